"""A logits processor that makes a request answer with given tokens, so that its own distributions can be compared.

    vllm serve ... --logits-processors vllm_calidrop.forcing:ForcedTokens
    {"prompt": ..., "logprobs": 20, "vllm_xargs": {"forced_token_ids": [12, 7, 3021]}}

At every step all tokens but the forced one are masked, so each sampler draws it. vLLM takes log-probabilities before
the mask where its `logprobs_mode` is `raw_logprobs`, its default: they are what the model would have said.
Teacher-forced fidelity (docs/evaluation.md) is measured with them. Log-probabilities of the prompt would not do: they
come from prefill, which is full attention.

One class serves both of vLLM's model runners, whose interfaces differ; either takes the same name.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor
from vllm.exceptions import VLLMValidationError
from vllm.v1.sample.logits_processor import AdapterLogitsProcessor
from vllm.v1.worker.gpu.sample.logits_processor.interface import LogitsProcessor as V2LogitsProcessor

FIELD = "forced_token_ids"
NAME = f"{__name__}:ForcedTokens"


class ForcedTokens(AdapterLogitsProcessor, V2LogitsProcessor):
    """Masks every token but `forced_token_ids[i]` at output i, and nothing beyond the end of that list.

    The V1 runner constructs it with (config, device, whether memory is pinned), tells it of requests by `update_state`
    and calls `apply(logits)`. The V2 runner constructs it with (config, its state of requests), tells it by
    `add_request` and calls `apply(logits, context)`. Speculative decoding is refused, as it samples several outputs of
    a step.
    """

    def __init__(self, vllm_config: Any, *runner: Any) -> None:
        if vllm_config.speculative_config is not None:
            raise ValueError(f"{NAME} does not work with speculative decoding")
        self._by_slot: dict[int, list[int]] = {}
        self._requests = None
        if len(runner) == 1:
            self._requests = runner[0]
        else:
            AdapterLogitsProcessor.__init__(self, vllm_config, *runner)

    @classmethod
    def validate_params(cls, sampling_params: Any) -> None:
        """VLLMValidationError, which is a 400, where the ids are not a list of non-negative integers."""
        given = (sampling_params.extra_args or {}).get(FIELD)
        if given is None:
            return
        whole = isinstance(given, list) and all(type(token) is int and token >= 0 for token in given)
        if not whole or not given:
            raise VLLMValidationError(f"{FIELD} must be a list of token ids, and not empty", parameter=FIELD)

    def is_argmax_invariant(self) -> bool:
        return False

    # The V1 runner

    def new_req_logits_processor(self, params: Any) -> Callable[[list[int], Tensor], Tensor] | None:
        forced = (params.extra_args or {}).get(FIELD)
        if forced is None:
            return None

        def force(outputs: list[int], logits: Tensor) -> Tensor:
            return _mask(logits, forced, len(outputs))

        return force

    # The V2 runner

    def add_request(self, req_idx: int, sampling_params: Any) -> bool:
        forced = (sampling_params.extra_args or {}).get(FIELD)
        self._by_slot.pop(req_idx, None)
        if forced is not None:
            self._by_slot[req_idx] = forced
        return forced is not None

    def apply(self, logits: Tensor, ctx: Any = None) -> Tensor:
        """Masks in place. `logits` is float32 [rows, vocabulary]; without speculative decoding row i is request i of
        the step.
        """
        if ctx is None:
            return super().apply(logits)
        assert self._requests is not None
        for row, slot in enumerate(ctx.idx_mapping_np.tolist()):
            forced = self._by_slot.get(slot)
            if forced is not None:
                known = int(ctx.seq_lens_upper_bound_np[row]) - int(self._requests.prompt_len.np[slot])
                _mask(logits[row], forced, known)
        return logits


def check_vocabulary(extra_args: Mapping[str, Any], vocabulary: int) -> None:
    """VLLMValidationError where a forced id is not one of the model's tokens, which number `vocabulary`."""
    forced = extra_args.get(FIELD)
    if isinstance(forced, list):
        for token in forced:
            if type(token) is int and token >= vocabulary:
                raise VLLMValidationError(
                    f"{FIELD} holds {token}, and the model has {vocabulary} tokens", parameter=FIELD
                )


def _mask(logits: Tensor, forced: list[int], index: int) -> Tensor:
    """`logits` [vocabulary], changed in place, with `forced[index]` the only token left. A prompt that is not complete
    has a negative index on the V2 runner."""
    if 0 <= index < len(forced) and forced[index] < len(logits):
        token = forced[index]
        kept = logits[token].clone()
        logits.fill_(-float("inf"))
        logits[token] = kept
    return logits
