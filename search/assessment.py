"""The compute-optimal report as data: every curve, ratio and choice that `ratchet eval --report` shows.

From one grid of cells (`search.cells`) and the predicted pass rates of its problems. Fixed strategies stand beside the
choice per bin of oracle, verifier-predicted and question-predicted difficulty, and of bins that say nothing; all of
them with the arms of the paper alone, and with all arms. Every choice is measured on problems it was not fitted on.

Axis legend: _P problems, _L points of a curve.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from search import stats
from search.cells import Grid
from search.optimal import (
    Cells,
    Curve,
    Ratio,
    arm_curve,
    assess,
    at_mean,
    by_budget,
    by_price,
    equal_accuracy,
    fit_table,
    outcomes,
    prices_of,
    quantile_bins,
    random_bins,
)
from search.stats import Floats

BEST_OF_N = ("majority", "best_of_n", "best_of_n_weighted")  # whatever their vote: the baselines
PAPER = ("greedy", *BEST_OF_N, "beam", "lookahead")
KINDS = ("oracle", "verifier", "question", "random", "none")  # how difficulty is known; none: one bin for all
SETS = ("all", "paper")


@dataclass(frozen=True, slots=True)
class Difficulty:
    """Pass rates of the grid's problems as someone knows them, and what knowing them costs.

    `flops`: of a problem, charged to every choice that uses the rates. Example: Difficulty(rates_P, 40.0)
    """

    rates_P: Floats
    flops: float = 0.0


def assessment(
    grid: Grid,
    known: Mapping[str, Difficulty],
    baselines: Sequence[str],
    choosable: Sequence[str] | None = None,
    *,
    budgets: Sequence[float] = (4, 8, 16),
    bins: int = 5,
    draws: int = 300,
    actual: bool = False,
    seed: object = 0,
) -> dict[str, Any]:
    """The document; see `SCHEMA` in the tests for its fields. `known`: "oracle", "verifier", "question" -> Difficulty.

    `baselines`: the arms that spend a budget on independent samples, early-stopped ones included; a ratio needs at
    least one at each of `budgets`. `choosable`: the arms that can be run for real; default: all. `actual`: FLOPs as
    computed instead of ideal. Raises DataError.
    """
    cells = Cells(grid, actual=actual)
    num = len(grid.keys)
    ranks_P = random_bins(num, num, seed=seed).astype(np.float64)  # no ties: bins of equal size in every resample
    free = {"random": Difficulty(ranks_P), "none": Difficulty(np.zeros(num))}
    everyone = {name: d for name, d in {**known, **free}.items() if name in KINDS}
    arms = _arm_sets(grid.only(choosable) if choosable is not None else grid)
    able = grid.only(arms["all"])
    curves: dict[str, dict[str, dict[str, list[float]]]] = {}
    ratios: list[dict[str, Any]] = []
    adds: list[dict[str, Any]] = []
    for arm_set, names in arms.items():
        chosen = Cells(grid.only(names), actual=actual)
        prices = prices_of(chosen)
        curves[arm_set] = {}
        by_kind: dict[str, list[Ratio]] = {}
        for kind, difficulty in everyone.items():
            bins_P = quantile_bins(difficulty.rates_P, bins)
            curve = assess(chosen, bins_P, by_price(prices), seed=seed, extra_flops_P=difficulty.flops)
            curves[arm_set][kind] = _points(curve)
            found = equal_accuracy(
                cells,
                baselines,
                names,
                lambda w, rates=difficulty.rates_P: quantile_bins(rates, bins, w),
                budgets,
                extra_flops=difficulty.flops,
                draws=draws,
                seed=seed,
            )
            ratios += [{"arms": arm_set, "bins": kind, **_finite(ratio.to_json())} for ratio in found]
            by_kind[kind] = found
        adds += [{"arms": arm_set, **row} for row in _added(by_kind)]
    question = known.get("question") or known.get("verifier") or known["oracle"]
    asked_P = quantile_bins(question.rates_P, bins)
    levels = sorted({cell.budget for cell in able.cells})
    return {
        "n": num,
        "actual": actual,
        "arms": {name: list(names) for name, names in arms.items()},
        "baselines": list(baselines),
        "cells": [_cell_row(grid, i, actual) for i in range(len(grid.cells))],
        "fixed": {arm: _points(arm_curve(cells, arm)) for arm in dict.fromkeys([*arms["all"], *baselines])},
        "optimal": curves,
        "ratios": ratios,
        "difficulty_adds": adds,
        "by_bin": _by_bin(grid, known, bins),
        "choices": _choices(able, question, bins, levels),
        "across": _across(Cells(able, actual=actual), asked_P, levels, seed),
        "across_samples": [
            row
            for arm in BEST_OF_N
            if arm in arms["all"]
            for row in _across_samples(Cells(able.only([arm]), actual=actual), asked_P, seed)
        ],
    }


def _added(by_kind: Mapping[str, Sequence[Ratio]]) -> list[dict[str, Any]]:
    """How many times more a choice saves by its bins than without any, paired over the same resamples (90 %)."""
    rows: list[dict[str, Any]] = []
    for kind, ratios in by_kind.items():
        for ratio, none in zip(ratios, by_kind["none"], strict=True):
            pairs = [(a, b) for a, b in zip(ratio.sampled_D, none.sampled_D, strict=True) if b > 0]
            if kind == "none" or not pairs or not none.value:
                continue
            low, high = np.quantile([a / b for a, b in pairs], (0.05, 0.95)).tolist()
            row = {"bins": kind, "budget": ratio.budget, "value": ratio.value / none.value, "low": low, "high": high}
            rows.append(_finite(row))
    return rows


def _arm_sets(grid: Grid) -> dict[str, list[str]]:
    """ "paper": what Snell et al. choose between; "all": everything that was measured. "pass" cannot answer."""
    everything = list(dict.fromkeys(cell.arm for cell in grid.cells if cell.arm != "pass"))
    paper = [arm for arm in everything if arm.partition("(")[0] in PAPER]
    return {"all": everything} | ({"paper": paper} if paper and paper != everything else {})


def _points(curve: Curve) -> dict[str, list[float]]:
    return {"accuracy": [round(a, 6) for a in curve.accuracy_L.tolist()], "flops": curve.flops_L.tolist()}


def _cell_row(grid: Grid, index: int, actual: bool) -> dict[str, Any]:
    cell = grid.cells[index]
    accuracy = stats.mean_estimate(cell.solved_P)
    row = {"arm": cell.arm, "budget": cell.budget, "accuracy": accuracy.value, "se": accuracy.se}
    return row | {"flops": float(cell.flops_P.mean()), "flops_actual": float(cell.actual_P.mean())}


def _by_bin(grid: Grid, known: Mapping[str, Difficulty], bins: int) -> dict[str, list[dict[str, Any]]]:
    """For each way to know difficulty: the bins, and the accuracy of every cell in them (paper's figures 3 and 4)."""
    found: dict[str, list[dict[str, Any]]] = {}
    for kind, difficulty in known.items():
        bins_P = quantile_bins(difficulty.rates_P, bins)
        found[kind] = [
            {
                "bin": int(b),
                "n": int((bins_P == b).sum()),
                "rate": float(difficulty.rates_P[bins_P == b].mean()),
                "accuracy": {cell.name: float(cell.solved_P[bins_P == b].mean()) for cell in grid.cells},
            }
            for b in np.unique(bins_P)
        ]
    return found


def _choices(grid: Grid, difficulty: Difficulty, bins: int, levels: Sequence[float]) -> dict[str, Any]:
    """What the table chooses for each bin at each budget: the heat map."""
    table = fit_table(grid, difficulty.rates_P.tolist(), bins=bins)
    rungs = [[table.choose(b, level) for level in levels] for b in range(1, table.num_bins + 1)]
    return {
        "budgets": list(levels),
        "edges": list(table.edges),
        "counts": list(table.counts[1:]),
        "rungs": [
            [{"arm": r.arm, "budget": r.budget, "value": r.value, "se": r.se, "flops": r.flops} for r in row]
            for row in rungs
        ],
    }


def _across(cells: Cells, bins_P: np.ndarray, levels: Sequence[float], seed: object) -> list[dict[str, Any]]:
    """Budgets across questions against the same budget on each: the table's choices, at equal mean FLOPs."""
    prices = by_price(prices_of(cells, 200))
    uniform = by_budget(cells.budgets_C, levels)
    values_L_P, flops_L_P = outcomes(cells, bins_P, prices, seed=seed)
    same_L_P, spent_L_P = outcomes(cells, bins_P, uniform, seed=seed)
    rows = [
        {"budget": level} | _shared(values_L_P, flops_L_P, same_P, spent_P)
        for level, same_P, spent_P in zip(levels, same_L_P, spent_L_P, strict=True)
    ]
    return [row for row in rows if "gain" in row]


def _across_samples(cells: Cells, bins_P: np.ndarray, seed: object) -> list[dict[str, Any]]:
    """The same for one strategy alone, of which hard questions get more samples (Damani et al. 2024)."""
    values_L_P, flops_L_P = outcomes(cells, bins_P, by_price(prices_of(cells, 200)), seed=seed)
    rows = [
        {"arm": cell.arm, "budget": cell.budget} | _shared(values_L_P, flops_L_P, same_P, spent_P)
        for cell, same_P, spent_P in zip(cells.grid.cells, cells.values_C_P, cells.flops_C_P, strict=True)
    ]
    return [row for row in rows if "gain" in row]


def _shared(values_L_P: Floats, flops_L_P: Floats, same_P: Floats, spent_P: Floats) -> dict[str, Any]:
    """Paired by problem; no "gain" where even the cheapest way to share costs more."""
    mixed_P = at_mean(values_L_P, flops_L_P, float(spent_P.mean()))
    if mixed_P is None:
        return {}
    gain = stats.paired_difference(same_P, mixed_P)
    found = {"flops": float(spent_P.mean()), "uniform": float(same_P.mean()), "across": float(mixed_P.mean())}
    return found | {"gain": gain.mean, "low": gain.low, "high": gain.high}


def _finite(row: Mapping[str, Any]) -> dict[str, Any]:
    return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}
