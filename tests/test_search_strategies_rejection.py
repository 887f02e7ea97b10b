"""The options of step rejection on scripts made by hand: best guess first, restarts, trust, and giving up."""

import math
from dataclasses import replace

import pytest

from search.types import Finish
from tests.scripted_search import (
    StepEngine,
    TextVerifier,
    babbling,
    by_score,
    by_table,
    check_company,
    count,
    given,
    judging,
    run_one,
    texts,
)


def rejecting(options, table, scores, *, samples=4, greedy=None, engine=None):
    engine = engine or StepEngine(by_table(table, greedy))
    return engine, run_one(f"step_rejection({options})", samples, engine, by_score(scores))


def drawn(engine):
    """What was drawn after what, and whether greedily."""
    decode = engine.tokenizer.decode
    return [(decode(c.ids), request.temperature == 0) for request, c in engine.log]


# ---------------------------------------------------------------- greedy


def test_the_first_draw_of_a_step_is_the_best_guess():
    table, guesses = {"": ["a\n"], "g\n": ["A"]}, {"": "g\n", "g\n": "G"}
    engine, result = rejecting("greedy=true", table, {"g\n": 0.9, "g\nG": 0.9}, greedy=guesses)
    assert drawn(engine) == [("g\n", True), ("G", True)]
    assert texts(result) == ["g\nG"]
    assert result.spend.samples == 1


def test_a_best_guess_that_is_refused_is_followed_by_samples():
    table, scores = {"": ["a\n", "b\n"], "b\n": ["A"]}, {"g\n": 0.1, "a\n": 0.2, "b\n": 0.8, "b\nA": 0.8}
    engine, result = rejecting("greedy=true", table, scores, greedy={"": "g\n"})
    assert drawn(engine)[:3] == [("g\n", True), ("a\n", False), ("b\n", False)]
    assert texts(result) == ["b\nA"]
    assert result.spend.samples == 3


def test_the_best_guess_is_one_of_the_draws_and_may_be_the_best_of_them():
    """Four draws and no more: the guess and three samples."""
    table, scores = {"": ["a\n", "b\n", "c\n"], "g\n": ["A"]}, {"g\n": 0.4, "g\nA": 0.9}
    engine, result = rejecting(
        "greedy=true", table, scores | dict.fromkeys(("a\n", "b\n", "c\n"), 0.2), greedy={"": "g\n"}
    )
    assert [text for text, _ in drawn(engine)[:4]] == ["g\n", "a\n", "b\n", "c\n"]
    assert texts(result) == ["g\nA"]
    assert result.spend.samples == 4


def test_one_chain_alone_guesses_since_all_would_guess_alike():
    table = {"": ["a\n"], "a\n": ["A"], "g\n": ["G"]}
    engine, result = rejecting("greedy=true, draws=2", table, {}, samples=8, greedy={"": "g\n"})
    firsts = [request.temperature for request, _ in engine.log if request.prefix == result.prompt_ids]
    assert firsts == [0, 1, 1, 1]
    assert sorted((c.chain, c.text) for c in result.candidates) == [(0, "g\nG"), *((n, "a\nA") for n in (1, 2, 3))]


# ---------------------------------------------------------------- restart

CHAINS = {"": ["a\n", "b\n", "c\n", "d\n"], **{f"{x}\n": [x.upper()] for x in "abcd"}}


def all_of(letter, first, second):
    return {f"{letter}\n": first, f"{letter}\n{letter.upper()}": second}


def test_a_chain_whose_steps_are_all_accepted_is_the_last():
    """Eight samples of two draws would buy four chains."""
    engine, result = rejecting("restart=true, draws=2", CHAINS, all_of("a", 0.9, 0.9), samples=8)
    assert texts(result) == ["a\nA"]
    assert [text for text, _ in drawn(engine)] == ["a\n", "A"]
    assert result.spend.samples == 1


def test_another_one_begins_where_a_step_was_not_accepted():
    """Chain 0 keeps the better of a and b, which is not good enough, whatever comes after; chain 1 is accepted."""
    scores = all_of("a", 0.2, 0.2) | all_of("b", 0.4, 0.9) | all_of("c", 0.5, 0.5)
    engine, result = rejecting("restart=true, draws=2", CHAINS, scores, samples=8)
    assert [(c.chain, c.text) for c in result.candidates] == [(0, "b\nB"), (1, "c\nC")]
    assert [text for text, _ in drawn(engine)] == ["a\n", "b\n", "B", "c\n", "C"]
    assert result.spend.samples == 3
    assert given(result) == "B", "a vote by score, as among chains side by side"


def test_the_last_step_has_to_be_accepted_too():
    scores = all_of("a", 0.9, 0.4) | all_of("b", 0.9, 0.9)
    _, result = rejecting("restart=true, draws=1", CHAINS, scores, samples=3)
    assert texts(result) == ["a\nA", "b\nB"]


def test_chains_that_are_never_accepted_cost_what_they_may_and_no_more():
    engine = StepEngine(by_table({"": ["x\n"], "x\n": ["A"]}))
    refused = run_one("step_rejection(restart=true, draws=2)", 7, engine, by_score({}, default=0.1))
    assert (len(refused.candidates), refused.spend.samples) == (3, 6)


def test_a_truncated_chain_is_not_accepted():
    engine = StepEngine(by_table({"": ["x" * 300, "b\n"], "b\n": ["B"]}))
    result = run_one("step_rejection(restart=true, draws=1)", 4, engine, by_score({}, default=0.9))
    assert [c.finish for c in result.candidates] == [Finish.LENGTH, Finish.EOS]
    assert given(result) == "B"


def test_a_chain_that_is_finished_without_looking_at_its_steps_can_be_accepted():
    """After `max_rounds` steps the rest comes at once; the verifier then judges the whole."""
    table = {"": ["a\n", "b\n"], "a\n": ["x\nA"], "b\n": ["x\nB"]}
    result = rejecting("restart=true, draws=1, max_rounds=1", table, {}, samples=3)[1]
    assert texts(result) == ["a\nx\nA"]


def test_of_the_restarted_chains_only_the_first_guesses():
    guesses = {"": "g\n", "g\n": "G"}
    engine, result = rejecting(
        "restart=true, greedy=true, draws=1",
        CHAINS,
        all_of("g", 0.1, 0.9) | all_of("a", 0.9, 0.9),
        samples=4,
        greedy=guesses,
    )
    assert drawn(engine) == [("g\n", True), ("G", True), ("a\n", False), ("A", False)]
    assert texts(result) == ["g\nG", "a\nA"]


# ---------------------------------------------------------------- trust, give up


class Sure(StepEngine):
    """It writes pieces with capitals with probability .5, all others with .99."""

    def extend_one(self, request):
        found = super().extend_one(request)
        text = self.tokenizer.decode(found.ids)
        return replace(found, logprob=math.log(0.5 if text.strip().isupper() else 0.99))


def sure_of(table):
    return Sure(by_table(table))


def test_a_step_that_the_policy_is_sure_of_is_not_shown_to_the_verifier():
    engine, verifier = sure_of({"": ["a\n"], "a\n": ["b\n"], "a\nb\n": ["A"]}), by_score({}, default=0.9)
    result = run_one("step_rejection(trust=0.95)", 4, engine, verifier)
    assert texts(result) == ["a\nb\nA"]
    assert ["".join(r.steps) for r in verifier.log] == ["a\nb\nA"]
    assert result.candidates[0].step_scores == (0.9, 0.9, 0.9)
    everything = by_score({}, default=0.9)
    run_one("step_rejection", 4, sure_of({"": ["a\n"], "a\n": ["b\n"], "a\nb\n": ["A"]}), everything)
    assert len(everything.log) == 3, "by default all are"


def test_an_answer_that_is_trusted_to_its_end_has_the_policys_own_scores():
    verifier = by_score({}, default=0.1)
    result = run_one("step_rejection(trust=0.95)", 4, sure_of({"": ["a\n"], "a\n": ["b"]}), verifier)
    assert not verifier.log
    assert result.candidates[0].step_scores == pytest.approx((0.99, 0.99))
    assert result.candidates[0].score == pytest.approx(0.99)
    assert given(result) == "b"


def test_an_engine_that_tells_no_probabilities_is_not_trusted():
    verifier = by_score({}, default=0.9)
    run_one("step_rejection(trust=0.1)", 4, StepEngine(by_table({"": ["a\n"], "a\n": ["A"]})), verifier)
    assert len(verifier.log) == 2


def test_a_chain_of_which_no_draw_was_accepted_is_ended_by_the_policy_alone():
    table = {"": ["a\n"], "a\n": ["b\n"], "a\nb\n": ["A"]}
    engine, verifier = StepEngine(by_table(table)), by_score({"a\n": 0.2}, default=0.9)
    result = run_one("step_rejection(draws=2, give_up=true)", 2, engine, verifier)
    assert texts(result) == ["a\nb\nA"]
    assert ["".join(r.steps) for r in verifier.log] == ["a\n"], "equal draws are read once, and the rest not at all"
    assert result.spend.samples == 2
    assert result.candidates[0].score == 0.2, "it votes with the step that was refused"
    assert given(result) == "A"


def test_what_gave_up_does_not_end_the_others():
    table = {"": ["a\n", "b\n"], "a\n": ["c\n"], "a\nc\n": ["A"], "b\n": ["B"]}
    scores = {"a\n": 0.2, "b\n": 0.9, "b\nB": 0.8}
    _, result = rejecting("draws=1, give_up=true", table, scores, samples=2)
    assert sorted((c.chain, c.text, c.score) for c in result.candidates) == [(0, "a\nc\nA", 0.2), (1, "b\nB", 0.8)]
    _, again = rejecting("draws=1, give_up=true, restart=true", table, scores, samples=2)
    assert [(c.chain, c.text) for c in again.candidates] == [(0, "a\nc\nA"), (1, "b\nB")]


# ---------------------------------------------------------------- whatever comes

OPTIONS = ["greedy=true", "restart=true", "greedy=true, restart=true", "draws=2, restart=true, max_rounds=2"]
OPTIONS += ["give_up=true", "greedy=true, trust=0.95, give_up=true", "restart=true, give_up=true, draws=2"]


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("seed", range(4))
def test_no_option_overspends_or_misreports(options, seed):
    engine, verifier = babbling(seed, cache=True), judging(seed, parameters=7)
    result = run_one(f"step_rejection({options})", 6, engine, verifier)
    assert 0 < result.spend.samples <= 6
    counted = count(engine, verifier)
    assert result.spend.generated_tokens == counted.generated
    assert result.spend.flops_ideal == counted.ideal_flops
    assert all(not c.open for c in result.candidates)
    chains = [c.chain for c in result.candidates]
    assert len({*chains}) == len(chains)


@pytest.mark.parametrize("options", OPTIONS)
def test_results_depend_neither_on_company_nor_on_the_order_of_completion(options):
    check_company(f"step_rejection({options})", 4, 0.7, num=5)


def test_a_verifier_that_fails_leaves_what_was_kept():
    judge = TextVerifier(lambda text: math.nan if text.startswith("c") else 0.3)
    result = run_one("step_rejection(restart=true, draws=1)", 4, StepEngine(by_table(CHAINS)), judge)
    assert result.failed is not None
    assert [c.text for c in result.candidates] == ["a\nA", "b\nB"]
