"""Run a hook's installation when, and only when, the module it wraps is imported.

vLLM loads plugins in every process, but the API server's modules take seconds to import and the engine core and its
workers never need them (and the other way round).
"""

from __future__ import annotations

import sys
from collections import defaultdict
from collections.abc import Callable, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType
from typing import Any

Callback = Callable[[ModuleType], None]


def when_imported(name: str, callback: Callback) -> None:
    """Call `callback(module)` now if the module is imported, else right after its first import.

    An error of the callback fails that import: a hook that cannot be installed must not go unnoticed.
    """
    module = sys.modules.get(name)
    if module is not None:
        callback(module)
        return
    if _finder not in sys.meta_path:
        sys.meta_path.insert(0, _finder)
    if callback not in _finder.waiting[name]:
        _finder.waiting[name].append(callback)


class _Finder(MetaPathFinder):
    """Finds nothing itself: it lets the others find, and adds the callbacks to the found module's execution."""

    def __init__(self) -> None:
        self.waiting: defaultdict[str, list[Callback]] = defaultdict(list)

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        callbacks = self.waiting.pop(fullname, None)
        if not callbacks:
            return None
        spec = find_spec(fullname)  # comes through here again, and finds nothing waiting
        if spec is None or spec.loader is None:
            self.waiting[fullname] = callbacks
            return None
        execute = spec.loader.exec_module

        def execute_then_hook(module: ModuleType) -> None:
            execute(module)
            for callback in callbacks:
                callback(module)

        loader: Any = spec.loader
        loader.exec_module = execute_then_hook
        return spec


_finder = _Finder()
