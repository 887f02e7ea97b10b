"""Answers that a strategy wants read in its middle: in one call for many problems, and beside a streaming engine."""

import threading
from concurrent.futures import wait
from dataclasses import replace

import pytest

from search import scheduler
from search.errors import EngineError
from search.policy import Policy
from search.randomness import key64
from search.scheduler import run_together
from search.types import Budget, Finish, Problem
from tests.scripted_search import (
    ChainTask,
    LineTask,
    ShuffledStream,
    StepEngine,
    TextVerifier,
    chain_engine,
    sampler_of,
)
from tests.scripted_search import run_all as run_each

ADAPTIVE = ["adaptive_majority", "adaptive_majority(batch=1)", "adaptive_best_of_n(certainty=0.8)"]
PROBLEMS = [ChainTask().problem(number, 3) for number in range(12)]
PATIENCE_S = 60  # for what comes at once


class Reader(ChainTask):
    """Calls `before(keys)` in every reading; `read` holds the keys of each, in the order in which they ended."""

    def __init__(self, before=lambda keys: None):
        self.before, self.read, self.threads = before, [], set()

    def answers(self, pairs):
        keys = [problem.key for problem, _ in pairs]
        self.threads.add(threading.current_thread())
        self.before(keys)
        self.read.append(keys)
        return super().answers(pairs)


class Watched(ShuffledStream):
    """Keeps what happens: ("asked" or "answered", question); calls `on_answers(self)` after each lump of answers."""

    def __init__(self, engine, on_answers):
        super().__init__(engine, 3)
        self.events, self.on_answers = [], on_answers

    def question(self, ticket):
        return bytes(self.flying[ticket].prefix[:3]).decode()

    def submit(self, requests):
        tickets = super().submit(requests)
        self.events += [("asked", self.question(ticket)) for ticket in tickets]
        return tickets

    def _collect(self):
        flying = {ticket: self.question(ticket) for ticket in self.flying}
        found = super()._collect()
        self.events += [("answered", flying[ticket]) for ticket, _ in found]
        self.on_answers(self)
        return found


def run_all(strategy, engine, task, problems=PROBLEMS, **more):
    judge = TextVerifier(lambda text: key64(text) / 2**64)
    return run_each(strategy, 8, engine, problems, judge, task=task, **more)


def asked(engine):
    return [(request.prefix, request.key) for request, _ in engine.log]


# ---------------------------------------------------------------- in one call


@pytest.mark.parametrize("strategy", ADAPTIVE)
def test_a_synchronous_engine_has_all_problems_read_in_one_call_a_round(strategy):
    task = Reader()
    results = run_all(strategy, chain_engine(0.9), task)
    batch = 1 if "batch=1" in strategy else 2
    rounds = [len(result.candidates) // batch for result in results]
    assert [len(set(keys)) for keys in task.read] == [sum(num > n for num in rounds) for n in range(max(rounds))]
    assert len(set(rounds)) > 1
    assert task.threads == {threading.current_thread()}


@pytest.mark.parametrize("strategy", ADAPTIVE)
@pytest.mark.parametrize("streaming", [False, True])
def test_results_are_those_of_reading_on_the_spot(strategy, streaming, monkeypatch):
    def searched():
        engine = chain_engine(0.9)
        return run_all(strategy, ShuffledStream(engine, 3) if streaming else engine, ChainTask()), asked(engine)

    found, requests = searched()

    async def on_the_spot(self, candidates):
        task = self._sampler.task
        return [replace(c, answer=task.answer(c.text)) if c.complete else c for c in candidates]

    monkeypatch.setattr(Policy, "answers", on_the_spot)
    expected, others = searched()
    assert found == expected
    assert sorted(requests) == sorted(others)
    assert streaming or requests == others  # the same batches, in the same order


def test_nothing_is_read_where_nothing_was_answered():
    task = Reader()
    (result,) = run_all("adaptive_majority", StepEngine(lambda *_: "x" * 99), task, PROBLEMS[:1], max_new_tokens=5)
    assert {c.finish for c in result.candidates} == {Finish.LENGTH}
    assert task.read == []


# ---------------------------------------------------------------- beside a streaming engine


@pytest.mark.parametrize("strategy", ADAPTIVE)
def test_a_slow_reading_holds_up_nobody_else(strategy):
    """The first reading of one problem lasts until the engine has answered all that the others ever ask."""
    slow = max(PROBLEMS, key=lambda p: p.question)
    plain, others_done = chain_engine(0.9), threading.Event()
    expected = run_all(strategy, plain, ChainTask())
    num_others = sum(bytes(prefix[:3]).decode() != slow.question for prefix, _ in asked(plain))

    def before(keys):
        if slow.key in keys:
            assert keys == [slow.key] * len(keys)
            assert others_done.wait(PATIENCE_S), "the others wait for this reading"
            stream.events.append(("read", slow.question))

    def on_answers(stream):
        if sum(what == "answered" and who != slow.question for what, who in stream.events) == num_others:
            others_done.set()

    stream = Watched(chain_engine(0.9), on_answers)
    assert run_all(strategy, stream, Reader(before)) == expected
    first_read = stream.events.index(("read", slow.question))
    assert not [who for what, who in stream.events[first_read:] if what != "read" and who != slow.question]


def policy_for(name, engine):
    return Policy(Problem(name, name), sampler_of(engine), Budget("samples", 8))


async def sample_and_read(policy, times=1):
    return [await policy.answers(await policy.sample(1)) for _ in range(times)]


def test_what_was_read_calls_a_waiting_engine_off():
    """The engine answers b when a is done, and a goes on, again and again, though nothing else is answered."""
    done = []

    class Waits(ShuffledStream):
        def _collect(self):
            ready = [t for t, request in self.flying.items() if bytes(request.prefix[:1]) == b"a" or "a" in done]
            if not ready:
                wait(self._until, PATIENCE_S)
                assert self.called_off, "nobody waits for the task"
            return [(t, self.engine.extend([self.flying.pop(t)])[0]) for t in ready]

    engine = Waits(StepEngine(lambda *_: "A"), 0)
    run_together(
        [sample_and_read(policy_for("a", engine), 3), sample_and_read(policy_for("b", engine))],
        engine,
        None,
        LineTask(),
        on_done=lambda i, _: done.append("ab"[i]),
    )
    assert done == ["a", "b"]


def test_what_no_reader_is_free_for_gathers(monkeypatch):
    monkeypatch.setattr(scheduler, "MAX_READERS", 1)
    answered = threading.Event()

    def before(keys):
        assert answered.wait(PATIENCE_S)

    task = Reader(before)
    stream = Watched(StepEngine(lambda *_: "A"), lambda stream: stream.flying or answered.set())
    names = [f"{n:03d}" for n in range(20)]
    found = run_together([sample_and_read(policy_for(name, stream)) for name in names], stream, None, task)
    assert all(candidate.answer == "A" for ((candidate,),) in found)
    assert len(task.read) == 2
    assert sorted(task.read[0] + task.read[1]) == names
    assert len(task.read[1]) > len(names) // 2


@pytest.mark.parametrize("streaming", [False, True])
def test_a_reading_that_breaks_ends_the_search(streaming):
    def before(keys):
        raise EngineError("the grading workers do not start")

    plain = chain_engine(0.9)
    stream = ShuffledStream(plain, 0)
    with pytest.raises(EngineError, match="the grading workers do not start"):
        run_all("adaptive_majority", stream if streaming else plain, Reader(before))
    assert not stream.flying  # all taken back: the engine can serve another search


def test_an_interruption_waits_for_no_reading():
    began, release = threading.Event(), threading.Event()

    def before(keys):
        began.set()
        release.wait(PATIENCE_S)

    def interrupt(stream):
        if ("answered", PROBLEMS[9].question) in stream.events and not stream.cancelled:
            assert began.wait(PATIENCE_S)
            raise KeyboardInterrupt

    try:
        with pytest.raises(KeyboardInterrupt):
            run_all("adaptive_majority", Watched(chain_engine(0.9), interrupt), Reader(before))
        assert not release.is_set()
    finally:
        release.set()
