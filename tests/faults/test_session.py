"""`ratchet round` with everything on: the round is in Prefect and in MLflow, and either may be lost."""

import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

RATCHET = [sys.executable, "-m", "flows.cli"]
POINTS = """select m.key, m.step, round(m.value, 6) from metrics m join runs r using (run_uuid)
    where r.name = 'loop smoke' and r.lifecycle_stage = 'active'"""
STAGES = {"problems", "baseline", "search", "select", "distill", "evaluate", "gate", "difficulty", "base"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where a round of the smoke loop was run as a user runs it."""
    folder = tmp_path_factory.mktemp("session")
    subprocess.run([*RATCHET, "round", "smoke"], cwd=folder, check=True, timeout=600)
    return folder


def rows(database: Path, query: str) -> list[tuple]:
    connection = sqlite3.connect(database)
    try:
        return connection.execute(query).fetchall()
    finally:
        connection.close()


def recorded(folder: Path) -> dict[str, object]:
    """What MLflow holds: names and states of runs, the loop run's curves, registered versions."""
    database = folder / "runs" / "mlflow.db"
    return {
        "runs": sorted(rows(database, "select name, status, lifecycle_stage from runs")),
        "points": sorted(rows(database, POINTS)),
        "versions": rows(database, "select count(*) from model_versions"),
        "aliases": sorted(a for (a,) in rows(database, "select alias from registered_model_aliases")),
    }


def test_prefect_shows_every_stage_as_a_task(folder):
    database = folder / "runs" / ".prefect" / "prefect.db"
    assert rows(database, "select state_type from flow_run") == [("COMPLETED",)]
    tasks = rows(database, "select name, state_type from task_run")
    assert {name for name, _ in tasks} == STAGES
    assert {state for _, state in tasks} == {"COMPLETED"}


def test_mlflow_holds_loop_rounds_and_stages(folder):
    found = recorded(folder)
    names = {name for name, _, _ in found["runs"]}
    assert {"loop smoke", "round-000", "round-001", "round-001 search"} <= names
    assert {tuple(row[1:]) for row in found["runs"]} == {("FINISHED", "active")}  # none was written twice
    steps = {step for key, step, _ in found["points"] if key == "champion/test/accuracy_greedy"}
    assert steps == {0, 1}
    assert "champion" in found["aliases"]


def test_a_lost_mlflow_database_is_rebuilt(folder):
    before = recorded(folder)
    (folder / "runs" / "mlflow.db").unlink()
    subprocess.run([*RATCHET, "track", "smoke"], cwd=folder, check=True, timeout=300)
    assert recorded(folder) == before
    subprocess.run([*RATCHET, "track", "smoke"], cwd=folder, check=True, timeout=300)
    assert recorded(folder) == before


def test_nothing_is_left_running(folder):
    found = subprocess.run(["pgrep", "-f", str(folder)], capture_output=True, text=True, check=False)
    assert found.stdout == ""
