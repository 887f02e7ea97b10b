"""Run rounds: takes the loop's lock, makes round 0 where there is none, goes on with an unfinished round, or starts
the next. No Prefect, no MLflow: `flows.round` adds them."""

from __future__ import annotations

import contextlib
import json
import shutil
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from configs.schema import Config
from flows import driver, searching
from flows.artefacts import StageDir, StageKey, code_version, sha256_json
from flows.driver import Call, Execute, Observer, RoundRun, plain_call
from flows.stage import Stages
from flows.state import Loop, RoundFolder, RoundRecord
from search.errors import UserError


@dataclass(frozen=True, slots=True)
class Options:
    """How `improve` runs."""

    runs_dir: Path
    control: str | None = None  # "random" or "bootstrap": a control of the last finished round
    abandon: bool = False  # give up the unfinished round
    verify: bool = False  # check every hash of the champion first
    base_only: bool = False  # round 0, and no more


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a call did. `records` holds round 0 too where this call made it; `nothing` says why no round ran."""

    loop: Path
    records: tuple[RoundRecord, ...] = ()
    nothing: str | None = None

    @property
    def last(self) -> RoundRecord | None:
        return self.records[-1] if self.records else None


def improve(
    config: Config, options: Options, observer: Observer, *, call: Call = plain_call, run: Execute | None = None
) -> Outcome:
    """One improvement round (or control) of the loop, resumed where it was left.

    `run` executes stages; by default one is made for this call. Raises LockedError, UserError, StageFailed; what was
    committed stays.
    """
    if run is None:
        with Stages(config) as stages:
            return improve(config, options, observer, call=call, run=stages)
    if not options.abandon:
        searching.check(config)
    name = config.loop.name
    records: list[RoundRecord] = []
    with Loop.locked(options.runs_dir, name, "a round", task=config.task.type) as loop:
        if options.verify and loop.state.champion:
            loop.verify(loop.state.champion)
        if options.abandon:
            return _abandon(loop, config, options.control)
        for late in _unreported(loop):
            try_report(loop, late)
        if loop.state.champion is None:
            folder = driver.resume_or_begin(loop, config, kind="round", round_number=0)
            records.append(_run(loop, folder, observer, run, call, driver.run_base))
        if options.base_only:
            return Outcome(loop.path, tuple(records))
        if options.control:
            folder = _control_folder(loop, config, options.control)
            records.append(_run(loop, folder, observer, run, call, driver.run_control))
            return Outcome(loop.path, tuple(records))
        folder = driver.resume_or_begin(loop, config, kind="round", round_number=None)
        try:
            records.append(_run(loop, folder, observer, run, call, driver.run_improvement))
        except driver.NothingToDo as reason:
            shutil.rmtree(folder.path)  # it holds nothing but the list of problems
            return Outcome(loop.path, tuple(records), nothing=str(reason))
        return Outcome(loop.path, tuple(records))


def _run(
    loop: Loop,
    folder: RoundFolder,
    observer: Observer,
    execute_stage: Execute,
    call: Call,
    body: Callable[[RoundRun], RoundRecord],
) -> RoundRecord:
    run = RoundRun(loop, folder, observer, execute_stage, call)
    observer.round_started(folder, run.config, expected_s(loop, folder))
    record = body(run)
    try_report(loop, record)
    observer.round_finished(folder, record)
    return record


def _abandon(loop: Loop, config: Config, control: str | None) -> Outcome:
    """Give the unfinished round or control up. Once its gate has spoken, the look counts: nobody may look for free."""
    kind = f"control-{control}" if control else "round"
    folder = loop.unfinished(kind)
    if folder is not None and folder.round == 0:  # every later round builds on round 0, so none may be missing
        shutil.rmtree(folder.path)
        return Outcome(loop.path, nothing="round 0 was given up and removed; `ratchet round` begins the loop anew")
    looked = folder is not None and (folder.path / "gate").is_dir()
    seen = driver.gate_set(config, folder.round) if folder is not None and looked else None
    return Outcome(loop.path, (loop.abandon("given up by hand", kind=kind, gate_set=seen),))


def expected_s(loop: Loop, folder: RoundFolder) -> float | None:
    """The wall time of the last round of this kind, from its stages."""
    for record in reversed(loop.state.rounds):
        if record.kind == folder.kind and (record.round > 0) == (folder.round > 0):
            return sum(driver.wall_s(stage) for stage in (loop.path / record.folder).iterdir() if stage.is_dir())
    return None


def _control_folder(loop: Loop, config: Config, control: str) -> RoundFolder:
    """A control belongs to the last finished round, and uses that round's configuration."""
    finished = [r for r in loop.state.rounds if r.kind == "round" and r.round > 0 and r.verdict != "abandoned"]
    if not finished:
        raise UserError("a control compares with a finished round: run `ratchet round` first")
    number, kind = finished[-1].round, f"control-{control}"
    unfinished = loop.unfinished(kind)
    if unfinished is not None and unfinished.round == number:
        return unfinished
    frozen = (loop.path / finished[-1].folder / "config.json").read_text(encoding="utf-8")
    return loop.begin_round(frozen, kind=kind, round=number)


# ---------------------------------------------------------------- reports


def _unreported(loop: Loop) -> list[RoundRecord]:
    """Rounds that a kill ended between verdict and report."""
    done = [record for record in loop.state.rounds if record.verdict != "abandoned"]
    return [record for record in done[-2:] if not (loop.path / record.folder / "report").is_dir()]


def try_report(loop: Loop, record: RoundRecord) -> None:
    """The verdict stands whatever becomes of its report: a failure is told, and the next round tries again."""
    try:
        report(loop, record)
    except Exception as error:  # noqa: BLE001 - drawing must neither undo a round nor keep the next from starting
        warnings.warn(f"no report of {record.folder}: {type(error).__name__}: {error}", stacklevel=2)


def report(loop: Loop, record: RoundRecord) -> None:
    """Plots, page and figures of a finished round: made after the verdict, from what is on disk, once."""
    from flows.report import write_round_report

    stage = StageDir(loop.path / record.folder, "report")
    ids = {"record": sha256_json({"round": record.round, "verdict": record.verdict, "metrics": dict(record.metrics)})}
    if stage.committed(inputs=ids) is None:
        key = StageKey("report", code_version(), "", ids)
        out = stage.begin(key)
        write_round_report(loop.path, record.round, out, record.kind)
        stage.commit(key)


def last_config(runs_dir: Path) -> tuple[str, list[str]] | None:
    """CONFIG and overrides of the last command that named one."""
    try:
        row = json.loads((runs_dir / ".last.json").read_text(encoding="utf-8"))
        return str(row["config"]), [str(o) for o in row["overrides"]]
    except (OSError, ValueError, KeyError):
        return None


def remember_config(runs_dir: Path, config: str, overrides: list[str]) -> None:
    """For the next command that names none. A runs folder that can only be read, a colleague's, forgets it."""
    from flows.artefacts import atomic_write

    path = str(Path(config).resolve()) if Path(config).is_file() else config
    with contextlib.suppress(OSError):
        runs_dir.mkdir(parents=True, exist_ok=True)
        atomic_write(runs_dir / ".last.json", json.dumps({"config": path, "overrides": overrides}) + "\n")
