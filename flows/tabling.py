"""The table stage: measure a small grid of strategies on validation problems, and fit the StrategyTables of the winner.

Independent samples come from the pools that the difficulty stage drew, scored by the winner's verifier; every other
strategy is searched for real. Two tables, one for answering and one for finding training data, and what they are worth
on problems they were not fitted on.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from configs.schema import Config
from difficulty import bins
from difficulty.regret import regret
from flows.chosen import load_chosen_verifier
from flows.eval_run import score
from flows.rating import Rates, predict_rates
from flows.stages import Context, Inputs, Job, run_jobs, write_json, write_metrics
from flows.tables import FILES, measurable
from search import optimal, stats
from search.cells import Cell, Grid, pool_cells, read_pools, searched_cell
from search.engines import load_engine, num_processes
from search.engines.reference import policy_path
from search.errors import DataError
from search.evaluate import reduce_pool
from search.optimal import Binning, Cells, Ratio
from search.parallel import Report, fork_map
from search.policy import Sampler
from search.results import read_results, write_results
from search.sets import read_problems
from search.strategies import Spec
from search.table import StrategyTable
from search.tasks import load_task
from search.types import Budget, Problem, Spend, VerifierFacts
from search.verifiers import describe

SHARD_PROBLEMS = 100
BASELINES = ("best_of_n", "best_of_n_weighted", "majority")
DRAWS = 100  # of the bootstrap
MIN_REGRET = 40  # problems, below which a regret says nothing


def table(context: Context, inputs: Inputs, out: Path) -> None:
    """table.json, rows.json; `usable` in report.json says whether the bundle takes them."""
    config = context.config
    problems = read_problems(inputs["problems"] / "validation.jsonl")[: config.table.problems]
    facts = describe(config, load_task(config), trained=inputs.get("verifier"))
    arms = measurable(config, facts)
    spend = run_jobs(context, inputs, out, _jobs(context, arms, problems))
    scored = any(_pooled(spec) and spec.needs for spec, _ in arms)
    spend += _score_pool(context, inputs, out, problems, scored=scored)
    report: dict[str, Any] = {}
    metrics: dict[str, float | tuple[float, float]] = {}
    try:
        grid = _grid(context, out, arms, problems)
        predicted = predict_rates(config, inputs, problems)
        known = [predicted.rates.get(key, 0.0) for key in grid.keys]  # without a predictor all alike: one bin
        made_of = _made_of(context, inputs, facts, grid)
        for objective, name in FILES.items():
            fitted = optimal.fit_table(
                _answering(grid) if objective == "answer" else grid,
                known,
                objective=objective,
                bins=config.difficulty.bins,
                edges=_edges(config, predicted.rates),
                made_of=made_of,
            )
            fitted.save(out / name)
            report[objective] = described(fitted, config.table.budgets)
        worth, metrics = _worth(_answering(grid), _binning(config, predicted.rates, known), predicted.flops)
        report |= {"usable": True, "difficulty": predicted.why, "cells": _rows(grid), "worth": worth}
        lost, regretted = _regret(config, out, arms, _answering(grid), predicted.rates)
        report["regret"], metrics = lost, metrics | regretted
        report["left_out"] = [name for name in _names(arms) if name not in {cell.name for cell in grid.cells}]
    except DataError as error:
        report |= {"usable": False, "reason": str(error)}
    write_json(out / "report.json", report)
    write_json(out / "spend.json", spend.to_json())
    write_metrics(out, metrics | {"table/usable": float(report["usable"])})


# ---------------------------------------------------------------- what is measured


def _pooled(spec: Spec) -> bool:
    return bool(spec.entry.pool) and not spec.options and not spec.vote


def _jobs(context: Context, arms: Sequence[tuple[Spec, Budget]], problems: Sequence[Problem]) -> list[Job]:
    facts = VerifierFacts("", 0)
    return [
        Job(
            folder=_folder(spec, budget),
            plan=spec.plan(budget, facts),
            problems=problems,
            stage=f"table/{context.round}",
            split="cells",
            shard_problems=SHARD_PROBLEMS,
            verified=bool(spec.needs),
            stepwise=spec.needs == "process",
        )
        for spec, budget in arms
        if not _pooled(spec)
    ]


def _folder(spec: Spec, budget: Budget) -> str:
    name = "".join(c if c.isalnum() else "-" for c in spec.text).strip("-")
    return f"cells/{name}-{budget.amount:g}"


def _names(arms: Sequence[tuple[Spec, Budget]]) -> list[str]:
    return [f"{spec.text} @ {budget.amount:g}" for spec, budget in arms]


def _score_pool(context: Context, inputs: Inputs, out: Path, problems: Sequence[Problem], *, scored: bool) -> Spend:
    """The stored samples of the problems, where an arm needs it with the verifier's scores, in out/pool; what the
    scores cost."""
    config, wanted, num = context.config, {p.key for p in problems}, num_processes(context.config)
    (out / "pool").mkdir(exist_ok=True)

    def work(index: int, tell: Report) -> dict[str, float]:
        pools = [r for r in read_results(inputs["pools"] / "pool-validation.jsonl") if r.problem.key in wanted]
        task = load_task(config)
        verifier = load_chosen_verifier(config, task, inputs) if scored else None
        drawn = pools[index::num]
        if verifier is not None:
            engine = load_engine(config, policy_path(inputs["policy"]), task, share=num, index=index)
            sampler = Sampler.of(config, engine, task, f"table/{context.round}", "pool")
            before, drawn = drawn, score(drawn, sampler, verifier)
            engine.close()
        else:
            before = drawn
        write_results(drawn, out / "pool" / f"shard-{index:05d}.jsonl")
        total = Spend()
        for old, new in zip(before, drawn, strict=True):
            more = new.spend.verifier_flops_ideal - old.spend.verifier_flops_ideal
            tokens = new.spend.verifier_tokens - old.spend.verifier_tokens
            actual = new.spend.verifier_flops_actual - old.spend.verifier_flops_actual
            total += Spend(
                verifier_tokens=tokens,
                flops_ideal=more,
                flops_actual=actual,
                verifier_flops_ideal=more,
                verifier_flops_actual=actual,
            )
        return total.to_json()

    return sum((Spend(**row) for row in fork_map(work, num, lambda index, row: None)), Spend())


def _grid(context: Context, out: Path, arms: Sequence[tuple[Spec, Budget]], problems: Sequence[Problem]) -> Grid:
    """Over the problems that were drawn and not lost, without the budgets that need more samples than were stored.
    Raises DataError where none is left."""
    pools = {pool.key: pool for pool in read_pools(out / "pool", load_task(context.config).step_delimiter)}
    keys = tuple(p.key for p in problems if p.key in pools)
    if not keys:
        raise DataError("no validation problem has stored samples: give difficulty.samples and difficulty.problems")
    ordered = [pools[key] for key in keys]
    most = min((len(pool.correct_N) for pool in ordered if not pool.failed), default=0)
    rules = {spec.text: spec.entry.pool for spec, _ in arms if _pooled(spec)}
    budgets = [b for b in context.config.table.budgets if b <= most]
    cells: list[Cell] = []
    if rules and budgets:
        cells += pool_cells(ordered, rules, budgets, seed=context.config.loop.seed)
    for spec, budget in arms:
        if not _pooled(spec):
            cells.append(searched_cell(out / _folder(spec, budget), spec.text, budget.amount, keys))
    return Grid(keys, tuple(cells))


def _answering(grid: Grid) -> Grid:
    """Without `pass`, which picks by the gold answer."""
    return grid.only([cell.arm for cell in grid.cells if cell.arm != "pass"])


def _edges(config: Config, rates: Rates) -> tuple[float, ...] | None:
    """Where the predicted rates are cut, whatever the problems; None: at their quantiles."""
    return config.difficulty.edges if config.difficulty.binning == "absolute" and rates else None


def _binning(config: Config, rates: Rates, known: Sequence[float]) -> Binning:
    """The bins of the problems whose rates are `known`, in a resample too."""
    rates_P, edges = np.array(known), _edges(config, rates)
    if edges is not None:
        return lambda weights: stats.assign_bins(rates_P, edges)
    return lambda weights: optimal.quantile_bins(rates_P, config.difficulty.bins, weights)


def _made_of(context: Context, inputs: Inputs, facts: VerifierFacts | None, grid: Grid) -> dict[str, Any]:
    policy = next(iter(read_results(inputs["pools"] / "pool-validation.jsonl"))).model
    return {
        "round": context.round,
        "seed": context.config.loop.seed,
        "policy": policy,
        "verifier": facts.fingerprint if facts else None,
        "arms": list(dict.fromkeys(cell.name for cell in grid.cells)),
    }


# ---------------------------------------------------------------- what it is worth


def _worth(grid: Grid, binning: Binning, each_flops: float) -> tuple[dict[str, Any], dict[str, Any]]:
    """On the halves that a choice was not fitted on: accuracy and FLOPs at every budget beside the best fixed strategy,
    and how many times its FLOPs the strongest best-of-N needs at equal accuracy. `each_flops`: what it costs to predict
    a question's difficulty, charged to the choice."""
    cells, bins_P = Cells(grid), binning(None)
    budgets = sorted({cell.budget for cell in grid.cells})
    values_L_P, flops_L_P = optimal.outcomes(cells, bins_P, optimal.by_budget(cells.budgets_C, budgets))
    rows: list[dict[str, Any]] = []
    metrics: dict[str, float | tuple[float, float]] = {"table/bins": float(len(np.unique(bins_P)))}
    for budget, values_P, flops_P in zip(budgets, values_L_P, flops_L_P, strict=True):
        fixed = max((c for c in grid.cells if c.budget <= budget), key=lambda c: float(c.solved_P.mean()))
        found, least = stats.mean_estimate(values_P), stats.mean_estimate(fixed.solved_P)
        flops = float(flops_P.mean()) + each_flops
        rows.append(
            {"budget": budget, "accuracy": found.value, "se": found.se, "flops": flops}
            | {"fixed": fixed.name, "fixed_accuracy": least.value, "fixed_flops": float(fixed.flops_P.mean())}
        )
        metrics |= {
            f"table/accuracy_at_{budget:g}": (found.value, found.se),
            f"table/fixed_at_{budget:g}": (least.value, least.se),
            f"table/flops_at_{budget:g}": flops,
        }
    ratios = _ratios(cells, binning, each_flops)
    metrics |= {f"table/saving_at_{r.budget:g}": (r.value, (r.high - r.low) / 3.29) for r in ratios}
    return {"budgets": rows, "ratios": [ratio.to_json() for ratio in ratios]}, metrics


def _ratios(cells: Cells, binning: Binning, each_flops: float) -> list[Ratio]:
    there = {cell.arm for cell in cells.grid.cells}
    baselines = [arm for arm in BASELINES if arm in there]
    budgets = sorted({c.budget for c in cells.grid.cells if c.arm in baselines and c.budget > 1})[-2:]
    if not baselines or not budgets:
        return []
    return optimal.equal_accuracy(cells, baselines, None, binning, budgets, extra_flops=each_flops, draws=DRAWS)


def _regret(
    config: Config, out: Path, arms: Sequence[tuple[Spec, Budget]], grid: Grid, rates: Rates
) -> tuple[dict[str, Any] | None, dict[str, tuple[float, float]]]:
    """What mis-binning costs: accuracy at one budget by a strategy per predicted bin, and by one per bin of the sampled
    pass rates. One half of a problem's samples makes its bin, the other measures the strategies that draw samples."""
    stored = {r.problem.key: r for r in read_results(out / "pool") if len(r.candidates) > 1 and not r.failed}
    keys = [key for key in grid.keys if key in stored and key in rates]
    most = min((len(stored[key].candidates) // 2 for key in keys), default=0)
    budget = max((b for b in config.table.budgets if b <= most), default=0)
    if not budget or len(keys) < MIN_REGRET:
        return None, {}
    split = [bins.halves(stored[key], seed=config.loop.seed) for key in keys]
    binned_P, drawn = ([reduce_pool(half[i]) for half in split] for i in (0, 1))
    rules = {spec.text: spec.entry.pool for spec, _ in arms if _pooled(spec) and spec.name != "pass"}
    cells = pool_cells(drawn, rules, [budget], seed=config.loop.seed) if rules else []
    rows = [grid.keys.index(key) for key in keys]
    values = [c.solved_P for c in cells] + [
        c.solved_P[rows] for c in grid.cells if c.budget == budget and c.arm not in rules
    ]
    oracle_P, predicted_P = ([bins.oracle_rate(pool) for pool in binned_P], [rates[key] for key in keys])
    cut = [bins.fixed_by(config.difficulty, values_P)(values_P) for values_P in (oracle_P, predicted_P)]
    found = regret(np.array(values), *cut, seed=config.loop.seed)
    metrics = {
        "table/regret": (found.loss.value, found.loss.se),
        "table/gain_by_bins": (found.gain.value, found.gain.se),
    }
    return {"budget": budget, "problems": len(keys)} | found.to_json(), metrics


def _rows(grid: Grid) -> list[dict[str, Any]]:
    return [
        {"arm": c.arm, "budget": c.budget, "accuracy": float(c.solved_P.mean()), "found": float(c.found_P.mean())}
        | {"rows": float(c.rows_P.mean()), "flops": float(c.flops_P.mean())}
        for c in grid.cells
    ]


def described(fitted: StrategyTable, budgets: Sequence[int]) -> dict[str, Any]:
    """What it chooses in each bin at each budget, in words."""
    choices: dict[str, list[str | None]] = {}
    rising = sorted({*budgets})
    for b in range(fitted.num_bins + 1):
        least = min(rung.budget for rung in fitted.ladders[b])
        choices[str(b) if b else "all"] = [fitted.choose(b, n).name if n >= least else None for n in rising]
    return {"budgets": rising, "edges": list(fitted.edges), "counts": list(fitted.counts), "choices": choices}
