"""The metered handles: what a search cost equals an independent count, no budget is exceeded, and what the engine or
the verifier get wrong ends one problem with its reason."""

import math

import pytest

from search.engines.scripted import EOS
from search.errors import VerifierError
from search.policy import AGGREGATE, Policy, Scorer, extended, steps_of
from search.types import Budget, Candidate, Continuation, Finish, Grade, Problem, Scored, VerifierFacts
from tests.scripted_search import (
    ALL,
    PLAIN,
    QUESTION,
    LineTask,
    StepEngine,
    TextVerifier,
    babbling,
    by_score,
    by_table,
    count,
    judging,
    policy_for,
    run,
    run_all,
    run_one,
    sampler_of,
    texts,
)
from tests.scripted_search import given as answer_given

# ---------------------------------------------------------------- spend


@pytest.mark.parametrize("cache", [False, True])
@pytest.mark.parametrize("strategy", ALL)
def test_spend_equals_an_independent_count(strategy, cache):
    """Pruned branches, rejected steps, rollouts and what the verifier read included; each prefix token billed once in
    the ideal FLOPs, and what the engine says it computed in the actual ones."""
    for seed in range(6):
        engine = babbling(seed, cache=cache)
        verifier = None if strategy in PLAIN else judging(seed, parameters=70)
        spend = run_one(strategy, 8, engine, verifier, max_new_tokens=40).spend
        counted = count(engine, verifier)
        assert spend.generated_tokens == counted.generated
        assert spend.prefilled_tokens == counted.prefilled
        assert spend.cached_tokens == counted.cached
        assert spend.verifier_tokens == counted.verifier
        assert spend.flops_actual == pytest.approx(counted.actual_flops, rel=1e-12)
        assert spend.flops_ideal == pytest.approx(counted.ideal_flops, rel=1e-12)


@pytest.mark.parametrize("strategy", [s for s in ALL if not s.startswith("lookahead")])
def test_samples_are_whole_answers_and_the_most_steps_at_one_depth(strategy):
    for seed in range(6):
        engine = babbling(seed)
        spend = run_one(strategy, 8, engine, None if strategy in PLAIN else judging(seed), max_new_tokens=40).spend
        whole, width = 0, {}
        for request, _ in engine.log:
            depth = bytes(i for i in request.prefix[request.prefix.index(257) :] if i < EOS).count(b"\n")
            if request.stop is None and not depth:
                whole += 1
            else:
                width[depth] = width.get(depth, 0) + 1
        assert spend.samples == whole + max(width.values(), default=0)


def test_the_prefix_is_billed_once_however_many_steps_continue_it():
    """A rival bills the whole prefix again at every step."""
    engine = StepEngine(lambda prompt, written, *_: "x\n" if written.count("\n") < 9 else "A")
    spend = run_one("dvts(width=1)", 1, engine, by_score({})).spend
    assert spend.generated_tokens == 9 * 2 + 2
    assert spend.flops_ideal == 2 * 1000 * (len("q") + 1 + 20)
    assert spend.prefilled_tokens == sum(2 + 2 * step for step in range(10))


def test_pruned_branches_are_billed():
    """A rival counts the tokens of the surviving beams alone."""
    table = {"": ["a\n", "long step\n"], "a\n": ["A", "B"]}
    result = run_one("beam(width=2)", 2, StepEngine(by_table(table)), by_score({"a\n": 0.9}))
    assert result.spend.generated_tokens == 2 + 10 + 2 + 2
    assert sum(len(c.ids) for c in result.candidates) == 8


def test_equal_steps_are_read_once_by_the_verifier():
    verifier = by_score({})
    result = run_one("best_of_n", 4, StepEngine(by_table({"": ["A", "A", "B", "A"]})), verifier)
    assert [r.steps for r in verifier.log] == [("A",), ("B",)]
    assert [c.score for c in result.candidates] == [0.5] * 4


def test_votes_without_scores_pay_no_verifier():
    for strategy in ("majority", "revisions_majority", "pass"):
        verifier = by_score({})
        result = run_one(strategy, 4, StepEngine(by_table({"": ["A"]})), verifier)
        assert result.spend.verifier_tokens == len(verifier.log) == 0


def test_votes_without_scores_pay_no_verifier_where_the_tokens_run_out_either():
    verifier = by_score({})
    strategy = "adaptive_majority(samples=8, batch=1, certainty=1)"
    result = run_one(strategy, 5, StepEngine(by_table({"": ["A"]})), verifier, unit="tokens")
    assert texts(result) == ["A", "A"]
    assert result.spend.verifier_tokens == len(verifier.log) == 0


def test_the_ideal_cost_of_whole_answers_counts_a_shared_beginning_once():
    table = {"": ["a\n"], "a\n": ["A", "B"]}
    spend = run_one("best_of_n", 2, StepEngine(by_table(table)), by_score({})).spend
    assert spend.verifier_flops_ideal == 0
    verifier = TextVerifier(lambda text: 0.5, parameters=10)
    spend = run_one("best_of_n", 2, StepEngine(by_table(table)), verifier).spend
    assert spend.verifier_flops_ideal == 2 * 10 * len("q" + "a\n" + "A" + "B")
    assert spend.verifier_flops_actual == 2 * 10 * len("qa\nA" + "qa\nB")


def test_an_attempt_in_the_next_prompt_is_a_prefix_computed_before():
    """The first answer continues the very ids that the revision's prompt begins with."""

    class Transcript(LineTask):
        def prompt(self, problem):
            return [{"role": "user", "content": "q"}]

    engine = StepEngine(lambda *_: "A")
    engine.tokenizer.apply_chat_template = lambda messages, **_: [
        token for m in messages for token in (*m["content"].encode(), 257 if m["role"] == "user" else EOS)
    ]
    policy = Policy(QUESTION, sampler_of(engine, Transcript()), Budget("samples", 2))

    async def revise():
        (first,) = await policy.sample(1)
        await policy.finish(policy.start(1, attempts=[first]))

    run(revise(), engine)
    shown = engine.log[1][0].prefix
    assert shown[:4] == (*b"q", 257, *b"A", EOS)
    assert policy.spend.flops_ideal == 2 * 1000 * (len(shown) + 2)


# ---------------------------------------------------------------- tokens


def test_a_prefix_is_continued_from_the_very_ids_it_was_generated_with():
    """One letter is two tokens here, so that encoding the text again would give other ids."""
    engine = StepEngine(by_table({"": ["é\n", "a\n"], "é\n": ["é"], "a\n": ["A"]}))
    result = run_one("dvts(width=1)", 2, engine, by_score({}))
    (_, first), (second_request, second) = engine.log[0], engine.log[2]
    assert second_request.prefix == result.prompt_ids + first.ids
    assert result.candidates[0].ids == first.ids + second.ids


def test_steps_are_the_differences_of_the_decoded_text():
    engine = StepEngine(by_table({"": ["é=1\n"], "é=1\n": ["b\n"], "é=1\nb\n": ["A"]}))
    result = run_one("dvts(width=1)", 1, engine, by_score({}))
    (candidate,) = result.candidates
    assert candidate.steps == ("é=1\n", "b\n", "A")
    assert candidate.step_ends == (5, 7, 9)  # é is two bytes; the end has its own
    assert candidate.text_ends == (4, 6, 7)


@pytest.mark.parametrize(
    ("text", "complete", "steps"),
    [
        ("a\nb\nA", True, ("a\n", "b\n", "A")),
        ("a\nb\n", True, ("a\n", "b\n", "")),
        ("a\nb\n", False, ("a\n", "b\n")),
        ("a\n\nb", True, ("a\n", "\n", "b")),
        ("", True, ("",)),
        ("", False, ("",)),
    ],
)
def test_a_whole_answer_is_split_as_if_it_had_been_searched(text, complete, steps):
    assert steps_of(Candidate(text=text, finish=Finish.EOS if complete else Finish.STOP), "\n") == steps


def test_searched_and_split_answers_read_the_same():
    pieces = {"": "a\n", "a\n": "b\n", "a\nb\n": ""}
    searched, whole = by_score({}), by_score({})
    run_one("dvts(width=1)", 1, StepEngine(by_table(pieces)), searched)
    run_one("best_of_n", 1, StepEngine(by_table(pieces)), whole)
    assert searched.log[-1] == whole.log[-1]
    assert whole.log[-1].steps == ("a\n", "b\n", "")


def test_an_answer_that_runs_into_the_next_question_ends_before_it():
    class FewShot(LineTask):
        end_text = "\n\nQuestion:"

    engine = StepEngine(lambda prompt, written, *_: "4\n\nQuestion:\n" if not written else "what else?")
    result = run_one("majority", 1, engine, task=FewShot())
    (candidate,) = result.candidates
    assert candidate.finish is Finish.EOS
    assert candidate.ids == (*b"4", EOS)
    assert result.spend.generated_tokens == len("4\n\nQuestion:\n")


@pytest.mark.parametrize("strategy", ["dvts(width=1)", "majority"])
def test_an_answer_that_had_ended_is_not_cut_off_by_what_runs_on_after_it(strategy):
    class FewShot(LineTask):
        end_text = "\n\nQuestion:"

    pieces = {"": "a\n", "a\n": "4\n", "a\n4\n": "\n", "a\n4\n\n": "Question: what else, and so on, without an end"}
    result = run_one(strategy, 1, StepEngine(by_table(pieces)), by_score({}), task=FewShot(), max_new_tokens=25)
    (candidate,) = result.candidates
    assert (candidate.finish, candidate.text, candidate.ids[-1]) == (Finish.EOS, "a\n4", EOS)
    assert "".join(candidate.steps) == "a\n4"
    assert answer_given(result) == "4"


def test_four_and_then_four_samples_are_the_same_eight():
    engine = babbling(1)

    async def in_parts(policy):
        return [*await policy.sample(4), *await policy.sample(4)]

    assert run(in_parts(policy_for(engine)), engine) == run(policy_for(engine).sample(8), engine)


def test_forks_are_new_draws_each_time():
    policy = policy_for(babbling(1))
    (root,) = policy.start(1)
    children = [*policy.fork(root, 2), *policy.fork(root, 2)]
    assert [c.path for c in children] == [(0, 0), (0, 1), (0, 2), (0, 3)]
    assert len({c.key for c in children}) == 4


def test_logprobs_add_up_over_steps():
    tokenizer = babbling(1).tokenizer
    step = extended(Candidate(), Continuation((97, 10), Finish.STOP, logprob=-1.5), tokenizer, None, stepwise=True)
    last = extended(step, Continuation((65, EOS), Finish.EOS, logprob=-0.5), tokenizer, None, stepwise=True)
    assert (last.logprob, last.text, last.step_ends) == (-2.0, "a\nA", (2, 4))


# ---------------------------------------------------------------- what goes wrong

ONE = [QUESTION]
THREE = [Problem(name, name, "A") for name in ("good", "bad", "fine")]


class Broken(TextVerifier):
    """Right about all problems but "bad"."""

    def __init__(self, reply, **options):
        super().__init__(lambda text: 0.5, **options)
        self.reply = reply

    def _score(self, request):
        scored = super()._score(request)
        return self.reply(scored) if request.problem.key == "bad" else scored


def replaced(*scores):
    return lambda scored: Scored(scores, scored.tokens, scored.prompt_tokens, scored.computed_tokens)


@pytest.mark.parametrize("strategy", ["best_of_n", "beam(width=2)", "revisions", "step_rejection"])
@pytest.mark.parametrize(
    ("reply", "reason"),
    [
        (replaced(math.nan), "score nan, which is not in 0..1"),
        (replaced(math.inf), "score inf"),
        (replaced(1.5), "score 1.5"),
        (replaced(-0.5), "score -0.5"),
        (replaced(), "0 scores for 1 steps; check its step separator"),
        (replaced(0.5, 0.5), "2 scores for 1 steps"),
    ],
)
def test_unusable_scores_fail_that_problem_alone_and_choose_nothing(strategy, reply, reason):
    engine = StepEngine(lambda *_: "A")
    good, bad, fine = run_all(strategy, 4, engine, THREE, Broken(reply))
    assert reason in bad.failed
    assert "'bad'" in bad.failed
    assert bad.selected is None
    assert bad.candidates  # what was generated is still there, and paid for
    assert bad.spend.verifier_tokens > 0
    assert (good.failed, fine.failed) == (None, None)
    alone = run_all(strategy, 4, StepEngine(lambda *_: "A"), THREE[:1], by_score({}))
    assert good == alone[0]


def test_a_score_that_is_only_just_outside_is_rounding():
    result = run_one("best_of_n", 1, StepEngine(lambda *_: "A"), TextVerifier(lambda text: 1.0 + 1e-9))
    assert result.failed is None


def test_a_verifier_that_answers_too_few_names_the_numbers():
    class Short(TextVerifier):
        def score(self, requests):
            return super().score(requests)[1:]

    with pytest.raises(VerifierError, match="answered 2 of 3 requests"):
        run_all("best_of_n", 1, StepEngine(lambda *_: "A"), THREE, Short(lambda text: 0.5))


def test_an_outcome_verifier_scores_finished_answers_only():
    verifier = by_score({"a\nA": 0.9})
    verifier.facts = VerifierFacts("orm", 0, process=False)
    engine = StepEngine(by_table({"": ["a\n", "x" * 300], "a\n": "A"}))
    policy = policy_for(engine)

    async def look():
        return await Scorer(verifier, policy, "\n").score([*await policy.sample(2), *policy.start(1)])

    whole, cut, started = run(look(), engine, verifier)
    assert (whole.score, whole.step_scores) == (0.9, (0.9,))
    assert cut.score is started.score is None
    assert len(verifier.log) == 1


def test_aggregations():
    scores = (0.5, 0.25, 0.75)
    values = {name: aggregate(scores) for name, aggregate in AGGREGATE.items()}
    assert values == {"last": 0.75, "min": 0.25, "prod": 0.09375, "mean": 0.5}


class Refusing(StepEngine):
    """Ends every request of one problem in a given way, without a token."""

    finish = Finish.ERROR

    def extend_one(self, request):
        return Continuation((), self.finish) if request.prefix[:3] == tuple(b"bad") else super().extend_one(request)


@pytest.mark.parametrize("strategy", ["majority", "best_of_n", "beam(width=2)", "revisions"])
@pytest.mark.parametrize("finish", [Finish.ERROR, Finish.OVERFLOW, Finish.EOS, Finish.STOP])
def test_an_engine_that_returns_nothing_fails_that_problem_alone(strategy, finish):
    engine = Refusing(lambda *_: "A")
    engine.finish = finish
    good, bad, fine = run_all(strategy, 4, engine, THREE, by_score({}))
    end = "overflow" if finish is Finish.OVERFLOW else "error"
    assert f"the engine returned nothing for any of its {len(bad.candidates)} candidates ({end})" == bad.failed
    assert bad.selected is None
    assert bad.spend.flops_ideal == bad.spend.generated_tokens == 0
    assert [answer_given(r) for r in (good, fine)] == ["A", "A"]


def test_one_failed_sample_does_not_vote_and_the_others_do():
    pieces = iter(["x", "B", "B", "A"])

    class Flaky(StepEngine):
        def extend_one(self, request):
            piece = next(pieces)
            return Continuation((), Finish.ERROR) if piece == "x" else Continuation((*piece.encode(), EOS), Finish.EOS)

    result = run_one("majority", 4, Flaky(lambda *_: ""))
    assert result.failed is None
    assert [c.finish for c in result.candidates] == [Finish.ERROR] + [Finish.EOS] * 3
    assert answer_given(result) == "B"
    assert result.candidates[0].grade is Grade.WRONG


def test_a_prompt_longer_than_the_context_fails_that_problem_with_its_numbers():
    long = Problem("long", "x" * 80, "A")
    engine = StepEngine(lambda *_: "A", max_length=60)
    for strategy in ("majority", "beam(width=2)", "revisions"):
        found = run_all(strategy, 4, engine, [THREE[0], long], by_score({}))
        assert found[1].failed == "its prompt has 81 tokens, and the model's context only 60"
        assert (found[1].candidates, found[1].selected, found[1].spend.samples) == ((), None, 0)
        assert answer_given(found[0]) == "A"


def test_one_overflow_ends_that_candidate_alone():
    """A rival loses the whole problem to one candidate that outgrew the context."""
    table = {"": ["x" * 20 + "\n", "b\n", "c\n", "d\n"], "b\n": ["A"], "x" * 20 + "\n": ["B"]}
    engine = StepEngine(by_table(table), max_length=23)
    result = run_one("dvts(width=1)", 2, engine, by_score({}))
    assert [c.finish for c in result.candidates] == [Finish.OVERFLOW, Finish.EOS]
    assert result.failed is None
    assert answer_given(result) == "A"
