"""The tree of a search as it is shown: steps that say the same after the same beginning are one, with a count.

`search.trace` records every draw; here they become sections (subtrees, chains, turns of revisions) of branches, best
first. The terminal (`flows.trace_text`) and the page (`flows.trace_html`) draw these.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from flows.show import harmless
from search.trace import Node

Status = Literal["chosen", "finished", "kept", "pruned", "cut off", "failed"]
MEANINGS: dict[Status, str] = {
    "chosen": "on the way to the answer given",
    "finished": "ended, but not given",
    "kept": "led to an answer",
    "pruned": "drawn, and given up",
    "cut off": "no room left in the token limit or the context",
    "failed": "the engine returned nothing",
}
NESTED = 10  # a search of more steps in a row shows those without a fork below each other, not indented
DEEPEST = 60  # forks below each other that are drawn; further down only the best way goes on


@dataclass(frozen=True, slots=True)
class Step:
    """One step, or whole answer, as often as it was drawn after the same beginning."""

    text: str
    tokens: int
    count: int
    num_kept: int  # draws of it that led to an answer
    status: Status
    score: float | None = None  # its own; of the end of its rollout where it was judged by that
    answer: str | None = None
    grade: str | None = None
    ended: bool = False  # the policy ended its answer here
    whole: bool = False  # an answer drawn at once, not step by step
    rollout: str = ""  # greedy text that it was judged by, thrown away
    label: str = ""  # "attempt 2"
    num_hidden: int = 0  # draws beside it that are not shown (see DEEPEST)


@dataclass(frozen=True, slots=True)
class Branch:
    """One step, then how it went on. In deep searches: steps in a row, each the only continuation of the last."""

    steps: tuple[Step, ...]
    children: tuple[Branch, ...] = ()

    @property
    def dead(self) -> bool:
        """Nothing came of it."""
        return self.steps[0].status == "pruned"


@dataclass(frozen=True, slots=True)
class Section:
    """Trees that belong together. `title` is empty where there is only one section."""

    title: str
    branches: tuple[Branch, ...]


def sections(nodes: Sequence[Node], strategy: str) -> list[Section]:
    """The whole search. `strategy` is the name of what was run: it says what the parts are called."""
    tree = _Tree(nodes)
    if any(node.shown for node in tree.roots):
        return _revised(tree)
    chains: dict[int | None, list[Node]] = defaultdict(list)
    for node in tree.roots:
        chains[node.chain].append(node)
    if len(chains) < 2:
        return [Section("", tree.branches(tree.roots))] if tree.roots else []
    name = "subtree" if strategy.startswith("dvts") else "chain"
    return [Section(f"{name} {i}", tree.branches(roots)) for i, roots in enumerate(chains.values(), start=1)]


def all_steps(parts: Iterable[Section]) -> Iterator[Step]:
    """Every step once."""
    waiting = [branch for part in parts for branch in part.branches]
    while waiting:
        branch = waiting.pop()
        yield from branch.steps
        waiting += branch.children


def chosen_way(parts: Sequence[Section]) -> list[Step]:
    """The steps of the answer given, in order; none where none was given."""
    way: list[Step] = []
    branches = [b for part in parts for b in part.branches]
    while branches := [b for b in branches if b.steps[0].status == "chosen"]:
        way += [step for step in branches[0].steps if step.status == "chosen"]
        branches = list(branches[0].children)
    return way


class _Tree:
    """Nodes by what they continue."""

    def __init__(self, nodes: Sequence[Node]):
        self.nodes = nodes
        self.next: dict[int, list[Node]] = defaultdict(list)
        self.rollouts: dict[int, Node] = {}
        self.roots: list[Node] = []
        for node in nodes:
            if node.parent is None:
                self.roots.append(node)
            elif node.kind == "lookahead":
                self.rollouts.setdefault(node.parent, node)
            else:
                self.next[node.parent].append(node)
        self.deep = self._depth() > NESTED

    def _depth(self) -> int:
        """Steps of the longest way; a node's parent was drawn before it."""
        depths: list[int] = []
        for node in self.nodes:
            depths.append(1 if node.parent is None else depths[node.parent] + (node.kind != "lookahead"))
        return max(depths, default=0)

    def branches(self, nodes: Sequence[Node], depth: int = 0, label: str = "") -> tuple[Branch, ...]:
        """What is drawn for these draws from one place, best first."""
        groups = self._groups(nodes)
        return tuple(self._branch(group, depth, label) for group in groups)

    def _groups(self, nodes: Sequence[Node]) -> list[list[Node]]:
        """Draws that say the same, together; the chosen first, then by whether they led on, and score."""
        same: dict[tuple[str, str, str], list[Node]] = defaultdict(list)
        for node in nodes:
            same[node.kind, node.finish, node.text].append(node)
        return sorted(same.values(), key=self._rank)

    def _rank(self, group: Sequence[Node]) -> tuple[bool, bool, float, int]:
        score = self._score(group[0])
        return (
            not any(node.selected for node in group),
            not any(node.kept for node in group),
            0.0 if score is None else -score,
            -len(group),
        )

    def _branch(self, group: list[Node], depth: int, label: str) -> Branch:
        steps = [replace(self._step(group), label=label)]
        while groups := self._groups([child for node in group for child in self.next[node.id]]):
            if depth < DEEPEST and (len(groups) > 1 or not self.deep):
                return Branch(tuple(steps), tuple(self._branch(g, depth + 1, "") for g in groups))
            group = groups[0]
            steps.append(replace(self._step(group), num_hidden=sum(map(len, groups[1:]))))
        return Branch(tuple(steps))

    def _step(self, group: Sequence[Node]) -> Step:
        kept = [node for node in group if node.kept]
        ended = next((node for node in kept if node.finish == "eos"), None)
        return Step(
            text=harmless(group[0].text),
            tokens=sum(node.tokens for node in group),
            count=len(group),
            num_kept=len(kept),
            status=_status(group),
            score=self._score(group[0]),
            answer=harmless(ended.answer) if ended and ended.answer is not None else None,
            grade=ended.grade if ended else None,
            ended=ended is not None,
            whole=group[0].kind == "answer",
            rollout=harmless("".join(node.text for node in self._rollout(group[0]))),
        )

    def _rollout(self, node: Node) -> list[Node]:
        found: list[Node] = []
        while (following := self.rollouts.get(node.id)) is not None:
            found.append(following)
            node = following
        return found

    def _score(self, node: Node) -> float | None:
        if node.score is not None:
            return node.score
        return next((n.score for n in reversed(self._rollout(node)) if n.score is not None), None)

    def root(self, id: int) -> Node:
        node = self.nodes[id]
        while node.parent is not None:
            node = self.nodes[node.parent]
        return node


def _status(group: Sequence[Node]) -> Status:
    ends: dict[str, Status] = {"length": "cut off", "overflow": "cut off", "error": "failed", "cancelled": "failed"}
    if any(node.selected for node in group):
        return "chosen"
    if group[0].finish in ends:
        return ends[group[0].finish]
    if any(node.kept for node in group):
        return "finished" if group[0].finish == "eos" else "kept"
    return "pruned"


# ---------------------------------------------------------------- revisions


def _revised(tree: _Tree) -> list[Section]:
    """Attempts in the order of their chains; what was searched step by step as one tree a turn."""
    later: dict[int, list[Node]] = defaultdict(list)  # by the answer that the chain began with
    for node in tree.roots:
        if node.shown:
            later[_origin(tree, node)].append(node)
    first = [node for node in tree.roots if not node.shown]
    if all(node.kind == "answer" for node in tree.roots):
        chains = [[node, *later.get(node.id, [])] for node in first]
        return [Section(f"chain {i}" * (len(chains) > 1), _attempts(tree, c)) for i, c in enumerate(chains, start=1)]
    found = [Section("search", tree.branches(first))]
    for origin, nodes in later.items():
        if nodes[0].kind == "answer":
            answer = tree.nodes[origin].answer
            title = f"revisions of {harmless(answer)}" if answer is not None else "revisions of an answer"
            found.append(Section(title, _attempts(tree, nodes, start=2)))
        else:
            found += _turns(tree, nodes)
    return found


def _origin(tree: _Tree, node: Node) -> int:
    """The answer at the beginning of the chain that a revision belongs to."""
    while node.shown:
        last = node.shown[-1]
        node = tree.root(last)
        if not node.shown:
            return last
    raise AssertionError("only revisions have an origin")


def _attempts(tree: _Tree, nodes: Sequence[Node], start: int = 1) -> tuple[Branch, ...]:
    return tuple(b for i, n in enumerate(nodes, start) for b in tree.branches([n], label=f"attempt {i}"))


def _turns(tree: _Tree, nodes: Sequence[Node]) -> list[Section]:
    by_shown: dict[tuple[int, ...], list[Node]] = defaultdict(list)
    for node in nodes:
        by_shown[node.shown].append(node)
    return [
        Section(f"turn {i}, shown {len(shown)} earlier answer{'s' * (len(shown) > 1)}", tree.branches(turn))
        for i, (shown, turn) in enumerate(by_shown.items(), start=2)
    ]


# ---------------------------------------------------------------- folding


@dataclass(frozen=True, slots=True)
class Folded:
    """Branches from one place, and what is left of them: how many draws, and their best score."""

    shown: tuple[Branch, ...]
    rest: tuple[Branch, ...] = ()
    num_more: int = 0  # draws
    best: float | None = None


def fold(branches: Sequence[Branch], most_live: int, most_dead: int) -> Folded:
    """The first of those that led on (the chosen one among them) and of those that did not."""
    live, dead = [b for b in branches if not b.dead], [b for b in branches if b.dead]
    rest = (*live[most_live:], *dead[most_dead:])
    scores = [b.steps[0].score for b in rest if b.steps[0].score is not None]
    shown = (*live[:most_live], *dead[:most_dead])
    return Folded(shown, rest, sum(b.steps[0].count for b in rest), max(scores, default=None))
