"""What is believed about how often the policy is right on one question, and what more samples are then worth.

A predicted rate errs, most harmfully near 0: the plug-in 1 - (1 - rate)^k promises little of a question that may be
easier than it looks, and keeps promising of one that is hopeless (Damani et al. 2024; method.md section (c)). So the
rate is Beta(a, b): a = rate x strength, b = (1 - rate) x strength, where the strength, fitted on other questions, says
how many samples' worth the prediction knows. The values of samples are expectations over it.

`Sequential` is the paper's second future-work item (Snell et al. 2024, section 8: switch between assessing a question
and attempting it): each sample that is not right makes the next one less promising, until it is not worth its price.
With a perfect verifier the gain only falls, so that looking one sample ahead is the optimal rule.

Axis legend: _P problems, _K numbers of samples.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

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


# ---------------------------------------------------------------- one question, sample by sample


@dataclass(frozen=True, slots=True)
class Sequential:
    """Whether one more sample of this question is worth its price. Example: Sequential(0.4, 1.6, 1e-9, 5e6)

    `price` is what a FLOP must gain in the chance of a right answer, `cost_per_sample` the FLOPs of one more sample;
    in other units, so long as they agree.
    """

    prior_a: float
    prior_b: float
    price: float
    cost_per_sample: float
    num: int = 0  # samples looked at
    doubt: float = 1.0  # the chance that the answer it would give now is wrong

    @property
    def gain(self) -> float:
        """What one more sample is expected to add to the chance of a right answer.

        The doubt times the rate believed if none so far was right, a / (a + b + num). Exact for a verifier that tells
        right from wrong; for another it takes its scores for calibrated and hopes that it will know the right answer.
        """
        return self.doubt * self.prior_a / (self.prior_a + self.prior_b + self.num)

    def worth_more(self) -> bool:
        return self.gain >= self.price * self.cost_per_sample

    def update(self, scores: Iterable[float | None]) -> Sequential:
        """After more samples, by their verifier's scores in 0..1 (outcomes are scores of 0 and 1); None, for a sample
        without an answer or a verdict, scores 0. The doubt is what the best of all scores leaves."""
        found = [0.0 if s is None else min(max(s, 0.0), 1.0) for s in scores]
        return replace(self, num=self.num + len(found), doubt=min([self.doubt, *(1 - s for s in found)]))

    def agreed(self, num: int, certainty: float) -> Sequential:
        """Without a verifier: after `num` samples in all, whose leading answer is ahead for good with this chance
        (adaptive consistency, Aggarwal et al. 2023): what is left of it is the doubt."""
        return replace(self, num=num, doubt=1 - certainty)
