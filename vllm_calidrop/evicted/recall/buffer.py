"""The page buffer: a few pages per KV head that stay on the device. The newest wanted pages stay."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

EMPTY = -1
OLDEST = 2**30


class Renewal(NamedTuple):
    """What a look does to a buffer of B places. held, rank: int64 [N, B] afterwards.

    place: int64 [N, K], where each wanted page that was not held is put; -1: nowhere (held already, or no room).
    """

    held: Tensor
    rank: Tensor
    place: Tensor


def is_held(wanted: Tensor, held: Tensor) -> Tensor:
    """Which of the wanted pages [N, K] are among the held ones [N, B]: bool [N, K]."""
    return ((wanted.unsqueeze(-1) == held.unsqueeze(1)) & (wanted >= 0).unsqueeze(-1)).any(-1)


def renew(held: Tensor, rank: Tensor, wanted: Tensor, size: Tensor) -> Renewal:
    """The first `size` of: the wanted pages, largest share first; then the held ones not wanted, newest first.

    held: int64 [N, B], the page at each place, EMPTY for none; rank: int64 [N, B], 0 for the newest page; wanted: int64
    [N, K], -1 for none; size: int64 [N], places that are the pair's own (0 <= size <= B). A page keeps its place.
    """
    places = held.shape[1]
    place_of_old = rank.argsort(dim=-1, stable=True)
    old = held.gather(1, place_of_old)
    already = (wanted.unsqueeze(-1) == held.unsqueeze(1)) & (wanted >= 0).unsqueeze(-1)
    place_of_wanted = torch.where(already.any(-1), already.int().argmax(-1), -1)

    pages = torch.cat((wanted, old), dim=1)
    place = torch.cat((place_of_wanted, place_of_old), dim=1)
    exists = torch.cat((wanted >= 0, (old >= 0) & ~is_held(old, wanted)), dim=1)
    position = exists.cumsum(-1) - 1
    stays = exists & (position < size.unsqueeze(-1))

    is_free = torch.arange(places) < size.unsqueeze(-1)
    is_free = is_free & ~marked(torch.where(stays, place, -1), places)
    free_places = (~is_free).int().argsort(dim=-1, stable=True)
    comes = stays & (place < 0)
    nth = (comes.cumsum(-1) - 1).clamp(0, max(0, places - 1))
    place = torch.where(comes, free_places.gather(1, nth), place)

    target = torch.where(stays, place, places)
    new_held = torch.full((len(held), places + 1), EMPTY).scatter(1, target, pages)[:, :places]
    new_rank = torch.full((len(held), places + 1), OLDEST).scatter(1, target, position)[:, :places]
    count = wanted.shape[1]
    return Renewal(new_held, new_rank, torch.where(comes, place, -1)[:, :count])


def marked(places: Tensor, count: int) -> Tensor:
    """bool [N, count]: which numbers below `count` occur in places [N, X] (-1: none)."""
    found = torch.zeros((len(places), count + 1), dtype=torch.bool)
    return found.scatter(1, torch.where(places < 0, count, places), True)[:, :count]
