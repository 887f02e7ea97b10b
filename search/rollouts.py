"""Monte Carlo values of steps: from each step of stored answers, draw answers to the end, and count the right ones.

The labels of Snell et al. 2024 (app. PRM training; Wang et al. 2023, Math-Shepherd): the value of a prefix is the share
of K fresh answers of the policy, continuing the very ids of the prefix, that are right. What a rollout may not judge is
left out of the share: a failed grader or engine; a truncated rollout is wrong.

`first_error` spends them where they tell most (Luo et al. 2024, OmegaPRM, arXiv 2406.06592): in each wrong answer a
binary search finds the first step after which none of K rollouts is right, by probing at most log2(steps) prefixes,
rounded up; right answers need none. With few rollouts a step that is merely hard passes for wrong. Left out: OmegaPRM's
tree, which picks the rollout to bisect next.

Rollouts are a plan like any search's: `search.run.search` and `run_shards` batch, meter, cap, resume and grade them. A
rollout's `path` is (answer, steps kept of it, draw); all that was drawn is its last step.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from search.errors import DataError
from search.policy import Policy, Sampler, Scorer
from search.randomness import key64
from search.run import Plan
from search.types import Budget, Candidate, Finish, Grade, Problem, SearchResult, Task

NAME = "rollouts"
JUDGED = (Finish.EOS, Finish.LENGTH, Finish.OVERFLOW)  # ended by itself or by a limit, not by a fault
Ids = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Rollouts:
    """How steps are valued. Example: Rollouts(16) draws 16 answers from every step but the last, whose end is known."""

    num: int = 16
    first_error: bool = False  # only as many steps as a binary search for the first wrong one needs
    prefixes: int | None = None  # of each problem at most so many steps, drawn at random; None: all

    def __post_init__(self) -> None:
        assert self.num > 0, self.num
        assert not self.first_error or self.prefixes is None, "a binary search chooses its prefixes itself"

    @property
    def text(self) -> str:
        options = ["first_error=true"] if self.first_error else []
        options += [f"prefixes={self.prefixes}"] if self.prefixes is not None else []
        return f"{NAME}({', '.join([str(self.num), *options])})"


@dataclass(frozen=True, slots=True)
class Value:
    """What the rollouts from one prefix came to. Example: Value(("3*5=15\\n",), num_correct=12, num=16)"""

    steps: tuple[str, ...]
    num_correct: int
    num: int

    @property
    def share(self) -> float:
        return self.num_correct / self.num


# ---------------------------------------------------------------- which answers, which steps


def prepare(
    results: Iterable[SearchResult], settings: Rollouts, sampler: Sampler, *, keep_unparsable: bool = False
) -> tuple[list[Problem], Plan]:
    """The problems and the plan that value the steps of these answers: for `search` or `run_shards`.

    A pure function of its arguments; problems come in the order of the results. Answers that a label may not come from
    (`refusal`) are left out, and revisions too, whose prompts show other answers. Raises DataError where no answer
    holds two steps.
    """
    found: dict[str, tuple[Problem, dict[Ids, Candidate]]] = {}
    num_answers = 0
    for result in results:
        _, answers = found.setdefault(result.problem.key, (result.problem, {}))
        for candidate in result.candidates:
            revised = candidate.prompt_ids not in ((), result.prompt_ids)
            if revised or refusal(result, candidate, keep_unparsable=keep_unparsable):
                continue
            num_answers += 1
            begun = split(candidate, sampler.engine.tokenizer, sampler.task.step_delimiter)
            answers.setdefault(begun.ids, replace(begun, prompt_ids=result.prompt_ids))
    stepped = {key: list(answers.values()) for key, (_, answers) in found.items()}
    stepped = {key: answers for key, answers in stepped.items() if any(len(a.step_ends) > 1 for a in answers)}
    if not stepped:
        raise DataError(
            f"none of {num_answers} answers holds the step delimiter {sampler.task.step_delimiter!r} before its end: "
            "there are no steps to draw rollouts from; set the task's step_delimiter to what separates its steps"
        )
    strategy = functools.partial(
        _bisect if settings.first_error else _value_all, answers=stepped, settings=settings, sampler=sampler
    )
    most = settings.num * max(sum(len(answer.step_ends) - 1 for answer in answers) for answers in stepped.values())
    plan = Plan(settings.text, strategy, Budget("samples", most), rule=lambda _: None, scored=False)
    return [found[key][0] for key in stepped], plan


def refusal(result: SearchResult, candidate: Candidate, *, keep_unparsable: bool = False) -> str | None:
    """Why no label may come from this answer; None: it may.

    Snell et al. filter out the answers without a valid final answer; `keep_unparsable` keeps them, as wrong ones.
    """
    if result.failed is not None:
        return "failed"
    if candidate.grade is None or candidate.grade is Grade.UNGRADED:
        return "ungraded"
    if not candidate.complete:
        return "truncated"
    return "no_answer" if candidate.answer is None and not keep_unparsable else None


def split(candidate: Candidate, tokenizer: Any, delimiter: str) -> Candidate:
    """An answer drawn whole, with the steps that searching it step by step would have shown.

    A step ends with the token that completes the delimiter within the step, never inside a token.
    """
    if candidate.step_ends:
        return candidate
    ids, ends = candidate.ids, list[int]()

    def holds(start: int, end: int) -> bool:
        return delimiter in tokenizer.decode(ids[start:end], skip_special_tokens=True)

    start = 0
    while start < len(ids) and holds(start, len(ids)):
        low, high = start, len(ids)  # the delimiter is complete at `high`, not at `low`
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if holds(start, middle) else (middle, high)
        ends.append(high)
        start = high
    if start < len(ids):
        ends.append(len(ids))
    texts = (tokenizer.decode(ids[:end], skip_special_tokens=True) for end in ends)
    return replace(candidate, step_ends=tuple(ends), text_ends=tuple(map(len, texts)))


def _begun(answers: Sequence[Candidate], max_new_tokens: int) -> dict[Ids, Candidate]:
    """Every distinct beginning of the answers that ends with a step and leaves room for more, by its ids."""
    begun: dict[Ids, Candidate] = {}
    for a, answer in enumerate(answers):
        for steps in range(1, len(answer.step_ends)):
            prefix, ends = _prefix(answer, steps), answer.text_ends[:steps]
            if len(prefix) < max_new_tokens and prefix not in begun:
                begun[prefix] = Candidate(
                    ids=prefix,
                    text=answer.text[: ends[-1]],
                    step_ends=answer.step_ends[:steps],
                    text_ends=ends,
                    path=(a, steps),
                    prompt_ids=answer.prompt_ids,
                )
    return begun


def _prefix(answer: Candidate, steps: int) -> Ids:
    return answer.ids[: answer.step_ends[steps - 1]]


# ---------------------------------------------------------------- strategies


async def _value_all(
    problem: Problem,
    policy: Policy,
    verifier: Scorer | None,
    budget: Budget,
    *,
    answers: Mapping[str, Sequence[Candidate]],
    settings: Rollouts,
    sampler: Sampler,
) -> list[Candidate]:
    """`num` rollouts from each distinct beginning, or from some of them drawn at random."""
    begun = list(_begun(answers[problem.key], sampler.max_new_tokens).values())
    if settings.prefixes is not None:
        ranked = sorted(begun, key=lambda c: key64(*sampler.seed, problem.key, NAME, *c.ids))
        begun = ranked[: settings.prefixes]
    return await _roll_out(policy, begun, settings.num)


async def _bisect(
    problem: Problem,
    policy: Policy,
    verifier: Scorer | None,
    budget: Budget,
    *,
    answers: Mapping[str, Sequence[Candidate]],
    settings: Rollouts,
    sampler: Sampler,
) -> list[Candidate]:
    """Binary search for the first wrong step of every wrong answer, side by side; equal prefixes are probed once."""
    given = answers[problem.key]
    begun = _begun(given, sampler.max_new_tokens)
    values: dict[Ids, float | None] = {}
    for answer in given:  # a right answer proves that each of its steps can be followed by a right end
        if answer.grade is Grade.CORRECT:
            values |= {_prefix(answer, steps): 1.0 for steps in range(1, len(answer.step_ends))}
    wrong = [answer for answer in given if answer.grade is Grade.WRONG]
    drawn: list[Candidate] = []
    while True:
        probes = dict.fromkeys(probe for answer in wrong if (probe := _next_probe(answer, values)) in begun)
        if not probes:
            return drawn
        rolled = await _roll_out(policy, [begun[probe] for probe in probes], settings.num)
        drawn += rolled
        graded = _judge(sampler.task, problem, rolled)
        for n, probe in enumerate(probes):
            verdicts = [v for v in graded[n * settings.num : (n + 1) * settings.num] if v is not None]
            values[probe] = sum(verdicts) / len(verdicts) if verdicts else None


def _next_probe(answer: Candidate, values: Mapping[Ids, float | None]) -> Ids:
    """The prefix half-way between the last step known to be good and the first known to be bad; () where it is found,
    or where the rollouts from there gave no verdict."""
    low, high = 0, len(answer.step_ends)
    for steps in range(1, high):
        if (value := values.get(_prefix(answer, steps))) is not None and value > 0:
            low = steps
    high = next((s for s in range(low + 1, high) if values.get(_prefix(answer, s)) == 0), high)
    if high - low <= 1:
        return ()
    probe = _prefix(answer, (low + high) // 2)
    return () if probe in values else probe


async def _roll_out(policy: Policy, begun: Sequence[Candidate], num: int) -> list[Candidate]:
    """`num` answers from each beginning, in its order; what was drawn is their last step, however long."""
    own = [c if c.prompt_ids != policy.prompt_ids else replace(c, prompt_ids=()) for c in begun]
    ended = await policy.finish([copy for candidate in own for copy in policy.resume(candidate, num, stream=NAME)])
    starts = (candidate for candidate in own for _ in range(num))
    return [
        replace(c, step_ends=(*b.step_ends, len(c.ids)), text_ends=(*b.text_ends, len(c.text)))
        for b, c in zip(starts, ended, strict=True)
    ]


def _judge(task: Task, problem: Problem, rolled: Sequence[Candidate]) -> list[bool | None]:
    """Whether each rollout is right; None: no verdict."""
    verdicts = iter(task.grade([(problem, c.text) for c in rolled if c.complete]))
    return [_right(next(verdicts).grade if c.complete else Grade.WRONG) if c.finish in JUDGED else None for c in rolled]


def _right(grade: Grade | None) -> bool | None:
    return None if grade is None or grade is Grade.UNGRADED else grade is Grade.CORRECT


# ---------------------------------------------------------------- what came out


def values(result: SearchResult) -> list[Value]:
    """The value of each prefix that a result of a `prepare`d plan drew rollouts from, in the order drawn.

    One on which no rollout has a verdict is left out.
    """
    counts: dict[tuple[str, ...], tuple[int, int]] = {}
    for steps, right in _outcomes(result):
        num_correct, num = counts.get(steps, (0, 0))
        counts[steps] = (num_correct + right, num + 1)
    return [Value(steps, num_correct, num) for steps, (num_correct, num) in counts.items()]


def _outcomes(result: SearchResult) -> Iterator[tuple[tuple[str, ...], bool]]:
    for candidate in result.candidates:
        right = _right(candidate.grade) if candidate.finish in JUDGED else None
        if right is not None:
            yield candidate.steps[:-1], right


def is_rollouts(result: SearchResult) -> bool:
    return result.strategy.startswith(NAME)


def finds_first_error(result: SearchResult) -> bool:
    """Whether its prefixes were those of a binary search: what follows a worthless one is worthless too."""
    return is_rollouts(result) and "first_error=true" in result.strategy
