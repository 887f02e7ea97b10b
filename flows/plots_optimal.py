"""The figures of the compute-optimal report, drawn from the document of `search.assessment`.

Each title is a finding that `flows.optimal_text` computes from the document. A section that is missing has no figure.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flows import optimal_text as text
from flows.optimal_text import Document, strategy
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
    render,
    styled,
)
from flows.plots_curves import (
    KIND_COLOURS,
    ROLE_COLOURS,
    accuracy_axis,
    curves,
    cut,
    draw_accuracy,
    draw_samples,
    log_axis,
    panel_title,
    plain,
    sample_lines,
    title,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_MARKERS = {"oracle": "D", "verifier": "s", "question": "o", "random": "v", "none": "^"}
FAMILY_COLOURS = {
    "greedy": "#7a828c",
    "majority": GREY,
    "best_of_n": BLUE,
    "beam": ORANGE,
    "step_rejection": GREEN,
    "dvts": PURPLE,
    "rebase": SAND,
    "lookahead": RED,
}
_ROW_POINTS = 46.0  # height of a row of the choices
_SPARE = ("#4aa3a2", "#8c5a3c", "#5b6cc0", "#c48fa8", "#6d8f3a")


# ---------------------------------------------------------------- all of them


def draw_all(found: Document) -> dict[str, Figure]:
    """Every figure whose data are there, by file name, in the order of the report. `found`: with null for what is
    not finite (`flows.optimal_text.finite`)."""
    there = {
        "accuracy": any(curves(found, arms) for arms in text.arm_sets(found)),
        "ratios": any(text.state(r) != "unknown" for r in found.get("ratios", ())),
        "samples": bool(sample_lines(found)),
        "choices": bool((found.get("choices") or {}).get("rungs")),
        "bins": bool(text.rival_budgets(found) and _bin_kinds(found)),
        "across": bool(_across_rows(found)),
        "exchange": bool((found.get("exchange") or {}).get("rows")),
        "quality": bool(_quality_points(found)),
    }
    return {name: _DRAWINGS[name](found) for name, known in there.items() if known}


def save(figures: Mapping[str, Figure], out: Path) -> dict[str, Path]:
    """PNG files, by name."""
    out.mkdir(parents=True, exist_ok=True)
    paths = {name: out / f"{name}.png" for name in figures}
    for name, figure in figures.items():
        paths[name].write_bytes(render(figure, "png"))
    return paths


# ---------------------------------------------------------------- budget at equal accuracy


@styled
def draw_ratios(found: Document) -> Figure:
    """A dot with its 90 % interval for every kind of difficulty at every N; right of 1 the choice is cheaper."""
    sets, kinds, budgets = text.arm_sets(found), text.kinds_of(found), text.ratio_budgets(found)
    places = {(b, k): i * (len(kinds) + 0.9) + j for i, b in enumerate(budgets) for j, k in enumerate(kinds)}
    figure, panels = canvas(0.19 * (max(places.values()) + 1) + 1.4, len(sets), sharey=True, sharex=True)
    low, high = _ratio_limits(found)
    for axes, arms in zip(panels, sets, strict=True):
        for (budget, kind), place in places.items():
            _ratio_dot(axes, text.find_ratio(found, arms, kind, budget), place, kind, low)
        axes.axvline(1, color=INK, linewidth=1, zorder=1)
        panel_title(axes, text.set_title(found, arms))
        axes.grid(visible=False)
        axes.grid(visible=True, axis="x")
        axes.set_xscale("log", base=2)
        ticks = [t for t in (0.125, 0.25, 0.5, 1, 2, 4, 8, 16, 32, 64, 128) if low <= t <= high]
        axes.set_xticks(ticks, [f"{t:g}" for t in ticks])
        axes.minorticks_off()
        axes.set_xlim(low, high)
    for i, budget in enumerate(budgets):
        panels[0].annotate(
            f"N = {budget:g}", (0, i * (len(kinds) + 0.9) - 0.8), (-4, 0), xycoords=("axes fraction", "data"),
            textcoords="offset points", ha="right", va="center", color=INK, fontsize=8, fontweight="bold",
            annotation_clip=False,
        )  # fmt: skip
    panels[0].set_yticks(list(places.values()), [text.KINDS[kind] for _, kind in places])
    panels[0].set_ylim(max(places.values()) + 0.7, -1.2)
    label = "FLOPs of the strongest best-of-N over those of the choice, at equal accuracy (1: nothing saved)"
    figure.supxlabel(label, fontsize=8.5, color=MUTED)
    title(figure, text.finding("ratios", found))
    return figure


def _ratio_limits(found: Document) -> tuple[float, float]:
    ends = [r[name] for r in found.get("ratios", ()) for name in ("value", "low", "high") if r.get(name)]
    return min([0.8, *(end / 1.15 for end in ends)]), max([1.5, *ends]) * 1.5


def _ratio_dot(axes: Axes, row: Mapping[str, Any] | None, place: float, kind: str, edge: float) -> None:
    known = text.state(row)
    if row is None or known == "unknown":
        return
    if known == "never":
        style = {"va": "center", "color": MUTED, "fontsize": 7.5, "fontstyle": "italic"}
        axes.annotate("accuracy never reached", (1, place), (6, 0), textcoords="offset points", **style)
        return
    colour, ink = KIND_COLOURS[kind], MUTED if kind in ("random", "none") else KIND_COLOURS[kind]
    value, low, high = (max(row[name] or row["value"], edge) for name in ("value", "low", "high"))
    axes.plot([low, high], [place, place], color=colour, linewidth=1.6, solid_capstyle="butt", zorder=3)
    axes.plot([value], [place], color=colour, marker=_MARKERS[kind], markersize=5, zorder=4)
    axes.annotate(
        text.times(row["value"]), (high, place), (4, 0), textcoords="offset points", va="center", color=ink,
        fontsize=8, annotation_clip=False,
    )  # fmt: skip


# ---------------------------------------------------------------- the choices


@styled
def draw_choices(found: Document) -> Figure:
    """Rows are bins, columns budgets; colour is the family of the strategy, the text names it."""
    from matplotlib.patches import Patch, Rectangle

    choices = found["choices"]
    budgets = choices["budgets"][-7:]
    grid = [row[-len(budgets) :] for row in choices["rungs"]]
    families = list(dict.fromkeys(text.family(r["arm"]) for row in grid for r in row))
    colours = _family_colours(families)
    figure, (axes,) = canvas(_ROW_POINTS / 72 * len(grid) + 1.2)
    for place, row in enumerate(grid):
        for column, rung in enumerate(row):
            fill = _tint(colours[text.family(rung["arm"])], 0.12 + 0.33 * (rung["value"] or 0.0))
            box = {"facecolor": fill, "edgecolor": "white", "linewidth": 2.5}
            axes.add_patch(Rectangle((column - 0.5, place - 0.5), 1, 1, **box))
            same = column > 0 and (rung["arm"], rung["budget"]) == (row[column - 1]["arm"], row[column - 1]["budget"])
            _rung_text(axes, column, place, rung, budgets, same=same)
    axes.set(xlim=(-0.5, len(budgets) - 0.5), ylim=(len(grid) - 0.5, -0.5))
    axes.set_xticks(range(len(budgets)), [f"N = {b:g}" for b in budgets])
    counts = choices.get("counts") or [None] * len(grid)
    names = [text.bin_name(b + 1, len(grid)) for b in range(len(grid))]
    labels = [f"bin {name}" + (f"\nn = {n}" if n is not None else "") for name, n in zip(names, counts, strict=False)]
    axes.set_yticks(range(len(grid)), labels)
    axes.tick_params(length=0)
    axes.grid(visible=False)
    axes.spines[["left", "bottom"]].set_visible(False)
    axes.xaxis.tick_top()
    handles = [Patch(color=_tint(colours[name], 0.3), label=plain(name)) for name in families]
    figure.legend(handles=handles, loc="outside lower left", ncols=min(len(handles), 5), columnspacing=1.6)
    title(figure, text.finding("choices", found))
    return figure


def _rung_text(
    axes: Axes, column: int, place: int, rung: Mapping[str, Any], budgets: Sequence[float], *, same: bool
) -> None:
    """The value in bold, below it the choice; "as before" where the budget to the left chose the same."""
    if same:
        axes.text(column, place, "as before", ha="center", va="center", color=MUTED, fontsize=7.5)
        return
    name, _, options = strategy(rung["arm"]).partition(" (")
    room = 96 // max(len(budgets), 5)
    lines = [name, *textwrap.wrap(options.removesuffix(")"), room)[:2]]
    if rung["budget"] != budgets[column]:
        lines[-1] += f" @ {rung['budget']:g}"
    shown = [line if len(line) <= room + 6 else line[: room + 5] + "…" for line in lines]
    above, each = 13.0 / _ROW_POINTS, 8.6 / _ROW_POINTS
    top = place - (above + each * len(shown)) / 2
    value = text.percent(rung["value"], 0)
    axes.text(column, top, value, ha="center", va="top", fontweight="bold", fontsize=9)
    words = plain("\n".join(shown))
    axes.text(column, top + above, words, ha="center", va="top", color=INK, fontsize=7, linespacing=1.15)


def _family_colours(families: Sequence[str]) -> dict[str, str]:
    known = {text.family(name): colour for name, colour in FAMILY_COLOURS.items()}
    spare = iter(_SPARE * (len(families) // len(_SPARE) + 1))
    return {family: known.get(family) or next(spare) for family in families}


def _tint(colour: str, share: float) -> str:
    """The colour on white."""
    from matplotlib.colors import to_hex, to_rgb

    red, green, blue = (1 - share * (1 - part) for part in to_rgb(colour))
    return to_hex((red, green, blue))


# ---------------------------------------------------------------- within bins


@styled
def draw_bins(found: Document) -> Figure:
    """One panel for each kind of difficulty: groups of bars by bin, hue by family, shade by budget."""
    from matplotlib.patches import Patch

    kinds = _bin_kinds(found)
    everyone, budgets = text.rivals(found), text.rival_budgets(found)
    figure, panels = canvas(1.75 * len(kinds) + 0.9, 1, rows=len(kinds), sharey=True)
    for axes, kind in zip(panels, kinds, strict=True):
        _bin_bars(axes, found["by_bin"][kind], everyone, budgets)
        shades = f"  (light to dark: {text.at(budgets)})" if len(budgets) > 1 else f"  ({text.at(budgets)})"
        panel_title(axes, f"Bins of {text.KINDS[kind]} difficulty" + (shades if axes is panels[0] else ""))
    handles = [Patch(color=ROLE_COLOURS[role], label=plain(cut(rival.name))) for role, rival in everyone.items()]
    figure.legend(handles=handles, loc="outside lower left", ncols=3, columnspacing=1.6)
    title(figure, text.finding("bins", found))
    return figure


def _bin_kinds(found: Document) -> list[str]:
    return [kind for kind in text.KINDS if found.get("by_bin", {}).get(kind)]


def _bin_bars(
    axes: Axes, rows: Sequence[Mapping[str, Any]], everyone: Mapping[str, text.Rival], budgets: Sequence[float]
) -> None:
    width = 0.84 / (len(everyone) * len(budgets) + 0.35 * (len(everyone) - 1))
    for place, row in enumerate(rows):
        x = place - 0.42 + width / 2
        for role, rival in everyone.items():
            for i, budget in enumerate(budgets):
                value = text.in_bin(row, rival, budget)
                shade = 0.35 + 0.65 * (i + 1) / len(budgets)
                axes.bar(x, value or 0.0, 0.9 * width, color=_tint(ROLE_COLOURS[role], shade))
                if value is not None and i == len(budgets) - 1:
                    axes.annotate(
                        f"{100 * value:.0f}", (x, value), (0, 1.5), textcoords="offset points", ha="center",
                        fontsize=7, color=MUTED,
                    )  # fmt: skip
                x += width
            x += 0.35 * width
    axes.set_ylim(0, 1.08)
    axes.set_yticks([0, 0.5, 1], ["0 %", "50 %", "100 %"])
    labels = [f"{text.bin_name(row['bin'], len(rows))}  (n = {row['n']})" for row in rows]
    axes.set_xticks(range(len(rows)), labels)
    axes.set_xlim(-0.55, len(rows) - 0.45)
    axes.tick_params(axis="x", length=0)


# ---------------------------------------------------------------- budgets per question


@styled
def draw_across(found: Document) -> Figure:
    """Uniform against per question at equal mean FLOPs, and their paired difference."""
    rows = _across_rows(found)
    figure, (left, right) = canvas(3.2, 2)
    x = [r["flops"] for r in rows]
    left.plot(x, [r["uniform"] for r in rows], color=BLUE, marker="s", markersize=4.5, label="uniform")
    left.plot(x, [r["across"] for r in rows], color=ORANGE, marker="o", label="per question")
    for r in rows:
        lower = min(r["uniform"], r["across"])
        left.annotate(
            f"N = {r['budget']:g}" if r is rows[0] else f"{r['budget']:g}", (r["flops"], lower), (3, -8),
            textcoords="offset points", color=MUTED, fontsize=7.5, va="center",
        )  # fmt: skip
    log_axis(left, x, "mean FLOPs a problem, the same for both")
    accuracy_axis(left, [r[name] for r in rows for name in ("uniform", "across")])
    panel_title(left, "Accuracy")
    left.legend(loc="lower right")
    for place, r in enumerate(rows):
        low, high = (100 * (r[name] if r[name] is not None else r["gain"]) for name in ("low", "high"))
        colour = ORANGE if low > 0 else RED if high < 0 else MUTED
        right.plot([low, high], [place, place], color=colour, linewidth=1.6)
        right.plot([100 * r["gain"]], [place], color=colour, marker="o")
        right.annotate(
            f"{100 * r['gain']:+.1f}", (high, place), (4, 0), textcoords="offset points", va="center", color=colour,
            fontsize=8, annotation_clip=False,
        )  # fmt: skip
    right.axvline(0, color=INK, linewidth=1, zorder=1)
    right.set_yticks(range(len(rows)), [f"N = {r['budget']:g}" for r in rows])
    right.set_ylim(len(rows) - 0.4, -0.6)
    right.grid(visible=False)
    right.grid(visible=True, axis="x")
    start, end = right.get_xlim()
    right.set_xlim(start, end + 0.16 * (end - start))
    right.set_xlabel("points gained over uniform (paired, 95 %)")
    panel_title(right, "Gain of budgets per question")
    title(figure, text.finding("across", found))
    return figure


def _across_rows(found: Document) -> list[Mapping[str, Any]]:
    return [r for r in found.get("across", ()) if all(r[k] is not None for k in ("flops", "uniform", "across", "gain"))]


# ---------------------------------------------------------------- exchange, verifier quality


@styled
def draw_exchange(found: Document) -> Figure:
    """By bin, what the small model with search is ahead of the larger one at equal FLOPs; one panel a version."""
    exchange = found["exchange"]
    versions = list(dict.fromkeys(row["version"] for row in exchange["rows"]))
    figure, panels = canvas(3.3, len(versions), sharey=True)
    for axes, version in zip(panels, versions, strict=True):
        rows = [row for row in exchange["rows"] if row["version"] == version]
        parts = [[*row["bins"], row["all"]] for row in rows]
        labels = [str(p["bin"]) if p.get("bin") is not None else "all" for p in max(parts, key=len)]
        for i, (row, points) in enumerate(zip(rows, parts, strict=True)):
            colour, marker = (GREEN, ORANGE, PURPLE, BLUE, SAND, RED, INK)[i % 7], "osD^vPX"[i % 7]
            aside = 0.2 * (i - (len(rows) - 1) / 2)
            for place, point in enumerate(points):
                _exchange_dot(axes, place + aside, point, colour, marker)
            axes.plot([], [], color=colour, marker=marker, label=f"R = {row['R']:g}  (inference x {row['times']:.3g})")
        axes.axhline(0, color=INK, linewidth=1, zorder=1)
        axes.set_xticks(range(len(labels)), labels)
        axes.set_xlabel("bin (1: easiest)")
        panel_title(axes, text.VERSIONS.get(version, str(version)))
        axes.margins(y=0.12)
        axes.legend(loc="best", handlelength=1.6, fontsize=7.5)
    panels[0].set_ylabel("points ahead of the larger model")
    title(figure, text.finding("exchange", found))
    return figure


def _exchange_dot(axes: Axes, x: float, point: Mapping[str, Any], colour: str, marker: str) -> None:
    if point["gain"] is None:
        return
    low, high = (100 * (point[name] if point[name] is not None else point["gain"]) for name in ("low", "high"))
    axes.plot([x, x], [low, high], color=colour, linewidth=1.2)
    axes.plot([x], [100 * point["gain"]], color=colour, marker=marker, markersize=5)


@styled
def draw_quality(found: Document) -> Figure:
    """Saving against AUC, a panel for each N: graded checkers joined by a line, trained verifiers filled."""
    points, budgets = _quality_points(found), text.quality_budgets(found)
    ends = [v for p in points for s in p["savings"].values() if s for v in s.values() if v]
    low, high = min([0.9, *ends]) / 1.15, max([1.1, *ends]) * 1.3
    figure, panels = canvas(3.6, len(budgets), sharey=True, sharex=True)
    for axes, budget in zip(panels, budgets, strict=True):
        axes.set_yscale("log", base=2)
        axes.set_ylim(low, high)
        rows = [(p, s) for p in points if (s := p["savings"].get(f"{budget:g}")) and s["value"]]
        _quality_dots(axes, [row for row in rows if not row[0]["trained"]], BLUE)
        _quality_dots(axes, [row for row in rows if row[0]["trained"]], ORANGE)
        axes.axhline(1, color=INK, linewidth=1, zorder=1)
        panel_title(axes, f"N = {budget:g}")
        axes.set_xlabel("AUC of the verifier")
    ticks = [t for t in (0.25, 0.5, 1, 2, 4, 8, 16, 32) if low <= t <= high]
    panels[0].set_yticks(ticks, [f"{t:g} x" for t in ticks])
    panels[0].set_ylabel("FLOPs saved at equal accuracy")
    least, most = min(p["auc"] for p in points), max(p["auc"] for p in points)
    room = 0.3 * max(most - least, 0.05)
    for axes in panels:
        axes.minorticks_off()
        axes.set_xlim(least - room, most + room)
        axes.set_xticks([tick for tick in axes.get_xticks() if least - room <= tick <= 1.0])
    title(figure, text.finding("quality", found))
    return figure


def _quality_dots(axes: Axes, rows: Sequence[tuple[Any, Any]], colour: str) -> None:
    """The graded ones on a line, with names at its lower right; the trained ones filled, with names at the upper left.
    Names are moved apart where they would touch."""
    trained = colour == ORANGE
    ordered = sorted(rows, key=lambda row: (row[0]["auc"], row[1]["value"]))
    if not trained:
        axes.plot([p["auc"] for p, _ in ordered], [s["value"] for _, s in ordered], color=LIGHT_BLUE, linewidth=1.2)
    low, high = (math.log2(end) for end in axes.get_ylim())
    gap, sign = 0.07 * (high - low), 1 if trained else -1
    last = -math.inf
    for p, s in ordered if trained else reversed(ordered):
        axes.plot([p["auc"]] * 2, [s["low"] or s["value"], s["high"] or s["value"]], color=colour, linewidth=1)
        face = colour if trained else "white"
        axes.plot([p["auc"]], [s["value"]], color=colour, marker="o", markerfacecolor=face, zorder=4)
        last = max(last + gap, sign * math.log2(s["value"]) + 0.35 * gap)
        name = textwrap.shorten(text.harmless(p["verifier"]), 26, placeholder="…")
        axes.annotate(
            plain(name), (p["auc"], 2 ** (sign * last)), (-6 * sign, 0), textcoords="offset points", va="center",
            ha="right" if trained else "left", color=colour, fontsize=7,
        )  # fmt: skip


def _quality_points(found: Document) -> list[Mapping[str, Any]]:
    points = (found.get("quality") or {}).get("points", ())
    return [p for p in points if p["auc"] is not None and any(s and s["value"] for s in p["savings"].values())]


_DRAWINGS: Mapping[str, Callable[[Document], Figure]] = {
    "accuracy": draw_accuracy,
    "ratios": draw_ratios,
    "samples": draw_samples,
    "choices": draw_choices,
    "bins": draw_bins,
    "across": draw_across,
    "exchange": draw_exchange,
    "quality": draw_quality,
}
