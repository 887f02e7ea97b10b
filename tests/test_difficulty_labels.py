import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from difficulty import labels
from search.errors import DataError
from search.types import Candidate, Finish, Grade, Problem, SearchResult, Spend

MARKS = {
    "right": Candidate(finish=Finish.EOS, answer="7", grade=Grade.CORRECT),
    "wrong": Candidate(finish=Finish.EOS, answer="8", grade=Grade.WRONG),
    "cut": Candidate(finish=Finish.LENGTH, answer=None, grade=Grade.WRONG),
    "no room": Candidate(finish=Finish.OVERFLOW, answer=None, grade=Grade.WRONG),
    "engine failed": Candidate(finish=Finish.ERROR, answer=None, grade=Grade.WRONG),
    "cancelled": Candidate(finish=Finish.CANCELLED, answer=None, grade=Grade.WRONG),
    "unfinished": Candidate(finish=Finish.STOP, answer=None, grade=Grade.WRONG),
    "ungraded": Candidate(finish=Finish.EOS, answer=None, grade=Grade.UNGRADED),
    "never graded": Candidate(finish=Finish.EOS, answer="7", grade=None),
}


def result(key, marks, model="m"):
    candidates = tuple(MARKS[mark] for mark in marks)
    return SearchResult(Problem(key, key, "7"), "pool", candidates, None, Spend(), model, "0")


def test_only_plain_graded_samples_count():
    found = labels.count_samples([result("a", ["right", "cut", "ungraded", "wrong", "right", "right"])], num_plain=4)
    assert (found.keys, found.successes_P.tolist(), found.totals_P.tolist()) == (("a",), [1], [3])


def test_a_sample_that_the_policy_did_not_get_to_finish_says_nothing():
    found = labels.count_samples([result("a", ["right", "engine failed", "cancelled", "unfinished", "no room"])])
    assert (found.successes_P.tolist(), found.totals_P.tolist()) == ([1], [2])


def test_pools_add_up_and_problems_without_graded_samples_are_left_out():
    rows = [result("a", ["right", "wrong"]), result("b", ["ungraded", "never graded"]), result("a", ["right"])]
    found = labels.count_samples(rows)
    assert (found.keys, found.successes_P.tolist(), found.totals_P.tolist()) == (("a",), [2], [3])
    assert found.model == "m"


def test_labels_of_two_policies_are_refused():
    with pytest.raises(DataError, match="mix policies m and other"):
        labels.count_samples([result("a", ["right"]), result("b", ["right"], "other")])


def test_no_results_give_no_labels():
    assert labels.count_samples([]).totals_P.shape == (0,)


@settings(deadline=None)
@given(st.integers(0, 30), st.integers(0, 30))
def test_posterior_is_ordered_and_shrinks_to_the_prior(right, wrong):
    found = labels.posterior(np.array([right]), np.array([right + wrong]), (2.0, 2.0))
    rate = right / (right + wrong) if right + wrong else 0.5
    assert 0 < found.low_P[0] < found.mean_P[0] < found.high_P[0] < 1
    assert min(rate, 0.5) <= found.mean_P[0] <= max(rate, 0.5)


def test_credible_intervals_cover_rates_drawn_from_their_prior():
    generator = np.random.default_rng(0)
    rates = generator.beta(0.6, 2.0, 5000)
    totals = generator.integers(2, 17, 5000)
    successes = generator.binomial(totals, rates)
    prior = labels.empirical_prior(successes, totals)
    assert prior == pytest.approx((0.6, 2.0), rel=0.15)
    found = labels.posterior(successes, totals, prior)
    covered = np.mean((found.low_P <= rates) & (rates <= found.high_P))
    assert covered == pytest.approx(0.9, abs=0.02)


@pytest.mark.parametrize(
    ("successes", "totals"), [([0, 0], [4, 4]), ([4, 4], [4, 4]), ([1, 0], [1, 1]), ([], []), ([0, 0], [0, 0])]
)
def test_an_uninformative_sample_gives_the_flat_prior(successes, totals):
    assert labels.empirical_prior(np.array(successes, dtype=int), np.array(totals, dtype=int)) == (1.0, 1.0)


def test_equal_rates_give_a_strong_prior_and_split_ones_a_weak_one():
    assert sum(labels.empirical_prior(np.full(50, 2), np.full(50, 4))) == 1000
    assert sum(labels.empirical_prior(np.tile([0, 4], 50), np.full(100, 4))) == pytest.approx(0.2)
