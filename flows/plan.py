"""`ratchet plan`: what the next round would do and cost, from the configuration and what earlier rounds took.

Spends nothing: no model is loaded, nothing is written. Tokens are estimated from the mean length of the answers that
earlier rounds drew, before that from sampling.max_new_tokens.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from configs.schema import Config
from flows.driver import read_metrics, wall_s
from flows.state import Loop, LoopState
from search.errors import DataError
from search.sets import read_outcomes
from search.stats import minimum_detectable_effect
from search.tasks import load_task

ASSUMED_DISCORDANT = 0.2  # before any round was measured: share of gate problems on which two models differ


def make_plan(config: Config, runs_dir: Path) -> dict[str, Any]:
    """Every figure of the plan, JSON-ready. Raises DataError."""
    try:
        loop: Loop | None = Loop.open(runs_dir, config.loop.name)
        state = loop.state if loop else LoopState(config.loop.name, config.task.type)
    except DataError:
        loop, state = None, LoopState(config.loop.name, config.task.type)
    finished = [r for r in state.rounds if r.kind == "round" and r.verdict in ("promoted", "rejected")]
    last = loop.path / finished[-1].folder if loop and finished else None
    samples = _samples(config)
    length = _mean_length(last, config)
    tokens = {stage: round(n * length) for stage, n in samples.items()}
    num_gate = config.gate.problems
    discordant = _discordant(last)
    look = state.look("gate") if config.task.type not in ("countdown", "arithmetic") else 1
    alpha = config.gate.alpha / (look * (look + 1))
    unfinished = loop.unfinished() if loop else None
    return {
        "loop": config.loop.name,
        "round": state.next_round if state.champion else 1,
        "unfinished": unfinished.round if unfinished else None,
        "champion": state.champion.round if state.champion else None,
        "first_trains_base": state.champion is None,
        "problems": _problems(config, loop, state),
        "samples": samples,
        "tokens": tokens,
        "mean_answer_tokens": round(length, 1),
        "flops": _flops(last, tokens),
        "wall_s": sum(wall_s(stage) for stage in last.iterdir() if stage.is_dir()) if last else None,
        "gate": {
            "problems": num_gate,
            "look": look,
            "alpha": alpha,
            "discordant": discordant,
            "minimum_detectable_effect": minimum_detectable_effect(math.sqrt(discordant), num_gate, alpha=alpha),
        },
        "config": config.model_dump(mode="json"),
    }


def _samples(config: Config) -> dict[str, int]:
    gate = config.gate.problems + config.gate.coverage_problems * config.gate.coverage_samples
    test = config.evaluate.test_problems + config.evaluate.pool_problems * config.evaluate.pool_samples
    difficulty = config.difficulty.problems * config.difficulty.samples
    search = config.search.problems * config.search.samples
    return {"baseline": gate, "search": search, "evaluate": gate + test, "difficulty": difficulty}


def _mean_length(last: Path | None, config: Config) -> float:
    spend = _json(last / "search" / "spend.json") if last else {}
    if spend.get("samples"):
        return spend["generated_tokens"] / spend["samples"]
    return float(config.sampling.max_new_tokens)


def _flops(last: Path | None, tokens: dict[str, int]) -> float | None:
    """2 x parameters x generated tokens, with the parameters that the last search counted with."""
    spend = _json(last / "search" / "spend.json") if last else {}
    if not spend.get("generated_tokens"):
        return None
    per_token = spend["flops_actual"] / (spend["generated_tokens"] + spend["prefilled_tokens"])
    return per_token * sum(tokens.values())


def _discordant(last: Path | None) -> float:
    metrics = read_metrics(last / "gate") if last else {}
    if metrics.get("gate/n"):
        return max((metrics["gate/wins"] + metrics["gate/losses"]) / metrics["gate/n"], 1e-3)
    return ASSUMED_DISCORDANT


def _problems(config: Config, loop: Loop | None, state: LoopState) -> dict[str, int | None]:
    """How many training problems there are, were never searched, and were searched but not solved."""
    folders = [loop.path / r.folder / "search" for r in state.rounds if r.kind == "round"] if loop else []
    outcomes = read_outcomes(path / "outcomes.json" for path in folders if (path / "outcomes.json").exists())
    unsolved = sum(outcome.correct == 0 for outcome in outcomes.values())
    task = load_task(config)
    total = None if task.generated else len(task.problems("train"))
    fresh = None if total is None else max(total - len(outcomes), 0)
    return {
        "this_round": min(config.search.problems, total) if total is not None else config.search.problems,
        "training": total,
        "never_searched": fresh,
        "searched": len(outcomes),
        "unsolved": unsolved,
    }


def _json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}


def show(plan: dict[str, Any]) -> None:
    """For people, on stdout."""
    from rich.console import Console
    from rich.table import Table

    from flows.show import count, seconds

    console = Console(soft_wrap=True, highlight=False)
    going = f"goes on with round {plan['unfinished']}" if plan["unfinished"] is not None else f"round {plan['round']}"
    console.print(
        f"loop {plan['loop']}: `ratchet round` {going}"
        + (", after the base model" if plan["first_trains_base"] else "")
    )
    p = plan["problems"]
    left = (
        "drawn fresh each round"
        if p["training"] is None
        else f"{p['never_searched']} of {p['training']} never searched"
    )
    console.print(
        f"problems: {p['this_round']} this round ({left}; {p['searched']} searched so far, {p['unsolved']} unsolved)"
    )
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("stage")
    table.add_column("samples", justify="right")
    table.add_column("tokens, about", justify="right")
    for stage, samples in plan["samples"].items():
        table.add_row(stage, f"{samples:,}", count(plan["tokens"][stage]))
    console.print(table)
    flops = f"{plan['flops']:.2g} FLOPs generating, " if plan["flops"] else ""
    time_text = seconds(plan["wall_s"]) if plan["wall_s"] else "unknown before the first round"
    console.print(f"cost: {flops}{count(sum(plan['tokens'].values()))} tokens; time: {time_text}")
    gate = plan["gate"]
    console.print(
        f"gate: {gate['problems']} problems, look {gate['look']}, alpha {gate['alpha']:.3g}: a gain of "
        f"{100 * gate['minimum_detectable_effect']:.1f} points would be found 4 times in 5"
    )
