"""`ratchet status`: where a loop stands, from what is on disk. Needs no lock and changes nothing.

JSON: {"loop", "champion": {"round", "path"} | null, "running": holder | null, "unfinished": {"round", "stages"} | null,
"rounds": [{"round", "kind", "verdict", "reason", "finished"}]}.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from flows.driver import wall_s
from flows.folders import STAGES
from flows.locks import holder
from flows.state import Loop, RoundFolder


def read_status(runs_dir: Path, name: str) -> dict[str, Any]:
    """Raises DataError where there is no such loop, CorruptArtefact where loop.json is damaged."""
    loop = Loop.open(runs_dir, name)
    champion = loop.state.champion
    busy = holder(loop.path / ".lock")
    unfinished = loop.unfinished() or loop.unfinished("control")
    return {
        "loop": name,
        "champion": {"round": champion.round, "path": str(loop.path / champion.policy.path)} if champion else None,
        "running": {"what": busy.what, "pid": busy.pid, "host": busy.host, "since": busy.since} if busy else None,
        "unfinished": _stages(unfinished) if unfinished else None,
        "rounds": [
            {
                "round": record.round,
                "kind": record.kind,
                "verdict": record.verdict,
                "reason": record.reason,
                "finished": record.finished_utc,
            }
            for record in loop.state.rounds
        ],
    }


def _stages(folder: RoundFolder) -> dict[str, Any]:
    stages: list[dict[str, Any]] = []
    for name in STAGES:
        done, work = folder.path / name, folder.path / f"{name}.work"
        if done.is_dir():
            stages.append({"stage": name, "state": "done", "wall_s": wall_s(done)})
        elif work.is_dir():
            shards = len(list(work.rglob("shard-*.jsonl")))
            stages.append({"stage": name, "state": "begun", "shards": shards})
    return {"round": folder.round, "kind": folder.kind, "stages": stages}


def show(status: dict[str, Any]) -> None:
    """For people, on stdout."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console(soft_wrap=True, highlight=False)
    champion = status["champion"]
    console.print(f"loop {status['loop']}, champion: " + (f"round {champion['round']}" if champion else "none yet"))
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("round", "verdict", "finished", "reason"):
        table.add_column(column)
    colours = {"promoted": "green", "rejected": "red", "base": "blue"}
    for row in status["rounds"]:
        name = str(row["round"]) + ("" if row["kind"] == "round" else f" {row['kind']}")
        verdict = Text(row["verdict"], style=colours.get(row["verdict"], ""))
        table.add_row(name, verdict, row["finished"][:16].replace("T", " "), Text(row["reason"]))
    console.print(table)
    unfinished = status["unfinished"]
    if unfinished:
        stages = ", ".join(f"{s['stage']} {s['state']}" for s in unfinished["stages"])
        console.print(f"unfinished: round {unfinished['round']} ({stages}); `ratchet round` goes on with it")
    running = status["running"]
    if running:
        console.print(f"running: {running['what']}, pid {running['pid']} on {running['host']} since {running['since']}")
