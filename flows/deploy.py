"""Serve the round on a schedule from this machine: a Prefect deployment, at most one round of a loop at a time.

Two walls keep rounds apart: the deployment's concurrency limit (a run that is due while another runs is cancelled, so
nothing piles up) and the loop's own lock. No flow-level retries: a run that died is resumed by the next one. The
schedule is paused while nobody serves. Left out: work pools, for which `infra/prefect.yaml` has the same deployment.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from configs import load
from flows.server import PrefectServer
from search.errors import ConfigError, TrackingError

if TYPE_CHECKING:
    from prefect.schedules import Schedule

ENTRY_POINT = "flows.scheduled:scheduled_round"


def deploy(
    config: str,
    cron: str,
    runs_dir: Path,
    overrides: Sequence[str] = (),
    *,
    timezone: str = "UTC",
    loop: str | None = None,
    interval_s: float | None = None,
    entry_point: str = ENTRY_POINT,
) -> None:
    """Serve until interrupted. `cron` has five fields; `interval_s` replaces it.

    Uses the server of PREFECT_API_URL, else a private one in the runs folder that lives as long as this call. Raises
    TrackingError without a server, ConfigError for a schedule that Prefect refuses.
    """
    path = str(load.find(config).resolve())
    name = loop or load.load(path, overrides).loop.name
    check_schedule(cron, timezone)
    parameters = {"config": path, "runs_dir": str(runs_dir.resolve()), "overrides": list(overrides)}
    server = PrefectServer("on", runs_dir)
    try:
        server.start()
        url = server.wait_ready()
        if url is None:
            raise TrackingError("a schedule needs a Prefect server; none answers")
        when = f"every {interval_s:g} s" if interval_s else f"at '{cron}' ({timezone})"
        print(f"serving loop {name} {when}; runs: {url.removesuffix('/api')}; stop with Ctrl-C", file=sys.stderr)
        _serve(name, _schedule(cron, timezone, interval_s), parameters, entry_point)
    finally:
        server.stop()


def check_schedule(cron: str, timezone: str) -> None:
    """Raise ConfigError for a schedule Prefect would refuse, before anything is started."""
    from zoneinfo import ZoneInfo

    if len(cron.split()) != 5:
        raise ConfigError(f"--cron '{cron}': five fields, as in '0 2 * * *' (minute hour day month weekday)")
    try:
        ZoneInfo(timezone)
    except (ValueError, OSError, KeyError):
        raise ConfigError(f"--timezone '{timezone}' is not known; use a name such as Europe/Berlin") from None


def _schedule(cron: str, timezone: str, interval_s: float | None) -> Schedule:
    from prefect.schedules import Cron, Interval

    return Interval(interval_s, timezone=timezone) if interval_s else Cron(cron, timezone=timezone)


def deployment(name: str, schedule: Schedule, parameters: dict[str, Any], entry_point: str = ENTRY_POINT) -> Any:
    """The deployment as Prefect registers it. Raises ConfigError for a schedule that Prefect refuses."""
    from prefect.client.schemas.objects import ConcurrencyLimitConfig, ConcurrencyLimitStrategy
    from prefect.types.entrypoint import EntrypointType
    from pydantic import ValidationError

    module, _, function = entry_point.partition(":")
    one = ConcurrencyLimitConfig(limit=1, collision_strategy=ConcurrencyLimitStrategy.CANCEL_NEW)
    try:
        return getattr(importlib.import_module(module), function).to_deployment(
            name=name,
            schedule=schedule,
            concurrency_limit=one,
            parameters=parameters,
            description=f"One improvement round of loop {name}; its folder holds the truth.",
            tags=["ratchet", name],
            entrypoint_type=EntrypointType.MODULE_PATH,
        )
    except ValidationError as error:
        reason = error.errors()[0]["msg"]
        raise ConfigError(f"Prefect refuses the schedule: {reason}; an example: --cron '0 2 * * *'") from error


def _serve(name: str, schedule: Schedule, parameters: dict[str, Any], entry_point: str) -> None:
    from prefect import serve

    serve(
        deployment(name, schedule, parameters, entry_point),
        limit=1,
        pause_on_shutdown=True,
        print_starting_message=False,
    )
