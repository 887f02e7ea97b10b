"""The stages of a round: each a function of its inputs that fills a folder. No Prefect, no MLflow, no heavy imports
until a stage needs them; `flows.driver` decides what runs when, and commits.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from configs.schema import Config
from flows.chosen import load_chosen_verifier
from search import answers
from search.engines import load_engine, num_processes
from search.engines.reference import policy_path
from search.parallel import Report, fork_map
from search.policy import Sampler
from search.results import merge_shards
from search.run import Plan, Plans, Progress, run_shards
from search.sets import draw_sets, read_outcomes, read_problems, write_problems, write_sets
from search.strategies.best_of_n import best_of_n, greedy
from search.tasks import load_problems, load_task
from search.types import Budget, Problem, Spend, Verifier

Inputs = Mapping[str, Path]
SHARD_SAMPLES = 4000  # about as many samples of a pool are committed together


@dataclass(frozen=True, slots=True)
class Context:
    """What a stage is told besides its inputs."""

    config: Config
    round: int
    progress: Progress
    control: str | None = None  # "random" or "bootstrap" in a control round
    look: int = 1  # j of the gate's look at its set since the last promotion


def write_metrics(out: Path, metrics: Mapping[str, float | tuple[float, float]]) -> None:
    """`metrics.jsonl`: one row a metric, a tuple being (value, standard error)."""
    with (out / "metrics.jsonl").open("w", encoding="utf-8") as file:
        for name, value in sorted(metrics.items()):
            row = {"name": name, "value": value[0], "se": value[1]} if isinstance(value, tuple) else None
            file.write(json.dumps(row or {"name": name, "value": value}) + "\n")


def write_json(path: Path, data: object) -> None:
    path.write_text(json.dumps(data, indent=1, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")


def earlier(inputs: Inputs, stage: str) -> list[Path]:
    """Inputs named `stage@001`, `stage@002`, ...: a stage's folders in all rounds so far, oldest first."""
    return [inputs[name] for name in sorted(inputs) if name.startswith(f"{stage}@")]


# ---------------------------------------------------------------- the stages


def problems(context: Context, inputs: Inputs, out: Path) -> None:
    """Draw and freeze the round's problems, and the step labels that come from a data set."""
    task = load_task(context.config)
    outcomes = read_outcomes(path / "outcomes.json" for path in earlier(inputs, "search"))
    frozen = inputs.get("problems@000")
    guards = {guard.name: load_problems(task, guard.path) for guard in context.config.gate.guards}
    guarded = [problem for guard in guards.values() for problem in guard]
    sets = draw_sets(task, context.config, context.round, frozen, outcomes, overlapping, guarded)
    counts = write_sets(task, sets, frozen, out)
    for name, guard in guards.items():
        write_problems(guard, out / f"guard-{name}.jsonl")
    rejected = [*getattr(task, "rejected", ())]
    metrics = {f"data/{name}_problems": float(count) for name, count in counts.items()}
    metrics["data/recycled_problems"] = float(sum(p.key in outcomes for p in sets["search"]))
    metrics["data/rejected_problems"] = float(len(rejected))
    verifier = context.config.verifier
    if verifier.type == "trained" and verifier.steps is not None:
        from flows.gold_steps import freeze

        unusable, figures = freeze(context, verifier.steps, task, out)
        rejected += unusable
        metrics |= figures
    with (out / "rejected.jsonl").open("w", encoding="utf-8") as file:
        for row in rejected:
            file.write(json.dumps(row.to_json(), ensure_ascii=False) + "\n")
    write_metrics(out, metrics)


def overlapping(training: Sequence[Problem], held_out: Sequence[Problem]) -> set[str]:
    """Keys of training questions that share eight words in a row with a held-out one, or are nearly the same."""
    from distill.leaks import near_duplicates, ngram_leaks

    texts, others = [p.question for p in training], [p.question for p in held_out]
    found = [*ngram_leaks(texts, others), *near_duplicates(texts, others)]
    return {training[overlap.train].key for overlap in found}


def base(context: Context, inputs: Inputs, out: Path) -> None:
    """The base model: trained from scratch for the embedded tasks, else a reference to the user's model."""
    config = context.config
    if config.model.base == "bootstrap":
        from distill import bootstrap

        bootstrap.run(config, inputs, out, progress=context.progress)
    elif config.model.base == "scripted":
        (out / "model").mkdir(exist_ok=True)
        write_json(out / "model" / "scripted.json", {"skill": 0})
        write_metrics(out, {})
    else:
        path = Path(config.model.base)
        reference = str(path.resolve()) if path.is_dir() else config.model.base
        engine = load_engine(config, reference, load_task(config))  # fails now, with a clear error, not hours in
        write_json(out / "model.json", {"path": reference, "fingerprint": engine.facts.fingerprint})
        write_metrics(out, {})


def baseline(context: Context, inputs: Inputs, out: Path) -> None:
    """The champion on the round's gate and guard sets; its test figures were measured when it was promoted."""
    _measure(context, inputs, out, ("gate",))


def evaluate(context: Context, inputs: Inputs, out: Path) -> None:
    """The challenger on the same problems, with the same seeds; in round 0 the base on the test set."""
    _measure(context, inputs, out, ("gate", "test") if context.round else ("test",))


# ---------------------------------------------------------------- shared


@dataclass(frozen=True, slots=True)
class Job:
    """Problems to run a plan on, into a folder of shards. `stage` and `split` are parts of every random key."""

    folder: str  # below the stage's; empty: the stage's own
    plan: Plans
    problems: Sequence[Problem]
    stage: str
    split: str
    shard_problems: int
    verified: bool = False  # the plan is given the configured verifier
    stepwise: bool = False  # its progress tells the size of the trees
    max_tokens: int | None = None  # hard cap on what all its problems generate
    expected_samples: int | None = None  # of a problem, for the progress; default: the one plan's budget

    @property
    def samples_each(self) -> int:
        if self.expected_samples or not isinstance(self.plan, Plan):
            return self.expected_samples or 1
        return int(self.plan.budget.amount)

    @property
    def samples(self) -> int:
        return len(self.problems) * self.samples_each


def greedy_job(name: str, problems: Sequence[Problem], stage: str) -> Job:
    plan = Plan("greedy", greedy, Budget("samples", 1), answers.first)
    return Job(f"greedy-{name}", plan, problems, stage, f"greedy-{name}", SHARD_SAMPLES // 4)


def pool_job(name: str, problems: Sequence[Problem], num: int, stage: str) -> Job:
    plan = Plan(f"pool({num})", best_of_n, Budget("samples", num), answers.majority)
    return Job(f"pool-{name}", plan, problems, stage, f"pool-{name}", max(1, SHARD_SAMPLES // num))


@dataclass(frozen=True, slots=True)
class _Done:
    """How far one process is, in all its jobs together."""

    samples: float = 0
    tokens: float = 0
    steps: float = 0
    problems: int = 0


def run_jobs(context: Context, inputs: Inputs, out: Path, jobs: Sequence[Job]) -> Spend:
    """Run every job with the policy, in as many processes as pay; their spend. Leaves folders of shards."""
    config = context.config
    num = num_processes(config)
    total = sum(job.samples for job in jobs)
    done = [_Done()] * num

    def report(index: int, row: dict[str, Any]) -> None:
        done[index] = _Done(**row)
        problems = f"{sum(d.problems for d in done)}/{sum(len(job.problems) for job in jobs)}"
        info: dict[str, Any] = {"tokens": sum(d.tokens for d in done), "problems": problems}
        if any(job.stepwise for job in jobs):
            info["steps"] = sum(d.steps for d in done)
        context.progress(sum(d.samples for d in done), total, **info)

    def work(index: int, tell: Report) -> dict[str, float]:
        task = load_task(config)
        engine = load_engine(config, policy_path(inputs["policy"]), task, share=num, index=index)
        verifier = load_chosen_verifier(config, task, inputs) if any(job.verified for job in jobs) else None
        spend, before = Spend(), _Done()
        for job in jobs:
            sampler = Sampler.of(config, engine, task, job.stage, job.split)
            used, before = _run_job(
                job, sampler, verifier if job.verified else None, out, (index, num), before, lambda d: tell(asdict(d))
            )
            spend += used
        engine.close()
        return spend.to_json()

    return sum((Spend(**row) for row in fork_map(work, num, report)), Spend())


def _run_job(
    job: Job,
    sampler: Sampler,
    verifier: Verifier | None,
    out: Path,
    part: tuple[int, int],
    before: _Done,
    tell: Callable[[_Done], None],
) -> tuple[Spend, _Done]:
    """One process's part of a job: what it spent, and how far the process is now."""
    now = before

    def progress(num_problems: int, _: int, *, tokens: int, steps: int) -> None:
        nonlocal now
        now = _Done(
            before.samples + num_problems * job.samples_each,
            before.tokens + tokens,
            before.steps + steps,
            before.problems + num_problems,
        )
        tell(now)

    spend = run_shards(
        job.problems,
        job.plan,
        sampler,
        out / job.folder,
        shard_problems=job.shard_problems,
        verifier=verifier,
        progress=progress,
        max_tokens=job.max_tokens // part[1] if job.max_tokens else None,
        part=part,
    )
    return spend, now


def _measure(context: Context, inputs: Inputs, out: Path, names: Sequence[str]) -> None:
    """Greedy answers on every set, and pools of samples on the first problems of it."""
    from search.evaluate import summary

    config = context.config
    pools = {
        "test": (config.evaluate.pool_problems, config.evaluate.pool_samples),
        "gate": (config.gate.coverage_problems, config.gate.coverage_samples),
    }
    jobs: list[Job] = []
    for name in names:
        problems = read_problems(inputs["problems"] / f"{name}.jsonl")
        num_pool, samples = pools[name]
        jobs += [greedy_job(name, problems, "evaluate"), pool_job(name, problems[:num_pool], samples, "evaluate")]
    if "gate" in names:
        for guard in config.gate.guards:
            problems = read_problems(inputs["problems"] / f"guard-{guard.name}.jsonl")
            jobs.append(greedy_job(f"guard-{guard.name}", problems, "evaluate"))
    spend = run_jobs(context, inputs, out, jobs)
    for job in jobs:
        merge_shards(out / job.folder, out / f"{job.folder}.jsonl")
    metrics: dict[str, float | tuple[float, float]] = {}
    for name in names:
        ks = [size for size in config.evaluate.k if size <= pools[name][1]]
        figures = summary(out / f"greedy-{name}.jsonl", out / f"pool-{name}.jsonl", ks)
        prefix = "test" if name == "test" else f"{name}_set"
        metrics |= {figure.replace("test/", f"{prefix}/"): (e.value, e.se) for figure, e in figures.items()}
    write_json(out / "spend.json", spend.to_json())
    write_metrics(out, metrics)
