"""Figures from stored results: greedy accuracy, pass@k, maj@k, search@N, each with its standard error.

Everything is recomputed from SearchResult files, read one line at a time; of a problem only its figures are kept. A
truncated, unfinished or answer-less candidate is wrong; an ungraded one counts as not solved, stays in the denominator
and is counted. The pool of a problem is its independent samples; see `search.stats` for the estimators.

Axis legend: _P problems, _N candidates of one problem, _K values of k.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from search import stats
from search.errors import DataError
from search.results import Paths, read_results
from search.stats import Estimate
from search.types import Candidate, Grade, SearchResult, Spend

RULES = ("pass", "gold", "majority", "best_of_n", "best_of_n_weighted")
SCORED_RULES = ("best_of_n", "best_of_n_weighted")


@dataclass(frozen=True, slots=True)
class Pool:
    """The independent samples of one problem, reduced to what the figures need.

    Example: Pool("3,5,7>22", (True, False), ("3*5+7", None), (0.9, None), 0, Spend(samples=2))
    """

    key: str
    correct_N: tuple[bool, ...]
    answers_N: tuple[str | None, ...]  # None: truncated or answer-less, never votes
    scores_N: tuple[float | None, ...]
    num_ungraded: int
    spend: Spend

    @property
    def scored(self) -> bool:
        """Every sample that has an answer has a score."""
        return all(s is not None for s, a in zip(self.scores_N, self.answers_N, strict=True) if a is not None)


@dataclass(frozen=True, slots=True)
class Outcomes:
    """One answer per problem: whether it was solved, and what that cost."""

    solved: Mapping[str, bool]
    num_ungraded: int
    spend: Spend

    @property
    def accuracy(self) -> Estimate:
        return stats.mean_estimate(list(self.solved.values()))


@dataclass(frozen=True, slots=True)
class PoolFigures:
    """Figures of a file of pools. `values_P_K[rule]` holds, by problem, the chance of being solved at each k."""

    keys: tuple[str, ...]
    ks: tuple[int, ...]
    values_P_K: Mapping[str, np.ndarray]  # rule -> [P, K] float64
    counts: Mapping[str, tuple[int, int]]  # key -> (correct, samples)
    num_ungraded: int
    spend: Spend  # of all samples

    def estimate(self, rule: str, k: int) -> Estimate:
        return stats.mean_estimate(self.values_P_K[rule][:, self.ks.index(k)])

    def by_key(self, rule: str, k: int) -> dict[str, float]:
        column = self.values_P_K[rule][:, self.ks.index(k)]
        return dict(zip(self.keys, map(float, column), strict=True))


@dataclass(frozen=True, slots=True)
class Row:
    """One line of `ratchet eval`: a strategy at a budget of samples per problem."""

    strategy: str
    budget: float
    accuracy: Estimate
    spend: Spend


@dataclass(frozen=True, slots=True)
class BinAccuracy:
    """Accuracy of the problems whose base pass rate lies in [low, high]; bin 1 is the easiest."""

    bin: int
    low: float
    high: float
    accuracy: Estimate


# ---------------------------------------------------------------- reading


def solved(candidate: Candidate) -> bool:
    """Finished and graded correct."""
    return candidate.complete and candidate.grade is Grade.CORRECT


def ungraded(candidate: Candidate) -> bool:
    """Finished, and the grader failed on it or never saw it. A truncated one is wrong without a grader."""
    return candidate.complete and candidate.grade in (None, Grade.UNGRADED)


def reduce_pool(result: SearchResult) -> Pool:
    """Keep what the figures need of one stored pool."""
    candidates = result.candidates
    return Pool(
        key=result.problem.key,
        correct_N=tuple(solved(c) for c in candidates),
        answers_N=tuple(c.answer if c.complete else None for c in candidates),
        scores_N=tuple(c.score if c.complete else None for c in candidates),
        num_ungraded=sum(ungraded(c) for c in candidates),
        spend=result.spend,
    )


def read_outcomes(paths: Paths) -> Outcomes:
    """The selected answer of every result: greedy files, or any strategy's. Abstaining is not solving.

    Raises DataError for a file that cannot be read, and for a problem that comes twice.
    """
    by_key: dict[str, bool] = {}
    num_ungraded, spend = 0, Spend()
    for result in read_results(paths):
        _refuse_twice(result.problem.key, by_key)
        chosen = None if result.selected is None else result.candidates[result.selected]
        by_key[result.problem.key] = chosen is not None and solved(chosen)
        looked_at = result.candidates if chosen is None else (chosen,)  # an ungraded answer may not be selectable
        num_ungraded += not by_key[result.problem.key] and any(map(ungraded, looked_at))
        spend += result.spend
    return Outcomes(by_key, num_ungraded, spend)


def _refuse_twice(key: str, seen: Mapping[str, object]) -> None:
    if key in seen:
        raise DataError(f"problem '{key}' comes twice; each problem is one line, with all its samples")


# ---------------------------------------------------------------- figures of a pool


def values_at(pool: Pool, rule: str, ks: Sequence[int], *, seed: object = 0) -> list[float]:
    """The chance that `rule` solves this problem with k of its samples, for each k.

    pass, gold: any of the k is right. majority: the most frequent answer. best_of_n: the highest score.
    best_of_n_weighted: the answer with the largest sum of scores. Raises ValueError for k above the pool.
    """
    if rule in ("pass", "gold"):
        return [stats.pass_at_k(len(pool.correct_N), sum(pool.correct_N), k) for k in ks]
    if rule == "majority":
        return stats.majority_at_k(pool.correct_N, pool.answers_N, ks)
    scores_N = [s if a is not None else None for s, a in zip(pool.scores_N, pool.answers_N, strict=True)]
    if rule == "best_of_n":
        return [stats.best_at_k(pool.correct_N, scores_N, k) for k in ks]
    if rule == "best_of_n_weighted":
        return stats.weighted_at_k(pool.correct_N, pool.answers_N, scores_N, ks, seed=f"{seed}/{pool.key}")
    raise ValueError(f"unknown rule '{rule}': one of {', '.join(RULES)}")


def pool_figures(pools: Iterable[Pool], ks: Sequence[int], rules: Sequence[str], *, seed: object = 0) -> PoolFigures:
    """The figures of every problem under every rule. Raises DataError naming the smallest pool below a k."""
    counts: dict[str, tuple[int, int]] = {}
    values: dict[str, list[list[float]]] = {rule: [] for rule in rules}
    num_ungraded, spend, smallest = 0, Spend(), None
    for pool in pools:
        _refuse_twice(pool.key, counts)
        num = len(pool.correct_N)
        counts[pool.key] = (sum(pool.correct_N), num)
        num_ungraded += pool.num_ungraded
        spend += pool.spend
        if num < max(ks):
            smallest = min(smallest or (num, pool.key), (num, pool.key))
            continue
        for rule in rules:
            if rule in SCORED_RULES and not pool.scored:
                raise DataError(f"problem '{pool.key}' has answers without a score: '{rule}' needs one for each")
            values[rule].append(values_at(pool, rule, ks, seed=seed))
    if smallest:
        raise DataError(
            f"k = {max(ks)} needs {max(ks)} samples of every problem, but '{smallest[1]}' has {smallest[0]}; "
            "lower k or leave that problem out"
        )
    if not counts:
        raise DataError("the pool holds no problems")
    arrays = {rule: np.array(rows, dtype=np.float64) for rule, rows in values.items()}
    return PoolFigures(tuple(counts), tuple(ks), arrays, counts, num_ungraded, spend)


def read_pool(paths: Paths, ks: Sequence[int], rules: Sequence[str] = ("pass", "majority")) -> PoolFigures:
    """The figures of stored pools. Raises DataError."""
    return pool_figures(map(reduce_pool, read_results(paths)), ks, rules)


def scale(spend: Spend, factor: float) -> Spend:
    """A spend times a factor; counts are rounded to whole ones."""
    scaled: dict[str, Any] = {
        name: value * factor if isinstance(value, float) else round(value * factor)
        for name, value in spend.to_json().items()
    }
    return Spend(**scaled)


# ---------------------------------------------------------------- summaries


def summary(
    greedy_path: Paths, pool_path: Paths | None, k: Sequence[int], *, rule: str = "gold"
) -> dict[str, Estimate]:
    """The metrics `test/...` of one model, by name, from its greedy and its pool file.

    `rule` is how the round's own search selects, for test/search_at_{n}; "gold" takes any right answer.
    test/ungraded is the ungraded share of the greedy answers. Raises DataError.
    """
    greedy = read_outcomes(greedy_path)
    shares = [1.0] * greedy.num_ungraded + [0.0] * (len(greedy.solved) - greedy.num_ungraded)
    metrics = {"test/accuracy_greedy": greedy.accuracy, "test/ungraded": stats.mean_estimate(shares)}
    if pool_path is None:
        return metrics
    figures = read_pool(pool_path, k, tuple(dict.fromkeys(("pass", "majority", rule))))
    for name, by_rule in (("pass", "pass"), ("maj", "majority"), ("search", rule)):
        for size in k:
            metrics[f"test/{name}_at_{size}"] = figures.estimate(by_rule, size)
    return metrics


def metric_rows(estimates: Mapping[str, Estimate]) -> list[dict[str, Any]]:
    """Rows of metrics.jsonl."""
    rows: list[dict[str, Any]] = []
    for name, estimate in estimates.items():
        row: dict[str, Any] = {"name": name, "value": estimate.value}
        if np.isfinite(estimate.se):
            row["se"] = estimate.se
        rows.append(row)
    return rows


def table(figures: PoolFigures) -> list[Row]:
    """Accuracy against budget: every rule at every k, with the spend that k samples of every problem cost."""
    rows: list[Row] = []
    num_samples = sum(n for _, n in figures.counts.values())
    for rule in figures.values_P_K:
        for k in figures.ks:
            spent = scale(figures.spend, k * len(figures.keys) / num_samples)
            rows.append(Row(rule, k, figures.estimate(rule, k), spent))
    return rows


def outcome_row(strategy: str, budget: float, outcomes: Outcomes) -> Row:
    """The row of a strategy that was really run, such as greedy or beam."""
    return Row(strategy, budget, outcomes.accuracy, outcomes.spend)


def to_json(task: str, n: int, num_ungraded: int, rows: Sequence[Row]) -> dict[str, Any]:
    """The document of `ratchet eval --json`."""
    results = [
        {
            "strategy": row.strategy,
            "budget": row.budget,
            "accuracy": row.accuracy.value,
            "se": row.accuracy.se if np.isfinite(row.accuracy.se) else None,
            "spend": row.spend.to_json(),
        }
        for row in rows
    ]
    return {"task": task, "n": n, "ungraded": num_ungraded, "results": results}


def by_difficulty(
    values: Mapping[str, float], base_rates: Mapping[str, float], *, bins: int = 5, edges: Sequence[float] | None = None
) -> list[BinAccuracy]:
    """Accuracy within quantile bins of the base model's pass rate, easiest first.

    Equal rates share a bin, so bins can be uneven, or fewer. `edges` fixes the bins of an earlier round. The rates
    must come from other samples than the values, else the easy bins flatter. Raises DataError for a missing rate.
    """
    missing = [key for key in values if key not in base_rates]
    if missing:
        raise DataError(f"{len(missing)} problems have no base pass rate, the first is '{missing[0]}'")
    rates = np.array([base_rates[key] for key in values], dtype=np.float64)
    scores = np.array([float(v) for v in values.values()])
    index = stats.assign_bins(rates, stats.quantile_edges(rates, bins) if edges is None else edges)
    return [
        BinAccuracy(
            int(b),
            float(rates[index == b].min()),
            float(rates[index == b].max()),
            stats.mean_estimate(scores[index == b]),
        )
        for b in np.unique(index)
    ]


def total_spend(paths: Paths) -> Spend:
    """The sum over stored results."""
    total = Spend()
    for result in read_results(paths):
        total += result.spend
    return total
