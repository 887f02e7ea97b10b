"""The compute-optimal report as data: its fields, that it is JSON, and that what it says can be worked out by hand."""

import json
import math

import numpy as np
import pytest

from search.assessment import KINDS, Difficulty, assessment
from search.cells import Cell, Grid
from search.errors import DataError
from search.optimal import Cells, arm_curve, quantile_bins

# every field of the document: a type, [what each item of a list is], or {"*": what every value is}
CURVE = {"accuracy": [float], "flops": [float]}
MAYBE = (float, type(None))
RATIO = {
    **dict.fromkeys(("arms", "bins", "baseline", "cheapest_baseline"), str),
    **dict.fromkeys(("budget", "accuracy", "value", "low", "high"), float),
    "draws": int,
    **dict.fromkeys(("cheapest", "cheapest_low"), MAYBE),
    "against": [{"baseline": str, **dict.fromkeys(("accuracy", "value", "low", "high"), float)}],
}
ADDS = {"arms": str, "bins": str, **dict.fromkeys(("budget", "value", "low", "high"), float)}
GAIN = dict.fromkeys(("budget", "flops", "uniform", "across", "gain", "low", "high"), float)
SCHEMA = {
    "n": int,
    "actual": bool,
    "arms": {"*": [str]},
    "baselines": [str],
    "cells": [{"arm": str, **dict.fromkeys(("budget", "accuracy", "se", "flops", "flops_actual"), float)}],
    "fixed": {"*": CURVE},
    "optimal": {"*": {"*": CURVE}},
    "ratios": [RATIO],
    "difficulty_adds": [ADDS],
    "by_bin": {"*": [{"bin": int, "n": int, "rate": float, "accuracy": {"*": float}}]},
    "choices": {
        "budgets": [float],
        "edges": [float],
        "counts": [int],
        "rungs": [[{"arm": str, **dict.fromkeys(("budget", "value", "se", "flops"), float)}]],
    },
    "across": [GAIN],
    "across_samples": [{"arm": str, **GAIN}],
}


def check(value, schema, where="document"):
    if isinstance(schema, list):
        assert isinstance(value, list), where
        for i, item in enumerate(value):
            check(item, schema[0], f"{where}[{i}]")
    elif isinstance(schema, dict):
        assert isinstance(value, dict), where
        if "*" not in schema:
            assert value.keys() == schema.keys(), where
        for name, item in value.items():
            check(item, schema.get("*") or schema[name], f"{where}.{name}")
    else:
        assert isinstance(value, schema) or (schema is float and isinstance(value, int)), f"{where} is {value!r}"


NUM = 60
EASY = np.repeat([True, False], NUM // 2)


def cell(arm, budget, solved_P, flops):
    solved, same = np.asarray(solved_P, dtype=np.float64), np.full(NUM, float(flops))
    return Cell(arm, budget, solved, same, 3 * same, solved, solved)


def made_up(seed=0):
    """Easy ones are solved by anything, hard ones by searching steps, for ten times the FLOPs of a greedy answer."""
    rng = np.random.default_rng(seed)
    hard_4, hard_16 = (EASY | (rng.random(NUM) < chance) for chance in (0.1, 0.3))
    tree = EASY | (rng.random(NUM) < 0.9)
    cells = (
        cell("greedy", 1, EASY, 10),
        cell("pass", 4, np.ones(NUM), 1),
        cell("majority", 4, hard_4, 40),
        cell("majority", 16, hard_16, 160),
        cell("step_rejection", 4, tree, 100),
        cell("beam(width=2)", 4, EASY, 120),
    )
    return Grid(tuple(f"p{i}" for i in range(NUM)), cells)


KNOWN = {
    "oracle": Difficulty(np.where(EASY, 0.9, 0.1) + np.arange(NUM) / 1e4),
    "question": Difficulty(np.where(EASY, 0.8, 0.3) + np.arange(NUM) / 1e4, 1.0),
}


@pytest.fixture(scope="module")
def found():
    return assessment(made_up(), KNOWN, ["majority"], budgets=[4, 16], bins=2, draws=8)


def test_the_document_has_its_fields_and_is_json(found):
    check(found, SCHEMA)
    assert json.loads(json.dumps(found, allow_nan=False)) == found


def test_what_is_compared(found):
    assert found["arms"] == {
        "all": ["greedy", "majority", "step_rejection", "beam(width=2)"],
        "paper": ["greedy", "majority", "beam(width=2)"],
    }
    assert {*found["fixed"]} == {*found["arms"]["all"]}
    assert found["optimal"].keys() == {"all", "paper"}
    assert all(curves.keys() == {"oracle", "question", "random", "none"} for curves in found["optimal"].values())
    assert {(r["arms"], r["bins"], r["budget"]) for r in found["ratios"]} == {
        (arms, kind, budget) for arms in ("all", "paper") for kind in KINDS if kind != "verifier" for budget in (4, 16)
    }
    assert {*found["by_bin"]} == {"oracle", "question"}


def test_pass_is_measured_and_never_chosen(found):
    """It solves everything for nothing: by the gold answers."""
    assert any(c["arm"] == "pass" for c in found["cells"])
    assert "pass" not in found["fixed"]
    names = {rung["arm"] for row in found["choices"]["rungs"] for rung in row}
    assert names == {"greedy", "step_rejection"}
    for rows in (found["across"], *(found["optimal"]["all"][kind]["flops"] for kind in ("oracle", "none"))):
        assert rows
    assert min(row["flops"] for row in found["across"]) >= 10
    assert found["optimal"]["all"]["oracle"]["flops"][0] >= 10


def test_a_budget_that_pass_alone_was_measured_at_is_no_level():
    grid = made_up()
    only = Grid(grid.keys, (*(c for c in grid.cells if c.arm != "greedy"), cell("pass", 1, np.ones(NUM), 1)))
    found = assessment(only, KNOWN, ["majority"], budgets=[4], bins=2, draws=2)
    assert found["choices"]["budgets"] == [4, 16]


def test_the_choice_is_where_the_strategies_are_cheapest(found):
    """Greedy for the easy half, rejection for the hard one: 55 FLOPs for as much as rejection for all, for 100."""
    curve = found["optimal"]["all"]["oracle"]
    assert max(curve["accuracy"]) == pytest.approx(found["fixed"]["step_rejection"]["accuracy"][0])
    assert min(f for f, a in zip(curve["flops"], curve["accuracy"], strict=True) if a > 0.9) == pytest.approx(55)
    blind = found["optimal"]["all"]["none"]
    assert min(f for f, a in zip(blind["flops"], blind["accuracy"], strict=True) if a > 0.9) == pytest.approx(100)
    told = found["optimal"]["all"]["question"]["flops"]
    assert told == pytest.approx([f + 1 for f in curve["flops"]]), "the same bins, and what a prediction costs"
    assert [[r["arm"] for r in row] for row in found["choices"]["rungs"]] == [
        ["greedy", "greedy", "greedy"],
        ["greedy", "step_rejection", "step_rejection"],
    ]
    assert found["choices"]["budgets"] == [1, 4, 16]
    assert found["choices"]["counts"] == [30, 30]


def test_ratios_are_of_the_arms_and_bins_they_name(found):
    by_name = {(r["arms"], r["bins"], r["budget"]): r for r in found["ratios"]}
    cells = Cells(made_up())
    accuracy, flops = arm_curve(cells, "majority").accuracy_L[1], 160.0
    own = found["optimal"]["all"]["oracle"]
    row = by_name["all", "oracle", 16]
    assert (row["baseline"], row["accuracy"]) == ("majority", pytest.approx(accuracy))
    accuracies, costs = (np.array([own[name][0], own[name][-1]]) for name in ("accuracy", "flops"))
    assert row["value"] == pytest.approx(flops / np.interp(accuracy, accuracies, costs), rel=0.1)
    assert by_name["all", "oracle", 16]["value"] > by_name["all", "none", 16]["value"]
    assert by_name["all", "oracle", 16]["value"] > by_name["paper", "oracle", 16]["value"]
    (against,) = row["against"]
    assert against["baseline"] == "majority"
    assert [against[name] for name in ("value", "low", "high")] == [row[name] for name in ("value", "low", "high")]


def test_what_difficulty_adds_is_a_choice_by_bins_over_one_without(found):
    ratio = {(r["arms"], r["bins"], r["budget"]): r["value"] for r in found["ratios"]}
    adds = {(r["arms"], r["bins"], r["budget"]): r for r in found["difficulty_adds"]}
    row = adds["all", "oracle", 16]
    assert row["value"] == pytest.approx(ratio["all", "oracle", 16] / ratio["all", "none", 16])
    assert row["low"] <= row["value"] <= row["high"]
    assert row["low"] > 1
    assert not any(bins == "none" for _, bins, _ in adds)


def test_bins_hold_every_problem_and_cell(found):
    for kind, rows in found["by_bin"].items():
        bins_P = quantile_bins(KNOWN[kind].rates_P, 2)
        assert [(row["bin"], row["n"]) for row in rows] == [(1, 30), (2, 30)]
        for row in rows:
            inside = bins_P == row["bin"]
            assert row["rate"] == pytest.approx(KNOWN[kind].rates_P[inside].mean())
            assert row["accuracy"] == {c.name: pytest.approx(c.solved_P[inside].mean()) for c in made_up().cells}


def test_sharing_a_budget_is_compared_at_the_same_mean(found):
    """At 16 samples the table's choice costs 55 a question; sharing has nothing to add to it."""
    (one, four, sixteen) = found["across"]
    assert (one["budget"], one["flops"], one["gain"]) == (1, 10, 0)
    assert (four["flops"], sixteen["flops"]) == (pytest.approx(55), pytest.approx(55))
    assert sixteen["gain"] == pytest.approx(0, abs=1e-9)
    rows = {row["budget"]: row for row in found["across_samples"]}
    assert rows.keys() == {4, 16}
    assert {row["arm"] for row in rows.values()} == {"majority"}
    assert rows[4]["gain"] == pytest.approx(0, abs=1e-9), "there is nothing cheaper to take from the easy ones"
    assert rows[16]["flops"] == 160
    assert rows[16]["uniform"] == found["fixed"]["majority"]["accuracy"][1]


def test_actual_flops_are_charged_where_they_are_asked_for(found):
    actual = assessment(made_up(), KNOWN, ["majority"], budgets=[16], bins=2, draws=2, actual=True)
    assert actual["actual"]
    assert actual["fixed"]["greedy"]["flops"] == [30]
    assert actual["across_samples"][0]["flops"] == 120
    assert actual["cells"] == found["cells"]


def test_arms_that_only_measure_are_no_choice():
    early = cell("early stopping", 16, np.ones(NUM), 20)
    grid = Grid(made_up().keys, (*made_up().cells, early))
    able = [c.arm for c in made_up().cells]
    found = assessment(grid, KNOWN, ["majority", "early stopping"], able, budgets=[16], bins=2, draws=2)
    assert "early stopping" not in found["arms"]["all"]
    assert "early stopping" in found["fixed"]
    assert {r["baseline"] for r in found["ratios"]} == {"early stopping"}
    assert all(math.isfinite(r["value"]) for r in found["ratios"])


def test_random_bins_say_nothing_and_stay_as_large():
    """They choose as one bin for all does, but for luck."""
    found = assessment(made_up(), KNOWN, ["majority"], budgets=[16], bins=3, draws=20, seed=3)
    ratio = {(r["arms"], r["bins"]): r["value"] for r in found["ratios"]}
    assert ratio["all", "random"] == pytest.approx(ratio["all", "none"], rel=0.3)
    assert ratio["all", "oracle"] > 1.5 * ratio["all", "random"]


def test_what_cannot_be_assessed_is_refused():
    with pytest.raises(DataError, match="no baseline was measured at a budget of 8"):
        assessment(made_up(), KNOWN, ["majority"], budgets=[8], bins=2, draws=2)
    few = Grid(("p", "q"), tuple(Cell("greedy", 1, *([np.ones(2)] * 5)) for _ in range(1)))
    with pytest.raises(DataError, match="too few"):
        assessment(few, {"oracle": Difficulty(np.ones(2))}, ["greedy"], budgets=[1], draws=2)
