"""`ratchet eval`: accuracy against budget of a model, or of samples made elsewhere.

JSON: {"task", "n", "ungraded", "results": [{"strategy", "budget", "accuracy", "se", "spend"}]}.
Strategies that sample independently share one pool: every budget is computed from its subsets, without bias.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from configs.schema import Config
from flows.state import Loop
from search import answers, evaluate
from search.engines import load_engine
from search.engines.reference import policy_path
from search.errors import ConfigError, DataError
from search.policy import Sampler
from search.run import Plan, Progress, run_shards
from search.sets import read_problems
from search.strategies.best_of_n import best_of_n, greedy
from search.tasks import load_task
from search.types import Budget, Problem, Task

RULES = {"pass": "pass", "majority": "majority"}


@dataclass(frozen=True, slots=True)
class Request:
    """What to report. Budgets are samples per problem."""

    budgets: tuple[int, ...]
    strategies: tuple[str, ...]

    def rules(self) -> list[str]:
        unknown = [s for s in self.strategies if s not in RULES and s != "greedy"]
        if unknown:
            raise ConfigError(f"--strategies {unknown[0]}: this version has greedy, {', '.join(RULES)}")
        return [RULES[s] for s in self.strategies if s in RULES]


def evaluate_model(
    config: Config, runs_dir: Path, model: str, split: str, num_problems: int, request: Request, *, report: bool
) -> dict[str, Any]:
    """Sample a model on held-out problems and report. Raises ConfigError, DataError, ModelError."""
    rules = request.rules()
    task = load_task(config)
    if split not in ("validation", "test"):
        raise ConfigError(f"--split {split}: expected validation or test")
    policy = _find_model(config, runs_dir, model)
    problems = _problems(task, split, num_problems, runs_dir / config.loop.name)
    if split == "test" and model in ("champion", "base"):
        with Loop.locked(runs_dir, config.loop.name, "an evaluation on the test set") as loop:
            loop.count_test_look()
    engine = load_engine(config, policy, task)
    sampling = config.sampling
    seed = (config.loop.seed, "evaluate", f"pool-{split}")
    sampler = Sampler(engine, sampling.temperature, sampling.max_new_tokens, seed, task.end_text)
    rows: list[evaluate.Row] = []
    with tempfile.TemporaryDirectory(prefix="ratchet-eval-") as folder, _bar(len(problems)) as progress:
        ungraded = 0
        if "greedy" in request.strategies:
            plan = Plan("greedy", greedy, Budget("samples", 1), answers.first)
            run_shards(problems, plan, task, sampler, Path(folder, "greedy"), shard_problems=250, progress=progress)
            outcomes = evaluate.read_outcomes(sorted(Path(folder, "greedy").glob("*.jsonl")))
            rows.append(evaluate.outcome_row("greedy", 1, outcomes))
            ungraded += outcomes.num_ungraded
        if rules:
            largest = max(request.budgets)
            plan = Plan(f"pool({largest})", best_of_n, Budget("samples", largest), answers.majority)
            run_shards(problems, plan, task, sampler, Path(folder, "pool"), shard_problems=250, progress=progress)
            figures = evaluate.read_pool(sorted(Path(folder, "pool").glob("*.jsonl")), request.budgets, rules)
            rows += evaluate.table(figures)
            ungraded += figures.num_ungraded
    engine.close()
    found = evaluate.to_json(task.name, len(problems), ungraded, rows)
    if report:
        _draw(found, runs_dir / config.loop.name / f"eval-{model.replace('/', '_')}-{split}.png")
    return found


def evaluate_pool(path: Path, task_name: str, request: Request) -> dict[str, Any]:
    """The same figures for samples made elsewhere (format: design of `ratchet eval --pool`). Raises DataError."""
    from search.grade import grader_of
    from search.pool import evaluate_file

    return evaluate_file(path, task_name, request.budgets, grader_of(task_name))


def _find_model(config: Config, runs_dir: Path, model: str) -> str:
    if model not in ("champion", "base"):
        if not Path(model).is_dir():
            raise DataError(f"--model {model}: no such folder; say champion, base, or a model folder")
        return policy_path(Path(model))
    loop = Loop.open(runs_dir, config.loop.name)
    if model == "base":
        return policy_path(loop.path / "round-000" / "base")
    if loop.state.champion is None:
        raise DataError(f"loop {config.loop.name} has no champion yet: run `ratchet round` first")
    return policy_path(loop.resolve(loop.state.champion.policy))


def _problems(task: Task, split: Literal["validation", "test"], num: int, loop: Path) -> list[Problem]:
    """The first problems of the split. Of a file, those held out in round 0: rows appended later were trained on."""
    frozen = loop / "round-000" / "problems" / f"{split}.jsonl"
    if task.generated:
        return task.draw(split, num, stream=split)
    return (read_problems(frozen) if frozen.exists() else task.problems(split))[:num]


@contextmanager
def _bar(num_problems: int) -> Iterator[Progress]:
    """A progress callback on stderr."""
    from rich.console import Console

    from flows.show import Display

    display = Display(Console(stderr=True))
    display.stage_started("eval", f"{num_problems} problems", None)
    try:
        yield lambda done, total, **info: display.progress("eval", done, total, **info)
    finally:
        display.stop()


def _draw(found: dict[str, Any], path: Path) -> None:
    from flows.plots import accuracy_against_samples

    accuracy_against_samples(found["results"], path)


def show(found: dict[str, Any]) -> None:
    """For people, on stdout."""
    from rich.console import Console
    from rich.table import Table

    from flows.show import count

    table = Table(box=None, pad_edge=False, header_style="bold")
    for column, justify in (("strategy", "left"), ("samples", "right"), ("accuracy", "right"), ("tokens", "right")):
        table.add_column(column, justify=justify)  # pyright: ignore[reportArgumentType]
    for row in _rows(found["results"]):
        table.add_row(*row[:3], count(row[3]))
    console = Console(soft_wrap=True, highlight=False)
    console.print(f"{found['task']}: {found['n']} problems, {found['ungraded']} ungraded")
    console.print(table)


def _rows(results: Sequence[dict[str, Any]]) -> list[tuple[str, str, str, float]]:
    rows: list[tuple[str, str, str, float]] = []
    for r in results:
        error = "" if r["se"] is None else f" ± {196 * r['se']:.1f}"
        accuracy = "-" if r["accuracy"] is None else f"{100 * r['accuracy']:.1f}{error} %"
        rows.append((r["strategy"], f"{r['budget']:g}", accuracy, (r["spend"] or {}).get("generated_tokens", 0)))
    return rows
