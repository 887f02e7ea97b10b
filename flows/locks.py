"""Locks the kernel frees when their holder dies: one a loop, one a GPU.

`flock` on a file that also says who holds it. The descriptor is not inherited by programs the holder starts (CLOEXEC)
and is closed in forks, so a child that outlives its parent never keeps the lock. On NFS, Linux turns flock into a
byte-range lock on the server, which is enough; file systems that cannot lock are refused.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import itertools
import json
import math
import os
import re
import shlex
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

from flows.artefacts import disk_errors
from search.errors import DiskError, LockedError

GPUS = Path("/proc/driver/nvidia/gpus")  # a folder for each, named by its bus address

_held: set[int] = set()


def _close_in_fork() -> None:
    for descriptor in _held:
        os.close(descriptor)
    _held.clear()


os.register_at_fork(after_in_child=_close_in_fork)


@dataclass(frozen=True, slots=True)
class Holder:
    """Who holds a lock. Example: Holder("round 3 of loop countdown", 4711, "node7", "2026-01-31T09:00:00+00:00", ..)"""

    what: str
    pid: int
    host: str
    since: str  # UTC
    command: str
    process_started_s: float  # seconds since the epoch: tells a recycled pid


@contextlib.contextmanager
def lock(path: Path, what: str, *, wait_s: float = 0.0) -> Iterator[None]:
    """Hold the lock at `path`, doing `what`. Raises LockedError naming the holder after `wait_s`, DiskError."""
    with disk_errors(path):
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
    owner = os.getpid()
    _held.add(descriptor)
    try:
        _acquire(descriptor, path, wait_s)
        with disk_errors(path):
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, json.dumps(asdict(_myself(what))).encode(), 0)
        try:
            yield
        finally:
            if os.getpid() == owner:  # also after an error: this process may live on, and would be named as the holder
                os.ftruncate(descriptor, 0)  # the file stays: unlinking a lock file lets two processes in
    finally:
        if os.getpid() == owner:  # a fork that unwinds through here has closed its copy already
            fcntl.flock(descriptor, fcntl.LOCK_UN)  # frees it also where a fork has not closed its copy yet
            _held.discard(descriptor)
            os.close(descriptor)


def visible_gpus() -> list[str]:
    """The GPUs of this machine as CUDA_VISIBLE_DEVICES names them, else by the number it would name them by: a
    container that was given /dev/nvidia3 alone calls it 0. Asks no driver."""
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    num = len(list(Path("/dev").glob("nvidia[0-9]*")))
    if chosen is None or not num:
        return [str(number) for number in range(num)]
    return list(itertools.takewhile(lambda device: device not in ("", "-1"), map(str.strip, chosen.split(","))))


@contextlib.contextmanager
def gpu_locks(devices: Sequence[str], what: str, waiting: Callable[[str], None]) -> Iterator[None]:
    """Hold the lock of every device, doing `what`; `waiting` is told once of each that is busy, then it is waited for.

    GPUs belong to the machine, whatever the runs folder, so the locks lie in its temporary folder. Several are taken in
    one order by everybody: nobody waits in a circle.
    """
    with contextlib.ExitStack() as held:
        for place, device in sorted({_place(device): device for device in devices}.items()):
            safe = "".join(c if c.isalnum() else "-" for c in place)
            path = Path(tempfile.gettempdir(), f"ratchet-{os.getuid()}-gpu-{safe}.lock")
            try:
                held.enter_context(lock(path, what))
            except LockedError as error:
                waiting(f"waiting for GPU {device}: {error}")
                held.enter_context(lock(path, what, wait_s=math.inf))
        yield


def _place(device: str) -> str:
    """The bus address of a GPU, whether it is called by its number, by its UUID or by how that begins: all who use it
    meet at one lock. Unknown ones (parts of a GPU; a machine that does not tell) keep the name they are called by.

    Numbers are in the order of the bus, as they are wherever the GPUs of a machine are alike.
    """
    told = sorted(GPUS.glob("*/information"))
    if device.isdecimal():
        return told[int(device)].parent.name if int(device) < len(told) else device
    begins = re.compile(rf"^GPU UUID:\s*{re.escape(device)}", re.MULTILINE)
    places = [path.parent.name for path in told if begins.search(path.read_text(encoding="utf-8"))]
    return places[0] if len(places) == 1 else device


def holder(path: Path) -> Holder | None:
    """Who holds the lock, for display; None: nobody. Only reads: asking never makes another's attempt fail."""
    try:
        found = Holder(**json.loads(path.read_bytes()))
    except (OSError, ValueError, TypeError):
        return None
    if found.host != socket.gethostname():
        return found
    started = _process_started_s(found.pid)
    return found if started is not None and abs(started - found.process_started_s) < 2 else None


def _acquire(descriptor: int, path: Path, wait_s: float) -> None:
    deadline = time.monotonic() + wait_s
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except OSError as error:
            if error.errno not in (errno.EAGAIN, errno.EACCES):
                raise DiskError(f"{path} cannot be locked ({error.strerror}): keep runs on a local disk") from error
        if time.monotonic() >= deadline:
            raise LockedError(_refusal(path))
        time.sleep(0.1)


def _refusal(path: Path) -> str:
    """Who is in the way. The holder writes its name just after taking the lock, so look a few times."""
    for _ in range(10):
        found = holder(path)
        if found is not None:
            return (
                f"{found.what} is being done by process {found.pid} on {found.host} since {found.since} "
                f"({found.command}); wait for it, or stop it with `kill {found.pid}`"
            )
        time.sleep(0.02)
    return f"{path} is locked by another process; wait for it (`fuser {path}` names it)"


def _myself(what: str) -> Holder:
    started_s = _process_started_s(os.getpid())
    return Holder(
        what=what,
        pid=os.getpid(),
        host=socket.gethostname(),
        since=datetime.now(UTC).isoformat(timespec="seconds"),
        command=shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])[:200] if sys.argv else "python",
        process_started_s=started_s if started_s is not None else 0.0,
    )


def _process_started_s(pid: int) -> float | None:
    import psutil

    try:
        return psutil.Process(pid).create_time()
    except psutil.Error:
        return None
