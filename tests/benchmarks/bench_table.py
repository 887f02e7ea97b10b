"""Fitting the StrategyTables from stored pools: where the seconds go, beside one plain pass over the same file.

    python tests/benchmarks/bench_table.py [--problems 1000] [--samples 64]

Pools are made up: Beta(0.5, 0.8) rates, answers of 40 tokens with step scores. "Plain pass" parses every line of the
file as JSON and looks at nothing. The arms are the four that independent samples give, at all powers of two. Seconds of
a core stand beside those on the clock, which a busy machine stretches.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import numpy as np
from common import markdown

from search.cells import Grid, pool_cells, read_pools
from search.optimal import Cells, assess, by_price, equal_accuracy, fit_table, prices_of, quantile_bins
from search.results import write_results
from search.types import Candidate, Finish, Grade, Problem, SearchResult, Spend

ARMS = {"pass": "pass", "majority": "majority", "best_of_n": "best_of_n", "best_of_n_weighted": "best_of_n_weighted"}
TOKENS, PROMPT, STEPS, TOKEN_FLOPS = 40, 20, 3, 2e6
DRAWS = 100
T = TypeVar("T")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--problems", type=int, default=1000)
    parser.add_argument("--samples", type=int, default=64)
    options = parser.parse_args()
    rng = np.random.default_rng(0)
    rates_P = rng.beta(0.5, 0.8, options.problems)
    budgets = [2**i for i in range(options.samples.bit_length()) if 2**i <= options.samples]
    rows: list[list[str]] = []

    def timed(what: str, work: Callable[[], T]) -> T:
        began_s, began_cpu_s = time.perf_counter(), time.process_time()
        found = work()
        cpu_s = time.process_time() - began_cpu_s
        rows.append([what, f"{time.perf_counter() - began_s:.2f}", f"{cpu_s:.2f}"])
        return found

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "pool.jsonl"
        write_results([made_up(rng, i, rate, options.samples) for i, rate in enumerate(rates_P)], path)
        megabytes = path.stat().st_size / 1e6
        timed("one plain pass over the file", lambda: plain_pass(path))
        pools = timed("reading the pools", lambda: read_pools(path, "\n"))
    cells = timed(f"{len(ARMS)} arms x {len(budgets)} budgets", lambda: pool_cells(pools, ARMS, budgets))
    grid = Grid(tuple(pool.key for pool in pools), tuple(cells))
    answering = grid.only(arm for arm in ARMS if arm != "pass")
    predicted = np.clip(rates_P + rng.normal(0, 0.1, len(rates_P)), 0, 1).tolist()
    timed("fit, to answer", lambda: fit_table(answering, predicted))
    timed("fit, to find rows", lambda: fit_table(grid, predicted, objective="rows"))
    wall_s, cpu_s = (sum(float(row[i]) for row in rows[1:]) for i in (1, 2))

    ready = Cells(answering)
    bins_P = quantile_bins(np.array(predicted))
    timed("(its worth, 10 x two folds)", lambda: assess(ready, bins_P, by_price(prices_of(ready))))
    names = ("best_of_n", "best_of_n_weighted", "majority")
    ratios = timed(
        f"(ratios at equal accuracy, {DRAWS} resamples)",
        lambda: equal_accuracy(
            ready, names, None, lambda w: quantile_bins(np.array(predicted), 5, w), budgets[-2:], draws=DRAWS
        ),
    )
    markdown(["step", "seconds", "of a core"], rows)
    print(
        f"\n{options.problems} pools of {options.samples}, {megabytes:.0f} MB. From stored pools to two tables: ",
        end="",
    )
    print(f"{wall_s:.1f} s, {cpu_s:.1f} s of a core: {cpu_s / float(rows[0][2]):.0f} x the plain pass.")
    for r in ratios:
        print(f"{r.baseline} at {r.budget:g}: {r.value:.2f} times the FLOPs ({r.low:.2f} to {r.high:.2f})")


def plain_pass(path: Path) -> int:
    with path.open(encoding="utf-8") as file:
        return sum(len(json.loads(line)["candidates"]) for line in file)


def made_up(rng: np.random.Generator, number: int, rate: float, num: int) -> SearchResult:
    right_N = rng.random(num) < rate
    wrong_N, seen_N = rng.geometric(0.2, num), rng.normal(0, 0.18, num) + np.where(right_N, 0.7, 0.4)
    ids_N_T = rng.integers(0, 50, (num, TOKENS)).tolist()
    candidates: list[Candidate] = []
    for n, right in enumerate(right_N.tolist()):
        answer = "right" if right else f"wrong {wrong_N[n]}"
        score = float(np.clip(seen_N[n], 0, 1))
        text = f"a step of some length {n % 7}\nand another one\n{answer}"
        grade = Grade.CORRECT if right else Grade.WRONG
        scores = (score,) * STEPS
        candidates.append(
            Candidate(tuple(ids_N_T[n]), text, Finish.EOS, answer=answer, grade=grade, step_scores=scores, score=score)
        )
    distinct = len({c.text for c in candidates})
    judge, policy = TOKEN_FLOPS * TOKENS * distinct, TOKEN_FLOPS * (PROMPT + TOKENS * num)
    spend = Spend(num, TOKENS * num, PROMPT, 0, TOKENS * num, policy + judge, policy + judge, judge, judge)
    problem = Problem(str(number), f"question {number}", "right")
    return SearchResult(problem, f"pool({num})", tuple(candidates), 0, spend, "made up", "0", prompt_ids=(1,) * PROMPT)


if __name__ == "__main__":
    main()
