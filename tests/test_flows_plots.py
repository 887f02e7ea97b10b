"""flows.plots: every figure is drawn, says something, follows its data, and equal data give equal bytes."""

import itertools
import struct
from pathlib import Path

import pytest

from flows import plots
from flows.findings import find
from flows.history import load_history

NAMES = {"rounds", "samples", "difficulty", "left", "candidates", "spend", "calibration"}


@pytest.fixture(scope="module")
def drawn(tmp_path_factory, fake_loop):
    """(history, figures) of round 4."""
    loaded = load_history(fake_loop.write_loop(tmp_path_factory.mktemp("runs")))
    return loaded, plots.draw_all(loaded, loaded.find(4), find(loaded, loaded.find(4)))


def texts(figure) -> list[str]:
    import matplotlib.text

    return [t.get_text() for t in figure.findobj(matplotlib.text.Text) if t.get_text()]


def test_every_figure_is_a_png_of_readable_size(drawn, tmp_path):
    paths = plots.save(drawn[1], tmp_path)
    assert set(paths) == NAMES
    for path in paths.values():
        data = Path(path).read_bytes()
        width, height = struct.unpack(">II", data[16:24])
        assert data.startswith(b"\x89PNG")
        assert width == 1110
        assert 150 <= height <= 900
        assert len(data) > 5_000


@pytest.mark.parametrize("kind", ["png", "svg"])
def test_equal_data_give_equal_bytes(drawn, kind):
    loaded, figures = drawn
    again = plots.over_rounds(loaded)
    assert plots.render(again, kind) == plots.render(figures["rounds"], kind)


def test_figures_change_with_the_data(drawn, tmp_path, fake_loop):
    other = load_history(fake_loop.write_loop(tmp_path, seed=1))
    figures = plots.draw_all(other, other.find(4), find(other, other.find(4)))
    changed = {n for n, f in figures.items() if plots.render(f, "png") != plots.render(drawn[1][n], "png")}
    assert {"rounds", "samples", "difficulty", "left"} <= changed


def test_the_rounds_figure_shows_rejections_and_controls(drawn):
    loaded, figures = drawn
    shown = texts(figures["rounds"])
    assert {"promoted", "rejected challenger", "control: no search", "control: more base training"} <= set(shown)
    greedy = loaded.find(4).metrics["test/accuracy_greedy"].value
    assert any(text.startswith("greedy") and f"{100 * greedy:.1f} %" in text for text in shown)
    shapes = {line.get_marker() for axes in figures["rounds"].axes for line in axes.lines}
    assert {"o", "X", "D", "s"} <= shapes


def test_the_champion_line_is_flat_over_a_rejected_round(drawn):
    loaded, figures = drawn
    champion = next(line for line in figures["rounds"].axes[0].lines if len(line.get_xdata()) == 5)
    x, y = list(champion.get_xdata()), list(champion.get_ydata())
    assert y[x.index(3)] == y[x.index(2)] == loaded.find(2).metrics["test/accuracy_greedy"].value


def test_only_models_that_were_champion_get_a_sample_curve(drawn):
    assert {"base", "round 1", "round 2", "round 4"} <= set(texts(drawn[1]["samples"]))
    assert "round 3" not in texts(drawn[1]["samples"])


def test_candidates_add_up(drawn):
    total, kept, taken = plots.split_filters(drawn[0].find(4).filters)
    assert total == kept + sum(taken.values()) == 48_000
    assert "Where the 48,000 candidates went" in texts(drawn[1]["candidates"])


def test_round_0_alone_is_drawn(tmp_path, fake_loop):
    loaded = load_history(fake_loop.write_loop(tmp_path, fake_loop.ROUNDS[:1]))
    figures = plots.draw_all(loaded, loaded.base, find(loaded, loaded.base))
    assert {"rounds", "samples", "difficulty", "left", "spend", "calibration"} == set(figures)
    assert all(plots.render(figure, "png") for figure in figures.values())


def test_labels_do_not_overlap(drawn):
    from matplotlib.text import Annotation

    for name in ("rounds", "samples"):
        figure = drawn[1][name]
        plots.render(figure, "png")
        for axes in figure.axes:
            boxes = sorted(
                (t.get_window_extent() for t in axes.texts if isinstance(t, Annotation)), key=lambda box: box.y0
            )
            assert all(a.y1 <= b.y0 + 1 for a, b in itertools.pairwise(boxes))
