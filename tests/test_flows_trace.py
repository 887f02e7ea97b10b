"""What a search looks like: the folded tree, the terminal, and the page, whatever a model writes."""

import base64
import hashlib
import html.parser
import io
import re
from dataclasses import replace
from pathlib import Path

import pytest
from rich.cells import cell_len
from rich.console import Console

from flows import trace_html, trace_text
from flows.solution import Solution
from flows.trace_tree import DEEPEST, NESTED, all_steps, chosen_way, fold, sections
from search import strategies
from search.engines.scripted import ScriptedEngine
from search.policy import Sampler
from search.randomness import key64
from search.run import search
from search.trace import Node, Trace
from search.types import Budget, Grade, Graded, Problem, Scored, VerifierFacts

HOSTILE = "</script></style><img src=x onerror=alert(1)><svg onload='alert(2)'> \x1b[31m\u202e&amp;\" ' {{ 7*7 }}"
EVERY = [
    "greedy",
    "majority",
    "best_of_n_weighted",
    "adaptive_majority",
    "adaptive_best_of_n",
    "beam(width=2)",
    "lookahead(width=2, steps=2)",
    "dvts(width=2)",
    "rebase",
    "step_rejection",
    "revisions(ratio=4)",
    "beam_revisions(width=2)",
    "searched_revisions(width=2)",
]


class Sums:
    """Three lines, then `= answer`; the right one is 7."""

    step_delimiter = "\n"
    end_text = None

    def prompt(self, problem):
        return problem.question

    def answers(self, pairs):
        return [text.partition("= ")[2] or None for _, text in pairs]

    def grade(self, pairs):
        found = self.answers(pairs)
        return [Graded(Grade.CORRECT if answer == problem.answer else Grade.WRONG, answer) for answer, (problem, _)
                in zip(found, pairs, strict=True)]  # fmt: skip


class Hashed:
    """A verifier whose scores are anything, but always the same."""

    facts = VerifierFacts("hashed", 100)

    def score(self, requests):
        return [Scored(tuple(key64(step) % 97 / 96 for step in r.steps), 9, 3, 9) for r in requests]


def writes(*lines):
    """A script of steps drawn from these lines."""

    def step(prompt, written, temperature, key):
        if "= " in written:
            return ""
        return f"{lines[key % len(lines)]}\n" if written.count("\n") < 3 else f"= {key % 3 + 6}"

    return ScriptedEngine(step=step)


def solved(strategy, engine=None, *, budget=12, question="what is it?"):
    """A search of one question, traced."""
    plan = strategies.parse(strategy).plan(Budget("samples", budget), Hashed.facts)
    trace = Trace()
    problem = Problem("q", question, "7")
    sampler = Sampler(engine or writes("add", "carry", "check"), Sums(), 1.0, 900, (0, "test", "q"))
    (result,) = search([problem], plan, sampler, Hashed(), traces=[trace])
    return Solution(result, tuple(trace.nodes), "sums", "base", 0.5, 1.0, "\n", capped=False)


def printed(solution, width=80):
    out = io.StringIO()
    console = Console(file=out, width=width, force_terminal=False)
    trace_text.show(sections(solution.nodes, solution.result.strategy), "title", console)
    return out.getvalue()


# ---------------------------------------------------------------- the tree


@pytest.mark.parametrize("strategy", EVERY)
def test_every_draw_is_in_the_tree_once_and_the_chosen_way_is_the_answer(strategy):
    solution = solved(strategy)
    parts = sections(solution.nodes, solution.result.strategy)
    steps = list(all_steps(parts))
    assert sum(s.count + s.num_hidden for s in steps) == sum(n.kind != "lookahead" for n in solution.nodes)
    assert solution.chosen is not None
    assert "".join(s.text for s in chosen_way(parts)) == solution.chosen.text
    assert sum(s.tokens for s in steps) + sum(n.tokens for n in solution.nodes if n.kind == "lookahead") == (
        solution.result.spend.generated_tokens
    )
    leaves = [s for s in steps if s.ended]
    assert sum(s.num_kept for s in leaves) == len(solution.result.candidates)
    assert {s.answer for s in leaves} == {c.answer for c in solution.result.candidates}


def test_steps_that_say_the_same_after_the_same_beginning_are_one():
    nodes = [
        Node(0, None, "step", "a", 1, "stop", score=0.5),
        Node(1, None, "step", "a", 1, "stop", score=0.5),
        Node(2, None, "step", "b", 1, "stop", score=0.9),
        Node(3, 0, "step", "c", 1, "eos", answer="x", grade="wrong"),
        Node(4, 1, "step", "c", 1, "eos", answer="x", grade="wrong"),
        Node(5, 1, "step", "d", 1, "length"),
    ]
    for way in ((0, 3), (1, 4)):
        for id in way:
            nodes[id].kept = True
            nodes[id].selected = way == (1, 4)
    (part,) = sections(nodes, "beam")
    a, b = part.branches
    assert [(s.text, s.count, s.num_kept, s.status) for s in (*a.steps, *b.steps)] == [
        ("a", 2, 2, "chosen"),
        ("b", 1, 0, "pruned"),
    ]
    (c,), (d,) = (child.steps for child in a.children)
    assert (c.count, c.status, c.answer, c.grade) == (2, "chosen", "x", "wrong")
    assert d.status == "cut off"


def test_the_parts_of_a_search_have_names():
    def titles(strategy):
        solution = solved(strategy, budget=8)
        return [part.title for part in sections(solution.nodes, solution.result.strategy)]

    assert titles("beam(width=2)") == [""]
    assert titles("dvts(width=2)") == [f"subtree {i}" for i in (1, 2, 3, 4)]
    assert titles("step_rejection") == ["chain 1", "chain 2"]
    assert titles("revisions(ratio=2)") == ["chain 1", "chain 2"]
    assert titles("searched_revisions(width=2)")[:3] == [
        "search",
        "turn 2, shown 1 earlier answer",
        "turn 3, shown 2 earlier answers",
    ]
    first, *others = titles("beam_revisions(width=2)")
    assert first == "search"
    assert {title.partition(" of ")[0] for title in others} == {"revisions"}


def test_attempts_stand_in_the_order_of_their_chain():
    solution = solved("revisions(ratio=100)", budget=6)
    (part,) = sections(solution.nodes, solution.result.strategy)
    assert [b.steps[0].label for b in part.branches] == [f"attempt {i}" for i in range(1, 7)]
    assert [b.steps[0].text for b in part.branches] == [c.text for c in solution.result.candidates]


def test_a_step_judged_by_its_rollout_has_its_score_and_text():
    solution = solved("lookahead(width=2, steps=1)", writes("add"))
    steps = list(all_steps(sections(solution.nodes, solution.result.strategy)))
    first = next(s for s in steps if s.text == "add\n" and s.rollout)
    assert first.rollout == "add\n"
    assert first.score is not None


def test_folding_keeps_the_chosen_and_counts_the_rest():
    solution = solved("best_of_n_weighted", writes(*map(str, range(50))), budget=64)
    (part,) = sections(solution.nodes, solution.result.strategy)
    folded = fold(part.branches, 3, 0)
    assert len(folded.shown) == 3
    assert folded.shown[0].steps[0].status == "chosen"
    assert folded.num_more == 64 - sum(b.steps[0].count for b in folded.shown)
    assert folded.best is not None
    assert fold(part.branches, 1000, 1000).rest == ()


def chain(length, beside=0):
    """A search of one long way, with pruned steps beside each of its own."""
    nodes = []
    before = None
    for depth in range(length):
        last = depth == length - 1
        node = Node(len(nodes), before, "step", f"step {depth}\n", 2, "eos" if last else "stop", score=0.5)
        node.kept = node.selected = True
        nodes.append(node)
        nodes += [Node(len(nodes) + i, before, "step", f"not {i}\n", 2, "stop", score=0.1) for i in range(beside)]
        before = node.id
    return nodes


@pytest.mark.parametrize("beside", [0, 2])
def test_a_search_of_any_depth_can_be_shown(beside):
    base = solved("greedy")
    solution = replace(base, nodes=tuple(chain(400, beside)))
    (part,) = sections(solution.nodes, "beam")
    assert len(chosen_way([part])) == 400
    assert sum(s.count + s.num_hidden for s in all_steps([part])) == len(solution.nodes)
    lines = printed(solution, 100).splitlines()
    assert all(cell_len(line) <= 100 for line in lines)
    assert sum("★" in line for line in lines) >= 400
    assert all(f"step {n}" in "".join(lines) for n in range(399))
    page = Page(trace_html.render(solution))
    assert page.deepest < 512  # what browsers nest


def test_only_deep_searches_show_steps_in_a_row():
    (short,), (deep,) = (sections(chain(n), "beam") for n in (NESTED, NESTED + 1))
    assert len(short.branches[0].steps) == 1
    assert len(deep.branches[0].steps) == NESTED + 1
    assert DEEPEST > NESTED


# ---------------------------------------------------------------- the terminal


@pytest.mark.parametrize("strategy", EVERY)
@pytest.mark.parametrize("width", [40, 100])
def test_no_line_is_wider_than_the_terminal_and_the_verdict_is_there(strategy, width):
    solution = solved(strategy, writes("a rather long step " * 5, "一二三四五六七八九十" * 4, "so"))
    lines = printed(solution, width).splitlines()
    assert max(map(cell_len, lines)) <= width
    assert len(lines) <= trace_text.MOST_ROWS + 10
    assert any("★" in line and solution.answer in line.partition("→")[2] for line in lines)


def test_a_large_tree_is_folded_to_what_can_be_read():
    solution = solved("rebase", writes(*map(str, range(9))), budget=256)
    lines = printed(solution).splitlines()
    assert 20 < len(lines) <= trace_text.MOST_ROWS + 5
    assert any(re.search(r"… \d+ more, best 0\.\d\d", line) for line in lines)


def test_the_terminal_obeys_no_model():
    shown = printed(solved("beam(width=2)", writes(HOSTILE)), 200)
    assert not [c for c in shown if ord(c) < 32 and c != "\n"]
    assert "\u202e" not in shown
    assert "[31m" in shown  # said, not obeyed
    assert "[/bold]" in printed(solved("majority", writes("[bold]x[/bold]")), 200)


# ---------------------------------------------------------------- the page


class Page(html.parser.HTMLParser):
    """The elements of a page, its text, and how deep they lie."""

    VOID = ("meta", "input", "rect", "br")

    def __init__(self, text):
        super().__init__()
        self.tags, self.attributes, self.text, self.style = [], [], [], ""
        self.open, self.deepest = [], 0
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, *pair) for pair in attrs]
        if tag not in self.VOID:
            self.open.append(tag)
            self.deepest = max(self.deepest, len(self.open))

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag, f"</{tag}> closes nothing"

    def handle_data(self, data):
        if self.open and self.open[-1] == "style":
            self.style += data
        else:
            self.text.append(data)


def test_hostile_text_is_inert_wherever_it_comes_from():
    solution = solved("beam(width=2)", writes(HOSTILE, "fine"), question=HOSTILE)
    candidates = tuple(replace(c, answer=HOSTILE) for c in solution.result.candidates)
    nodes = tuple(replace(n, answer=HOSTILE, grade="wrong") for n in solution.nodes)
    result = replace(solution.result, candidates=candidates, strategy=HOSTILE, model=HOSTILE)
    text = trace_html.render(replace(solution, result=result, nodes=nodes, model=HOSTILE))
    page = Page(text)
    assert page.open == []
    harmless = trace_html.render(solved("beam(width=2)", writes("evil", "fine")))
    assert set(page.tags) <= set(Page(harmless).tags)
    assert page.tags.count("style") == page.tags.count("title") == 1
    assert not {"script", "img", "iframe", "object", "link", "base", "form", "a"} & set(page.tags)
    for _, name, value in page.attributes:
        assert not name.startswith("on")
        assert name not in ("src", "href", "style", "action", "srcset", "data")
        assert "alert" not in (value or "")
    assert not [c for c in text if (ord(c) < 32 and c not in "\n\t") or c in "\u202a\u202e\u2066"]
    assert "</script></style><img src=x onerror=alert(1)>" in "".join(page.text)
    assert "49" not in "".join(page.text).replace("{{ 7*7 }}", "")  # no template in a template


@pytest.mark.parametrize("strategy", EVERY)
def test_the_page_allows_its_own_style_and_nothing_else(strategy):
    text = trace_html.render(solved(strategy))
    page = Page(text)
    policy = next(value for tag, name, value in page.attributes if tag == "meta" and "default-src" in (value or ""))
    digest = base64.b64encode(hashlib.sha256(page.style.encode()).digest()).decode()
    assert policy == f"default-src 'none'; style-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'"
    assert "url(" not in page.style
    assert "@import" not in page.style
    assert "http" not in text.replace("http-equiv", "")
    assert page.open == []


def test_the_page_tells_the_answer_the_cost_and_the_votes():
    solution = solved("best_of_n_weighted", budget=16)
    text = " ".join("".join(Page(trace_html.render(solution)).text).split())
    spend = solution.result.spend
    for part in ("what is it?", f"{spend.generated_tokens:,} generated", "Votes", "The way to the answer", "no script"):
        assert part in text
    assert ("✓ right" in text) == any(v.grade == "correct" for v in solution.votes())


def test_a_whole_answer_whose_steps_were_scored_is_shown_step_by_step():
    solution = solved("best_of_n_weighted", writes("add"))
    assert solution.chosen is not None
    text = trace_html.render(solution)
    way = text[text.index('class="way"') : text.index("The search")]
    assert way.count("<li>") == len(solution.chosen.step_scores) == 4


def test_controls_work_without_a_mouse_and_every_input_has_a_label():
    page = Page(trace_html.render(solved("lookahead(width=2)")))
    inputs = {value for tag, name, value in page.attributes if tag == "input" and name == "id"}
    labels = {value for tag, name, value in page.attributes if tag == "label" and name == "for"}
    assert inputs == labels == {"no-pruned", "no-rollouts", "only-chosen"}
    assert page.tags.count("details") == page.tags.count("summary") > 0
    assert ":focus-visible" in page.style
    assert "prefers-color-scheme: dark" in page.style


def test_a_search_without_an_answer_says_why():
    solution = solved("beam(width=2)")
    result = replace(solution.result, selected=None, candidates=(), failed="the engine fell over <b>")
    text = trace_html.render(replace(solution, result=result))
    assert "no answer: the engine fell over &lt;b&gt;" in text
    assert Page(trace_html.render(replace(solution, result=result, nodes=()))).open == []


def test_the_templates_are_installed_with_the_package():
    folder = Path(trace_html.__file__).parent / "templates"
    assert {"trace.css", "trace.html.j2"} <= {path.name for path in folder.iterdir()}
