"""Run where there is a PF_KEY (user-mode Linux will do): what a dump of 5,000 policies costs, as JSON on stdout.

A loop of recv() that decodes nothing against `dump_policies()`, by turns, so that both meet the same kernel.
"""

from __future__ import annotations

import json
import os
import sys
import time

from pfkey import Action, Direction, Kernel, Message, MessageType, Policy, Selector, connect, encode
from pfkey.channel import NativeChannel
from pfkey.typed import policy_message

POLICIES = 5000


def fill(kernel: Kernel) -> None:
    """So many policies."""
    wanted = [
        Policy(Direction.OUT, Selector(f"10.{n >> 8}.{n & 255}.0/24", "172.16.0.0/12"), Action.DISCARD, priority=n)
        for n in range(POLICIES)
    ]
    kernel.flush_policies()
    kernel.request_many(policy_message(MessageType.SPDADD, policy, kernel.abi) for policy in wanted)


def received(channel: NativeChannel) -> int:
    """A loop as a script has it: one recv() for each message, up to the one with seq 0."""
    channel.send(encode(Message(MessageType.SPDDUMP, abi=channel.abi, seq=1, pid=os.getpid())))
    receive, count = channel._socket.recv, 1
    while receive(65536)[8:12] != b"\0\0\0\0":
        count += 1
    return count


def main() -> int:
    """Measure both, print the seconds for one entry."""
    kernel = connect()
    fill(kernel)
    channel = NativeChannel()  # opened now, so that it has not heard of the policies
    loop, ours, rows = [], [], []
    for _ in range(12):
        start = time.perf_counter()
        if received(channel) != POLICIES:
            raise AssertionError("the loop lost something")
        loop.append(time.perf_counter() - start)
        start = time.perf_counter()
        found = kernel.dump_policies()
        if len(found) != POLICIES or found.column("priority")[0] not in range(POLICIES):
            raise AssertionError("the dump lost something")
        ours.append(time.perf_counter() - start)
        start = time.perf_counter()
        if sum(1 for _ in found.select("priority", "policy_id")) != POLICIES:
            raise AssertionError
        rows.append(time.perf_counter() - start)
    kernel.flush_policies()
    print(json.dumps({"loop": min(loop) / POLICIES, "dump": min(ours) / POLICIES, "select": min(rows) / POLICIES}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
