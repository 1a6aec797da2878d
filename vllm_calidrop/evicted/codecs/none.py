"""No codec: evicted KV in the cache's dtype, page by page. What is read is what was written, to the bit."""

from __future__ import annotations

import torch
from torch import Tensor

from vllm_calidrop.evicted.codecs.base import Codec, Encoded
from vllm_calidrop.evicted.codecs.layout import Layout
from vllm_calidrop.evicted.layout import PAGE_TOKENS, PAGES_PER_BLOCK, SWAP_BLOCK_TOKENS


class NoCodec(Codec):
    """A block: [pages, 2 (K, V), PAGE_TOKENS, D] in the cache's dtype. Nothing is refused: NaN is stored as NaN."""

    name = "none"

    @property
    def tokens_per_block(self) -> int:
        return SWAP_BLOCK_TOKENS

    @property
    def page_read_bytes(self) -> int:
        return PAGE_TOKENS * 2 * self.head_dim * self.dtype.itemsize

    def run_bytes(self, tokens: int) -> int:
        """What is read ends with the last token, although its page goes on."""
        return tokens * 2 * self.head_dim * self.dtype.itemsize

    def encode(self, keys: Tensor, values: Tensor) -> Encoded:
        heads, tokens, head_dim = keys.shape
        count, (pages, rest) = self.blocks_for(tokens), divmod(tokens, PAGE_TOKENS)
        blocks = keys.new_zeros((heads, count * PAGES_PER_BLOCK, 2, PAGE_TOKENS, head_dim))
        for half, x in enumerate((keys, values)):
            blocks[:, :pages, half] = x[:, : tokens - rest].unflatten(1, (pages, PAGE_TOKENS))
            if rest:
                blocks[:, pages, half, :rest] = x[:, tokens - rest :]
        refused = torch.zeros(heads, dtype=torch.bool, device=keys.device)
        return Encoded(blocks.view(torch.uint8).view(heads, count, self.block_bytes), refused)

    def kernel_layout(self) -> Layout:
        return Layout.uncoded(self.pages_per_block)

    def decode(self, blocks: Tensor) -> tuple[Tensor, Tensor]:
        pages = blocks.view(self.dtype).view(len(blocks), -1, 2, PAGE_TOKENS, self.head_dim)
        return pages[:, :, 0].flatten(1, 2), pages[:, :, 1].flatten(1, 2)

    def decode_pages(self, memory: Tensor, first_bytes: Tensor, pages: Tensor) -> Tensor:
        runs = memory.view(self.dtype).view(-1, 2, PAGE_TOKENS, self.head_dim)
        return runs[first_bytes // self.page_read_bytes + pages]
