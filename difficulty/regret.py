"""What mis-binning costs: the value lost by choosing a strategy per predicted bin instead of per oracle bin.

Two-fold, as the paper selects (Snell et al. 2024, section 3.2): the strategy of each bin is chosen on one half of its
problems and valued on the other, over many random halves, so that no choice is judged by what made it.

Axis legend: _P problems, _S strategies, _B bins (index 0: problems without a bin).
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from search import stats
from search.errors import DataError
from search.randomness import key64
from search.stats import Estimate

Floats = NDArray[np.float64]
Ints = NDArray[np.intp]


@dataclass(frozen=True, slots=True)
class Regret:
    """Mean values over problems. `loss` and `gain` are paired by problem, with the error over problems."""

    oracle: Estimate  # one strategy per oracle bin
    predicted: Estimate  # one per predicted bin
    uniform: Estimate  # one for all
    loss: Estimate  # oracle - predicted: the regret of mis-binning
    gain: Estimate  # predicted - uniform: what the predicted bins are worth

    def to_json(self) -> dict[str, dict[str, float]]:
        return asdict(self)


def regret(
    values_S_P: ArrayLike, oracle_P: ArrayLike, predicted_P: ArrayLike, *, splits: int = 50, seed: object = 0
) -> Regret:
    """`values_S_P[s][p]`: what strategy s is worth on problem p, higher being better (accuracy, or accuracy less cost).

    Bins are whole numbers from 1 (0: none). The values must come from other samples than the oracle bins
    (`difficulty.bins.halves`), else the oracle's lead is luck. Raises DataError for shapes that do not fit, values
    that are not finite, or fewer than four problems.
    """
    values = np.asarray(values_S_P, dtype=np.float64)
    oracle, predicted = np.asarray(oracle_P, dtype=np.intp), np.asarray(predicted_P, dtype=np.intp)
    if values.ndim != 2 or not len(values) or not values.shape[1:] == oracle.shape == predicted.shape:
        raise DataError(
            f"values have shape {values.shape}, bins {oracle.shape} and {predicted.shape}: give [S, P], [P]"
        )
    if values.shape[1] < 4 or not np.isfinite(values).all():
        raise DataError(f"a regret needs finite values of at least 4 problems, not of {values.shape[1]}")
    found = [_chosen(values, bins_P, splits, seed) for bins_P in (oracle, predicted, np.ones_like(oracle))]
    by_oracle, by_predicted, by_none = found
    return Regret(
        *(stats.mean_estimate(values_P) for values_P in found),
        loss=stats.mean_estimate(by_oracle - by_predicted),
        gain=stats.mean_estimate(by_predicted - by_none),
    )


def _chosen(values_S_P: Floats, bins_P: Ints, splits: int, seed: object) -> Floats:
    """The value of each problem under the strategy that the other half of its bin chose, mean over splits; [P].

    Both halves of a bin hold at least one of its problems where it has two; a bin of one takes the whole half's choice.
    """
    num_bins, num = int(bins_P.max()) + 1, len(bins_P)
    total_P = np.zeros(num)
    for split in range(splits):
        order = np.random.Generator(np.random.Philox(key64("regret", seed, split))).permutation(num)
        ranked = np.lexsort((order, bins_P))  # by bin, at random inside
        half_P = np.empty(num, dtype=np.intp)
        half_P[ranked] = (np.arange(num) + split) % 2
        for half in (0, 1):
            judged_B, everywhere = _best(values_S_P, bins_P, half_P == 1 - half, num_bins)
            there = half_P == half
            choice = np.where(judged_B[bins_P[there]] >= 0, judged_B[bins_P[there]], everywhere)
            total_P[there] += values_S_P[choice, there.nonzero()[0]]
    return total_P / splits


def _best(values_S_P: Floats, bins_P: Ints, there_P: NDArray[np.bool_], num_bins: int) -> tuple[Ints, int]:
    """The strategy with the highest sum in each bin (-1: no problem of it there), and over all bins."""
    sums_S_B = np.stack([np.bincount(bins_P[there_P], row[there_P], minlength=num_bins) for row in values_S_P])
    counts_B = np.bincount(bins_P[there_P], minlength=num_bins)
    return np.where(counts_B > 0, sums_S_B.argmax(axis=0), -1), int(sums_S_B.sum(axis=1).argmax())
