"""How a method of vLLM is wrapped: checked, once, and listed.

A wrap that silently does nothing is worse than none (a budget without effect), so a symbol that is missing or whose
parameters are not the expected ones stops the start-up with an error that says which symbol and which versions.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from vllm_calidrop.compat import SUPPORTED_VLLM, TESTED_VLLM, installed_vllm_version

_MARK = "__calidrop_original__"

# What a wrapped attribute can be besides a plain function; the wrapper gets the same kind again.
_DESCRIPTORS = (classmethod, staticmethod)


class HookError(RuntimeError):
    """A wrapped symbol of vLLM is not what this version of the plugin was written for."""


@dataclass(frozen=True)
class Hook:
    """One installed wrap: `owner.name`, a method of a class or a function of a module of vLLM, and our wrapper."""

    symbol: str
    wrapper: str
    owner: Any
    name: str


_installed: dict[str, Hook] = {}


def installed_hooks() -> tuple[Hook, ...]:
    """The wraps of this process, in the order of their installation."""
    return tuple(_installed.values())


def wrap_method(
    owner: Any,
    name: str,
    make_wrapper: Callable[[Callable[..., Any]], Callable[..., Any]],
    expected_params: tuple[str, ...],
) -> None:
    """Replace `owner.name` by `make_wrapper(original)`; `owner` is a class or a module.

    `expected_params` are the names the signature must begin with, `self` (or `cls`) included. Only an attribute defined
    on `owner` itself is wrapped: an inherited one would be wrapped for one subclass and missed in the others. A second
    call for the same symbol does nothing. An async function needs an async (or awaitable-returning) wrapper.
    """
    symbol, needed_by = _symbol_of(owner, name), make_wrapper.__module__
    raw = vars(owner).get(name)
    if raw is None:
        inherited = " on the class itself (it is inherited)" if hasattr(owner, name) else ""
        raise hook_error(f"{symbol} does not exist{inherited}", needed_by)
    original = raw.__func__ if isinstance(raw, _DESCRIPTORS) else raw
    if hasattr(original, _MARK):
        return
    if not callable(original):
        raise hook_error(f"{symbol} is a {type(original).__name__}, not a method", needed_by)
    require_parameters(symbol, original, expected_params, needed_by)

    wrapper = functools.wraps(original)(make_wrapper(original))
    setattr(wrapper, _MARK, original)
    setattr(owner, name, type(raw)(wrapper) if isinstance(raw, _DESCRIPTORS) else wrapper)
    _installed[symbol] = Hook(symbol, f"{needed_by}.{make_wrapper.__qualname__}", owner, name)


def require_parameters(symbol: str, function: Callable[..., Any], expected: tuple[str, ...], needed_by: str) -> None:
    """HookError unless the signature of `function`, which `symbol` names, begins with the expected parameters."""
    found = tuple(inspect.signature(function).parameters)
    if found[: len(expected)] != expected:
        raise hook_error(
            f"{symbol} takes ({', '.join(found)}), expected it to begin with ({', '.join(expected)})", needed_by
        )


def require_installed(symbols: tuple[str, ...], needed_by: str) -> None:
    """HookError unless every one of `symbols` is wrapped in this process. needed_by: the module that asks."""
    missing = [symbol for symbol in symbols if symbol not in _installed]
    if missing:
        raise hook_error(f"{', '.join(missing)} not wrapped in this process", needed_by)


def require_wraps_in_use(cls: type) -> None:
    """HookError if `cls` has its own version of a method that is wrapped on a base class, and never calls that one.

    A signature does not tell: the wrap is installed, and instances of `cls` do not run it. An override that names the
    method itself (`super().schedule()`, `Scheduler.schedule(self)`) is taken to call it.
    """
    for hook in installed_hooks():
        by_passing = bypassing_override(cls, hook)
        if by_passing is not None:
            raise hook_error(
                f"{_symbol_of(by_passing, hook.name)} takes the place of {hook.symbol} and does not call it",
                hook.wrapper.rpartition(".")[0],
            )


def bypassing_override(cls: type, hook: Hook) -> type | None:
    """The class among `cls` and its bases whose override keeps `hook` from running for instances of `cls`, or None."""
    if not inspect.isclass(hook.owner) or hook.owner not in cls.__mro__:
        return None
    for base in cls.__mro__:
        raw = vars(base).get(hook.name)
        if raw is None:
            continue
        function = raw.__func__ if isinstance(raw, _DESCRIPTORS) else raw
        if hasattr(function, _MARK):
            return None
        code = getattr(inspect.unwrap(function), "__code__", None)
        if code is None or hook.name not in code.co_names:
            return base
    return None


def require_instantiable(cls: type) -> None:
    """HookError if a class of vLLM that `cls` is derived from has an abstract method that `cls` does not define.

    Otherwise the first instance would fail, which is in the middle of a step of the engine.
    """
    if inspect.isabstract(cls):
        missing = ", ".join(sorted(cls.__abstractmethods__))  # type: ignore[attr-defined]
        bases = " and ".join(_class_name(base) for base in cls.__bases__)
        raise hook_error(f"{bases} demands {missing}, which {_class_name(cls)} does not have", cls.__module__)


def original_of(owner: Any, name: str) -> Callable[..., Any]:
    """vLLM's own function behind `owner.name`, wrapped or not."""
    raw = vars(owner)[name]
    function = raw.__func__ if isinstance(raw, _DESCRIPTORS) else raw
    return getattr(function, _MARK, function)


def _symbol_of(owner: Any, name: str) -> str:
    return f"{owner.__name__ if inspect.ismodule(owner) else _class_name(owner)}.{name}"


def _class_name(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


def hook_error(what: str, needed_by: str) -> HookError:
    """The error that says what is wrong, which of our files needs it (a module's name), and the versions."""
    return HookError(
        f"vllm-calidrop cannot hook into vLLM {installed_vllm_version()}: {what}. "
        f"It is needed by {needed_by.replace('.', '/')}.py. "
        f"Supported versions of vLLM: {SUPPORTED_VLLM} (tested: {' and '.join(TESTED_VLLM)})."
    )
