"""The grader: what counts as an answer, what is equal, what is refused; nothing hangs, raises or is fooled."""

import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from pathlib import Path
from typing import get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from search.errors import EngineError
from search.grading import GraderPool, Job
from search.tasks.compare import bad_gold, gold_answer, judge
from search.tasks.math_answers import AnswerType, extract, normal, number_text, parse_number, refused
from search.types import Grade, Graded

RIGHT, WRONG, UNGRADED = Grade.CORRECT, Grade.WRONG, Grade.UNGRADED


@pytest.fixture(scope="module")
def pool():
    with GraderPool(seconds=20, workers=1) as pool:
        yield pool


def grade(pool, gold, response, answer_type="math"):
    return pool.grade([(gold, response)], answer_type)[0].grade


# ---------------------------------------------------------------- extraction


@pytest.mark.parametrize(
    ("response", "answer"),
    [
        ("So \\boxed{7}.", "7"),
        ("\\boxed{1} or rather \\boxed{2}", "2"),
        ("\\boxed{\\frac{1}{2}}", "\\frac{1}{2}"),
        ("\\boxed{\\{1, 2\\}}", "\\{1, 2\\}"),
        ("\\fbox{3}", "3"),
        ("\\boxed 5", "5"),
        ("\\boxed{\\boxed{4}}", "4"),
        ("48+24 = 72\n#### 72", "72"),
        ("The answer is 72.", "72"),
        ("**Answer:** $\\frac{3}{4}$", "\\frac{3}{4}"),
        ("Final answer: 3.5", "3.5"),
        ("<think>\\boxed{1}</think>The answer is \\boxed{2}", "2"),
        ("72", "72"),
        ("", None),
        ("\\boxed{}", None),
        ("\\boxed{5", None),
        ("I add 3 and 4 and get 7 eggs, I think, which is a lot of eggs", None),
        ("first 3\nthen 7", None),
    ],
)
def test_extract_finds_the_marked_answer_and_nothing_else(response, answer):
    assert extract(response).answer == answer


def test_extract_counts_marks_so_that_hedging_shows():
    assert extract("\\boxed{1}\\boxed{2}\\boxed{3}").marked == 3
    assert extract("\\boxed{1}").marked == 1
    assert extract("no answer").marked == 0


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("72", 72),
        ("-3", -3),
        ("1,080", 1080),
        ("11,\\! 111,\\! 100", 11111100),
        ("$12.50", Fraction(25, 2)),
        ("\\$32,\\!348", 32348),
        (".0000672", Fraction(672, 10**7)),
        ("3/4", Fraction(3, 4)),
        ("\\frac43", Fraction(4, 3)),
        ("-\\dfrac{35}{9}", Fraction(-35, 9)),
        ("1\\frac{4}{5}", Fraction(9, 5)),
        ("137 \\frac{1}{2}", Fraction(275, 2)),
        ("1 1/2", Fraction(3, 2)),
        ("6.72 \\times 10^{-5}", Fraction(672, 10**7)),
        ("1e3", 1000),
        ("90^\\circ", 90),
        ("864 \\mbox{ inches}^2", 864),
        ("x = 5", 5),
        ("\\text{5}", None),
        ("5 or 6", None),
        ("1, 2", None),
        ("1/0", None),
        ("2+3", None),
        ("12x", None),
        ("", None),
    ],
)
def test_parse_number_is_exact(text, value):
    number = parse_number(text, words=False)
    assert (number.value if number else None) == value


def test_parse_number_takes_plain_words_as_units_where_asked():
    assert parse_number("12 red apples", words=True).value == 12
    assert parse_number("2 dozen eggs", words=True).value == 24
    assert parse_number("12 red apples", words=False) is None


@given(st.fractions(max_denominator=10**6))
def test_number_text_reads_back_as_the_same_number(value):
    assert parse_number(number_text(value), words=False).value == value


# ---------------------------------------------------------------- equality


@pytest.mark.parametrize(
    ("gold", "answer"),
    [
        ("2\\sqrt{3}", "\\sqrt{12}"),
        ("p - q", "-q+p"),
        ("\\frac{14}{3}", "14/3"),
        ("1\\frac{4}{5}", "1.8"),
        ("0.333333", "\\frac13"),
        ("50", "50\\%"),
        ("0.5", "50\\%"),
        ("12", "12 cm^2"),
        ("12", "12 apples"),
        ("1,-2", "-2, 1"),
        ("\\{1,2\\}", "2,1"),
        ("x=5", "5"),
        ("5", "x = 5"),
        ("1024", "2^{10} = 1024"),
        ("52_8", "52_{8}"),
        ("x \\in [-2,7]", "[-2,7]"),
        ("\\text{Evelyn}", "evelyn"),
        ("\\text{(C)}", "C"),
        ("\\text{east}", "\\textbf{East}"),
        ("90^\\circ", "90"),
        ("3 \\pm 2\\sqrt2", "3+2\\sqrt2, 3-2\\sqrt2"),
        ("\\begin{pmatrix} 1/5 \\\\ 2 \\end{pmatrix}", "\\begin{pmatrix} 0.2 \\\\ 2 \\end{pmatrix}"),
        ("(0,9) \\cup (9,36)", "(0, 9)\\cup(9, 36)"),
        ("x^3+3x-6", "3x + x^3 - 6"),
        ("\\cot x", "\\frac{1}{\\tan x}"),
    ],
)
def test_equal_answers_are_correct(pool, gold, answer):
    assert grade(pool, gold, f"Thus $\\boxed{{{answer}}}$.") is RIGHT


@pytest.mark.parametrize(
    ("gold", "answer"),
    [
        ("2\\sqrt{3}", "3\\sqrt{2}"),
        ("(1,2,3)", "(3,2,1)"),
        ("[-2,7]", "(-2,7)"),
        ("11/2", "1 1/2"),
        ("52_8", "52_9"),
        ("x=5", "y=5"),
        ("\\text{Evelyn}", "Carla"),
        ("\\text{(C)}", "A, B, C, D"),
        ("123", "23"),
        ("5", "5, 6"),
        ("5", "\\{4, 5\\}"),
        ("5", "1, 2, 3, 4, 5"),
        ("2k+2", "2k"),
        ("1/3", "0.3"),
        ("70", "\\binom{8}{4}"),  # the question in a box is not the answer to it
        ("7", "3+4"),
        ("\\frac{\\sqrt{3}}{2}", "\\sin 60^\\circ"),
        ("5050", "\\sum_{k=1}^{100} k"),
    ],
)
def test_other_answers_and_unfinished_ones_are_wrong(pool, gold, answer):
    assert grade(pool, gold, f"Thus $\\boxed{{{answer}}}$.") is WRONG


@pytest.mark.parametrize("gold", ["72", "2\\sqrt{3}", "\\text{Evelyn}", "(1,2)"])
@pytest.mark.parametrize(
    "response",
    [
        "",
        " ",
        "\\boxed{}",
        "\\boxed{}" * 50,
        "\\boxed{ }",
        "What is the number of clips 72 that Evelyn sold on days (1,2) at 2\\sqrt{3}?",
        "72 71 70 69",
        "\\boxed{72, 2\\sqrt{3}, \\text{Evelyn}, (1,2)}",
        "\\boxed{72}\\boxed{2\\sqrt{3}}\\boxed{\\text{Evelyn}}\\boxed{(1,2)}\\boxed{none}",
        "\\boxed{1722}",
        "#### ",
        "The answer is",
        "The answer is the answer.",
        "\\boxed{\\text{the right answer}}",
    ],
)
def test_nothing_hollow_scores(pool, gold, response):
    assert grade(pool, gold, response) is WRONG


def test_repeating_an_expression_of_the_question_is_wrong(pool):
    pair = ("5\\sqrt{2}", "\\boxed{\\sqrt{50}}")
    assert pool.grade([pair], questions=["Simplify $\\sqrt{50}$."])[0].grade is WRONG
    assert pool.grade([pair], questions=["Simplify $\\sqrt{2500}^{1/2}$."])[0].grade is RIGHT
    same = ("\\sqrt{50}", "\\boxed{\\sqrt{50}}")
    assert pool.grade([same], questions=["Which is larger, $7$ or $\\sqrt{50}$?"])[0].grade is RIGHT


@pytest.mark.parametrize(
    ("answer_type", "gold", "response", "expected"),
    [
        ("number", "72", "#### 72 clips", RIGHT),
        ("number", "72", "The answer is 72 clips altogether in May.", RIGHT),
        ("number", "72", "The answer is $72.00.", RIGHT),
        ("number", "1000", "\\boxed{1,000}", RIGHT),
        ("number", "72", "\\boxed{172}", WRONG),
        ("number", "72", "\\boxed{70+2}", WRONG),
        ("number", "72", "\\boxed{71 or 72}", WRONG),
        ("choice", "B", "\\boxed{B}", RIGHT),
        ("choice", "(b)", "The answer is (B) because of it.", RIGHT),
        ("choice", "B", "B) 42", RIGHT),
        ("choice", "B", "A, B, C, D", WRONG),
        ("choice", "A", "A. B. C. D.", WRONG),
        ("choice", "A", "A or B", WRONG),
        ("choice", "A", "The answer is a number", WRONG),
        ("text", "Mercury", "Answer: mercury.", RIGHT),
        ("text", "the red fox", "\\boxed{The  red fox}", RIGHT),
        ("text", "red", "\\boxed{red and blue}", WRONG),
    ],
)
def test_answer_types(pool, answer_type, gold, response, expected):
    assert grade(pool, gold, response, answer_type) is expected


def test_equal_answers_have_one_canonical_form_for_voting(pool):
    groups = [
        ["72", "72.0", "\\$72", "72\\text{ clips}", "72 apples"],
        ["2\\sqrt{3}", "\\sqrt{12}", "\\frac{6}{\\sqrt{3}}"],
        ["\\frac{1}{2}", "0.5", "\\dfrac12", "1/2"],
        ["\\text{(C)}", "C", "(C)"],
        ["p-q", "-q + p"],
        ["1,-2", "\\{-2, 1\\}"],
        ["(x+1)^2", "x^2+2x+1"],
    ]
    flat = [(None, f"\\boxed{{{answer}}}") for group in groups for answer in group]
    graded = iter(pool.grade(flat))
    forms = [{next(graded).answer for _ in group} for group in groups]
    assert [len(form) for form in forms] == [1] * len(groups)
    assert len(set.union(*forms)) == len(groups)


def test_without_a_gold_answer_there_is_a_canonical_answer_and_no_grade(pool):
    assert pool.grade([(None, "\\boxed{4}"), (None, "no idea\nat all")]) == [
        Graded(UNGRADED, "4"),
        Graded(UNGRADED, None),
    ]


def test_gold_answers_are_found_in_whole_solutions():
    assert gold_answer("48/2 = 24\n#### 1,080", "number") == "1,080"
    assert gold_answer("so $\\boxed{\\frac{1}{2}}$.", "math") == "\\frac{1}{2}"
    assert gold_answer(" 7 ", "math") == "7"


@pytest.mark.parametrize(
    ("gold", "answer_type", "reason"),
    [
        ("", "math", "empty"),
        ("many", "number", "not a number"),
        ("A or B", "choice", "not one option"),
        ("\\frac{1}{2", "math", "unbalanced"),
        ("9^{9^9}", "math", "cannot be parsed"),
        ("..", "text", "empty"),
    ],
)
def test_bad_gold_says_why(gold, answer_type, reason):
    assert reason in bad_gold(gold, answer_type)


def test_an_unusable_gold_answer_is_ungraded(pool):
    assert grade(pool, "many", "\\boxed{7}", "number") is UNGRADED


# ---------------------------------------------------------------- hostile answers

HOSTILE = {
    "tower": "9**9**9",
    "tower in braces": "10^{10^{10}}",
    "tower in brackets": "(9^{9})^{(9^{9})}^{9}",
    "factorials": "((9!)!)!",
    "factorial of a large number": "99999!",
    "deep brackets": "(" * 400 + "1" + ")" * 400,
    "deep braces": "{" * 400 + "1" + "}" * 400,
    "deep fractions": "\\frac{1}{" * 200 + "2" + "}" * 200,
    "deep roots": "\\sqrt{" * 63 + "2" + "}" * 63,
    "megabyte of integrals": "\\int_0^1 x^x \\, dx + " * 50_000,
    "huge matrix": "\\begin{pmatrix}" + (" 1 &" * 300 + " 1 \\\\") * 30 + "\\end{pmatrix}",
    "digits": "7" * 3000,
    "nul": "7\x00",
    "escape": "\x1b[31m7\x1b[0m",
    "bidirectional override": "\u202e7",
    "backtracking": "1" + "," * 3000 + "!",
    "spaces": "^" + " " * 3900 + "x",
    "commands": "\\left" * 700,
    "half a surrogate pair": "7\ud800",
}


@pytest.mark.parametrize("name", HOSTILE)
@pytest.mark.parametrize("gold", ["7", "2\\sqrt{3}", "x^2+1"])
def test_hostile_answers_are_wrong(pool, name, gold):
    assert grade(pool, gold, f"\\boxed{{{HOSTILE[name]}}}") is WRONG


def test_guards_let_honest_answers_pass():
    for answer in ["2^{2005}", "e^{x^2}", "2^{2^3}", "\\frac{\\binom{8}{4}}{70}", "10!", "x^{10}+x^9+1", "1" * 300]:
        assert refused(answer) is None, answer


def test_text_work_is_linear_in_the_response():
    # Each would take minutes with one quadratic scan. No time is asserted: the test's own limit is the bound.
    for unit in ["\\boxed{", "####", "\\text{", "answer is ", "$", "{", " ", "\\frac", "^", "1,", "(", "\n#### 1"]:
        response = unit * (2_000_000 // len(unit))
        answer = extract(response).answer
        if answer is not None and refused(answer) is None:
            judge("7", answer, "math")
            judge("7", answer, "text")
            normal(answer)


PIECES = [*"0123456789+-*/^!={}()[]_,.$%\\ xyeABC\n\x00\ud800\u00bd\u0663", "\\frac", "\\sqrt", "\\boxed{", "\\text{"]
PIECES += ["\\int", "\\left", "answer is ", "####", "\\begin{pmatrix}", "\\\\", "10^", "\\times", " million"]


@settings(max_examples=150, deadline=None)
@given(st.lists(st.sampled_from(PIECES), max_size=60).map("".join), st.sampled_from(get_args(AnswerType)))
def test_text_and_numbers_never_raise(text, answer_type):
    extract(text, answer_type)
    refused(text)
    bad_gold(gold_answer(text, answer_type), answer_type)
    assert judge("7", text, answer_type).grade in (RIGHT, WRONG, None)
    assert judge(text, "7", answer_type).grade in (RIGHT, WRONG, None)


# ---------------------------------------------------------------- workers


def test_order_is_kept_and_equal_pairs_are_compared_once(pool):
    golds = [f"{k}\\sqrt{{2}}" for k in range(2, 12)]
    pairs = [(g, f"\\boxed{{{g.replace('2', '2 ')}}}") for g in golds] + [("2\\sqrt{2}", "\\boxed{3\\sqrt{2}}")] * 5
    graded = [g.grade for g in pool.grade(pairs)]
    assert graded == [RIGHT] * 10 + [WRONG] * 5


def test_a_worker_that_was_killed_is_replaced(pool):
    assert grade(pool, "2\\sqrt{3}", "\\boxed{\\sqrt{12}}") is RIGHT
    before = pool.pids()
    for pid in before:
        os.kill(pid, signal.SIGKILL)
    assert grade(pool, "2\\sqrt{5}", "\\boxed{\\sqrt{20}}") is RIGHT
    assert not set(before) & set(pool.pids())


def test_a_worker_serves_all_threads_and_outlives_those_that_end(pool):
    pids = []
    for k in (2, 3, 5):
        with ThreadPoolExecutor(1) as thread:
            answer = f"\\boxed{{\\sqrt{{{2 * k * k}}}}}"
            assert thread.submit(grade, pool, f"{k}\\sqrt{{2}}", answer).result() is RIGHT
        pids.append(pool.pids())
    assert grade(pool, "7\\sqrt{2}", "\\boxed{\\sqrt{98}}") is RIGHT
    assert pids == [pool.pids()] * 3
    assert len(pool.pids()) == 1


def test_workers_that_cannot_start_are_an_error_not_a_verdict(monkeypatch):
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with GraderPool(workers=1) as pool, pytest.raises(EngineError, match="do not start"):
        pool.grade([("2\\sqrt{3}", "\\boxed{\\sqrt{12}}")])


GREEDY_LIBRARY = """
class LatexExtractionConfig:
    def __init__(self, **options): pass

def parse(text, config, **options):
    return [text]

def verify(gold, answer, **options):
    kept = []
    try:
        while "hungry" in answer[0]:
            kept = [kept, bytearray(16 << 20)]
        return gold == answer
    except Exception:
        return False
"""


def test_an_answer_that_takes_all_memory_is_ungraded_though_the_library_hides_it(tmp_path, monkeypatch):
    (tmp_path / "math_verify.py").write_text(GREEDY_LIBRARY)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with GraderPool(seconds=20, memory_mib=512, workers=1) as pool:
        found = pool.compare([Job("2x", "3x"), Job("2x", "hungry"), Job("2x", "2x"), Job("2x", "4x")])
        assert [(c.equal, c.failed) for c in found] == [(False, None), (None, "memory"), (True, None), (False, None)]
        assert pool.failures == {"memory": 1}


def test_an_answer_does_not_pay_for_the_memory_that_earlier_ones_took(tmp_path, monkeypatch):
    hoarder = GREEDY_LIBRARY.replace("    kept = []\n", "    HOARD.append(bytearray(100 << 20))\n    kept = []\n")
    (tmp_path / "math_verify.py").write_text("HOARD = []\n" + hoarder)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with GraderPool(seconds=20, memory_mib=1024, workers=1) as pool:
        found = pool.compare([Job("2x", f"{k}x") for k in range(12)])
        assert [c.equal for c in found] == [k == 2 for k in range(12)]


def test_a_folder_named_search_in_the_current_directory_is_not_imported(tmp_path, monkeypatch):
    (tmp_path / "search").mkdir()
    (tmp_path / "search" / "__init__.py").write_text("raise SystemExit('the wrong one')")
    monkeypatch.chdir(tmp_path)
    with GraderPool(workers=1) as pool:
        assert grade(pool, "2\\sqrt{3}", "\\boxed{\\sqrt{12}}") is RIGHT


def test_no_worker_outlives_a_killed_parent():
    code = (
        "from search.grading import GraderPool\n"
        "pool = GraderPool(workers=2)\n"
        "pool.grade([('2x', '\\\\boxed{x+x}'), ('3x', '\\\\boxed{x+2x}')])\n"
        "print(*pool.pids(), flush=True)\n"
        "import time; time.sleep(600)\n"
    )
    root = Path(__file__).parents[1]
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, cwd=root)
    assert parent.stdout is not None
    with parent.stdout:
        pids = [int(pid) for pid in parent.stdout.readline().split()]
        parent.kill()
        parent.wait()
    assert len(pids) == 2
    deadline = time.monotonic() + 5
    while any(map(_alive, pids)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not [pid for pid in pids if _alive(pid)]


def _alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
