"""The compute-optimal choice on the base models of several training seeds: FLOPs of best-of-N over its own, at equal
accuracy, with question-predicted difficulty and the verifier that round 0 trains.

    .venv/bin/python tests/benchmarks/bench_optimal.py [--task arithmetic] [--seeds 0,1,2] [--problems 500]

Runs `ratchet eval --report` on held-out problems, which trains base and verifier where they are missing. Everything is
kept under --runs-dir and reused.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

STRATEGIES = (
    "greedy,majority,adaptive_majority,best_of_n,best_of_n_weighted,best_of_n_weighted(vote=sharpened),"
    "beam(width=2),beam(width=4),step_rejection(draws=16, greedy=true, trust=0.95, give_up=true)"
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--task", default="arithmetic", choices=("arithmetic", "countdown"))
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--problems", type=int, default=500)
    parser.add_argument("--strategies", default=STRATEGIES)
    parser.add_argument("--runs-dir", type=Path, default=Path("runs"))
    args = parser.parse_args()
    for seed in map(int, args.seeds.split(",")):
        found = measure(args.task, seed, args.problems, args.strategies, args.runs_dir)
        show(seed, found["optimal"])


def measure(task: str, seed: int, problems: int, strategies: str, runs_dir: Path) -> dict[str, Any]:
    """The document of `ratchet eval --report --json` for the base model of one seed."""
    loop = f"{task}-seed-{seed}"
    mine = ["--set", f"loop.name={loop}", "--set", f"loop.seed={seed}", "--runs-dir", str(runs_dir)]
    asked = ["--model", "base", "--problems", str(problems), "--strategies", strategies, "--report", "--json"]
    return json.loads(run("eval", task, *mine, *asked))


def run(*arguments: str) -> str:
    command = [sys.executable, "-m", "flows.cli", *arguments]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout


def show(seed: int, found: dict[str, Any]) -> None:
    """A line for each set of arms and N: against every kind of best-of-N."""
    known = found["known"].get("question", {})
    print(f"seed {seed}: {found['problems']} problems, Spearman of the prediction {known.get('spearman', 0):.2f}")
    for ratio in found["ratios"]:
        if ratio["bins"] != "question" or ratio["budget"] < 8:
            continue
        line = f"  {ratio['arms']:<6} N = {ratio['budget']:<3g} {100 * ratio['accuracy']:.1f} %"
        line += f"  strongest ({ratio['baseline']}) {_times(ratio)}"
        for one in ratio["against"]:
            if one["baseline"] in ("best_of_n", "best_of_n_weighted", "early_best_of_n(0.9)"):
                line += f"; {one['baseline']} {_times(one)}"
        print(line)
    for row in found["difficulty_adds"]:
        if row["bins"] in ("question", "random") and row["budget"] >= 8:
            print(f"  bins ({row['bins']}) over none, {row['arms']} arms, N = {row['budget']:g}: {_times(row)}")


def _times(row: dict[str, Any]) -> str:
    if row["value"] is None:
        return "-"
    return f"{row['value']:.1f} ({row['low']:.1f}-{row['high']:.1f})"


if __name__ == "__main__":
    main()
