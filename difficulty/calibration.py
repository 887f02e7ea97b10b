"""From a raw score to a calibrated pass rate, and how good predicted rates are.

Platt scaling (Platt 1999) with soft labels: rate = sigmoid(slope x score + offset), fitted on out-of-fold scores. It
keeps the order of the problems; isotonic regression would tie them.

Axis legend: _P problems.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

import numpy as np
from numpy.typing import NDArray

from search import stats

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Platt:
    """rate = sigmoid(slope x score + offset)."""

    slope: float
    offset: float

    def __call__(self, scores_P: Floats) -> Floats:
        z = np.clip(self.slope * scores_P + self.offset, -500, 500)
        return 1 / (1 + np.exp(-z))


def fit_platt(scores_P: Floats, rates_P: Floats, weights_P: Floats) -> Platt:
    """Newton's method on the weighted cross-entropy against soft labels, on standardised scores.

    A prior worth one problem pulls the slope to zero, so that separable labels stay finite. A constant score gives
    slope 0 and the mean rate.
    """
    center, spread = float(scores_P.mean()), float(scores_P.std())
    mean = float(np.clip(np.average(rates_P, weights=weights_P), 1e-4, 1 - 1e-4))
    base = math.log(mean / (1 - mean))
    if not spread > 1e-12:
        return Platt(0.0, base)
    design = np.stack([(scores_P - center) / spread, np.ones_like(scores_P)], axis=1)
    penalty = np.diag([0.05, 1e-6])
    theta: NDArray[np.floating[Any]] = np.array([0.0, base])

    def loss(theta: NDArray[np.floating[Any]]) -> float:
        z = design @ theta
        entropy = np.logaddexp(0, z) - rates_P * z
        return float(weights_P @ entropy + 0.5 * theta @ penalty @ theta)

    current = loss(theta)
    for _ in range(100):
        p = 1 / (1 + np.exp(-(design @ theta)))
        gradient = design.T @ (weights_P * (p - rates_P)) + penalty @ theta
        curvature = design.T @ (design * (weights_P * p * (1 - p))[:, None]) + penalty
        step = np.linalg.solve(curvature, gradient)
        length = 1.0
        while (reached := loss(theta - length * step)) > current and length > 1e-6:
            length /= 2
        theta = theta - length * step
        if current - reached < 1e-10 * (1 + abs(current)):
            break
        current = reached
    slope = float(theta[0]) / spread
    return Platt(slope, float(theta[1]) - slope * center)


@dataclass(frozen=True, slots=True)
class Scores:
    """How well predicted pass rates fit labelled problems."""

    spearman: float  # with the sampled rates; a perfect predictor reaches the report's ceiling
    spearman_se: float
    brier: float  # against single sampled outcomes
    brier_rate: float  # against the true pass rates: label noise subtracted (a constant scores their variance)
    ece: float
    auroc: float | None  # pass rate above zero or not; None where one kind is missing

    def to_json(self) -> dict[str, float | None]:
        return asdict(self)

    @classmethod
    def from_json(cls, row: Mapping[str, Any]) -> Scores:
        return cls(**{f.name: row[f.name] for f in fields(cls)})


@dataclass(frozen=True, slots=True)
class CurvePoint:
    """Problems with similar predictions: their mean prediction and their mean sampled rate."""

    predicted: float
    observed: float
    se: float
    n: int


def score(predicted_P: Floats, successes_P: Ints, totals_P: Ints, *, seed: object) -> Scores:
    """All measures of predictions in [0, 1]. Every problem needs at least one sample."""
    rates = successes_P / totals_P
    low, high = stats.bootstrap(
        len(rates), lambda i: stats.spearman(predicted_P[i], rates[i]), seed=f"{seed}/spearman", draws=200
    )
    area = stats.auroc(predicted_P, successes_P > 0)
    rate_error = stats.brier_corrected(predicted_P, successes_P, totals_P)
    brier = stats.brier(predicted_P, successes_P, totals_P)
    return Scores(
        spearman=stats.spearman(predicted_P, rates),
        spearman_se=(high - low) / (2 * stats.normal_quantile(0.95)),
        brier=brier,
        brier_rate=brier if math.isnan(rate_error) else rate_error,  # single samples cannot tell noise apart
        ece=stats.calibration_error(predicted_P, rates),
        auroc=None if math.isnan(area) else area,
    )


def curve(predicted_P: Floats, rates_P: Floats, *, points: int = 10) -> tuple[CurvePoint, ...]:
    """Calibration curve over groups of equal size, in the order of the predictions."""
    order = np.argsort(predicted_P, kind="stable")
    found: list[CurvePoint] = []
    for group in np.array_split(order, min(points, len(order))):
        observed = stats.mean_estimate(rates_P[group])
        se = observed.se if math.isfinite(observed.se) else 0.0
        found.append(CurvePoint(float(predicted_P[group].mean()), observed.value, se, len(group)))
    return tuple(found)
