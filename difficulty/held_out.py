"""Predictions of problems by models that never saw them: question-wise folds, and figures no choice was made for.

Axis legend: _P problems, _A alternatives (penalties, epochs, representations) among which the errors choose.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from difficulty.calibration import Floats, fit_platt
from search.randomness import key64

NUM_FOLDS = 5
Folds = NDArray[np.intp]


def fold_of_each(num: int, seed: object) -> Folds:
    """The fold of each problem, shape [P]; the same for every predictor of one seed."""
    order = np.random.Generator(np.random.Philox(key64("difficulty", "folds", seed))).permutation(num)
    folds = np.empty(num, dtype=np.intp)
    folds[order] = np.arange(num) % NUM_FOLDS
    return folds


def squared_errors(scores_A_P: Floats, rates_P: Floats) -> Floats:
    return (scores_A_P - rates_P) ** 2


def entropies(logits_A_P: Floats, rates_P: Floats) -> Floats:
    """Cross-entropy against soft labels."""
    return np.logaddexp(0, logits_A_P) - rates_P * logits_A_P


def best(errors_A_P: Floats, weights_P: Floats) -> int:
    """The alternative with the least weighted error."""
    return int(np.argmin((errors_A_P * weights_P).mean(axis=1)))


def honest_rates(scores_A_P: Floats, errors_A_P: Floats, rates_P: Floats, weights_P: Floats, folds_P: Folds) -> Floats:
    """Calibrated predictions [P] by models that a problem's own label had no say in.

    Choosing among dozens of models by the very errors that are then reported makes noise look like a signal, so each
    fold uses the choice and the calibration of the other folds' errors. (The models behind those errors did see this
    fold's labels; a fully nested validation would cost five times as much.)
    """
    honest = np.empty(len(rates_P))
    for fold in np.unique(folds_P):
        held, rest = folds_P == fold, folds_P != fold
        chosen = scores_A_P[best(errors_A_P[:, rest], weights_P[rest])]
        honest[held] = fit_platt(chosen[rest], rates_P[rest], weights_P[rest])(chosen[held])
    return honest
