"""The look as one pass over the codes, in Triton: page masses, from which shares and wanted pages follow.

The meaning is `recall/sketch.py::estimate` and the first half of `recall/looks.py::page_shares`. Not used by the CPU
back end; it runs under Triton's interpreter in the tests, and is compiled there for the GPUs it is meant for.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from vllm_calidrop.evicted.layout import PAGE_TOKENS, PAGES_PER_BLOCK, SWAP_BLOCK_TOKENS
from vllm_calidrop.evicted.recall.sketch import CHANNELS_PER_BYTE, LEVELS, padded_dim, rotation


@triton.jit
def look_kernel(  # type: ignore[no-untyped-def]  # annotations of a kernel are read as constants
    rotated,  # float32 [N, G, 4, D' / 4]: Rot q, channels of a byte apart
    along_mu,  # float32 [N, G]: q . mu
    codes,  # uint8 [blocks, H, PAGES, D' / 16, TOKENS / PAGES, 4], one layer's
    scales,  # float16 [blocks, H, TOKENS]
    blocks,  # int64 [N, W]
    kv_heads,  # int64 [N]
    stored,  # int64 [N]
    masses,  # float32 [N, G, W * PAGES]
    scale,
    num_heads,
    width,
    inner,
    outer,
    GROUP: tl.constexpr,
    BYTES: tl.constexpr,
    TOKENS: tl.constexpr,
    PAGES: tl.constexpr,
):
    """One program: one sketch block of one (sequence, KV head) pair, for all its query heads."""
    pair, column = tl.program_id(0), tl.program_id(1)
    count = tl.load(stored + pair)
    token = tl.arange(0, TOKENS)
    byte = tl.arange(0, BYTES)
    page = column * PAGES + tl.arange(0, PAGES)
    exists = column * TOKENS + token < count
    row = tl.load(blocks + pair * width + column) * num_heads + tl.load(kv_heads + pair)
    lane = TOKENS // PAGES
    of_token = (row * TOKENS + token // lane * lane) * BYTES + token % lane * 4
    of_byte = byte // 4 * 4 * lane + byte % 4
    code = tl.load(codes + of_token[:, None] + of_byte[None, :], mask=exists[:, None], other=0)
    code = code.to(tl.int32)
    c = tl.load(scales + row * TOKENS + token, mask=exists, other=0.0).to(tl.float32)
    for head in tl.static_range(GROUP):
        dot = tl.zeros((TOKENS,), dtype=tl.float32)
        for channel in tl.static_range(4):
            bits = code >> (2 * channel)
            level = tl.where(bits & 1 != 0, outer, inner)
            level = tl.where(bits & 2 != 0, level, -level)
            query = tl.load(rotated + ((pair * GROUP + head) * 4 + channel) * BYTES + byte)
            dot += tl.sum(level * query[None, :], axis=1)
        logits = (tl.load(along_mu + pair * GROUP + head) + c * dot) * scale
        logits = tl.reshape(tl.where(exists, logits, float("-inf")), (PAGES, TOKENS // PAGES))
        top = tl.max(logits, axis=1)
        base = tl.where(top == float("-inf"), 0.0, top)
        total = tl.sum(tl.exp(logits - base[:, None]), axis=1)
        mass = tl.where(total > 0, base + tl.log(total), float("-inf"))
        tl.store(masses + (pair * GROUP + head) * width * PAGES + page, mass)


def page_masses(
    query: Tensor,
    mu: Tensor,
    codes: Tensor,
    scales: Tensor,
    blocks: Tensor,
    kv_heads: Tensor,
    stored: Tensor,
    scale: float,
) -> Tensor:
    """l_hp of N pairs: float32 [N, G, W * PAGES_PER_BLOCK], -inf for pages that do not exist.

    query: [N, G, D]; mu: float32 [N, D]; of one layer of a RecallStore, codes: uint8 and scales:
    float16 [blocks, H, SWAP_BLOCK_TOKENS]; blocks: int64 [N, W]; kv_heads, stored: int64 [N].
    """
    pairs, group, head_dim = query.shape
    width, num_bytes = blocks.shape[1], padded_dim(head_dim) // CHANNELS_PER_BYTE
    query = query.float()
    rotated = query @ rotation(head_dim).to(query.device).T
    by_channel = rotated.unflatten(-1, (num_bytes, 4)).transpose(-1, -2).contiguous()
    along_mu = (query * mu.unsqueeze(1)).sum(-1)
    masses = torch.empty((pairs, group, width * PAGES_PER_BLOCK), dtype=torch.float32, device=query.device)
    assert codes.is_contiguous() and scales.is_contiguous() and blocks.is_contiguous()
    assert SWAP_BLOCK_TOKENS == PAGES_PER_BLOCK * PAGE_TOKENS
    look_kernel[(pairs, width)](
        by_channel, along_mu, codes, scales, blocks, kv_heads, stored, masses, scale, codes.shape[1], width, *LEVELS,
        GROUP=group, BYTES=num_bytes, TOKENS=SWAP_BLOCK_TOKENS, PAGES=PAGES_PER_BLOCK,
    )  # fmt: skip
    return masses
