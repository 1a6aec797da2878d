"""Which operator set serves a process: by the platform, or by name. A new set is one module and one line here.

Nothing falls back in silence: where the default set cannot serve a model, the log says once which one does and why; a
set that was asked for by name serves, or the engine does not start.
"""

from __future__ import annotations

import importlib
import logging
import os

from vllm_calidrop.ops.base import ModelKV, OperatorSet
from vllm_calidrop.ops.flavour import uses_cuda_flavour

logger = logging.getLogger("vllm.calidrop")

CHOICE_VARIABLE = "VLLM_CALIDROP_OPS"
AUTO = "auto"
# By name; imported when asked for, because Triton and xFormers are not installed everywhere.
SETS = {
    "reference": ("vllm_calidrop.ops.reference", "ReferenceSet"),
    "cpp": ("vllm_calidrop.ops.cpp", "CppSet"),
    "triton": ("vllm_calidrop.ops.triton.operators", "TritonSet"),
    "xformers": ("vllm_calidrop.ops.xformers", "XformersSet"),
}


def choice() -> str:
    """A name of SETS, or `auto`, from the environment."""
    chosen = os.environ.get(CHOICE_VARIABLE, AUTO)
    if chosen not in (AUTO, *SETS):
        raise ValueError(f"{CHOICE_VARIABLE} must be one of {', '.join((AUTO, *SETS))}, got {chosen!r}")
    return chosen


def set_named(name: str) -> type[OperatorSet]:
    """The class; ImportError where what it is made of is not installed."""
    module, attribute = SETS[name]
    found: type[OperatorSet] = getattr(importlib.import_module(module), attribute)
    return found


def wanted_set() -> type[OperatorSet]:
    """The set that was asked for, or the platform's default, before a model is known."""
    chosen = choice()
    return set_named(("triton" if uses_cuda_flavour() else "cpp") if chosen == AUTO else chosen)


def set_for(model: ModelKV) -> type[OperatorSet]:
    """The set that serves this model, said in the log where it is not the default. ValueError where there is none."""
    wanted = wanted_set()
    reason = wanted.refusal(model)
    if reason is None:
        if choice() != AUTO:
            logger.info("CaliDrop: the operators are %r (%s)", wanted.name, CHOICE_VARIABLE)
        return wanted
    if choice() != AUTO or uses_cuda_flavour():
        raise ValueError(f"calidrop: {reason} ({CHOICE_VARIABLE}={choice()})")
    logger.warning("CaliDrop: the reference operators in torch serve, several times slower than compiled: %s", reason)
    return set_named("reference")
