"""`ratchet eval`: accuracy against budget of a model, or of samples made elsewhere.

JSON: {"task", "n", "ungraded", "results": [{"strategy", "budget", "accuracy", "se", "spend"}]}.
Strategies that sample independently share one pool: every budget is computed from its subsets, without bias. Samples
are drawn as a round's are, by a stage of its own (`sample`): in a child process, on all cores, holding the GPU's lock.
"""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from configs.schema import Config
from flows.child import signals_end_children
from flows.driver import StageCall
from flows.stage import Stages
from flows.stages import Context, Inputs, greedy_job, pool_job, run_jobs, write_json
from flows.state import Loop
from search import evaluate
from search.engines.reference import policy_path
from search.errors import ConfigError, DataError, StageFailed
from search.run import Progress
from search.sets import read_problems, write_problems
from search.tasks import load_task
from search.types import Problem, Task

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
    policy = find_model(config, runs_dir, model)
    problems = _problems(task, split, num_problems, runs_dir / config.loop.name)
    if not problems:
        raise DataError(f"--split {split}: the task has no problem in it; give more problems, or a larger share")
    if split == "test" and model in ("champion", "base"):
        with Loop.locked(runs_dir, config.loop.name, "an evaluation on the test set") as loop:
            loop.count_test_look()
    rows: list[evaluate.Row] = []
    ungraded = 0
    with work_folder() as folder:
        wanted = {"split": split, "greedy": "greedy" in request.strategies}
        write_json(folder / "request.json", wanted | {"samples": max(request.budgets) if rules else 0})
        write_problems(problems, folder / "problems.jsonl")
        _sample_there(config, policy, folder, len(problems))
        if "greedy" in request.strategies:
            outcomes = evaluate.read_outcomes(sorted(folder.glob("eval/greedy-*/*.jsonl")))
            rows.append(evaluate.outcome_row("greedy", 1, outcomes))
            ungraded += outcomes.num_ungraded
        if rules:
            figures = evaluate.read_pool(sorted(folder.glob("eval/pool-*/*.jsonl")), request.budgets, rules)
            rows += evaluate.table(figures)
            ungraded += figures.num_ungraded
    found = evaluate.to_json(task.name, len(problems), ungraded, rows)
    if report:
        _draw(found, runs_dir / config.loop.name / f"eval-{model.replace('/', '_')}-{split}.png")
    return found


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


def _sample_there(config: Config, policy: Path, folder: Path, num_problems: int) -> None:
    """Run the stage `sample` on what lies in the folder; its answers come into `eval/`."""
    out = folder / "eval"
    out.mkdir()
    inputs = {"policy": policy, "request": folder}
    call = StageCall("sample", 0, None, config, inputs, out, heavy=True, look=1)
    with signals_end_children(), Stages(config) as stages, _bar(num_problems) as progress:
        stages(call, progress)


def sample(context: Context, inputs: Inputs, out: Path) -> None:
    """The stage: greedy answers and a pool of samples of the problems, with the seeds that a round's evaluation has."""
    request = json.loads((inputs["request"] / "request.json").read_text(encoding="utf-8"))
    problems = read_problems(inputs["request"] / "problems.jsonl")
    jobs = [greedy_job(request["split"], problems, "evaluate")] if request["greedy"] else []
    if request["samples"]:
        jobs.append(pool_job(request["split"], problems, request["samples"], "evaluate"))
    run_jobs(context, inputs, out, jobs)


def evaluate_pool(path: Path, task_name: str, request: Request) -> dict[str, Any]:
    """The same figures for samples made elsewhere (format: design of `ratchet eval --pool`). Raises DataError."""
    from search.grade import grader_of
    from search.pool import evaluate_file

    return evaluate_file(path, task_name, request.budgets, grader_of(task_name))


def find_model(config: Config, runs_dir: Path, model: str) -> Path:
    """Where the model lies. Raises DataError, ModelError."""
    if model not in ("champion", "base"):
        if not Path(model).is_dir():
            raise DataError(f"--model {model}: no such folder; say champion, base, or a model folder")
        place = Path(model)
    else:
        loop = Loop.open(runs_dir, config.loop.name)
        if loop.state.champion is None:
            raise DataError(f"loop {config.loop.name} has no champion yet: run `ratchet round` first")
        place = loop.path / "round-000" / "base" if model == "base" else loop.resolve(loop.state.champion.policy)
    policy_path(place)
    return place


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
    print(f"report: {path}", file=sys.stderr)


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
