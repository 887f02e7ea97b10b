"""What a verifier is trained on: answers cut into steps, with a label for each step or one outcome. No torch."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from search.errors import CorruptArtefact
from search.types import Problem


@dataclass(frozen=True, slots=True)
class StepExample:
    """One answer, cut into steps; a line of `examples.jsonl`.

    `labels` has one label a step, in [0, 1]; None: no loss there. `outcome` is set where only the whole answer has a
    label (multiple-instance loss). `weight` is the number of equal answers that it stands for.
    Example: StepExample(problem, ("3*5=15\\n", "15+7=22"), labels=(0.75, 1.0), source="tree", round=1)
    """

    problem: Problem
    steps: tuple[str, ...]
    attempts: tuple[str, ...] = ()
    labels: tuple[float | None, ...] = ()
    outcome: bool | None = None
    source: str = ""
    round: int = 0
    weight: float = 1.0

    def to_json(self) -> dict[str, Any]:
        problem = {"key": self.problem.key, "question": self.problem.question, "gold": self.problem.answer}
        row: dict[str, Any] = problem | {"meta": dict(self.problem.meta), "steps": list(self.steps)}
        if self.attempts:
            row["attempts"] = list(self.attempts)
        row |= {"labels": list(self.labels), "outcome": self.outcome, "source": self.source, "round": self.round}
        return row | {"weight": self.weight}

    @classmethod
    def from_json(cls, row: Mapping[str, Any]) -> StepExample:
        """Raises ValueError for labels outside [0, 1] or not one a step."""
        example = cls(
            problem=Problem(row["key"], row["question"], row["gold"], row["meta"]),
            steps=tuple(row["steps"]),
            attempts=tuple(row.get("attempts", ())),
            labels=tuple(row["labels"]),
            outcome=row["outcome"],
            source=row["source"],
            round=row["round"],
            weight=row.get("weight", 1.0),
        )
        if len(example.labels) != len(example.steps):
            raise ValueError(f"{len(example.labels)} labels for {len(example.steps)} steps")
        if bad := [label for label in example.labels if label is not None and not 0 <= label <= 1]:
            raise ValueError(f"the label {bad[0]} is not in 0..1")
        return example


def write_examples(examples: Iterable[StepExample], path: Path) -> None:
    """One JSON line an example; the same bytes for the same examples."""
    with path.open("w", encoding="utf-8") as file:
        for example in examples:
            file.write(json.dumps(example.to_json(), ensure_ascii=False, separators=(",", ":")) + "\n")


def read_examples(path: Path) -> Iterator[StepExample]:
    """The examples of a file, one at a time. Raises CorruptArtefact naming the line."""
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            try:
                yield StepExample.from_json(json.loads(line))
            except (ValueError, KeyError, TypeError) as error:
                raise CorruptArtefact(f"{path}, line {number} is not a training example: {error!r}") from error
