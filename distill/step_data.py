"""Data sets of solutions whose steps people or other models have labelled, as examples for a verifier. No torch.

Three layouts, told by the columns of each row
- {"question": text, "steps": [text, ...], "labels": [label, ...]}, under names of the user's choice;
- PRM800K's own (Lightman et al. 2023, arXiv 2305.20050): question.problem, and label.steps, each with completions of
  which one is followed: the chosen one, else what the labeler wrote instead, else the first that is rated;
- TRL's stepwise supervision: prompt, completions, labels.

A label is a chance of being right, or a rating of -1, 0 (neutral) or 1; neutral steps count as right, as in the paper.
A step without a label (null: those after the first wrong one, mostly) carries no loss. Steps are cut and end as the
search would show them: with the task's delimiter, but for the last one of a finished solution. Finished is what does
not end with the delimiter; of PRM800K's, what reached an answer, or what the whole is known of. A row that cannot be
used is set aside, never mended. Left out: the other completions of a PRM800K step.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from configs.schema import StepLabels
from distill.labels import STEP_DATA, StepExample
from search.errors import DataError
from search.randomness import key64
from search.tasks import files
from search.tasks.files import Rejected, Row
from search.types import Problem, Task

# Why a row is no example of its own; each is counted once.
DROPPED = ("rejected", "bad_problem", "duplicate", "held_out", "overlapping", "over_cap")
COUNTED = ("rows", *DROPPED, "kept", "right", "wrong", "unlabelled", "ratings")


@dataclass(frozen=True, slots=True)
class StepData:
    """The examples, and where every row went.

    `counts["rows"]` is the sum over DROPPED and of "kept". Of the kept ones, "right", "wrong" and "unlabelled" count
    the steps. "ratings": rows whose labels were read as such.
    """

    examples: tuple[StepExample, ...]
    rejected: tuple[Rejected, ...]
    counts: Mapping[str, int]


def read_step_data(
    settings: StepLabels,
    task: Task,
    *,
    held_out: Callable[[str], bool],
    overlapping: Callable[[Sequence[Problem]], set[str]],
    seed: int = 0,
) -> StepData:
    """The examples of a data set, without those of held-out problems, and of questions too like one: `overlapping`
    returns their keys.

    Of more than `max_examples`, every question's first comes before any one's second: the same ones for the same rows
    in whatever order. Equal rows are one example of their summed weight.
    Raises DataError where the set cannot be read, more than `max_bad_rows` are unusable, or nothing is left.
    """
    found, rejected, counts = _examples(settings, task)
    secret = {key for key in {example.problem.key for example in found} if held_out(key)}
    open_ones = {e.problem.key: e.problem for e in found if e.problem.key not in secret}
    alike = overlapping([*open_ones.values()])
    left = [e for e in found if e.problem.key not in secret | alike]
    kept = _capped(left, settings.max_examples, seed)
    counts["held_out"] = sum(e.problem.key in secret for e in found)
    counts["overlapping"] = len(found) - counts["held_out"] - len(left)
    counts["over_cap"], counts["kept"] = len(left) - len(kept), len(kept)
    counts.update(_verdict(label) for example in kept for label in example.labels)
    if not kept:
        told = ", ".join(f"{name} {counts[name]}" for name in DROPPED if counts[name])
        raise DataError(
            f"none of {counts['rows']} rows of {settings.path} is left to train a verifier on ({told}): give another "
            "data set, or leave [verifier.steps] out"
        )
    return StepData(tuple(kept), tuple(rejected), dict(counts))


def _verdict(label: float | None) -> str:
    return "unlabelled" if label is None else "right" if label > 0.5 else "wrong"


def _capped(examples: Sequence[StepExample], most: int, seed: int) -> list[StepExample]:
    """Those kept, sorted by problem and steps."""
    ranks: Counter[str] = Counter()
    ranked: list[tuple[tuple[int, int], StepExample]] = []
    for example in sorted(examples, key=lambda e: key64(seed, "answer", *e.steps, "", *map(str, e.labels))):
        key = example.problem.key
        ranked.append(((ranks[key], key64(seed, "label", key)), example))
        ranks[key] += 1
    ranked.sort(key=lambda entry: entry[0])
    kept = [example for _, example in ranked[:most]]
    return sorted(kept, key=lambda e: (e.problem.key, e.steps, tuple(map(str, e.labels))))


# ---------------------------------------------------------------- rows to examples


@dataclass(frozen=True, slots=True)
class _Solution:
    """A row, whatever its layout; the labels as they were written."""

    row: Row
    question: str
    steps: tuple[str, ...]
    labels: tuple[Any, ...]
    finished: bool | None = None  # None: its last step tells
    rated: bool = False  # the layout says that the labels are ratings


def _examples(settings: StepLabels, task: Task) -> tuple[list[StepExample], list[Rejected], Counter[str]]:
    """Distinct examples in the order of the rows, rows set aside, and the counts so far. Raises DataError."""
    rejected: list[Rejected] = []
    solutions, num_broken = _solutions(settings, rejected)
    ratings = _are_ratings(settings, solutions)
    found: dict[tuple[object, ...], StepExample] = {}
    num_usable = num_rated = 0
    for solution in solutions:
        try:
            example = _example(solution, task, ratings=ratings or solution.rated)
        except DataError as error:
            rejected.append(files.set_aside(settings.path, solution.row, str(error)))
            continue
        num_usable, num_rated = num_usable + 1, num_rated + (ratings or solution.rated)
        known = found.setdefault((example.problem.key, example.steps, example.labels), example)
        if known is not example:
            found[known.problem.key, known.steps, known.labels] = replace(known, weight=known.weight + 1)
    rejected.sort(key=lambda row: row.line)
    _check_share(settings, num_usable + num_broken, rejected)
    counts: Counter[str] = Counter(dict.fromkeys(COUNTED, 0))
    counts["rows"], counts["rejected"] = num_usable + num_broken + len(rejected), len(rejected)
    counts["bad_problem"], counts["duplicate"] = num_broken, num_usable - len(found)
    counts["ratings"] = num_rated
    return list(found.values()), rejected, counts


def _solutions(settings: StepLabels, rejected: list[Rejected]) -> tuple[list[_Solution], int]:
    """The rows that can be read, and the number of those whose problem the labeler found broken."""
    found: list[_Solution | None] = []
    for row in _rows(settings, rejected):
        try:
            found.append(_solution(row, settings))
        except DataError as error:
            rejected.append(files.set_aside(settings.path, row, str(error)))
    return [solution for solution in found if solution is not None], found.count(None)


def _rows(settings: StepLabels, rejected: list[Rejected]) -> Iterator[Row]:
    if files.is_local(settings.path):
        return files.read_jsonl(Path(settings.path), rejected)
    columns = f"'{settings.question_column}', '{settings.steps_column}' and '{settings.labels_column}'"
    way_out = f"set verifier.steps.path to a local .jsonl file with the columns {columns}"
    return files.read_hub(settings.path, settings.hub_config, settings.hub_split, settings.revision, way_out=way_out)


def _check_share(settings: StepLabels, num_usable: int, rejected: Sequence[Rejected]) -> None:
    columns = "verifier.steps.question_column, steps_column and labels_column"
    limits = {"max_bad_rows": settings.max_bad_rows, "section": "verifier.steps", "columns": columns}
    files.check_share(settings.path, num_usable, rejected, what="row", **limits)


def _are_ratings(settings: StepLabels, solutions: Sequence[_Solution]) -> bool:
    """Whether a 0 is neutral. A whole set is read in one way: most of its rows hold no -1 themselves."""
    if settings.scale != "auto":
        return settings.scale == "ratings"
    given = [label for s in solutions if not s.rated for label in s.labels if label is not None]
    return -1 in given and not any(isinstance(label, bool) or 0 < label < 1 for label in given)


def _example(solution: _Solution, task: Task, *, ratings: bool) -> StepExample:
    """Raises DataError for a label that means nothing, and a question or step that the task cannot use."""
    labels = [_rated(label) if ratings else _share(label) for label in solution.labels]
    if all(label is None for label in labels):
        raise DataError("no step has a label")
    problem = task.parse(solution.question)
    steps, cut = _cut(solution, labels, task.step_delimiter)
    return StepExample(problem, steps, labels=cut, source=STEP_DATA)


def _rated(label: float | None) -> float | None:
    if label is None:
        return None
    if isinstance(label, bool) or label not in (-1, 0, 1):
        raise DataError(f"the rating {label} is none of -1, 0 and 1")
    return float(label >= 0)


def _share(label: float | None) -> float | None:
    if label is None:
        return None
    if not 0 <= label <= 1:
        raise DataError(f"the label {label} is not in 0..1")
    return float(label)


def _cut(
    solution: _Solution, labels: Sequence[float | None], delimiter: str
) -> tuple[tuple[str, ...], tuple[float | None, ...]]:
    """The steps as search would show them, and a label for each. Of a step with the delimiter in its middle the last
    part has the label: whether the parts before it were right is not known."""
    steps: list[str] = []
    cut: list[float | None] = []
    for number, (text, label) in enumerate(zip(solution.steps, labels, strict=True), start=1):
        parts = [part.strip() for part in text.split(delimiter) if part.strip()]
        if not parts:
            raise DataError(f"step {number} holds nothing but the step delimiter {delimiter!r}")
        steps += [part + delimiter for part in parts]
        cut += [*[None] * (len(parts) - 1), label]
    finished = solution.finished if solution.finished is not None else not solution.steps[-1].endswith(delimiter)
    if finished:
        steps[-1] = steps[-1].removesuffix(delimiter)
    return tuple(steps), tuple(cut)


# ---------------------------------------------------------------- layouts


def _solution(row: Row, settings: StepLabels) -> _Solution | None:
    """None: the labeler found the problem itself broken. Raises DataError for a row that cannot be read."""
    data = row.data
    if isinstance(data.get("question"), Mapping) and isinstance(data.get("label"), Mapping):
        return _of_prm800k(row)
    question, steps, labels = settings.question_column, settings.steps_column, settings.labels_column
    if steps not in data and "completions" in data:
        question, steps, labels = "prompt", "completions", "labels"
    return _checked(row, data.get(question), data.get(steps), data.get(labels), (question, steps, labels))


def _of_prm800k(row: Row) -> _Solution | None:
    question, label = row.data["question"], row.data["label"]
    if label.get("finish_reason") == "bad_problem":
        return None
    followed: list[tuple[object, object]] = []
    for step in _objects(label.get("steps"), "label.steps"):
        completion = _followed(step)
        if completion is None:  # the labeler gave up before there was any
            break
        followed.append(completion)
    texts, ratings = [text for text, _ in followed], [rating for _, rating in followed]
    whole = question.get("pre_generated_steps")
    known = isinstance(whole, list) and whole[: len(texts)] == texts
    if known:  # labelled up to the first error; the rest is told
        texts, ratings = whole, [*ratings, *[None] * (len(whole) - len(texts))]
    found = _checked(row, question.get("problem"), texts, ratings, ("question.problem", "label.steps", "rating"))
    return replace(found, finished=known or label.get("finish_reason") == "solution", rated=True)


def _followed(step: Mapping[str, Any]) -> tuple[object, object] | None:
    """(text, rating) of the completion with which the solution went on; None: there is none."""
    completions = _objects(step.get("completions") or [], "completions")
    chosen, human = step.get("chosen_completion"), step.get("human_completion")
    if chosen is not None:
        if not isinstance(chosen, int) or not 0 <= chosen < len(completions):
            raise DataError(f"chosen_completion {chosen} is none of {len(completions)} completions")
        return completions[chosen].get("text"), completions[chosen].get("rating")
    if human:  # what the labeler wrote where all completions were wrong
        return (human.get("text") if isinstance(human, Mapping) else human), 1
    rated = [completion for completion in completions if completion.get("rating") is not None] or completions
    return (rated[0].get("text"), rated[0].get("rating")) if rated else None


def _objects(value: object, name: str) -> list[Mapping[str, Any]]:
    if not isinstance(value, list) or not all(isinstance(one, Mapping) for one in value):
        raise DataError(f"'{name}' is no list of objects")
    return value


def _checked(row: Row, question: object, steps: object, labels: object, names: tuple[str, str, str]) -> _Solution:
    """Raises DataError for what has not the shape of a labelled solution."""
    if not isinstance(question, str) or not question.strip():
        raise DataError(f"no '{names[0]}' (text); the row has: {', '.join(map(str, row.data))[:100]}")
    if len(question) > files.MAX_QUESTION_CHARS:
        raise DataError(f"'{names[0]}' is longer than {files.MAX_QUESTION_CHARS} characters")
    if not isinstance(steps, list):
        raise DataError(f"no '{names[1]}' (a list of texts); the row has: {', '.join(map(str, row.data))[:100]}")
    if not steps or not all(isinstance(step, str) and step.strip() for step in steps):
        raise DataError(f"'{names[1]}' is empty, or has an entry that is empty or no text")
    if not all(map(files.is_text, (question, *steps))):
        raise DataError("question or steps hold characters that are no text (NUL or half a surrogate pair)")
    if not isinstance(labels, list):
        raise DataError(f"no '{names[2]}' (a list of labels); the row has: {', '.join(map(str, row.data))[:100]}")
    if len(labels) != len(steps):
        raise DataError(f"{len(labels)} labels for {len(steps)} steps")
    if bad := [label for label in labels if label is not None and not isinstance(label, int | float)]:
        raise DataError(f"the label {str(bad[0])[:40]!r} is no number, true, false or null")
    return _Solution(row, question, tuple(steps), tuple(labels))
