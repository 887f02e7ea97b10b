"""Makes MLflow hold what a loop's folder says (`flows.record`), once, however often it is called.

Runs are known by tags (loop id, round, stage), points by (name, step): what is there already is not written again, what
is missing is added. A run that contradicts the folder, because its round was done again, is deleted (MLflow keeps it in
its trash) and written anew. `ratchet.digest`, set last, says that a run is complete. Explicit run ids and batches only:
no active run, so nothing here depends on threads. Weights are never copied.
"""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mlflow.entities import Dataset, InputTag, Metric, Param, Run, RunTag
from mlflow.entities import DatasetInput as MlflowDatasetInput
from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient

from flows.record import Artefact, DatasetInput, Key, LoopRecord, RunRecord
from flows.registry import register

DIGEST = "ratchet.digest"
ARTEFACTS = "ratchet.artefacts"
DROPPED = "ratchet.dropped_values"


@dataclass
class Report:
    """What one pass wrote."""

    num_runs_created: int = 0
    num_runs_updated: int = 0
    num_runs_replaced: int = 0
    num_points: int = 0
    num_versions: int = 0
    problems: list[str] = field(default_factory=list[str])  # artefacts or models that could not be written

    def __str__(self) -> str:
        runs = f"{self.num_runs_created} runs created, {self.num_runs_updated} completed"
        rest = (
            f"{self.num_runs_replaced} replaced; {self.num_points} points, {self.num_versions} model versions written"
        )
        return f"{runs}, {rest}"


def mirror(client: MlflowClient, record: LoopRecord, artefact_root: str | None, *, verify: bool = False) -> Report:
    """Write what is missing. `verify` compares everything, also runs whose digest says that they are complete.

    artefact_root: where a new experiment keeps its files; None: the server decides. Raises MlflowException and what
    the store's transport raises; artefacts and models that fail are listed in the report instead.
    """
    report = Report()
    experiment_id = _experiment(client, record, artefact_root)
    existing = _existing(client, experiment_id, record.id, report)
    ids: dict[Key, str] = {}
    for run in record.runs:
        parent = None if run.key.kind == "loop" else Key("round", run.key.round)
        parent = Key("loop") if run.key.kind == "round" else parent
        pass_ = _RunPass(client, experiment_id, run, ids[parent] if parent else None, report, verify)
        ids[run.key] = pass_.write(existing.pop(run.key, None))
    for run in existing.values():  # their folders are gone: an uncommitted stage that was wiped
        if run.info.status == "RUNNING":
            client.set_terminated(run.info.run_id, "KILLED")
    try:
        report.num_versions += register(client, record, {key.round: i for key, i in ids.items() if key.kind == "round"})
    except MlflowException as error:
        report.problems.append(f"model registry: {error.message.splitlines()[0] if error.message else error}")
    return report


def _experiment(client: MlflowClient, record: LoopRecord, artefact_root: str | None) -> str:
    """The loop's experiment, made if needed. Another loop of the same name keeps its own."""
    for name in (record.name, f"{record.name}-{record.id[:6]}"):
        found = client.get_experiment_by_name(name)
        if found is None:
            location = None if artefact_root is None else f"{artefact_root}/{name}-{record.id[:6]}"
            try:
                tags = {
                    "ratchet.loop_id": record.id,
                    "mlflow.experimentKind": "custom_model_development",
                }  # not a chat app
                return client.create_experiment(name, location, tags=tags)
            except MlflowException:
                found = client.get_experiment_by_name(name)  # another process was first
                if found is None:
                    raise
        if found.tags.get("ratchet.loop_id") == record.id:
            if found.lifecycle_stage == "deleted":
                client.restore_experiment(found.experiment_id)
            return found.experiment_id
    raise MlflowException(f"experiments '{record.name}' and '{record.name}-{record.id[:6]}' belong to other loops")


def _existing(client: MlflowClient, experiment_id: str, loop_id: str, report: Report) -> dict[Key, Run]:
    found: dict[Key, Run] = {}
    token = None
    while True:
        query = f"tags.`ratchet.loop_id` = '{loop_id}'"
        page = client.search_runs([experiment_id], query, max_results=500, page_token=token)
        for run in page:
            tags = run.data.tags
            kind = tags.get("ratchet.kind", "")
            key = Key(kind, tags.get("ratchet.round", ""), tags.get("ratchet.stage", ""))  # type: ignore[arg-type]
            if key in found:  # made by two processes at once: one of them goes
                client.delete_run(run.info.run_id)
                report.num_runs_replaced += 1
            else:
                found[key] = run
        token = page.token
        if not token:
            return found


@dataclass
class _RunPass:
    """One run of one pass."""

    client: MlflowClient
    experiment_id: str
    want: RunRecord
    parent: str | None
    report: Report
    verify: bool

    def write(self, have: Run | None) -> str:
        """Bring the run up to date and return its id."""
        tags = self._tags()
        if have is not None and self._is_complete(have, tags):
            return have.info.run_id
        known: dict[tuple[str, int], list[float]] = {}
        if have is not None:
            known = self._known_points(have)
            if self._contradicts(have, known):
                self.client.delete_run(have.info.run_id)
                self.report.num_runs_replaced += 1
                have = None
            else:
                self.report.num_runs_updated += 1
        if have is None:
            known = {}
            have = self.client.create_run(self.experiment_id, self.want.start_ms, tags, self.want.name)
            self.report.num_runs_created += 1
        self._fill(have, known, tags)
        return have.info.run_id

    def _tags(self) -> dict[str, str]:
        tags = dict(self.want.tags) | {"mlflow.runName": self.want.name}
        if self.parent is not None:
            tags["mlflow.parentRunId"] = self.parent
        if self.want.num_dropped:
            tags[DROPPED] = str(self.want.num_dropped)
        return tags

    def _is_complete(self, have: Run, tags: Mapping[str, str]) -> bool:
        same = have.data.tags.get(DIGEST) == self.want.digest and have.info.status == self.want.status
        return same and not self.verify and have.data.tags.get("mlflow.parentRunId") == tags.get("mlflow.parentRunId")

    def _known_points(self, have: Run) -> dict[tuple[str, int], list[float]]:
        """(name, step) -> values. A run of one step has them in its summary; curves need their history."""
        known: dict[tuple[str, int], list[float]] = {}
        steps: dict[str, set[int]] = {}
        for point in self.want.points:
            steps.setdefault(point.name, set()).add(point.step)
        for name in have.data.metrics:
            if name in steps:
                for metric in self.client.get_metric_history(have.info.run_id, name):
                    known.setdefault((metric.key, metric.step), []).append(metric.value)
        return known

    def _contradicts(self, have: Run, known: Mapping[tuple[str, int], list[float]]) -> bool:
        wanted = {(p.name, p.step): p.value for p in self.want.points}
        others = set(have.data.metrics) - {name for name, _ in wanted}
        doubled = any(len(values) > 1 for values in known.values())
        differs = any(key not in wanted or not _same(wanted[key], values[0]) for key, values in known.items())
        params = any(self.want.params.get(name) != value for name, value in have.data.params.items())
        return bool(others) or doubled or differs or params

    def _fill(self, have: Run, known: Mapping[tuple[str, int], list[float]], tags: Mapping[str, str]) -> None:
        run_id = have.info.run_id
        points = [p for p in self.want.points if (p.name, p.step) not in known]
        metrics = [Metric(p.name, p.value, p.time_ms, p.step) for p in points]
        params = [Param(k, v) for k, v in self.want.params.items() if k not in have.data.params]
        changed = [RunTag(k, v) for k, v in tags.items() if have.data.tags.get(k) != v]
        for some in _chunks(metrics, 500):
            self.client.log_batch(run_id, metrics=some)
        for some in _chunks(params, 90):
            self.client.log_batch(run_id, params=some)
        for some in _chunks(changed, 90):
            self.client.log_batch(run_id, tags=some)
        self.report.num_points += len(metrics)
        if self.want.datasets and not (have.inputs and have.inputs.dataset_inputs):
            self.client.log_inputs(run_id, [_dataset(d) for d in self.want.datasets])
        complete = self._upload(have)
        if self.want.status == "RUNNING":
            if have.info.status != "RUNNING":  # it was killed and goes on
                self.client.update_run(run_id, "RUNNING")
        else:
            self.client.set_terminated(run_id, self.want.status, self.want.end_ms)
        if complete:
            self.client.set_tag(run_id, DIGEST, self.want.digest)

    def _upload(self, have: Run) -> bool:
        """Copy the artefacts that are new or changed. A store that fails costs the files, not the figures."""
        run_id = have.info.run_id
        known = {} if self.verify else json.loads(have.data.tags.get(ARTEFACTS) or "{}")
        wanted = {artefact.path: artefact.sha256[:12] for artefact in self.want.artefacts}
        try:
            for artefact in self.want.artefacts:
                if known.get(artefact.path) != wanted[artefact.path]:
                    _log_artefact(self.client, run_id, artefact)
            if wanted and (known != wanted):
                self.client.set_tag(run_id, ARTEFACTS, json.dumps(wanted)[:5000] if len(wanted) < 80 else "{}")
        except (MlflowException, OSError, ImportError) as error:
            self.report.problems.append(f"files of {self.want.name}: {str(error).splitlines()[0]}")
            return False
        return True


def _same(a: float, b: float) -> bool:
    return math.isclose(a, b, rel_tol=1e-12, abs_tol=0.0) or a == b


def _chunks(items: list[Any], size: int) -> Iterable[list[Any]]:
    return (items[start : start + size] for start in range(0, len(items), size))


def _dataset(row: DatasetInput) -> MlflowDatasetInput:
    source = json.dumps({"uri": row.uri})
    profile = json.dumps({"num_rows": row.num_rows})
    dataset = Dataset(row.name, row.digest, "local", source, profile=profile)
    return MlflowDatasetInput(dataset, [InputTag("mlflow.data.context", row.context)])


def _log_artefact(client: MlflowClient, run_id: str, artefact: Artefact) -> None:
    folder, _, name = artefact.path.rpartition("/")
    if artefact.source is not None and artefact.source.name == name:
        client.log_artifact(run_id, str(artefact.source), folder or None)
        return
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch, name)
        path.write_text(artefact.text or "", encoding="utf-8")
        client.log_artifact(run_id, str(path), folder or None)
