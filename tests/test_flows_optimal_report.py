"""flows.optimal_report: the page needs nothing else and obeys no name; both say where the choice does not pay."""

import base64
import copy
import io
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from flows import optimal_report as report
from flows import optimal_text as text
from flows import plots_optimal
from search.assessment import Difficulty, assessment
from search.cells import Cell, Grid
from tests.optimal_document import document, ratio

EVIL = "<script>alert(1)</script>\x1b[2J\u202e"


class Page(HTMLParser):
    """What a browser would see: elements with attributes, and the text."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data


def shown(found, width=100):
    console = Console(width=width, record=True, file=io.StringIO(), highlight=False)
    report.show(found, console)
    return console.export_text()


def plain(found, width=100):
    return " ".join(shown(found, width).split())


@pytest.fixture(scope="module")
def hostile(tmp_path_factory) -> tuple[Path, Page]:
    """A page about names that a user or a model might have chosen badly."""
    found = document() | {"task": f"<img src=x onerror=alert(1)>{EVIL}", "model": EVIL, "policy": '"><b>'}
    found = json.loads(json.dumps(found).replace("beam(width=2)", "beam(vote=<svg/onload=alert(1)>)"))
    found["quality"]["points"][0]["verifier"] = f"{EVIL}, oracle"
    found["table"]["made_of"] = {EVIL: EVIL}
    found["cells"][0]["se"] = found["ratios"][0]["cheapest"] = float("nan")
    found["ratios"][1]["high"] = float("inf")
    page = report.write(found, tmp_path_factory.mktemp("report") / "new")
    return page, Page(page)


def test_the_page_fetches_nothing_and_runs_nothing(hostile):
    path, page = hostile
    policy = next(a["content"] for _, a in page.elements if a.get("http-equiv") == "Content-Security-Policy")
    assert policy is not None
    assert policy.startswith("default-src 'none'")
    assert "script" not in policy
    tags = {tag for tag, _ in page.elements}
    assert tags.isdisjoint({"script", "link", "iframe", "object", "embed", "base", "form", "svg", "b", "a"})
    for _, attributes in page.elements:
        assert not [name for name in attributes if name.startswith("on")]
        assert all((attributes.get(name) or "data:").startswith("data:") for name in ("src", "href", "srcset"))
    style = path.read_text(encoding="utf-8").partition("<style>")[2].partition("</style>")[0]
    assert "url(" not in style
    assert "@import" not in style


def test_hostile_names_are_shown_not_obeyed(hostile):
    path, page = hostile
    source = path.read_text(encoding="utf-8")
    assert "<script" not in source
    assert "<script>alert(1)</script>" in page.text
    assert "beam (vote=<svg/onload=alert(1)>)" in page.text
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]", source)


def test_every_figure_is_in_the_page_described_in_words_and_beside_it(hostile):
    path, page = hostile
    images = [attributes for tag, attributes in page.elements if tag == "img"]
    assert len(images) == 8
    for image in images:
        kind, _, data = (image["src"] or "").partition(";base64,")
        assert kind == "data:image/svg+xml"
        assert base64.b64decode(data).lstrip().startswith(b"<?xml")
        assert len(image["alt"] or "") > 60
    assert len(list((path.parent / "plots").glob("*.png"))) == 8
    assert page.text.count("FLOPs of the strongest best-of-N over those of the choice") >= 2


def test_the_document_beside_the_page_has_finite_numbers(hostile):
    stored = json.loads((hostile[0].parent / "optimal.json").read_text(), parse_constant=pytest.fail)
    assert stored["cells"][0]["se"] is None
    assert stored["ratios"][1]["high"] is None
    assert stored["choices"] == document()["choices"]


# ---------------------------------------------------------------- words


def test_the_headline_gives_both_sets_of_arms_and_what_difficulty_adds():
    found = document()
    for row in found["ratios"]:
        if row["bins"] == "none":
            row |= {"value": 1.5, "low": 1.2, "high": 1.8}
    first, second, third, fourth = text.headline(found)
    assert first == (
        "With all arms, at equal accuracy, the compute-optimal choice with question-predicted difficulty spends 1/3.0 "
        "of the FLOPs of the strongest best-of-N at N = 8 (90 %: 1/3.6 to 1/2.4) and 1/3.0 at N = 16 (90 %: 1/3.6 to "
        "1/2.4)."
    )
    assert second.startswith("With the paper's arms alone, at equal accuracy,")
    assert "1/2.0 of the FLOPs" in second
    assert "spend 1/1.5 at N = 8 and 1/1.5 at N = 16: difficulty saves more, beyond both intervals" in third
    assert "a further factor of 2.0 at N = 8" in third
    assert "better at 5 of 5 mean budgets, worse at 0" in fourth


@pytest.mark.parametrize(
    ("value", "low", "high", "said"),
    [
        (0.5, 0.4, 0.8, "does not pay: at equal accuracy it spends more than the strongest best-of-N, 2.0 times"),
        (0.5, 0.0, 0.8, "2.0 times at N = 8 (90 %: 1.2 to never reached)"),
        (1.3, 0.9, 1.6, "is not shown to pay: factor saved over the strongest best-of-N at equal accuracy 1.3 at N"),
        (
            0.0,
            0.0,
            0.0,
            "does not pay: it never reaches the accuracy of the strongest best-of-N, 40.0 % (N = 4), 45.0 %",
        ),
        (1.3, None, None, "is not shown to pay"),
    ],
)
def test_where_the_choice_does_not_pay_it_says_so(value, low, high, said):
    found = document()
    for row in found["ratios"]:
        row |= {"value": value, "low": low, "high": high}
    lines = " ".join(text.headline(found))
    assert said in lines
    assert "spends 1/" not in lines
    assert said.split(":")[0].split("(")[0].strip() in plain(found)


def test_a_baseline_that_stops_early_may_leave_less_to_save():
    found = document()
    assert text.against_cheapest(found) == ""
    for row in found["ratios"]:
        row |= {"cheapest": 1.6, "cheapest_low": 0.8, "cheapest_baseline": "early_best_of_n(0.9)"}
    said = "at N = 8 (early best-of-N (0.9); at most 1.2 times, 95 %)"
    assert f"it spends 1/1.6 {said}" in " ".join(text.headline(found))


def test_difficulty_that_adds_nothing_is_said_to():
    found = document()
    assert "difficulty saves no more" in text.difficulty_adds(found)
    for row in found["ratios"]:
        if row["bins"] == "none":
            row["value"] *= 0.9
    assert "more, but the 90 % intervals overlap" in text.difficulty_adds(found)
    next(r for r in found["ratios"] if r["bins"] == "none" and r["budget"] == 8)["value"] = 3.5
    assert "more at some only" in text.difficulty_adds(found)


def test_budgets_per_question_that_lose_are_counted():
    found = document()
    found["across"][0] |= {"gain": -0.05, "low": -0.09, "high": -0.01}
    found["across"][1] |= {"low": -0.01}
    assert "better at 3 of 5 mean budgets, worse at 1, no difference shown at 1" in text.across_sentence(found)
    assert text.finding("across", found) == "Budgets per question are better at 3 of 5 mean budgets, worse at 1"
    found["across"][0] |= {"gain": 0.0, "low": -0.01, "high": 0.01}
    assert text.finding("across", found).endswith("better at 3 of 5 mean budgets, worse at none")


def test_the_exchange_and_the_verifiers_in_one_sentence_each():
    found = document()
    assert text.finding("exchange", found) == "Search with the small model: ahead at R = 0.16 and 22"
    found["exchange"]["rows"][1]["all"] = {**found["exchange"]["rows"][1]["all"], "low": -0.3, "high": -0.1}
    assert text.finding("exchange", found) == "Search with the small model: ahead at R = 0.16, behind at R = 22"
    assert text.finding("quality", found) == "At N = 16 the choice saves with every verifier measured"
    worst, best = found["quality"]["points"]
    worst["savings"] = {"16": {"value": 0.8, "low": 0.7, "high": 0.9}}
    assert text.finding("quality", found) == "At N = 16 the choice saves from an AUC of 0.95 on"
    best["savings"] = worst["savings"]
    assert text.finding("quality", found) == "No saving is shown at N = 16, not even with the best verifier"


def test_within_bins_the_lead_is_that_of_the_bins_of_the_choice():
    found = document()
    for row, lead in zip(found["by_bin"]["question"], (0.05, -0.1), strict=True):
        row["accuracy"]["step_rejection(draws=4) @ 16"] += lead
    said = "Step rejection leads best-of-N in 1 of 2 question-predicted bins at N = 16, by up to 5 points"
    assert text.finding("bins", found) == said
    del found["by_bin"]["question"]
    assert text.finding("bins", found) == "Accuracy within each bin"


def test_what_is_not_known_is_listed():
    found = document()
    assert not [line for line in report.unknowns(found) if "resamples" in line or "larger model" in line]
    found["ratios"] = [r | {"draws": 30} for r in found["ratios"] if r["bins"] != "verifier"]
    for curves in found["optimal"].values():
        curves.pop("verifier", None)
    del found["exchange"], found["quality"]
    lines = " ".join(report.unknowns(found))
    for said in (
        "verifier-predicted difficulty",
        "30 resamples",
        "No larger model",
        "Only one verifier",
        "40 problems",
    ):
        assert said in lines


@pytest.mark.parametrize(
    ("arm", "said"),
    [
        ("greedy", "greedy"),
        ("best_of_n_weighted", "best-of-N weighted"),
        ("step_rejection(draws=8, greedy=true, restart=false)", "step rejection (draws=8, greedy, no restart)"),
        ("beam(width=2, vote=majority)", "beam (width=2, vote=majority)"),
        ("odd(", "odd"),
    ],
)
def test_strategies_are_written_for_people(arm, said):
    assert text.strategy(arm) == said


# ---------------------------------------------------------------- in the terminal


def test_the_terminal_has_headline_ratios_and_choices_within_100_columns():
    found = document()
    lines = shown(found).splitlines()
    assert max(map(len, lines)) <= 100
    page = "\n".join(lines)
    assert "base on arithmetic: 40 validation problems; ideal FLOPs" in page
    assert re.search(r"question-predicted +0\.66 +1\.2 M +3\.0 \(2\.4-3\.6\)", page)
    assert re.search(r"1, easiest +20 +a 60 % +b 60 % +b 60 % @2", page)
    assert re.search(r"c +step rejection \(draws=4\)", page)
    assert "Not known" in page


def test_many_budgets_and_long_names_fit_too():
    found = document()
    long = f"step_rejection({', '.join(f'option_{i}={i}' for i in range(20))})"
    choices = found["choices"]
    choices["budgets"] = [2**i for i in range(12)]
    choices["rungs"] = [[row[1] | {"arm": long, "budget": 1024}] * 12 for row in choices["rungs"]]
    found["ratios"] += [ratio("all", "question", 2**i, 123.4) for i in range(5, 12)]
    assert max(map(len, shown(found).splitlines())) <= 100
    assert max(map(len, shown(found, 60).splitlines())) <= 60


def test_control_characters_do_not_reach_the_terminal():
    found = json.loads(json.dumps(document()).replace("greedy", "gre\\u001b[2Jedy")) | {"task": EVIL}
    assert "\x1b" not in shown(found)
    assert "\u202e" not in shown(found)


def test_letters_go_on():
    assert [report._letter(i) for i in (0, 25, 26, 27, 52)] == ["a", "z", "aa", "ab", "ba"]


# ---------------------------------------------------------------- thin documents


def test_a_document_with_nothing_but_its_size(tmp_path):
    page = Page(report.write({"n": 0}, tmp_path))
    assert not [tag for tag, _ in page.elements if tag == "img"]
    assert "No ratios were computed: nothing can be said about savings." in page.text
    assert "nothing can be said" in plain({"n": 0})


def test_sections_that_are_missing_are_left_out(tmp_path):
    found = document() | {"verifier": None, "exchange": None}
    for name in ("quality", "across", "by_bin", "known", "table"):
        del found[name]
    page = Page(report.write(found, tmp_path))
    assert "no verifier" in page.text
    for title in ("What a better verifier buys", "A larger model, or search", "Budgets per question", "Within bins"):
        assert title not in page.text
    assert "Budget at equal accuracy" in page.text


def test_nulls_everywhere(tmp_path):
    found = copy.deepcopy(document())
    for row in [*found["ratios"], *found["across"], *found["cells"]]:
        row |= {k: None for k in row if k not in ("arms", "bins", "budget", "arm", "baseline", "flops")}
    found["known"] = {"oracle": None, "question": {"spearman": None, "flops": None}}
    for row in found["exchange"]["rows"]:
        row["all"] = {**row["all"], "gain": None}
    page = report.write(found, tmp_path)
    assert "<h2>Budgets per question</h2>" in page.read_text()
    shown(found)


# ---------------------------------------------------------------- a real one


def grid(num=40):
    rng = np.random.default_rng(0)
    rate_P = rng.uniform(0.05, 0.95, num)
    levels = {"greedy": (1,), "majority": (1, 4, 8), "best_of_n": (1, 4, 8), "beam(width=2)": (4, 8)}
    levels["step_rejection(draws=4)"] = (4, 8)
    cells: list[Cell] = []
    for arm, budgets in levels.items():
        for budget in budgets:
            power = 1 if arm in ("greedy", "majority") else budget ** (0.9 if "step" in arm else 0.6)
            solved_P = 1 - (1 - rate_P) ** power
            flops_P = np.full(num, 1e6 * budget * (0.6 if "step" in arm else 1.0))
            cells.append(Cell(arm, budget, solved_P, flops_P, 1.1 * flops_P, solved_P, solved_P))
    return Grid(tuple(map(str, range(num))), tuple(cells)), rate_P


@pytest.fixture(scope="module", params=[1, 3])
def assessed(request):
    cells, rate_P = grid()
    known = {"oracle": Difficulty(rate_P), "question": Difficulty(rate_P**2, 5e4)}
    found = assessment(cells, known, ["best_of_n"], budgets=(4, 8), bins=request.param, draws=3)
    return found | {"task": "made up", "model": "m", "split": "validation", "problems": 40, "policy": "p"}


def test_the_document_of_a_grid(assessed):
    assert list(plots_optimal.draw_all(text.finite(assessed))) == [
        "accuracy", "ratios", "samples", "choices", "bins", "across",
    ]  # fmt: skip
    page = shown(assessed)
    assert max(map(len, page.splitlines())) <= 100
    assert "made up" in page
    assert "step rejection" in page
    row = text.find_ratio(text.finite(assessed), "all", "question", 8)
    assert row is not None
    assert text.ratio_cell(row).replace(" to ", "-") in page


def test_its_tables_hold_its_figures(assessed):
    found = text.finite(assessed)
    page = report.render_page(found, {})
    assert "made up" in page
    for cell in found["cells"]:
        assert f"{100 * cell['accuracy']:.1f} % ±" in page
    for row in found["across"]:
        assert f"{100 * row['gain']:+.1f} (" in page
