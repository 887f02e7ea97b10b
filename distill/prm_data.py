"""What a verifier's training reads: examples as token ids with the places of their steps, split by question.

A label belongs to a step's last token. An example with an outcome, and an outcome verifier's, has one target for the
whole answer. Left out: several turns in one row (attempts belong to the prompt, see search.verifiers.layout).
"""

from __future__ import annotations

import hashlib
import json
from array import array
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch

from configs.schema import TrainedVerifier
from distill.labels import STEP_DATA, StepExample
from search.errors import DataError, TrainingError
from search.randomness import key64
from search.types import ScoreRequest, Task
from search.verifiers.layout import OwnLayout

IGNORED = -100.0  # the target of what the loss leaves out; the trainer counts the others
MIN_QUESTIONS = 2  # on either side of the split


@dataclass(frozen=True, slots=True)
class Row:
    """One example. `targets` and `weights` have one entry a step and, last, one of the whole answer's outcome."""

    key: str
    ids: array[int]
    starts: tuple[int, ...]
    ends: tuple[int, ...]
    targets: tuple[float, ...]
    weights: tuple[float, ...]
    copies: float  # equal answers that it stands for
    right: float | None  # whether the answer is right, where it is finished and its label says so

    @property
    def num_terms(self) -> int:
        return sum(target != IGNORED for target in self.targets)


@dataclass(frozen=True, slots=True)
class Rows:
    """Encoded examples: what is trained on, what is held out, what was dropped and why."""

    train: list[Row]
    validation: list[Row]  # for early stopping: chosen as those trained on are
    spare: list[Row]  # the other held-out answers: with them for aggregation and calibration
    dropped_too_long: int
    dropped_unlabelled: int
    dropped_wrong: int  # more than `wrong_per_right` allows
    flipped: int
    digest: str  # of the examples, in order


Batch = dict[str, torch.Tensor]


def encode(
    examples: Iterable[StepExample], settings: TrainedVerifier, task: Task, tokenizer: object, *, history: bool
) -> Rows:
    """Encode, turn labels round where `flip_labels` says so, and split by question.

    Of more than `max_examples` answers the newest rounds are kept. The split depends on the question alone, so that a
    verifier that is trained on goes on with the same held-out questions.
    Raises DataError (labels that cannot be used, steps that do not end with the delimiter, too few questions to
    split), TrainingError (nothing to train on).
    """
    kept = _newest(examples, settings.max_examples)
    digest = hashlib.sha256()
    for example in kept:
        _check(example)
        digest.update(json.dumps(example.to_json(), sort_keys=True).encode() + b"\n")
    if settings.kind == "prm":
        _check_delimiter(kept, task.step_delimiter)
    layout = OwnLayout(task, tokenizer, process=settings.kind == "prm", history=history)
    rows: list[Row] = []
    unlabelled = flipped = too_long = 0
    for example in kept:
        example, num_flipped = _flip(example, settings.flip_labels)
        flipped += num_flipped
        row = _row(example, layout, task.step_delimiter, settings)
        if row.num_terms == 0:
            unlabelled += 1
        elif len(row.ids) > settings.max_length:
            too_long += 1
        else:
            rows.append(row)
    if not rows:
        raise TrainingError(
            f"nothing to train a verifier on: of {len(kept)} answers {too_long} are longer than verifier.max_length = "
            f"{settings.max_length} and {unlabelled} have no label"
        )
    train, held_out = split(rows, settings.validation)
    chosen, surplus = balance(train, settings.wrong_per_right)
    validation, spare = balance(held_out, settings.wrong_per_right)
    return Rows(chosen, validation, spare, too_long, unlabelled, len(surplus), flipped, digest.hexdigest())


def _newest(examples: Iterable[StepExample], most: int) -> list[StepExample]:
    """Answers by their rounds, and then what a data set brings, which was capped where it was read."""
    parts: dict[bool, list[StepExample]] = {False: [], True: []}
    for example in examples:
        parts[example.source == STEP_DATA].append(example)
    return [*sorted(parts[False], key=lambda example: -example.round)[:most], *parts[True]]


def balance(rows: Sequence[Row], wrong_per_right: float | None) -> tuple[list[Row], list[Row]]:
    """(rows to use, surplus): of each question all right answers and so many wrong ones for each, but at least one.

    Where few answers are right, the wrong ones that tell nothing new would fill most of the batches.
    """
    if wrong_per_right is None:
        return list(rows), []
    right, wrong = Counter[str](), dict[str, list[int]]()
    for i, row in enumerate(rows):
        if row.right is not None and row.right <= 0.5:
            wrong.setdefault(row.key, []).append(i)
        elif row.right is not None:
            right[row.key] += 1
    surplus: set[int] = set()
    for key, places in wrong.items():
        places.sort(key=lambda i: key64("verifier", "wrong", key, *rows[i].ids))
        surplus.update(places[max(1, round(wrong_per_right * right[key])) :])
    kept = [row for i, row in enumerate(rows) if i not in surplus]
    return kept, [rows[i] for i in sorted(surplus)]


def split(rows: Sequence[Row], share: float) -> tuple[list[Row], list[Row]]:
    """(training rows, held-out rows): all rows of a question on one side, by a hash of its key. Raises DataError."""
    if share == 0:
        return list(rows), []
    held_out = [key64("verifier", "validation", row.key) / 2**64 < share for row in rows]
    train = [row for row, out in zip(rows, held_out, strict=True) if not out]
    validation = [row for row, out in zip(rows, held_out, strict=True) if out]
    for name, part in (("trained on", train), ("held out", validation)):
        if (num := len({row.key for row in part})) < MIN_QUESTIONS:
            raise DataError(
                f"{len({row.key for row in rows})} questions are too few to split: verifier.validation = {share:g} "
                f"leaves {num} {name}, at least {MIN_QUESTIONS} are needed; raise verifier.problems"
            )
    return train, validation


def collate(rows: Sequence[Row]) -> Batch:
    """Right-padded ids [B, T], starts and ends [B, S] (0: no step), labels and weights [B, S + 1]."""
    width, steps = max(len(row.ids) for row in rows), max(len(row.ends) for row in rows)
    ids = torch.zeros(len(rows), width, dtype=torch.long)
    starts = torch.zeros(len(rows), steps, dtype=torch.long)
    ends = torch.zeros(len(rows), steps, dtype=torch.long)
    labels = torch.full((len(rows), steps + 1), IGNORED)
    weights = torch.zeros(len(rows), steps + 1)
    for i, row in enumerate(rows):
        ids[i, : len(row.ids)] = torch.tensor(row.ids)
        starts[i, : len(row.starts)] = torch.tensor(row.starts)
        ends[i, : len(row.ends)] = torch.tensor(row.ends)
        labels[i, : len(row.ends)] = torch.tensor(row.targets[:-1])
        labels[i, -1] = row.targets[-1]
        weights[i, : len(row.ends)] = torch.tensor(row.weights[:-1])
        weights[i, -1] = row.weights[-1]
    return {"input_ids": ids, "starts": starts, "ends": ends, "labels": labels, "weights": weights}


# ---------------------------------------------------------------- one example


def _check(example: StepExample) -> None:
    where = f"problem '{example.problem.key}', source '{example.source}'"
    if not example.steps:
        raise DataError(f"{where}: an answer without any step cannot be trained on")
    if example.labels and len(example.labels) != len(example.steps):
        raise DataError(f"{where}: {len(example.labels)} labels for {len(example.steps)} steps")
    if bad := [label for label in example.labels if label is not None and not 0 <= label <= 1]:  # NaN is none either
        raise DataError(f"{where}: the label {bad[0]} is not in 0..1")
    if not 0 < example.weight < float("inf"):
        raise DataError(f"{where}: the weight {example.weight} is not a positive number")


def _check_delimiter(examples: Sequence[StepExample], delimiter: str) -> None:
    if examples and not any(delimiter in step for example in examples for step in example.steps):
        raise DataError(
            f"no step of {len(examples)} answers holds the task's step delimiter {delimiter!r}: a process "
            "verifier would see whole answers only. Set task.step_delimiter, or verifier.kind = 'orm'"
        )


def _flip(example: StepExample, share: float) -> tuple[StepExample, int]:
    """Labels turned round, y to 1 - y, decided by the text up to the step. Also how many."""
    if share == 0:
        return example, 0
    place = ("verifier", "flip", example.problem.key, *example.attempts)
    flips = [key64(*place, "".join(example.steps[: n + 1])) / 2**64 < share for n in range(len(example.steps))]
    labels = tuple(
        1 - label if flip and label is not None else label for label, flip in zip(example.labels, flips, strict=False)
    )
    outcome = example.outcome if example.outcome is None else example.outcome != flips[-1]
    num = sum(flip and label is not None for label, flip in zip(example.labels, flips, strict=False))
    num += example.outcome is not None and flips[-1]
    return _with(example, labels, outcome), num


def _with(example: StepExample, labels: tuple[float | None, ...], outcome: bool | None) -> StepExample:
    row = example.to_json() | {"labels": list(labels or [None] * len(example.steps)), "outcome": outcome}
    return StepExample.from_json(row)


def _right(example: StepExample, labels: Sequence[float | None]) -> float | None:
    """Whether the finished answer is right, where it is known. A data set may label no step after the first wrong one,
    which makes the whole wrong."""
    last = example.outcome if example.outcome is not None else labels[-1]
    worst = min((label for label in labels if label is not None), default=None)
    if example.source == STEP_DATA and worst is not None and worst <= 0.5:
        return float(worst)
    return None if last is None else float(last)


def _row(example: StepExample, layout: OwnLayout, delimiter: str, settings: TrainedVerifier) -> Row:
    request = ScoreRequest(example.problem, example.steps, example.attempts)
    encoded, finished = layout.encode(request), request.finished(delimiter)
    labels = example.labels or (None,) * len(example.steps)
    right = _right(example, labels) if finished else None
    if settings.kind == "prm":
        steps = [IGNORED if label is None else float(label) for label in labels]
        outcome = IGNORED if example.outcome is None else float(example.outcome)
    else:  # one score, one target
        steps, outcome = [IGNORED if right is None else right], IGNORED
    return Row(
        key=example.problem.key,
        ids=array("l", encoded.ids),
        starts=encoded.starts,
        ends=encoded.ends,
        targets=(*steps, outcome),
        weights=tuple(example.weight * share for share in (*[settings.prefix_weight] * (len(steps) - 1), 1.0, 1.0)),
        copies=example.weight,
        right=right,
    )
