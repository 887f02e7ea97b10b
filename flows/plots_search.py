"""The figure of `ratchet eval --report`: accuracy against what it costs, in samples, tokens and FLOPs."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

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
    render,
    styled,
)
from flows.show import count

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Result = Mapping[str, Any]


class Look(NamedTuple):
    """How a strategy is drawn. What needs no search is dashed, what only gold answers could choose is dotted."""

    colour: str
    marker: str
    dash: Any = "solid"


DASHED, DOTTED = (0, (4, 2)), (0, (1, 2))
LOOKS = {
    "greedy": Look(INK, "*"),
    "pass": Look(GREY, "o", DOTTED),
    "majority": Look(MUTED, "o", DASHED),
    "best_of_n": Look(LIGHT_BLUE, "s", DASHED),
    "best_of_n_weighted": Look(BLUE, "s", DASHED),
    "beam": Look(ORANGE, "^"),
    "dvts": Look(PURPLE, "v"),
    "rebase": Look(SAND, "D"),
    "step_rejection": Look(GREEN, "P"),
    "lookahead": Look(RED, "X"),
    "adaptive_majority": Look(MUTED, "<"),
    "adaptive_best_of_n": Look(LIGHT_BLUE, ">"),
}
_OTHER = [Look(c, m, d) for d in ("solid", DASHED) for m, c in zip("hdp8H", (RED, BLUE, GREEN, ORANGE, PURPLE))]  # noqa: B905
AXES = {"samples": "samples", "generated_tokens": "generated tokens", "flops_ideal": "FLOPs (ideal)"}


def save_comparison(found: Mapping[str, Any], path: Path) -> None:
    """The document of `ratchet eval --json`, drawn as PNG."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(render(comparison(found), "png"))


@styled
def comparison(found: Mapping[str, Any]) -> Figure:
    """One panel for each cost that is known; bands are standard errors."""
    results = [r for r in found["results"] if r["accuracy"] is not None]
    costs = [name for name in AXES if any(r["spend"][name] for r in results)] or ["samples"]
    looks = dict(zip(dict.fromkeys(r["strategy"] for r in results), _looks(results), strict=True))
    rows = -(-len(looks) // 4)
    figure, panels = canvas(3.2 + 0.2 * rows, len(costs), sharey=True)
    for axes, cost in zip(panels, costs, strict=True):
        for name, look in looks.items():
            _line(axes, [r for r in results if r["strategy"] == name], cost, look, name)
        axes.set_xscale("log", base=2 if cost == "samples" else 10)
        axes.set_xlabel(f"{AXES[cost]} per problem")
        _ticks(axes, [_cost(r, cost) for r in results], cost, wide=len(costs) == 1)
    title = f"Accuracy on {found['n']} problems of {found['task']}, with standard errors"
    figure.suptitle(title, x=0.01, ha="left", fontsize=9.5, fontweight="bold")
    percent_axis(panels[0])
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower left", ncols=4, columnspacing=1.6, handlelength=3)
    return figure


def _line(axes: Axes, rows: Sequence[Result], cost: str, look: Look, name: str) -> None:
    points = sorted((_cost(r, cost), r["accuracy"], r["se"] or 0.0) for r in rows if _cost(r, cost) > 0)
    x, y, errors = ([p[i] for p in points] for i in range(3))
    label = name.replace("_", " ")
    size = 9 if look.marker == "*" else 4.5
    style: dict[str, Any] = {"color": look.colour, "marker": look.marker, "markersize": size, "linestyle": look.dash}
    low, high = ([v + sign * e for v, e in zip(y, errors, strict=True)] for sign in (-1, 1))
    if len(points) == 1:  # a band has no width
        axes.vlines(x, low, high, color=look.colour, linewidth=1)
        style["linestyle"] = "none"
    axes.fill_between(x, low, high, color=look.colour, alpha=0.13, linewidth=0)
    axes.plot(x, y, linewidth=1.4, label=label, zorder=4 if look.dash == DOTTED else 3, **style)


def _cost(row: Result, cost: str) -> float:
    return row["spend"][cost] / max(1, row.get("n") or 1)


def _ticks(axes: Axes, costs: Sequence[float], cost: str, *, wide: bool) -> None:
    """Few, in plain numbers: powers of 2 or 4, or of 10 with 3 between."""
    known = [c for c in costs if c > 0]
    if not known:
        return
    low, high = min(known) / 1.15, max(known) * 1.15
    bases = [2.0**i for i in range(24)] if cost == "samples" else [d * 10.0**i for i in range(30) for d in (1, 3)]
    ticks = [b for b in bases if low <= b <= high]
    if len(ticks) > 4 and not (wide and cost == "samples"):
        ticks = [t for t in ticks if t in bases[::2]]
    axes.set_xticks(ticks, [count(t) for t in ticks])
    axes.minorticks_off()
    axes.set_xlim(low, high)


def _looks(results: Sequence[Result]) -> Iterator[Look]:
    """A strategy's own look; of a second one with the same name, and of the others, the next free one."""
    others = itertools.cycle(_OTHER)
    taken: set[str] = set()
    for strategy in dict.fromkeys(r["strategy"] for r in results):
        name = strategy.partition("(")[0]
        yield LOOKS[name] if name in LOOKS and name not in taken else next(others)
        taken.add(name)
