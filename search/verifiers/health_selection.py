"""What selecting by a verifier's scores gains as the pool grows, and whether more samples begin to hurt.

Accuracy at N is the expectation over the N-subsets of each stored pool (`search.stats`). The alarm is that of
over-optimisation (Gao et al. 2022, arXiv 2210.10760; Snell et al. 2024, section 5.3): the score of what is selected
rises with N while its accuracy falls.

Axis legend: _P problems, _K numbers of samples.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from search import evaluate, stats
from search.evaluate import Pool
from search.stats import Estimate, Floats, PairedDifference

RULES = {"pass": "pass", "majority": "majority", "best_of_n": "best_of_n", "weighted": "best_of_n_weighted"}
SELECTING = ("best_of_n", "weighted")  # those that follow the scores


@dataclass(frozen=True, slots=True)
class Alarm:
    """Over-optimisation by one rule: accuracy fell from its peak at `peak` samples to the largest pool.

    `fired`: the loss is significant and the selected score rose. Example: Alarm("best_of_n", True, 4, -0.06, ...)
    """

    rule: str
    fired: bool
    peak: int  # samples with the highest accuracy
    change: float  # accuracy at the largest N minus that at the peak
    low: float | None  # interval of the change: 95 % over all comparisons together
    high: float | None
    score_change: float  # mean score of what is selected, in the same places

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True, slots=True)
class Selection:
    """Accuracy against the number of samples, by rule: pass (any is right), majority, best_of_n, weighted."""

    ks: tuple[int, ...]
    accuracy: Mapping[str, tuple[Estimate, ...]]  # rule -> [K]
    scores: Mapping[str, tuple[float, ...]]  # rule -> [K], mean score of what is selected
    gains: tuple[PairedDifference, ...]  # weighted - majority, [K], 95 %
    alarms: tuple[Alarm, ...]


def selection(pools: Sequence[Pool], *, seed: object = 0) -> Selection:
    """The curves at N = 1, 2, 4, ... and the smallest pool's size. `pools` holds at least one."""
    smallest = min(len(pool.correct_N) for pool in pools)
    ks = tuple(sorted({*(2**i for i in range(smallest.bit_length())), smallest}))
    values = {
        name: np.array([evaluate.values_at(pool, rule, ks, seed=seed) for pool in pools])
        for name, rule in RULES.items()
    }
    scores_P_K = {rule: np.array([_selected_scores(pool, rule, ks, seed) for pool in pools]) for rule in SELECTING}
    return Selection(
        ks=ks,
        accuracy={rule: tuple(stats.mean_estimate(column) for column in values_P_K.T)
                  for rule, values_P_K in values.items()},
        scores={rule: tuple(_mean(column) for column in found.T) for rule, found in scores_P_K.items()},
        gains=tuple(
            stats.paired_difference(a, b) for a, b in zip(values["majority"].T, values["weighted"].T, strict=True)
        ),
        alarms=tuple(_alarm(rule, ks, values[rule], scores_P_K[rule]) for rule in SELECTING),
    )  # fmt: skip


def _alarm(rule: str, ks: Sequence[int], values_P_K: Floats, scores_P_K: Floats) -> Alarm:
    """Each earlier N is compared with the largest, and the interval holds for all of them at once (Bonferroni): the
    best of many noisy points always looks like a peak."""
    peak = int(np.argmax(values_P_K.mean(axis=0)))
    comparisons = max(len(ks) - 1, 1)
    change = stats.paired_difference(values_P_K[:, peak], values_P_K[:, -1], confidence=1 - 0.05 / comparisons)
    both = ~np.isnan(scores_P_K[:, [peak, -1]]).any(axis=1)
    rise = _mean(scores_P_K[both, -1] - scores_P_K[both, peak])
    return Alarm(
        rule=rule,
        fired=change.high < 0 and rise > 0,
        peak=ks[peak],
        change=change.mean,
        low=change.low if math.isfinite(change.low) else None,
        high=change.high if math.isfinite(change.high) else None,
        score_change=rise,
    )


def _selected_scores(pool: Pool, rule: str, ks: Sequence[int], seed: object) -> list[float]:
    """The expected score of what is selected among N samples, where anything is; nan where nothing ever is.

    Of the weighted vote it is the mean score of the winning answer's samples, best-of-N has one sample.
    """
    scores_N = [s if a is not None else None for s, a in zip(pool.scores_N, pool.answers_N, strict=True)]
    worth_N = [s or 0.0 for s in scores_N]
    expected: list[list[float]] = []
    for of_N in (worth_N, [1.0] * len(worth_N)):
        if rule == "best_of_n":
            expected.append(stats.best_at_k(of_N, scores_N, ks))
        else:
            expected.append(stats.weighted_at_k(of_N, pool.answers_N, scores_N, ks, seed=f"{seed}/{pool.key}"))
    return [score / chance if chance else math.nan for score, chance in zip(*expected, strict=True)]


def _mean(values: Floats) -> float:
    known = values[~np.isnan(values)]
    return float(known.mean()) if known.size else 0.0
