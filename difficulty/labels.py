"""Difficulty labels: how often the policy solved a problem, from independent plain samples only.

The pass rate gets a Beta posterior. A searched candidate (pruned, revised, selected) is no draw from the policy and
must not be counted; nor is an answer the grader failed on. Left out: labels from verifier scores.

Axis legend: _P problems.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from search.errors import DataError
from search.types import Finish, Grade, SearchResult

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
TRUNCATED = (Finish.LENGTH, Finish.OVERFLOW)


@dataclass(frozen=True, slots=True)
class Counts:
    """Right answers and graded samples of each problem, by key, under one policy.

    Example: Counts(("3,5,7>22",), array([3]), array([16]), "9f86d081884c7d65")
    """

    keys: tuple[str, ...]
    successes_P: Ints
    totals_P: Ints
    model: str  # fingerprint of the policy


@dataclass(frozen=True, slots=True)
class Posterior:
    """Mean and equal-tailed credible interval of each problem's pass rate."""

    mean_P: Floats
    low_P: Floats
    high_P: Floats


def count_samples(results: Iterable[SearchResult], num_plain: int | None = None) -> Counts:
    """Counts over the first `num_plain` candidates of every result; None where all are plain samples (stored pools).

    Several results of one problem are added up. A truncated answer is wrong. Left out are answers without a grade,
    answers that the engine failed on or the search did not let end, and problems of which no sample is left. Raises
    DataError where results come from different policies: a label belongs to one.
    """
    counts: dict[str, tuple[int, int]] = {}
    model = ""
    for result in results:
        if model and result.model != model:
            raise DataError(f"difficulty labels mix policies {model} and {result.model}; label one policy at a time")
        model = result.model
        plain = result.candidates[:num_plain]
        graded = [c for c in plain if c.finish in TRUNCATED or (c.complete and c.grade in (Grade.CORRECT, Grade.WRONG))]
        right = sum(c.complete and c.grade is Grade.CORRECT for c in graded)
        if graded:
            before = counts.get(result.problem.key, (0, 0))
            counts[result.problem.key] = (before[0] + right, before[1] + len(graded))
    pairs = np.array(list(counts.values()), dtype=np.int64).reshape(-1, 2)
    return Counts(tuple(counts), pairs[:, 0], pairs[:, 1], model)


def empirical_prior(successes_P: Ints, totals_P: Ints) -> tuple[float, float]:
    """The Beta(a, b) the pass rates look drawn from, by moments; a + b lies in [0.2, 1000].

    (1, 1) where nothing can be learned: no problem with two samples, or all samples alike.
    """
    keep = totals_P >= 2
    successes, totals = successes_P[keep].astype(np.float64), totals_P[keep].astype(np.float64)
    if not len(totals) or not 0 < successes.sum() < totals.sum():
        return 1.0, 1.0
    mean = float((successes / totals).mean())
    square = float((successes * (successes - 1) / (totals * (totals - 1))).mean())  # unbiased for the rate's square
    variance = square - mean**2
    strength = mean * (1 - mean) / variance - 1 if variance > 0 else 1000.0
    strength = min(max(strength, 0.2), 1000.0)
    return mean * strength, (1 - mean) * strength


def posterior(
    successes_P: Ints, totals_P: Ints, prior: tuple[float, float] = (1.0, 1.0), *, credibility: float = 0.9
) -> Posterior:
    """Beta posterior of every pass rate. Problems without samples get the prior."""
    from scipy.special import betaincinv  # pyright: ignore[reportMissingTypeStubs, reportUnknownVariableType]

    a, b = prior[0] + successes_P, prior[1] + (totals_P - successes_P)
    tail = (1 - credibility) / 2
    low_P, high_P = (np.asarray(betaincinv(a, b, q), dtype=np.float64) for q in (tail, 1 - tail))
    return Posterior(a / (a + b), low_P, high_P)
