"""Weighted ridge regression over several representations of the same problems, chosen by inner cross-validation.

Axis legend: _P problems, _F features, _A penalties. float64 throughout; deterministic for a seed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from difficulty.calibration import Platt, fit_platt
from difficulty.held_out import NUM_FOLDS, best, fold_of_each, honest_rates, squared_errors

Floats = NDArray[np.float64]
PENALTIES = (0.002, 0.01, 0.05, 0.25, 1.0, 5.0)  # against 1, the variance of a standardised feature


@dataclass(frozen=True, slots=True, eq=False)
class Linear:
    """Pass rate = platt(standardised features x weights + bias)."""

    mean_F: Floats
    scale_F: Floats
    weight_F: Floats
    bias: float
    platt: Platt

    def __call__(self, features_P_F: Floats) -> Floats:
        """Rates in [0, 1], shape [P]; nan for a row that is not finite."""
        finite = np.isfinite(features_P_F).all(axis=1)
        rates = np.full(len(features_P_F), np.nan)
        standard = (features_P_F[finite] - self.mean_F) / self.scale_F
        rates[finite] = self.platt(standard @ self.weight_F + self.bias)
        return rates


@dataclass(frozen=True, slots=True, eq=False)
class Fitted:
    """The chosen model, and predictions of every problem by models not fitted to it nor chosen by its own error."""

    name: str  # of the chosen representation
    penalty: float
    model: Linear
    rates_P: Floats  # out of fold, calibrated


def fit_best(
    representations: Mapping[str, Callable[[], Floats]], rates_P: Floats, weights_P: Floats, *, seed: object
) -> Fitted:
    """The representation and penalty with the least out-of-fold squared error, refitted on all problems.

    A representation is given as a callable that makes its features [P, F], so that one is held at a time.
    """
    folds = fold_of_each(len(rates_P), seed)
    weights = weights_P / weights_P.mean()
    names = list(representations)
    scores = np.concatenate(
        [_out_of_fold(_standardise(m())[0], rates_P, weights, folds) for m in representations.values()]
    )
    errors = squared_errors(scores, rates_P)
    chosen = best(errors, weights)
    name, penalty = names[chosen // len(PENALTIES)], PENALTIES[chosen % len(PENALTIES)]
    platt = fit_platt(scores[chosen], rates_P, weights)
    features, mean, scale = _standardise(representations[name]())
    weight_A_F, bias_A = _ridge(features, rates_P, weights, (penalty,))
    model = Linear(mean, scale, weight_A_F[0], float(bias_A[0]), platt)
    return Fitted(name, penalty, model, honest_rates(scores, errors, rates_P, weights, folds))


def _standardise(features_P_F: Floats) -> tuple[Floats, Floats, Floats]:
    """Centred and scaled features with their mean and scale; a constant feature becomes zero."""
    mean = features_P_F.mean(axis=0)
    scale = features_P_F.std(axis=0)
    scale = np.where(scale > 1e-7 * (1 + np.abs(mean)), scale, np.inf)
    standard = (features_P_F - mean) / scale
    return standard, mean, scale


def _out_of_fold(features_P_F: Floats, rates_P: Floats, weights_P: Floats, folds_P: NDArray[np.intp]) -> Floats:
    """Scores of every problem by the models that never saw it, shape [A, P]."""
    scores = np.empty((len(PENALTIES), len(rates_P)))
    for fold in range(NUM_FOLDS):
        held, train = folds_P == fold, folds_P != fold
        weight_A_F, bias_A = _ridge(features_P_F[train], rates_P[train], weights_P[train], PENALTIES)
        scores[:, held] = weight_A_F @ features_P_F[held].T + bias_A[:, None]
    return scores


def _ridge(
    features_P_F: Floats, rates_P: Floats, weights_P: Floats, penalties: Sequence[float]
) -> tuple[Floats, Floats]:
    """Weights [A, F] and biases [A]; solved in the smaller of the two spaces, features or problems."""
    share = weights_P / weights_P.sum()
    center, level = share @ features_P_F, float(share @ rates_P)
    root = np.sqrt(share)
    x = (features_P_F - center) * root[:, None]
    y = (rates_P - level) * root
    dual = x.shape[0] < x.shape[1]
    gram: Floats = x @ x.T if dual else x.T @ x
    target: Floats = y if dual else x.T @ y
    weights = np.empty((len(penalties), x.shape[1]))
    for i, penalty in enumerate(penalties):
        solution: NDArray[np.floating[Any]] = np.linalg.solve(gram + penalty * np.eye(len(gram)), target)
        weights[i] = x.T @ solution if dual else solution
    return weights, level - weights @ center
