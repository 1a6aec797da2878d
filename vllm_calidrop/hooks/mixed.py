"""Classes of vLLM, or of the user, with methods of ours in front of theirs.

Where the configuration names the class that vLLM makes an object of (the scheduler, the worker), no method has to be
wrapped: the configuration names a subclass instead, made of a mixin of ours and of the class that was named before.
That class may be vLLM's or the user's own; the mixin reaches it by `super()`.

The mixed class is named by a path, as vLLM's configuration names classes, because a configuration travels to processes
that have made no such class yet. `MODULE.CaliDrop:package:module:Class` says what it is made of, and MODULE makes it
when it is asked for that attribute (its `__getattr__` calls `Mixture.by_name`).
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from vllm_calidrop.hooks.wrap import hook_error, require_instantiable, require_parameters

_PREFIX = "CaliDrop:"

# The base of a mixin: whatever it is mixed with. The type checker takes it for a class that has every method.
if TYPE_CHECKING:
    Below = Any
else:
    Below = object


@dataclass(frozen=True)
class Mixture:
    """What is mixed into classes of one kind.

    module: the module whose attributes the mixed classes are. mixin: our methods. usual: the paths of vLLM's classes
    that it is mixed with, unless the user names another one. methods: those that the class below must have, each with
    the parameters that its signature must begin with, `self` included.
    """

    module: str
    mixin: type
    usual: tuple[str, ...]
    methods: Mapping[str, tuple[str, ...]]
    _made: dict[str, type] = field(default_factory=dict)

    def path_of(self, base: str | type) -> str:
        """The path of the class that is mixed with `base`, which is a class or the path of one."""
        if isinstance(base, str):
            return f"{self.module}.{_PREFIX}{base.replace('.', ':')}"
        return f"{self.module}.{self.of(base).__name__}"

    def base_path(self, path: Any) -> str | None:
        """The path of the class that the mixed class of this path is made of; None where it is no mixed one."""
        start = f"{self.module}.{_PREFIX}"
        if not isinstance(path, str) or not path.startswith(start):
            return None
        return path.removeprefix(start).replace(":", ".")

    def by_name(self, name: str) -> type:
        """The mixed class of this name; AttributeError, as a module raises it, where the name is none of ours."""
        if name in self._made:
            return self._made[name]
        if not name.startswith(_PREFIX):
            raise AttributeError(f"module {self.module!r} has no attribute {name!r}")
        module, _, base = name.removeprefix(_PREFIX).replace(":", ".").rpartition(".")
        return self.of(getattr(importlib.import_module(module), base))

    def of(self, base: type) -> type:
        """The class that is mixed with `base`, made once. HookError names what does not fit."""
        path = f"{base.__module__}.{base.__qualname__}"
        name = _PREFIX + path.replace(".", ":")
        if name not in self._made:
            for method, expected in self.methods.items():
                symbol, below = _declaration(base, method)
                if below is None:
                    raise hook_error(f"{symbol} does not exist", self.module)
                require_parameters(symbol, below, expected, self.module)
            mixed = type(name, (self.mixin, base), {"__module__": self.module, "__doc__": self.mixin.__doc__})
            require_instantiable(mixed)
            self._made[name] = mixed
        return self._made[name]


def _declaration(base: type, method: str) -> tuple[str, Any]:
    """The name and function of the first `method` among `base` and its bases that names what it takes.

    One that takes anything (`*args, **kwargs`) is meant to pass it on to the next. None for no such function.
    """
    for cls in base.__mro__:
        function = vars(cls).get(method)
        if inspect.isfunction(function):
            kinds = [parameter.kind for parameter in inspect.signature(function).parameters.values()][1:]
            if kinds != [inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD]:
                return f"{cls.__module__}.{cls.__qualname__}.{method}", function
    return f"{base.__module__}.{base.__qualname__}.{method}", None
