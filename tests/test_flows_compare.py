"""flows.compare: the JSON document is what its docstring says, the table fits a terminal, errors show the way out."""

import io
import json

import pytest
from rich.console import Console

from flows import compare
from flows.history import load_history
from flows.report_text import per_point
from flows.state import Loop
from search.errors import DataError
from search.types import Spend


@pytest.fixture(scope="module")
def runs_dir(tmp_path_factory, fake_loop):
    return fake_loop.write_loop(tmp_path_factory.mktemp("runs")).parent


def output(runs_dir, *, width: int = 100, terminal: bool = False, **options) -> str:
    file = io.StringIO()
    console = Console(file=file, width=width, force_terminal=terminal, color_system="standard" if terminal else None)
    compare.run(runs_dir, "fake", console=console, **options)
    return file.getvalue()


def test_the_document_has_the_promised_shape(runs_dir):
    document = json.loads(output(runs_dir, as_json=True))
    assert set(document) == {"loop", "rounds"}
    assert document["loop"] == "fake"
    for row in document["rounds"]:
        assert list(row) == ["round", "verdict", "metrics", "gain", "spend", "models"]
        assert isinstance(row["round"], int)
        assert all(isinstance(value, float) for value in row["metrics"].values())
        assert all(set(gain) == {"value", "low", "high", "n"} for gain in row["gain"].values())
        assert set(row["spend"]) == {*Spend().to_json(), "wall_s", "stages", "per_point"}
        assert set(row["models"]) == {"before", "challenger", "champion"}
    verdicts = [row["verdict"] for row in document["rounds"]]
    assert verdicts == [
        "base", "promoted", "control-bootstrap", "control-random", "promoted", "rejected", "promoted",
    ]  # fmt: skip


def test_the_document_holds_figures_gains_and_models(runs_dir):
    rounds = json.loads(output(runs_dir, as_json=True))["rounds"]
    loaded = load_history(runs_dir / "fake")
    assert rounds[0]["models"]["before"] is None
    assert rounds[0]["gain"] == {}
    last, r = rounds[-1], loaded.find(4)
    assert last["metrics"]["test/pass_at_16"] == r.metrics["test/pass_at_16"].value
    assert last["metrics"]["test/pass_at_16_se"] == r.metrics["test/pass_at_16"].se
    assert last["gain"]["accuracy_greedy"]["value"] == r.gains["accuracy_greedy"].mean
    assert last["models"]["champion"]["path"] == "round-004/distill/model"
    assert last["models"]["before"]["path"] == "round-002/distill/model"
    assert sum(stage["wall_s"] for stage in last["spend"]["stages"].values()) == pytest.approx(last["spend"]["wall_s"])


def test_cost_per_point_only_where_something_was_gained(runs_dir):
    loaded = load_history(runs_dir / "fake")
    gained, each = loaded.find(1), per_point(loaded.find(1))
    assert each is not None
    assert each.wall_s * 100 * gained.gains["accuracy_greedy"].mean == pytest.approx(gained.total.wall_s)
    assert each.tokens * 100 * gained.gains["accuracy_greedy"].mean == pytest.approx(gained.total.tokens, rel=1e-3)
    assert per_point(loaded.find(3)) is None
    assert json.loads(output(runs_dir, as_json=True))["rounds"][5]["spend"]["per_point"] is None


def test_json_is_one_line_whatever_the_width(runs_dir):
    assert output(runs_dir, as_json=True, width=20, terminal=True).count("\n") == 1


def test_the_table_fits_and_is_complete(runs_dir):
    shown = output(runs_dir)
    table = shown.splitlines()[1:9]
    assert table[0].startswith("round ")
    assert [line.split()[0] for line in table[1:]] == ["0", "1", "1", "1", "2", "3", "4"]
    assert max(len(line) for line in table) <= 100
    assert "…" not in shown
    greedy = load_history(runs_dir / "fake").find(4).metrics["test/accuracy_greedy"].value
    assert f"{100 * greedy:.1f}" in table[-1]
    assert "Champion: round-004/distill/model" in shown


def test_a_pipe_of_80_columns_cuts_nothing(runs_dir):
    assert "…" not in output(runs_dir, width=80)
    assert "per point" in output(runs_dir, width=80)


def test_a_narrow_terminal_drops_the_costs(runs_dir):
    shown = output(runs_dir, width=80, terminal=True)
    assert "…" not in shown
    assert "per point" not in shown
    assert "promoted" in shown


def test_verdicts_are_coloured_unless_no_color(runs_dir, monkeypatch):
    assert "\x1b[32mpromoted" in output(runs_dir, terminal=True)
    assert "\x1b[31mrejected" in output(runs_dir, terminal=True)
    monkeypatch.setenv("NO_COLOR", "1")
    assert "\x1b[3" not in output(runs_dir, terminal=True)


def test_reasons_given_by_hand_are_not_markup(tmp_path, fake_loop):
    fake_loop.write_loop(tmp_path, fake_loop.ROUNDS[:2])
    Loop.open(tmp_path, "fake").rollback("[red]worse[/red] \x1b[2J")
    shown = output(tmp_path)
    assert "[red]worse[/red]" in shown
    assert "\x1b" not in shown


def test_an_unfinished_round_is_said_to_be(tmp_path, fake_loop):
    fake_loop.write_loop(tmp_path, fake_loop.ROUNDS[:2])
    Loop.open(tmp_path, "fake").begin_round(fake_loop.CONFIG)
    assert "Round 2 is not finished: `ratchet round` resumes it." in output(tmp_path)
    row = json.loads(output(tmp_path, as_json=True))["rounds"][-1]
    assert (row["round"], row["verdict"], row["gain"]) == (2, "unfinished", {})


def test_html_is_written_beside_the_table(runs_dir, tmp_path):
    shown = output(runs_dir, html=tmp_path / "loop.html")
    assert "promoted" in shown
    assert "Loop fake" in (tmp_path / "loop.html").read_text(encoding="utf-8")


def test_no_such_loop_names_those_there_are(runs_dir):
    with pytest.raises(DataError, match=r"no loop 'other' .*there: fake.*ratchet round CONFIG"):
        compare.run(runs_dir, "other")
    with pytest.raises(DataError, match="loop name"):
        compare.run(runs_dir, "../fake")
