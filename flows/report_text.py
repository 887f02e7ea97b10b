"""A round in words and tables: what the report, the summary and the comparison say about it. No drawing, no HTML."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from flows import limits
from flows.findings import Findings, clean
from flows.history import Cost, Figure, History, ModelRef, Round, measured_sizes
from flows.show import count, seconds
from search.stats import PairedDifference

CAPTIONS = {
    "rounds": "The champion after every round. A cross is a challenger that was rejected, hollow marks are controls, "
    "dotted lines the base model.",
    "samples": "What more samples buy, for the base and the champions since. Dashed: one greedy answer.",
    "difficulty": "Gain by difficulty. The bins were fixed in round 0 by one half of the base's samples; the bars use "
    "the other half.",
    "left": "What the champion still misses, by the same bins. The middle part is what another round can learn from.",
    "candidates": "Every searched candidate is counted once, at the first filter that took it.",
    "spend": "Tokens computed (generated, prefilled, scored) and wall time, by stage.",
    "verifier": "The verifier on fresh answers to problems it was not trained on: what choosing by its scores is "
    "worth, whether a score means what it says, and whether length sways it. Bands and bars are 95 %.",
    "verifier_rounds": "Each round's verifier, and the one before on the same answers.",
    "calibration": "Left: predicted against sampled pass rates, in groups of equal size. Right: how well predictions "
    "rank problems; the dashed line is what labels this noisy allow.",
}


@dataclass(frozen=True, slots=True)
class Row:
    cells: tuple[str, ...]
    strong: bool = False


@dataclass(frozen=True, slots=True)
class Table:
    """Cells are text; the first of a row names it."""

    heads: tuple[str, ...]
    rows: tuple[Row, ...] = ()


def percent(value: float | None) -> str:
    """A share: "21.6 %"."""
    return "-" if value is None else f"{100 * value:.1f} %"


def points(gain: PairedDifference | None) -> str:
    """A gain in points with its 95 % interval: "+5.2 (+3.8 to +6.7)"."""
    if gain is None:
        return "-"
    return f"{100 * gain.mean:+.1f} ({100 * gain.low:+.1f} to {100 * gain.high:+.1f})"


def share(figure: Figure | None, *, error: bool = False) -> str:
    """A share in percent, with half of its 95 % interval: "21.6 ±1.8"."""
    if figure is None:
        return "-"
    half = f" ±{100 * figure.half_width:.1f}" if error and figure.se else ""
    return f"{100 * figure.value:.1f}{half}"


# ---------------------------------------------------------------- the verdict


def round_name(round_: Round) -> str:
    kinds = {"round": f"round {round_.number}", "control-random": f"round {round_.number}, control without search"}
    kinds["control-bootstrap"] = f"round {round_.number}, control with more base training"
    return kinds.get(round_.kind, f"round {round_.name}")


def headline(round_: Round) -> str:
    """The verdict in one sentence."""
    name = round_name(round_)
    name = name[0].upper() + name[1:]
    sentences = {
        "base": f"{name} measured the base model.",
        "promoted": f"{name} was promoted: its model is the new champion.",
        "rejected": f"{name} was rejected: the champion stays.",
        "abandoned": f"{name} was given up: the champion stays.",
        "control": f"{name}: a comparison, never promoted.",
    }
    return sentences.get(round_.verdict, f"{name} is not finished yet.")


def explanation(round_: Round) -> list[str]:
    """Why, in plain language."""
    primary = round_.gate.get("primary")
    if not isinstance(primary, Mapping):
        return [clean(round_.reason)] if round_.reason else []
    lines = [
        f"On {primary['n']:,} gate problems that neither model was trained on, the challenger reached "
        f"{percent(primary['challenger'])} {clean(str(primary['measure']))}, the champion "
        f"{percent(primary['champion'])}: {100 * primary['effect']:+.1f} points, 95 % interval "
        f"{100 * primary['low']:+.1f} to {100 * primary['high']:+.1f}."
    ]
    p, alpha = float(primary["p"]), float(primary["alpha"])
    chance = "p < 0.0001" if p < 1e-4 else f"p = {p:.4f}"
    sure = "beyond chance" if p < alpha else "not beyond chance"
    lines.append(
        f"{primary['wins']:,} problems were won and {primary['losses']:,} lost: {sure} ({chance}, allowed {alpha:.4g} "
        f"at look {round_.gate.get('look', 1)}). A gain of {100 * primary['mde']:.1f} points would have been found in "
        "four of five cases."
    )
    return lines


def checks(round_: Round) -> list[dict[str, Any]]:
    """Every check of the gate: {"passed", "text"}."""
    rows = round_.gate.get("checks", [])
    return [{"passed": bool(row["passed"]), "text": clean(str(row["text"]))} for row in rows]


def rounds_so_far(history: History) -> str:
    done = [r.verdict for r in history.proper if r.number]
    promoted, rejected = done.count("promoted"), done.count("rejected")
    return f"{len(done)} rounds: {promoted} promoted, {rejected} rejected."


# ---------------------------------------------------------------- figures


def shown_figures(history: History) -> dict[str, str]:
    """Metrics worth a line, by name: greedy, pass@1, the largest vote, and coverage."""
    sizes = measured_sizes(history.base.metrics, "pass")
    largest = max(sizes, default=1)
    shown = {"accuracy_greedy": "greedy", "pass_at_1": "pass@1"}
    shown |= {f"maj_at_{k}": f"maj@{k}" for k in sizes if k == largest > 1}
    shown |= {f"pass_at_{k}": f"pass@{k}" for k in sizes if k in (16, largest) and k > 1}
    return shown


def figures_table(history: History, round_: Round) -> Table:
    """Base, before, after and gain of every figure; in round 0 the base alone."""
    shown = shown_figures(history)
    base = history.base.metrics
    if round_.before is None:
        pairs = [(label, share(base.get(f"test/{name}"), error=True)) for name, label in shown.items()]
        return Table(("", "base"), tuple(Row(pair) for pair in pairs if pair[1] != "-"))
    rows: list[Row] = []
    for name, label in shown.items():
        after = round_.metrics.get(f"test/{name}")
        if after is not None:
            cells = (
                label,
                share(base.get(f"test/{name}")),
                share(round_.before_metrics.get(f"test/{name}"), error=True),
            )
            rows.append(Row((*cells, share(after, error=True), points(round_.gains.get(name)))))
    return Table(("", "base", "before", "after", "gain (95 %)"), tuple(rows))


def rounds_table(history: History) -> Table:
    """One row a model."""
    shown = shown_figures(history)
    rows: list[Row] = []
    for r in history.rounds:
        figures = [share(r.metrics.get(f"test/{name}")) for name in shown]
        cells = (row_name(r), r.verdict, *figures, points(r.gains.get("accuracy_greedy")))
        rows.append(Row(cells, strong=r.verdict in ("base", "promoted")))
    return Table(("round", "verdict", *shown.values(), "greedy gain (95 %)"), tuple(rows))


def row_name(round_: Round) -> str:
    """Short, for tables: "1", "1 random"."""
    return f"{round_.number} {round_.kind.removeprefix('control-')}" if round_.kind != "round" else str(round_.number)


def comparison_lines(history: History, round_: Round) -> list[str]:
    """What distilling kept, what happened to coverage, and what the controls reached."""
    lines: list[str] = []
    kept = round_.efficiency
    if kept is not None:
        error = ""
        if kept.low is not None and kept.high is not None:
            error = f" (95 % interval {100 * kept.low:.0f} to {100 * kept.high:.0f})"
        lines.append(
            f"Distilling kept {100 * kept.value:.0f} %{error} of what search gained over one sample: before the round, "
            f"{percent(_value(round_.before_metrics, 'test/pass_at_1'))} of single samples were right and "
            f"{percent(kept.searched)} of the problems had a right one among {kept.samples}; now "
            f"{percent(_value(round_.metrics, 'test/pass_at_1'))} of single samples are right."
        )
    largest = max(measured_sizes(round_.metrics, "pass"), default=1)
    coverage = round_.gains.get(f"pass_at_{largest}")
    if coverage is not None and largest > 1:
        change = "rose" if coverage.low > 0 else "fell" if coverage.high < 0 else "did not change measurably"
        lines.append(f"Coverage {change}: pass@{largest} {points(coverage)} points.")
    for control in history.controls(round_.number) if round_.kind == "round" else ():
        gain = control.gains.get("accuracy_greedy")
        if gain is not None:
            what = {"control-random": "random right samples instead of search"}.get(control.kind, "more base training")
            lines.append(f"The control with {what} gained {points(gain)} points greedily.")
    return lines


def limits_sentence(round_: Round) -> str:
    """Which of verifier, search and distillation limits the loop; empty where that was not measured."""
    found = limits.from_metrics(round_.metrics)
    return found.sentence() if found else ""


def _value(metrics: Mapping[str, Figure], name: str) -> float | None:
    figure = metrics.get(name)
    return None if figure is None else figure.value


def description(name: str, history: History) -> str:
    """What a chart shows, for those who cannot see it; the other charts stand beside tables."""
    if name == "rounds":
        lines = [
            f"{label}: "
            + ", ".join(f"round {r.number} {share(r.champion_metrics.get(f'test/{metric}'))} %" for r in history.proper)
            for metric, label in shown_figures(history).items()
        ]
        return "The champion after each round. " + "; ".join(lines) + "."
    if name == "samples":
        models = {"base": history.base.metrics, "latest champion": history.proper[-1].champion_metrics}
        lines = []
        for label, metrics in models.items():
            values = (f"pass@{k} {share(metrics.get(f'test/pass_at_{k}'))} %" for k in measured_sizes(metrics, "pass"))
            lines.append(f"{label}: {', '.join(values)}.")
        return " ".join(lines)
    return ""


def left_sentence(findings: Findings) -> str:
    """How much search still finds that the greedy answer misses, and where."""
    rows = [row for row in findings.bins if row.left is not None]
    total = sum(row.num for row in rows)
    if not total:
        return ""
    mass = {row.bin: row.num * row.left.searched for row in rows if row.left}
    unsolved = sum(row.num * row.left.unsolved for row in rows if row.left)
    first = max(mass, key=lambda place: mass[place])
    names = {1: "the easiest bin", len(findings.bins): "the hardest bin"}
    return (
        f"Search with {findings.samples} samples still solves {sum(mass.values()):.0f} of {total} problems that the "
        f"champion's greedy answer misses, most of them ({mass[first]:.0f}) in {names.get(first, f'bin {first}')}; "
        f"{unsolved:.0f} it does not solve either."
    )


def examples_sentence(findings: Findings) -> str:
    return (
        f"Of the test problems, {findings.num_solved} greedy answers became right and {findings.num_lost} wrong. "
        f"The first of each follow."
    )


# ---------------------------------------------------------------- data, difficulty, cost, models


def data_lines(round_: Round) -> list[str]:
    data = {name: figure.value for name, figure in round_.group("data/").items()}
    if "rows" not in data:
        return []
    line = f"{data['rows']:,.0f} training rows"
    parts = {"new_rows": "new in this round", "replay_rows": "replayed from the base's own data"}
    known = [f"{data[name]:,.0f} {words}" for name, words in parts.items() if name in data]
    line += f" ({', '.join(known)})" if known else ""
    if "distinct_solutions" in data:
        line += f"; {data['distinct_solutions']:,.0f} distinct right solutions were found"
    return [line + "."]


_DIFFICULTY = {
    "spearman": "rank correlation (Spearman)",
    "length_spearman": "... of the prompt's length alone",
    "metadata_spearman": "... of what the task says of the question",
    "spearman_ceiling": "... that labels this noisy allow",
    "spearman_share": "... as a share of that",
    "brier": "Brier score",
    "brier_rate": "squared error of the rate",
    "constant_brier_rate": "... of a constant",
    "ece": "calibration error",
    "auroc": "AUC, solvable or not",
    "bin_agreement": "share of questions in the bin that their samples give",
    "bin_agreement_within_one": "... or in the next",
    "bin_agreement_chance": "... by chance",
}


def difficulty_table(round_: Round) -> Table:
    found = round_.group("difficulty/")
    rows = [
        Row((label, f"{found[name].value:.4f}" + (f" ±{found[name].half_width:.4f}" if found[name].se else "")))
        for name, label in _DIFFICULTY.items()
        if name in found
    ]
    return Table(("", f"round {round_.number}"), tuple(rows))


_VERIFIER = {
    "auc_within": "AUC within problems",
    "auc": "AUC over all answers",
    "step_auc": "AUC of steps",
    "value_auc": "AUC of unfinished answers, against fresh rollouts",
    "first_error_f1": "F1 of the first wrong step",
    "brier": "Brier score",
    "ece": "calibration error",
    "auc_within_previous": "AUC within problems of the verifier before, same answers",
    "brier_previous": "Brier score of the verifier before, same answers",
}
_REVISION = {
    "right_to_wrong": "right answers revised to wrong",
    "wrong_to_right": "wrong answers revised to right",
}


def verifier_table(round_: Round) -> Table:
    """Ranking and calibration of the verifier, and what the reviser does to answers."""
    names = {f"verifier/{name}": label for name, label in _VERIFIER.items()}
    names |= {f"revision/{name}": label for name, label in _REVISION.items()}
    found = [(label, figure) for name, label in names.items() if (figure := round_.metrics.get(name))]
    rows = [
        Row((label, f"{figure.value:.4f}" + (f" ±{figure.half_width:.4f}" if figure.se else "")))
        for label, figure in found
    ]
    return Table(("", f"round {round_.number}"), tuple(rows))


def per_point(round_: Round) -> Cost | None:
    """What one point of greedy accuracy cost; None where the gain may be nothing (95 %). Tokens are rounded."""
    gain = round_.gains.get("accuracy_greedy")
    if gain is None or gain.low <= 0:
        return None
    from search.evaluate import scale

    factor = 1 / (100 * gain.mean)
    return Cost(scale(round_.total.spend, factor), round_.total.wall_s * factor)


def cost_lines(round_: Round) -> list[str]:
    total, each = round_.total, per_point(round_)
    lines = [f"The round computed {count(total.tokens)} tokens in {seconds(total.wall_s)}."]
    if each is not None:
        lines.append(
            f"One point of greedy accuracy cost {count(each.tokens)} tokens, {count(each.spend.flops_ideal)}FLOP and "
            f"{seconds(each.wall_s)}."
        )
    return lines


def spend_table(round_: Round) -> Table:
    def cells(name: str, cost: Cost) -> tuple[str, ...]:
        s = cost.spend
        tokens = (s.generated_tokens, s.prefilled_tokens, s.cached_tokens, s.verifier_tokens)
        shown = [count(n) if n else "-" for n in (s.samples, *tokens, s.flops_ideal, s.flops_actual)]
        return (name, *shown, seconds(cost.wall_s))

    heads = ("stage", "samples", "generated", "prefilled", "cached", "verifier", "FLOPs", "actual FLOPs", "wall time")
    rows = [cells(stage, cost) for stage, cost in round_.costs.items() if cost != Cost()]
    if not rows:
        return Table(heads)
    rows.append(cells("all", round_.total))
    used = [i for i in range(len(heads)) if any(row[i] != "-" for row in rows)]
    kept = [Row(tuple(row[i] for i in used), strong=row[0] == "all") for row in rows]
    return Table(tuple(heads[i] for i in used), tuple(kept))


def models_table(round_: Round) -> Table:
    models: Sequence[tuple[str, ModelRef | None]] = (
        ("champion before", round_.before),
        ("challenger" if round_.number else "base", round_.challenger),
        ("champion after", round_.champion),
    )
    rows = [Row((name, clean(m.path), m.fingerprint or "not measured")) for name, m in models if m is not None]
    return Table(("", "path", "fingerprint"), tuple(rows))
