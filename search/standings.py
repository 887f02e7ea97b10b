"""Strategies side by side: what each gains over the plain baselines at the same budget, and how much cheaper it is.

Gains are paired by problem, with 95 % t intervals (Miller 2024, arXiv 2411.00640). A saving is the baseline's ideal
FLOPs at equal accuracy over the row's own, by interpolating the baseline's measured curve (Snell et al. 2024 compare
so); where the curve starts above the accuracy there is none, and where it ends below it only a bound. Left out: an
interval of the saving.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from search import stats
from search.evaluate import SCORED_RULES, PoolFigures
from search.stats import Estimate
from search.types import Spend

PLAIN = ("greedy", "majority")  # what needs no search and no verifier
WEIGHTED = "best_of_n_weighted"  # what a verifier brings without search


@dataclass(frozen=True, slots=True)
class Row:
    """A strategy at a budget. `values[key]`: was the problem solved, or its chance over the subsets of a pool.

    `spend` is that of all its problems together, `wall_s` what its processes took for it.
    """

    strategy: str
    budget: float
    values: Mapping[str, float]
    spend: Spend
    num_ungraded: int = 0
    failures: tuple[str, ...] = ()  # a reason for each problem that failed
    wall_s: float | None = None
    verified: bool = False  # it needs a verifier
    approximate: bool = False  # the engine could not return its token ids

    @property
    def accuracy(self) -> Estimate:
        return stats.mean_estimate(list(self.values.values()))

    @property
    def kind(self) -> str:
        """Its name without the options that leave it what it is: how many samples a budget of tokens buys."""
        return self.strategy if "vote=" in self.strategy else self.strategy.partition("(")[0]

    @property
    def cost(self) -> float:
        """Ideal FLOPs of a problem; samples where no FLOPs are known."""
        return (self.spend.flops_ideal or self.spend.samples) / max(1, len(self.values))


@dataclass(frozen=True, slots=True)
class Gain:
    """Difference in accuracy to another row, over the `n` problems that both finished."""

    over: str
    value: float
    low: float
    high: float
    n: int


def pool_rows(figures: PoolFigures, names: Mapping[str, str], wall_s: Mapping[bool, float] | None = None) -> list[Row]:
    """The rows of every strategy at every k of a pool. `names`: strategy -> rule; `wall_s` of all the pool's samples,
    without and with their scores: a row takes its share."""
    rows: list[Row] = []
    num = max(1, sum(n for _, n in figures.counts.values()))
    for strategy, rule in names.items():
        scored = rule in SCORED_RULES
        for i, k in enumerate(figures.ks):
            share = k * len(figures.keys) / num
            rows.append(
                Row(
                    strategy,
                    k,
                    figures.by_key(rule, k),
                    figures.spends_K[scored][i],
                    figures.num_ungraded,
                    figures.failures + (figures.unscored if scored else ()),
                    wall_s[scored] * share if wall_s else None,
                    verified=scored,
                    approximate=figures.approximate,
                )
            )
    return rows


def gain(row: Row, rows: Sequence[Row], over: Sequence[str]) -> Gain | None:
    """Against the most accurate of these strategies at the same budget (greedy has one answer at any); None where it
    is that one, or none is there."""
    others = [r for r in rows if r.kind in over and r.values and r.budget in (row.budget, _any_budget(r))]
    best = max(others, key=lambda r: r.accuracy.value, default=None)
    if best is None or best is row:
        return None
    keys = [key for key in row.values if key in best.values]
    if not keys:
        return None
    found = stats.paired_difference([best.values[key] for key in keys], [row.values[key] for key in keys])
    mean, low, high = (round(value, 12) + 0.0 for value in (found.mean, found.low, found.high))  # equal is no gain
    return Gain(best.strategy, mean, low, high, found.n)


def _any_budget(row: Row) -> float | None:
    return row.budget if row.kind == "greedy" else None


@dataclass(frozen=True, slots=True)
class Saving:
    """How many times a row's cost the baseline needs for its accuracy. `value` None: out of the curve's range;
    `more_than`: where the curve ends below the accuracy, what its most accurate point costs."""

    value: float | None = None
    more_than: float | None = None


def saving(row: Row, curve: Sequence[Row]) -> Saving:
    """Interpolates accuracy over the logarithm of the cost, between the neighbours where the curve first gets there.

    Accuracies are over the problems that all have finished.
    """
    rows = [r for r in curve if r.cost > 0 and r.values]
    keys = [key for key in row.values if all(key in r.values for r in rows)]
    target = _accuracy(row, keys)
    points = sorted((r.cost, _accuracy(r, keys)) for r in rows)
    if not row.cost or not points or not target >= points[0][1]:
        return Saving()
    if target == points[0][1]:
        return Saving(points[0][0] / row.cost)
    for (low_cost, low), (high_cost, high) in itertools.pairwise(points):
        if low <= target <= high:
            part = (target - low) / (high - low)
            return Saving(math.exp((1 - part) * math.log(low_cost) + part * math.log(high_cost)) / row.cost)
    best_cost, _ = max(points, key=lambda point: (point[1], -point[0]))
    return Saving(more_than=best_cost / row.cost)


def _accuracy(row: Row, keys: Sequence[str]) -> float:
    return stats.mean_estimate([row.values[key] for key in keys]).value


def baseline_of(row: Row, rows: Sequence[Row]) -> str:
    """What a row's saving is measured against: with a verifier its own weighted vote, else the majority."""
    weighted = row.verified and row.kind != WEIGHTED and any(r.kind == WEIGHTED for r in rows)
    return WEIGHTED if weighted else "majority"


def to_json(task: str, n: int, num_ungraded: int, rows: Sequence[Row], curves: Sequence[Row] = ()) -> dict[str, Any]:
    """The document of `ratchet eval --json`. `curves`: more points of the baselines, for savings only."""
    return {
        "task": task,
        "n": n,
        "ungraded": num_ungraded,
        "results": [_row_json(row, rows, [*rows, *curves]) for row in rows],
    }


def _row_json(row: Row, rows: Sequence[Row], points: Sequence[Row]) -> dict[str, Any]:
    accuracy = row.accuracy
    found: dict[str, Any] = {
        "strategy": row.strategy,
        "budget": row.budget,
        "n": accuracy.n,
        "accuracy": _finite(accuracy.value),
        "se": _finite(accuracy.se),
        "failed": len(row.failures),
        "ungraded": row.num_ungraded,
        "gain": _gain_json(gain(row, rows, PLAIN)),
    }
    if row.failures:
        found["failed_reason"] = Counter(row.failures).most_common(1)[0][0]
    if row.approximate:
        found["approximate"] = True
    if row.verified and row.kind != WEIGHTED:
        found["verifier_gain"] = _gain_json(gain(row, rows, (WEIGHTED,)))
    over = baseline_of(row, rows)
    curve = [r for r in points if r.kind == over]
    if curve and row.kind not in (over, "pass"):  # any of k right is no answer that could be given
        saved = saving(row, curve)
        found["saving"] = {"over": over, "value": saved.value, "more_than": saved.more_than}
    return found | {"spend": row.spend.to_json(), "wall_s": None if row.wall_s is None else round(row.wall_s, 3)}


def _gain_json(gain: Gain | None) -> dict[str, Any] | None:
    if gain is None:
        return None
    return {"over": gain.over, "value": gain.value, "low": _finite(gain.low), "high": _finite(gain.high), "n": gain.n}


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
