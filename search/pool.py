"""Accuracy against budget from samples made elsewhere: the work behind `ratchet eval --pool FILE --task TASK`.

Rows are {"id": "q1", "question": "...", "answer": "72", "responses": ["...", ...], "scores": [...]}. `scores` is
optional: one number per response, or one list of step scores each, of which the last step's counts (Snell et al.,
arXiv 2408.03314, find it best for a value-like verifier) unless another aggregation is asked for. `question` may be
left out where the grader does not need it, and `id` too: the line number then stands for it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from search import evaluate
from search.errors import DataError
from search.evaluate import Pool
from search.standings import pool_rows, to_json
from search.tasks.files import Rejected, read_jsonl
from search.types import Grade, Graded, Problem, Spend

Grader = Callable[[Sequence[tuple[Problem, str]]], list[Graded]]
Aggregation = Literal["last", "min", "product"]
_AGGREGATE: dict[str, Callable[[Sequence[float]], float]] = {"last": lambda s: s[-1], "min": min, "product": math.prod}
_CHUNK_RESPONSES = 1024  # graded together


class _BadRow(Exception):
    """Why a row cannot be used."""


@dataclass(frozen=True, slots=True)
class _Row:
    line: int
    problem: Problem
    responses: tuple[str, ...]
    scores: tuple[float, ...] | None


POOL_RULES = {"pass": "pass", "majority": "majority"}
SCORED_POOL_RULES = {
    "best_of_n": "best_of_n",
    "best_of_n_weighted": "best_of_n_weighted",
    "best_of_n(vote=sharpened)": "sharpened",
}


def evaluate_file(
    path: Path,
    task: str,
    budgets: Sequence[int] | None,
    grade: Grader,
    *,
    aggregation: Aggregation = "last",
    names: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """The document of `ratchet eval --json`: pass and majority at every budget, best-of-n too where there are scores.

    `names`: strategies with their rules, instead of all. `budgets` None: 1, 4, 16, ... as far as every problem has
    responses. Raises DataError naming line and reason for a row that cannot be used, for a file in which only some
    rows have scores, for a problem that comes twice, and for a budget above the smallest number of responses.
    """
    if budgets is not None and (not budgets or min(budgets) < 1):
        raise DataError(f"budgets {list(budgets)}: give numbers of samples from 1 on, for example 1,2,4,8")
    scored = next((row.scores is not None for row in _read(path, aggregation)), False)
    chosen = names or POOL_RULES | (SCORED_POOL_RULES if scored else {})
    if lacking := [name for name, rule in chosen.items() if rule in evaluate.SCORED_RULES and not scored]:
        raise DataError(f"{path} has no scores: '{lacking[0]}' needs one for every response")
    ks = sorted(set(budgets or _sizes(min((len(r.responses) for r in _read(path, aggregation)), default=1))))
    curve = sorted({*ks, *(2**i for i in range(max(ks).bit_length()) if 2**i <= max(ks))})
    pools = _graded(path, _read(path, aggregation), grade)
    figures = evaluate.pool_figures(pools, curve, list(dict.fromkeys(chosen.values())))
    rows = pool_rows(figures, chosen)
    shown = [row for row in rows if row.budget in ks]
    return to_json(task, len(figures.keys), figures.num_ungraded, shown, [row for row in rows if row.budget not in ks])


def _sizes(smallest: int) -> list[int]:
    return [4**i for i in range(smallest.bit_length()) if 4**i <= smallest]


def _graded(path: Path, rows: Iterator[_Row], grade: Grader) -> Iterator[Pool]:
    """The pools of all rows; bounded memory: about a thousand responses are held at a time."""
    chunk: list[_Row] = []
    for row in rows:
        chunk.append(row)
        if sum(len(r.responses) for r in chunk) >= _CHUNK_RESPONSES:
            yield from _grade_rows(path, chunk, grade)
            chunk = []
    yield from _grade_rows(path, chunk, grade)


def _grade_rows(path: Path, rows: Sequence[_Row], grade: Grader) -> Iterator[Pool]:
    try:
        graded = grade([(row.problem, text) for row in rows for text in row.responses])
    except DataError as error:
        if len(rows) == 1:
            raise DataError(f"{path} line {rows[0].line}: {error}") from error
        for row in rows:  # one of them is to blame: find its line
            yield from _grade_rows(path, [row], grade)
        return
    verdicts = iter(graded)
    for row in rows:
        yield _pool(row, [next(verdicts) for _ in row.responses])


def _pool(row: _Row, graded: Sequence[Graded]) -> Pool:
    return Pool(
        key=row.problem.key,
        correct_N=tuple(g.grade is Grade.CORRECT for g in graded),
        answers_N=tuple(g.answer for g in graded),
        scores_N=row.scores or (None,) * len(graded),
        num_ungraded=sum(g.grade is Grade.UNGRADED for g in graded),
        spend=Spend(samples=len(graded)),  # the tokens behind the responses are not known
    )


# ---------------------------------------------------------------- reading


def _read(path: Path, aggregation: Aggregation) -> Iterator[_Row]:
    rejected: list[Rejected] = []
    first_scored: bool | None = None
    for raw in read_jsonl(path, rejected):
        if rejected:
            break
        try:
            row = _row(raw.line, raw.data, aggregation)
        except _BadRow as error:
            raise DataError(f"{path} line {raw.line}: {error}") from None
        if first_scored is None:
            first_scored = row.scores is not None
        if first_scored != (row.scores is not None):
            has, had = ("has", "have none") if row.scores else ("has no", "have them")
            raise DataError(f"{path} line {row.line}: {has} scores, but the rows before {had}; score all rows or none")
        yield row
    if rejected:
        raise DataError(f"{path} line {rejected[0].line}: {rejected[0].reason}")


def _row(line: int, data: Mapping[str, Any], aggregation: Aggregation) -> _Row:
    responses = data.get("responses")
    if not isinstance(responses, list) or not responses or not all(isinstance(r, str) for r in responses):
        raise _BadRow("'responses' must be a list of at least one text")
    question, answer, name = data.get("question", ""), data.get("answer"), data.get("id", line)
    if isinstance(answer, int | float) and not isinstance(answer, bool):
        answer = repr(answer)
    if not isinstance(answer, str):
        raise _BadRow("'answer' must be a text or a number: without a gold answer nothing can be graded")
    if not isinstance(question, str):
        raise _BadRow("'question' must be a text")
    if not isinstance(name, str | int) or isinstance(name, bool):
        raise _BadRow("'id' must be a text or a whole number")
    scores = None if data.get("scores") is None else _scores(data["scores"], len(responses), aggregation)
    return _Row(line, Problem(str(name), question, answer), tuple(responses), scores)


def _scores(given: Any, num_responses: int, aggregation: Aggregation) -> tuple[float, ...]:
    if not isinstance(given, list):
        raise _BadRow("'scores' must be a list: one number, or one list of step scores, per response")
    if len(given) != num_responses:
        raise _BadRow(f"{len(given)} scores for {num_responses} responses")
    found: list[float] = []
    for number, score in enumerate(given, 1):
        steps = score if isinstance(score, list) else [score]
        if not steps:
            raise _BadRow(f"the scores of response {number} are an empty list")
        if not all(isinstance(s, int | float) and not isinstance(s, bool) and math.isfinite(s) for s in steps):
            raise _BadRow(f"score {number} is not a finite number or a list of them: {str(score)[:40]}")
        found.append(float(_AGGREGATE[aggregation](steps)))
    return tuple(found)
