"""Sizes of the kernels' tiles for a shape: one place, so that what is launched is what the tests compile."""

from __future__ import annotations

from typing import NamedTuple


class Tiles(NamedTuple):
    """m: query heads of a group (at least the 16 a tensor core takes), d: head_dim, both powers of two; n: tokens.

    registers: the most a thread may have; None: as the assembler likes. Left alone at head_dim 128 it aims at an
    occupancy that the shared memory does not allow, and spills for it.
    """

    m: int
    n: int
    d: int
    warps: int
    stages: int
    registers: int | None


def power_of_two(number: int) -> int:
    return 1 << (number - 1).bit_length()


def tiles_for(group: int, head_dim: int) -> Tiles:
    """K and V of a tile are at most 32 KiB in 16 bits, and `stages` tiles are on their way at once."""
    d = max(16, power_of_two(head_dim))
    return Tiles(
        m=max(16, power_of_two(group)),
        n=32 if d > 128 else 64,
        d=d,
        warps=4,
        stages=3 if d <= 128 else 2,
        registers=128 if head_dim == 128 else None,
    )


def reload_tiles_for(group: int, head_dim: int) -> Tiles:
    """The reload's: some registers more, as it needs them at head_dim 128, and the bus is what it waits for."""
    tiles = tiles_for(group, head_dim)
    return tiles._replace(registers=tiles.registers and tiles.registers + 16)


def encoded_tiles_for(group: int, head_dim: int) -> Tiles:
    """Tiles of codes. They are not loaded ahead, as how wide they are is known only when the kernel runs."""
    d = max(16, power_of_two(head_dim))
    return Tiles(
        m=max(16, power_of_two(group)),
        n=max(16, min(64, 2048 // d)),
        d=d,
        warps=8,
        stages=1,
        registers=168 if d <= 128 else None,
    )
