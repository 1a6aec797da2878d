"""The numbers that all languages share: Triton takes them as constants, C++ as a header that is made from them.

They are defined where they belong; this file only collects them, so that no kernel has a copy of its own.
"""

from __future__ import annotations

from vllm_calidrop.algorithm.calibration import Gate
from vllm_calidrop.evicted.codecs.layout import Layout
from vllm_calidrop.evicted.layout import MAX_BUFFER, PAGE_TOKENS, PAGES_PER_BLOCK, SWAP_BLOCK_TOKENS
from vllm_calidrop.evicted.recall.buffer import EMPTY, OLDEST
from vllm_calidrop.evicted.recall.rest import NEGLIGIBLE
from vllm_calidrop.evicted.recall.sketch import CHANNELS_PER_BYTE, LEVELS, LLOYD_MAX_ERROR, UNBIASED_ERROR, WORD_BYTES
from vllm_calidrop.ops.contract import NO_BUDGET
from vllm_calidrop.records import COUNTERS

# Values of a kernel's decision buffer. From RECOMPUTE on a head recomputes; less RECOMPUTE it is what the head does
# where the read budget keeps its group from that.
PLAIN, MERGE, RECOMPUTE, RECOMPUTE_OR_MERGE = 0, 1, 2, 3


def header() -> str:
    """The C++ header `numbers.h`: enums of gates, counters and layout fields, and the sizes as constants."""
    sizes = {
        "PageTokens": PAGE_TOKENS,
        "SwapBlockTokens": SWAP_BLOCK_TOKENS,
        "PagesPerBlock": PAGES_PER_BLOCK,
        "MaxBuffer": MAX_BUFFER,
        "WordChannels": CHANNELS_PER_BYTE * WORD_BYTES,
        "Empty": EMPTY,
        "Oldest": OLDEST,
        "NoBudget": NO_BUDGET,
    }
    gates = ", ".join(f"kGate{_camel(gate.name)} = {int(gate)}" for gate in Gate)
    counters = ", ".join(f"kCount{_camel(name)} = {column}" for column, name in enumerate(COUNTERS))
    lines = [
        "// Made by ops/numbers.py::header when the operators are built.",
        "#pragma once",
        "#include <cstdint>",
        "namespace calidrop {",
        f"enum GateNumber {{ {gates} }};",
        f"enum CounterColumn {{ {counters} }};",
        *(f"constexpr int k{name} = {value};" for name, value in sizes.items()),
        f"constexpr float kInnerLevel = {LEVELS[0]}f, kOuterLevel = {LEVELS[1]}f;",
        "// Of the error of a balanced query's product with a sketched key, per |query|^2 and squared scale.",
        f"constexpr float kErrorVariance = {UNBIASED_ERROR * (1 - LLOYD_MAX_ERROR) ** 2}f;",
        f"constexpr float kNegligible = {NEGLIGIBLE}f;",
        "// One codec's layout, by the names of evicted/codecs/layout.py::Layout.",
        f"struct CodecLayout {{ int32_t {', '.join(Layout._fields)}; }};",
        "}  // namespace calidrop",
    ]
    return "\n".join(lines) + "\n"


def _camel(name: str) -> str:
    return "".join(part.capitalize() for part in name.lower().split("_"))
