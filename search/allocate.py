"""A budget shared among questions: each gets the offer that pays (Damani et al. 2024, "Learning How Hard to Think",
arXiv 2410.04707; method.md section (c)).

A question, or a bin of alike questions, has a ladder of offers: what each costs, and how likely it is predicted to
give a right answer. We maximise the sum of values under a mean budget: always take the step with the largest gain per
FLOP, on the upper concave hull of every ladder. Where the ladders are concave and their steps cost the same, this is
exact at every budget; otherwise it is exact at the budgets where a step ends, and in between short of the optimum by
less than the gain of one step of one question (`Allocation.bound` is what nobody exceeds). It never spends more than
the budget: the last step is taken for as many questions as it can pay, and what is left is left.

Values are predictions. With rates that err, pass the expectation under what is believed (`search.belief`), not a
plug-in: questions that look hopeless but might not be else soak up the budget.

Axis legend: _P ladders (questions or bins), _L offers of one ladder, _Q questions.
"""

from __future__ import annotations

import heapq
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from search.errors import BudgetError, DataError
from search.randomness import key64
from search.stats import Floats

ABSTAIN = -1  # the free offer: no answer, no cost
Offers = NDArray[np.intp]


@dataclass(frozen=True, slots=True, eq=False)
class Ladder:
    """The offers to one question, in any order. Example: Ladder([1e6, 2e6, 4e6], [0.3, 0.5, 0.6])

    Raises DataError for offers that cannot be compared.
    """

    costs_L: Floats  # FLOPs (or any one unit), 0 or more
    values_L: Floats  # predicted chance of a right answer, or any value

    def __init__(self, costs: ArrayLike, values: ArrayLike):
        costs_L, values_L = np.asarray(costs, dtype=np.float64), np.asarray(values, dtype=np.float64)
        if costs_L.shape != values_L.shape or costs_L.ndim != 1 or not costs_L.size:
            raise DataError(f"a ladder needs as many values as costs, not {values_L.shape} and {costs_L.shape}")
        if not (np.isfinite(costs_L).all() and np.isfinite(values_L).all() and costs_L.min() >= 0):
            raise DataError(f"a ladder needs finite values and costs of 0 or more, not {costs_L} with {values_L}")
        object.__setattr__(self, "costs_L", costs_L)
        object.__setattr__(self, "values_L", values_L)

    def cost(self, offer: int) -> float:
        return 0.0 if offer == ABSTAIN else float(self.costs_L[offer])

    def value(self, offer: int) -> float:
        return 0.0 if offer == ABSTAIN else float(self.values_L[offer])


class Split(NamedTuple):
    """Part of a bin gets another offer than the rest of it. Example: Split(2, 3, 0.4)"""

    ladder: int
    offer: int
    share: float  # of the bin's questions


@dataclass(frozen=True, slots=True, eq=False)
class Allocation:
    """Who gets what. Costs and values are means over questions, in the units of the ladders."""

    choice_P: Offers  # the offer of each ladder, ABSTAIN for none: of bins, the bin-to-offer table
    splits: tuple[Split, ...]  # the bins that the budget could not move as a whole
    cost: float
    value: float
    bound: float  # no allocation of this budget has a larger value
    left: float  # of the budget

    def assign(self, bins_Q: ArrayLike, keys_Q: Sequence[str]) -> Offers:
        """The offer of each question by its ladder; who is on which side of a split follows from its key."""
        bins = np.asarray(bins_Q, dtype=np.intp)
        offers_Q = self.choice_P[bins]
        for split in self.splits:
            for i, (bin_, key) in enumerate(zip(bins, keys_Q, strict=True)):
                if bin_ == split.ladder and key64("split", key) / 2**64 < split.share:
                    offers_Q[i] = split.offer
        return offers_Q


class _Step(NamedTuple):
    """From one offer of a ladder's hull to the next."""

    rate: float  # gain per FLOP
    ladder: int
    offer: int
    cost: float
    gain: float


# ---------------------------------------------------------------- one ladder


def concave(costs: ArrayLike, values: ArrayLike, *, abstain: bool = True) -> Offers:
    """Indices of the offers on the upper concave hull, by rising cost, each worth more than the one before.

    `costs`, `values`: shape [L], in any order. With `abstain` the hull starts at the free offer of cost and value 0,
    which is not among the indices: they are none where nothing is worth more than no answer. Without, it starts at
    the cheapest offer. Raises DataError as `Ladder` does.
    """
    return np.array([i for i in _hull(Ladder(costs, values), abstain) if i != ABSTAIN], dtype=np.intp)


def _hull(ladder: Ladder, abstain: bool) -> list[int]:
    order = [int(i) for i in np.lexsort((-ladder.values_L, ladder.costs_L))]
    hull: list[int] = []
    for i in [ABSTAIN, *order] if abstain else order:
        cost, value = ladder.cost(i), ladder.value(i)
        if hull and value <= ladder.value(hull[-1]):
            continue
        # offers on a straight line stay: the finer the steps, the less of a budget is left
        while hull and (cost == ladder.cost(hull[-1]) or (len(hull) > 1 and _above(ladder, hull, cost, value))):
            hull.pop()
        hull.append(i)
    return hull


def _above(ladder: Ladder, hull: Sequence[int], cost: float, value: float) -> bool:
    """Whether the step to a new offer is steeper than the last one, which then lies below the hull."""
    before, last = hull[-2], hull[-1]
    new = (value - ladder.value(last)) * (ladder.cost(last) - ladder.cost(before))
    return new > (ladder.value(last) - ladder.value(before)) * (cost - ladder.cost(last)) * (1 + 1e-9)


def _steps(ladders: Sequence[Ladder], abstain: bool) -> tuple[Offers, list[_Step]]:
    """Where every ladder starts, and all steps of all hulls, the steepest first; those of one ladder in order."""
    starts: list[int] = []
    steps: list[_Step] = []
    for p, ladder in enumerate(ladders):
        hull = _hull(ladder, abstain)
        starts.append(hull[0])
        rate = math.inf
        for before, offer in itertools.pairwise(hull):
            cost, gain = ladder.cost(offer) - ladder.cost(before), ladder.value(offer) - ladder.value(before)
            rate = min(rate, gain / cost)
            steps.append(_Step(rate, p, offer, cost, gain))
    return np.array(starts, dtype=np.intp), sorted(steps, key=lambda step: -step.rate)


# ---------------------------------------------------------------- many ladders


def allocate(
    ladders: Sequence[Ladder],
    mean_cost: float,
    *,
    counts: Sequence[int] | None = None,
    abstain: bool = True,
    price: float = 0.0,
    split: bool = True,
) -> Allocation:
    """The best use of `mean_cost` FLOPs a question.

    `counts`: how many questions share each ladder, 1 by default; then it is the offline table of Damani et al.:
    solved once on other questions, the same offer inside a bin. A bin that the budget cannot move as a whole is split
    (at most one, where steps cost the same); `split` = False leaves it where it is. A step must gain more than `price`
    a FLOP. Without `abstain` every question gets at least its cheapest offer. Raises BudgetError where the budget
    cannot buy those, DataError for no ladders.
    """
    counts_P, choice_P, steps, left = _begin(ladders, mean_cost, counts, abstain)
    value = sum(n * ladders[p].value(int(choice_P[p])) for p, n in enumerate(counts_P))
    splits, stuck, bound = list[Split](), set[int](), None
    for step in steps:
        if step.rate <= price or step.ladder in stuck:
            continue
        count = int(counts_P[step.ladder])
        affordable = min(count, math.floor(left / step.cost * (1 + 1e-12) + 1e-9))
        if affordable < count and bound is None:
            bound = value + left * step.rate
        moved = affordable if split or affordable == count else 0
        left, value = max(left - moved * step.cost, 0.0), value + moved * step.gain
        if moved == count:
            choice_P[step.ladder] = step.offer
            continue
        stuck.add(step.ladder)
        if moved:
            splits.append(Split(step.ladder, step.offer, moved / count))
    total, bound = int(counts_P.sum()), value if bound is None else bound
    left /= total
    return Allocation(choice_P, tuple(splits), mean_cost - left, value / total, bound / total, left)


def at_price(ladders: Sequence[Ladder], price: float, *, abstain: bool = True) -> Offers:
    """The Lagrangian form: of each ladder the offer with the largest value - price x cost, the cheapest of equals;
    shape [P]. ABSTAIN where nothing pays. It needs no look at the other questions."""
    chosen = np.empty(len(ladders), dtype=np.intp)
    for p, ladder in enumerate(ladders):
        order = np.argsort(ladder.costs_L, kind="stable")
        net = ladder.values_L[order] - price * ladder.costs_L[order]
        best = int(net.argmax())
        chosen[p] = ABSTAIN if abstain and net[best] <= 0 else order[best]
    return chosen


def price_for(
    ladders: Sequence[Ladder], mean_cost: float, counts: Sequence[int] | None = None, *, abstain: bool = True
) -> float:
    """The price of a FLOP at which `at_price` spends as much of `mean_cost` as it can; 0 where all that gains fits.

    It never spends more. Steps that gain equally per FLOP are bought together or not at all, which leaves up to their
    cost; `allocate` is finer. Raises BudgetError where the budget cannot buy the cheapest offers, DataError for no
    ladders.
    """
    counts_P, _, steps, left = _begin(ladders, mean_cost, counts, abstain)
    rates = np.array([step.rate for step in steps])
    costs = np.cumsum([step.cost * counts_P[step.ladder] for step in steps])
    fits = int(np.searchsorted(costs, left * (1 + 1e-12), side="right"))
    if fits == len(steps):
        return 0.0
    # what is as steep as the first that does not fit cannot be bought apart from it
    fits = int(np.searchsorted(-rates, -rates[fits] * (1 + 1e-9), side="left"))
    return float((rates[fits - 1] + rates[fits]) / 2) if fits else float(2 * rates[0])


def _begin(
    ladders: Sequence[Ladder], mean_cost: float, counts: Sequence[int] | None, abstain: bool
) -> tuple[NDArray[np.int64], Offers, list[_Step], float]:
    """How many questions each ladder has, where it starts, all steps, and what the starts leave of the budget."""
    if not ladders:
        raise DataError("no ladders: there is nothing to share a budget among")
    counts_P = np.ones(len(ladders), dtype=np.int64) if counts is None else np.asarray(counts, dtype=np.int64)
    if counts_P.shape != (len(ladders),) or counts_P.min() < 1:
        raise DataError(f"{len(ladders)} ladders need as many counts of at least 1, not {list(counts_P)}")
    starts_P, steps = _steps(ladders, abstain)
    total = int(counts_P.sum())
    least = sum(n * ladders[p].cost(int(starts_P[p])) for p, n in enumerate(counts_P)) / total
    if not mean_cost >= least * (1 - 1e-12):
        raise BudgetError(f"a mean budget of {mean_cost:g} does not buy the cheapest offers: give at least {least:g}")
    return counts_P, starts_P, steps, max(0.0, mean_cost - least) * total


# ---------------------------------------------------------------- plain samples, perfect selector


def samples_for(rates_P: ArrayLike, total: int, *, floor: float = 0.0, price: float = 0.0) -> NDArray[np.int64]:
    """How many samples each question gets of `total`, if one right one is enough; int64 [P].

    The closed form for binary rewards: after k samples the next one gains rate (1 - rate)^k. Greedy, exact. A
    question whose rate is at most `floor` gets none; a sample must gain more than `price`. What gains nothing stays
    unspent. Raises DataError for rates outside 0..1.
    """
    rates = np.asarray(rates_P, dtype=np.float64)
    if not ((rates >= 0) & (rates <= 1)).all():
        raise DataError(f"rates lie in 0..1, not {rates.min():g}..{rates.max():g}")
    num = np.zeros(len(rates), dtype=np.int64)
    heap = [(-float(rate), p) for p, rate in enumerate(rates) if rate > max(floor, price)]
    heapq.heapify(heap)
    for _ in range(total):
        if not heap:
            break
        gain, p = heap[0]
        num[p] += 1
        gain *= 1 - rates[p]
        if -gain > price:
            heapq.heapreplace(heap, (gain, p))
        else:
            heapq.heappop(heap)
    return num
