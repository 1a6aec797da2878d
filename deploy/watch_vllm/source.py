"""vLLM's Python files, read without importing them: from a wheel or from an installed folder.

A release that is newer than the environment cannot be imported here, so everything is taken from the syntax trees.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import re
import zipfile
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# Models and other people's packages inside vLLM have no class that we touch, and are two thirds of the text.
_OURS_MAY_USE = re.compile(r"vllm/(?!third_party/|model_executor/models/|transformers_utils/).*\.py$")

Definition = ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef | ast.Assign | ast.AnnAssign


@dataclass(frozen=True)
class Found:
    """A name of a module, where it is really defined: the module's name and the syntax tree's node."""

    module: str
    node: Definition

    @property
    def name(self) -> str:
        node = self.node
        return f"{self.module}.{node.name}" if not isinstance(node, ast.Assign | ast.AnnAssign) else self.module


class Source:
    """The package `vllm` in a wheel or in a folder that has it (a site-packages)."""

    def __init__(self, place: Path) -> None:
        self._archive = zipfile.ZipFile(place) if place.is_file() else None
        self._folder = place
        if self._archive is not None:
            names = self._archive.namelist()
        else:
            names = [str(path.relative_to(place)) for path in (place / "vllm").rglob("*.py")]
        self._files = {_module_of(name): name for name in names if _OURS_MAY_USE.match(name)}

    def text(self, module: str) -> str | None:
        name = self._files.get(module)
        if name is None:
            return None
        raw = self._archive.read(name) if self._archive is not None else (self._folder / name).read_bytes()
        return raw.decode()

    @functools.cache  # noqa: B019  (a source lives as long as the command)
    def tree(self, module: str) -> ast.Module | None:
        text = self.text(module)
        return None if text is None else ast.parse(text)

    def find(self, module: str, name: str) -> Found | None:
        """The definition of `module.name`, followed through `from ... import`; None where there is none to be seen."""
        tree = self.tree(module)
        if tree is None:
            return None
        for node in _statements(tree):
            if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and node.name == name:
                return Found(module, node)
            if isinstance(node, ast.Assign) and any(isinstance(t, ast.Name) and t.id == name for t in node.targets):
                return Found(module, node)
            if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and node.target.id == name:
                return Found(module, node)
        for node in _statements(tree):
            if isinstance(node, ast.ImportFrom):
                for alias in node.names:
                    if (alias.asname or alias.name) == name:
                        return self.find(self._absolute(module, node), alias.name)
        return None

    def bases(self, found: Found) -> list[Found]:
        """The base classes that are vLLM's own."""
        assert isinstance(found.node, ast.ClassDef)
        bases = [base.value if isinstance(base, ast.Subscript) else base for base in found.node.bases]
        named = [self.find(found.module, base.id) for base in bases if isinstance(base, ast.Name)]
        return [base for base in named if base is not None and isinstance(base.node, ast.ClassDef)]

    def lineage(self, found: Found) -> list[Found]:
        """The class and all its ancestors in vLLM, nearest first."""
        line = [found]
        for base in self.bases(found):
            line += [ancestor for ancestor in self.lineage(base) if ancestor not in line]
        return line

    def method(self, found: Found, name: str) -> tuple[Found, ast.FunctionDef | ast.AsyncFunctionDef] | None:
        """The method that instances of the class use, and the class that defines it."""
        for cls in self.lineage(found):
            for node in methods(cls.node):
                if node.name == name:
                    return cls, node
        return None

    def abstract_methods(self, found: Found) -> list[str]:
        """What a class derived from this one must define."""
        decided: dict[str, bool] = {}
        for cls in self.lineage(found):
            for node in methods(cls.node):
                marks = {ast.unparse(mark).rpartition(".")[2] for mark in node.decorator_list}
                decided.setdefault(node.name, "abstractmethod" in marks)
        return sorted(name for name, abstract in decided.items() if abstract)

    def overrides(self, found: Found, method: str) -> list[str]:
        """The classes of vLLM below this one that have a method of this name themselves."""
        return sorted(
            below.name for below in self._below(found) if any(node.name == method for node in methods(below.node))
        )

    def _below(self, found: Found) -> list[Found]:
        assert isinstance(found.node, ast.ClassDef)
        direct: list[Found] = []
        for module in self._modules_with_a_class_of(found.node.name):
            tree = self.tree(module)
            assert tree is not None
            for node in ast.walk(tree):
                if isinstance(node, ast.ClassDef) and node is not found.node:
                    candidate = Found(module, node)
                    if any(base.name == found.name for base in self.bases(candidate)):
                        direct.append(candidate)
        return direct + [lower for cls in direct for lower in self._below(cls)]

    def _modules_with_a_class_of(self, base: str) -> list[str]:
        return sorted(self._modules_by_base.get(base, ()))

    @functools.cached_property
    def _modules_by_base(self) -> dict[str, set[str]]:
        """For each name that is written as a base class somewhere: the modules that do. One pass over all texts."""
        modules: dict[str, set[str]] = defaultdict(set)
        for module in self._files:
            for bases in re.findall(r"^\s*class \w+\(([^)]*)\)", self.text(module) or "", re.MULTILINE):
                for base in re.findall(r"\w+", bases):
                    modules[base].add(module)
        return modules

    def _absolute(self, module: str, node: ast.ImportFrom) -> str:
        if node.level == 0:
            return node.module or ""
        parts = module.split(".")
        if not self._files[module].endswith("__init__.py"):
            parts = parts[:-1]
        parts = parts[: len(parts) - node.level + 1]
        return ".".join([*parts, *([node.module] if node.module else [])])


def methods(node: Any) -> list[ast.FunctionDef | ast.AsyncFunctionDef]:
    """The functions in the body of a class."""
    return [child for child in node.body if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef)]


def signature(node: ast.FunctionDef | ast.AsyncFunctionDef) -> str:
    """The parameters as they are written, without annotations: `self, request, num_tokens=0`."""
    arguments = node.args
    bare = ast.arguments(
        posonlyargs=[ast.arg(a.arg) for a in arguments.posonlyargs],
        args=[ast.arg(a.arg) for a in arguments.args],
        vararg=ast.arg(arguments.vararg.arg) if arguments.vararg else None,
        kwonlyargs=[ast.arg(a.arg) for a in arguments.kwonlyargs],
        kw_defaults=arguments.kw_defaults,
        kwarg=ast.arg(arguments.kwarg.arg) if arguments.kwarg else None,
        defaults=arguments.defaults,
    )
    return ast.unparse(bare)


def body_hash(node: Definition) -> str:
    """16 hexadecimal digits that change with the code, and not with comments, docstrings or line breaks."""
    if isinstance(node, ast.Assign | ast.AnnAssign):
        dumped = ast.dump(node)
    else:
        body = node.body
        first = body[0]
        if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant) and isinstance(first.value.value, str):
            body = body[1:]
        dumped = "".join(ast.dump(statement) for statement in body)
    return hashlib.sha256(dumped.encode()).hexdigest()[:16]


def _module_of(file: str) -> str:
    return file.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


def _statements(tree: ast.Module) -> list[ast.stmt]:
    """The module's own statements, and those inside its `if` and `try`."""
    found: list[ast.stmt] = []
    pending: list[ast.stmt] = list(tree.body)
    while pending:
        node = pending.pop(0)
        if isinstance(node, ast.If | ast.Try):
            pending = [*node.body, *node.orelse, *getattr(node, "finalbody", []), *pending]
            for handler in getattr(node, "handlers", []):
                pending += handler.body
        else:
            found.append(node)
    return found
