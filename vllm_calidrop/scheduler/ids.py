"""Who owns what: the free ids of the pools and of the state table, and what one sequence holds of them."""

from __future__ import annotations

from typing import NamedTuple

from vllm_calidrop.memory import PoolSizes


class FreeList:
    """The ids of a pool that nobody holds. A swap block is a fixed number of bytes of every layer and KV head, on all
    ranks; sketch blocks, buffer pages and state slots are given out the same way."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._free = list(range(size - 1, -1, -1))

    @property
    def num_free(self) -> int:
        return len(self._free)

    @property
    def num_used(self) -> int:
        return self.size - len(self._free)

    def take(self, count: int) -> tuple[int, ...] | None:
        """`count` ids, or None when there are fewer."""
        if count > len(self._free):
            return None
        return tuple(self._free.pop() for _ in range(count))

    def give_back(self, ids: tuple[int, ...]) -> None:
        self._free.extend(reversed(ids))
        assert len(self._free) <= self.size


class HeldIds(NamedTuple):
    """What one sequence holds until no step in flight can touch it any more."""

    slots: tuple[int, ...]
    swap_blocks: tuple[int, ...]
    sketch_blocks: tuple[int, ...]
    buffer_pages: tuple[int, ...]


class Ids:
    """All pools of one engine. slots: of the calibration state table."""

    def __init__(self, sizes: PoolSizes, num_slots: int) -> None:
        self.slots = FreeList(num_slots)
        self.swap = FreeList(sizes.swap_blocks)
        self.sketches = FreeList(sizes.sketch_blocks)
        self.buffers = FreeList(sizes.buffer_pages)

    @property
    def free(self) -> PoolSizes:
        return PoolSizes(self.swap.num_free, self.sketches.num_free, self.buffers.num_free)

    @property
    def sizes(self) -> PoolSizes:
        return PoolSizes(self.swap.size, self.sketches.size, self.buffers.size)

    def take(self, needs: PoolSizes) -> HeldIds:
        """A state slot and what a decision needs; it was made for what is free."""
        lists = (self.slots, self.swap, self.sketches, self.buffers)
        counts = (1, needs.swap_blocks, needs.sketch_blocks, needs.buffer_pages)
        taken = [of.take(count) for of, count in zip(lists, counts, strict=True)]
        if any(ids is None for ids in taken):
            raise RuntimeError(f"calidrop: {needs} and a state slot were promised, {self.free} is free")
        return HeldIds(*(ids or () for ids in taken))

    def give_back(self, held: HeldIds) -> None:
        for of, ids in zip((self.slots, self.swap, self.sketches, self.buffers), held, strict=True):
            of.give_back(ids)

    @property
    def in_use(self) -> dict[str, int]:
        return {
            "swap_blocks": self.swap.num_used,
            "sketch_blocks": self.sketches.num_used,
            "buffer_pages": self.buffers.num_used,
            "state_slots": self.slots.num_used,
        }
