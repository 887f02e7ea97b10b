"""Run a stage as a child process that never outlives its parent, and hear of its progress, metrics and errors.

    parent (flows)  --life pipe-->  guard  --fork-->  stage  -->  whatever the stage starts
                    <--events-----------------------------'

`python -m flows.child` forks at once. The first process stays the guard: it runs no stage code, so it answers even
when the stage holds the GIL in C code. It leads a process group of its own, adopts orphans (sub-reaper) and ends every
descendant when the parent dies (end of file on the life pipe, or another parent process id), when the stage ends, or on
SIGTERM after a grace. The stage itself dies with the guard (parent-death signal). What is written to stdout and stderr
goes to the log; events are JSON lines on a pipe of their own. An error crosses as class name and message.

Left out: stages on another machine, restarts (the caller decides).
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import errno
import functools
import json
import os
import runpy
import select
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

from search import errors
from search.errors import RatchetError, StageFailed, UserError

EVENT_FD = "RATCHET_EVENT_FD"
GRACE_S = 10.0
_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36
_MAX_LINE = 1 << 20

Event = dict[str, Any]


# ---------------------------------------------------------------- in the stage's process


def emit(event: Mapping[str, Any]) -> None:
    """Send one event to the parent; nothing happens in a process that `run_child` did not start.

    {"event": "progress", "done": 3, "total": 8, "info": {...}}, {"event": "metric", "name": ..., "value": ...}.
    """
    pid, _, descriptor = os.environ.get(EVENT_FD, "").partition(":")
    if pid != str(os.getpid()):
        return  # also in what the stage starts: there the number may be another file's
    line = json.dumps(event, default=str).encode() + b"\n"
    with _emitting, contextlib.suppress(BrokenPipeError):  # the parent died: the guard is about to end us
        while line:
            line = line[os.write(int(descriptor), line) :]


_emitting = threading.Lock()


def die_with_parent(expected_ppid: int) -> None:
    """From now on the kernel kills this process when its parent ends; at once if that has happened (Linux)."""
    _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != expected_ppid:
        os._exit(137)


def _prctl(option: int, value: int) -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(option, ctypes.c_ulong(value), 0, 0, 0)


def run_reporting(body: Callable[[], object]) -> int:
    """Run a stage; report what it raises as an event, with the traceback in the log. The exit code."""
    try:
        body()
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except KeyboardInterrupt:
        return 130
    except BaseException as error:  # noqa: BLE001 - the process boundary: everything becomes an exit code here
        traceback.print_exc()
        shown = _translate(error)
        event = {"event": "error", "type": type(shown).__name__, "message": str(shown)}
        code = shown.exit_code if isinstance(shown, RatchetError) else 1
        emit(event | {"user": isinstance(shown, UserError), "exit_code": code})
        return code
    return 0


def _translate(error: BaseException) -> BaseException:
    """A full disk and a bad configuration come in many classes; the parent knows ours."""
    full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
    if not isinstance(error, RatchetError) and (full or "No space left on device" in str(error)):
        return errors.DiskError(f"{error}; make room and run the same command again, nothing committed is lost")
    if type(error).__name__ == "InvalidConfig":
        return errors.ConfigError(str(error))
    return error


# ---------------------------------------------------------------- the guard


class _Guard:
    """Waits for the stage, and ends everything below itself when it is time to."""

    def __init__(self, parent: int, life_fd: int, grace_s: float) -> None:
        self.parent, self.life_fd, self.grace_s = parent, life_fd, grace_s
        self.terminated = False
        self.stage = 0
        self.status: int | None = None
        self.wake_r, self.wake_w = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)

    def prepare(self) -> None:
        """Before the fork, so that no signal is lost."""
        _prctl(_PR_SET_CHILD_SUBREAPER, 1)
        signal.set_wakeup_fd(self.wake_w, warn_on_full_buffer=False)
        for number in (signal.SIGCHLD, signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._on_signal)

    def _on_signal(self, number: int, _frame: FrameType | None) -> None:
        self.terminated = self.terminated or number != signal.SIGCHLD

    def watch(self, stage: int) -> NoReturn:
        self.stage = stage
        deadline = None
        while self.status is None:
            if self._orphaned():
                self._end_all(0)
            if self.terminated and deadline is None:
                deadline = time.monotonic() + self.grace_s
                with contextlib.suppress(ProcessLookupError):
                    os.kill(stage, signal.SIGTERM)
            if deadline is not None and time.monotonic() > deadline:
                self._end_all(0)
            self._wait(0.25)
            self._reap()
        self._end_all(1.0)
        code = os.waitstatus_to_exitcode(self.status)
        os._exit(code if code >= 0 else 128 - code)

    def _orphaned(self) -> bool:
        return _readable([self.life_fd], 0) or os.getppid() != self.parent

    def _wait(self, seconds: float) -> None:
        _readable([self.life_fd, self.wake_r], seconds)
        with contextlib.suppress(BlockingIOError):
            os.read(self.wake_r, 4096)

    def _reap(self) -> None:
        with contextlib.suppress(ChildProcessError):
            while (found := os.waitpid(-1, os.WNOHANG))[0]:
                if found[0] == self.stage:
                    self.status = found[1]

    def _end_all(self, grace_s: float) -> None:
        """Kill every descendant until none is left: some may be starting others meanwhile."""
        deadline = time.monotonic() + grace_s
        while below := descendants(os.getpid()):
            if time.monotonic() >= deadline or self._orphaned():
                for pid in below:
                    with contextlib.suppress(ProcessLookupError, PermissionError):
                        os.kill(pid, signal.SIGKILL)
            time.sleep(0.02)
            self._reap()


def descendants(pid: int) -> list[int]:
    """Every living process below `pid` (Linux); elsewhere the other members of its group cannot be listed: empty."""
    children: dict[int, list[int]] = {}
    with contextlib.suppress(FileNotFoundError):
        for name in os.listdir("/proc"):
            if name.isdigit():
                with contextlib.suppress(OSError):
                    state, parent = Path(f"/proc/{name}/stat").read_text().rpartition(")")[2].split()[:2]
                    if state != "Z":
                        children.setdefault(int(parent), []).append(int(name))
    found: list[int] = []
    frontier = [pid]
    while frontier:
        frontier = [child for one in frontier for child in children.get(one, [])]
        found += frontier
    return found


def _readable(descriptors: Sequence[int], seconds: float) -> bool:
    """Is there something to read, or an end of file? Waits at most `seconds`."""
    poll = select.poll()
    for descriptor in descriptors:
        poll.register(descriptor, select.POLLIN)
    return bool(poll.poll(seconds * 1000))


def guarded(parent: int, life_fd: int, event_fd: int, grace_s: float, body: Callable[[], object]) -> NoReturn:
    """Fork: this process becomes the guard, its child runs `body` and ends. One thread only may be running."""
    guard = _Guard(parent, life_fd, grace_s)
    guard.prepare()
    me = os.getpid()
    stage = os.fork()
    if stage:
        os.close(event_fd)
        guard.watch(stage)
    code = 1
    try:
        signal.set_wakeup_fd(-1)
        for number in (signal.SIGCHLD, signal.SIGTERM):
            signal.signal(number, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        for descriptor in (guard.wake_r, guard.wake_w, life_fd):
            os.close(descriptor)
        die_with_parent(me)
        os.environ[EVENT_FD] = f"{os.getpid()}:{event_fd}"
        code = run_reporting(body)
        atexit._run_exitfuncs()
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError):
                stream.flush()
    finally:
        os._exit(code)  # waits for no thread that a library left behind, and no late crash changes the result


def main(argv: Sequence[str]) -> NoReturn:
    """python -m flows.child PARENT_PID LIFE_FD EVENT_FD GRACE_S MODULE [ARG ...]"""
    parent, life_fd, event_fd, grace_s, module = int(argv[0]), int(argv[1]), int(argv[2]), float(argv[3]), argv[4]
    for descriptor in (life_fd, event_fd):
        os.set_inheritable(descriptor, False)
    sys.argv = [module, *argv[5:]]
    run = functools.partial(runpy.run_module, module, run_name="__main__", alter_sys=True)
    guarded(parent, life_fd, event_fd, grace_s, run)


# ---------------------------------------------------------------- in the parent


@dataclass(frozen=True, slots=True)
class ChildResult:
    """A child that ended well."""

    wall_s: float
    num_events: int


class _Child:
    """A guard that was started, seen from its parent."""

    def __init__(self, process: subprocess.Popen[bytes], life_w: int) -> None:
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
) -> ChildResult:
    """Run `python -m MODULE ARG...` (`module_args`) to its end; stdout and stderr are appended to `log_path`.

    `env` is added to this process's. `timeout_s` bounds the wall clock, `idle_timeout_s` the time without an event.
    Raises what the child raised where it is one of ours, else StageFailed naming `what`, the cause and the log. An
    exception here (a signal handler's, `on_event`'s) ends the child first: SIGTERM, `grace_s`, SIGKILL.
    """
    started = time.monotonic()
    reader, writer = os.pipe2(os.O_CLOEXEC)
    os.set_blocking(reader, False)
    try:
        child = _start(module_args, python or sys.executable, env or {}, log_path, writer, grace_s)
    except BaseException:
        os.close(reader)
        raise
    finally:
        os.close(writer)
    _live.add(child)
    events = _Events(reader, on_event)
    try:
        reason = _supervise(child, events, started, timeout_s, idle_timeout_s)
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
        return ChildResult(time.monotonic() - started, events.count)
    raise _failure(what, child.process.returncode, events.error, reason, log_path)


def _start(
    module_args: Sequence[str], python: str, env: Mapping[str, str], log_path: Path, writer: int, grace_s: float
) -> _Child:
    life_r, life_w = os.pipe2(os.O_CLOEXEC)
    numbers = map(str, (os.getpid(), life_r, writer, grace_s))
    command = [python, "-P", "-m", "flows.child", *numbers, *module_args]  # -P: no package from the current folder
    try:
        with log_path.open("ab") as log:
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=_environment(env),
                pass_fds=(life_r, writer),
                start_new_session=True,
            )
    except FileNotFoundError as error:
        os.close(life_w)
        raise errors.ConfigError(f"stages.python = '{python}' does not exist") from error
    except BaseException:
        os.close(life_w)
        raise
    finally:
        os.close(life_r)
    return _Child(process, life_w)


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
        _readable([] if events.closed else [events.reader], 0.05)
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


def _failure(what: str, code: int, error: Event | None, reason: str | None, log_path: Path) -> RatchetError:
    if reason is None and error is not None:
        kind = getattr(errors, str(error["type"]), None)
        message = str(error["message"])
        if isinstance(kind, type) and issubclass(kind, RatchetError):
            return kind(message)
        return StageFailed(f"{what} failed: {error['type']}: {message}; see {log_path}")
    cause = reason or _explain(code)
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


if __name__ == "__main__":
    main(sys.argv[1:])
