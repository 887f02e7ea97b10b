"""The difficulty stage: label problems by plain samples of the winner, fit the probe, compare it with the old one."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from difficulty import probe as probes
from difficulty.labels import Counts, count_samples
from flows.stages import Context, Inputs, pool_job, run_jobs, write_json, write_metrics
from search.engines import load_engine
from search.engines.reference import policy_path
from search.results import merge_shards, read_results
from search.sets import read_problems
from search.tasks import load_task
from search.types import SearchResult, Spend

SETS = ("fit", "validation")


def difficulty(context: Context, inputs: Inputs, out: Path) -> None:
    """Fit on the fit split (after a rejection also on the search's plain samples), report on the validation split.

    The old predictor is measured on the same fresh labels, and kept where its Brier score is lower.
    """
    config, seed = context.config.difficulty, context.config.loop.seed
    spend = _draw_labels(context, inputs, out)
    policy, task = policy_path(inputs["policy"]), load_task(context.config)
    engine: Any = load_engine(context.config, policy, task, hidden_states=True)
    searched = read_results(inputs["search"]) if "search" in inputs else ()
    num_plain = context.config.search.probe_samples
    plain = (result.with_candidates(result.candidates[:num_plain]) for result in searched)
    labels = _label(chain(read_results(out / "pool-fit.jsonl"), plain), engine)
    fresh = _label(read_results(out / "pool-validation.jsonl"), engine)
    engine.close()
    probe, _ = probes.fit(
        *labels.arrays(), seed, keys=labels.keys, layers=config.layers, bins=config.bins, policy=labels.policy
    )
    report = probes.evaluate(probe, *fresh.arrays(), seed, keys=fresh.keys)
    metrics: dict[str, float | tuple[float, float]] = {}
    if "previous" in inputs:
        old = probes.Probe.load(inputs["previous"])
        old_report = probes.evaluate(old, *fresh.arrays(), seed, keys=fresh.keys)
        metrics["difficulty/brier_previous"] = old_report.scores.brier
        if old_report.usable and old_report.scores.brier < report.scores.brier:
            probe, report = old, old_report
        metrics["difficulty/kept_previous"] = float(probe is old)
    probe.save(out)
    for row in report.metrics():
        metrics[row["name"]] = row["value"] if row.get("se") is None else (row["value"], row["se"])
    write_json(out / "report.json", report.to_json())
    write_json(out / "spend.json", spend.to_json())
    write_metrics(out, metrics)


@dataclass(frozen=True, slots=True)
class _Labels:
    """Problems with what they showed: right answers of plain samples, and the policy's states of their prompts."""

    counts: Counts
    states: np.ndarray  # [P, L, 2, H]
    lengths_P: np.ndarray  # prompt tokens

    @property
    def keys(self) -> tuple[str, ...]:
        return self.counts.keys

    @property
    def policy(self) -> str:
        return self.counts.model

    def arrays(self) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        return self.states, self.counts.successes_P, self.counts.totals_P, self.lengths_P


def _draw_labels(context: Context, inputs: Inputs, out: Path) -> Spend:
    """Plain samples of the winner on the fit and validation problems."""
    num, stage = context.config.difficulty.samples, f"difficulty/{context.round}"
    jobs = [pool_job(name, read_problems(inputs["problems"] / f"{name}.jsonl"), num, stage) for name in SETS]
    spend = run_jobs(context, inputs, out, jobs)
    for job in jobs:
        merge_shards(out / job.folder, out / f"{job.folder}.jsonl")
    return spend


def _label(results: Iterable[SearchResult], engine: Any) -> _Labels:
    prompts: dict[str, tuple[int, ...]] = {}

    def noted() -> Iterable[SearchResult]:
        for result in results:
            prompts[result.problem.key] = result.prompt_ids
            yield result

    counts = count_samples(noted())
    prompts_P = [prompts[key] for key in counts.keys]
    return _Labels(counts, engine.hidden_states(prompts_P), np.array([len(p) for p in prompts_P]))
