"""Predicted pass rates of questions, by the predictor of a bundle: what the StrategyTable is asked with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from configs.schema import Config
from difficulty.predictor import estimator, load
from difficulty.prompts import Prompts
from difficulty.report import check_rates
from flows.stages import Context, Inputs, write_json
from search.engines import load_engine
from search.engines.reference import policy_path
from search.prompts import prompt_ids
from search.sets import read_problems
from search.tasks import load_task
from search.types import Engine, Problem

Rates = dict[str, float]


@dataclass(frozen=True, slots=True)
class Predicted:
    """Pass rates by key; none, with the reason, where there is no usable predictor: all questions are then alike.

    `flops`: what one prediction costs beside the prompt's prefill, which the search needs anyway.
    """

    rates: Rates
    why: str = "predicted"
    flops: float = 0.0


def predict_rates(
    config: Config, inputs: Mapping[str, Path], problems: Sequence[Problem], engine: Engine | None = None
) -> Predicted:
    """With the policy and the predictor of a stage's inputs. `engine`: one that has the policy loaded.

    Raises ModelError for a folder that holds no predictor, DataError for one of another policy.
    """
    if "difficulty" not in inputs:
        return Predicted({}, "there is no difficulty predictor")
    predictor = load(inputs["difficulty"])
    if not predictor.usable:
        return Predicted({}, f"the difficulty predictor is not usable: {predictor.why}")
    task, policy = load_task(config), policy_path(inputs["policy"])
    own = engine is None or not engine.capabilities.hidden_states
    shown: Any = load_engine(config, policy, task, hidden_states=True) if own else engine

    try:
        ids_P = [tuple(prompt_ids(task, shown.tokenizer, problem)) for problem in problems]
        prompts = Prompts(ids_P, shown, policy=policy, model=config.model)
        rates = estimator(predictor, lambda _: prompts)(problems)
    finally:
        if own:
            shown.close()
    differ, why = check_rates(np.array(rates, dtype=np.float64))
    if not differ:
        return Predicted({}, f"the difficulty predictor cannot tell these questions apart: {why}")
    flops = sum(predictor.flops(len(ids)) for ids in ids_P) / max(1, len(ids_P))
    return Predicted({problem.key: float(rate) for problem, rate in zip(problems, rates, strict=True)}, flops=flops)


def rate(context: Context, inputs: Inputs, out: Path) -> None:
    """The stage: rates.json for the problems of an evaluation."""
    problems = read_problems(inputs["problems"] / "problems.jsonl")
    write_json(out / "rates.json", asdict(predict_rates(context.config, inputs, problems)))
