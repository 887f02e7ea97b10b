"""Predicted pass rates of questions, by the predictor of a bundle: what the StrategyTable is asked with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from configs.schema import Config
from difficulty.probe import Probe, estimator
from flows.stages import Context, Inputs, write_json
from search.engines import load_engine
from search.engines.reference import policy_path
from search.prompts import prompt_ids
from search.sets import read_problems
from search.tasks import load_task
from search.types import Engine, Problem

Rates = dict[str, float]


def predict_rates(
    config: Config, inputs: Mapping[str, Path], problems: Sequence[Problem], engine: Engine | None = None
) -> tuple[Rates, str]:
    """Pass rates by key with the policy and the predictor of a stage's inputs; empty, with the reason, where there is
    no usable predictor: all questions are then treated alike. `engine`: one that has the policy loaded.

    Raises ModelError for a folder that holds no predictor, DataError for one of another policy.
    """
    if "difficulty" not in inputs:
        return {}, "there is no difficulty predictor"
    probe = Probe.load(inputs["difficulty"])
    if not probe.usable:
        return {}, f"the difficulty predictor is not usable: {probe.why}"
    task = load_task(config)
    own = engine is None or not engine.capabilities.hidden_states
    states: Any = load_engine(config, policy_path(inputs["policy"]), task, hidden_states=True) if own else engine
    try:
        prompts = [tuple(prompt_ids(task, states.tokenizer, problem)) for problem in problems]
        rates = estimator(probe, lambda _: states.hidden_states(prompts))(problems)
    finally:
        if own:
            states.close()
    return {problem.key: float(rate) for problem, rate in zip(problems, rates, strict=True)}, "predicted"


def rate(context: Context, inputs: Inputs, out: Path) -> None:
    """The stage: rates.json for the problems of an evaluation."""
    problems = read_problems(inputs["problems"] / "problems.jsonl")
    rates, why = predict_rates(context.config, inputs, problems)
    flops = 2.0 * Probe.load(inputs["difficulty"]).model.weight_F.size
    write_json(out / "rates.json", {"rates": rates, "why": why, "flops": flops})
