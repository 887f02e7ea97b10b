"""The StrategyTable: asked for one question or for many, written, read, and refused where it is damaged."""

import json
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from search.allocate import ABSTAIN
from search.errors import BudgetError, DataError
from search.table import EVERYWHERE, Rung, StrategyTable, pick

EASY = (Rung("greedy", 1, 0.9, 0.9, 0.01, 10.0), Rung("majority", 4, 0.95, 0.95, 0.01, 40.0))
HARD = (
    Rung("greedy", 1, 0.1, 0.1, 0.01, 10.0),
    Rung("majority", 4, 0.2, 0.2, 0.01, 40.0),
    Rung("beam(width=2)", 4, 0.5, 0.5, 0.01, 60.0),
)
ALL = (Rung("greedy", 1, 0.5, 0.5, 0.01, 10.0), Rung("beam(width=2)", 4, 0.6, 0.6, 0.01, 60.0))
TABLE = StrategyTable("answer", (0.5,), (20, 10, 10), (ALL, EASY, HARD), {"round": 3})


# ---------------------------------------------------------------- one question


def test_a_rate_is_told_its_bin_and_an_unknown_one_gets_none():
    rates = [0.9, 0.5, 0.1, math.nan, math.inf, -math.inf]
    assert TABLE.bins(rates).tolist() == [1, 2, 2, EVERYWHERE, EVERYWHERE, EVERYWHERE]
    assert TABLE.bins([]).tolist() == []
    assert TABLE.num_bins == 2


def test_a_budget_buys_the_best_that_is_as_cheap():
    assert TABLE.choose(2, 4).name == "beam(width=2) @ 4"
    assert TABLE.choose(2, 3.9).name == "greedy @ 1"
    assert TABLE.choose(EVERYWHERE, 100).name == "beam(width=2) @ 4"
    with pytest.raises(BudgetError, match=r"knows no strategy for 0.5 samples: give at least 1$"):
        TABLE.choose(1, 0.5)


def test_what_is_not_worse_by_more_than_half_an_error_of_the_difference_may_be_cheaper():
    """Errors .03 and .04: the difference has .05, so .675 of .70 is near enough and .67 is not."""
    best, near = Rung("b", 4, 0.70, 0.7, 0.03, 40.0), Rung("a", 2, 0.676, 0.676, 0.04, 20.0)
    far, worst = Rung("c", 1, 0.67, 0.67, 0.04, 5.0), Rung("d", 1, 0.6, 0.6, 0.3, 1.0)
    assert pick([best, near, far]) == 1
    assert pick([best, far]) == 0
    assert pick([best, near, far, worst]) == 3
    assert pick([far]) == 0


def test_of_equals_the_cheaper_one_is_picked():
    assert pick([Rung("a", 4, 1.0, 1, 0, 9.0), Rung("b", 2, 1.0, 1, 0, 5.0), Rung("c", 2, 1.0, 1, 0, 7.0)]) == 1


def test_flops_buy_the_best_too():
    assert TABLE.best_within(2, 59).name == "majority @ 4"
    assert TABLE.best_within(2, 60).name == "beam(width=2) @ 4"
    with pytest.raises(BudgetError, match="costs as little as 9 FLOPs"):
        TABLE.best_within(2, 9)


# ---------------------------------------------------------------- many questions


def test_hard_questions_get_what_easy_ones_do_not_need():
    """Greedy costs 10 each; of 22.5 a question 50 are left, just what a beam for the only hard one costs more."""
    found = TABLE.spread(22.5, [3, 1])
    assert [TABLE.ladders[b + 1][i].name for b, i in enumerate(found.choice_P)] == ["greedy @ 1", "beam(width=2) @ 4"]
    assert found.cost == 22.5
    assert found.value == pytest.approx((3 * 0.9 + 0.5) / 4)


def test_a_bin_without_questions_costs_nothing_and_gets_its_cheapest():
    found = TABLE.spread(60, [0, 5])
    assert found.choice_P.tolist() == [0, 2]
    assert found.cost == 60
    split = TABLE.spread(35, [0, 10]).splits  # half of the hard ones: 10 + 50 / 2
    assert [(s.ladder, s.offer, s.share) for s in split] == [(1, 2, 0.5)]


def test_what_cannot_be_paid_is_refused():
    with pytest.raises(BudgetError, match="mean budget of 9 does not buy"):
        TABLE.spread(9, [1, 1])
    with pytest.raises(DataError, match="nothing to share a budget among"):
        TABLE.spread(9, [0, 0])
    assert TABLE.spread(9, [1, 1], abstain=True).choice_P.tolist() == [0, ABSTAIN]
    assert TABLE.spread(4, [1, 1], abstain=True).choice_P.tolist() == [ABSTAIN, ABSTAIN]


rungs = st.builds(
    lambda budget, value, flops: Rung("a", budget, value, value, 0.0, flops),
    st.sampled_from([1, 2, 4, 8]),
    st.floats(0, 1).map(lambda x: round(x, 3)),
    st.floats(1, 100).map(lambda x: round(x, 1)),
)
ladders = st.lists(rungs, min_size=1, max_size=6).map(lambda found: tuple(sorted(found, key=lambda r: r.flops)))


@settings(max_examples=150, deadline=None)
@given(st.lists(st.tuples(ladders, st.integers(0, 30)), min_size=1, max_size=5), st.integers(8, 20))
def test_sharing_never_overspends_and_is_never_worth_less_than_the_same_for_all(bins, budget):
    """But by the part of a step that no whole question can take."""
    counts = [count for _, count in bins]
    if not sum(counts):
        return
    table = StrategyTable(
        "answer", tuple(range(1, len(bins))), (sum(counts), *counts), (bins[0][0], *(b for b, _ in bins))
    )
    uniform = [table.choose(b, budget) for b in range(1, table.num_bins + 1)]
    total = sum(counts)
    mean = sum(n * rung.flops for n, rung in zip(counts, uniform, strict=True)) / total
    value = sum(n * rung.value for n, rung in zip(counts, uniform, strict=True)) / total
    found = table.spread(mean, counts)
    assert found.cost <= mean * (1 + 1e-9)
    step = max(max(r.value for r in ladder) - min(r.value for r in ladder) for ladder, _ in bins)
    assert found.value >= value - step / total - 1e-9
    assert found.bound >= value - 1e-9


# ---------------------------------------------------------------- on disk


def test_a_table_comes_back_as_it_was(tmp_path):
    TABLE.save(tmp_path / "table.json")
    assert StrategyTable.load(tmp_path / "table.json") == TABLE
    assert StrategyTable.from_json(json.loads(json.dumps(TABLE.to_json()))) == TABLE
    assert TABLE.to_json()["format"] == 1


def damaged(**changes):
    return {**TABLE.to_json(), **changes}


def rung_with(**changes):
    ladders = TABLE.to_json()["ladders"]
    ladders[1][0] = {**ladders[1][0], **changes}
    return damaged(ladders=ladders)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (damaged(format=2), "has format 2, this Ratchet reads 1: fit it again"),
        (damaged(format=None), "has format None"),
        ({}, "no strategy table"),
        ([], "no strategy table"),
        ("table", "no strategy table"),
        (None, "no strategy table"),
        (damaged(edges=None), "no strategy table"),
        (damaged(edges=["low"]), "no strategy table"),
        (damaged(made_of=3), "no strategy table"),
        (damaged(edges=[]), "edges, counts and ladders do not fit together"),
        (damaged(counts=[20, 10]), "do not fit together"),
        (damaged(ladders=[]), "do not fit together"),
        (damaged(ladders=[*TABLE.to_json()["ladders"][:2], []]), "do not fit together"),
        (damaged(edges=[math.nan]), "edges do not rise"),
        (damaged(objective="fame"), "objective 'fame' is none of answer, rows"),
        (rung_with(value=math.nan), "is no rung"),
        (rung_with(flops=None), "no strategy table"),
        (rung_with(flops="10"), "no strategy table"),
        (rung_with(arm=7), "is no rung"),
        (rung_with(flops=99.0), "not in the order of their FLOPs"),
        (rung_with(colour="red"), "no strategy table"),
    ],
)
def test_a_damaged_table_is_refused_with_its_name(row, message, tmp_path):
    path = tmp_path / "table.json"
    path.write_text(json.dumps(row), encoding="utf-8")
    with pytest.raises(DataError, match=message) as caught:
        StrategyTable.load(path)
    assert str(caught.value).startswith(str(path))


def test_edges_of_several_bins_rise():
    four = (EASY, EASY, HARD, HARD)
    row = StrategyTable("rows", (0.7, 0.2), (4, 1, 1, 2), four).to_json()
    with pytest.raises(DataError, match="edges do not rise"):
        StrategyTable.from_json(row)


@pytest.mark.parametrize("text", ["", "{", "\x00"])
def test_a_file_that_is_no_json_is_refused(text, tmp_path):
    (tmp_path / "table.json").write_text(text)
    with pytest.raises(DataError, match="cannot be read as a strategy table"):
        StrategyTable.load(tmp_path / "table.json")
    with pytest.raises(DataError, match="cannot be read as a strategy table"):
        StrategyTable.load(tmp_path / "nowhere.json")


def test_a_table_of_one_bin_treats_all_alike():
    table = StrategyTable("rows", (), (5, 5), (EASY, EASY))
    assert StrategyTable.from_json(table.to_json()).bins([0.1, 0.9, math.nan]).tolist() == [1, 1, EVERYWHERE]
