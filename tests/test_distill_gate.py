import dataclasses
import json
import math

import numpy as np
import pytest

from configs.schema import Gate, GuardSet
from distill.gate import Comparison, Evidence, Guard, Verdict, decide, gather
from search import stats
from search.results import write_results
from search.types import Candidate, Finish, Grade, Problem, SearchResult, Spend

CONFIG = Gate(problems=1000, coverage_problems=200, coverage_samples=4, coverage_k=4)


def greedy(both: int, losses: int, wins: int, neither: int):
    """Paired outcomes with the given cells; returns (champion, challenger)."""
    champion = [True] * (both + losses) + [False] * (wins + neither)
    challenger = [True] * both + [False] * losses + [True] * wins + [False] * neither
    keys = [f"p{i}" for i in range(len(champion))]
    return dict(zip(keys, champion, strict=True)), dict(zip(keys, challenger, strict=True))


def pool(right: int, problems: int = 400):
    return {f"p{i}": (right, 4) for i in range(problems)}


def evidence(losses: int = 20, wins: int = 80, **changes):
    champion, challenger = greedy(100, losses, wins, 800)
    full = Evidence(1, champion, challenger, pool(2), pool(2), training_rows=100, min_rows=50)
    return dataclasses.replace(full, **changes)


def failed(verdict: Verdict) -> str:
    assert not verdict.promoted
    assert verdict.reasons == tuple(text for passed, text in verdict.checks if not passed)
    return "\n".join(verdict.reasons)


def test_a_better_model_is_promoted_and_the_figures_are_right():
    verdict = decide(CONFIG, evidence())
    first = verdict.primary
    assert verdict.promoted
    assert first is not None
    assert (first.wins, first.losses, first.n) == (80, 20, 1000)
    assert first.effect == pytest.approx(0.06)
    assert first.p == stats.mcnemar_p(20, 80)
    assert first.alpha == 0.025
    assert first.low < 0.06 < first.high
    assert first.mde == pytest.approx(stats.minimum_detectable_effect(math.sqrt(0.1), 1000, alpha=0.025), rel=0.01)
    text = "\n".join(verdict.reasons)
    assert "greedy accuracy 12.0 % -> 18.0 % (+6.0 points" in text
    assert "80 won, 20 lost" in text
    assert all(text.isascii() and "\n" not in text for text in verdict.reasons)


@pytest.mark.parametrize(("losses", "wins"), [(0, 0), (50, 50), (80, 20), (45, 55), (1, 0)])
def test_ties_worse_and_unproven_models_are_rejected(losses, wins):
    assert "not shown to be better" in failed(decide(CONFIG, evidence(losses, wins)))


def test_each_look_spends_less():
    won = evidence(40, 63)  # p = .015
    assert decide(CONFIG, won).promoted
    second = decide(CONFIG, dataclasses.replace(won, look=2))
    assert second.primary is not None
    assert second.primary.alpha == pytest.approx(0.05 / 6)
    assert "at look 2" in failed(second)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"look": 0}, "looks count from 1"),
        ({"leaks": ("5,7,9>21",)}, "1 leaks between training and held-out problems, first: 5,7,9>21"),
        ({"ungraded_share": 0.0101}, "1.01 % of the answers are ungraded, at most 1 % may be"),
        ({"ungraded_share": math.nan}, "ungraded"),
        ({"training_rows": 49}, "49 training rows, at least 50 are needed"),
        ({"errors": ("distill: loss is not finite",)}, "a stage failed: distill: loss is not finite"),
        ({"challenger_greedy": {"p0": True}}, "answered different problems: 1000 and 1, 999 not in both"),
        ({"champion_greedy": {}, "challenger_greedy": {}}, "the primary test cannot be made: no problems"),
        ({"challenger_pool": {}}, "coverage cannot be compared"),
        ({"champion_pool": pool(2, 1), "challenger_pool": pool(2, 1)}, "one problem alone has no standard error"),
        ({"challenger_pool": {k: (1, 3) for k in pool(2)}}, "k = 4 needs a pool of at least 4 samples, not 3"),
        ({"challenger_pool": {k: (5, 4) for k in pool(2)}}, "5 correct of 4 samples"),
    ],
)
def test_anything_wrong_rejects_with_a_reason(changes, reason):
    assert decide(CONFIG, evidence()).promoted
    assert reason in failed(decide(CONFIG, evidence(**changes)))


def test_too_few_gate_problems_reject_even_a_huge_gain():
    champion, challenger = greedy(0, 0, 150, 0)
    verdict = decide(CONFIG, evidence(champion_greedy=champion, challenger_greedy=challenger))
    assert "150 gate problems, at least 200 are needed" in failed(verdict)


def test_lost_coverage_rejects():
    worse = {k: (2 if i % 25 else 0, 4) for i, k in enumerate(pool(2))}  # pass@4 100 % -> 96 %
    text = failed(decide(CONFIG, evidence(challenger_pool=worse)))
    assert "pass_at_4 100.0 % -> 96.0 % on 400 problems (-4.0 points" in text
    unclear = {k: (2 if i % 80 else 0, 4) for i, k in enumerate(pool(2))}
    assert "too few problems to rule out" in failed(decide(CONFIG, evidence(challenger_pool=unclear)))


def test_every_guard_must_hold_by_its_own_margin():
    config = CONFIG.model_copy(update={"guards": (GuardSet(name="easy", path="easy.jsonl", margin=0.1),)})
    champion, challenger = greedy(180, 10, 0, 10)
    guard = Guard("easy", champion, challenger)
    assert decide(config, evidence(guards=(guard,))).promoted
    strict = config.model_copy(update={"guards": (GuardSet(name="easy", path="easy.jsonl", margin=0.05),)})
    assert "guard_easy 95.0 % -> 90.0 %" in failed(decide(strict, evidence(guards=(guard,))))
    assert "guard 'easy' was not measured" in failed(decide(config, evidence()))
    odd = Guard("easy", champion, {})
    assert "guard 'easy' cannot be compared" in failed(decide(config, evidence(guards=(odd,))))


def test_pass_at_1_as_primary_uses_the_pools():
    config = CONFIG.model_copy(update={"primary": "pass_at_1"})
    generator = np.random.default_rng(0)
    rates = generator.beta(2, 2, 800)

    def drawn(shift: float):
        counts = generator.binomial(16, np.clip(rates + shift, 0, 1))
        return {f"p{i}": (int(c), 16) for i, c in enumerate(counts)}

    better = decide(config, evidence(champion_pool=drawn(0), challenger_pool=drawn(0.05)))
    assert better.promoted
    assert better.primary is not None
    assert better.primary.measure == "mean pass@1"
    assert better.primary.effect == pytest.approx(0.045, abs=0.02)
    assert not decide(config, evidence(champion_pool=drawn(0), challenger_pool=drawn(-0.05))).promoted
    assert not decide(config, evidence(champion_pool=pool(2), challenger_pool=pool(2))).promoted


def test_verdict_survives_json():
    worse = {k: (0, 4) for k in pool(2)}
    for found in (evidence(), evidence(challenger_greedy={}), evidence(challenger_pool=worse)):
        verdict = decide(CONFIG, found)
        text = json.dumps(verdict.to_json(), allow_nan=False)
        assert Verdict.from_json(json.loads(text)) == verdict
        json.dumps(verdict.metrics(), allow_nan=False)


def test_metric_names():
    names = [row["name"] for row in decide(CONFIG, evidence()).metrics()]
    assert len(names) == len(set(names))
    assert {"gate/promoted", "gate/effect", "gate/p", "gate/mde", "gate/pass_at_4", "gate/pass_at_4_low"} <= set(names)


# ---------------------------------------------------------------- how often it errs


def simulate(generator, loss_rate: float, win_rate: float, num: int = 400):
    draw = generator.random(num)
    losses, wins = int((draw < loss_rate).sum()), int((draw > 1 - win_rate).sum())
    champion, challenger = greedy(0, losses, wins, num - losses - wins)
    same = pool(2, 120)
    return Evidence(1, champion, challenger, same, same, training_rows=1)


def test_equal_models_are_promoted_by_chance_at_most_alpha_over_all_looks():
    generator = np.random.default_rng(0)
    config = Gate(
        alpha=0.2, coverage_samples=4, coverage_k=4
    )  # a large alpha makes the rate visible in few simulations
    loops, promoted = 250, 0
    for _ in range(loops):
        looks = (dataclasses.replace(simulate(generator, 0.1, 0.1), look=j) for j in range(1, 7))
        promoted += any(decide(config, e).promoted for e in looks)
    assert 0 < promoted / loops <= 0.2 + 0.02


def test_a_worse_model_is_never_promoted():
    generator = np.random.default_rng(1)
    assert not any(decide(CONFIG, simulate(generator, 0.15, 0.1)).promoted for _ in range(400))


def test_the_gate_has_the_power_its_mde_promises():
    generator = np.random.default_rng(2)
    first = decide(CONFIG, simulate(generator, 0.15, 0.15, 2000)).primary
    assert first is not None
    runs = [
        decide(CONFIG, simulate(generator, 0.15 - first.mde / 2, 0.15 + first.mde / 2, 2000)).promoted
        for _ in range(300)
    ]
    assert 0.72 < np.mean(runs) < 0.88


# ---------------------------------------------------------------- from files


def write(path, solved_by_key, num=1):
    results = []
    for key, right in solved_by_key.items():
        grades = [Grade.CORRECT] * right + [Grade.WRONG] * (num - right)
        candidates = tuple(Candidate((1,), "7", Finish.EOS, answer="7", grade=g) for g in grades)
        results.append(SearchResult(Problem(key, key, "7"), "greedy", candidates, 0, Spend(samples=num), "f", "0/gate"))
    write_results(results, path)


@pytest.fixture
def folders(tmp_path):
    champion, challenger = greedy(20, 5, 60, 215)
    for name, outcomes in (("champion", champion), ("challenger", challenger)):
        (tmp_path / name).mkdir()
        write(tmp_path / name / "greedy-gate.jsonl", outcomes)
        write(tmp_path / name / "greedy-guard-easy.jsonl", {f"g{i}": 1 for i in range(150)})
        write(tmp_path / name / "pool-gate.jsonl", {f"p{i}": 2 for i in range(150)}, num=4)
    return tmp_path / "champion", tmp_path / "challenger"


GUARDED = CONFIG.model_copy(update={"guards": (GuardSet(name="easy", path="easy.jsonl"),)})


def test_evidence_is_gathered_from_files(folders):
    found = gather(GUARDED, *folders, look=1, training_rows=9, min_rows=5)
    assert found.champion_pool["p3"] == (2, 4)
    verdict = decide(GUARDED, found)
    assert verdict.promoted
    assert [c.name for c in verdict.comparisons] == ["pass_at_4", "guard_easy"]
    assert isinstance(verdict.comparisons[0], Comparison)


@pytest.mark.parametrize("name", ["greedy-gate", "greedy-guard-easy", "pool-gate"])
@pytest.mark.parametrize("damage", ["missing", "torn", "short"])
def test_a_damaged_file_rejects(folders, name, damage):
    path = folders[1] / f"{name}.jsonl"
    text = path.read_text()
    if damage == "missing":
        path.unlink()
    else:
        path.write_text(text[:-40] if damage == "torn" else text[: text.rstrip().rindex("\n") + 1])
    verdict = decide(GUARDED, gather(GUARDED, *folders, look=1, training_rows=9, min_rows=5))
    reasons = failed(verdict)
    assert (
        "cannot be read" if damage == "missing" else "not a search result" if damage == "torn" else "different"
    ) in (reasons)


def test_ungraded_answers_are_counted(folders):
    path = folders[1] / "greedy-gate.jsonl"
    lines = path.read_text().splitlines()
    lines[-6:] = [line.replace('"grade":"wrong"', '"grade":"ungraded"') for line in lines[-6:]]
    path.write_text("\n".join(lines) + "\n")
    found = gather(GUARDED, *folders, look=1, training_rows=9, min_rows=5)
    assert found.ungraded_share == pytest.approx(6 / 300)
    assert "2.00 % of the answers are ungraded" in failed(decide(GUARDED, found))
