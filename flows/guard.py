"""The child's side of `flows.child`: the guard that ends everything, and the stage that reports what happens.

`python -m flows.guard` forks at once. The first process stays the guard: it runs no stage code, so it answers even when
the stage holds the GIL in C code. It leads a session of its own, adopts orphans (sub-reaper) and ends every descendant
when the parent dies (end of file on the life pipe, or another parent process id), when the stage ends, or on SIGTERM
after a grace. The stage dies with the guard (parent-death signal).
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
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

from search import errors
from search.errors import RatchetError, UserError

EVENT_FD = "RATCHET_EVENT_FD"
_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36


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
        return readable([self.life_fd], 0) or os.getppid() != self.parent

    def _wait(self, seconds: float) -> None:
        readable([self.life_fd, self.wake_r], seconds)
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


def readable(descriptors: Sequence[int], seconds: float) -> bool:
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
    """python -m flows.guard PARENT_PID LIFE_FD EVENT_FD GRACE_S MODULE [ARG ...]"""
    parent, life_fd, event_fd, grace_s, module = int(argv[0]), int(argv[1]), int(argv[2]), float(argv[3]), argv[4]
    for descriptor in (life_fd, event_fd):
        os.set_inheritable(descriptor, False)
    sys.argv = [module, *argv[5:]]
    run = functools.partial(runpy.run_module, module, run_name="__main__", alter_sys=True)
    guarded(parent, life_fd, event_fd, grace_s, run)


if __name__ == "__main__":
    main(sys.argv[1:])
