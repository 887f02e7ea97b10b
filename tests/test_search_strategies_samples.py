"""Independent samples, their adaptive forms, and step rejection, on scripts made by hand."""

import math

import pytest
from scipy import stats

from search.strategies.best_of_n import ahead
from search.types import Finish
from tests.scripted_search import (
    StepEngine,
    TextVerifier,
    by_score,
    by_table,
    chain_engine,
    check_company,
    given,
    run_one,
    texts,
)


def answering(*answers):
    """Whole answers, one after another."""
    return StepEngine(by_table({"": answers}))


# ---------------------------------------------------------------- independent samples


def test_greedy_is_one_answer_at_temperature_zero():
    engine = StepEngine(lambda prompt, written, temperature, key: f"{temperature}")
    result = run_one("greedy", 16, engine)
    assert texts(result) == ["0.0"]
    assert result.spend.samples == 1


def test_every_vote_over_independent_samples_shares_one_pool():
    verifier = by_score({"A": 0.9})
    pools = [
        run_one(strategy, 8, chain_engine(0.5), verifier if "best" in strategy else None).candidates
        for strategy in ("pass", "majority", "best_of_n", "best_of_n_weighted", "adaptive_majority(certainty=1)")
    ]
    assert all(tuple(c.ids for c in pool) == tuple(c.ids for c in pools[0]) for pool in pools)
    assert len(pools[0]) == 8


def test_a_smaller_pool_is_the_beginning_of_a_larger_one():
    large = texts(run_one("majority", 16, chain_engine(0.5)))
    assert texts(run_one("majority", 4, chain_engine(0.5))) == large[:4]


@pytest.mark.parametrize(
    ("strategy", "answer"),
    [("best_of_n", "B"), ("best_of_n_weighted", "A"), ("majority", "C"), ("best_of_n_weighted(vote=sharpened)", "B")],
)
def test_each_vote_chooses_its_own_way(strategy, answer):
    engine = answering("A", "B", "C", "A", "C", "C")
    verifier = by_score({"A": 0.6, "B": 0.9, "C": 0.2})
    assert given(run_one(strategy, 6, engine, verifier)) == answer


def test_answerless_and_truncated_samples_never_vote_and_stay_in_the_result():
    """A rival lets completions without an answer vote: their empty answer would have 3 of 5 votes."""
    engine = answering("", "x" * 300, "A", "", "")
    result = run_one("majority", 5, engine)
    assert given(result) == "A"
    assert [c.finish for c in result.candidates] == [Finish.EOS, Finish.LENGTH] + [Finish.EOS] * 3
    assert run_one("best_of_n", 5, answering("", "", "A", "", ""), by_score({"": 1.0, "A": 0.1})).selected == 2


def test_equal_answers_vote_together_whatever_their_steps():
    engine = answering("x\n", "", "y\n", "", "B", "C")  # pieces: "x\n" goes on below
    engine.script = by_table({"": ["x\n", "y\n", "B", "C"], "x\n": "A", "y\n": "A"})
    assert given(run_one("majority", 4, engine)) == "A"


# ---------------------------------------------------------------- adaptive


@pytest.mark.parametrize("votes", range(9))
@pytest.mark.parametrize("others", range(5))
def test_the_posterior_is_that_of_a_beta_distribution(votes, others):
    assert ahead(votes, others) == pytest.approx(stats.beta(votes + 1, others + 1).sf(0.5))


@pytest.mark.parametrize(
    ("answers", "drawn"),
    [
        ("AAAAAAAA", 4),  # 1 - 2^-5 = 0.969; three agree with 0.9375
        ("ABAAAAAA", 7),  # 6 : 1 gives 0.965, 5 : 1 0.938
        ("ABABABAB", 8),  # never certain
        ("ABCDAAAA", 8),  # 5 : 1
        ("ABCAAAAAAA", 8),  # the second-best has one vote however many others there are
    ],
)
def test_majority_stops_exactly_when_the_posterior_says_so(answers, drawn):
    result = run_one("adaptive_majority(batch=1)", len(answers), answering(*answers))
    assert len(result.candidates) == result.spend.samples == drawn
    best, second = sorted((answers[:drawn].count(a) for a in "AB"), reverse=True)
    assert (stats.beta(best + 1, second + 1).sf(0.5) >= 0.95) == (drawn < len(answers))


def test_a_batch_is_what_is_drawn_between_two_looks():
    assert len(run_one("adaptive_majority(batch=3)", 16, answering("A")).candidates) == 6
    assert len(run_one("adaptive_majority(batch=3)", 7, answering(*"ABCDEFG")).candidates) == 7


def test_answerless_samples_are_no_votes_for_certainty():
    result = run_one("adaptive_majority(batch=1)", 12, answering("", "A", "", "A", "", "A", "", "A", "A"))
    assert len(result.candidates) == 8
    assert given(result) == "A"


def test_adaptive_best_of_n_stops_when_the_verifier_is_certain_of_an_answer():
    verifier = by_score({"A": 0.5, "": 1.0, "B": 0.9, "C": 1.0})
    result = run_one("adaptive_best_of_n(batch=1)", 8, answering("A", "", "A", "B", "C"), verifier)
    assert texts(result) == ["A", "", "A", "B"]  # certain of no answer is no reason to stop
    assert given(result) == "B"
    never = run_one("adaptive_best_of_n(certainty=0.99)", 5, answering("A"), verifier)
    assert len(never.candidates) == 5


# ---------------------------------------------------------------- step rejection


def rejecting(table, scores, options="", samples=4, **more):
    engine = StepEngine(by_table(table))
    result = run_one(f"step_rejection{options}", samples, engine, by_score(scores), **more)
    return engine, result


def test_a_step_that_passes_is_kept_at_once():
    engine, result = rejecting({"": ["a\n"], "a\n": ["A"]}, {"a\n": 0.7, "a\nA": 0.9})
    assert len(engine.log) == 2
    assert texts(result) == ["a\nA"]
    assert result.spend.samples == 1


def test_a_step_that_fails_is_drawn_again_until_one_passes():
    engine, result = rejecting({"": ["a\n", "b\n", "c\n"], "c\n": ["A"]}, {"a\n": 0.1, "b\n": 0.4, "c\n": 0.5})
    assert [c.ids for _, c in engine.log[:3]] == [tuple(b"a\n"), tuple(b"b\n"), tuple(b"c\n")]
    assert texts(result) == ["c\nA"]
    assert result.spend.samples == 3
    assert result.spend.generated_tokens == 6 + 2  # the rejected steps are billed


def test_after_all_draws_the_best_is_kept():
    table = {"": ["a\n", "b\n", "c\n", "d\n"], "b\n": ["A", "B", "C", "D"]}
    steps = {"a\n": 0.1, "b\n": 0.4, "c\n": 0.2, "d\n": 0.3}
    engine, result = rejecting(table, steps | {"b\nA": 0.1, "b\nB": 0.2, "b\nC": 0.45, "b\nD": 0.3})
    assert texts(result) == ["b\nC"]
    assert len(engine.log) == 8
    assert result.spend.samples == 4
    engine, result = rejecting(table, steps, "(threshold=0.3)")
    assert texts(result) == ["b\nA"]
    assert len(engine.log) == 3


def test_chains_share_the_budget_and_redraw_on_their_own():
    """8 samples buy 2 chains of 4 draws. Chain 1 passes at its first draw, chain 0 at its third."""
    table = {"": ["a\n", "b\n", "c\n", "d\n"], "b\n": ["B"], "d\n": ["D"]}
    engine, result = rejecting(table, {"a\n": 0.1, "b\n": 0.9, "c\n": 0.2, "d\n": 0.8}, samples=8)
    first_steps = [bytes(c.ids).decode() for request, c in engine.log if request.prefix == result.prompt_ids]
    assert first_steps == ["a\n", "b\n", "c\n", "d\n"]
    assert sorted((c.chain, c.text) for c in result.candidates) == [(0, "d\nD"), (1, "b\nB")]


@pytest.mark.parametrize(("samples", "draws", "chains"), [(16, 4, 4), (16, 16, 1), (3, 4, 1), (6, 4, 1), (1, 4, 1)])
def test_n_samples_buy_n_over_k_chains(samples, draws, chains):
    engine = StepEngine(lambda prompt, written, *_: "x\n" if written.count("\n") < 3 else "A")
    result = run_one(f"step_rejection(draws={draws})", samples, engine, by_score({}, default=0.1))
    assert len(result.candidates) == chains
    assert result.spend.samples == chains * min(draws, samples) <= samples


def test_a_truncated_or_failed_step_is_worse_than_any_other():
    table = {"": ["x" * 300, "b\n", "x" * 300, "x" * 300], "b\n": ["A"]}
    _, result = rejecting(table, {"b\n": 0.0})
    assert texts(result) == ["b\nA"]


def test_a_chain_of_dead_ends_is_in_the_result_and_does_not_vote():
    _, result = rejecting({"": ["x" * 300]}, {})
    assert [c.finish for c in result.candidates] == [Finish.LENGTH]
    assert result.selected is None
    assert result.failed is None


def test_rejection_looks_at_the_last_step_alone():
    verifier = TextVerifier(lambda text: {"a\n": 0.6, "a\nb\n": 0.6}.get(text, 0.9), aggregation="prod")
    engine = StepEngine(by_table({"": ["a\n"], "a\n": ["b\n"], "a\nb\n": ["A"]}))
    result = run_one("step_rejection", 4, engine, verifier)
    assert len(engine.log) == 3  # 0.36 would be drawn again
    assert result.candidates[0].score == pytest.approx(math.prod((0.6, 0.6, 0.9)))


# ---------------------------------------------------------------- company

SAMPLED = ["greedy", "majority", "best_of_n_weighted", "adaptive_majority", "adaptive_best_of_n(certainty=0.8)"]


@pytest.mark.parametrize("strategy", SAMPLED)
def test_results_depend_neither_on_company_nor_on_the_order_of_completion(strategy):
    check_company(strategy, 3, 0.8, num=6)
