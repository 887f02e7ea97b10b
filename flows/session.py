"""What `ratchet round` and `ratchet loop` do around the driver: the terminal, MLflow, Prefect, the closing table.

The round's own journal decides the outcome. MLflow must answer at the start; after that neither it nor Prefect can
stop a round: what Prefect fails to run is run without it.
"""

from __future__ import annotations

import importlib
import json
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from configs.schema import Config
from flows import show, tracking
from flows.artefacts import Manifest
from flows.child import signals_end_children
from flows.driver import Observer
from flows.observers import Several, Silent, Terminal
from flows.quiet import silence
from flows.runner import Options, Outcome, improve
from flows.searching import check
from flows.server import PrefectServer, is_prefect_infrastructure_error
from flows.stage import Stages
from flows.state import Loop, RoundFolder, RoundRecord
from search.errors import ConfigError


class Mirror(Silent):
    """Tells the tracker where the round stands."""

    def __init__(self, tracker: tracking.Tracker) -> None:
        self._tracker = tracker

    def round_started(self, folder: RoundFolder, config: Config, expected_s: float | None) -> None:
        self._tracker.round_started(folder.path.name)

    def stage_started(self, folder: RoundFolder, name: str, expected_s: float | None) -> None:
        self._tracker.stage_started(name)

    def stage_finished(self, folder: RoundFolder, name: str, wall_s: float, resumed: bool) -> None:
        self._tracker.stage_finished(name)

    def stage_failed(self, folder: RoundFolder, name: str, message: str) -> None:
        self._tracker.stage_finished(name, failed=True)

    def round_finished(self, folder: RoundFolder, record: RoundRecord) -> None:
        self._tracker.round_finished()


FIRST_STAGES = ("problems", "base", "baseline")  # may run before Prefect is up; it then shows them as done


class _ServerReady(Exception):
    """Prefect can take over."""


class Session:
    """One call of the command line: a configuration, a runs folder, and what listens."""

    def __init__(
        self, config: Config, name: str, overrides: list[str], runs_dir: Path, *, prefect: str | None, as_json: bool
    ) -> None:
        self.config, self.name, self.overrides, self.runs_dir = config, name, overrides, runs_dir
        self.mode = prefect or config.orchestration.prefect
        if self.mode not in ("auto", "on", "off"):
            raise ConfigError(f"--prefect {self.mode}: expected auto, on or off")
        self.as_json = as_json
        self.console = Console(stderr=True, highlight=False)
        self.loop_dir = runs_dir / config.loop.name

    def round(self, *, control: str | None = None, abandon: bool = False, verify: bool = False) -> RoundRecord | None:
        """One round, shown as it runs; its record, or None where there was nothing to do."""
        if not abandon:
            check(self.config)
        with self._around() as run:
            outcome = run(Options(self.runs_dir, control=control, abandon=abandon, verify=verify))
        self._close(outcome)
        return outcome.last

    def base(self) -> None:
        """Round 0 alone, where there is none yet, without Prefect: what an evaluation of the base needs."""
        check(self.config)
        with self._around() as run:
            run(Options(self.runs_dir, base_only=True))

    def loop(self, rounds: int | None, *, until_flat: bool) -> None:
        """Rounds until the loop has `rounds` of them (default: as configured), or until a gain is not significant."""
        check(self.config)
        target = rounds or self.config.loop.rounds
        outcome = None
        with self._around() as run:
            while (done := self._rounds_done()) < target:
                outcome = run(Options(self.runs_dir))
                if outcome.nothing:
                    self.console.print(Text(outcome.nothing))
                    break
                self._close(outcome, links=False)
                if until_flat and outcome.last and outcome.last.verdict == "rejected" and done + 1 < target:
                    self.console.print("the gain of this round is not significant: the loop stops here")
                    break
        if outcome is None:
            self.console.print(f"loop {self.config.loop.name} has {done} rounds already; ask for more with --rounds")
        self._links()

    def _rounds_done(self) -> int:
        if not (self.loop_dir / "loop.json").exists():
            return 0
        state = Loop.open(self.runs_dir, self.config.loop.name).state
        return sum(r.kind == "round" and r.verdict in ("promoted", "rejected") for r in state.rounds)

    # ------------------------------------------------------------ around the driver

    @contextmanager
    def _around(self) -> Iterator[Any]:
        """What runs a round with everything that listens; starts the servers and stops them."""
        silence()
        self.runs_dir.mkdir(parents=True, exist_ok=True)
        tracker = tracking.Tracker(self.loop_dir, self.config.tracking, warn=self._warn)
        server = PrefectServer(self.mode, self.runs_dir)
        with signals_end_children():
            try:
                tracker.start()
                server.start()
                if server.warning:
                    self._warn(server.warning)
                if not server.ready():  # importing Prefect takes seconds that the first stages need not wait for
                    threading.Thread(target=importlib.import_module, args=("flows.round",), daemon=True).start()
                display = show.Display(self.console)
                observer = Several([Terminal(display), Mirror(tracker)])
                with Stages(self.config) as stages:
                    yield lambda options: self._run(options, observer, server, stages)
            finally:
                server.stop()
                tracker.close()  # tells what it could not record

    def _run(self, options: Options, observer: Observer, server: PrefectServer, stages: Stages) -> Outcome:
        """Stages that come before the server is up run without it; then the flow goes on with what they committed."""
        outcome = self._until_ready(options, observer, server, stages)
        if outcome is not None:
            return outcome
        if server.wait_ready() is None:
            if self.mode != "off":
                self._warn("Prefect does not answer: the round runs without it")
            return improve(self.config, options, observer, run=stages)
        from flows import round as flow_module

        outcomes: list[Outcome] = []
        flow_module.listener.set(observer)
        flow_module.outcome.set(outcomes)
        flow_module.executor.set(stages)
        try:
            flow_module.round_flow(
                config=self.name,
                runs_dir=str(self.runs_dir),
                overrides=self.overrides,
                control=options.control,
                abandon=options.abandon,
                verify=options.verify,
            )
        except Exception as error:
            if not is_prefect_infrastructure_error(error):
                raise
            self._warn(f"Prefect failed ({type(error).__name__}); the round itself goes on without it")
        return outcomes[0] if outcomes else improve(self.config, options, observer, run=stages)

    def _until_ready(
        self, options: Options, observer: Observer, server: PrefectServer, stages: Stages
    ) -> Outcome | None:
        """Do a round's first stages while the server starts; None when Prefect is to take over, between two stages."""
        if server.ready() or options.abandon:
            return None

        def call(name: str, run: Callable[[], Manifest]) -> Manifest:
            if name not in FIRST_STAGES or server.ready():
                raise _ServerReady
            return run()

        try:
            return improve(self.config, options, observer, call=call, run=stages)
        except _ServerReady:
            return None

    def _warn(self, message: str) -> None:
        self.console.print(Text(f"  ! {message}", style="yellow"), soft_wrap=True)

    # ------------------------------------------------------------ the end

    def _close(self, outcome: Outcome, *, links: bool = True) -> None:
        if outcome.nothing:
            self.console.print(Text(outcome.nothing))
            return
        record = outcome.last
        assert record is not None
        if self.as_json:
            row = {"round": record.round, "kind": record.kind, "verdict": record.verdict, "reason": record.reason}
            sys.stdout.write(json.dumps(row | {"metrics": dict(record.metrics)}, indent=1) + "\n")
            return
        _summary(outcome.loop, record)
        if links:
            self._links()

    def _links(self) -> None:
        """Lines that work as printed."""
        if self.as_json:
            return
        console = Console(highlight=False, soft_wrap=True)
        uri = tracking.tracking_uri(self.config.tracking, self.runs_dir)
        rows = [("compare", f"{_program('ratchet')} compare {self.name}")]
        if self.config.tracking.mlflow:
            rows.append(("MLflow", tracking.page_command(uri)))
            if not uri.startswith("http"):
                rows.append(("", "then open http://127.0.0.1:5000/#/experiments?workflowType=machine_learning"))
        if self.mode != "off":
            page = PrefectServer(self.mode, self.runs_dir).page_command()
            rows.append(("Prefect", page))
            if not page.startswith("http"):
                rows.append(("", "then open http://127.0.0.1:4200"))
        for what, line in rows:
            console.print(Text.assemble((f"{what:<9}", "bold"), line))


def _summary(loop_dir: Path, record: RoundRecord) -> None:
    """The closing table: before, after, gain with its interval, verdict and spend."""
    from flows import report_text as text
    from flows.history import load_history

    console = Console(highlight=False)
    history = load_history(loop_dir)
    finished = history.find(record.round, record.kind)
    colour = {"promoted": "green", "rejected": "red"}.get(record.verdict, "")
    console.print(Text(text.headline(finished), style=f"bold {colour}".strip()))
    figures = text.figures_table(history, finished)
    if figures.rows:
        console.print(show.plain_table(figures.heads, [row.cells for row in figures.rows]))
    for line in (*text.explanation(finished), text.limits_sentence(finished), *text.cost_lines(finished)):
        if line:
            console.print(Text(line), soft_wrap=True)


def _program(name: str) -> str:
    program = Path(sys.executable).parent / name
    try:
        return str(program.relative_to(Path.cwd()))
    except ValueError:
        return str(program)
