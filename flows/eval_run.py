"""The searches of `ratchet eval`, done in the stage's process: shard by shard, the same problems under every strategy
before the next ones, so that what an interrupted or capped evaluation leaves can be compared.

A shard that was cut short (by a kill on a streaming engine, by --max-tokens anywhere) keeps its finished problems, and
notes what --max-tokens cut off: it was spent.
"""

from __future__ import annotations

import functools
import json
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from configs.schema import Config
from flows.chosen import load_chosen_verifier
from flows.eval_store import Cell, count_lines, fitted, kept
from flows.rating import Rates, predict_rates
from flows.stages import write_json
from flows.tables import load_tables
from search import answers
from search.choosing import choose_each, choose_together
from search.engines import load_engine, num_processes
from search.engines.reference import policy_path
from search.errors import VerifierError
from search.parallel import Report, fork_map
from search.policy import Policy, Sampler, Scorer, none_scored
from search.results import read_results, read_unfinished, write_results, write_unfinished
from search.run import Plan, Plans, Progress, search_shard
from search.scheduler import Searching, Tick, run_together
from search.sets import read_problems
from search.strategies import OPTIMAL, parse
from search.table import StrategyTable
from search.tasks import load_task
from search.thresholds import GRID, fit_threshold, needs_fit, with_threshold
from search.types import Budget, Candidate, Problem, SearchResult, Verifier


@dataclass(frozen=True, slots=True)
class Shard:
    """Problems `start`..`end` of a cell."""

    cell: Cell
    number: int
    start: int
    end: int

    @property
    def path(self) -> Path:
        return self.cell.shard(self.number)

    @property
    def weight(self) -> float:
        return self.cell.weight * (self.end - self.start)


@dataclass(slots=True)
class Done:
    """How far one process is."""

    weight: float = 0.0
    problems: int = 0
    tokens: int = 0
    steps: int = 0
    cell: str = ""


def run_cells(config: Config, inputs: Mapping[str, Path], progress: Progress) -> None:
    """The stage: do what the request's cells lack. `progress(done, total, tokens=, steps=, problems=, what=)`."""
    request = json.loads((inputs["request"] / "request.json").read_text(encoding="utf-8"))
    problems = read_problems(inputs["request"] / "problems.jsonl")
    cells = [Cell.from_json(row) for row in request["cells"]]
    num = num_processes(config)
    unfitted = [c for c in cells if c.strategy and needs_fit(parse(c.strategy)) and fitted(c) is None]
    fit = read_problems(inputs["request"] / "fit.jsonl") if unfitted else []
    shards = shards_of(cells, len(problems))
    to_fit = sum(cell.weight for cell in unfitted) * len(GRID) * len(fit)
    total, all_problems = to_fit + sum(s.weight for s in shards), sum(s.end - s.start for s in shards)
    fitting = Done()
    states = [Done() for _ in range(num)]
    rates = _rates(config, inputs, problems) if any(is_optimal(cell) for cell in cells) else {}

    def report_fit(index: int, row: dict[str, Any]) -> None:
        nonlocal fitting
        fitting = Done(**row)
        progress(fitting.weight, total, tokens=fitting.tokens, steps=fitting.steps, what=fitting.cell)

    def report(index: int, row: dict[str, Any]) -> None:
        states[index] = Done(**row)
        progress(
            to_fit + sum(s.weight for s in states),
            total,
            tokens=fitting.tokens + sum(s.tokens for s in states),
            steps=fitting.steps + sum(s.steps for s in states),
            problems=f"{sum(s.problems for s in states)}/{all_problems}",
            what=row["cell"],
        )

    def work(index: int, tell: Report) -> None:
        task = load_task(config)
        engine = load_engine(config, policy_path(inputs["policy"]), task, share=num, index=index)
        sampler = Sampler.of(config, engine, task, "evaluate", f"pool-{request['split']}")
        verifier = load_chosen_verifier(config, task, inputs) if any(cell.verified for cell in cells) else None
        limit = None if left is None else left // num
        table = load_tables(inputs["table"])["answer"] if "table" in inputs else None
        plans = functools.partial(plans_of, verifier=verifier, table=table, rates=rates)
        _Process(sampler, verifier, plans, problems, limit, num, tell).run(assign(shards, num)[index])
        engine.close()

    left: int | None = request["max_tokens"]
    if unfitted:
        fit_all = functools.partial(_fit_all, config, inputs, request["split"], unfitted, fit, left)
        (tokens,) = fork_map(fit_all, 1, report_fit, fork=True)
        left = None if left is None else left - tokens
    fork_map(work, num, report)


def _rates(config: Config, inputs: Mapping[str, Path], problems: Sequence[Problem]) -> Rates:
    """Predicted pass rates, in a process of its own: nothing of the model stays here before others are forked."""
    (found,) = fork_map(
        lambda index, tell: asdict(predict_rates(config, inputs, problems)), 1, lambda index, row: None, fork=True
    )
    if not found["rates"]:
        print(f"every question gets the same: {found['why']}", file=sys.stderr)
    return found["rates"]


def is_optimal(cell: Cell) -> bool:
    return bool(cell.strategy) and parse(cell.strategy).name == OPTIMAL


def _fit_all(
    config: Config,
    inputs: Mapping[str, Path],
    split: str,
    cells: Sequence[Cell],
    problems: Sequence[Problem],
    max_tokens: int | None,
    index: int,
    tell: Report,
) -> int:
    """Fit the thresholds of these cells, each on the same problems, and leave them in the cells' folders; tokens."""
    task = load_task(config)
    engine = load_engine(config, policy_path(inputs["policy"]), task)
    sampler = Sampler.of(config, engine, task, "evaluate", f"fit-{split}")
    verifier = load_chosen_verifier(config, task, inputs)
    assert verifier is not None, "a strategy with a threshold was planned without a verifier"
    done = Done()
    for cell in cells:
        before = replace(done, cell=f"fitting {cell.name}")

        def on_tick(tick: Tick, cell: Cell = cell, before: Done = before) -> None:
            weight = before.weight + cell.weight * tick.finished
            now = replace(before, weight=weight, tokens=before.tokens + tick.tokens, steps=before.steps + tick.steps)
            tell(asdict(now))

        left = None if max_tokens is None else max_tokens - done.tokens
        fit = fit_threshold(
            parse(cell.strategy), cell.budget, problems, sampler, verifier, max_tokens=left, on_tick=on_tick
        )
        row = {"threshold": fit.spec.options["threshold"], "tried": [asdict(one) for one in fit.tried]}
        write_json(cell.folder / "fit.json", row | {"tokens": fit.tokens})
        weight = done.weight + cell.weight * len(problems) * len(GRID)
        done = Done(weight, tokens=done.tokens + fit.tokens, steps=done.steps + fit.steps)
    engine.close()
    return done.tokens


def shards_of(cells: Sequence[Cell], num_problems: int) -> list[Shard]:
    """All shards, those of the first problems first; a block of samples before its scores."""
    shards = [
        Shard(cell, number, start, min(start + cell.shard_problems, num_problems))
        for cell in cells
        for number, start in enumerate(range(0, num_problems, cell.shard_problems))
    ]
    return sorted(shards, key=lambda shard: shard.start)


def assign(shards: Sequence[Shard], num: int) -> list[list[Shard]]:
    """Shards of each process, about equal in work. Scores go where their samples are drawn."""
    loads = [0.0] * num
    owners: dict[Path, int] = {}
    assigned: list[list[Shard]] = [[] for _ in range(num)]
    for shard in shards:
        source = shard.cell.scores / shard.path.name if shard.cell.scores else None
        index = owners[source] if source in owners else loads.index(min(loads))
        owners[shard.path] = index
        loads[index] += shard.weight
        assigned[index].append(shard)
    return assigned


class _Process:
    """One process's part of the work."""

    def __init__(
        self,
        sampler: Sampler,
        verifier: Verifier | None,
        plans: Callable[[Cell], Plans],
        problems: Sequence[Problem],
        max_tokens: int | None,
        num_processes: int,
        tell: Report,
    ):
        self._sampler = sampler
        self._verifier = verifier
        self._plans = plans
        self._problems = problems
        self._max_tokens = max_tokens
        self._num_processes = num_processes
        self._tell = tell
        self._done = Done()

    def run(self, shards: Sequence[Shard]) -> None:
        for shard in shards:
            started_s = time.monotonic()
            work = self._score if shard.cell.scores else self._search
            if work(shard):
                row = {"wall_s": round(time.monotonic() - started_s, 3), "processes": self._num_processes}
                with (shard.cell.folder / "timing.jsonl").open("a", encoding="utf-8") as file:
                    file.write(json.dumps({"shard": shard.number, **row}) + "\n")
            self._done.weight += shard.weight
            self._done.problems += shard.end - shard.start
            self._tell(asdict(self._done))

    def _search(self, shard: Shard) -> bool:
        """Search what the shard lacks; True where there was something to do."""
        if count_lines(shard.path) == shard.end - shard.start:
            return False
        there = kept(shard.path)
        problems = self._problems[shard.start : shard.end]
        left = None if self._max_tokens is None else self._max_tokens - self._done.tokens
        if left is not None and left <= 0:
            return False
        verifier = self._verifier if shard.cell.verified else None
        before, cut_off = replace(self._done, cell=shard.cell.name), read_unfinished(shard.path)

        def on_tick(tick: Tick) -> None:
            part = (len(there) + tick.finished) / len(problems)
            self._tell(
                asdict(
                    Done(
                        before.weight + part * shard.weight,
                        before.problems + len(there) + tick.finished,
                        before.tokens + tick.tokens,
                        before.steps + tick.steps,
                        before.cell,
                    )
                )
            )
            self._done = replace(before, tokens=before.tokens + tick.tokens, steps=before.steps + tick.steps)

        search_shard(
            problems,
            there.values(),
            self._plans(shard.cell),
            self._sampler,
            shard.path,
            verifier=verifier,
            max_tokens=left,
            on_tick=on_tick,
            on_unfinished=lambda spend: write_unfinished(cut_off + spend, shard.path),
        )
        return True

    def _score(self, shard: Shard) -> bool:
        assert shard.cell.scores is not None
        assert self._verifier is not None
        source = shard.cell.scores / shard.path.name
        if count_lines(source) == count_lines(shard.path):
            return False
        self._done.cell = shard.cell.name
        drawn = list(read_results(source))
        write_results(score(drawn, self._sampler, self._verifier), shard.path)
        return True


def plans_of(cell: Cell, *, verifier: Verifier | None, table: StrategyTable | None, rates: Rates) -> Plans:
    """What is run on the problems of a cell: one plan for all, or what the table chooses for each."""
    if not cell.strategy:
        name = f"pool({cell.amount:g})" if not cell.first else f"pool({cell.first}+{cell.amount:g})"
        return Plan(name, functools.partial(_block, first=cell.first), cell.budget, answers.majority)
    spec, threshold = parse(cell.strategy), fitted(cell)
    facts = verifier.facts if verifier and cell.verified else None
    if spec.name == OPTIMAL:
        assert table is not None, "an optimal choice was planned without a table"
        each = choose_each(table, rates, cell.amount, facts)
        if not spec.options.get("spread"):
            return each
        flops = [each.rungs_B[b].flops for b in table.bins(list(rates.values())).tolist()] or [each.rungs_B[0].flops]
        return choose_together(table, rates, sum(flops) / len(flops), facts)
    if threshold is not None:
        spec = with_threshold(spec, threshold)
    return spec.plan(cell.budget, facts)


async def _block(
    problem: Problem, policy: Policy, verifier: Scorer | None, budget: Budget, *, first: int
) -> list[Candidate]:
    """Independent samples from number `first` on: the same ones that a larger pool has at these places."""
    policy.start(first, stream="sample")
    return await policy.sample(int(budget.amount))


def score(drawn: Sequence[SearchResult], sampler: Sampler, verifier: Verifier) -> list[SearchResult]:
    """Stored pools with a verifier's scores; their spend has the verifier's added. One problem's failure is its own."""
    scoring = [_score_one(result, sampler, verifier) for result in drawn]
    scored: list[SearchResult] = []
    for result in run_together(scoring, sampler.engine, verifier):
        assert result is not None, "scoring generates nothing, so no cap ends it"
        scored.append(result)
    return scored


async def _scored(result: SearchResult, policy: Policy, scorer: Scorer) -> SearchResult:
    if result.failed:
        return result
    try:
        candidates = await scorer.score(result.candidates)
    except VerifierError as error:
        return replace(result, failed=str(error), spend=result.spend + policy.spend)
    spend, failed = result.spend + policy.spend, none_scored(candidates)
    return replace(result, candidates=tuple(candidates), spend=spend, failed=failed)


def _score_one(result: SearchResult, sampler: Sampler, verifier: Verifier) -> Searching[SearchResult]:
    policy = Policy(result.problem, sampler, Budget("samples", 0))
    return _scored(result, policy, Scorer(verifier, policy, sampler.task.step_delimiter))
