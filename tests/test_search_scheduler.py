"""The scheduler merges what strategies ask for into full batches, feeds streaming engines at once, holds the cap on
tokens, and leaves nothing behind when something breaks."""

import contextlib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from search.errors import BudgetExceeded, EngineError
from search.policy import Policy, Scorer
from search.randomness import key64
from search.scheduler import run_together
from search.types import Budget, Problem
from tests.scripted_search import (
    LineTask,
    ShuffledStream,
    StepEngine,
    TextVerifier,
    by_score,
    chain_engine,
    run_all,
    sampler_of,
)

STRATEGIES = ["majority", "beam(width=2)", "lookahead(width=2)", "step_rejection", "revisions(ratio=1)"]
STRATEGIES += ["adaptive_majority", "adaptive_best_of_n(certainty=0.7)"]


class Batches(StepEngine):
    """Keeps the sizes of the batches it was given."""

    def __init__(self, script=lambda prompt, written, temperature, key: f"{prompt}:{key % 3}"):
        super().__init__(script)
        self.sizes = []

    def extend(self, requests):
        self.sizes.append(len(requests))
        return super().extend(requests)


def policy_for(name, engine, max_new_tokens=50):
    return Policy(Problem(name, name), sampler_of(engine, max_new_tokens=max_new_tokens), Budget("samples", 8))


async def one_by_one(policy, num):
    return [(await policy.sample(1))[0] for _ in range(num)]


def problems(num):
    return [Problem(f"p{n}", f"{key64(n) % 10**4:04d}", "x") for n in range(num)]


# ---------------------------------------------------------------- batches


def test_requests_of_all_problems_share_batches():
    engine = Batches()

    async def two_steps(policy, num):
        first = await policy.sample(num)
        return first + await policy.sample(1)

    policies = [policy_for(name, engine) for name in "abc"]
    results = run_together([two_steps(p, n) for p, n in zip(policies, (1, 2, 3), strict=True)], engine)
    assert engine.sizes == [6, 3]
    assert [len(r) for r in results] == [2, 3, 4]
    assert all(c.text.startswith(name) for name, r in zip("abc", results, strict=True) for c in r)


def test_a_batch_holds_every_live_problem_and_no_other():
    engine = Batches()
    run_together([one_by_one(policy_for(name, engine), n) for n, name in enumerate("abcd", 1)], engine)
    assert engine.sizes == [4, 3, 2, 1]


def test_scores_of_all_problems_are_asked_in_one_batch():
    verifier = by_score({})
    run_all("beam(width=2)", 4, chain_engine(0.8), problems(10), verifier)
    assert len(verifier.batches) == 4
    assert all(size > 10 for size in verifier.batches[:3])


def test_a_strategy_that_asks_nothing_is_done():
    async def nothing():
        return "done"

    assert run_together([nothing(), nothing()], Batches()) == ["done", "done"]


def test_results_come_in_the_order_of_the_problems():
    engine = Batches()
    order = []
    found = run_together(
        [one_by_one(policy_for(name, engine), n) for n, name in zip((3, 1, 2), "abc", strict=True)],
        engine,
        on_done=lambda i, result: order.append((i, len(result))),
    )
    assert [len(result) for result in found] == [3, 1, 2]
    assert order == [(1, 1), (2, 2), (0, 3)]


def test_ticks_tell_problems_tokens_and_the_size_of_the_trees():
    engine = Batches(lambda *_: "abc")
    ticks = []
    run_together(
        [one_by_one(policy_for(name, engine), n) for n, name in enumerate("ab", 1)],
        engine,
        on_tick=lambda tick: ticks.append((tick.finished, tick.tokens, tick.steps)),
    )
    assert ticks == [(1, 8, 2), (2, 12, 3)]


# ---------------------------------------------------------------- streaming


def test_a_streaming_engine_has_the_next_step_as_soon_as_one_problem_can_go_on():
    """Problem b goes on while a still waits: no step waits for the slowest of all problems."""
    seen = []

    class Slow(ShuffledStream):
        def _collect(self):
            if not self.flying:
                return []
            seen.append(len(self.flying))
            ticket = max(self.flying)  # the newest first: problem a, asked first, waits to the end
            return [(ticket, self.engine.extend([self.flying.pop(ticket)])[0])]

    engine = Slow(StepEngine(lambda *_: "A"), 0)
    run_together([one_by_one(policy_for(name, engine), 3) for name in "ab"], engine)
    assert seen == [2, 2, 2, 1, 1, 1]


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_the_order_of_completion_changes_nothing(strategy):
    def judge():
        return TextVerifier(lambda text: key64(text) / 2**64)

    expected = run_all(strategy, 8, chain_engine(0.7), problems(6), judge())
    for seed in range(5):
        assert run_all(strategy, 8, ShuffledStream(chain_engine(0.7), seed), problems(6), judge()) == expected


@pytest.mark.parametrize(
    ("tickets", "message"), [(lambda t: t[1:], "took 1 of 2 requests"), (lambda t: [*t, 99], "took 3 of 2 requests")]
)
def test_a_streaming_engine_that_takes_too_few_or_too_many_is_an_error(tickets, message):
    class Losing(ShuffledStream):
        def submit(self, requests):
            return tickets(super().submit(requests))

    engine = Losing(StepEngine(lambda *_: "A"), 0)
    with pytest.raises(EngineError, match=message):
        run_together([policy_for("a", engine).sample(2)], engine)


def test_a_streaming_engine_that_forgets_is_an_error_that_says_how_many():
    class Forgetful(ShuffledStream):
        def _collect(self):
            return []

    engine = Forgetful(StepEngine(lambda *_: "A"), 0)
    with pytest.raises(EngineError, match="3 requests are unanswered"):
        run_together([policy_for("a", engine).sample(3)], engine)


def test_an_answer_to_nothing_that_was_asked_is_an_error():
    class Confused(ShuffledStream):
        def _collect(self):
            return [(ticket + 100, answer) for ticket, answer in super()._collect()]

    engine = Confused(StepEngine(lambda *_: "A"), 0)
    with pytest.raises(EngineError, match="ticket 10"):
        run_together([policy_for("a", engine).sample(3)], engine)


def test_an_engine_that_returns_too_few_names_the_numbers():
    class Short(StepEngine):
        def extend(self, requests):
            return super().extend(requests)[1:]

    engine = Short(lambda *_: "A")
    with pytest.raises(EngineError, match="answered 3 of 4 requests"):
        run_together([policy_for("a", engine).sample(4)], engine)


# ---------------------------------------------------------------- what breaks


@pytest.mark.parametrize("streaming", [False, True])
def test_a_failing_strategy_closes_the_others_and_cancels_what_is_in_flight(streaming):
    class InOrder(ShuffledStream):
        def _collect(self):
            if not self.flying or self.cancelled:
                return super()._collect()
            ticket = min(self.flying)
            return [(ticket, self.engine.extend([self.flying.pop(ticket)])[0])]

    plain = StepEngine(lambda *_: "A")
    engine = InOrder(plain, 0) if streaming else plain
    closed = []

    async def fails(policy):
        await policy.sample(1)
        raise ValueError("broken strategy")

    async def waits(policy):
        try:
            await policy.sample(3)
            await policy.sample(3)
        finally:
            closed.append(True)

    with pytest.raises(ValueError, match="broken strategy"):
        run_together([fails(policy_for("a", engine)), waits(policy_for("b", engine))], engine)
    assert closed == [True]
    if streaming:
        assert engine.flying == {}
        assert engine.cancelled == [1, 2, 3]


class Uncancellable(ShuffledStream):
    def _collect(self):
        ticket = min(self.flying)
        return [(ticket, self.engine.extend([self.flying.pop(ticket)])[0])]

    def cancel(self, tickets):
        raise EngineError("cancelling failed")


def waiting(policy, closed):
    async def wait():
        try:
            await policy.sample(3)
        finally:
            closed.append(policy.problem.key)

    return wait()


def test_what_broke_is_told_though_cleaning_up_breaks_too():
    engine, closed = Uncancellable(StepEngine(lambda *_: "A"), 0), []

    async def fails(policy):
        await policy.sample(1)
        raise ValueError("broken strategy")

    with pytest.raises(ValueError, match="broken strategy"):
        run_together([fails(policy_for("a", engine)), waiting(policy_for("b", engine), closed)], engine)
    assert engine.flying  # there was something to cancel
    assert closed == ["b"]


def test_cleaning_up_that_breaks_alone_is_told_and_closes_all(monkeypatch):
    engine, closed = StepEngine(lambda *_: "A" * 9), []

    def broken(self):
        raise EngineError("cancelling failed")

    monkeypatch.setattr("search.scheduler._Batched.stop", broken)
    with pytest.raises(EngineError, match="cancelling failed"):
        run_together([waiting(policy_for(name, engine), closed) for name in "ab"], engine, max_tokens=1)
    assert closed == ["a", "b"]


def test_an_engine_that_dies_keeps_what_was_finished_before():
    done = []
    engine = ShuffledStream(StepEngine(lambda *_: "A"), 0, num_answers=7)
    with pytest.raises(EngineError, match="the engine died"):
        run_together(
            [one_by_one(policy_for(name, engine), n) for n, name in zip((1, 2, 9), "abc", strict=True)],
            engine,
            on_done=lambda i, result: done.append(i),
        )
    assert sorted(done) == [0, 1]


def test_an_error_of_a_strategys_own_is_not_swallowed_by_its_handles():
    async def asks_too_much(policy):
        await policy.sample(99)

    engine = Batches()
    with pytest.raises(BudgetExceeded, match="99 more samples"):
        run_together([asks_too_much(policy_for("a", engine))], engine)
    assert engine.sizes == []


# ---------------------------------------------------------------- the cap


@pytest.mark.parametrize("streaming", [False, True])
@settings(deadline=None, max_examples=60)
@given(st.sampled_from(STRATEGIES), st.integers(0, 1500), st.integers(0, 5))
def test_the_cap_on_tokens_is_never_exceeded(streaming, strategy, cap, seed):
    plain = chain_engine(0.8)
    engine = ShuffledStream(plain, seed) if streaming else plain
    verifier = TextVerifier(lambda text: key64(text) / 2**64)
    results = run_all(strategy, 4, engine, problems(6), verifier, max_tokens=cap, max_new_tokens=30)
    assert sum(len(c.ids) for _, c in plain.log) <= cap
    expected = run_all(strategy, 4, chain_engine(0.8), problems(6), verifier, max_new_tokens=30)
    assert all(result in expected for result in results)  # what is there is whole
    assert not streaming or not engine.flying


def test_a_cap_that_is_large_enough_changes_nothing():
    expected = run_all("beam(width=2)", 4, chain_engine(0.8), problems(5), by_score({}))
    assert run_all("beam(width=2)", 4, chain_engine(0.8), problems(5), by_score({}), max_tokens=10**6) == expected


def test_a_request_is_made_only_if_it_fits_at_its_full_length():
    """An answer is 6 tokens and may be 50."""

    def run(cap):
        engine = Batches(lambda *_: "abcde")
        found = run_together([one_by_one(policy_for(name, engine), 2) for name in "ab"], engine, max_tokens=cap)
        return [result is not None for result in found], engine.sizes

    assert run(112) == ([True, True], [2, 2])
    assert run(106) == ([True, True], [2, 1, 1])  # 12 are used, and 50 + 50 more are too many
    assert run(60) == ([True, False], [1, 1])
    assert run(49) == ([False, False], [])


def test_what_meets_the_cap_is_dropped_or_ends_with_what_it_has():
    async def until_refused(policy):
        drawn = []
        with contextlib.suppress(BudgetExceeded):
            for _ in range(4):
                drawn += await policy.sample(1)
        return [c.text for c in drawn]

    def run(**how):
        engine = Batches(lambda *_: "abcde")  # six tokens, EOS included
        return run_together([until_refused(policy_for("a", engine, max_new_tokens=6))], engine, max_tokens=14, **how)

    assert run() == [None]
    assert run(finish_at_cap=True) == [["abcde", "abcde"]]


def test_a_search_that_keeps_the_unfinished_scores_them():
    whole = run_all("adaptive_best_of_n", 8, chain_engine(0.8), problems(3), by_score({}), max_new_tokens=10)
    verifier = by_score({})
    cut = run_all(
        "adaptive_best_of_n",
        8,
        chain_engine(0.8),
        problems(3),
        verifier,
        max_new_tokens=10,
        max_tokens=80,
        keep_unfinished=True,
    )
    for result, full in zip(cut, whole, strict=True):
        assert 0 < len(result.candidates) < 8
        assert [c.ids for c in result.candidates] == [c.ids for c in full.candidates[: len(result.candidates)]]
        assert all(c.score == 0.5 for c in result.candidates if c.complete)
    assert sum(r.spend.generated_tokens for r in cut) <= 80


def test_questions_need_no_engine():
    """A verifier is asked even where the cap lets the engine do nothing more."""
    engine = StepEngine(lambda *_: "A")
    verifier = by_score({})
    policy = policy_for("a", engine, max_new_tokens=2)

    async def sample_and_score():
        found = await policy.sample(1)
        return await Scorer(verifier, policy, LineTask.step_delimiter).score(found)

    ((candidate,),) = run_together([sample_and_score()], engine, verifier, max_tokens=2)
    assert candidate.score == 0.5
