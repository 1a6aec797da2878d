"""Which rows of a batch go where: indexes into it."""

from __future__ import annotations

import numpy as np
import torch

from vllm_calidrop.attention.metadata import places


def test_neighbours_are_a_slice() -> None:
    batch = torch.arange(10)
    for tokens in ([0], [4], [2, 3, 4], list(range(10))):
        index = places(np.array(tokens))
        assert isinstance(index, slice)
        assert batch[index].tolist() == tokens
        assert batch[index].data_ptr() == batch[tokens[0]].data_ptr(), "nothing is copied"


def test_others_are_an_index() -> None:
    batch = torch.arange(10)
    for tokens in ([0, 2], [1, 2, 4], [0, 9]):
        index = places(np.array(tokens))
        assert isinstance(index, torch.Tensor)
        assert batch[index].tolist() == tokens
