"""The threshold of step rejection belongs to a verifier: it is fitted on problems that are not reported on.

Every threshold of a grid is really run. The most accurate one wins; of those that are not worse than it by more than
one standard error of the paired difference, the one that costs the fewest FLOPs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from search.errors import ConfigError
from search.evaluate import solved
from search.policy import Sampler
from search.run import Plan, search
from search.scheduler import Tick
from search.strategies import FIT, Spec
from search.types import Budget, Problem, SearchResult, Verifier

GRID = (0.1, 0.3, 0.5, 0.7, 0.9)


@dataclass(frozen=True, slots=True)
class Tried:
    """What one threshold gave: the share of problems solved, and the ideal FLOPs a problem."""

    threshold: float
    accuracy: float
    flops: float


@dataclass(frozen=True, slots=True)
class Fit:
    """The spec with its threshold, what was tried for it, and the tokens and steps that all of it generated."""

    spec: Spec
    tried: tuple[Tried, ...]
    tokens: int
    steps: int


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
    max_tokens: int | None = None,
    on_tick: Callable[[Tick], None] | None = None,
) -> Fit:
    """The threshold that serves best on `problems`, which need gold answers. `on_tick` hears of all together.

    `max_tokens` caps what all of them generate: the first one that it leaves unfinished ends the grid. Raises
    ConfigError where that leaves nothing to choose from, BudgetError and ConfigError as `Spec.plan` does.
    """
    spent = Tick()
    solved_T_P: list[list[bool]] = []
    tried: list[Tried] = []
    for threshold in grid:
        candidate = with_threshold(spec, threshold)
        left = None if max_tokens is None else max_tokens - spent.tokens
        results, spent = _run(candidate.plan(budget, verifier.facts), problems, sampler, verifier, left, spent, on_tick)
        if len(results) < len(problems):
            break
        right = [r.chosen is not None and solved(r.chosen) for r in results]
        solved_T_P.append(right)
        flops = sum(result.spend.flops_ideal for result in results) / len(results)
        tried.append(Tried(threshold, sum(right) / len(right), flops))
    if not tried:
        raise ConfigError(
            f"{spec.text}: a cap of {max_tokens} tokens does not let one threshold be tried on {len(problems)} "
            "problems: raise it, or give the threshold as a number"
        )
    best = max(range(len(tried)), key=lambda i: (tried[i].accuracy, -tried[i].flops))
    fair = [i for i in range(len(tried)) if _not_worse(solved_T_P[i], solved_T_P[best])]
    chosen = min(fair, key=lambda i: tried[i].flops)
    return Fit(with_threshold(spec, grid[chosen]), tuple(tried), spent.tokens, spent.steps)


def _run(
    plan: Plan,
    problems: Sequence[Problem],
    sampler: Sampler,
    verifier: Verifier,
    max_tokens: int | None,
    before: Tick,
    on_tick: Callable[[Tick], None] | None,
) -> tuple[list[SearchResult], Tick]:
    """One threshold's results, and how far the fit is with it: `before` and what it generated, finished or not."""
    now = before

    def hear(tick: Tick) -> None:
        nonlocal now
        now = Tick(before.finished + tick.finished, before.tokens + tick.tokens, before.steps + tick.steps)
        if on_tick:
            on_tick(now)

    results = search(problems, plan, sampler, verifier, max_tokens=max_tokens, on_tick=hear)
    return results, Tick(before.finished + len(results), now.tokens, now.steps)


def with_threshold(spec: Spec, threshold: float) -> Spec:
    return replace(spec, options={**spec.options, "threshold": threshold})


def _not_worse(solved_P: Sequence[bool], best_P: Sequence[bool]) -> bool:
    """Whether the mean paired difference is within one standard error of zero."""
    difference_P = np.array(best_P, dtype=float) - np.array(solved_P, dtype=float)
    error = difference_P.std(ddof=1) / len(difference_P) ** 0.5 if len(difference_P) > 1 else 0.0
    return bool(difference_P.mean() <= error)
