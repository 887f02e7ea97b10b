"""The user's own questions: a JSONL file or hub data set of question and answer, compared as `answer_type` says.

{"question": "Which metal is liquid at room temperature?", "answer": "mercury"}      answer_type = "text"
"""

from __future__ import annotations

from configs.schema import JsonlTask, Splits
from search.tasks import few_shot
from search.tasks.file_task import FileTask

_EXAMPLES = {"math": few_shot.MATH, "number": few_shot.NUMBER, "choice": few_shot.CHOICE, "text": few_shot.TEXT}


class Jsonl(FileTask):
    """The task; see the module. Raises DataError."""

    def __init__(self, config: JsonlTask, splits: Splits, seed: int) -> None:
        kind = config.answer_type
        super().__init__(config, splits, seed, name="jsonl", answer_type=kind, examples=_EXAMPLES[kind])
