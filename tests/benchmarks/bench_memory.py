"""Memory of a search over many problems: results stream to disk, so it does not grow with their number.

    python tests/benchmarks/bench_memory.py [--problems 10000] [--samples 16]

Best-of-N and beam search with the scripted engine, in one process; prints resident memory after every tenth of the
problems, and the growth from the second tenth on (the first fills caches) against what the results take on disk.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import psutil
from common import markdown

from configs.load import load
from configs.schema import OracleVerifier
from search.engines.scripted import ScriptedEngine
from search.policy import Sampler
from search.run import run_shards
from search.strategies import parse
from search.tasks import load_task
from search.types import Budget
from search.verifiers.oracle import Oracle


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--problems", type=int, default=10_000)
    parser.add_argument("--samples", type=int, default=16)
    options = parser.parse_args()
    config = load("smoke")
    task = load_task(config)
    problems = task.draw("train", options.problems, stream="memory")
    verifier = Oracle(task, OracleVerifier(type="oracle"))
    rows: list[list[str]] = []
    for name in ("best_of_n_weighted", "beam(width=4)"):
        with tempfile.TemporaryDirectory() as folder:
            model = Path(folder, "model")
            model.mkdir()
            (model / "scripted.json").write_text('{"skill": 0}', encoding="utf-8")
            engine = ScriptedEngine.of_task(task, model, config.engine)  # type: ignore[arg-type]
            sampler = Sampler(engine, task, 1.0, config.sampling.max_new_tokens, (0, "memory", "train"))
            plan = parse(name).plan(Budget("samples", options.samples), verifier.facts)
            held: list[float] = []

            def watch(done: int, total: int, held: list[float] = held, **_: object) -> None:
                if done >= (len(held) + 1) * total / 10:
                    held.append(psutil.Process().memory_info().rss / 2**20)

            out = Path(folder, "results")
            run_shards(problems, plan, sampler, out, shard_problems=250, verifier=verifier, progress=watch)
            disk = sum(path.stat().st_size for path in Path(folder).rglob("*.jsonl")) / 2**20
        shown = " ".join(f"{mib:.0f}" for mib in held)
        rows.append([name, str(options.problems), shown, f"{held[-1] - held[1]:+.0f} MiB", f"{disk:.0f} MiB"])
    markdown(["strategy", "problems", "MiB after each tenth", "growth", "results on disk"], rows)


if __name__ == "__main__":
    main()
