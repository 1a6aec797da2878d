"""Decode with recall by pages, in torch, for all such rows of a layer at once (docs/recall.md).

A KV head group looks when one of its queries has turned away from the one of its last look. A look estimates every
page's share of the attention from the sketch and reads the wanted pages alone. Without a buffer their state is kept and
merged until the next look; with one the pages themselves stay and are attended with each query. With a rest a look also
attends all other evicted tokens from their codes, and what it found as a whole is merged until the next look.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from vllm_calidrop.algorithm.calibration import AttentionState, attention_state, cosine, merge_states
from vllm_calidrop.evicted.layout import PAGE_TOKENS, SWAP_BLOCK_TOKENS, swap_blocks_for
from vllm_calidrop.evicted.pool import SwapPool
from vllm_calidrop.evicted.recall.buffer import is_held, marked, renew
from vllm_calidrop.evicted.recall.looks import page_shares, wanted_pages
from vllm_calidrop.evicted.recall.rest import rest_state
from vllm_calidrop.evicted.recall.sketch import estimate, inflation
from vllm_calidrop.evicted.recall.store import RecallStore
from vllm_calidrop.ops.base import Tables
from vllm_calidrop.ops.contract import NO_BUDGET
from vllm_calidrop.ops.similarity import observe_similarity
from vllm_calidrop.ops.state import count_looks

# Pairs of (sequence, KV head) look in groups of at most this many tokens, which bounds the decoded codes.
LOOK_TOKENS = 1 << 17


class RecallRows(NamedTuple):
    """M rows that recall by pages, gathered from the tables by slot.

    slots, most, buffer_size, rest, stored, codec: int [M]; theta, eps, top_p (NaN: by number alone): float32 [M].
    swap_blocks, sketch_blocks: int [M, W]; buffer_ids: int [M, B], B the largest buffer_size. most_reads: int [M],
    pages that a layer may read in this step, None if there is no read budget.
    """

    slots: Tensor
    theta: Tensor
    eps: Tensor
    top_p: Tensor
    most: Tensor
    buffer_size: Tensor
    rest: Tensor
    stored: Tensor
    swap_blocks: Tensor
    sketch_blocks: Tensor
    buffer_ids: Tensor
    codec: Tensor
    most_reads: Tensor | None

    @classmethod
    def of(cls, slots: Tensor, tables: Tables) -> RecallRows:
        recall, sequences = tables.recall, tables.sequences
        size, most_reads = recall.buffer_size[slots], sequences.most_reads[slots]
        return cls(
            slots=slots,
            theta=recall.theta[slots],
            eps=recall.eps[slots],
            top_p=recall.top_p[slots],
            most=recall.most[slots],
            buffer_size=size,
            rest=recall.rest[slots],
            stored=recall.stored[slots],
            swap_blocks=sequences.swap_blocks[slots].long(),
            sketch_blocks=recall.sketch_blocks[slots].long(),
            buffer_ids=recall.buffer_ids[slots, : int(size.max())].long(),
            codec=sequences.codec[slots],
            most_reads=most_reads if bool((most_reads < NO_BUDGET).any()) else None,
        )


def recalled_state(
    layer: int, slots: Tensor, query: Tensor, kept_lse: Tensor, tables: Tables, scale: float
) -> AttentionState:
    """The gate, the looks, and the state over what they recall, for M rows that recall by pages.

    slots: int64 [M]; query: [M, H, G, D]; kept_lse: [M, H, G], of the state over the kept tokens.
    """
    rows, state, store = RecallRows.of(slots, tables), tables.states[layer], tables.store
    rho = cosine(query, state.query[slots])
    observe_similarity(tables.similarity, rho[store.looked[layer, slots]])
    looks = (rho.amin(-1) < rows.theta[:, None]) | ~store.looked[layer, slots, None]
    store.looked[layer, slots] = True

    buffered = _buffered_state(rows, layer, query, store, scale)  # what was held before this step's looks
    has_buffer = ((rows.buffer_size > 0) & (rows.rest == 0))[:, None] & ~looks
    state.lse[slots] = state.lse[slots].masked_fill(has_buffer.unsqueeze(-1), -torch.inf)

    pages_read = torch.zeros_like(looks, dtype=torch.int64)
    skipped = None
    row, kv_head = torch.nonzero(looks, as_tuple=True)
    if row.numel():
        step = max(1, LOOK_TOKENS // (swap_blocks_for(int(rows.stored.max())) * SWAP_BLOCK_TOKENS))
        pairs = list(zip(row.split(step), kv_head.split(step)))
        found = [_look(rows, layer, *some, query[some], kept_lse[some], store, scale) for some in pairs]
        if rows.most_reads is not None:
            found, skipped = _within_budget(rows, layer, row, kv_head, found, store, rows.most_reads)
        for some, look in zip(pairs, found):
            rest = _rest(rows, layer, *some, look, store)  # before the look renews what the buffers hold
            pages_read[some] = _read(rows, layer, *some, look.wanted, query[some], tables, scale)
            if rest is not None:
                held = None if buffered is None else AttentionState(buffered.out[some], buffered.lse[some])
                _store_whole(rows, layer, *some, held, rest, tables)

    recalled = AttentionState(state.out[slots], state.lse[slots])
    if buffered is not None:
        of_others = buffered.lse.masked_fill((rows.rest > 0)[:, None, None], -torch.inf)
        recalled = merge_states(recalled, AttentionState(buffered.out, of_others))
    count_looks(state, slots, looks, ~looks.unsqueeze(-1) & (recalled.lse > -torch.inf), pages_read, skipped)
    return recalled


class Estimates(NamedTuple):
    """What a look knows of all tokens and pages: logits float32 [N, G, T] and shares [N, G, P]."""

    logits: Tensor
    shares: Tensor


class Look(NamedTuple):
    """What N (row, KV head) pairs want: pages int64 [N, K], largest share first, -1 for none; share: float32 [N, K].

    estimates: None where no pair has a rest.
    """

    wanted: Tensor
    share: Tensor
    estimates: Estimates | None


def _look(
    rows: RecallRows, layer: int, row: Tensor, kv_head: Tensor, query: Tensor, kept_lse: Tensor, store: RecallStore,
    scale: float,
) -> Look:  # fmt: skip
    """Look at the sketch for N (row, KV head) pairs: query [N, G, D], kept_lse [N, G]."""
    blocks = swap_blocks_for(int(rows.stored.max()))
    has_rest = rows.rest[row] > 0
    sketch = store.sketch(layer, rows.slots[row], rows.sketch_blocks[row, :blocks], kv_head, rows.rest[row])
    logits = estimate(query, *sketch) * scale
    if has_rest.any():
        noise = inflation(query, sketch.scales, sketch.balance, scale)
        logits = logits - torch.where(has_rest[:, None, None], noise, 0.0)
    shares = page_shares(logits, rows.stored[row], kept_lse)
    wanted = wanted_pages(shares, rows.eps[row], rows.top_p[row], rows.most[row])
    estimates = Estimates(logits, shares) if has_rest.any() else None
    return Look(wanted, shares.amax(1).gather(1, wanted.clamp_min(0)), estimates)


def _rest(
    rows: RecallRows, layer: int, row: Tensor, kv_head: Tensor, look: Look, store: RecallStore
) -> AttentionState | None:
    """The states of N (row, KV head) pairs that look over all pages they neither hold nor read; empty for those
    without a rest, None if none has one."""
    if look.estimates is None:
        return None
    logits, shares = look.estimates
    held = _held(rows, row, store.held[layer, rows.buffer_ids[row], kv_head[:, None]])
    excluded = marked(torch.cat((look.wanted, held), dim=1), shares.shape[-1])
    state = AttentionState(
        logits.new_zeros((*shares.shape[:2], store.mu.shape[-1])), shares.new_zeros(shares.shape[:2])
    )
    state.lse.fill_(-torch.inf)
    blocks = rows.sketch_blocks[row, : logits.shape[-1] // SWAP_BLOCK_TOKENS]
    for bits in rows.rest[row].unique().tolist():
        if bits:
            mine = rows.rest[row] == bits
            values = store.values(layer, rows.slots[row[mine]], blocks[mine], kv_head[mine], bits)
            found = rest_state(logits[mine], shares[mine], rows.stored[row[mine]], excluded[mine], *values)
            state.out[mine], state.lse[mine] = found
    return state


def _store_whole(
    rows: RecallRows, layer: int, row: Tensor, kv_head: Tensor, held: AttentionState | None, rest: AttentionState,
    tables: Tables,
) -> None:  # fmt: skip
    """Of N pairs that looked, those with a rest store the state over everything: the pages that were read (stored
    already), the pages that were held, and the rest."""
    state, mine = tables.states[layer], rows.rest[row] > 0
    where = (rows.slots[row[mine]], kv_head[mine])
    whole = merge_states(
        AttentionState(state.out[where], state.lse[where]), AttentionState(rest.out[mine], rest.lse[mine])
    )
    if held is not None:
        whole = merge_states(whole, AttentionState(held.out[mine], held.lse[mine]))
    state.out[where], state.lse[where] = whole


def _within_budget(
    rows: RecallRows, layer: int, row: Tensor, kv_head: Tensor, found: list[Look], store: RecallStore, most: Tensor
) -> tuple[list[Look], Tensor]:
    """Of all pages that a row would read in this layer, the `most` [M] of largest share, ties to the lower KV head.

    The others are wanted by nobody. Also returns how many those are, int64 [M].
    """
    columns = max(look.wanted.shape[1] for look in found)
    grow = [(0, columns - look.wanted.shape[1]) for look in found]
    wanted = torch.cat([pad(look.wanted, by, value=-1) for look, by in zip(found, grow)])
    share = torch.cat([pad(look.share, by) for look, by in zip(found, grow)])
    held = _held(rows, row, store.held[layer, rows.buffer_ids[row], kv_head[:, None]])
    pair, column = torch.nonzero((wanted >= 0) & ~is_held(wanted, held), as_tuple=True)

    # Pairs lie row by row, so a stable sort by share and then by row leaves each row's pages in order of share.
    order = share[pair, column].argsort(descending=True, stable=True)
    order = order[row[pair[order]].argsort(stable=True)]
    owner = row[pair[order]]
    place = torch.arange(len(owner)) - torch.searchsorted(owner, owner)
    beyond = order[place >= most[owner]]
    wanted[pair[beyond], column[beyond]] = -1
    skipped = torch.bincount(row[pair[beyond]], minlength=len(rows.slots))
    parts = [len(look.wanted) for look in found]
    left = zip(wanted.split(parts), share.split(parts), found, strict=True)
    return [Look(wanted, share, look.estimates) for wanted, share, look in left], skipped


def _read(
    rows: RecallRows, layer: int, row: Tensor, kv_head: Tensor, wanted: Tensor, query: Tensor, tables: Tables,
    scale: float,
) -> Tensor:  # fmt: skip
    """Read the wanted pages of N (row, KV head) pairs that their buffers do not hold; query [N, G, D]. Stores the state
    over the pages read and puts these into the pair's buffer. Returns how many were read, int64 [N]."""
    table, store = tables.states[layer], tables.store
    slots, stored = rows.slots[row], rows.stored[row]
    buffer_ids = rows.buffer_ids[row]
    held = _held(rows, row, store.held[layer, buffer_ids, kv_head[:, None]])
    read = (wanted >= 0) & ~is_held(wanted, held)

    pair, column = torch.nonzero(read, as_tuple=True)
    kv = _pages(rows, layer, row[pair], kv_head[pair], wanted[pair, column], tables.pool)
    padded = kv.new_zeros((*wanted.shape, *kv.shape[1:]))
    padded[pair, column] = kv
    state = _state_over(query, padded, torch.where(read, wanted, -1), stored, scale)

    table.query[slots, kv_head] = query
    table.out[slots, kv_head] = state.out
    table.lse[slots, kv_head] = state.lse
    if held.shape[1]:
        where = (layer, buffer_ids, kv_head[:, None])
        renewal = renew(held, store.rank[where], wanted, rows.buffer_size[row])
        mine = torch.arange(held.shape[1]) < rows.buffer_size[row, None]
        own = (layer, buffer_ids[mine], kv_head[:, None].expand_as(mine)[mine])
        store.held[own], store.rank[own] = renewal.held[mine], renewal.rank[mine]
        put = renewal.place[pair, column] >= 0
        place = renewal.place[pair, column][put]
        store.buffer[layer, buffer_ids[pair[put], place], kv_head[pair[put]]] = kv[put].to(store.buffer.dtype)
    return read.sum(-1)


def _pages(rows: RecallRows, layer: int, row: Tensor, kv_head: Tensor, page: Tensor, pool: SwapPool) -> Tensor:
    """Some pages [X, 2, PAGE_TOKENS, D]; row, kv_head, page: int64 [X], the page counted from the run's first."""

    def read(row: Tensor, kv_head: Tensor, page: Tensor, codec: int) -> Tensor:
        per_block = pool.codecs[codec].pages_per_block
        block_ids = rows.swap_blocks[row, page // per_block]
        return pool.read_pages(layer, block_ids, kv_head, page % per_block, codec)

    codecs = rows.codec[row]
    if not codecs.any():
        return read(row, kv_head, page, 0)
    head_dim = pool.codecs[0].head_dim
    pages = torch.empty((len(page), 2, PAGE_TOKENS, head_dim), dtype=torch.float32)
    for codec in codecs.unique().tolist():
        mine = codecs == codec
        pages[mine] = read(row[mine], kv_head[mine], page[mine], codec).float()
    return pages


def _buffered_state(
    rows: RecallRows, layer: int, query: Tensor, store: RecallStore, scale: float
) -> AttentionState | None:
    """State over the pages each row's buffers hold, with the current query [M, H, G, D]; None if nobody has one."""
    if not rows.buffer_ids.shape[1]:
        return None
    num_rows, num_heads = query.shape[:2]
    row = torch.arange(num_rows).repeat_interleave(num_heads)
    kv_head = torch.arange(num_heads).repeat(num_rows)
    where = (layer, rows.buffer_ids[row], kv_head[:, None])
    held = _held(rows, row, store.held[where])
    state = _state_over(query.flatten(0, 1), store.buffer[where], held, rows.stored[row], scale)
    return AttentionState(*(part.unflatten(0, (num_rows, num_heads)) for part in state))


def _held(rows: RecallRows, row: Tensor, held: Tensor) -> Tensor:
    """The pages held [N, B], without the columns beyond a row's own places."""
    return torch.where(torch.arange(held.shape[1]) < rows.buffer_size[row, None], held, -1)


def _state_over(query: Tensor, pages: Tensor, numbers: Tensor, stored: Tensor, scale: float) -> AttentionState:
    """State of N pairs' queries [N, G, D] over K pages each [N, K, 2, PAGE_TOKENS, D]; numbers: int64 [N, K], -1: none.

    stored: int64 [N], tokens of all pages of the pair; the last page may be part empty.
    """
    token = numbers.unsqueeze(-1) * PAGE_TOKENS + torch.arange(PAGE_TOKENS)
    valid = (numbers >= 0).unsqueeze(-1) & (token < stored[:, None, None])
    keys, values = pages[:, :, 0].flatten(1, 2), pages[:, :, 1].flatten(1, 2)
    return attention_state(query, keys, values, scale, valid.flatten(1))
