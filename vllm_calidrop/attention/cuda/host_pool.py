"""The swap pool of a GPU worker: pinned host memory that the device's kernels read in place.

Registered once at start-up, for all of the server's life; torch's own pinning would round it up to a power of two.
Evicted KV is written by copies on a stream of their own, from a staging tensor, so neither the blocks it came from nor
the next layer waits for it. `join` makes the compute stream wait before anything that may read.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from vllm_calidrop.cache.layout import PAGE_TOKENS, SWAP_BLOCK_TOKENS
from vllm_calidrop.cache.swap import SwapPool


class PinnedSwapPool(SwapPool):
    """device_pages: `pages` as the device sees them, the same memory. On a CPU device, `pages` itself."""

    def __init__(
        self,
        num_layers: int,
        num_blocks: int,
        num_kv_heads: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        super().__init__(num_layers, num_blocks, num_kv_heads, head_dim, dtype)
        self.device_pages = self.pages
        self._stream: torch.cuda.Stream | None = None
        self._written: torch.cuda.Event | None = None
        self._registered = False
        if device.type != "cpu":
            self.device_pages = self._pinned(device)
            self._stream = torch.cuda.Stream(device)

    def store(self, layer: int, block_ids: tuple[int, ...], keys: Tensor, values: Tensor) -> None:
        """Copy evicted KV [H, m, D] into blocks, on the pool's own stream."""
        staging = packed(keys, values, len(block_ids))
        if self._stream is None:
            self._copy(layer, block_ids, staging)
            return
        # After the compute stream: it makes the staging tensor, and may still read what the blocks held before.
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            self._copy(layer, block_ids, staging)
            self._written = self._stream.record_event()
        staging.record_stream(self._stream)

    def join(self) -> None:
        """From here on the compute stream sees everything that was stored."""
        if self._written is not None:
            torch.cuda.current_stream().wait_event(self._written)
            self._written = None

    def close(self) -> None:
        """Wait for the copies, then give the memory back to the pageable world, in this order. Idempotent."""
        if not self._registered:
            return
        torch.cuda.synchronize()
        self.device_pages = self.pages
        self._registered = False
        error = torch.cuda.cudart().cudaHostUnregister(self.pages.data_ptr())
        if int(error) != 0:
            raise RuntimeError(f"calidrop: the swap pool could not be unregistered: {error}")

    def _copy(self, layer: int, block_ids: tuple[int, ...], staging: Tensor) -> None:
        for at, first, count in runs(block_ids):
            self.pages[layer, first : first + count].copy_(staging[at : at + count], non_blocking=True)

    def _pinned(self, device: torch.device) -> Tensor:
        if self.pages.numel() == 0:
            return torch.empty(self.pages.shape, dtype=self.pages.dtype, device=device)
        from vllm.utils.platform_utils import is_uva_available
        from vllm.utils.torch_utils import get_accelerator_view_from_cpu_tensor

        if not is_uva_available():
            raise RuntimeError(self._refusal("pinned memory is not available here"))
        error = torch.cuda.cudart().cudaHostRegister(self.pages.data_ptr(), self.pages.nbytes, 0)
        if int(error) != 0:
            raise RuntimeError(self._refusal(f"cudaHostRegister answered {error}"))
        self._registered = True
        if not self.pages.is_pinned():
            raise RuntimeError(self._refusal("CUDA does not see the registered memory as pinned"))
        view: Tensor = get_accelerator_view_from_cpu_tensor(self.pages)
        # Once, at start-up: the view is the pool and not a copy of it.
        probe = self.pages.view(-1)[-1:]
        for value in (1.0, 0.0):
            probe.fill_(value)
            if view.view(-1)[-1:].item() != value:
                raise RuntimeError(self._refusal("the device does not see what the host writes"))
        return view

    def _refusal(self, reason: str) -> str:
        return (
            f"calidrop: the swap pool ({self.pages.nbytes / 2**30:.2f} GiB) cannot be pinned: {reason}. Lower it with "
            '--additional-config \'{"calidrop": {"swap_bytes": ...}}\''
        )


def packed(keys: Tensor, values: Tensor, num_blocks: int) -> Tensor:
    """Evicted KV [H, m, D] as swap blocks, contiguous: [num_blocks, H, pages, 2, PAGE_TOKENS, D], zero beyond m."""
    heads, tokens, head_dim = keys.shape
    kv = keys.new_zeros((heads, 2, num_blocks * SWAP_BLOCK_TOKENS, head_dim))
    kv[:, 0, :tokens] = keys
    kv[:, 1, :tokens] = values
    kv = kv.view(heads, 2, num_blocks, -1, PAGE_TOKENS, head_dim)
    return kv.permute(2, 0, 3, 1, 4, 5).contiguous()


def runs(block_ids: tuple[int, ...]) -> Iterator[tuple[int, int, int]]:
    """Consecutive ids as (place in block_ids, first id, how many): one copy each."""
    start = 0
    for at in range(1, len(block_ids) + 1):
        if at == len(block_ids) or block_ids[at] != block_ids[at - 1] + 1:
            yield start, block_ids[start], at - start
            start = at
