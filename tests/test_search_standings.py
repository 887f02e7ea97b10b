"""Rows of strategies against each other: paired gains, savings at equal accuracy, the document of `ratchet eval`."""

import json

import pytest

from search import stats
from search.standings import Row, Saving, gain, saving, to_json
from search.types import Spend


def row(strategy, budget, values, flops=0.0, **more):
    values = dict(enumerate(values)) if isinstance(values, list) else values
    return Row(strategy, budget, values, Spend(samples=int(budget) * len(values), flops_ideal=flops), **more)


def curve(*points):
    """A baseline of 100 problems that reaches these accuracies at these FLOPs a problem."""
    return [
        row("majority", i, [1.0] * round(100 * accuracy) + [0.0] * round(100 - 100 * accuracy), 100 * flops)
        for i, (flops, accuracy) in enumerate(points, 1)
    ]


def test_a_gain_is_paired_over_the_strongest_plain_baseline_at_the_same_budget():
    greedy = row("greedy", 1, [1, 0, 0, 0])
    majority = row("majority", 4, [1, 1, 0, 0])
    better = row("majority", 16, [1, 1, 1, 1])
    beam = row("beam", 4, [1, 1, 1, 0])
    found = gain(beam, [greedy, majority, better, beam], ("greedy", "majority"))
    expected = stats.paired_difference([1, 1, 0, 0], [1, 1, 1, 0])
    assert (found.over, found.n) == ("majority", 4)
    assert [found.value, found.low, found.high] == pytest.approx([expected.mean, expected.low, expected.high])
    assert gain(greedy, [greedy, row("majority", 1, [0, 0, 0, 0])], ("greedy", "majority")) is None  # the strongest
    assert gain(beam, [beam], ("greedy", "majority")) is None


def test_greedy_has_one_answer_at_any_budget():
    greedy, beam = row("greedy", 1, [1, 1]), row("beam", 64, [1, 0])
    assert gain(beam, [greedy, beam], ("greedy", "majority")).value == -0.5


def test_a_baseline_may_have_options_but_no_vote_of_its_own():
    majority, other = row("majority(samples=4)", 500, [1, 0, 0]), row("majority(vote=weighted)", 500, [1, 1, 1])
    beam = row("beam(samples=4)", 500, [1, 1, 0], 10, verified=True)
    found = gain(beam, [majority, other, beam], ("greedy", "majority"))
    assert (found.over, found.value) == ("majority(samples=4)", pytest.approx(1 / 3))
    (_, _, shown) = to_json("x", 3, 0, [majority, other, beam])["results"]
    assert shown["saving"]["over"] == "majority"


def test_a_gain_is_over_the_problems_that_both_finished():
    majority, beam = row("majority", 4, {"a": 0.0, "b": 1.0, "c": 1.0}), row("beam", 4, {"a": 1.0, "c": 1.0, "d": 0.0})
    found = gain(beam, [majority, beam], ("majority",))
    assert (found.value, found.n) == (0.5, 2)
    assert gain(row("beam", 4, {"x": 1.0}), [majority], ("majority",)) is None


@pytest.mark.parametrize(
    ("accuracy", "expected"),
    [(0.2, 10 / 5), (0.4, 100 / 5), (0.3, 10**1.5 / 5), (0.41, None), (0.19, None), (0.5, None)],
    ids=["at the first", "at the last", "half way in the logarithm", "above", "below", "far above"],
)
def test_a_saving_is_what_the_baseline_needs_for_the_same_accuracy(accuracy, expected):
    own = row("beam", 4, [1.0] * round(100 * accuracy) + [0.0] * round(100 - 100 * accuracy), 500)
    found = saving(own, curve((100, 0.4), (10, 0.2)))
    assert found.value == (None if expected is None else pytest.approx(expected))
    assert found.more_than == (pytest.approx(100 / 5) if accuracy > 0.4 else None)


def test_a_curve_that_falls_is_read_where_it_first_gets_there():
    own = row("beam", 4, [1.0] * 30 + [0.0] * 70, 100)
    assert saving(own, curve((1, 0.2), (10, 0.4), (100, 0.2), (1000, 0.5))).value == pytest.approx(10**0.5)
    assert saving(own, curve((10, 0.3))).value == pytest.approx(10)
    assert saving(own, curve((1, 0.1), (10, 0.25), (100, 0.2))).more_than == pytest.approx(10)  # its best is no dearer
    assert saving(own, []) == Saving()


def test_a_saving_is_over_the_problems_that_all_have_finished():
    own = row("beam", 4, {"easy": 1.0}, 10)  # the hard one met the cap
    low, high = row("majority", 1, {"easy": 1.0, "hard": 0.0}, 20), row("majority", 4, {"easy": 1.0, "hard": 1.0}, 80)
    assert saving(own, [low, high]).value == pytest.approx(1.0)


def test_a_row_without_finished_problems_has_no_figures():
    rows = [row("greedy", 1, [1, 0]), row("beam", 4, {}, verified=True), row("majority", 4, [1, 0])]
    document = json.loads(json.dumps(to_json("countdown", 2, 0, rows), allow_nan=False))
    beam = document["results"][1]
    assert (beam["n"], beam["accuracy"], beam["se"], beam["gain"], beam["saving"]["value"]) == (
        0,
        None,
        None,
        None,
        None,
    )


def test_the_document():
    spend = Spend(samples=2, generated_tokens=20, flops_ideal=2e3)
    greedy = Row("greedy", 1, {"a": 1.0, "b": 0.0}, spend, num_ungraded=1, failures=("x", "y", "y"), wall_s=1.23456)
    weighted = Row("best_of_n_weighted", 4, {"a": 1.0, "b": 1.0}, spend, verified=True)
    beam = Row("beam", 4, {"a": 1.0, "b": 0.0}, spend, verified=True)
    document = json.loads(json.dumps(to_json("countdown", 2, 1, [greedy, weighted, beam])))
    assert (document["task"], document["n"], document["ungraded"]) == ("countdown", 2, 1)
    first, second, third = document["results"]
    assert first == {
        "strategy": "greedy",
        "budget": 1,
        "n": 2,
        "accuracy": 0.5,
        "se": pytest.approx(0.5),
        "failed": 3,
        "failed_reason": "y",
        "ungraded": 1,
        "gain": None,
        "spend": spend.to_json(),
        "wall_s": 1.235,
    }
    assert second["gain"]["over"] == "greedy"
    assert "verifier_gain" not in second
    assert third["verifier_gain"]["over"] == "best_of_n_weighted"
    assert third["verifier_gain"]["value"] == -0.5
    assert third["saving"] == {"over": "best_of_n_weighted", "value": None, "more_than": None}
    assert third["wall_s"] is None
