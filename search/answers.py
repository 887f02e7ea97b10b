"""Which candidate's answer is given: selection rules over finished candidates.

Answer-less and truncated candidates never vote (a defect of several rival systems). Ties go to the answer that was
sampled first, which is a fair draw, since samples are exchangeable.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence

from search.types import Candidate, Grade

Rule = Callable[[Sequence[Candidate]], "int | None"]


def majority(candidates: Sequence[Candidate]) -> int | None:
    """Index of the first candidate with the most frequent answer; None where nobody has an answer."""
    votes = Counter(c.answer for c in candidates if c.complete and c.answer is not None)
    if not votes:
        return None
    winner = max(votes, key=lambda answer: votes[answer])  # Counter keeps first-seen order, so ties go to the first
    return next(i for i, c in enumerate(candidates) if c.complete and c.answer == winner)


def gold(candidates: Sequence[Candidate]) -> int | None:
    """Index of the first candidate that the grader found correct: selection with gold answers, for training data."""
    return next((i for i, c in enumerate(candidates) if c.grade is Grade.CORRECT), None)


def first(candidates: Sequence[Candidate]) -> int | None:
    """Index of the first finished candidate with an answer: greedy's rule."""
    return next((i for i, c in enumerate(candidates) if c.complete and c.answer is not None), None)
