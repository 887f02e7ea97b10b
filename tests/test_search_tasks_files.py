"""Loading problems: what is set aside and why, duplicates, splits that never move, prompts, and errors that help."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from configs.load import parse
from search.errors import DataError
from search.tasks import files, load_task
from search.tasks.file_task import solution_key
from search.tasks.files import question_key
from search.types import SPLITS, Grade


def config(path, **task):
    section = {"type": "jsonl", "path": str(path), "answer_type": "number", "prompt": "plain"} | task
    return parse({"loop": {"name": "t"}, "task": section, "model": {"base": "some-model"}})


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def questions(num, start=0):
    return [{"question": f"What is {k} plus {k}?", "answer": str(2 * k)} for k in range(start, start + num)]


@pytest.fixture
def source(tmp_path):
    return tmp_path / "problems.jsonl"


def every(task):
    return {p.key: (p.question, p.answer, split) for split in SPLITS for p in task.problems(split)}


# ---------------------------------------------------------------- rows


BAD_LINES = {
    b'{"question": "2+2?"}': "no 'answer'",
    b'{"answer": "4"}': "no 'question'",
    b'{"question": "", "answer": "4"}': "no 'question'",
    b'{"question": "2+2?", "answer": null}': "no 'answer'",
    b'{"question": "2+2?", "answer": true}': "no 'answer'",
    b'{"question": ["2+2?"], "answer": "4"}': "no 'question'",
    b'{"question": "2+2?", "answer": "four"}': "not a number",
    b'{"question": "2+2?", "answer": "4"': "not JSON",
    b"not json at all": "not JSON",
    b"[1, 2]": "not a JSON object but list",
    b"7": "not a JSON object but int",
    b'{"question": "2+2?", "answer": "4", "answer": "5"}': "stands twice",
    b'{"question": "caf\xe9?", "answer": "4"}': "not UTF-8",
    b'{"question": "2+2?\x00", "answer": "4"}': "NUL",
    b'{"question": "2+2?\\u0000", "answer": "4"}': "NUL",
    b'{"question": "2+2?\\ud800", "answer": "4"}': "surrogate",
    b'{"a":' * 100_000: "nested too deeply",
    b'{"question": "' + b"x" * (files.MAX_LINE_BYTES + 10) + b'", "answer": "4"}': "longer than 4 MiB",
    b'{"question": "' + b"x" * 200_000 + b'", "answer": "4"}': "longer than 100000 characters",
    b'{"question": "2+2?", "answer": "' + b"9" * 5000 + b'"}': "cannot be parsed",
    b'{"question": "2+2?", "answer": ' + b"9" * 5000 + b"}": "not JSON",
}


@pytest.mark.parametrize("line", BAD_LINES, ids=[reason for reason in BAD_LINES.values()])
def test_a_bad_row_is_set_aside_with_its_line_and_reason(source, tmp_path, line):
    good = questions(60)
    body = [json.dumps(row).encode() for row in good]
    source.write_bytes(b"\n".join([*body[:30], line, *body[30:]]) + b"\n")
    task = load_task(config(source))
    assert len(every(task)) == 60
    (rejected,) = task.rejected
    assert rejected.line == 31
    assert BAD_LINES[line] in rejected.reason
    task.write_rejected(tmp_path / "rejected.jsonl")
    (row,) = (json.loads(text) for text in (tmp_path / "rejected.jsonl").read_text(encoding="ascii").splitlines())
    assert (row["line"], row["reason"], row["source"]) == (31, rejected.reason, str(source))
    assert len(row["text"]) <= 2000


def test_bom_crlf_and_blank_lines_are_no_fault(source):
    rows = [json.dumps(row).encode() for row in questions(20)]
    source.write_bytes(b"\xef\xbb\xbf" + b"\r\n\r\n".join(rows) + b"\r\n\r\n")
    task = load_task(config(source))
    assert len(every(task)) == 20
    assert task.rejected == ()


def test_a_last_line_without_newline_counts(source):
    source.write_text("\n".join(json.dumps(row) for row in questions(5)))
    assert len(every(load_task(config(source)))) == 5


def test_repeated_rows_collapse_with_a_count(source):
    rows = questions(40)
    again = [rows[3], {"question": "  what IS 4\tplus 4? ", "answer": "8.0"}]
    task = load_task(config(write(source, rows + again)))
    assert len(every(task)) == 40
    assert task.num_duplicates == 2
    assert task.rejected == ()


def test_a_question_with_different_answers_is_set_aside_everywhere(source):
    task = load_task(config(write(source, [*questions(100), {"question": "What is 7 plus 7?", "answer": "15"}])))
    assert [r.line for r in task.rejected] == [8, 101]
    assert all("different answers in lines 8, 101" in r.reason for r in task.rejected)
    assert question_key("What is 7 plus 7?") not in every(task)


def test_an_id_that_belongs_to_two_questions_sets_the_second_aside(source):
    rows = [row | {"id": k} for k, row in enumerate(questions(40))]
    rows[20]["id"] = 3
    task = load_task(config(write(source, rows), id_column="id"))
    assert [(r.line, "already belongs" in r.reason) for r in task.rejected] == [(21, True)]
    assert {p.meta["id"] for s in SPLITS for p in task.problems(s)} == {str(k) for k in range(40)} - {"20"}


def test_too_many_bad_rows_fail_with_counts_and_reasons(source):
    rows = [*questions(80), *[{"question": f"bad {k}?"} for k in range(20)]]
    with pytest.raises(DataError, match=r"20 of 100 rows .* task.max_bad_rows = 0.05 .*line 81: no 'answer'"):
        load_task(config(write(source, rows)))
    assert len(load_task(config(source, max_bad_rows=0.2)).rejected) == 20


def test_wrong_columns_say_which_columns_there_are(source):
    write(source, [{"prompt": "2+2?", "solution": "4"}])
    with pytest.raises(DataError, match=r"no 'question'.*the row has: prompt, solution.*|no usable problem"):
        load_task(config(source))
    task = load_task(config(source, question_column="prompt", answer_column="solution"))
    assert [v[:2] for v in every(task).values()] == [("2+2?", "4")]


def test_an_empty_and_a_missing_file_are_errors(source, tmp_path):
    source.write_text("\n")
    with pytest.raises(DataError, match="empty"):
        load_task(config(source))
    with pytest.raises(DataError, match=r"nowhere\.jsonl cannot be read: No such file"):
        load_task(config(tmp_path / "nowhere.jsonl"))


def test_a_hub_name_offline_names_the_way_out():
    with pytest.raises(DataError, match=r"'nobody/no-such-data'.*set task\.path to a local \.jsonl"):
        load_task(config("nobody/no-such-data"))


@settings(max_examples=60, deadline=None)
@given(lines=st.lists(st.binary(max_size=80), max_size=8))
def test_any_bytes_load_or_are_set_aside(tmp_path_factory, lines):
    source = tmp_path_factory.mktemp("bytes") / "p.jsonl"
    good = b"".join(json.dumps(row).encode() + b"\n" for row in questions(3))
    source.write_bytes(good + b"\n".join(lines))
    task = load_task(config(source, max_bad_rows=1.0))
    assert len(every(task)) == 3


# ---------------------------------------------------------------- keys and splits


def test_keys_ignore_spacing_and_case_but_not_numbers():
    assert question_key("How  many\neggs? ") == question_key("how many eggs?")
    assert question_key("Add 3 and 4") != question_key("Add 3 and 5")
    assert len(question_key("x")) == 16


def test_rows_appended_later_never_move_old_ones(source):
    before = every(load_task(config(write(source, questions(300)))))
    after = every(load_task(config(write(source, questions(150, start=900) + questions(300)[::-1]))))
    assert len(after) == 450
    assert {key: after[key][2] for key in before} == {key: value[2] for key, value in before.items()}
    shares = [sum(v[2] == split for v in after.values()) for split in SPLITS]
    assert shares[0] > 250
    assert all(share > 10 for share in shares)


def test_problems_come_in_file_order(source):
    task = load_task(config(write(source, questions(200))))
    lines = [p.meta["line"] for p in task.problems("train")]
    assert lines == sorted(lines)


def test_the_level_that_people_gave_a_problem_is_kept(source):
    rows = [{**row, "level": level} for row, level in zip(questions(3), ("Level 5", 2, None), strict=True)]
    task = load_task(config(write(source, rows)))
    levels = {p.meta["line"]: p.meta.get("level") for split in SPLITS for p in task.problems(split)}
    assert levels == {1: "Level 5", 2: "2", 3: None}


def test_a_test_file_is_exactly_the_test_split(source, tmp_path):
    write(source, questions(300))
    test = write(tmp_path / "test.jsonl", questions(40, start=280))
    task = load_task(config(source, test_path=str(test)))
    assert {p.question for p in task.problems("test")} == {row["question"] for row in questions(40, start=280)}
    others = [p for split in SPLITS[:-1] for p in task.problems(split)]
    assert len(others) == 280
    plain = load_task(config(source))
    moved = {p.key for p in plain.problems("test")} - {p.key for p in task.problems("test")}
    assert moved
    assert moved < {p.key for p in task.problems("train")}


def test_draw_is_a_pure_function_of_its_stream(source):
    task = load_task(config(write(source, questions(200))))
    first = task.draw("train", 20, stream="round-1")
    assert first == task.draw("train", 20, stream="round-1")
    assert first != task.draw("train", 20, stream="round-2")
    used = frozenset(p.key for p in first)
    assert not used & {p.key for p in task.draw("train", 20, stream="round-1", exclude=used)}
    with pytest.raises(DataError, match="unused problems, not 1000"):
        task.draw("train", 1000, stream="x")


# ---------------------------------------------------------------- prompts and grading


def test_prompts(source):
    write(source, questions(1))

    def prompt_of(**task):
        loaded = load_task(config(source, **task))
        return loaded.prompt(next(p for s in SPLITS for p in loaded.problems(s)))

    chat = prompt_of(prompt="chat")
    assert [m["role"] for m in chat] == ["system", "user"]
    assert "\\boxed{}" in chat[0]["content"]
    assert chat[1]["content"] == "What is 0 plus 0?"
    assert prompt_of(prompt="chat", instruction="Be brief.")[0]["content"] == "Be brief."
    few = prompt_of(prompt="few_shot", step_delimiter="\n")
    assert few.endswith("Question: What is 0 plus 0?\nSolution:")
    assert few.count("Solution:") == 5
    assert prompt_of(prompt="plain") == "What is 0 plus 0?\n"


@pytest.mark.parametrize("kind", ["math", "number", "choice", "text"])
def test_the_few_shot_examples_are_right_and_in_the_form_the_grader_reads(source, kind):
    write(source, [{"question": "q?", "answer": "1" if kind in ("math", "number") else "A"}])
    task = load_task(config(source, answer_type=kind, prompt="few_shot"))
    text = task.prompt(next(p for s in SPLITS for p in task.problems(s)))
    blocks = text.split("Question: ")[1:-1]
    assert len(blocks) >= 2
    for block, example in zip(blocks, task._examples, strict=True):
        (graded,) = task._pool.grade([(example.answer, block)], kind)
        assert graded.grade is Grade.CORRECT
    task.close()


def test_a_task_grades_its_problems(source):
    task = load_task(config(write(source, questions(50))))
    problems = task.problems("train")
    graded = task.grade([(p, f"So it is \\boxed{{{p.answer}}}") for p in problems] + [(problems[0], "no")])
    assert [g.grade for g in graded] == [Grade.CORRECT] * len(problems) + [Grade.WRONG]
    assert graded[0].answer == problems[0].answer


def test_solution_keys_see_the_equations_only(source):
    task = load_task(config(write(source, questions(30))))
    problem = task.problems("train")[0]
    same = [
        "He has 3 + 4 = 7 eggs.\n\\boxed{7}",
        "Adding up, $3+4=7$. So the answer is \\boxed{7}.",
        "3 + 4 = <<3+4=7>>7",
    ]
    assert len({task.solution_key(problem, text) for text in same}) == 1
    assert task.solution_key(problem, "4 + 3 = 7") != task.solution_key(problem, same[0])
    assert solution_key("12 x 1,000 = 12,000") == solution_key("12 * 1000 = 12000")
    assert solution_key("words alone") != solution_key("other words alone")
    assert len(solution_key("1+1=2\n" * 1000)) <= 200


def test_guard_sets_are_read_by_the_same_rules(source, tmp_path):
    task = load_task(config(write(source, questions(30))))
    extra = write(tmp_path / "guard.jsonl", questions(5, start=500))
    assert [p.answer for p in task.load_extra(str(extra))] == ["1000", "1002", "1004", "1006", "1008"]
