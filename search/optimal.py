"""The compute-optimal choice: fit it per bin of difficulty, and measure it honestly (Snell et al. 2024, section 3.2).

Choosing among a hundred noisy cells rewards luck, so a cell's mean in a bin is shrunken towards what its arm does
elsewhere, and what a choice is worth is measured on the other half of the bin's problems: two folds in every bin,
repeated over many splits, each with its own fit. A price of compute turns "at most N" into a curve: in each bin the
cell with the largest value - price x FLOPs.

Resampled problems are weights, so that copies of one problem never lie on both sides of a split.

Axis legend: _P problems, _C cells, _B bins (index 0 = the easiest, bin 1), _L points of a curve (prices or budgets).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from search import stats
from search.cells import Grid
from search.errors import DataError
from search.randomness import key64
from search.stats import Floats
from search.table import Objective, Rung, StrategyTable, pick

Ints = NDArray[np.intp]
MIN_PROBLEMS = 20  # of a fit; with fewer, a table would be luck
NUM_SPLITS = 10


@dataclass(frozen=True, slots=True, eq=False)
class Fit:
    """Every cell in every bin, float64 [B, C]: shrunken value, what it is without shrinking, the standard error of the
    value beside the bin's other cells, and FLOPs. `weights_B`: problems in the bin."""

    values_B_C: Floats
    means_B_C: Floats
    ses_B_C: Floats
    flops_B_C: Floats
    weights_B: Floats


@dataclass(frozen=True, slots=True, eq=False)
class Curve:
    """Points of accuracy and mean FLOPs a problem, cheapest first."""

    accuracy_L: Floats
    flops_L: Floats

    def flops_at(self, accuracy: float) -> float:
        """The least FLOPs for an accuracy, linear between neighbours, which a mixture of the two really reaches; inf
        where the curve ends below it."""
        reached, flops = self._rising()
        if accuracy > reached[-1]:  # by the last bits of another sum is not above
            return float(flops[-1]) if math.isclose(accuracy, reached[-1], rel_tol=1e-9) else math.inf
        return float(np.interp(accuracy, reached, flops))

    def accuracy_at(self, flops: float) -> float:
        """What that many FLOPs a problem reach; nan below the first point."""
        reached, paid = self._rising()
        return float(np.interp(flops, paid, reached, left=math.nan))

    def _rising(self) -> tuple[Floats, Floats]:
        """Accuracy and FLOPs of the points that no cheaper one is as accurate as."""
        order = np.lexsort((-self.accuracy_L, self.flops_L))
        accuracy, flops = self.accuracy_L[order], self.flops_L[order]
        better = np.append(True, accuracy[1:] > np.maximum.accumulate(accuracy)[:-1])
        return accuracy[better], flops[better]


class Cells:
    """The arrays of a grid, made ready for fits on any weights of its problems."""

    def __init__(self, grid: Grid, objective: Objective = "answer", *, actual: bool = False):
        self.grid = grid
        self.values_C_P = grid.values(objective)
        self.flops_C_P = grid.flops(actual=actual)
        self.budgets_C = np.array([cell.budget for cell in grid.cells])
        rest_C_P = self.values_C_P - self.values_C_P.mean(axis=0)  # cells are compared on the same problems
        self._stacked = np.concatenate([self.values_C_P, self.flops_C_P, rest_C_P, rest_C_P**2])

    @property
    def num_problems(self) -> int:
        return self.values_C_P.shape[1]

    def fits(self, member_F_B_P: Floats) -> list[Fit]:
        """A fit for each fold, on the problems' weights in each bin; shape [F, B, P]."""
        folds, bins, _ = member_F_B_P.shape
        flat = member_F_B_P.reshape(folds * bins, -1)
        sums = (self._stacked @ flat.T).T.reshape(folds, bins, 4, -1)
        most = float(self.values_C_P.max())
        return [_fit(sums[f], member_F_B_P[f].sum(axis=1), most) for f in range(folds)]


def _fit(sums_B_4_C: Floats, weights_B: Floats, most: float) -> Fit:
    """From weighted sums of value, FLOPs, paired rest and its square; no value is above `most`."""
    num = np.maximum(weights_B, 1e-9)[:, None]
    means_B_C, flops_B_C, rest_B_C = (sums_B_4_C[:, i] / num for i in range(3))
    variance_B_C = np.maximum(sums_B_4_C[:, 3] / num - rest_B_C**2, 0.0)
    share_B = weights_B / weights_B.sum()
    square_B_C = variance_B_C / np.maximum(num - 1, 1.0)
    overall_C = share_B @ means_B_C
    level_B = means_B_C.mean(axis=1, keepdims=True)
    prior_B_C = level_B + (overall_C - overall_C.mean())
    own_B_C = means_B_C - prior_B_C
    spread_B = np.maximum((own_B_C**2 - square_B_C).mean(axis=1, keepdims=True), 0.0)  # of true deviations
    keep_B_C = np.divide(spread_B, spread_B + square_B_C, out=np.ones_like(own_B_C), where=spread_B + square_B_C > 0)
    keep_B_C[weights_B < 2] = 0.0  # one problem does not tell how much problems differ
    empty_B = (weights_B <= 0)[:, None]
    values_B_C = np.clip(np.where(empty_B, overall_C, prior_B_C + keep_B_C * own_B_C), 0.0, most)
    flops_B_C = np.where(empty_B, share_B @ flops_B_C, flops_B_C)
    prior_square_C = share_B**2 @ square_B_C  # what a cell is worth elsewhere is not known for certain either
    ses_B_C = np.sqrt(keep_B_C * square_B_C + (1 - keep_B_C) ** 2 * prior_square_C)
    return Fit(values_B_C, means_B_C, ses_B_C, flops_B_C, weights_B)


# ---------------------------------------------------------------- choices

Choice = Callable[[Fit], Ints]  # -> the index of the cell for each point of a curve and bin, [L, B]


def by_price(prices_L: Sequence[float] | Floats) -> Choice:
    """In each bin the cell with the largest value - price x FLOPs."""
    prices = np.asarray(prices_L, dtype=np.float64)[:, None, None]
    return lambda fit: (fit.values_B_C - prices * fit.flops_B_C).argmax(axis=2)


def by_budget(budgets_C: Floats, budgets_L: Sequence[float]) -> Choice:
    """In each bin what `StrategyTable.choose` takes for a budget of samples. Every budget buys some cell."""

    def choose(fit: Fit) -> Ints:
        chosen = np.empty((len(budgets_L), len(fit.weights_B)), dtype=np.intp)
        for point, budget in enumerate(budgets_L):
            affordable = np.flatnonzero(budgets_C <= budget)
            for b in range(len(fit.weights_B)):
                columns = (fit.values_B_C[b], fit.means_B_C[b], fit.ses_B_C[b], fit.flops_B_C[b])
                rungs = [Rung("", 0.0, *(float(column[c]) for column in columns)) for c in affordable]
                chosen[point, b] = affordable[pick(rungs)]
        return chosen

    return choose


def prices_of(cells: Cells, num: int = 60) -> Floats:
    """Prices from "only the cheapest" to "whatever is best", on a logarithmic scale; the last is 0."""
    means, flops = cells.values_C_P.mean(axis=1), cells.flops_C_P.mean(axis=1)
    unit = max(float(means.max() - means.min()), 1e-3) / max(float(flops.max()), 1.0)
    steepest = 1.0 / max(float(flops.min()), 1.0)
    return np.append(np.geomspace(steepest, unit / 100, num - 1), 0.0)


# ---------------------------------------------------------------- honest measures


def assess(
    cells: Cells,
    bins_P: Ints,
    choice: Choice,
    *,
    weights_P: Floats | None = None,
    splits: int = NUM_SPLITS,
    seed: object = 0,
    extra_flops_P: Floats | float = 0.0,
) -> Curve:
    """What the choice is worth: fitted on one half of every bin, measured on the other, over `splits` splits.

    `bins_P` from 1 on; `extra_flops_P`: what finding the bin costs. `weights_P`: how often each problem counts.
    """
    weights = np.ones(cells.num_problems) if weights_P is None else weights_P
    accuracy, flops = 0.0, 0.0
    for split in range(splits):
        fits = cells.fits(_halves(bins_P, weights, key64("optimal", "split", seed, split)))
        for fitted, held in ((0, 1), (1, 0)):
            chosen_L_B = choice(fits[fitted])
            share_B = fits[held].weights_B / weights.sum() / splits
            each_B = np.arange(len(share_B))
            accuracy = accuracy + fits[held].means_B_C[each_B, chosen_L_B] @ share_B
            flops = flops + fits[held].flops_B_C[each_B, chosen_L_B] @ share_B
    extra = float(np.broadcast_to(extra_flops_P, weights.shape) @ weights / weights.sum())
    return Curve(np.asarray(accuracy), np.asarray(flops) + extra)


def outcomes(
    cells: Cells, bins_P: Ints, choice: Choice, *, splits: int = NUM_SPLITS, seed: object = 0
) -> tuple[Floats, Floats]:
    """By problem what the choice comes to when it is fitted on the other half: values and FLOPs, both [L, P]."""
    weights = np.ones(cells.num_problems)
    values, flops = 0.0, 0.0
    for split in range(splits):
        member = _halves(bins_P, weights, key64("optimal", "split", seed, split))
        fits = cells.fits(member)
        other_P = member[0].sum(axis=0) > 0  # those of the first half are judged by the second, and vice versa
        chosen = [choice(fit)[:, bins_P - 1] for fit in fits]
        chosen_L_P = np.where(other_P, chosen[1], chosen[0])
        columns = np.arange(cells.num_problems)
        values = values + cells.values_C_P[chosen_L_P, columns] / splits
        flops = flops + cells.flops_C_P[chosen_L_P, columns] / splits
    return np.asarray(values), np.asarray(flops)


def at_mean(values_L_P: Floats, flops_L_P: Floats, flops: float) -> Floats | None:
    """By problem, the value of the mixture of two neighbouring points that costs `flops` on average, [P]; what the
    dearest point gives where that costs less, None where even the cheapest costs more."""
    means_L = flops_L_P.mean(axis=1)
    order = np.argsort(means_L, kind="stable")
    after = int(np.searchsorted(means_L[order], flops, side="right"))
    if after == 0:
        return None
    if after == len(order):
        return values_L_P[order[-1]]
    low, high = order[after - 1], order[after]
    part = (flops - means_L[low]) / (means_L[high] - means_L[low])
    return (1 - part) * values_L_P[low] + part * values_L_P[high]


def arm_curve(cells: Cells, arm: str, *, weights_P: Floats | None = None) -> Curve:
    """A fixed strategy at all its budgets. Raises DataError where it was not measured."""
    rows = [i for i, cell in enumerate(cells.grid.cells) if cell.arm == arm]
    if not rows:
        raise DataError(f"the arm {arm} was not measured")
    weights = np.ones(cells.num_problems) if weights_P is None else weights_P
    accuracy = cells.values_C_P[rows] @ weights / weights.sum()
    flops = cells.flops_C_P[rows] @ weights / weights.sum()
    order = np.argsort(flops, kind="stable")
    return Curve(accuracy[order], flops[order])


def _halves(bins_P: Ints, weights_P: Floats, key: int) -> Floats:
    """Weights of each problem in two halves of every bin, [2, B, P]."""
    order = np.random.Generator(np.random.Philox(key)).permutation(len(bins_P))
    ranked = np.lexsort((order, bins_P))  # by bin, at random inside
    half_P = np.empty(len(bins_P), dtype=np.intp)
    half_P[ranked[weights_P[ranked] > 0]] = np.arange(int((weights_P > 0).sum())) % 2
    half_P[weights_P <= 0] = 0
    num_bins = int(bins_P.max())
    member = np.zeros((2, num_bins, len(bins_P)))
    member[half_P, bins_P - 1, np.arange(len(bins_P))] = weights_P
    return member


# ---------------------------------------------------------------- bins


def quantile_bins(rates_P: Floats, num: int = 5, weights_P: Floats | None = None) -> Ints:
    """Quantile bins of these problems themselves, 1 = easiest (section 3.2)."""
    counted = rates_P if weights_P is None else np.repeat(rates_P, weights_P.astype(np.intp))
    return stats.assign_bins(rates_P, stats.quantile_edges(counted, num))


def random_bins(num_problems: int, num: int = 5, *, seed: object = 0) -> Ints:
    """The control: bins of equal size that say nothing."""
    rng = np.random.Generator(np.random.Philox(key64("optimal", "random bins", seed)))
    return rng.permutation(num_problems) % num + 1


# ---------------------------------------------------------------- the table


def fit_table(
    grid: Grid,
    rates_P: Sequence[float],
    *,
    objective: Objective = "answer",
    bins: int = 5,
    edges: Sequence[float] | None = None,
    made_of: Mapping[str, Any] | None = None,
) -> StrategyTable:
    """Fit on problems whose predicted pass rates are given; quantile edges of these, unless `edges` are.

    Raises DataError for too few problems, for rates of another number, and for ones that are not finite.
    """
    rates = np.asarray(rates_P, dtype=np.float64)
    if len(rates) != len(grid.keys):
        raise DataError(f"{len(rates)} rates for {len(grid.keys)} problems: give one for each")
    if not np.isfinite(rates).all():
        raise DataError(f"{int((~np.isfinite(rates)).sum())} of {len(rates)} predicted rates are not finite")
    if len(rates) < MIN_PROBLEMS:
        raise DataError(f"{len(rates)} problems are too few to fit a table on: give at least {MIN_PROBLEMS}")
    cells = Cells(grid, objective)
    cuts = tuple(edges) if edges is not None else stats.quantile_edges(rates, bins)
    bins_P, num = stats.assign_bins(rates, cuts), len(cuts) + 1
    member = np.array([np.ones(len(rates)), *((bins_P == b + 1).astype(float) for b in range(num))])
    (whole,) = cells.fits(member[None, :1])
    (fit,) = cells.fits(member[None, 1:])
    ladders = [_ladder(grid, whole, 0), *(_ladder(grid, fit, b) for b in range(num))]
    return StrategyTable(
        objective=objective,
        edges=cuts,
        counts=tuple(int(row.sum()) for row in member),
        ladders=tuple(ladders),
        made_of={"problems": len(rates), "cells": len(grid.cells), **(made_of or {})},
    )


def _ladder(grid: Grid, fit: Fit, b: int) -> tuple[Rung, ...]:
    """The cells of a bin, cheapest first."""
    rungs = [
        Rung(
            cell.arm,
            cell.budget,
            *(round(float(a[b, c]), 6) for a in (fit.values_B_C, fit.means_B_C, fit.ses_B_C)),
            flops=float(fit.flops_B_C[b, c]),
        )
        for c, cell in enumerate(grid.cells)
    ]
    return tuple(sorted(rungs, key=lambda rung: rung.flops))


# ---------------------------------------------------------------- budget at equal accuracy


@dataclass(frozen=True, slots=True)
class Against:
    """One baseline at one budget: its accuracy, and how many times the choice's FLOPs it spends there."""

    baseline: str
    accuracy: float
    value: float
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class Ratio:
    """How many times a choice's FLOPs the baseline spends for the same accuracy; 90 % interval over problems.

    0 where the choice never reaches the accuracy.
    """

    budget: float
    baseline: str  # the arm with the best accuracy at this budget
    accuracy: float
    value: float
    low: float
    high: float
    draws: int
    cheapest: float = math.nan  # the same against the baseline that reaches this accuracy with the fewest FLOPs
    cheapest_low: float = math.nan
    cheapest_baseline: str = ""
    against: tuple[Against, ...] = ()  # every baseline at this budget
    sampled_D: tuple[float, ...] = ()  # the value in each resample, to compare choices in pairs

    def to_json(self) -> dict[str, Any]:
        row = {name: getattr(self, name) for name in self.__slots__ if name not in ("against", "sampled_D")}
        return row | {"against": [asdict(one) for one in self.against]}


Binning = Callable[[Floats | None], Ints]  # weights -> bins: quantiles are cut anew in each resample


def equal_accuracy(
    cells: Cells,
    baselines: Sequence[str],
    arms: Sequence[str] | None,
    binning: Binning,
    budgets: Sequence[float],
    *,
    extra_flops: float = 0.0,
    draws: int = 300,
    splits: int = 4,
    confidence: float = 0.9,
    seed: object = 0,
) -> list[Ratio]:
    """Ratios against the strongest baseline at each budget. Every resample of the problems redoes it all: bins, splits,
    shrinking, choice, and which baseline is the strongest. `arms`: what may be chosen; None: everything. A resample has
    fewer distinct problems to choose by, so intervals err to the low side.

    Raises DataError where a baseline was not measured at a budget.
    """
    chosen = cells if arms is None else Cells(cells.grid.only(arms))
    prices = by_price(prices_of(chosen))
    at_N = [_baselines_at(cells, baselines, budget) for budget in budgets]

    def measured(weights: Floats | None, seed: object) -> list[_Measured]:
        bins_P = binning(weights)
        curve = assess(
            chosen, bins_P, prices, weights_P=weights, splits=splits, seed=seed, extra_flops_P=extra_flops
        )  # fmt: skip
        curves = {arm: arm_curve(cells, arm, weights_P=weights) for arm in baselines}
        return [_measure(cells, found, curve, curves, weights) for found in at_N]

    whole = measured(None, seed)
    rng = np.random.Generator(np.random.Philox(key64("optimal", "bootstrap", seed)))
    again: list[list[_Measured]] = []
    for draw in range(draws):
        weights = np.bincount(rng.integers(0, cells.num_problems, cells.num_problems), minlength=cells.num_problems)
        again.append(measured(weights.astype(np.float64), f"{seed}/{draw}"))
    tail = (1 - confidence) / 2
    return [_ratio(budget, whole[i], [one[i] for one in again], (tail, 1 - tail)) for i, budget in enumerate(budgets)]


@dataclass(frozen=True, slots=True)
class _Measured:
    """At one budget on one set of weights. Every baseline's accuracy and ratio, and the two that matter."""

    each: Mapping[str, tuple[float, float]]
    strongest: str
    cheapest: float
    cheapest_baseline: str

    @property
    def accuracy(self) -> float:
        return self.each[self.strongest][0]

    @property
    def value(self) -> float:
        return self.each[self.strongest][1]


def _baselines_at(cells: Cells, baselines: Sequence[str], budget: float) -> list[int]:
    found = [i for i, c in enumerate(cells.grid.cells) if c.arm in baselines and c.budget == budget]
    if not found:
        raise DataError(f"no baseline was measured at a budget of {budget:g}")
    return found


def _measure(
    cells: Cells, found: Sequence[int], curve: Curve, curves: Mapping[str, Curve], weights: Floats | None
) -> _Measured:
    w = np.ones(cells.num_problems) if weights is None else weights
    points = [
        (float(cells.values_C_P[i] @ w / w.sum()), -float(cells.flops_C_P[i] @ w / w.sum()), cells.grid.cells[i].arm)
        for i in found
    ]
    accuracy, _, strongest = max(points)
    dear, other = min((c.flops_at(accuracy), name) for name, c in curves.items())
    each = {arm: (reached, -cost / curve.flops_at(reached)) for reached, cost, arm in points}
    return _Measured(each, strongest, dear / curve.flops_at(accuracy), other)


def _ratio(budget: float, whole: _Measured, again: Sequence[_Measured], tails: tuple[float, float]) -> Ratio:
    def interval(values: Sequence[float]) -> tuple[float, float]:
        low, high = np.quantile(values, tails) if len(values) else (math.nan, math.nan)
        return float(low), float(high)

    against = [
        Against(arm, reached, value, *interval([one.each[arm][1] for one in again]))
        for arm, (reached, value) in whole.each.items()
    ]
    values = [one.value for one in again]
    low, high = interval(values)
    least, _ = interval([one.cheapest for one in again])
    return Ratio(
        budget,
        whole.strongest,
        whole.accuracy,
        whole.value,
        low,
        high,
        len(again),
        whole.cheapest,
        least,
        whole.cheapest_baseline,
        tuple(against),
        tuple(values),
    )
