"""Tells MLflow how the loop is doing, without ever being in its way. With `flows.mirror` and `flows.registry`, the only
code that talks to MLflow.

The runs folder is the truth and MLflow its mirror (`flows.record` says what it should hold). While a round runs, a
child process keeps the mirror up to date: importing MLflow, slow servers and broken ones cost the round nothing, and
ending it is bounded. It is told what is running by lines on its standard input; when that closes without a goodbye, the
round was killed: it records that and ends within seconds. What could not be written is written by the next round, or by
`ratchet track`. Only `start` raises; everything later warns once.
"""

from __future__ import annotations

import base64
import contextlib
import json
import os
import queue
import select
import shlex
import signal
import sqlite3
import ssl
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from configs.schema import Tracking
from flows import locks
from flows.folders import ROUND, Live
from flows.record import read
from flows.redact import Redactor
from search.errors import TrackingError

if TYPE_CHECKING:
    from flows.mirror import Report

ORPHAN_S = 4  # how long the mirror may outlive a killed round
MAX_PAUSE_S = 60.0  # between attempts while MLflow does not answer
LOG_BYTES = 2**20


def tracking_uri(settings: Tracking, runs_dir: Path) -> str:
    """Where records go: the configuration, else MLFLOW_TRACKING_URI, else SQLite in the runs folder."""
    chosen = settings.uri or os.environ.get("MLFLOW_TRACKING_URI")
    return chosen or f"sqlite:///{runs_dir.absolute() / 'mlflow.db'}"


def page_command(uri: str) -> str:
    """What to type, or open, to see MLflow's pages."""
    if uri.startswith(("http://", "https://")):
        return Redactor().text(uri)
    program = Path(sys.executable).parent / "mlflow"
    with contextlib.suppress(ValueError):
        program = program.relative_to(Path.cwd())
    return f"{shlex.quote(str(program))} server --backend-store-uri {shlex.quote(uri)} --workers 1 --port 5000"


# ---------------------------------------------------------------- the round's side


class Tracker:
    """The round's handle on its MLflow mirror. Every method but `start` returns at once and never raises.

        tracker = Tracker(loop_dir, config.tracking)
        tracker.start()                       # raises TrackingError
        tracker.round_started("round-003")    # a folder's name, controls included
        tracker.stage_started("search")
        tracker.stage_finished("search", failed=False)
        tracker.round_finished()
        tracker.close(timeout_s=20)           # True: everything is recorded

    `warn` gets at most one line, when something could not be recorded.
    """

    def __init__(self, loop_dir: Path, settings: Tracking, *, warn: Callable[[str], None] | None = None) -> None:
        self.uri = tracking_uri(settings, loop_dir.parent)
        self._loop_dir = loop_dir
        self._settings = settings
        self._warn = warn or _print_warning
        self._process: subprocess.Popen[bytes] | None = None
        self._reader: threading.Thread | None = None
        self._warned = False
        self._recorded = False

    def start(self) -> None:
        """Check that MLflow answers and start mirroring. Raises TrackingError with the way out."""
        if not self._settings.mlflow or self._process is not None:
            return
        check(self.uri, self._settings.timeout_s)
        self._loop_dir.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-P", "-m", "flows.tracking", str(self._loop_dir.absolute()), self.uri]
        with _open_log(self._loop_dir / "tracking.log") as log:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                env=_child_environment(self._settings.timeout_s),
                start_new_session=True,  # Ctrl-C is for the round; it ends the mirror itself
            )
        self._reader = threading.Thread(target=self._listen, args=(self._process,), daemon=True)
        self._reader.start()

    def round_started(self, folder: str) -> None:
        self._send({"round": folder, "stage": None})

    def stage_started(self, stage: str) -> None:
        self._send({"stage": stage})

    def stage_finished(self, stage: str, *, failed: bool = False) -> None:
        self._send({"stage": None, "failed": stage} if failed else {"stage": None})

    def round_finished(self) -> None:
        self._send({"round": None, "stage": None})

    def close(self, timeout_s: float = 20.0) -> bool:
        """Record what is left, for at most `timeout_s`; True: MLflow holds everything."""
        process, self._process = self._process, None
        if process is None:
            return not self._settings.mlflow
        _write_line(process, {"close": True})
        try:
            process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        if self._reader is not None:
            self._reader.join(1.0)
        for stream in (process.stdin, process.stdout):
            with contextlib.suppress(OSError):
                if stream is not None:
                    stream.close()
        complete = process.returncode == 0 and self._recorded
        if not complete:
            self._warn_once("the record was not finished in time")
        return complete

    def _send(self, message: Mapping[str, Any]) -> None:
        if self._process is not None and not _write_line(self._process, message):
            self._warn_once(f"the mirror ended; see {self._loop_dir / 'tracking.log'}")

    def _listen(self, process: subprocess.Popen[bytes]) -> None:
        assert process.stdout is not None
        for line in process.stdout:
            with contextlib.suppress(ValueError):
                problem = json.loads(line).get("problem")
                self._recorded = problem is None
                if problem is not None:
                    self._warn_once(problem)

    def _warn_once(self, problem: str) -> None:
        if not self._warned:
            self._warned = True
            self._warn(f"MLflow: {problem}; the round goes on, `ratchet track` records what is missing")


def rebuild(loop_dir: Path, settings: Tracking) -> Report:
    """Compare everything with the folder and write what is missing, also into an empty store. Raises TrackingError."""
    uri = tracking_uri(settings, loop_dir.parent)
    check(uri, settings.timeout_s)
    os.environ.update(_limits(settings.timeout_s))
    try:
        report = _Store(loop_dir, uri).mirror(running_now(loop_dir), verify=True)
    except Exception as error:
        raise TrackingError(f"{_where(uri)} could not be written: {_first_line(error)}") from error
    if report.problems:
        raise TrackingError(f"{_where(uri)} holds the figures, but not {'; '.join(report.problems[:3])}")
    return report


def running_now(loop_dir: Path) -> Live:
    """What another process is doing in the loop, as far as its folder tells."""
    folders = [p for p in loop_dir.glob("round-*") if ROUND.fullmatch(p.name) and not (p / "record.json").exists()]
    if not folders or locks.holder(loop_dir / ".lock") is None:
        return Live()
    newest = max(folders, key=lambda path: path.stat().st_mtime)
    work = sorted(newest.glob("*.work"), key=lambda path: path.stat().st_mtime)
    return Live(newest.name, work[-1].name.removesuffix(".work") if work else None)


def _print_warning(text: str) -> None:
    print(text, file=sys.stderr)


def _write_line(process: subprocess.Popen[bytes], message: Mapping[str, Any]) -> bool:
    """Tell the mirror something; False where it has ended. A pipe holds thousands of lines, so this never waits."""
    assert process.stdin is not None
    try:
        process.stdin.write(json.dumps(message).encode() + b"\n")
        process.stdin.flush()
    except (OSError, ValueError):
        return False
    return True


@contextlib.contextmanager
def _open_log(path: Path) -> Iterator[Any]:
    large = path.exists() and path.stat().st_size > LOG_BYTES
    with path.open("wb" if large else "ab") as log:
        yield log


def _limits(timeout_s: float) -> dict[str, str]:
    """MLflow's own defaults let one call wait four minutes, it reports usage home and prints links."""
    limits = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2", "MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR": "1"}
    limits |= {"MLFLOW_HTTP_REQUEST_TIMEOUT": str(max(1, round(timeout_s))), "GIT_PYTHON_REFRESH": "quiet"}
    limits |= {"MLFLOW_DISABLE_TELEMETRY": "true", "DO_NOT_TRACK": "true"}
    return limits | {"MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true"}


def _child_environment(timeout_s: float) -> dict[str, str]:
    root = str(Path(__file__).resolve().parent.parent)
    path = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
    return {**os.environ, **_limits(timeout_s), "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}


# ---------------------------------------------------------------- does it answer?


def check(uri: str, timeout_s: float) -> None:
    """Raise TrackingError unless the store answers. Imports no MLflow, so it takes milliseconds where all is well."""
    scheme = uri.partition(":")[0]
    if scheme in ("http", "https"):
        _check_server(uri, timeout_s)
    elif scheme == "sqlite":
        _check_sqlite(uri)
    elif scheme == "file" or ("://" not in uri and not uri.startswith("databricks")):
        raise TrackingError(
            f"tracking.uri = '{uri}' is a plain folder, which MLflow 3.17 no longer writes; "
            "use sqlite:///PATH/mlflow.db, or leave it out"
        )


def _where(uri: str) -> str:
    return f"MLflow at {Redactor().text(uri)}"


_WAY_OUT = (
    "start it, correct tracking.uri or MLFLOW_TRACKING_URI, or go without: --set tracking.mlflow=false "
    "(`ratchet track` records the round later)"
)


def _check_server(uri: str, timeout_s: float) -> None:
    parts = urllib.parse.urlsplit(uri)
    host = parts.netloc.rpartition("@")[2]
    url = urllib.parse.urlunsplit((parts.scheme, host, parts.path.rstrip("/"), "", ""))
    request = urllib.request.Request(f"{url}/api/2.0/mlflow/experiments/search?max_results=1")
    authorization = _authorization(parts)
    if authorization:
        request.add_header("Authorization", authorization)
    try:
        try:
            _ask(request, timeout_s)
        except TimeoutError:  # the first question to a server that has just started takes it seconds
            _ask(request, 2 * timeout_s)
    except urllib.error.HTTPError as error:
        hint = " (MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD?)" if error.code in (401, 403) else ""
        raise TrackingError(f"{_where(uri)} answers with HTTP {error.code}{hint}: {_WAY_OUT}") from None
    except ValueError:
        raise TrackingError(f"{_where(uri)} is something else than an MLflow server: {_WAY_OUT}") from None
    except OSError as error:
        why = getattr(error, "reason", None) or error
        raise TrackingError(f"{_where(uri)} does not answer ({why}): {_WAY_OUT}") from None


def _ask(request: urllib.request.Request, timeout_s: float) -> None:
    """Raises TimeoutError, other OSErrors, and ValueError where the answer is not JSON."""
    try:
        with urllib.request.urlopen(request, timeout=timeout_s, context=_tls(request.type)) as answer:
            json.loads(answer.read(10_000_000))
    except urllib.error.URLError as error:
        if isinstance(error.reason, TimeoutError):
            raise error.reason from None
        raise


def _authorization(parts: urllib.parse.SplitResult) -> str | None:
    environment = os.environ.get
    user = environment("MLFLOW_TRACKING_USERNAME") or urllib.parse.unquote(parts.username or "")
    password = environment("MLFLOW_TRACKING_PASSWORD") or urllib.parse.unquote(parts.password or "")
    if user:
        return "Basic " + base64.b64encode(f"{user}:{password}".encode()).decode()
    token = environment("MLFLOW_TRACKING_TOKEN")
    return f"Bearer {token}" if token else None


def _tls(scheme: str) -> ssl.SSLContext | None:
    if scheme != "https":
        return None
    if os.environ.get("MLFLOW_TRACKING_INSECURE_TLS", "").lower() in ("true", "1"):
        return ssl._create_unverified_context()  # the user asked MLflow for it
    return ssl.create_default_context(cafile=os.environ.get("MLFLOW_TRACKING_SERVER_CERT_PATH"))


def _sqlite_path(uri: str) -> Path:
    return Path(uri.partition("?")[0].removeprefix("sqlite:///")).absolute()


def _check_sqlite(uri: str) -> None:
    path = _sqlite_path(uri)
    if not uri.startswith("sqlite:///") or path.is_dir():
        raise TrackingError(f"tracking.uri = '{uri}' names no file: write sqlite:///PATH/mlflow.db")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.closing(sqlite3.connect(path, timeout=5)) as database:
            database.execute("BEGIN IMMEDIATE").close()  # refused where the file cannot be written
            database.execute("SELECT count(*) FROM sqlite_master").fetchone()
    except (OSError, sqlite3.Error) as error:
        raise TrackingError(
            f"{_where(uri)} cannot be used ({error}): move {path} away and `ratchet track` makes it anew, "
            "or give another place in tracking.uri"
        ) from None


# ---------------------------------------------------------------- the mirror's side


class _Store:
    """A loop's place in one MLflow store. Makes the store if needed, one process at a time."""

    def __init__(self, loop_dir: Path, uri: str) -> None:
        self._loop_dir = loop_dir
        self._artefact_root: str | None = None
        first_use: contextlib.AbstractContextManager[None] = contextlib.nullcontext()
        if not uri.startswith(("http://", "https://", "databricks")):
            home = _sqlite_path(uri).parent if uri.startswith("sqlite:") else loop_dir.parent.absolute()
            self._artefact_root = (home / "mlartifacts").as_uri()
            # MLflow creates its tables without a lock: of three processes at once, two crash
            first_use = locks.lock(home / ".mlflow.lock", "first use of MLflow", wait_s=120)
        from mlflow.tracking import MlflowClient

        with first_use:
            self._client = MlflowClient(uri)
            self._client.search_experiments(max_results=1)

    def mirror(self, live: Live, *, verify: bool = False) -> Report:
        from flows.mirror import mirror

        record = read(self._loop_dir, live)
        with locks.lock(self._loop_dir / ".tracking.lock", "tracking", wait_s=60):
            return mirror(self._client, record, self._artefact_root, verify=verify)


@dataclass
class _Breaker:
    """After a failure, wait before the next attempt: 2 s, then twice as long each time."""

    pause_s: float = 1.0
    next_s: float = 0.0

    def failed(self) -> None:
        self.pause_s = min(MAX_PAUSE_S, 2 * self.pause_s)
        self.next_s = time.monotonic() + self.pause_s

    def succeeded(self) -> None:
        self.pause_s, self.next_s = 1.0, 0.0

    @property
    def wait_s(self) -> float:
        return max(0.0, self.next_s - time.monotonic())


class _Mirror:
    """The child process: one pass over the folder for every batch of messages."""

    def __init__(self, loop_dir: Path, uri: str) -> None:
        self._loop_dir = loop_dir
        self._uri = uri
        self._inbox: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
        self._store: _Store | None = None
        self._live = Live()
        self._closing = False
        self._breaker = _Breaker()

    def run(self) -> int:
        """Until told to close, or left alone. Exit code 0: everything is recorded."""
        threading.Thread(target=self._receive, daemon=True).start()
        pending = True
        while True:
            if not self._closing:
                self._next_messages(self._breaker.wait_s if pending else None)
                pending = True
            if self._closing or self._breaker.wait_s == 0:
                pending = not self._pass()
                if self._closing:
                    return int(pending)

    def _receive(self) -> None:
        """Read the round's messages. It keeps the pipe open while it waits for us: a closed one means that it died."""
        parent, rest = os.getppid(), b""
        while os.getppid() == parent:
            readable, _, _ = select.select([0], [], [], 1.0)
            data = os.read(0, 65536) if readable else None
            if data == b"":
                break
            *lines, rest = (rest + (data or b"")).split(b"\n")
            for line in lines:
                self._inbox.put(json.loads(line))
        signal.alarm(ORPHAN_S)  # no handler: the kernel ends the process, whatever it waits for
        self._inbox.put({"close": True})

    def _next_messages(self, timeout_s: float | None) -> None:
        with contextlib.suppress(queue.Empty):
            self._take(self._inbox.get(timeout=timeout_s))
            while True:
                self._take(self._inbox.get_nowait())

    def _take(self, message: Mapping[str, Any]) -> None:
        live = self._live
        current = message.get("round", live.round)
        failed = live.failed | {(str(current), message["failed"])} if message.get("failed") else live.failed
        self._live = Live(current, message.get("stage", live.stage), failed)
        self._closing = self._closing or bool(message.get("close"))
        if self._closing:
            self._live = Live(failed=failed)

    def _pass(self) -> bool:
        problem: str | None
        try:
            self._store = self._store or _Store(self._loop_dir, self._uri)
            live = self._live
            if live.round is None:  # another process may hold the loop; ours came too late for it
                live = replace(running_now(self._loop_dir), failed=live.failed)
            problem = next(iter(self._store.mirror(live).problems), None)
        except Exception as error:  # noqa: BLE001  whatever the store's transport raises must not end the mirror
            problem = f"{_where(self._uri)}: {_first_line(error)}"
        if problem is None:
            self._breaker.succeeded()
        else:
            print(problem, file=sys.stderr, flush=True)
            self._breaker.failed()
        with contextlib.suppress(OSError):  # the round may be gone
            os.write(1, json.dumps({"problem": problem}).encode() + b"\n")
        return problem is None


def _first_line(error: BaseException) -> str:
    return Redactor().text((str(error).strip().splitlines() or [type(error).__name__])[0][:300])


def main(arguments: list[str]) -> int:
    """The mirror process: loop folder, store."""
    with contextlib.suppress(OSError):
        os.nice(5)  # the stages come first
    signal.signal(signal.SIGPIPE, signal.SIG_IGN)
    return _Mirror(Path(arguments[0]), arguments[1]).run()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
