"""Which split a problem belongs to: a pure function of its key, so it never changes as data grows.

The hash knows neither the loop nor its seed: two loops with equal shares hold out the same problems.
"""

from __future__ import annotations

from collections.abc import Iterable

from configs.schema import Splits
from search.errors import DataError
from search.randomness import key64
from search.types import SPLITS, Problem, Split

MAX_REPEATS = 20_000  # draws in a row without a new problem: the space is taken for exhausted


class Exhausted(DataError):
    """Fewer problems exist than were asked for; `found` holds those that do."""

    found: tuple[Problem, ...] = ()


def split_of(key: str, splits: Splits) -> Split:
    """The split of a problem key. Example: split_of("3,5,7>22", Splits()) == "train" """
    position = key64("split", key) / 2**64
    # The shares add up to one only within rounding: the last split that has a share takes the sliver.
    edge = 0.0
    last: Split = "train"
    for name in SPLITS:
        share = getattr(splits, name)
        edge += share
        last = name if share > 0 else last
        if position < edge:
            return name
    return last


def take_distinct(problems: Iterable[Problem], num: int, *, split: Split, exclude: frozenset[str]) -> list[Problem]:
    """The first `num` distinct problems of an endless stream that are not in `exclude`.

    The stream holds problems of `split` only. Raises Exhausted, saying how many there are, once the stream has
    repeated itself for long.
    """
    found: dict[str, Problem] = {}
    skipped: set[str] = set()
    repeats = 0
    if num <= 0:
        return []
    for problem in problems:
        if problem.key in found or problem.key in skipped:
            repeats += 1
            if repeats >= MAX_REPEATS:
                break
            continue
        repeats = 0
        if problem.key in exclude:
            skipped.add(problem.key)
            continue
        found[problem.key] = problem
        if len(found) == num:
            return list(found.values())
    error = Exhausted(
        f"{num} new problems of the {split} split were asked for, but only {len(found)} exist besides "
        f"{len(skipped)} already used: ask for fewer, widen the task's ranges or raise splits.{split}"
    )
    error.found = tuple(found.values())
    raise error
