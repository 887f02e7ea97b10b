"""All strategies by name, and how a user writes one: `beam`, `beam(width=2, max_rounds=20)`, `dvts(vote=majority)`.

To add one: write a coroutine (problem, policy, verifier, budget, *, options) and give it a line in STRATEGIES. Its
keyword-only parameters are its options; their defaults say their types. `vote` is an option of all that vote.
"""

from __future__ import annotations

import contextlib
import difflib
import functools
import inspect
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from search import answers
from search.answers import Rule
from search.errors import ConfigError
from search.run import Plan
from search.strategies.best_of_n import adaptive_best_of_n, adaptive_majority, best_of_n, greedy
from search.strategies.revisions import beam_revisions, revisions, searched_revisions
from search.strategies.sequential import adaptive_budget
from search.strategies.sizes import half_of, num_beams, num_samples
from search.strategies.step_rejection import step_rejection
from search.strategies.trees import beam_search, dvts, lookahead_search, rebase
from search.types import Budget, VerifierFacts

VOTES: dict[str, Rule] = {
    "majority": answers.majority,
    "highest": answers.highest,
    "weighted": answers.weighted,
    "sharpened": functools.partial(answers.weighted, power=4.0),
    "hierarchical": answers.hierarchical,
}


@dataclass(frozen=True, slots=True)
class Entry:
    """A strategy as users can name it. `needs`: "" no verifier, "outcome" any, "process" one that scores steps."""

    function: Callable[..., Any]
    rule: Rule
    needs: str = ""
    pool: str = ""  # the rule of search.evaluate that computes it from a pool of independent samples
    check: Callable[[Budget, Mapping[str, Any]], object] = lambda budget, o: num_samples(budget, o["samples"])


def _believable(budget: Budget, options: Mapping[str, Any]) -> int:
    if options["rate"] > 1:
        raise ConfigError(f"rate = {options['rate']:g} is no chance of a right answer: give at most 1")
    if options["base"] >= 1:
        raise ConfigError(f"base = {options['base']:g} is no mean rate of success: give less than 1")
    return num_samples(budget, options["samples"])


def _beams(budget: Budget, options: Mapping[str, Any]) -> int:
    return num_beams(budget, options["samples"], options["width"], options.get("steps", 0))


async def _optimal(problem: Any, policy: Any, verifier: Any, budget: Budget, *, spread: bool = False) -> Any:
    """Its options. The coroutine that runs is that of the strategy which the table chooses: `search.choosing`."""
    raise _no_table()


def _no_table() -> ConfigError:
    return ConfigError(
        "optimal chooses by the StrategyTable of a champion, and there is none here: run a round with table.enabled = "
        f"true, or name a strategy: {', '.join(name for name in STRATEGIES if name != OPTIMAL)}"
    )


def _refuse(budget: Budget, options: Mapping[str, Any]) -> None:
    raise _no_table()


OPTIMAL = "optimal"  # the compute-optimal choice, per question
STRATEGIES: dict[str, Entry] = {
    "greedy": Entry(greedy, answers.first, check=lambda budget, o: num_samples(budget, 1)),
    "pass": Entry(best_of_n, answers.gold, pool="pass"),
    "majority": Entry(best_of_n, answers.majority, pool="majority"),
    "best_of_n": Entry(best_of_n, answers.highest, "outcome", pool="best_of_n"),
    "best_of_n_weighted": Entry(best_of_n, answers.weighted, "outcome", pool="best_of_n_weighted"),
    "adaptive_majority": Entry(adaptive_majority, answers.majority),
    "adaptive_best_of_n": Entry(adaptive_best_of_n, answers.highest, "outcome"),
    "adaptive_budget": Entry(adaptive_budget, answers.highest, "outcome", check=_believable),
    "adaptive_budget_majority": Entry(adaptive_budget, answers.majority, check=_believable),
    "beam": Entry(beam_search, answers.weighted, "process", check=_beams),
    "lookahead": Entry(lookahead_search, answers.weighted, "process", check=_beams),
    "dvts": Entry(dvts, answers.weighted, "process", check=_beams),
    "rebase": Entry(rebase, answers.weighted, "process"),
    "step_rejection": Entry(step_rejection, answers.weighted, "process"),
    "revisions": Entry(revisions, answers.hierarchical, "outcome"),
    "revisions_majority": Entry(revisions, answers.majority),
    "beam_revisions": Entry(
        beam_revisions,
        answers.hierarchical,
        "process",
        check=lambda budget, o: half_of(budget, o["samples"], o["width"]),
    ),
    "searched_revisions": Entry(searched_revisions, answers.hierarchical, "process", check=_beams),
    OPTIMAL: Entry(_optimal, answers.weighted, check=_refuse),
}

FIT = "fit"  # instead of a threshold: step_rejection(threshold=fit), see search.thresholds
SCORED_VOTES = ("highest", "weighted", "sharpened", "hierarchical")
MAY_BE_ZERO = ("samples", "steps", "ratio", "threshold", "certainty", "max_rounds", "price", "base")
_SPEC = re.compile(r"\s*([a-z_]+)\s*(?:\((.*)\))?\s*", re.DOTALL)


@dataclass(frozen=True, slots=True)
class Spec:
    """One strategy with its options, as the user wrote them. `text` names it in tables: `beam(width=2)`."""

    name: str
    options: Mapping[str, Any]
    vote: str | None = None

    @property
    def entry(self) -> Entry:
        return STRATEGIES[self.name]

    @property
    def text(self) -> str:
        given = [f"{name}={_written(value)}" for name, value in self.options.items()]
        given += [f"vote={self.vote}"] if self.vote else []
        return f"{self.name}({', '.join(given)})" if given else self.name

    @property
    def rule(self) -> Rule:
        return VOTES[self.vote] if self.vote else self.entry.rule

    @property
    def needs(self) -> str:
        """The verifier that the strategy or its vote asks: "" none, "outcome" any, "process" one that scores steps."""
        return self.entry.needs or ("outcome" if self.vote in SCORED_VOTES else "")

    def plan(self, budget: Budget, verifier: VerifierFacts | None = None, *, rule: Rule | None = None) -> Plan:
        """What is run on every problem. Raises BudgetError for a budget that cannot buy one unit of it, ConfigError
        where it needs another verifier."""
        if self.needs and verifier is None:
            raise ConfigError(
                f"{self.text} needs a verifier: set verifier.type, or use one of "
                f"{', '.join(name for name, entry in STRATEGIES.items() if not entry.needs)}"
            )
        if self.needs == "process" and verifier is not None and not verifier.process:
            raise ConfigError(f"{self.name} needs a verifier that scores steps; this one scores finished answers only")
        if self.options.get("threshold") == FIT:
            raise ConfigError(f"{self.text}: the threshold has to be fitted first; give a number, as in threshold=0.5")
        self.entry.check(budget, defaults(self.entry.function) | dict(self.options))
        strategy = functools.partial(self.entry.function, **self.options)
        amount = f"{budget.amount:g}" + ("" if budget.unit == "samples" else f" {budget.unit}")
        return Plan(f"{self.text} @ {amount}", strategy, budget, rule or self.rule, scored=bool(self.needs))


def _written(value: Any) -> str:
    """As a user writes it."""
    return f"{value:g}" if isinstance(value, float) else str(value).lower() if isinstance(value, bool) else str(value)


def parse(text: str) -> Spec:
    """A strategy with options. Raises ConfigError naming what is wrong and what there is."""
    match = _SPEC.fullmatch(text)
    name = match[1] if match else text.strip()
    if match is None or name not in STRATEGIES:
        near = _nearest(name.partition("(")[0].strip().lower(), STRATEGIES)
        raise ConfigError(f"there is no strategy '{text.strip()}': {near}there are {', '.join(STRATEGIES)}")
    allowed = defaults(STRATEGIES[name].function)
    options: dict[str, Any] = {}
    vote = None
    for part in filter(None, (p.strip() for p in (match[2] or "").split(","))):
        option, equals, value = (p.strip() for p in part.partition("="))
        if option == "vote":
            if value not in VOTES:
                raise ConfigError(f"{name}: vote={value} is none of {', '.join(VOTES)}")
            vote = value
        elif not equals or option not in allowed:
            there = [*allowed, "vote"]
            raise ConfigError(f"{name} has no option '{part}': {_nearest(option, there)}it has {', '.join(there)}")
        else:
            options[option] = _value(name, option, value, allowed[option])
    return Spec(name, options, vote)


def parse_list(text: str) -> list[Spec]:
    """Strategies separated by commas; those inside brackets separate options. Raises ConfigError."""
    specs = [parse(part) for part in re.split(r",(?![^(]*\))", text) if part.strip()]
    if not specs:
        raise ConfigError(f"no strategy given: there are {', '.join(STRATEGIES)}")
    return specs


def _nearest(name: str, there: Iterable[str]) -> str:
    near = difflib.get_close_matches(name, list(there), 1)
    return f"did you mean {near[0]}? " if near else ""


def defaults(function: Callable[..., Any]) -> dict[str, Any]:
    """The options of a strategy with their defaults."""
    parameters = inspect.signature(function).parameters.values()
    return {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY}


def _value(name: str, option: str, text: str, default: Any) -> Any:
    if option == "threshold" and text == FIT:
        return FIT
    value = {"true": True, "false": False}.get(text.lower()) if isinstance(default, bool) else None
    if not isinstance(default, bool):
        with contextlib.suppress(ValueError):  # said below, with what is expected
            value = type(default)(text)
    if value is None:
        raise ConfigError(f"{name}: {option}={text} is none; write it like the default, {option}={default}")
    if not (isinstance(default, bool) or value > 0 or (value == 0 and option in MAY_BE_ZERO)):
        least = "0 or more" if option in MAY_BE_ZERO else "more than 0"
        raise ConfigError(f"{name}: {option}={text} means nothing; give {least}")
    return value
