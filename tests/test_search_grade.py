"""`ratchet grade`: rows in, verdicts out, and an error that names the line."""

import json

import pytest

from search.errors import DataError, DiskError
from search.grade import grade_file


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def read(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.fixture
def source(tmp_path):
    return tmp_path / "rows.jsonl"


def test_one_response_a_row(source, tmp_path):
    rows = [
        {"id": 7, "answer": "He sold 24.\n#### 72", "response": "\\boxed{72}"},
        {"answer": 72, "response": "So 71.\n#### 71"},
        {"answer": "1,080", "response": "The answer is 1080 clips."},
        {"answer": "72", "response": ""},
    ]
    summary = grade_file("gsm8k", write(source, rows), tmp_path / "out.jsonl")
    assert summary.to_json() == {"task": "gsm8k", "correct": 2, "wrong": 2, "ungraded": 0}
    back = read(tmp_path / "out.jsonl")
    assert [row["correct"] for row in back] == [True, False, True, False]
    assert [{k: v for k, v in row.items() if k != "correct"} for row in back] == rows


def test_many_responses_a_row(source, tmp_path):
    rows = [
        {"answer": "2\\sqrt{3}", "responses": ["\\boxed{\\sqrt{12}}", "\\boxed{}", "\\boxed{1}\\boxed{2\\sqrt{3}}"]},
        {"answer": "\\text{(C)}", "responses": []},
    ]
    summary = grade_file("math", write(source, rows), tmp_path / "out.jsonl")
    assert (summary.correct, summary.wrong, summary.ungraded, summary.flagged) == (2, 1, 0, 1)
    back = read(tmp_path / "out.jsonl")
    assert [row["correct"] for row in back] == [[True, False, True], []]
    assert "flags" in back[0]
    assert "flags" not in back[1]


def test_a_question_makes_its_repetition_wrong(source):
    row = {"question": "Simplify $\\sqrt{50}$.", "answer": "5\\sqrt{2}", "response": "\\boxed{\\sqrt{50}}"}
    assert grade_file("math", write(source, [row])).wrong == 1
    assert grade_file("math", write(source, [row | {"response": "\\boxed{5 \\sqrt 2}"}])).correct == 1


def test_the_users_own_answer_types(source):
    rows = [{"answer": "B", "response": "The answer is (B)."}, {"answer": "B", "response": "A, B, C"}]
    assert grade_file("jsonl", write(source, rows), answer_type="choice").to_json() == {
        "task": "jsonl", "correct": 1, "wrong": 1, "ungraded": 0,
    }  # fmt: skip


def test_countdown_rows_need_only_the_question(source, tmp_path):
    rows = [
        {"question": "3 5 7 > 22", "response": "3*5=15\n7+15=22"},
        {"question": "3 5 7 > 22", "answer": "22", "responses": ["3*5=15", "22"]},
    ]
    summary = grade_file("countdown", write(source, rows), tmp_path / "out.jsonl")
    assert (summary.correct, summary.wrong) == (1, 2)
    assert [row["correct"] for row in read(tmp_path / "out.jsonl")] == [True, [False, False]]


GOOD = {"answer": "1", "response": "1"}


@pytest.mark.parametrize(
    ("task", "row", "reason"),
    [
        ("gsm8k", {"answer": "1"}, "either 'response'"),
        ("gsm8k", {"answer": "1", "response": "1", "responses": ["1"]}, "either 'response'"),
        ("gsm8k", {"answer": "1", "response": None}, "must be a text"),
        ("gsm8k", {"answer": "1", "responses": "1"}, "a list of texts"),
        ("gsm8k", {"answer": "1", "responses": [1]}, "a list of texts"),
        ("gsm8k", {"response": "1"}, "no 'answer'"),
        ("gsm8k", {"answer": "many", "response": "1"}, "not a number"),
        ("math", {"answer": "", "response": "1"}, "empty"),
        ("math", {"answer": "1", "response": "1", "question": 7}, "'question' must be a text"),
    ],
)
def test_a_bad_row_is_an_error_that_names_its_line_and_writes_nothing(source, tmp_path, task, row, reason):
    with pytest.raises(DataError, match=rf"rows\.jsonl line 3: .*{reason}"):
        grade_file(task, write(source, [GOOD, GOOD, row, GOOD]), tmp_path / "out.jsonl")
    assert not (tmp_path / "out.jsonl").exists()


def test_other_errors_say_what_to_do(source, tmp_path):
    with pytest.raises(DataError, match="no task 'chess' to grade: choose one of gsm8k"):
        grade_file("chess", source)
    with pytest.raises(DataError, match="No such file"):
        grade_file("gsm8k", tmp_path / "absent.jsonl")
    with pytest.raises(DataError, match="holds no rows"):
        grade_file("gsm8k", write(source, []))
    source.write_text('{"answer": "1", "response": "1"}\n{"answer": "1", "resp')
    with pytest.raises(DataError, match="line 2: not JSON"):
        grade_file("gsm8k", source)
    with pytest.raises(DataError, match="needs the 'question'"):
        grade_file("countdown", write(source, [GOOD]))
    with pytest.raises(DataError, match=r"line 1: .*no countdown question"):
        grade_file("countdown", write(source, [GOOD | {"question": "hello"}]))
    with pytest.raises(DataError, match=r"line 1: the answer '23' is not the question's own, '22'"):
        grade_file("countdown", write(source, [{"question": "3 5 7 > 22", "answer": 23, "response": ""}]))
    with pytest.raises(DiskError, match="cannot be written"):
        grade_file("gsm8k", write(source, [GOOD]), tmp_path / "absent" / "out.jsonl")


def test_the_file_may_be_graded_in_place_and_keeps_odd_text(source):
    rows = [{"answer": "1", "response": "\ud800 \u0000 \U0001f95a \\boxed{1}", "note": {"a": [1.5, None]}}]
    source.write_text(json.dumps(rows[0]) + "\n")
    assert grade_file("gsm8k", source, source).correct == 1
    assert read(source) == [rows[0] | {"correct": True}]
