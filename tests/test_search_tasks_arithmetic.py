import re
import time
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from configs.schema import ArithmeticTask, Bootstrap, Splits
from search.errors import DataError
from search.tasks.arithmetic import Arithmetic
from search.tasks.splits import split_of
from search.types import Grade, Graded, Problem


@pytest.fixture(scope="module")
def task() -> Arithmetic:
    return Arithmetic(ArithmeticTask(type="arithmetic", max_operand=20, modulus=97), Splits(), 0)


@pytest.fixture(scope="module")
def problem(task: Arithmetic) -> Problem:
    return task.parse("5+13*7")  # 18, then 126 - 97 = 29


def graded(task: Arithmetic, problem: Problem, text: str) -> Graded:
    return task.grade([(problem, text)])[0]


# ---------------------------------------------------------------- grading


@pytest.mark.parametrize("text", ["5+13=18\n18*7=29", "5+13=18\n18*7=29\n"])
def test_right(task: Arithmetic, problem: Problem, text: str) -> None:
    assert graded(task, problem, text) == Graded(Grade.CORRECT, "29")


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("5+13=18\n18*7=30", "30"),  # a wrong result is an answer, and a wrong one
        ("5+13=17\n17*7=22", "22"),  # a slip carried on
        ("5+13=18\n18*7=126", None),  # not reduced
        ("5+13=18\n19*7=29", None),  # begins with another number than the last result
        ("5+13=18", None),
        ("18*7=29", None),
        ("29", None),
        ("", None),
        ("5+13=18\n18*7=29\n29+0=29", None),
        ("5+13=18\n18*7=29 ", None),
        ("5+13=18\n18*7=29\x00", None),
        ("13+5=18\n18*7=29", None),  # the chain is applied as it stands
        ("5 + 13 = 18\n18*7=29", None),
        ("5+13=18\n18*07=29", None),
        ("5+13=18\n18*7=٢٩", None),
        ("5+13=18\n18**7=29", None),
    ],
)
def test_wrong(task: Arithmetic, problem: Problem, text: str, answer: str | None) -> None:
    assert graded(task, problem, text) == Graded(Grade.WRONG, answer)


def test_slips_that_cancel_give_no_answer(task: Arithmetic) -> None:
    problem = task.parse("20-20*5")  # 0, then 0
    assert graded(task, problem, "20-20=0\n0*5=0").grade is Grade.CORRECT
    again = task.parse("9+9+9")
    assert graded(task, again, "9+9=8\n8+9=27") == Graded(Grade.WRONG, None)


def test_equal_answers_have_equal_grades(task: Arithmetic) -> None:
    shown = task.demonstrations(2000, stream="grades", bootstrap=Bootstrap())
    for (problem, _), verdict in zip(shown, task.grade(shown), strict=True):
        if verdict.answer is not None:
            assert (verdict.grade is Grade.CORRECT) == (verdict.answer == problem.answer)


HOSTILE = ["9" * 2_000_000, "5+13=18\n" * 300_000, "\x00" * 1_000_000, "(" * 1_000_000, "\ud800", "9**9**9=9"]


def test_hostile_text_is_wrong_and_cheap(task: Arithmetic, problem: Problem) -> None:
    started_s = time.process_time()
    for text in HOSTILE:
        assert graded(task, problem, text) == Graded(Grade.WRONG, None)
        assert not any(task.step_labels(problem, text)[1:])
        assert len(task.solution_key(problem, text)) <= 200
    hostile_s = time.process_time() - started_s
    started_s = time.process_time()
    for _ in range(20_000):
        graded(task, problem, "5+13=18\n18*7=29")
    assert hostile_s < 5 * (time.process_time() - started_s)  # against honest work, not the clock


@given(text=st.one_of(st.text(), st.text(alphabet="0123456789+-*=\n")))
@settings(max_examples=300, deadline=None)
def test_the_grader_is_total(text: str) -> None:
    task = Arithmetic(ArithmeticTask(type="arithmetic", max_operand=20, modulus=97), Splits(), 0)
    problem = task.parse("5+13*7")
    assert graded(task, problem, text).grade in (Grade.WRONG, Grade.CORRECT)
    assert isinstance(task.solution_key(problem, text), str)


def test_step_labels_find_the_first_bad_step(task: Arithmetic, problem: Problem) -> None:
    assert task.step_labels(problem, "5+13=18\n18*7=29") == [True, True]
    assert task.step_labels(problem, "5+13=18\n18*7=28") == [True, False]
    assert task.step_labels(problem, "5+13=17\n17*7=22") == [False, False]  # right by itself, on a wrong start
    assert task.step_labels(problem, "5+13=18\n18*7=29\n29+1=30") == [True, True, False]


# ---------------------------------------------------------------- problems


def test_solve_agrees_with_python(task: Arithmetic) -> None:
    for problem in task.draw("fit", 200, stream="solve"):
        value, *rest = re.findall("[0-9]+|[-+*]", problem.key)
        value = int(value)
        for sign, operand in zip(rest[::2], rest[1::2], strict=True):
            value = {"+": value + int(operand), "-": value - int(operand), "*": value * int(operand)}[sign] % 97
        assert problem.answer == str(value)
        assert graded(task, problem, task.solve(problem) or "") == Graded(Grade.CORRECT, str(value))


def test_draws_are_distinct_of_their_split_and_pure(task: Arithmetic) -> None:
    for split in ("train", "gate"):
        first = task.draw(split, 300, stream="round 1")
        keys = {p.key for p in first}
        assert first == task.draw(split, 300, stream="round 1")
        assert len(keys) == 300
        assert {split_of(key, task.splits) for key in keys} == {split}
        again = task.draw(split, 300, stream="round 2", exclude=frozenset(keys))
        assert not keys & {p.key for p in again}
        lengths = Counter(p.meta["operations"] for p in first)
        assert set(lengths) == set(range(2, 11))


@pytest.mark.parametrize("question", ["", "5", "5+13", "5+13*x", "5/3+1", "5++3+1", "05+3+1", "1+1" * 200])
def test_a_bad_question_says_what_a_good_one_is(task: Arithmetic, question: str) -> None:
    with pytest.raises(DataError, match=r"write it like|operations, not"):
        task.parse(question)


def test_a_question_may_hold_blanks(task: Arithmetic) -> None:
    assert task.parse(" 5 + 13 * 7 = ") == task.parse("5+13*7")


def test_an_exhausted_space_is_an_error_that_counts() -> None:
    tiny = Arithmetic(ArithmeticTask(type="arithmetic", min_operations=1, max_operations=1, max_operand=3), Splits(), 0)
    with pytest.raises(DataError, match=r"100 new problems of the train split .* only \d+ exist"):
        tiny.draw("train", 100, stream="x")


def test_contradicting_lengths_are_refused() -> None:
    with pytest.raises(DataError, match="min_operations = 5 is more than max_operations = 3"):
        Arithmetic(ArithmeticTask(type="arithmetic", min_operations=5, max_operations=3), Splits(), 0)


# ---------------------------------------------------------------- the flawed teacher


def inner_chains(task: Arithmetic, text: str) -> set[str]:
    """Read from the text alone: every run of its lines is a chain of its own, if it starts from an operand."""
    lines = [re.fullmatch(r"(\d+)([-+*])(\d+)=(\d+)", line).groups() for line in text.split("\n")]
    runs = [lines[i:j] for i in range(len(lines)) for j in range(i + task.config.min_operations, len(lines) + 1)]
    chains = {run[0][0] + "".join(sign + operand for _, sign, operand, _ in run): run for run in runs}
    inside = range(1, task.config.max_operand + 1)
    right = {key for key, run in chains.items() if all(task.apply(int(a), s, int(b)) == int(c) for a, s, b, c in run)}
    return {key for key in right if int(chains[key][0][0]) in inside}


def test_no_training_trace_contains_a_solution_of_a_held_out_problem(task: Arithmetic) -> None:
    for problem in task.draw("train", 300, stream="search"):
        text = task.solve(problem) or ""
        inner = inner_chains(task, text)
        assert problem.key in inner
        assert {split_of(key, task.splits) for key in inner} == {"train"}
        assert task.solved_keys(problem, text) == inner


def test_no_demonstration_contains_a_right_solution_of_a_held_out_problem(task: Arithmetic) -> None:
    for problem, text in task.demonstrations(1500, stream="bootstrap", bootstrap=Bootstrap()):
        assert split_of(problem.key, task.splits) == "train"
        inner = inner_chains(task, text)
        assert {split_of(key, task.splits) for key in inner} <= {"train"}
        assert inner <= task.solved_keys(problem, text)


def slips(task: Arithmetic, errors: float) -> Counter[str]:
    """How often the teacher slips, by kind of line: "+ slip", "+ right", ..."""
    found: Counter[str] = Counter()
    for _, text in task.demonstrations(3000, stream="slips", bootstrap=Bootstrap(teacher_errors=errors)):
        for a, sign, b, c in re.findall(r"(\d+)([-+*])(\d+)=(\d+)", text):
            right = task.apply(int(a), sign, int(b)) == int(c)
            tempted = {"+": int(a) % 10 + int(b) % 10 >= 10, "-": int(a) % 10 < int(b) % 10, "*": int(b) % 10 >= 7}
            found[f"{sign if tempted[sign] else 'easy'} {'right' if right else 'slip'}"] += 1
    return found


def test_the_teacher_slips_as_often_as_it_should(task: Arithmetic) -> None:
    counts = slips(task, 1.0)
    for sign, share in (("+", 0.15), ("-", 0.6), ("*", 0.35)):
        total = counts[f"{sign} slip"] + counts[f"{sign} right"]
        # A slip in the tables of zero is none.
        assert counts[f"{sign} slip"] / total == pytest.approx(share, abs=0.04)
    assert counts["easy slip"] == 0


def test_a_teacher_without_errors_is_right(task: Arithmetic) -> None:
    assert not any(count for kind, count in slips(task, 0.0).items() if kind.endswith("slip"))


def test_demonstrations_are_pure_and_mostly_short(task: Arithmetic) -> None:
    shown = task.demonstrations(800, stream="a", bootstrap=Bootstrap(short=0.65))
    assert shown == task.demonstrations(800, stream="a", bootstrap=Bootstrap(short=0.65))
    short = sum(p.meta["operations"] <= 4 for p, _ in shown) / 800
    assert short == pytest.approx(0.65 + 0.35 * 3 / 9, abs=0.06)
