"""A budget shared among questions: hulls, the greedy against brute force, prices, bins, and plain samples."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from search.allocate import ABSTAIN, Ladder, allocate, at_price, concave, price_for, samples_for
from search.errors import BudgetError, DataError

whole = st.integers(0, 12)
ladders_of = st.lists(st.tuples(whole, st.integers(-3, 12)), min_size=1, max_size=4).map(
    lambda pairs: Ladder([float(c) for c, _ in pairs], [float(v) for _, v in pairs])
)
few = st.lists(ladders_of, min_size=1, max_size=4)


def concave_ladder(gains):
    """Offers of 1, 2, ... FLOPs with falling gains."""
    return Ladder(np.arange(1.0, len(gains) + 1), np.cumsum(sorted(gains, reverse=True)))


unit_ladders = st.lists(st.floats(0, 1), min_size=1, max_size=4).map(concave_ladder)


def spent(ladders, offers, counts=None):
    counts = counts or [1] * len(ladders)
    return sum(n * ladder.cost(o) for n, ladder, o in zip(counts, ladders, offers, strict=True)) / sum(counts)


def worth(ladders, offers, counts=None):
    counts = counts or [1] * len(ladders)
    return sum(n * ladder.value(o) for n, ladder, o in zip(counts, ladders, offers, strict=True)) / sum(counts)


def optimum(ladders, mean_cost, *, abstain=True):
    """The best mean value of all combinations that fit."""
    choices = [range(ABSTAIN if abstain else 0, len(ladder.costs_L)) for ladder in ladders]
    fits = [c for c in itertools.product(*choices) if spent(ladders, c) <= mean_cost + 1e-12]
    return max(worth(ladders, c) for c in fits) if fits else None


# ---------------------------------------------------------------- one ladder


@pytest.mark.parametrize(
    ("costs", "values", "hull"),
    [
        ([1, 2, 3], [0.5, 0.8, 0.9], [0, 1, 2]),
        ([1, 2, 3], [0.5, 0.6, 0.9], [0, 2]),  # the middle lies below the line from 0.5 to 0.9
        ([1, 2, 3], [0.1, 0.6, 0.9], [1, 2]),  # so does the first, below the line from nothing
        ([1, 2, 3], [0.3, 0.6, 0.9], [0, 1, 2]),  # on a straight line all stay
        ([1, 2, 3], [0.5, 0.5, 0.4], [0]),  # never more for less
        ([3, 1, 2], [0.9, 0.5, 0.6], [1, 0]),  # in any order
        ([1, 1, 2], [0.2, 0.5, 0.6], [1, 2]),  # the better of equal costs
        ([1, 2], [0, -1], []),  # nothing is worth more than no answer
        ([0, 1], [0.2, 0.5], [0, 1]),  # free, and worth something
        ([0, 1], [0, 0.5], [1]),
    ],
)
def test_hulls_by_hand(costs, values, hull):
    assert concave(costs, values).tolist() == hull


def test_without_abstaining_the_hull_starts_at_the_cheapest():
    assert concave([1, 2, 3], [0.1, 0.6, 0.9], abstain=False).tolist() == [0, 1, 2]
    assert concave([1, 2, 3], [0.6, 0.1, 0.5], abstain=False).tolist() == [0]
    assert concave([2, 1], [-1, -2], abstain=False).tolist() == [1, 0]


@given(ladders_of, st.booleans())
def test_the_hull_lies_above_every_offer_and_gets_flatter(ladder, abstain):
    hull = concave(ladder.costs_L, ladder.values_L, abstain=abstain).tolist()
    costs, values = [ladder.cost(i) for i in hull], [ladder.value(i) for i in hull]
    if abstain and (not hull or costs[0] > 0):
        costs, values = [0.0, *costs], [0.0, *values]
    assert costs == sorted(set(costs))
    slopes = np.diff(values) / np.diff(costs)
    assert (slopes > 0).all()
    assert (np.diff(slopes) <= 1e-9).all()
    assert (np.interp(ladder.costs_L, costs, values) >= ladder.values_L - 1e-9).all()


# ---------------------------------------------------------------- many ladders


def test_a_budget_goes_where_it_gains_most_by_hand():
    """Gains per FLOP: A .6 .2 .1, B .5 .4 .05. In order: A1 B1 B2 A2 A3 B3."""
    ladders = [Ladder([1, 2, 3], [0.6, 0.8, 0.9]), Ladder([1, 2, 3], [0.5, 0.9, 0.95])]
    found = [allocate(ladders, total / 2) for total in range(8)]
    table = [[-1, -1], [0, -1], [0, 0], [0, 1], [1, 1], [2, 1], [2, 2], [2, 2]]
    assert [f.choice_P.tolist() for f in found] == table
    assert [f.value for f in found] == pytest.approx([0, 0.3, 0.55, 0.75, 0.85, 0.9, 0.925, 0.925])
    assert [f.left for f in found] == pytest.approx([0] * 7 + [0.5])
    assert all(f.bound == pytest.approx(f.value) for f in found)


def test_what_does_not_fit_is_left_and_the_bound_says_what_could_have_been():
    ladder = Ladder([5], [1.0])
    found = allocate([ladder, ladder], 4)
    assert sorted(found.choice_P.tolist()) == [ABSTAIN, 0]
    assert (found.value, found.cost, found.left) == pytest.approx((0.5, 2.5, 1.5))
    assert found.bound == pytest.approx(0.8)  # 8 of the 10 FLOPs that all of it costs
    smaller = allocate([ladder, ladder, Ladder([1], [0.1])], 2)
    assert smaller.choice_P.tolist() == [0, ABSTAIN, 0]  # what is left goes to a step that it can pay


@settings(max_examples=150, deadline=None)
@given(st.lists(unit_ladders, min_size=1, max_size=4), st.floats(0, 5))
def test_it_is_exact_where_ladders_are_concave_with_equal_steps(ladders, mean_cost):
    found = allocate(ladders, mean_cost)
    assert found.value == pytest.approx(optimum(ladders, mean_cost), abs=1e-9)
    assert found.value == pytest.approx(worth(ladders, found.choice_P), abs=1e-9)
    assert found.cost == pytest.approx(spent(ladders, found.choice_P), abs=1e-9)


@settings(max_examples=200, deadline=None)
@given(few, st.integers(0, 40).map(lambda n: n / 3), st.booleans())
def test_on_any_ladders_it_never_overspends_and_is_one_step_from_the_best(ladders, mean_cost, abstain):
    best = optimum(ladders, mean_cost, abstain=abstain)
    if best is None:
        with pytest.raises(BudgetError, match="does not buy the cheapest offers: give at least"):
            allocate(ladders, mean_cost, abstain=abstain)
        return
    found = allocate(ladders, mean_cost, abstain=abstain)
    assert spent(ladders, found.choice_P) == pytest.approx(found.cost, abs=1e-9)
    assert found.cost <= mean_cost + 1e-9
    assert found.value == pytest.approx(worth(ladders, found.choice_P), abs=1e-9)
    assert found.value - 1e-9 <= best <= found.bound + 1e-9
    largest = max(float(np.ptp([0.0, *ladder.values_L])) for ladder in ladders)
    assert found.value >= best - largest / len(ladders) - 1e-9
    again = allocate(ladders, found.cost, abstain=abstain)  # where a step ends it is exact
    assert again.value >= optimum(ladders, found.cost, abstain=abstain) - largest / len(ladders) - 1e-9


@settings(max_examples=100, deadline=None)
@given(st.lists(unit_ladders, min_size=1, max_size=4), st.integers(0, 4))
def test_it_is_never_worse_than_the_same_budget_for_all(ladders, each):
    uniform = [min(each, len(ladder.costs_L)) - 1 for ladder in ladders]
    assert allocate(ladders, each).value >= worth(ladders, uniform) - 1e-9


@settings(max_examples=100, deadline=None)
@given(few, st.integers(0, 40).map(lambda n: n / 3))
def test_more_budget_is_never_less_to_expect_of_it(ladders, mean_cost):
    bounds = [allocate(ladders, mean_cost + more).bound for more in (0, 0.5, 3, 100)]
    assert bounds == pytest.approx(sorted(bounds))


def test_a_price_ends_it_before_the_budget():
    ladders = [Ladder([1, 2, 3], [0.6, 0.8, 0.9]), Ladder([1, 2, 3], [0.04, 0.08, 0.1])]
    found = allocate(ladders, 3, price=0.05)
    assert found.choice_P.tolist() == [2, ABSTAIN]
    assert found.left == pytest.approx(1.5)
    assert allocate(ladders, 3, price=0.5).choice_P.tolist() == [0, ABSTAIN]


# ---------------------------------------------------------------- bins


def test_a_bin_gets_the_same_offer_and_what_does_not_reach_all_of_it_splits_it():
    easy, hard = Ladder([1, 2], [0.8, 0.9]), Ladder([1, 2], [0.3, 0.5])
    whole_bins = allocate([easy, hard], 1.5, counts=[100, 300], split=False)
    assert whole_bins.choice_P.tolist() == [1, 0]  # the hard bin would gain more, but costs more than is left
    assert whole_bins.left == pytest.approx(0.25)
    assert not whole_bins.splits
    found = allocate([easy, hard], 1.5, counts=[100, 300])
    assert found.choice_P.tolist() == [0, 0]
    assert found.splits == ((1, 1, 200 / 300),)  # .2 a FLOP in the hard bin, .1 in the easy one
    assert found.left == pytest.approx(0)
    assert found.value == pytest.approx((80 + 300 * 0.3 + 200 * 0.2) / 400)
    assert found.bound == pytest.approx(found.value)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(unit_ladders, st.integers(1, 4)), min_size=1, max_size=3), st.floats(0, 4))
def test_bins_are_as_many_questions_with_one_ladder(bins, mean_cost):
    ladders, counts = [ladder for ladder, _ in bins], [count for _, count in bins]
    each = [ladder for ladder, count in bins for _ in range(count)]
    found = allocate(ladders, mean_cost, counts=counts)
    assert found.value == pytest.approx(allocate(each, mean_cost).value, abs=1e-9)
    assert found.cost <= mean_cost + 1e-9
    kept = allocate(ladders, mean_cost, counts=counts, split=False)
    assert not kept.splits
    assert kept.cost == pytest.approx(spent(ladders, kept.choice_P, counts))
    assert kept.value <= found.value + 1e-9


def test_questions_find_their_offer_by_bin_and_key():
    found = allocate([Ladder([1, 2], [0.8, 0.9]), Ladder([1, 2], [0.3, 0.5])], 1.5, counts=[100, 300])
    keys, bins = [f"q{i}" for i in range(3000)], np.arange(3000) % 3 > 0
    offers = found.assign(bins.astype(int), keys)
    assert set(offers[~bins]) == {0}
    assert offers[bins].mean() == pytest.approx(2 / 3, abs=0.03)
    again = found.assign(bins[:10].astype(int), keys[:10])
    assert (again == offers[:10]).all()  # whoever else is asked
    assert found.choice_P.tolist() == [0, 0]


# ---------------------------------------------------------------- prices


@given(few, st.floats(0, 5), st.booleans())
def test_at_a_price_each_question_gets_its_best_offer(ladders, price, abstain):
    for ladder, offer in zip(ladders, at_price(ladders, price, abstain=abstain), strict=True):
        choices = range(ABSTAIN if abstain else 0, len(ladder.costs_L))
        net = {i: ladder.value(i) - price * ladder.cost(i) for i in choices}
        assert net[offer] == pytest.approx(max(net.values()), abs=1e-9)
        assert all(ladder.cost(offer) <= ladder.cost(i) for i in choices if net[i] > net[offer] - 1e-12) or price == 0


def test_of_equals_the_cheapest_and_nothing_where_nothing_pays():
    ladders = [Ladder([2, 1], [0.5, 0.25]), Ladder([1, 2], [0.1, 0.3])]
    assert at_price(ladders, 0.25).tolist() == [ABSTAIN, ABSTAIN]
    assert at_price(ladders, 0.25, abstain=False).tolist() == [1, 0]
    assert at_price(ladders, 0.125).tolist() == [0, 1]
    assert at_price(ladders, 0).tolist() == [0, 1]


@settings(max_examples=200, deadline=None)
@given(few, st.integers(0, 40).map(lambda n: n / 3))
def test_the_price_for_a_budget_never_overspends_and_wastes_less_than_its_next_steps(ladders, mean_cost):
    price = price_for(ladders, mean_cost)
    offers = at_price(ladders, price)
    assert spent(ladders, offers) <= mean_cost + 1e-9
    value, cost = worth(ladders, offers), spent(ladders, offers)
    assert value == pytest.approx(allocate(ladders, cost).bound, abs=1e-9)  # the best for what it spends
    if price:
        cheaper = at_price(ladders, price * 0.999)
        lower = [at_price(ladders, p) for p in np.linspace(0, price, 500)]
        more = min((spent(ladders, o) for o in [cheaper, *lower] if spent(ladders, o) > cost + 1e-9), default=math.inf)
        assert more > mean_cost - 1e-9


def test_the_price_with_bins_by_hand():
    ladders = [Ladder([1, 2], [0.8, 0.9]), Ladder([1, 2], [0.3, 0.5])]  # .8 .1 and .3 .2
    assert price_for(ladders, 0.25, [100, 300]) == pytest.approx((0.8 + 0.3) / 2)
    assert price_for(ladders, 1, [100, 300]) == pytest.approx((0.3 + 0.2) / 2)
    assert price_for(ladders, 1.7, [100, 300]) == pytest.approx((0.3 + 0.2) / 2)
    assert price_for(ladders, 2, [100, 300]) == 0
    assert price_for(ladders, 0.1, [100, 300]) == pytest.approx(1.6)
    assert at_price(ladders, 1.6).tolist() == [ABSTAIN, ABSTAIN]


# ---------------------------------------------------------------- plain samples


def test_samples_by_hand():
    """Marginals: .5 .25 .125 .0625 and .3 .21 .147 .1029."""
    assert samples_for([0.5, 0.3], 1).tolist() == [1, 0]
    assert samples_for([0.5, 0.3], 4).tolist() == [2, 2]
    assert samples_for([0.5, 0.3], 5).tolist() == [2, 3]
    assert samples_for([0.5, 0.3], 6).tolist() == [3, 3]
    assert samples_for([0, 1, 0.2], 10).tolist() == [0, 1, 9]  # 1 needs one, 0 gains nothing
    assert samples_for([0, 1], 10).tolist() == [0, 1]
    assert samples_for([0.5, 0.02], 10, floor=0.02).tolist() == [10, 0]
    assert samples_for([0.5, 0.3], 100, price=0.2).tolist() == [2, 2]
    assert samples_for([], 5).tolist() == []


rates = st.lists(st.floats(0, 1), min_size=1, max_size=4)


@settings(max_examples=100, deadline=None)
@given(rates, st.integers(0, 12))
def test_samples_are_the_allocation_on_their_curves(rates_P, total):
    num = samples_for(rates_P, total)
    found = 1 - (1 - np.array(rates_P)) ** num
    ladders = [Ladder(np.arange(1.0, 14), 1 - (1 - rate) ** np.arange(1, 14)) for rate in rates_P]
    assert num.sum() <= total
    assert found.mean() == pytest.approx(allocate(ladders, total / len(rates_P)).value, abs=1e-9)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.floats(0, 1), min_size=1, max_size=3), st.integers(0, 7))
def test_no_other_split_of_the_samples_is_better(rates_P, total):
    rates_P = np.array(rates_P)
    value = (1 - (1 - rates_P) ** samples_for(rates_P, total)).sum()
    splits = (s for s in itertools.product(range(total + 1), repeat=len(rates_P)) if sum(s) <= total)
    assert value == pytest.approx(max((1 - (1 - rates_P) ** np.array(s)).sum() for s in splits), abs=1e-9)


# ---------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: Ladder([1, 2], [0.1]), DataError, "a ladder needs as many values as costs"),
        (lambda: Ladder([], []), DataError, "a ladder needs as many values as costs"),
        (lambda: Ladder([-1], [0.1]), DataError, "costs of 0 or more"),
        (lambda: Ladder([1], [math.nan]), DataError, "finite values"),
        (lambda: concave([1], [1, 2]), DataError, "a ladder needs"),
        (lambda: allocate([], 1), DataError, "no ladders"),
        (lambda: allocate([Ladder([1], [1])], 1, counts=[0]), DataError, "1 ladders need as many counts"),
        (lambda: allocate([Ladder([1], [1])], 1, counts=[1, 2]), DataError, "1 ladders need as many counts"),
        (lambda: allocate([Ladder([4], [1])], 1, abstain=False), BudgetError, "of 1 does not buy .* at least 4"),
        (lambda: allocate([Ladder([4], [1])], math.nan), BudgetError, "of nan does not buy"),
        (lambda: allocate([Ladder([4], [1])], -1), BudgetError, "of -1 does not buy .* at least 0"),
        (lambda: price_for([Ladder([4], [1])], 1, abstain=False), BudgetError, "does not buy"),
        (lambda: samples_for([0.5, 1.5], 3), DataError, r"rates lie in 0\.\.1, not 0.5\.\.1.5"),
    ],
)
def test_what_means_nothing_is_refused_with_the_way_out(call, error, message):
    with pytest.raises(error, match=message):
        call()
