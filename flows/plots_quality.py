"""What verifier quality buys, drawn from the document of tests/benchmarks/bench_verifier_quality.py.

Two panels, since a saving alone misleads: it is largest where a poor verifier's best-of-N saturates early. Left: the
accuracy that search reaches for the FLOPs of N samples, beside that of the strongest best-of-N; right: FLOPs at equal
accuracy. Lines join checkers of known noise; filled marks are trained verifiers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flows.plot_style import BLUE, GREY, INK, ORANGE, canvas, percent_axis, render, styled
from flows.show import harmless

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Point = Mapping[str, Any]
LOWEST = 0.8  # of the axis of savings: below 1 nothing is saved
NEARLY_PERFECT = 0.95


def save_quality(found: Mapping[str, Any], path: Path, *, samples: int = 16) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(render(draw_quality(found, samples=samples), "png"))


@styled
def draw_quality(found: Mapping[str, Any], *, samples: int = 16) -> Figure:
    """`samples`: N."""
    points, at = sorted(found["points"], key=lambda p: p["auc"]), str(samples)
    figure, (left, right) = canvas(3.7, 2, sharex=True)
    known, trained = [p for p in points if not p["trained"]], [p for p in points if p["trained"]]
    _accuracy(left, known, trained, at)
    _savings(right, known, trained, at)
    for axes in (left, right):
        axes.set_xlabel("AUC of the verifier within problems")
        axes.set_xlim(0.47, 1.03)
    left.set_title(f"Accuracy for {samples} samples' FLOPs")
    right.set_title(f"FLOPs saved at equal accuracy, N = {samples}")
    figure.legend(*left.get_legend_handles_labels(), loc="outside lower left", ncols=2, handlelength=2.5)
    return figure


def _accuracy(axes: Axes, known: Sequence[Point], trained: Sequence[Point], at: str) -> None:
    def plain(p: Point) -> float:
        return p["strongest"][at]["accuracy"]

    def searched(p: Point, end: str = "value") -> float:
        return plain(p) + p["gains"][at][end]

    rows = (("checker with known noise", known, GREY, BLUE, "solid"), ("trained verifier", trained, ORANGE, ORANGE, ""))
    for kind, points, colour, own, line in rows:
        face = ("white", ORANGE) if points is trained else (GREY, "white")
        style: dict[str, Any] = {"linestyle": line or "none"}
        label = f"strongest best-of-N, {kind}"
        axes.plot(
            _aucs(points), [*map(plain, points)], "s", color=colour, markersize=4, markerfacecolor=face[0],
            label=label, **style,
        )  # fmt: skip
        low, high = ([searched(p, end) for p in points] for end in ("low", "high"))
        axes.vlines(_aucs(points), low, high, own, linewidth=1)
        label = f"compute-optimal search, {kind}"
        axes.plot(
            _aucs(points), [*map(searched, points)], "o", color=own, markerfacecolor=face[1], label=label, **style
        )
    axes.vlines(_aucs(trained), [*map(plain, trained)], [*map(searched, trained)], ORANGE, linewidth=0.8, alpha=0.5)
    axes.set_ylim(0, 1)
    percent_axis(axes)
    for p in known:
        _name(axes, p, searched(p), _short(p), BLUE, (-5, 6), p["auc"] > 0.6)


def _savings(axes: Axes, known: Sequence[Point], trained: Sequence[Point], at: str) -> None:
    highest = max(p["savings"][at]["high"] for p in (*known, *trained)) * 1.15
    axes.set_yscale("log", base=2)
    axes.set_ylim(LOWEST, highest)
    axes.axhline(1, color=INK, linewidth=1, zorder=1)
    for points, colour, line in ((known, BLUE, "solid"), (trained, ORANGE, "none")):
        values, low, high = ([max(p["savings"][at][end], LOWEST) for p in points] for end in ("value", "low", "high"))
        axes.vlines(_aucs(points), low, high, color=colour, linewidth=1)
        face = colour if points is trained else "white"
        axes.plot(_aucs(points), values, color=colour, marker="o", markerfacecolor=face, linestyle=line, zorder=4)
    ticks = [t for t in (1, 2, 4, 8, 16, 32) if t <= highest]
    axes.set_yticks(ticks, [f"{t} x" for t in ticks])
    axes.minorticks_off()
    above = 0.0
    for p in trained:
        saving = p["savings"][at]
        if p["auc"] > NEARLY_PERFECT:  # they stand close together
            above = max(saving["high"], above * 1.17)
            _name(axes, p, above, p["verifier"], ORANGE, (4, 7), True)
        elif saving["low"] > 1:
            _name(axes, p, saving["low"], p["verifier"], ORANGE, (4, -4), False)
        else:
            _name(axes, p, saving["value"], p["verifier"], ORANGE, (-6, 0), True)


def _name(axes: Axes, point: Point, y: float, text: str, colour: str, offset: tuple[float, float], right: bool) -> None:
    box = {"facecolor": "white", "edgecolor": "none", "pad": 0.5, "alpha": 0.8}
    side = "right" if right else "left"
    axes.annotate(
        harmless(text), (point["auc"], y), offset, textcoords="offset points", ha=side, va="center", color=colour,
        fontsize=7, bbox=box,
    )  # fmt: skip


def _aucs(points: Sequence[Point]) -> list[float]:
    return [p["auc"] for p in points]


def _short(point: Point) -> str:
    """Of a checker with noise: the noise."""
    name = str(point["verifier"])
    return f"{100 * float(name.removeprefix('oracle ')):g} %" if name.startswith("oracle ") else name
