"""Run a stage as a child process that never outlives its parent, and hear of its progress, metrics and errors.

    parent (here)  --life pipe-->  guard  --fork-->  stage  -->  whatever the stage starts
                   <--events-----------------------------'

stdout and stderr go to the log; events are JSON lines on a pipe of their own. An error crosses as class name and
message. `flows.guard` is the other side. Left out: stages on another machine, restarts (the caller decides).
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import IO, TYPE_CHECKING, Any, NoReturn

from flows.guard import emit, readable
from search import errors
from search.errors import RatchetError, StageFailed

if TYPE_CHECKING:
    from flows.zygote import ForkedProcess, Zygote

GRACE_S = 10.0
_MAX_LINE = 1 << 20

__all__ = ["ChildResult", "emit", "run_child", "signals_end_children", "stop_children"]

Event = dict[str, Any]


# ---------------------------------------------------------------- in the parent


@dataclass(frozen=True, slots=True)
class ChildResult:
    """A child that ended well."""

    wall_s: float
    num_events: int


class _Child:
    """A guard that was started, seen from its parent."""

    def __init__(self, process: subprocess.Popen[bytes] | ForkedProcess, life_w: int) -> None:
        self.process, self.life_w = process, life_w

    def terminate(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            self.process.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        """End the guard and what is left of its group. Idempotent."""
        if self.life_w >= 0:
            os.close(self.life_w)  # the guard ends everything it adopted, also what left the group
            self.life_w = -1
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(3)
        if self.process.returncode is None or self.process.returncode < 0:  # the guard hangs, or was killed itself
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()


_live: set[_Child] = set()


def run_child(
    module_args: Sequence[str],
    *,
    what: str,
    log_path: Path,
    python: str | None = None,
    env: Mapping[str, str] | None = None,
    timeout_s: float | None = None,
    idle_timeout_s: float | None = None,
    grace_s: float = GRACE_S,
    on_event: Callable[[Event], None] | None = None,
    zygote: Zygote | None = None,
    pass_fds: Sequence[int] = (),
    on_start: Callable[[], None] | None = None,
) -> ChildResult:
    """Run `python -m MODULE ARG...` (`module_args`) to its end; stdout and stderr are appended to `log_path`.

    `env` is added to this process's. `timeout_s` bounds the wall clock, `idle_timeout_s` the time without an event.
    With a `zygote` the process is forked from it, its imports done, where that is possible and `python` is our own.
    Raises what the child raised where it is one of ours, else StageFailed naming `what`, the cause and the log. An
    exception here (a signal handler's, `on_event`'s) ends the child first: SIGTERM, `grace_s`, SIGKILL.
    """
    started_s = time.monotonic()
    reader, writer = os.pipe2(os.O_CLOEXEC)
    os.set_blocking(reader, False)
    try:
        forks = zygote if python in (None, sys.executable) else None
        command = _Command(module_args, python or sys.executable, _environment(env or {}), grace_s, tuple(pass_fds))
        child = _start(command, log_path, writer, forks)
    except BaseException:
        os.close(reader)
        raise
    finally:
        os.close(writer)
    _live.add(child)
    if on_start is not None:
        on_start()
    events = _Events(reader, on_event)
    try:
        reason = _supervise(child, events, started_s, timeout_s, idle_timeout_s)
        if reason is not None:
            _stop(child, grace_s)
        events.drain()
    except BaseException:
        _stop(child, grace_s)
        raise
    finally:
        child.kill()
        _live.discard(child)
        os.close(reader)
    if reason is None and child.process.returncode == 0:
        return ChildResult(time.monotonic() - started_s, events.count)
    raise _failure(what, child.process.returncode, events.error, reason, log_path)


@dataclass(frozen=True, slots=True)
class _Command:
    module_args: Sequence[str]
    python: str
    environment: Mapping[str, str]
    grace_s: float
    pass_fds: tuple[int, ...]


def _start(command: _Command, log_path: Path, writer: int, zygote: Zygote | None) -> _Child:
    life_r, life_w = os.pipe2(os.O_CLOEXEC)
    try:
        with log_path.open("ab") as log:
            process = None
            if zygote is not None:
                descriptors = (life_r, writer, log.fileno())
                process = zygote.fork(command.module_args, command.environment, descriptors, command.grace_s)
            if process is None:
                process = _spawn(command, life_r, writer, log)
    except BaseException:
        os.close(life_w)
        raise
    finally:
        os.close(life_r)
    return _Child(process, life_w)


def _spawn(command: _Command, life_r: int, writer: int, log: IO[bytes]) -> subprocess.Popen[bytes]:
    numbers = map(str, (os.getpid(), life_r, writer, command.grace_s))
    try:
        return subprocess.Popen(  # -P: no package from the current folder
            [command.python, "-P", "-m", "flows.guard", *numbers, *command.module_args],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            env=command.environment,
            pass_fds=(life_r, writer, *command.pass_fds),
            start_new_session=True,
        )
    except FileNotFoundError as error:
        raise errors.ConfigError(f"stages.python = '{command.python}' does not exist") from error


def _environment(env: Mapping[str, str]) -> dict[str, str]:
    """This process's environment; a source checkout is importable for any interpreter."""
    merged = {**os.environ, "PYTHONUNBUFFERED": "1", **env}
    root = Path(__file__).resolve().parent.parent
    if (root / "pyproject.toml").exists():
        merged["PYTHONPATH"] = os.pathsep.join(filter(None, [str(root), merged.get("PYTHONPATH")]))
    return merged


class _Events:
    """JSON lines from a pipe that is never waited for alone: a grandchild may hold its other end for ever."""

    def __init__(self, reader: int, on_event: Callable[[Event], None] | None) -> None:
        self.reader, self.on_event = reader, on_event
        self.buffer = b""
        self.count = 0
        self.error: Event | None = None
        self.closed = False

    def drain(self) -> bool:
        """Handle what has arrived. True when there was something."""
        some = False
        while not self.closed:
            try:
                chunk = os.read(self.reader, 1 << 16)
            except BlockingIOError:
                break
            self.closed = not chunk
            some = some or bool(chunk)
            *lines, self.buffer = (self.buffer + chunk).split(b"\n")
            for line in lines:
                self._handle(line)
            if len(self.buffer) > _MAX_LINE:
                self.buffer = b""
        return some

    def _handle(self, line: bytes) -> None:
        try:
            event = json.loads(line)
        except ValueError:
            return  # a line cut by the child's death
        if not isinstance(event, dict):
            return
        self.count += 1
        if event.get("event") == "error":
            self.error = event
        elif self.on_event is not None:
            self.on_event(event)


def _supervise(
    child: _Child, events: _Events, started: float, timeout_s: float | None, idle_timeout_s: float | None
) -> str | None:
    """Until the guard ends (None) or a limit is reached (which one)."""
    heard = time.monotonic()
    while child.process.poll() is None:
        readable([] if events.closed else [events.reader], 0.05)
        now = time.monotonic()
        if events.drain():
            heard = now
        if timeout_s is not None and now - started > timeout_s:
            return f"was stopped after {timeout_s:g} s (stages.timeout_s)"
        if idle_timeout_s is not None and now - heard > idle_timeout_s:
            return f"was stopped: no progress for {idle_timeout_s:g} s"
    return None


def _stop(child: _Child, grace_s: float) -> None:
    """SIGTERM; the guard allows the grace, then kills. A guard that does not end is killed with its group."""
    child.terminate()
    with contextlib.suppress(subprocess.TimeoutExpired):
        child.process.wait(grace_s + 2)
    child.kill()


def stop_children() -> None:
    """SIGTERM to every child of this process, for a signal handler; `run_child` then returns in its own thread."""
    for child in list(_live):
        child.terminate()


def _failure(what: str, code: int | None, error: Event | None, reason: str | None, log_path: Path) -> RatchetError:
    if reason is None and error is not None:
        kind = getattr(errors, str(error["type"]), None)
        message = str(error["message"])
        if isinstance(kind, type) and issubclass(kind, RatchetError):
            return kind(message)
        return StageFailed(f"{what} failed: {error['type']}: {message}; see {log_path}")
    cause = reason or _explain(code or 0)
    last = _last_line(log_path)
    return StageFailed(f"{what} {cause}; see {log_path}" + (f" (last line: {last})" if last else ""))


def _explain(code: int) -> str:
    number = -code if code < 0 else code - 128
    if 0 < number < 65:
        try:
            name = signal.Signals(number).name
        except ValueError:
            name = f"signal {number}"
        hint = ": out of memory, or killed by hand" if name == "SIGKILL" else ""
        return f"was ended by {name}{hint}"
    return f"ended with exit code {code}"


def _last_line(path: Path, num_bytes: int = 4096) -> str:
    try:
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - num_bytes))
            lines = file.read().decode(errors="replace").split("\n")
    except OSError:
        return ""
    return next((line.strip()[:300] for line in reversed(lines) if line.strip()), "")


@contextlib.contextmanager
def signals_end_children() -> Iterator[None]:
    """SIGTERM raises SystemExit(143) and SIGINT KeyboardInterrupt here, children being told first. Main thread only."""

    def on_term(_number: int, _frame: FrameType | None) -> NoReturn:
        stop_children()
        raise SystemExit(143)

    def on_interrupt(_number: int, _frame: FrameType | None) -> NoReturn:
        stop_children()
        raise KeyboardInterrupt

    old = signal.signal(signal.SIGTERM, on_term), signal.signal(signal.SIGINT, on_interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, old[0])
        signal.signal(signal.SIGINT, old[1])
