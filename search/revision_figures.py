"""What chains of revisions achieve, turn by turn: accuracy, right answers spoilt, wrong ones mended.

P(wrong | the attempt before was right) and P(right | it was wrong) are told apart, as the paper's 38 % asks (Snell et
al. 2024, section 6.1). Errors are clustered by problem: its chains are alike. Only attempts that were shown count as
the attempt before: a truncated one never is.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from search.stats import Estimate, mean_estimate
from search.types import Candidate, Grade, SearchResult


@dataclass(frozen=True, slots=True)
class ChainFigures:
    """Turn t is entry t - 1 of `accuracy`; the step from turn t to the next is entry t - 1 of the `_at` two."""

    accuracy: tuple[Estimate, ...]
    right_to_wrong_at: tuple[Estimate, ...]
    wrong_to_right_at: tuple[Estimate, ...]
    right_to_wrong: Estimate  # of all turns
    wrong_to_right: Estimate
    revised: Estimate  # mean accuracy of the turns after the first: what checkpoints are chosen by

    def metrics(self) -> dict[str, tuple[float, float]]:
        """Name -> (value, standard error). A share of nothing is left out."""
        found = {f"accuracy_turn_{t}": e for t, e in enumerate(self.accuracy, 1)}
        for name in ("right_to_wrong", "wrong_to_right"):
            found[name] = getattr(self, name)
            found |= {f"{name}_turn_{t}": e for t, e in enumerate(getattr(self, f"{name}_at"), 2)}
        found["accuracy_revised"] = self.revised
        return {f"revision/{name}": (e.value, e.se) for name, e in found.items() if e.n and math.isfinite(e.se)}


def chains(result: SearchResult) -> list[list[Candidate]]:
    """The chains of a search by revisions, in the order of their attempts; candidates of no chain are left out."""
    found: dict[int, list[Candidate]] = defaultdict(list)
    for candidate in result.candidates:
        if candidate.chain is not None:
            found[candidate.chain].append(candidate)
    return [found[number] for number in sorted(found)]


def chain_figures(results: Iterable[SearchResult]) -> ChainFigures:
    """The figures of graded chains, whatever their lengths. An answer that was not graded is not right."""
    attempts = [
        a for number, result in enumerate(results) for chain in chains(result) for a in _attempts(number, chain)
    ]
    last = max((a.turn for a in attempts), default=0)
    later = [a for a in attempts if a.turn > 1]
    after_right = [a for a in later if a.before is True]
    after_wrong = [a for a in later if a.before is False]
    turns = range(2, last + 1)
    return ChainFigures(
        accuracy=tuple(_share((a for a in attempts if a.turn == t), True) for t in range(1, last + 1)),
        right_to_wrong_at=tuple(_share((a for a in after_right if a.turn == t), False) for t in turns),
        wrong_to_right_at=tuple(_share((a for a in after_wrong if a.turn == t), True) for t in turns),
        right_to_wrong=_share(after_right, False),
        wrong_to_right=_share(after_wrong, True),
        revised=_share(later, True),
    )


@dataclass(frozen=True, slots=True)
class _Attempt:
    problem: int
    turn: int  # from 1
    right: bool
    before: bool | None  # whether the attempt before was right; None: it was not shown, or nobody knows


def _attempts(problem: int, chain: Sequence[Candidate]) -> Iterator[_Attempt]:
    before = None
    for turn, candidate in enumerate(chain, 1):
        yield _Attempt(problem, turn, candidate.grade is Grade.CORRECT, before)
        known = candidate.complete and candidate.grade in (Grade.CORRECT, Grade.WRONG)
        before = candidate.grade is Grade.CORRECT if known else None


def _share(attempts: Iterable[_Attempt], right: bool) -> Estimate:
    """The share of the attempts that are right, or are not."""
    pairs = [(a.right is right, a.problem) for a in attempts]
    return mean_estimate([hit for hit, _ in pairs], [problem for _, problem in pairs])
