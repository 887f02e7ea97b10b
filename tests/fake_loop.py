"""A whole plausible loop on disk, without a model: problems have a difficulty, models a skill, answers are drawn.

Rounds 1, 2 and 4 are promoted, round 3 is rejected, round 1 has both controls. loop.json is written by `flows.state`,
the figures by `search.evaluate`; conftest.py hands this module to the tests as the fixture `fake_loop`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from distill.gate import Comparison, Primary, Verdict
from distill.select import FILTERS
from flows.champion import Bundle
from flows.state import Loop, RoundRecord
from search import evaluate
from search.results import write_results
from search.types import Candidate, Finish, Grade, Problem, SearchResult, Spend

HOSTILE = '<script>alert("x")</script>\x1b[31mred\x1b[0m [bold]b[/bold] & "quoted"'


@dataclass(frozen=True)
class FakeRound:
    number: int
    skill: float
    verdict: str
    reason: str = ""
    kind: str = "round"


ROUNDS = (
    FakeRound(0, 0.0, "base", "the base model"),
    FakeRound(1, 1.0, "promoted", "greedy accuracy rose"),
    FakeRound(1, 0.75, "control", kind="control-random"),
    FakeRound(1, 0.15, "control", kind="control-bootstrap"),
    FakeRound(2, 1.45, "promoted", "greedy accuracy rose"),
    FakeRound(3, 1.40, "rejected", "no significant gain: p = 0.61 > alpha = 0.05"),
    FakeRound(4, 1.75, "promoted", "greedy accuracy rose"),
)


CONFIG = json.dumps({"loop": {"name": "fake"}, "search": {"samples": 16, "problems": 3000}}) + "\n"


@dataclass(frozen=True)
class Sizes:
    test: int = 240
    pool: int = 120
    samples: int = 16

    @property
    def ks(self) -> tuple[int, ...]:
        return tuple(k for k in (1, 2, 4, 8, 16, 32, 64) if k <= self.samples)


def write_loop(root: Path, rounds: tuple[FakeRound, ...] = ROUNDS, sizes: Sizes | None = None, seed: int = 0) -> Path:
    """The loop's folder, filled."""
    sizes = sizes or Sizes()
    loop = Loop.open(root, "fake", task="countdown")
    rng = np.random.default_rng(seed)
    difficulty_P = rng.normal(3.7, 1.6, sizes.test)
    luck_P = rng.random(sizes.test)
    for r in rounds:
        begun = loop.begin_round(CONFIG, kind=r.kind, round=r.number)
        folder = begun.path
        _measure(folder, r, sizes, difficulty_P, luck_P)
        stage = folder / ("distill" if r.number else "base")
        (stage / "model").mkdir(parents=True)
        write_json(stage / "model" / "config.json", {"skill": r.skill})
        if r.number:
            _search_and_select(folder, r)
            _gate(folder, r)
        if r.kind == "round":
            _difficulty(folder, r)
        if r.verdict != "unfinished":
            promoted = r.verdict in ("base", "promoted")
            bundle = Bundle(r.number, loop.part(stage / "model")) if promoted else None
            loop.finish(begun, RoundRecord(r.number, r.verdict, r.reason, kind=r.kind), bundle)  # type: ignore[arg-type]
    return loop.path


def write_json(path: Path, data: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")


def write_stage(folder: Path, metrics: Mapping[str, tuple[float, float | None]], spend: Spend, wall_s: float) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    rows = [{"name": n, "value": v} | ({} if se is None else {"se": se}) for n, (v, se) in sorted(metrics.items())]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    write_json(folder / "spend.json", spend.to_json())
    write_json(folder / "timing.json", {"wall_s": wall_s})
    write_json(folder / "manifest.json", {"files": {}})


def tokens(samples: int, generated: int, scale: float = 1.0) -> Spend:
    flops = 0.8e6 * 1.3 * generated * scale
    return Spend(samples, generated, generated // 4, 0, 0, flops, flops * 1.1)


def _problem(i: int) -> Problem:
    question = HOSTILE if i < 6 else f"{3 + i % 9} {1 + i % 7} {2 + i % 5} > {10 + i % 80}"
    return Problem(f"problem-{i}", question, str(10 + i % 80), {"numbers": 3 + i % 3})


def _candidate(right: bool, wrong: int) -> Candidate:
    text = "3+4=7\n7*5=35" if right else HOSTILE if wrong == 0 else f"3*4={wrong}"
    grade = Grade.CORRECT if right else Grade.WRONG
    return Candidate((7, 9, 11, 2), text, Finish.EOS, answer="right" if right else f"wrong {wrong}", grade=grade)


def _results(strategy: str, right_P_N: Any, wrong_P_N: Any, model: str) -> list[SearchResult]:
    return [
        SearchResult(
            problem=_problem(i),
            strategy=strategy,
            candidates=tuple(_candidate(bool(r), int(w)) for r, w in zip(right_N, wrong_N, strict=True)),
            selected=0,
            spend=tokens(len(right_N), 30 * len(right_N)),
            model=model,
            seed="0/evaluate/test",
            prompt_ids=(1, 2, 3),
        )
        for i, (right_N, wrong_N) in enumerate(zip(right_P_N, wrong_P_N, strict=True))
    ]


def _measure(folder: Path, r: FakeRound, sizes: Sizes, difficulty_P: Any, luck_P: Any) -> None:
    rng = np.random.default_rng([r.number, len(r.kind)])
    own_P = rng.normal(0, 0.35, sizes.test)
    rate_P = 1 / (1 + np.exp(difficulty_P - r.skill - own_P))
    greedy_P = luck_P * 0.7 + rng.random(sizes.test) * 0.3 < np.minimum(1.5 * rate_P, 0.97)
    pool_P_N = rng.random((sizes.pool, sizes.samples)) < rate_P[: sizes.pool, None]
    model = f"{abs(hash((r.number, r.skill))):016x}"[:16]
    stage = folder / "evaluate"
    for name, right, strategy in (
        ("greedy-test", greedy_P[:, None], "greedy"),
        ("pool-test", pool_P_N, f"pool({sizes.samples})"),
    ):
        stage.mkdir(parents=True, exist_ok=True)
        wrong = np.minimum(rng.geometric(0.2, right.shape) - 1, 12)
        write_results(_results(strategy, right, wrong, model), stage / f"{name}.jsonl")
    figures = evaluate.summary(stage / "greedy-test.jsonl", stage / "pool-test.jsonl", sizes.ks)
    metrics = {name: (e.value, e.se) for name, e in figures.items()}
    write_stage(stage, metrics, tokens(50_000, 1_400_000), 41.0 + r.number)


def _search_and_select(folder: Path, r: FakeRound) -> None:
    counts: dict[str, int] = dict.fromkeys(("candidates", *FILTERS), 0)
    counts |= {"wrong": 38_400 - 2_100 * r.number, "truncated": 2_050 - 300 * r.number, "ungraded": 3}
    counts |= {"duplicate": 2_600 + 800 * r.number, "over_cap": 700 + 600 * r.number, "candidates": 48_000}
    counts["kept"] = 2 * counts["candidates"] - sum(counts.values())
    counts |= {"rows": counts["kept"] * 100 // 85, "leaks": 0}
    write_stage(folder / "baseline", {}, tokens(12_000, 340_000), 11.0)
    solved = 1500.0 + 200 * r.number
    write_stage(folder / "search", {"search/solved": (solved, None)}, tokens(48_000, 1_350_000), 22.0)
    data = {"data/rows": float(counts["kept"] * r.number), "data/new_rows": float(counts["kept"])}
    data["data/distinct_solutions"] = data["data/rows"] * 0.85
    write_stage(folder / "select", {name: (v, None) for name, v in data.items()}, Spend(), 1.5)
    write_json(folder / "select" / "counts.json", counts)
    loss = {"distill/loss": (0.8 - 0.05 * r.number, None)}
    write_stage(folder / "distill", loss, tokens(0, 0) + Spend(prefilled_tokens=900_000, flops_ideal=6e12), 38.0)


def _gate(folder: Path, r: FakeRound) -> None:
    if r.kind != "round":
        return
    promoted = r.verdict == "promoted"
    effect, p = (0.06, 1e-9) if promoted else (-0.002, 0.61)
    primary = Primary(
        "greedy accuracy",
        4000,
        0.21,
        0.21 + effect,
        effect,
        0.007,
        effect - 0.014,
        effect + 0.014,
        420,
        180,
        p,
        0.05,
        0.018,
    )
    coverage = Comparison("coverage (pass@16)", 500, 0.60, 0.63, 0.03, 0.012, 0.01, 0.02)
    checks = ((promoted, f"greedy accuracy: {100 * effect:+.1f} points, p = {p:.2g}"), (True, "coverage is not worse"))
    reasons = tuple(text for passed, text in checks if passed == promoted)
    verdict = Verdict(promoted, reasons, checks, 1, primary, (coverage,))
    write_stage(folder / "gate", {"gate/effect": (effect, 0.007), "gate/p": (p, None)}, Spend(), 0.4)
    write_json(folder / "gate" / "verdict.json", verdict.to_json())


def _difficulty(folder: Path, r: FakeRound) -> None:
    metrics: dict[str, tuple[float, float | None]] = {
        "difficulty/spearman": (0.58 + 0.01 * r.number, 0.02),
        "difficulty/brier": (0.061, 0.002),
    }
    metrics |= {"difficulty/length_spearman": (0.41, 0.03), "difficulty/spearman_ceiling": (0.88, None)}
    metrics |= {"difficulty/brier_rate": (0.008, None), "difficulty/constant_brier_rate": (0.0144, None)}
    points = [0.004 + 0.006 * i + 0.004 * i * i for i in range(10)]
    curve = [
        {"predicted": x, "observed": x * (1 + 0.2 * math.sin(3 * i)), "se": 0.1 * math.sqrt(x) / 4, "n": 100}
        for i, x in enumerate(points)
    ]
    write_stage(folder / "difficulty", metrics, tokens(16_000, 450_000), 9.0)
    write_json(folder / "difficulty" / "report.json", {"curve": curve})
