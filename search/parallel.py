"""Share one stage's shards among processes: on CPUs, a tiny model samples faster in two processes of one thread than in
one process of two.

Processes are forked before anything has started a thread (no model is loaded yet), each does every n-th shard, and what
they return and report comes back as JSON over a pipe. One that fails fails all. Left out: GPUs, where one process is
better served by large batches, and other machines.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import sys
import traceback
from collections.abc import Callable
from typing import Any, NoReturn

from search import errors
from search.errors import EngineError, RatchetError

Report = Callable[[dict[str, Any]], None]
Work = Callable[[int, Report], Any]  # (index of the process, report) -> a JSON value


def fork_map(
    work: Work, num: int, on_report: Callable[[int, dict[str, Any]], None], *, fork: bool = False
) -> list[Any]:
    """`work(i, report)` for i in 0..num-1, each in its own process; what they return, in order.

    `on_report(i, row)` hears what process i reports. With num = 1 the work is done here, unless `fork`: work that
    loads an engine, before more processes are forked, leaves nothing of it here. Raises what a process raised where it
    is one of ours, else EngineError; the others are ended first.
    """
    if num == 1 and not fork:
        return [work(0, lambda row: on_report(0, row))]
    sys.stdout.flush()
    sys.stderr.flush()
    readers: dict[int, int] = {}
    pids: list[int] = []
    for index in range(num):
        reader, writer = os.pipe()
        pid = os.fork()
        if pid == 0:
            os.close(reader)
            _work(work, index, writer)
        os.close(writer)
        readers[reader] = index
        pids.append(pid)
    try:
        return _collect(readers, num, on_report)
    except BaseException:
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        raise
    finally:
        for reader in readers:
            os.close(reader)
        for pid in pids:
            os.waitpid(pid, 0)


def _work(work: Work, index: int, writer: int) -> NoReturn:
    """In the forked process: never returns into the caller's code."""
    code = 1
    try:
        with os.fdopen(writer, "w", buffering=1, encoding="utf-8") as pipe:

            def send(kind: str, value: Any) -> None:
                pipe.write(json.dumps({kind: value}) + "\n")

            try:
                result = work(index, lambda row: send("report", row))
                send("result", result)
                code = 0
            except Exception as error:  # noqa: BLE001 - the process boundary: it is raised again in the parent
                traceback.print_exc()
                send("error", [type(error).__name__, str(error)])
    finally:
        os._exit(code)


def _collect(readers: dict[int, int], num: int, on_report: Callable[[int, dict[str, Any]], None]) -> list[Any]:
    results: dict[int, Any] = {}
    rest = dict.fromkeys(readers, b"")
    open_readers = set(readers)
    while open_readers:
        for reader in select.select(sorted(open_readers), [], [])[0]:
            chunk = os.read(reader, 1 << 16)
            if not chunk:
                open_readers.discard(reader)
                if readers[reader] not in results:
                    raise EngineError(f"process {readers[reader]} of {num} ended before its shards were done")
                continue
            *lines, rest[reader] = (rest[reader] + chunk).split(b"\n")
            for line in lines:
                message = json.loads(line)
                if "error" in message:
                    raise _as_ours(*message["error"])
                if "result" in message:
                    results[readers[reader]] = message["result"]
                else:
                    on_report(readers[reader], message["report"])
    return [results[index] for index in range(num)]


def _as_ours(name: str, message: str) -> RatchetError:
    kind = getattr(errors, name, None)
    if isinstance(kind, type) and issubclass(kind, RatchetError):
        return kind(message)
    return EngineError(f"{name}: {message}")
