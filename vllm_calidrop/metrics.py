"""The names of all Prometheus metrics, in one place: what the server exports, and what dashboards and alerts may use.

vLLM's habits: prefix `calidrop:`, labels `model_name` and `engine`, base units, and `_total` added to a counter's name
when it is exposed. ENGINE metrics are cumulative in each engine process and set to that value by whoever answers a
scrape; API metrics are counted in the API processes and summed over them. Nothing here imports a metrics library.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

PREFIX = "calidrop:"

MODEL, ENGINE = "model_name", "engine"


@dataclass(frozen=True)
class Metric:
    """One metric family. buckets: upper bounds of a histogram, without +Inf."""

    name: str
    kind: Literal["counter", "gauge", "histogram"]
    help: str
    labels: tuple[str, ...] = (MODEL, ENGINE)
    buckets: tuple[float, ...] = ()

    @property
    def family(self) -> str:
        return PREFIX + self.name

    @property
    def exposed(self) -> tuple[str, ...]:
        """The names of its samples on `/metrics`."""
        if self.kind == "counter":
            return (f"{self.family}_total",)
        if self.kind == "histogram":
            return tuple(f"{self.family}_{part}" for part in ("bucket", "sum", "count"))
        return (self.family,)


_LAYER = (MODEL, ENGINE, "layer")

REQUESTS = Metric(
    "requests",
    "counter",
    "Requests admitted, by what was decided: calidrop (evicted, calibrated), evict (not calibrated) or full.",
    (MODEL, ENGINE, "mode"),
)
FALLBACKS = Metric(
    "requests_fallback",
    "counter",
    "Requests that got less than they asked for, by reason: swap_full (host pool) or recall_full (sketches, buffer).",
    (MODEL, ENGINE, "reason"),
)
REFUSED = Metric(
    "requests_refused",
    "counter",
    "Requests that this backend refused, by reason: invalid (400), limit (400, outside the operator's), "
    "never_fits (400, would wait for ever), swap_full or recall_full (503, kv_on_full: reject).",
    (MODEL, "reason"),
)
SWAP_WAITS = Metric("swap_waits", "counter", "Requests that had to wait for the host pool (kv_on_full: wait).")
KEPT_TOKENS = Metric(
    "kept_tokens", "counter", "Prompt tokens per KV head kept by compactions, counted once per request."
)
EVICTED_TOKENS = Metric(
    "evicted_tokens", "counter", "Prompt tokens per KV head evicted by compactions, counted once per request."
)
KV_BLOCKS_FREED = Metric("kv_blocks_freed", "counter", "KV-cache blocks given back by compactions.")
KV_BLOCKS_USED = Metric("kv_blocks_used", "gauge", "KV-cache blocks held by requests.")
KV_BLOCKS = Metric("kv_blocks", "gauge", "KV-cache blocks in all.")
SEQUENCES = Metric("sequences", "gauge", "Running sequences that are or will be compacted.")
SWAP_BLOCKS_USED = Metric("swap_blocks_used", "gauge", "Blocks of the host pool in use.")
SWAP_BLOCKS = Metric("swap_blocks", "gauge", "Blocks of the host pool in all.")
SWAP_BLOCK_BYTES = Metric("swap_block_bytes", "gauge", "Bytes of one block of the host pool, all ranks together.")
SKETCH_BLOCKS_USED = Metric("sketch_blocks_used", "gauge", "Sketch blocks (recall by pages) in use.")
SKETCH_BLOCKS = Metric("sketch_blocks", "gauge", "Sketch blocks (recall by pages) in all.")
BUFFER_PAGES_USED = Metric("buffer_pages_used", "gauge", "Places of page buffers (recall by pages) in use.")
BUFFER_PAGES = Metric("buffer_pages", "gauge", "Places of page buffers (recall by pages) in all.")
BYTES_OUT = Metric("bytes_out", "counter", "Bytes of evicted KV copied to the host pool, all ranks together.")
BYTES_IN = Metric("bytes_in", "counter", "Bytes of evicted KV read again from the host pool, all ranks together.")
RECOMPUTES = Metric("recomputes", "counter", "Decisions (query head, step) that read evicted KV again.", _LAYER)
MERGES = Metric("merges", "counter", "Decisions (query head, step) that merged the stored state.", _LAYER)
PLAIN = Metric("plain", "counter", "Decisions (query head, step) that used the kept tokens alone.", _LAYER)
GROUP_READS = Metric("group_reads", "counter", "Reads of the evicted KV of one KV head.", _LAYER)
PAGES_READ = Metric("pages_read", "counter", "16-token pages of one KV head that those reads read.", _LAYER)
SKIPPED = Metric(
    "skipped", "counter", "Reads (recall by pages: pages) that a read budget kept from being made.", _LAYER
)
NONFINITE = Metric(
    "nonfinite", "counter", "KV heads whose evicted KV held NaN or inf, so that a codec refused to store it.", _LAYER
)
COMPACTION_SECONDS = Metric(
    "compaction_seconds",
    "histogram",
    "Time to compact one prompt, all layers together, on the first rank; CPU back end.",
    buckets=(0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0),
)
SIMILARITY = Metric(
    "similarity",
    "histogram",
    "Cosine similarity of a decode query to the one its stored state was computed with, one per decision of the first "
    "rank's heads; CPU back end.",
    buckets=(0.0, 0.2, 0.4, 0.5, 0.6, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95, 0.98, 1.0),
)
DEFAULTS_VERSION = Metric(
    "defaults_version", "gauge", "Version of the server defaults in force; rises with every change.", (MODEL,)
)

# One entry per column of vllm_calidrop.records.COUNTERS.
LAYER_COUNTERS = (RECOMPUTES, MERGES, PLAIN, GROUP_READS, PAGES_READ, SKIPPED, NONFINITE)

METRICS: tuple[Metric, ...] = (
    REQUESTS,
    FALLBACKS,
    REFUSED,
    SWAP_WAITS,
    KEPT_TOKENS,
    EVICTED_TOKENS,
    KV_BLOCKS_FREED,
    KV_BLOCKS_USED,
    KV_BLOCKS,
    SEQUENCES,
    SWAP_BLOCKS_USED,
    SWAP_BLOCKS,
    SWAP_BLOCK_BYTES,
    SKETCH_BLOCKS_USED,
    SKETCH_BLOCKS,
    BUFFER_PAGES_USED,
    BUFFER_PAGES,
    BYTES_OUT,
    BYTES_IN,
    *LAYER_COUNTERS,
    COMPACTION_SECONDS,
    SIMILARITY,
    DEFAULTS_VERSION,
)
