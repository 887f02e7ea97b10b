import re
import time
from itertools import combinations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from configs.schema import Bootstrap, CountdownTask, Splits
from search.errors import DataError
from search.tasks.countdown import Countdown
from search.tasks.splits import split_of
from search.tasks.tokenizer import EOS, build_tokenizer, vocabulary
from search.types import Grade, Problem


@pytest.fixture(scope="module")
def task() -> Countdown:
    return Countdown(CountdownTask(type="countdown"), Splits(), 0)


@pytest.fixture(scope="module")
def problem(task: Countdown) -> Problem:
    return task.parse("3 5 7 > 22")


def verdict(task: Countdown, problem: Problem, text: str) -> Grade:
    return task.grade([(problem, text)])[0].grade


# ---------------------------------------------------------------- grading


@pytest.mark.parametrize("text", ["5*3=15\n15+7=22", "3*5=15\n7+15=22", "5*3=15\n15+7=22\n"])
def test_right_solutions(task: Countdown, problem: Problem, text: str) -> None:
    assert verdict(task, problem, text) is Grade.CORRECT


@pytest.mark.parametrize(
    ("question", "text", "why"),
    [
        ("3 5 7 > 22", "", "nothing"),
        ("3 5 7 > 22", "22", "no operation"),
        ("3 5 7 > 22", "15+7=22", "a number that is not there"),
        ("3 5 7 > 22", "5*3=15\n15+7=23", "a wrong result"),
        ("3 5 7 > 22", "5*3=15\n15+7=22\n22+0=22", "a line after the end"),
        ("3 5 7 > 22", "5*3=15\n15+7=22\n\n", "an empty line after the end"),
        ("3 5 7 > 22", "5*3=15\n15+7=22 ", "a blank after the end"),
        ("3 5 7 > 22", " 5*3=15\n15+7=22", "a blank before the start"),
        ("3 5 7 > 22", "5*3=15\r\n15+7=22", "another line end"),
        ("3 5 7 > 22", "5 * 3 = 15\n15+7=22", "blanks inside"),
        ("3 5 7 > 22", "5*3=15\n15+7=22\x00", "a NUL byte"),
        ("3 5 7 > 22", "5*3=15\n15+07=22", "a leading zero"),
        ("3 5 7 > 22", "٥*3=15\n15+7=22", "a digit of another script"),
        ("3 5 7 > 22", "5*3+7=22", "two operations a line"),
        ("3 5 7 > 22", "(5*3)+7=22", "brackets"),
        ("3 5 7 > 15", "5*3=15", "a number left unused"),
        ("3 5 7 > 25", "5*3=15\n5+5=10\n15+10=25", "a number used twice"),
        ("2 5 7 > 39", "2**5=32\n32+7=39", "a power"),
        ("2 5 7 > 8", "7//2=3\n3+5=8", "a floor division"),
        ("2 5 7 > 8", "7/2=3\n3+5=8", "a division with a remainder"),
        ("1 4 5 > 6", "1.5*4=6", "a decimal built from two numbers"),
        ("3 5 7 > 9", "3-5=-2\n-2+7=5", "a negative result"),
        ("3 5 7 > 9", "-3+5=2\n2+7=9", "a unary minus"),
        ("3 5 5 > 3", "5-5=0\n3+0=3", "an intermediate result of zero"),
        ("10 11 12 > 98", "10*11=110\n110-12=98", "an intermediate result above 99"),
    ],
)
def test_wrong_solutions(task: Countdown, question: str, text: str, why: str) -> None:
    assert verdict(task, task.parse(question), text) is Grade.WRONG, why


def test_intermediate_bound_is_the_configured_one() -> None:
    small = Countdown(CountdownTask(type="countdown", max_intermediate=20), Splits(), 0)
    problem = small.parse("3 5 7 > 8")
    assert verdict(small, problem, "7+3=10\n10+5=15") is Grade.WRONG
    assert verdict(small, small.parse("3 7 10 > 11"), "7*3=21\n21-10=11") is Grade.WRONG


def test_a_legal_play_has_an_answer_even_where_it_misses(task: Countdown, problem: Problem) -> None:
    hit, miss, illegal = task.grade(
        [(problem, "5*3=15\n15+7=22"), (problem, "5+3=8\n8+7=15"), (problem, "5+3=9\n9+7=16")]
    )
    assert (hit.answer, miss.answer, illegal.answer) == ("(5*3)+7", "(5+3)+7", None)
    assert (hit.grade, miss.grade, illegal.grade) == (Grade.CORRECT, Grade.WRONG, Grade.WRONG)


HOSTILE = [
    "9" * 2_000_000,
    "(" * 1_000_000,
    "5*3=15\n" * 300_000,
    "\x00" * 1_000_000,
    "9**9**9=9",
    "+-*/=" * 200_000,
    "\ud800",
    "5*3=15\n15+7=22" + " " * 3_000_000,
]


def test_hostile_text_is_wrong_and_cheap(task: Countdown, problem: Problem) -> None:
    started_s = time.process_time()
    for text in HOSTILE:
        assert verdict(task, problem, text) is Grade.WRONG
        assert not any(task.step_labels(problem, text)[1:2])
        assert len(task.solution_key(problem, text)) <= 200
    harmless_s = time.process_time() - started_s
    started_s = time.process_time()
    for _ in range(20_000):
        task.grade([(problem, "5*3=15\n15+7=22")])
    assert harmless_s < 5 * (time.process_time() - started_s)  # against honest work, not the clock


@given(text=st.one_of(st.text(), st.text(alphabet="0123456789+-*/=\n")))
@settings(max_examples=300, deadline=None)
def test_the_grader_is_total(text: str) -> None:
    task = Countdown(CountdownTask(type="countdown"), Splits(), 0)
    problem = task.parse("3 5 7 > 22")
    assert verdict(task, problem, text) in (Grade.WRONG, Grade.CORRECT)
    assert isinstance(task.solution_key(problem, text), str)
    assert len(task.step_labels(problem, text)) >= 1


def test_step_labels_find_the_first_bad_step(task: Countdown, problem: Problem) -> None:
    assert task.step_labels(problem, "5*3=15\n15+7=22") == [True, True]
    assert task.step_labels(problem, "5*3=15\n15-7=8") == [True, False]
    assert task.step_labels(problem, "5*3=14\n14+7=21") == [False, False]
    assert task.step_labels(problem, "7-3=4\n5*4=20") == [False, False]  # legal, but 22 is out of reach


# ---------------------------------------------------------------- solutions


def test_reordered_lines_and_commuted_operands_are_one_solution(task: Countdown) -> None:
    problem = task.parse("2 3 5 7 > 41")
    same = ["3*2=6\n7*5=35\n35+6=41", "7*5=35\n3*2=6\n35+6=41", "5*7=35\n2*3=6\n6+35=41"]
    other = "7+5=12\n12*3=36\n36+2=38"
    assert len({task.solution_key(problem, text) for text in same}) == 1
    assert task.solution_key(problem, other) not in {task.solution_key(problem, text) for text in same}
    assert {graded.answer for graded in task.grade([(problem, text) for text in same])} == {"(7*5)+(3*2)"}


def test_subtraction_does_not_commute(task: Countdown) -> None:
    problem = task.parse("2 3 9 > 4")
    first, second = "9-3=6\n6-2=4", "9-2=7\n7-3=4"
    assert task.solution_key(problem, first) != task.solution_key(problem, second)


def test_solve_is_right_and_none_where_nothing_is(task: Countdown) -> None:
    problems = task.draw("train", 300, stream="solve")
    texts = [task.solve(p) for p in problems]
    assert all(
        g.grade is Grade.CORRECT for g in task.grade([(p, t or "") for p, t in zip(problems, texts, strict=True)])
    )
    assert task.solve(task.parse("1 1 1 > 99")) is None


# ---------------------------------------------------------------- problems


def test_draws_are_distinct_of_their_split_and_pure(task: Countdown) -> None:
    first = task.draw("gate", 400, stream="round 1")
    assert first == task.draw("gate", 400, stream="round 1")
    assert first != task.draw("gate", 400, stream="round 2")
    keys = {p.key for p in first}
    assert len(keys) == 400
    assert {split_of(key, task.splits) for key in keys} == {"gate"}
    again = task.draw("gate", 400, stream="round 2", exclude=frozenset(keys))
    assert not keys & {p.key for p in again}
    assert task.draw("gate", 50, stream="round 1") == first[:50]  # a longer draw begins with the shorter one


def test_a_key_is_canonical(task: Countdown) -> None:
    assert task.parse("7,3 5>22") == task.parse("3 5 7 > 22")
    assert task.parse("3 5 7 > 22").key == "3,5,7>22"
    drawn = task.draw("test", 50, stream="x")
    assert all(task.parse(p.question) == p and task.parse(p.key) == p for p in drawn)


@pytest.mark.parametrize(
    "question", ["", "3 5 > 22", "3 5 7", "3 5 7 > x", "3 5 7 > 100", "0 5 7 > 2", "3 " * 60 + "> 2"]
)
def test_a_bad_question_says_what_a_good_one_is(task: Countdown, question: str) -> None:
    with pytest.raises(DataError, match=r"write it like|numbers, not|outside 1\.\.99"):
        task.parse(question)


def test_an_exhausted_space_is_an_error_that_counts() -> None:
    tiny = Countdown(CountdownTask(type="countdown", min_numbers=2, max_numbers=2, max_value=3), Splits(), 0)
    with pytest.raises(DataError, match=r"1000 new problems of the train split .* only \d+ exist"):
        tiny.draw("train", 1000, stream="x")


def test_problems_of_a_generated_task_are_drawn(task: Countdown) -> None:
    with pytest.raises(DataError, match="draw"):
        task.problems("train")


# ---------------------------------------------------------------- demonstrations


def subproblems(task: Countdown, text: str) -> set[str]:
    """An independent count by brute force: every problem of the task that the grader finds solved by some lines."""
    lines = text.split("\n")
    found: set[str] = set()
    for size in range(task.config.min_numbers - 1, len(lines) + 1):
        for chosen in combinations(lines, size):
            operands = [value for line in chosen for value in re.findall("[0-9]+", line)[:2]]
            target = chosen[-1].split("=")[1]
            for numbers in set(combinations(sorted(operands, key=int), size + 1)):
                if int(numbers[-1]) <= task.config.max_value:
                    problem = task.parse(f"{' '.join(numbers)} > {target}")
                    if verdict(task, problem, "\n".join(chosen)) is Grade.CORRECT:
                        found.add(problem.key)
    return found


def test_no_training_trace_contains_a_solution_of_a_held_out_problem(task: Countdown) -> None:
    shown = task.demonstrations(600, stream="bootstrap", bootstrap=Bootstrap(solved=0.3))
    for problem, text in shown:
        assert split_of(problem.key, task.splits) == "train"
        assert any(g.answer is not None for g in task.grade([(problem, text)])), "every demonstration is legal play"
        assert {split_of(key, task.splits) for key in subproblems(task, text)} <= {"train"}


def test_solved_keys_agree_with_brute_force(task: Countdown) -> None:
    for problem in task.draw("train", 300, stream="keys"):
        text = task.solve(problem) or ""
        assert task.solved_keys(problem, text) == subproblems(task, text)
        assert problem.key in task.solved_keys(problem, text)


def test_lines_that_change_nothing_hide_no_solution(task: Countdown) -> None:
    problem = task.parse("1 6 7 8 > 50")
    keys = task.solved_keys(problem, "7*6=42\n42/1=42\n42+8=50")
    assert keys == {"1,6,7,8>50", "6,7,8>50", "1,6,7>42"}
    assert task.solved_keys(problem, "7*6=42\n42/1=42") == frozenset()  # not a complete play


def test_demonstrations_are_pure_and_mixed(task: Countdown) -> None:
    settings_ = Bootstrap(solved=0.3)
    shown = task.demonstrations(600, stream="a", bootstrap=settings_)
    assert shown == task.demonstrations(600, stream="a", bootstrap=settings_)
    assert shown != task.demonstrations(600, stream="b", bootstrap=settings_)
    solved = sum(g.grade is Grade.CORRECT for g in task.grade(shown)) / 600
    assert 0.3 < solved < 0.6  # an unrelated target is hit by luck now and then


# ---------------------------------------------------------------- tokenizer


def test_tokenizer_is_lossless_and_survives_a_save(tmp_path, task: Countdown) -> None:
    from transformers import AutoTokenizer

    built = build_tokenizer()
    built.save_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert len(tokenizer) == len(vocabulary()) == 111
    for problem in task.draw("train", 50, stream="tokens"):
        text = task.prompt(problem) + (task.solve(problem) or "")
        ids = tokenizer.encode(text, add_special_tokens=False)
        assert tokenizer.decode(ids) == text
        assert ids == built.encode(text, add_special_tokens=False)
        assert tokenizer.decode([*ids, tokenizer.eos_token_id], skip_special_tokens=True) == text


def test_every_number_and_sign_is_one_token() -> None:
    tokenizer = build_tokenizer()
    for piece in [*map(str, range(100)), *"+-*/=,>\n"]:
        assert len(tokenizer.encode(piece, add_special_tokens=False)) == 1
    assert tokenizer.convert_ids_to_tokens(tokenizer.encode("105 007", add_special_tokens=False)) == [
        "10", "5", "<unk>", "0", "0", "7",
    ]  # fmt: skip
    assert tokenizer.eos_token == EOS
