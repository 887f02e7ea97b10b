"""A real round of the embedded task, killed with SIGKILL at random moments: nothing is left running, nothing is lost,
and the round ends with the same bytes as one that was never disturbed."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

SMALL = [
    "bootstrap.examples=3000",
    "search.problems=200",
    "search.shard_problems=25",
    "search.samples=8",
    "select.min_rows=1",
    "distill.epochs=2",
    "distill.checkpoint_steps=2",
    "gate.problems=200",
    "gate.coverage_problems=40",
    "gate.coverage_samples=8",
    "gate.coverage_k=4",
    "evaluate.test_problems=100",
    "evaluate.pool_problems=40",
    "evaluate.pool_samples=8",
    "evaluate.k=[1,8]",
    "difficulty.problems=60",
    "difficulty.samples=4",
    "verifier.problems=100",
    "verifier.samples=8",
    "verifier.checks=4",
]
NUM_KILLS = 5


def command(runs: Path) -> list[str]:
    sets = [part for pair in SMALL for part in ("--set", pair)]
    return [sys.executable, "-m", "flows.cli", "round", "countdown", "--runs-dir", str(runs), *sets]


def content(loop: Path) -> dict[str, object]:
    """Every committed stage but the report, which shows wall times."""
    return {
        str(path.parent.relative_to(loop)): json.loads(path.read_text())["outputs"]
        for path in sorted(loop.glob("round-*/*/manifest.json"))
        if path.parent.name != "report"
    }


def processes_of(runs: Path) -> list[str]:
    """Command lines of living processes that name the runs folder."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            try:
                line = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
                environment = (entry / "environ").read_bytes().decode(errors="replace")
            except OSError:
                continue
            if str(runs) in line or str(runs) in environment:
                found.append(f"{entry.name} {line[:200]}")
    return found


def start(runs: Path) -> subprocess.Popen[bytes]:
    return subprocess.Popen(command(runs), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)


def test_kills_at_random_moments_change_nothing(tmp_path):
    began = time.monotonic()
    assert start(tmp_path / "whole").wait(900) == 0
    took_s = time.monotonic() - began
    runs, chance = tmp_path / "killed", random.Random(20261120)
    loop = runs / "countdown"
    killed = 0
    for _ in range(NUM_KILLS):
        process = start(runs)
        try:
            process.wait(chance.uniform(0.1, 0.6) * took_s)
            break  # the round was done before its turn came
        except subprocess.TimeoutExpired:
            os.kill(process.pid, signal.SIGKILL)
            process.wait()
            killed += 1
        deadline = time.monotonic() + 5
        while processes_of(runs) and time.monotonic() < deadline:
            time.sleep(0.1)
        assert processes_of(runs) == []
    while not (loop / "round-001" / "record.json").exists():
        assert start(runs).wait(900) == 0
    assert killed >= 2
    assert content(loop) == content(tmp_path / "whole" / "countdown")
    verdicts = [
        json.loads((p / "loop.json").read_text())["rounds"][1]["verdict"]
        for p in (loop, tmp_path / "whole" / "countdown")
    ]
    assert verdicts[0] == verdicts[1]
