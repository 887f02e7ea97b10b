"""Which Prefect server a command runs under. The real one starts in seconds: its tests are slow."""

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from flows import server
from flows.server import PrefectServer, is_prefect_infrastructure_error
from search.errors import LockedError, TrackingError


@contextmanager
def prefect_api(mode: str, runs_dir: Path) -> Iterator[str | None]:
    """A server held as a command holds it."""
    held = PrefectServer(mode, runs_dir)
    try:
        held.start()
        yield held.wait_ready()
    finally:
        held.stop()


@pytest.fixture(autouse=True)
def no_settings(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in [name for name in os.environ if name.startswith("PREFECT_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PREFECT_PROFILES_PATH", str(tmp_path / "no-profiles.toml"))


@pytest.fixture
def answering() -> Iterator[tuple[str, list[str | None]]]:
    """The URL of a server that says it is healthy, and the credentials it was sent."""
    seen: list[str | None] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            seen.append(self.headers.get("Authorization"))
            self.send_response(200 if self.path == "/api/health" else 404)
            self.end_headers()
            self.wfile.write(b"true")

        def log_message(self, format: str, *args: object) -> None:
            pass

    http = HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=http.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{http.server_port}/api", seen
    http.shutdown()
    http.server_close()


def test_off_starts_nothing(tmp_path: Path) -> None:
    with prefect_api("off", tmp_path) as url:
        assert url is None
    assert list(tmp_path.iterdir()) == []


def test_the_configured_server_is_used_and_left_alone(
    answering: tuple[str, list[str | None]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PREFECT_API_URL", answering[0] + "/")
    monkeypatch.setenv("PREFECT_API_AUTH_STRING", "me:pw")
    with prefect_api("on", tmp_path) as url:
        assert url == answering[0]
        assert os.environ["PREFECT_API_URL"] == url
    assert os.environ["PREFECT_API_URL"] == answering[0] + "/"
    assert answering[1] == ["Basic bWU6cHc="]
    assert not (tmp_path / ".prefect").exists()
    assert PrefectServer("auto", tmp_path).page_command() == answering[0].removesuffix("/api")


def test_the_active_profile_counts_as_configured(
    answering: tuple[str, list[str | None]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    profiles = tmp_path / "profiles.toml"
    profiles.write_text(
        f'active = "mine"\n[profiles.mine]\nPREFECT_API_URL = "{answering[0]}"\nPREFECT_API_KEY = "k"\n'
    )
    monkeypatch.setenv("PREFECT_PROFILES_PATH", str(profiles))
    with prefect_api("on", tmp_path) as url:
        assert url == answering[0]
    assert answering[1] == ["Bearer k"]
    profiles.write_text("not TOML [")
    assert server.configured_api() == (None, None)


def test_on_demands_the_configured_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PREFECT_API_URL", "http://127.0.0.1:9/api")
    with pytest.raises(TrackingError, match=r"127\.0\.0\.1:9/api does not answer.*--prefect auto"):
        PrefectServer("on", tmp_path).start()


@pytest.fixture
def broken_interpreter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The private server's process ends at once."""
    program = tmp_path / "python"
    program.write_text("#!/bin/sh\nexit 3\n")
    program.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(program))


@pytest.mark.usefixtures("broken_interpreter")
def test_auto_goes_without_where_no_server_comes_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PREFECT_API_URL", "http://127.0.0.1:9/api")
    handle = PrefectServer("auto", tmp_path)
    handle.start()
    assert "does not answer" in str(handle.warning)
    assert handle.wait_ready() is None
    assert os.environ["PREFECT_API_URL"] == "http://127.0.0.1:9/api"


@pytest.mark.usefixtures("broken_interpreter")
def test_on_fails_where_no_server_comes_up(tmp_path: Path) -> None:
    handle = PrefectServer("on", tmp_path)
    handle.start()
    with pytest.raises(TrackingError, match=r"server\.log says why.*--prefect off"):
        handle.wait_ready()
    handle.stop()


def test_whose_error_it_is() -> None:
    import httpx

    assert is_prefect_infrastructure_error(httpx.ConnectError("gone"))
    assert not is_prefect_infrastructure_error(LockedError("held"))
    assert not is_prefect_infrastructure_error(ValueError("ours"))
    assert not is_prefect_infrastructure_error(KeyboardInterrupt())
    wrapped = RuntimeError("flow failed")
    wrapped.__cause__ = httpx.ReadTimeout("slow")
    assert is_prefect_infrastructure_error(wrapped)
    ours = RuntimeError("flow failed")
    ours.__cause__ = LockedError("held")
    assert not is_prefect_infrastructure_error(ours)


def test_the_page_command_names_the_home(tmp_path: Path) -> None:
    command = PrefectServer("auto", tmp_path / "my runs").page_command()
    assert f"PREFECT_HOME='{tmp_path}/my runs/.prefect'" in command
    assert command.endswith("prefect server start")


def test_a_recycled_pid_is_not_taken_for_the_server(tmp_path: Path) -> None:
    home = tmp_path / ".prefect"
    home.mkdir()
    row = {"pid": os.getpid(), "started_s": 1.0, "url": "http://127.0.0.1:9/api"}
    (home / "server.json").write_text(json.dumps(row))
    found = server._recorded(home)
    assert found is not None
    assert not server._is_running(found)
    server._end(found)  # must not touch this process


# ---------------------------------------------------------------- with the real server


ROUND = """
import sys, time
from pathlib import Path
from flows.server import PrefectServer
handle = PrefectServer("on", Path(sys.argv[1]))
handle.start()
url = handle.wait_ready()
from prefect import flow, task

@task(persist_result=False)
def stage(name):
    time.sleep(float(sys.argv[3]))
    return name

@flow(name=sys.argv[2], persist_result=False)
def round_flow():
    print(url, flush=True)
    return [stage(name) for name in ("search", "distill", "gate")]

round_flow()
print("done", flush=True)
handle.stop()
"""


def start_round(runs_dir: Path, name: str, stage_s: float) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", ROUND, str(runs_dir), name, str(stage_s)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def first_line(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def runs(url: str, what: str) -> list[tuple[str, str]]:
    rows = json.loads(server._open(f"{url}/{what}/filter", body={}))
    return sorted((row["name"], row["state"]["type"]) for row in rows)


def wait_for(condition: Callable[[], bool], timeout_s: float) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "timed out"
        time.sleep(0.05)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_history_outlives_the_private_server(tmp_path: Path) -> None:
    for name in ("first", "second"):
        process = start_round(tmp_path, name, 0)
        out, err = process.communicate(timeout=200)
        assert "done" in out, err
        record = server._recorded(tmp_path / ".prefect")
        assert record is not None
        assert not server._is_running(record)
    with prefect_api("on", tmp_path) as url:
        assert url is not None
        assert [state for _, state in runs(url, "flow_runs")] == ["COMPLETED"] * 2
        assert [state for _, state in runs(url, "task_runs")] == ["COMPLETED"] * 6


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_two_rounds_share_a_server_and_a_killed_one_leaves_nothing(tmp_path: Path) -> None:
    one = start_round(tmp_path, "one", 60)
    url = first_line(one)
    two = start_round(tmp_path, "two", 60)
    assert first_line(two) == url
    record = server._recorded(tmp_path / ".prefect")
    assert record is not None
    one.kill()
    one.communicate()
    time.sleep(3)
    assert server._is_running(record)  # the other round still uses it
    two.kill()
    two.communicate()
    wait_for(lambda: not server._is_running(record), 5)
    with prefect_api("on", tmp_path) as url:
        assert url is not None
        assert [state for _, state in runs(url, "flow_runs")] == ["CRASHED"] * 2


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_server_that_hangs_is_stopped_by_the_next_round(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import signal

    one = start_round(tmp_path, "one", 300)
    first_line(one)
    record = server._recorded(tmp_path / ".prefect")
    assert record is not None
    os.kill(record.pid, signal.SIGSTOP)
    one.kill()
    one.communicate()
    monkeypatch.setattr(server, "START_S", 1.0)  # it has been up for long enough to answer
    handle = PrefectServer("on", tmp_path)
    handle.start()
    assert handle.wait_ready(120) is not None
    assert not server._is_running(record)
    handle.stop()


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_server_killed_in_the_middle_costs_the_round_seconds(tmp_path: Path) -> None:
    code = ROUND.replace("round_flow()\nprint", "try:\n    round_flow()\nexcept Exception as e:\n    error = e\nprint")
    code = code.replace(
        'print("done"', "from flows.server import is_prefect_infrastructure_error as ours\nprint(ours(error)"
    )
    command = [sys.executable, "-c", code, str(tmp_path), "one", "3"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    first_line(process)
    record = server._recorded(tmp_path / ".prefect")
    assert record is not None
    time.sleep(1)
    os.killpg(record.pid, 9)
    started = time.monotonic()
    out, err = process.communicate(timeout=300)
    print(f"ended after {time.monotonic() - started:.0f} s")
    assert "True" in out, err
