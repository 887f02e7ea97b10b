"""The threshold of step rejection belongs to a verifier: it is fitted on problems that are not reported on.

Every threshold of a grid is really run. The most accurate one wins; of those that are not worse than it by more than
one standard error of the paired difference, the one that costs the fewest FLOPs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from search.policy import Sampler
from search.run import search
from search.strategies import FIT, Spec
from search.types import Budget, Grade, Problem, Verifier

GRID = (0.1, 0.3, 0.5, 0.7, 0.9)


@dataclass(frozen=True, slots=True)
class Tried:
    """What one threshold gave: the share of problems solved, and the ideal FLOPs a problem."""

    threshold: float
    accuracy: float
    flops: float


def needs_fit(spec: Spec) -> bool:
    return spec.options.get("threshold") == FIT


def fit_threshold(
    spec: Spec,
    budget: Budget,
    problems: Sequence[Problem],
    sampler: Sampler,
    verifier: Verifier,
    *,
    grid: Sequence[float] = GRID,
    on_tried: Callable[[Tried], None] | None = None,
) -> tuple[Spec, list[Tried]]:
    """The spec with the threshold that serves best on `problems`, which need gold answers; and all that was tried.

    Raises BudgetError and ConfigError as `Spec.plan` does.
    """
    solved_T_P: list[list[bool]] = []
    tried: list[Tried] = []
    for threshold in grid:
        candidate = with_threshold(spec, threshold)
        results = search(problems, candidate.plan(budget, verifier.facts), sampler, verifier)
        right = [r.selected is not None and r.candidates[r.selected].grade is Grade.CORRECT for r in results]
        solved_T_P.append(right)
        flops = sum(result.spend.flops_ideal for result in results) / len(results)
        tried.append(Tried(threshold, sum(right) / len(right), flops))
        if on_tried:
            on_tried(tried[-1])
    best = max(range(len(grid)), key=lambda i: (tried[i].accuracy, -tried[i].flops))
    fair = [i for i in range(len(grid)) if _not_worse(solved_T_P[i], solved_T_P[best])]
    chosen = min(fair, key=lambda i: tried[i].flops)
    return with_threshold(spec, grid[chosen]), tried


def with_threshold(spec: Spec, threshold: float) -> Spec:
    return replace(spec, options={**spec.options, "threshold": threshold})


def _not_worse(solved_P: Sequence[bool], best_P: Sequence[bool]) -> bool:
    """Whether the mean paired difference is within one standard error of zero."""
    difference_P = np.array(best_P, dtype=float) - np.array(solved_P, dtype=float)
    error = difference_P.std(ddof=1) / len(difference_P) ** 0.5 if len(difference_P) > 1 else 0.0
    return bool(difference_P.mean() <= error)
