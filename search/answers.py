"""Which candidate's answer is given: selection rules over finished candidates.

Answer-less, truncated and failed candidates never vote (a defect of several rival systems), and equal answers are
equal canonical strings. Ties go to the answer that was sampled first, which is a fair draw, since samples are
exchangeable.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence

from search.types import Candidate, Grade

Rule = Callable[[Sequence[Candidate]], "int | None"]


def voters(candidates: Sequence[Candidate]) -> list[int]:
    """Indices of those who may vote: finished, with an answer."""
    return [i for i, c in enumerate(candidates) if c.complete and c.answer is not None]


def first(candidates: Sequence[Candidate]) -> int | None:
    """Index of the first finished candidate with an answer: greedy's rule."""
    return next(iter(voters(candidates)), None)


def gold(candidates: Sequence[Candidate]) -> int | None:
    """Index of the first candidate that the grader found correct: selection with gold answers, for training data."""
    return next((i for i, c in enumerate(candidates) if c.grade is Grade.CORRECT), None)


def majority(candidates: Sequence[Candidate]) -> int | None:
    """Index of the candidate with the most frequent answer, its best-scored or first one; None where nobody has one."""
    return _heaviest(candidates, voters(candidates), lambda c: 1.0)


def highest(candidates: Sequence[Candidate]) -> int | None:
    """Index of the candidate with the highest score (best-of-N)."""
    return max(_scored(candidates), key=lambda i: candidates[i].score or 0.0, default=None)


def weighted(candidates: Sequence[Candidate], *, power: float = 1.0) -> int | None:
    """The answer with the largest sum of score^power; of its candidates the one with the highest score.

    Best-of-N weighted (Snell et al. section 5.1); power > 1 sharpens, towards the highest score alone.
    """
    return _heaviest(candidates, _scored(candidates), lambda c: max(c.score or 0.0, 0.0) ** power)


def hierarchical(candidates: Sequence[Candidate]) -> int | None:
    """Best-of-N weighted in each chain, then among the winners (Snell et al., revision model selection)."""
    chains: dict[int | None, list[int]] = defaultdict(list)
    for i in _scored(candidates):
        chains[candidates[i].chain].append(i)
    winners = [_heaviest(candidates, chain, lambda c: c.score or 0.0) for chain in chains.values()]
    return _heaviest(candidates, [i for i in winners if i is not None], lambda c: c.score or 0.0)


def _scored(candidates: Sequence[Candidate]) -> list[int]:
    return [i for i in voters(candidates) if candidates[i].score is not None]


def _heaviest(candidates: Sequence[Candidate], among: Sequence[int], weigh: Callable[[Candidate], float]) -> int | None:
    weights: dict[str | None, float] = defaultdict(float)  # in the order of sampling: max takes the first of equals
    for i in among:
        weights[candidates[i].answer] += weigh(candidates[i])
    if not weights:
        return None
    winner = max(weights, key=lambda answer: weights[answer])
    return max((i for i in among if candidates[i].answer == winner), key=lambda i: candidates[i].score or 0.0)
