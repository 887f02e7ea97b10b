"""Trajectories that teach a policy to revise: a few wrong attempts, then a right answer that is trained on.

Snell et al. 2024, section 6.1 and the appendix on revision finetuning. Attempts are stored independent samples. For
each distinct right answer n is drawn uniformly from 0..4; the last attempt is the wrong sample nearest to it in
character edits, so that the model learns to edit instead of beginning anew, the others are wrong ones at random.

Ours, and not the paper's: in a share of the trajectories (`keep_right`) the last attempts are right already and the
answer repeats them. The paper's contexts hold nothing but wrong answers, and its model turns 38 % of the right ones
into wrong ones. Its default of one half is a choice: shares were not compared at equal training. And several
trajectories may end in one answer (`per_answer`), the next-nearest wrong sample then being the last. Left out: chains
drawn by the policy itself as training data (the paper's appendix P: they hurt).
"""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from configs.schema import Revision
from distill.labels import StepExample
from distill.select import Row, SolutionKey, identity, shows_held_out
from search.policy import steps_of
from search.randomness import key64, rng
from search.revision_figures import chains
from search.types import Candidate, Finish, Grade, Problem, SearchResult

Render = Callable[[Problem, Sequence[str]], Sequence[int]]  # the prompt's ids that show these attempts
FILTERS = ("ungraded", "truncated", "no_answer", "held_out", "solves_held_out", "duplicate", "over_cap")
WRONG_KEPT = 64  # distinct wrong samples kept of one problem: what the paper draws at most


@dataclass(slots=True)
class Samples:
    """The usable samples of one problem."""

    problem: Problem
    right: list[tuple[int, int, Candidate]] = field(default_factory=list)  # heap: (-rank, round, sample)
    wrong: list[tuple[int, str]] = field(default_factory=list)  # heap: (-rank, text)
    seen: set[int] = field(default_factory=set)


@dataclass(frozen=True, slots=True)
class Trajectory:
    """The attempts shown, oldest first, and the answer that is trained on."""

    problem: Problem
    attempts: tuple[str, ...]
    answer: Candidate
    round: int
    solution: str
    number: int  # of those that end in this answer


@dataclass(frozen=True, slots=True)
class Revisions:
    """The rows of a revision model, and where every sample went.

    `counts["candidates"]` is the sum of `counts[f]` over FILTERS, of `counts["right"]` and of `counts["wrong"]`;
    `counts["attempts_n"]` tells how many trajectories show n attempts.
    """

    rows: tuple[Row, ...]
    counts: Mapping[str, int]


def make_rows(
    results: Iterable[tuple[int, SearchResult]],
    config: Revision,
    *,
    render: Render,
    solution_key: SolutionKey,
    seed: int,
    held_out: Callable[[str], bool],
    solved_keys: Callable[[Problem, str], Iterable[str]] | None = None,
) -> Revisions:
    """Training rows from (round, result) pairs, sorted by problem; the loss falls on the right answer alone.

    `held_out(key)` and `solved_keys(problem, text)` keep answers that show a held-out problem's solution out of what
    is trained on; a wrong attempt, on which no loss falls, may show one.
    """
    counts: Counter[str] = Counter(dict.fromkeys(("candidates", *FILTERS, "right", "wrong"), 0))
    pools = gather(results, config, counts, solution_key, seed, held_out, solved_keys)
    rows: list[Row] = []
    for _, samples in sorted(pools.items()):
        for one in trajectories(samples, config, solution_key, seed):
            prompt = tuple(render(one.problem, one.attempts))
            solution = f"{one.solution} ({one.number})" if one.number else one.solution
            rows.append(Row(one.problem.key, prompt, one.answer.ids, "search", one.round, solution))
            counts[f"attempts_{len(one.attempts)}"] += 1
            counts["kept_right"] += one.answer.text in one.attempts
    return Revisions(tuple(rows), dict(counts))


def gather(
    results: Iterable[tuple[int, SearchResult]],
    config: Revision,
    counts: Counter[str],
    solution_key: SolutionKey,
    seed: int,
    held_out: Callable[[str], bool],
    solved_keys: Callable[[Problem, str], Iterable[str]] | None,
) -> dict[str, Samples]:
    """The usable samples of each problem over all results, capped while they stream in; which ones survive the cap
    follows from (seed, problem, text), not from the order."""
    pools: dict[str, Samples] = {}
    for number, result in results:
        problem = result.problem
        samples = pools.setdefault(problem.key, Samples(problem))
        for candidate in result.candidates:
            counts["candidates"] += 1
            why = unusable(candidate)
            if why is None and (held_out(problem.key) or candidate.grade is Grade.CORRECT):
                why = shows_held_out(problem, candidate.text, held_out, solved_keys)
            if why is None and candidate.grade is Grade.CORRECT:
                solution = solution_key(problem, candidate.text)
                rank = -key64(seed, "revision", problem.key, solution)
                entry = (rank, number, candidate)
                why = _keep(samples.right, entry, samples.seen, solution, config.per_problem) or "right"
            elif why is None:
                text = candidate.text.rstrip()
                entry = (-key64(seed, "revision", problem.key, text), text)
                why = _keep(samples.wrong, entry, samples.seen, text, WRONG_KEPT) or "wrong"
            counts[why] += 1
    return pools


def unusable(candidate: Candidate) -> str | None:
    """Why a sample can be neither attempt nor answer; None: it can."""
    if candidate.grade is None or candidate.grade is Grade.UNGRADED:
        return "ungraded"
    if candidate.finish is not Finish.EOS:
        return "truncated"
    return None if candidate.answer is not None else "no_answer"


def _keep(heap: list[tuple], entry: tuple, seen: set[int], name: str, most: int) -> str | None:
    """Put a new sample on a heap whose first entry is the worst; the filter that drops one, or None."""
    if identity("", name) in seen:
        return "duplicate"
    seen.add(identity("", name))
    if len(heap) < most:
        heapq.heappush(heap, entry)
        return None
    heapq.heappushpop(heap, entry)  # one stays, one goes: what was kept is unchanged either way
    return "over_cap"


# ---------------------------------------------------------------- trajectories


def trajectories(samples: Samples, config: Revision, solution_key: SolutionKey, seed: int) -> Iterator[Trajectory]:
    """Those of one problem: a pure function of its samples and the seed."""
    key = samples.problem.key
    wrong = [text for _, text in sorted(samples.wrong, reverse=True)]
    for _, number, answer in sorted(samples.right, key=lambda entry: entry[:2], reverse=True):
        solution = solution_key(samples.problem, answer.text)
        near = sorted(wrong, key=lambda text: edit_distance(text, answer.text))  # equals stay in their random order
        for draw in range(config.per_answer):
            chance = rng(seed, "revision", key, solution, draw)
            num = chance.randint(0, config.max_attempts)
            num_right = chance.randint(1, num) if num and chance.random() < config.keep_right else 0
            num_wrong = min(num - num_right, len(wrong))
            last = near[draw % len(near)] if num_wrong else ""
            others = chance.sample([text for text in wrong if text != last], max(0, num_wrong - 1))
            attempts = (*others, last)[:num_wrong] if num_wrong else ()
            attempts = (*attempts, *[answer.text] * num_right)
            yield Trajectory(samples.problem, attempts, answer, number, solution, draw)


def edit_distance(a: str, b: str) -> int:
    """The least number of characters inserted, deleted or replaced that make `a` into `b`.

    A column of the table at once, its differences being the bits of two whole numbers (Myers 1999, "A fast
    bit-vector algorithm for approximate string matching"; Hyyro 2003 for the distance of whole texts).
    """
    if not a or not b:
        return max(len(a), len(b))
    where: dict[str, int] = {}
    for i, letter in enumerate(a):
        where[letter] = where.get(letter, 0) | 1 << i
    mask, last = (1 << len(a)) - 1, 1 << (len(a) - 1)
    up, down, distance = mask, 0, len(a)  # rows where a column rises, and falls, by one
    for letter in b:
        same = where.get(letter, 0)
        diagonal = (((same & up) + up) ^ up) | same | down
        right_up, right_down = down | ~(diagonal | up) & mask, up & diagonal
        distance += bool(right_up & last) - bool(right_down & last)
        right_up, right_down = (right_up << 1 | 1) & mask, right_down << 1 & mask
        up, down = right_down | ~(diagonal | right_up) & mask, right_up & diagonal
    return distance


# ---------------------------------------------------------------- the verifier of chains


def chain_examples(
    results: Iterable[tuple[int, SearchResult]], render: Render, delimiter: str, *, window: int
) -> Iterator[StepExample]:
    """What a history-aware outcome verifier is trained on: each finished answer of a chain, with the attempts that
    its policy was shown before it; the samples of `revisions(window=window)` as stored.

    Answers that were not graded are left out. Raises ValueError where a candidate's prompt shows other attempts.
    """
    for number, result in results:
        for chain in chains(result):
            for turn, candidate in enumerate(chain):
                if not candidate.complete or candidate.grade not in (Grade.CORRECT, Grade.WRONG):
                    continue
                before = [c.text for c in chain[:turn] if c.complete][-window:]
                attempts = shown(result.problem, candidate, before, render)
                steps = steps_of(candidate, delimiter)
                yield StepExample(
                    problem=result.problem,
                    steps=steps,
                    attempts=attempts,
                    labels=(None,) * len(steps),
                    outcome=candidate.grade is Grade.CORRECT,
                    source="revisions",
                    round=number,
                )


def shown(problem: Problem, candidate: Candidate, before: Sequence[str], render: Render) -> tuple[str, ...]:
    """Those of the attempts `before` it that a candidate's prompt shows: the last ones, as many as its context held.

    Raises ValueError where its prompt is none of these.
    """
    if not candidate.prompt_ids:
        return ()
    for first in range(len(before)):
        if tuple(render(problem, before[first:])) == candidate.prompt_ids:
            return tuple(before[first:])
    raise ValueError(f"problem '{problem.key}': an answer of a chain was shown other attempts than those before it")
