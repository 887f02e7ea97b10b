"""The figures of a verifier: its health on one set of pools, and how that went over the rounds."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flows.history import Z95, History
from flows.history import Figure as Value
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
    canvas,
    label_ends,
    percent_axis,
    render,
    styled,
)
from search.stats import Estimate
from search.verifiers.health import Health
from search.verifiers.health_selection import Alarm

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_DASHED = (0, (4, 3))
_CURVES = {  # rule -> (name, colour)
    "pass": ("any right", GREY),
    "weighted": ("weighted", BLUE),
    "best_of_n": ("best-of-N", ORANGE),
    "majority": ("majority", GREEN),
}
_KINDS = {True: ("right", BLUE), False: ("wrong", ORANGE)}


# ---------------------------------------------------------------- one verifier


def save_health(health: Health, path: Path) -> None:
    """All panels as one PNG."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(render(draw_health(health), "png"))


@styled
def draw_health(health: Health) -> Figure:
    """Selection against samples, calibration, the spread of scores, score by length; bands and bars are 95 %."""
    figure, (chosen, calibrated, spread, length) = canvas(6.2, 2, rows=2)
    _selection(chosen, health)
    _calibration(calibrated, health)
    _histogram(spread, health)
    _lengths(length, health)
    return figure


def _selection(axes: Axes, health: Health) -> None:
    ks, labels = health.selection.ks, list[tuple[float, str, str]]()
    for rule, (name, colour) in _CURVES.items():
        curve = health.selection.accuracy[rule]
        values, bars = [e.value for e in curve], [_half(e) for e in curve]
        low, high = ([v + sign * b for v, b in zip(values, bars, strict=True)] for sign in (-1, 1))
        ideal = rule == "pass"
        axes.fill_between(ks, low, high, color=colour, alpha=0.14, linewidth=0)
        axes.plot(ks, values, color=colour, marker="o", markersize=3.6, linestyle=_DASHED if ideal else "solid")
        labels.append((values[-1], name, MUTED if ideal else colour))
    for alarm in health.selection.alarms:
        _mark_alarm(axes, health, alarm)
    axes.set_xscale("log", base=2)
    shown = [k for k in ks if k & (k - 1) == 0]
    shown = shown[:: 2 if len(shown) > 7 else 1]
    axes.set_xticks(shown, [str(k) for k in shown])
    axes.minorticks_off()
    end = max(ks[-1], 2) * 1.12
    axes.set_xlim(0.9, end)
    axes.set_xlabel("samples N")
    axes.set_title("Accuracy of what is selected")
    percent_axis(axes)
    label_ends(axes, end, labels)


def _mark_alarm(axes: Axes, health: Health, alarm: Alarm) -> None:
    if alarm.fired:
        value = health.selection.accuracy[alarm.rule][-1].value
        text = f"over-optimised: \u2212{100 * abs(alarm.change):.1f} points\nsince N = {alarm.peak}"
        axes.plot([health.selection.ks[-1]], [value], marker="X", color=RED, markersize=8, zorder=5)
        offset, va = ((-8, 5), "bottom") if alarm.rule == "weighted" else ((-8, -5), "top")
        axes.annotate(
            text, (health.selection.ks[-1], value), offset, textcoords="offset points", ha="right", va=va,
            color=RED, fontsize=7.5,
        )  # fmt: skip


def _calibration(axes: Axes, health: Health) -> None:
    points = health.calibration
    axes.plot([0, 1], [0, 1], color=GREY, linewidth=1, linestyle=_DASHED, zorder=1)
    bars = [Z95 * (p.se or 0.0) for p in points]
    x, y = [p.predicted for p in points], [p.observed for p in points]
    axes.plot(x, y, color=BLUE, linewidth=1, alpha=0.5, zorder=2)
    axes.errorbar(x, y, _inside(y, bars), color=BLUE, marker="o", linestyle="none", elinewidth=1, zorder=3)
    axes.set(xlim=(-0.01, 1.01), xlabel="score", ylabel="share of right answers")
    percent_axis(axes)
    axes.set_ylim(-0.01, 1.02)
    axes.set_title("Calibration (dashed: perfect)")
    _note(axes, health, {"brier": "Brier", "brier_constant": "a constant's", "ece": "ECE"})


def _histogram(axes: Axes, health: Health) -> None:
    num = len(health.histogram["right"])
    edges = [i / num for i in range(num + 1)]
    highest = 0.0
    for name, colour in _KINDS.values():
        counts = health.histogram[name]
        total = sum(counts) or 1
        shares = [count / total for count in counts]
        highest = max(highest, *shares)
        axes.stairs(shares, edges, color=colour, fill=True, alpha=0.25)
        axes.stairs(shares, edges, color=colour, linewidth=1.4, label=f"{name} ({sum(counts):,})")
    axes.set(xlim=(0, 1), ylim=(0, highest), xlabel="score", ylabel="share of its kind")
    percent_axis(axes)
    axes.set_yticks([tick for tick in axes.get_yticks() if tick <= highest])
    axes.set_ylim(0, 1.35 * highest)  # room for the legend and the figures
    axes.set_title("Scores of right and wrong answers")
    axes.legend(loc="upper left", ncols=2, borderaxespad=0.2, columnspacing=1.2, handlelength=1.4)
    _note(axes, health, {"auc_within": "AUC within problems", "auc": "pooled", "step_auc": "steps"}, y=0.87)


def _lengths(axes: Axes, health: Health) -> None:
    for correct, (name, colour) in _KINDS.items():
        points = [p for p in health.lengths if p.correct == correct]
        if points:
            bars = [Z95 * (p.se or 0.0) for p in points]
            x, y = [p.length for p in points], [p.score for p in points]
            look: dict[str, Any] = {"color": colour, "marker": "o", "markersize": 4, "linewidth": 1.4}
            axes.errorbar(x, y, _inside(y, bars), elinewidth=1, label=name, **look)
    axes.set(xlabel="answer length in tokens", ylabel="mean score", ylim=(0, 1.25), yticks=[0, 0.25, 0.5, 0.75, 1])
    axes.set_title("Score by length")
    axes.legend(loc="upper left", ncols=2, borderaxespad=0.2, columnspacing=1.2, handlelength=1.4)
    _note(axes, health, {"length_bias": "rank correlation within problems"}, y=0.87)


def _note(axes: Axes, health: Health, names: Mapping[str, str], *, y: float = 0.0) -> None:
    """Figures in one line at height `y` of the panel, or one below the other in its upper left corner."""
    lines = [f"{label} {health.figures[name].value:.3f}" for name, label in names.items() if name in health.figures]
    text = ",  ".join(lines) if y else "\n".join(lines)
    place = (0.03, y or 0.97)
    axes.annotate(text, place, xycoords="axes fraction", va="top", color=INK, fontsize=7)


def _inside(values: Sequence[float], bars: Sequence[float]) -> tuple[list[float], list[float]]:
    """Lengths of bars, below and above, that end at 0 and 1."""
    pairs = list(zip(values, bars, strict=True))
    return [max(min(b, v), 0.0) for v, b in pairs], [max(min(b, 1 - v), 0.0) for v, b in pairs]


def _half(estimate: Estimate) -> float:
    return Z95 * estimate.se if math.isfinite(estimate.se) else 0.0


# ---------------------------------------------------------------- over rounds


@dataclass(frozen=True, slots=True)
class RoundHealth:
    """A figure of one round's verifier, and of the one before on the same pools. Example: RoundHealth(1, ...)"""

    round: int
    new: Value
    previous: Value | None


def over_rounds(history: History, name: str) -> list[RoundHealth]:
    """verifier/{name} of every round that measured one."""
    return [
        RoundHealth(r.number, r.metrics[f"verifier/{name}"], r.metrics.get(f"verifier/{name}_previous"))
        for r in history.proper
        if f"verifier/{name}" in r.metrics
    ]


@styled
def draw_rounds(auc_within: Sequence[RoundHealth], brier: Sequence[RoundHealth]) -> Figure:
    """AUC within problems and Brier score round by round, with the verifier of the round before on the same pools."""
    from matplotlib.lines import Line2D

    figure, (left, right) = canvas(3.1, 2)
    _rounds(left, auc_within, "AUC within problems (higher is better)", PURPLE)
    _rounds(right, brier, "Brier score (lower is better)", BLUE)
    hollow = Line2D([], [], linestyle="none", color=MUTED, marker="D", markerfacecolor="white")
    handles = [Line2D([], [], linestyle="none", color=MUTED, marker="o", label="verifier of the round"), hollow]
    hollow.set_label("the one before, same answers")
    handles.append(Line2D([], [], color=MUTED, linewidth=1, marker="|", linestyle="none", markersize=9, label="95 %"))
    figure.legend(handles=handles, loc="outside lower left", ncols=3, handletextpad=0.3, columnspacing=1.6)
    return figure


def _rounds(axes: Axes, points: Sequence[RoundHealth], title: str, colour: str) -> None:
    from matplotlib.ticker import MaxNLocator

    x, y = [p.round for p in points], [p.new.value for p in points]
    axes.plot(x, y, color=colour, zorder=2)
    axes.errorbar(x, y, [p.new.half_width for p in points], color=colour, marker="o", linestyle="none", elinewidth=1)
    before = {p.round: p for p in points}
    for p in points:
        if p.previous is not None:
            start = before.get(p.round - 1)
            if start is not None:  # the same verifier, on the pools of the next round
                axes.plot(
                    [start.round, p.round], [start.new.value, p.previous.value], color=LIGHT_BLUE, linewidth=1,
                    linestyle=_DASHED, zorder=1,
                )  # fmt: skip
            axes.plot([p.round], [p.previous.value], marker="D", color=colour, markerfacecolor="white", markersize=4.5)
    axes.set_title(title)
    axes.set_xlabel("round")
    if x:
        axes.set_xlim(min(x) - 0.3, max(x) + 0.3)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=8))
    axes.yaxis.set_major_locator(MaxNLocator(nbins=5))


def save_rounds(history: History, path: Path) -> bool:
    """The figure of `draw_rounds` as PNG; False (and no file) where no round measured a verifier."""
    points = {name: over_rounds(history, name) for name in ("auc_within", "brier")}
    if not any(points.values()):
        return False
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(render(draw_rounds(points["auc_within"], points["brier"]), "png"))
    return True
