"""What a verifier's scores are worth, in numbers: AUC, Brier, calibration, first-error F1. Arrays in, estimates out.

Standard errors are clustered by problem throughout: samples of one problem are no independent evidence. That of the
pooled AUC is Obuchowski's (1997), DeLong's placement values summed within clusters. First-error F1 is that of
ProcessBench (arXiv 2412.06559): harmonic mean of the accuracies on answers with an error and without one. Left out:
reliability corrections of the calibration error, whose expectation at finite samples is above zero.

Axis legend: _I items (answers, steps or prefixes), _G clusters.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from search import stats
from search.randomness import key64
from search.stats import Estimate, Floats

Clusters = Sequence[Hashable]
_ALWAYS_HIT = -math.inf  # a threshold below every score finds no error


class CalibrationPoint(NamedTuple):
    """Items with similar scores: their mean score and the share of right ones."""

    predicted: float
    observed: float
    se: float | None
    n: int


@dataclass(frozen=True, slots=True)
class LengthPoint:
    """Answers of similar length, right and wrong ones apart: their mean length in tokens and mean score."""

    correct: bool
    length: float
    score: float
    se: float | None
    n: int

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, row: Mapping[str, Any]) -> LengthPoint:
        return cls(**{f.name: row[f.name] for f in fields(cls)})


class Steps(NamedTuple):
    """One answer's step scores and labels, of equal length. Example: Steps("q1", (0.9, 0.2), (True, False))"""

    key: str  # of its problem
    scores: tuple[float, ...]
    labels: tuple[bool, ...]


# ---------------------------------------------------------------- ranking


def weighted_auc(scores_I: ArrayLike, positive_I: ArrayLike, negative_I: ArrayLike, clusters_I: Clusters) -> Estimate:
    """Chance that a positive outcome has a higher score than a negative one of another item, ties half. O(n log n).

    Item i stands for positive_I[i] positive and negative_I[i] negative outcomes with one score: booleans for labels,
    successes and failures for rollouts. nan where one kind is missing, an infinite se for a single cluster.
    """
    positive, negative = np.asarray(positive_I, dtype=np.float64), np.asarray(negative_I, dtype=np.float64)
    total_positive, total_negative = float(positive.sum()), float(negative.sum())
    pairs = total_positive * total_negative - float(positive @ negative)
    if not pairs > 0:
        return Estimate(math.nan, math.nan, len(positive))
    _, place = np.unique(np.asarray(scores_I, dtype=np.float64), return_inverse=True)
    at_positive, at_negative = np.bincount(place, weights=positive), np.bincount(place, weights=negative)
    # of each item: how many of the others' opposite outcomes lie below its positive, above its negative ones
    below = (np.cumsum(at_negative) - at_negative / 2)[place] - negative / 2
    above = (total_positive - np.cumsum(at_positive) + at_positive / 2)[place] - positive / 2
    area = float(positive @ below) / pairs
    lost_positive, lost_negative = area * (total_negative - negative), area * (total_positive - positive)
    influence = (positive * (below - lost_positive) + negative * (above - lost_negative)) / pairs
    return Estimate(area, _clustered_se(influence, clusters_I), len(positive))


def auc_by_cluster(scores_I: ArrayLike, positive_I: ArrayLike, negative_I: ArrayLike, clusters_I: Clusters) -> Floats:
    """The AUC within each cluster that has both outcomes, in order of appearance; shape [G]."""
    scores, positive, negative = (np.asarray(x, dtype=np.float64) for x in (scores_I, positive_I, negative_I))
    areas = [
        weighted_auc(scores[i], positive[i], negative[i], [0] * len(i)).value for i in members(clusters_I).values()
    ]
    return np.array([a for a in areas if not math.isnan(a)])


def members(clusters_I: Clusters) -> dict[Hashable, NDArray[np.intp]]:
    """The indices of each cluster's items, in order of appearance."""
    found: dict[Hashable, list[int]] = {}
    for i, name in enumerate(clusters_I):
        found.setdefault(name, []).append(i)
    return {name: np.array(indices, dtype=np.intp) for name, indices in found.items()}


def _clustered_se(influence_I: Floats, clusters_I: Clusters) -> float:
    sums = np.array([influence_I[i].sum() for i in members(clusters_I).values()])
    return math.sqrt(float(sums @ sums) * len(sums) / (len(sums) - 1)) if len(sums) > 1 else math.inf


# ---------------------------------------------------------------- calibration


def quantile_bins(values_I: Floats, bins: int) -> NDArray[np.intp]:
    """The bin of each value, from 0 = lowest, about equally many in each; equal values share a bin."""
    return np.searchsorted(np.array(stats.quantile_edges(values_I, bins)), values_I, side="left")


def calibration(
    scores_I: Floats, correct_I: Floats, clusters_I: Clusters, *, bins: int = 10
) -> tuple[tuple[CalibrationPoint, ...], Estimate]:
    """Calibration curve over quantile bins of the score, and the expected calibration error over the same bins."""
    index = quantile_bins(scores_I, bins)
    residual = correct_I - scores_I
    points: list[CalibrationPoint] = []
    signed = np.empty_like(residual)
    for b in np.unique(index):
        inside = np.flatnonzero(index == b)
        observed = stats.mean_estimate(correct_I[inside], [clusters_I[int(i)] for i in inside])
        points.append(
            CalibrationPoint(float(scores_I[inside].mean()), observed.value, finite(observed.se), len(inside))
        )
        signed[inside] = residual[inside] * (1 if residual[inside].sum() >= 0 else -1)
    return tuple(points), stats.mean_estimate(signed, clusters_I)


def score_by_length(
    lengths_I: Floats, scores_I: Floats, correct_I: Floats, clusters_I: Clusters, *, bins: int = 8
) -> tuple[LengthPoint, ...]:
    """Mean score within quantile bins of the length, wrong answers first."""
    points: list[LengthPoint] = []
    for correct in (False, True):
        kind = np.flatnonzero(correct_I == correct)
        index = quantile_bins(lengths_I[kind], bins)
        for b in np.unique(index):
            inside = kind[index == b]
            mean = stats.mean_estimate(scores_I[inside], [clusters_I[int(i)] for i in inside])
            length = float(lengths_I[inside].mean())
            points.append(LengthPoint(correct, length, mean.value, finite(mean.se), len(inside)))
    return tuple(points)


def length_correlations(lengths_I: Floats, scores_I: Floats, clusters_I: Clusters) -> tuple[list[float], list[Any]]:
    """Spearman of score with length within each cluster, and the clusters' names.

    Clusters of fewer than 3 items, or in which either is constant, say nothing and are left out.
    """
    found = [
        (stats.spearman(lengths_I[i], scores_I[i]), name)
        for name, i in members(clusters_I).items()
        if len(i) >= 3 and np.ptp(lengths_I[i]) > 0 and np.ptp(scores_I[i]) > 0
    ]
    return [value for value, _ in found], [name for _, name in found]


def finite(value: float) -> float | None:
    """None for what JSON and MLflow cannot hold."""
    return value if math.isfinite(value) else None


# ---------------------------------------------------------------- the first wrong step


def first_error_f1(answers: Sequence[Steps], *, seed: object = 0) -> Estimate:
    """ProcessBench's F1 of naming the first wrong step: the first one whose score is below a threshold.

    The threshold is chosen on one half of the problems and judged on the other, both ways. nan where a half lacks
    answers with an error, or answers without one.
    """
    low_I, high_I = np.array([_hit_range(a) for a in answers]).reshape(-1, 2).T
    faulty_I = np.array([not all(a.labels) for a in answers], dtype=bool)
    ordered = sorted({a.key for a in answers}, key=lambda key: key64("first-error", seed, key))
    first = set(ordered[: len(ordered) // 2])
    in_first_I = np.array([a.key in first for a in answers], dtype=bool)
    hits_I = np.zeros(len(answers))
    for chosen_on, judged_on in ((in_first_I, ~in_first_I), (~in_first_I, in_first_I)):
        if not (faulty_I & chosen_on).any() or not (~faulty_I & chosen_on).any():
            return Estimate(math.nan, math.nan, len(answers))
        threshold = best_threshold(low_I[chosen_on], high_I[chosen_on], faulty_I[chosen_on])
        hits_I[judged_on] = (low_I[judged_on] < threshold) & (threshold <= high_I[judged_on])
    faulty, sound = hits_I[faulty_I].mean(), hits_I[~faulty_I].mean()
    if not faulty + sound:
        return Estimate(0.0, 0.0, len(answers))
    by_faulty, by_sound = (2 * other**2 / (faulty + sound) ** 2 for other in (sound, faulty))
    influence = np.where(
        faulty_I, by_faulty * (hits_I - faulty) / faulty_I.sum(), by_sound * (hits_I - sound) / (~faulty_I).sum()
    )
    f1 = float(2 * faulty * sound / (faulty + sound))
    return Estimate(f1, _clustered_se(influence, [a.key for a in answers]), len(answers))


def best_threshold(low_I: Floats, high_I: Floats, faulty_I: NDArray[np.bool_]) -> float:
    """The threshold with the highest F1, in the middle of its plateau. An answer is hit for low < threshold <= high."""
    candidates = np.unique(high_I[np.isfinite(high_I) & (low_I < high_I)])
    if not candidates.size:
        return 0.5
    rates: list[Floats] = []
    for kind in (faulty_I, ~faulty_I):
        usable = kind & (low_I < high_I)
        begun = np.searchsorted(np.sort(low_I[usable]), candidates, side="left")
        over = np.searchsorted(np.sort(high_I[usable]), candidates, side="left")
        rates.append((begun - over) / kind.sum())
    total = rates[0] + rates[1]
    best = float(candidates[np.argmax(2 * rates[0] * rates[1] / np.where(total > 0, total, 1.0))])
    bounds = np.concatenate([low_I, high_I])
    below = bounds[(bounds < best) & np.isfinite(bounds)]
    return (best + float(below.max())) / 2 if below.size else best


def _hit_range(answer: Steps) -> tuple[float, float]:
    """(low, high]: the thresholds that name exactly this answer's first error, or find none where there is none."""
    error = next((s for s, label in enumerate(answer.labels) if not label), None)
    before = min(answer.scores[:error], default=math.inf)
    return (_ALWAYS_HIT if error is None else answer.scores[error]), before
