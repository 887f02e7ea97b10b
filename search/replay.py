"""Stored pools drawn again, sample by sample, in random orders: what a rule that stops early would have given and cost.

A rule looks at answers and scores alone, never at correctness. Everything is vectorised over problems and orders, so
that 1000 pools of 64 samples take a fraction of a second a rule. Ties are broken as `search.answers` breaks them, by
who came first. Left out: the length of single samples, which pools do not keep, so a sample costs its pool's mean.

Axis legend: _P problems, _R rows (problem x order), _K samples drawn so far, from 1; _A answers of one problem.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from search.cells import ROWS_KEPT, Cell
from search.errors import DataError
from search.evaluate import Pool, expected_spend, read_shares
from search.randomness import key64
from search.stats import Floats
from search.strategies.best_of_n import ahead
from search.types import Spend

NEVER = np.iinfo(np.int64).max  # a row that the rule never stops
BLOCK = 256  # pools at a time: bounded memory
_SPENT = tuple(Spend().to_json())


@dataclass(frozen=True, eq=False)
class Replay:
    """Some pools in random orders. Rows: the orders of the first problem, then those of the next.

    Votes are counted once, however many rules ask for them.
    """

    pools: tuple[Pool, ...]
    orders: int
    answers_R_K: NDArray[np.intp]  # number of the answer within its problem; the last of all is "no answer"
    scores_R_K: Floats  # nan: no score, or no answer
    correct_R_K: NDArray[np.bool_]
    shares_P_A: Floats  # the share of each answer's samples that is right, 0 for no answer

    @property
    def none(self) -> int:
        """The number of "no answer"."""
        return self.shares_P_A.shape[1] - 1

    @functools.cached_property
    def majority(self) -> Vote:
        """Each answer counts 1."""
        return vote(self, np.ones(self.answers_R_K.shape))

    @functools.cached_property
    def weighted(self) -> Vote:
        """Each answer counts its score."""
        return vote(self, self.scores_R_K)

    @functools.cached_property
    def highest(self) -> Vote:
        """The best score (`top`), and whether its sample is right; `second` and `total` are 0."""
        return _highest(self)

    def by_row(self, values_P: np.ndarray) -> np.ndarray:
        return np.repeat(values_P, self.orders, axis=0)

    def spend(self, *, scored: bool) -> Floats:
        """FLOPs of 0 to K samples, [2 (ideal, actual), P, K + 1]."""
        num = self.answers_R_K.shape[1]
        return np.stack([spend_table(pool, num, scored=scored) for pool in self.pools], axis=1)


class Run(NamedTuple):
    """What a rule does on every row."""

    drawn_R: NDArray[np.int64]  # samples after which it stops: 0 abstains, NEVER goes on to the end of the budget
    right_R_K: Floats  # the chance that the answer it gives after so many samples is right


class StopRule(Protocol):
    """When to stop drawing, and which answer is given."""

    @property
    def name(self) -> str:
        """The arm, as tables call it."""
        ...

    @property
    def scored(self) -> bool:
        """It needs the verifier's scores, and pays for them."""
        ...

    def run(self, replay: Replay) -> Run: ...


class Vote(NamedTuple):
    """Running votes, each of shape [R, K]: after so many samples."""

    top: Floats  # weight of the leading answer, 0 where nobody voted
    second: Floats  # of the next one
    total: Floats  # of all
    right: Floats  # the chance that the leading answer is right

    def certainty(self) -> Floats:
        """Of votes that count 1: the posterior probability that the leader is ahead of the second for good."""
        table = _ahead_table(int(self.top.max(initial=0)))
        return np.where(self.top > 0, table[self.top.astype(np.intp), self.second.astype(np.intp)], 0.0)


class Stopped(NamedTuple):
    """A rule at one budget, on all problems; arrays of shape [P]."""

    cell: Cell
    samples_P: Floats  # drawn on average


# ---------------------------------------------------------------- votes


def vote(replay: Replay, weights_R_K: Floats) -> Vote:
    """The running vote: each answer counts its weight (nan: no vote, below 0: 0)."""
    answers, rows = replay.answers_R_K, np.arange(len(replay.answers_R_K))
    voting = (answers != replay.none) & ~np.isnan(weights_R_K)
    weights = np.where(voting, np.maximum(weights_R_K, 0.0), 0.0)
    sums = np.zeros((len(rows), replay.none + 1))
    came = np.full(sums.shape, answers.shape[1])  # when an answer first voted: the earliest of equals leads
    leader, top, second = np.full(len(rows), replay.none), np.full(len(rows), -1.0), np.zeros(len(rows))
    tops, seconds, leaders = np.empty(answers.shape), np.empty(answers.shape), np.empty(answers.shape, dtype=np.intp)
    for k in range(answers.shape[1]):
        answer, votes = answers[:, k], voting[:, k]
        weight = sums[rows, answer] = sums[rows, answer] + weights[:, k]
        since = came[rows, answer] = np.where(votes, np.minimum(came[rows, answer], k), came[rows, answer])
        other = votes & (answer != leader)
        ahead = other & ((weight > top) | ((weight == top) & (since < came[rows, leader])))
        second = np.where(ahead, np.maximum(top, 0.0), np.where(other, np.maximum(second, weight), second))
        top = np.where(ahead | (votes & ~other), weight, top)
        leader = np.where(ahead, answer, leader)
        tops[:, k], seconds[:, k], leaders[:, k] = np.maximum(top, 0.0), second, leader
    right = np.take_along_axis(replay.by_row(replay.shares_P_A), leaders, axis=1)
    return Vote(tops, seconds, np.cumsum(weights, axis=1), right)


def _highest(replay: Replay) -> Vote:
    scores = np.where(np.isnan(replay.scores_R_K), -np.inf, replay.scores_R_K)
    best = np.maximum.accumulate(scores, axis=1)
    before = np.concatenate([np.full((len(best), 1), -np.inf), best[:, :-1]], axis=1)
    chosen = np.maximum.accumulate(np.where(scores > before, np.arange(scores.shape[1]), -1), axis=1)
    right = np.take_along_axis(replay.correct_R_K, np.maximum(chosen, 0), axis=1) & (chosen >= 0)
    zeros = np.zeros(scores.shape)
    return Vote(np.where(chosen >= 0, best, 0.0), zeros, zeros, right.astype(np.float64))


@functools.cache
def _ahead_table(num: int) -> Floats:
    return np.array([[ahead(votes, others) for others in range(num + 1)] for votes in range(num + 1)])


def first_stop(stops_R_K: NDArray[np.bool_], batch: int = 1) -> NDArray[np.int64]:
    """Samples drawn at the first stop, looked at after every `batch` samples; NEVER where there is none."""
    stops = stops_R_K[:, batch - 1 :: batch]
    if not stops.shape[1]:
        return np.full(len(stops_R_K), NEVER)
    return np.where(stops.any(axis=1), (stops.argmax(axis=1) + 1) * batch, NEVER)


# ---------------------------------------------------------------- pools to rows to cells


def stopped(
    pools: Sequence[Pool], rules: Sequence[StopRule], budgets: Sequence[int], *, orders: int = 32, seed: object = 0
) -> list[list[Stopped]]:
    """What each rule comes to at each budget (most samples a problem), budgets ascending, as means over random orders.

    A problem that failed is not solved, at what it cost. Raises DataError for a pool smaller than a budget, for
    answers without a score where a rule needs them, and for no budgets or orders.
    """
    ks = sorted(set(budgets))
    if not ks or ks[0] < 1 or orders < 1:
        raise DataError(f"budgets {list(budgets)} in {orders} orders: give at least one budget of 1 or more, 1 order")
    _check(pools, ks[-1], scored=any(rule.scored for rule in rules))
    blocks = [_block(replay, rules, ks) for replay in replays(pools, ks[-1], orders=orders, seed=seed)]
    found = np.concatenate(blocks, axis=3) if blocks else np.zeros((len(rules), len(ks), 6, 0))
    return [
        [Stopped(Cell(rule.name, k, *columns[:5]), columns[5]) for k, columns in zip(ks, columns_K, strict=True)]
        for rule, columns_K in zip(rules, found, strict=True)
    ]


def replays(pools: Sequence[Pool], num: int, *, orders: int, seed: object) -> Iterator[Replay]:
    """The pools block by block, the first `num` samples of every order. An order depends on its problem alone."""
    for start in range(0, len(pools), BLOCK):
        yield _replay(tuple(pools[start : start + BLOCK]), num, orders, seed)


def _replay(pools: tuple[Pool, ...], num: int, orders: int, seed: object) -> Replay:
    names = [{a: i for i, a in enumerate(dict.fromkeys(a for a in p.answers_N if a is not None))} for p in pools]
    none = max(map(len, names))
    answers, scores = np.full((len(pools), orders, num), none), np.full((len(pools), orders, num), np.nan)
    correct, shares = np.zeros(answers.shape, dtype=np.bool_), np.zeros((len(pools), none + 1))
    for p, (pool, index) in enumerate(zip(pools, names, strict=True)):
        if pool.failed:
            continue
        generator = np.random.Generator(np.random.Philox(key64("replay", seed, pool.key)))
        order = generator.random((orders, len(pool.correct_N))).argsort(axis=1)[:, :num]
        column = np.array([none if a is None else index[a] for a in pool.answers_N], dtype=np.intp)
        score = np.array([np.nan if s is None else s for s in pool.scores_N], dtype=np.float64)
        right = np.array(pool.correct_N, dtype=np.bool_)
        answers[p], scores[p], correct[p] = column[order], np.where(column == none, np.nan, score)[order], right[order]
        counts = np.bincount(column, minlength=none + 1)
        shares[p] = np.bincount(column, weights=right, minlength=none + 1) / np.maximum(counts, 1)
    shares[:, none] = 0.0
    shape = (-1, num)
    return Replay(pools, orders, answers.reshape(shape), scores.reshape(shape), correct.reshape(shape), shares)


def _block(replay: Replay, rules: Sequence[StopRule], ks: Sequence[int]) -> np.ndarray:
    """Solved, FLOPs ideal and actual, found, rows and samples; shape [rules, budgets, 6, P]."""
    spends = {scored: replay.spend(scored=scored) for scored in {rule.scored for rule in rules}}
    num_right = np.concatenate([np.zeros((len(replay.correct_R_K), 1), int), replay.correct_R_K.cumsum(axis=1)], axis=1)
    rows_P = np.array([_rows_table(pool, ks[-1]) for pool in replay.pools])
    sizes = replay.by_row(np.array([len(pool.correct_N) for pool in replay.pools]))
    problem, rows = replay.by_row(np.arange(len(replay.pools))), np.arange(len(sizes))
    found = np.empty((len(rules), len(ks), 6, len(replay.pools)))
    for i, rule in enumerate(rules):
        run = rule.run(replay)
        alive = np.array([not (pool.failed or (rule.scored and pool.unscored)) for pool in replay.pools])[problem]
        for j, k in enumerate(ks):
            drawn = np.where(alive, np.minimum(run.drawn_R, k), np.minimum(k, sizes))
            given = np.where(alive & (drawn > 0), run.right_R_K[rows, np.maximum(drawn, 1) - 1], 0.0)
            right = num_right[rows, drawn]
            spent = [table[problem, drawn] for table in spends[rule.scored]]
            values = np.array([given, *spent, right > 0, rows_P[problem, right], drawn], dtype=np.float64)
            found[i, j] = values.reshape(6, len(replay.pools), -1).mean(axis=2)
    return found


def _check(pools: Sequence[Pool], num: int, *, scored: bool) -> None:
    for pool in pools:
        if len(pool.correct_N) < num and not pool.failed:
            raise DataError(f"a budget of {num} needs {num} samples, '{pool.key}' has {len(pool.correct_N)}")
        if scored and not (pool.scored or pool.unscored or pool.failed):
            raise DataError(f"problem '{pool.key}' has answers without a score: the rule needs one for each")


def spend_table(pool: Pool, num: int, *, scored: bool) -> Floats:
    """Ideal and actual FLOPs of 0 to `num` of the pool's samples, as `search.evaluate.expected_spend`; [2, num + 1].

    Samples where the engine knows no FLOPs. The policy's part is linear after the first sample; the verifier reads
    each distinct answer once.
    """
    size = len(pool.correct_N)
    if not size:
        return np.zeros((2, num + 1))
    ks = np.minimum(np.arange(num + 1), size)
    bare = replace(pool, copies=(), reads=())  # what is read is counted below, for all k at once
    ends = [dict(zip(_SPENT, expected_spend(bare, k, scored=False), strict=True)) for k in (1, size)]
    judged = dict(zip(_SPENT, expected_spend(bare, size, scored=scored), strict=True))
    shares = read_shares(pool, ks) if scored else (0.0, 0.0)
    tables: list[Floats] = []
    for kind, read in zip(("flops_ideal", "flops_actual"), shares, strict=True):
        first, last = (end[kind] for end in ends)
        slope = (last - first) / (size - 1) if size > 1 else 0.0
        table = first + slope * (ks - 1) + judged[f"verifier_{kind}"] * read
        tables.append(table if table.any() else pool.spend.samples * ks / size)
    spent = np.array(tables)
    spent[:, 0] = 0.0
    return spent


def _rows_table(pool: Pool, num: int) -> Floats:
    """Distinct right texts expected among 0 to `num` of the pool's right samples, at most ROWS_KEPT; [num + 1]."""
    copies, right = np.array(pool.right_copies, dtype=np.float64), max(1, sum(pool.right_copies))
    drawn = np.arange(right)
    missed = np.cumprod(np.maximum(right - copies[:, None] - drawn, 0) / (right - drawn), axis=1)
    seen = np.concatenate([[0.0], (1 - missed).sum(axis=0)])
    return np.minimum(seen[np.minimum(np.arange(num + 1), right)], ROWS_KEPT)
