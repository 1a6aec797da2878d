"""What a request's evicted tokens cost in device memory, as a share of their KV."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vllm_calidrop.evicted.layout import PAGE_TOKENS
from vllm_calidrop.evicted.recall.sketch import token_bytes
from vllm_calidrop.evicted.recall.values import value_bytes


def device_share(fields: Mapping[str, Any], evicted: int, head_dim: int, item_bytes: int) -> float:
    """Bytes on the device for the evicted tokens of one KV head, over the bytes of their K and V in the cache's dtype.

    Counted are the codes of keys and values with their scales, and the page buffer; what a sequence has once (means,
    the stored state) is not.
    """
    if fields.get("kv_recall") != "pages" or not evicted:
        return 0.0
    codes = token_bytes(head_dim) + value_bytes(head_dim, fields.get("kv_recall_rest", "none"))
    kv = 2 * head_dim * item_bytes
    buffered = fields.get("kv_recall_buffer", 0) * PAGE_TOKENS
    return (codes * evicted + kv * buffered) / (kv * evicted)
