"""Grading while a streaming engine goes on: it waits for no grader, nothing is lost, and what breaks is told."""

import threading

import pytest

from search import grading_beside
from search.errors import EngineError
from search.grading_beside import Beside
from tests.scripted_search import ChainTask, ShuffledStream, chain_engine, run_all

PROBLEMS = [ChainTask().problem(number, 3) for number in range(20)]
PATIENCE_S = 60  # for what comes at once


class Grader(ChainTask):
    """Calls `before(n)` in the n-th call, from 0 on; `graded` holds the keys in order."""

    def __init__(self, before):
        self.before, self.graded = before, []

    def grade(self, pairs):
        self.before(len(self.graded))
        self.graded.append(pairs[0][0].key)
        return super().grade(pairs)


class Watched(ShuffledStream):
    """Calls `on_collect(n)` before the n-th call that takes answers, from 0 on."""

    def __init__(self, on_collect, **more):
        super().__init__(chain_engine(0.8), 0, **more)
        self.on_collect, self.calls = on_collect, 0

    def _collect(self):
        if not self.cancelled:
            self.calls += 1
            self.on_collect(self.calls - 1)
        return super()._collect()


def searched(engine, task, told, strategy="greedy", **more):
    return run_all(strategy, 1, engine, PROBLEMS, task=task, on_result=told.append, **more)


def keys(results):
    return [result.problem.key for result in results]


def test_the_engine_goes_on_while_an_answer_is_graded():
    began, went_on = threading.Event(), threading.Event()

    def before(n):
        began.set()
        assert went_on.wait(PATIENCE_S), "the engine waits for the grader"

    def on_collect(n):
        assert n == 0 or began.wait(PATIENCE_S)
        if n == 3:
            went_on.set()

    told = []
    task = Grader(before)
    results = searched(Watched(on_collect), task, told)
    assert keys(told) == task.graded
    assert sorted(task.graded) == sorted(keys(results)) == sorted(p.key for p in PROBLEMS)


@pytest.mark.parametrize("strategy", ["majority(samples=4)", "revisions_majority(ratio=4)", "adaptive_majority"])
def test_results_are_those_of_an_engine_that_waits(strategy):
    plain = run_all(strategy, 8, chain_engine(0.8), PROBLEMS, task=ChainTask())
    told = []
    stream = ShuffledStream(chain_engine(0.8), 1)
    assert run_all(strategy, 8, stream, PROBLEMS, task=ChainTask(), on_result=told.append) == plain
    assert sorted(keys(told)) == sorted(keys(plain))


def test_a_grader_that_breaks_ends_the_search_and_what_was_graded_before_is_kept():
    def before(n):
        if n == 2:
            raise EngineError("the grading workers do not start")

    told, task = [], Grader(before)
    stream = Watched(lambda n: None)
    with pytest.raises(EngineError, match="the grading workers do not start"):
        searched(stream, task, told)
    assert keys(told) == task.graded[:2]
    assert not stream.flying  # all taken back: the engine can serve another search


def test_a_grader_that_breaks_on_the_last_answer_is_told():
    def before(n):
        if n == len(PROBLEMS) - 1:
            raise EngineError("the grading workers do not start")

    told = []
    with pytest.raises(EngineError, match="the grading workers do not start"):
        searched(Watched(lambda n: None), Grader(before), told)
    assert len(told) == len(PROBLEMS) - 1


def test_what_was_finished_before_the_engine_died_is_graded_and_told():
    died = threading.Event()

    class Dying(Watched):
        def _collect(self):
            if self._left == 0:
                died.set()
            return super()._collect()

    told = []
    task = Grader(lambda n: died.wait(PATIENCE_S))
    with pytest.raises(EngineError, match="the engine died"):
        searched(Dying(lambda n: None, num_answers=7), task, told)
    assert died.is_set()
    assert len(told) == 7


def test_an_interruption_waits_for_no_grader():
    began, release = threading.Event(), threading.Event()

    def before(n):
        began.set()
        release.wait(PATIENCE_S)

    def interrupt(n):
        if n:
            assert began.wait(PATIENCE_S)
            raise KeyboardInterrupt

    told = []
    try:
        with pytest.raises(KeyboardInterrupt):
            searched(Watched(interrupt), Grader(before), told)
        assert not release.is_set()
        assert told == []
    finally:
        release.set()


def test_a_synchronous_engine_grades_in_its_own_thread():
    threads = []
    searched(chain_engine(0.8), Grader(lambda n: threads.append(threading.current_thread())), [])
    assert threads == [threading.current_thread()] * len(PROBLEMS)


def test_only_so_much_waits(monkeypatch):
    """Each piece is held until as much is given as may be; the next one is given when it is done."""
    monkeypatch.setattr(grading_beside, "MOST_WAITING", 3)
    num, given, seen, changed = 20, [], [], threading.Condition()

    def work(n):
        with changed:
            assert changed.wait_for(lambda: len(given) > min(num - 1, n + 3), PATIENCE_S)
        return len(given)

    with Beside(work, lambda n, count: seen.append((n, count))) as beside:
        for n in range(num):
            with changed:
                given.append(n)
                changed.notify()
            beside.give(n)
    assert [n for n, _ in seen] == [*range(num)]
    assert all(count <= n + 5 for n, count in seen)
