"""The Prefect server a command runs under: the one PREFECT_API_URL names, else a private one for the runs folder.

The private server is a child process on 127.0.0.1 with its home, a SQLite database that keeps the history, in
`runs/.prefect`. Never Prefect's ephemeral server: it loses records. Rounds of several loops share one server: each
holds a shared kernel lock on `users.lock`, and the server ends when nobody does, so it outlives no round, however that
ended; one that hangs is stopped by the next round. A server that dies takes no round with it, since the journal on disk
says how a round ended (`is_prefect_infrastructure_error` tells such failures from ours).
"""

from __future__ import annotations

import base64
import contextlib
import fcntl
import json
import os
import runpy
import shlex
import signal
import socket
import subprocess
import sys
import threading
import time
import tomllib
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from flows.artefacts import atomic_write
from search.errors import RatchetError, TrackingError

ANSWER_S = 2.0  # within which a server must answer
START_S = 90.0  # within which a private one must be up: 6 s as a rule, 11 s at first, more on a loaded machine
STOP_S = 5.0
DRAIN_S = 5.0  # for what Prefect's client has not sent yet
USERS, RECORD = "users.lock", "server.json"


@dataclass(frozen=True, slots=True)
class _Server:
    """The private server's process. Example: _Server(4711, 1790000000.5, "http://127.0.0.1:43121/api")"""

    pid: int
    started_s: float  # since the epoch: tells a recycled pid
    url: str


class PrefectServer:
    """A command's hold on a Prefect server.

        server = PrefectServer("auto", runs_dir)
        server.start()               # returns at once; raises TrackingError
        url = server.wait_ready()    # None: run without Prefect; raises TrackingError in mode "on"
        ...
        server.stop()

    Until `stop`, the environment of this process and of its children names the server.
    """

    def __init__(self, mode: str, runs_dir: Path, *, home: Path | None = None) -> None:
        assert mode in ("auto", "on", "off"), mode
        self.mode = mode
        self.home = (home or runs_dir / ".prefect").absolute()
        self.url: str | None = None
        self.warning: str | None = None  # why the configured server is not used
        self._server: _Server | None = None
        self._users: int | None = None
        self._spawned = False
        self._environment: dict[str, str | None] = {}

    def start(self) -> None:
        """Find or start the server. Raises TrackingError in mode "on" where the configured one does not answer."""
        if self.mode == "off" or self.url is not None:
            return
        configured, credentials = configured_api()
        if configured is not None:
            problem = _problem(configured, credentials)
            if problem is None:
                self.url = configured
                self._set_environment({"PREFECT_API_URL": configured})
                return
            if self.mode == "on":
                raise TrackingError(
                    f"the Prefect server at {configured} does not answer ({problem}): start it, correct "
                    "PREFECT_API_URL, or let the round start one of its own with --prefect auto"
                )
            self.warning = f"the Prefect server at {configured} does not answer ({problem})"
        try:
            self._start_private()
        except OSError as error:
            if self.mode == "on":
                raise TrackingError(f"a Prefect server could not be started in {self.home}: {error}") from error

    def ready(self) -> bool:
        """Would `wait_ready` return at once?"""
        return self._server is None or _problem(self._server.url) is None

    def wait_ready(self, timeout_s: float = START_S) -> str | None:
        """The API's URL once it answers; None in mode "off", and in "auto" where it does not come up."""
        if self._server is None:
            return self.url
        deadline = time.monotonic() + timeout_s
        with contextlib.suppress(ImportError):
            import prefect  # noqa: F401  two seconds that are best spent while the server starts
        while time.monotonic() < deadline and _is_running(self._server):
            if _problem(self._server.url) is None:
                if self._spawned:
                    _crash_orphans(self._server.url)
                return self.url
            time.sleep(0.1)
        if self.mode == "on":
            raise TrackingError(
                f"the Prefect server in {self.home} did not come up; {self.home / 'server.log'} says why, "
                "or go without: --prefect off"
            )
        self.stop()
        return None

    def stop(self) -> None:
        """Send what is left to the server and let go of it; the last user stops it."""
        if self._server is not None and _problem(self._server.url) is None:
            _drain()
        self._set_environment({})
        self.url = None
        server, self._server = self._server, None
        users, self._users = self._users, None
        if users is None:
            return
        with contextlib.suppress(OSError):
            fcntl.flock(users, fcntl.LOCK_EX | fcntl.LOCK_NB)  # succeeds for the last user only
            if server is not None:
                _end(server)
        os.close(users)

    def page_command(self) -> str:
        """What to type, or open, to see the runs: also after the command ended."""
        configured, _ = configured_api()
        if configured is not None:
            return configured.removesuffix("/api")
        program = Path(sys.executable).parent / "prefect"
        with contextlib.suppress(ValueError):
            program = program.relative_to(Path.cwd())
        switches = "PREFECT_SERVER_ANALYTICS_ENABLED=false"
        return f"PREFECT_HOME={shlex.quote(str(self.home))} {switches} {shlex.quote(str(program))} server start"

    # ------------------------------------------------------------ the private server

    def _start_private(self) -> None:
        self.home.mkdir(parents=True, exist_ok=True, mode=0o700)
        with _exclusive(self.home / "start.lock"):
            self._users = self._join()
            server = _recorded(self.home)
            if server is not None and _is_running(server) and not _is_stale(server):
                self._server = server
            else:
                if server is not None:
                    _end(server)
                self._server = self._spawn()
                self._spawned = True
        self.url = self._server.url
        self._set_environment(_client_environment(self.home, self.url))

    def _join(self) -> int:
        """Become a user. A server that is ending holds the lock alone: it is given some seconds, then ended."""
        descriptor = os.open(self.home / USERS, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        deadline = time.monotonic() + STOP_S
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
                return descriptor
            except BlockingIOError:
                server = _recorded(self.home)
                if time.monotonic() > deadline and server is not None:
                    _end(server)
                if time.monotonic() > deadline + STOP_S:
                    os.close(descriptor)
                    raise
                time.sleep(0.05)

    def _spawn(self) -> _Server:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        environment = {k: v for k, v in os.environ.items() if not k.startswith("PREFECT_")}
        root = str(Path(__file__).resolve().parent.parent)
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, [root, environment.get("PYTHONPATH")]))
        environment |= {"PREFECT_HOME": str(self.home), "PREFECT_SERVER_ANALYTICS_ENABLED": "false"}
        environment |= {"PREFECT_SERVER_EPHEMERAL_ENABLED": "false", "DO_NOT_TRACK": "1", "OMP_NUM_THREADS": "1"}
        environment |= {"PREFECT_SERVER_LOGGING_LEVEL": "WARNING"}
        with (self.home / "server.log").open("wb") as log:
            process = subprocess.Popen(
                [sys.executable, "-P", "-m", "flows.server", str(self.home), str(port)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=environment,
                start_new_session=True,  # Ctrl-C is for the round, which still has things to tell the server
            )
        _children.append(process)
        server = _Server(process.pid, _started_s(process.pid) or time.time(), f"http://127.0.0.1:{port}/api")
        atomic_write(self.home / RECORD, json.dumps(asdict(server)) + "\n")
        return server

    def _set_environment(self, wanted: Mapping[str, str]) -> None:
        """Set variables until the next call, which first puts the old values back."""
        for name, value in self._environment.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
        self._environment = {name: os.environ.get(name) for name in wanted}
        os.environ.update(wanted)


_children: list[subprocess.Popen[bytes]] = []  # to be reaped


def is_prefect_infrastructure_error(error: BaseException) -> bool:
    """Did Prefect fail, and not the round? Its server died, refused, or lost a run; our own errors never count."""
    if isinstance(error, RatchetError | KeyboardInterrupt | SystemExit):
        return False
    seen: BaseException | None = error
    while seen is not None:
        module = type(seen).__module__.partition(".")[0]
        if isinstance(seen, RatchetError):
            return False
        if module in ("prefect", "httpx", "httpcore", "websockets", "h11", "h2", "anyio"):
            return True
        seen = seen.__cause__ or seen.__context__
    return False


# ---------------------------------------------------------------- asking


def configured_api() -> tuple[str | None, str | None]:
    """(URL of the API the user configured, value of its Authorization header); from the environment or the profile.

    Reads Prefect's profile file itself: importing Prefect for it would take seconds.
    """
    settings = {**_profile(), **{k: v for k, v in os.environ.items() if k.startswith("PREFECT_")}}
    url = settings.get("PREFECT_API_URL") or None
    credentials = None
    if settings.get("PREFECT_API_AUTH_STRING"):
        credentials = "Basic " + base64.b64encode(settings["PREFECT_API_AUTH_STRING"].encode()).decode()
    elif settings.get("PREFECT_API_KEY"):
        credentials = f"Bearer {settings['PREFECT_API_KEY']}"
    return url.rstrip("/") if url else None, credentials


def _profile() -> dict[str, str]:
    home = Path(os.environ.get("PREFECT_HOME") or "~/.prefect").expanduser()
    path = Path(os.environ.get("PREFECT_PROFILES_PATH") or home / "profiles.toml").expanduser()
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
        active = os.environ.get("PREFECT_PROFILE") or content.get("active")
        return {name: str(value) for name, value in content["profiles"][active].items()}
    except (OSError, ValueError, KeyError, AttributeError, TypeError):
        return {}


def _open(url: str, credentials: str | None = None, body: Any = None) -> bytes:
    request = urllib.request.Request(url, None if body is None else json.dumps(body).encode())
    request.add_header("Content-Type", "application/json")
    if credentials:
        request.add_header("Authorization", credentials)
    local = url.startswith("http://127.0.0.1:")  # never through a proxy
    handlers = [urllib.request.ProxyHandler({})] if local else []
    with urllib.request.build_opener(*handlers).open(request, timeout=ANSWER_S) as answer:
        return answer.read(10_000_000)


def _problem(url: str, credentials: str | None = None) -> str | None:
    """Why the API cannot be used; None: it answers."""
    try:
        _open(f"{url}/health", credentials)
    except urllib.error.HTTPError as error:
        return f"HTTP {error.code}"
    except (OSError, ValueError) as error:
        return str(getattr(error, "reason", None) or error)
    return None


def _crash_orphans(url: str) -> None:
    """Flow runs of killed rounds would say "running" for ever. Only for a server that has no other users yet."""
    states = {"type": {"any_": ["RUNNING", "PENDING", "CANCELLING"]}}
    crashed = {"type": "CRASHED", "message": "its process is gone; `ratchet round` resumes the round"}
    with contextlib.suppress(OSError, ValueError):
        for run in json.loads(_open(f"{url}/flow_runs/filter", body={"flow_runs": {"state": states}})):
            _open(f"{url}/flow_runs/{run['id']}/set_state", body={"state": crashed, "force": True})


# ---------------------------------------------------------------- the server's process


def _recorded(home: Path) -> _Server | None:
    try:
        return _Server(**json.loads((home / RECORD).read_bytes()))
    except (OSError, ValueError, TypeError):
        return None


def _started_s(pid: int) -> float | None:
    import psutil

    try:
        process = psutil.Process(pid)
        return None if process.status() == psutil.STATUS_ZOMBIE else process.create_time()
    except psutil.Error:
        return None


def _is_running(server: _Server) -> bool:
    for child in _children:
        child.poll()
    started_s = _started_s(server.pid)
    return started_s is not None and abs(started_s - server.started_s) < 2


def _is_stale(server: _Server) -> bool:
    """Running, long enough to be up, and not answering: stopped or hung."""
    return time.time() - server.started_s > START_S and _problem(server.url) is not None


def _end(server: _Server) -> None:
    """SIGTERM to the server's process group, SIGKILL after some seconds. The pid is checked against its start time."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        deadline = time.monotonic() + STOP_S
        if _is_running(server):
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(server.pid, number)
        while _is_running(server) and time.monotonic() < deadline:
            time.sleep(0.02)


@contextlib.contextmanager
def _exclusive(path: Path) -> Iterator[None]:
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _client_environment(home: Path, url: str) -> dict[str, str]:
    """For this process and the stages: our server and nobody else's settings; fail soon when it dies."""
    no_proxy = ",".join(filter(None, [os.environ.get("NO_PROXY"), "127.0.0.1"]))
    wanted = {"PREFECT_API_URL": url, "PREFECT_HOME": str(home), "PREFECT_SERVER_EPHEMERAL_ENABLED": "false"}
    wanted |= {"PREFECT_CLIENT_MAX_RETRIES": "2", "NO_PROXY": no_proxy, "no_proxy": no_proxy, "DO_NOT_TRACK": "1"}
    return wanted | {"PREFECT_API_KEY": "", "PREFECT_API_AUTH_STRING": ""}


def _drain() -> None:
    """Task runs reach the server as events from a background thread: wait for them, for some seconds."""
    if "prefect" not in sys.modules:
        return

    def send() -> None:
        from prefect.events.worker import EventsWorker
        from prefect.logging.handlers import APILogWorker

        for service in (EventsWorker, APILogWorker):
            service.drain_all(timeout=DRAIN_S)

    sender = threading.Thread(target=send, daemon=True)
    sender.start()
    sender.join(DRAIN_S)


def main(arguments: list[str]) -> None:
    """The private server: home, port. Serves until nobody holds the users' lock."""
    home, port = Path(arguments[0]), arguments[1]
    threading.Thread(target=_end_when_unused, args=(home / USERS,), daemon=True).start()
    sys.argv = ["prefect", "server", "start", "--host", "127.0.0.1", "--port", port]
    runpy.run_module("prefect", run_name="__main__", alter_sys=True)


def _end_when_unused(path: Path) -> None:
    descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    while True:
        with contextlib.suppress(BlockingIOError):
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os._exit(0)  # nobody is left to be told; SQLite's journal makes this safe
        time.sleep(0.5)


if __name__ == "__main__":
    main(sys.argv[1:])
