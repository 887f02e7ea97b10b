"""`ratchet compare`: the rounds of a loop side by side, as a table, as JSON or as an HTML page.

The JSON document is stable:

    {"loop": name,
     "rounds": [{
        "round": 1,
        "verdict": "base" | "promoted" | "rejected" | "abandoned" | "unfinished" | "control-random" | ...,
        "metrics": {"test/accuracy_greedy": 0.231, "test/accuracy_greedy_se": 0.009, ...},
        "gain": {"accuracy_greedy": {"value": 0.052, "low": 0.038, "high": 0.067, "n": 2000}, ...},
        "spend": {"samples": ..., "generated_tokens": ..., "flops_ideal": ..., ..., "wall_s": ...,
                  "stages": {"search": {the same}, ...},
                  "per_point": {"tokens": ..., "flops_ideal": ..., "wall_s": ...} | null},
        "models": {"before": {"path", "fingerprint"} | null, "challenger": ..., "champion": ...}}]}

`metrics` are those of the model that the round made; gains compare it with the champion that the round began with, over
the same problems, with 95 % intervals. `per_point` is the cost of one point of greedy accuracy, null where the gain may
be nothing.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flows import report_text as text
from flows import table_text
from flows.history import Cost, History, ModelRef, Round, load_history
from flows.show import count, seconds
from flows.state import loop_path
from search.errors import DataError

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

WIDTH = 100
_COLOURS = {"base": "cyan", "promoted": "green", "rejected": "red", "unfinished": "yellow"}


def run(
    runs_dir: Path, name: str, *, as_json: bool = False, html: Path | None = None, console: Console | None = None
) -> None:
    """The command. The document or the table goes to `console` (stdout), the page to `html`. Raises DataError."""
    from rich.console import Console

    console = console or Console()
    history = load_history(find_loop(runs_dir, name))
    if html is not None:
        from flows.report import write_loop_report

        write_loop_report(history, html)
    if as_json:
        line = json.dumps(document(history), allow_nan=False, sort_keys=False)
        console.file.write(line + "\n")
    else:
        print_table(history, console)


def find_loop(runs_dir: Path, name: str) -> Path:
    """The folder of a loop. Raises DataError naming those there are."""
    path = loop_path(runs_dir, name)
    if not path.is_dir():
        have = ", ".join(sorted(p.parent.name for p in runs_dir.glob("*/loop.json"))) or "none"
        raise DataError(
            f"no loop '{name}' in {runs_dir} (there: {have}): start one with `ratchet round CONFIG`, or say where "
            "loops lie with --runs-dir"
        )
    return path


# ---------------------------------------------------------------- JSON


def document(history: History) -> dict[str, Any]:
    """What `--json` prints; see the module. Only finite numbers."""
    return {"loop": history.name, "rounds": [_round_document(r) for r in history.rounds]}


def _round_document(r: Round) -> dict[str, Any]:
    metrics: dict[str, float] = {}
    for name, figure in sorted(r.metrics.items()):
        if name.startswith("gain/"):  # below, with their intervals
            continue
        metrics[name] = figure.value
        if figure.se is not None:
            metrics[f"{name}_se"] = figure.se
    gains = {
        name: {"value": g.mean, "low": g.low, "high": g.high, "n": g.n}
        for name, g in sorted(r.gains.items())
        if math.isfinite(g.low) and math.isfinite(g.high)
    }
    return {
        "round": r.number,
        "verdict": r.kind if r.verdict == "control" else r.verdict,
        "metrics": {name: value for name, value in metrics.items() if math.isfinite(value)},
        "gain": gains,
        "spend": _spend_document(r),
        "models": {"before": _model(r.before), "challenger": _model(r.challenger), "champion": _model(r.champion)},
    }


def _spend_document(r: Round) -> dict[str, Any]:
    def flat(cost: Cost) -> dict[str, float]:
        return cost.spend.to_json() | {"wall_s": cost.wall_s}

    each = text.per_point(r)
    stages = {stage: flat(cost) for stage, cost in r.costs.items()}
    per_point = each and {"tokens": each.tokens, "flops_ideal": each.spend.flops_ideal, "wall_s": each.wall_s}
    return {**flat(r.total), "stages": stages, "per_point": per_point}


def _model(model: ModelRef | None) -> dict[str, str | None] | None:
    return None if model is None else {"path": model.path, "fingerprint": model.fingerprint}


# ---------------------------------------------------------------- the terminal


def print_table(history: History, console: Console) -> None:
    """The rounds, one a line, and what the loop stands at. Colours follow the console, NO_COLOR included."""
    from rich.text import Text

    if not console.is_terminal:  # a pipe has no width: cut nothing
        console.width = max(console.width, WIDTH)
    console.print(Text.assemble((history.name, "bold"), f"  {history.task}. {text.rounds_so_far(history)}"))
    console.print(table(history, costs=console.width >= WIDTH))
    console.print(Text("% of the test problems; gain of the greedy answer in points, ± its 95 % interval", "dim"))
    if (chosen := table_text.over_rounds(history)).rows:
        console.print()
        console.print(_drawn(chosen))
        console.print(Text("of the winner's predictor and StrategyTable; saving: FLOPs at equal accuracy", "dim"))
    finished = [r for r in history.proper if r.number and r.gains]
    lines = text.comparison_lines(history, finished[-1])[:1] if finished else []
    lines = [f"Round {finished[-1].number}: {line[0].lower()}{line[1:]}" for line in lines]
    if history.champion is not None:
        lines.append(
            f"Champion: {text.clean(history.champion.path)} ({history.champion.fingerprint or 'not measured'})"
        )
    lines += [f"Round {r.name} is not finished: `ratchet round` resumes it." for r in history.rounds if unfinished(r)]
    for line in (*lines, *map(text.clean, history.moves_by_hand)):
        console.print(Text(line), soft_wrap=not console.is_terminal)


def _drawn(rows: text.Table) -> Table:
    from rich.table import Table
    from rich.text import Text

    drawn = Table(box=None, pad_edge=False, header_style="bold")
    for head in rows.heads:
        drawn.add_column(head)
    for row in rows.rows:
        drawn.add_row(*(Text(cell) for cell in row.cells))
    return drawn


def unfinished(r: Round) -> bool:
    return r.verdict == "unfinished"


def table(history: History, *, costs: bool = True) -> Table:
    """At most 100 columns wide, 80 without the costs."""
    from rich.table import Table
    from rich.text import Text

    shown = text.shown_figures(history)
    largest = max((name for name in shown if name.startswith("pass_at_")), key=_size, default="")
    names = [name for name in shown if not name.startswith("pass_at_") or name in ("pass_at_1", largest)]
    heads = ["round", "verdict", *(shown[name] for name in names), "gain"]
    drawn = Table(box=None, pad_edge=False, header_style="bold")
    for place, head in enumerate([*heads, "tokens", "time", "per point"] if costs else heads):
        drawn.add_column(head, justify="left" if place < 2 else "right", no_wrap=True)
    for r in history.rounds:
        gain, each = r.gains.get("accuracy_greedy"), text.per_point(r)
        cells = [text.share(r.metrics.get(f"test/{name}")) for name in names]
        cells.append(f"{100 * gain.mean:+.1f} ±{50 * (gain.high - gain.low):.1f}" if gain else "-")
        if costs:
            cells += [count(r.total.tokens), seconds(r.total.wall_s), count(each.tokens) if each else "-"]
        name = ("  " if r.kind != "round" else "") + text.row_name(r)
        drawn.add_row(Text(name), Text(r.verdict, _COLOURS.get(r.verdict, "dim")), *map(Text, cells))
    return drawn


def _size(name: str) -> int:
    return int(name.rpartition("_")[2])
