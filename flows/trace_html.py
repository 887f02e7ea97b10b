"""A self-contained page of one search: the answer, what it cost, who voted, and the whole tree, to be folded by hand.

It holds no script; its content policy lets in one style sheet, by its hash, and nothing else. Every text is escaped.
"""

from __future__ import annotations

import base64
import functools
import hashlib
from dataclasses import replace
from pathlib import Path

from flows.show import harmless
from flows.solution import Solution
from flows.trace_text import MARKS, one_line
from flows.trace_tree import MEANINGS, Step, all_steps, chosen_way, fold, sections
from search.policy import steps_of

_TEMPLATES = Path(__file__).parent / "templates"
LONG_CHARS, LONG_LINES = 240, 5  # above either a whole answer is folded to its first line
SHORT_CHARS = 150  # of it, and of a rollout
MOST_LIVE, MOST_DEAD = 30, 4  # branches of one place before the rest is folded
MANY_ROWS = 200  # a larger tree hides what was pruned until it is asked for
MOST_VOTES = 20


def render(solution: Solution) -> str:
    """The page as text."""
    import jinja2
    from markupsafe import Markup

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_TEMPLATES),
        autoescape=True,
        finalize=lambda value: harmless(value) if type(value) is str else value,  # not Markup: that was made here
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    style = (_TEMPLATES / "trace.css").read_text(encoding="utf-8")
    result = solution.result
    parts = sections(solution.nodes, result.strategy)
    steps = list(all_steps(parts))
    votes = solution.votes()
    page = environment.get_template("trace.html.j2").render(
        style=Markup(style),
        style_hash="sha256-" + base64.b64encode(hashlib.sha256(style.encode()).digest()).decode(),
        title=f"{solution.answer or 'No answer'} | {one_line(result.problem.question)[:80]}",
        question=result.problem.question,
        strategy=result.strategy,
        answer=solution.answer,
        correct=solution.correct,
        verdict_text=solution.verdict(),
        why_not=None if solution.answer is not None else solution.why_not(),
        facts=solution.facts(),
        votes=votes[:MOST_VOTES],
        given=solution.chosen.answer if solution.chosen else None,
        votes_caption=_votes_caption(solution),
        more_votes=f"{len(votes) - MOST_VOTES} more answers" if len(votes) > MOST_VOTES else "",
        weighed=any(vote.weight is not None for vote in votes),
        way=_way(solution, chosen_way(parts)),
        summary=_summary(solution, steps),
        parts=parts,
        meanings={status: text for status, text in MEANINGS.items() if any(s.status == status for s in steps)},
        marks=MARKS,
        has_rollouts=any(step.rollout for step in steps),
        scored=any(step.score is not None for step in steps),
        hide_pruned=len(steps) > MANY_ROWS,
        fold=functools.partial(fold, most_live=MOST_LIVE, most_dead=MOST_DEAD),
        short=_short,
        is_long=_is_long,
        quintile=lambda value: min(4, max(0, int(5 * value))),
    )
    return page


def _way(solution: Solution, way: list[Step]) -> list[Step]:
    """The steps of the answer given; a whole answer whose steps were scored is cut into them."""
    chosen = solution.chosen
    if chosen is None or len(way) != 1 or len(chosen.step_scores) < 2:
        return way
    texts = steps_of(chosen, solution.delimiter)
    if len(texts) != len(chosen.step_scores):
        return way
    return [replace(way[0], text=t, score=s) for t, s in zip(texts, chosen.step_scores, strict=True)]


def _short(text: str) -> str:
    line = one_line(text)
    return line if len(line) <= SHORT_CHARS else line[:SHORT_CHARS].rstrip() + "…"


def _is_long(step: Step) -> bool:
    return len(step.text) > LONG_CHARS or step.text.strip("\n").count("\n") >= LONG_LINES


def _summary(solution: Solution, steps: list[Step]) -> str:
    """The tree in one sentence."""
    nodes = solution.nodes
    drawn = sum(node.kind != "lookahead" for node in nodes)
    rolled = len(nodes) - drawn
    noun = "answers" if all(node.kind == "answer" for node in nodes) else "steps"
    pruned = sum(node.kind != "lookahead" and not node.kept for node in nodes)
    parts = [f"{drawn:,} {noun} drawn", f"{len(steps):,} different after the same beginning"]
    parts += [f"{pruned:,} pruned"] * (pruned > 0)
    parts += [f"{rolled:,} more in rollouts"] * (rolled > 0)
    return ", ".join(parts) + "."


def _votes_caption(solution: Solution) -> str:
    silent = ", ".join(f"{num} {why}" for why, num in solution.silent().items())
    return "Finished candidates by answer." + (f" No vote: {silent}." if silent else "")
