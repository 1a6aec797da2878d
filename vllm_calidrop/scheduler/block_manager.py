"""vLLM's full-attention block manager, which also frees what compaction left behind."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from vllm.v1.core.kv_cache_utils import KVCacheBlock
from vllm.v1.core.single_type_kv_cache_manager import FullAttentionManager
from vllm.v1.request import Request

if TYPE_CHECKING:
    from vllm_calidrop.scheduler.ledger import Ledger


class CaliDropManager(FullAttentionManager):
    """Blocks of a compacted sequence: null below g, its own from g on, hashed only below g.

    `ledger` is set when the scheduler is built; without it (a tool that builds managers alone) this is vLLM's manager.
    """

    ledger: Ledger | None = None

    def new_step_starts(self) -> None:
        """Free [0, g) of every sequence whose compaction step has been processed.

        vLLM asks for skipped blocks only while it allocates for the same request, older requests first, and preempts
        the newest; blocks must be back before anybody allocates.
        """
        super().new_step_starts()
        if self.ledger is not None:
            for request_id, first_block in self.ledger.take_freeable():
                self._remove_blocks_in_range(request_id, 0, first_block)

    def cache_blocks(
        self,
        request: Request,
        num_tokens: int,
        retention_interval: int | None = None,
        *,
        replay_boundaries: Sequence[int],
    ) -> None:
        """Hash only blocks below g: the others will hold compacted KV, and outputs computed from it."""
        if self.ledger is not None:
            first_block = self.ledger.first_block_of(request.request_id)
            if first_block is not None:
                num_tokens = min(num_tokens, first_block * self.block_size)
        super().cache_blocks(request, num_tokens, retention_interval, replay_boundaries=replay_boundaries)

    def pop_blocks_for_free(self, request_id: str) -> list[KVCacheBlock]:
        """A sequence ends or is preempted: its decision, swap blocks and state slot end with its blocks."""
        if self.ledger is not None:
            self.ledger.release(request_id)
        return super().pop_blocks_for_free(request_id)
