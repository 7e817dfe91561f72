"""The house stands: every module imports only floors below it, and says in its first line what it is for."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import pfkey

PACKAGE = Path(pfkey.__file__).parent
MODULES = sorted(path for path in PACKAGE.rglob("*.py") if path.name not in ("_core.py", "__main__.py"))

# From the ground up.  What is imported inside a function is needed by those alone who call it.
FLOORS = (
    {"errors", "constants"},
    {"_numbers", "abi"},
    {"_selector", "messages", "extensions"},
    {"_record", "_values", "_rare", "codec", "tables", "_direct", "typed", "_sockets", "_ffi_build"},
    {"_declare", "_formats", "schema", "annotate"},
    {"conversation"},
    {"channel", "served", "refusals"},
    {"calls", "exchange", "sharing", "link", "async_link"},
    {"kernel", "aio"},
    {"embedded", "target"},
    {"assignment", "tracker"},
    {"guards", "overlaps", "book"},
    {"reading", "work", "guarding", "reorder", "recovery", "settle"},
    {"uses", "explain", "resync", "watch", "hostlock", "tracking"},
    {"keeper", "aio_tracker"},
    {"habits", "show", "hexdump", "stage", "demo", "cli"},
)
HEIGHT = {module: height for height, floor in enumerate(FLOORS) for module in floor}


def name(path: Path) -> str:
    """The module, or for one of a subpackage that."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported(path: Path) -> set[str]:
    """The modules of this package that a module imports when it is imported itself."""
    depth = len(path.relative_to(PACKAGE).parts) - 1
    found: set[str] = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.ImportFrom) and node.level == depth + 1:
            found |= {node.module.split(".")[0]} if node.module else {alias.name for alias in node.names}
    return found


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_a_module_imports_only_floors_below_or_its_own(path: Path) -> None:
    module = name(path)
    if module == "__init__":
        return
    assert module in HEIGHT, f"{module} has no floor: see CONTRIBUTING.md, then say here where it stands"
    for other in imported(path) - {"_core", "__version__"}:
        assert HEIGHT[other] <= HEIGHT[module], f"{module} imports {other}, which stands above it"


def test_no_two_modules_need_each_other() -> None:
    needs = {name(path): imported(path) - {"_core"} for path in MODULES if path.parent == PACKAGE}
    standing: set[str] = set()
    while ready := {
        module
        for module, needed in needs.items()
        if module not in standing and needed <= standing | {module, "embedded", "__version__"}
    }:
        standing |= ready
    assert standing == set(needs)


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_a_module_says_what_it_is_for(path: Path) -> None:
    text = ast.get_docstring(ast.parse(path.read_text()))
    assert text, f"{path.name} has no docstring"
    assert text.splitlines()[0].rstrip().endswith((".", ":", "?")), text.splitlines()[0]


def test_nothing_asks_which_system_it_is() -> None:
    """What differs is a field of Abi, named for what it does."""
    asking = [path.name for path in MODULES if ".name == " in path.read_text() and "abi.name" in path.read_text()]
    assert asking == []
