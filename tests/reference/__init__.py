"""The independent reference of CaliDrop (arXiv 2507.19906): Hugging Face Llama weights, plain PyTorch.

Written from the paper alone; it imports neither vLLM nor the engine that is tested against it.

- ``settings``: what a request may ask for
- ``policies``: which prompt tokens each KV head keeps
- ``attention``: attention states, their merge, the gate (equation 1 and the branches of Algorithm 2)
- ``recall``: recall by pages, which the paper has not (``kv_recall``)
- ``model``: the Llama forward, Algorithm 1 at the end of the prompt, Algorithm 2 at every decode step
- ``second``: the same thing written again, differently, to check this one
"""

from tests.reference.model import MERGE, NO_DECISION, PLAIN, RECOMPUTE, Margins, Reference, Result
from tests.reference.settings import Settings

__all__ = [
    "MERGE",
    "NO_DECISION",
    "PLAIN",
    "RECOMPUTE",
    "Margins",
    "Reference",
    "Result",
    "Settings",
]
