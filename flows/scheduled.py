"""The flow a schedule runs: one round, its verdict as the run's state. Entry point: `flows.scheduled.scheduled_round`.

Unlike `ratchet round` it has no terminal, and the server is the one that started it. Another round that holds the
loop's lock makes the run "Cancelled" with the holder's name; the round's own error makes it "Failed" with that error.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from prefect import flow
from prefect.client.schemas.objects import State, StateType
from prefect.states import Cancelled, Completed

from configs import load
from flows.quiet import silence
from flows.round import listener, round_flow
from flows.session import Mirror
from flows.tracking import Tracker
from search.errors import LockedError


@flow(name="ratchet", flow_run_name="{config}", persist_result=False, validate_parameters=True)
def scheduled_round(config: str = "countdown", runs_dir: str = "runs", overrides: list[str] | None = None) -> Any:
    """One improvement round of a loop: resumes an unfinished one, else starts the next.

    The run's state is named after the verdict, "Promoted" or "Rejected". Raises what the round raises.
    """
    silence()
    parsed = load.load(config, overrides or [])
    tracker = Tracker(Path(runs_dir) / parsed.loop.name, parsed.tracking)
    tracker.start()
    listener.set(Mirror(tracker))
    try:
        return verdict_state(round_flow.fn(config, runs_dir, overrides))
    except LockedError as error:
        return Cancelled(message=f"nothing done: {error}")
    finally:
        tracker.close()


def verdict_state(summary: dict[str, Any]) -> State[Any]:
    """A final state that says how the round ended. Example name: "Rejected"."""
    verdict, reason = str(summary["verdict"]), str(summary.get("reason") or "")
    state: State[Any] = Completed(name=verdict.capitalize(), message=f"{verdict}: {reason}" if reason else verdict)
    assert state.type == StateType.COMPLETED  # a rejection is a round that did its work
    return state
