"""Grade a file of responses made elsewhere: the work behind `ratchet grade TASK FILE [--out FILE]`.

Rows are {"answer", "response"} or {"answer", "responses": [...]}; a "question" is needed for the generated tasks, whose
gold answer follows from it, and elsewhere makes repeating an expression of the question wrong. The rows come back with
"correct": true, false or null (the grader failed), a list for "responses"; a row in which a response marks several
answers (the last counts) also gets "flags".
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from search.errors import DataError, DiskError
from search.grading import GraderPool
from search.tasks.compare import bad_gold, gold_answer
from search.tasks.files import Rejected, read_jsonl
from search.tasks.math_answers import AnswerType, extract
from search.types import Grade, Graded, Problem

TASKS = ("gsm8k", "math", "jsonl", "countdown", "arithmetic")
_CORRECT = {Grade.CORRECT: True, Grade.WRONG: False, Grade.UNGRADED: None}


@dataclass(frozen=True, slots=True)
class GradeSummary:
    """Counts of responses, not rows. `flagged`: responses that mark several answers."""

    task: str
    correct: int
    wrong: int
    ungraded: int
    flagged: int = 0

    def to_json(self) -> dict[str, Any]:
        return {"task": self.task, "correct": self.correct, "wrong": self.wrong, "ungraded": self.ungraded}


@dataclass(frozen=True, slots=True)
class _Row:
    line: int
    data: Mapping[str, Any]
    responses: tuple[str, ...]
    question: str | None
    gold: str | None


def grade_file(
    task: str, path: str | Path, out: str | Path | None = None, *, answer_type: AnswerType = "math"
) -> GradeSummary:
    """Grade every response of a file. `answer_type` is for the task "jsonl".

    Raises DataError (naming the line) for a row that cannot be graded; nothing is written then.
    """
    kind = _kind(task, answer_type)
    rows = _read(Path(path), generated=task in ("countdown", "arithmetic"), answer_type=kind)
    graded = _grade_generated(task, rows, str(path)) if task in ("countdown", "arithmetic") else _grade(rows, kind)
    marks = [[extract(text, kind).marked > 1 for text in row.responses] for row in rows]
    if out is not None:
        _write(Path(out), [_row_back(*item) for item in zip(rows, _per_row(rows, graded), marks, strict=True)])
    grades = [g.grade for g in graded]
    counts = (grades.count(grade) for grade in (Grade.CORRECT, Grade.WRONG, Grade.UNGRADED))
    return GradeSummary(task, *counts, flagged=sum(sum(m) for m in marks))


def grader_of(
    name: str, *, answer_type: AnswerType = "math"
) -> Callable[[Sequence[tuple[Problem, str]]], list[Graded]]:
    """What grades the responses of a task by name, without a configuration: for pools made elsewhere.

    Raises DataError for a name that is no task.
    """
    kind = _kind(name, answer_type)

    def grade(pairs: Sequence[tuple[Problem, str]]) -> list[Graded]:
        if name in ("countdown", "arithmetic"):
            task = _widest(name)
            return task.grade([(task.parse(problem.question), text) for problem, text in pairs])
        golds = [(None if p.answer is None else gold_answer(p.answer, kind), text) for p, text in pairs]
        with GraderPool(workers=min(4, os.cpu_count() or 1)) as pool:
            return pool.grade(golds, kind, [p.question for p, _ in pairs])

    return grade


def _kind(task: str, answer_type: AnswerType) -> AnswerType:
    """How a task compares answers. Raises DataError for a name that is no task."""
    if task not in TASKS:
        raise DataError(f"no task '{task}' to grade: choose one of {', '.join(TASKS)}")
    assert answer_type in get_args(AnswerType)
    fixed: dict[str, AnswerType] = {"gsm8k": "number", "math": "math"}
    return fixed.get(task, answer_type)


def _read(path: Path, *, generated: bool, answer_type: AnswerType) -> list[_Row]:
    rejected: list[Rejected] = []
    rows: list[_Row] = []
    for row in read_jsonl(path, rejected):
        made = _row(row.line, row.data, generated, answer_type)
        if isinstance(made, str):
            rejected.append(Rejected(str(path), row.line, made))
        else:
            rows.append(made)
    if rejected:
        first = min(rejected, key=lambda r: r.line)
        raise DataError(f"{path} line {first.line}: {first.reason} ({len(rejected)} such rows in all); mend the file")
    if not rows:
        raise DataError(f'{path} holds no rows; expected lines such as {{"answer": "72", "response": "... 72"}}')
    return rows


def _row(line: int, data: Mapping[str, Any], generated: bool, answer_type: AnswerType) -> _Row | str:
    """A checked row, or what is wrong with it."""
    if ("response" in data) == ("responses" in data):
        return "a row needs either 'response' (text) or 'responses' (a list of texts)"
    responses = [data["response"]] if "response" in data else data["responses"]
    if not isinstance(responses, list) or not all(isinstance(r, str) for r in responses):
        return "'response' must be a text and 'responses' a list of texts"
    question, answer = data.get("question"), data.get("answer")
    if question is not None and not isinstance(question, str):
        return "'question' must be a text"
    if isinstance(answer, int | float) and not isinstance(answer, bool):
        answer = repr(answer)
    if generated:
        if not question:
            return "a generated task needs the 'question'"
    elif not isinstance(answer, str):
        return "no 'answer' (text or a number)"
    elif reason := bad_gold(gold_answer(answer, answer_type), answer_type):
        return reason
    return _Row(line, data, tuple(responses), question, answer if isinstance(answer, str) else None)


def _grade(rows: Sequence[_Row], answer_type: AnswerType) -> list[Graded]:
    pairs = [(row.gold, text) for row in rows for text in row.responses]
    questions = [row.question for row in rows for _ in row.responses]
    with GraderPool(workers=min(4, os.cpu_count() or 1)) as pool:
        return pool.grade(pairs, answer_type, questions)


def _grade_generated(name: str, rows: Sequence[_Row], source: str) -> list[Graded]:
    task = _widest(name)
    pairs: list[tuple[Problem, str]] = []
    for row in rows:
        try:
            problem = task.parse(row.question)
        except DataError as error:
            raise DataError(f"{source} line {row.line}: {error}") from error
        if row.gold is not None and problem.answer is not None and row.gold.strip() != problem.answer:
            raise DataError(
                f"{source} line {row.line}: the answer {row.gold[:40]!r} is not the question's own, {problem.answer!r}"
            )
        pairs += [(problem, text) for text in row.responses]
    return task.grade(pairs)


def _widest(name: str) -> Any:
    """A generated task with the widest ranges it allows: a file may come from any configuration."""
    from configs.schema import ArithmeticTask, CountdownTask, Splits

    if name == "countdown":
        from search.tasks.countdown import Countdown

        return Countdown(CountdownTask(type="countdown", min_numbers=2, max_numbers=6, max_value=50), Splits(), 0)
    from search.tasks.arithmetic import Arithmetic

    return Arithmetic(ArithmeticTask(type="arithmetic", max_operations=16, max_operand=96), Splits(), 0)


def _per_row(rows: Sequence[_Row], graded: Sequence[Graded]) -> list[list[Graded]]:
    flat = iter(graded)
    return [[next(flat) for _ in row.responses] for row in rows]


def _row_back(row: _Row, graded: Sequence[Graded], several: Sequence[bool]) -> dict[str, Any]:
    correct = [_CORRECT[g.grade] for g in graded]
    back = {**row.data, "correct": correct if "responses" in row.data else correct[0]}
    return back | {"flags": ["several answers marked"]} if any(several) else back


def _write(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    part = path.with_name(path.name + ".part")
    try:
        part.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        part.replace(path)
    except OSError as error:
        raise DiskError(f"{path} cannot be written: {error.strerror}; give --out a folder that exists") from error
