"""Problems and their graders. `load_task(config)` builds the one a configuration names."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from configs.schema import Config
from search.errors import DataError
from search.types import Problem, Task


def load_task(config: Config) -> Task:
    """The task of a loop; file tasks read their source here. Raises DataError."""
    task, splits, seed = config.task, config.splits, config.loop.seed
    # Imports are lazy: `import search.tasks` stays cheap, and a task's parts load only where it is used.
    if task.type == "countdown":
        from search.tasks.countdown import Countdown

        return Countdown(task, splits, seed)
    if task.type == "arithmetic":
        from search.tasks.arithmetic import Arithmetic

        return Arithmetic(task, splits, seed)
    if task.type == "gsm8k":
        from search.tasks.gsm8k import Gsm8k

        return Gsm8k(task, splits, seed)
    if task.type == "math":
        from search.tasks.math import Math

        return Math(task, splits, seed)
    from search.tasks.jsonl import Jsonl

    return Jsonl(task, splits, seed)


def load_problems(task: Task, path: str) -> list[Problem]:
    """The problems of another file for the same grader: guard sets. Generated tasks read rows {"question"}.

    Raises DataError.
    """
    load_extra: Callable[[str], list[Problem]] | None = getattr(task, "load_extra", None)
    if load_extra is not None:
        return load_extra(path)
    from search.tasks.files import Rejected, read_jsonl

    parse: Callable[[str], Problem] = getattr(task, "parse")  # noqa: B009 - every generated task has it
    rejected: list[Rejected] = []
    problems = [parse(str(row.data.get("question", ""))) for row in read_jsonl(Path(path), rejected)]
    if rejected:
        raise DataError(f"{path} line {rejected[0].line}: {rejected[0].reason}")
    return problems
