"""The packages' arrows, read from the sources: who may import whom, no circle, and where vLLM may be imported."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = "vllm_calidrop"

# A package may import those after it, and what TOP allows of the modules at the top level.
ORDER = ("hooks", "attention", "worker", "scheduler", "ops", "settings", "evicted", "algorithm")
TOP = {
    "plugin": ("hooks",),
    "support": ("selection", "ops", "settings", "evicted"),
    "memory": ("records", "settings", "evicted", "algorithm"),
    "records": (),
    "metrics": (),
    "selection": (),
    "compat": (),
    "forcing": (),
}
MAY_IMPORT_TOP = {
    "hooks": set(TOP) - {"plugin"},
    "attention": {"support", "selection", "records"},
    "worker": {"memory", "records", "metrics", "support"},
    "scheduler": {"memory", "records", "metrics", "support"},
    "ops": {"records", "metrics"},
    "settings": set(),
    "evicted": {"records"},
    "algorithm": set(),
}
# Modules outside of hooks/ and attention/ that import vLLM, because they are of it or must ask it.
OF_VLLM = {
    "scheduler.block_manager",  # vLLM's manager, derived
    "scheduler.spec",  # vLLM's spec, derived
    "scheduler.ledger", "scheduler.living", "scheduler.full_pool", "scheduler.headroom",  # the type of a request
    "ops.packed",  # vLLM's packed CPU cache is written by vLLM's own operator
    "ops.flavour", "support",  # which platform this is
    "evicted.pinned_pool",  # whether the GPU sees pinned host memory
    "forcing",  # a logits processor
}  # fmt: skip


def sources(package: str) -> list[tuple[str, ast.Module]]:
    """Dotted names below `package`, and their syntax."""
    folder = ROOT / package
    found = []
    for path in sorted(folder.rglob("*.py")):
        parts = path.relative_to(folder).with_suffix("").parts
        found.append((".".join(part for part in parts if part != "__init__"), ast.parse(path.read_text())))
    return found


def imported(tree: ast.Module) -> Iterator[str]:
    """Every module that is imported anywhere in a source, inside functions and for types too."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def ours(tree: ast.Module) -> set[str]:
    """The packages and top-level modules of ours that are imported."""
    return {name.split(".")[1] for name in imported(tree) if name.startswith(f"{PACKAGE}.")}


MODULES = sources(PACKAGE)


@pytest.mark.parametrize(("module", "tree"), MODULES, ids=[name for name, _ in MODULES])
def test_arrows(module: str, tree: ast.Module) -> None:
    home = module.split(".")[0]
    if "." in module or home in ORDER:
        allowed = {home, *ORDER[ORDER.index(home) + 1 :], *MAY_IMPORT_TOP[home]}
        if home == "worker":
            allowed.discard("scheduler")  # they live in different processes
    else:
        allowed = set(TOP.get(home, ()))
    assert ours(tree) <= allowed, ours(tree) - allowed


def test_no_circle_between_packages_and_top_level_modules() -> None:
    arrows: dict[str, set[str]] = {}
    for module, tree in MODULES:
        home = module.split(".")[0]
        arrows.setdefault(home, set()).update(ours(tree) - {home})
    while free := [name for name, targets in arrows.items() if not targets & arrows.keys()]:
        for name in free:
            del arrows[name]
    assert not arrows, arrows


def test_vllm_is_imported_where_it_must_be() -> None:
    importing = {
        module
        for module, tree in MODULES
        if any(name.split(".")[0] == "vllm" for name in imported(tree))
        and module.split(".")[0] not in ("hooks", "attention")
    }
    assert importing == OF_VLLM


def test_the_engine_knows_no_server() -> None:
    for module, tree in MODULES:
        named = {name.split(".")[0] for name in imported(tree)}
        assert not named & {"server", "vllm_calidrop_server", "benchmarks", "tests"}, module


def test_the_top_level_holds_only_what_belongs_there() -> None:
    found = {path.stem for path in (ROOT / PACKAGE).glob("*.py")} - {"__init__"}
    assert found == set(TOP)
    assert {path.name for path in (ROOT / PACKAGE).iterdir() if (path / "__init__.py").exists()} == set(ORDER)
