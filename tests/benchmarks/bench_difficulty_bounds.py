"""What bounds a difficulty predictor on the embedded tasks: how well one would rank questions that knows more of them.

    python tests/benchmarks/bench_difficulty_bounds.py runs/arithmetic runs/countdown [--problems 4000] [--taught 20000]

For the base model of each loop, on the test pools of its round 0. Arithmetic: a survival model over the operations of a
chain, fitted to `--problems` fresh labelled questions, that knows each sign and operand, and the true running value
before the first 0, 1, 2, ... of them; to know those a predictor has to compute the chain. Countdown: the chance that
random legal play hits the target, from all legal plays; and a network of the policy's size and weights that was taught
this chance, without any noise, on `--taught` other questions: what one forward pass can tell.
"""

from __future__ import annotations

import argparse
import re
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from common import markdown

from configs import load
from configs.schema import Config, SequencePredictor
from difficulty import sequence, tokens
from difficulty.labels import Counts, count_samples, empirical_prior
from difficulty.prompts import Prompts
from flows.stages import pool_job
from search import stats
from search.engines import load_engine
from search.policy import Sampler
from search.prompts import prompt_ids
from search.results import read_results
from search.run import run_shards
from search.tasks import load_task
from search.tasks.arithmetic import Arithmetic

SAMPLES = 16


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("loops", nargs="+", type=Path)
    parser.add_argument("--problems", type=int, default=4000)
    parser.add_argument("--taught", type=int, default=20_000)
    options = parser.parse_args()
    for loop in options.loops:
        config = load.load(loop.resolve().name.split("-")[0], ["stages.threads=1"])
        fresh = count_samples(read_results(loop / "round-000" / "evaluate" / "pool-test.jsonl"))
        policy = loop / "round-000" / "base" / "model"
        known = arithmetic if config.task.type == "arithmetic" else countdown
        found = known(config, policy, fresh, options)
        markdown(["loop", "what is known", "Spearman", "share"], [[loop.name, *one] for one in found])


def figures(what: str, predicted_P: np.ndarray, fresh: Counts) -> list[str]:
    found = stats.spearman(predicted_P, fresh.successes_P / fresh.totals_P)
    ceiling = stats.spearman_ceiling(fresh.successes_P, fresh.totals_P, seed=0)
    return [what, f"{found:.3f}", f"{found / ceiling:.3f}"]


# ---------------------------------------------------------------- arithmetic


def arithmetic(config: Config, policy: Path, fresh: Counts, options: argparse.Namespace) -> list[list[str]]:
    labels = labelled(config, policy, options.problems)
    rates, weights = labels.successes_P / labels.totals_P, labels.totals_P.astype(float)
    weights /= weights + sum(empirical_prior(labels.successes_P, labels.totals_P))
    tokens.COMPONENTS = 10_000  # nothing is left out
    rows: list[list[str]] = []
    task: Any = load_task(config)
    for num in (0, 1, 2, 3, 99):
        read = [known_parts(task, keys, num) for keys in (labels.keys, fresh.keys)]
        head, _ = tokens.fit(read[0], rates, weights, seed=0)
        what = "operations" if not num else f"and the value before {'all' if num == 99 else f'the first {num}'}"
        rows.append(figures(what, head.predict(read[1]), fresh))
    return rows


def known_parts(task: Arithmetic, keys: tuple[str, ...], num: int) -> Prompts:
    """Each operation as one part of a question: its sign and operand, and the value before it for the first `num`."""
    modulus, operands = task.config.modulus, task.config.max_operand + 1
    parts: list[np.ndarray] = []
    for key in keys:
        value, *rest = re.split("([-+*])", key)
        a, codes = int(value), list[int]()
        for i, (sign, b) in enumerate(zip(rest[::2], map(int, rest[1::2]), strict=True)):
            before = a if i < num else modulus
            codes.append(("+-*".index(sign) * (modulus + 1) + before) * operands + b)
            a = task.apply(a, sign, b)
        one = np.zeros((len(codes), 1, 3 * (modulus + 1) * operands), dtype=np.float32)
        one[np.arange(len(codes)), 0, codes] = 1
        parts.append(one)
    return Prompts([tuple(range(len(part))) for part in parts], tokens=parts)


def labelled(config: Config, policy: Path, num: int) -> Counts:
    task = load_task(config)
    engine = load_engine(config, policy, task)
    job = pool_job("more", task.draw("fit", num, stream="bounds"), SAMPLES, "bounds")
    sampler = Sampler.of(config, engine, task, job.stage, job.split)
    with tempfile.TemporaryDirectory() as folder:
        run_shards(job.problems, job.plan, sampler, Path(folder), shard_problems=job.shard_problems)
        return count_samples(read_results(Path(folder)))


# ---------------------------------------------------------------- countdown


def countdown(config: Config, policy: Path, fresh: Counts, options: argparse.Namespace) -> list[list[str]]:
    known_P = np.array([chance(key) for key in fresh.keys])
    rows = [figures("all legal plays", known_P, fresh)]
    task = load_task(config)
    tokenizer = load_engine(config, policy, task).tokenizer
    problems = task.draw("train", options.taught, stream="bounds")
    taught = Prompts([prompt_ids(task, tokenizer, p) for p in problems], policy=policy, model=config.model)
    rates = np.array([chance(p.key) for p in problems])
    settings = SequencePredictor(method="full", learning_rate=1e-3, held_out=0.05, batch_size=64, micro_batch_size=64)
    with tempfile.TemporaryDirectory() as folder:
        head, _ = sequence.fit(taught, rates, np.ones(len(rates)), settings, Path(folder), seed=0)
    asked = [prompt_ids(task, tokenizer, task.parse(question(key))) for key in fresh.keys]
    predicted = head.predict(Prompts(asked, policy=policy, model=config.model))
    return [*rows, figures(f"a network taught that on {options.taught} questions", predicted, fresh)]


def question(key: str) -> str:
    numbers, _, target = key.partition(">")
    return f"{numbers.replace(',', ' ')} > {target}"


def chance(key: str) -> float:
    """That random legal play of the key's numbers ends on its target."""
    numbers, _, target = key.partition(">")
    return results(tuple(sorted(map(int, numbers.split(","))))).get(int(target), 0.0)


@cache
def results(numbers: tuple[int, ...]) -> dict[int, float]:
    """What random legal play ends on, each with its chance; every intermediate result lies in 1..99."""
    if len(numbers) == 1:
        return {numbers[0]: 1.0}
    found: dict[int, float] = {}
    pairs = [(i, j) for i in range(len(numbers)) for j in range(i)]
    moves = [(pair, legal(*(numbers[i] for i in pair))) for pair in pairs]
    playable = sum(bool(options) for _, options in moves)
    for (i, j), options in moves:
        for result in options:
            rest = [n for place, n in enumerate(numbers) if place not in (i, j)]
            for end, odds in results(tuple(sorted([*rest, result]))).items():
                found[end] = found.get(end, 0.0) + odds / len(options) / playable
    return found


def legal(a: int, b: int) -> list[int]:
    a, b = max(a, b), min(a, b)
    return [r for r in (a + b, a - b, a * b, a // b if a % b == 0 else 0) if 1 <= r <= 99]


if __name__ == "__main__":
    main()
