"""`ratchet solve`: one question, the chosen strategy, the answer and what it cost; `--trace` shows the tree.

The search runs as a stage (`solve`): in this process, which starts fastest and ends with the command; in a child where
the engine writes to stdout and starts processes (vLLM) or wants another interpreter. stdout carries the answer alone
on its first line; a search without an answer leaves it empty and exits with 1.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from configs import load
from configs.schema import Config
from flows.artefacts import atomic_write, disk_errors
from flows.child import signals_end_children
from flows.chosen import Chosen, choose, load_chosen_verifier
from flows.driver import StageCall
from flows.evaluation import work_folder
from flows.locks import gpu_locks
from flows.rating import predict_rates
from flows.show import count, harmless, seconds
from flows.solution import Solution
from flows.stage import Stages, in_process, used_gpus
from flows.stages import Context, Inputs, write_json
from flows.tables import fitted_with, load_tables
from search import answers, strategies
from search.choosing import choose_each
from search.engines import load_engine, num_processes
from search.engines.reference import policy_path
from search.errors import ConfigError, DataError
from search.policy import Sampler
from search.run import Plan, Progress, search
from search.tasks import load_task
from search.trace import Node, Trace
from search.types import SPLITS, Budget, Engine, Problem, SearchResult, Task, Verifier

WITHOUT_SCORES = {  # what the configured strategy is here without a verifier, or instead of a look at the gold answer
    "pass": "majority",
    "best_of_n": "majority",
    "best_of_n_weighted": "majority",
    "adaptive_best_of_n": "adaptive_majority",
    "adaptive_budget": "adaptive_budget_majority",
    "revisions": "revisions_majority",
}
_OURS = ("bootstrap", "scripted")  # bases that only a round makes


@dataclass(frozen=True, slots=True)
class Question:
    """What is asked. None: as configured. `budget` is in samples."""

    text: str
    strategy: str | None = None
    budget: int | None = None
    max_tokens: int | None = None
    trace: bool = False


# ---------------------------------------------------------------- asking


def lone(argument: str | None) -> str:
    """The question, where one argument was given. Raises ConfigError where it names a configuration, or is missing."""
    example = "for example `ratchet solve countdown '3 5 7 > 22'`"
    if argument is None:
        raise ConfigError(f"which question? {example}")
    with contextlib.suppress(load.InvalidConfig):
        load.find(argument)
        raise ConfigError(f"which question for {argument}? {example}")
    return argument


def ask(config: Config, runs_dir: Path, question: Question, model: str = "champion") -> Solution:
    """Search for an answer. Raises ConfigError (what was asked cannot be), BudgetError, DataError, ModelError."""
    if question.strategy and (spec := strategies.parse(question.strategy)).rule is answers.gold:
        raise ConfigError(f"--strategy {spec.text} picks by the gold answer: it measures, and cannot answer a question")
    try:
        question.text.encode()
    except UnicodeEncodeError:
        raise ConfigError("the question is not UTF-8: check the terminal's encoding") from None
    with signals_end_children(), work_folder("solve") as folder, _status() as progress:
        chosen = _chosen(config, runs_dir, model, folder)
        config = chosen.config
        write_json(folder / "question.json", asdict(question))
        out = folder / "solve"
        out.mkdir()
        call = StageCall("solve", 0, None, config, chosen.inputs | {"question": folder}, out, heavy=True, look=1)
        if config.engine.type == "vllm" or config.stages.python not in (None, sys.executable):
            with Stages(config) as stages:
                stages(call, progress)
        else:
            _here(call, progress)
        about = json.loads((out / "about.json").read_text(encoding="utf-8"))
        trace = json.loads((out / "trace.json").read_text(encoding="utf-8"))
        row = json.loads((out / "result.json").read_text(encoding="utf-8"))
    nodes = tuple(Node(**{**node, "shown": tuple(node["shown"])}) for node in trace)
    result = SearchResult.from_json(row)
    capped = question.max_tokens is not None
    return Solution(result, nodes, config.task.type, model, **about, capped=capped)


def _here(call: StageCall, progress: Progress) -> None:
    """Run the stage in this process. What a model's own code prints is no result."""
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # spinning threads collapse when others want the cores
    os.environ.setdefault("GOMP_SPINCOUNT", "0")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    locks = gpu_locks(used_gpus(call), "ratchet solve", lambda message: print(message, file=sys.stderr))
    with contextlib.redirect_stdout(sys.stderr), locks:
        in_process(call, progress)


def _chosen(config: Config, runs_dir: Path, model: str, folder: Path) -> Chosen:
    """What answers; the user's own base needs no round before it does."""
    own = config.model.base not in _OURS
    if model == "base" and own:
        source = Path(config.model.base)
        write_json(folder / "model.json", {"path": str(source.resolve()) if source.is_dir() else config.model.base})
        return Chosen(config, folder / "model.json", None)
    try:
        return choose(config, runs_dir, model)
    except DataError as error:
        way_out = "; `--model base` answers without one" if own and model == "champion" else ""
        raise DataError(f"{error}{way_out}") from None


@contextmanager
def _status() -> Iterator[Progress]:
    """A progress callback on stderr; nothing is shown where that is no terminal."""
    from rich.console import Console

    started_s = time.monotonic()
    with Console(stderr=True).status("loading the model") as status:

        def progress(done: float, total: float, **info: Any) -> None:
            elapsed = max(time.monotonic() - started_s, 1e-3)
            steps = f"{info['steps']} steps, " if info["steps"] else ""
            status.update(f"searching: {steps}{count(info['tokens'])} tokens, {seconds(elapsed)}")

        yield progress


# ---------------------------------------------------------------- the stage


def solve(context: Context, inputs: Inputs, out: Path) -> None:
    """The stage: result.json, trace.json, about.json."""
    config = context.config
    asked = Question(**json.loads((inputs["question"] / "question.json").read_text(encoding="utf-8")))
    started_s = time.monotonic()
    task = load_task(config)
    try:
        problem = find_problem(task, asked.text)
        verifier = load_chosen_verifier(config, task, inputs)
        by_table = chooses(asked, inputs, config, task)
        plan = None if by_table else make_plan(config, asked, problem, verifier)
        engine = load_engine(config, policy_path(inputs["policy"]), task, share=num_processes(config))
        loaded_s = time.monotonic()
        about: dict[str, Any] = {}
        if plan is None:
            plan, about["by_table"] = _by_table(config, inputs, asked, problem, verifier, engine)
        sampler = Sampler.of(config, engine, task, "solve", "question")
        context.progress(0, 1, tokens=0, steps=0)
        trace = Trace()
        (result,) = search(
            [problem],
            plan,
            sampler,
            verifier,
            max_tokens=asked.max_tokens,
            keep_unfinished=True,
            on_tick=lambda tick: context.progress(0, 1, tokens=tick.tokens, steps=tick.steps),
            traces=[trace] if asked.trace else None,
        )
        searched_s = time.monotonic()
        engine.close()
    finally:
        getattr(task, "close", lambda: None)()
    write_json(out / "result.json", result.to_json())
    write_json(out / "trace.json", trace.to_json())
    times = {"load_s": loaded_s - started_s, "search_s": searched_s - loaded_s}
    write_json(out / "about.json", times | about | {"delimiter": task.step_delimiter})


def find_problem(task: Task, question: str) -> Problem:
    """The problem of a question; one that the task's own file holds comes with its gold answer. Raises ConfigError."""
    try:
        problem = task.parse(question)
    except DataError as error:
        raise ConfigError(str(error)) from None  # of the command line, not of a file
    if problem.answer is None and not task.generated:
        known = (p for split in SPLITS for p in task.problems(split))
        problem = next((p for p in known if p.key == problem.key), problem)
    return problem


def chooses(asked: Question, inputs: Inputs, config: Config, task: Task) -> bool:
    """Whether the StrategyTable decides: where it was asked for, and where nothing was and it was fitted with this
    verifier. Raises ConfigError where it was asked for and there is none, or in a way that one question cannot have."""
    spec = strategies.parse(asked.strategy) if asked.strategy else None
    optimal = spec is not None and spec.name == strategies.OPTIMAL
    if spec is not None and optimal and (spec.options or spec.vote):
        raise ConfigError(
            f"--strategy {spec.text}: for one question the table chooses strategy, budget and vote; say optimal alone"
        )
    if "table" not in inputs:
        if optimal:
            raise ConfigError(
                f"--strategy {asked.strategy}: this model has no StrategyTable; run a round with table.enabled = true, "
                "or name another strategy"
            )
        return False
    return optimal or (spec is None and fitted_with(load_tables(inputs["table"])["answer"], config, task, inputs))


def _by_table(
    config: Config, inputs: Inputs, asked: Question, problem: Problem, verifier: Verifier | None, engine: Engine
) -> tuple[Plan, dict[str, Any]]:
    """What the table chooses for this question, and why. Raises BudgetError, ConfigError."""
    table = load_tables(inputs["table"])["answer"]
    predicted = predict_rates(config, inputs, [problem], engine)
    rates = predicted.rates
    facts = verifier.facts if verifier else None
    chooser = choose_each(table, rates, asked.budget or config.search.samples, facts)
    rung = chooser.rung(problem)
    _check_gold(config, strategies.parse(rung.arm), problem)
    said = {
        "rate": rates.get(problem.key),
        "bin": chooser.bin_of(problem),
        "bins": table.num_bins,
        "why": predicted.why,
    }
    return chooser(problem), said | {"strategy": rung.name, "value": rung.value}


def make_plan(config: Config, asked: Question, problem: Problem, verifier: Verifier | None) -> Plan:
    """What is run. Raises ConfigError, BudgetError."""
    spec = strategies.parse(asked.strategy or config.search.strategy)
    if spec.name == strategies.OPTIMAL:  # configured, and there is no table yet
        spec = strategies.parse("best_of_n_weighted")
    if asked.strategy is None and (verifier is None or spec.name == "pass") and spec.name in WITHOUT_SCORES:
        spec = strategies.Spec(WITHOUT_SCORES[spec.name], spec.options)
    _check_gold(config, spec, problem)
    budget = Budget("samples", asked.budget or config.search.samples)
    return spec.plan(budget, verifier.facts if verifier else None)


def _check_gold(config: Config, spec: strategies.Spec, problem: Problem) -> None:
    if spec.needs and config.verifier.type == "oracle" and problem.answer is None:
        raise ConfigError(
            "verifier.type = 'oracle' scores by the gold answer, and this question has none: set verifier.type=none, "
            "or ask a question of the task's file"
        )


# ---------------------------------------------------------------- showing


def show(solution: Solution, *, tree: bool, page: Path | None) -> None:
    """The answer and what it cost, on stdout; why there is none, on stderr."""
    from rich.console import Console
    from rich.text import Text

    out = Console(highlight=False, soft_wrap=True)
    where = out if solution.answer is not None else Console(stderr=True, highlight=False, soft_wrap=True)
    if solution.answer is not None:
        out.print(Text(solution.answer, style="bold"))
        if said := solution.verdict():
            out.print(Text(said, style="green" if solution.correct else "red"))
    for name, value in [*solution.facts(), ("votes", solution.votes_line())]:
        where.print(Text(f"{name:<9} {value}", style="dim"))
    if tree:
        from flows import trace_text, trace_tree

        wide = Console(highlight=False, width=None if out.is_terminal else max(out.width, 100))
        parts = trace_tree.sections(solution.nodes, solution.result.strategy)
        title = f"{' '.join(harmless(solution.result.problem.question).split())}   {solution.result.strategy}"
        trace_text.show(parts, title, wide)
    if page is not None:
        where.print(Text(f"page      {page}", style="dim"))


def page_path(solution: Solution, runs_dir: Path, loop: str) -> Path:
    """Where the page lies by default: with the loop, else in the current folder. The same search has the same name."""
    result = solution.result
    whole = "\0".join((result.problem.question, result.strategy, result.model, result.seed))
    words = (
        re.sub(r"[^a-z0-9]+", "-", f"{result.strategy} {result.problem.question}".lower()).strip("-")[:48].strip("-")
    )
    name = f"{words}-{hashlib.sha256(whole.encode(errors='replace')).hexdigest()[:6]}.html"
    folder = runs_dir / loop
    return folder / "traces" / name if (folder / "loop.json").exists() else Path(name)


def write_page(solution: Solution, path: Path) -> Path:
    """Write the page of the tree; says where. Raises DiskError."""
    from flows import trace_html

    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    atomic_write(path, trace_html.render(solution))
    return path
