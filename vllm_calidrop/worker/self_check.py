"""Every kernel that will serve, once on this GPU before anything is served, against plain float32 torch on the host.

No GPU has been at hand where this was written, and drivers, GPUs and Triton differ: a kernel that is wrong here would
give wrong answers without a sign. So an engine whose kernels do not agree does not start. It goes the way of a prompt
and two decode steps, in the model's dtype, head counts, block size and cache layout, through the swap pool itself.
Meaning of each kernel: `calibration.py`, `policies/h2o.py`.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from typing import NamedTuple

import torch
from torch import Tensor

from vllm_calidrop.algorithm.calibration import AttentionState, Gate, attention_state, cosine, decide, merge_states
from vllm_calidrop.algorithm.policies.h2o import add_column_sums
from vllm_calidrop.evicted.codecs import NoCodec
from vllm_calidrop.evicted.codecs.layout import layout_table
from vllm_calidrop.evicted.layout import SWAP_BLOCK_TOKENS, swap_blocks_for
from vllm_calidrop.ops import gpu, triton
from vllm_calidrop.ops.kv_cache import kv_views
from vllm_calidrop.ops.triton import Rows, Scratch, Sequences, State
from vllm_calidrop.worker.cuda_compaction import Run, offload
from vllm_calidrop.worker.cuda_worker import CaliDropCudaWorker
from vllm_calidrop.worker.state_table import StateTable

logger = logging.getLogger("vllm.calidrop")

TOKENS, BUDGET, WINDOW = 200, 40, 16
# Weights are rounded to the cache's dtype before they meet the values.
TOLERANCE = {torch.float32: 2e-5, torch.float16: 2e-3, torch.bfloat16: 1.5e-2}
SUMS_TOLERANCE = 2e-4
CODES_TOLERANCE = 5e-4
INT8_TOLERANCE = 0.05  # of the numbers themselves, which are normal
RECOMPUTES, MERGES, PADDING = range(3)


class SelfCheckError(RuntimeError):
    """A kernel does not run here, or does not give what it must."""


def self_check(worker: CaliDropCudaWorker, kv_cache: Tensor, scale: float) -> None:
    """Raise SelfCheckError, naming the kernel, unless all agree. kv_cache: a layer's, for its shape and layout."""
    started = time.perf_counter()
    check = _Check(worker, kv_cache, scale)
    check.scores()
    check.compaction()
    check.decode()
    check.codecs()
    logger.info(
        "CaliDrop: %d kernels checked on %s in %.1f s; largest difference %.1e (%s)",
        len(check.worst),
        _device_name(worker.device),
        time.perf_counter() - started,
        *max((difference, kernel) for kernel, difference in check.worst.items()),
    )


class _Prompt(NamedTuple):
    """On the host: K and V [H, TOKENS, D], queries [WINDOW, Hq, D]; positions per KV head, ascending, [H, ...]."""

    keys: Tensor
    values: Tensor
    queries: Tensor
    kept: Tensor
    evicted: Tensor


class _Check:
    """worst: the largest difference of each kernel so far, relative where numbers are larger than 1."""

    def __init__(self, worker: CaliDropCudaWorker, kv_cache: Tensor, scale: float) -> None:
        self.worker, self.scale, self.device = worker, scale, worker.device
        self.worst: dict[str, float] = {}
        _, _, self.kv_heads, self.group, self.head_dim = worker.table.query.shape
        self.dtype = kv_cache.dtype
        self.block_size = kv_cache.shape[2]
        random = torch.Generator().manual_seed(0)
        keys, values = torch.randn((2, self.kv_heads, TOKENS, self.head_dim), generator=random).to(self.dtype)
        heads = self.kv_heads * self.group
        queries = torch.randn((WINDOW, heads, self.head_dim), generator=random).to(self.dtype)
        order = torch.rand((self.kv_heads, TOKENS), generator=random).argsort(-1)
        stored = min(TOKENS - BUDGET, worker.pool.pages.shape[1] * SWAP_BLOCK_TOKENS)
        kept, evicted = order[:, :BUDGET].sort(-1).values, order[:, BUDGET : BUDGET + stored].sort(-1).values
        self.prompt = _Prompt(keys, values, queries, kept, evicted)
        columns = -(-TOKENS // self.block_size)
        table = torch.randperm(columns + 1, generator=random)[:columns]
        self.blocks = table.int().to(self.device)
        self.cache = kv_views(_small(kv_cache, columns + 1))
        position = torch.arange(TOKENS)
        places = (table[position // self.block_size].to(self.device), position.to(self.device) % self.block_size)
        self._places = places
        self._write_cache()

    def _write_cache(self) -> None:
        block, within = self._places
        for view, written in zip(self.cache, (self.prompt.keys, self.prompt.values), strict=True):
            view[block, :, within] = written.transpose(0, 1).to(self.device)

    def scores(self) -> None:
        with self._of("score") as name:
            first = TOKENS - WINDOW
            sums = torch.zeros((self.kv_heads, TOKENS), dtype=torch.float32, device=self.device)
            elements = triton.score_scratch_elements(WINDOW, self.kv_heads, self.group)
            scratch = torch.empty(elements, dtype=torch.float32, device=self.device)
            queries = self.prompt.queries.to(self.device)
            triton.add_column_sums(sums, queries, self.cache, self.blocks, first, self.scale, scratch)
            wanted = torch.zeros((self.kv_heads, TOKENS))
            add_column_sums(wanted, self.prompt.queries, self.prompt.keys, first, self.scale)
            self._compare(name, sums, wanted, SUMS_TOLERANCE)

    def compaction(self) -> None:
        """As attention/cuda/compaction.py does it; the swap pool's first blocks are written, and nobody's yet."""
        prompt, pool, stored = self.prompt, self.worker.pool, self.prompt.evicted.shape[1]
        ids = tuple(range(swap_blocks_for(stored)))
        keys, values = (_taken(x, prompt.evicted) for x in (prompt.keys, prompt.values))
        evicted = prompt.evicted.to(self.device)
        with self._of("copy evicted") as name:
            for part in pool.parts(ids, stored) if stored else ():
                positions = evicted[:, part.tokens].contiguous()
                triton.copy_evicted(self.cache, self.blocks, positions, part.staging, part.ids)
                pool.send(0, part)
            pool.join()
            back = self.worker.pages(0)[: len(ids)].transpose(0, 1).flatten(1, 2).cpu()  # [H, pages, 2, tokens, D]
            for half, wanted in enumerate((keys, values)):
                self._compare(name, back[:, :, half].flatten(1, 2)[:, :stored], wanted, 0)
        with self._of("calibrate") as name:
            query = prompt.queries[-1]
            table = self._table(self.device)
            triton.calibrate(
                query.to(self.device), self.cache, self.blocks, evicted, _state(table), 1, self._scratch(1), self.scale
            )
            state = attention_state(self._grouped(query), keys, values, self.scale)
            self._compare_state(name, AttentionState(table.out[0, 1], table.lse[0, 1]), state)
            self._compare(name, table.query[0, 1], self._grouped(query), 0)
        with self._of("move kept") as name:
            moved = torch.empty(
                (2, self.kv_heads, BUDGET, self.head_dim), dtype=self.dtype, device=self.device
            )  # fmt: skip
            triton.gather_kept(self.cache, self.blocks, prompt.kept.to(self.device), moved)
            triton.scatter_kept(self.cache, self.blocks, TOKENS - BUDGET, moved)
            block, within = (place[TOKENS - BUDGET :] for place in self._places)
            for view, source in zip(self.cache, (prompt.keys, prompt.values), strict=True):
                self._compare(name, view[block, :, within].transpose(0, 1), _taken(source, prompt.kept), 0)

    def decode(self) -> None:
        """Three rows of the compacted prompt: one must recompute, one must merge, one pads the batch."""
        prompt, stored = self.prompt, self.prompt.evicted.shape[1]
        heads = self.kv_heads * self.group
        device, found, wanted = self.device, self._table(self.device), self._table(torch.device("cpu"))
        query = prompt.queries[:3]
        earlier = AttentionState(
            self._grouped(prompt.queries[4]).float(), self._grouped(prompt.queries[5]).float()[..., 0]
        )
        for table in (found, wanted):
            table.put(0, RECOMPUTES, *_moved(table, self._grouped(prompt.queries[3]), earlier))
            table.put(0, MERGES, *_moved(table, self._grouped(query[MERGES]), earlier))
        ids = torch.arange(max(1, swap_blocks_for(stored)), dtype=torch.int32, device=device).expand(2, -1)
        theta1, theta2, gate = torch.full((2,), 0.6), torch.full((2,), 0.9), torch.full((2,), int(Gate.GROUP))
        sequences = Sequences(
            torch.full((2,), TOKENS - BUDGET, dtype=torch.int32, device=device),
            torch.full((2,), stored, dtype=torch.int32, device=device),
            theta1.to(device), theta2.to(device), gate.int().to(device), ids, *self._codec(2, 0),
        )  # fmt: skip
        rows = Rows(
            torch.tensor([RECOMPUTES, MERGES, 0], dtype=torch.int32, device=device),
            torch.arange(3, dtype=torch.int32, device=device),
            torch.tensor([TOKENS, TOKENS, 0], dtype=torch.int32, device=device),
            self.blocks.expand(3, -1),
        )
        keys, values = (_taken(x, prompt.kept) for x in (prompt.keys, prompt.values))
        kept = [attention_state(self._grouped(query[row]), keys, values, self.scale) for row in (RECOMPUTES, MERGES)]
        keys, values = (_taken(x, prompt.evicted) for x in (prompt.keys, prompt.values))
        evicted = attention_state(self._grouped(query[RECOMPUTES]), keys, values, self.scale)
        answers = [merge_states(one, other).out for one, other in zip(kept, (evicted, earlier), strict=True)]
        if stored:
            rho = cosine(torch.stack([self._grouped(query[row]) for row in (RECOMPUTES, MERGES)]), wanted.query[0])
            wanted.count(0, torch.arange(2), decide(rho, theta1, theta2, gate))
            wanted.put(0, RECOMPUTES, self._grouped(query[RECOMPUTES]), evicted)
        else:
            answers = [state.out for state in kept]

        out = torch.full((3, heads, self.head_dim), 7.0, dtype=self.dtype, device=device)
        scratch, pages, on_device = self._scratch(3), self.worker.pages(0), query.to(device)
        if gpu.choice() == "xformers":
            name = "decode step (xformers)"
            with self._of(name):
                step = gpu.decode_step_op()
                step(on_device, out, self.cache, pages, rows, sequences, _state(found), scratch, self.scale)
        else:
            with self._of("decode") as name:
                triton.decode_kept(on_device, self.cache, rows, sequences, _state(found), scratch, self.scale)
                partial = _combined(scratch.kept_out[:2].cpu(), scratch.kept_lse[:2].cpu())
                for row, state in enumerate(kept):
                    self._compare_state(name, AttentionState(*(self._grouped(x[row]) for x in partial)), state)
            for name, reload in (("reload", triton.reload_evicted), ("reload encoded", triton.reload_encoded)):
                with self._of(name):  # the second has nothing to do, and leaves what is there
                    reload(on_device, pages, rows, sequences, scratch, self.scale)
                    if stored:
                        partial = _combined(scratch.evicted_out[:1].cpu(), scratch.evicted_lse[:1].cpu())
                        self._compare_state(name, AttentionState(*(self._grouped(x[0]) for x in partial)), evicted)
            name = "merge"
            with self._of(name):
                triton.merge_row(on_device, out, rows, sequences, _state(found), scratch)
        with self._of(name):
            for row, answer in enumerate(answers):
                self._compare(name, self._grouped(out[row]), answer, TOLERANCE[self.dtype])
            self._compare(name, out[PADDING], torch.full((heads, self.head_dim), 7.0), 0)
            self._compare_state(name, AttentionState(found.out, found.lse), AttentionState(wanted.out, wanted.lse))
            self._compare(name, found.query, wanted.query, 0)
            self._compare(name, found.counts, wanted.counts, 0)

    def codecs(self) -> None:
        """Encoded on the device, sent to the host, read again by the kernel; against what the host decodes there."""
        prompt, stored, device = self.prompt, self.prompt.evicted.shape[1], self.device
        if gpu.choice() == "xformers" or not stored:
            return
        self._write_cache()  # compaction has moved the kept tokens over others
        query = prompt.queries[RECOMPUTES]
        zero, end = torch.zeros(1, dtype=torch.int32, device=device), torch.full((1,), TOKENS, device=device)
        rows = Rows(zero, zero, end.int(), self.blocks.expand(1, -1))
        for number, codec in enumerate(self.worker.pool.codecs):
            if isinstance(codec, NoCodec):
                continue
            ids = tuple(range(codec.blocks_for(stored)))
            with self._of("reload encoded") as name:
                run = Run(ids, stored, codec)
                offload(0, self.blocks, prompt.evicted.to(device), self.cache, self.worker.pool, run)
                self.worker.pool.join()
                sequences = Sequences(
                    zero, zero + stored, zero.float(), zero.float(), zero,
                    torch.tensor([ids], dtype=torch.int32, device=device), *self._codec(1, number),
                )  # fmt: skip
                scratch = self._scratch(1)
                scratch.decision.fill_(triton.RECOMPUTE)
                scratch.similarity.zero_()
                on_device = query[None].to(device)
                triton.reload_encoded(on_device, self.worker.pages(0), rows, sequences, scratch, self.scale)
                found = _combined(scratch.evicted_out.cpu(), scratch.evicted_lse.cpu())
                heads = torch.arange(self.kv_heads)
                read = self.worker.pool.read(0, torch.tensor([ids]).expand(len(heads), -1), heads, number)
                keys, values = (x[:, :stored] for x in read)
                wanted = attention_state(self._grouped(query), keys, values, self.scale)
                for one, other in zip(found, wanted, strict=True):
                    self._compare(name, self._grouped(one[0]), other, CODES_TOLERANCE)
            if codec.name == "int8":
                with self._of("encode") as name:
                    for one, other in ((keys, prompt.keys), (values, prompt.values)):
                        self._compare(name, one, _taken(other, prompt.evicted).float(), INT8_TOLERANCE)

    def _codec(self, slots: int, number: int) -> tuple[Tensor, Tensor, Tensor]:
        """The last fields of Sequences: all slots with this codec, none with a read budget."""
        codec = torch.full((slots,), number, dtype=torch.int32, device=self.device)
        return codec, torch.full_like(codec, triton.NO_BUDGET), layout_table(self.head_dim, self.dtype, self.device)

    def _table(self, device: torch.device) -> StateTable:
        return StateTable(1, 2, self.kv_heads, self.group, self.head_dim, self.dtype, device)

    def _scratch(self, rows: int) -> Scratch:
        heads = (self.kv_heads, self.group, self.head_dim)
        return triton.view_scratch(triton.make_scratch(rows, *heads, self.device), rows, *heads)

    def _grouped(self, x: Tensor) -> Tensor:
        return x.unflatten(0, (self.kv_heads, self.group))

    def _compare_state(self, kernel: str, found: AttentionState, wanted: AttentionState) -> None:
        for one, other in zip(found, wanted, strict=True):
            self._compare(kernel, one, other, TOLERANCE[self.dtype])

    def _compare(self, kernel: str, found: Tensor, wanted: Tensor, tolerance: float) -> None:
        if wanted.numel() == 0:
            return
        found, wanted = found.cpu().double(), wanted.double()
        difference = (found - wanted).abs() / wanted.abs().clamp_min(1.0)
        worst = float(torch.where(found == wanted, 0.0, difference).nan_to_num(torch.inf).max())
        if worst > tolerance:
            raise SelfCheckError(self._refusal(kernel, f"differs by {worst:.3g} where {tolerance:.3g} is allowed"))
        self.worst[kernel] = max(worst, self.worst.get(kernel, 0.0))

    @contextmanager
    def _of(self, kernel: str) -> Iterator[str]:
        """Whatever goes wrong in it is the kernel's."""
        try:
            yield kernel
        except SelfCheckError:
            raise
        except Exception as error:
            raise SelfCheckError(self._refusal(kernel, f"cannot be run ({type(error).__name__}: {error})")) from error

    def _refusal(self, kernel: str, what: str) -> str:
        versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "triton", "vllm-calidrop"))
        return (
            f"calidrop: the kernel {kernel!r} {what}, so nothing is served. {_device_name(self.device)}, {versions}, "
            f"{self.dtype}, {self.kv_heads} KV heads of {self.group} query heads, head_dim {self.head_dim}, block size "
            f"{self.block_size}. Please report this line; without --attention-backend calidrop vLLM serves the model."
        )


def _small(kv_cache: Tensor, blocks: int) -> Tensor:
    """A cache of some blocks with another one's layout; NaN, as nothing that was not written may be used."""
    strides = kv_cache.stride()
    order = sorted(range(kv_cache.dim()), key=lambda dim: -strides[dim])
    sizes = (blocks, *kv_cache.shape[1:])
    made = torch.full([sizes[dim] for dim in order], torch.nan, dtype=kv_cache.dtype, device=kv_cache.device)
    return made.permute([order.index(dim) for dim in range(kv_cache.dim())])


def _taken(x: Tensor, index: Tensor) -> Tensor:
    """[H, T, D] at positions [H, n]."""
    return x.gather(1, index.unsqueeze(-1).expand(-1, -1, x.shape[-1]))


def _combined(out: Tensor, lse: Tensor) -> AttentionState:
    """The whole [N, Hq, D], [N, Hq] of states over splits [N, Hq, splits, D], [N, Hq, splits]."""
    weight = torch.softmax(lse, dim=-1).unsqueeze(-1)
    return AttentionState(torch.where(weight > 0, out * weight, 0.0).sum(-2), torch.logsumexp(lse, dim=-1))


def _moved(table: StateTable, query: Tensor, state: AttentionState) -> tuple[Tensor, AttentionState]:
    device = table.query.device
    return query.to(device), AttentionState(state.out.to(device), state.lse.to(device))


def _state(table: StateTable) -> State:
    return State(table.query[0], table.out[0], table.lse[0], table.counts[:, 0])


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "the host, interpreted"
