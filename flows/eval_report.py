"""`ratchet eval --report`: the compute-optimal choice measured on what the evaluation searched, as a page, pictures and
data. `search.assessment` has the figures, `flows.optimal_report` the looks; here they get their inputs.

Difficulty is known in three ways, each from something that does not touch the samples that are measured: oracle (pass
rates of further samples), verifier (mean scores of the same further samples, no gold answers), and question (the
predictor of the bundle, before anything is sampled).
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from search import stats
from search.assessment import BEST_OF_N, Difficulty, assessment
from search.belief import beta_prior, fit_strength
from search.cells import Grid, outcome_cell
from search.early_stopping import (
    AdaptiveMajority,
    AdaptiveWeighted,
    EarlyBestOfN,
    EarlyStopping,
    EarlyWeighted,
    OptScale,
    many_stopped_cells,
)
from search.evaluate import Pool
from search.exchanged import exchanged
from search.optimal import MIN_PROBLEMS
from search.sequential import mean_cost, simulate_sequential
from search.table import StrategyTable
from search.types import SearchResult

UNSCORED_RULES = (EarlyStopping(), AdaptiveMajority())
SCORED_RULES = (EarlyBestOfN(0.5), EarlyBestOfN(0.9), EarlyWeighted(), AdaptiveWeighted(), OptScale())
SEQUENTIAL_PRICES = (0.3, 0.1, 0.05, 0.02, 0.01, 0.005)  # chance of a right answer that one more sample must add
RATIOS_AT = (4, 8, 16, 32, 64)  # budgets at which equal accuracy is asked for, where a baseline has them


def write(
    out: Path,
    found: Mapping[str, Any],
    grid: Grid,
    pools: Sequence[Pool],
    others: Sequence[Pool],
    rates: Mapping[str, float],
    flops: float,
    table: StrategyTable | None,
    *,
    bins: int,
    scored: bool,
    seed: object,
    larger: Sequence[SearchResult] | None = None,
    made_of: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """The report in `out`; what `ratchet eval` adds to its document, empty where there is too little to choose from.

    `pools`: the samples that are measured; `others`: disjoint ones of the same problems. `rates`, `flops`: predicted
    from the question, and what that costs. `larger`: the greedy answers of a larger model, for the exchange.
    `made_of`: fingerprints of policy and verifier.
    """
    from flows import optimal_report

    if len(grid.keys) < MIN_PROBLEMS or len(grid.cells) < 2 or not pools:
        print(
            f"no compute-optimal report: it needs {MIN_PROBLEMS} problems, two strategies and independent samples; "
            "leave --strategies out to compare all",
            file=sys.stderr,
        )
        return {}
    grid, early = _with_early(grid, pools, scored=scored)
    known = difficulties(grid, others, rates, flops, scored=scored)
    arms = dict.fromkeys(cell.arm for cell in grid.cells)
    baselines = [arm for arm in arms if arm.partition("(")[0] in BEST_OF_N or arm in early]
    there = {cell.budget for cell in grid.cells if cell.arm in baselines}
    choosable = [arm for arm in arms if arm not in early and arm != "pass"]
    document = assessment(
        grid, known, baselines, choosable, budgets=[n for n in RATIOS_AT if n in there], bins=bins, seed=seed
    ) | {name: found[name] for name in ("task", "model", "split")}
    oracle = known["oracle"].rates_P
    document |= {
        "problems": len(grid.keys),
        "known": {name: {"spearman": stats.spearman(d.rates_P, oracle), "flops": d.flops} for name, d in known.items()},
        "table": table.to_json() if table else None,
        **(made_of or {}),
    }
    if rates:
        document["sequential"] = _sequential(pools, others, rates, grid, scored=scored)
    if larger is not None:
        document["exchange"] = _exchange(grid.only(choosable), larger, pools, oracle, bins, seed)
    page = optimal_report.write(document, out)
    print(f"report: {page}", file=sys.stderr)
    return {"optimal": document}


def _exchange(
    grid: Grid, larger: Sequence[SearchResult], pools: Sequence[Pool], oracle_P: np.ndarray, bins: int, seed: object
) -> dict[str, Any]:
    """M is told by what a token costs either model."""
    by_key = {result.problem.key: result for result in larger}
    cell = outcome_cell([by_key[key] for key in grid.keys], "greedy", 1)
    each = next(r.spend.flops_ideal / (len(r.prompt_ids) + r.spend.generated_tokens) for r in larger)
    pool = next(p for p in pools if p.spend.generated_tokens)
    policy = pool.spend.flops_ideal - pool.spend.verifier_flops_ideal
    own = policy / (pool.num_prompt_tokens + pool.spend.generated_tokens)
    return exchanged(grid, cell, each / own, oracle_P, bins=bins, seed=seed)


def _sequential(
    pools: Sequence[Pool], others: Sequence[Pool], rates: Mapping[str, float], grid: Grid, *, scored: bool
) -> dict[str, Any]:
    """Assess and solve at once, from the predicted rates: accuracy against FLOPs over prices, at the largest budget.

    How much the predictor knows (its strength) is one number, fitted on the disjoint samples.
    """
    keys = list(grid.keys)
    rates_P = np.clip([rates[key] for key in keys], 1e-3, 1 - 1e-3)
    by_key = {pool.key: pool for pool in others}
    right = [sum(by_key[key].correct_N) for key in keys]
    strength = fit_strength(rates_P, right, [len(by_key[key].correct_N) for key in keys])
    priors = dict(zip(keys, zip(*beta_prior(rates_P, strength), strict=True), strict=True))
    each = float(np.mean([mean_cost(pool, scored=scored) for pool in pools])) or 1.0
    most = max(int(cell.budget) for cell in grid.cells if cell.arm == "majority")
    points: list[dict[str, float]] = []
    for price in SEQUENTIAL_PRICES:
        (stop,) = simulate_sequential(
            pools, priors, price / each, [most], answer="highest" if scored else "majority"
        )  # fmt: skip
        accuracy, flops = float(stop.cell.solved_P.mean()), float(stop.cell.flops_P.mean())
        samples = float(stop.samples_P.mean())
        points.append({"price": price, "accuracy": accuracy, "flops": flops, "samples": samples})
    return {"strength": strength, "most": most, "points": points}


def _with_early(grid: Grid, pools: Sequence[Pool], *, scored: bool) -> tuple[Grid, tuple[str, ...]]:
    """With the baselines that stop early, replayed on the same samples."""
    budgets = sorted({int(c.budget) for c in grid.cells if c.arm == "majority" and c.budget > 1})
    rules = (*UNSCORED_RULES, *(SCORED_RULES if scored else ()))
    if not budgets:
        return grid, ()
    own = {cell.arm for cell in grid.cells}
    cells = [c for c in many_stopped_cells(pools, rules, budgets) if c.arm not in own]
    return Grid(grid.keys, (*grid.cells, *cells)), tuple(rule.name for rule in rules)


def difficulties(
    grid: Grid, others: Sequence[Pool], rates: Mapping[str, float], flops: float, *, scored: bool
) -> dict[str, Difficulty]:
    """By name; a way that is not open here is left out. As in the paper the samples behind the first two are free."""
    by_key = {pool.key: pool for pool in others}
    ordered = [by_key[key] for key in grid.keys]
    solved_P = np.array([np.mean(pool.correct_N or (False,)) for pool in ordered], dtype=np.float64)
    found = {"oracle": Difficulty(solved_P)}
    if scored:
        means = [np.mean([s for s in pool.scores_N if s is not None] or [0.0]) for pool in ordered]
        found["verifier"] = Difficulty(np.array(means, dtype=np.float64))
    if rates:
        found["question"] = Difficulty(np.array([rates[key] for key in grid.keys]), flops)
    return found
