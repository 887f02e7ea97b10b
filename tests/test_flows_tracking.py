"""The MLflow mirror: what it holds, that writing twice changes nothing, that it is rebuilt from the folder alone."""

import dataclasses
import json
import os
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from configs.schema import Tracking
from flows import tracking
from flows.artefacts import StageDir, StageKey
from flows.folders import Live, read_metrics
from flows.record import Key, read
from flows.redact import REDACTED, Redactor, metric_name, parameters
from flows.state import Bundle, Loop, RoundRecord, Verdict
from search.errors import TrackingError

CONFIG = {
    "loop": {"name": "demo", "seed": 7},
    "task": {"type": "countdown"},
    "model": {"base": "bootstrap"},
    "sampling": {"max_new_tokens": 64},
    "engine": {"api_key": "very-secret-key"},
}


def commit(round_dir: Path, stage: str, metrics: dict[str, float], files: dict[str, str] | None = None) -> None:
    key = StageKey(stage, "code", "config")
    folder = StageDir(round_dir, stage)
    out = folder.begin(key)
    rows = [{"name": name, "value": value, "se": 0.01} for name, value in metrics.items()]
    (out / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (out / "timing.json").write_text(json.dumps({"wall_s": 2.0}))
    for name, text in (files or {}).items():
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        (out / name).write_text(text)
    folder.commit(key)


def add_round(runs_dir: Path, accuracy: float, verdict: Verdict = "promoted") -> Path:
    """One more round of loop "demo"; round 0 first."""
    with Loop.locked(runs_dir, "demo", "test", task="countdown") as loop:
        base = loop.state.next_round == 0
        folder = loop.begin_round(json.dumps(CONFIG))
        model = {"model/config.json": json.dumps({"accuracy": accuracy})}
        commit(folder.path, "problems", {"data/test_problems": 2}, {"test.jsonl": '{"key": 1}\n{"key": 2}\n'})
        commit(folder.path, "base" if base else "distill", {"distill/loss": 1.0}, model)
        commit(folder.path, "evaluate", {"test/accuracy_greedy": accuracy, "gate/accuracy_greedy": accuracy})
        commit(folder.path, "report", {}, {"report.html": "<p>fine</p>", "plots/curve.svg": "<svg/>"})
        bundle = None
        if base or verdict == "promoted":
            part = loop.part(folder.path / ("base" if base else "distill") / "model")
            bundle = Bundle(folder.round, part)
        record = RoundRecord(
            folder.round, "base" if base else verdict, "because <b>tests</b>", metrics={"gain/test": 0.1}
        )
        loop.finish(folder, record, bundle)
    return folder.path


@pytest.fixture
def loop_dir(tmp_path: Path) -> Path:
    runs_dir = tmp_path / "runs"
    runs_dir.mkdir()
    add_round(runs_dir, 0.1)
    add_round(runs_dir, 0.2)
    add_round(runs_dir, 0.15, "rejected")
    return runs_dir / "demo"


@pytest.fixture(scope="session")
def empty_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """MLflow's tables, made once: the migrations take seconds."""
    from mlflow.tracking import MlflowClient

    path = tmp_path_factory.mktemp("store") / "mlflow.db"
    MlflowClient(f"sqlite:///{path}").search_experiments()
    return path


@pytest.fixture
def store(loop_dir: Path, empty_store: Path) -> str:
    path = loop_dir.parent / "mlflow.db"
    path.write_bytes(empty_store.read_bytes())
    return f"sqlite:///{path}"


def everything(uri: str) -> dict[Key, dict[str, Any]]:
    """All that MLflow shows of the loop's runs, ids and times apart."""
    from mlflow.tracking import MlflowClient

    client = MlflowClient(uri)
    experiment = client.get_experiment_by_name("demo")
    assert experiment is not None
    found: dict[Key, dict[str, Any]] = {}
    for run in client.search_runs([experiment.experiment_id]):
        tags = {k: v for k, v in run.data.tags.items() if k != "mlflow.parentRunId"}
        key = Key(tags["ratchet.kind"], tags.get("ratchet.round", ""), tags.get("ratchet.stage", ""))  # type: ignore[arg-type]
        points = {
            name: [(m.step, m.value) for m in client.get_metric_history(run.info.run_id, name)]
            for name in run.data.metrics
        }
        files = sorted(f.path for f in client.list_artifacts(run.info.run_id))
        datasets = sorted((d.dataset.name, d.dataset.digest) for d in run.inputs.dataset_inputs)
        assert key not in found
        found[key] = {"tags": tags, "points": points, "files": files, "datasets": datasets, "params": run.data.params}
        found[key]["status"] = run.info.status
    return found


def test_the_folder_becomes_one_loop_run_with_a_run_per_round_and_stage(loop_dir: Path, store: str) -> None:
    from mlflow.tracking import MlflowClient

    tracking.rebuild(loop_dir, Tracking(uri=store))
    found = everything(store)
    assert len(found) == 1 + 3 + 3 * 4
    loop = found[Key("loop")]
    assert loop["points"]["test/accuracy_greedy"] == [(0, 0.1), (1, 0.2), (2, 0.15)]
    assert loop["points"]["champion/test/accuracy_greedy"] == [(0, 0.1), (1, 0.2), (2, 0.2)]
    assert loop["points"]["test/accuracy_greedy_se"] == [(0, 0.01), (1, 0.01), (2, 0.01)]
    assert loop["points"]["spend/wall_seconds"] == [(0, 8.0), (1, 8.0), (2, 8.0)]
    assert "report.html" in loop["files"]
    last = found[Key("round", "round-002")]
    assert last["status"] == "FINISHED"
    assert last["tags"]["verdict"] == "rejected"
    assert last["params"]["sampling.max_new_tokens"] == "64"
    assert last["params"]["engine.api_key"] == REDACTED
    assert last["points"]["gain/test"] == [(2, 0.1)]
    assert [name for name, _ in last["datasets"]] == ["test"]
    assert {"config.json", "model", "report.html", "plots"} <= set(last["files"])
    assert "<b>" not in last["tags"]["mlflow.note.content"]
    client = MlflowClient(store)
    aliases = client.get_registered_model("demo").aliases
    versions = {v.version: v.tags["ratchet.round"] for v in client.search_model_versions("name = 'demo'")}
    by_alias = {alias: versions[version] for alias, version in aliases.items()}
    assert by_alias == {"champion": "1", "previous": "0", "challenger": "2"}
    text = (loop_dir.parent / "mlflow.db").read_bytes() + b"".join(
        p.read_bytes() for p in (loop_dir.parent / "mlartifacts").rglob("*") if p.is_file()
    )
    assert b"very-secret-key" not in text


def test_children_point_to_their_parents(loop_dir: Path, store: str) -> None:
    from mlflow.tracking import MlflowClient

    tracking.rebuild(loop_dir, Tracking(uri=store))
    client = MlflowClient(store)
    experiment = client.get_experiment_by_name("demo")
    assert experiment is not None
    runs = {r.info.run_name: r for r in client.search_runs([experiment.experiment_id])}
    assert runs["round-001 evaluate"].data.tags["mlflow.parentRunId"] == runs["round-001"].info.run_id
    assert runs["round-001"].data.tags["mlflow.parentRunId"] == runs["loop demo"].info.run_id


def test_writing_again_changes_nothing_and_a_deleted_store_is_rebuilt_equal(
    loop_dir: Path, store: str, empty_store: Path
) -> None:
    first = tracking.rebuild(loop_dir, Tracking(uri=store))
    assert first.num_runs_created == 16
    once = everything(store)
    again = tracking.rebuild(loop_dir, Tracking(uri=store))
    assert (again.num_runs_created, again.num_runs_replaced, again.num_points, again.num_versions) == (0, 0, 0, 0)
    assert everything(store) == once
    other = loop_dir.parent / "other.db"  # another file: MLflow keeps the deleted one open in this process
    other.write_bytes(empty_store.read_bytes())
    tracking.rebuild(loop_dir, Tracking(uri=f"sqlite:///{other}"))
    assert everything(f"sqlite:///{other}") == once


def test_copied_files_with_other_times_double_no_point(loop_dir: Path, store: str) -> None:
    tracking.rebuild(loop_dir, Tracking(uri=store))
    once = everything(store)
    for path in loop_dir.rglob("*"):
        os.utime(path, (1_000_000, 1_000_000))
    tracking.rebuild(loop_dir, Tracking(uri=store))
    assert everything(store) == once


def test_a_stage_done_again_with_another_result_replaces_its_run(loop_dir: Path, store: str) -> None:
    tracking.rebuild(loop_dir, Tracking(uri=store))
    metrics = loop_dir / "round-002" / "evaluate" / "metrics.jsonl"
    metrics.write_text(metrics.read_text().replace("0.15", "0.16"))
    report = tracking.rebuild(loop_dir, Tracking(uri=store))
    assert report.num_runs_replaced == 3  # the stage, its round, the loop's curves
    assert everything(store)[Key("loop")]["points"]["test/accuracy_greedy"] == [(0, 0.1), (1, 0.2), (2, 0.16)]


def test_rollback_moves_the_alias(loop_dir: Path, store: str) -> None:
    from mlflow.tracking import MlflowClient

    tracking.rebuild(loop_dir, Tracking(uri=store))
    with Loop.locked(loop_dir.parent, "demo", "rollback") as loop:
        loop.rollback("a test")
    tracking.rebuild(loop_dir, Tracking(uri=store))
    client = MlflowClient(store)
    champion = client.get_model_version_by_alias("demo", "champion")
    assert champion.tags["ratchet.round"] == "0"
    assert client.get_model_version_by_alias("demo", "previous").tags["ratchet.round"] == "1"


def test_two_loops_of_one_name_keep_apart(loop_dir: Path, store: str, tmp_path: Path) -> None:
    tracking.rebuild(loop_dir, Tracking(uri=store))
    once = everything(store)
    (tmp_path / "elsewhere").mkdir()
    add_round(tmp_path / "elsewhere", 0.9)
    report = tracking.rebuild(tmp_path / "elsewhere" / "demo", Tracking(uri=store))
    assert report.num_runs_created == 6
    assert everything(store) == once


# ---------------------------------------------------------------- live


def wait_for(condition, timeout_s: float = 60.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "timed out"
        time.sleep(0.05)


def test_a_round_is_mirrored_while_it_runs(loop_dir: Path, store: str) -> None:
    warnings: list[str] = []
    with Loop.locked(loop_dir.parent, "demo", "round") as loop:
        folder = loop.begin_round(json.dumps(CONFIG))
        tracker = tracking.Tracker(loop_dir, Tracking(uri=store), warn=warnings.append)
        tracker.start()
        tracker.round_started(folder.path.name)
        StageDir(folder.path, "search").begin(StageKey("search", "code", "config"))
        tracker.stage_started("search")
        wait_for(lambda: _status(store, Key("stage", "round-003", "search")) == "RUNNING")
        assert _status(store, Key("round", "round-003")) == "RUNNING"
        tracker.stage_finished("search", failed=True)
        loop.abandon("a test")
        tracker.round_finished()
        assert tracker.close(60)
    assert _status(store, Key("stage", "round-003", "search")) == "FAILED"
    assert _status(store, Key("round", "round-003")) == "KILLED"
    assert _status(store, Key("loop")) == "FINISHED"
    assert warnings == []


def _status(uri: str, key: Key) -> object:
    try:
        return everything(uri).get(key, {}).get("status")
    except AssertionError:
        return None  # no experiment yet


def test_tracking_off_does_nothing(loop_dir: Path) -> None:
    tracker = tracking.Tracker(loop_dir, Tracking(mlflow=False))
    tracker.start()
    tracker.stage_started("search")
    assert tracker.close()
    assert not (loop_dir.parent / "mlflow.db").exists()


# ---------------------------------------------------------------- the start


@pytest.fixture
def silent_port():
    """A server that accepts and never answers."""
    import socket

    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        yield server.getsockname()[1]


def test_a_server_that_does_not_answer_fails_the_start(loop_dir: Path, silent_port: int) -> None:
    with pytest.raises(TrackingError, match=r"does not answer.*tracking.mlflow=false"):
        tracking.Tracker(loop_dir, Tracking(uri="http://127.0.0.1:9")).start()
    tracker = tracking.Tracker(loop_dir, Tracking(uri=f"http://127.0.0.1:{silent_port}", timeout_s=0.3))
    with pytest.raises(TrackingError, match="does not answer"):
        tracker.start()


@pytest.mark.parametrize(("status", "body", "message"), [(401, "{}", "USERNAME"), (200, "<html>", "something else")])
def test_a_server_that_is_not_ours_fails_the_start(loop_dir: Path, status: int, body: str, message: str) -> None:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status)
            self.end_headers()
            self.wfile.write(body.encode())

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        uri = f"http://user:hush-hush@127.0.0.1:{server.server_port}"
        with pytest.raises(TrackingError, match=message) as caught:
            tracking.Tracker(loop_dir, Tracking(uri=uri)).start()
        assert "hush-hush" not in str(caught.value)
    finally:
        server.shutdown()
        server.server_close()


@pytest.mark.parametrize("uri", ["./mlruns", "file:///somewhere/mlruns", "sqlite://"])
def test_stores_that_cannot_work_are_refused(loop_dir: Path, uri: str) -> None:
    with pytest.raises(TrackingError, match="sqlite:///PATH"):
        tracking.Tracker(loop_dir, Tracking(uri=uri)).start()


def test_a_damaged_database_is_refused(loop_dir: Path) -> None:
    (loop_dir.parent / "mlflow.db").write_bytes(b"no database" * 1000)
    with pytest.raises(TrackingError, match="ratchet track"):
        tracking.Tracker(loop_dir, Tracking()).start()


def test_where_records_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    assert tracking.tracking_uri(Tracking(), tmp_path) == f"sqlite:///{tmp_path}/mlflow.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://team:5000")
    assert tracking.tracking_uri(Tracking(), tmp_path) == "http://team:5000"
    assert tracking.tracking_uri(Tracking(uri="sqlite:///x.db"), tmp_path) == "sqlite:///x.db"
    assert tracking.page_command("http://user:hush@team:5000") == f"http://{REDACTED}@team:5000"


def test_importing_tracking_imports_no_mlflow() -> None:
    code = "import sys, flows.tracking; sys.exit('mlflow' in sys.modules or 'torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# ---------------------------------------------------------------- odd values


@given(st.text())
@settings(max_examples=200, deadline=None)
def test_any_metric_name_becomes_one_mlflow_takes(name: str) -> None:
    from mlflow.utils.validation import _validate_metric_name

    _validate_metric_name(metric_name(name))


def test_good_metric_names_stay() -> None:
    for name in ("test/pass_at_64", "gate/accuracy_greedy_se", "spend/flops", "difficulty/spearman"):
        assert metric_name(name) == name


def test_values_that_are_no_finite_numbers_are_dropped_and_counted(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    rows = ['{"name": "a", "value": NaN}', '{"name": "b", "value": Infinity, "se": 1}', '{"name": "c", "value": 1e999}']
    rows += ['{"name": "d", "value": 1, "se": NaN}', '{"name": "e", "value": "x"}', "[]", "{", "", '{"name": "f"}']
    rows += ['{"name": "loss", "value": 2, "step": 10}', '{"name": "g", "value": true}']
    path.write_text("\n".join(rows))
    figures, curves, num_dropped = read_metrics(path, 1)
    assert figures == {"b_se": 1.0, "d": 1.0}
    assert [(p.name, p.value, p.step) for p in curves] == [("loss", 2.0, 10)]
    assert num_dropped == 9


def test_secrets_are_redacted_and_settings_are_not() -> None:
    redact = Redactor({"HF_TOKEN": "hf_abcdefgh", "MY_API_KEY": "k" * 20, "SHORT_TOKEN": "abc"})
    config = {"hf_token": "x", "max_new_tokens": 64, "seen": "uses hf_abcdefgh", "uri": "postgresql://me:pw@db/x"}
    assert redact(config) == {
        "hf_token": REDACTED,
        "max_new_tokens": 64,
        "seen": f"uses {REDACTED}",
        "uri": f"postgresql://{REDACTED}@db/x",
    }
    assert redact.text("abc") == "abc"


def test_parameters_are_flat_and_short() -> None:
    flat = parameters({"a": {"b": [1, 2], "c": None, "d": "x" * 9000}, "e@f": True})
    assert flat["a.b"] == "[1, 2]"
    assert "a.c" not in flat
    assert len(flat["a.d"]) == 500
    assert flat["e_f"] == "true"


# ---------------------------------------------------------------- the record itself


def test_the_record_is_a_pure_function_of_the_folder(loop_dir: Path) -> None:
    assert read(loop_dir) == read(loop_dir)


ODD = [json.dumps({name: 3 for name in ("record", "outputs", "champion", "loop", "path")}).encode()]
ODD += [b'{"outputs": {"test.jsonl": 1, "model": []}, "record": {"verdict": [], "metrics": 1, "started_utc": 5}}']


def test_damaged_files_leave_figures_out_and_never_fail(loop_dir: Path) -> None:
    for path in [p for p in loop_dir.rglob("*") if p.is_file()]:
        before = path.read_bytes()
        for damage in (b"", b"\x00\xff", before[: len(before) // 2], b"[1]", b"null", *ODD):
            path.write_bytes(damage)
            assert read(loop_dir).runs[0].key == Key("loop")
        path.write_bytes(before)


def test_statuses_follow_what_is_live(loop_dir: Path) -> None:
    with Loop.locked(loop_dir.parent, "demo", "round") as loop:
        folder = loop.begin_round(json.dumps(CONFIG))
    StageDir(folder.path, "search").begin(StageKey("search", "code", "config"))
    name = folder.path.name

    def statuses(live: Live) -> list[str]:
        runs = {run.key: run.status for run in read(loop_dir, live).runs}
        return [runs[Key("loop")], runs[Key("round", name)], runs[Key("stage", name, "search")]]

    assert statuses(Live()) == ["FINISHED", "KILLED", "KILLED"]
    assert statuses(Live(name, "search")) == ["RUNNING", "RUNNING", "RUNNING"]
    assert statuses(Live(failed=frozenset({(name, "search")}))) == ["FINISHED", "FAILED", "FAILED"]
    assert dataclasses.replace(Live(name), stage=None) == Live(name)
    assert tracking.running_now(loop_dir) == Live()
    with Loop.locked(loop_dir.parent, "demo", "round"):
        assert tracking.running_now(loop_dir) == Live(name, "search")
