"""Trajectories of the revision model: what they show, how often, and that they are the same every time."""

import functools
import itertools
from collections import Counter
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from configs.schema import Revision
from distill.revision import FILTERS, chain_examples, edit_distance, make_rows
from search.prompts import prompt_ids
from search.types import Candidate, Finish, Grade, Problem, SearchResult, Spend
from tests.scripted_search import LineTask, StepEngine, TextVerifier, run_one

EOS = 1
PAPER = Revision(keep_right=0)


def sample(text: str, grade: Grade | None = Grade.WRONG, finish: Finish = Finish.EOS) -> Candidate:
    found = None if text == "no answer" else text
    return Candidate((*map(ord, text), EOS), text, finish, answer=found, grade=grade)


def right(text: str) -> Candidate:
    return sample(text, Grade.CORRECT)


def result(key: str, *candidates: Candidate) -> SearchResult:
    return SearchResult(Problem(key, key, "gold"), "pool", candidates, 0, Spend(), "model", "seed", prompt_ids=(7,))


def render(problem: Problem, attempts) -> list[int]:
    return [ord(letter) for letter in f"{problem.question}?" + "".join(f"{attempt}|" for attempt in attempts)]


def made(results, config=PAPER, *, seed=0, held_out=frozenset(), solved_keys=None):
    return make_rows(
        [(1, r) for r in results],
        config,
        render=render,
        solution_key=lambda _, text: text.replace(" ", ""),
        seed=seed,
        held_out=held_out.__contains__,
        solved_keys=solved_keys,
    )


def attempts_of(row) -> list[str]:
    return "".join(map(chr, row.prompt_ids)).partition("?")[2].split("|")[:-1]


def completion(row) -> str:
    return "".join(map(chr, row.completion_ids[:-1]))


def many(num: int = 400) -> list[SearchResult]:
    wrong = [sample(f"{n}{n}{n}") for n in range(10, 16)]
    return [result(f"k{i}", *wrong, sample("1235"), right("1234")) for i in range(num)]


# ---------------------------------------------------------------- what is shown


def test_zero_to_four_wrong_attempts_each_as_often_the_nearest_last():
    rows = made(many()).rows
    assert len(rows) == 400
    shown = [attempts_of(row) for row in rows]
    numbers = Counter(map(len, shown))
    assert set(numbers) == {0, 1, 2, 3, 4}
    assert all(50 < count < 110 for count in numbers.values())  # 80 of each expected
    assert {attempts[-1] for attempts in shown if attempts} == {"1235"}
    assert all(len(set(attempts)) == len(attempts) and "1234" not in attempts for attempts in shown)
    others = Counter(text for attempts in shown for text in attempts[:-1])
    assert len(others) == 6
    assert min(others.values()) > 0.6 * max(others.values())


def test_the_loss_falls_on_the_right_answers_very_ids():
    answer = replace(right("12 34"), ids=(3, 1, 4, 1, 5, EOS))
    (row,) = made([result("k", sample("9"), answer)]).rows
    assert row.completion_ids == (3, 1, 4, 1, 5, EOS)
    assert row.key == "k"
    assert row.solution == "1234"


def test_no_more_attempts_than_there_are():
    rows = made([result(f"k{i}", sample("1"), sample("1"), right("2")) for i in range(50)]).rows
    assert {tuple(attempts_of(row)) for row in rows} == {(), ("1",)}
    rows = made([result(f"k{i}", right("2")) for i in range(5)]).rows
    assert {tuple(attempts_of(row)) for row in rows} == {()}


def test_right_attempts_that_stay():
    rows = made(many(), Revision(keep_right=0.5)).rows
    kept = [row for row in rows if "1234" in attempts_of(row)]
    assert 110 < len(kept) < 210  # of the 320 expected to show attempts, half
    for row in kept:
        attempts = attempts_of(row)
        first = attempts.index("1234")
        assert set(attempts[first:]) == {"1234"} == {completion(row)}  # right once, right to the end
    assert {len(attempts_of(row)) for row in kept} == {1, 2, 3, 4}
    assert {attempts_of(row).count("1234") for row in kept} == {1, 2, 3, 4}


def test_several_trajectories_of_one_answer_end_in_the_next_nearest_attempts():
    rows = made(
        [result("k", sample("999"), sample("124"), sample("134"), right("123"))], Revision(keep_right=0, per_answer=60)
    ).rows
    assert len(rows) == len({row.solution for row in rows}) == 60
    last = Counter(attempts_of(row)[-1] for row in rows if attempts_of(row))
    assert set(last) == {"999", "124", "134"}


def test_distinct_right_answers_up_to_a_cap():
    answers = [right(f"{n}") for n in range(20)]
    chosen = made([result("k", *answers, right("1 9"))], Revision(keep_right=0, per_problem=4))
    assert len({completion(row) for row in chosen.rows}) == 4
    assert (chosen.counts["duplicate"], chosen.counts["over_cap"], chosen.counts["right"]) == (1, 16, 4)


# ---------------------------------------------------------------- what is dropped


def test_every_sample_is_counted_once():
    leaking = {"5": ["held"], "6": ["held"]}
    samples = [
        right("1"),
        right("1"),
        right("5"),
        sample("6"),
        sample("7"),
        sample("no answer"),
        sample("8", None),
        sample("9", Grade.UNGRADED),
        sample("10", finish=Finish.LENGTH),
    ]
    chosen = made(
        [result("k", *samples), result("held", right("1"))],
        held_out=frozenset({"held"}),
        solved_keys=lambda _, text: leaking.get(text, []),
    )
    assert {name: chosen.counts[name] for name in FILTERS} == {
        "ungraded": 2,
        "truncated": 1,
        "no_answer": 1,
        "held_out": 1,
        "solves_held_out": 1,
        "duplicate": 1,
        "over_cap": 0,
    }
    assert (chosen.counts["right"], chosen.counts["wrong"]) == (1, 2)  # no loss falls on a wrong one
    assert chosen.counts["candidates"] == sum(chosen.counts[n] for n in (*FILTERS, "right", "wrong"))
    assert {row.key for row in chosen.rows} == {"k"}


def test_rows_depend_neither_on_order_nor_on_how_results_are_cut():
    results = many(20)
    whole = made(results)
    halves = [r.with_candidates(part) for r in results for part in (r.candidates[4:], r.candidates[:4])]
    assert made(reversed(halves)).rows == whole.rows
    assert made(results, seed=1).rows != whole.rows


# ---------------------------------------------------------------- edit distance


def table_distance(a: str, b: str) -> int:
    row = list(range(len(b) + 1))
    for i, letter in enumerate(a, 1):
        new = [i]
        for j, other in enumerate(b, 1):
            new.append(min(row[j] + 1, new[-1] + 1, row[j - 1] + (letter != other)))
        row = new
    return row[-1]


@given(st.text("ab\n", max_size=90), st.text("ab\n", max_size=90))
def test_edit_distance_is_that_of_the_table(a, b):
    assert edit_distance(a, b) == table_distance(a, b)


# ---------------------------------------------------------------- the verifier of chains


@pytest.mark.parametrize("max_length", [4096, 236])  # the shorter context holds two attempts and no more
def test_the_verifier_learns_from_what_it_will_be_asked(max_length):
    """Attempts and steps of an example are those that the search hands to a verifier of its chains."""
    numbers = itertools.count()
    engine = StepEngine(lambda *_: f"{'A' if next(numbers) % 3 else 'long' * 6}", max_length=max_length)
    verifier = TextVerifier(lambda text: 0.5, process=False)
    found = run_one("revisions(ratio=2, window=3)", 8, engine, verifier)
    examples = list(
        chain_examples([(4, found)], functools.partial(prompt_ids, LineTask(), engine.tokenizer), "\n", window=3)
    )
    asked = {(request.attempts, request.steps) for request in verifier.log}
    assert {(e.attempts, e.steps) for e in examples} == asked
    assert len(examples) == 8
    assert {len(e.attempts) for e in examples} == ({0, 1, 2, 3} if max_length == 4096 else {0, 1, 2})
    assert {(e.steps, e.outcome) for e in examples} == {(("A",), True), (("long" * 6,), False)}
    assert {(e.labels, e.source, e.round) for e in examples} == {((None,), "revisions", 4)}


def test_answers_that_tell_nothing_are_no_examples():
    result_ = result("k", sample("1"), sample("2", Grade.UNGRADED), sample("3", finish=Finish.LENGTH))
    chain = result_.with_candidates([replace(c, chain=0) for c in result_.candidates])
    assert [e.steps for e in chain_examples([(1, chain)], render, "\n", window=4)] == [("1",)]


def test_a_prompt_that_shows_other_attempts_is_an_error():
    first, second = replace(sample("1"), chain=0), replace(sample("2"), chain=0, prompt_ids=(5, 6))
    with pytest.raises(ValueError, match="'k': an answer of a chain was shown other"):
        list(chain_examples([(1, result("k", first, second))], render, "\n", window=4))
