"""The report of `ratchet eval --report`: what the compute-optimal choice saves, as a page, figures, and in a terminal.

`write` leaves optimal.html (nothing fetched, no script, every value escaped), plots/*.png and optimal.json; `show`
prints the headline and two tables. `flows.optimal_text` says the findings, `flows.plots_optimal` draws them.
"""

from __future__ import annotations

import base64
import itertools
import json
import string
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table as RichTable
from rich.text import Text

from flows import optimal_text as text
from flows.optimal_text import Document, percent, ratio_cell, strategy, times
from flows.report_text import Row, Table
from flows.show import count, harmless, plain_table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_TEMPLATES = Path(__file__).parent / "templates"
CAPTIONS = {
    "accuracy": "Compute-optimal points were measured on the half of each bin that they were not fitted on, over many "
    "splits; the edges of bins are quantiles of all these problems. Fixed strategies need no fit, but the best of them "
    "was picked on these problems, which flatters it. Charged: policy and verifier, pruned branches included, and for "
    "knowing the difficulty what the table of ratios names; where it names nothing, the samples behind it were free, "
    "as in the paper. Arrows: the same accuracy.",
    "samples": "Samples are those a strategy may draw; it may stop before. The choice takes in each bin what the "
    "other half of the problems finds best for that many, or cheapest among equals.",
    "ratios": "FLOPs of the strongest best-of-N over those of the choice at the same accuracy; to the right of 1 the "
    "choice is cheaper. Bars are 90 % intervals over problems, each resample with its own bins, splits, fit and "
    "strongest baseline. Random bins and no bins are the controls: what they save is not owed to difficulty.",
    "choices": "What the table chooses, fitted on all problems. Its values are the fit's own estimates, shrunken and "
    "not held out: read them as reasons for the choice, not as results.",
    "bins": "Measured, nothing chosen by bin; one strategy of each family, the best over all problems. A bin holds few "
    "problems, so differences of a few points mean nothing.",
    "across": "Uniform: the same number of samples for every question, the table's choice in its bin. Per question: "
    "one price of compute for all, so that bins where more helps get more. Both fitted on the other half, at equal "
    "mean FLOPs, paired by problem; bars are 95 %. Knowing the bin costs both the same and is left out.",
    "exchange": "Accuracy of the small model with compute-optimal search less that of the larger one's greedy answer, "
    "when both have cost the same FLOPs in pre-training and inference. R: tokens of inference for each of "
    "pre-training. The two versions of the paper charge inference differently. Bars are 95 %.",
    "quality": "FLOPs of the strongest best-of-N over those of the choice, against how well the verifier tells right "
    "answers from wrong ones. Hollow: a perfect checker made worse; filled: trained verifiers. Bars are 90 % over "
    "problems.",
}


def write(found: Document, out: Path) -> Path:
    """The page with its figures and data, in `out`; returns the page's path."""
    from flows.plots_optimal import draw_all, save

    found = text.finite(found)
    out.mkdir(parents=True, exist_ok=True)
    (out / "optimal.json").write_text(json.dumps(found, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    figures = draw_all(found)
    save(figures, out / "plots")
    page = out / "optimal.html"
    page.write_text(render_page(found, figures), encoding="utf-8")
    return page


def render_page(found: Document, figures: Mapping[str, Figure]) -> str:
    """The page as text. `found` as `flows.optimal_text.finite` leaves it."""
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_TEMPLATES),
        autoescape=True,
        finalize=lambda value: harmless(value) if type(value) is str else value,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("optimal.html.j2").render(
        title=f"Compute-optimal search: {found.get('task') or 'a task'}",
        subtitle=subtitle(found),
        headline=text.headline(found),
        figures={name: _embedded(name, figure, found) for name, figure in figures.items()},
        tables={
            "accuracy": accuracy_table(found),
            "ratios": ratios_table(found),
            "cheapest": cheapest_table(found),
            "cells": cells_table(found),
            "choices": choices_table(found),
            "across": across_table(found),
            "exchange": exchange_table(found),
            "quality": quality_table(found),
        },
        bins={text.KINDS[kind]: bins_table(found, kind) for kind in text.KINDS if kind in found.get("by_bin", {})},
        models=models_sentence(found),
        unknowns=unknowns(found),
        made_of=(found.get("table") or {}).get("made_of") or {},
    )


def _embedded(name: str, figure: Figure, found: Document) -> dict[str, str]:
    """The figure as a data address, its caption, and a description in words."""
    from flows.plots_optimal import render

    data = base64.b64encode(render(figure, "svg")).decode()
    finding, caption = text.finding(name, found), CAPTIONS[name]
    source = f"data:image/svg+xml;base64,{data}"
    return {"source": source, "finding": finding, "caption": caption, "alt": f"Chart. {finding}. {caption}"}


def subtitle(found: Document) -> str:
    """Whose answers to what."""
    who = f"{found['model']} on " if found.get("model") else ""
    split = f", {found['split']} problems" if found.get("split") else " problems"
    counted = "FLOPs as computed" if found.get("actual") else "ideal FLOPs: each distinct prefix token once"
    parts = [f"{who}{found.get('task') or 'a task'}: {found['n']:,}{split.removeprefix(',')}", counted]
    parts += [f"{name} {found[name]}" for name in ("policy", "verifier") if found.get(name)]
    parts += ["no verifier"] if found.get("verifier", "") is None else []
    return "; ".join(harmless(str(part)) for part in parts) + "."


def models_sentence(found: Document) -> str:
    """The two models of the exchange."""
    exchange = found.get("exchange") or {}
    small, larger = exchange.get("small"), exchange.get("larger")
    if not small or not larger:
        return ""
    size = f"; M = {exchange['multiplier']:.3g}" if exchange.get("multiplier") else ""
    return f"Answering greedily, {_model('small', small)}, {_model('larger', larger)} (95 %){size}."


def _model(name: str, row: Mapping[str, Any]) -> str:
    units = {"parameters": "parameters", "flops": "FLOPs an answer"}
    sizes = [f"{count(row[key])} {unit}" for key, unit in units.items() if row.get(key)]
    error = "" if row.get("se") is None else f" ±{100 * text.Z95 * row['se']:.1f}"
    return f"the {name} model ({', '.join(sizes)}) solves {percent(row['accuracy'])}{error}".replace(" ()", "")


def unknowns(found: Document) -> list[str]:
    """What the figures do not say."""
    n, kinds = found["n"], text.kinds_of(found)
    lines = [
        f"One policy, one verifier, {n:,} problems: intervals are over problems, not over trainings. Other seeds "
        "may differ by more.",
        "Strategies that search step by step were searched once at each budget; the luck of that one search is in "
        "every figure.",
    ]
    lacking = [text.KINDS[kind] for kind in ("oracle", "verifier", "question") if kind not in kinds]
    if lacking:
        lines.append(f"Not measured: {text.joined(lacking)} difficulty.")
    if any(k in kinds for k in ("verifier", "question")) and "oracle" in kinds:
        lines.append("Oracle bins need the answers: a bound for prediction, not a way to answer.")
    if text.difficulty_adds(found):
        lines.append("What difficulty adds to the arms has no interval of its own, only those of both ratios.")
    never = sorted({(r["bins"], r["budget"]) for r in found.get("ratios", ()) if text.state(r) == "never"})
    if never:
        lines.append(f"{len(never)} ratios have no value: the choice never reaches that accuracy.")
    draws = [r["draws"] for r in found.get("ratios", ()) if r.get("draws")]
    if draws and min(draws) < 200:
        lines.append(f"The intervals come from {min(draws)} resamples: their ends are rough.")
    if not found.get("exchange"):
        lines.append("No larger model was compared at equal FLOPs.")
    if not found.get("quality"):
        lines.append("Only one verifier was used: what a better or worse one would save is not known.")
    return lines


# ---------------------------------------------------------------- in the terminal


def show(found: Document, console: Console | None = None) -> None:
    """The headline, ratios by kind of difficulty, choices by bin and budget, what stays unknown; 100 columns."""
    console = console or Console(highlight=False, width=None if sys.stdout.isatty() else 100)
    found = text.finite(found)
    console.print(Text(subtitle(found)))
    _show_lines(text.headline(found), console)
    _show_ratios(found, console)
    _show_choices(found, console)
    console.print(Text("\nNot known"))
    _show_lines(unknowns(found), console)


def _show_lines(lines: Sequence[str], console: Console) -> None:
    grid = RichTable.grid(padding=(0, 1))
    for line in lines:
        grid.add_row("  -", Text(line))
    console.print(grid)


def _show_ratios(found: Document, console: Console) -> None:
    """By difficulty, one set of arms below the other; the three largest budgets."""
    table = ratios_table(found, most=3)
    rows: list[tuple[str, ...]] = []
    for arms, group in itertools.groupby(table.rows, key=lambda row: row.cells[0]):
        rows.append((arms, *[""] * (len(table.heads) - 2)))
        rows += [(f"  {row.cells[1]}", *(cell.replace(" to ", "-") for cell in row.cells[2:])) for row in group]
    if rows:
        console.print(Text("\nFLOPs of the strongest best-of-N over those of the choice, at equal accuracy (90 %)"))
        console.print(plain_table(["difficulty", *table.heads[2:]], rows))


def _show_choices(found: Document, console: Console) -> None:
    """Strategies as letters, named below the table."""
    choices = found.get("choices") or {}
    rungs = choices.get("rungs") or []
    if not rungs:
        return
    budgets = choices["budgets"][-7:]
    grid = [row[-len(budgets) :] for row in rungs]
    arms = list(dict.fromkeys(rung["arm"] for row in grid for rung in row))
    letters = {arm: _letter(i) for i, arm in enumerate(arms)}
    cells = [
        [f"{letters[r['arm']]} {percent(r['value'], 0)}" + (f" @{r['budget']:g}" if r["budget"] != b else "")
         for r, b in zip(row, budgets, strict=True)]
        for row in grid
    ]  # fmt: skip
    names = [text.bin_name(b + 1, len(grid)) for b in range(len(grid))]
    rows = [[name, str(n), *row] for name, n, row in zip(names, choices["counts"], cells, strict=True)]
    kind = text.KINDS[text.main_kind(found)]
    console.print(Text(f"\nChoices by bin of {kind} difficulty, with what the fit expects (shrunken, not held out)"))
    console.print(plain_table(["bin", "problems", *(f"N = {b:g}" for b in budgets)], rows))
    for arm, letter in letters.items():
        console.print(Text(f"  {letter}  {strategy(arm)}", style="dim"))


def _letter(index: int) -> str:
    """a, b, ... z, aa, ab, ..."""
    before, last = divmod(index, 26)
    return (_letter(before - 1) if before else "") + string.ascii_lowercase[last]


# ---------------------------------------------------------------- tables


def ratios_table(found: Document, *, most: int = 6) -> Table:
    """By arms and kind of difficulty: how good and dear the prediction is, and the ratios."""
    budgets, known = text.ratio_budgets(found)[-most:], found.get("known", {})
    rows: list[Row] = []
    for arms in reversed(text.arm_sets(found)):
        for kind in text.kinds_of(found):
            facts = known.get(kind) or {}
            spearman, flops = facts.get("spearman"), facts.get("flops")
            cells = [ratio_cell(text.find_ratio(found, arms, kind, b)) for b in budgets]
            if set(cells) != {"-"}:
                first = [
                    text.KINDS[kind],
                    "-" if spearman is None else f"{spearman:.2f}",
                    count(flops) if flops else "-",
                ]
                rows.append(Row((text.SETS[arms], *first, *cells), strong=kind == text.main_kind(found)))
    return Table(("arms", "difficulty", "Spearman", "charged", *(f"N = {b:g}" for b in budgets)), tuple(rows))


def cheapest_table(found: Document) -> Table:
    """The same ratios against whichever baseline reaches the accuracy with the fewest FLOPs."""
    kind, rows = text.main_kind(found), list[Row]()
    for arms in reversed(text.arm_sets(found)):
        for budget in text.ratio_budgets(found):
            row = text.find_ratio(found, arms, kind, budget)
            if row and row.get("cheapest") is not None:
                pair = [strategy(row["baseline"]), ratio_cell(row), strategy(row["cheapest_baseline"])]
                low = f"{times(row['cheapest'])} (at least {times(row.get('cheapest_low'))})"
                rows.append(Row((text.SETS[arms], f"{budget:g}", percent(row["accuracy"]), *pair, low)))
    heads = ("arms", "N", "accuracy", "most accurate", "saving over it", "cheapest to that accuracy", "saving over it")
    return Table(heads, tuple(rows))


def accuracy_table(found: Document) -> Table:
    """What every line of the figure reaches for the FLOPs of the strongest best-of-N."""
    base = text.strongest(found).cells
    marks = [(b, base[b], text.cost(found, base[b]) or 0.0) for b in text.ratio_budgets(found) if b in base]
    rows = [Row(("strongest best-of-N", *(percent(cell["accuracy"]) for _, cell, _ in marks)))]
    for arms in reversed(text.arm_sets(found)):
        lines = {text.KINDS[k]: found["optimal"][arms].get(k) for k in text.kinds_of(found)}
        if best := text.best_search(found, arms):
            lines[f"always {strategy(best)}"] = found["fixed"].get(best)
        for name, points in lines.items():
            if (curve := text.curve_of(points)) is not None:
                reached = [text.finite(curve.accuracy_at(flops)) for _, _, flops in marks]
                strong = name == text.KINDS[text.main_kind(found)]
                rows.append(Row((f"{text.SETS[arms]}, {name}", *map(percent, reached)), strong=strong))
    heads = tuple(f"{count(flops)} (N = {b:g})" for b, _, flops in marks)
    return Table(("FLOPs a problem", *heads), tuple(rows) if marks else ())


def cells_table(found: Document) -> Table:
    """Everything that was measured."""
    rows: list[Row] = []
    for cell in sorted(found.get("cells", ()), key=lambda c: (c["arm"], c["budget"])):
        error = f" ±{100 * text.Z95 * cell['se']:.1f}" if cell.get("se") is not None else ""
        spent = [count(cell[name]) if cell.get(name) else "-" for name in ("flops", "flops_actual")]
        rows.append(Row((strategy(cell["arm"]), f"{cell['budget']:g}", percent(cell["accuracy"]) + error, *spent)))
    return Table(("strategy", "N", "accuracy (95 %)", "FLOPs", "actual FLOPs"), tuple(rows))


def choices_table(found: Document) -> Table:
    """In full: what is run in a bin at a budget, and what the fit expects of it."""
    choices = found.get("choices") or {}
    rows = [
        Row((text.bin_name(b + 1, len(choices["rungs"])), str(choices["counts"][b]), *map(_rung, rungs)))
        for b, rungs in enumerate(choices.get("rungs", ()))
    ]
    return Table(("bin", "problems", *(f"N = {b:g}" for b in choices.get("budgets", ()))), tuple(rows))


def _rung(rung: Mapping[str, Any]) -> str:
    return f"{strategy(rung['arm'])} @ {rung['budget']:g}: {percent(rung['value'], 0)}"


def bins_table(found: Document, kind: str) -> Table:
    """The bars of the figure."""
    budgets, bins = text.rival_budgets(found), found.get("by_bin", {}).get(kind, ())
    pairs = [(rival, b) for rival in text.rivals(found).values() for b in budgets]
    rows = [
        Row(
            (text.bin_name(r["bin"], len(bins)), str(r["n"]), *(percent(text.in_bin(r, who, b), 0) for who, b in pairs))
        )
        for r in bins
    ]
    return Table(("bin", "problems", *(f"{who.name} @ {b:g}" for who, b in pairs)), tuple(rows) if pairs else ())


def across_table(found: Document) -> Table:
    rows = [
        Row((f"{r['budget']:g}", count(r["flops"]), percent(r["uniform"]), percent(r["across"]), text.gain_points(r)))
        for r in found.get("across", ())
    ]
    return Table(("N", "mean FLOPs", "uniform", "per question", "gain in points"), tuple(rows))


def exchange_table(found: Document) -> Table:
    rows: list[Row] = []
    for row in (found.get("exchange") or {}).get("rows", ()):
        for part in (*row["bins"], row["all"]):
            number = str(part["bin"]) if part.get("bin") is not None else "all"
            pair = [percent(part["small"]), percent(part["larger"]), text.gain_points(part)]
            first = [text.VERSIONS.get(row["version"], row["version"]), f"{row['R']:g}", f"{row['times']:.4g}", number]
            rows.append(Row((*first, str(part.get("n", "-")), *pair), strong=number == "all"))
    heads = ("version", "R", "inference x", "bin", "problems", "small, searching", "larger, greedy", "gain in points")
    return Table(heads, tuple(rows))


def quality_table(found: Document) -> Table:
    if not found.get("quality"):
        return Table(())
    budgets = text.savings_budgets(found)
    rows = [
        Row((
            harmless(p["verifier"]), "trained" if p["trained"] else "graded",
            "-" if p["auc"] is None else f"{p['auc']:.3f}", *(ratio_cell(p["savings"].get(f"{b:g}")) for b in budgets),
        ))
        for p in found["quality"]["points"]
    ]  # fmt: skip
    return Table(("verifier", "kind", "AUC", *(f"N = {b:g}" for b in budgets)), tuple(rows))
