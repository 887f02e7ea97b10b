"""Difficulty bins: the oracle's, a verifier's and the predictor's, cut where given data say, and how they agree.

Bin 1 is the easiest. Snell et al. 2024 (arXiv 2408.03314, section 3.2): oracle bins are quantiles of the pass rate over
many samples, verifier-predicted bins quantiles of the mean score of final answers over the same samples; ours, from the
question alone, are quantiles of the predicted rate. Liu et al. 2025 (2502.06703) cut at fixed rates instead: easy above
0.5, medium above 0.1, hard the rest, so that bins of different policies compare. Samples that make bins must not also
be those that strategies are scored on: `halves` splits a stored pool in two disjoint ones.

Axis legend: _P problems, _N samples of one problem, _B bins. Left out: bins of token budgets or of levels set by hand.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Literal, TypeVar

import numpy as np
from numpy.typing import ArrayLike, NDArray

from configs.schema import Difficulty
from search import stats
from search.errors import DataError
from search.evaluate import Pool, expected_spend, reduce_pool
from search.randomness import key64
from search.types import SearchResult, Spend

Ints = NDArray[np.intp]
ABSOLUTE = (0.1, 0.5)  # Liu et al.: hard up to 0.1, medium up to 0.5, easy above


@dataclass(frozen=True, slots=True)
class Bins:
    """Where values are cut, ascending; a value on an edge lies below it. Example: Bins((0.1, 0.5)) makes three bins.

    Edges may repeat: then a bin between them is empty, and bin numbers mean the same for every Bins of one size.
    """

    edges: tuple[float, ...]

    @property
    def num(self) -> int:
        return len(self.edges) + 1

    def __call__(self, values_P: ArrayLike) -> Ints:
        """The bin of each value, from 1 = highest, which is easiest; 0 where a value is not finite."""
        values = np.asarray(values_P, dtype=np.float64)
        found = stats.assign_bins(np.nan_to_num(values), self.edges)
        return np.where(np.isfinite(values), found, 0)


def fix(
    values_P: ArrayLike,
    *,
    binning: Literal["quantile", "absolute"] = "quantile",
    num: int = 5,
    edges: Sequence[float] = ABSOLUTE,
) -> Bins:
    """Bins fixed on these values: `num` quantiles of them, or the given edges, whatever the values.

    Equal values share the bin of their middle, so that the hardest bin keeps its number where many rates are 0.
    """
    if binning == "absolute":
        return Bins(tuple(edges))
    values = np.asarray(values_P, dtype=np.float64)
    values = values[np.isfinite(values)]
    if not values.size:
        return Bins(())
    easier = len(values) - stats.ranks(values) + 0.5  # how many are easier; half of the equal ones count
    bins_P = np.minimum((easier / len(values) * num).astype(np.intp), num - 1) + 1
    nowhere = float(values.min()) - 1.0  # an edge below everything: no bin is that hard
    hardest = [values[bins_P >= b].max(initial=nowhere) for b in range(num, 1, -1)]
    return Bins(tuple(float(edge) for edge in hardest))


def fixed_by(config: Difficulty, values_P: ArrayLike) -> Bins:
    """Bins as the configuration asks for."""
    return fix(values_P, binning=config.binning, num=config.bins, edges=config.edges)


# ---------------------------------------------------------------- what bins are made of


def oracle_rate(pool: Pool) -> float:
    """The pass rate over the pool's samples; nan without any."""
    return float(np.mean(pool.correct_N)) if pool.correct_N else float("nan")


def verifier_rate(pool: Pool) -> float:
    """The mean score of final answers over the pool's samples, without looking at the gold answer.

    A sample without an answer counts 0; one the verifier gave no verdict on is left out. nan where none is left.
    """
    pairs = zip(pool.answers_N, pool.scores_N, strict=True)
    scores = [0.0 if answer is None else score for answer, score in pairs if answer is None or score is not None]
    scored = any(score is not None for score in pool.scores_N)
    return float(np.mean([s for s in scores if s is not None])) if scores and scored else float("nan")


Stored = TypeVar("Stored", Pool, SearchResult)


def halves(pool: Stored, *, seed: object = 0) -> tuple[Stored, Stored]:
    """Two disjoint halves of a pool's samples at random: one to make bins of, one to score strategies on.

    The random choice depends on the seed and the problem alone. What a half cost is what so many samples cost on
    average. Raises DataError for a pool of fewer than two samples.
    """
    stored = reduce_pool(pool) if isinstance(pool, SearchResult) else pool
    num = len(stored.correct_N)
    if num < 2:
        raise DataError(f"problem '{stored.key}' has {num} samples: two halves need at least 2")
    order = np.random.Generator(np.random.Philox(key64("difficulty", "halves", seed, stored.key))).permutation(num)
    first, second = sorted(order[: num // 2].tolist()), sorted(order[num // 2 :].tolist())
    if isinstance(pool, SearchResult):
        return _part(pool, stored, first), _part(pool, stored, second)
    ungraded = pool.num_ungraded * len(first) // num
    return _half(pool, first, ungraded), _half(pool, second, pool.num_ungraded - ungraded)


def _part(result: SearchResult, pool: Pool, chosen: Sequence[int]) -> SearchResult:
    selected = chosen.index(result.selected) if result.selected in chosen else None
    candidates = tuple(result.candidates[i] for i in chosen)
    return replace(result, candidates=candidates, selected=selected, spend=_spend(pool, len(chosen)))


def _half(pool: Pool, chosen: Sequence[int], num_ungraded: int) -> Pool:
    answers_N, scores_N = (tuple(values[i] for i in chosen) for values in (pool.answers_N, pool.scores_N))
    silent = sum(s is None for s, a in zip(scores_N, answers_N, strict=True) if a is not None)
    return replace(
        pool,
        correct_N=tuple(pool.correct_N[i] for i in chosen),
        answers_N=answers_N,
        scores_N=scores_N,
        num_ungraded=num_ungraded,
        num_unscored=silent if pool.num_unscored else 0,
        spend=_spend(pool, len(chosen)),
        copies=(),
        right_copies=(),
        reads=(),
    )


def _spend(pool: Pool, num: int) -> Spend:
    """What `num` of the pool's samples cost on average."""
    values = expected_spend(pool, num, scored=True).tolist()
    row: dict[str, Any] = {
        f.name: round(value) if isinstance(f.default, int) else value
        for f, value in zip(fields(Spend), values, strict=True)
    }
    return Spend(**row)


# ---------------------------------------------------------------- how bins agree


@dataclass(frozen=True, slots=True)
class Agreement:
    """How bins agree with the oracle's. Shares of problems; `chance` is the exact agreement of unrelated bins."""

    exact: float
    within_one: float
    chance: float


def confusion(oracle_P: ArrayLike, predicted_P: ArrayLike, num: int) -> NDArray[np.int64]:
    """How many problems of each oracle bin (rows) lie in each predicted bin (columns); [B, B], index 0 = bin 1.

    Problems without a bin (0) on either side are left out.
    """
    oracle, predicted = np.asarray(oracle_P, dtype=np.intp), np.asarray(predicted_P, dtype=np.intp)
    keep = (oracle > 0) & (predicted > 0)
    table = np.zeros((num, num), dtype=np.int64)
    np.add.at(table, (oracle[keep] - 1, predicted[keep] - 1), 1)
    return table


def agreement(confusion_B_B: ArrayLike) -> Agreement:
    """Of a confusion matrix with at least one problem."""
    table = np.asarray(confusion_B_B, dtype=np.float64)
    shares = table / table.sum()
    distance = np.abs(np.subtract.outer(np.arange(len(table)), np.arange(len(table))))
    return Agreement(
        exact=float(np.trace(shares)),
        within_one=float(shares[distance <= 1].sum()),
        chance=float(shares.sum(axis=0) @ shares.sum(axis=1)),
    )
