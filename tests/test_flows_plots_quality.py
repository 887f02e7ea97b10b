"""flows.plots_quality: what verifier quality buys, drawn from hand-made points, ones that save nothing among them."""

import numpy as np

from flows.plot_style import render
from flows.plots_quality import LOWEST, draw_quality, save_quality


def point(name, auc, saving, gain, *, trained=False):
    value, low, high = saving
    return {
        "verifier": name,
        "auc": auc,
        "auc_steps": auc,
        "trained": trained,
        "savings": {"16": {"value": value, "low": low, "high": high}},
        "gains": {"16": {"value": gain, "low": gain - 0.03, "high": gain + 0.03}},
        "strongest": {"16": {"arm": "sharpened", "accuracy": 0.4}},
    }


DOCUMENT = {
    "points": [
        point("oracle 0", 1.0, (6.0, 5.0, 7.0), 0.2),
        point("oracle 0.2", 0.8, (0.0, 0.0, 2.0), 0.05),
        point("none", 0.5, (1.0, 0.0, 1.0), 0.0),
        point("round 1 \x1b[31m", 0.99, (7.0, 6.0, 8.0), 0.18, trained=True),
        point("30 questions", 0.83, (2.0, 0.0, 3.0), 0.0, trained=True),
        point("300 questions", 0.9, (5.0, 3.0, 6.0), 0.1, trained=True),
    ]
}


def drawn(axes) -> list[list[tuple[float, float]]]:
    return [[(float(x), float(y)) for x, y in np.round(line.get_xydata(), 9)] for line in axes.get_lines()]


def test_both_panels_show_every_verifier(tmp_path):
    figure = draw_quality(DOCUMENT)
    left, right = figure.axes
    assert [(0.83, 0.4), (0.9, 0.5), (0.99, 0.58)] in drawn(left)
    known = [(0.5, 1.0), (0.8, LOWEST), (1.0, 6.0)]  # what never gets there stands at the bottom, it is not left out
    assert known in drawn(right)
    names = {text.get_text() for axes in figure.axes for text in axes.texts}
    assert {"none", "0 %", "20 %", "30 questions", "300 questions"} <= names
    assert not any("\x1b" in name for name in names)
    save_quality(DOCUMENT, tmp_path / "figures" / "quality.png")
    assert (tmp_path / "figures" / "quality.png").read_bytes() == render(draw_quality(DOCUMENT), "png")
