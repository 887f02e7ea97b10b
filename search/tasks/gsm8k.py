"""Grade-school word problems (Cobbe et al. 2021): the answer column ends in "#### 72".

A problem, in our words: question "A crate holds 12 jars ... how many?", answer "2 * 12 = <<2*12=24>>24\\n#### 24".
Answers are numbers; units, currency and thousands separators do not matter.
"""

from __future__ import annotations

from configs.schema import Gsm8kTask, Splits
from search.tasks.few_shot import NUMBER
from search.tasks.file_task import FileTask


class Gsm8k(FileTask):
    """The task; see the module. Raises DataError."""

    def __init__(self, config: Gsm8kTask, splits: Splits, seed: int) -> None:
        super().__init__(config, splits, seed, name="gsm8k", answer_type="number", examples=NUMBER)
