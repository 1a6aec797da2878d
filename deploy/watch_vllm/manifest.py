"""What the touched symbols look like in one release of vLLM, and how two releases differ in them."""

from __future__ import annotations

import ast
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .source import Source, body_hash, signature

FOLDER = Path(__file__).with_name("manifests")
Entry = dict[str, Any]
Manifest = dict[str, Entry]


@dataclass(frozen=True)
class Change:
    """One difference. breaks: our code cannot work unless it has been changed already; otherwise it should be read."""

    symbol: str
    what: str
    files: tuple[str, ...]
    breaks: bool


def describe(source: Source, symbols: Mapping[str, Iterable[str]]) -> Manifest:
    """The entries of these symbols in a release. symbols: for each one which of our files touch it.

    One that the release does not have gets the entry {"missing": true}.
    """
    return {symbol: _entry(source, symbol) | {"used_by": sorted(files)} for symbol, files in symbols.items()}


def files_of(manifest: Manifest) -> dict[str, list[str]]:
    """Which of our files touch a symbol."""
    return {symbol: entry["used_by"] for symbol, entry in manifest.items()}


def read(version: str) -> Manifest:
    """The committed manifest of a tested release. FileNotFoundError where there is none."""
    manifest: Manifest = json.loads((FOLDER / f"{version}.json").read_text())
    return manifest


def write(version: str, manifest: Manifest) -> None:
    lines = (f"{json.dumps(symbol)}: {json.dumps(entry, sort_keys=True)}" for symbol, entry in sorted(manifest.items()))
    (FOLDER / f"{version}.json").write_text("{\n" + ",\n".join(lines) + "\n}\n")


def compare(old: Manifest, new: Manifest) -> list[Change]:
    """The differences between two releases in the symbols of the older one's manifest, in their order."""
    changes = []
    for symbol, before in sorted(old.items()):
        after = new.get(symbol, {"missing": True})
        for what, breaks in _differences(before, after):
            changes.append(Change(symbol, what, tuple(before["used_by"]), breaks))
    return changes


def _differences(before: Entry, after: Entry) -> Iterable[tuple[str, bool]]:
    if after.get("missing"):
        if not before.get("missing"):
            yield "it is gone", True
        return
    if before.get("missing"):
        yield "it is new", False
        return
    old, new = before.get("signature"), after.get("signature")
    if old != new:
        yield f"its parameters were ({old}) and are ({new})", not _only_optional_ones_added(old, new)
    if before.get("body") != after.get("body"):
        yield "its code has changed", False
    if before.get("defined_by") != after.get("defined_by"):
        yield f"it was defined by {before.get('defined_by')} and is defined by {after.get('defined_by')}", False
    new_demands = sorted(set(after.get("abstract", [])) - set(before.get("abstract", [])))
    if new_demands:
        yield f"a class derived from it must now define {', '.join(new_demands)}", True
    dropped = sorted(set(before.get("abstract", [])) - set(after.get("abstract", [])))
    if dropped:
        yield f"a class derived from it need not define {', '.join(dropped)} any more", False
    added = sorted(set(after.get("overrides", [])) - set(before.get("overrides", [])))
    if added:
        yield f"it is now overridden by {', '.join(added)}", False
    lost = sorted(set(before.get("overrides", [])) - set(after.get("overrides", [])))
    if lost:
        yield f"it is no longer overridden by {', '.join(lost)}", False


def _only_optional_ones_added(old: str | None, new: str | None) -> bool:
    """Whether every call that fitted the old parameters fits the new ones."""
    if old is None or new is None or not new.startswith(old):
        return False
    added = [part for part in new.removeprefix(old).split(", ") if part]
    return all("=" in part or part.startswith("*") for part in added)


def _entry(source: Source, symbol: str) -> Entry:
    module, _, name = symbol.partition(":")
    owner, _, method = name.partition(".")
    found = source.find(module, owner)
    if found is None:
        # A module inside the package, or a name that the module makes on demand (`from vllm import LLM`).
        is_module = source.tree(f"{module}.{name}") is not None
        on_demand = source.find(module, "__getattr__") is not None and f'"{name}"' in (source.text(module) or "")
        return {"kind": "other"} if is_module or on_demand else {"missing": True}
    node = found.node
    if not method:
        if isinstance(node, ast.ClassDef):
            return {"kind": "class", "abstract": source.abstract_methods(found)}
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            return {"kind": "function", "signature": signature(node), "body": body_hash(node)}
        return {"kind": "value", "body": body_hash(node)}
    if not isinstance(node, ast.ClassDef) or (at := source.method(found, method)) is None:
        return {"missing": True}
    cls, function = at
    return {
        "kind": "method",
        "signature": signature(function),
        "body": body_hash(function),
        "defined_by": cls.name,
        "overrides": source.overrides(found, method),
    }
