"""Hooks that wait for an import never get lost, and what must be installed is checked."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

from vllm_calidrop.hooks import on_import, wrap
from vllm_calidrop.hooks.on_import import require_awaited_modules, when_imported
from vllm_calidrop.hooks.wrap import SUPPORTED_VLLM, HookError, require_installed, require_wrapped, wrap_method


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """An importable package `calidrop_awaited_N` with a module `late`; nothing waits afterwards."""
    name = f"calidrop_awaited_{tmp_path.name.translate({ord('-'): '_'})}"
    (tmp_path / name).mkdir()
    (tmp_path / name / "__init__.py").write_text("")
    (tmp_path / name / "late.py").write_text("class Thing:\n    pass\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(on_import._finder, "waiting", on_import._finder.waiting.copy())
    return name


def test_a_module_that_was_only_looked_for_is_still_hooked(package: str) -> None:
    seen: list[ModuleType] = []
    when_imported(f"{package}.late", seen.append)
    for _ in range(2):
        assert importlib.util.find_spec(f"{package}.late") is not None
    assert seen == []
    module = importlib.import_module(f"{package}.late")
    assert seen == [module]
    importlib.reload(module)
    assert seen == [module], "it waits no longer"


def test_a_hook_that_failed_fails_again(package: str) -> None:
    """Code that swallows the first error and imports again must not get an unhooked module."""

    def failing(module: ModuleType) -> None:
        raise HookError("does not fit")

    when_imported(f"{package}.late", failing)
    for _ in range(2):
        with pytest.raises(HookError, match="does not fit"):
            importlib.import_module(f"{package}.late")
        assert f"{package}.late" not in sys.modules


@pytest.mark.parametrize("imported", [True, False])
def test_a_class_that_is_gone(package: str, imported: bool) -> None:
    """Whether the module was imported before the plugin or after."""

    def hook(module: ModuleType) -> None:
        wrap_method(module.Gone, "method", lambda original: original, ("self",))

    with pytest.raises(HookError) as refusal:
        if imported:
            importlib.import_module(f"{package}.late")
        when_imported(f"{package}.late", hook)
        importlib.import_module(f"{package}.late")
    assert f"{package}.late" in str(refusal.value) and "Gone" in str(refusal.value)
    assert SUPPORTED_VLLM in str(refusal.value)


def test_awaited_modules_must_exist(package: str) -> None:
    on_import._finder.waiting.clear()
    seen: list[ModuleType] = []
    when_imported(f"{package}.late", seen.append)
    require_awaited_modules()
    assert f"{package}.late" not in sys.modules, "looking is not importing"
    for gone in (f"{package}.renamed", f"{package}.moved.late", f"{package}_gone"):
        when_imported(gone, seen.append)
        with pytest.raises(HookError, match=f"module {gone} does not exist"):
            require_awaited_modules()
        del on_import._finder.waiting[gone]
    assert importlib.import_module(f"{package}.late") in seen


def test_required_symbols(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wrap, "_installed", {"a.B.c": wrap.Hook("a.B.c", "here")})
    require_installed(())
    require_installed(("a.B.c",))
    with pytest.raises(HookError, match=r"a\.B\.d, a\.B\.e") as refusal:
        require_installed(("a.B.d", "a.B.c", "a.B.e"))
    assert "a.B.c" not in str(refusal.value)


class Base:
    def method(self) -> int:
        return 1


class Overriding(Base):
    def method(self) -> int:
        return 2


def test_what_instances_use_must_be_wrapped() -> None:
    for name in ("method", "gone"):
        with pytest.raises(HookError, match=rf"Base\.{name} is not wrapped"):
            require_wrapped(Base, name)
    wrap_method(Base, "method", lambda original: lambda self: original(self), ("self",))
    require_wrapped(Base, "method")
    require_wrapped(type("Inheriting", (Base,), {}), "method")
    with pytest.raises(HookError, match=r"Overriding\.method is not wrapped"):
        require_wrapped(Overriding, "method")
