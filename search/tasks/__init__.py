"""Problems and their graders. `load_task(config)` builds the one a configuration names."""

from __future__ import annotations

from configs.schema import Config
from search.types import Task


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
