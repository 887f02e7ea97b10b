"""The schedule: what is registered, and that a run fires, ends with the journal's verdict and leaves nothing behind."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from flows import deploy, server
from search.errors import ConfigError

INFRA = Path(__file__).resolve().parent.parent / "infra"


@pytest.fixture
def no_settings(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in [name for name in os.environ if name.startswith("PREFECT_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PREFECT_PROFILES_PATH", str(tmp_path / "no-profiles.toml"))


@pytest.mark.parametrize(("cron", "timezone"), [("0 2 * *", "UTC"), ("", "UTC"), ("0 2 * * *", "Mars/Olympus")])
def test_bad_schedules_are_refused_before_anything_starts(cron: str, timezone: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"'0 2 \* \* \*'|Europe/Berlin"):
        deploy.deploy("countdown", cron, tmp_path, timezone=timezone)
    assert list(tmp_path.iterdir()) == []


def test_the_deployment_lets_one_round_run_and_retries_nothing() -> None:
    from prefect.schedules import Cron

    parameters = {"config": "countdown", "runs_dir": "/runs", "overrides": []}
    made = deploy.deployment("demo", Cron("0 2 * * *", timezone="UTC"), parameters)
    assert made.entrypoint == "flows.scheduled.scheduled_round"
    assert made.parameters == parameters
    assert made.concurrency_limit == 1
    assert made.concurrency_options.collision_strategy.value == "CANCEL_NEW"
    from flows.scheduled import scheduled_round

    assert not scheduled_round.retries


def test_a_verdict_is_a_state_that_can_be_read_from_afar() -> None:
    from flows.scheduled import verdict_state

    state = verdict_state({"round": 3, "verdict": "rejected", "reason": "no gain"})
    assert (state.type.value, state.name, state.message) == ("COMPLETED", "Rejected", "rejected: no gain")
    assert verdict_state({"verdict": "nothing to do"}).name == "Nothing to do"


def test_the_shipped_deployment_names_what_exists() -> None:
    content = yaml.safe_load((INFRA / "prefect.yaml").read_text())
    (deployment,) = content["deployments"]
    assert set(deployment) == {
        *("name", "description", "entrypoint", "tags", "parameters", "work_pool", "schedules", "concurrency_limit")
    }  # Prefect ignores keys it does not know, so a typo would mean: no limit
    assert deployment["concurrency_limit"] == {
        "limit": 1,
        "collision_strategy": "CANCEL_NEW",
        "grace_period_seconds": 600,
    }
    assert content["pull"] == []
    from prefect.flows import load_flow_from_entrypoint

    flow = load_flow_from_entrypoint(deployment["entrypoint"])
    assert set(deployment["parameters"]) == set(flow.parameters.properties)
    for schedule in deployment["schedules"]:
        deploy.check_schedule(schedule["cron"], schedule["timezone"])


def test_the_shipped_automation_is_one_prefect_takes() -> None:
    from prefect.events.schemas.automations import AutomationCore

    automation = AutomationCore.model_validate(yaml.safe_load((INFRA / "prefect-zombies.yaml").read_text()))
    assert automation.actions[0].type == "change-flow-run-state"


# ---------------------------------------------------------------- with the real server


TOY = """
import time
from pathlib import Path
from prefect import flow
from prefect.states import Cancelled
from flows.locks import lock
from flows.scheduled import verdict_state
from search.errors import LockedError

@flow(name="toy", persist_result=False)
def toy(config: str, runs_dir: str, overrides: list[str]):
    try:
        with lock(Path(runs_dir) / "toy.lock", "a toy round"), (Path(runs_dir) / "journal.txt").open("a") as journal:
            print(config, overrides, file=journal)
            return verdict_state({"verdict": "rejected", "reason": "a toy"})
    except LockedError as error:
        return Cancelled(message=str(error))
"""

SERVE = """
import sys
from pathlib import Path
from flows.deploy import deploy
deploy("smoke", "0 2 * * *", Path(sys.argv[1]), ["loop.name=toy"], interval_s=5, entry_point=sys.argv[2])
"""


def flow_runs(runs_dir: Path) -> list[tuple[str, str]]:
    """(type, name) of the states of the runs that began."""
    record = server._recorded(runs_dir / ".prefect")
    if record is None:
        return []
    try:
        rows = json.loads(server._open(f"{record.url}/flow_runs/filter", body={}))
    except OSError:
        return []
    return [(row["state"]["type"], row["state"]["name"]) for row in rows if row["state"]["type"] != "SCHEDULED"]


def wait_for(condition: Callable[[], bool], timeout_s: float) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "timed out"
        time.sleep(0.2)


def serve(runs_dir: Path, entry_point: str, *paths: Path) -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, paths))}
    command = [sys.executable, "-c", SERVE, str(runs_dir), entry_point]
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment)


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.usefixtures("no_settings")
def test_a_schedule_fires_and_the_run_carries_the_verdict(tmp_path: Path) -> None:
    from flows.locks import lock

    (tmp_path / "toyflow.py").write_text(TOY)
    process = serve(tmp_path, "toyflow:toy", tmp_path)
    try:
        wait_for(lambda: ("COMPLETED", "Rejected") in flow_runs(tmp_path), 300)
        assert "['loop.name=toy']" in (tmp_path / "journal.txt").read_text()
        with lock(tmp_path / "toy.lock", "somebody's round"):
            wait_for(lambda: ("CANCELLED", "Cancelled") in flow_runs(tmp_path), 200)
    finally:
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)
    assert "serving loop toy every 5 s" in err
    record = server._recorded(tmp_path / ".prefect")
    assert record is not None
    wait_for(lambda: not server._is_running(record), 10)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.usefixtures("no_settings")
def test_a_scheduled_round_of_the_smallest_loop_is_in_the_journal_and_in_mlflow(tmp_path: Path) -> None:
    process = serve(tmp_path, deploy.ENTRY_POINT)
    try:
        wait_for(lambda: bool({("COMPLETED", "Promoted"), ("COMPLETED", "Rejected")} & set(flow_runs(tmp_path))), 800)
    finally:
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=60)
    rounds = json.loads((tmp_path / "toy" / "loop.json").read_text())["rounds"]
    assert rounds[1]["verdict"] in ("promoted", "rejected")
    from mlflow.tracking import MlflowClient

    client = MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    experiment = client.get_experiment_by_name("toy")
    assert experiment is not None
    names = {run.info.run_name for run in client.search_runs([experiment.experiment_id])}
    assert {"loop toy", "round-001"} <= names
