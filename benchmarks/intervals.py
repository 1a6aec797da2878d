"""Bootstrap intervals of means, and the number of prompts below which there is none."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

# With fewer prompts of a group the bootstrap draws from too few different values: where all of four answers are right
# it would say that the score is certain.
LEAST = 10


def interval(groups: Mapping[str, Sequence[float]], resamples: int = 2000, seed: int = 0) -> tuple[float, float] | None:
    """The 95 % percentile interval of the mean of the groups' means, or None where a group has fewer than LEAST values.

    Values are drawn anew within each group (a bootstrap stratified by group). The same seed draws the same places of
    every group, so that intervals of rows with the same prompts are comparable.
    """
    if not groups or any(len(values) < LEAST for values in groups.values()):
        return None
    generator = np.random.default_rng(seed)
    means = np.zeros(resamples)
    for name in sorted(groups):
        values = np.asarray(groups[name], dtype=np.float64)
        means += values[generator.integers(len(values), size=(resamples, len(values)))].mean(1)
    low, high = np.percentile(means / len(groups), [2.5, 97.5])
    return float(low), float(high)
