"""What is believed about how often the policy is right on one question, and what more samples are then worth.

A predicted rate errs, most harmfully near 0: the plug-in 1 - (1 - rate)^k promises little of a question that may be
easier than it looks, and keeps promising of one that is hopeless (Damani et al. 2024; method.md section (c)). So the
rate is Beta(a, b): a = rate x strength, b = (1 - rate) x strength, where the strength, fitted on other questions, says
how many samples' worth the prediction knows. The values of samples are expectations over it.

Axis legend: _P problems, _K numbers of samples.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike

from search.errors import DataError
from search.stats import Floats

STRENGTHS = tuple(float(s) for s in np.geomspace(0.25, 1024, 49))  # a fitted strength is one of these


def beta_prior(rates: ArrayLike, strength: float) -> tuple[Floats, Floats]:
    """(a, b) of the Beta distribution with that mean and a + b = strength; each shaped like `rates`.

    Rates of exactly 0 or 1 are allowed and are then certain. Raises DataError for rates outside 0..1, and a strength
    that is not positive.
    """
    rates_P = np.asarray(rates, dtype=np.float64)
    if not ((rates_P >= 0) & (rates_P <= 1)).all():
        raise DataError(f"a predicted rate lies in 0..1, not {rates_P[~((rates_P >= 0) & (rates_P <= 1))][0]:g}")
    if not 0 < strength < math.inf:
        raise DataError(f"a prior of strength {strength:g} means nothing: give more than 0 samples")
    return rates_P * strength, (1 - rates_P) * strength


def expected_values(a_P: ArrayLike, b_P: ArrayLike, ks: Sequence[int]) -> Floats:
    """The chance that k samples hold a right one, if the rate is Beta(a, b); shape [P, K].

    1 - B(a, b + k) / B(a, b). Its marginals, a / (a + b + k) x the chance that k are all wrong, fall like 1 / k^(a + 1)
    and not exponentially: honest where the rate is uncertain. For large a + b it is 1 - (1 - rate)^k.
    """
    a, b = (np.atleast_1d(np.asarray(x, dtype=np.float64))[:, None] for x in (a_P, b_P))
    if not len(ks) or min(ks) < 0:
        raise DataError(f"numbers of samples are 0 or more, not {list(ks)}")
    drawn = np.arange(max(ks))
    all_wrong = np.cumprod((b + drawn) / (a + b + drawn), axis=1)
    none_right = np.concatenate([np.ones((len(all_wrong), 1)), all_wrong], axis=1)
    return np.asarray(1.0 - none_right[:, list(ks)], dtype=np.float64)


def fit_strength(rates_P: ArrayLike, successes_P: ArrayLike, totals_P: ArrayLike) -> float:
    """How many samples' worth of knowledge the predicted rates hold: the strength under which the counted successes
    on other questions are the likeliest (beta-binomial), out of STRENGTHS.

    All shaped [P]. Rates are kept 1e-3 away from 0 and 1, so that no single surprise is impossible. Raises DataError.
    """
    rates = np.clip(np.asarray(rates_P, dtype=np.float64), 1e-3, 1 - 1e-3)
    right, total = np.asarray(successes_P, dtype=np.int64), np.asarray(totals_P, dtype=np.int64)
    if not (rates.shape == right.shape == total.shape and rates.size and (right >= 0).all() and (right <= total).all()):
        raise DataError("a strength is fitted to rates with as many successes, each of its total, and to one at least")
    likelihoods = [_log_likelihood(*beta_prior(rates, s), right, total) for s in STRENGTHS]
    return STRENGTHS[int(np.argmax(likelihoods))]


def _log_likelihood(a_P: Floats, b_P: Floats, right_P: np.ndarray, total_P: np.ndarray) -> float:
    """Of the counts in some order: the product of the predictive chances, one sample after another."""
    drawn = np.arange(int(total_P.max()))
    wrong_P = total_P - right_P

    def rising(x_P: Floats, num_P: np.ndarray) -> float:
        return float(
            np.log(x_P[:, None] + drawn, where=drawn < num_P[:, None], out=np.zeros((len(x_P), len(drawn)))).sum()
        )

    return rising(a_P, right_P) + rising(b_P, wrong_P) - rising(a_P + b_P, total_P)
