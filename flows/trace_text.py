"""The tree of a search in the terminal: a line a step, no wider than the terminal, folded until it can be read."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from rich.cells import cell_len, set_cell_size
from rich.console import Console, Group, RenderableType
from rich.text import Text
from rich.tree import Tree

from flows.trace_tree import MEANINGS, Branch, Section, Status, Step, all_steps, fold

MARKS: dict[Status, str] = {"chosen": "★", "finished": "●", "kept": "•", "pruned": "○", "cut off": "✂", "failed": "!"}
MOST_ROWS = 80
LIMITS = ((1000, 1000), (16, 4), (8, 2), (4, 1), (3, 0), (2, 0), (1, 0))  # live and pruned branches of one place
NARROWEST = 6  # columns kept for a step's text
SHALLOWEST = 36  # columns below which a tree goes on without indenting


class _Slim(Tree):
    """A tree with two columns a level instead of four: searches are deep."""

    ASCII_GUIDES = ("  ", "| ", "+-", "`-")
    TREE_GUIDES: ClassVar = [("  ", "│ ", "├╴", "╰╴")] * 3


def show(parts: Sequence[Section], title: str, console: Console) -> None:
    """Print the sections under the title."""
    scored = any(step.score is not None for step in all_steps(parts))
    limits = next((limit for limit in LIMITS if sum(_rows(p.branches, limit) for p in parts) <= MOST_ROWS), LIMITS[-1])
    tree = _Slim(_line(Text(title, style="bold"), console.width), guide_style="dim")
    for part in parts:
        inside = tree.add(_line(Text(part.title, style="bold"), console.width - 2)) if part.title else tree
        _add(inside, part.branches, limits, console.width - 2 * (1 + bool(part.title)), scored)
    console.print(tree, no_wrap=True, overflow="ellipsis", crop=True)
    console.print(Text(_legend(parts), style="dim"))


def _legend(parts: Sequence[Section]) -> str:
    """What the marks mean, of those that are there."""
    steps = list(all_steps(parts))
    names = [f"{MARKS[status]} {status}" for status in MEANINGS if any(s.status == status for s in steps)]
    rollouts = ["↝ greedy rollout, thrown away"] * any(step.rollout for step in steps)
    return "  ".join([*names, *rollouts, *["×3 drawn three times"] * any(step.count > 1 for step in steps)])


def _add(tree: Tree, branches: Sequence[Branch], limits: tuple[int, int], width: int, scored: bool) -> None:
    folded = fold(branches, *limits)
    flat = width < SHALLOWEST
    rest: list[RenderableType] = []
    if folded.num_more:
        best = "" if folded.best is None else f", best {folded.best:.2f}"
        rest.append(_line(Text(f"… {folded.num_more} more{best}", style="dim"), width))
    for branch in folded.shown:
        lines = [_step(step, width, scored, then=flat or i > 0) for i, step in enumerate(branch.steps)]
        if flat and len(folded.shown) == 1:  # what lies beside a step comes before what follows it
            lines, rest = [lines[0], *rest, *lines[1:]], []
        inside = tree.add(Group(*lines))
        _add(tree if flat else inside, branch.children, limits, width - 2 * (not flat), scored)
    for line in rest:
        tree.add(line)


def _rows(branches: Sequence[Branch], limits: tuple[int, int]) -> int:
    """Lines that would be printed."""
    folded = fold(branches, *limits)
    inner = sum(len(b.steps) + _rows(b.children, limits) for b in folded.shown)
    return inner + (folded.num_more > 0)


def _step(step: Step, width: int, scored: bool, *, then: bool) -> Text:
    """One line: mark, score, text, then what became of it, which is never cut off."""
    style = {"chosen": "bold", "pruned": "dim", "cut off": "dim", "failed": "dim"}.get(step.status, "")
    mark = "bold green" if step.status == "chosen" else "dim"
    head = Text("↳" * then).append(f"{MARKS[step.status]} ", style=mark)
    if step.score is not None:
        head.append(f"{step.score:.2f} ", style="dim" if step.status == "pruned" else _colour(step.score))
    elif scored:
        head.append("  -  ", style="dim")
    if step.label:
        head.append(f"{step.label}: ", style="dim")
    tail = _fate(step)
    room = max(NARROWEST, width - head.cell_len - tail.cell_len)
    body = Text().append(_cut(one_line(step.text) or "(nothing)", room), style=style)
    if step.rollout and (left := room - body.cell_len - 4) > 4:
        body.append(f"  ↝ {_cut(one_line(step.rollout), left)}", style="dim italic")
    return _line(head + body + tail, max(width, 1))


def _fate(step: Step) -> Text:
    """What became of a step, to stand behind its text."""
    fate = Text()
    if step.ended:
        fate.append("  → " + (_cut(one_line(step.answer), 40) if step.answer is not None else "no answer"))
        colours = {"correct": ("right", "green"), "wrong": ("wrong", "red"), "ungraded": ("not graded", "yellow")}
        if step.grade and (step.answer is not None or step.grade == "correct"):
            word, colour = colours[step.grade]
            fate.append(", ").append(word, style=colour)
    words = [f"×{step.count}"] if step.count > 1 else []
    if not step.ended and 0 < step.num_kept < step.count:
        words.append(f"{step.num_kept} kept")
    if step.status in ("pruned", "cut off", "failed"):
        words.append(step.status)
    if step.num_hidden:
        words.append(f"+{step.num_hidden} beside")
    return fate.append("  " + ", ".join(words), style="dim") if words else fate


def one_line(text: str) -> str:
    """Line breaks shown as marks, blanks run together."""
    return " ↵ ".join(" ".join(line.split()) for line in text.strip().splitlines() if line.strip())


def _cut(text: str, width: int) -> str:
    return text if cell_len(text) <= width else set_cell_size(text, width - 1).rstrip() + "…"


def _line(text: Text, width: int) -> Text:
    text.no_wrap = True
    text.truncate(width, overflow="ellipsis")
    return text


def _colour(score: float) -> str:
    return "red" if score < 0.25 else "yellow" if score < 0.6 else "green"
