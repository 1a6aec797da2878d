"""One look of one KV head in C++, on its own: what tests and benchmarks of the kernels call."""

from __future__ import annotations

import ctypes
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vllm_calidrop.algorithm.calibration import AttentionState
from vllm_calidrop.evicted.layout import PAGE_TOKENS, PAGES_PER_BLOCK, pages_for
from vllm_calidrop.evicted.recall.rest import NEGLIGIBLE
from vllm_calidrop.evicted.recall.sketch import padded_dim, signs


class _Arguments(ctypes.Structure):
    """look.cpp::LookArguments, where the fields are explained."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in ("heads", "head_dim", "padded_dim", "tokens", "bits")),
        *((name, ctypes.c_int64) for name in ("page_bytes", "excluded_count")),
        *((name, ctypes.c_double) for name in ("scale", "negligible")),
        *((name, ctypes.c_void_p) for name in ("query", "kept_lse", "signs", "blocks", "codes", "scales", "mu")),
        *((name, ctypes.c_void_p) for name in ("balance", "value_codes", "value_scales", "value_mu", "excluded")),
        *((name, ctypes.c_void_p) for name in ("shares", "out", "lse")),
    ]


class CodedHead(NamedTuple):
    """What a KV head keeps of its evicted tokens on the device, in B blocks, contiguous.

    codes: uint8 [B, PAGES_PER_BLOCK, D' / 16, PAGE_TOKENS, 4]; scales: float16 [B, PAGES_PER_BLOCK, PAGE_TOKENS]; mu:
    float32 [D]; value_codes: uint8 [B, PAGES_PER_BLOCK, D', 2 bits] and value_scales like scales; value_mu: float32
    [D];
    balance: float32 [D].  Without a rest the last four are None.
    """

    codes: Tensor
    scales: Tensor
    mu: Tensor
    value_codes: Tensor | None = None
    value_scales: Tensor | None = None
    value_mu: Tensor | None = None
    balance: Tensor | None = None


def operator_of(library: ctypes.CDLL) -> Any:
    library.calidrop_look.argtypes = [ctypes.POINTER(_Arguments)]
    library.calidrop_look_arguments_bytes.restype = ctypes.c_int64
    assert library.calidrop_look_arguments_bytes() == ctypes.sizeof(_Arguments)
    return library.calidrop_look


class Look:
    """A look of `query` [G, D] at `head`, prepared once and called any number of times.

    blocks: int32 [W], the sequence's blocks in order; tokens: how many exist; kept_lse: [G]; excluded: int64 [X], pages
    attended otherwise. After a call `shares` is float32 [G, P], and `state` the rest's, where the head has coded
    values.
    """

    def __init__(
        self, operator: Any, head: CodedHead, query: Tensor, blocks: Tensor, tokens: int, kept_lse: Tensor,
        excluded: Tensor, scale: float, negligible: float = NEGLIGIBLE,
    ) -> None:  # fmt: skip
        self.operator, heads, head_dim = operator, *query.shape
        self.shares = torch.empty((heads, pages_for(tokens)))
        self.state = AttentionState(torch.empty(heads, head_dim), torch.empty(heads))
        kept = {
            "query": query.float().contiguous(), "kept_lse": kept_lse.float().contiguous(), "blocks": blocks,
            "signs": signs(padded_dim(head_dim)), "codes": head.codes, "scales": head.scales, "mu": head.mu,
            "balance": head.balance, "value_codes": head.value_codes, "value_scales": head.value_scales,
            "value_mu": head.value_mu, "excluded": excluded, "shares": self.shares, "out": self.state.out,
            "lse": self.state.lse,
        }  # fmt: skip
        assert head.codes.shape[1] == PAGES_PER_BLOCK and all(x is None or x.is_contiguous() for x in kept.values())
        self.kept = kept  # what the pointers point to
        bits = head.value_codes.shape[-1] // 2 if head.value_codes is not None else 0
        self.arguments = _Arguments(
            heads=heads,
            head_dim=head_dim,
            padded_dim=padded_dim(head_dim),
            tokens=tokens,
            bits=bits,
            page_bytes=padded_dim(head_dim) * PAGE_TOKENS * bits // 8,
            excluded_count=len(excluded),
            scale=scale,
            negligible=negligible,
            **{name: None if tensor is None else tensor.data_ptr() for name, tensor in kept.items()},
        )

    def __call__(self) -> None:
        status = self.operator(ctypes.byref(self.arguments))
        assert status == 0, status
