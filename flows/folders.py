"""A loop's folder read back leniently, for display: what damaged or missing files would have said is left out.

Where a decision hangs on it, use `flows.state` and `flows.artefacts`, which check. Times come from the files, not from
a clock, so reading twice gives the same.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeGuard

from flows.redact import metric_name

Status = Literal["RUNNING", "FINISHED", "FAILED", "KILLED"]
ROUND = re.compile(r"round-(\d{3,})(-control-[a-z0-9-]+)?")
# in the order in which they run: later figures replace earlier ones of the same name
STAGES = ("problems", "base", "baseline", "search", "select", "distill", "evaluate", "gate")
STAGES += ("difficulty", "verifier", "reviser", "table", "report")
NO_STAGE = ("corrupt", "stale", "bundles", "plots")


class Point(NamedTuple):
    """One value of one metric. Example: Point("gate/p_value", 0.01, 3, 1790000000000)"""

    name: str
    value: float
    step: int
    time_ms: int


@dataclass(frozen=True, slots=True)
class Live:
    """What is running now, which no file says. `failed`: stages that ended with an error, as (round, stage)."""

    round: str | None = None
    stage: str | None = None
    failed: frozenset[tuple[str, str]] = frozenset()


@dataclass(frozen=True, slots=True)
class Stage:
    """One stage's folder, committed or not."""

    name: str
    path: Path
    committed: bool
    start_ms: int
    end_ms: int
    metrics: Mapping[str, float] = field(default_factory=dict[str, float])
    curves: tuple[Point, ...] = ()  # metrics whose rows name a step of their own
    timing: Mapping[str, float] = field(default_factory=dict[str, float])
    spend: Mapping[str, float] = field(default_factory=dict[str, float])
    manifest: Mapping[str, Any] = field(default_factory=dict[str, Any])
    num_dropped: int = 0  # metric values that were not finite numbers

    @property
    def wall_s(self) -> float:
        return self.timing.get("wall_s", 0.0)


@dataclass(frozen=True, slots=True)
class Round:
    """One round's folder. `metrics`: its figures under the names every round shares."""

    folder: str
    number: int
    control: bool
    path: Path
    status: Status
    verdict: str | None
    start_ms: int
    end_ms: int | None
    config: Mapping[str, Any]
    record: Mapping[str, Any]  # what the round's record.json says; empty: unfinished
    stages: tuple[Stage, ...]
    metrics: Mapping[str, float]
    final: bool  # it has a verdict, and nobody is working on it any more: its report is written too


def loop_id(loop_dir: Path) -> str:
    """Twelve hex digits that tell this loop from others of the same name; made at the first call.

    Kept in `tracking.json` in the loop's folder, so a copy or a move of the folder stays the same loop.
    """
    path = loop_dir / "tracking.json"
    if not path.exists():
        temp = path.with_name(f".tracking.json.tmp-{os.getpid()}")
        temp.write_text(json.dumps({"loop_id": os.urandom(6).hex()}) + "\n")
        with contextlib.suppress(FileExistsError):
            os.link(temp, path)  # the first of two processes wins, and both read the same
        temp.unlink()
    return str(read_json(path).get("loop_id") or hashlib.sha256(str(loop_dir.resolve()).encode()).hexdigest()[:12])


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file; empty where there is none."""
    try:
        value = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    return mapping(value)


def mapping(value: Any) -> dict[str, Any]:
    """The value where it is a JSON object, else an empty one."""
    return value if isinstance(value, dict) else {}


def mtime_ms(path: Path) -> int:
    try:
        return int(path.stat().st_mtime * 1000)
    except OSError:
        return 0


def _utc_ms(text: Any) -> int:
    try:
        return int(datetime.fromisoformat(str(text)).timestamp() * 1000)
    except (ValueError, OverflowError):
        return 0


def read_round(path: Path, live: Live, champion: Mapping[str, float]) -> Round:
    """The round in `path`. `champion`: the champion's test figures before it."""
    match = ROUND.fullmatch(path.name)
    assert match is not None
    record = mapping(read_json(path / "record.json").get("record"))
    verdict = str(record["verdict"]) if "verdict" in record else None
    stages = _read_stages(path)
    start_ms = _utc_ms(record.get("started_utc") or read_json(path / "started.json").get("started_utc"))
    start_ms = start_ms or mtime_ms(path / "config.json") or mtime_ms(path)
    last_ms = max([start_ms, *(stage.end_ms for stage in stages)])
    status = _round_status(path.name, verdict, live)
    return Round(
        folder=path.name,
        number=int(match[1]),
        control=match[2] is not None,
        path=path,
        status=status,
        verdict=verdict,
        start_ms=start_ms,
        end_ms=None if status == "RUNNING" else max(_utc_ms(record.get("finished_utc")), last_ms),
        config=read_json(path / "config.json"),
        record=record,
        stages=stages,
        metrics=_merge(stages, record, verdict, champion),
        final=verdict is not None and live.round != path.name,
    )


def _round_status(folder: str, verdict: str | None, live: Live) -> Status:
    if verdict is not None:
        return {"failed": "FAILED", "abandoned": "KILLED"}.get(verdict, "FINISHED")  # type: ignore[return-value]
    if live.round == folder:
        return "RUNNING"
    return "FAILED" if any(failed == folder for failed, _ in live.failed) else "KILLED"


def _merge(
    stages: Iterable[Stage], record: Mapping[str, Any], verdict: str | None, champion: Mapping[str, float]
) -> dict[str, float]:
    """The figures of a round. The champion's own measurement comes under `baseline/`; `champion/test/...` are those
    of whichever model is champion after the round."""
    merged: dict[str, float] = {}
    measured: dict[str, float] = {}
    totals = {"spend/wall_seconds": 0.0}
    for stage in (s for s in stages if s.committed):
        prefix = "baseline/" if stage.name == "baseline" else ""
        merged |= {prefix + name: value for name, value in stage.metrics.items()}
        totals["spend/wall_seconds"] += stage.wall_s
        for name, value in stage.spend.items():
            totals[f"spend/{name}"] = totals.get(f"spend/{name}", 0.0) + value
        if stage.name == "evaluate":
            measured |= {name: value for name, value in stage.metrics.items() if name.startswith("test/")}
    if "spend/flops_actual" in totals:
        totals["spend/flops"] = totals["spend/flops_actual"]
    merged = totals | merged | {metric_name(name): value for name, value in numbers(record.get("metrics")).items()}
    if verdict is not None:
        new = measured if verdict in ("promoted", "base") and measured else champion
        merged |= {f"champion/{name}": value for name, value in new.items()}
    return merged


def numbers(values: Any) -> dict[str, float]:
    """Finite numbers of a mapping; {"value": v, "se": e} gives two."""
    found: dict[str, float] = {}
    for name, value in (values or {}).items() if isinstance(values, Mapping) else ():
        if isinstance(value, Mapping):
            parts = {str(name): value.get("value"), f"{name}_se": value.get("se")}
        else:
            parts = {str(name): value}
        found |= {key: float(number) for key, number in parts.items() if _finite(number)}
    return found


def _finite(value: Any) -> TypeGuard[float]:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= 1.7e308


def _read_stages(path: Path) -> tuple[Stage, ...]:
    names = [p.name for p in path.iterdir() if p.is_dir() and not p.name.startswith(".")]
    stages: dict[str, Stage] = {}
    for name in names:
        stage = name.removesuffix(".work")
        if stage in NO_STAGE or (name.endswith(".work") and stage in names):
            continue
        stages[stage] = _read_stage(path / name, stage)
    order = {name: position for position, name in enumerate(STAGES)}
    return tuple(sorted(stages.values(), key=lambda s: (order.get(s.name, len(order)), s.name)))


def _read_stage(path: Path, name: str) -> Stage:
    if path.name != name or not (path / "manifest.json").exists():
        start_ms = mtime_ms(path / ".key") or mtime_ms(path)
        return Stage(name, path, committed=False, start_ms=start_ms, end_ms=max(start_ms, mtime_ms(path)))
    end_ms = mtime_ms(path / "manifest.json")
    timing = numbers(read_json(path / "timing.json"))
    metrics, curves, num_dropped = read_metrics(path / "metrics.jsonl", end_ms)
    return Stage(
        name,
        path,
        committed=True,
        start_ms=end_ms - int(timing.get("wall_s", 0.0) * 1000),
        end_ms=end_ms,
        metrics=metrics,
        curves=curves,
        timing=timing,
        spend=numbers(read_json(path / "spend.json")),
        manifest=read_json(path / "manifest.json"),
        num_dropped=num_dropped,
    )


def read_metrics(path: Path, time_ms: int) -> tuple[dict[str, float], tuple[Point, ...], int]:
    """(figures with their standard errors, curves of rows that name a step, number of values that were not finite)."""
    figures: dict[str, float] = {}
    curves: list[Point] = []
    num_dropped = 0
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return {}, (), 0
    for line in lines:
        try:
            row = json.loads(line)
            name, value = str(row["name"]), row["value"]
        except (ValueError, KeyError, TypeError, RecursionError):
            num_dropped += bool(line.strip())
            continue
        for key, number in ((name, value), (f"{name}_se", row.get("se"))):
            if number is None and key != name:
                continue
            if not _finite(number):
                num_dropped += 1
            elif type(row.get("step")) is int and abs(row["step"]) < 2**53:
                curves.append(Point(metric_name(key), float(number), row["step"], time_ms))
            else:
                figures[metric_name(key)] = float(number)
    return figures, tuple(curves), num_dropped
