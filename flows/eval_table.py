"""What `ratchet eval` prints: accuracy with what it gains and saves, then what a problem costs. Fits 100 columns."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from flows.show import count, seconds

Result = Mapping[str, Any]
SPENT = {
    "samples": "samples",
    "generated_tokens": "generated",
    "prefilled_tokens": "prefilled",
    "cached_tokens": "cached",
    "verifier_tokens": "verifier",
    "flops_ideal": "FLOPs",
    "flops_actual": "actual",
}
LEAST = ("flops_actual", "cached_tokens", "prefilled_tokens", "verifier_tokens")
_MARKS = {"greedy": "g", "majority": "m"}


def show(found: Mapping[str, Any], console: Console | None = None) -> None:
    """On stdout."""
    console = console or Console(highlight=False, width=None if sys.stdout.isatty() else 120)
    where = f", {found['split']}" if "split" in found else ""
    model = f"{found['model']} on " if "model" in found else ""
    console.print(Text(f"{model}{found['task']}{where}: {found['n']} problems, {found['ungraded']} ungraded"))
    results = found["results"]
    accuracies = _fitting(_accuracies, found, ("saving", "over weighted"), console)
    console.print(accuracies)
    for line in _legend(results, [str(column.header) for column in accuracies.columns]):
        console.print(Text(line, style="dim"))
    if any(r["spend"]["generated_tokens"] for r in results):
        console.print()
        console.print(_fitting(_spends, found, LEAST, console))
        console.print(Text("per problem; FLOPs: each distinct token once, actual: as computed", style="dim"))
    if unfinished := found.get("unfinished"):
        tokens = count(unfinished["generated_tokens"])
        console.print(Text(f"besides these: {tokens} tokens for what --max-tokens cut off", style="dim"))
    if any(r.get("approximate") for r in results):
        console.print(Text("approximate: the engine does not return its token ids, so prefixes may differ from them"))
    for line in _failures(results):
        console.print(Text(line))


def _fitting(
    draw: Callable[[Mapping[str, Any], Sequence[str]], Table],
    found: Mapping[str, Any],
    least: Sequence[str],
    console: Console,
) -> Table:
    """On a narrow terminal without the columns that matter least."""
    tables = (draw(found, least[:num]) for num in range(len(least) + 1))
    wide = console.options.update(width=1000)
    widths = ((table, Measurement.get(console, wide, table).maximum) for table in tables)
    return next((table for table, width in widths if width <= console.width), draw(found, least))


def _accuracies(found: Mapping[str, Any], left_out: Sequence[str] = ()) -> Table:
    results: Sequence[Result] = found["results"]
    heads = ["strategy", found.get("unit", "samples"), "accuracy", "gain"]
    weighted = any(r.get("verifier_gain") for r in results) and "over weighted" not in left_out
    savings = any(_saving(r).plain for r in results) and "saving" not in left_out
    partial = any(r["n"] < found["n"] for r in results)
    heads += ["over weighted"] * weighted + ["saving"] * savings + ["problems"] * partial
    table = _table(heads)
    for name, r in _grouped(results):
        cells = [name, _budget(r, found), _accuracy(r), _gain(r.get("gain"), marked=True)]
        cells += [_gain(r.get("verifier_gain"))] * weighted
        cells += [_saving(r)] * savings + [Text(str(r["n"]))] * partial
        table.add_row(*cells)
    return table


def _spends(found: Mapping[str, Any], left_out: Sequence[str] = ()) -> Table:
    results: Sequence[Result] = found["results"]
    shown = [name for name in SPENT if name not in left_out and any(r["spend"][name] for r in results)]
    if found.get("unit", "samples") == "samples" and all(
        r["spend"]["samples"] == r["budget"] * r["n"] for r in results
    ):
        shown.remove("samples")
    timed = any(r.get("wall_s") for r in results)
    table = _table(["strategy", "budget", *(SPENT[name] for name in shown), *["time"] * timed])
    for name, r in _grouped(results):
        cells = [Text(count(_rounded(r["spend"][field] / max(1, r["n"])))) for field in shown]
        cells += [Text(seconds(r["wall_s"]) if r.get("wall_s") else "")] * timed
        table.add_row(name, _budget(r, found), *cells)
    return table


def _table(heads: Sequence[str]) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for index, head in enumerate(heads):
        table.add_column(Text(head), justify="right" if index else "left", no_wrap=True)
    return table


def _grouped(results: Sequence[Result]) -> Iterator[tuple[Text, Result]]:
    """A strategy is named in its first row."""
    for name, rows in itertools.groupby(results, key=lambda r: r["strategy"]):
        for index, row in enumerate(rows):
            yield Text("" if index else name), row


def _budget(r: Result, found: Mapping[str, Any]) -> Text:
    """Greedy is one sample, whatever the others are given."""
    if r["strategy"] == "greedy" and found.get("unit", "samples") != "samples":
        return Text("")
    return Text(f"{r['budget']:g}" if r["budget"] < 10_000 else count(r["budget"]))


def _accuracy(r: Result) -> Text:
    if r["accuracy"] is None:
        return Text("-")
    return Text(f"{100 * r['accuracy']:.1f} %" + ("" if r["se"] is None else f" ± {196 * r['se']:4.1f}"))


def _gain(gain: Mapping[str, Any] | None, *, marked: bool = False) -> Text:
    """In points, with its 95 % interval; bold where that leaves 0 out."""
    if gain is None:
        return Text("")
    text = f"{round(100 * gain['value'], 1) + 0.0:+.1f}"
    sure = gain["low"] is not None and (gain["low"] > 0 or gain["high"] < 0)
    text += "" if gain["low"] is None else f" ± {50 * (gain['high'] - gain['low']):4.1f}"
    mark = f" {_MARKS.get(gain['over'].partition('(')[0], '')}" if marked else ""
    return Text.assemble((text, "bold" if sure else ""), (mark, "dim"))


def _saving(r: Result) -> Text:
    found = r.get("saving") or {}
    if found.get("value") is not None:
        return Text(f"{found['value']:.1f} x")
    return Text("" if found.get("more_than") is None else f"> {found['more_than']:.1f} x")


def _rounded(value: float) -> float:
    return round(value, 1) if value < 100 else round(value)


def _legend(results: Sequence[Result], heads: Sequence[str]) -> Iterator[str]:
    if any(r.get("gain") for r in results):
        yield "± 95 %; gain: points over greedy (g) or majority (m), the better at this budget"
    overs = {r["saving"]["over"] for r in results if _saving(r).plain}
    if "saving" in heads:
        cost = "FLOPs" if any(r["spend"]["flops_ideal"] for r in results) else "samples"
        yield f"saving: {cost} that {min(overs)} needs for this accuracy, over its own"
        yield "> where it does not get there" + ("; for itself: that majority needs" if len(overs) > 1 else "")


def _failures(results: Sequence[Result]) -> Iterator[str]:
    for r in results:
        if r["failed"]:
            reason = r["failed_reason"]
            yield f"{r['strategy']} @ {r['budget']:g}: {r['failed']} of {r['n']} problems failed; most often: {reason}"
