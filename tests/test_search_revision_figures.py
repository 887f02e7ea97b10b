"""The figures of chains, against counts made by hand."""

import math

import pytest

from search.revision_figures import chain_figures, chains
from search.types import Candidate, Finish, Grade, Problem, SearchResult, Spend

LETTERS = {"R": Grade.CORRECT, "W": Grade.WRONG, "T": Grade.WRONG, "U": Grade.UNGRADED}


def result(key: str, *written: str) -> SearchResult:
    """A search by chains written as letters, stored turn by turn: R right, W wrong, T truncated, U ungraded."""
    candidates = [
        Candidate((5,), letter, Finish.LENGTH if letter == "T" else Finish.EOS, grade=LETTERS[letter], chain=number)
        for turn in range(max(map(len, written)))
        for number, chain in enumerate(written)
        for letter in chain[turn : turn + 1]
    ]
    return SearchResult(Problem(key, key, "1"), "revisions", tuple(candidates), 0, Spend(), "model", "seed")


def test_chains_are_told_apart_and_stay_in_order():
    found = chains(result("a", "RWR", "WW"))
    assert ["".join(c.text for c in chain) for chain in found] == ["RWR", "WW"]
    loose = Candidate((5,), "R", Finish.EOS, grade=Grade.CORRECT)
    assert chains(result("a", "RW").with_candidates([loose])) == []


def test_accuracy_and_changes_turn_by_turn():
    figures = chain_figures([result("a", "RRW", "WRR"), result("b", "WWR")])
    assert [e.value for e in figures.accuracy] == pytest.approx([1 / 3, 2 / 3, 2 / 3])
    assert [e.n for e in figures.accuracy] == [3, 3, 3]
    assert [e.value for e in figures.right_to_wrong_at] == [0, 1 / 2]
    assert [e.value for e in figures.wrong_to_right_at] == [1 / 2, 1]
    assert figures.right_to_wrong.value == pytest.approx(1 / 3)
    assert figures.wrong_to_right.value == pytest.approx(2 / 3)
    assert figures.revised.value == pytest.approx(4 / 6)


def test_an_attempt_that_was_not_shown_is_nobodys_predecessor():
    figures = chain_figures([result("a", "TR", "UR", "RT"), result("b", "WR")])
    assert figures.wrong_to_right.n == 1
    assert figures.right_to_wrong.value == 1
    assert figures.accuracy[0].value == 1 / 4  # ungraded and truncated ones are not right


def test_the_error_is_that_of_problems_not_of_chains():
    copied = chain_figures([result(f"a{i}", *["RR"] * 8) for i in range(10)] + [result("b", *["WW"] * 8)] * 10)
    assert copied.accuracy[0].se == pytest.approx(math.sqrt(0.25 / 20), rel=0.05)


def test_metrics_have_fixed_names_and_leave_out_shares_of_nothing():
    metrics = chain_figures([result("a", "RR"), result("b", "RW")]).metrics()
    assert set(metrics) == {
        "revision/accuracy_turn_1",
        "revision/accuracy_turn_2",
        "revision/accuracy_revised",
        "revision/right_to_wrong",
        "revision/right_to_wrong_turn_2",
    }
    assert metrics["revision/right_to_wrong"] == pytest.approx((0.5, 0.5))
    assert chain_figures([]).metrics() == {}
