"""Shards shared among processes: results in order, reports heard, failures raised as what they were."""

import os
import time

import pytest

from search.errors import EngineError, ModelError
from search.parallel import fork_map


def ignore(index, row):
    """Nobody listens."""


def test_every_process_returns_its_own_result():
    results = fork_map(lambda index, report: [index, os.getpid()], 3, ignore)
    assert [index for index, _ in results] == [0, 1, 2]
    assert len({pid for _, pid in results} | {os.getpid()}) == 4


def test_one_process_is_this_one():
    assert fork_map(lambda index, report: os.getpid(), 1, ignore) == [os.getpid()]


def test_one_process_is_a_child_where_that_is_asked_for():
    (pid,) = fork_map(lambda index, report: os.getpid(), 1, ignore, fork=True)
    assert pid != os.getpid()


def test_reports_are_heard_with_their_process():
    heard = []

    def work(index, report):
        for done in range(2):
            report({"done": done})

    fork_map(work, 2, lambda index, row: heard.append((index, row["done"])))
    assert sorted(heard) == [(0, 0), (0, 1), (1, 0), (1, 1)]


def test_our_errors_cross_as_what_they_are_and_end_the_others():
    def work(index, report):
        if index == 1:
            raise ModelError("no tokenizer in here")
        time.sleep(60)

    started = time.monotonic()
    with pytest.raises(ModelError, match="no tokenizer in here"):
        fork_map(work, 2, ignore)
    assert time.monotonic() - started < 30


def test_other_errors_are_engine_errors_that_name_themselves():
    with pytest.raises(EngineError, match="ZeroDivisionError"):
        fork_map(lambda index, report: 1 // index, 2, ignore)


def test_a_process_that_is_killed_is_noticed():
    def work(index, report):
        if index == 0:
            os.kill(os.getpid(), 9)

    with pytest.raises(EngineError, match="process 0 of 2 ended"):
        fork_map(work, 2, ignore)
