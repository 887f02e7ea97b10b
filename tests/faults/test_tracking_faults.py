"""What MLflow may do to a round: nothing. Servers that die, hang or start late, and rounds that are killed."""

import importlib.util
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from configs.schema import Tracking
from flows import tracking
from flows.record import Key
from flows.state import Loop
from search.errors import TrackingError

_spec = importlib.util.spec_from_file_location(
    "tracking_helpers", Path(__file__).resolve().parent.parent / "test_flows_tracking.py"
)
assert _spec is not None
assert _spec.loader is not None
helpers = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(helpers)
add_round, everything, wait_for, CONFIG = helpers.add_round, helpers.everything, helpers.wait_for, helpers.CONFIG

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


@pytest.fixture
def loop_dir(tmp_path: Path) -> Path:
    (tmp_path / "runs").mkdir()
    add_round(tmp_path / "runs", 0.1)
    add_round(tmp_path / "runs", 0.2)
    return tmp_path / "runs" / "demo"


class MlflowServer:
    """A real tracking server on a port of its own, that can be killed and started again."""

    def __init__(self, home: Path) -> None:
        self.home = home
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.uri = f"http://127.0.0.1:{self.port}"
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        store = ["--backend-store-uri", f"sqlite:///{self.home}/server.db"]
        store += ["--artifacts-destination", str(self.home / "files"), "--workers", "1", "--port", str(self.port)]
        command = [str(Path(sys.executable).parent / "mlflow"), "server", *store]
        with (self.home / "server.log").open("ab") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True, cwd=self.home)
        wait_for(self.answers, 240)

    def answers(self) -> bool:
        try:
            urllib.request.urlopen(f"{self.uri}/health", timeout=2).read()
        except OSError:
            return False
        return True

    def kill(self) -> None:
        if self.process is not None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
            self.process = None


@pytest.fixture
def mlflow_server(tmp_path: Path) -> Iterator[MlflowServer]:
    server = MlflowServer(tmp_path)
    server.start()
    yield server
    server.kill()


def test_a_server_that_dies_costs_the_round_nothing_and_the_record_is_completed_later(
    loop_dir: Path, mlflow_server: MlflowServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in tracking._limits(30).items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    settings = Tracking(uri=mlflow_server.uri, timeout_s=30)  # a server needs many seconds to warm up on a busy machine
    warnings: list[str] = []
    tracker = tracking.Tracker(loop_dir, settings, warn=warnings.append)
    tracker.start()
    tracker.round_started("round-002")
    wait_for(lambda: helpers._status(mlflow_server.uri, Key("loop")) == "RUNNING", 120)
    mlflow_server.kill()
    add_round(loop_dir.parent, 0.3)
    slowest_s = 0.0
    for stage in ("baseline", "search", "select") * 5:
        started = time.monotonic()
        tracker.stage_started(stage)
        tracker.stage_finished(stage)
        slowest_s = max(slowest_s, time.monotonic() - started)
    assert slowest_s < 1
    started = time.monotonic()
    assert not tracker.close(timeout_s=15)
    assert time.monotonic() - started < 20
    assert len(warnings) == 1
    assert "ratchet track" in warnings[0]
    with pytest.raises(TrackingError, match="does not answer"):
        tracking.rebuild(loop_dir, settings)
    mlflow_server.start()
    tracking.rebuild(loop_dir, settings)
    late = everything(mlflow_server.uri)
    again = tracking.rebuild(loop_dir, settings)
    assert (again.num_runs_created, again.num_runs_replaced, again.num_points) == (0, 0, 0)
    fresh = f"sqlite:///{loop_dir.parent / 'fresh.db'}"
    tracking.rebuild(loop_dir, Tracking(uri=fresh))
    assert late == everything(fresh)
    assert {run["status"] for run in late.values()} == {"FINISHED"}


def test_a_server_that_accepts_and_never_answers_cannot_hold_the_end(loop_dir: Path) -> None:
    """It answers the check at the start, and nothing after."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        answers = [b"HTTP/1.0 200 OK\r\n\r\n{}"]
        held: list[socket.socket] = []

        def accept() -> None:
            while True:
                try:
                    connection, _ = listener.accept()
                except OSError:
                    return
                if answers:
                    connection.recv(65536)
                    connection.sendall(answers.pop())
                    connection.close()
                held.append(connection)

        threading.Thread(target=accept, daemon=True).start()
        warnings: list[str] = []
        uri = f"http://127.0.0.1:{listener.getsockname()[1]}"
        tracker = tracking.Tracker(loop_dir, Tracking(uri=uri, timeout_s=60), warn=warnings.append)
        tracker.start()
        wait_for(lambda: len(held) > 1, 120)
        started = time.monotonic()
        assert not tracker.close(timeout_s=3)
        assert time.monotonic() - started < 6
        assert len(warnings) == 1


def test_four_first_uses_at_once(tmp_path: Path) -> None:
    """MLflow makes its tables without a lock; unguarded, most of these crash."""
    runs_dir = tmp_path / "runs"
    runs_dir.mkdir()
    add_round(runs_dir, 0.1)
    for name in ("b", "c", "d"):
        shutil.copytree(runs_dir / "demo", runs_dir / name)
    code = (
        "import sys; from pathlib import Path; from configs.schema import Tracking; from flows import tracking\n"
        "tracking.rebuild(Path(sys.argv[1]), Tracking())"
    )
    environment = {k: v for k, v in os.environ.items() if k != "MLFLOW_TRACKING_URI"}
    processes = [
        subprocess.Popen([sys.executable, "-c", code, str(runs_dir / name)], stderr=subprocess.PIPE, env=environment)
        for name in ("demo", "b", "c", "d")
    ]
    for process in processes:
        _, err = process.communicate(timeout=400)
        assert process.returncode == 0, err.decode()
    found = everything(f"sqlite:///{runs_dir / 'mlflow.db'}")
    assert {run["status"] for run in found.values()} == {"FINISHED"}


def test_the_page_command_works_as_printed_and_shows_files(loop_dir: Path) -> None:
    tracking.rebuild(loop_dir, Tracking(uri=f"sqlite:///{loop_dir.parent / 'mlflow.db'}"))
    command = tracking.page_command(f"sqlite:///{loop_dir.parent / 'mlflow.db'}")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = command.replace("--port 5000", f"--port {port}")
    environment = {**os.environ, "MLFLOW_DISABLE_TELEMETRY": "true"}
    process = subprocess.Popen(
        command,
        shell=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
        env=environment,
    )
    try:
        uri = f"http://127.0.0.1:{port}"

        def ask(path: str, body: object = None) -> bytes:
            data = None if body is None else json.dumps(body).encode()
            request = urllib.request.Request(uri + path, data, {"Content-Type": "application/json"})
            return urllib.request.urlopen(request, timeout=10).read()

        def up() -> bool:
            try:
                return ask("/health") == b"OK"
            except OSError:
                return False

        wait_for(up, 240)
        assert b"<title>MLflow" in ask("/")
        found = json.loads(ask("/api/2.0/mlflow/experiments/get-by-name?experiment_name=demo"))
        ids = [found["experiment"]["experiment_id"]]
        runs = json.loads(ask("/api/2.0/mlflow/runs/search", {"experiment_ids": ids}))["runs"]
        (round_run,) = [run for run in runs if run["info"]["run_name"] == "round-001"]
        run_id = round_run["info"]["run_id"]
        assert b"<svg" in ask(f"/get-artifact?run_uuid={run_id}&path=plots/curve.svg")
        assert b'"adapter"' in ask(f"/get-artifact?run_uuid={run_id}&path=model/model.json")
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def test_a_killed_round_is_recorded_as_killed_and_leaves_nothing_running(loop_dir: Path) -> None:
    """The parent dies without a goodbye: the mirror says so and ends."""
    store = f"sqlite:///{loop_dir.parent / 'mlflow.db'}"
    code = f"""
import sys, time
from pathlib import Path
from configs.schema import Tracking
from flows.tracking import Tracker
tracker = Tracker(Path({str(loop_dir)!r}), Tracking(uri={store!r}))
tracker.start()
tracker.round_started("round-002")
print(tracker._process.pid, flush=True)
time.sleep(600)
"""
    with Loop.locked(loop_dir.parent, "demo", "round") as loop:
        loop.begin_round(json.dumps(CONFIG))
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    mirror_pid = int(parent.stdout.readline())
    wait_for(lambda: helpers._status(store, Key("round", "round-002")) == "RUNNING")
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    parent.stdout.close()
    wait_for(lambda: not _alive(mirror_pid), 30)
    assert helpers._status(store, Key("round", "round-002")) == "KILLED"
    assert helpers._status(store, Key("loop")) == "FINISHED"


def _alive(pid: int) -> bool:
    try:
        return (
            "zombie" not in Path(f"/proc/{pid}/status").read_text() and Path(f"/proc/{pid}/cmdline").read_bytes() != b""
        )
    except OSError:
        return False
