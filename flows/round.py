"""The round as a Prefect flow: stages are its tasks. Nothing is decided here; `flows.driver` runs the round, and its
journal on disk, not the flow's state, says how it ended. Deployments use `flows.scheduled`, which wraps it."""

from __future__ import annotations

from collections.abc import Callable
from contextvars import ContextVar
from pathlib import Path
from typing import Any

from prefect import flow, task
from prefect.artifacts import create_markdown_artifact

from configs import load
from flows.artefacts import Manifest
from flows.driver import Execute, Observer
from flows.observers import Silent
from flows.runner import Options, Outcome, improve

listener: ContextVar[Observer | None] = ContextVar("listener", default=None)
executor: ContextVar[Execute | None] = ContextVar("executor", default=None)
outcome: ContextVar[list[Outcome] | None] = ContextVar("outcome", default=None)


def prefect_call(name: str, run: Callable[[], Manifest]) -> Manifest:
    """Run a stage as a Prefect task. What it made is small and stays in memory; Prefect stores no result."""
    result: list[Manifest] = []

    def stage() -> dict[str, Any]:
        manifest = run()
        result.append(manifest)
        return {"stage": manifest.stage, "id": manifest.id, "files": len(manifest.outputs)}

    task(name=name, task_run_name=name, persist_result=False)(stage)()
    return result[0]


@flow(name="ratchet-round", flow_run_name="{config}", persist_result=False, validate_parameters=True)
def round_flow(
    config: str = "countdown",
    runs_dir: str = "runs",
    overrides: list[str] | None = None,
    control: str | None = None,
    abandon: bool = False,
    verify: bool = False,
) -> dict[str, Any]:
    """One improvement round of a loop: resumes an unfinished one, else starts the next.

    Raises LockedError where another round of the loop is running, and what the round raises.
    """
    parsed = load.load(config, overrides or [])
    options = Options(Path(runs_dir), control=control, abandon=abandon, verify=verify)
    done = improve(parsed, options, listener.get() or Silent(), call=prefect_call, run=executor.get())
    holder = outcome.get()
    if holder is not None:
        holder.append(done)
    record = done.last
    if record is None or done.nothing:
        return {"verdict": "nothing to do", "reason": done.nothing}
    summary = done.loop / record.folder / "report" / "summary.md"
    if summary.is_file():
        create_markdown_artifact(
            summary.read_text(encoding="utf-8"), key=f"{parsed.loop.name}-round".replace("_", "-").replace(".", "-")
        )
    return {"round": record.round, "verdict": record.verdict, "reason": record.reason}
