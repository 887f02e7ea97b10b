"""The loop's folder: loop.json (champion bundle, history, looks), round folders, the champion link.

loop.json is the truth of what is finished; it carries a checksum and is written together with a copy, loop.json.bak.
Every finished round also leaves its record in its folder, so a lost loop.json is rebuilt (`Loop.open(repair=True)`).
Paths in the records are relative to the loop's folder, so that it can be moved. Everything that writes needs the lock
(`Loop.lock`); reading needs nothing. A verdict, the new bundle and the gate look become visible in one rename of
loop.json; the `champion` link follows last and is put right by the next holder of the lock (`reconcile`).
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import os
import re
import shutil
import subprocess
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from flows.artefacts import TEMPORARY, atomic_write, disk_errors, drop_abandoned, sha256_json, sync_folder, tree_sha
from flows.champion import Bundle, Part, link_champion
from flows.crash import crash_point
from flows.locks import lock
from search.errors import CorruptArtefact, DataError, UserError

VERSION = 1
Verdict = Literal["base", "promoted", "rejected", "abandoned", "control"]
Action = Literal["base", "promote", "refit", "rollback"]  # refit: the same policy, its verifier or predictor anew
_SLUG = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")
_ROUND = re.compile(r"round-(\d{3,})(?:-(control-[a-z0-9-]+))?")


@functools.cache
def git_sha() -> str | None:
    """The commit of this source tree; None where it is no checkout."""
    root = Path(__file__).resolve().parent.parent
    if not (root / ".git").exists():
        return None
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        found = subprocess.run(["git", "-C", root, "rev-parse", "HEAD"], capture_output=True, text=True, timeout=5)
        return found.stdout.strip() or None
    return None


def utc_now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


# ---------------------------------------------------------------- records


@dataclass(frozen=True, slots=True)
class RoundRecord:
    """One finished round. `kind`: "round", or "control-random" and the like, which never promotes."""

    round: int
    verdict: Verdict
    reason: str
    kind: str = "round"
    config_sha: str = ""
    config_changes: Mapping[str, Any] = field(default_factory=dict[str, Any])  # against the round before
    metrics: Mapping[str, Any] = field(default_factory=dict[str, Any])
    models: Mapping[str, str] = field(default_factory=dict[str, str])
    counters: Mapping[str, float] = field(default_factory=dict[str, float])  # what it used up; see LoopState.total
    gate_set: str | None = None  # the gate set it looked at; None: none
    started_utc: str = ""
    finished_utc: str = ""

    @property
    def folder(self) -> str:
        return folder_name(self.round, self.kind)


@dataclass(frozen=True, slots=True)
class Move:
    """One change of the champion."""

    action: Action
    bundle: Bundle
    reason: str
    utc: str


@dataclass(frozen=True, slots=True)
class LoopState:
    """What loop.json holds."""

    name: str
    task: str
    champion: Bundle | None = None
    previous: Bundle | None = None
    moves: tuple[Move, ...] = ()
    rounds: tuple[RoundRecord, ...] = ()
    gate_looks: Mapping[str, int] = field(default_factory=dict[str, int])  # per gate set, since the last promotion
    test_looks: int = 0

    def total(self, counter: str) -> float:
        """Sum of one counter over the rounds proper, for example the training problems used so far."""
        return sum(record.counters.get(counter, 0) for record in self.rounds if record.kind == "round")

    def find(self, folder: str) -> RoundRecord | None:
        return next((record for record in self.rounds if record.folder == folder), None)

    @property
    def next_round(self) -> int:
        return max((record.round for record in self.rounds if record.kind == "round"), default=-1) + 1

    def look(self, gate_set: str) -> int:
        """j of the next look at this gate set: 1 for the first since the last promotion."""
        return self.gate_looks.get(gate_set, 0) + 1

    def to_json(self) -> dict[str, Any]:
        body = {"version": VERSION, **dataclasses.asdict(self)}
        body = json.loads(json.dumps(body, allow_nan=False))
        return body | {"checksum": sha256_json(body)}

    @classmethod
    def from_json(cls, row: Any) -> LoopState:
        """Raises CorruptArtefact where it is not what `to_json` wrote, DataError for a newer version."""
        try:
            body = {name: value for name, value in row.items() if name != "checksum"}
            if sha256_json(body) != row["checksum"]:
                raise ValueError("its checksum does not match")
            if body["version"] != VERSION:
                raise DataError(f"loop.json has version {body['version']}, this Ratchet reads {VERSION}: update it")
            return cls(
                name=body["name"],
                task=body["task"],
                champion=Bundle.from_json(body["champion"]) if body["champion"] else None,
                previous=Bundle.from_json(body["previous"]) if body["previous"] else None,
                moves=tuple(Move(**(m | {"bundle": Bundle.from_json(m["bundle"])})) for m in body["moves"]),
                rounds=tuple(RoundRecord(**record) for record in body["rounds"]),
                gate_looks=body["gate_looks"],
                test_looks=body["test_looks"],
            )
        except DataError:
            raise
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise CorruptArtefact(str(error)) from error


def moved(state: LoopState, action: Action, bundle: Bundle, reason: str) -> LoopState:
    """The state after the champion became `bundle`; the old champion is what a rollback returns to."""
    move = Move(action, bundle, reason, utc_now())
    previous = state.previous if action == "refit" else state.champion
    return dataclasses.replace(state, champion=bundle, previous=previous, moves=(*state.moves, move))


def with_round(state: LoopState, record: RoundRecord, bundle: Bundle | None) -> LoopState:
    """The state after a round: record, look and move together. A gate that promotes starts its looks anew."""
    looks = dict(state.gate_looks)
    if record.gate_set is not None:
        looks[record.gate_set] = looks.get(record.gate_set, 0) + 1
    if bundle is not None:
        action: Action = {"base": "base", "promoted": "promote"}.get(record.verdict, "refit")  # pyright: ignore
        state = moved(state, action, bundle, record.reason)
        looks = looks if action == "refit" else {}
    return dataclasses.replace(state, rounds=(*state.rounds, record), gate_looks=looks)


def folder_name(round: int, kind: str = "round") -> str:
    return f"round-{round:03d}" if kind == "round" else f"round-{round:03d}-{kind}"


@dataclass(frozen=True, slots=True)
class RoundFolder:
    """A round's folder: its frozen configuration, and when it started."""

    path: Path
    round: int
    kind: str

    def started(self) -> tuple[str, str]:
        """(UTC time of its start, hash of its configuration). Raises CorruptArtefact."""
        path = self.path / "started.json"
        try:
            row = json.loads(path.read_bytes())
            return str(row["started_utc"]), str(row["config_sha"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise CorruptArtefact(
                f"{path} cannot be used ({error}): restore it, or give the round up with --abandon"
            ) from error

    def config_json(self) -> str:
        """The resolved configuration the round began with. Raises CorruptArtefact."""
        text = (self.path / "config.json").read_text(encoding="utf-8", errors="replace")
        if sha256_json(text) != self.started()[1]:
            raise CorruptArtefact(
                f"{self.path / 'config.json'} was changed after the round began; restore it, or give the round up "
                "with --abandon"
            )
        return text


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise CorruptArtefact(f"{path} cannot be used: {error}") from error


# ---------------------------------------------------------------- the loop


class Loop:
    """One loop's folder. `state` is what was read at open or written last."""

    def __init__(self, path: Path, state: LoopState) -> None:
        self.path = path
        self.state = state

    @classmethod
    def open(cls, runs_dir: Path, name: str, *, task: str | None = None, repair: bool = False) -> Loop:
        """The loop `name`; with `task`, it is made if there is none. `repair` (under the lock) rebuilds loop.json.

        Raises DataError: no such loop, a bad name, another task; CorruptArtefact: loop.json is damaged.
        """
        path = loop_path(runs_dir, name)
        fresh = not (path / "loop.json").exists() and not _traces(path)
        if fresh:
            if task is None:
                raise DataError(f"no loop '{name}' in {runs_dir}: start it with `ratchet round`")
            with disk_errors(path):
                path.mkdir(parents=True, exist_ok=True)
            return cls(path, LoopState(name, task))
        try:
            loop = cls(path, _read_state(path / "loop.json"))
        except CorruptArtefact as error:
            if not repair:
                raise CorruptArtefact(
                    f"{path / 'loop.json'} is damaged ({error}): `ratchet round` rebuilds it from loop.json.bak and "
                    "the round folders"
                ) from error
            loop = cls(path, rebuild(path, name, task or ""))
            loop.set_aside_state(str(error))
            loop.save()
        if task is not None and loop.state.task != task:
            raise DataError(f"loop '{name}' has task '{loop.state.task}', not '{task}': give the loop another name")
        return loop

    def lock(self, what: str) -> contextlib.AbstractContextManager[None]:
        """The one writer's lock, for a loop that is open already; `locked` takes it and then reads."""
        return lock(self.path / ".lock", f"{what} of loop {self.path.name}")

    @classmethod
    @contextlib.contextmanager
    def locked(cls, runs_dir: Path, name: str, what: str, *, task: str | None = None) -> Iterator[Loop]:
        """Open a loop to write it: takes the lock, repairs what a crash left. Raises LockedError, DataError."""
        path = loop_path(runs_dir, name)
        if task is not None:
            with disk_errors(path):
                path.mkdir(parents=True, exist_ok=True)
        elif not path.is_dir():
            raise DataError(f"no loop '{name}' in {runs_dir}: start it with `ratchet round`")
        with lock(path / ".lock", f"{what} of loop {name}"):
            loop = cls.open(runs_dir, name, task=task, repair=True)
            if not (path / "loop.json").exists():
                loop.save()
            loop.reconcile()
            yield loop

    # ------------------------------------------------------------ rounds

    def unfinished(self, kind: str = "round") -> RoundFolder | None:
        """The begun round of this kind that has no verdict. `kind` "control": of any control."""
        for folder in reversed(_round_folders(self.path)):
            same = folder.kind == kind or (kind == "control" and folder.kind != "round")
            if same and self.state.find(folder.path.name) is None and (folder.path / "config.json").exists():
                return folder
        return None

    def begin_round(self, config_json: str, *, kind: str = "round", round: int | None = None) -> RoundFolder:
        """Make the folder of the next round (or control `round`) with its frozen configuration."""
        number = self.state.next_round if round is None else round
        folder = RoundFolder(self.path / folder_name(number, kind), number, kind)
        known = self.state.find(folder.path.name)
        if known is not None and known.kind != "round" and known.verdict == "abandoned":
            self._forget(known)
        elif known is not None:
            raise DataError(f"{folder.path.name} of loop {self.path.name} is finished already")
        with disk_errors(folder.path):
            folder.path.mkdir(exist_ok=True)
            crash_point("round.begin.folder")
            started = {"started_utc": utc_now(), "config_sha": sha256_json(config_json), "git_sha": git_sha()}
            atomic_write(folder.path / "started.json", json.dumps(started) + "\n")
            crash_point("round.begin.started")
            atomic_write(folder.path / "config.json", config_json)
            sync_folder(self.path)
        crash_point("round.begin.done")
        return folder

    def _forget(self, record: RoundRecord) -> None:
        """Make room for another attempt at a control that was given up: nothing was built on it."""
        with disk_errors(self.path):
            shutil.rmtree(self.path / record.folder, ignore_errors=True)
        rounds = tuple(r for r in self.state.rounds if r is not record)
        self._commit(dataclasses.replace(self.state, rounds=rounds))

    def finish(self, folder: RoundFolder, record: RoundRecord, bundle: Bundle | None = None) -> RoundRecord:
        """Record a round's verdict and, with it, the new champion. Checks the bundle's hashes in full first.

        A rejected round may leave the old policy with a verifier or predictor fitted anew. Fills in the record's
        times and config hash. Raises CorruptArtefact.
        """
        assert bundle is not None or record.verdict not in ("base", "promoted"), record.verdict
        assert bundle is None or record.verdict in ("base", "promoted", "rejected"), record.verdict
        assert record.folder == folder.path.name, record.folder
        assert self.state.find(record.folder) is None, f"{record.folder} is finished"
        if bundle is not None:
            self.verify(bundle)
        try:
            started_utc, config_sha = folder.started()
        except CorruptArtefact:
            if record.verdict != "abandoned":  # giving it up is the way out of a damaged round
                raise
            started_utc, config_sha = utc_now(), ""
        record = dataclasses.replace(
            record, config_sha=config_sha, started_utc=started_utc, finished_utc=record.finished_utc or utc_now()
        )
        entry = {"sequence": len(self.state.rounds), "task": self.state.task, "record": dataclasses.asdict(record)}
        entry |= {"bundle": dataclasses.asdict(bundle) if bundle else None}
        atomic_write(folder.path / "record.json", json.dumps(entry, indent=1, sort_keys=True) + "\n")
        crash_point("round.finish.record")
        self._commit(with_round(self.state, record, bundle))
        return record

    def abandon(self, reason: str, *, kind: str = "round", gate_set: str | None = None) -> RoundRecord:
        """Give the unfinished round up. `gate_set`: the one it had looked at, which still counts."""
        folder = self.unfinished(kind)
        if folder is None:
            raise UserError(f"loop {self.path.name} has no unfinished round to abandon")
        record = RoundRecord(folder.round, "abandoned", reason, kind=folder.kind, gate_set=gate_set)
        return self.finish(folder, record)

    # ------------------------------------------------------------ the champion

    def part(self, path: Path) -> Part:
        """Name a file or folder of this loop by content (reads it in full)."""
        inside = self._inside(path)
        return Part(inside, tree_sha(self.path / inside, self.path))

    def resolve(self, part: Part) -> Path:
        """Where a part lies now. Raises CorruptArtefact where its path leaves the loop's folder."""
        return self.path / self._inside(self.path / part.path)

    def _inside(self, path: Path) -> str:
        resolved, root = path.resolve(), self.path.resolve()
        if not resolved.is_relative_to(root):
            raise CorruptArtefact(f"{path} is not inside {self.path}")
        return resolved.relative_to(root).as_posix()

    def verify(self, bundle: Bundle) -> None:
        """Every hash of every part. Raises CorruptArtefact."""
        for name, part in bundle.parts().items():
            if tree_sha(self.resolve(part), self.path) != part.sha256:
                raise CorruptArtefact(
                    f"the {name} in {self.resolve(part)} is not what was recorded, it was changed: restore it from a "
                    "copy, or choose another champion with `ratchet promote --round N`"
                )

    def promote(self, bundle: Bundle, reason: str) -> None:
        """Make `bundle` the champion by hand. Gate looks go on counting. Raises UserError, CorruptArtefact."""
        self._refuse_in_round("promote")
        self.verify(bundle)
        self._commit(moved(self.state, "promote", bundle, reason))

    def rollback(self, reason: str) -> Bundle:
        """Exchange champion and previous. Raises UserError where there is no previous one, CorruptArtefact."""
        self._refuse_in_round("roll back")
        bundle = self.state.previous
        if bundle is None:
            raise UserError(f"loop {self.path.name} has no previous champion to roll back to")
        self.verify(bundle)
        self._commit(moved(self.state, "rollback", bundle, reason))
        return bundle

    def _refuse_in_round(self, what: str) -> None:
        folder = self.unfinished()
        if folder is not None:
            raise UserError(
                f"cannot {what}: {folder.path.name} is unfinished and compares with the champion it began with; "
                "finish it with `ratchet round`, or give it up with `ratchet round --abandon`"
            )

    def count_test_look(self) -> None:
        """A look at the test split outside a round is counted."""
        self._commit(dataclasses.replace(self.state, test_looks=self.state.test_looks + 1))

    # ------------------------------------------------------------ writing

    def _commit(self, state: LoopState) -> None:
        self.state = state
        self.save()
        self._link_champion()

    def save(self) -> None:
        text = _state_text(self.state)
        atomic_write(self.path / "loop.json", text)
        crash_point("loop.save.state")
        atomic_write(self.path / "loop.json.bak", text)
        crash_point("loop.save.done")

    def reconcile(self) -> None:
        """Finish what a crash between two writes left: the copy of loop.json, the link, temporary files."""
        for folder in ("", "round-*/", "round-*/corrupt/", "round-*/stale/"):
            for path in self.path.glob(folder + TEMPORARY):
                drop_abandoned(path)
        text = _state_text(self.state)
        copy = self.path / "loop.json.bak"
        if not copy.exists() or copy.read_bytes() != text.encode():
            atomic_write(copy, text)
        self._link_champion()

    def set_aside_state(self, reason: str) -> None:
        """Keep a damaged loop.json for a person to look at."""
        damaged = self.path / "loop.json"
        if damaged.exists():
            stamp = utc_now().replace(":", "")
            os.replace(damaged, self.path / f"loop.json.damaged-{stamp}")
            atomic_write(self.path / f"loop.json.damaged-{stamp}.txt", reason + "\n")

    def _link_champion(self) -> None:
        if self.state.champion is not None:
            link_champion(self.path, self.state.champion)


# ---------------------------------------------------------------- helpers


def loop_path(runs_dir: Path, name: str) -> Path:
    """Where the loop lies. Raises DataError for a name that is no plain folder name or leads elsewhere."""
    if not _SLUG.fullmatch(name):
        raise DataError(f"loop name '{name}': use a-z, 0-9, '.', '_' and '-', at most 64, no '/'")
    path = runs_dir / name
    if path.is_symlink():
        raise DataError(f"{path} is a link; a loop lies in the runs folder itself: use --runs-dir to keep it elsewhere")
    return path


def _traces(path: Path) -> bool:
    """Was there a loop here, whatever became of loop.json?"""
    return (path / "loop.json.bak").exists() or any(path.glob("round-*/record.json"))


def _state_text(state: LoopState) -> str:
    return json.dumps(state.to_json(), indent=1, sort_keys=True) + "\n"


def _read_state(path: Path) -> LoopState:
    try:
        return LoopState.from_json(json.loads(path.read_bytes()))
    except FileNotFoundError as error:
        raise CorruptArtefact("it is missing") from error
    except ValueError as error:
        if isinstance(error, DataError):
            raise
        raise CorruptArtefact(str(error)) from error


def rebuild(path: Path, name: str, task: str) -> LoopState:
    """The state from loop.json.bak where that is sound, and from the records in the round folders it does not hold.

    Without the copy, champions moved by hand (promote, rollback) are not known any more.
    """
    try:
        state = _read_state(path / "loop.json.bak")
    except CorruptArtefact:
        state = LoopState(name, task)
    entries = [_read_json(file) for file in path.glob("round-*/record.json")]
    for entry in sorted(entries, key=lambda entry: entry["sequence"]):
        state = dataclasses.replace(state, task=entry["task"])
        record = RoundRecord(**entry["record"])
        if state.find(record.folder) is None:
            state = with_round(state, record, Bundle.from_json(entry["bundle"]) if entry["bundle"] else None)
    return state


def _round_folders(path: Path) -> list[RoundFolder]:
    found: list[RoundFolder] = []
    for folder in sorted(path.glob("round-*")):
        match = _ROUND.fullmatch(folder.name)
        if match and folder.is_dir():
            found.append(RoundFolder(folder, int(match[1]), match[2] or "round"))
    return sorted(found, key=lambda folder: folder.round)
