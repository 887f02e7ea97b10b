import numpy as np
import pytest

from difficulty.regret import regret
from search.errors import DataError


def world(num=2000, noise=0.0, seed=0):
    """Strategy 0 is best in odd bins, strategy 1 in even ones; strategy 2 is second everywhere."""
    generator = np.random.default_rng(seed)
    oracle = generator.integers(1, 5, num)
    odd = oracle % 2
    values = np.stack([0.2 + 0.6 * odd, 0.8 - 0.6 * odd, np.full(num, 0.55)])
    return values + noise * generator.normal(size=values.shape), oracle, generator


def test_oracle_bins_choose_the_best_and_uniform_the_safe_one():
    values, oracle, _ = world()
    found = regret(values, oracle, oracle)
    assert found.oracle.value == pytest.approx(0.8)
    assert found.uniform.value == pytest.approx(0.55)
    assert (found.loss.value, found.loss.se) == (0, 0)
    assert found.gain.value == pytest.approx(0.25)


def test_mis_binning_costs_its_share():
    values, oracle, generator = world()
    wrong = generator.random(len(oracle)) < 0.1
    predicted = np.where(wrong, oracle % 4 + 1, oracle)  # one in ten lies in a bin of the other kind
    found = regret(values, oracle, predicted)
    assert found.loss.value == pytest.approx(0.6 * wrong.mean(), abs=0.01)
    assert found.loss.se < 0.01
    assert found.to_json()["loss"]["n"] == len(oracle)


def test_useless_bins_lose_all_that_binning_gives():
    values, oracle, generator = world()
    found = regret(values, oracle, generator.integers(1, 5, len(oracle)))
    assert found.gain.value == pytest.approx(0, abs=0.02)
    assert found.loss.value == pytest.approx(0.25, abs=0.02)


def test_a_choice_among_equals_does_not_win_by_luck():
    """All strategies are alike but for noise: choosing per bin must not look better than any of them."""
    generator = np.random.default_rng(3)
    values = generator.normal(size=(30, 400))
    bins = generator.integers(1, 6, 400)
    found = regret(values, bins, generator.integers(1, 6, 400))
    for estimate in (found.oracle, found.predicted, found.uniform):
        assert abs(estimate.value) < 0.12
    claimed = np.mean([values[:, bins == b].mean(axis=1).max() for b in range(1, 6)])
    assert claimed > 0.15  # what choosing and judging on the same problems would say


def test_a_bin_of_one_problem_takes_the_choice_of_all():
    values, oracle, _ = world(100)
    oracle[:] = 1
    oracle[0] = 4
    assert np.isfinite(regret(values, oracle, oracle).oracle.value)


@pytest.mark.parametrize(
    ("values", "oracle", "predicted"),
    [
        (np.zeros((2, 5)), [1] * 5, [1] * 4),
        (np.zeros(5), [1] * 5, [1] * 5),
        (np.zeros((2, 3)), [1] * 3, [1] * 3),
        (np.full((2, 5), np.nan), [1] * 5, [1] * 5),
    ],
)
def test_what_does_not_fit_is_refused(values, oracle, predicted):
    with pytest.raises(DataError):
        regret(values, oracle, predicted)
