"""`ratchet eval`: accuracy against budget of search strategies on one model, or of samples made elsewhere.

JSON: {"task", "n", "ungraded", "results": [{"strategy", "budget", "accuracy", "se", "spend", ...}]}; `search.standings`
says what else a row holds. Strategies that sample independently share one pool: every budget is computed from its
subsets, without bias; every other strategy is searched for each budget. Searches run as a round's do, in a stage of
their own (`sample`): in a child process, on all cores, holding the GPU's lock. What they find is kept and reused
(`flows.eval_store`).
"""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from configs.schema import Config
from flows import eval_report, eval_store
from flows.child import signals_end_children
from flows.chosen import Chosen, choose
from flows.driver import StageCall
from flows.eval_store import Cell, Store
from flows.locks import lock
from flows.stage import Stages
from flows.stages import Context, Inputs, write_json
from flows.state import Loop
from flows.tables import load_tables
from search.cells import Grid, halves, pool_cells, searched_cell
from search.choosing import plan_of
from search.engines import num_processes
from search.errors import BudgetError, ConfigError, DataError, StageFailed
from search.evaluate import SCORED_RULES, Pool, joined, reduce_pool
from search.results import read_results
from search.run import Progress
from search.sets import read_problems, write_problems
from search.standings import PLAIN, WEIGHTED, Row, pool_rows, to_json
from search.strategies import OPTIMAL, VOTES, Spec, parse, parse_list
from search.table import StrategyTable
from search.tasks import load_task
from search.thresholds import GRID, needs_fit, with_threshold
from search.types import Budget, Problem, SearchResult, Spend, Task, VerifierFacts
from search.verifiers import describe

NUM_FIT = 100  # problems on which a threshold is fitted
ALWAYS = ("greedy", "pass", "majority")
WITH_VERIFIER = ("best_of_n", "best_of_n_weighted")
WITH_STEP_SCORES = ("beam", "dvts", "rebase", "step_rejection")
REPORTED = ("greedy", "pass", "majority", "adaptive_majority")  # with --report, and more where steps are scored
SHARPENED = "best_of_n_weighted(vote=sharpened)"
REPORTED_STEPS = (
    "beam(width=2)",
    "beam(width=4)",
    "lookahead(width=2)",
    "dvts(width=2)",
    "rebase",
    "step_rejection(draws=4)",
    "step_rejection(draws=16, greedy=true)",
    "step_rejection(draws=16, greedy=true, trust=0.95, give_up=true)",
)
BIN_SAMPLES = 32  # with --report: more independent samples, which tell difficulty apart from what is measured
RULE_OF_VOTE = {
    "majority": "majority",
    "highest": "best_of_n",
    "weighted": "best_of_n_weighted",
    "sharpened": "sharpened",
    "hierarchical": "best_of_n_weighted",  # independent samples are one chain
}


@dataclass(frozen=True, slots=True)
class Request:
    """What to report: strategies (None: all that fit) at budgets per problem, in `unit` (samples, tokens, flops)."""

    budgets: tuple[float, ...] | None
    strategies: str | None = None
    unit: str = "samples"
    max_tokens: int | None = None  # hard cap on what is generated, all searches together, what is stored of them too
    fresh: bool = False  # do again what is stored


@dataclass(frozen=True, slots=True)
class Item:
    """One strategy at one budget. `rule`: how it is computed from the pool; None: it is searched for real."""

    spec: Spec
    budget: Budget
    rule: str | None

    @property
    def scored(self) -> bool:
        """Whether it may ask the verifier."""
        return bool(self.spec.needs) or self.spec.name == OPTIMAL


def evaluate_model(
    config: Config,
    runs_dir: Path,
    model: str,
    split: str,
    num_problems: int,
    request: Request,
    *,
    report: bool,
    larger: str | None = None,
) -> dict[str, Any]:
    """Search held-out problems with a model and report; on the test split a look is counted, whatever the model.

    Raises ConfigError, BudgetError, DataError, ModelError, and LockedError where a round writes the loop.
    """
    if split not in ("validation", "test"):
        raise ConfigError(f"--split {split}: expected validation or test")
    task = load_task(config)
    chosen = choose(config, runs_dir, model)
    config = chosen.config
    facts = describe(config, task, trained=chosen.verifier)
    table = load_tables(chosen.table)["answer"] if chosen.table else None
    items = plan(request, facts, table, report=report)
    problems = _problems(task, split, num_problems, runs_dir / config.loop.name)
    if not problems:
        raise DataError(f"--split {split}: the task has no problem in it; give more problems, or a larger share")
    if split == "test":
        _count_look(config, runs_dir)
    root = runs_dir / config.loop.name / "eval"
    root.mkdir(parents=True, exist_ok=True)
    with lock(root / ".lock", f"an evaluation of loop {config.loop.name}"):
        fit = _problems(task, "fit", NUM_FIT, runs_dir / config.loop.name)
        choosing = [folder for folder in (chosen.table, chosen.difficulty) if folder]
        store = Store(root, config, chosen.policy, split, problems, num_processes(config), fit, choosing)
        asked, binning = facts.fingerprint if facts else None, BIN_SAMPLES if report else 0
        searches = Searches(store, items, asked, task.step_delimiter, binning=binning)
        if request.fresh:
            store.forget(searches.cells)
        _search(chosen, split, problems, fit, searches.cells, request)
        order = {p.key: i for i, p in enumerate(problems)}
        rows, curves, num_ungraded = searches.rows(order)
        spent = searches.spent(request.max_tokens)
    _tell_unfinished(rows, len(problems), request.max_tokens, spent.get("generated_tokens"))
    found = to_json(task.name, len(problems), num_ungraded, rows, curves)
    found |= {"unit": request.unit, "model": model, "split": split, **spent}
    if report:
        folder = runs_dir / config.loop.name / _report_name(model, split, config, facts)
        folder.mkdir(parents=True, exist_ok=True)
        _draw(found, folder / "strategies.png")
        rates, flops = _rates(chosen, problems)
        grid, pools, others = searches.grid(order)
        greedy = None if larger is None else _larger(config, runs_dir, larger, split, problems, request)
        found |= eval_report.write(
            folder,
            found,
            grid,
            pools,
            others,
            rates,
            flops,
            table,
            bins=config.difficulty.bins,
            scored=searches.scored,
            seed=config.loop.seed,
            larger=greedy,
            made_of={"policy": store.model, "verifier": asked if searches.scored else None},
        )
    return found


def _count_look(config: Config, runs_dir: Path) -> None:
    """In the loop's state; where there is no loop yet, nobody has chosen anything by its test set."""
    if (runs_dir / config.loop.name / "loop.json").exists():
        with Loop.locked(runs_dir, config.loop.name, "an evaluation on the test set") as loop:
            loop.count_test_look()


def _report_name(model: str, split: str, config: Config, facts: VerifierFacts | None) -> str:
    """Another model, split or verifier has a report of its own."""
    name = f"eval-{model}-{split}"
    if facts is not None:
        kind, fingerprint = config.verifier.type, facts.fingerprint
        name += f"-{fingerprint}" if fingerprint.startswith(f"{kind}-") else f"-{kind}-{fingerprint}"
    return "".join(c if c.isalnum() or c in "-_." else "_" for c in name)


# ---------------------------------------------------------------- what is run


def plan(
    request: Request, facts: VerifierFacts | None, table: StrategyTable | None = None, *, report: bool = False
) -> list[Item]:
    """Every strategy at every budget that can buy it; what one cannot buy is left out with a line on stderr.

    `table` is what `optimal` chooses by; a `report` compares more strategies by default. Raises ConfigError, and
    BudgetError where nothing is left.
    """
    if request.unit not in ("samples", "tokens", "flops"):
        raise ConfigError(f"--unit {request.unit}: expected samples, tokens or flops")
    named = REPORTED if report else ALWAYS
    specs = parse_list(request.strategies) if request.strategies else [parse(n) for n in _default(facts, named)]
    budgets = request.budgets or ((1, 2, 4, 8, 16) if report else (1, 4, 16, 64))
    items: list[Item] = []
    refused: BudgetError | None = None
    for spec in dict.fromkeys(spec.text for spec in specs):
        chosen = parse(spec)
        for amount in (1.0,) if chosen.name == "greedy" else map(float, budgets):
            unit = "samples" if chosen.name == "greedy" else request.unit
            budget = Budget(unit, amount)  # pyright: ignore[reportArgumentType]
            try:
                if chosen.name == OPTIMAL and table is not None:
                    _check_optimal(table, budget, facts)
                else:
                    (with_threshold(chosen, 0.5) if needs_fit(chosen) else chosen).plan(budget, facts)
            except BudgetError as error:
                refused = error
                print(f"left out: {chosen.text} at {amount:g}: {error}", file=sys.stderr)
            else:
                items.append(Item(chosen, budget, _rule(chosen, budget)))
    if not items:
        raise refused or BudgetError("no budget given")
    return items


def _check_optimal(table: StrategyTable, budget: Budget, facts: VerifierFacts | None) -> None:
    """Raises BudgetError where the table knows nothing as cheap, ConfigError where it cannot be asked like this."""
    if budget.unit != "samples":
        raise ConfigError(f"--unit {budget.unit}: optimal chooses by samples; leave --unit out, or optimal")
    for b in range(table.num_bins + 1):
        plan_of(table.choose(b, budget.amount), facts)


def _default(facts: VerifierFacts | None, always: Sequence[str]) -> tuple[str, ...]:
    if facts is None:
        return tuple(always)
    if always is ALWAYS:
        return (*always, *WITH_VERIFIER, *(WITH_STEP_SCORES if facts.process else ()))
    return (*always, *WITH_VERIFIER, SHARPENED, *(REPORTED_STEPS if facts.process else ()))


def _rule(spec: Spec, budget: Budget) -> str | None:
    """How the strategy is computed from a pool of independent samples; None: it cannot be."""
    if not spec.entry.pool or spec.options or budget.unit != "samples" or budget.amount != int(budget.amount):
        return None
    return RULE_OF_VOTE[spec.vote] if spec.vote else spec.entry.pool


class Searches:
    """The searches behind the items, and what they found."""

    def __init__(self, store: Store, items: Sequence[Item], verifier: str | None, delimiter: str, *, binning: int = 0):
        """`delimiter` of the steps; `binning`: samples beside those of the largest budget, to tell difficulty."""
        self._items = items
        self._delimiter = delimiter
        self.binning = binning
        self._cells = {
            (item.spec.text, item.budget.amount): store.search(
                item.spec, item.budget, verifier if item.scored else None
            )
            for item in items
            if item.rule is None
        }
        sizes = [int(item.budget.amount) for item in items if item.rule]
        self._num = max(sizes, default=0)
        self._blocks = store.pool(self._num + binning)
        scored = verifier is not None and any(item.rule in SCORED_RULES for item in items)
        self._scores = [store.scores(block, verifier) for block in self._blocks] if scored and verifier else []

    def grid(self, order: Mapping[str, int]) -> tuple[Grid, list[Pool], list[Pool]]:
        """All that was measured at budgets of samples, problem by problem; the pools behind it; and the disjoint
        samples that tell difficulty. Raises DataError where a search is not complete."""
        keys = tuple(order)
        blocks = [block.folder for block in self._scores or self._blocks]
        drawn = joined(blocks, order, self._num, self._delimiter) if self._num else ()
        pools = [reduce_pool(result, self._delimiter) for result in drawn]
        if self._num and len(pools) < len(keys):
            raise DataError(f"samples of {len(keys) - len(pools)} problems are missing: run the same command again")
        rest = [reduce_pool(halves(r, self._num)[1]) for r in joined(blocks, order, self._num + self.binning)]
        rules = {item.spec.text: item.rule for item in self._items if item.rule}
        sizes = sorted({int(item.budget.amount) for item in self._items if item.rule})
        cells = pool_cells(pools, rules, sizes) if rules else []
        for item in self._items:
            if item.rule is None and item.budget.unit == "samples" and item.spec.name != OPTIMAL:
                folder, text = self._cells[item.spec.text, item.budget.amount].folder, item.spec.text
                rule = VOTES[item.spec.vote] if item.spec.vote else None
                cells.append(searched_cell(folder, text, item.budget.amount, keys, rule))
        return Grid(keys, tuple(cells)), pools, rest

    @property
    def scored(self) -> bool:
        """Whether the pool's samples have a verifier's scores."""
        return bool(self._scores)

    @property
    def cells(self) -> list[Cell]:
        """In the order in which they are done: samples before their scores, the pool of the baselines before what is
        compared with it, cheap searches before dear ones, so that a cap leaves what can be compared."""
        searched = sorted(dict.fromkeys(self._cells.values()), key=lambda cell: cell.weight)
        return [*self._blocks, *self._scores, *searched]

    def spent(self, max_tokens: int | None) -> dict[str, Any]:
        """What no row tells: "unfinished", the cost of what a cap cut off, where one did; and with a cap
        "generated_tokens", all that it counts, each search once."""
        unfinished = sum((cell.unfinished() for cell in self.cells), Spend())
        found: dict[str, Any] = {} if unfinished == Spend() else {"unfinished": unfinished.to_json()}
        return found if max_tokens is None else found | {"generated_tokens": _generated_tokens(self.cells)}

    def rows(self, order: Mapping[str, int]) -> tuple[list[Row], list[Row], int]:
        """A row for each item; more points of the baselines' curves; ungraded answers."""
        pooled, num_ungraded = self._pool_rows(order)
        rows: list[Row] = []
        for item in self._items:
            name, amount = item.spec.text, item.budget.amount
            if item.rule:
                rows.append(pooled.pop((name, amount), Row(name, amount, {}, Spend(), verified=item.scored)))
                continue
            cell = self._cells[name, amount]
            found = eval_store.outcomes(cell, item.spec, order)
            num_ungraded += found.num_ungraded
            solved = {key: float(value) for key, value in found.solved.items()}
            spent = (found.spend, found.num_ungraded, found.failures, cell.wall_s())
            rows.append(Row(name, amount, solved, *spent, verified=item.scored, approximate=found.approximate))
        curves = [row for (name, _), row in pooled.items() if name in (*PLAIN, WEIGHTED) and row.values]
        return rows, curves, num_ungraded

    def _pool_rows(self, order: Mapping[str, int]) -> tuple[dict[tuple[str, float], Row], int]:
        names = {item.spec.text: item.rule for item in self._items if item.rule}
        if not names:
            return {}, 0
        ks = {int(item.budget.amount) for item in self._items if item.rule}
        ks |= {2**i for i in range(self._num.bit_length()) if 2**i <= self._num}
        figures = eval_store.figures(
            self._scores or self._blocks, sorted(ks), list(dict.fromkeys(names.values())), order, self._delimiter
        )
        if figures is None:
            return {}, 0
        part = self._num / sum(block.amount for block in self._blocks)
        drawn = part * sum(block.wall_s() for block in self._blocks)
        scoring = part * sum(cell.wall_s() for cell in self._scores)
        rows = pool_rows(figures, names, {False: drawn, True: drawn + scoring})
        return {(row.strategy, row.budget): row for row in rows}, figures.num_ungraded


def _generated_tokens(cells: Sequence[Cell]) -> int:
    return sum(cell.generated_tokens() for cell in cells)


def _search(
    chosen: Chosen,
    split: str,
    problems: Sequence[Problem],
    fit: Sequence[Problem],
    cells: Sequence[Cell],
    request: Request,
) -> None:
    """Do what the cells lack; their folders hold it then. `fit`: problems on which thresholds are fitted."""
    lacking = [cell for cell in cells if cell.num_stored() < len(problems)]
    if len(lacking) < len(cells):
        there = f"{len(cells) - len(lacking)} of {len(cells)} searches are there already"
        print(f"{there} ({cells[0].folder.parent}); --fresh does them anew", file=sys.stderr)
    if not lacking:
        return
    left = None if request.max_tokens is None else max(0, request.max_tokens - _generated_tokens(cells))
    with work_folder() as folder:
        wanted = {"split": split, "max_tokens": left, "cells": [cell.to_json() for cell in lacking]}
        write_json(folder / "request.json", wanted)
        write_problems(problems, folder / "problems.jsonl")
        if any(needs_fit(parse(cell.strategy)) for cell in lacking if cell.strategy):
            if not fit:
                raise DataError("threshold=fit needs problems of the fit split, and there are none: give a number")
            write_problems(fit, folder / "fit.jsonl")
        out = cells[0].folder.parent
        inputs, config = chosen.inputs | {"request": folder}, chosen.config
        call = StageCall("sample", 0, None, config, inputs, out, heavy=True, look=1)
        what = f"{len(problems)} problems, {len(lacking)} searches"
        with signals_end_children(), Stages(config) as stages, _bar(what) as progress:
            stages(call, progress)
    for cell in lacking:
        if (found := eval_store.read_fit(cell)) is not None:
            print(_fit_line(cell, found, len(fit)), file=sys.stderr)


def _larger(
    config: Config, runs_dir: Path, model: str, split: str, problems: Sequence[Problem], request: Request
) -> list[SearchResult]:
    """The greedy answers of a larger model of the same task to the same problems, kept as any search is."""
    chosen = choose(config, runs_dir, model)
    root = runs_dir / config.loop.name / "eval"
    with lock(root / ".lock", f"an evaluation of loop {config.loop.name}"):
        store = Store(root, config, chosen.policy, split, problems, num_processes(config))
        cell = store.search(parse("greedy"), Budget("samples", 1.0), None)
        if request.fresh:
            store.forget([cell])
        _search(chosen, split, problems, (), [cell], request)
        return list(read_results(cell.folder))


def _rates(chosen: Chosen, problems: Sequence[Problem]) -> tuple[dict[str, float], float]:
    """Predicted pass rates, and the FLOPs of a prediction; none where there is no usable predictor."""
    if chosen.difficulty is None:
        return {}, 0.0
    with work_folder() as folder:
        write_problems(problems, folder / "problems.jsonl")
        out = folder / "rate"
        out.mkdir()
        call = StageCall("rate", 0, None, chosen.config, chosen.inputs | {"problems": folder}, out, heavy=True, look=1)
        with signals_end_children(), Stages(chosen.config) as stages:
            stages(call, lambda *_, **__: None)
        found = json.loads((out / "rates.json").read_text(encoding="utf-8"))
    if not found["rates"]:
        print(f"no bins by question: {found['why']}", file=sys.stderr)
    return found["rates"], found["flops"]


def _fit_line(cell: Cell, fit: Mapping[str, Any], num_problems: int) -> str:
    line = f"{cell.name}: threshold {fit['threshold']:g}, fitted on {num_problems} other problems for "
    line += f"{fit['tokens']} tokens"
    if len(fit["tried"]) < len(GRID):
        line += f"; --max-tokens ended that after {len(fit['tried'])} of {len(GRID)} thresholds, --fresh fits anew"
    return line


def sample(context: Context, inputs: Inputs, out: Path) -> None:
    """The stage: the searches of `request.json`, into their own folders."""
    from flows.eval_run import run_cells

    run_cells(context.config, inputs, context.progress)


def _tell_unfinished(
    rows: Sequence[Row], num_problems: int, max_tokens: int | None, generated_tokens: int | None
) -> None:
    """Which figures lack problems; only a cap makes them lack some."""
    lacking = [(row, num_problems - len(row.values)) for row in rows if len(row.values) < num_problems]
    if not lacking:
        return
    most = max(num for _, num in lacking)
    each = ", ".join(f"{row.strategy} @ {row.budget:g} {num}" for row, num in lacking)
    print(
        f"--max-tokens {max_tokens}: up to {most} of {num_problems} problems are left out ({each}). Figures are over "
        f"the finished ones, and the first to finish are the easier ones. {generated_tokens} tokens were generated, "
        "stored searches included; the same command with a higher cap goes on",
        file=sys.stderr,
    )


# ---------------------------------------------------------------- samples made elsewhere


def evaluate_pool(path: Path, task_name: str, request: Request, *, report: bool = False) -> dict[str, Any]:
    """The same figures for samples made elsewhere (format: design of `ratchet eval --pool`). Raises DataError."""
    from search.grade import grader_of
    from search.pool import evaluate_file

    if request.unit != "samples":
        raise ConfigError(f"--unit {request.unit}: a file of samples has budgets in samples only")
    budgets = None if request.budgets is None else [int(b) for b in request.budgets]
    names = None if request.strategies is None else _pool_names(request.strategies)
    found = evaluate_file(path, task_name, budgets, grader_of(task_name), names=names) | {"unit": "samples"}
    if report:
        _draw(found, path.with_name(f"{path.stem}-eval.png"))
    return found


def _pool_names(strategies: str) -> dict[str, str]:
    names: dict[str, str] = {}
    for spec in parse_list(strategies):
        rule = _rule(spec, Budget("samples", 1))
        if rule is None:
            raise ConfigError(
                f"{spec.text} cannot be computed from stored samples: leave --pool out to search with a model"
            )
        names[spec.text] = rule
    return names


# ---------------------------------------------------------------- folders and problems


@contextmanager
def work_folder(command: str = "eval") -> Iterator[Path]:
    """A temporary folder; it stays where a stage failed, since the error names the log in it."""
    folder = Path(tempfile.mkdtemp(prefix=f"ratchet-{command}-"))
    keep = False
    try:
        yield folder
    except StageFailed:
        keep = True
        raise
    finally:
        if not keep:
            shutil.rmtree(folder, ignore_errors=True)


def _problems(task: Task, split: Literal["validation", "test", "fit"], num: int, loop: Path) -> list[Problem]:
    """The first problems of the split. Of a file, those held out in round 0: rows appended later were trained on."""
    frozen = loop / "round-000" / "problems" / f"{split}.jsonl"
    if task.generated:
        return task.draw(split, num, stream=split)
    return (read_problems(frozen) if frozen.exists() else task.problems(split))[:num]


# ---------------------------------------------------------------- progress and picture


@contextmanager
def _bar(what: str) -> Iterator[Progress]:
    """A progress callback on stderr."""
    from rich.console import Console

    from flows.show import Display

    display = Display(Console(stderr=True))
    display.stage_started("eval", what, None)
    try:
        yield lambda done, total, **info: display.progress("eval", done, total, **info)
    finally:
        display.stop()


def _draw(found: dict[str, Any], path: Path) -> None:
    from flows.plots_search import save_comparison

    save_comparison(found, path)
    print(f"report: {path}", file=sys.stderr)
