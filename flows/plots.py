"""The figures of a loop: for the README, the report and MLflow. Style and rendering: `flows.plot_style`."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distill.select import FILTERS
from flows.findings import BinRow, Findings
from flows.folders import STAGES
from flows.history import Z95, History, Round, measured_sizes, read_json
from flows.history import Figure as Value
from flows.plot_style import (
    BLUE,
    FAINT,
    GREEN,
    GREY,
    INK,
    LIGHT_BLUE,
    MUTED,
    ORANGE,
    PURPLE,
    SAND,
    canvas,
    label_ends,
    percent_axis,
    render,
    styled,
)
from flows.show import count, seconds
from search.stats import Estimate

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MANY = 5  # lines of rounds in one panel
STAGE_HUES = {  # neighbours in a round's order stay apart
    "problems": "#c7ccd3",
    "base": "#7a828c",
    "baseline": "#86aedb",
    "search": ORANGE,
    "select": INK,
    "distill": PURPLE,
    "evaluate": BLUE,
    "gate": "#c48fa8",
    "difficulty": GREEN,
    "verifier": SAND,
    "reviser": "#8fb8a0",
    "table": "#e3bd7d",
    "report": "#7a828c",
}


# ---------------------------------------------------------------- all of them


def draw_all(history: History, round_: Round, findings: Findings) -> dict[str, Figure]:
    """Every figure whose data are there, by file name, in the order of the report."""
    figures: dict[str, Figure] = {"rounds": over_rounds(history)}
    if measured_sizes(history.base.metrics, "pass"):
        figures["samples"] = against_samples(history)
    if any(row.num for row in findings.bins):
        figures["difficulty"] = by_difficulty(findings.bins, round_)
    if any(row.left for row in findings.bins):
        figures["left"] = what_is_left(findings.bins, findings.samples)
    if round_.filters:
        figures["candidates"] = candidates(round_.filters)
    if any(r.costs for r in history.rounds):
        figures["spend"] = spend(history)
    figures |= _of_verifier(history, round_)
    points = calibration_curve(round_)
    if points:
        figures["calibration"] = calibration(points, round_.group("difficulty/"))
    return figures


def _of_verifier(history: History, round_: Round) -> dict[str, Figure]:
    """Its health on the round's answers, and how that went over the rounds."""
    stored = read_json(round_.folder / "verifier" / "health.json")
    if not stored:
        return {}
    from flows.plots_verifier import draw_health, draw_rounds, over_rounds
    from search.verifiers.health import Health

    figures = {"verifier": draw_health(Health.from_json(stored))}
    if len(auc := over_rounds(history, "auc_within")) > 1:
        figures["verifier_rounds"] = draw_rounds(auc, over_rounds(history, "brier"))
    return figures


def save(figures: Mapping[str, Figure], out: Path) -> dict[str, Path]:
    """PNG files, by name."""
    out.mkdir(parents=True, exist_ok=True)
    paths = {name: out / f"{name}.png" for name in figures}
    for name, figure in figures.items():
        paths[name].write_bytes(render(figure, "png"))
    return paths


# ---------------------------------------------------------------- accuracy over rounds


@styled
def over_rounds(history: History) -> Figure:
    """The champion's figures after each round, with what was rejected and what the controls reached beside it."""
    largest = max(measured_sizes(history.base.metrics, "pass"), default=1)
    middle = [k for k in measured_sizes(history.base.metrics, "pass") if 1 < k < largest]
    accuracy = {"greedy": ("test/accuracy_greedy", BLUE), "pass@1": ("test/pass_at_1", ORANGE)}
    if largest > 1:
        accuracy[f"maj@{largest}"] = (f"test/maj_at_{largest}", GREEN)
    coverage = {f"pass@{k}": (f"test/pass_at_{k}", PURPLE if k == largest else SAND) for k in (*middle[-2:-1], largest)}
    figure, (left, right) = canvas(3.5, 2, width_ratios=(1, 1))
    _rounds_panel(left, history, accuracy, "Accuracy on the test problems")
    _rounds_panel(right, history, coverage, "Coverage: solved by any of k samples")
    _verdict_legend(figure, history)
    return figure


def _rounds_panel(axes: Axes, history: History, measures: Mapping[str, tuple[str, str]], title: str) -> None:
    labels: list[tuple[float, str, str]] = []
    last = max(r.number for r in history.rounds)
    for place, (name, (metric, colour)) in enumerate(measures.items()):
        kept = [(r.number, r.champion_metrics[metric]) for r in history.proper if metric in r.champion_metrics]
        if not kept:
            continue
        axes.axhline(kept[0][1].value, color=colour, linewidth=0.8, linestyle=(0, (1, 3)), zorder=1)
        axes.plot([x for x, _ in kept], [v.value for _, v in kept], color=colour, zorder=3)
        for r in history.rounds:
            _round_marker(axes, r, metric, colour, 0.11 + 0.06 * place)
        labels.append((kept[-1][1].value, f"{name}  {_percent(kept[-1][1].value)}", colour))
    axes.set_title(title)
    axes.set_xlabel("round (0 = the base model, dotted)")
    axes.set_xlim(-0.25, last + 0.25)
    axes.set_xticks(range(last + 1))
    percent_axis(axes)
    label_ends(axes, last + 0.25, labels)


def _round_marker(axes: Axes, r: Round, metric: str, colour: str, aside: float) -> None:
    value = r.metrics.get(metric)
    if value is None or r.verdict in ("abandoned", "unfinished"):
        return
    shape = {"control-random": "D", "control-bootstrap": "s"}.get(r.kind)
    style: dict[str, Any]
    if shape:
        x, style = r.number + aside, {"marker": shape, "markerfacecolor": "white", "markersize": 4.5}
    elif r.verdict == "rejected":
        x, style = r.number, {"marker": "X", "markersize": 6.5, "markeredgecolor": "white", "markeredgewidth": 0.6}
    else:
        x, style = r.number, {"marker": "o"}
    axes.errorbar([x], [value.value], [value.half_width], color=colour, elinewidth=1, zorder=4, **style)


def _verdict_legend(figure: Figure, history: History) -> None:
    from matplotlib.lines import Line2D

    def mark(label: str, **style: Any) -> Line2D:
        return Line2D([], [], color=MUTED, linestyle="none", label=label, **style)

    kinds, verdicts = {r.kind for r in history.rounds}, {r.verdict for r in history.rounds}
    handles = [mark("promoted", marker="o")]
    if "rejected" in verdicts:
        handles.append(mark("rejected challenger", marker="X", markersize=6.5))
    if "control-random" in kinds:
        handles.append(mark("control: no search", marker="D", markerfacecolor="white", markersize=4.5))
    if "control-bootstrap" in kinds:
        handles.append(mark("control: more base training", marker="s", markerfacecolor="white", markersize=4.5))
    handles.append(Line2D([], [], color=MUTED, linewidth=1, marker="|", linestyle="none", markersize=9, label="95 %"))
    figure.legend(handles=handles, loc="outside lower left", ncols=len(handles), handletextpad=0.3, columnspacing=1.6)


# ---------------------------------------------------------------- accuracy against samples


@styled
def against_samples(history: History) -> Figure:
    """What more samples buy: coverage and majority vote of the base and of the champions since."""
    figure, (left, right) = canvas(3.3, 2)
    for axes, figure_name, title in (
        (left, "pass", "Any of k samples is right (pass@k)"),
        (right, "maj", "Majority of k samples is right (maj@k)"),
    ):
        labels: list[tuple[float, str, str]] = []
        shown = _champions(history)
        last_k = 1
        for (label, metrics), colour in zip(shown, _shades(len(shown)), strict=True):
            sizes = measured_sizes(metrics, figure_name)
            values = [metrics[f"test/{figure_name}_at_{k}"] for k in sizes]
            if not sizes:
                continue
            last_k, ink = max(last_k, sizes[-1]), MUTED if colour == GREY else colour
            bars = [v.half_width for v in values]
            axes.errorbar(
                sizes, [v.value for v in values], bars, color=colour, marker="o", markersize=3.8, elinewidth=1
            )
            labels.append((values[-1].value, label, ink))
            greedy = metrics.get("test/accuracy_greedy")
            if figure_name == "maj" and greedy is not None and label in (shown[0][0], shown[-1][0]):
                axes.axhline(greedy.value, color=colour, linewidth=0.9, linestyle=(0, (4, 3)), zorder=1)
                labels.append((greedy.value, f"{label}, greedy", ink))
        _samples_axis(axes, last_k)
        axes.set_title(title)
        label_ends(axes, last_k * 1.16, labels)
    return figure


def _champions(history: History) -> list[tuple[str, Mapping[str, Value]]]:
    """The base, then the model of every promoted round; the latest ones where there are many."""
    promoted = [(f"round {r.number}", r.metrics) for r in history.proper if r.verdict == "promoted"]
    return [("base", history.base.metrics), *promoted[-(MANY - 1) :]]


def _samples_axis(axes: Axes, last_k: int) -> None:
    axes.set_xscale("log", base=2)
    ticks = [2**i for i in range(int(math.log2(last_k)) + 1)]
    axes.set_xticks(ticks, [str(k) for k in ticks])
    axes.minorticks_off()
    axes.set_xlim(0.86, last_k * 1.16)
    axes.set_xlabel("samples k")
    percent_axis(axes)


def _shades(num: int) -> list[str]:
    """From grey for the base to the full hue for the latest."""
    from matplotlib.colors import LinearSegmentedColormap, to_hex

    if num == 1:
        return [GREY]
    ramp = LinearSegmentedColormap.from_list("rounds", ["#9cc0e6", BLUE, "#0c2f5c"])
    return [GREY, *(to_hex(ramp(i / max(num - 2, 1))) for i in range(num - 1))]


# ---------------------------------------------------------------- difficulty


@styled
def by_difficulty(bins: Sequence[BinRow], round_: Round) -> Figure:
    """pass@1 within the bins of round 0: the base, the champion before, the challenger."""
    figure, (axes,) = canvas(3.0)
    series: list[tuple[str, str, list[Estimate]]] = [("base", GREY, [row.base for row in bins])]
    if round_.number > 1:
        series.append(("champion before", LIGHT_BLUE, [row.before for row in bins]))
    after = [row.after for row in bins if row.after is not None]
    if len(after) == len(bins):
        series.append((f"round {round_.number}, {round_.verdict}", BLUE, after))
    width = 0.8 / len(series)
    for i, (label, colour, values) in enumerate(series):
        x = [place + (i - (len(series) - 1) / 2) * width for place in range(len(bins))]
        bars = [Z95 * v.se if math.isfinite(v.se) else 0.0 for v in values]
        axes.bar(x, [v.value for v in values], width * 0.92, color=colour, label=label)
        axes.errorbar(x, [v.value for v in values], bars, fmt="none", color=INK, elinewidth=0.9)
        for place, value in zip(x, values, strict=True):
            top = value.value + (Z95 * value.se if math.isfinite(value.se) else 0.0)
            axes.annotate(
                f"{100 * value.value:.0f}", (place, top), (0, 2), textcoords="offset points", ha="center",
                fontsize=7.5, color=MUTED,
            )  # fmt: skip
    axes.set_xticks(range(len(bins)), [_bin_label(row, len(bins)) for row in bins])
    axes.tick_params(axis="x", length=0)
    axes.set_title("pass@1 by the base model's pass rate")
    percent_axis(axes)
    axes.legend(loc="upper right", ncols=1)
    return figure


@styled
def what_is_left(bins: Sequence[BinRow], samples: int) -> Figure:
    """Per bin: solved greedily, solved only by search, unsolved. The middle part is what another round can distil."""
    figure, (axes,) = canvas(0.38 * len(bins) + 1.15)
    rows = [row for row in bins if row.left is not None]
    parts = (
        ("solved by the greedy answer", BLUE, [row.left.greedy for row in rows if row.left], "white"),
        (f"only by one of {samples} samples", ORANGE, [row.left.searched for row in rows if row.left], "white"),
        ("by none", FAINT, [row.left.unsolved for row in rows if row.left], INK),
    )
    start = [0.0] * len(rows)
    for label, colour, shares, text_colour in parts:
        axes.barh(range(len(rows)), shares, 0.72, left=start, color=colour, label=label)
        for place, (share, begin) in enumerate(zip(shares, start, strict=True)):
            if share >= 0.05:
                axes.text(
                    begin + share / 2, place, f"{100 * share:.0f}", ha="center", va="center", color=text_colour,
                    fontsize=7.5,
                )  # fmt: skip
        start = [begin + share for begin, share in zip(start, shares, strict=True)]
    axes.set_yticks(range(len(rows)), [_bin_label(row, len(bins), "  ") for row in rows])
    axes.invert_yaxis()
    axes.grid(visible=False)
    axes.set_xlim(0, 1)
    axes.spines[["left", "bottom"]].set_visible(False)
    axes.set_xticks([])
    axes.set_title("What is left for the champion, % of the problems of a bin")
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower left", ncols=3, columnspacing=1.6)
    return figure


def _bin_label(row: BinRow, num_bins: int, separator: str = "\n") -> str:
    place = {1: "easiest", num_bins: "hardest"}.get(row.bin, f"bin {row.bin}")
    low, high = 100 * row.low, 100 * row.high
    rates = f"{low:.0f} %" if round(low) == round(high) else f"{low:.0f}-{high:.0f} %"
    return separator.join((place, rates, f"n = {row.num}"))


# ---------------------------------------------------------------- candidates and spend


@styled
def candidates(filters: Mapping[str, int]) -> Figure:
    """Where the searched candidates went: what each filter took, and what is kept."""
    total, kept, taken = split_filters(filters)
    rows = [("kept", kept), *sorted(taken.items(), key=lambda item: (-item[1], item[0]))]
    figure, (axes,) = canvas(0.27 * len(rows) + 0.75)
    longest = max(n for _, n in rows) or 1
    axes.barh(range(len(rows)), [n for _, n in rows], 0.68, color=[BLUE, *[GREY] * len(taken)])
    for place, (_, n) in enumerate(rows):
        share = f"  {100 * n / total:.1f} %" if total and n else ""
        axes.annotate(f"{n:,}{share}", (n, place), (4, 0), textcoords="offset points", va="center")
    axes.set_yticks(range(len(rows)), [name.replace("_", " ") for name, _ in rows])
    axes.invert_yaxis()
    axes.set_xlim(0, longest * 1.18)
    axes.grid(visible=False)
    axes.spines["bottom"].set_visible(False)
    axes.set_xticks([])
    axes.set_title(f"Where the {total:,} candidates went" if total else "Where the candidates went")
    return figure


def split_filters(counts: Mapping[str, int]) -> tuple[int, int, dict[str, int]]:
    """(candidates, kept, what each filter took) of select/counts.json."""
    taken = {name: counts[name] for name in FILTERS if name in counts}
    return counts.get("candidates", 0), counts.get("kept", 0), taken


@styled
def spend(history: History) -> Figure:
    """Tokens and wall time of every round, by stage."""
    rounds = [r for r in history.rounds if r.costs]
    stages = [stage for stage in STAGES if any(_large(r, stage) for r in rounds)]
    figure, (left, right) = canvas(0.3 * len(rounds) + 1.3, 2, sharey=True)
    _stack(left, [{stage: float(cost.tokens) for stage, cost in r.costs.items()} for r in rounds], stages, count)
    _stack(right, [{stage: cost.wall_s for stage, cost in r.costs.items()} for r in rounds], stages, seconds)
    names = [f"round {r.number}" if r.kind == "round" else r.kind.replace("-", ": ", 1) for r in rounds]
    left.set_yticks(range(len(rounds)), names)
    left.invert_yaxis()
    left.set_title("Tokens computed")
    right.set_title("Wall time")
    figure.legend(*left.get_legend_handles_labels(), loc="outside lower left", ncols=min(len(stages), 8))
    return figure


def _stack(
    axes: Axes, rows: Sequence[Mapping[str, float]], stages: Sequence[str], shown: Callable[[float], str]
) -> None:
    """One bar a row, made of its stages, with the sum of all its stages at the end."""
    ends = [0.0] * len(rows)
    for stage in stages:
        widths = [row.get(stage, 0.0) for row in rows]
        axes.barh(range(len(rows)), widths, 0.68, left=ends, color=STAGE_HUES[stage], label=stage)
        ends = [end + width for end, width in zip(ends, widths, strict=True)]
    for place, (end, row) in enumerate(zip(ends, rows, strict=True)):
        axes.annotate(shown(sum(row.values())), (end, place), (4, 0), textcoords="offset points", va="center")
    axes.set_xlim(0, max(ends) * 1.22 or 1)
    axes.set_xticks([])
    axes.grid(visible=False)
    axes.spines["bottom"].set_visible(False)


def _large(r: Round, stage: str) -> bool:
    """Worth a colour: 1 % of the round's tokens or time."""
    cost, total = r.costs.get(stage), r.total
    return cost is not None and (cost.tokens > 0.01 * total.tokens or cost.wall_s > 0.01 * total.wall_s)


# ---------------------------------------------------------------- the difficulty predictor


def calibration_curve(round_: Round) -> list[Mapping[str, float]]:
    """Points {"predicted", "observed", "se", "n"} of the difficulty predictor, from problems it did not see."""
    for name in ("report.json", "probe.json"):
        points = read_json(round_.folder / "difficulty" / name).get("curve")
        if points:
            return list(points)
    return []


@styled
def calibration(points: Sequence[Mapping[str, float]], figures: Mapping[str, Value]) -> Figure:
    """Predicted against observed pass rate, and how well the predictor ranks problems."""
    figure, (axes, side) = canvas(3.1, 2, width_ratios=(1.1, 1))
    predicted, observed = [p["predicted"] for p in points], [p["observed"] for p in points]
    end = min(1.0, 1.08 * max(*predicted, *(p["observed"] + Z95 * p["se"] for p in points), 0.05))
    axes.plot([0, end], [0, end], color=GREY, linewidth=1, linestyle=(0, (4, 3)), zorder=1)
    bars = [Z95 * p["se"] for p in points]
    axes.errorbar(predicted, observed, bars, color=BLUE, marker="o", linestyle="none", elinewidth=1, zorder=3)
    axes.set(xlim=(0, end), ylim=(0, end), xlabel="predicted pass rate", ylabel="observed pass rate")
    axes.set_title("Predicted difficulty (dashed: perfect)")
    percent_axis(axes)
    axes.xaxis.set_major_formatter(axes.yaxis.get_major_formatter())
    _ranking(side, figures)
    return figure


def _ranking(axes: Axes, figures: Mapping[str, Value]) -> None:
    names = {"spearman": "predictor", "length_spearman": "prompt length\nalone"}
    rows = [(names[name], figures[name]) for name in names if name in figures]
    for place, (_, value) in enumerate(rows):
        axes.barh(place, value.value, 0.55, color=LIGHT_BLUE if place else BLUE)
        axes.errorbar(value.value, place, xerr=value.half_width, fmt="none", color=INK, elinewidth=0.9)
        x = max(value.value, 0) + value.half_width
        axes.annotate(f"{value.value:.2f}", (x, place), (4, 0), textcoords="offset points", va="center")
    if "spearman_ceiling" in figures:
        x = figures["spearman_ceiling"].value
        axes.axvline(x, color=MUTED, linewidth=1, linestyle=(0, (4, 3)))
        axes.annotate(
            f"labels allow {x:.2f}", (x, 0.03), (-4, 0), xycoords=("data", "axes fraction"),
            textcoords="offset points", ha="right", color=MUTED, fontsize=7.5,
        )  # fmt: skip
    axes.set_yticks(range(len(rows)), [name for name, _ in rows])
    axes.set(xlim=(min(0, *(v.value - v.half_width for _, v in rows), 0), 1), ylim=(max(len(rows), 2) - 0.3, -0.6))
    axes.grid(visible=False)
    axes.set_title("Rank correlation with pass rates")
    axes.set_xlabel("Spearman")


# ---------------------------------------------------------------- shared


def _percent(value: float) -> str:
    return f"{100 * value:.1f} %"
