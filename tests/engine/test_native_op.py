"""Both implementations of the decode operator, in the real engine, against the reference."""

from __future__ import annotations

import pytest

from tests.engine.cases import MODEL, CachedReference, ask_of, covering_combinations
from tests.engine.harness import Engine, assert_equal_to_reference
from vllm_calidrop.attention.ops import decode
from vllm_calidrop.attention.ops.native import build

pytestmark = pytest.mark.engine

OPERATORS = [
    "torch",
    pytest.param("native", marks=pytest.mark.skipif(build.find_compiler() is None, reason="no C++ compiler")),
]


@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize("block_size", [16, 32])
def test_equals_the_reference(
    operator: str, block_size: int, monkeypatch: pytest.MonkeyPatch, reference: CachedReference
) -> None:
    monkeypatch.setenv(decode.CHOICE_VARIABLE, operator)
    decode.uses_native.cache_clear()
    engine = Engine(MODEL, block_size=block_size)
    asks = [ask_of(combination, seed) for seed, combination in enumerate(covering_combinations())][::3]
    try:
        assert decode.decode_op().__module__.endswith({"torch": "cpu", "native": "native"}[operator])
        assert_equal_to_reference(asks, engine.ask(asks), [reference(ask) for ask in asks])
        engine.assert_nothing_in_use()
    finally:
        engine.close()
        decode.uses_native.cache_clear()
