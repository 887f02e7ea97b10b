"""The tree of one search, recorded as it grows: every step generated, kept or not, with its score.

The metered handles write it; strategies know nothing of it. A place in the tree is (random stream, number of ids): a
fork gives the same place a second name.
"""

from __future__ import annotations

from collections.abc import Iterable
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
    score: float | None = None
    answer: str | None = None
    correct: bool | None = None
    kept: bool = False  # on the way to an answer that was returned
    selected: bool = False  # on the way to the answer that was given


@dataclass(slots=True)
class Trace:
    """Nodes in the order they were generated."""

    nodes: list[Node] = field(default_factory=list[Node])
    _places: dict[tuple[int, int], int] = field(default_factory=dict[tuple[int, int], int])

    def grow(self, before: Candidate, after: Candidate, kind: str) -> None:
        """`after` continues `before`."""
        parent = self._places.get((before.key, len(before.ids)))
        text = after.text[len(before.text) :]
        node = Node(len(self.nodes), parent, kind, text, len(after.ids) - len(before.ids), after.finish.value)
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
            leaf.correct = None if graded.grade is None else graded.grade.value == "correct"
            while place is not None:
                node = self.nodes[place]
                node.kept = True
                node.selected = node.selected or index == selected
                place = node.parent

    def to_json(self) -> list[dict[str, Any]]:
        return [{name: getattr(node, name) for name in Node.__slots__} for node in self.nodes]
