"""`adaptive_budget` on scripts made by hand: when it stops, what it looks at, and what it hands back."""

import math

import pytest

from search.errors import ConfigError
from search.strategies import parse
from search.types import Budget, Scored
from tests.scripted_search import StepEngine, by_score, by_table, chain_engine, check_company, given, run_one, texts


def answering(*answers):
    """Whole answers, one after another."""
    return StepEngine(by_table({"": answers}))


def drawn(options, answers, scores, samples=16):
    result = run_one(f"adaptive_budget({options})", samples, answering(*answers), by_score(scores))
    assert len(result.candidates) == result.spend.samples
    return texts(result)


SCORES = {"bad": 0.0, "poor": 0.2, "fair": 0.5, "good": 0.9, "sure": 1.0}


# ---------------------------------------------------------------- when it stops


def test_it_stops_when_the_next_sample_is_not_worth_its_price():
    """Beta(1, 1), all wrong: the gains are 1/2, 1/3, 1/4, 1/5, ... of which 1/5 is below 0.22."""
    assert drawn("price=0.22", ["bad"], SCORES) == ["bad"] * 3
    assert drawn("price=0.3", ["bad"], SCORES) == ["bad"] * 2
    assert drawn("price=0.4", ["bad"], SCORES) == ["bad"]
    assert drawn("price=0.06", ["bad"], SCORES, samples=5) == ["bad"] * 5


def test_the_best_score_so_far_is_what_is_left_to_gain():
    """After poor, fair: doubt 1/2, gain 1/2 x 1/4; then good: 1/10 x 1/5."""
    assert drawn("price=0.1", ["poor", "fair", "good", "bad"], SCORES) == ["poor", "fair", "good"]
    assert drawn("price=0.13", ["poor", "fair", "good", "bad"], SCORES) == ["poor", "fair"]
    assert drawn("price=0.001", ["bad", "sure", "bad"], SCORES) == ["bad", "sure"]


def test_a_good_score_of_a_hopeless_question_is_not_believed_at_once():
    """Rate .2, calibrated at .5: a score of .9 has odds 9/4, so that 4/13 are left, x .4 / 3 = .04 to gain."""
    answers = ["good", "bad", "bad", "bad"]
    assert drawn("rate=0.2, price=0.03", answers, SCORES) == answers[:1]
    assert drawn("rate=0.2, price=0.03, base=0.5", answers, SCORES) == answers[:3]  # .041, .031, .025
    assert drawn("rate=0.8, price=0.03, base=0.5", answers, SCORES) == answers[:1]


def test_a_free_sample_is_always_worth_it():
    assert drawn("price=0", ["sure"], SCORES, samples=7) == ["sure"] * 7


def test_what_was_predicted_decides_how_long_it_tries():
    """Hopeless: 0.1/2 = .05, .1/3, ... Promising: 1.9/2, 1.9/3, 1.9/4, ... falls below 0.11 after 16."""
    assert len(drawn("rate=0.05, price=0.1", ["bad"], SCORES, samples=64)) == 1
    assert len(drawn("rate=0.95, price=0.11", ["bad"], SCORES, samples=64)) == 16
    # the surer the prediction, the longer it takes to give it up: 0.5 x 20 / (20 + n) < 0.101 from n = 80 on
    assert len(drawn("strength=20, price=0.101", ["bad"], SCORES, samples=99)) == 80
    assert len(drawn("rate=1, strength=1e6, price=0.1", ["bad"], SCORES, samples=99)) == 99


@pytest.mark.parametrize(("batch", "samples", "num"), [(1, 16, 3), (2, 16, 4), (3, 16, 3), (4, 16, 4), (4, 2, 2)])
def test_a_batch_is_what_is_drawn_between_two_looks(batch, samples, num):
    assert len(drawn(f"price=0.22, batch={batch}", ["bad"], SCORES, samples=samples)) == num


def test_what_cannot_be_chosen_is_a_failure_to_learn_from_and_no_reason_to_stop():
    """A rival would stop at the empty answer that its verifier likes."""
    scores = {"": 1.0, "x" * 300: 1.0, "good": 0.9}
    result = run_one("adaptive_budget(price=0.05)", 16, answering("", "x" * 300, "good", ""), by_score(scores))
    assert len(result.candidates) == 3
    assert given(result) == "good"


def test_an_answer_without_a_verdict_leaves_the_doubt():
    verifier = by_score(SCORES)
    verifier.score = lambda requests: [
        Scored((), tokens=1, prompt_tokens=1, computed_tokens=1, unscored="no verdict") for _ in requests
    ]
    result = run_one("adaptive_budget(price=0.22)", 16, answering("sure"), verifier)
    assert len(result.candidates) == 3


# ---------------------------------------------------------------- without a verifier


def test_agreement_takes_the_place_of_scores():
    """All agree: doubt 1/4, 1/8, 1/16, ...; gains 1/4 x 1/3 = .083, 1/8 x 1/4 = .031, 1/16 x 1/5 = .0125."""
    agreeing = [
        len(run_one(f"adaptive_budget_majority(price={p})", 16, answering("A")).candidates) for p in (0.1, 0.05, 0.02)
    ]
    assert agreeing == [1, 2, 3]
    answers = ["A", "B", "A", "A", "A", "A"]  # A : B is 1:0, 1:1, 2:1, 3:1 with doubt 1/4, 1/2, 5/16, 3/16
    gains = [1 / 4 / 3, 1 / 2 / 4, 5 / 16 / 5, 3 / 16 / 6]
    for num, gain in enumerate(gains, 1):
        cheap = gain < min(gains[: num - 1], default=math.inf)
        result = run_one(f"adaptive_budget_majority(price={gain + 1e-6})", 16, answering(*answers))
        assert (len(result.candidates) == num) == cheap
    assert given(result) == "A"


def test_without_answers_there_is_nothing_to_agree_on():
    result = run_one("adaptive_budget_majority(price=0.22)", 16, answering(""))
    assert len(result.candidates) == 3
    assert result.selected is None


# ---------------------------------------------------------------- as any other strategy


def test_it_draws_from_the_pool_that_all_share():
    pool = texts(run_one("best_of_n", 16, chain_engine(0.5), by_score({}, default=0.2)))
    assert texts(run_one("adaptive_budget", 16, chain_engine(0.5), by_score({}, default=0.2))) == pool
    few = run_one("adaptive_budget(price=0.15)", 16, chain_engine(0.5), by_score({}, default=0.2))
    assert 1 < len(few.candidates) < 16
    assert texts(few) == pool[: len(few.candidates)]


def test_the_vote_is_a_choice():
    answers, scores = ["A", "B", "A"], {"A": 0.5, "B": 0.6}
    strategies = {"": "B", "(vote=weighted)": "A", "(vote=majority)": "A", "(vote=sharpened)": "B"}
    for options, answer in strategies.items():
        assert given(run_one(f"adaptive_budget{options}", 3, answering(*answers), by_score(scores))) == answer


def test_no_verifier_is_paid_where_none_is_asked():
    verifier = by_score(SCORES)
    run_one("adaptive_budget_majority", 8, answering("A", "B"), verifier)
    assert not verifier.log


def test_a_rate_above_one_is_refused():
    with pytest.raises(ConfigError, match=r"rate = 1.5 is no chance of a right answer: give at most 1"):
        parse("adaptive_budget_majority(rate=1.5)").plan(Budget("samples", 4))
    with pytest.raises(ConfigError, match=r"base = 1 is no mean rate of success: give less than 1"):
        parse("adaptive_budget_majority(base=1)").plan(Budget("samples", 4))
    with pytest.raises(ConfigError, match="rate=0 means nothing; give more than 0"):
        parse("adaptive_budget(rate=0)")
    with pytest.raises(ConfigError, match="price=-1 means nothing; give 0 or more"):
        parse("adaptive_budget(price=-1)")


@pytest.mark.parametrize("strategy", ["adaptive_budget(price=0.1)", "adaptive_budget_majority(price=0.05)"])
def test_results_depend_neither_on_company_nor_on_the_order_of_completion(strategy):
    check_company(strategy, 5, 0.8, num=6)
