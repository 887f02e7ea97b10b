"""The difficulty stage: label problems by plain samples of the winner, fit predictors, compare with the old one."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any

from configs.schema import Config
from difficulty import predictor as predictors
from difficulty.labels import Counts, count_samples
from difficulty.predictor import Predictor
from difficulty.prompts import Prompts
from difficulty.report import Report
from flows.stages import Context, Inputs, pool_job, run_jobs, write_json, write_metrics
from search.engines import load_engine
from search.engines.reference import policy_path
from search.errors import DataError, ModelError
from search.prompts import prompt_ids
from search.results import merge_shards, read_results
from search.sets import read_problems
from search.tasks import load_task
from search.types import Problem, SearchResult, Spend, Task

SETS = ("fit", "validation")


def difficulty(context: Context, inputs: Inputs, out: Path) -> None:
    """Fit on the fit split (after a rejection also on the search's plain samples), report on the validation split.

    The old predictor is measured on the same fresh labels, and kept where its Brier score is lower. `usable` in
    report.json says whether the bundle takes what is kept; where not, all questions are treated alike.
    """
    spend = _draw_labels(context, inputs, out)
    write_json(out / "spend.json", spend.to_json())
    try:
        report, metrics = _fit(context, inputs, out)
    except DataError as error:
        report, metrics = {"usable": False, "why": str(error)}, {"difficulty/usable": 0.0}
    write_json(out / "report.json", report)
    write_metrics(out, metrics)


Metrics = dict[str, float | tuple[float, float]]


def _fit(context: Context, inputs: Inputs, out: Path) -> tuple[dict[str, Any], Metrics]:
    """What the report says, and the metrics. Raises DataError where nothing can be fitted."""
    config, seed = context.config, context.config.loop.seed
    policy, task = policy_path(inputs["policy"]), load_task(config)
    engine: Any = load_engine(config, policy, task, hidden_states=True)
    searched = read_results(inputs["search"]) if "search" in inputs else ()
    num_plain = config.search.probe_samples
    plain = (result.with_candidates(result.candidates[:num_plain]) for result in searched)
    reading = _Reading(config, policy, task, engine)
    labels = reading.label(chain(read_results(out / "pool-fit.jsonl"), plain))
    fresh = reading.label(read_results(out / "pool-validation.jsonl"))
    predictor, own = predictors.fit(
        labels.prompts, labels.counts, config.difficulty, seed=seed, metas_P=labels.metas_P, out=out
    )
    report = _evaluate(predictor, fresh, context)
    row: dict[str, Any] = {"fitted": own.to_json()}
    metrics: Metrics = {}
    if "previous" in inputs:
        old, old_report, why = _previous(inputs["previous"], fresh, context)
        if old_report is not None:
            metrics["difficulty/brier_previous"] = old_report.scores.brier
            row["previous"] = old_report.to_json()
        else:
            row["previous"] = {"usable": False, "why": why}
        if old and old_report and old_report.usable and old_report.scores.brier < report.scores.brier:
            predictor, report = old, old_report
        metrics["difficulty/kept_previous"] = float(predictor is old)
    if problem := labels.revealing or fresh.revealing:
        report = report.unusable(problem)
    replace(predictor, usable=report.usable, why=report.why).save(out)
    engine.close()
    for one in report.metrics():
        metrics[one["name"]] = one["value"] if one.get("se") is None else (one["value"], one["se"])
    return row | report.to_json(), metrics


@dataclass(frozen=True, slots=True)
class _Labels:
    """Problems with what they showed: right answers of plain samples, and what the policy makes of their prompts."""

    counts: Counts
    prompts: Prompts
    metas_P: list[Mapping[str, Any]]
    revealing: str  # why these prompts are not made of the question alone; empty where they are


@dataclass(frozen=True, slots=True)
class _Reading:
    """How labelled problems are read."""

    config: Config
    policy: str | Path
    task: Task
    engine: Any

    def label(self, results: Iterable[SearchResult]) -> _Labels:
        read: dict[str, tuple[Problem, tuple[int, ...]]] = {}

        def noted() -> Iterable[SearchResult]:
            for result in results:
                read[result.problem.key] = (result.problem, result.prompt_ids)
                yield result

        counts = count_samples(noted())
        known = [read[key] for key in counts.keys]
        prompts = Prompts([ids for _, ids in known], self.engine, policy=self.policy, model=self.config.model)
        return _Labels(counts, prompts, [problem.meta for problem, _ in known], self._revealing(known))

    def _revealing(self, known: Iterable[tuple[Problem, tuple[int, ...]]]) -> str:
        """A prompt that the question alone does not give shows the answer, or attempts at it."""
        found = [
            problem.key
            for problem, ids in known
            if ids != tuple(prompt_ids(self.task, self.engine.tokenizer, _asked(problem)))
        ]
        if not found:
            return ""
        return (
            f"{len(found)} prompts are not made of the question alone, first that of '{found[0]}': "
            "they may show the answer"
        )


def _asked(problem: Problem) -> Problem:
    """The problem as one who does not know its answer knows it."""
    return Problem(problem.key, problem.question, None, problem.meta)


def _evaluate(predictor: Predictor, fresh: _Labels, context: Context) -> Report:
    config = context.config
    return predictors.evaluate(
        predictor, fresh.prompts, fresh.counts, config.difficulty, seed=config.loop.seed, metas_P=fresh.metas_P
    )


def _previous(folder: Path, fresh: _Labels, context: Context) -> tuple[Predictor | None, Report | None, str]:
    """The old predictor and its report on the same labels; or why it cannot be read any more."""
    try:
        old = predictors.load(folder)
        return old, _evaluate(old, fresh, context), ""
    except (ModelError, DataError) as error:
        return None, None, str(error)


def _draw_labels(context: Context, inputs: Inputs, out: Path) -> Spend:
    """Plain samples of the winner on the fit and validation problems."""
    num, stage = context.config.difficulty.samples, f"difficulty/{context.round}"
    jobs = [pool_job(name, read_problems(inputs["problems"] / f"{name}.jsonl"), num, stage) for name in SETS]
    spend = run_jobs(context, inputs, out, jobs)
    for job in jobs:
        merge_shards(out / job.folder, out / f"{job.folder}.jsonl")
    return spend
