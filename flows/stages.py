"""The stages of a round: each a function of its inputs that fills a folder. No Prefect, no MLflow, no heavy imports
until a stage needs them; `flows.driver` decides what runs when, and commits.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from configs.schema import Config
from search import answers
from search.engines import load_engine
from search.engines.reference import policy_path
from search.policy import Sampler
from search.run import Plan, Progress, merge_shards, read_results, run_shards
from search.sets import draw_sets, read_outcomes, read_problems, write_problems, write_sets
from search.strategies.best_of_n import best_of_n, greedy
from search.tasks import load_problems, load_task
from search.types import Budget, Engine, Grade, Problem, Spend, Task

Inputs = Mapping[str, Path]


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
    """Draw and freeze the round's problems."""
    task = load_task(context.config)
    outcomes = read_outcomes(path / "outcomes.json" for path in earlier(inputs, "search"))
    frozen = inputs.get("problems@000")
    sets = draw_sets(task, context.config, context.round, frozen, outcomes, overlapping)
    counts = write_sets(task, sets, frozen, out)
    for guard in context.config.gate.guards:
        write_problems(load_problems(task, guard.path), out / f"guard-{guard.name}.jsonl")
    rejected = getattr(task, "rejected", ())
    with (out / "rejected.jsonl").open("w", encoding="utf-8") as file:
        for row in rejected:
            file.write(json.dumps(row.to_json(), ensure_ascii=False) + "\n")
    metrics = {f"data/{name}_problems": float(count) for name, count in counts.items()}
    metrics["data/recycled_problems"] = float(sum(p.key in outcomes for p in sets["search"]))
    metrics["data/rejected_problems"] = float(len(rejected))
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


def search(context: Context, inputs: Inputs, out: Path) -> None:
    """Spend test-time compute on the round's training problems; the first samples of each are plain ones."""
    config = context.config
    task, engine = open_policy(context, inputs)
    budget = Budget("samples", config.search.samples)
    plan = Plan(f"best_of_n({config.search.samples})", best_of_n, budget, answers.gold)
    training = read_problems(inputs["problems"] / "search.jsonl")
    spend = run_shards(
        training,
        plan,
        task,
        sampler(context, engine, f"search/{context.round}", "train", task.end_text),
        out,
        shard_problems=config.search.shard_problems,
        progress=context.progress,
        max_tokens=config.search.max_tokens,
    )
    engine.close()
    outcomes: dict[str, tuple[int, int]] = {}
    for result in read_results(out):
        correct = sum(c.grade is Grade.CORRECT for c in result.candidates)
        outcomes[result.problem.key] = (correct, len(result.candidates))
    write_json(out / "outcomes.json", outcomes)
    write_json(out / "spend.json", spend.to_json())
    solved = sum(correct > 0 for correct, _ in outcomes.values())
    write_metrics(out, {"search/problems": float(len(outcomes)), "search/solved": float(solved)})


# ---------------------------------------------------------------- shared


def open_policy(context: Context, inputs: Inputs) -> tuple[Task, Engine]:
    task = load_task(context.config)
    return task, load_engine(context.config, policy_path(inputs["policy"]), task)


def sampler(context: Context, engine: Engine, stage: str, split: str, end_text: str | None = None) -> Sampler:
    sampling = context.config.sampling
    seed = (context.config.loop.seed, stage, split)
    return Sampler(engine, sampling.temperature, sampling.max_new_tokens, seed, end_text)


def _measure(context: Context, inputs: Inputs, out: Path, names: Sequence[str]) -> None:
    """Greedy answers on every set, and pools of samples on the first problems of it."""
    from search.evaluate import summary

    config, k = context.config, context.config.evaluate.k
    task, engine = open_policy(context, inputs)
    pools = {
        "test": (config.evaluate.pool_problems, config.evaluate.pool_samples),
        "gate": (config.gate.coverage_problems, config.gate.coverage_samples),
    }
    spend, metrics = Spend(), {}
    work = _work(context, inputs, names, pools)
    total = sum(len(problems) * samples for _, problems, samples in work)
    done = 0
    for name, problems, samples in work:

        def progress(part: int, _: int, *, samples: int = samples, done: int = done, **info: object) -> None:
            context.progress(done + part * samples, total, **info)

        plan = Plan("greedy", greedy, Budget("samples", 1), answers.first)
        if name.startswith("pool"):
            plan = Plan(f"pool({samples})", best_of_n, Budget("samples", samples), answers.majority)
        draws = sampler(context, engine, "evaluate", name, task.end_text)
        spend += run_shards(problems, plan, task, draws, out / name, shard_problems=1000, progress=progress)
        done += len(problems) * samples
    engine.close()
    for name, _, _ in work:
        merge_shards(out / name, out / f"{name}.jsonl")
    for name in names:
        ks = [size for size in k if size <= pools[name][1]]
        figures = summary(out / f"greedy-{name}.jsonl", out / f"pool-{name}.jsonl", ks)
        metrics |= {figure.replace("test/", f"{name}_set/"): (e.value, e.se) for figure, e in figures.items()}
    metrics = {name.replace("test_set/", "test/"): value for name, value in metrics.items()}
    write_json(out / "spend.json", spend.to_json())
    write_metrics(out, metrics)


def _work(
    context: Context, inputs: Inputs, names: Sequence[str], pools: Mapping[str, tuple[int, int]]
) -> list[tuple[str, list[Problem], int]]:
    """What is measured: (folder, problems, samples each)."""
    work: list[tuple[str, list[Problem], int]] = []
    for name in names:
        problems = read_problems(inputs["problems"] / f"{name}.jsonl")
        num_pool, samples = pools[name]
        work += [(f"greedy-{name}", problems, 1), (f"pool-{name}", problems[:num_pool], samples)]
    if "gate" in names:
        for guard in context.config.gate.guards:
            problems = read_problems(inputs["problems"] / f"guard-{guard.name}.jsonl")
            work.append((f"greedy-guard-{guard.name}", problems, 1))
    return work
