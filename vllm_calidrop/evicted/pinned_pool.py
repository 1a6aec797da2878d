"""The swap pool of a GPU worker: pinned host memory that the device's kernels read in place.

Registered once at start-up, for all of the server's life; torch's own pinning would round it up to a power of two.
Evicted KV goes by way of staging on the device: a kernel packs it there, on the compute stream, and copies on a stream
of their own take it to the host in large runs. So neither the KV blocks it came from nor the next layer waits for the
bus. There are two staging buffers; the compute stream waits, on the device, before it packs into one whose copies are
not done, and (`join`) before a step that may read what was stored.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from vllm_calidrop.evicted.codecs import Codec
from vllm_calidrop.evicted.pool import Part, SwapPool, part_of

STAGING_BUFFERS = 2
STAGING_BYTES = 64 * 2**20


class PinnedSwapPool(SwapPool):
    """On a CPU device (under Triton's interpreter) nothing is pinned."""

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
        self._stream: torch.cuda.Stream | None = None
        self._registered = False
        if device.type != "cpu":
            self.device_pages = self._pinned(device)
            self._stream = torch.cuda.Stream(device)
        count = staging_blocks(num_blocks, num_kv_heads, head_dim, dtype)
        shape = (STAGING_BUFFERS, count, *self.memory.shape[2:])
        self._staging = torch.zeros(shape, dtype=torch.uint8, device=device)
        self._copied: list[torch.cuda.Event | None] = [None] * STAGING_BUFFERS
        self._next = self._filling = 0

    def parts(self, block_ids: tuple[int, ...], tokens: int, codec: Codec) -> Iterator[Part]:
        """The blocks of a run of `tokens` evicted tokens, as many at a time as fit a staging buffer."""
        most = self._staging.shape[1]
        for first in range(0, len(block_ids), most):
            some = block_ids[first : first + most]
            buffer, self._next = self._next, (self._next + 1) % STAGING_BUFFERS
            copied = self._copied[buffer]
            if copied is not None:
                torch.cuda.current_stream().wait_event(copied)
            self._filling = buffer
            yield part_of(first, some, tokens, codec, self._staging[buffer, : len(some)])

    def send(self, layer: int, part: Part) -> None:
        """Copy a filled part to the host."""
        if self._stream is None:
            self._copy(layer, part)
            return
        # After the compute stream: it fills the buffer, and may still read what the blocks held before.
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            self._copy(layer, part)
            self._copied[self._filling] = self._stream.record_event()

    def join(self) -> None:
        """From here on the compute stream sees everything that was sent."""
        for copied in self._copied:
            if copied is not None:
                torch.cuda.current_stream().wait_event(copied)
        self._copied = [None] * STAGING_BUFFERS

    def close(self) -> None:
        """Wait for the copies, then unregister the memory, in this order. Idempotent."""
        if not self._registered:
            return
        torch.cuda.synchronize()
        self.device_pages = self.pages
        self._registered = False
        error = torch.cuda.cudart().cudaHostUnregister(self.pages.data_ptr())
        if int(error) != 0:
            raise RuntimeError(f"calidrop: the swap pool could not be unregistered: {error}")

    def _copy(self, layer: int, part: Part) -> None:
        for at, first, count in runs(part.block_ids):
            self.memory[layer, first : first + count].copy_(part.out[at : at + count], non_blocking=True)

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


def staging_blocks(num_blocks: int, num_kv_heads: int, head_dim: int, dtype: torch.dtype) -> int:
    """Swap blocks of one layer in a staging buffer: what STAGING_BYTES hold, at least one, at most the pool's."""
    block = SwapPool.block_bytes(1, num_kv_heads, head_dim, dtype)
    return min(num_blocks, max(1, STAGING_BYTES // block))


def staging_bytes(num_blocks: int, num_kv_heads: int, head_dim: int, dtype: torch.dtype) -> int:
    """Bytes of all staging buffers."""
    count = staging_blocks(num_blocks, num_kv_heads, head_dim, dtype)
    return count * STAGING_BUFFERS * SwapPool.block_bytes(1, num_kv_heads, head_dim, dtype)


def runs(block_ids: tuple[int, ...]) -> Iterator[tuple[int, int, int]]:
    """Consecutive ids as (place in block_ids, first id, how many): one copy each."""
    start = 0
    for at in range(1, len(block_ids) + 1):
        if at == len(block_ids) or block_ids[at] != block_ids[at - 1] + 1:
            yield start, block_ids[start], at - start
            start = at
