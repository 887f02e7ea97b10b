"""What a round's StrategyTable chooses and is worth, and how table and predictor change over rounds; as rows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from flows.history import History, Round
from flows.report_text import Row, Table


def choices(round_: Round) -> Table:
    """For each bin of difficulty the strategy at each budget, easiest first."""
    found = read(round_)
    answer = found.get("answer")
    if not answer:
        return Table((), ())
    budgets = [f"{n:g}" for n in answer["budgets"]]
    by_bin = _by_bin(answer)
    hardest = len(by_bin)
    names = {1: "1, easiest", hardest: f"{hardest}, hardest"} if hardest > 1 else {1: "all"}
    rows = [Row((names.get(b, str(b)), *(name or "-" for name in chosen))) for b, chosen in enumerate(by_bin, 1)]
    return Table(("difficulty", *(f"at {n}" for n in budgets)), tuple(rows))


def worth(round_: Round) -> list[str]:
    """What the choice is worth on problems that it was not fitted on, in sentences."""
    found = read(round_).get("worth")
    if not found:
        return []
    lines: list[str] = []
    for row in found["budgets"][-1:]:
        lines.append(
            f"Within {row['budget']:g} samples a question the chosen strategies solve {100 * row['accuracy']:.1f} % "
            f"(± {196 * row['se']:.1f}) for {row['flops']:.3g} FLOPs; the best fixed one, {row['fixed']}, solves "
            f"{100 * row['fixed_accuracy']:.1f} % for {row['fixed_flops']:.3g}."
        )
    for ratio in found["ratios"]:
        baseline = f"{ratio['baseline']} at {ratio['budget']:g} samples"
        if not ratio["value"]:
            lines.append(f"No choice is as accurate as {baseline}.")
            continue
        lines.append(
            f"{baseline} takes {ratio['value']:.1f} times the FLOPs for the same accuracy (90 %: {ratio['low']:.1f} to "
            f"{ratio['high']:.1f})."
        )
    why = read(round_).get("difficulty", "")
    lines += [f"Every question gets the same: {why}."] if why != "predicted" else []
    if left_out := read(round_).get("left_out"):
        lines.append(f"Not measured: {', '.join(left_out)}: difficulty.samples are too few.")
    return lines


def over_rounds(history: History) -> Table:
    """Predictor and table of every round: how well difficulty is told, what choosing by it saves, and what the
    hardest and the easiest questions get at the largest budget."""
    rows: list[Row] = []
    for r in history.proper:
        answer = read(r).get("answer")
        d, t = r.group("difficulty/"), r.group("table/")
        if not answer or not t:
            continue
        savings = sorted((int(n.rpartition("_")[2]), f) for n, f in t.items() if n.startswith("saving_at_"))
        last = [chosen[-1] or "-" for chosen in _by_bin(answer)]
        share = f"{d['spearman'].value:.2f}" if "spearman" in d else "-"
        ceiling = f" of {d['spearman_ceiling'].value:.2f}" if "spearman_ceiling" in d else ""
        saving = ", ".join(f"{f.value:.1f} x at {n}" for n, f in savings) or "-"
        rows.append(Row((str(r.number), share + ceiling, saving, last[0] if last else "-", last[-1] if last else "-")))
    heads = ("round", "Spearman", "saving", "easiest questions get", "hardest questions get")
    return Table(heads if rows else (), tuple(rows))


def _by_bin(answer: dict[str, Any]) -> list[list[str | None]]:
    """What each bin gets at each budget, the easiest bin first."""
    return [answer["choices"][b] for b in sorted(answer["choices"].keys() - {"all"}, key=int)]


def read(round_: Round) -> dict[str, Any]:
    """The table stage's report; empty where there is none."""
    path = Path(round_.folder) / "table" / "report.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
