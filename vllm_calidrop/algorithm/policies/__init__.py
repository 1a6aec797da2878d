"""Eviction policies by their `kv_policy` name. `full` evicts nothing, so it is decided before a policy is asked."""

from __future__ import annotations

from vllm_calidrop.algorithm.policies.base import Needs, Policy, ScoreInputs, Selection
from vllm_calidrop.algorithm.policies.h2o import H2O
from vllm_calidrop.algorithm.policies.snapkv import SnapKV
from vllm_calidrop.algorithm.policies.streaming_llm import StreamingLLM

POLICIES: dict[str, Policy] = {
    policy.name: policy
    for policy in (
        SnapKV(),
        H2O(),
        StreamingLLM(),
    )
}

__all__ = ["H2O", "POLICIES", "Needs", "Policy", "ScoreInputs", "Selection", "SnapKV", "StreamingLLM"]
