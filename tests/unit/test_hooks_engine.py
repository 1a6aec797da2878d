"""Hooks that wait for an import never get lost, and what must be installed is checked."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import logging
import pkgutil
import re
import sys
from abc import ABC, abstractmethod
from pathlib import Path
from types import ModuleType

import pytest

from vllm_calidrop import compat
from vllm_calidrop.compat import SUPPORTED_VLLM, TESTED_VLLM
from vllm_calidrop.hooks import on_import, wrap
from vllm_calidrop.hooks.on_import import require_awaited_modules, when_imported
from vllm_calidrop.hooks.wrap import (
    HookError,
    require_installed,
    require_instantiable,
    require_wraps_in_use,
    wrap_method,
)


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

    def hook(module: ModuleType) -> None:
        seen.append(module)

    when_imported(f"{package}.late", hook)
    require_awaited_modules()
    assert f"{package}.late" not in sys.modules, "looking is not importing"
    for gone in (f"{package}.renamed", f"{package}.moved.late", f"{package}_gone"):
        when_imported(gone, hook)
        with pytest.raises(HookError, match=f"module {gone} does not exist"):
            require_awaited_modules()
        del on_import._finder.waiting[gone]
    assert importlib.import_module(f"{package}.late") in seen


def test_required_symbols(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wrap, "_installed", {"a.B.c": wrap.Hook("a.B.c", "here", None, "c")})
    require_installed((), "us")
    require_installed(("a.B.c",), "us")
    with pytest.raises(HookError, match=r"a\.B\.d, a\.B\.e") as refusal:
        require_installed(("a.B.d", "a.B.c", "a.B.e"), "our.module")
    assert "a.B.c" not in str(refusal.value) and "our/module.py" in str(refusal.value)


class Base:
    def method(self) -> int:
        return 1


class Inheriting(Base):
    pass


class CallingOn(Base):
    def method(self) -> int:
        return 2 * super().method()


class CallingOnByName(CallingOn):
    def method(self) -> int:
        return 2 * Base.method(self)


class Bypassing(CallingOn):
    def method(self) -> int:
        return 2


class BypassingToo(Bypassing):
    def method(self) -> int:
        return super().method() + 1


def test_a_wrap_that_instances_do_not_run_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wrap, "_installed", {})
    monkeypatch.setattr(Base, "method", Base.method)
    wrap_method(Base, "method", lambda original: lambda self: 10 * original(self), ("self",))
    for cls in (object, Base, Inheriting, CallingOn, CallingOnByName):
        require_wraps_in_use(cls)
    assert Inheriting().method() == 10 and CallingOn().method() == CallingOnByName().method() == 20
    assert Bypassing().method() == 2, "the wrap does not run"
    for cls in (Bypassing, BypassingToo):
        with pytest.raises(HookError, match=r"Bypassing\.method takes the place of .*Base\.method"):
            require_wraps_in_use(cls)


class Demanding(ABC):
    @abstractmethod
    def old(self) -> None: ...

    @abstractmethod
    def new_in_the_next_version(self) -> None: ...


def test_a_class_of_ours_that_lacks_an_abstract_method() -> None:
    class Ours(Demanding):
        def old(self) -> None: ...

    with pytest.raises(HookError, match=r"Demanding demands new_in_the_next_version, which .*Ours does not have"):
        require_instantiable(Ours)
    require_instantiable(type("Whole", (Ours,), {"new_in_the_next_version": lambda self: None}))


def test_every_class_derived_from_one_of_vllms_is_whole_and_is_checked() -> None:
    """What is checked at start-up is read from the places that check; this finds a class that they forgot."""
    import vllm_calidrop
    from vllm_calidrop.attention.backend import CaliDropBackend
    from vllm_calidrop.hooks.engine import pending_output
    from vllm_calidrop.scheduler import block_manager, spec

    derived = set()
    for found in pkgutil.walk_packages(vllm_calidrop.__path__, f"{vllm_calidrop.__name__}."):
        if re.search(r"cuda|triton|xformers|plugin", found.name):
            continue  # they need a GPU, or are the entry point
        module = importlib.import_module(found.name)
        for cls in vars(module).values():
            ours = inspect.isclass(cls) and cls.__module__ == found.name
            if ours and any(base.__module__.startswith("vllm.") for base in cls.__mro__):
                derived.add(cls)
    for cls in derived:
        require_instantiable(cls)
    from vllm_calidrop.forcing import ForcedTokens
    from vllm_calidrop.hooks.api.retry import PoolFullError

    # vLLM makes the former when an engine starts, for evaluations only; the latter is a plain exception.
    need_no_check = {ForcedTokens, PoolFullError}
    checked = {
        CaliDropBackend,
        CaliDropBackend.get_builder_cls(),
        CaliDropBackend.get_impl_cls(),
        pending_output.PendingOutput,
        block_manager.CaliDropManager,
        spec.CaliDropSpec,
    }
    assert derived == checked | need_no_check


def test_a_pending_output_passes_on_what_vllm_asks_for() -> None:
    from vllm_calidrop.hooks.engine.pending_output import PendingOutput

    class Output:
        def get_output(self) -> dict[str, int]:
            return {}

        def get_kv_connector_output(self) -> str:
            return "saved"

    pending = PendingOutput(Output(), lambda finished: finished.update(counters=1))  # type: ignore[arg-type]
    assert pending.get_output() == {"counters": 1}
    assert pending.get_kv_connector_output() == "saved"


@pytest.mark.parametrize(
    ("installed", "allowed", "warns", "refuses"),
    [
        *((version, False, False, False) for version in TESTED_VLLM),
        (f"{TESTED_VLLM[0]}+cpu", False, False, False),
        ("0.33.1", False, True, False),
        ("0.31.0", False, True, False),
        ("0.33.1.dev20+gabcdef", False, True, False),
        ("unknown", False, True, False),
        ("0.34.0", False, False, True),
        ("0.34.0rc1", False, False, True),
        ("1.0", False, False, True),
        ("0.34.0", True, True, False),
    ],
)
def test_versions(
    installed: str,
    allowed: bool,
    warns: bool,
    refuses: bool,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    compat._check.cache_clear()
    monkeypatch.setattr(compat, "installed_vllm_version", lambda: installed)
    monkeypatch.setattr(logging.getLogger("vllm"), "propagate", True)
    if allowed:
        monkeypatch.setenv(compat.ALLOW_VARIABLE, "1")
    if refuses:
        with pytest.raises(compat.VersionError) as refusal:
            compat.check_vllm_version()
        for said in (installed, SUPPORTED_VLLM, *TESTED_VLLM, compat.ALLOW_VARIABLE):
            assert said in str(refusal.value)
        return
    for _ in range(3):
        compat.check_vllm_version()
    said = [record.message for record in caplog.records]
    assert len(said) == warns, said
    assert all(installed in message for message in said)


def test_the_installed_version_is_a_tested_one() -> None:
    """`make test` and `make test-overlay` are what "tested" means."""
    assert compat.installed_vllm_version().partition("+")[0] in TESTED_VLLM
