"""The reviser stage: a second policy that mends the winner's answers, and the verifier of its chains (Snell et al.
2024, section 6.1). See `distill.revision` for what it is trained on.

The checkpoints of its training are compared by what the paper says counts: the accuracy of the attempts after the
first, in chains on fit problems. The reviser in use takes part; where it is the best, it stays. What the chosen one is
worth is measured on validation problems: its chains turn by turn, beside as many independent first answers of its own.
"""

from __future__ import annotations

import functools
import json
import math
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from distill import revision as revisions
from distill import select as selection
from distill.labels import write_examples
from flows.learning import is_held_out, searched
from flows.stages import Context, Inputs, Job, pool_job, run_jobs, write_json, write_metrics
from flows.verifying import training_spend
from search import answers
from search.engines.reference import policy_path
from search.errors import DataError, TrainingError
from search.evaluate import read_outcomes
from search.prompts import prompt_ids, revision_prompt
from search.results import read_results
from search.revision_figures import chain_figures
from search.sets import read_problems
from search.stats import mean_estimate, paired_difference
from search.strategies import parse
from search.tasks import load_task
from search.types import Budget, Problem, SearchResult, Spend, VerifierFacts

Metrics = dict[str, "float | tuple[float, float]"]
SHARD_ATTEMPTS = 4000  # about as many are committed together
PREVIOUS = "previous"


def reviser(context: Context, inputs: Inputs, out: Path) -> None:
    """`usable` in report.json says whether the bundle takes it; where not, the one before stays."""
    spend = _draw(context, inputs, out)
    report: dict[str, Any] = {"usable": False}
    metrics: Metrics = {}
    try:
        report |= _train(context, inputs, out)
        found, cost = _compare(context, inputs, out)
        spend += cost
        chosen = _best(found)
        report |= {"checkpoints": found, "chosen": chosen}
        if chosen == PREVIOUS:
            report["reason"] = "the reviser before it revises better, on the same problems"
        else:
            _place(out, _candidates(inputs, out)[chosen])
            report["verifier"], cost = _verify(context, inputs, out, chosen)
            metrics, used = _measure(context, out, inputs, verified=report["verifier"]["usable"])
            spend += cost + used
            report["usable"] = True
        metrics |= {"revision/rows": float(report["rows"]), "revision/kept_previous": float(chosen == PREVIOUS)}
    except (DataError, TrainingError) as error:
        report["reason"] = str(error)
    shutil.rmtree(out / "training" / "snapshots", ignore_errors=True)
    write_json(out / "report.json", report)
    write_json(out / "spend.json", spend.to_json())
    write_metrics(out, metrics | {"revision/usable": float(report["usable"])})


# ---------------------------------------------------------------- rows and training


def _draw(context: Context, inputs: Inputs, out: Path) -> Spend:
    """Fresh answers of the winner to training problems, in `out/pool-samples`."""
    problems, num = _labelled(context, inputs)[0], context.config.revision.samples
    return run_jobs(context, inputs, out, [pool_job("samples", problems, num, _stage(context))])


def _labelled(context: Context, inputs: Inputs) -> tuple[list[Problem], list[Problem]]:
    """The training problems on which the winner draws fresh answers for the reviser, and those kept for the verifier
    of its chains: on what the reviser was trained on, it is right too often."""
    settings = context.config.revision
    problems = read_problems(inputs["problems"] / "labels.jsonl")[: settings.problems]
    num = min(settings.verifier.problems, len(problems) // 2) if settings.verified else 0
    return problems[num:], problems[:num]


def _train(context: Context, inputs: Inputs, out: Path) -> dict[str, Any]:
    """Train on what was drawn, now and in earlier searches; the counts of the rows. Raises TrainingError."""
    config, folder = context.config, out / "training"
    if config.engine.type == "scripted":
        raise TrainingError("a scripted model cannot learn to revise")
    from distill.sft import train

    folder.mkdir(exist_ok=True)
    counts = _write_rows(context, inputs, out)
    if (folder / "model").exists() and not (folder / "checkpoints").exists():  # trained before an interruption
        return counts
    base, policy = Path(policy_path(inputs["base"])), Path(policy_path(inputs["policy"]))
    train(
        out / "rows.jsonl",
        base if config.revision.init == "base" else policy,
        base,
        folder,
        config.revision.train,
        config.model,
        seed=config.loop.seed,
        threads=config.stages.threads,
        progress=context.progress,
        device=_device(context),
        snapshots=config.revision.checkpoints,
    )
    return counts


def _write_rows(context: Context, inputs: Inputs, out: Path) -> dict[str, Any]:
    config, task = context.config, load_task(context.config)
    tokenizer, room = _speaks(context, policy_path(inputs["policy"]))
    held_out = is_held_out(config, task, inputs["problems"])
    kept = {problem.key for problem in _labelled(context, inputs)[1]}
    made = revisions.make_rows(
        _samples(context, inputs, out),
        config.revision,
        render=lambda problem, attempts: revision_prompt(task, tokenizer, problem, attempts, room)[0],
        solution_key=task.solution_key,
        seed=config.loop.seed,
        held_out=lambda key: key in kept or held_out(key),
        solved_keys=getattr(task, "solved_keys", None),
    )
    with (out / "rows.jsonl").open("w", encoding="utf-8") as file:
        for row in made.rows:
            file.write(json.dumps(row.to_json(), ensure_ascii=False, separators=(",", ":")) + "\n")
    return {"rows": len(made.rows), "samples": dict(made.counts)}


def _samples(context: Context, inputs: Inputs, out: Path) -> Iterator[tuple[int, SearchResult]]:
    """(round, result): what earlier and this round's searches left, and the winner's fresh answers."""
    return selection.read_results([*sorted(searched(inputs).items()), (context.round, out / "pool-samples")])


def _speaks(context: Context, model: str | Path) -> tuple[Any, int]:
    """The tokenizer of the model, and the most tokens that a prompt may have before an answer."""
    from search.engines.loading import describe_model

    described = describe_model(model, context.config.model)
    return described.tokenizer, described.facts.max_length - context.config.sampling.max_new_tokens


# ---------------------------------------------------------------- the choice


def _candidates(inputs: Inputs, out: Path) -> dict[str, Path]:
    """The reviser in use first, then the checkpoints as they came: of equals the first is chosen."""
    found = {PREVIOUS: Path(policy_path(inputs[PREVIOUS]))} if PREVIOUS in inputs else {}
    found |= {path.name: path for path in sorted((out / "training" / "snapshots").glob("step-*"))}
    return found | {"end": out / "training" / "model"}


def _compare(context: Context, inputs: Inputs, out: Path) -> tuple[dict[str, Any], Spend]:
    """Accuracy of the first attempts and of the revised ones, of every candidate on the same problems."""
    settings, spend = context.config.revision, Spend()
    problems = read_problems(inputs["problems"] / "fit.jsonl")[: settings.compared_problems]
    found: dict[str, Any] = {}
    for name, folder in _candidates(inputs, out).items():
        job = _chains(f"chains-{name}", problems, settings.turns, math.inf, context, "fit")
        spend += run_jobs(context, {"policy": folder}, out, [job])
        figures = chain_figures(read_results(out / job.folder))
        found[name] = {"first": figures.accuracy[0].value, "revised": figures.revised.value, "se": figures.revised.se}
    return found, spend


def _best(found: Mapping[str, Any]) -> str:
    return max(found, key=lambda name: found[name]["revised"])


def _place(out: Path, chosen: Path) -> None:
    """Copy the chosen weights to `out/model`, which appears whole."""
    work = out / "model.new"
    for folder in (work, out / "model"):
        shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(chosen, work)
    work.replace(out / "model")


# ---------------------------------------------------------------- the verifier of chains


def _verify(context: Context, inputs: Inputs, out: Path, chosen: str) -> tuple[dict[str, Any], Spend]:
    """Train the verifier of the reviser's chains, on training and fit problems; its report."""
    settings, task = context.config.revision.verifier, load_task(context.config)
    if not context.config.revision.verified:
        return {"usable": False}, Spend()
    from distill.verifier import train

    job = _chains("chains-train", _labelled(context, inputs)[1], settings.samples, 1.0, context, "train")
    spend = run_jobs(context, {"policy": out / "model"}, out, [job])
    results = ((context.round, result) for name in ("train", chosen) for result in read_results(out / f"chains-{name}"))
    render = functools.partial(prompt_ids, task, _speaks(context, out / "model")[0])
    examples = revisions.chain_examples(
        results, render, task.step_delimiter, window=context.config.revision.max_attempts
    )
    write_examples(examples, out / "examples.jsonl")
    base, old = Path(policy_path(inputs["base"])), inputs[PREVIOUS] / "verifier" if PREVIOUS in inputs else None
    init = base if settings.init == "base" else out / "model"
    if settings.warm_start and old is not None and old.is_dir():
        init = old
    try:
        trained = train(
            out / "examples.jsonl",
            init,
            base,
            out / "verifier",
            settings,
            context.config.model,
            task,
            seed=context.config.loop.seed,
            policy_fingerprint=next(read_results(out / "chains-train")).model,
            history=True,
            threads=context.config.stages.threads,
            progress=context.progress,
            device=settings.device,
        )
    except (DataError, TrainingError) as error:
        shutil.rmtree(out / "verifier", ignore_errors=True)
        return {"usable": False, "reason": str(error)}, spend
    report = asdict(trained)
    return {"usable": True, "training": report}, spend + training_spend(report)


# ---------------------------------------------------------------- what it is worth


def _measure(context: Context, out: Path, inputs: Inputs, *, verified: bool) -> tuple[Metrics, Spend]:
    """On validation problems: chains turn by turn, and chains against first answers at equal samples."""
    settings = context.config.revision
    problems = read_problems(inputs["problems"] / "validation.jsonl")
    num = 2 * settings.turns
    ways = {"sequential": math.inf, "parallel": 0.0}
    jobs = [_chains(name, problems, num, ratio, context, "validation", verified) for name, ratio in ways.items()]
    policy = {"policy": out / "model"} | ({"verifier": out / "verifier"} if verified else {})
    config = context.config.model_copy(update={"verifier": settings.verifier})
    spend = run_jobs(replace(context, config=config), policy, out, jobs)
    metrics: Metrics = dict(chain_figures(read_results(out / "sequential")).metrics())
    rules = {"majority": answers.majority} | ({"verifier": answers.hierarchical} if verified else {})
    for name, rule in rules.items():
        solved = {way: read_outcomes(out / way, rule).solved for way in ways}
        for way, by_key in solved.items():
            estimate = mean_estimate(list(by_key.values()))
            metrics[f"revision/{way}_{name}"] = (estimate.value, estimate.se)
        pairs = [(solved["parallel"][key], right) for key, right in solved["sequential"].items()]
        gain = paired_difference([float(a) for a, _ in pairs], [float(b) for _, b in pairs])
        metrics[f"revision/gain_{name}"] = (gain.mean, gain.se)
    return metrics, spend


# ---------------------------------------------------------------- shared


def _chains(
    folder: str,
    problems: Sequence[Problem],
    samples: int,
    ratio: float,
    context: Context,
    split: str,
    verified: bool = False,
) -> Job:
    name = "revisions" if verified else "revisions_majority"
    facts = VerifierFacts("", 0, process=False) if verified else None
    window = context.config.revision.max_attempts
    plan = parse(f"{name}(ratio={ratio:g}, window={window})").plan(Budget("samples", samples), facts)
    shard = max(1, SHARD_ATTEMPTS // samples)
    return Job(folder, plan, problems, _stage(context), split, shard, verified=verified)


def _stage(context: Context) -> str:
    return f"reviser/{context.round}"


def _device(context: Context) -> str:
    engine = context.config.engine
    return engine.device if engine.type == "transformers" else "auto"
