"""The histogram of similarities that the gate saw: counted where they are computed, on CPU, by every operator set."""

from __future__ import annotations

import torch
from torch import Tensor

from vllm_calidrop.metrics import SIMILARITY

SUM_UNIT = 1e-6  # of the sum of similarities, which is kept in an integer
SIMILARITY_BOUNDS = torch.tensor(SIMILARITY.buckets, dtype=torch.float32)


def similarity_histogram() -> Tensor:
    """int64 [buckets + 2]: how many per bound, how many above the last, and their sum in SUM_UNIT."""
    return torch.zeros(len(SIMILARITY.buckets) + 2, dtype=torch.int64)


def observe_similarity(histogram: Tensor, rho: Tensor) -> None:
    """Add similarities of any shape. NaN is none (a head without evicted KV), and rounding may exceed 1."""
    rho = rho[~rho.isnan()].clamp(max=1.0)
    places = torch.bucketize(rho, SIMILARITY_BOUNDS)
    histogram[:-1] += torch.bincount(places, minlength=len(histogram) - 1)
    histogram[-1] += (rho.double() / SUM_UNIT).round().long().sum()
