"""What each strategy came to at each budget, problem by problem: what a compute-optimal choice is fitted on.

An arm is a strategy as users write it, `beam(width=2)`; a cell is an arm at one budget on all problems of a grid.
Cells of arms that draw independent samples are expectations over the subsets of one stored pool; the others were
searched for real, once.

Axis legend: _P problems, in the order of the grid's keys; _C cells.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from search.answers import Rule
from search.errors import DataError
from search.evaluate import SCORED_RULES, Pool, chances, expected_spend, reduce_pool, solved
from search.results import Paths, read_results
from search.stats import Floats, distinct_at_k
from search.types import SearchResult, Spend

_SPENT = tuple(Spend().to_json())
ROWS_KEPT = 4  # distinct right answers of a problem that count as rows: what `select` keeps by default


@dataclass(frozen=True, slots=True, eq=False)
class Cell:
    """One arm at one budget; every array is float64 of shape [P].

    Example: Cell("best_of_n_weighted", 16, ...), Cell("step_rejection(draws=4)", 8, ...)
    """

    arm: str
    budget: float  # samples it was given
    solved_P: Floats  # the chance that the answer it gives is right
    flops_P: Floats  # ideal FLOPs of policy and verifier; samples where the engine does not know the policy's
    actual_P: Floats  # FLOPs as computed
    found_P: Floats  # the chance that any of its answers is right
    rows_P: Floats  # distinct right answers among them, at most ROWS_KEPT

    @property
    def name(self) -> str:
        """As tables call it: `beam @ 16`."""
        return f"{self.arm} @ {self.budget:g}"


@dataclass(frozen=True, slots=True, eq=False)
class Grid:
    """All cells on the same problems."""

    keys: tuple[str, ...]
    cells: tuple[Cell, ...]

    def __post_init__(self) -> None:
        for cell in self.cells:
            if len(cell.solved_P) != len(self.keys):
                raise DataError(f"{cell.name} has {len(cell.solved_P)} problems, the grid {len(self.keys)}")

    def values(self, objective: str = "answer") -> Floats:
        """What the objective counts, shape [C, P]. `answer`: the chance that the answer given is right. `rows`: for
        training data, that any is right, and a tenth of that for all the distinct right answers that are kept."""
        if objective == "answer":
            return np.array([cell.solved_P for cell in self.cells])
        return np.array([cell.found_P + 0.1 * cell.rows_P / ROWS_KEPT for cell in self.cells])

    def flops(self, *, actual: bool = False) -> Floats:
        """Shape [C, P]."""
        return np.array([cell.actual_P if actual else cell.flops_P for cell in self.cells])

    def only(self, arms: Iterable[str]) -> Grid:
        """Without the other arms. Raises DataError where nothing is left."""
        wanted = set(arms)
        cells = tuple(cell for cell in self.cells if cell.arm in wanted)
        if not cells:
            raise DataError(f"none of the arms {', '.join(sorted(wanted))} was measured")
        return replace(self, cells=cells)

    def find(self, arm: str, budget: float) -> Cell | None:
        return next((cell for cell in self.cells if cell.arm == arm and cell.budget == budget), None)


# ---------------------------------------------------------------- from stored results


def pool_cells(
    pools: Sequence[Pool], arms: Mapping[str, str], budgets: Sequence[int], *, seed: object = 0
) -> list[Cell]:
    """Cells of the arms that draw independent samples. `arms`: name -> rule of `search.evaluate`.

    A problem that failed is not solved, at what it cost. Raises DataError for a pool smaller than a budget, and for
    answers without a score where a rule needs them.
    """
    ks = sorted(set(budgets))
    for pool in pools:
        if len(pool.correct_N) < ks[-1] and not pool.failed:
            raise DataError(f"a budget of {ks[-1]} needs {ks[-1]} samples, '{pool.key}' has {len(pool.correct_N)}")
    flops_P_K: dict[bool, list[Floats]] = {}
    for scored in {rule in SCORED_RULES for rule in arms.values()}:
        spent_P_K = [[_spend(pool, k, scored=scored) for k in ks] for pool in pools]
        flops_P_K[scored] = [np.array(spent_P_K)[:, :, i] for i in range(2)]
    found_P_K = np.array([chances(pool, "pass", ks) for pool in pools])
    rows_P_K = np.array([_expected_rows(pool, ks) for pool in pools])
    cells: list[Cell] = []
    for arm, rule in arms.items():
        solved_P_K = np.array([chances(pool, rule, ks, seed=seed) for pool in pools])
        ideal, actual = flops_P_K[rule in SCORED_RULES]
        cells += [
            Cell(arm, k, solved_P_K[:, i], ideal[:, i], actual[:, i], found_P_K[:, i], rows_P_K[:, i])
            for i, k in enumerate(ks)
        ]
    return cells


def searched_cell(paths: Paths, arm: str, budget: float, keys: Sequence[str], rule: Rule | None = None) -> Cell:
    """The cell of an arm that was searched for real. `rule` chooses among its stored answers anew.

    Raises DataError where a problem of `keys` is missing.
    """
    found = {result.problem.key: _outcome(result, rule) for result in read_results(paths)}
    missing = [key for key in keys if key not in found]
    if missing:
        raise DataError(f"{arm} @ {budget:g} lacks {len(missing)} of {len(keys)} problems, the first is '{missing[0]}'")
    return Cell(arm, budget, *np.array([found[key] for key in keys], dtype=np.float64).T)


def outcome_cell(results: Sequence[SearchResult], arm: str, budget: float) -> Cell:
    """The cell of results that are at hand, in their order."""
    return Cell(arm, budget, *np.array([_outcome(result, None) for result in results], dtype=np.float64).T)


def read_pools(paths: Paths, delimiter: str | None = None) -> list[Pool]:
    """Stored pools, reduced to what figures need; `delimiter` of the task's steps."""
    return [reduce_pool(result, delimiter) for result in read_results(paths)]


def halves(pool: SearchResult, num: int) -> tuple[SearchResult, SearchResult]:
    """The first `num` samples and the others: one part measures strategies, the other difficulty (disjoint, so that
    a bin does not hold the luck of the very samples that are scored). Spend stays with the first part."""
    first, rest = pool.candidates[:num], pool.candidates[num:]
    return pool.with_candidates(first), replace(pool, candidates=rest, spend=Spend())


def _outcome(result: SearchResult, rule: Rule | None) -> tuple[float, float, float, float, float]:
    index = result.selected if rule is None or result.failed else rule(result.candidates)
    right = index is not None and not result.failed and solved(result.candidates[index])
    distinct = {c.text for c in result.candidates if solved(c)}
    ideal, actual = _cost(result.spend.to_json())
    return float(right), ideal, actual, float(bool(distinct)), float(min(len(distinct), ROWS_KEPT))


def _spend(pool: Pool, k: int, *, scored: bool) -> tuple[float, float]:
    """What k samples cost."""
    spent = expected_spend(pool, min(k, len(pool.correct_N)), scored=scored)
    return _cost(dict(zip(_SPENT, spent.tolist(), strict=True)))


def _cost(spent: Mapping[str, float]) -> tuple[float, float]:
    """Ideal and actual FLOPs. Where the policy's are not known, samples, for every arm: with a verifier's FLOPs alone
    the arms that ask none would seem to cost nothing."""
    if spent["flops_ideal"] <= spent["verifier_flops_ideal"]:
        return float(spent["samples"]), float(spent["samples"])
    return spent["flops_ideal"], spent["flops_actual"]


def _expected_rows(pool: Pool, ks: Sequence[int]) -> list[float]:
    """Distinct right texts expected among k samples, at most ROWS_KEPT."""
    num = len(pool.correct_N)
    if pool.failed or not num:
        return [0.0] * len(ks)
    return distinct_at_k(num, pool.right_copies, [min(k, num) for k in ks], ROWS_KEPT)
