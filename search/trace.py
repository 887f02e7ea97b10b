"""The tree of one search, recorded as it grows: every step generated, kept or not, with its score.

The metered handles write it; strategies know nothing of it. A place in the tree is (random stream, number of ids): a
fork gives the same place a second name.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from search.types import Candidate


@dataclass(slots=True)
class Node:
    """One generated step, whole answer or rollout step. `parent` is None for those that start at the prompt."""

    id: int
    parent: int | None
    kind: str  # step | answer | lookahead
    text: str
    tokens: int
    finish: str
    chain: int | None = None  # which independent chain or subtree it grew in, where the strategy has several
    shown: tuple[int, ...] = ()  # of one that starts at the prompt: the attempts in it, oldest first (revisions)
    score: float | None = None  # of a rollout's last step: what the step it began at is judged by
    answer: str | None = None
    grade: str | None = None  # correct | wrong | ungraded; None: nothing to grade against, or thrown away
    kept: bool = False  # on the way to an answer that was returned
    selected: bool = False  # on the way to the answer that was given


@dataclass(slots=True)
class Trace:
    """Nodes in the order they were generated."""

    nodes: list[Node] = field(default_factory=list[Node])
    _places: dict[tuple[int, int], int] = field(default_factory=dict[tuple[int, int], int])
    _shown: dict[int, tuple[int, ...]] = field(default_factory=dict[int, tuple[int, ...]])  # by random stream

    def start(self, candidates: Iterable[Candidate], attempts: Sequence[Candidate]) -> None:
        """The candidates begin with these attempts in their prompts."""
        places = [self._places.get((attempt.key, len(attempt.ids))) for attempt in attempts]
        shown = tuple(place for place in places if place is not None)
        self._shown |= {candidate.key: shown for candidate in candidates}

    def grow(self, before: Candidate, after: Candidate, kind: str) -> None:
        """`after` continues `before`."""
        parent = self._places.get((before.key, len(before.ids)))
        text = after.text[len(before.text) :]
        node = Node(len(self.nodes), parent, kind, text, len(after.ids) - len(before.ids), after.finish.value)
        node.chain = after.chain
        node.shown = () if parent is not None else self._shown.get(after.key, ())
        self.nodes.append(node)
        self._places[after.key, len(after.ids)] = node.id

    def fork(self, candidate: Candidate, child: Candidate) -> None:
        place = self._places.get((candidate.key, len(candidate.ids)))
        if place is not None:
            self._places[child.key, len(child.ids)] = place

    def score(self, candidate: Candidate) -> None:
        place = self._places.get((candidate.key, len(candidate.ids)))
        if place is not None:
            self.nodes[place].score = candidate.score

    def finish(self, candidates: Iterable[tuple[Candidate, Candidate]], selected: int | None) -> None:
        """Mark the ways to the answers: pairs of a candidate as searched and as graded."""
        for index, (searched, graded) in enumerate(candidates):
            place = self._places.get((searched.key, len(searched.ids)))
            if place is None:
                continue
            leaf = self.nodes[place]
            leaf.answer = graded.answer
            leaf.grade = graded.grade.value if graded.grade else None
            while place is not None:
                node = self.nodes[place]
                node.kept = True
                node.selected = node.selected or index == selected
                place = node.parent

    def to_json(self) -> list[dict[str, Any]]:
        return [{name: getattr(node, name) for name in Node.__slots__} for node in self.nodes]
