"""Compiles the C core: the declarations that cffi needs are read from the core's own header."""

from __future__ import annotations

import os
import re
from pathlib import Path

from cffi import FFI

ROOT = Path(__file__).resolve().parent.parent
SOURCES = ["csrc/decode.c", "csrc/encode.c", "csrc/socket.c"]
HEADERS = ["csrc/pfk.h", "csrc/wire.h"]


def declarations() -> str:
    """pfk.h without comments and directives, its constants put in."""
    text = (ROOT / "csrc" / "pfk.h").read_text(encoding="utf-8")
    text = re.sub(r"/\*.*?\*/", "", text, flags=re.DOTALL)
    constants = dict(re.findall(r"^#define (\w+) (\d+)$", text, flags=re.MULTILINE))
    text = re.sub(r"^#.*$", "", text, flags=re.MULTILINE)
    for name, value in constants.items():
        text = re.sub(rf"\b{name}\b", value, text)
    return text + "".join(f"#define {name} {value}\n" for name, value in constants.items())


def compile_arguments() -> tuple[list[str], list[str]]:
    """Flags for the compiler and the linker.

    PFKEY_WERROR=1 makes warnings errors, PFKEY_SANITIZE=1 builds with the address and undefined-behaviour sanitizers.
    """
    compiler = ["-std=c11", "-Wall", "-Wextra"]
    linker: list[str] = []
    if os.environ.get("PFKEY_WERROR"):
        compiler.append("-Werror")
    if os.environ.get("PFKEY_SANITIZE"):
        sanitizers = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-g", "-O1"]
        compiler += sanitizers
        linker += sanitizers[:1]
    return compiler, linker


ffibuilder = FFI()
ffibuilder.cdef(declarations())
_compiler, _linker = compile_arguments()
ffibuilder.set_source(
    "pfkey._core",
    '#include "pfk.h"',
    sources=SOURCES,
    include_dirs=["csrc"],
    depends=HEADERS,
    extra_compile_args=_compiler,
    extra_link_args=_linker,
)

if __name__ == "__main__":
    ffibuilder.compile(verbose=True)
