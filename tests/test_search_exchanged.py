"""A small model's search against a larger one's greedy answers, at the FLOPs of both versions of the paper."""

import json

import numpy as np
import pytest

from search.cells import Cell, Grid
from search.errors import ConfigError, DataError
from search.exchange import RATIOS, multiplier
from search.exchanged import exchanged

NUM = 20  # in each of two bins
EASY = np.repeat([True, False], NUM)


def cell(arm, budget, solved_P, flops):
    solved, same = np.asarray(solved_P, dtype=np.float64), np.full(2 * NUM, float(flops))
    return Cell(arm, budget, solved, same, same, solved, solved)


GREEDY = cell("greedy", 1, EASY, 10)  # solves the easy ones
MAJORITY = cell("majority", 16, np.ones(2 * NUM), 160)  # and for 160 FLOPs all
LARGER = cell("greedy", 1, np.where(EASY, 1.0, 0.5), 40)
GRID = Grid(tuple(f"p{i}" for i in range(2 * NUM)), (GREEDY, MAJORITY))


def rows_of(found):
    return {(row["version"], row["R"]): row for row in found["rows"]}


def test_what_each_version_allows_is_what_its_formula_says():
    """M = 4. v1, R = 22: 4 + 9 / 22 = 4.41 greedy answers; ICLR counts inference twice, so of as many FLOPs twice."""
    found = exchanged(GRID, LARGER, 4.0, EASY * 1.0, bins=2)
    rows = rows_of(found)
    assert {key: row["times"] for key, row in rows.items()} == {
        (version, ratio): multiplier(4.0, ratio, version) for version, ratios in RATIOS.items() for ratio in ratios
    }
    assert rows["v1", 22.0]["flops"] == pytest.approx(10 * (4 + 9 / 22))
    assert rows["iclr", 11.0]["flops"] == pytest.approx(2 * 10 * (4 + 4.5 / 11))
    assert found["multiplier"] == 4.0
    assert found["small"] == {"accuracy": 0.5, "se": pytest.approx(0.0801, abs=1e-4), "flops": 10}
    assert (found["larger"]["accuracy"], found["larger"]["flops"]) == (0.75, 40)


def test_search_wins_where_it_may_cost_much_and_loses_where_it_may_not():
    """With 44 FLOPs a hard question gets the majority with chance (44.1 - 10) / 150, with 60 and more always."""
    rows = rows_of(exchanged(GRID, LARGER, 4.0, EASY * 1.0, bins=2))
    dear, cheap = rows["v1", 22.0], rows["v1", 0.16]
    easy, hard = dear["bins"]
    assert (easy["bin"], easy["n"]) == (1, NUM)
    assert [easy[name] for name in ("small", "larger", "gain", "low", "high")] == pytest.approx([1, 1, 0, 0, 0])
    assert hard["small"] == pytest.approx((10 * (4 + 9 / 22) - 10) / 150)
    assert hard["gain"] == pytest.approx(hard["small"] - 0.5)
    assert dear["all"]["n"] == 2 * NUM
    assert dear["all"]["small"] == pytest.approx((1 + hard["small"]) / 2)
    assert cheap["flops"] > 160
    assert [b["small"] for b in cheap["bins"]] == pytest.approx([1, 1])
    assert cheap["all"]["gain"] == pytest.approx(0.25)
    assert cheap["all"]["low"] > 0.1


def test_a_bin_that_can_buy_nothing_solves_nothing():
    """M = 1 allows one greedy answer; on hard problems even that costs more."""
    hard_costs = Cell("greedy", 1, EASY * 1.0, np.where(EASY, 5.0, 15.0), *([EASY * 1.0] * 3))
    row = rows_of(exchanged(Grid(GRID.keys, (hard_costs, MAJORITY)), LARGER, 1.0, EASY * 1.0, bins=2))["v1", 22.0]
    assert row["flops"] == 10
    assert [b["small"] for b in row["bins"]] == pytest.approx([1, 0])


def test_a_bin_of_one_problem_has_no_interval_and_the_document_is_json():
    rates = np.append(np.zeros(2 * NUM - 1), 1.0)
    found = exchanged(GRID, LARGER, 4.0, rates, bins=2)
    first = found["rows"][0]["bins"][0]
    assert (first["n"], first["low"], first["high"]) == (1, None, None)
    json.dumps(found, allow_nan=False)


def test_what_cannot_be_exchanged_is_refused():
    with pytest.raises(DataError, match="needs the small model's greedy answers: add greedy to --strategies"):
        exchanged(GRID.only(["majority"]), LARGER, 4.0, EASY * 1.0)
    with pytest.raises(ConfigError, match=r"0.5 times as large is no larger model"):
        exchanged(GRID, LARGER, 0.5, EASY * 1.0)
