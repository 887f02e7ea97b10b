"""The compute-optimal choice: shrunken cells, prices, two folds, bins, and ratios whose intervals hold the truth."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from search.cells import Cell, Grid
from search.errors import DataError
from search.optimal import (
    MIN_PROBLEMS,
    Cells,
    Curve,
    arm_curve,
    assess,
    at_mean,
    by_budget,
    by_price,
    equal_accuracy,
    fit_table,
    outcomes,
    prices_of,
    quantile_bins,
    random_bins,
)
from search.stats import quantile_edges


def cell(arm, budget, solved_P, flops, rows_P=0.0):
    solved = np.asarray(solved_P, dtype=np.float64)
    cost = np.broadcast_to(np.asarray(flops, dtype=np.float64), solved.shape)
    return Cell(arm, budget, solved, cost, 2 * cost, solved, np.broadcast_to(rows_P, solved.shape))


def grid_of(*cells):
    return Grid(tuple(f"p{i}" for i in range(len(cells[0].solved_P))), cells)


def noise(num_problems, num_cells, seed, chance=0.5):
    """Arms of one and the same quality, each a little dearer than the one before."""
    rng = np.random.default_rng(seed)
    return grid_of(*(cell(f"a{i}", i + 1, rng.random(num_problems) < chance, i + 1) for i in range(num_cells)))


def fit(cells, bins_P):
    """The fit on all problems."""
    member = np.array([(bins_P == b + 1).astype(float) for b in range(bins_P.max())])
    (found,) = cells.fits(member[None])
    return found


# ---------------------------------------------------------------- shrinkage


def levels(num_bins, arms, per_bin, rng, lucky=None):
    """Cells that are `arms[a]` right in every bin, but for what the lucky one is in the last bin."""
    bins_P = np.repeat(np.arange(1, num_bins + 1), per_bin)
    cells = []
    for a, chance in enumerate(arms):
        chances_P = np.full(len(bins_P), chance)
        if lucky is not None and a == lucky[0]:
            chances_P[bins_P == num_bins] = lucky[1]
        cells.append(cell(f"a{a}", 1, rng.random(len(bins_P)) < chances_P, a + 1))
    return Cells(grid_of(*cells)), bins_P


def test_a_lucky_noisy_cell_is_pulled_to_what_its_arm_does_elsewhere():
    """Twenty arms of .5; in the last of five bins of 25 one is right 80 % of the time by luck (3 errors above)."""
    rng = np.random.default_rng(0)
    cells, bins_P = levels(5, [0.5] * 20, 25, rng)
    last = bins_P == 5
    cells.values_C_P[3, last] = np.repeat([1.0, 0.0], [20, 5])
    found = fit(Cells(grid_of(*(cell(f"a{i}", 1, row, 1) for i, row in enumerate(cells.values_C_P)))), bins_P)
    assert found.means_B_C[4, 3] == 0.8
    assert found.values_B_C[4, 3] < 0.65
    assert np.abs(found.values_B_C - 0.5).max() < np.abs(found.means_B_C - 0.5).max()
    assert np.abs(found.values_B_C - 0.5).mean() < 0.6 * np.abs(found.means_B_C - 0.5).mean()


def test_a_well_measured_cell_is_left_alone():
    """The last bin has 2000 problems a bin, and its arm is .9 there, as measured."""
    cells, bins_P = levels(3, [0.5] * 6, 2000, np.random.default_rng(1), lucky=(2, 0.9))
    found = fit(cells, bins_P)
    assert found.values_B_C[2, 2] == pytest.approx(found.means_B_C[2, 2], abs=0.01)
    assert found.ses_B_C[2, 2] == pytest.approx(math.sqrt(0.9 * 0.1 / 2000), rel=0.5)


def test_an_arm_that_is_better_everywhere_keeps_its_level():
    cells, bins_P = levels(4, [0.3, 0.3, 0.3, 0.7], 40, np.random.default_rng(2))
    found = fit(cells, bins_P)
    assert (found.values_B_C.argmax(axis=1) == 3).all()
    assert np.abs(found.values_B_C[:, 3] - 0.7).mean() < 0.06


def test_shrinking_comes_nearer_to_the_truth():
    raw, shrunken = [], []
    for seed in range(20):
        cells, bins_P = levels(5, np.linspace(0.3, 0.7, 10), 20, np.random.default_rng(seed))
        found, truth_C = fit(cells, bins_P), np.linspace(0.3, 0.7, 10)
        raw.append(((found.means_B_C - truth_C) ** 2).mean())
        shrunken.append(((found.values_B_C - truth_C) ** 2).mean())
    assert np.mean(shrunken) < 0.6 * np.mean(raw)


def test_values_without_noise_are_what_was_measured_and_certain():
    """Every problem of a bin alike: nothing is left to doubt."""
    bins_P = np.repeat([1, 2], 10)
    found = fit(Cells(grid_of(cell("a", 1, bins_P == 1, 1), cell("b", 1, bins_P == 2, 1))), bins_P)
    assert found.values_B_C.tolist() == found.means_B_C.tolist() == [[1, 0], [0, 1]]
    assert found.ses_B_C.tolist() == [[0, 0], [0, 0]]


def test_an_error_is_told_where_everything_is_shrunken_away():
    """One bin has no elsewhere: a cell is worth what was measured, and its error is that of the measurement. Were it
    none, the luckiest of equals would be chosen, dear as it is."""
    found = fit(Cells(noise(100, 8, 3)), np.ones(100, dtype=np.intp))
    assert found.values_B_C.tolist() == pytest.approx(found.means_B_C)
    rest = noise(100, 8, 3).values()
    rest = rest - rest.mean(axis=0)
    assert found.ses_B_C[0].tolist() == pytest.approx((rest.std(axis=1, ddof=1) / 10).tolist())
    table = fit_table(noise(300, 30, 4), [0.5] * 300)
    rung = table.choose(1, 30)
    assert rung.budget < max(table.ladders[1], key=lambda r: r.value).budget


def test_errors_say_how_far_a_value_is_from_the_truth():
    """Over many draws of the noise, arms and bins that differ: squared distance over squared error is about one."""
    distances, errors = [], []
    truth_C = np.linspace(0.35, 0.65, 8)
    for seed in range(60):
        cells, bins_P = levels(4, truth_C, 30, np.random.default_rng(seed))
        found = fit(cells, bins_P)
        values = found.values_B_C - found.values_B_C.mean(axis=1, keepdims=True)
        distances.append(((values - (truth_C - truth_C.mean())) ** 2).mean())
        errors.append((found.ses_B_C**2).mean())
    assert 0.6 < np.mean(distances) / np.mean(errors) < 1.6


def test_one_problem_alone_decides_nothing():
    """As the one problem of its bin goes, `b` would be worth 1 there."""
    rng = np.random.default_rng(5)
    bins_P = np.append(np.ones(60, dtype=np.intp), 2)
    good, bad = np.append(rng.random(60) < 0.9, 0), np.append(rng.random(60) < 0.1, 1)
    found = fit(Cells(grid_of(cell("a", 1, good, 1), cell("b", 1, bad, 1))), bins_P)
    assert found.values_B_C[1, 0] > found.values_B_C[1, 1]


def test_a_bin_without_problems_is_worth_what_all_are():
    cells = Cells(grid_of(cell("a", 1, [0, 1, 1, 1], [1, 2, 3, 6]), cell("b", 1, [0, 0, 0, 1], 1)))
    (found,) = cells.fits(np.array([[[1.0] * 4, [0.0] * 4]]))
    assert found.values_B_C[1].tolist() == [0.75, 0.25]
    assert found.flops_B_C[1].tolist() == [3, 1]
    assert found.weights_B.tolist() == [4, 0]


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.integers(2, 40), st.integers(1, 5), st.integers(1, 6))
def test_values_stay_between_nothing_and_the_most_there_is(seed, problems, num_bins, arms):
    rng = np.random.default_rng(seed)
    cells = Cells(grid_of(*(cell(f"a{i}", 1, rng.random(problems) < 0.5, 1) for i in range(arms))))
    weights_B_P = rng.integers(0, 3, (num_bins, problems)).astype(float)
    if not weights_B_P.sum():
        return
    (found,) = cells.fits(weights_B_P[None])
    for array in (found.values_B_C, found.ses_B_C, found.flops_B_C, found.means_B_C):
        assert np.isfinite(array).all()
        assert (array >= 0).all()
    assert (found.values_B_C <= cells.values_C_P.max()).all()


# ---------------------------------------------------------------- choices


def test_a_price_buys_where_it_pays():
    """Bin 1: a .9, b 1; bin 2: a .1, b .7. `b` costs 9 more: worth it below .1/9 and .6/9."""
    bins_P = np.repeat([1, 2], 10)
    a = cell("a", 1, np.repeat([0.9, 0.1], 10), 1)
    b = cell("b", 4, np.repeat([1.0, 0.7], 10), 10)
    found = fit(Cells(grid_of(a, b)), bins_P)
    assert by_price([0.1, 0.05, 0.001, 0.0])(found).tolist() == [[0, 0], [0, 1], [1, 1], [1, 1]]


def test_prices_go_from_the_cheapest_to_the_best():
    grid = grid_of(cell("a", 1, [0.1] * 9, 1), cell("b", 4, [0.5] * 9, 1000), cell("c", 8, [0.9] * 9, 1e9))
    cells = Cells(grid)
    chosen = by_price(prices_of(cells))(fit(cells, np.ones(9, dtype=np.intp)))[:, 0].tolist()
    assert chosen == sorted(chosen)
    assert {*chosen} == {0, 1, 2}
    assert prices_of(cells)[-1] == 0


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 4))
def test_a_budget_chooses_as_the_table_does(seed, num_bins):
    rng = np.random.default_rng(seed)
    rates = rng.random(60)
    cells = []
    for arm in ("a", "b", "c"):
        for budget in (1, 4, 16):
            solved = rng.random(60) < rates ** rng.random()
            cells.append(cell(arm, budget, solved, budget * rng.uniform(0.5, 2) + rng.random(60)))
    grid, budgets = grid_of(*cells), [1, 3, 4, 20]
    table = fit_table(grid, rates.tolist(), bins=num_bins)
    ready = Cells(grid)
    chosen_L_B = by_budget(ready.budgets_C, budgets)(fit(ready, quantile_bins(rates, num_bins)))
    for budget, chosen_B in zip(budgets, chosen_L_B, strict=True):
        for b, c in enumerate(chosen_B):
            assert table.choose(b + 1, budget).name == grid.cells[c].name


# ---------------------------------------------------------------- honest measures


def test_of_pure_noise_nothing_is_gained_though_it_looks_so():
    """Twelve arms that are all worth .5: the best of a bin looks 8 points better, and is not on other halves."""
    honest, flattering = [], []
    for seed in range(150):
        grid = noise(100, 12, seed)
        bins_P = random_bins(100, 4, seed=seed)
        curve = assess(Cells(grid), bins_P, by_price([0.0]), splits=3, seed=seed)
        honest.append(float(curve.accuracy_L[0]) - 0.5)
        found = fit(Cells(grid), bins_P)
        best = found.values_B_C.argmax(axis=1)
        flattering.append(float(found.means_B_C[np.arange(4), best] @ found.weights_B / 100) - 0.5)
    error = np.std(honest) / math.sqrt(len(honest))
    assert abs(np.mean(honest)) < 3 * error < 0.015
    assert np.mean(flattering) > 0.07


def test_what_a_bin_tells_is_gained_and_random_bins_gain_nothing():
    """`a` solves the easy half, `b` the hard one: knowing which is which solves all."""
    rates = np.repeat([0.9, 0.1], 100)
    rng = np.random.default_rng(6)
    a, b = (rng.random(200) < np.where(side, 0.8, 0.2) for side in (rates > 0.5, rates < 0.5))
    cells = Cells(grid_of(cell("a", 1, a, 1), cell("b", 1, b, 1)))
    told = assess(cells, quantile_bins(rates, 2), by_price([0.0]), seed=1)
    blind = assess(cells, random_bins(200, 2, seed=1), by_price([0.0]), seed=1)
    assert told.accuracy_L[0] == pytest.approx((a[:100].sum() + b[100:].sum()) / 200)
    assert blind.accuracy_L[0] < 0.6


def test_what_knowing_the_bin_costs_is_added():
    cells = Cells(grid_of(cell("a", 1, [0, 1] * 10, 3)))
    bins_P = quantile_bins(np.arange(20.0), 2)
    assert assess(cells, bins_P, by_price([0.0])).flops_L.tolist() == pytest.approx([3])
    assert assess(cells, bins_P, by_price([0.0]), extra_flops_P=2.0).flops_L.tolist() == pytest.approx([5])
    each = np.arange(20.0)
    assert assess(cells, bins_P, by_price([0.0]), extra_flops_P=each).flops_L.tolist() == pytest.approx([12.5])


def test_problem_by_problem_it_is_the_same_measure():
    """`outcomes` averages to `assess`, whose splits it shares."""
    cells, rates = Cells(noise(90, 6, 7)), np.random.default_rng(7).random(90)
    bins_P = quantile_bins(rates, 3)
    for choice in (by_price([0.1, 0.01, 0.0]), by_budget(cells.budgets_C, [1, 3, 6])):
        values_L_P, flops_L_P = outcomes(cells, bins_P, choice, seed=8)
        curve = assess(cells, bins_P, choice, seed=8)
        assert values_L_P.mean(axis=1).tolist() == pytest.approx(curve.accuracy_L.tolist())
        assert flops_L_P.mean(axis=1).tolist() == pytest.approx(curve.flops_L.tolist())


def test_a_problem_is_never_judged_by_a_choice_that_saw_it():
    """A problem whose own value alone would make its cell the best: the other half knows nothing of it."""
    solved = np.zeros((2, 40))
    solved[1, 0] = 1000.0
    cells = Cells(grid_of(cell("a", 1, solved[0] + 1, 1), cell("b", 1, solved[1], 1)))
    values_L_P, _ = outcomes(cells, np.ones(40, dtype=np.intp), by_price([0.0]))
    assert values_L_P[0, 0] == pytest.approx(1)
    assert values_L_P[0, 1:].min() < 0.9


def test_copies_of_a_resampled_problem_never_lie_on_both_sides():
    """Each problem has an arm of its own and weighs three: were a copy on the other side, it would be solved."""
    solved = np.eye(12)
    cells = Cells(grid_of(*(cell(f"a{i}", 1, row, 1) for i, row in enumerate(solved))))
    weights = np.full(12, 3.0)
    for seed in range(5):
        curve = assess(cells, np.ones(12, dtype=np.intp), by_price([0.0]), weights_P=weights, seed=seed)
        assert curve.accuracy_L.tolist() == [0.0]


def test_weights_count_as_copies_do():
    cells, bins_P = Cells(grid_of(cell("a", 1, [1, 0, 1, 0], [1, 2, 3, 4]))), np.array([1, 1, 2, 2])
    curve = assess(cells, bins_P, by_price([0.0]), weights_P=np.array([5.0, 1.0, 0.0, 2.0]))
    assert curve.accuracy_L.tolist() == pytest.approx([5 / 8])
    assert curve.flops_L.tolist() == pytest.approx([(5 * 1 + 2 + 2 * 4) / 8])


# ---------------------------------------------------------------- curves


def test_flops_at_an_accuracy_lie_between_neighbours():
    curve = Curve(np.array([0.2, 0.4, 0.8]), np.array([1.0, 2.0, 10.0]))
    assert [curve.flops_at(a) for a in (0.1, 0.2, 0.3, 0.4, 0.6, 0.8)] == pytest.approx([1, 1, 1.5, 2, 6, 10])
    assert curve.flops_at(0.81) == math.inf
    assert curve.flops_at(0.8 + 1e-12) == 10, "a sum in another order"
    assert [curve.accuracy_at(f) for f in (1, 1.5, 6, 99)] == pytest.approx([0.2, 0.3, 0.6, 0.8])
    assert math.isnan(curve.accuracy_at(0.5))


def test_points_that_a_cheaper_one_beats_are_passed_over():
    """Half of the way from .5 for 1 to .7 for 3, whatever .4 for 2 is; also where points are not in order."""
    for order in ([0, 1, 2], [1, 2, 0], [2, 1, 0]):
        curve = Curve(np.array([0.5, 0.4, 0.7])[order], np.array([1.0, 2.0, 3.0])[order])
        assert curve.flops_at(0.6) == pytest.approx(2)
        assert curve.accuracy_at(2) == pytest.approx(0.6)
    same = Curve(np.array([0.3, 0.6]), np.array([2.0, 2.0]))
    assert (same.flops_at(0.5), same.accuracy_at(2)) == (2, 0.6)


def test_a_fixed_strategy_is_a_curve_over_its_budgets():
    cells = Cells(grid_of(cell("a", 4, [1, 1, 0], 8), cell("b", 1, [1, 1, 1], 5), cell("a", 1, [1, 0, 0], 2)))
    curve = arm_curve(cells, "a", weights_P=np.array([1.0, 1.0, 2.0]))
    assert curve.accuracy_L.tolist() == [0.25, 0.5]
    assert curve.flops_L.tolist() == [2, 8]
    with pytest.raises(DataError, match="the arm c was not measured"):
        arm_curve(cells, "c")


def test_a_mean_budget_mixes_the_two_points_around_it():
    values = np.array([[0.0, 0.0], [1.0, 0.0], [1.0, 1.0]])
    flops = np.array([[1.0, 1.0], [3.0, 1.0], [9.0, 3.0]])  # means 1, 2, 6
    assert at_mean(values, flops, 0.9) is None
    for budget, expected in ((1, [0, 0]), (1.5, [0.5, 0]), (2, [1, 0]), (4, [1, 0.5]), (6, [1, 1]), (99, [1, 1])):
        found = at_mean(values[::-1], flops[::-1], budget)
        assert found is not None
        assert found.tolist() == pytest.approx(expected)


# ---------------------------------------------------------------- bins


def test_quantile_bins_are_cut_anew_in_a_resample():
    """Of the ten rates the three largest are drawn three times and more: they alone fill the easiest bins."""
    rates = np.arange(10) / 10
    assert quantile_bins(rates, 5).tolist() == [5, 5, 4, 4, 3, 3, 2, 2, 1, 1]
    weights = np.array([1, 0, 0, 0, 0, 0, 0, 3, 3, 3], dtype=np.float64)
    found = quantile_bins(rates, 5, weights)
    drawn = np.repeat(rates, weights.astype(int))
    edges = quantile_edges(drawn, 5)
    assert edges == (0.7, 0.8)
    assert found[7:].tolist() == [3, 2, 1]
    assert (quantile_bins(rates, 5, np.ones(10)) == quantile_bins(rates, 5)).all()


def test_equal_rates_share_a_bin():
    assert quantile_bins(np.full(7, 0.3), 5).tolist() == [1] * 7


def test_random_bins_are_of_equal_size_and_depend_on_the_seed_alone():
    assert np.bincount(random_bins(10, 5, seed=1)).tolist() == [0, 2, 2, 2, 2, 2]
    assert (random_bins(50, 5, seed=1) == random_bins(50, 5, seed=1)).all()
    assert (random_bins(50, 5, seed=1) != random_bins(50, 5, seed=2)).any()


# ---------------------------------------------------------------- the table


def crossing(num=200, seed=0):
    """`cheap` does on the easier half, `dear` is needed on the other."""
    rng = np.random.default_rng(seed)
    rates = np.linspace(0, 1, num)
    cheap = rng.random(num) < rates
    more = (rates < 0.5) & (rng.random(num) < 0.7)
    return grid_of(cell("cheap", 1, cheap, 1), cell("dear", 8, cheap | more, 10)), rates


def test_the_table_holds_every_cell_of_every_bin_cheapest_first():
    grid, rates = crossing()
    table = fit_table(grid, rates.tolist(), bins=4, made_of={"round": 2})
    assert table.counts == (200, 50, 50, 50, 50)
    assert table.edges == quantile_edges(rates, 4)
    assert [[r.name for r in ladder] for ladder in table.ladders] == [["cheap @ 1", "dear @ 8"]] * 5
    assert table.made_of == {"problems": 200, "cells": 2, "round": 2}
    by_bin = quantile_bins(rates, 4)
    for b in range(1, 5):
        assert [r.mean for r in table.ladders[b]] == pytest.approx(grid.values()[:, by_bin == b].mean(axis=1), abs=1e-6)
    assert [r.mean for r in table.ladders[0]] == pytest.approx(grid.values().mean(axis=1), abs=1e-6)
    assert table.bins(rates.tolist()).tolist() == by_bin.tolist()
    assert table.choose(1, 8).name == "cheap @ 1"
    assert table.choose(4, 8).name == "dear @ 8"


def test_a_table_to_find_rows_counts_rows():
    """`a` is right more often; `b` finds as much and four distinct right answers."""
    solved = np.repeat([1.0, 0.0], 20)
    one = Cell("a", 4, solved, solved + 1, solved, solved, solved)
    many = Cell("b", 4, solved * 0, solved + 1, solved, solved, 4 * solved)
    grid = grid_of(one, many)
    assert fit_table(grid, [0.5] * 40, objective="rows").choose(1, 4).arm == "b"
    assert fit_table(grid, [0.5] * 40, objective="answer").choose(1, 4).arm == "a"
    means = {rung.arm: rung.mean for rung in fit_table(grid, [0.5] * 40, objective="rows").ladders[1]}
    assert means == {"a": 0.5 + 0.1 / 8, "b": 0.55}


def test_edges_may_be_given():
    grid, rates = crossing()
    table = fit_table(grid, rates.tolist(), edges=[0.9])
    assert table.edges == (0.9,)
    assert table.counts == (200, int((rates > 0.9).sum()), int((rates <= 0.9).sum()))


def test_a_predictor_that_tells_nothing_makes_one_bin():
    grid, _ = crossing()
    table = fit_table(grid, [0.4] * 200, bins=5)
    assert (table.num_bins, table.edges, table.counts) == (1, (), (200, 200))
    assert table.ladders[0] == table.ladders[1]


def test_what_no_table_can_be_fitted_on_is_refused():
    grid, rates = crossing()
    few, _ = crossing(MIN_PROBLEMS - 1)
    with pytest.raises(DataError, match="199 rates for 200 problems: give one for each"):
        fit_table(grid, rates[1:].tolist())
    with pytest.raises(DataError, match="2 of 200 predicted rates are not finite"):
        fit_table(grid, [math.nan, math.inf, *rates[2:]])
    with pytest.raises(DataError, match=f"19 problems are too few to fit a table on: give at least {MIN_PROBLEMS}"):
        fit_table(few, [0.5] * 19)


# ---------------------------------------------------------------- budget at equal accuracy


def known_ratio(num, seed):
    """`base` at 8 samples is right .6 of the time for 80 FLOPs. `tree` is right as often on easy problems for 20 and on
    hard ones for 60: with bins .6 costs 40, half; for 200 it is right .8 of the time."""
    rng = np.random.default_rng(seed)
    easy = np.arange(num) % 2 == 0
    luck = rng.random(num)
    base = [cell("base", n, luck < chance, 10.0 * n) for n, chance in ((1, 0.2), (8, 0.6), (64, 0.9))]
    luck = rng.random(num)
    few, more, most = luck < np.where(easy, 0.6, 0.1), luck < 0.6, luck < 0.8
    trees = [cell("tree", n, solved, 10.0 * n) for n, solved in ((2, few), (6, more), (20, most))]
    return Cells(grid_of(*base, *trees)), np.where(easy, 0.8, 0.2)


def test_the_ratio_of_a_known_grid_is_covered():
    """Where an interval misses it lies below: a resample has fewer distinct problems to choose by."""
    ratios = []
    for seed in range(16):
        cells, rates = known_ratio(400, seed)
        ratios += equal_accuracy(
            cells, ["base"], ["tree"], lambda w, r=rates: quantile_bins(r, 2, w), [8], draws=30, seed=seed
        )
    assert {(r.baseline, r.budget, r.draws) for r in ratios} == {("base", 8, 30)}
    assert sum(r.low <= 2 for r in ratios) >= 15
    assert sum(r.low <= 2 <= r.high for r in ratios) >= 11
    assert np.median([r.value for r in ratios]) == pytest.approx(2, rel=0.2)


def test_the_strongest_baseline_and_the_cheapest_way_to_its_accuracy():
    """At 4 `strong` is right on all, and `lean` at 16 as well, for less. Chosen may be what costs 2."""
    strong, weak = cell("strong", 4, np.ones(40), 100), cell("weak", 4, np.repeat([1, 0], 20), 1)
    lean, own = cell("lean", 16, np.ones(40), 30), cell("own", 1, np.ones(40), 2)
    cells = Cells(grid_of(strong, weak, lean, own))
    (found,) = equal_accuracy(cells, ["strong", "weak", "lean"], ["own"], lambda w: np.ones(40, int), [4], draws=5)
    assert (found.baseline, found.accuracy, found.value) == ("strong", 1, 50)
    assert (found.cheapest_baseline, found.cheapest, found.cheapest_low) == ("lean", 15, 15)
    assert (found.low, found.high) == (50, 50)
    (dearer,) = equal_accuracy(cells, ["strong"], ["own"], lambda w: np.ones(40, int), [4], draws=5, extra_flops=2.0)
    assert dearer.value == 25, "what the difficulty costs is charged"


def test_a_choice_that_never_gets_there_has_no_ratio():
    cells = Cells(grid_of(cell("base", 4, np.ones(40), 4), cell("own", 4, np.zeros(40), 1)))
    (found,) = equal_accuracy(cells, ["base"], ["own"], lambda w: np.ones(40, int), [4], draws=5)
    assert (found.value, found.low, found.high, found.cheapest) == (0, 0, 0, 0)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6))
def test_a_baseline_always_reaches_its_own_accuracy(seed):
    """Whatever the last bits of the sums are: no ratio is infinite or no number."""
    cells = Cells(noise(60, 5, seed))
    ratios = equal_accuracy(cells, ["a0", "a4"], None, lambda w: np.ones(60, int), [1, 5], draws=8, splits=2, seed=seed)
    for ratio in ratios:
        assert all(math.isfinite(v) for v in ratio.to_json().values() if isinstance(v, float))


def test_resamples_cut_their_bins_anew():
    seen = []

    def binning(weights):
        seen.append(weights)
        return np.ones(30, dtype=np.intp)

    equal_accuracy(Cells(noise(30, 3, 0)), ["a0"], None, binning, [1], draws=4)
    assert seen[0] is None
    assert [float(w.sum()) for w in seen[1:]] == [30] * 4
    assert len({tuple(w) for w in seen[1:]}) == 4


def test_a_budget_without_a_baseline_is_refused():
    cells = Cells(noise(30, 3, 0))
    with pytest.raises(DataError, match="no baseline was measured at a budget of 7"):
        equal_accuracy(cells, ["a0"], None, lambda w: np.ones(30, int), [1, 7])
    with pytest.raises(DataError, match="the arm b was not measured"):
        equal_accuracy(cells, ["a0", "b"], None, lambda w: np.ones(30, int), [1])
