"""Accuracy against what it costs: the two first figures of the compute-optimal report, and what its figures share.

Drawn from the document of `search.assessment`; `flows.plots_optimal` has the other figures.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from flows import optimal_text as text
from flows.optimal_text import Document, curve_of, strategy
from flows.plot_style import (
    BLUE,
    GREEN,
    GREY,
    INK,
    LIGHT_BLUE,
    MUTED,
    ORANGE,
    PURPLE,
    RED,
    SAND,
    canvas,
    percent_axis,
    styled,
)
from flows.show import count

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MOST_LINES = 7  # in a panel
DASHED, DOTTED, DASHDOT = (0, (4, 2)), (0, (1, 1.6)), (0, (5, 1.5, 1, 1.5))
KIND_COLOURS = {"question": ORANGE, "verifier": PURPLE, "oracle": INK, "none": MUTED, "random": GREY}
_KIND_DASHES = {"question": "solid", "verifier": "solid", "oracle": DASHED, "none": DASHDOT, "random": DOTTED}
ROLE_COLOURS = {"baseline": BLUE, "paper": SAND, "other": GREEN}


class Line(NamedTuple):
    """One line of a panel: costs and accuracies, and how it is drawn."""

    label: str
    x: Sequence[float]
    y: Sequence[float]
    colour: str
    style: Mapping[str, Any]


# ---------------------------------------------------------------- against FLOPs


@styled
def draw_accuracy(found: Document) -> Figure:
    """The paper's arms and all arms side by side; arrows lead from best-of-N to the choice at the same accuracy."""
    lines = {arms: drawn for arms in text.arm_sets(found) if (drawn := curves(found, arms))}
    everything = [line for drawn in lines.values() for line in drawn]
    figure, panels = canvas(4.4, len(lines), sharey=True)
    for axes, (arms, drawn) in zip(panels, lines.items(), strict=True):
        for line in drawn:
            axes.plot(line.x, line.y, color=line.colour, **line.style)
        panel_title(axes, text.set_title(found, arms))
        unit = "FLOPs a problem, as computed" if found.get("actual") else "FLOPs a problem (log)"
        log_axis(axes, [x for line in everything for x in line.x], unit, room=1.9)
        _budget_names(axes, found)
        for budget in text.headline_budgets(found):
            _saving_arrow(axes, found, arms, budget)
    accuracy_axis(panels[0], [y for line in everything for y in line.y])
    line_legend(figure, sorted(everything, key=lambda line: line.style["zorder"] >= 5))
    title(figure, text.finding("accuracy", found))
    return figure


def curves(found: Document, arms: str) -> list[Line]:
    """Best-of-N, the best fixed search, the choice by kind of difficulty; never more than `MOST_LINES`."""
    fixed, optimal = found.get("fixed", {}), found.get("optimal", {}).get(arms, {})
    main = text.main_kind(found)
    lines: list[Line | None] = []
    look: dict[str, Any] = {"marker": "s", "markersize": 4.5, "zorder": 4}
    lines.append(_rival_line(found, text.strongest(found), BLUE, look))
    if arm := text.cheapest_baseline(found):
        look = {"marker": "s", "markersize": 3.5, "linestyle": DASHED, "linewidth": 1.2, "zorder": 4}
        lines.append(_curve_line(f"always {short(arm)}", fixed.get(arm), LIGHT_BLUE, look))
    if best := text.best_search(found, arms):
        look = {"marker": "^", "markersize": 4.5, "linewidth": 1.2, "zorder": 3}
        colour = ROLE_COLOURS["paper" if arms == "paper" else "other"]
        lines.append(_curve_line(f"always {short(best)}", fixed.get(best), colour, look))
    for kind in KIND_COLOURS:
        own = {"linewidth": 2.4, "zorder": 6} if kind == main else {"linewidth": 1.3, "zorder": 5}
        look = {"linestyle": _KIND_DASHES[kind], **own}
        lines.append(_curve_line(f"optimal, {text.KINDS[kind]}", optimal.get(kind), KIND_COLOURS[kind], look))
    return [line for line in lines if line is not None][:MOST_LINES]


def _rival_line(found: Document, rival: text.Rival, colour: str, style: Mapping[str, Any]) -> Line | None:
    cells = rival.cells.values()
    points = {"flops": [text.cost(found, c) for c in cells], "accuracy": [c["accuracy"] for c in cells]}
    return _curve_line(rival.name, points, colour, style)


def _curve_line(label: str, points: Any, colour: str, style: Mapping[str, Any]) -> Line | None:
    curve = curve_of(points)
    if curve is None:
        return None
    marker = {} if len(curve.flops_L) > 1 or "marker" in style else {"marker": "o"}
    return Line(label, curve.flops_L.tolist(), curve.accuracy_L.tolist(), colour, {**style, **marker})


def _budget_names(axes: Axes, found: Document) -> None:
    """N at the points of the strongest best-of-N."""
    for i, (budget, cell) in enumerate(text.strongest(found).cells.items()):
        said = f"N = {budget:g}" if i == 0 else f"{budget:g}"
        _beside(axes, said, text.cost(found, cell) or 1.0, cell["accuracy"], 4, color=BLUE, fontsize=7.5)


def _saving_arrow(axes: Axes, found: Document, arms: str, budget: float) -> None:
    """From the strongest best-of-N to the choice; what it saves stands beside N, where no line passes."""
    row = text.find_ratio(found, arms, text.main_kind(found), budget)
    cell = text.strongest(found).cells.get(budget)
    curve = curve_of(found["optimal"][arms].get(text.main_kind(found)))
    if row is None or cell is None or curve is None or text.state(row) in ("never", "unknown"):
        return
    start, y = text.cost(found, cell) or 1.0, cell["accuracy"]
    end = curve.flops_at(y)
    if not math.isfinite(end) or end <= 0:
        return
    arrow = {"arrowstyle": "-|>,head_width=0.2,head_length=0.4", "color": RED, "linewidth": 1.1, "shrinkB": 1}
    axes.annotate("", (end, y), (start, y), arrowprops=arrow | {"shrinkA": 4}, zorder=7)
    value = row["value"]
    said = f"{text.times(value)} x less" if value >= 1 else f"{text.times(1 / value)} x more"
    _beside(axes, said, start, y, 9 + 5 * len(f"{budget:g}"), color=RED, fontsize=8, fontweight="bold", zorder=8)


def _beside(axes: Axes, said: str, x: float, y: float, aside: float, **style: Any) -> None:
    """At the lower right of a point, where a rising line does not pass."""
    axes.annotate(said, (x, y), (aside, -8), textcoords="offset points", va="center", **style)


# ---------------------------------------------------------------- against samples and tokens


@styled
def draw_samples(found: Document) -> Figure:
    """By samples they may draw, and by tokens where the document has them."""
    lines = {"samples allowed": sample_lines(found)} | ({"tokens a problem": t} if (t := _token_lines(found)) else {})
    figure, panels = canvas(3.5, len(lines), sharey=True)
    for axes, (label, drawn) in zip(panels, lines.items(), strict=True):
        for line in drawn:
            axes.plot(line.x, line.y, color=line.colour, **line.style)
        log_axis(axes, [x for line in drawn for x in line.x], label, base=2 if label == "samples allowed" else 10)
    accuracy_axis(panels[0], [y for drawn in lines.values() for line in drawn for y in line.y])
    line_legend(figure, [line for drawn in lines.values() for line in drawn])
    title(figure, text.finding("samples", found))
    return figure


def sample_lines(found: Document) -> list[Line]:
    rows = [(r["budget"], r["uniform"]) for r in found.get("across", ()) if r["uniform"] is not None]
    own = {"linewidth": 2.4, "marker": "o", "zorder": 6}
    label = f"optimal, {text.KINDS[text.main_kind(found)]}"
    chosen = Line(label, [x for x, _ in rows], [y for _, y in rows], ORANGE, own)
    return [*([chosen] if rows else []), *_fixed_lines(found, "budget")][:MOST_LINES]


def _token_lines(found: Document) -> list[Line]:
    """Only where cells have "tokens"; the choice too where its curve has them."""
    kind = text.main_kind(found)
    points = found.get("optimal", {}).get("all", {}).get(kind, {})
    lines = _fixed_lines(found, "tokens")
    if lines and points.get("tokens"):
        chosen = {"flops": points["tokens"], "accuracy": points["accuracy"]}
        line = _curve_line(f"optimal, {text.KINDS[kind]}", chosen, ORANGE, {"linewidth": 2.4, "zorder": 6})
        lines = [*([line] if line else []), *lines]
    return lines[:MOST_LINES]


def _fixed_lines(found: Document, cost: str) -> list[Line]:
    """The strongest baseline, the best searches, the vote and the greedy answer."""
    everyone = {**text.rivals(found), "vote": text.always(found, "majority"), "greedy": text.always(found, "greedy")}
    looks = {
        "baseline": (BLUE, {"marker": "s", "markersize": 4.5}),
        "paper": (SAND, {"marker": "D", "markersize": 4.5}),
        "other": (GREEN, {"marker": "^", "markersize": 4.5}),
        "vote": (MUTED, {"marker": "o", "markersize": 3.5, "linestyle": DASHED}),
        "greedy": (INK, {"marker": "*", "markersize": 9, "linestyle": "none", "zorder": 7}),
    }
    lines: list[Line] = []
    for role, rival in everyone.items():
        points = sorted((c[cost], c["accuracy"]) for c in rival.cells.values() if c.get(cost))
        if points:
            colour, look = looks[role]
            x, y = ([point[i] for point in points] for i in range(2))
            label = rival.name if role == "baseline" else f"always {cut(rival.name)}"
            lines.append(Line(label, x, y, colour, {"linewidth": 1.3, **look}))
    return lines


# ---------------------------------------------------------------- what the figures share


def title(figure: Figure, words: str) -> None:
    """The finding, above all panels; a long one takes two lines."""
    figure.suptitle(textwrap.fill(plain(words), 96), x=0.01, ha="left", fontsize=10, fontweight="bold")


def panel_title(axes: Axes, words: str) -> None:
    axes.set_title(plain(words), fontweight="normal", fontsize=9, pad=6)


def short(arm: str) -> str:
    return cut(strategy(arm))


def cut(name: str, most: int = 48) -> str:
    return name if len(name) <= most else name[: most - 1] + "…"


def plain(words: str) -> str:
    """Nothing in it is taken for mathematics."""
    return words.replace("$", r"\$")


def log_axis(axes: Axes, values: Iterable[float], label: str, *, base: int = 10, room: float = 1.25) -> None:
    """Few ticks, in plain numbers; `room`: how far the axis goes on to the right."""
    known = [v for v in values if v > 0]
    axes.set_xlabel(label)
    if not known:
        return
    low, high = min(known) / 1.15, max(known) * room
    axes.set_xscale("log", base=base)
    steps = (1,) if high / low > 2000 else (1, 3) if high / low > 100 else (1, 2, 5) if high / low > 5 else range(1, 10)
    bases = [2.0**i for i in range(24)] if base == 2 else [d * 10.0**i for i in range(30) for d in steps]
    ticks = [b for b in bases if low <= b <= high]
    axes.set_xticks(ticks, [count(t) for t in ticks])
    axes.minorticks_off()
    axes.set_xlim(low, high)


def accuracy_axis(axes: Axes, values: Sequence[float]) -> None:
    """Percent; from 0 unless that would waste a quarter of the panel."""
    low, high = min(values), max(values)
    axes.set_ylim(0, max(1.08 * high, 0.01))
    percent_axis(axes)
    if low > 0.25 * high:
        axes.set_ylim(bottom=max(0.0, low - 0.14 * (high - low) - 0.01))


def line_legend(figure: Figure, lines: Sequence[Line]) -> None:
    """Each line once, below the panels."""
    from matplotlib.lines import Line2D

    once = {line.label: line for line in lines}
    handles = [Line2D([], [], color=line.colour, label=plain(line.label), **line.style) for line in once.values()]
    columns = 3 if max((len(label) for label in once), default=0) < 44 else 2
    figure.legend(handles=handles, loc="outside lower left", ncols=columns, columnspacing=1.4, handlelength=2.6)
