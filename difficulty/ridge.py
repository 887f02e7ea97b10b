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
from search.randomness import key64

Floats = NDArray[np.float64]
PENALTIES = (0.002, 0.01, 0.05, 0.25, 1.0, 5.0)  # against 1, the variance of a standardised feature
NUM_FOLDS = 5


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
    folds = _folds(len(rates_P), seed)
    weights = weights_P / weights_P.mean()
    scores = {n: _out_of_fold(_standardise(m())[0], rates_P, weights, folds) for n, m in representations.items()}
    name, index = _choose(scores, rates_P, weights)
    platt = fit_platt(scores[name][index], rates_P, weights)
    features, mean, scale = _standardise(representations[name]())
    weight_A_F, bias_A = _ridge(features, rates_P, weights, (PENALTIES[index],))
    model = Linear(mean, scale, weight_A_F[0], float(bias_A[0]), platt)
    return Fitted(name, PENALTIES[index], model, _honest_rates(scores, rates_P, weights, folds))


def _choose(scores: Mapping[str, Floats], rates_P: Floats, weights_P: Floats) -> tuple[str, int]:
    """Representation and index of the penalty with the least weighted squared error."""
    errors = {n: ((scores_A_P - rates_P) ** 2 * weights_P).mean(axis=1) for n, scores_A_P in scores.items()}
    name = min(errors, key=lambda n: float(errors[n].min()))
    return name, int(errors[name].argmin())


def _honest_rates(
    scores: Mapping[str, Floats], rates_P: Floats, weights_P: Floats, folds_P: NDArray[np.intp]
) -> Floats:
    """Calibrated predictions [P] by weights that a problem's own label had no say in.

    Choosing among dozens of models by the very errors that are then reported makes noise look like a signal, so each
    fold uses the choice and the calibration of the other folds' errors. (The models behind those errors did see this
    fold's labels; a fully nested validation would cost five times as much.)
    """
    honest = np.empty(len(rates_P))
    for fold in range(NUM_FOLDS):
        held, rest = folds_P == fold, folds_P != fold
        name, index = _choose({n: s[:, rest] for n, s in scores.items()}, rates_P[rest], weights_P[rest])
        chosen = scores[name][index]
        honest[held] = fit_platt(chosen[rest], rates_P[rest], weights_P[rest])(chosen[held])
    return honest


def _folds(num: int, seed: object) -> NDArray[np.intp]:
    """The fold of each problem, shape [P]."""
    order = np.random.Generator(np.random.Philox(key64("difficulty", "folds", seed))).permutation(num)
    folds = np.empty(num, dtype=np.intp)
    folds[order] = np.arange(num) % NUM_FOLDS
    return folds


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
