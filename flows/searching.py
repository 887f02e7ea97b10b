"""The search of a round: a few plain samples of every problem, then the configured strategy with what is left.

Only the plain ones make difficulty labels, so they come first among a problem's candidates. Best-of-N is nothing but
plain samples: one pool. Answers are chosen by the gold answer where there is one. The search of a control round draws
plain samples alone, for as many FLOPs as the round spent on each problem, its verifier included.

`optimal` lets the champion's StrategyTable choose for each problem, so that all together cost as many FLOPs as the
plain samples of best-of-N would: where more training data is to be found for a FLOP, more is spent.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from configs.schema import Config
from flows.stages import Context, Inputs, Job, run_jobs, write_json, write_metrics
from flows.tables import load_tables, measurable
from search import answers
from search.answers import Rule
from search.choosing import arm_flops, choose_together
from search.errors import BudgetError, ConfigError
from search.policy import Policy, Scorer, Waiting
from search.results import read_results
from search.run import Plan, Plans
from search.sets import read_problems
from search.strategies import OPTIMAL, Spec, parse
from search.strategies.sizes import num_samples
from search.types import Budget, Candidate, Grade, Problem, Spend, VerifierFacts

Searching = Coroutine[Waiting, None, list[Candidate]]

# ---------------------------------------------------------------- what is run


def check(config: Config) -> None:
    """Can a round be run with this search? Raises ConfigError, BudgetError (both exit with 2)."""
    if uses_table(config):
        _beside_plain(config, parse(config.search.strategy))
        if not config.table.enabled:
            raise ConfigError("search.strategy = 'optimal' asks the StrategyTable: set table.enabled = true")
        if "pass" not in [parse(text).text for text in config.table.strategies] or len({*config.table.budgets}) < 2:
            raise ConfigError(
                "search.strategy = 'optimal' spends what plain samples would cost: table.strategies needs pass, and "
                "table.budgets two of them"
            )
    else:
        round_plan(config)
    if config.table.enabled:
        measurable(config, verifier_facts(config))
    if config.engine.type == "server":
        raise ConfigError(
            "engine.type = 'server' serves one policy, and a round makes new ones: run rounds on engine.type = "
            "'transformers' or 'vllm'; `ratchet eval` and `ratchet solve` work with a server"
        )


def named(config: Config) -> str:
    """What a round runs, in a few words. Raises ConfigError, BudgetError."""
    if uses_table(config):
        left = _beside_plain(config, parse(config.search.strategy))
        return f"plain({config.search.probe_samples}) + the table's choice for the FLOPs of {left} samples"
    return round_plan(config).name


def round_plan(config: Config) -> Plan:
    """What a round runs on each of its problems. Raises ConfigError, BudgetError."""
    settings, spec = config.search, parse(config.search.strategy)
    budget = Budget("samples", settings.samples)
    if spec.entry.pool:
        return _pool_plan(config, spec, budget)
    left = _beside_plain(config, spec)
    try:
        inner = spec.plan(replace(budget, amount=left), verifier_facts(config))
    except BudgetError as error:
        raise BudgetError(
            f"search.strategy = '{spec.text}' has {left} of search.samples = {settings.samples}, "
            f"search.probe_samples = {settings.probe_samples} being plain ones: {error}"
        ) from error
    return _after_plain(config, inner)


def _beside_plain(config: Config, spec: Spec) -> int:
    """Samples that a strategy has beside the plain ones. Raises BudgetError."""
    settings = config.search
    left = settings.samples - settings.probe_samples
    if left < 1:
        raise BudgetError(
            f"search.samples = {settings.samples} leaves search.strategy = '{spec.text}' nothing beside "
            f"search.probe_samples = {settings.probe_samples}: raise search.samples"
        )
    return left


def _after_plain(config: Config, inner: Plan) -> Plan:
    num = config.search.probe_samples
    strategy = functools.partial(_probed, num_plain=num, strategy=inner.strategy)
    budget = Budget("samples", num + inner.budget.amount)
    return Plan(f"plain({num}) + {inner.name}", strategy, budget, gold_or(inner.rule), inner.scored)


def _pool_plan(config: Config, spec: Spec, budget: Budget) -> Plan:
    """Independent samples, the plain ones being the first of them. Best-of-N takes gold answers for a verifier."""
    num = num_samples(budget, spec.options.get("samples", 0))
    if num < config.search.probe_samples:
        raise BudgetError(
            f"search.strategy = '{spec.text}' draws fewer than search.probe_samples = {config.search.probe_samples}"
        )
    rule = spec.rule
    if _takes_gold(spec):
        rule = answers.majority
    else:
        spec.plan(budget, verifier_facts(config))  # raises where it needs a verifier
    name = f"{spec.name}({num})"
    return Plan(name, _strategy(spec), Budget("samples", num), gold_or(rule), _asks(spec))


def _strategy(spec: Spec) -> Any:
    return functools.partial(spec.entry.function, **spec.options)


def verifier_facts(config: Config) -> VerifierFacts | None:
    """What is known of the verifier before it is loaded: whether there is one, and whether it scores steps."""
    settings = config.verifier
    return None if settings.type == "none" else VerifierFacts("", 0, process=settings.scores_steps)


def uses_verifier(config: Config) -> bool:
    """Whether the round's strategy is given the configured verifier."""
    return (_asks(parse(config.search.strategy)) or uses_table(config)) and config.verifier.type != "none"


def uses_table(config: Config) -> bool:
    """Whether the champion's StrategyTable chooses the round's strategies."""
    return parse(config.search.strategy).name == OPTIMAL


def _asks(spec: Spec) -> bool:
    return bool(spec.needs) and not _takes_gold(spec)


def _takes_gold(spec: Spec) -> bool:
    """Plain best-of-N chooses by the gold answers in a round: scores would only cost."""
    return spec.name == "best_of_n" and not spec.vote


def is_plain(strategy: str, verifier: str) -> bool:
    """Does a search of this kind draw independent samples and nothing else, at no other cost?"""
    spec = parse(strategy)
    return bool(spec.entry.pool) and (not _asks(spec) or verifier == "none")


def gold_or(rule: Rule) -> Rule:
    """Choose by the gold answer where the candidates were graded by one, else by `rule`."""

    def choose(candidates: Sequence[Candidate]) -> int | None:
        graded = any(c.grade is not None for c in candidates)
        return answers.gold(candidates) if graded else rule(candidates)

    return choose


async def _probed(
    problem: Problem,
    policy: Policy,
    verifier: Scorer | None,
    budget: Budget,
    *,
    num_plain: int,
    strategy: Callable[..., Searching],
) -> list[Candidate]:
    plain = await policy.sample(num_plain)
    policy.keep(plain, for_good=True)  # they come first, too, where the strategy fails in the middle
    rest = replace(budget, amount=budget.amount - num_plain)
    return plain + await strategy(problem, policy, verifier, rest)


# ---------------------------------------------------------------- the stage


def search(context: Context, inputs: Inputs, out: Path) -> None:
    """Spend test-time compute on the round's training problems; the first samples of each are plain ones."""
    if context.control == "random":
        _search_plainly(context, inputs, out)
        return
    config = context.config
    untabled = uses_table(config) and "table" not in inputs
    unverified = uses_verifier(config) and config.verifier.type == "trained" and "verifier" not in inputs
    if untabled or unverified:  # the champion has none that is usable: the round goes on without
        config = config.model_copy(update={"search": config.search.model_copy(update={"strategy": "best_of_n"})})
    problems = read_problems(inputs["problems"] / "search.jsonl")
    figures: dict[str, int] = {"unverified": int(unverified)} | ({"untabled": 1} if untabled else {})
    if uses_table(config):
        plan, figures["predicted"] = _chosen(config, inputs, problems, out)
    else:
        plan = round_plan(config)
    job = Job(
        folder="",
        plan=plan,
        problems=problems,
        stage=f"search/{context.round}",
        split="train",
        shard_problems=config.search.shard_problems,
        verified=uses_verifier(config),
        stepwise=not parse(config.search.strategy).entry.pool,
        max_tokens=config.search.max_tokens,
        expected_samples=config.search.samples,
    )
    spend = run_jobs(context, inputs, out, [job])
    outcomes: dict[str, tuple[int, int]] = {}
    num_failed = 0
    for result in read_results(out):
        correct = 0 if result.failed else sum(c.grade is Grade.CORRECT for c in result.candidates)
        outcomes[result.problem.key] = (correct, len(result.candidates))
        num_failed += result.failed is not None
    write_json(out / "outcomes.json", outcomes)
    figures |= {"failed": num_failed, "unfinished": len(problems) - len(outcomes)}
    _write_figures(out, spend, outcomes, figures)


def _chosen(config: Config, inputs: Inputs, problems: Sequence[Problem], out: Path) -> tuple[Plans, int]:
    """What the table of the champion chooses for each problem, at the FLOPs of best-of-N, and of how many problems the
    difficulty is known. chosen.json says what."""
    from flows.rating import predict_rates

    table = load_tables(inputs["table"])["rows"]
    left = _beside_plain(config, parse(config.search.strategy))
    found = predict_rates(config, inputs, problems)
    each = arm_flops(table, "pass", left)
    chooser = choose_together(table, found.rates, each, verifier_facts(config))
    chosen = {
        "difficulty": found.why,
        "predicted": len(found.rates),
        "mean_flops": each,
        "strategies": chooser.counts(problems),
    }
    write_json(out / "chosen.json", chosen)
    return lambda problem: _after_plain(config, chooser(problem)), len(found.rates)


def _write_figures(
    out: Path, spend: Spend, outcomes: Mapping[str, tuple[int, int]], more: Mapping[str, int] | None = None
) -> None:
    write_json(out / "spend.json", spend.to_json())
    solved = sum(correct > 0 for correct, _ in outcomes.values())
    figures = {"problems": len(outcomes), "solved": solved, **(more or {})}
    write_metrics(out, {f"search/{name}": float(value) for name, value in figures.items()})


# ---------------------------------------------------------------- control


def _search_plainly(context: Context, inputs: Inputs, out: Path) -> None:
    """Control `random`: plain samples of the problems of every round given, with the policy that it searched with.

    For round 2: inputs problems@002, policy@002 and search@002, the search it is compared with; results in round-002.
    """
    numbers = sorted(int(name.partition("@")[2]) for name in inputs if name.startswith("search@"))
    spend, outcomes = Spend(), dict[str, tuple[int, int]]()
    for done, number in enumerate(numbers):

        def progress(part: float, total: float, before: int = done, **info: Any) -> None:
            context.progress(before + part / max(total, 1), len(numbers), **info)

        job = _plain_job(context.config, inputs, number)
        policy = {"policy": inputs[f"policy@{number:03d}"]}
        spend += run_jobs(replace(context, progress=progress), policy, out, [job])
        for result in read_results(out / job.folder):
            correct = sum(c.grade is Grade.CORRECT for c in result.candidates)
            outcomes[f"{number}/{result.problem.key}"] = (correct, len(result.candidates))
    _write_figures(out, spend, outcomes)


def _plain_job(config: Config, inputs: Inputs, number: int) -> Job:
    flops = {r.problem.key: r.spend.flops_ideal for r in read_results(inputs[f"search@{number:03d}"])}
    problems = read_problems(inputs[f"problems@{number:03d}"] / "search.jsonl")
    strategy = functools.partial(equal_flops, first=config.search.probe_samples, flops=flops)
    return Job(
        folder=f"round-{number:03d}",
        plan=Plan("plain", strategy, Budget("samples", math.inf), answers.gold),
        problems=[problem for problem in problems if problem.key in flops],
        stage=f"search/{number}",
        split="train",
        shard_problems=config.search.shard_problems,
        expected_samples=config.search.samples,
    )


async def equal_flops(
    problem: Problem,
    policy: Policy,
    verifier: Scorer | None,
    budget: Budget,
    *,
    first: int,
    flops: Mapping[str, float],
) -> list[Candidate]:
    """Independent samples until the ideal FLOPs of this problem's search are spent, to the nearest sample."""
    drawn: list[Candidate] = []
    num = first if flops[problem.key] > 0 else 0
    while num > 0:
        drawn += await policy.sample(num)
        spend = policy.spend
        share = spend.generated_tokens / (spend.generated_tokens + len(policy.prompt_ids))  # the prompt counts once
        each = spend.flops_ideal * share / len(drawn)
        left = (flops[problem.key] - spend.flops_ideal) / each if each else 0.0
        num = max(1, math.floor(left / 2)) if left >= 0.5 else 0  # one by one at the end: a batch may cost too much
    return drawn
