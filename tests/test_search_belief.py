"""Beliefs about a rate: expectations against integrals, the fitted strength, and stopping against the optimal rule."""

import functools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import integrate, stats

from search.belief import STRENGTHS, beta_prior, expected_values, fit_strength
from search.errors import DataError
from search.strategies.sequential import Sequential

shapes = st.floats(0.05, 20)


# ---------------------------------------------------------------- expectations


@settings(max_examples=40, deadline=None)
@given(shapes, shapes, st.integers(0, 12))
def test_the_value_of_samples_is_the_integral_over_the_belief(a, b, k):
    def wrong(rate):
        return (1 - rate) ** k

    missed, _ = integrate.quad(wrong, 0, 1, weight="alg", wvar=(a - 1, b - 1))
    whole, _ = integrate.quad(lambda rate: 1.0, 0, 1, weight="alg", wvar=(a - 1, b - 1))
    assert expected_values([a], [b], [k])[0, 0] == pytest.approx(1 - missed / whole, abs=1e-7)


def test_values_by_hand():
    """Beta(1, 1): k wrong in a row have the chance 1 / (k + 1)."""
    assert expected_values([1.0, 2.0], [1.0, 1.0], [0, 1, 2, 3]).tolist() == [
        pytest.approx([0, 1 / 2, 2 / 3, 3 / 4]),
        pytest.approx([0, 2 / 3, 1 - 1 / 6, 1 - 1 / 10]),
    ]
    assert expected_values(1.0, 1.0, [2]).shape == (1, 1)


def test_certain_knowledge_is_the_plug_in():
    rates = np.array([0.0, 0.02, 0.5, 1.0])
    ks = [1, 4, 16, 64]
    plug_in = 1 - (1 - rates[:, None]) ** ks
    assert expected_values(*beta_prior(rates, 1e9), ks) == pytest.approx(plug_in, abs=1e-6)


def test_an_uncertain_rate_promises_less_than_its_mean_and_gives_up_later():
    """Of the same mean: uncertain questions are solved less often by many samples, and their gains fade slower."""
    uncertain, certain = (expected_values([0.1 * s], [0.9 * s], range(0, 200))[0] for s in (2.0, 1e6))
    assert uncertain[1] == pytest.approx(certain[1], abs=1e-6)
    assert (uncertain[2:60] < certain[2:60]).all()
    gains = [np.diff(values) for values in (uncertain, certain)]
    assert gains[0][5] < gains[1][5]
    assert gains[0][150] > 100 * gains[1][150]


@given(shapes, shapes)
def test_marginals_fall(a, b):
    gains = np.diff(expected_values([a], [b], range(0, 20))[0])
    assert (gains > 0).all()
    assert (np.diff(gains) < 0).all()
    drawn = np.arange(19)
    wrong = 1 - expected_values([a], [b], range(0, 19))[0]
    assert gains == pytest.approx(wrong * a / (a + b + drawn))


# ---------------------------------------------------------------- the strength of a prediction


def test_the_likelihood_is_that_of_the_beta_binomial():
    rates, right, total = np.array([0.2, 0.7]), np.array([1, 5]), np.array([4, 6])

    def likelihood(strength):
        return stats.betabinom(total, rates * strength, (1 - rates) * strength).logpmf(right).sum()

    best = max(STRENGTHS, key=likelihood)
    assert fit_strength(rates, right, total) == best


@pytest.mark.parametrize("strength", [1.0, 8.0, 64.0])
def test_the_strength_behind_counts_is_found_again(strength):
    rng = np.random.default_rng(0)
    rates = rng.uniform(0.05, 0.95, 4000)
    right = rng.binomial(16, rng.beta(rates * strength, (1 - rates) * strength))
    assert fit_strength(rates, right, np.full(4000, 16)) == pytest.approx(strength, rel=0.5)


def test_perfect_and_useless_predictions_are_told_apart():
    rng = np.random.default_rng(1)
    truth = rng.beta(0.5, 0.8, 2000)
    right, total = rng.binomial(16, truth), np.full(2000, 16)
    assert fit_strength(truth, right, total) > 100
    assert fit_strength(np.full(2000, truth.mean()), right, total) == pytest.approx(1.3, rel=0.3)
    assert fit_strength([0.0, 1.0], [4, 0], [4, 4]) == STRENGTHS[0]  # surprises, but none that is impossible


# ---------------------------------------------------------------- sample by sample


def test_gains_by_hand():
    belief = Sequential(1.0, 1.0, price=0.01, cost_per_sample=10.0)
    assert belief.gain == 0.5
    belief = belief.update([0.2, None])
    assert (belief.num, belief.doubt) == (2, 0.8)
    assert belief.gain == pytest.approx(0.8 / 4)
    assert belief.worth_more()
    belief = belief.update([0.1])
    assert belief.doubt == 0.8  # the best one counts
    assert belief.update([0.9]).gain == pytest.approx(0.1 / 6)
    assert not belief.update([0.9]).worth_more()  # 1 / 60 against 1 / 10
    assert belief.update([1.0]).gain == 0.0
    assert belief.update([1.5, -3]).doubt == 0.0  # scores are kept in 0..1


def test_a_score_is_seen_from_where_the_verifier_is_calibrated():
    """A score of .8 among questions of mean rate .5 has odds 4; of a question with rate .1 they are 4/9."""
    belief = Sequential(0.1, 0.9, 0.01, 1.0, base=0.5)
    assert belief.left_by(0.8) == pytest.approx(1 - 4 / 13)
    assert belief.update([0.8, 0.3]).doubt == pytest.approx(9 / 13)
    assert (belief.left_by(0.0), belief.left_by(1.0)) == (1.0, 0.0)
    assert Sequential(0.25, 0.75, 0.01, 1.0, base=0.25).left_by(0.8) == pytest.approx(0.2)  # nothing new
    assert Sequential(0.1, 0.9, 0.01, 1.0).left_by(0.8) == pytest.approx(0.2)  # taken at its word
    assert Sequential(0.0, 1.0, 0.01, 1.0, base=0.5).left_by(0.8) == 1.0
    assert Sequential(0.0, 1.0, 0.01, 1.0, base=0.5).left_by(1.0) == 0.0


def test_agreement_in_the_place_of_scores():
    belief = Sequential(1.0, 1.0, 0.05, 1.0).agreed(2, 0.75)
    assert belief.gain == pytest.approx(0.25 / 4)
    assert belief.worth_more()
    assert not belief.agreed(3, 0.9).worth_more()


def test_a_question_without_hope_is_not_begun():
    assert not Sequential(*map(float, beta_prior(0.01, 5)), price=0.02, cost_per_sample=1).worth_more()
    assert not Sequential(*map(float, beta_prior(0.0, 5)), price=1e-9, cost_per_sample=1).worth_more()
    assert Sequential(1, 1, price=0, cost_per_sample=1).update([1.0]).worth_more()  # what costs nothing


@settings(max_examples=60, deadline=None)
@given(shapes, shapes, st.floats(0.01, 0.5))
def test_with_a_perfect_verifier_looking_one_ahead_is_the_optimal_rule(a, b, price):
    """Against dynamic programming over all ways to go on: is it better to draw at least once more?"""

    @functools.cache
    def best(wrong):
        return 0.0 if wrong >= 60 else max(0.0, go_on(wrong))

    def go_on(wrong):
        rate = a / (a + b + wrong)
        return rate + (1 - rate) * best(wrong + 1) - price

    for wrong in range(40):
        belief = Sequential(a, b, price, 1.0).update([0.0] * wrong)
        if math.isclose(belief.gain, price, rel_tol=1e-9):
            continue
        assert belief.worth_more() == (go_on(wrong) > 0)


# ---------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: beta_prior([0.5, 1.5], 2), r"a predicted rate lies in 0\.\.1, not 1.5"),
        (lambda: beta_prior([math.nan], 2), r"lies in 0\.\.1, not nan"),
        (lambda: beta_prior([0.5], 0), "a prior of strength 0 means nothing: give more than 0"),
        (lambda: beta_prior([0.5], math.inf), "a prior of strength inf"),
        (lambda: expected_values([1], [1], [-1]), r"numbers of samples are 0 or more, not \[-1\]"),
        (lambda: expected_values([1], [1], []), "numbers of samples are 0 or more"),
        (lambda: fit_strength([], [], []), "as many successes"),
        (lambda: fit_strength([0.5], [3], [2]), "as many successes"),
        (lambda: fit_strength([0.5, 0.5], [1], [2]), "as many successes"),
    ],
)
def test_what_means_nothing_is_refused(call, message):
    with pytest.raises(DataError, match=message):
        call()
