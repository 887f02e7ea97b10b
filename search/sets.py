"""The problems of one round, drawn once at its start and written down, so that a file that grows moves nothing.

Held-out sets of a file are frozen in round 0: rows that are appended later join the training split. Generated tasks
draw a fresh gate set each round. The training slice of a round takes problems never searched before; where those are
used up it recycles, unsolved first.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from configs.schema import Config
from search.errors import DataError
from search.randomness import key64
from search.tasks.splits import Exhausted
from search.types import SPLITS, Problem, Split, Task

HELD_OUT: tuple[Split, ...] = ("fit", "validation", "gate", "test")
Overlapping = Callable[[Sequence[Problem], Sequence[Problem]], set[str]]  # (training, held out) -> training keys


@dataclass(frozen=True, slots=True)
class Outcome:
    """What searching a problem has given so far, all rounds together."""

    correct: int
    total: int


def write_problems(problems: Iterable[Problem], path: Path) -> None:
    """One JSON line a problem."""
    with path.open("w", encoding="utf-8") as file:
        for p in problems:
            row = {"key": p.key, "question": p.question, "answer": p.answer, "meta": dict(p.meta)}
            file.write(json.dumps(row, ensure_ascii=False, separators=(",", ":")) + "\n")


def read_problems(path: Path) -> list[Problem]:
    """The problems of a file written by `write_problems`."""
    with path.open(encoding="utf-8") as lines:
        rows = map(json.loads, lines)
        return [Problem(row["key"], row["question"], row["answer"], row["meta"]) for row in rows]


def read_outcomes(paths: Iterable[Path]) -> dict[str, Outcome]:
    """The outcomes of earlier searches, added up over `outcomes.json` files ({key: [correct, total]})."""
    totals: dict[str, Outcome] = {}
    for path in paths:
        for key, (correct, total) in json.loads(path.read_text(encoding="utf-8")).items():
            before = totals.get(key, Outcome(0, 0))
            totals[key] = Outcome(before.correct + correct, before.total + total)
    return totals


def draw_sets(
    task: Task,
    config: Config,
    round_number: int,
    frozen: Path | None,
    searched: Mapping[str, Outcome],
    overlapping: Overlapping = lambda training, held_out: set(),
    guards: Sequence[Problem] = (),
) -> dict[str, list[Problem]]:
    """The sets of a round: "search" (empty in round 0), "fit", "validation", "gate", "test"; and "labels", where the
    bundle has parts that learn from fresh answers: training problems to draw them on.

    `frozen` is round 0's folder of sets, None in round 0 itself. `overlapping` says which training problems of a file
    are too like a held-out one; they are never searched, and come as the set "overlapping". Nor are the problems of
    guard sets ever searched. Raises DataError where a held-out set comes out empty, or a generated one too small.
    """
    if task.generated:
        sets = _draw_generated(task, config, round_number, frozen, searched, guards)
    else:
        sets = _take_from_file(task, config, round_number, frozen, searched, overlapping, guards)
    if not sets["test"] or not sets["gate"] or not sets["fit"] or not sets["validation"]:
        sizes = ", ".join(f"{name} {len(problems)}" for name, problems in sets.items())
        raise DataError(f"a held-out set is empty ({sizes}): give more problems, or larger shares in [splits]")
    return sets


def _draw_generated(
    task: Task,
    config: Config,
    round_number: int,
    frozen: Path | None,
    searched: Mapping[str, Outcome],
    guards: Sequence[Problem],
) -> dict[str, list[Problem]]:
    sizes: dict[Split, int] = {
        "fit": config.difficulty.problems,
        "validation": max(200, config.difficulty.problems // 3),
        "test": config.evaluate.test_problems,
    }
    sets = {name: _first_drawn(task, name, num, frozen) for name, num in sizes.items()}
    sets |= {"gate": task.draw("gate", config.gate.problems, stream=f"gate/{round_number}"), "search": []}
    guarded = {p.key for p in guards}
    if round_number:
        sets["search"] = _generated_slice(task, config, f"search/{round_number}", searched, guarded)
    if num := num_labelled(config):
        try:
            sets["labels"] = task.draw("train", num, stream=f"labels/{round_number}", exclude=frozenset(guarded))
        except Exhausted as used_up:
            sets["labels"] = list(used_up.found)
    return sets


def num_labelled(config: Config) -> int:
    """Training problems on which a round draws fresh answers of its winner, for verifier and reviser."""
    verifier = config.verifier.problems if config.verifier.type == "trained" and config.answer_labels else 0
    return max(verifier, config.revision.problems if config.revision.enabled else 0)


def _generated_slice(
    task: Task, config: Config, stream: str, searched: Mapping[str, Outcome], guarded: set[str]
) -> list[Problem]:
    """New problems as long as there are any; with the last of them, those searched before."""
    num = config.search.problems
    try:
        return task.draw("train", num, stream=stream, exclude=frozenset(guarded.union(searched)))
    except Exhausted as used_up:
        old = [key for key in searched if key not in guarded]
        return take_slice([*used_up.found, *_shuffled(config, "train", list(_posed(task, old)))], num, searched)


def _posed(task: Task, keys: Iterable[str]) -> Iterator[Problem]:
    """The problems of these keys that the task still poses: its ranges may have been narrowed since."""
    for key in keys:
        try:
            problem = task.parse(key)
        except DataError:
            continue
        yield problem


def _first_drawn(task: Task, split: Split, num: int, frozen: Path | None) -> list[Problem]:
    """A set that stays the same: from round 0's file where it holds as many problems as are asked for."""
    if frozen is not None:
        problems = read_problems(frozen / f"{split}.jsonl")
        if len(problems) == num:
            return problems
    return task.draw(split, num, stream=split)


def _take_from_file(
    task: Task,
    config: Config,
    round_number: int,
    frozen: Path | None,
    searched: Mapping[str, Outcome],
    overlapping: Overlapping,
    guards: Sequence[Problem],
) -> dict[str, list[Problem]]:
    limits = {"fit": config.difficulty.problems, "gate": config.gate.problems, "test": config.evaluate.test_problems}
    if frozen is None:
        held_out = {split: task.problems(split) for split in HELD_OUT}
        sets = {split: _shuffled(config, split, held_out[split])[: limits.get(split)] for split in HELD_OUT}
        sets |= {"search": []}
        if num := num_labelled(config):
            clean, _ = without_alike(task.problems("train"), sets, guards, overlapping)
            sets["labels"] = _shuffled(config, "labels/0", clean)[:num]
        return sets
    held_out = set(json.loads((frozen / "held_out.json").read_text(encoding="utf-8")))
    # A test file of its own stays one: what is appended to it is never trained on.
    sources: list[Split] = [
        split for split in SPLITS if split != "test" or getattr(config.task, "test_path", None) is None
    ]
    everything = [problem for split in sources for problem in task.problems(split)]
    training = [problem for problem in everything if problem.key not in held_out]
    sets = {split: read_problems(frozen / f"{split}.jsonl") for split in HELD_OUT}
    clean, alike = without_alike(training, sets, guards, overlapping)
    chosen = take_slice(_shuffled(config, "train", clean), config.search.problems, searched)
    sets |= {"search": chosen, "overlapping": alike}
    if num := num_labelled(config):
        sets["labels"] = _shuffled(config, f"labels/{round_number}", clean)[:num]
    return sets


def without_alike(
    training: Sequence[Problem],
    sets: Mapping[str, Sequence[Problem]],
    guards: Sequence[Problem],
    overlapping: Overlapping,
) -> tuple[list[Problem], list[Problem]]:
    """The training problems that may be searched, and those that may not: a guard set's own, and what is too like one
    of a guard set or a held-out set."""
    alike = overlapping(training, [*guards, *(problem for split in HELD_OUT for problem in sets[split])])
    alike |= {problem.key for problem in guards}
    return [p for p in training if p.key not in alike], [p for p in training if p.key in alike]


def _shuffled(config: Config, name: str, problems: Sequence[Problem]) -> list[Problem]:
    """A fixed order in which a new problem finds its place without moving the others against each other."""
    return sorted(problems, key=lambda p: key64(config.loop.seed, "order", name, p.key))


def take_slice(training: Sequence[Problem], num: int, searched: Mapping[str, Outcome]) -> list[Problem]:
    """The next `num` problems: never searched ones first, then unsolved, then the least often solved.

    Empty where every problem was searched and solved: there is nothing left to learn from.
    """

    def rank(problem: Problem) -> tuple[bool, float]:
        outcome = searched.get(problem.key)
        return outcome is not None, outcome.correct / max(outcome.total, 1) if outcome else 0.0

    if all((outcome := searched.get(p.key)) is not None and outcome.correct > 0 for p in training):
        return []
    return sorted(training, key=rank)[:num]


def write_sets(task: Task, sets: Mapping[str, Sequence[Problem]], frozen: Path | None, out: Path) -> dict[str, Any]:
    """Write the sets, and what identifies them; returns the counts. A file task's held-out keys are frozen here."""
    for name, problems in sets.items():
        write_problems(problems, out / f"{name}.jsonl")
    if not task.generated:
        if frozen is None:
            keys = sorted(p.key for split in HELD_OUT for p in task.problems(split))
        else:
            keys = json.loads((frozen / "held_out.json").read_text(encoding="utf-8"))
        (out / "held_out.json").write_text(json.dumps(keys) + "\n", encoding="utf-8")
    counts = {name: len(problems) for name, problems in sets.items()}
    (out / "counts.json").write_text(json.dumps(counts, sort_keys=True) + "\n", encoding="utf-8")
    return counts


def held_out_keys(sets: Path) -> set[str]:
    """Keys that no training row may have: the round's held-out and guard sets, and all a file task ever held out."""
    files = [*(sets / f"{split}.jsonl" for split in HELD_OUT), *sorted(sets.glob("guard-*.jsonl"))]
    keys = {problem.key for path in files for problem in read_problems(path)}
    frozen = sets / "held_out.json"
    return keys | set(json.loads(frozen.read_text(encoding="utf-8"))) if frozen.exists() else keys
