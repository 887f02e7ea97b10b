import itertools
import math
import random
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from search import stats

ANSWERS = st.lists(st.sampled_from([None, "a", "b", "c"]), min_size=1, max_size=8)


def test_import_pulls_no_scipy():
    code = "import sys, search.stats, search.evaluate; print('scipy' in sys.modules, 'torch' in sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.split() == ["False", "False"]


# ---------------------------------------------------------------- best of k


@given(st.integers(1, 12), st.data())
def test_pass_at_k_equals_enumeration(num, data):
    correct = data.draw(st.lists(st.booleans(), min_size=num, max_size=num))
    k = data.draw(st.integers(1, num))
    subsets = list(itertools.combinations(correct, k))
    assert stats.pass_at_k(num, sum(correct), k) == pytest.approx(sum(map(any, subsets)) / len(subsets))


def test_pass_at_k_refuses_a_pool_that_is_too_small():
    with pytest.raises(ValueError, match="k = 5 needs a pool of at least 5 samples, not 4"):
        stats.pass_at_k(4, 1, 5)


def _vote_by_enumeration(correct, answers, weights, k):
    total = 0.0
    subsets = list(itertools.combinations(range(len(answers)), k))
    for subset in subsets:
        sums = {}
        for i in subset:
            if answers[i] is not None and weights[i] is not None:
                sums[answers[i]] = sums.get(answers[i], 0.0) + weights[i]
        best = [a for a in sums if math.isclose(sums[a], max(sums.values()), abs_tol=1e-9)]
        total += sum(correct[a] for a in best) / len(best) if best else 0.0
    return total / len(subsets)


@settings(deadline=None)
@given(ANSWERS, st.booleans(), st.booleans())
def test_majority_equals_enumeration(answers, right_a, right_b):
    correct = {"a": right_a, "b": right_b, "c": False}
    ks = list(range(1, len(answers) + 1))
    got = stats.majority_at_k([a is not None and correct[a] for a in answers], answers, ks)
    want = [_vote_by_enumeration(correct, answers, [1.0] * len(answers), k) for k in ks]
    assert got == pytest.approx(want, abs=1e-9)


@given(ANSWERS, st.data())
@settings(max_examples=50, deadline=None)
def test_weighted_equals_enumeration(answers, data):
    weight = st.one_of(st.none(), st.sampled_from([0.1, 0.2, 0.3, 0.7]))
    weights = data.draw(st.lists(weight, min_size=len(answers), max_size=len(answers)))
    ks = list(range(1, len(answers) + 1))
    got = stats.weighted_at_k([a == "a" for a in answers], answers, weights, ks, seed=0)
    want = [_vote_by_enumeration({"a": True, "b": False, "c": False}, answers, weights, k) for k in ks]
    assert got == pytest.approx(want, abs=1e-9)


@given(st.lists(st.tuples(st.booleans(), st.sampled_from([None, 0.0, 0.5, 1.0])), min_size=1, max_size=8))
def test_best_by_score_equals_enumeration(samples):
    for k in range(1, len(samples) + 1):
        total = 0.0
        subsets = list(itertools.combinations(samples, k))
        for subset in subsets:
            scored = [(s, c) for c, s in subset if s is not None]
            top = [c for s, c in scored if s == max(scored)[0]]
            total += sum(top) / len(top) if top else 0.0
        (got,) = stats.best_at_k([c for c, _ in samples], [s for _, s in samples], [k])
        assert got == pytest.approx(total / len(subsets))


def test_large_pools_agree_with_random_subsets():
    draw = random.Random(3)
    answers = [draw.choice([None, "a", "a", "b", "b", "c", "d", "e", "f"]) for _ in range(64)]
    correct = [a == "b" for a in answers]
    exact = stats.majority_at_k(correct, answers, [2, 4, 16, 48])
    sampled = [stats.weighted_at_k(correct, answers, [1.0] * 64, [2, 4, 16, 48], seed=s) for s in range(30)]
    assert np.mean(sampled, axis=0) == pytest.approx(exact, abs=0.02)  # 12 000 subsets: se < .005
    assert stats.majority_at_k(correct, answers, [64]) == stats.weighted_at_k(
        correct, answers, [1.0] * 64, [64], seed=0
    )


def test_subsets_depend_on_the_seed_alone():
    answers, correct = ["a", "b", "c", "d"] * 10, [True, False, False, False] * 10
    weights = [i / 40 for i in range(40)]
    first, again, other = (stats.weighted_at_k(correct, answers, weights, [8], seed=s) for s in (1, 1, 2))
    assert first == again != other


def test_majority_of_a_huge_pool_does_not_overflow():
    answers = ["a"] * 700 + ["b"] * 500
    assert stats.majority_at_k([a == "a" for a in answers], answers, [601])[0] > 0.99


# ---------------------------------------------------------------- errors and tests


def test_mean_estimate_is_the_binomial_error():
    found = stats.mean_estimate([True] * 30 + [False] * 70)
    assert (found.value, found.n) == (0.3, 100)
    assert found.se == pytest.approx(math.sqrt(0.3 * 0.7 / 99))


def test_clustered_error_of_copies_is_that_of_the_originals():
    values = [0.0, 1.0, 1.0, 0.0, 1.0]
    once = stats.mean_estimate(values)
    copied = stats.mean_estimate(values * 4, [0, 1, 2, 3, 4] * 4)
    assert copied.se == pytest.approx(once.se)
    assert stats.mean_estimate(values * 4).se < once.se


def test_paired_interval_covers_the_true_difference():
    generator = np.random.default_rng(0)
    covered = 0
    for _ in range(400):
        a = generator.random(40)
        found = stats.paired_difference(a, a + generator.normal(0.1, 0.3, 40))
        covered += found.low <= 0.1 <= found.high
    assert 0.92 < covered / 400 < 0.975


def test_paired_difference_refuses_what_is_not_paired():
    with pytest.raises(ValueError, match="paired"):
        stats.paired_difference([1.0, 0.0], [1.0])


@pytest.mark.parametrize("num", [30, 120, 500])
@pytest.mark.parametrize("churn", [0.02, 0.1])
def test_lower_bound_holds_at_the_margin(num, churn):
    """A true loss of 2 points is mistaken for a smaller one about 5 % of the time, also for few problems."""
    generator = np.random.default_rng(num)
    passed = 0
    for _ in range(1500):
        draw = generator.random(num)
        difference = (draw < churn) - 1.0 * (draw > 1 - churn - 0.02)
        passed += stats.paired_lower_bound(np.zeros(num), difference) >= -0.02
    assert passed / 1500 <= 0.05 + 0.015


def test_lower_bound_without_differences_needs_115_problems():
    assert stats.paired_lower_bound(np.ones(114), np.ones(114)) < -0.02
    assert stats.paired_lower_bound(np.ones(115), np.ones(115)) >= -0.02


@settings(deadline=None)
@given(st.integers(0, 40), st.integers(0, 40))
def test_mcnemar_is_the_binomial_tail(losses, wins):
    from scipy.stats import binomtest

    if losses + wins:
        want = binomtest(wins, losses + wins, alternative="greater").pvalue
        assert stats.mcnemar_p(losses, wins) == pytest.approx(want)
    assert stats.mcnemar_p(losses, wins, mid=True) < stats.mcnemar_p(losses, wins)


def test_mcnemar_of_no_difference_and_of_large_counts():
    assert stats.mcnemar_p(0, 0) == 1.0
    assert stats.mcnemar_p(2000, 2000) > 0.5
    assert 0 < stats.mcnemar_p(900, 1100) < 1e-5


def test_alpha_spent_by_all_looks_stays_below_alpha():
    assert stats.alpha_at_look(0.05, 1) == 0.025
    assert sum(stats.alpha_at_look(0.05, j) for j in range(1, 1000)) < 0.05
    with pytest.raises(ValueError, match="count from 1"):
        stats.alpha_at_look(0.05, 0)


def test_minimum_detectable_effect_is_detected_with_80_percent_power():
    # the reference's table: 5.6 points for 500 problems and 20 % discordant, two-sided
    assert stats.minimum_detectable_effect(math.sqrt(0.2), 500, sides=2) == pytest.approx(0.056, abs=5e-4)
    effect = stats.minimum_detectable_effect(math.sqrt(0.2), 2000, alpha=0.025)
    generator = np.random.default_rng(1)
    wins = generator.binomial(2000, 0.1 + effect / 2, 2000)
    losses = generator.binomial(2000, 0.1 - effect / 2, 2000)
    found = sum(stats.mcnemar_p(int(b), int(c)) <= 0.025 for b, c in zip(losses, wins, strict=True))
    assert 0.75 < found / 2000 < 0.85


def test_t_quantile_and_tail_agree():
    for degrees in (5, 50, 299, 300, 5000):
        assert stats.t_upper_p(stats.t_quantile(0.95, degrees), degrees) == pytest.approx(0.05, rel=1e-6)


def test_bootstrap_interval_of_a_mean():
    values = np.random.default_rng(0).random(400)
    low, high = stats.bootstrap(400, lambda i: float(values[i].mean()), seed=7)
    se = values.std() / 20
    assert low == pytest.approx(values.mean() - 1.645 * se, abs=0.3 * se)
    assert high == pytest.approx(values.mean() + 1.645 * se, abs=0.3 * se)
    assert (low, high) == stats.bootstrap(400, lambda i: float(values[i].mean()), seed=7)


# ---------------------------------------------------------------- predictors


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), min_size=3, max_size=30))
def test_spearman_equals_scipy(pairs):
    from scipy.stats import spearmanr

    a, b = zip(*pairs, strict=True)
    if len(set(a)) > 1 and len(set(b)) > 1:
        assert stats.spearman(a, b) == pytest.approx(spearmanr(a, b).statistic, abs=1e-9)
    else:
        assert stats.spearman(a, b) == 0


@pytest.mark.parametrize("samples", [4, 16])
def test_spearman_ceiling_is_what_the_true_rates_reach(samples):
    generator = np.random.default_rng(samples)
    rates = generator.beta(0.7, 1.2, 4000)
    successes = generator.binomial(samples, rates)
    ceiling = stats.spearman_ceiling(successes, np.full(4000, samples), seed=0)
    assert ceiling == pytest.approx(stats.spearman(rates, successes), abs=0.025)


def test_brier_is_corrected_for_label_noise():
    generator = np.random.default_rng(0)
    rates = generator.beta(1, 2, 20000)
    successes, totals = generator.binomial(4, rates), np.full(20000, 4)
    assert stats.brier_corrected(rates, successes, totals) == pytest.approx(0, abs=0.003)
    constant = np.full(20000, rates.mean())
    assert stats.brier_corrected(constant, successes, totals) == pytest.approx(rates.var(), abs=0.003)
    assert stats.brier(rates, successes, totals) == pytest.approx((rates * (1 - rates)).mean(), abs=0.003)


def test_calibration_error():
    assert stats.calibration_error([0.25] * 4, [0, 0, 0, 1]) == 0
    assert stats.calibration_error([0.9] * 4, [0, 0, 0, 1]) == pytest.approx(0.65)


def test_auroc_with_ties():
    assert stats.auroc([1, 2, 3, 4], [0, 0, 1, 1]) == 1
    assert stats.auroc([1, 1, 1, 1], [0, 1, 0, 1]) == 0.5
    assert math.isnan(stats.auroc([1, 2], [1, 1]))


@given(st.lists(st.integers(0, 6), min_size=1, max_size=60), st.integers(1, 6))
def test_equal_rates_share_a_bin_and_easier_bins_come_first(rates, bins):
    edges = stats.quantile_edges(rates, bins)
    found = stats.assign_bins(rates, edges)
    assert len(edges) < bins
    assert set(found) == set(range(1, len(edges) + 2))  # no bin is empty
    for a, b in itertools.pairwise(sorted(zip(rates, found, strict=True))):
        assert a[1] == b[1] if a[0] == b[0] else a[1] >= b[1]


def test_five_bins_without_ties_are_even():
    rates = np.random.default_rng(0).permutation(100)
    sizes = np.bincount(stats.assign_bins(rates, stats.quantile_edges(rates)))
    assert sizes.tolist() == [0, 20, 20, 20, 20, 20]
