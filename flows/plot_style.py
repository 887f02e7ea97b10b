"""One style for all figures: light background, hues that stay apart for colour-blind readers and in grey print.

Labels stand at the lines, bars of error are 95 % intervals, fonts come with matplotlib, and equal figures give equal
bytes. matplotlib is imported by the first drawing, without a display and without its global state.
"""

from __future__ import annotations

import functools
import io
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, Literal, ParamSpec

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

P = ParamSpec("P")
INK, MUTED, FAINT = "#20262e", "#66707c", "#d9dde2"
BLUE, ORANGE, GREEN, PURPLE, SAND, RED = "#1f5fa6", "#d5700e", "#128168", "#8a3a8c", "#b08d2a", "#b3261e"
GREY, LIGHT_BLUE = "#a9b1bb", "#86aedb"
WIDTH = 7.4  # inches; 1110 pixels at 150 dpi, shown at about 830 in a README

_STYLE: dict[str, Any] = {
    "font.family": "DejaVu Sans",
    "font.size": 8.5,
    "text.color": INK,
    "axes.edgecolor": MUTED,
    "axes.labelcolor": MUTED,
    "axes.linewidth": 0.7,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "axes.titlelocation": "left",
    "axes.titlesize": 9.5,
    "axes.titleweight": "bold",
    "axes.titlepad": 9,
    "grid.color": "#e9ecef",
    "grid.linewidth": 0.7,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.major.size": 2.5,
    "ytick.major.size": 0,
    "legend.frameon": False,
    "legend.fontsize": 8,
    "lines.linewidth": 1.8,
    "lines.markersize": 5.5,
    "errorbar.capsize": 0,
    "figure.facecolor": "white",
    "savefig.facecolor": "white",
    "svg.hashsalt": "ratchet",
    "svg.fonttype": "path",
}


def render(figure: Figure, kind: Literal["png", "svg"]) -> bytes:
    """The file's bytes; equal figures give equal bytes."""
    from matplotlib import rc_context

    buffer = io.BytesIO()
    metadata = {"Software": None} if kind == "png" else {"Date": None, "Creator": None}
    with rc_context(rc=_STYLE):  # pyright: ignore[reportArgumentType]
        figure.savefig(buffer, format=kind, dpi=150, metadata=metadata)
    return buffer.getvalue()


def styled(draw: Callable[P, Figure]) -> Callable[P, Figure]:
    """Texts and lines take the style when they are made, so a figure is drawn inside it."""

    @functools.wraps(draw)
    def drawn(*args: P.args, **options: P.kwargs) -> Figure:
        from matplotlib import rc_context

        with rc_context(rc=_STYLE):  # pyright: ignore[reportArgumentType]
            return draw(*args, **options)

    return drawn


def canvas(height: float, columns: int = 1, *, rows: int = 1, **options: Any) -> tuple[Figure, list[Axes]]:
    """A figure and its panels, row by row."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    figure = Figure(figsize=(WIDTH, height), layout=ConstrainedLayoutEngine(w_pad=0.08, h_pad=0.06, wspace=0.06))
    FigureCanvasAgg(figure)
    axes = figure.subplots(rows, columns, squeeze=False, **options)
    return figure, list(axes.flat)


def percent_axis(axes: Axes) -> None:
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    axes.yaxis.set_major_locator(MaxNLocator(nbins=6, steps=[1, 2, 2.5, 5, 10]))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:g} %"))
    low, high = axes.get_ylim()
    axes.set_ylim(0, min(high, 1.02) if low >= 0 or high > 0 else high)


def label_ends(axes: Axes, x: float, labels: Iterable[tuple[float, str, str]]) -> None:
    """Labels right of the lines' ends, moved apart where they would touch."""
    low, high = axes.get_ylim()
    gap = 0.062 * (high - low)
    ordered = sorted(labels)
    places = [value for value, _, _ in ordered]
    for _ in range(50):
        for i in range(len(places) - 1):
            overlap = gap - (places[i + 1] - places[i])
            if overlap > 1e-9:
                places[i] -= overlap / 2
                places[i + 1] += overlap / 2
    for place, (_, text, colour) in zip(places, ordered, strict=True):
        axes.annotate(
            text, (x, place), (3, 0), textcoords="offset points", va="center", color=colour, fontsize=8,
            annotation_clip=False,
        )  # fmt: skip
