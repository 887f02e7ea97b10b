"""Kinds of difficulty predictors on the stored pools of loops: how well each ranks unseen questions, at what cost.

    python tests/benchmarks/bench_difficulty.py runs/countdown runs/arithmetic [--kinds ridge,mlp,tokens,sequence]
        [--set difficulty.sequence.method=full ...]

Each kind is fitted to the labelled fit problems of a round's difficulty stage and measured on the test pools of its
evaluate stage, which are answers of the same policy where it won. Share: of the Spearman that the true pass rates would
have with these labels (split halves). Cost: of one prediction, against 16 answers to the same question, in FLOPs.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from common import markdown

from configs import load
from configs.schema import Config
from difficulty import predictor as predictors
from difficulty.labels import Counts, count_samples
from difficulty.prompts import Prompts
from search.engines import load_engine
from search.results import read_results
from search.tasks import load_task

HEAD = ("loop", "round", "pass rate", "predictor", "Spearman", "share", "Brier", "of variance", "fit s", "cost")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("loops", nargs="+", type=Path)
    parser.add_argument("--kinds", default="ridge,mlp,tokens")
    parser.add_argument("--problems", type=int, help="at most so many fit problems")
    parser.add_argument("--set", action="append", default=[], help="override one key of the configuration")
    options = parser.parse_args()
    rows: list[tuple[str, ...]] = []
    for loop in options.loops:
        for folder in sorted(loop.glob("round-[0-9][0-9][0-9]")):
            rows += measured(loop, folder, options)
    markdown(list(HEAD), [list(one) for one in rows])


def measured(loop: Path, folder: Path, options: argparse.Namespace) -> Iterator[tuple[str, ...]]:
    fit, test = folder / "difficulty" / "pool-fit.jsonl", folder / "evaluate" / "pool-test.jsonl"
    if not fit.is_file() or not test.is_file():
        return
    config = load.load(loop.resolve().name.split("-")[0], [*options.set, "stages.threads=1"])
    task = load_task(config)
    policies = [*loop.glob("round-*/base/model"), *loop.glob("round-*/distill/model")]
    engines = ((path, load_engine(config, path, task, hidden_states=True)) for path in policies)
    found = next(((p, e) for p, e in engines if e.facts.fingerprint == first_model(fit) == first_model(test)), None)
    if found is None:
        return
    policy, engine = found
    known, fresh = (read(path, engine, policy, config) for path in (fit, test))
    known = first(known, options.problems)
    search = 16 * np.mean([r.spend.flops_ideal / r.spend.samples for r in read_results(fit)])
    baselines: dict[str, Any] = {}
    for kind in options.kinds.split(","):
        settings = config.difficulty.model_copy(update={"predictors": (kind,)})
        began = time.process_time()
        with tempfile.TemporaryDirectory() as out:
            fitted, _ = predictors.fit(known[0], known[1], settings, seed=0, metas_P=known[2], out=Path(out))
            seconds = time.process_time() - began
            report = predictors.evaluate(fitted, fresh[0], fresh[1], settings, seed=0, metas_P=fresh[2])
        baselines = report.baselines
        cost = f"{100 * report.flops / search:.2f} %"
        yield row(loop, folder, fresh[1], kind, report.scores, report, f"{seconds:.1f}", cost)
    for name, scores in baselines.items():
        if name != "constant":
            yield row(loop, folder, fresh[1], name, scores, report, "", "")


def row(loop: Path, folder: Path, counts: Counts, kind: str, s: Any, report: Any, *rest: str) -> tuple[str, ...]:
    rate, variance = (counts.successes_P / counts.totals_P).mean(), report.baselines["constant"].brier_rate
    figures = (f"{s.spearman:.3f}", f"{s.spearman / report.ceiling:.3f}", f"{s.brier_rate:.4f}")
    return (loop.name, folder.name[-3:], f"{rate:.3f}", kind, *figures, f"{s.brier_rate / variance:.2f}", *rest)


def first_model(path: Path) -> str:
    return next(iter(read_results(path))).model


def read(path: Path, engine: Any, policy: Path, config: Config) -> tuple[Prompts, Counts, list[Any]]:
    results = {r.problem.key: r.with_candidates(()) for r in read_results(path)}
    counts = count_samples(read_results(path))
    chosen = [results[key] for key in counts.keys]
    prompts = Prompts([r.prompt_ids for r in chosen], engine, policy=policy, model=config.model)
    return prompts, counts, [r.problem.meta for r in chosen]


def first(data: tuple[Prompts, Counts, list[Any]], num: int | None) -> tuple[Prompts, Counts, list[Any]]:
    prompts, counts, metas = data
    if num is None:
        return data
    few = Counts(counts.keys[:num], counts.successes_P[:num], counts.totals_P[:num], counts.model)
    return prompts.take(np.arange(min(num, len(prompts)))), few, metas[:num]


if __name__ == "__main__":
    main()
