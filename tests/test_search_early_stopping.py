"""Baselines that stop early, each against its rule read aloud, and against the strategies that run for real."""

import math
import random
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import optimize
from scipy import stats as scipy_stats

from search.early_stopping import (
    AdaptiveMajority,
    AdaptiveWeighted,
    EarlyBestOfN,
    EarlyStopping,
    EarlyWeighted,
    OptScale,
    fitted,
    many_stopped_cells,
    stopped_cells,
    truncated_normal_below,
)
from search.errors import ConfigError, DataError
from search.replay import spend_table
from tests.replay_kit import pool_of, stops_at
from tests.scripted_search import LineTask, StepEngine, TextVerifier, by_table, run_one

answer_lists = st.lists(st.sampled_from(["A", "B", "C", None]), min_size=1, max_size=14)
scored_lists = st.lists(
    st.tuples(st.sampled_from(["A", "B", "C", None]), st.sampled_from([0.05, 0.3, 0.6, 0.92, 1.0])),
    min_size=1,
    max_size=14,
)
RULES = [
    EarlyStopping(4),
    AdaptiveMajority(batch=1),
    EarlyBestOfN(0.9),
    EarlyWeighted(0.8),
    AdaptiveWeighted(0.9),
    OptScale(),
]


# ---------------------------------------------------------------- by agreement


@pytest.mark.parametrize(
    ("answers", "window", "drawn"),
    [
        ("AAAA", 4, 4),
        ("ABAACCCC", 4, 8),
        ("ABBBBA", 4, None),  # windows do not overlap
        ("ABBB", 2, 4),
        ("AB-AAA", 2, 6),
        ("--AA", 2, 4),  # two without an answer do not agree
        ("AAA", 4, None),
    ],
)
def test_self_consistency_stops_where_a_whole_window_agrees(answers, window, drawn):
    assert stops_at(EarlyStopping(window), [None if a == "-" else a for a in answers]) == drawn


def test_all_that_were_drawn_vote_and_not_the_last_window_alone():
    pool = pool_of(["A", "A", "A", "B", "B", "B"], right="A")
    rng = random.Random(0)  # by brute force over every order
    orders = [rng.sample(pool.answers_N, 6) for _ in range(4000)]
    won = []
    for order in orders:
        num = next((n for n in (2, 4, 6) if order[n - 1] == order[n - 2]), 6)
        won.append(max(dict.fromkeys(order[:num]), key=order[:num].count) == "A")
    cell = stopped_cells([pool], EarlyStopping(2), [6], orders=4000)[0]
    assert cell.solved_P[0] == pytest.approx(np.mean(won), abs=0.03)


@settings(deadline=None)
@given(answer_lists, st.integers(1, 3), st.sampled_from([0.8, 0.95]))
def test_adaptive_majority_is_the_strategy_of_that_name(answers, batch, certainty):
    engine = StepEngine(by_table({"": [a or "" for a in answers]}))
    strategy = f"adaptive_majority(certainty={certainty}, batch={batch})"
    result = run_one(strategy, len(answers), engine)
    drawn = stops_at(AdaptiveMajority(certainty, batch), answers)
    assert len(result.candidates) == min(drawn or len(answers), len(answers))


# ---------------------------------------------------------------- by score


class NumberedTask(LineTask):
    """Every text is its own, `3:A`, so that each can have its own score."""

    @staticmethod
    def answer(text):
        return text.partition(":")[2] or None


@settings(deadline=None)
@given(scored_lists, st.integers(1, 3))
def test_early_best_of_n_is_the_strategy_adaptive_best_of_n(pairs, batch):
    texts = [f"{n}:{answer or ''}" for n, (answer, _) in enumerate(pairs)]
    scores = {text: score for text, (_, score) in zip(texts, pairs, strict=True)}
    engine = StepEngine(by_table({"": texts}))
    strategy = f"adaptive_best_of_n(batch={batch})"
    result = run_one(strategy, len(pairs), engine, TextVerifier(scores.__getitem__), task=NumberedTask())
    drawn = stops_at(EarlyBestOfN(0.9, batch), *zip(*((a, s if a else None) for a, s in pairs), strict=True))
    assert len(result.candidates) == min(drawn or len(pairs), len(pairs))
    assert [c.answer for c in result.candidates] == [a for a, _ in pairs[: len(result.candidates)]]


def test_a_weighted_vote_stops_by_the_share_of_its_leader():
    answers, scores = ["A", "B", "A", "A"], [0.6, 0.4, 0.8, 1.0]  # shares: 1, .6, 1.4/1.8 = .78, 2.4/2.8 = .86
    assert stops_at(EarlyWeighted(0.75), answers, scores) == 3
    assert stops_at(EarlyWeighted(0.8), answers, scores) == 4
    assert stops_at(EarlyWeighted(0.9), answers, scores) is None
    assert stops_at(EarlyWeighted(0.9, least=1), answers, scores) == 1
    assert stops_at(EarlyWeighted(0.5, least=2), answers, scores) == 2
    # fourth powers: .1296 .0256 .4096 1: after three .9546
    assert stops_at(EarlyWeighted(0.95, power=4), answers, scores) == 3
    assert stops_at(EarlyWeighted(0.1), [None] * 4, [None] * 4) is None


@settings(deadline=None)
@given(scored_lists)
def test_a_weighted_vote_stops_when_its_leader_cannot_be_overtaken(pairs):
    answers, scores = [a for a, _ in pairs], [s if a is not None else None for a, s in pairs]
    expected = None
    for num in range(1, len(pairs) + 1):
        sums: dict[str, float] = {}
        for answer, score in pairs[:num]:
            if answer is not None:
                sums[answer] = sums.get(answer, 0.0) + score
        first, second, *_ = [*sorted(sums.values(), reverse=True), 0.0, 0.0]
        if sums and scipy_stats.beta(first + 1, second + 1).sf(0.5) >= 0.9:
            expected = num
            break
    assert stops_at(AdaptiveWeighted(0.9), answers, scores) == expected


# ---------------------------------------------------------------- OptScale


@pytest.mark.parametrize("scores", [[0.7, 0.8, 0.65], [0.2, 0.4, 0.3, 0.35], [0.1, 0.9, 0.5], [0.3, 0.5, 0.45, 0.6]])
def test_the_fit_is_the_maximum_of_the_truncated_normal_likelihood(scores):
    """Against a continuous optimiser over the same box; the grid is coarse, its likelihood nearly the same."""

    def below(mu, sigma, x):
        return scipy_stats.truncnorm(-mu / sigma, (1 - mu) / sigma, loc=mu, scale=sigma).cdf(x)

    def loss(theta):
        mu, sigma = theta
        law = scipy_stats.truncnorm(-mu / sigma, (1 - mu) / sigma, loc=mu, scale=sigma)
        return -law.logpdf(scores).sum()

    best = optimize.minimize(
        loss, [np.mean(scores), np.std(scores)], bounds=[(-1, 2), (0.005, 1)], method="Nelder-Mead"
    )
    for target in (0.5, 0.8):
        found = truncated_normal_below(np.array([scores]), target)[0]
        assert found == pytest.approx(below(*best.x, target), abs=0.06)


def test_a_prior_pulls_the_fit():
    scores = np.array([[0.2, 0.3, 0.25]])
    fits = [truncated_normal_below(scores, 0.6, prior)[0] for prior in (None, (0.25, 0.05), (0.8, 0.2))]
    assert fits[0] == pytest.approx(1, abs=1e-3)
    assert fits[1] > fits[2]


def test_so_many_samples_that_the_best_score_is_reached_with_confidence():
    """By the definition: the least N with F(target)^N <= 1 - confidence, and never fewer than were peeked at."""
    scores = [0.4, 0.6, 0.5, *[0.5] * 61]
    answers = ["A"] * 64
    for target, confidence in ((0.55, 0.95), (0.6, 0.95), (0.65, 0.9), (0.7, 0.99)):
        below = truncated_normal_below(np.array([scores[:3]]), target)[0]
        needed = next((n for n in range(1, 65) if below**n <= 1 - confidence), None)
        expected = None if needed is None else max(needed, 3)
        assert stops_at(OptScale(target, confidence), answers, scores) == expected, (target, below)


def test_sure_scores_stop_at_the_peek_and_poor_ones_never():
    assert stops_at(OptScale(), ["A"] * 16, [0.99] * 16) == 3
    assert stops_at(OptScale(), ["A"] * 16, [0.1, 0.2, 0.15] + [1.0] * 13) is None
    assert stops_at(OptScale(peek=5), ["A"] * 16, [0.99] * 16) == 5
    assert stops_at(OptScale(), [None] * 16, [None] * 16) is None
    assert stops_at(OptScale(peek=5), ["A"] * 3, [0.99] * 3) == 5  # beyond the budget: all of it is drawn


@settings(deadline=None, max_examples=40)
@given(st.lists(st.floats(0, 1), min_size=3, max_size=3))
def test_a_higher_aim_needs_no_fewer_samples(scores):
    needs = [stops_at(OptScale(target), ["A"] * 64, scores + [0.5] * 61) or math.inf for target in (0.5, 0.8, 0.95)]
    assert needs == sorted(needs)


# ---------------------------------------------------------------- cells


def random_pools(num=40, size=16, verifier=4.0):
    rng = np.random.default_rng(5)
    pools = []
    for i in range(num):
        answers = [str(a) for a in rng.choice(list("ABCDE"), size, p=rng.dirichlet([0.5] * 5))]
        scores = [float(np.clip(rng.normal(0.75 if a == "A" else 0.35, 0.2), 0, 1)) for a in answers]
        pools.append(pool_of(answers, scores, key=f"p{i}", verifier=verifier))
    return pools


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.name)
def test_correctness_is_never_looked_at(rule):
    """The same answers and scores with every grade turned round: the same samples are drawn and paid."""
    pools = random_pools()
    turned = [replace(pool, correct_N=tuple(not c for c in pool.correct_N)) for pool in pools]
    for a, b in zip(stopped_cells(pools, rule, [4, 16]), stopped_cells(turned, rule, [4, 16]), strict=True):
        assert (a.flops_P == b.flops_P).all()
        assert (a.solved_P != b.solved_P).any()


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.name)
def test_it_costs_at_most_the_whole_budget_and_one_sample_is_one_sample(rule):
    pools = random_pools()
    cells = stopped_cells(pools, rule, [1, 4, 16])
    for cell, k in zip(cells, (1, 4, 16), strict=True):
        most = np.array([spend_table(pool, 16, scored=rule.scored)[:, k] for pool in pools])
        assert (cell.flops_P <= most[:, 0] + 1e-9).all()
        assert (cell.actual_P <= most[:, 1] + 1e-9).all()
        if k == 1:
            assert cell.flops_P == pytest.approx(most[:, 0])
    assert (cells[2].flops_P >= cells[1].flops_P - 1e-9).all()
    assert (cells[2].found_P >= cells[2].solved_P - 1e-9).all()


def test_the_verifier_is_paid_only_by_rules_that_ask_it():
    pool = pool_of(["A", "A", "B", "B"], [0.1] * 4, verifier=100.0)
    by_vote, by_score = stopped_cells([pool], EarlyStopping(3), [1]), stopped_cells([pool], EarlyBestOfN(), [1])
    assert by_vote[0].flops_P[0] == 2 * (10 + 5)
    assert by_score[0].flops_P[0] == 2 * (10 + 5) + 100  # one sample is one of two distinct texts


def test_several_rules_together_are_each_alone():
    pools = random_pools()
    together = many_stopped_cells(pools, RULES, [2, 16], seed=3)
    alone = [cell for rule in RULES for cell in stopped_cells(pools, rule, [2, 16], seed=3)]
    assert [c.name for c in together] == [c.name for c in alone]
    assert all((a.solved_P == b.solved_P).all() for a, b in zip(together, alone, strict=True))
    assert all((a.flops_P == b.flops_P).all() for a, b in zip(together, alone, strict=True))


def test_arms_are_named_by_what_differs_from_the_default():
    assert [rule.name for rule in RULES] == [
        "early_stopping(window=4)",
        "adaptive_majority(batch=1)",
        "early_best_of_n(0.9)",
        "early_weighted(0.8)",
        "adaptive_weighted(certainty=0.9)",
        "optscale(target=0.95, confidence=0.95)",
    ]
    assert AdaptiveMajority().name == "adaptive_majority"
    assert EarlyBestOfN(0.5, batch=2).name == "early_best_of_n(0.5, batch=2)"
    assert EarlyWeighted(0.5, 2, 4).name == "early_weighted(0.5, least=2, power=4)"
    assert (
        OptScale(0.9, peek=5, prior=(0.8, 0.2)).name == "optscale(target=0.9, confidence=0.95, peek=5, prior=0.8/0.2)"
    )


# ---------------------------------------------------------------- fitting a threshold


def test_the_cheapest_threshold_that_is_not_worse_is_taken():
    """Right answers score .8, wrong ones .3: any threshold between finds the same, .95 draws all of it."""
    rng = np.random.default_rng(0)
    pools = []
    for i in range(50):
        answers = [str(a) for a in rng.choice(["A", "B"], 16)]
        pools.append(pool_of(answers, [0.8 if a == "A" else 0.3 for a in answers], key=str(i), verifier=1.0))
    rules = [EarlyBestOfN(threshold) for threshold in (0.2, 0.5, 0.95)]
    assert fitted(pools, rules, 16) == EarlyBestOfN(0.5)
    assert fitted(pools, rules[:1], 16) == EarlyBestOfN(0.2)
    assert fitted(pools[:1], rules[1:], 16) == EarlyBestOfN(0.5)
    with pytest.raises(DataError, match="no rules to choose from"):
        fitted(pools, [], 16)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: EarlyStopping(1), "a window of 1 always agrees: give at least 2"),
        (lambda: AdaptiveMajority(batch=0), "a batch of 0 samples: give at least 1"),
        (lambda: EarlyBestOfN(batch=0), "a batch of 0 samples"),
        (lambda: EarlyWeighted(least=0), "a first look after 0 samples: give at least 1"),
        (lambda: OptScale(target=1.0), "target = 1, confidence = 0.95: give both between 0 and 1"),
        (lambda: OptScale(confidence=0.0), "confidence = 0"),
        (lambda: OptScale(peek=0), "a peek at 0 samples"),
    ],
)
def test_rules_that_mean_nothing_are_refused(make, message):
    with pytest.raises(ConfigError, match=message):
        make()
