"""flows.report: the page needs nothing else, escapes everything, says why, and is the same for the same data."""

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from flows import report_text
from flows.history import load_history
from flows.report import summary_markdown, write_loop_report, write_round_report
from flows.state import Loop
from search.errors import DataError


@pytest.fixture(scope="module")
def loop_dir(tmp_path_factory, fake_loop) -> Path:
    """The loop with its reports, as the round leaves them."""
    loop = fake_loop.write_loop(tmp_path_factory.mktemp("runs"))
    for number in (0, 1, 3, 4):
        write_round_report(loop, number, loop / f"round-{number:03d}" / "report")
    return loop


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


@pytest.fixture(scope="module")
def page(loop_dir) -> Page:
    return Page(loop_dir / "round-004/report/report.html")


def test_the_page_fetches_nothing(page):
    policy = next(a["content"] for t, a in page.elements if a.get("http-equiv") == "Content-Security-Policy")
    assert policy is not None
    assert policy.startswith("default-src 'none'")
    assert "script" not in policy
    tags = {tag for tag, _ in page.elements}
    assert tags.isdisjoint({"script", "link", "iframe", "object", "embed", "base", "form", "video", "audio", "a"})
    for _, attributes in page.elements:
        assert not [name for name in attributes if name.startswith("on")]
        for name in ("src", "href", "srcset", "background", "action"):
            assert (attributes.get(name) or "data:").startswith("data:")


def test_the_style_fetches_nothing(loop_dir):
    text = (loop_dir / "round-004/report/report.html").read_text(encoding="utf-8")
    style = text[text.index("<style>") : text.index("</style>")]
    assert "url(" not in style
    assert "@import" not in style


def test_hostile_text_is_shown_not_obeyed(loop_dir, fake_loop, page):
    source = (loop_dir / "round-004/report/report.html").read_text(encoding="utf-8")
    assert "<script" not in source
    assert "&lt;script&gt;" in source
    assert '<script>alert("x")</script>' in page.text
    assert "\x1b" not in source
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]", source)
    assert "[bold]b[/bold]" in page.text


def test_hostile_names_and_reasons_are_escaped(tmp_path, fake_loop):
    bad = fake_loop.FakeRound(1, 0.1, "abandoned", '<img src=x onerror="alert(1)"> | **bold** \x1b[2J')
    loop = fake_loop.write_loop(tmp_path, (fake_loop.ROUNDS[0], bad))
    gate = loop / "round-001/gate/verdict.json"
    gate.unlink()
    write_round_report(loop, 1, tmp_path / "out")
    source = (tmp_path / "out/report.html").read_text(encoding="utf-8")
    assert "<img src=x" not in source
    assert "&lt;img src=x" in source
    summary = (tmp_path / "out/summary.md").read_text(encoding="utf-8")
    assert "<img" not in summary
    assert "**bold**" not in summary
    assert "\x1b" not in source + summary


def test_every_picture_is_described(page):
    pictures = [attributes for tag, attributes in page.elements if tag == "img"]
    assert len(pictures) == 7
    assert all(len(a["alt"] or "") > 40 for a in pictures)
    assert "round 4 " in (pictures[1]["alt"] or "") + (pictures[0]["alt"] or "")
    assert dict(next(a for t, a in page.elements if t == "html"))["lang"] == "en"
    tables = [tag for tag, _ in page.elements if tag == "table"]
    assert len(tables) == len([tag for tag, _ in page.elements if tag == "caption"])
    assert all(a.get("scope") in ("col", "row") for tag, a in page.elements if tag == "th")


def test_the_page_says_what_happened_and_what_it_cost(loop_dir, page):
    r = load_history(loop_dir).find(4)
    assert "Round 4 was promoted: its model is the new champion." in page.text
    assert "the challenger reached 27.0 % greedy accuracy, the champion 21.0 %" in page.text
    assert "420 problems were won and 180 lost: beyond chance (p < 0.0001" in page.text
    for name in ("accuracy_greedy", "pass_at_1", "maj_at_16", "pass_at_16"):
        assert report_text.points(r.gains[name]) in page.text
    assert "One point of greedy accuracy cost" in page.text
    assert "Search with 16 samples still solves" in page.text
    assert "Distilling kept" in page.text
    assert r.challenger is not None
    assert str(r.challenger.fingerprint) in page.text


def test_a_rejection_gives_its_reasons(loop_dir):
    rejected = Page(loop_dir / "round-003/report/report.html")
    assert "Round 3 was rejected: the champion stays." in rejected.text
    assert "not beyond chance (p = 0.6100" in rejected.text
    assert "failed: greedy accuracy: -0.2 points" in rejected.text
    assert ("section", "verdict rejected") in [(t, a.get("class")) for t, a in rejected.elements]


def test_the_controls_of_a_round_are_set_beside_its_gain(loop_dir):
    text = Page(loop_dir / "round-001/report/report.html").text
    assert "The control with random right samples instead of search gained" in text
    assert "The control with more base training gained" in text


def test_the_base_round_has_a_page(loop_dir):
    text = Page(loop_dir / "round-000/report/report.html").text
    assert "Round 0 measured the base model." in text
    assert "Problems won and lost" not in text


def test_the_report_folder_holds_what_tracking_shows(loop_dir):
    folder = loop_dir / "round-004/report"
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    names = [row["name"] for row in rows]
    assert names == sorted(names)
    assert {"gain/accuracy_greedy", "gain/accuracy_greedy_low", "distill/efficiency", "spend/flops"} <= set(names)
    assert {p.stem for p in (folder / "plots").glob("*.png")} >= {"rounds", "samples", "spend"}
    assert (folder / "summary.md").read_text().startswith("**Round 4 was promoted")


def test_the_same_data_give_the_same_bytes(loop_dir, tmp_path):
    write_round_report(loop_dir, 1, tmp_path / "again")
    old = loop_dir / "round-001/report"
    for name in ("metrics.jsonl", "plots/rounds.png", "plots/candidates.png"):
        assert (old / name).read_bytes() == (tmp_path / "again" / name).read_bytes()


def test_the_summary_is_a_table_a_note_can_hold(loop_dir):
    loaded = load_history(loop_dir)
    summary = summary_markdown(loaded, loaded.find(3))
    lines = summary.splitlines()
    assert lines[0] == "**Round 3 was rejected: the champion stays.**"
    assert "| greedy |" in summary
    assert len(summary) < 5000
    assert {line.count("|") for line in lines if line.startswith("|")} == {6}


def test_the_loop_page_shows_all_rounds(loop_dir, tmp_path):
    loaded = load_history(loop_dir)
    write_loop_report(loaded, tmp_path / "new" / "loop.html")
    loop = Page(tmp_path / "new" / "loop.html")
    assert "Loop fake" in loop.text
    assert "4 rounds: 3 promoted, 1 rejected." in loop.text
    for name in ("1 random", "1 bootstrap", "rejected"):
        assert name in loop.text


def test_an_unfinished_round_has_a_page(tmp_path, fake_loop):
    loop = fake_loop.write_loop(tmp_path, fake_loop.ROUNDS[:1])
    Loop.open(tmp_path, "fake").begin_round(fake_loop.CONFIG)
    write_round_report(loop, 1, tmp_path / "out")
    text = Page(tmp_path / "out/report.html").text
    assert "Round 1 is not finished yet." in text
    assert "`ratchet round` resumes it" in text


def test_a_round_that_is_not_there_is_named(loop_dir, tmp_path):
    with pytest.raises(DataError, match="has no round 7"):
        write_round_report(loop_dir, 7, tmp_path)
