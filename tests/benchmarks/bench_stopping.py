"""Rules that stop early, replayed on stored pools: how long it takes, and what each comes to on made-up questions.

    python tests/benchmarks/bench_stopping.py [--problems 1000] [--samples 64]

Rates of success are Beta(0.5, 0.8); the verifier's scores overlap and are calibrated over all questions. The time of
`pool_cells`, exact best-of-N and majority on the same pools and budgets, stands beside it. "Best-of-N as good" is the
number of samples for every question that reaches the rule's accuracy, over the mean number that the rule drew. The
sequential budget comes twice: without knowledge of single questions, and with predictions as good as four samples.
"""

from __future__ import annotations

import argparse
import time

import numpy as np
from common import markdown

from search.belief import beta_prior
from search.cells import pool_cells
from search.early_stopping import (
    AdaptiveMajority,
    AdaptiveWeighted,
    EarlyBestOfN,
    EarlyStopping,
    EarlyWeighted,
    OptScale,
)
from search.evaluate import Pool
from search.replay import stopped
from search.sequential import simulate_sequential
from search.types import Spend

TOKEN_FLOPS = 2e6
PRICES = (3e-10, 1e-10, 3e-11)  # of a FLOP; a sample costs about 1.2e8


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--problems", type=int, default=1000)
    parser.add_argument("--samples", type=int, default=64)
    options = parser.parse_args()
    rng = np.random.default_rng(0)
    rates = rng.beta(0.5, 0.8, options.problems)
    pools = [made_up(rng, str(i), rate, options.samples) for i, rate in enumerate(rates)]
    budgets = [2**i for i in range(options.samples.bit_length()) if 2**i <= options.samples]

    began = time.perf_counter()
    cells = pool_cells(pools, {"majority": "majority", "best_of_n": "best_of_n"}, budgets)
    exact_s, began = time.perf_counter() - began, time.perf_counter()
    rules = [EarlyStopping(4), AdaptiveMajority(batch=1), OptScale(), EarlyBestOfN(0.9), EarlyBestOfN(0.99)]
    rules += [EarlyWeighted(0.8), AdaptiveWeighted()]
    found = [by_budget[-1] for by_budget in stopped(pools, rules, budgets)]
    rules_s, began = time.perf_counter() - began, time.perf_counter()
    mean, known = 0.5 / 1.3, (0.5 + rng.binomial(4, rates)) / (1.3 + 4)
    for predicted, strength, base in ((np.full(len(pools), mean), 1.3, 0.0), (known, 5.3, mean)):
        priors = {pool.key: ab for pool, *ab in zip(pools, *beta_prior(predicted, strength), strict=True)}
        found += [simulate_sequential(pools, priors, price, budgets, base=base)[-1] for price in PRICES]
    sequential_s = time.perf_counter() - began

    best = [cell for cell in cells if cell.arm == "best_of_n"]
    rows: list[list[str]] = []
    for one in found:
        accuracy, drawn = float(one.cell.solved_P.mean()), float(one.samples_P.mean())
        as_good = np.interp(accuracy, [cell.solved_P.mean() for cell in best], budgets)
        rows.append([one.cell.name, f"{accuracy:.1%}", f"{drawn:.1f}", f"{as_good / drawn:.1f} x"])
    markdown(["rule", "accuracy", "samples drawn", "best-of-N as good"], rows)
    print(f"\n{len(pools)} pools of {options.samples}, {len(budgets)} budgets, 32 orders:")
    print(
        f"{len(rules)} rules {rules_s:.1f} s, 2 x {len(PRICES)} prices {sequential_s:.1f} s, exact arms {exact_s:.1f} s"
    )


def made_up(rng: np.random.Generator, key: str, rate: float, num: int) -> Pool:
    right = rng.random(num) < rate
    answers = tuple("right" if r else f"wrong {rng.geometric(0.2)}" for r in right)
    seen = np.where(right, 0.8, 0.3) + rng.normal(0, 0.18, num)
    scores = 1 / (1 + 0.8 / 0.5 * np.exp(-(seen - 0.55) * 0.5 / 0.18**2))  # what it sees says so much of right or wrong
    judge, policy = 20 * num * TOKEN_FLOPS, (20 + 40 * num) * TOKEN_FLOPS
    return Pool(
        key,
        tuple(bool(r) for r in right),
        answers,
        tuple(float(s) for s in scores),
        0,
        Spend(num, 40 * num, 20, 0, 20 * num, policy + judge, policy + judge, judge, judge),
        (1,) * num,
        (1,) * int(right.sum()),
        20,
    )


if __name__ == "__main__":
    main()
