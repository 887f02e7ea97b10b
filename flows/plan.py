"""`ratchet plan`: what the next round would do and cost, from the configuration and what earlier rounds took.

Spends nothing: no model is loaded, nothing is sampled, the loop's folder stays as it is. The problems are drawn as the
round would draw them, so their numbers are exact (a leak check of a large file takes seconds). Tokens are estimated
from the mean length of the answers that earlier rounds drew, before that from sampling.max_new_tokens.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from configs.schema import Config
from flows.driver import gate_set, read_metrics, wall_s
from flows.folders import read_json
from flows.searching import check, named, uses_verifier, verifier_facts
from flows.stages import overlapping
from flows.state import Loop, LoopState
from flows.tables import measurable
from search.errors import DataError
from search.sets import Outcome, draw_sets, read_outcomes, take_slice, without_alike
from search.stats import minimum_detectable_effect
from search.tasks import load_problems, load_task
from search.types import Problem, Task

ASSUMED_DISCORDANT = 0.2  # before any round was measured: share of gate problems on which two models differ


def make_plan(config: Config, runs_dir: Path) -> dict[str, Any]:
    """Every figure of the plan, JSON-ready. Raises DataError, and ConfigError for a search that a round refuses."""
    check(config)
    try:
        loop: Loop | None = Loop.open(runs_dir, config.loop.name)
        state = loop.state
    except DataError:
        loop, state = None, LoopState(config.loop.name, config.task.type)
    round_number = state.next_round if state.champion else 1
    unfinished = loop.unfinished() if loop else None
    finished = [r for r in state.rounds if r.kind == "round" and r.verdict in ("promoted", "rejected")]
    last = loop.path / finished[-1].folder if loop and finished else None
    sizes, problems = _problems(config, loop, round_number)
    samples = _samples(config, sizes)
    length = _mean_length(last, config)
    tokens = {stage: round(n * length) for stage, n in samples.items()}
    num_gate = sizes["gate"]
    discordant = _discordant(last)
    look = state.look(gate_set(config, round_number))
    alpha = config.gate.alpha / (look * (look + 1))
    return {
        "loop": config.loop.name,
        "round": round_number,
        "unfinished": unfinished.round if unfinished else None,
        "champion": state.champion.round if state.champion else None,
        "first_trains_base": state.champion is None,
        "problems": problems,
        "search": named(config),
        "samples": samples,
        "tokens": tokens,
        "mean_answer_tokens": round(length, 1),
        "flops": _flops(last, tokens, samples["search"] if uses_verifier(config) else 0),
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


def _samples(config: Config, sizes: Mapping[str, int]) -> dict[str, int]:
    """Samples of each stage, from the sizes of the round's sets."""
    gate = sizes["gate"] + min(config.gate.coverage_problems, sizes["gate"]) * config.gate.coverage_samples
    gate += sizes["guards"]
    test = sizes["test"] + min(config.evaluate.pool_problems, sizes["test"]) * config.evaluate.pool_samples
    difficulty = (sizes["fit"] + sizes["validation"]) * config.difficulty.samples
    search = sizes["search"] * config.search.samples
    samples = {"baseline": gate, "search": search, "evaluate": gate + test, "difficulty": difficulty}
    if config.verifier.type == "trained" and config.answer_labels:
        samples["verifier"] = min(config.verifier.problems, sizes["labels"]) * config.verifier.samples
    if config.table.enabled:
        searched = [b.amount for spec, b in measurable(config, verifier_facts(config)) if not spec.entry.pool]
        samples["table"] = min(config.table.problems, sizes["validation"]) * int(sum(searched))
    if config.revision.enabled:
        samples["reviser"] = min(config.revision.problems, sizes["labels"]) * config.revision.samples
    return samples


def _mean_length(last: Path | None, config: Config) -> float:
    spend = read_json(last / "search" / "spend.json") if last else {}
    if spend.get("samples"):
        return spend["generated_tokens"] / spend["samples"]
    return float(config.sampling.max_new_tokens)


def _flops(last: Path | None, tokens: dict[str, int], num_verified: int) -> float | None:
    """2 x parameters x generated tokens, with the parameters that the last search counted with, and for each of
    `num_verified` samples what its verifier took of one."""
    spend = read_json(last / "search" / "spend.json") if last else {}
    if not spend.get("generated_tokens"):
        return None
    verifier = spend.get("verifier_flops_actual", 0.0)
    per_token = (spend["flops_actual"] - verifier) / (spend["generated_tokens"] + spend["prefilled_tokens"])
    return per_token * sum(tokens.values()) + verifier / spend["samples"] * num_verified


def _discordant(last: Path | None) -> float:
    metrics = read_metrics(last / "gate") if last else {}
    if metrics.get("gate/n"):
        return max((metrics["gate/wins"] + metrics["gate/losses"]) / metrics["gate/n"], 1e-3)
    return ASSUMED_DISCORDANT


def _problems(config: Config, loop: Loop | None, round_number: int) -> tuple[dict[str, int], dict[str, int | None]]:
    """Sizes of the round's sets ("guards": of all guard sets), and how far the training problems have come."""
    folders = [loop.path / r.folder / "search" for r in loop.state.rounds if r.kind == "round"] if loop else []
    outcomes = read_outcomes(path / "outcomes.json" for path in folders if (path / "outcomes.json").exists())
    frozen = loop.path / "round-000" / "problems" if loop else None
    task = load_task(config)
    sets, training = _draw(task, config, round_number, frozen if frozen and frozen.is_dir() else None, outcomes)
    sizes = {name: len(problems) for name, problems in sets.items()}
    if loop:  # an unfinished round has drawn its problems
        sizes |= read_json(loop.path / f"round-{round_number:03d}" / "problems" / "counts.json")
    sizes["guards"] = sum(len(load_problems(task, guard.path)) for guard in config.gate.guards)
    return sizes, {
        "this_round": sizes["search"],
        "recycled": sum(p.key in outcomes for p in sets["search"]),
        "training": None if training is None else len(training),
        "never_searched": None if training is None else sum(p.key not in outcomes for p in training),
        "searched": len(outcomes),
        "unsolved": sum(outcome.correct == 0 for outcome in outcomes.values()),
    }


def _draw(
    task: Task, config: Config, round_number: int, frozen: Path | None, outcomes: Mapping[str, Outcome]
) -> tuple[dict[str, list[Problem]], list[Problem] | None]:
    """The sets that the round would draw and, of a file, every problem that it could train on."""
    guards = [problem for guard in config.gate.guards for problem in load_problems(task, guard.path)]
    if task.generated:
        return draw_sets(task, config, round_number, frozen, outcomes, guards=guards), None
    unlimited = config.search.model_copy(update={"problems": sys.maxsize})
    whole = config.model_copy(update={"search": unlimited})
    sets = draw_sets(task, whole, round_number, frozen, {}, overlapping, guards)
    training = sets["search"]
    if frozen is None:  # round 0 will hold these out, and searches nothing itself
        training, _ = without_alike(task.problems("train"), sets, guards, overlapping)
    return sets | {"search": take_slice(training, config.search.problems, outcomes)}, training


def _left(problems: Mapping[str, int | None]) -> str:
    """Where a round's training problems come from."""
    if not problems["this_round"]:
        return "nothing new and nothing unsolved"
    again = f", {problems['recycled']} of these again" if problems["recycled"] else ""
    if problems["training"] is not None:
        return f"{problems['never_searched']} of {problems['training']} never searched{again}"
    return f"no more new ones exist{again}" if again else "drawn fresh each round"


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
    so_far = f"{p['searched']} searched so far, {p['unsolved']} unsolved"
    console.print(f"problems: {p['this_round']} this round ({_left(p)}; {so_far})")
    console.print(f"search: {plan['search']}", markup=False)
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
