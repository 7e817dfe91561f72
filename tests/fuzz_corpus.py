"""What the fuzz targets in csrc/fuzz start from: `python tests/fuzz_corpus.py FOLDER` writes abis.h and the corpora.

Every wire case and every recorded message becomes a file, in both byte orders; its first byte says whose it is.
"""

from __future__ import annotations

import hashlib
import sys
from pathlib import Path

from wire import EVERYTHING, mirrored

from pfkey import Abi
from pfkey.codec import core_slots

NAMES = ("linux", "freebsd-9", "freebsd-12", "freebsd-15", "netbsd", "macos")
ABIS = [Abi.named(f"{name}-{order}") for order in ("little", "big") for name in NAMES]


def header() -> str:
    """The Abi tables as C."""
    rows = []
    for abi in ABIS:
        slots = ", ".join(f"[{number}] = {slot}" for number, slot in sorted(core_slots(abi).items()) if slot)
        rows.append(
            f"\t{{ .big_endian = {int(abi.byteorder == 'big')}, .sockaddr_has_length = {int(abi.sockaddr_has_length)},"
            f" .request_size = {abi.request_size}, .af_inet = {abi.af_inet}, .af_inet6 = {abi.af_inet6},"
            f"\n\t  .slot = {{ {slots} }} }},\t/* {abi}, {abi.byteorder}-endian */"
        )
    return "\n".join(["static const struct pfk_abi abis[] = {", *rows, "};", ""])


def inputs() -> list[tuple[int, bytes]]:
    """(number of the Abi, message): what each of the systems of that message's kind may be sent."""
    found = []
    for one in EVERYTHING:
        for data, order in ((one.data, "little"), (mirrored(one.data, one.abi), "big")):
            found += [
                (number, data)
                for number, abi in enumerate(ABIS)
                if abi.byteorder == order and abi.name == one.abi.name and (not abi.release or abi.release >= (12,))
            ]
    return found


def write(folder: Path) -> None:
    """abis.h, and a folder of inputs for each target."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "abis.h").write_text(header())
    singles, batches = folder / "single", folder / "batch"
    for place in (singles, batches):
        place.mkdir(exist_ok=True)
    found = inputs()
    for number, data in found:
        _put(singles, bytes((number,)) + data)
    for (number, first), (other, second) in zip(found, found[2:], strict=False):
        if number == other:
            lengths = b"".join(len(data).to_bytes(2, "little") for data in (first, second))
            _put(batches, bytes((number, 2)) + lengths + first + second)


def _put(folder: Path, data: bytes) -> None:
    (folder / hashlib.sha256(data).hexdigest()[:24]).write_bytes(data)


if __name__ == "__main__":
    write(Path(sys.argv[1]))
