"""(b') The same as (b) over evicted tokens that a codec stored, from their codes: nothing is decoded in memory.

Range by range of a group (cache/codecs/grouped.py): a key is offset + gain * scale * number per channel, so the queries
take the range's scales once and are multiplied with the numbers; a value is offset + scale * number per token, so the
weights take the tokens' scales. Outlier tokens are attended as they were. Every byte that crosses the bus is read once.
Products have 16 bits of the queries and weights and all of the numbers, and are summed in float32. Meaning:
`calibration.py::attention_state` over `Codec.decode`.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor, bfloat16, uint8

from vllm_calidrop.evicted import layout as tokens
from vllm_calidrop.evicted.codecs import grouped, layout
from vllm_calidrop.ops.contract import Rows, Sequences
from vllm_calidrop.ops.triton.attend import LOG2_E, dot, store_partial
from vllm_calidrop.ops.triton.reload import reads
from vllm_calidrop.ops.triton.scratch import Scratch
from vllm_calidrop.ops.triton.tiles import encoded_tiles_for, power_of_two

PAGE_TOKENS: tl.constexpr = tl.constexpr(tokens.PAGE_TOKENS)
OUTLIERS: tl.constexpr = tl.constexpr(layout.MAX_OUTLIERS)
FIELDS: tl.constexpr = tl.constexpr(len(layout.Layout._fields))
SCALE_SHIFT: tl.constexpr = tl.constexpr(grouped.SCALE_SHIFT)
GAIN_START: tl.constexpr = tl.constexpr(grouped.GAIN_START)
GAIN_UNITS: tl.constexpr = tl.constexpr(grouped.GAIN_UNITS)
GAIN_OF_1: tl.constexpr = tl.constexpr(grouped.GAIN_UNITS - grouped.GAIN_START)
BITS: tl.constexpr = tl.constexpr(layout.Layout._fields.index("bits"))
IS_FLOAT: tl.constexpr = tl.constexpr(layout.Layout._fields.index("is_float"))
FINE: tl.constexpr = tl.constexpr(layout.Layout._fields.index("fine"))
HAS_OUTLIERS: tl.constexpr = tl.constexpr(layout.Layout._fields.index("outliers"))
PAGES_PER_BLOCK: tl.constexpr = tl.constexpr(layout.Layout._fields.index("pages_per_block"))
PAGES_PER_GROUP: tl.constexpr = tl.constexpr(layout.Layout._fields.index("pages_per_group"))
PAGES_PER_RANGE: tl.constexpr = tl.constexpr(layout.Layout._fields.index("pages_per_range"))
GROUP_BYTES: tl.constexpr = tl.constexpr(layout.Layout._fields.index("group_bytes"))
HEAD_BYTES: tl.constexpr = tl.constexpr(layout.Layout._fields.index("head_bytes"))
RANGE_BYTES: tl.constexpr = tl.constexpr(layout.Layout._fields.index("range_bytes"))
POSITION_BYTES: tl.constexpr = tl.constexpr(layout.Layout._fields.index("position_bytes"))
PAGE_BYTES: tl.constexpr = tl.constexpr(layout.Layout._fields.index("page_bytes"))
CODE_BYTES: tl.constexpr = tl.constexpr(layout.Layout._fields.index("code_bytes"))


def reload_encoded(
    query: Tensor, pages: Tensor, rows: Rows, sequences: Sequences, scratch: Scratch, scale: float
) -> None:
    """States over parts of the evicted tokens into scratch.evicted_*, of groups that read them and have a codec.

    Arguments and grid as for `reload_evicted`; a split is a share of the groups of tokens.
    """
    num_rows, heads, splits = scratch.evicted_lse.shape
    kv_heads, head_dim = pages.shape[1], pages.shape[-1]
    group, item = heads // kv_heads, pages.itemsize
    tiles = encoded_tiles_for(group, head_dim)
    assert query.stride(2) == 1 and sequences.swap_blocks.stride(1) == 1 and sequences.layouts.is_contiguous()
    assert pages[:1, :1].is_contiguous() and head_dim % 8 == 0
    encoded_kernel[(num_rows, kv_heads, splits)](
        query, pages.view(uint8), pages.view(bfloat16), pages, rows.slot, rows.token, rows.end, sequences.start,
        sequences.stored, sequences.swap_blocks, sequences.codec, sequences.most_reads, sequences.layouts,
        scratch.evicted_out, scratch.evicted_lse, scratch.decision, scratch.similarity, scale, query.stride(0),
        query.stride(1), pages.stride(0) * item, pages.stride(1) * item, sequences.swap_blocks.stride(0),
        KV_HEADS=kv_heads, GROUP=group, HEAD_DIM=head_dim, ITEM=item, SPLITS=splits, TILE_H=power_of_two(kv_heads),
        TILE_M=tiles.m, TILE_N=tiles.n, TILE_D=tiles.d, num_warps=tiles.warps, num_stages=tiles.stages,
        maxnreg=tiles.registers,
    )  # fmt: skip


@triton.jit
def encoded_kernel(  # type: ignore[no-untyped-def]  # annotations of a kernel are read as constants
    query, bytes_of, halves_of, exact_of, slot_of_row, token_of_row, end_of_row, start_of_slot, stored_of_slot,
    swap_blocks, codec_of_slot, most_reads, layouts, evicted_out, evicted_lse, decision, similarity, scale, query_token,
    query_head, page_block, page_head, table_slot,
    KV_HEADS: tl.constexpr, GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, ITEM: tl.constexpr, SPLITS: tl.constexpr,
    TILE_H: tl.constexpr, TILE_M: tl.constexpr, TILE_N: tl.constexpr, TILE_D: tl.constexpr,
):  # fmt: skip
    """One program: a split of the evicted tokens of one (row, KV head), for all query heads of its group.

    bytes_of, halves_of, exact_of: the same memory as bytes, as bfloat16 and in the cache's dtype.
    """
    row, kv_head, split = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64), tl.program_id(2)
    slot = tl.load(slot_of_row + row).to(tl.int64)
    if slot < 0:
        return
    if tl.load(end_of_row + row) <= tl.load(start_of_slot + slot):
        return
    codec = tl.load(codec_of_slot + slot)
    if codec <= 0:
        return
    if not reads(decision, similarity, most_reads, row, slot, kv_head, KV_HEADS, GROUP, TILE_H, TILE_M):
        return
    m, d = tl.arange(0, TILE_M), tl.arange(0, TILE_D)
    in_group, in_head = m < GROUP, d < HEAD_DIM
    head = kv_head * GROUP + m
    token = tl.load(token_of_row + row).to(tl.int64)
    q = tl.load(
        query + token * query_token + head[:, None] * query_head + d[None, :],
        mask=in_group[:, None] & in_head[None, :],
        other=0.0,
    ).to(tl.float32) * (scale * LOG2_E)

    fields = layouts + codec * FIELDS
    bits, is_float = tl.load(fields + BITS), tl.load(fields + IS_FLOAT)
    fine, outliers = tl.load(fields + FINE), tl.load(fields + HAS_OUTLIERS)
    pages_per_block, pages_per_group = tl.load(fields + PAGES_PER_BLOCK), tl.load(fields + PAGES_PER_GROUP)
    pages_per_range, range_bytes = tl.load(fields + PAGES_PER_RANGE), tl.load(fields + RANGE_BYTES)
    group_bytes, head_bytes = tl.load(fields + GROUP_BYTES), tl.load(fields + HEAD_BYTES)
    position_bytes, page_bytes = tl.load(fields + POSITION_BYTES), tl.load(fields + PAGE_BYTES)
    code_bytes = tl.load(fields + CODE_BYTES)
    unit = tl.where(is_float != 0, 256.0, 1.0)  # what `load_numbers` leaves to us
    middle = tl.where(is_float != 0, 0.0, -0.5)

    count = tl.load(stored_of_slot + slot).to(tl.int32)
    block_tokens, group_tokens = pages_per_block * PAGE_TOKENS, pages_per_group * PAGE_TOKENS
    groups_per_block = tl.cdiv(pages_per_block, pages_per_group)
    groups = count // block_tokens * groups_per_block + tl.cdiv(count % block_tokens, group_tokens)
    share = tl.cdiv(groups, SPLITS)
    first = split * share
    last = tl.minimum(first + share, groups)
    top = tl.full((TILE_M,), float("-inf"), dtype=tl.float32)
    total = tl.zeros((TILE_M,), dtype=tl.float32)
    acc = tl.zeros((TILE_M, TILE_D), dtype=tl.float32)
    for index in range(first, last):
        index = tl.full((), 0, dtype=tl.int32) + index  # a loop counter is a Python number under the interpreter
        in_block = index % groups_per_block
        before = index // groups_per_block * block_tokens + in_block * group_tokens
        held = tl.minimum(group_tokens, block_tokens - in_block * group_tokens)
        here = tl.minimum(held, count - before)
        block = tl.load(swap_blocks + slot * table_slot + index // groups_per_block).to(tl.int64)
        start = block * page_block + kv_head * page_head + in_block * group_bytes

        positions = start + pages_per_group // pages_per_range * range_bytes
        for outlier in tl.static_range(OUTLIERS):
            position = tl.load(bytes_of + positions + outlier, mask=outlier < outliers, other=255).to(tl.int32)
            top, total, acc = attend_exact(
                exact_of, (positions + position_bytes) // ITEM + outlier * 2 * HEAD_DIM, position < here, q, d, in_head,
                HEAD_DIM, top, total, acc,
            )  # fmt: skip
        range_tokens = pages_per_range * PAGE_TOKENS
        for range_begin in range(0, here, range_tokens):
            end = tl.minimum(range_begin + range_tokens, here)
            at_range = start + range_begin // range_tokens * range_bytes
            offset = tl.load(halves_of + at_range // 2 + d, mask=in_head, other=0.0).to(tl.float32)
            exponent = tl.load(
                bytes_of + positions + outliers + range_begin // range_tokens, mask=fine != 0, other=0
            ).to(tl.int32)  # fmt: skip
            scales = load_scales(bytes_of, halves_of, at_range, exponent, d, in_head, fine, HEAD_DIM)
            base = tl.sum(q * offset[None, :], axis=1)
            scaled = q * scales[None, :]
            base_of_codes = middle * tl.sum(scaled, axis=1)
            scaled = scaled * unit
            for begin in range(range_begin, end, TILE_N):
                t = begin + tl.arange(0, TILE_N)
                exists = t < end
                coded = exists
                for outlier in tl.static_range(OUTLIERS):
                    position = tl.load(bytes_of + positions + outlier, mask=outlier < outliers, other=255).to(tl.int32)
                    coded = coded & (t != position)
                page = start + head_bytes + (t // PAGE_TOKENS).to(tl.int64) * page_bytes
                within = t % PAGE_TOKENS
                of_values = page + PAGE_TOKENS * code_bytes
                meta = (of_values + PAGE_TOKENS * code_bytes) // 2
                keys = load_numbers(
                    bytes_of, page + within * code_bytes, exists, bits, is_float, HEAD_DIM, TILE_N, TILE_D
                )  # fmt: skip
                gain = tl.load(
                    bytes_of + 2 * meta + 4 * PAGE_TOKENS + within, mask=exists & (fine != 0), other=GAIN_OF_1
                )
                logits = precise_dot(scaled, tl.trans(keys)) - base_of_codes[:, None]
                gain = (gain.to(tl.float32) + GAIN_START) * (1.0 / GAIN_UNITS)
                logits = logits * gain[None, :] + base[:, None]
                logits = tl.where(coded[None, :], logits, float("-inf"))
                new_top = tl.maximum(top, tl.max(logits, axis=1))
                weights = tl.exp2(logits - new_top[:, None])
                shrink = tl.exp2(top - new_top)
                total = total * shrink + tl.sum(weights, axis=1)
                values = load_numbers(
                    bytes_of, of_values + within * code_bytes, exists, bits, is_float, HEAD_DIM, TILE_N, TILE_D
                )  # fmt: skip
                offsets = tl.load(halves_of + meta + 2 * within, mask=exists, other=0.0).to(tl.float32)
                widths = tl.load(halves_of + meta + 2 * within + 1, mask=exists, other=0.0).to(tl.float32)
                same = tl.sum(weights * (offsets - middle * widths)[None, :], axis=1)
                acc = acc * shrink[:, None] + same[:, None] + precise_dot(weights * (widths * unit)[None, :], values)
                top = new_top
    of_row = row * (KV_HEADS * GROUP) + head
    store_partial(evicted_out, evicted_lse, top, total, acc, of_row, split, in_group, SPLITS, HEAD_DIM, TILE_D)


@triton.jit
def attend_exact(  # type: ignore[no-untyped-def]
    exact_of, place, exists, q, d, in_head, HEAD_DIM: tl.constexpr, top, total, acc
):
    """Add one token whose K and V lie at `place`; before it nothing may have been added."""
    key = tl.load(exact_of + place + d, mask=in_head & exists, other=0.0).to(tl.float32)
    value = tl.load(exact_of + place + HEAD_DIM + d, mask=in_head & exists, other=0.0).to(tl.float32)
    logit = tl.where(exists, tl.sum(q * key[None, :], axis=1), float("-inf"))
    new_top = tl.maximum(top, logit)
    safe = tl.where(new_top == float("-inf"), 0.0, new_top)
    weight, shrink = tl.exp2(logit - safe), tl.exp2(top - safe)
    return new_top, total * shrink + weight, acc * shrink[:, None] + weight[:, None] * value[None, :]


@triton.jit
def load_scales(  # type: ignore[no-untyped-def]
    bytes_of, halves_of, at_range, exponent, d, in_head, fine, HEAD_DIM: tl.constexpr
):
    """float32 [TILE_D]: scales of a range's channels, which lie behind their offsets."""
    if fine != 0:
        byte = tl.load(bytes_of + at_range + 2 * HEAD_DIM + d, mask=in_head, other=0).to(tl.int32)
        scales = tl.where(byte > 0, (exponent << 23) + (byte << SCALE_SHIFT), 0).to(tl.float32, bitcast=True)
    else:
        scales = tl.load(halves_of + at_range // 2 + HEAD_DIM + d, mask=in_head, other=0.0).to(tl.float32)
    return scales


@triton.jit
def load_numbers(  # type: ignore[no-untyped-def]
    bytes_of, place, exists, bits, is_float, HEAD_DIM: tl.constexpr, TILE_N: tl.constexpr, TILE_D: tl.constexpr
):
    """bfloat16 [T, D], exactly, of tokens whose codes begin at byte `place` [T]: integers less half their range, so
    that sums of them lose nothing; e4m3 256 times too small. Anything beyond head_dim and where not `exists`."""
    if bits == 8:
        numbers = numbers_of_8(load_codes(bytes_of, place, exists, HEAD_DIM, TILE_D), is_float)
    elif bits == 4:
        numbers = numbers_of_4(load_codes(bytes_of, place, exists, HEAD_DIM // 2, TILE_D // 2))
    else:
        numbers = numbers_of_2(load_codes(bytes_of, place, exists, HEAD_DIM // 4, TILE_D // 4))
    return numbers.to(tl.bfloat16)


@triton.jit
def load_codes(bytes_of, place, exists, COUNT: tl.constexpr, TILE_C: tl.constexpr):  # type: ignore[no-untyped-def]
    """int32 [T, TILE_C]: COUNT bytes of each token."""
    c = tl.arange(0, TILE_C)
    mask = exists[:, None] & (c < COUNT)[None, :]
    return tl.load(bytes_of + place[:, None] + c[None, :], mask=mask, other=0).to(tl.int32)


@triton.jit
def numbers_of_8(code, is_float):  # type: ignore[no-untyped-def]
    """e4m3: the bits of a half-precision number, subnormal ones included."""
    half = ((code & 0x80) << 8) | ((code & 0x7F) << 7)
    of_float = half.to(tl.uint16).to(tl.float16, bitcast=True).to(tl.float32)
    return tl.where(is_float != 0, of_float, (code - 128).to(tl.float32))


@triton.jit
def numbers_of_4(code):  # type: ignore[no-untyped-def]
    return (tl.interleave(code & 15, code >> 4) - 8).to(tl.float32)


@triton.jit
def numbers_of_2(code):  # type: ignore[no-untyped-def]
    even, odd = tl.interleave(code & 3, code >> 4 & 3), tl.interleave(code >> 2 & 3, code >> 6)
    return (tl.interleave(even, odd) - 2).to(tl.float32)


@triton.jit
def precise_dot(a, b):  # type: ignore[no-untyped-def]
    """float32 a [M, K] times bfloat16 b [K, N], which is exact: a goes in two parts, with 16 bits of it left."""
    high = a.to(tl.bfloat16)
    low = (a - high.to(tl.float32)).to(tl.bfloat16)
    return dot(high, b) + dot(low, b)
