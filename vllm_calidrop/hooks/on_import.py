"""Run a hook's installation when, and only when, the module it wraps is imported.

vLLM loads plugins in every process, but the API server's modules take seconds to import and the engine core and its
workers never need them (and the other way round).
"""

from __future__ import annotations

import importlib.util
import sys
from collections import defaultdict
from collections.abc import Callable, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

from vllm_calidrop.hooks.wrap import hook_error

Callback = Callable[[ModuleType], None]


def when_imported(name: str, callback: Callback) -> None:
    """Call `callback(module)` now if the module is imported, else right after its first import.

    An error of the callback fails that import: a hook that cannot be installed must not go unnoticed.
    """
    module = sys.modules.get(name)
    if module is not None:
        _call(callback, module)
        return
    if _finder not in sys.meta_path:
        sys.meta_path.insert(0, _finder)
    if callback not in _finder.waiting[name]:
        _finder.waiting[name].append(callback)


def require_awaited_modules() -> None:
    """HookError if a module that callbacks wait for cannot be imported here: they would wait for ever, unnoticed."""
    for name in list(_finder.waiting):
        try:
            found = importlib.util.find_spec(name) is not None
        except ModuleNotFoundError:  # a package above it
            found = False
        if not found:
            raise hook_error(f"module {name} does not exist", _finder.waiting[name][0].__module__)


def _call(callback: Callback, module: ModuleType) -> None:
    try:
        callback(module)
    except AttributeError as error:
        raise hook_error(str(error), callback.__module__) from error


class _Finder(MetaPathFinder):
    """Finds nothing itself: it lets the others find, and adds the callbacks to the found module's execution.

    They wait until they have succeeded: a module may be looked for without being imported, or be imported again.
    """

    def __init__(self) -> None:
        self.waiting: defaultdict[str, list[Callback]] = defaultdict(list)

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname not in self.waiting:
            return None
        others = (finder.find_spec(fullname, path, target) for finder in sys.meta_path if finder is not self)
        spec = next((found for found in others if found is not None), None)
        if spec is None or spec.loader is None:
            return None
        execute = spec.loader.exec_module

        def execute_then_hook(module: ModuleType) -> None:
            execute(module)
            for callback in self.waiting.get(fullname, ()):
                _call(callback, module)
            self.waiting.pop(fullname, None)

        loader: Any = spec.loader
        loader.exec_module = execute_then_hook
        return spec


_finder = _Finder()
