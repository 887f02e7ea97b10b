"""A process that has imported the slow libraries and forks one process per stage: each stage starts at once.

The zygote is itself a child of `flows.child` (guarded, it dies with the command). Asked over a socket, it forks a guard
with the stage's own life pipe, event pipe and log; from there on everything is as in the plain path. The guard dies
with the zygote, the zygote with the command.

Forking is safe only while the zygote has one thread, so it checks before every fork (OpenMP has not run; OpenBLAS must
be held to one thread and pyarrow's allocator to none, see `ENV`) and refuses otherwise; it refuses too where there is a
GPU, since CUDA does not survive a fork. A refusal means the plain path, never a failure.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from flows.child import run_child
from flows.guard import guarded
from search.errors import RatchetError

ENV = {"OPENBLAS_NUM_THREADS": "1", "JE_ARROW_MALLOC_CONF": "background_thread:false"}  # threads that imports start
PRELOAD = (
    "torch",
    "transformers",
    "transformers.models.auto.modeling_auto",
    "transformers.models.auto.tokenization_auto",
    "transformers.models.llama.modeling_llama",
    "search.engines.transformers",
    "distill.sft",
)
_FIXED = ("OMP_", "GOMP_", "MKL_", "KMP_", "OPENBLAS_")  # read once, when the libraries are loaded
GPUS = "nvidia[0-9]*"  # in /dev
_START_S = 300.0


# ---------------------------------------------------------------- in the command's process


class ForkedProcess:
    """A guard that the zygote forked, with the part of subprocess.Popen's interface that `flows.child` uses."""

    def __init__(self, pid: int, status: int) -> None:
        self.pid, self._status = pid, status
        self.returncode: int | None = None
        self._text = b""

    def poll(self) -> int | None:
        """The guard's exit code, from the zygote; -9 where both ended without telling."""
        return self._read(0)

    def wait(self, timeout: float | None = None) -> int:
        """Raises subprocess.TimeoutExpired."""
        deadline = None if timeout is None else time.monotonic() + timeout
        while self._read(0.1) is None:
            if timeout is not None and deadline is not None and time.monotonic() >= deadline:
                raise subprocess.TimeoutExpired("the forked stage", timeout)
        assert self.returncode is not None
        return self.returncode

    def _read(self, seconds: float) -> int | None:
        while self.returncode is None and select.select([self._status], [], [], seconds)[0]:
            chunk = os.read(self._status, 64)
            self._text += chunk
            if not chunk or self._text.endswith(b"\n"):
                self.returncode = int(self._text or -signal.SIGKILL)
                os.close(self._status)
        return self.returncode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)


class Zygote:
    """Holds the zygote of one command. `with Zygote(env) as zygote: run_child(..., zygote=zygote)`.

    `env` holds what the libraries read when they are loaded, such as OMP_NUM_THREADS; a stage that is asked for with
    other numbers of threads takes the plain path.
    """

    def __init__(
        self, env: Mapping[str, str], *, preload: Sequence[str] = PRELOAD, log_path: Path | None = None
    ) -> None:
        self.env = {**ENV, **env}
        self._preload = preload
        self._log_path = log_path or Path(tempfile.gettempdir(), f"ratchet-zygote-{os.getpid()}.log")
        self._socket: socket.socket | None = None
        self._thread: threading.Thread | None = None
        self._lock = threading.Lock()
        self.num_forks = 0

    def __enter__(self) -> Zygote:
        """Start importing, in the background: the first stage waits for it, and nothing else does."""
        if sys.platform != "linux" or any(Path("/dev").glob(GPUS)):
            return self
        ours, theirs = socket.socketpair()
        self._socket = ours
        self._thread = threading.Thread(target=self._serve, args=(theirs,), daemon=True)
        self._thread.start()
        return self

    def _serve(self, theirs: socket.socket) -> None:
        arguments = ["flows.zygote", str(theirs.fileno()), *self._preload]
        with theirs, contextlib.suppress(RatchetError):  # a zygote that ends leaves the plain path
            run_child(
                arguments,
                what="zygote",
                log_path=self._log_path,
                env=self.env,
                pass_fds=(theirs.fileno(),),
                on_start=theirs.close,
            )

    def __exit__(self, *_: object) -> None:
        if self._socket is not None:
            self._socket.close()
        if self._thread is not None:
            self._thread.join()
            self._log_path.unlink(missing_ok=True)

    def fork(
        self, arguments: Sequence[str], environment: Mapping[str, str], descriptors: Sequence[int], grace_s: float
    ) -> ForkedProcess | None:
        """Ask for a process that runs `python -m arguments`. `descriptors`: life, events, log. None: refused."""
        environment = {**environment, **ENV}
        with self._lock:
            if self._socket is None or _threads(environment) != _threads({**os.environ, **self.env}):
                return None
            request = {"arguments": list(arguments), "environment": environment, "grace_s": grace_s}
            status_r, status_w = os.pipe2(os.O_CLOEXEC)
            try:
                pid = self._ask(json.dumps(request | {"cwd": os.getcwd()}).encode(), [*descriptors, status_w])
            except OSError:  # it died, or hangs: the plain path from now on
                self._socket.close()
                self._socket, pid = None, 0
            finally:
                os.close(status_w)
            if not pid:
                os.close(status_r)
                return None
            self.num_forks += 1
            return ForkedProcess(pid, status_r)

    def _ask(self, request: bytes, descriptors: Sequence[int]) -> int:
        assert self._socket is not None
        self._socket.settimeout(_START_S)
        socket.send_fds(self._socket, [len(request).to_bytes(4, "little")], list(descriptors))
        self._socket.sendall(request)
        answer = self._socket.recv(8)
        if not answer:
            raise BrokenPipeError
        return int.from_bytes(answer, "little")


def _threads(environment: Mapping[str, str]) -> dict[str, str]:
    return {name: value for name, value in environment.items() if name.startswith(_FIXED)}


# ---------------------------------------------------------------- in the zygote


def main(descriptor: int, preload: Sequence[str]) -> None:
    """Import, then fork whenever asked, until the socket's other end closes."""
    sys.modules["sklearn"] = None  # pyright: ignore[reportArgumentType] - transformers would import it, for nothing
    for name in preload:
        importlib.import_module(name)
    import gc

    gc.freeze()
    asked = socket.socket(fileno=descriptor)
    asked.set_inheritable(False)
    waiting: dict[int, int] = {}  # guard -> where its exit code goes
    wake_r, wake_w = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
    signal.set_wakeup_fd(wake_w)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # the stages get theirs from the command, and time to save
    while True:
        ready, _, _ = select.select([asked, wake_r], [], [], 1.0)
        with contextlib.suppress(BlockingIOError):
            os.read(wake_r, 4096)
        _tell(waiting)
        if asked in ready and not _fork_one(asked, (wake_r, wake_w), waiting):
            return


def _tell(waiting: dict[int, int]) -> None:
    with contextlib.suppress(ChildProcessError):
        while (found := os.waitpid(-1, os.WNOHANG))[0]:
            status = waiting.pop(found[0], None)
            if status is not None:
                with contextlib.suppress(BrokenPipeError):
                    os.write(status, f"{os.waitstatus_to_exitcode(found[1])}\n".encode())
                os.close(status)


def _fork_one(asked: socket.socket, wake: tuple[int, int], waiting: dict[int, int]) -> bool:
    """Answer one request with the guard's pid, or 0. False: nobody asks any more."""
    header, descriptors, _, _ = socket.recv_fds(asked, 4, 4)
    if not header:
        return False
    for descriptor in descriptors:
        os.set_inheritable(descriptor, False)
    text = b""
    while len(text) < int.from_bytes(header, "little"):
        text += asked.recv(1 << 16)
    request = json.loads(text)
    pid = 0
    if len(os.listdir("/proc/self/task")) == 1:
        me = os.getpid()
        pid = os.fork()
        if not pid:
            for other in (asked.detach(), *wake, *waiting.values()):
                os.close(other)
            _become_guard(request, descriptors, me)
        waiting[pid] = descriptors.pop()
    for descriptor in descriptors:
        os.close(descriptor)
    asked.sendall(pid.to_bytes(8, "little"))
    return True


def _become_guard(request: dict[str, Any], descriptors: list[int], zygote: int) -> NoReturn:
    """As `flows.guard.main`: a session of its own, the log, then guard and stage."""
    try:
        signal.set_wakeup_fd(-1)
        os.setsid()
        os.chdir(request["cwd"])
        os.environ.clear()
        os.environ.update(request["environment"])
        life, events, log, _status = descriptors  # the status end stays open: its end of file says the guard is gone
        for stream in (1, 2):
            os.dup2(log, stream)
        os.close(log)
        module, *rest = request["arguments"]
        sys.argv = [module, *rest]
        run = functools.partial(runpy.run_module, module, run_name="__main__", alter_sys=True)
        guarded(zygote, life, events, request["grace_s"], run)
    finally:
        os._exit(1)


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2:])
