"""Step labels from a data set, read and frozen with a round's problems; the verifier is trained on them.

A set that cannot be used ends the round at its start, not after the search. What solves a held-out problem, or one too
like it, is left out.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path

from configs.schema import StepLabels
from distill.labels import write_examples
from distill.step_data import read_step_data
from flows.learning import is_held_out
from flows.stages import Context, overlapping, write_json
from search.sets import HELD_OUT, read_problems
from search.tasks.files import Rejected
from search.types import Problem, Task

EXAMPLES, COUNTS = "steps.jsonl", "steps.json"


def freeze(
    context: Context, settings: StepLabels, task: Task, sets: Path
) -> tuple[Sequence[Rejected], dict[str, float]]:
    """Write the examples beside the sets of problems; the rows set aside, and metrics. Raises DataError."""
    files = [*(sets / f"{split}.jsonl" for split in HELD_OUT), *sorted(sets.glob("guard-*.jsonl"))]
    secret = [] if task.generated else [problem for path in files for problem in read_problems(path)]
    found = read_step_data(
        settings,
        task,
        held_out=is_held_out(context.config, task, sets),
        overlapping=functools.partial(_too_like, secret=secret),
        seed=context.config.loop.seed,
    )
    write_examples(found.examples, sets / EXAMPLES)
    write_json(sets / COUNTS, dict(found.counts))
    return found.rejected, {f"data/steps_{name}": float(count) for name, count in found.counts.items()}


def _too_like(problems: Sequence[Problem], secret: Sequence[Problem]) -> set[str]:
    return overlapping(problems, secret) if secret else set()  # generated tasks compare keys
