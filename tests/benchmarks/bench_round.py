"""How long a round takes, and what Prefect and MLflow cost: the second table of the README.

    .venv/bin/python tests/benchmarks/bench_round.py [countdown]

Two rounds with Prefect and MLflow, then two without, of the same loop in fresh folders, on an otherwise idle machine.
Absolute times depend on the machine; the cost of Prefect and MLflow is the difference within this run.
"""

import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path


def one_round(folder: Path, task: str, *options: str) -> float:
    began = time.monotonic()
    command = [sys.executable, "-m", "flows.cli", "round", task, "--runs-dir", str(folder), *options]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return time.monotonic() - began


def main() -> None:
    task = sys.argv[1] if len(sys.argv) > 1 else "countdown"
    plain = ("--prefect", "off", "--set", "tracking.mlflow=false")
    with tempfile.TemporaryDirectory() as name:
        both, none = Path(name, "both"), Path(name, "none")
        times = {"with": [one_round(both, task) for _ in range(2)]}
        times["without"] = [one_round(none, task, *plain) for _ in range(2)]
        stages = {
            n: {
                p.parent.name: json.loads(p.read_text())["wall_s"]
                for p in (both / task).glob(f"round-{n:03d}/*/timing.json")
            }
            for n in (1, 2)
        }
    print("| round | with Prefect and MLflow | without | they cost | allowed (20 s + 3 %) |")
    print("|---|---|---|---|---|")
    for number, label in enumerate(("first, base model included", "second")):
        a, b = times["with"][number], times["without"][number]
        print(f"| {label} | {a:.0f} s | {b:.0f} s | {a - b:+.0f} s | {20 + 0.03 * a:.0f} s |")
    shown = ", ".join(
        f"{stage} {wall_s:.0f} s" for stage, wall_s in sorted(stages[2].items(), key=lambda item: -item[1])
    )
    print(f"\nsecond round by stage: {shown}")
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20
    print(f"largest process: {peak:.1f} GiB")


if __name__ == "__main__":
    main()
