"""What only time shows: `python benchmarks/soak.py [--decodes N] [--seconds N]`.

A table of 100,000 SAs fits in 100 MB, memory stays flat over ten million decodes, and two threads decoding for a minute
never disagree with one.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import resource
import sys
import threading
import time
from pathlib import Path

from pfkey import Abi, DecodeError, decode, decode_many, encode

DATA = Path(__file__).parent.parent / "tests" / "data"
PAGE = resource.getpagesize()


def messages() -> list[tuple[bytes, Abi]]:
    """Everything that two real kernels said."""
    found = []
    for file, abi in (("linux-6.1", Abi.linux("little")), ("freebsd-12.1", Abi.freebsd(12, "little"))):
        for exchange in json.loads((DATA / f"{file}.json").read_text())["exchanges"]:
            found += [(bytes.fromhex(line), abi) for line in exchange["recv"]]
    return found


def resident() -> int:
    """Bytes of memory in use, or the most that ever were where the system does not tell."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * PAGE
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def turn(said: list[tuple[bytes, Abi]]) -> int:
    """Each message decoded and encoded, cut and refused, alone and in a batch; how many decodes that was."""
    for data, abi in said:
        message = decode(data, abi)
        if encode(message) != data or (not message.extensions and len(data) > 16):
            raise AssertionError(data.hex())
        with contextlib.suppress(DecodeError):
            decode(data[:-4], abi)
    for abi in {abi for _, abi in said}:
        len(decode_many([data for data, whose in said if whose == abi], abi))
    return 3 * len(said)


def memory(decodes: int) -> int:
    """Print the memory at the beginning and at the end; 1 when it grew."""
    said = messages()
    done = 0
    for _ in range(200):
        done += turn(said)
    gc.collect()
    before, least = resident(), done
    while done - least < decodes:
        done += turn(said)
    gc.collect()
    grown = resident() - before
    print(f"{done - least} decodes: {before / 1e6:.1f} MB before, {grown / 1e3:+.0f} kB after")
    return int(grown > 1 << 20)


def table() -> int:
    """Print what a table of 100,000 SAs takes; 1 when that is 100 MB or more."""
    data = max((data for data, abi in messages() if abi.name == "linux"), key=len)
    datagrams = [bytes(bytearray(data)) for _ in range(100_000)]
    before, start = resident(), time.perf_counter()
    found = decode_many(datagrams, Abi.linux("little"))
    seconds, size = time.perf_counter() - start, resident() - before
    print(f"{len(found)} messages of {len(data)} bytes: {size / 1e6:.0f} MB, {seconds * 1e3:.0f} ms")
    return int(size >= 100e6)


def threads(seconds: float) -> int:
    """Print how often two threads agreed with one; 1 when they did not."""
    expected = [(data, abi, decode(data, abi)) for data, abi in messages()]
    wrong: list[str] = []
    counts = [0, 0]
    end = time.monotonic() + seconds

    def work(which: int) -> None:
        while time.monotonic() < end and not wrong:
            for data, abi, message in expected:
                if decode(data, abi) != message:
                    wrong.append(data.hex())
                counts[which] += 1

    running = [threading.Thread(target=work, args=(which,)) for which in range(2)]
    for one in running:
        one.start()
    for one in running:
        one.join()
    print(f"{sum(counts)} decodes by two threads in {seconds:.0f} s: {len(wrong)} differ from one thread's")
    return int(bool(wrong))


def main() -> int:
    """All of it, with what the command line says."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--decodes", type=int, default=10_000_000)
    parser.add_argument("--seconds", type=float, default=60)
    arguments = parser.parse_args()
    return table() | memory(arguments.decodes) | threads(arguments.seconds)


if __name__ == "__main__":
    sys.exit(main())
