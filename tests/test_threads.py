"""Several threads decode and encode at once: the core releases the GIL, and none may see another's buffers."""

from __future__ import annotations

import threading
import time

from wire import EVERYTHING

from pfkey import DecodeError, decode, encode

SECONDS = 2.0


def test_threads_never_disagree() -> None:
    expected = [(one, decode(one.data, one.abi)) for one in EVERYTHING]
    faults: list[str] = []
    counts = [0] * 4
    end = time.monotonic() + SECONDS

    def work(number: int) -> None:
        while time.monotonic() < end and not faults:
            for one, message in expected[number::2]:
                again = decode(one.data, one.abi)
                if again._record != message._record or encode(again) != one.data:
                    faults.append(one.name)
                try:
                    decode(one.data[:-8], one.abi)
                    if len(one.data) > 16:
                        faults.append(f"{one.name}, cut")
                except DecodeError:
                    pass
                counts[number] += 1

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert faults == []
    assert min(counts) > 100
