"""How good must a verifier be before search pays? The saving at equal accuracy against the quality of the verifier.

    .venv/bin/python tests/benchmarks/bench_verifier_quality.py [--runs-dir runs] [--loop arithmetic] [--problems 300] \
        [--verifier FOLDER ...] [--questions 30 100 300] [--out runs/quality] [--figure infra/figures/quality.png]

The base model of an arithmetic loop (`ratchet round arithmetic` makes one where there is none) searches the same
problems with verifiers of every quality: the perfect step checker, the same with 2 to 30 % of its scores turned round
(counted as if it were as large as the trained ones), none, and trained ones: those of the loop's rounds, and weaker
ones that are trained here on the labelled answers to a few questions only. For each the compute-optimal choice among
all arms, by the number of operations in the question, against the strongest of greedy, majority, best-of-N, weighted
and sharpened best-of-N at the same N: against its own weighted vote alone, which saturates, a weak verifier would seem
to save most. Both models' FLOPs are counted; intervals are 90 %, those of savings redo the whole choice.
A saving alone misleads, since it is largest where a poor verifier's best-of-N saturates early: so the points that the
choice gains for the FLOPs of N samples stand beside it. Searches are kept under --out and reused; about 2 minutes a
verifier on two busy cores.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import json
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import common
import numpy as np

from configs import load
from configs.schema import Config, NoVerifier, OracleVerifier, TrainedVerifier
from flows.artefacts import sha256_file
from flows.plots_quality import save_quality
from flows.stages import Context, Job, run_jobs
from search.cells import Cell, Grid, outcome_cell, pool_cells
from search.evaluate import reduce_pool
from search.optimal import Cells, at_mean, by_price, equal_accuracy, outcomes, prices_of, quantile_bins
from search.parallel import Report, fork_map
from search.randomness import key64
from search.results import read_results
from search.stats import paired_difference
from search.strategies import parse
from search.tasks import load_task
from search.types import Budget, Problem, SearchResult, VerifierFacts
from search.verifiers import describe
from search.verifiers.health import measure

NOISE = (0.0, 0.02, 0.05, 0.1, 0.2, 0.3)
LARGEST = 32  # samples of a pool
POOLED = {name: name for name in ("majority", "best_of_n", "best_of_n_weighted", "sharpened")}
SEARCHED = {"beam(width=4)": (4, 8, 16), "step_rejection(draws=16, greedy=true)": (2, 4, 8, 16)}
BASELINES = ("greedy", *POOLED)
AT = (8, 16)


@dataclass(frozen=True)
class Rater:
    """One verifier to search with."""

    name: str
    settings: Any  # a section of the configuration
    folder: Path | None = None  # of a trained one


# ---------------------------------------------------------------- searching


class Bench:
    """The same problems, samples and arms under every verifier."""

    def __init__(self, loop: Path, num_problems: int, out: Path):
        text = (loop / "round-000" / "config.json").read_text(encoding="utf-8")
        self.config: Config = load.parse(json.loads(text), str(loop))
        self.policy = loop / "round-000" / "base" / "model"
        self.task: Any = load_task(self.config)
        self.problems: list[Problem] = self.task.draw("validation", num_problems, stream="verifier quality")
        self.out = out

    def run(self, rater: Rater, jobs: Sequence[Job]) -> list[list[SearchResult]]:
        """What each job found; only what is not there yet is searched."""
        config = self.config.model_copy(update={"verifier": rater.settings})
        folder = self.out / f"{rater.name.replace(' ', '-')}-{self._identity(rater)}"
        inputs = {"policy": self.policy} | ({"verifier": rater.folder} if rater.folder else {})
        num = len(self.problems)
        lacking = [job for job in jobs if sum(1 for _ in read_results(_shards(folder / job.folder))) < num]
        if lacking:
            run_jobs(Context(config, 0, lambda *a, **k: None), inputs, folder, lacking)
        return [list(read_results(_shards(folder / job.folder))) for job in jobs]

    def facts(self, rater: Rater) -> VerifierFacts | None:
        return describe(self.config.model_copy(update={"verifier": rater.settings}), self.task, trained=rater.folder)

    def _identity(self, rater: Rater) -> str:
        """Of what decides what a search finds."""
        noise, size = getattr(rater.settings, "noise", None), getattr(rater.settings, "parameters", None)
        of_run = [self.config.loop.seed, self.config.sampling.model_dump(mode="json"), [p.key for p in self.problems]]
        files = [*sorted(self.policy.glob("*.safetensors")), *weights(rater.folder)]
        what = [*of_run, noise, size, *map(sha256_file, files)]
        return hashlib.sha256(json.dumps(what).encode()).hexdigest()[:12]

    def job(self, folder: str, strategy: str, num: int, rater: Rater) -> Job:
        """Independent samples share their random streams whatever the verifier: so all have the same pool."""
        facts = self.facts(rater)
        plan = parse(strategy).plan(Budget("samples", num), facts)
        size = max(1, min(-(-len(self.problems) // 4), 4000 // num))
        return Job(folder, plan, self.problems, "quality", "quality", size, verified=facts is not None)


def weights(verifier: Path | None) -> list[Path]:
    """The files of a trained verifier that decide its scores."""
    return [verifier / "verifier.json", *sorted(verifier.rglob("*.safetensors"))] if verifier else []


def _shards(folder: Path) -> list[Path]:
    return sorted(folder.glob("shard-*.jsonl"))


def size_of(pool: Sequence[SearchResult]) -> int:
    """The policy's size for an oracle, whose tokens are characters: so it costs what a trained verifier would."""
    tokens = sum(len(r.prompt_ids) + r.spend.generated_tokens for r in pool)
    flops = sum(r.spend.flops_ideal for r in pool)
    characters = sum(len(r.problem.question) + sum(len(c.text) for c in r.candidates) for r in pool)
    return round(flops / 2 / characters) if tokens else 0


# ---------------------------------------------------------------- verifiers


def usable_verifiers(loop: Path) -> Iterator[tuple[str, Path]]:
    for folder in sorted(loop.glob("round-???/verifier")):
        if json.loads((folder / "report.json").read_text(encoding="utf-8"))["usable"]:
            yield f"round {int(folder.parent.name.removeprefix('round-'))}", folder


def train_weaker(bench: Bench, loop: Path, num_questions: int) -> Path:
    """A verifier trained on the labelled answers to so many questions of round 0, as the loop trains its own."""
    out = bench.out / "verifiers" / f"{num_questions}-questions"
    if (out / "verifier.json").exists():
        return out
    settings = bench.config.verifier
    assert isinstance(settings, TrainedVerifier)

    def work(index: int, tell: Report) -> None:
        from distill.labels import read_examples
        from distill.verifier import train

        examples = list(read_examples(loop / "round-000" / "verifier" / "examples.jsonl"))
        keys = sorted({e.problem.key for e in examples}, key=functools.partial(key64, "quality"))[:num_questions]
        chosen = [e for e in examples if e.problem.key in set(keys)]
        options: dict[str, Any] = {"seed": bench.config.loop.seed, "policy_fingerprint": "", "threads": 1}
        train(chosen, bench.policy, bench.policy, out, settings, bench.config.model, bench.task, **options)

    fork_map(work, 1, lambda *_: None, fork=True)  # what loads torch must not fork afterwards
    return out


# ---------------------------------------------------------------- figures


def cells_of(bench: Bench, rater: Rater, greedy: Cell) -> tuple[Grid, list[SearchResult]]:
    """All cells under a verifier, and its scored pool."""
    searched = [(arm, n) for arm, budgets in SEARCHED.items() for n in budgets]
    jobs = [bench.job("pool", "best_of_n_weighted", LARGEST, rater)]
    jobs += [bench.job(f"{parse(arm).name}-{n}", arm, n, rater) for arm, n in searched]
    pool, *found = bench.run(rater, jobs)
    keys = tuple(p.key for p in bench.problems)
    by_key = [{r.problem.key: r for r in results} for results in (pool, *found)]
    pool, *found = ([results[key] for key in keys] for results in by_key)
    sizes = [2**i for i in range(LARGEST.bit_length())]
    cells = [replace(greedy, budget=n) for n in (1, *AT)]  # one greedy answer, however much may be spent
    cells += pool_cells([reduce_pool(r) for r in pool], POOLED, sizes)
    cells += [outcome_cell(results, arm, n) for (arm, n), results in zip(searched, found, strict=True)]
    return Grid(keys, tuple(cells)), pool


def point(bench: Bench, rater: Rater, grid: Grid, pool: Sequence[SearchResult], draws: int) -> dict[str, Any]:
    """A verifier's quality, and what search by it saves."""
    facts = bench.facts(rater)
    auc = auc_steps = 0.5
    if facts is not None:
        figures = measure(pool, task=bench.task, process=facts.process, aggregation=facts.aggregation).figures
        auc, auc_steps = figures["auc_within"].value, figures["step_auc"].value
    operations_P = np.array([-p.meta["operations"] for p in bench.problems], dtype=np.float64)
    cells = Cells(grid)
    ratios = equal_accuracy(
        cells,
        [arm for arm in BASELINES if grid.find(arm, AT[0])],
        None,
        lambda weights: quantile_bins(operations_P, 5, weights),
        AT,
        draws=draws,
    )
    gains = gains_of(cells, quantile_bins(operations_P, 5), {r.budget: r.baseline for r in ratios})
    at_16 = {arm: grid.find(arm, 16) for arm in ("majority", "best_of_n_weighted", "beam(width=4)")}
    majority, weighted, beam = (cell and float(cell.solved_P.mean()) for cell in at_16.values())
    row: dict[str, Any] = {"verifier": rater.name, "auc": auc, "auc_steps": auc_steps}
    row |= {"trained": rater.folder is not None, "gains": gains}
    row["savings"] = {f"{r.budget:g}": {"value": r.value, "low": r.low, "high": r.high} for r in ratios}
    row["strongest"] = {f"{r.budget:g}": {"arm": r.baseline, "accuracy": r.accuracy} for r in ratios}
    return row | {"weighted_16": weighted, "beam_16": beam, "majority": majority}


def gains_of(cells: Cells, bins_P: Any, strongest: dict[float, str]) -> dict[str, dict[str, float]]:
    """What the choice solves more than the strongest baseline at N, for the FLOPs of N scored samples; paired by
    problem, 90 %. Unlike a saving it does not grow where that baseline is poor."""
    values_L_P, flops_L_P = outcomes(cells, bins_P, by_price(prices_of(cells)))
    gains: dict[str, dict[str, float]] = {}
    for budget, arm in strongest.items():
        paid = cells.grid.find("best_of_n_weighted", budget) or cells.grid.find("majority", budget)
        baseline = cells.grid.find(arm, budget)
        assert paid is not None
        assert baseline is not None
        own_P = at_mean(values_L_P, flops_L_P, float(paid.flops_P.mean()))
        assert own_P is not None, "one greedy answer costs less than N samples"
        gain = paired_difference(baseline.solved_P, own_P, confidence=0.9)
        gains[f"{budget:g}"] = {"value": gain.mean, "low": gain.low, "high": gain.high}
    return gains


def crossing(points: Sequence[dict[str, Any]], what: str, at: int, level: float, measure: str = "auc") -> float | None:
    """The AUC from which on the lower bound of the saving or gain lies above `level`, by the checkers of known noise,
    linear between two of them; None: not even the best one's does."""
    ordered = sorted((p[measure], p[what][str(at)]["low"]) for p in points if not p["trained"])
    reached: float | None = None
    for (x, low), (x_before, low_before) in zip(ordered[::-1], [*ordered[-2::-1], (None, None)], strict=True):
        if low <= level:
            break
        reached = x
        if low_before is not None and low_before <= level:
            reached = x - (x - x_before) * (low - level) / (low - low_before)
    return reached


def sentence(points: Sequence[dict[str, Any]]) -> str:
    """How good must my PRM be before search pays?"""

    def need(what: str, at: int, level: float) -> str:
        found = [crossing(points, what, at, level, measure) for measure in ("auc", "auc_steps")]
        return "never" if None in found else "from an AUC within problems of {:.2f} (of steps {:.2f}) on".format(*found)

    def told(at: int) -> str:
        trained = [p for p in points if p["trained"]]
        paid = [p["savings"][str(at)]["low"] > 1 and p["gains"][str(at)]["low"] > 0 for p in trained]
        return (
            f"at N = {at} it saves FLOPs {need('savings', at, 1)}, half of them or more {need('savings', at, 2)}, and "
            f"solves more for the same FLOPs {need('gains', at, 0)} ({sum(paid)} of {len(paid)} trained ones do both)"
        )

    return f"How good must a verifier be before search pays? By the 90 % bounds, {'; '.join(map(told, AT))}."


def show(points: Sequence[dict[str, Any]]) -> None:
    heads = ["verifier", "AUC of answers", "AUC of steps", "majority@16", "weighted@16", "beam@16"]
    heads += [f"saving at N = {n} (90 %)" for n in AT] + ["points gained for the FLOPs of 16 samples"]
    rows: list[list[str]] = []
    for p in points:
        shares = ("-" if p[n] is None else f"{100 * p[n]:.1f} %" for n in ("majority", "weighted_16", "beam_16"))
        savings = ("{value:.1f} ({low:.1f} to {high:.1f})".format(**p["savings"][str(n)]) for n in AT)
        gained = "{value:+.1f} ({low:+.1f} to {high:+.1f})".format(**{k: 100 * v for k, v in p["gains"]["16"].items()})
        rows.append([p["verifier"], f"{p['auc']:.3f}", f"{p['auc_steps']:.4f}", *shares, *savings, gained])
    common.markdown(heads, rows)


# ---------------------------------------------------------------- the command


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs-dir", type=Path, default=Path("runs"))
    parser.add_argument("--loop", default="arithmetic")
    parser.add_argument("--problems", type=int, default=300)
    parser.add_argument("--verifier", type=Path, action="append", help="a trained one's folder; default: the loop's")
    parser.add_argument("--questions", type=int, nargs="*", default=[30, 100, 300], help="of weaker trained ones")
    parser.add_argument("--draws", type=int, default=300, help="of the bootstrap")
    parser.add_argument("--out", type=Path, default=Path("runs/quality"))
    parser.add_argument("--figure", type=Path, default=Path(__file__).parents[2] / "infra" / "figures" / "quality.png")
    options = parser.parse_args()
    loop = options.runs_dir / options.loop
    if not (loop / "round-000" / "verifier" / "report.json").exists():
        given = ["--runs-dir", str(options.runs_dir), "--set", f"loop.name={options.loop}"]
        subprocess.run([sys.executable, "-m", "flows.cli", "round", "arithmetic", *given], check=True)
    bench = Bench(loop, options.problems, options.out)
    points = [*measured(bench, loop, options)]
    document = {"problems": len(bench.problems), "points": points, "sentence": sentence(points)}
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "quality.json").write_text(json.dumps(document, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    print()
    show(points)
    save_quality(document, options.figure)
    print(f"\n{document['sentence']}\nfigures: {options.out / 'quality.json'}, {options.figure}")


def measured(bench: Bench, loop: Path, options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """A point for each verifier, the best oracle first."""
    none = Rater("none", NoVerifier(type="none"))
    jobs = [bench.job("greedy", "greedy", 1, none), bench.job("pool", "majority", LARGEST, none)]
    keys = tuple(p.key for p in bench.problems)
    found = [{r.problem.key: r for r in results} for results in bench.run(none, jobs)]
    first, pool = ([results[key] for key in keys] for results in found)
    greedy = outcome_cell(first, "greedy", 1)
    size = size_of(pool)
    raters = [Rater(f"oracle {n:g}", OracleVerifier(type="oracle", noise=n, parameters=size)) for n in NOISE]
    folders = [(f.name, f) for f in options.verifier] if options.verifier else [*usable_verifiers(loop)]
    folders += [(f"{n} questions", train_weaker(bench, loop, n)) for n in options.questions]
    raters += [Rater(name, bench.config.verifier, folder) for name, folder in folders]
    for rater in raters:
        grid, scored = cells_of(bench, rater, greedy)
        yield tell(point(bench, rater, grid, scored, options.draws))
    cells = [replace(greedy, budget=n) for n in (1, *AT)]
    cells += pool_cells([reduce_pool(r) for r in pool], {"majority": "majority"}, [1, 2, 4, 8, 16, LARGEST])
    yield tell(point(bench, none, Grid(keys, tuple(cells)), pool, options.draws))


def tell(row: dict[str, Any]) -> dict[str, Any]:
    arms = {n: (round(s["value"], 2), row["strongest"][n]["arm"]) for n, s in row["savings"].items()}
    print(row["verifier"], f"{row['auc']:.4f} {row['auc_steps']:.4f}", arms, flush=True)
    return row


if __name__ == "__main__":
    main()
