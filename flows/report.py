"""The report of a round: one HTML page that needs nothing else, the figures as PNG, a summary in Markdown, metrics.

The page is built by flows/templates/report.html.j2 with escaping on; it holds no script and its content policy forbids
fetching anything. `flows.report_text` says the figures in words. Written after the verdict, from what is on disk.
"""

from __future__ import annotations

import base64
import json
import math
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from flows import report_text as text
from flows import table_text
from flows.findings import Findings, find
from flows.history import History, Round, greedy_gain, load_history, measured_sizes, paired, shard_files
from flows.limits import Counts, find_limits
from search import evaluate, stats

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_TEMPLATES = Path(__file__).parent / "templates"


def write_round_report(loop_dir: Path, number: int, out: Path, kind: str = "round") -> None:
    """Write report.html, summary.md, metrics.jsonl and plots/*.png of a round into `out`.

    metrics.jsonl is a pure function of what the stages wrote; the others also show wall times. Raises DataError where
    there is no such round.
    """
    from flows.plots import draw_all, save

    out.mkdir(parents=True, exist_ok=True)
    _write_metrics(round_metrics(loop_dir, number, kind), out)
    history = load_history(loop_dir, gains={(number, kind): out})
    round_ = history.find(number, kind)
    findings = find(history, round_)
    figures = draw_all(history, round_, findings)
    save(figures, out / "plots")
    (out / "summary.md").write_text(summary_markdown(history, round_), encoding="utf-8")
    (out / "report.html").write_text(render_page(history, round_, findings, figures), encoding="utf-8")


def write_loop_report(history: History, path: Path) -> None:
    """One page for the loop: its latest measured round in full, and all rounds side by side."""
    from flows.plots import draw_all

    measured = [r for r in history.proper if any(name.startswith("test/") for name in r.metrics)]
    round_ = (measured or history.proper)[-1]
    findings = find(history, round_)
    path.parent.mkdir(parents=True, exist_ok=True)
    page = render_page(history, round_, findings, draw_all(history, round_, findings), whole_loop=True)
    path.write_text(page, encoding="utf-8")


def render_page(
    history: History, round_: Round, findings: Findings, figures: Mapping[str, Figure], *, whole_loop: bool = False
) -> str:
    """The page as text."""
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_TEMPLATES),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    latest = f"round {round_.number}"
    title = f"Loop {history.name}" if whole_loop else f"{history.name}, {text.round_name(round_)}"
    return environment.get_template("report.html.j2").render(
        title=title,
        subtitle=f"Task {history.task}. " + (f"{text.rounds_so_far(history)} Latest: {latest}." if whole_loop else ""),
        verdict=round_.verdict,
        headline=text.headline(round_),
        explanation=text.explanation(round_),
        checks=text.checks(round_),
        figures=_embedded(history, figures),
        figures_table=text.figures_table(history, round_),
        rounds_table=text.rounds_table(history),
        findings=text.comparison_lines(history, round_),
        limits_sentence=text.limits_sentence(round_),
        moves=history.moves_by_hand,
        left_sentence=text.left_sentence(findings),
        data_lines=text.data_lines(round_),
        difficulty_table=text.difficulty_table(round_),
        verifier_table=text.verifier_table(round_),
        choices_table=table_text.choices(round_),
        choices_lines=table_text.worth(round_),
        choosers_table=table_text.over_rounds(history),
        cost_lines=text.cost_lines(round_),
        spend_table=text.spend_table(round_),
        solved=[asdict(example) for example in findings.solved],
        lost=[asdict(example) for example in findings.lost],
        examples_sentence=text.examples_sentence(findings),
        models_table=text.models_table(round_),
        source=f"runs/{history.path.name}/{round_.folder.name}",
    )


def _embedded(history: History, figures: Mapping[str, Figure]) -> dict[str, dict[str, str]]:
    """The figures as data addresses, with a caption and a description in words."""
    from flows.plots import render

    embedded: dict[str, dict[str, str]] = {}
    for name, figure in figures.items():
        data = base64.b64encode(render(figure, "svg")).decode()
        caption = text.CAPTIONS[name]
        embedded[name] = {
            "source": f"data:image/svg+xml;base64,{data}",
            "caption": caption,
            "alt": f"Chart. {caption} {text.description(name, history)}".strip(),
        }
    return embedded


def summary_markdown(history: History, round_: Round) -> str:
    """A few lines for an MLflow note or a Prefect artifact."""
    table = text.figures_table(history, round_)
    lines = [f"**{_plain(text.headline(round_))}**", "", *(_plain(line) for line in text.explanation(round_)), ""]
    if table.rows:
        lines += ["| " + " | ".join(map(_plain, table.heads)) + " |", "|" + " --- |" * len(table.heads)]
        lines += ["| " + " | ".join(map(_plain, row.cells)) + " |" for row in table.rows]
        lines.append("")
    limit = [line] if (line := text.limits_sentence(round_)) else []
    lines += [_plain(line) for line in (*text.comparison_lines(history, round_), *limit, *text.cost_lines(round_))]
    return "\n".join(lines).rstrip() + "\n"


def _plain(line: str) -> str:
    """Nothing in it is taken for Markdown or HTML: reasons may quote what a person or a model wrote."""
    one_line = " ".join(line.split())
    for mark in "\\`*_[]|#!":
        one_line = one_line.replace(mark, "\\" + mark)
    return one_line.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


# ---------------------------------------------------------------- metrics


def round_metrics(loop_dir: Path, number: int, kind: str = "round") -> dict[str, float | tuple[float, float]]:
    """Rows of metrics.jsonl; a tuple is (value, standard error). Reads the pools: seconds, not milliseconds.

    gain/{figure}, _low, _high, _n (challenger minus champion before, paired, 95 %), distill/efficiency (_low, _high by
    bootstrap over problems; _samples, _searched), limits/... (see `flows.limits`), spend/... of the round. No wall
    times: they would differ in a repeat.
    """
    round_ = load_history(loop_dir).find(number, kind)
    names = {"flops_ideal": "flops"}
    total = round_.total.spend.to_json()
    rows: dict[str, float | tuple[float, float]] = {f"spend/{names.get(n, n)}": float(v) for n, v in total.items()}
    if round_.before is None:
        return rows | _limits_rows(round_)
    gains = greedy_gain(round_.before.folder, round_.folder)
    ks = [k for k in measured_sizes(round_.metrics, "pass") if f"test/pass_at_{k}" in round_.before_metrics]
    old, new = shard_files(round_.before.folder, "pool-test"), shard_files(round_.folder, "pool-test")
    if ks and old and new:
        a, b = evaluate.read_pool(old, ks), evaluate.read_pool(new, ks)
        for name, rule in (("pass", "pass"), ("maj", "majority")):
            sizes = [k for k in ks if k > 1 or name == "pass"]  # a vote of one is pass@1
            found = {f"{name}_at_{k}": paired(a.by_key(rule, k), b.by_key(rule, k)) for k in sizes}
            gains |= {figure: gain for figure, gain in found.items() if gain}
        rows |= _efficiency_rows(a.counts, b.counts, round_) | _limits_rows(round_, a.counts, b.counts)
    else:
        rows |= _limits_rows(round_)
    for figure, gain in gains.items():
        rows[f"gain/{figure}"] = (gain.mean, gain.se)
        rows |= {f"gain/{figure}_low": gain.low, f"gain/{figure}_high": gain.high, f"gain/{figure}_n": float(gain.n)}
    return rows


def _limits_rows(
    round_: Round, before: Counts | None = None, after: Counts | None = None
) -> dict[str, float | tuple[float, float]]:
    found = find_limits(round_, before, after)
    return found.metrics() if found else {}


def _efficiency_rows(
    before: Mapping[str, tuple[int, int]], after: Mapping[str, tuple[int, int]], round_: Round
) -> dict[str, float]:
    """From (right, samples) by problem. Empty where search gained nothing over one sample."""
    keys = [key for key in before if key in after]
    size = min([round_.samples or math.inf, *(n for _, n in before.values())])
    one_P = np.array([before[key][0] / before[key][1] for key in keys])
    then_P = np.array([after[key][0] / after[key][1] for key in keys])
    searched_P = np.array([stats.pass_at_k(before[key][1], before[key][0], int(size)) for key in keys])
    if not keys or searched_P.mean() <= one_P.mean():
        return {}

    def ratio(indices: Any) -> float:
        room = float(searched_P[indices].mean() - one_P[indices].mean())
        return float(then_P[indices].mean() - one_P[indices].mean()) / room if room > 0 else math.nan

    low, high = stats.bootstrap(len(keys), ratio, seed=f"efficiency/{round_.folder.name}", confidence=0.95)
    rows = {"": ratio(np.arange(len(keys))), "_low": low, "_high": high, "_samples": float(size)}
    rows |= {"_searched": float(searched_P.mean())}
    return {f"distill/efficiency{end}": value for end, value in rows.items() if math.isfinite(value)}


def _write_metrics(metrics: Mapping[str, float | tuple[float, float]], out: Path) -> None:
    def row(name: str, value: float | tuple[float, float]) -> dict[str, Any]:
        if isinstance(value, tuple):
            return {"name": name, "value": value[0], "se": value[1]}
        return {"name": name, "value": value}

    lines = [json.dumps(row(name, value)) + "\n" for name, value in sorted(metrics.items())]
    (out / "metrics.jsonl").write_text("".join(lines), encoding="utf-8")
