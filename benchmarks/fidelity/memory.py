"""What a request's evicted tokens cost in device memory, as a share of their KV."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vllm_calidrop.evicted.layout import PAGE_TOKENS
from vllm_calidrop.evicted.recall.sketch import padded_dim, token_bytes

# Bits a channel of the coded values of all evicted tokens, by `kv_recall_rest`; a float16 scale a token beside them.
VALUE_BITS = {"none": 0, "v1": 1, "v2": 2}


def device_share(fields: Mapping[str, Any], evicted: int, head_dim: int, item_bytes: int) -> float:
    """Bytes on the device for the evicted tokens of one KV head, over the bytes of their K and V in the cache's dtype.

    Counted are the codes of keys and values with their scales, and the page buffer; what a sequence has once (means,
    the stored state) is not.
    """
    if fields.get("kv_recall") != "pages" or not evicted:
        return 0.0
    bits = VALUE_BITS[fields.get("kv_recall_rest", "none")]
    codes = token_bytes(head_dim) + (padded_dim(head_dim) * bits // 8 + 2 if bits else 0)
    kv = 2 * head_dim * item_bytes
    buffered = fields.get("kv_recall_buffer", 0) * PAGE_TOKENS
    return (codes * evicted + kv * buffered) / (kv * evicted)
