"""What the stored answers of a round show, problem by problem: gains by difficulty, what is left, solved and lost.

Difficulty bins are fixed in round 0: quantiles of the base model's pass rate on the test problems that were sampled.
The base's samples with even index decide the bin, those with odd index measure every model, so no bin flatters or
punishes the base by the luck that put a problem there. (Samples of one index share their random draws between rounds;
measuring with the other half keeps that out, too.)
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from flows.history import History, ModelRef, Round, greedy_outcomes, shard_files
from flows.show import harmless
from search import evaluate, stats
from search.results import read_results
from search.stats import Estimate
from search.types import SearchResult

NUM_BINS = 5
EXAMPLES = 4
_LONGEST = 700  # characters of an example's answer


@dataclass(frozen=True, slots=True)
class Left:
    """Problems of a bin after the round, by what solves them. Shares of `num`."""

    greedy: float  # the champion's one greedy answer
    searched: float  # not that, but at least one of its samples
    unsolved: float


@dataclass(frozen=True, slots=True)
class BinRow:
    """One difficulty bin, 1 = easiest. pass@1 of the base, the champion before, the challenger."""

    bin: int
    low: float  # the base's pass rates in the bin
    high: float
    num: int  # problems
    base: Estimate
    before: Estimate
    after: Estimate | None
    left: Left | None  # None: the champion has no stored samples


@dataclass(frozen=True, slots=True)
class Example:
    """A problem whose greedy answer became right or wrong. All text is the model's or the user's: escape it."""

    question: str
    gold: str | None
    before: str
    after: str


@dataclass(frozen=True, slots=True)
class Findings:
    """Empty where the stored answers are not there (yet)."""

    bins: tuple[BinRow, ...] = ()
    samples: int = 0  # of a pool: what "searched" in Left had
    num_solved: int = 0  # greedy answers that became right
    num_lost: int = 0  # ... that became wrong
    solved: tuple[Example, ...] = ()
    lost: tuple[Example, ...] = ()


def find(history: History, round_: Round) -> Findings:
    """Reads the stored answers of base, champion before and challenger. Seconds for large pools."""
    rows, samples = difficulty_bins(history, round_)
    if round_.before is None or round_.challenger is None:
        return Findings(bins=tuple(rows), samples=samples)
    old, new = greedy_outcomes(round_.before.folder), greedy_outcomes(round_.folder)
    shared = [key for key in old if key in new]
    solved = [key for key in shared if new[key] > old[key]]
    lost = [key for key in shared if new[key] < old[key]]
    wanted = {*solved[:EXAMPLES], *lost[:EXAMPLES]}
    pairs = _answers(round_.before.folder, wanted), _answers(round_.folder, wanted)
    return Findings(
        bins=tuple(rows),
        samples=samples,
        num_solved=len(solved),
        num_lost=len(lost),
        solved=tuple(_example(key, *pairs) for key in solved[:EXAMPLES]),
        lost=tuple(_example(key, *pairs) for key in lost[:EXAMPLES]),
    )


# ---------------------------------------------------------------- bins


def difficulty_bins(history: History, round_: Round) -> tuple[list[BinRow], int]:
    """The bins, easiest first, and the number of samples in a pool. Empty without the pools of round 0."""
    base = _read_pools(history.base.folder)
    if not base:
        return [], 0
    before = _read_pools(round_.before.folder) if round_.before else base
    after = _read_pools(round_.folder) if round_.number else {}
    champion = round_.champion or ModelRef("", None, round_.folder)
    kept = _read_pools(champion.folder)
    greedy = greedy_outcomes(champion.folder)
    keys = [key for key in base if key in before and (not after or key in after)]
    rates = np.array([np.mean(base[key][0::2]) for key in keys])
    if not keys:
        return [], 0
    index = stats.assign_bins(rates, stats.quantile_edges(rates, NUM_BINS))
    rows = [
        BinRow(
            bin=place,
            low=float(rates[index == number].min()),
            high=float(rates[index == number].max()),
            num=int((index == number).sum()),
            base=_pass_at_1(base, members),
            before=_pass_at_1(before, members),
            after=_pass_at_1(after, members) if after else None,
            left=_left(kept, greedy, members),
        )
        for place, number in enumerate(np.unique(index), 1)
        if (members := [key for key, i in zip(keys, index, strict=True) if i == number])
    ]
    return rows, max(len(correct) for correct in base.values())


def _read_pools(folder: Path) -> dict[str, tuple[bool, ...]]:
    """Problem key -> which of its samples are right."""
    results = read_results(shard_files(folder, "pool-test"))
    return {r.problem.key: tuple(map(evaluate.solved, r.candidates)) for r in results}


def _pass_at_1(pools: Mapping[str, tuple[bool, ...]], keys: list[str]) -> Estimate:
    return stats.mean_estimate([np.mean(pools[key][1::2] or pools[key]) for key in keys])


def _left(pools: Mapping[str, tuple[bool, ...]], greedy: Mapping[str, float], keys: list[str]) -> Left | None:
    known = [key for key in keys if key in pools and key in greedy]
    if not known:
        return None
    right = sum(greedy[key] > 0 for key in known) / len(known)
    searched = sum(greedy[key] == 0 and any(pools[key]) for key in known) / len(known)
    return Left(right, searched, 1 - right - searched)


# ---------------------------------------------------------------- examples


def _answers(folder: Path, keys: set[str]) -> dict[str, SearchResult]:
    return {result.problem.key: result for result in _greedy(folder) if result.problem.key in keys}


def _greedy(folder: Path) -> Iterator[SearchResult]:
    return read_results(shard_files(folder, "greedy-test"))


def _example(key: str, before: Mapping[str, SearchResult], after: Mapping[str, SearchResult]) -> Example:
    problem = after[key].problem
    return Example(clean(problem.question), problem.answer, _text(before[key]), _text(after[key]))


def _text(result: SearchResult) -> str:
    return clean(result.candidates[0].text) if result.candidates else ""


def clean(text: str) -> str:
    """Foreign text that may be shown: harmless and cut to length."""
    shown = harmless(text)
    return shown if len(shown) <= _LONGEST else shown[:_LONGEST] + " [...]"
