"""A codec's layout as plain numbers: what an operator that reads codes itself has to know.

The bytes they describe are `grouped.py`'s. C++ operators and Triton kernels read them from a table (`layout_table` in
`codecs/__init__.py`) and divide by them, so a wrong layout is refused when its codec is built.
"""

from __future__ import annotations

from typing import NamedTuple

from vllm_calidrop.evicted.layout import PAGE_TOKENS

ALIGNMENT = 16
# Outlier tokens of a group, in any codec: kernels loop over so many.
MAX_OUTLIERS = 3


class Layout(NamedTuple):
    """One codec's layout. Sizes are in bytes; is_float and fine are 0 or 1."""

    bits: int
    is_float: int
    fine: int
    outliers: int
    pages_per_block: int
    pages_per_group: int
    pages_per_range: int
    group_bytes: int
    head_bytes: int
    range_bytes: int
    position_bytes: int
    page_bytes: int
    code_bytes: int

    @classmethod
    def uncoded(cls, pages_per_block: int) -> Layout:
        """The layout of codec `none`, whose pages are read as they are: all other numbers are 0."""
        return cls(**dict.fromkeys(cls._fields, 0) | {"pages_per_block": pages_per_block})

    def faults(self, head_dim: int, element_bytes: int, block_bytes: int) -> list[str]:
        """What is wrong with it, for a cache of this head_dim and element size and for blocks of so many bytes."""
        if min(self) < 0 or self.pages_per_block < 1:
            return [f"negative numbers, or no page in a block: {self}"]
        if self == self.uncoded(self.pages_per_block):
            pages = self.pages_per_block * PAGE_TOKENS * 2 * head_dim * element_bytes
            return [] if pages == block_bytes else [f"{self.pages_per_block} pages as they are take {pages} bytes"]
        if self.pages_per_range < 1 or self.pages_per_group < 1 or self.pages_per_group % self.pages_per_range:
            return [f"pages_per_group {self.pages_per_group} are not ranges of {self.pages_per_range} pages"]
        ranges = self.pages_per_group // self.pages_per_range
        groups, rest = divmod(self.pages_per_block, self.pages_per_group)
        used = groups * self.group_bytes + (self.head_bytes + rest * self.page_bytes if rest else 0)
        head = ranges * self.range_bytes + self.position_bytes + self.outliers * 2 * head_dim * element_bytes
        holds = {
            "bits must be 2, 4 or 8, and 8 of a float": self.bits in ((8,) if self.is_float else (2, 4, 8)),
            "is_float and fine must be 0 or 1": max(self.is_float, self.fine) <= 1,
            f"outliers must be at most {MAX_OUTLIERS}": self.outliers <= MAX_OUTLIERS,
            "code_bytes must hold one token's codes": self.code_bytes == -(-head_dim * self.bits // 8),
            "page_bytes must hold a page": self.page_bytes == PAGE_TOKENS * (2 * self.code_bytes + 4 + self.fine),
            "range_bytes must hold offsets and scales": self.range_bytes == (3 if self.fine else 4) * head_dim,
            "position_bytes must hold them": self.position_bytes >= self.outliers + ranges * self.fine,
            f"head_bytes must hold {head}, in {ALIGNMENT}s": self.head_bytes >= head
            and self.head_bytes % ALIGNMENT == 0,
            "group_bytes must be a head and its pages": self.group_bytes
            == self.head_bytes + self.pages_per_group * self.page_bytes,
            f"its pages take {used} bytes of {block_bytes}": used <= block_bytes,
        }
        return [what for what, is_so in holds.items() if not is_so]
