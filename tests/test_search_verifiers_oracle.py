"""The oracle is right about steps and answers, errs at the rates that it was given, and always in the same places."""

import pytest

from configs.schema import CountdownTask, OracleVerifier, Splits
from search.tasks.countdown import Countdown
from search.types import Problem, ScoreRequest
from search.verifiers.oracle import EXPLOIT, RIGHT, WRONG, Oracle
from tests.scripted_search import ChainTask, LineTask, accuracy, chain_engine, run_all

TASK = ChainTask()
PROBLEM = Problem("key", "12345", "12345")


def oracle(task=TASK, **settings):
    return Oracle(task, OracleVerifier(type="oracle", **settings))


def scores(verifier, *steps, problem=PROBLEM):
    (scored,) = verifier.score([ScoreRequest(problem, steps)])
    return scored.scores


def test_a_perfect_oracle_knows_right_from_wrong():
    assert scores(oracle(), "1\n", "2\n") == (RIGHT, RIGHT)
    assert scores(oracle(), "1\n", "7\n", "3\n") == (RIGHT, WRONG, WRONG)
    assert scores(oracle(), "1\n", "2\n", "3\n", "4\n", "5") == (RIGHT,) * 5


def test_an_answer_that_ended_too_early_is_wrong_though_its_steps_are_right():
    assert scores(oracle(), "1\n", "2\n", "") == (RIGHT, RIGHT, WRONG)
    assert scores(oracle(), "1\n", "2") == (RIGHT, WRONG)


def test_text_after_the_end_is_wrong():
    assert scores(oracle(), "1\n", "2\n", "3\n", "4\n", "5\n", "6")[-1] == WRONG


def test_a_task_without_a_step_checker_has_its_answers_scored():
    verifier = oracle(LineTask())
    assert not verifier.facts.process
    assert scores(verifier, "steps\n", "12345") == (RIGHT,)
    assert scores(verifier, "steps\n", "123") == (WRONG,)


def test_one_score_a_step_on_a_real_task():
    task = Countdown(CountdownTask(type="countdown"), Splits(), 0)
    for problem in task.draw("train", 20, stream="oracle"):
        steps = tuple(task.solve(problem).splitlines(keepends=True))
        assert scores(oracle(task), *steps, problem=problem) == (RIGHT,) * len(steps)
        assert scores(oracle(task), *steps[:-1], "1+1=3", problem=problem)[-1] == WRONG
        assert scores(oracle(task), *steps[:-1], "", problem=problem)[-1] == WRONG


@pytest.mark.parametrize("noise", [0.1, 0.3, 0.5])
def test_noise_flips_that_share_of_the_scores(noise):
    verifier = oracle(noise=noise)
    problems = [Problem(f"{i}", "12345", "12345") for i in range(1000)]
    flipped = [scores(verifier, "1\n", problem=p) == (WRONG,) for p in problems]
    flipped += [scores(verifier, "9\n", problem=p) == (RIGHT,) for p in problems]
    assert sum(flipped) / 2000 == pytest.approx(noise, abs=0.035)


def test_exploits_are_wrong_prefixes_that_beat_every_right_one():
    verifier = oracle(exploits=0.05)
    found = [scores(verifier, f"{1000 + i}")[-1] for i in range(2000)]
    assert found.count(EXPLOIT) / 2000 == pytest.approx(0.05, abs=0.015)
    assert set(found) == {EXPLOIT, WRONG}
    right = [scores(verifier, "1\n", problem=Problem(f"{i}", "12345", "12345")) for i in range(200)]
    assert set(right) == {(RIGHT,)}
    assert WRONG < RIGHT < EXPLOIT


def test_an_error_belongs_to_the_text_and_comes_again():
    verifier, again = oracle(noise=0.5), oracle(noise=0.5)
    texts = [(f"{i}\n",) for i in range(50)]
    first = [scores(verifier, *text) for text in texts]
    assert first == [scores(again, *text) for text in reversed(texts)][::-1]
    other = Oracle(TASK, OracleVerifier(type="oracle", noise=0.5), seed=1)
    assert first != [scores(other, *text) for text in texts]


def test_the_cost_is_of_what_was_read():
    (scored,) = oracle().score([ScoreRequest(PROBLEM, ("1\n", "2\n"), attempts=("abc",))])
    assert (scored.prompt_tokens, scored.tokens, scored.computed_tokens) == (8, 12, 12)


# ---------------------------------------------------------------- what search makes of it

PROBLEMS = [TASK.problem(number, 5) for number in range(60)]


def reached(strategy, samples, problems=PROBLEMS, chance=0.6, **quality):
    return accuracy(run_all(strategy, samples, chain_engine(chance), problems, oracle(**quality), task=TASK))


@pytest.mark.parametrize("samples", [4, 16])
@pytest.mark.parametrize("search", ["beam(width=2)", "beam", "dvts", "rebase", "step_rejection"])
def test_with_a_perfect_verifier_search_by_steps_beats_best_of_n_on_chained_problems(search, samples):
    assert reached(search, samples) > reached("best_of_n", samples) + 0.1


def test_at_equal_samples_the_best_of_n_is_the_coverage():
    """A check of the comparison above: 1 - (1 - 0.6^5)^16 is 0.73."""
    assert reached("best_of_n", 16) == pytest.approx(0.73, abs=0.12)
    assert reached("best_of_n", 16) == reached("pass", 16)


@pytest.mark.parametrize("strategy", ["best_of_n", "beam(vote=highest)"])
def test_with_an_exploitable_verifier_more_search_is_worse(strategy):
    problems = PROBLEMS[:25]
    few, many = (reached(strategy, n, problems, chance=0.7, exploits=0.01) for n in (16, 256))
    assert many < few - 0.2


def test_the_weighted_vote_withstands_exploits_longer():
    problems = PROBLEMS[:25]
    many = {s: reached(s, 256, problems, chance=0.7, exploits=0.01) for s in ("best_of_n", "best_of_n_weighted")}
    assert many["best_of_n_weighted"] > many["best_of_n"] + 0.2


@pytest.mark.parametrize("strategy", ["best_of_n", "best_of_n_weighted", "beam", "dvts", "rebase", "step_rejection"])
def test_a_verifier_that_tosses_coins_is_no_better_than_no_verifier(strategy):
    problems = [TASK.problem(number, 3) for number in range(100)]
    random, majority = reached("pass", 1, problems), reached("majority", 16, problems)
    with_coins = reached(strategy, 16, problems, noise=0.5)
    assert with_coins <= majority + 0.1
    if "weighted" not in strategy:
        assert with_coins == pytest.approx(random, abs=0.15)
