"""Run what the StrategyTable chooses: each question gets the strategy and budget of its predicted difficulty.

Two ways to spend: at most N samples on every question, or (`spread`) as much on average as that would cost, more where
it pays and less where it does not.

A question whose difficulty is not known (no usable predictor, a rate that is not finite) gets what is best over all.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from search.allocate import Allocation
from search.errors import DataError
from search.run import Plan
from search.strategies import parse
from search.table import EVERYWHERE, Rung, StrategyTable
from search.types import Budget, Problem, VerifierFacts


@dataclass(frozen=True, slots=True)
class Chooser:
    """A plan for each problem. `rates` are predicted pass rates by key; `rungs_B[b]` what bin b gets (0: unknown).

    Raises BudgetError where the table knows nothing as cheap, ConfigError where its strategy needs another verifier.
    """

    table: StrategyTable
    rates: Mapping[str, float]
    rungs_B: tuple[Rung, ...]
    facts: VerifierFacts | None = None
    allocation: Allocation | None = None  # of a budget across questions: some of a bin may get another rung

    def bin_of(self, problem: Problem) -> int:
        """From 1 = easiest; 0 where no rate is known."""
        return int(self.table.bins([self.rates.get(problem.key, float("nan"))])[0])

    def rung(self, problem: Problem) -> Rung:
        b = self.bin_of(problem)
        if self.allocation is None or b == EVERYWHERE:
            return self.rungs_B[b]
        (offer,) = self.allocation.assign([b - 1], [problem.key])
        return self.table.ladders[b][offer]

    def __call__(self, problem: Problem) -> Plan:
        return plan_of(self.rung(problem), self.facts)

    def counts(self, problems: Sequence[Problem]) -> dict[str, int]:
        """How many of the problems get which strategy, the most frequent first."""
        return dict(Counter(self.rung(problem).name for problem in problems).most_common())


def plan_of(rung: Rung, facts: VerifierFacts | None) -> Plan:
    return parse(rung.arm).plan(Budget("samples", rung.budget), facts)


def choose_each(
    table: StrategyTable, rates: Mapping[str, float], budget: float, facts: VerifierFacts | None = None
) -> Chooser:
    """At most `budget` samples on every question. Raises BudgetError."""
    rungs = tuple(table.choose(b, budget) for b in range(table.num_bins + 1))
    return Chooser(table, rates, rungs, facts)


def choose_together(
    table: StrategyTable, rates: Mapping[str, float], mean_flops: float, facts: VerifierFacts | None = None
) -> Chooser:
    """At most `mean_flops` a question on average over these questions, as the table estimates costs.

    One whose difficulty is not known gets the best for that mean, or the cheapest there is; where none is known, all
    are alike. Raises BudgetError.
    """
    bins = table.bins(list(rates.values())).tolist()
    counts = [bins.count(b) for b in range(1, table.num_bins + 1)]
    if not sum(counts):
        return Chooser(table, rates, (table.best_within(EVERYWHERE, mean_flops),) * (table.num_bins + 1), facts)
    allocation = table.spread(mean_flops, counts)
    rungs = [ladder[i] for ladder, i in zip(table.ladders[1:], allocation.choice_P, strict=True)]
    unknown = table.best_within(EVERYWHERE, max(mean_flops, table.ladders[EVERYWHERE][0].flops))
    return Chooser(table, rates, (unknown, *rungs), facts, allocation)


def arm_flops(table: StrategyTable, arm: str, samples: float) -> float:
    """What `samples` of an arm cost a question on average, linear between the budgets that were measured and beyond.

    Raises DataError where the table does not hold the arm at two budgets.
    """
    rungs = sorted((rung.budget, rung.flops) for rung in table.ladders[EVERYWHERE] if rung.arm == arm)
    if len(rungs) < 2:
        way_out = f"add to table.budgets, and {arm} to table.strategies" if not rungs else "add to table.budgets"
        raise DataError(f"the StrategyTable has {arm} at {len(rungs)} budgets, two are needed: {way_out}")
    budgets, flops = (np.array(column) for column in zip(*rungs, strict=True))
    at = int(np.clip(np.searchsorted(budgets, samples), 1, len(budgets) - 1))
    slope = (flops[at] - flops[at - 1]) / (budgets[at] - budgets[at - 1])
    return float(flops[at] + slope * (samples - budgets[at]))
