"""The layout of the quantised codecs: keys per channel in groups of tokens, values per token, outlier tokens beside.

Keys per channel and values per token is KIVI's layout (arXiv 2402.02750). A code c stands for offset + scale *
number(c); offset and scale are bfloat16, which has float32's range. A block is a row of groups of GROUP_TOKENS tokens;
its last group has fewer pages where no whole one fits. A group, in bytes (D head_dim, O outlier tokens, C bytes of D
codes):

    R times      for each of R ranges of the group's tokens, which have offsets and scales of their own:
      2 D          offsets of the key channels
      2 D          scales of the key channels; fine codecs: D, in a byte each
    pad16(O)     positions of the outlier tokens inside the group, NOWHERE where there are fewer; fine codecs: then, in
                 the padding, the exponents of the R ranges' scales, a byte each
    2 O D item   K and V of the outlier tokens, in the cache's dtype
                 zeros up to a multiple of 16: the head; then GROUP_TOKENS / 16 pages of
    16 C         codes of the keys, token by token, the first channel in the lowest bits
    16 C         codes of the values
    64           offset and scale of each token's values
    16           fine codecs: gain of each token's keys, offset + gain * scale * number(c), a byte each

Fine codecs (of few bits) have several ranges in a group, R > 1, and pay for them with smaller numbers. A scale is four
bits of mantissa and four of exponent above its range's: byte b of exponent e is the float32 of bits (e << 23) + (b <<
19), 0 for b = 0. A gain's byte b is (b + 64) / 128. It makes up for what coarse codes take from a key's length:
<k - offset, decoded - offset> becomes |k - offset|^2. Without it the key that a query looks for, the longest along it,
loses the most.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from vllm_calidrop.evicted.codecs.base import LARGEST, Codec, Encoded, gather_runs
from vllm_calidrop.evicted.codecs.layout import ALIGNMENT, Layout
from vllm_calidrop.evicted.codecs.outliers import outlier_tokens
from vllm_calidrop.evicted.layout import PAGE_TOKENS

NOWHERE = 255
# Of a byte-sized scale: bits of a float32's mantissa that it leaves out, and exponents from its range's on.
SCALE_SHIFT, SCALE_EXPONENTS = 19, 16
# A byte-sized gain of b is (b + GAIN_START) / GAIN_UNITS.
GAIN_START, GAIN_UNITS = 64, 128


class Quantised(NamedTuple):
    """Codes and what they mean along one axis. codes: uint8, the shape of what was quantised, one a byte.

    offset, scale: bfloat16, the same shape with 1 along that axis.
    """

    codes: Tensor
    offset: Tensor
    scale: Tensor


class GroupedCodec(Codec):
    """A number format of `bits` bits in this layout.

    is_float: whether codes are e4m3 numbers. fine: whether scales of keys are a byte, and each key has a gain. ranges,
    outliers: of a group; 0 outliers for none.
    """

    bits: ClassVar[int]
    is_float: ClassVar[bool] = False
    fine: ClassVar[bool] = False
    group_tokens: ClassVar[int]
    ranges: ClassVar[int] = 1
    outliers: ClassVar[int]

    @abstractmethod
    def quantise(self, x: Tensor, dim: int, valid: Tensor) -> Quantised:
        """Quantise float32 `x` along `dim`; valid: bool, broadcast to x, False where nothing counts.

        Fine codecs: a scale has as many bits of mantissa as a byte-sized one."""

    @abstractmethod
    def numbers(self, codes: Tensor) -> Tensor:
        """float32: what the codes stand for before offset and scale."""

    # --- sizes -------------------------------------------------------------------------------------------------------

    @property
    def code_bytes(self) -> int:
        """C: bytes of one token's codes of K or V."""
        return -(-self.head_dim * self.bits // 8)

    @property
    def page_bytes(self) -> int:
        return PAGE_TOKENS * (2 * self.code_bytes + 4 + self.fine)

    @property
    def range_bytes(self) -> int:
        return (3 if self.fine else 4) * self.head_dim

    @property
    def position_bytes(self) -> int:
        return _aligned(self.outliers + self.ranges * self.fine)

    @property
    def head_bytes(self) -> int:
        outliers = self.outliers * 2 * self.head_dim * self.dtype.itemsize
        return _aligned(self.ranges * self.range_bytes + self.position_bytes + outliers)

    @property
    def pages_per_range(self) -> int:
        return self.pages_per_group // self.ranges

    @property
    def pages_per_group(self) -> int:
        return self.group_tokens // PAGE_TOKENS

    @property
    def group_bytes(self) -> int:
        return self.head_bytes + self.pages_per_group * self.page_bytes

    @property
    def tokens_per_block(self) -> int:
        whole, rest = divmod(self.block_bytes, self.group_bytes)
        pages = max(0, rest - self.head_bytes) // self.page_bytes
        return whole * self.group_tokens + pages * PAGE_TOKENS

    @property
    def groups_per_block(self) -> int:
        """The last one may have fewer pages."""
        return -(-self.tokens_per_block // self.group_tokens)

    @property
    def page_read_bytes(self) -> int:
        """A page and the whole head of its group."""
        return self.head_bytes + self.page_bytes

    def run_bytes(self, tokens: int) -> int:
        blocks, rest = divmod(tokens, self.tokens_per_block)
        groups = blocks * self.groups_per_block + -(-rest // self.group_tokens)
        return groups * self.head_bytes + self.page_count(tokens) * self.page_bytes

    def kernel_layout(self) -> Layout:
        return Layout(**{field: int(getattr(self, field)) for field in Layout._fields})

    # --- encoding ----------------------------------------------------------------------------------------------------

    def encode(self, keys: Tensor, values: Tensor) -> Encoded:
        """Block by block, so that the copies in float32 stay small."""
        refused = _refused(keys) | _refused(values)
        shape = (len(keys), self.blocks_for(keys.shape[1]), self.block_bytes)
        blocks = torch.zeros(shape, dtype=torch.uint8, device=keys.device)
        runs = zip(keys.split(self.tokens_per_block, dim=1), values.split(self.tokens_per_block, dim=1), strict=True)
        for index, run in enumerate(runs):
            kv = torch.where(refused[:, None, None, None], 0, torch.stack(run, dim=1))
            encoded = self._encode_groups(kv).flatten(1)[:, : self.block_bytes]
            blocks[:, index, : encoded.shape[1]] = encoded
        return Encoded(blocks, refused)

    def _encode_groups(self, kv: Tensor) -> Tensor:
        """uint8 [H, groups, group_bytes] of a block's tokens [H, 2 (K, V), T, D]."""
        heads, _, tokens, head_dim = kv.shape
        groups = -(-tokens // self.group_tokens)
        padding = groups * self.group_tokens - tokens
        kv = torch.nn.functional.pad(kv, (0, 0, 0, padding)).unflatten(2, (groups, self.group_tokens)).transpose(1, 2)
        keys, values = kv.float().unbind(2)  # [H, groups, G, D]
        index = torch.arange(groups * self.group_tokens, device=kv.device)
        exists = (index < tokens).view(groups, self.group_tokens).expand(heads, -1, -1)

        position = outlier_tokens(keys, exists, self.outliers)
        coded = ~torch.zeros_like(exists).scatter(-1, position, True) & exists
        ranges = keys.unflatten(2, (self.ranges, -1))  # [H, groups, R, G / R, D]
        k = self.quantise(ranges, -2, coded.unflatten(2, (self.ranges, -1)).unsqueeze(-1))
        v = self.quantise(values, -1, exists.unsqueeze(-1))

        outliers = kv.gather(3, position[:, :, None, :, None].expand(-1, -1, 2, -1, head_dim)).transpose(2, 3)
        position = torch.where(exists.gather(-1, position), position, NOWHERE).to(torch.uint8)
        scale = k.scale.squeeze(-2)
        if self.fine:
            scale, exponent = _bytes_of_scales(scale)
            k = k._replace(scale=_scales_of_bytes(scale, exponent).unsqueeze(-2).to(torch.bfloat16))
            position = torch.cat((position, exponent), dim=-1)
        head = torch.cat(
            (
                torch.cat((_bytes(k.offset.squeeze(-2)), _bytes(scale)), dim=-1).flatten(2),
                torch.nn.functional.pad(position, (0, self.position_bytes - position.shape[-1]), value=NOWHERE),
                _bytes(outliers.flatten(2)),
            ),
            dim=-1,
        )
        head = torch.nn.functional.pad(head, (0, self.head_bytes - head.shape[-1]))
        shape = (heads, groups, self.pages_per_group, -1)
        pages = [
            _packed(k.codes, self.bits).reshape(shape),
            _packed(v.codes, self.bits).reshape(shape),
            _bytes(torch.cat((v.offset, v.scale), dim=-1)).reshape(shape),
        ]
        if self.fine:
            pages.append(self._gains(ranges, k).reshape(shape))
        return torch.cat((head, torch.cat(pages, dim=-1).flatten(2)), dim=-1)

    def _gains(self, keys: Tensor, quantised: Quantised) -> Tensor:
        """uint8 [..., G] of keys [..., G, D]; that of 1 where nothing is coded."""
        away = keys - quantised.offset.float()
        coded = quantised.scale.float() * self.numbers(quantised.codes)
        overlap = (away * coded).sum(-1)
        gain = torch.where(overlap > 0, away.square().sum(-1) / overlap, 1.0)
        return (gain * GAIN_UNITS - GAIN_START).round().clamp(0, 255).to(torch.uint8)

    # --- decoding ----------------------------------------------------------------------------------------------------

    def decode(self, blocks: Tensor) -> tuple[Tensor, Tensor]:
        """float32. Groups beyond a run's end decode to whatever lies there, NaN included."""
        whole = self.groups_per_block * self.group_bytes
        groups = torch.nn.functional.pad(blocks[:, :whole], (0, whole - min(whole, self.block_bytes)))
        head, pages = groups.view(-1, self.group_bytes).split((self.head_bytes, self.group_bytes - self.head_bytes), 1)
        pages = pages.unflatten(1, (self.pages_per_group, self.page_bytes))
        kv = self._decoded(head, pages, torch.arange(self.group_tokens)).unflatten(0, (len(blocks), -1))
        keys, values = kv.transpose(1, 2).flatten(2, 3)[:, :, : self.tokens_per_block].unbind(1)
        return keys, values

    def decode_pages(self, memory: Tensor, first_bytes: Tensor, pages: Tensor) -> Tensor:
        """float32."""
        group, page = pages // self.pages_per_group, pages % self.pages_per_group
        start = first_bytes + group * self.group_bytes
        head = gather_runs(memory, start, self.head_bytes)
        codes = gather_runs(memory, start + self.head_bytes + page * self.page_bytes, self.page_bytes)
        tokens = page.unsqueeze(-1) * PAGE_TOKENS + torch.arange(PAGE_TOKENS)
        return self._decoded(head, codes.unsqueeze(1), tokens)

    def _decoded(self, head: Tensor, pages: Tensor, tokens: Tensor) -> Tensor:
        """float32 [N, 2, T, D] of pages uint8 [N, P, page_bytes] of N groups with heads uint8 [N, head_bytes].

        tokens: int64 [T] or [N, T], the tokens' positions in their group, T = P * PAGE_TOKENS.
        """
        head_dim, code_run = self.head_dim, PAGE_TOKENS * self.code_bytes
        ranges, position, outliers = head.tensor_split(
            (self.ranges * self.range_bytes, self.ranges * self.range_bytes + self.position_bytes), dim=1
        )
        offset, scale = ranges.reshape(-1, self.ranges, self.range_bytes).tensor_split((2 * head_dim,), dim=2)
        offset = _numbers(offset, torch.bfloat16).float()
        if self.fine:
            scale = _scales_of_bytes(scale, position[:, self.outliers : self.outliers + self.ranges])
        else:
            scale = _numbers(scale, torch.bfloat16).float()
        k_codes, v_codes, v_meta, gains = pages.split(
            (code_run, code_run, PAGE_TOKENS * 4, PAGE_TOKENS * self.fine), dim=-1
        )
        range_of = (tokens // (PAGE_TOKENS * self.pages_per_range)).expand(len(head), -1)
        pair = torch.arange(len(head)).unsqueeze(-1)
        keys = scale[pair, range_of] * self._unpacked(k_codes)
        if self.fine:
            keys = keys * ((gains.float() + GAIN_START) / GAIN_UNITS).view(len(head), -1, 1)
        keys = keys + offset[pair, range_of]
        v_offset, v_scale = _numbers(v_meta, torch.bfloat16).float().view(len(head), -1, 2).unsqueeze(-1).unbind(2)
        kv = torch.stack((keys, v_offset + v_scale * self._unpacked(v_codes)), dim=1)
        if not self.outliers:
            return kv
        exact = _numbers(outliers[:, : self.outliers * 2 * head_dim * self.dtype.itemsize], self.dtype)
        exact = exact.float().view(-1, self.outliers, 2, head_dim)
        here = position[:, : self.outliers].long().unsqueeze(-1) == tokens.unsqueeze(-2)  # [N, O, T]
        pair, outlier, token = torch.nonzero(here, as_tuple=True)
        kv[pair, :, token] = exact[pair, outlier]
        return kv

    def _unpacked(self, packed: Tensor) -> Tensor:
        """float32 [N, T, D] numbers of packed codes uint8 [N, P, PAGE_TOKENS * code_bytes]."""
        packed = packed.reshape(len(packed), -1, self.code_bytes)
        if self.bits < 8:
            shifts = torch.arange(0, 8, self.bits, dtype=torch.uint8)
            packed = (packed.unsqueeze(-1) >> shifts & (1 << self.bits) - 1).flatten(-2)
        return self.numbers(packed[..., : self.head_dim])


def bfloat16_below(x: Tensor) -> Tensor:
    """The largest bfloat16 that is not above x (float32)."""
    rounded = x.to(torch.bfloat16)
    return torch.where(rounded.float() > x, torch.nextafter(rounded, torch.full_like(rounded, -torch.inf)), rounded)


def bfloat16_above(x: Tensor) -> Tensor:
    """The smallest bfloat16 that is not below x (float32)."""
    return -bfloat16_below(-x)


def coarse_below(x: Tensor) -> Tensor:
    """x >= 0 (float32) with as many bits of mantissa as a byte-sized scale has, cut off. bfloat16, which holds it."""
    return (x.view(torch.int32) >> SCALE_SHIFT << SCALE_SHIFT).view(torch.float32).to(torch.bfloat16)


def coarse_above(x: Tensor) -> Tensor:
    """The same, the smallest that is not below x."""
    return _coarse_moved(x, (1 << SCALE_SHIFT) - 1)


def coarse_nearest(x: Tensor) -> Tensor:
    """The same, the nearest."""
    return _coarse_moved(x, 1 << SCALE_SHIFT - 1)


def _coarse_moved(x: Tensor, bits: int) -> Tensor:
    return coarse_below((x.contiguous().view(torch.int32) + bits).view(torch.float32))


def _bytes_of_scales(scale: Tensor) -> tuple[Tensor, Tensor]:
    """Codes scales bfloat16 [..., D] as bytes [..., D], 0 for those too small for one, and exponents uint8 [...]."""
    bits = scale.float().view(torch.int32) >> SCALE_SHIFT
    mantissa_bits = 23 - SCALE_SHIFT
    exponent = ((bits.amax(-1) >> mantissa_bits) - (SCALE_EXPONENTS - 1)).clamp(min=0)
    return (bits - (exponent << mantissa_bits).unsqueeze(-1)).clamp(min=0).to(torch.uint8), exponent.to(torch.uint8)


def _scales_of_bytes(scale: Tensor, exponent: Tensor) -> Tensor:
    """float32 [..., D] of bytes [..., D] and exponents uint8 [...]."""
    bits = (exponent.int() << 23).unsqueeze(-1) + (scale.int() << SCALE_SHIFT)
    return torch.where(scale > 0, bits, 0).view(torch.float32)


def _refused(x: Tensor) -> Tensor:
    """bool [H]: heads of x [H, T, D] with a number that is not finite or too large; NaN compares as neither."""
    return ~(x.abs() < LARGEST).flatten(1).all(-1)


def _packed(codes: Tensor, bits: int) -> Tensor:
    """Codes uint8 [..., D], `bits` of each -> [..., bytes], the first in the lowest bits."""
    if bits == 8:
        return codes
    per_byte = 8 // bits
    codes = torch.nn.functional.pad(codes, (0, -codes.shape[-1] % per_byte)).unflatten(-1, (-1, per_byte))
    packed = codes[..., 0]
    for place in range(1, per_byte):
        packed = packed | codes[..., place] << place * bits
    return packed


def _bytes(x: Tensor) -> Tensor:
    return x.contiguous().view(torch.uint8)


def _numbers(raw: Tensor, dtype: torch.dtype) -> Tensor:
    """Bytes [..., n * itemsize] as numbers [..., n]."""
    return raw.contiguous().view(dtype)


def _aligned(count: int) -> int:
    return -(-count // ALIGNMENT) * ALIGNMENT
