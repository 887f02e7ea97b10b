r"""Competition mathematics (Hendrycks et al. 2021; the 500 test problems of Lightman et al. 2023).

The answer column is a bare LaTeX answer, or a whole solution with the answer in its last \boxed{}.
"""

from __future__ import annotations

from configs.schema import MathTask, Splits
from search.tasks.few_shot import MATH
from search.tasks.file_task import FileTask


class Math(FileTask):
    """The task; see the module. Raises DataError."""

    def __init__(self, config: MathTask, splits: Splits, seed: int) -> None:
        super().__init__(config, splits, seed, name="math", answer_type="math", examples=MATH)
