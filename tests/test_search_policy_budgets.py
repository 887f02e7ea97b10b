"""Budgets: none is exceeded, and where one runs out in the middle, what the strategy has by then is the result."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from search.errors import BudgetError, BudgetExceeded
from search.types import Budget, Finish
from tests.scripted_search import (
    ALL,
    StepEngine,
    babbling,
    by_score,
    by_table,
    judging,
    policy_for,
    run,
    run_one,
    texts,
)
from tests.scripted_search import given as answer_given


@settings(deadline=None, max_examples=150)
@given(st.sampled_from(ALL), st.integers(1, 40), st.integers(0, 10**6))
def test_no_strategy_spends_more_samples_than_its_budget(strategy, samples, seed):
    try:
        result = run_one(strategy, samples, babbling(seed), judging(seed), max_new_tokens=30)
    except BudgetError:
        return  # it cannot buy one unit, and says so
    assert 0 < result.spend.samples <= samples
    assert result.failed is None


def sized(strategy, samples=8):
    """The strategy with a width for budgets that do not say one."""
    if strategy == "greedy":
        return strategy
    name, _, options = strategy.partition("(")
    return f"{name}(samples={samples}" + (f", {options}" if options else ")")


@settings(deadline=None, max_examples=150)
@given(st.sampled_from(ALL), st.integers(1, 400), st.integers(0, 10**6))
def test_a_token_budget_is_never_exceeded(strategy, tokens, seed):
    result = run_one(sized(strategy), tokens, babbling(seed), judging(seed), unit="tokens", max_new_tokens=30)
    assert result.spend.generated_tokens <= tokens
    assert result.selected is None or result.candidates[result.selected].complete


@settings(deadline=None, max_examples=200)
@given(st.sampled_from(ALL), st.integers(1, 10**6), st.sampled_from([0, 300, 5000]), st.integers(0, 10**6))
def test_a_flop_budget_is_never_exceeded_the_verifier_included(strategy, flops, parameters, seed):
    verifier = judging(seed, parameters=parameters)
    result = run_one(sized(strategy), flops, babbling(seed), verifier, unit="flops", max_new_tokens=30)
    assert result.spend.flops_ideal <= flops * (1 + 1e-9)


def test_what_is_finished_when_the_tokens_run_out_is_kept_and_scored():
    table = {"": ["A", "b\n", "c\n", "d\n"], "b\n": ["e\n"], "c\n": ["f\n"], "b\ne\n": ["B"]}
    verifier = by_score({"A": 0.3, "b\n": 0.9, "c\n": 0.8})
    result = run_one("beam(width=2, samples=4)", 10, StepEngine(by_table(table)), verifier, unit="tokens")
    assert texts(result) == ["A"]
    assert result.candidates[0].score == 0.3
    assert answer_given(result) == "A"
    assert result.failed is None


def test_revisions_cut_off_by_the_budget_keep_their_chains_and_context():
    answers = iter("ABCDEF")
    verifier = by_score({})
    engine = StepEngine(lambda *_: next(answers))
    result = run_one("revisions(samples=16, ratio=4)", 9, engine, verifier, unit="tokens")
    assert [(c.text, c.chain) for c in result.candidates] == [("A", 0), ("B", 1), ("C", 0), ("D", 1)]
    assert [c.score for c in result.candidates] == [0.5] * 4
    assert [r.attempts for r in verifier.log] == [(), (), ("A",), ("B",)]


def test_what_a_strategy_discarded_has_no_vote_where_the_tokens_run_out():
    """A and B were rejected, B is the best so far, and a third draw of the chain cannot be paid."""
    engine = StepEngine(by_table({"": ["A", "B", "C"]}))
    verifier = by_score({"A": 0.1, "B": 0.3, "C": 0.9})
    result = run_one("step_rejection(samples=4)", 4, engine, verifier, unit="tokens")
    assert [(c.text, c.chain, c.score) for c in result.candidates] == [("B", 0, 0.3)]


def test_searched_turns_cut_off_by_the_budget_keep_their_turns():
    """Two answers of two tokens a turn; the second is cut off in its second round."""
    first, second = ["A", "B"], ["C", "c\n"]
    scores = {"A": 0.2, "B": 0.9, "C": 0.4, "c\n": 0.5}

    def script(prompt, written, temperature, key):
        return (first if prompt == "q" else second).pop(0)

    more = "searched_revisions(width=2, samples=4)"
    result = run_one(more, 8, StepEngine(script), by_score(scores), unit="tokens")
    assert [(c.text, c.chain, c.score) for c in result.candidates] == [("A", 0, 0.2), ("B", 0, 0.9), ("C", 1, 0.4)]


def test_seeds_and_their_revisions_cut_off_by_the_budget_keep_their_chains():
    answers = iter("ABCDEFGH")
    scores = {"A": 0.2, "B": 0.9, "C": 0.4, "D": 0.6}
    strategy = "beam_revisions(width=2, samples=8, chains=2)"
    result = run_one(strategy, 13, StepEngine(lambda *_: next(answers)), by_score(scores), unit="tokens")
    assert [(c.text, c.chain) for c in result.candidates] == [
        ("C", 2),
        ("A", 3),
        ("B", 0),
        ("D", 1),
        ("E", 0),
        ("F", 1),
    ]


@pytest.mark.parametrize(("unit", "amount"), [("tokens", 3), ("flops", 2 * 1000 * 5)])
def test_a_budget_that_buys_nothing_at_run_time_fails_with_its_numbers(unit, amount):
    result = run_one("majority(samples=4)", amount, StepEngine(lambda *_: "A"), unit=unit)
    assert result.failed == (
        f"4 more answers or steps asked for, but the budget of {amount} {unit} has 3 tokens left: give more of it"
    )
    assert result.candidates == ()
    assert result.selected is None
    assert result.spend.generated_tokens == 0


def look_ahead(tokens, num_steps):
    engine = StepEngine(lambda *_: "x\n")
    policy = policy_for(engine, Budget("tokens", tokens))

    async def look():
        candidates = await policy.step(policy.start(2))
        before = policy.spend
        try:
            return await policy.look_ahead(candidates, num_steps), before
        except BudgetExceeded:
            return None, before

    return *run(look(), engine), policy.spend


def test_a_rollout_that_cannot_begin_is_not_charged():
    rolled, before, after = look_ahead(5, 3)
    assert rolled is None
    assert before == after
    assert before.generated_tokens == 4


def test_a_rollout_that_cannot_be_paid_to_its_end_stops():
    """Two rollouts of two tokens a step: 4 of 13 are spent before, and the third step has one left for two."""
    rolled, _, after = look_ahead(13, 5)
    assert [c.text for c in rolled] == ["x\n" * 3] * 2
    assert all(c.open for c in rolled)
    assert after.generated_tokens == 12


def test_rollouts_of_what_has_ended_cost_nothing():
    engine = StepEngine(lambda *_: "A")
    policy = policy_for(engine, Budget("tokens", 4))

    async def look():
        ended = await policy.step(policy.start(2))
        return ended, await policy.look_ahead(ended, 2)

    ended, rolled = run(look(), engine)
    assert [c.text for c in rolled] == [c.text for c in ended] == ["A", "A"]


@pytest.mark.parametrize("budget", [Budget("samples", 3), Budget("tokens", 3), Budget("flops", 2_000 * (2 + 3))])
def test_a_refused_call_spends_nothing(budget):
    engine = StepEngine(lambda *_: "A")
    policy = policy_for(engine, budget)
    with pytest.raises(BudgetExceeded, match="4 more"):
        run(policy.sample(4), engine)
    assert policy.spend.generated_tokens == policy.spend.samples == 0
    assert engine.log == []


def test_a_token_budget_bounds_every_sample():
    engine = StepEngine(lambda *_: "x" * 100)
    (candidates,) = [run(policy_for(engine, Budget("tokens", 40), max_new_tokens=50).sample(4), engine)]
    assert [len(c.ids) for c in candidates] == [10] * 4
    assert all(c.finish is Finish.LENGTH for c in candidates)


def test_an_answer_is_no_longer_than_allowed_all_its_steps_together():
    engine = StepEngine(lambda *_: "xxx\n")
    result = run_one("dvts(width=1)", 1, engine, by_score({}), max_new_tokens=10)
    (candidate,) = result.candidates
    assert (candidate.finish, len(candidate.ids)) == (Finish.LENGTH, 10)
    assert [request.max_new_tokens for request, _ in engine.log] == [10, 6, 2]


def test_flops_without_a_size_of_the_model_are_no_budget():
    with pytest.raises(BudgetError, match=r"engine\.flops_parameters"):
        run_one("best_of_n(samples=2)", 1000, StepEngine(lambda *_: "A", parameters=0), judging(0), unit="flops")
