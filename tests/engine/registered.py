"""Run in a process of its own (test_registered.py): everything that is registered, through the real engine.

A policy and a codec that the package does not have are registered here first, by one line each, as a plugin would do
it. Then every registered policy, codec, gate and recall rule is served and compared with the reference; what the
operator set of this process does not serve must be refused with the setting's name. Prints one line per result; any
difference is an AssertionError. Argument: `pairs`, every two values of two settings together, or `values`, each once.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

import tests.engine.conftest  # noqa: F401  (environment, before vLLM)
import tests.reference.model as reference_model
from tests.engine.cases import MODEL, CachedReference, covering_combinations, prompt_of
from tests.engine.harness import Ask, Engine, assert_equal_to_reference
from tests.reference import codecs as reference_codecs
from tests.reference import policies as reference_policies
from tests.reference import settings as reference_settings
from tests.support.interpreter import answer_for_a_gpu, few_splits, patch_language_once
from vllm_calidrop.algorithm.policies import POLICIES, Needs, Policy, ScoreInputs
from vllm_calidrop.algorithm.policies.h2o import add_column_sums
from vllm_calidrop.evicted.codecs import CODECS, Codec, Encoded, codec_of
from vllm_calidrop.evicted.codecs.base import gather_runs
from vllm_calidrop.evicted.layout import PAGE_TOKENS
from vllm_calidrop.ops.flavour import uses_cuda_flavour
from vllm_calidrop.ops.registry import wanted_set
from vllm_calidrop.settings.request import RequestSettings, SettingsError
from vllm_calidrop.settings.server import ServerSettings, resolve_request
from vllm_calidrop.support import refuse_settings

FIELDS = RequestSettings.model_json_schema()["properties"]


class L2Norm(Policy):
    """Keeps the tokens whose keys are shortest (arXiv 2406.11430)."""

    name = "l2norm"
    needs = Needs.KEYS

    def importance(self, inputs: ScoreInputs) -> Tensor:
        assert inputs.keys is not None
        return -torch.linalg.vector_norm(inputs.keys.float(), dim=-1)


class Half(Codec):
    """Evicted KV in float16, page by page; kernels know nothing of it."""

    name = "half"

    @property
    def tokens_per_block(self) -> int:
        return self.block_bytes // self.page_read_bytes * PAGE_TOKENS

    @property
    def page_read_bytes(self) -> int:
        return PAGE_TOKENS * 2 * self.head_dim * 2

    def run_bytes(self, tokens: int) -> int:
        return tokens * 2 * self.head_dim * 2

    def encode(self, keys: Tensor, values: Tensor) -> Encoded:
        heads, tokens, _ = keys.shape
        count = self.blocks_for(tokens)
        kv = torch.stack((keys, values), dim=1).half()
        kv = torch.nn.functional.pad(kv, (0, 0, 0, count * self.tokens_per_block - tokens))
        pages = kv.unflatten(2, (-1, PAGE_TOKENS)).transpose(1, 2).contiguous()
        refused = ~kv.isfinite().flatten(1).all(1)
        return Encoded(pages.view(torch.uint8).reshape(heads, count, self.block_bytes), refused)

    def decode(self, blocks: Tensor) -> tuple[Tensor, Tensor]:
        pages = blocks.contiguous().view(torch.float16).view(len(blocks), -1, 2, PAGE_TOKENS, self.head_dim).float()
        return pages[:, :, 0].flatten(1, 2), pages[:, :, 1].flatten(1, 2)

    def decode_pages(self, memory: Tensor, first_bytes: Tensor, pages: Tensor) -> Tensor:
        runs = gather_runs(memory, first_bytes + pages * self.page_read_bytes, self.page_read_bytes)
        return runs.view(torch.float16).view(-1, 2, PAGE_TOKENS, self.head_dim).float()


POLICIES[L2Norm.name] = L2Norm()
CODECS[Half.name] = Half


def shortest_keys(q: Tensor, k: Tensor, scale: float, settings: Any) -> reference_policies.Selection:
    """`L2Norm` written again, for the reference."""
    scores = -k.square().sum(-1).sqrt()
    return reference_policies._rank(scores, range(k.shape[1]), settings.budget, always=range(0))


def by_the_policy(q: Tensor, k: Tensor, scale: float, settings: Any) -> reference_policies.Selection:
    """The choice of a policy that the reference has not: its own, from the reference's queries and keys."""
    policy, (heads, prompt_len, _) = POLICIES[settings.kv_policy], k.shape
    queries = q.permute(2, 0, 1, 3).flatten(1, 2)  # [P, Hq, D]
    before = prompt_len - settings.window

    def sums(first: int) -> Tensor:
        found = torch.zeros(heads, prompt_len)
        add_column_sums(found, queries[first:], k, first, scale)
        return found

    inputs = ScoreInputs(
        prompt_len=prompt_len,
        num_kv_heads=heads,
        budget=settings.budget,
        window=settings.window,
        sinks=settings.sinks,
        pool_kernel=settings.kv_pool_kernel,
        scale=scale,
        device=k.device,
        keys=k if Needs.KEYS in policy.needs else None,
        window_queries=queries[before:] if Needs.WINDOW_QUERIES in policy.needs else None,
        window_sums=sums(before) if Needs.WINDOW_SUMS in policy.needs else None,
        column_sums=sums(0) if Needs.COLUMN_SUMS in policy.needs else None,
    )
    scores = policy.importance(inputs)
    return reference_policies._rank(scores, range(prompt_len), settings.budget, always=range(0))


def stored_as(name: str, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """What is read again of a codec that the reference has not: what it decodes of what it encodes."""
    if name == Half.name:
        return k.half().float(), v.half().float()
    if name == "none" or name in reference_codecs.CODECS:
        return reference_codecs.stored_as(name, k, v)
    codec = codec_of(name, k.shape[1], k.dtype)
    keys, values = codec.decode(codec.encode(k[None], v[None]).blocks.flatten(0, 1))
    return keys.reshape(-1, k.shape[1])[: len(k)].float(), values.reshape(-1, k.shape[1])[: len(k)].float()


def read_bytes(name: str, tokens: int, dim: int, item: int) -> int:
    if name == "none" or name in reference_codecs.CODECS:
        return reference_codecs.read_bytes(name, tokens, dim, item)
    return codec_of(name, dim, torch.float32).run_bytes(tokens)


def read_page_bytes(name: str, dim: int, item: int) -> int:
    if name == "none" or name in reference_codecs.CODECS:
        return reference_codecs.read_page_bytes(name, dim, item)
    return codec_of(name, dim, torch.float32).page_read_bytes


def teach_the_reference() -> None:
    """Let it answer for what it does not know, so that whatever is registered is compared."""
    reference_policies._POLICIES[L2Norm.name] = shortest_keys
    for name in POLICIES:
        reference_policies._POLICIES.setdefault(name, by_the_policy)
    reference_settings.POLICIES = (*POLICIES, "full")
    reference_model.stored_as = stored_as
    reference_model.read_bytes = read_bytes
    reference_model.read_page_bytes = read_page_bytes


def combinations(how: str) -> list[tuple[Any, ...]]:
    rules: list[dict[str, Any]] = [{"kv_recall": rule} for rule in FIELDS["kv_recall"]["enum"]]
    rules.append({"kv_recall": "pages", "kv_recall_buffer": 4})
    dimensions: tuple[Sequence[Any], ...] = (list(POLICIES), list(CODECS), FIELDS["kv_gate"]["enum"], rules)
    return covering_combinations(dimensions=dimensions) if how == "pairs" else each_value(dimensions)


def each_value(dimensions: Sequence[Sequence[Any]]) -> list[tuple[Any, ...]]:
    """Few combinations that hold every value, in one that is served where there is such."""

    def values(indices: Sequence[int]) -> set[tuple[int, int]]:
        return set(enumerate(indices))

    def combination(indices: Sequence[int]) -> tuple[Any, ...]:
        return tuple(values[index] for values, index in zip(dimensions, indices, strict=True))

    every = list(itertools.product(*(range(len(values)) for values in dimensions)))
    served = [indices for indices in every if refused_field(settings_of(combination(indices))) is None]
    missing = set().union(*map(values, every))
    chosen = []
    while missing:
        of = served if missing & set().union(*map(values, served)) else every
        best = max(of, key=lambda indices: len(values(indices) & missing))
        missing -= values(best)
        chosen.append(combination(best))
    return chosen


def settings_of(combination: Sequence[Any]) -> dict[str, Any]:
    policy, codec, gate, rule = combination
    settings = {"kv_policy": policy, "kv_codec": codec, "kv_gate": gate, **rule, "kv_budget": 32}
    return {**settings, "kv_theta1": 0.8, "kv_theta2": 0.85}


def refused_field(settings: dict[str, Any]) -> str | None:
    """The setting that this process's operators do not serve."""
    try:
        refuse_settings(resolve_request(settings, ServerSettings()))
    except SettingsError as error:
        return error.field
    return None


def assert_refused(engine: Engine, ask: Ask, field: str) -> None:
    from vllm.exceptions import VLLMValidationError

    try:
        engine.submit("refused", ask)
    except VLLMValidationError as error:
        assert error.parameter == field, (error, field)
        assert str(ask.settings[field]) in str(error)
        return
    raise AssertionError(f"{ask.settings} was not refused")


def main(how: str) -> None:
    interpreted = uses_cuda_flavour()
    length, outputs = (70, 3) if interpreted else (260, 10)
    options: dict[str, Any] = {"block_size": 32, "max_num_batched_tokens": 4096}
    if interpreted:
        answer_for_a_gpu()
        few_splits()
        patch_language_once()
        options = {"block_size": 16, "max_num_batched_tokens": 64, "max_num_seqs": 8, "kv_cache_memory_bytes": 2**26}
        options["num_gpu_blocks_override"] = 256
    teach_the_reference()
    reference, engine = CachedReference(), Engine(MODEL, **options)
    assert type(engine.worker.calidrop.operators) is wanted_set()

    asks, refused = [], 0
    for seed, combination in enumerate(combinations(how)):
        ask = Ask(prompt_of(length, seed), outputs, settings_of(combination))
        field = refused_field(ask.settings)
        if field is None:
            asks.append(ask)
        else:
            assert_refused(engine, ask, field)
            refused += 1
    assert_equal_to_reference(asks, engine.ask(asks), [reference(ask) for ask in asks])
    print(f"combinations: {len(asks)} equal, {refused} refused by name")

    prompt = prompt_of(length, 50)
    every = [{"kv_policy": policy} for policy in POLICIES]
    always = [Ask(prompt, outputs, {**each, "kv_budget": 32, "kv_theta1": 2, "kv_theta2": 2}) for each in every]
    whole = [Ask(prompt, outputs, {**each, "kv_budget": len(prompt)}) for each in every]
    full, *others = engine.ask([Ask(prompt, outputs), *always, *whole])
    assert all(other.tokens == full.tokens for other in others)
    assert [other.report["mode"] for other in others if other.report] == ["calidrop"] * len(every) + ["full"] * len(
        every
    )
    print(f"full KV: {len(every)} policies equal")
    engine.assert_nothing_in_use()


if __name__ == "__main__":
    main(sys.argv[1])
