"""Every operator of a GPU's set, once before anything is served, against the reference operators on the host.

No GPU has been at hand where this was written, and drivers, GPUs and Triton differ: a kernel that is wrong here would
give wrong answers without a sign. So an engine whose operators do not agree does not start. The check goes the way of a
prompt and a decode step for every codec, in the model's dtype, head counts, block size and cache layout, through the
swap pool itself.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version

import torch
from torch import Tensor

from vllm_calidrop.algorithm.calibration import AttentionState, Gate
from vllm_calidrop.evicted.codecs import Codec, number_of
from vllm_calidrop.evicted.layout import SWAP_BLOCK_TOKENS
from vllm_calidrop.evicted.recall.store import RecallStore
from vllm_calidrop.ops.base import OperatorSet, Tables
from vllm_calidrop.ops.contract import Rows
from vllm_calidrop.ops.reference import ReferenceSet
from vllm_calidrop.ops.similarity import similarity_histogram
from vllm_calidrop.ops.state import store_state
from vllm_calidrop.ops.strided import StridedCache
from vllm_calidrop.records import SequenceRecord
from vllm_calidrop.worker.slots import SlotTables
from vllm_calidrop.worker.state_table import StateTable
from vllm_calidrop.worker.worker import CaliDropWorker

logger = logging.getLogger("vllm.calidrop")

TOKENS, BUDGET, WINDOW = 200, 40, 16
# Weights are rounded to the cache's dtype before they meet the values.
TOLERANCE = {torch.float32: 2e-5, torch.float16: 2e-3, torch.bfloat16: 1.5e-2}
SUMS_TOLERANCE = 2e-4
# How much further from the tokens' own KV, which are normal numbers, the device's codes may be than the host's worst:
# at the edge of a code the two may round in different directions.
CODES_TOLERANCE = 0.05
# What a state over decoded KV may differ by, as queries and weights count to 16 bits there.
CODED_STATE_TOLERANCE = 5e-4
RECOMPUTES, MERGES, PADDING, ROWS = 0, 1, 2, 3


class SelfCheckError(RuntimeError):
    """An operator does not run here, or does not give what it must."""


def self_check(worker: CaliDropWorker, kv_cache: Tensor, scale: float) -> None:
    """Raise SelfCheckError, naming the operator, unless all agree. kv_cache: a layer's, for its shape and layout."""
    started = time.perf_counter()
    check = _Check(worker, kv_cache, scale)
    check.observe()
    check.move()
    check.calibrate()
    for codec in check.codecs():
        check.pack(codec)
        check.decode(codec)
    logger.info(
        "CaliDrop: the %s operators checked on %s in %.1f s; largest difference %.1e (%s)",
        worker.operators.name,
        _device_name(worker.device),
        time.perf_counter() - started,
        max(check.worst.values()),
        max(check.worst, key=lambda name: check.worst[name]),
    )


class _Side:
    """An operator set with tables and a cache of its own: the set to be checked on the device, or the reference."""

    def __init__(self, operators: type[OperatorSet], worker: CaliDropWorker, kv_cache: Tensor) -> None:
        model, device = worker.operators.model, kv_cache.device
        self.device = device
        self.table = StateTable(1, 2, model.num_kv_heads, model.group, model.head_dim, model.dtype, device)
        self.slots = SlotTables(2, TOKENS, model.head_dim, model.dtype, device)
        store = RecallStore(1, 2, 0, 0, model.num_kv_heads, model.head_dim, model.dtype)
        tables = Tables(
            self.slots.sequences, self.slots.recall, self.table.layers, similarity_histogram(), worker.pool, store
        )
        self.operators = operators(tables, model, ROWS)
        self.cache = self.operators.cache_of(kv_cache)
        self.by_token = StridedCache(kv_cache)


class _Check:
    """The two sides, and the same random prompt in both caches; what was not written there is NaN."""

    def __init__(self, worker: CaliDropWorker, kv_cache: Tensor, scale: float) -> None:
        self.worker, self.scale, self.model = worker, scale, worker.operators.model
        self.worst: dict[str, float] = {}
        random = torch.Generator().manual_seed(0)
        model = self.model
        columns = -(-TOKENS // model.block_size)
        device_cache = _small(kv_cache, columns + 1)
        host_cache = torch.full(device_cache.shape, torch.nan, dtype=model.dtype)
        self.mine = _Side(type(worker.operators), worker, device_cache)
        self.reference = _Side(ReferenceSet, worker, host_cache)
        self.blocks = torch.randperm(columns + 1, generator=random)[:columns].int()

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=random).to(model.dtype)

        self.keys, self.values = normal(2, model.num_kv_heads, TOKENS, model.head_dim)
        self.queries = normal(TOKENS, model.num_kv_heads * model.group, model.head_dim)
        order = torch.rand((model.num_kv_heads, TOKENS), generator=random).argsort(-1)
        stored = min(TOKENS - BUDGET, worker.pool.pages.shape[1] * SWAP_BLOCK_TOKENS)
        self.kept = order[:, :BUDGET].sort(-1).values
        self.evicted = order[:, BUDGET : BUDGET + stored].sort(-1).values
        self._write()

    def _write(self) -> None:
        for side in (self.mine, self.reference):
            keys, values = self.keys.to(side.device), self.values.to(side.device)
            side.by_token.put(self.blocks.to(side.device), 0, keys, values)

    def codecs(self) -> list[Codec]:
        """Those that the set serves; without a pool nothing can be encoded."""
        names = self.mine.operators.VALUES.get("kv_codec")
        found = [codec for codec in self.worker.pool.codecs if names is None or codec.name in names]
        if not self.mine.operators.decodes_first:
            found = [codec for codec in found if codec.kernel_layout() is not None]
        return found if self.evicted.shape[1] else found[:1]

    def observe(self) -> None:
        sums = []
        for side in (self.mine, self.reference):
            shape = (self.model.num_kv_heads, TOKENS)
            sums.append(torch.zeros(shape, dtype=torch.float32, device=side.device))
            with self._of("observe"):
                queries, first = self.queries[-WINDOW:].to(side.device), TOKENS - WINDOW
                side.operators.observe(sums[-1], queries, side.cache, self.blocks.to(side.device), first, self.scale)
        self._compare("observe", sums[0], sums[1], SUMS_TOLERANCE)

    def move(self) -> None:
        """The kept tokens to the end of the prompt, and what then lies in all of it."""
        found = []
        for side in (self.mine, self.reference):
            blocks, kept = self.blocks.to(side.device), self.kept.to(side.device)
            with self._of("take"):
                taken = side.operators.take(side.cache, blocks, kept)
            with self._of("put"):
                side.operators.put(side.cache, blocks, TOKENS - BUDGET, *taken)
            found.append((*taken, *(read[0, :, :TOKENS] for read in side.by_token.read(blocks[None]))))
        for name, one, other in zip(("take", "take", "put", "put"), *found, strict=True):
            self._compare(name, one, other, 0)
        self._write()

    def calibrate(self) -> None:
        for side in (self.mine, self.reference):
            blocks, evicted = self.blocks.to(side.device), self.evicted.to(side.device)
            with self._of("calibrate"):
                query = self.queries[-1].to(side.device)
                side.operators.calibrate(query, side.cache, blocks, evicted, 0, MERGES, self.scale)
        self._compare_tables("calibrate", TOLERANCE[self.model.dtype])

    def pack(self, codec: Codec) -> None:
        """Encoded on the device, sent to the host and decoded there; against the tokens' own KV."""
        if not self.evicted.shape[1]:
            return
        pool, name = self.worker.pool, f"pack, codec {codec.name}"
        ids = tuple(range(codec.blocks_for(self.evicted.shape[1])))
        with self._of(name):
            blocks = self.blocks.to(self.mine.device)
            for part in pool.parts(ids, self.evicted.shape[1], codec):
                positions = self.evicted[:, part.tokens].contiguous().to(self.mine.device)
                refused = self.mine.operators.pack(self.mine.cache, blocks, positions, codec, part.out)
                pool.send(0, part)
                self._compare(name, refused.float(), torch.zeros(self.model.num_kv_heads), 0)
            pool.join()
            heads = torch.arange(self.model.num_kv_heads)
            read = pool.read(0, torch.tensor([ids]).expand(len(heads), -1), heads, number_of(codec.name))
        kv = tuple(_taken(x, self.evicted) for x in (self.keys, self.values))
        by_host = codec.decode(codec.encode(*kv).blocks.flatten(0, 1))
        for found, coded, exact in zip(read, by_host, kv, strict=True):
            stored, exact = exact.shape[1], exact.float()
            lost = float((coded.reshape(found.shape)[:, :stored].float() - exact).abs().max())
            further = (found[:, :stored].float() - exact).abs().sub(lost).clamp_min(0)
            self._compare(name, further, torch.zeros_like(further), CODES_TOLERANCE if lost else 0)

    def decode(self, codec: Codec) -> None:
        """Three rows of the compacted prompt: one must recompute, one must merge, one pads the batch."""
        name, heads = f"decode, codec {codec.name}", (self.model.num_kv_heads, self.model.group)
        outs = []
        for side in (self.mine, self.reference):
            blocks, kept = self.blocks.to(side.device), self.kept.to(side.device)
            operators, device = side.operators, side.device
            side.slots.admit([self._record(slot, codec) for slot in (RECOMPUTES, MERGES)])
            old = AttentionState(*(self._grouped(self.queries[row]).float().to(device) for row in (4, 5)))
            earlier = AttentionState(old.out, old.lse[..., 0] + math.log(BUDGET))  # weighs as much as the kept tokens
            for slot, row in ((RECOMPUTES, 3), (MERGES, MERGES)):
                store_state(side.table.layers[0], slot, self._grouped(self.queries[row]).to(device), earlier)
            side.table.counts.zero_()
            with self._of(name):
                operators.put(side.cache, blocks, TOKENS - BUDGET, *operators.take(side.cache, blocks, kept))
                outs.append(torch.full((ROWS, heads[0] * heads[1], self.model.head_dim), 7.0, device=device))
                outs[-1] = outs[-1].to(self.model.dtype)
                operators.decode(
                    self.queries[:ROWS].to(device), outs[-1], side.cache, 0, self._rows(device), self.scale
                )
        self._compare(name, outs[0], outs[1], TOLERANCE[self.model.dtype])
        self._compare(name, outs[0][PADDING], outs[1][PADDING], 0)
        self._compare_tables(name, TOLERANCE[self.model.dtype] if codec.name == "none" else CODED_STATE_TOLERANCE)
        self._write()  # compaction has moved the kept tokens over others

    def _record(self, slot: int, codec: Codec) -> SequenceRecord:
        stored = self.evicted.shape[1]
        return SequenceRecord(
            request_id=str(slot), admission=slot, slot=slot, prompt_len=TOKENS, compaction_point=TOKENS, budget=BUDGET,
            first_block=0, view_start=0, policy="snapkv", window=WINDOW, sinks=0, pool_kernel=1, theta1=0.6,
            theta2=0.9, gate=int(Gate.GROUP), stored=stored, swap_blocks=tuple(range(codec.blocks_for(stored))),
            codec=codec.name,
        )  # fmt: skip

    def _rows(self, device: torch.device) -> Rows:
        """The third row is padding: its other entries name a slot and a token, and must not be followed."""
        slot = torch.tensor([RECOMPUTES, MERGES, 0], dtype=torch.int32, device=device)
        token = torch.arange(ROWS, dtype=torch.int32, device=device)
        end = torch.tensor([TOKENS, TOKENS, 0], dtype=torch.int32, device=device)
        return Rows(slot, token, end, self.blocks.to(device).expand(ROWS, -1))

    def _grouped(self, x: Tensor) -> Tensor:
        return x.unflatten(0, (self.model.num_kv_heads, self.model.group))

    def _compare_tables(self, operator: str, tolerance: float) -> None:
        for field in ("query", "out", "lse", "counts"):
            one, other = (getattr(side.table.layers[0], field) for side in (self.mine, self.reference))
            self._compare(operator, one, other, 0 if field in ("query", "counts") else tolerance)

    def _compare(self, operator: str, found: Tensor, wanted: Tensor, tolerance: float) -> None:
        if wanted.numel() == 0:
            return
        found, wanted = found.cpu().double(), wanted.cpu().double()
        difference = (found - wanted).abs() / wanted.abs().clamp_min(1.0)
        worst = float(torch.where(found == wanted, 0.0, difference).nan_to_num(torch.inf).max())
        if worst > tolerance:
            raise SelfCheckError(self._refusal(operator, f"differs by {worst:.3g} where {tolerance:.3g} is allowed"))
        self.worst[operator] = max(worst, self.worst.get(operator, 0.0))

    @contextmanager
    def _of(self, operator: str) -> Iterator[None]:
        """Whatever goes wrong in it is the operator's."""
        try:
            yield
        except SelfCheckError:
            raise
        except Exception as error:
            raise SelfCheckError(self._refusal(operator, f"cannot be run ({type(error).__name__}: {error})")) from error

    def _refusal(self, operator: str, what: str) -> str:
        model, name = self.model, self.worker.operators.name
        versions = ", ".join(f"{package} {version(package)}" for package in ("torch", "triton", "vllm-calidrop"))
        return (
            f"calidrop: the {name} operator {operator!r} {what}, so nothing is served. "
            f"{_device_name(self.worker.device)}, {versions}, {model.dtype}, {model.num_kv_heads} KV heads of "
            f"{model.group} query heads, head_dim {model.head_dim}, block size {model.block_size}. Please report this "
            "line; without --attention-backend calidrop vLLM serves the model."
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


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "the host, interpreted"
