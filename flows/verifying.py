"""The verifier stage: label answers, the winner's fresh ones first, train on them, and say how healthy the result is.

Trained on training and fit problems only. Its health, and that of the verifier before it, is measured on the same
fresh answers of the winner to validation problems; what did not come out usable is not put into the bundle.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from configs.schema import TrainedVerifier
from distill import select as selection
from distill.labels import STEP_DATA, Labelled, label, read_examples, write_examples
from flows import gold_steps
from flows.chosen import load_chosen_verifier
from flows.learning import searched
from flows.stages import Context, Inputs, pool_job, run_jobs, write_json, write_metrics
from search.engines import load_engine, num_processes
from search.engines.reference import policy_path
from search.errors import DataError, TrainingError
from search.parallel import Report, fork_map
from search.policy import AGGREGATE, Sampler, steps_of
from search.results import merge_shards, read_results
from search.rollouts import Rollouts, prepare, values
from search.run import run_shards
from search.sets import read_problems
from search.tasks import load_task
from search.types import Candidate, Scored, ScoreRequest, SearchResult, Spend, Task, Verifier
from search.verifiers.health import Health, PrefixValue, compare, measure

FORBIDDEN = ("validation", "gate", "test")  # splits that no verifier is fitted to
NUM_VALUED = 100  # validation problems on which steps are valued by fresh rollouts
VALUED_STEPS = 2  # of each
ROLLOUTS = 16  # from each
SHARD_PROBLEMS = 100
SCORED_TOGETHER = 2000  # answers


def verifier(context: Context, inputs: Inputs, out: Path) -> None:
    """`usable` in report.json says whether the bundle takes it; where not, the one before stays."""
    settings = context.config.verifier
    assert isinstance(settings, TrainedVerifier)
    spend = _draw(context, inputs, out, settings)
    report: dict[str, Any] = {}
    metrics: dict[str, float | tuple[float, float]] = {}
    try:
        report |= _train(context, inputs, out, settings)
        spend += training_spend(report["training"])
        found, rows, cost = _measure(context, inputs, out)
        spend += cost
        report |= found
        metrics = {row["name"]: (row["value"], row["se"]) if "se" in row else row["value"] for row in rows}
    except (DataError, TrainingError) as error:
        report |= {"usable": False, "reason": str(error)}
    write_json(out / "report.json", report)
    write_json(out / "spend.json", spend.to_json())
    write_metrics(out, metrics | {"verifier/usable": float(report["usable"])})


def _measure(context: Context, inputs: Inputs, out: Path) -> tuple[dict[str, Any], list[dict[str, Any]], Spend]:
    """Its health, beside that of the verifier before it: what the report says, metrics, cost. Raises DataError."""
    from flows.plots_verifier import save_health

    new, spend = _health(context, inputs, out, out)
    report, rows = _judged(new), new.metrics()
    if "previous" in inputs:
        old, cost = _health(context, inputs, out, inputs["previous"])
        spend += cost
        found = compare(old, new)
        report |= {"compared": found.to_json()}
        rows += found.metrics()
        if report["usable"] and found.verdict == "worse":
            report |= {"usable": False, "reason": "worse than the verifier before it, on the same fresh answers"}
    write_json(out / "health.json", new.to_json())
    save_health(new, out / "health.png")
    return report, rows, spend


def _judged(health: Health) -> dict[str, Any]:
    """Does it rank the answers to a problem better than chance?"""
    found = health.figures.get("auc_within")
    if found is None:
        return {"usable": False, "reason": "no validation problem has both right and wrong answers to tell apart"}
    if found.value <= 0.5:
        return {"usable": False, "reason": f"it ranks answers no better than chance: AUC {found.value:.3f} in problems"}
    return {"usable": True}


# ---------------------------------------------------------------- answers and rollouts


def _draw(context: Context, inputs: Inputs, out: Path, settings: TrainedVerifier) -> Spend:
    """Fresh answers to training problems, where they are labelled, and rollouts: for labels where they are asked for,
    and for the health."""
    spend = Spend()
    if context.config.answer_labels:
        problems = read_problems(inputs["problems"] / "labels.jsonl")[: settings.problems]
        job = pool_job("labels", problems, settings.samples, f"verifier/{context.round}")
        spend += run_jobs(context, inputs, out, [job])
        merge_shards(out / job.folder, out / "pool-labels.jsonl")
    if {"rollouts", "siblings"} & set(settings.labels):
        wanted = Rollouts(settings.rollouts, settings.first_error)
        spend += _roll_out(context, inputs, out / "rollouts", [out / "pool-labels.jsonl"], wanted)
    if settings.kind == "prm":
        fresh = inputs["pools"] / "pool-validation.jsonl"
        spend += _roll_out(
            context, inputs, out / "values", [fresh], Rollouts(ROLLOUTS, prefixes=VALUED_STEPS), NUM_VALUED
        )
    return spend


def _roll_out(
    context: Context, inputs: Inputs, out: Path, pools: Sequence[Path], wanted: Rollouts, most: int | None = None
) -> Spend:
    """Rollouts from the steps of stored answers, in shards; none where no answer has two steps."""
    config, settings = context.config, context.config.verifier
    assert isinstance(settings, TrainedVerifier)
    num = num_processes(config)
    done = [(0, 0)] * num

    def report(index: int, row: dict[str, Any]) -> None:
        done[index] = (row["done"], row["tokens"])
        context.progress(sum(d for d, _ in done), row["total"], tokens=sum(t for _, t in done), what=out.name)

    def work(index: int, tell: Report) -> dict[str, float]:
        task = load_task(config)
        engine = load_engine(config, policy_path(inputs["policy"]), task, share=num, index=index)
        sampler = Sampler.of(config, engine, task, f"verifier/{context.round}", out.name)
        drawn = [result for path in pools for result in read_results(path)][:most]
        try:
            problems, plan = prepare(drawn, wanted, sampler, keep_unparsable=settings.keep_unparsable)
        except DataError:  # answers of one step have nothing to be valued
            return Spend().to_json()
        spend = run_shards(
            problems,
            plan,
            sampler,
            out,
            shard_problems=SHARD_PROBLEMS,
            progress=lambda done, total, **info: tell({"done": done, "total": total, "tokens": info["tokens"]}),
            part=(index, num),
        )
        engine.close()
        return spend.to_json()

    return sum((Spend(**row) for row in fork_map(work, num, report)), Spend())


# ---------------------------------------------------------------- training


def _train(context: Context, inputs: Inputs, out: Path, settings: TrainedVerifier) -> dict[str, Any]:
    """Label and train; what the report says of it. Raises DataError, TrainingError."""
    from distill.verifier import train

    config = context.config
    task = load_task(config)
    report = _write_examples(context, inputs, out, settings, task)
    policy, base = Path(policy_path(inputs["policy"])), Path(policy_path(inputs["base"]))
    init = base if settings.init == "base" else policy
    if settings.warm_start and "previous" in inputs:
        init = inputs["previous"]
    trained = train(
        out / "examples.jsonl",
        init,
        base,
        out,
        settings,
        config.model,
        task,
        seed=config.loop.seed,
        policy_fingerprint=_fingerprint(inputs),
        threads=config.stages.threads,
        progress=context.progress,
        device=settings.device,
    )
    return report | {"training": asdict(trained)}


def _write_examples(
    context: Context, inputs: Inputs, out: Path, settings: TrainedVerifier, task: Task
) -> dict[str, Any]:
    """Labelled answers, and those of a data set; what the report says of the latter. Raises DataError."""
    labelled = _label(context, inputs, out, settings, task)
    counts = dict(labelled.counts)
    if settings.steps is None:
        write_json(out / "labels.json", counts)
        write_examples(labelled.examples, out / "examples.jsonl")
        return {}
    found = json.loads((inputs["problems"] / gold_steps.COUNTS).read_text(encoding="utf-8"))
    write_json(out / "labels.json", counts | {f"examples/{STEP_DATA}": found["kept"]})
    steps = read_examples(inputs["problems"] / gold_steps.EXAMPLES)
    write_examples(itertools.chain(labelled.examples, steps), out / "examples.jsonl")
    return {"steps": found | {"path": settings.steps.path}}


def _label(context: Context, inputs: Inputs, out: Path, settings: TrainedVerifier, task: Task) -> Labelled:
    """The policy's own answers with labels; none where no source labels them. Raises DataError."""
    if not context.config.answer_labels:
        return Labelled((), {})
    forbidden = {p.key for path in _forbidden(inputs["problems"]) for p in read_problems(path)}
    return label(
        _answers(context, inputs, out),
        context.config.answer_labels,
        task,
        held_out=forbidden.__contains__,
        max_examples=settings.max_examples,
        kind=settings.kind,
        keep_unparsable=settings.keep_unparsable,
        seed=context.config.loop.seed,
    )


def _forbidden(problems: Path) -> Iterator[Path]:
    yield from (problems / f"{name}.jsonl" for name in FORBIDDEN)
    yield from sorted(problems.glob("guard-*.jsonl"))


def _answers(context: Context, inputs: Inputs, out: Path) -> Iterator[tuple[int, SearchResult]]:
    """(round, result): what earlier and this round's searches left, the winner's fresh answers, and rollouts."""
    fresh: list[Path] = [out / "pool-labels.jsonl", inputs["pools"] / "pool-fit.jsonl"]
    fresh += [out / "rollouts"] if (out / "rollouts").is_dir() else []
    return selection.read_results([*searched(inputs).items(), *((context.round, path) for path in fresh)])


def _fingerprint(inputs: Inputs) -> str:
    return next(iter(read_results(inputs["pools"] / "pool-validation.jsonl"))).model


def training_spend(report: dict[str, Any]) -> Spend:
    """6 FLOPs a parameter and trained token (forward and backward), 2 a scored one."""
    trained, scored, size = report["trained_tokens"], report["scored_tokens"], report["parameters"]
    flops = size * (6.0 * trained + 2.0 * scored)
    return Spend(
        verifier_tokens=trained + scored,
        flops_ideal=flops,
        flops_actual=flops,
        verifier_flops_ideal=flops,
        verifier_flops_actual=flops,
    )


# ---------------------------------------------------------------- health


def _health(context: Context, inputs: Inputs, out: Path, folder: Path) -> tuple[Health, Spend]:
    """Of the verifier in `folder`, on the winner's fresh answers to validation problems."""
    config = context.config
    task = load_task(config)
    scorer = load_chosen_verifier(config, task, {**inputs, "verifier": folder})
    assert scorer is not None
    pool = [r for r in read_results(inputs["pools"] / "pool-validation.jsonl") if not r.failed]
    scored, spend = score_answers(pool, scorer, task)
    rolled = read_results(out / "values") if scorer.facts.process and any((out / "values").glob("shard-*")) else ()
    valued, cost = _values(rolled, scorer)
    facts = scorer.facts
    found = measure(scored, task=task, process=facts.process, aggregation=facts.aggregation, values=valued)
    return found, spend + cost


def score_answers(pool: Sequence[SearchResult], verifier: Verifier, task: Task) -> tuple[list[SearchResult], Spend]:
    """The pool with the verifier's scores; equal answers are read once. What it could not read has no score."""
    reads: dict[tuple[str, tuple[str, ...]], ScoreRequest] = {}
    for result in pool:
        for candidate in result.candidates:
            if candidate.complete:
                steps = steps_of(candidate, task.step_delimiter)
                reads.setdefault((result.problem.key, steps), ScoreRequest(result.problem, steps))
    scores, spend = _score(list(reads.values()), verifier)
    known = dict(zip(reads, scores, strict=True))
    aggregate = AGGREGATE[verifier.facts.aggregation]

    def scored(key: str, candidate: Candidate) -> Candidate:
        if not candidate.complete:
            return candidate
        found = known[key, steps_of(candidate, task.step_delimiter)]
        if found.unscored is not None:
            return replace(candidate, unscored=found.unscored)
        return replace(candidate, step_scores=found.scores, score=aggregate(found.scores))

    return [replace(r, candidates=tuple(scored(r.problem.key, c) for c in r.candidates)) for r in pool], spend


def _values(rolled: Iterable[SearchResult], verifier: Verifier) -> tuple[list[PrefixValue], Spend]:
    """What the verifier says of unfinished answers, beside how fresh rollouts from there ended."""
    found = [(result.problem, value) for result in rolled for value in values(result)]
    scores, spend = _score([ScoreRequest(problem, value.steps) for problem, value in found], verifier)
    aggregate = AGGREGATE[verifier.facts.aggregation]
    pairs = [pair for pair in zip(found, scores, strict=True) if pair[1].unscored is None]
    return [PrefixValue(aggregate(s.scores), v.num_correct, v.num, p.key) for (p, v), s in pairs], spend


def _score(requests: Sequence[ScoreRequest], verifier: Verifier) -> tuple[list[Scored], Spend]:
    scores: list[Scored] = []
    for start in range(0, len(requests), SCORED_TOGETHER):
        scores += verifier.score(requests[start : start + SCORED_TOGETHER])
    tokens = sum(one.computed_tokens for one in scores)
    flops = 2.0 * verifier.facts.flops_parameters * tokens
    spent = {name: flops for name in ("flops_ideal", "flops_actual", "verifier_flops_ideal", "verifier_flops_actual")}
    return scores, Spend(verifier_tokens=tokens, **spent)  # pyright: ignore[reportArgumentType]
