"""What a round looks like in the terminal: progress on stderr while it runs, a short table on stdout at the end."""

from __future__ import annotations

import time
import unicodedata
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, Task, TaskID, TextColumn
from rich.table import Table
from rich.text import Text

LINE_S = 60.0  # between two lines of progress where there is no terminal


def seconds(value: float) -> str:
    """A duration a person reads at a glance: "0.4 s", "12 s", "1 min 40 s", "2 h 05 min"."""
    if value < 9.95:
        return f"{value:.1f} s"
    whole = round(value)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def count(value: float) -> str:
    """A count in few digits: "9.51", "950", "48.2 k", "1.3 M", "2.1 T"."""
    for limit, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= limit:
            return f"{value / limit:.3g} {unit}"
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def harmless(text: str) -> str:
    """Foreign text that may be shown: control, format and private characters become visible marks.

    Terminals obey escape sequences, and bidirectional marks reorder what a person reads. HTML is escaped elsewhere.
    """
    return "".join(c if c in "\n\t" or unicodedata.category(c)[0] != "C" else "\N{REPLACEMENT CHARACTER}" for c in text)


class _Left(TextColumn):
    """Time left of a stage: from its own speed once it has one, before that from how long it took last time."""

    def __init__(self) -> None:
        super().__init__("")

    def render(self, task: Task) -> Text:
        if task.finished:
            return Text("")
        elapsed = task.elapsed or 0.0
        done = task.completed / task.total if task.total else 0.0
        if done > 0.02:
            left = elapsed * (1 - done) / done
        elif task.fields["expected_s"]:
            left = max(task.fields["expected_s"] - elapsed, 0.0)
        else:
            return Text(f"{seconds(elapsed)} so far", style="dim")
        return Text(f"about {seconds(left)} left", style="dim")


class Display:
    """Implements the driver's observer on a console. One line a stage; the running one has a bar and the time left."""

    def __init__(self, console: Console):
        self.console = console
        self._progress: Progress | None = None
        self._task: TaskID | None = None
        self._started_s = 0.0
        self._told_s = 0.0  # when a log last got a line

    def round_started(self, title: str, expected_s: float | None) -> None:
        about = f"  [dim]expected {seconds(expected_s)}[/dim]" if expected_s else ""
        self.console.print(f"[bold]{title}[/bold]{about}", highlight=False)

    def stage_started(self, name: str, what: str, expected_s: float | None) -> None:
        self._started_s = self._told_s = time.monotonic()
        if not self.console.is_terminal:
            return
        self._progress = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            TextColumn("{task.fields[info]}", markup=False),
            _Left(),
            console=self.console,
            transient=True,
        )
        self._task = self._progress.add_task(f"{name:<11}", total=None, info=what, expected_s=expected_s)
        self._progress.start()

    def progress(self, name: str, done: float, total: float, **info: Any) -> None:
        """`info`: tokens generated, steps (continuations: the size of all trees), loss; what runs, problems "3/8"."""
        shown = self._describe(done, total, info)
        if self._progress is not None and self._task is not None:
            self._progress.update(self._task, completed=done, total=total, info=shown)
            return
        now_s = time.monotonic()
        if now_s - self._told_s >= LINE_S and done < total:  # a log gets a line now and then
            self._told_s = now_s
            left = (now_s - self._started_s) * (total - done) / done if done else 0.0
            about = f" · about {seconds(left)} left" if left else ""
            self.console.print(Text(f"  {name:<11}{shown}{about}"), soft_wrap=True)

    def _describe(self, done: float, total: float, info: Mapping[str, Any]) -> str:
        parts = [info["what"]] if info.get("what") else []
        parts.append(f"{info['problems']} problems" if "problems" in info else f"{done:g}/{total:g}")
        if "tokens" in info:
            elapsed_s = max(time.monotonic() - self._started_s, 1e-3)
            parts.append(f"{count(info['tokens'] / elapsed_s)} tok/s")
        if info.get("steps"):
            parts.append(f"{count(info['steps'])} steps")
        if "loss" in info:
            parts.append(f"loss {info['loss']:.3f}")
        return " · ".join(parts)

    def stage_finished(self, name: str, wall_s: float, note: str, *, resumed: bool) -> None:
        self.stop()
        time_text = "done earlier" if resumed else seconds(wall_s)
        line = Text.assemble(("  ✓ ", "green"), f"{name:<11}", f"{note:<48} ", (time_text, "dim"))
        self.console.print(line, soft_wrap=True)

    def stage_failed(self, name: str) -> None:
        """The message itself is the command's last line."""
        self.stop()
        self.console.print(Text.assemble(("  ✗ ", "red"), name))

    def note(self, message: str) -> None:
        self.console.print(Text(f"    {message}", style="dim"))

    def stop(self) -> None:
        """Take the bar away."""
        if self._progress is not None:
            self._progress.stop()
        self._progress = self._task = None


def plain_table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    """Names on the left, figures on the right, no lines."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for index, head in enumerate(heads):
        table.add_column(Text(head), justify="right" if index else "left")
    for row in rows:
        table.add_row(*map(Text, row))
    return table
