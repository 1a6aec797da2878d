"""What of vLLM this package touches, and which of our files does.

Four kinds are found: names that our modules import from vLLM, methods of vLLM's classes that ours override, what the
hooks wrap, and the methods that the hooks' mixins come before. What the code reads off vLLM's objects without naming
their classes (`worker.model_runner`) is not found; tests with real engines are there for that.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import sys
import types
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
PACKAGES = ("vllm_calidrop", "server")

# Symbol -> our files. A symbol is `module:name` or `module:Class.method`.
Touched = dict[str, set[str]]


def touched() -> Touched:
    """Everything of the four kinds. It imports vLLM, for the hooks say what they wrap when their modules are there."""
    symbols: Touched = defaultdict(set)
    for path in _our_files():
        file = str(path.relative_to(ROOT))
        tree = ast.parse(path.read_text())
        names = dict(_imported(tree))
        for symbol in names.values():
            symbols[symbol].add(file)
        for symbol in _overridden(tree, names):
            symbols[symbol].add(file)
    for symbol, file in [*_wrapped(), *_mixed()]:
        symbols[symbol].add(file)
    return dict(sorted(symbols.items()))


def derived_classes() -> dict[str, list[tuple[str, str, list[str]]]]:
    """For each class of vLLM that classes of ours name as a base: file, our class, and the methods that it defines."""
    derived: dict[str, list[tuple[str, str, list[str]]]] = defaultdict(list)
    for path in _our_files():
        tree = ast.parse(path.read_text())
        names = dict(_imported(tree))
        for node, base in _classes_on(tree, names):
            defined = [child.name for child in node.body if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef)]
            derived[base].append((str(path.relative_to(ROOT)), node.name, defined))
    return derived


def _our_files() -> Iterator[Path]:
    for package in PACKAGES:
        yield from sorted((ROOT / package).rglob("*.py"))


def _imported(tree: ast.Module) -> Iterator[tuple[str, str]]:
    """(the name here, `module:name` in vLLM)."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.level == 0 and (node.module or "").split(".")[0] == "vllm":
            for alias in node.names:
                yield alias.asname or alias.name, f"{node.module}:{alias.name}"


def _classes_on(tree: ast.Module, names: dict[str, str]) -> Iterator[tuple[ast.ClassDef, str]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef):
            for base in node.bases:
                if isinstance(base, ast.Name) and base.id in names:
                    yield node, names[base.id]


def _overridden(tree: ast.Module, names: dict[str, str]) -> Iterator[str]:
    for node, base in _classes_on(tree, names):
        for child in node.body:
            if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
                yield f"{base}.{child.name}"


def _wrapped() -> Iterator[tuple[str, str]]:
    from vllm_calidrop import hooks
    from vllm_calidrop.hooks import on_import, wrap

    hooks.install_engine_hooks()
    hooks.install_api_hooks()
    # vllm.platforms.cuda wants an extension of vLLM's CUDA build.
    sys.modules.setdefault("vllm._C_stable_libtorch", types.ModuleType("of vLLM's CUDA build"))
    for name in list(on_import._finder.waiting):
        importlib.import_module(name)
    for hook in wrap.installed_hooks():
        owner: Any = hook.owner
        if not getattr(owner, "__module__", owner.__name__).startswith("vllm."):
            continue  # a test's
        file = hook.wrapper.rpartition(".")[0].replace(".", "/") + ".py"
        if inspect.ismodule(owner):
            yield f"{owner.__name__}:{hook.name}", file
        else:
            yield f"{owner.__module__}:{owner.__qualname__}.{hook.name}", file


def _mixed() -> Iterator[tuple[str, str]]:
    from vllm_calidrop.hooks.engine import kv_cache_manager, scheduler, worker

    for part in (kv_cache_manager, scheduler, worker):
        for path in part.MIXTURE.usual:
            module, _, cls = path.rpartition(".")
            for method in part.MIXTURE.methods:
                yield f"{module}:{cls}.{method}", part.__name__.replace(".", "/") + ".py"
