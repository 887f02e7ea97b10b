import numpy as np
import pytest

from difficulty import calibration


def sigmoid(z):
    return 1 / (1 + np.exp(-z))


def test_platt_recovers_the_curve_the_labels_came_from():
    generator = np.random.default_rng(0)
    scores = generator.normal(0.3, 0.1, 3000)
    rates = generator.binomial(8, sigmoid(9 * scores - 4)) / 8
    platt = calibration.fit_platt(scores, rates, np.ones(3000))
    assert platt.slope == pytest.approx(9, rel=0.05)
    assert platt.offset == pytest.approx(-4, rel=0.05)


@pytest.mark.parametrize("rates", [np.zeros(40), np.ones(40), np.repeat([0.0, 1.0], 20)])
def test_platt_stays_finite_on_separable_and_constant_labels(rates):
    platt = calibration.fit_platt(np.linspace(-1, 1, 40), rates, np.ones(40))
    predicted = platt(np.linspace(-1, 1, 40))
    assert np.isfinite([platt.slope, platt.offset]).all()
    assert ((predicted >= 0) & (predicted <= 1)).all()
    assert np.abs(predicted - rates).mean() < 0.1


def test_platt_of_a_constant_score_is_the_mean_rate():
    platt = calibration.fit_platt(np.full(10, 3.0), np.tile([0.2, 0.4], 5), np.ones(10))
    assert platt.slope == 0
    assert platt(np.array([3.0, 99.0])) == pytest.approx([0.3, 0.3])


def test_platt_follows_the_weights():
    rates = np.tile([0.0, 1.0], 50)
    platt = calibration.fit_platt(np.zeros(100), rates, np.tile([1.0, 3.0], 50))
    assert platt(np.zeros(1)) == pytest.approx([0.75])


def test_scores_of_the_truth_and_of_a_constant():
    generator = np.random.default_rng(1)
    rates = generator.beta(1, 2, 4000)
    totals = np.full(4000, 16)
    successes = generator.binomial(16, rates)
    truth = calibration.score(rates, successes, totals, seed=0)
    constant = calibration.score(np.full(4000, rates.mean()), successes, totals, seed=0)
    assert truth.spearman > 0.9
    assert 0 < truth.spearman_se < 0.02
    assert truth.brier_rate == pytest.approx(0, abs=0.002)
    assert truth.ece < 0.02
    assert (constant.spearman, constant.auroc) == (0, 0.5)
    assert constant.brier_rate == pytest.approx(rates.var(), abs=0.004)
    assert calibration.Scores.from_json(truth.to_json()) == truth


def test_auroc_is_none_where_every_problem_was_solved():
    assert calibration.score(np.array([0.1, 0.5]), np.array([1, 2]), np.array([2, 2]), seed=0).auroc is None


def test_curve_groups_are_even_and_ordered():
    predicted = np.random.default_rng(0).random(95)
    points = calibration.curve(predicted, predicted / 2)
    assert [p.n for p in points] == [10] * 5 + [9] * 5
    assert all(p.observed == pytest.approx(p.predicted / 2) for p in points)
    assert sorted(points, key=lambda p: p.predicted) == list(points)
