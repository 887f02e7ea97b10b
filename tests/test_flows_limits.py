"""flows.limits: every verdict from hand-made numbers, and its way into metrics, page, summary and terminal."""

import json
import math
from pathlib import Path

import pytest

from configs import load
from flows import session
from flows.history import Figure, load_history
from flows.limits import Limits, find_limits, from_metrics, of_distillation, of_search, of_verifier
from flows.observers import Silent
from flows.record import CURVES
from flows.report import round_metrics, write_round_report
from flows.runner import Options, improve
from search.types import Candidate, Finish, Grade, Problem, SearchResult, Spend
from search.verifiers.health import Health, measure

TINY = Path(__file__).with_name("tiny.txt").read_text().split()


def limits(verifier=None, search=None, distillation=None, se: float | None = 0.01) -> Limits:
    gaps = {"verifier_gap": verifier, "search_gap": search, "distillation_gap": distillation}
    known = {name: Figure(value, se) for name, value in gaps.items() if value is not None}
    return Limits(Figure(16), **known)


def health(right: int, wrong_ahead: int, num: int = 100) -> Health:
    """Two samples a problem: `right` problems hold a right answer; `wrong_ahead` times the other is preferred."""

    def pool(i: int) -> SearchResult:
        scores = (0.2, 0.8) if i < wrong_ahead else (0.8, 0.2)
        grades = (Grade.CORRECT if i < right else Grade.WRONG, Grade.WRONG)
        candidates = tuple(
            Candidate((1, 2), f"{n}", Finish.EOS, answer=f"{n}", grade=grade, step_scores=(score,), score=score)
            for n, (grade, score) in enumerate(zip(grades, scores, strict=True))
        )
        return SearchResult(Problem(f"p{i}", "?", "0"), "pool(2)", candidates, None, Spend(), "m", "0/x/y")

    return measure(map(pool, range(num)))


# ---------------------------------------------------------------- verdicts


@pytest.mark.parametrize(
    ("gaps", "limited_by"),
    [
        ((0.34, 0.05, 0.02), "verifier"),
        ((0.02, 0.33, 0.05), "search"),
        ((0.02, 0.05, 0.33), "distillation"),
        ((0.02, 0.33, -0.05), "search"),
        ((None, 0.05, 0.33), "distillation"),
        ((0.30, 0.05, None), "verifier"),
        ((0.30, 0.32, 0.02), None),  # the two largest are 1.4 standard errors apart
        ((0.30, 0.33, 0.02), "search"),  # 2.1
        ((0.0, 0.0, 0.0), None),
        ((0.30, None, None), None),
        ((None, None, None), None),
    ],
)
def test_the_largest_gap_limits_where_it_exceeds_the_others_beyond_chance(gaps, limited_by):
    assert limits(*gaps).limited_by == limited_by


def test_without_errors_nothing_is_told_apart():
    assert limits(0.5, 0.1, 0.1, se=None).limited_by is None


def test_the_sentence_says_what_limits_first():
    found = Limits(
        samples=Figure(64),
        verifier_gap=Figure(0.34, 0.02),
        contained=Figure(0.95),
        chosen=Figure(0.61),
        majority=Figure(0.3),
        search_gap=Figure(0.05, 0.01),
        search_slope=Figure(0.01, 0.002),
        greedy=Figure(0.4),
        distillation_gap=Figure(-0.02, 0.03),
        searched_before=Figure(0.6),
        greedy_after=Figure(0.62),
    )
    assert found.sentence() == (
        "The verifier limits this loop: of 95.0 % that 64 samples of the policy hold, the verifier chooses 61.0 % (gap "
        "34.0 ±3.9 points, majority 30.0 %, greedy 40.0 %); 64 samples hold no right answer to 5.0 ±2.0 % of the "
        "problems, and a doubling finds 1.0 ±0.4 points of it; 64 samples of the champion before held a right answer "
        "to 60.0 %, the distilled model's own answer is right for 62.0 % (no gap)."
    )
    assert limits(None, 0.3, 0.1).sentence().startswith("Search limits this loop: 16 samples hold no right answer")
    assert limits(None, 0.1, 0.3).sentence().startswith("Distillation limits this loop: ")
    assert limits(0.1, 0.1, 0.1).sentence().startswith("What limits this loop cannot be told apart: ")
    assert limits(None, 0.3).sentence() == ""


def test_metrics_come_back_as_they_were():
    found = limits(0.3, 0.1, 0.05)
    rows = found.metrics()
    assert rows["limits/verifier_gap"] == (0.3, 0.01)
    assert rows["limits/limited_by"] == 1
    assert limits(0.1, 0.3).metrics()["limits/limited_by"] == 2
    assert limits(0.1, 0.1, 0.3).metrics()["limits/limited_by"] == 3
    assert limits(0.3, 0.3).metrics()["limits/limited_by"] == 0
    assert "limits/limited_by" not in limits(None, 0.3).metrics()
    figures = {name: Figure(*row) if isinstance(row, tuple) else Figure(row) for name, row in rows.items()}
    assert from_metrics(figures) == found
    assert from_metrics({}) is None
    assert "limits/" in CURVES


# ---------------------------------------------------------------- gaps


def test_the_verifier_gap_is_what_it_fails_to_choose():
    found = of_verifier(health(right=80, wrong_ahead=10), 2)
    assert found["contained"].value == pytest.approx(0.8)
    assert found["chosen"].value == pytest.approx(0.7)
    assert found["verifier_gap"].value == pytest.approx(0.1)
    assert found["verifier_gap"].se == pytest.approx(math.sqrt(0.1 * 0.9 / 99))
    assert of_verifier(health(right=80, wrong_ahead=0), 2)["verifier_gap"].value == 0


def test_the_search_gap_and_what_a_doubling_finds():
    counts = {f"p{i}": (4 * (i < 5), 4) for i in range(9)} | {"failed": (0, 0)}
    found = of_search(counts, 1)
    assert found["search_gap"].value == pytest.approx(0.5)
    assert found["search_slope"].value == 0  # what one sample misses, four miss too
    rare = of_search({f"p{i}": (1, 4) for i in range(10)}, 1)
    assert rare["search_gap"].value == pytest.approx(0.75)
    assert rare["search_slope"].value == pytest.approx((1 - 0.25) / 2)
    last = of_search({f"p{i}": (1, 4) for i in range(10)}, 4)  # no larger pool: the last doubling
    assert last["search_slope"].value == pytest.approx(1 - 0.5)


def test_the_distillation_gap_is_paired():
    before = {f"p{i}": (2 * (i < 8), 2) for i in range(10)}
    greedy = {f"p{i}": float(i < 5) for i in range(20)}
    found = of_distillation(before, greedy, 2)
    assert found["searched_before"].value == pytest.approx(0.8)
    assert found["greedy_after"].value == pytest.approx(0.5)
    assert found["distillation_gap"].value == pytest.approx(0.3)
    assert found["distillation_gap"].se == pytest.approx(math.sqrt(0.3 * 0.7 / 9))
    assert of_distillation(before, {}, 2) == {}


# ---------------------------------------------------------------- in a round


@pytest.fixture
def loop_dir(tmp_path, fake_loop) -> Path:
    return fake_loop.write_loop(tmp_path, fake_loop.ROUNDS[:3])


def with_verifier(loop_dir: Path, fake_loop, *, usable: bool = True) -> None:
    stage = loop_dir / "round-001/verifier"
    fake_loop.write_json(stage / "health.json", health(right=80, wrong_ahead=60).to_json())
    fake_loop.write_json(stage / "report.json", {"usable": usable})


def test_a_round_without_a_verifier_compares_search_and_distillation(loop_dir):
    history = load_history(loop_dir)
    found = find_limits(history.find(1))
    assert found is not None
    assert list(found.gaps) == ["search", "distillation"] or list(found.gaps) == ["distillation", "search"]
    assert found.samples.value == 16
    assert found.search_gap is not None
    pass_at_16 = history.find(1).metrics["test/pass_at_16"]
    assert found.search_gap.value == pytest.approx(1 - pass_at_16.value)
    base = find_limits(history.find(0))
    assert base is not None
    assert list(base.gaps) == ["search"]
    assert base.sentence() == ""
    assert find_limits(history.find(1, "control-random")) is None


def test_a_verifier_sets_the_number_of_samples(loop_dir, fake_loop):
    with_verifier(loop_dir, fake_loop)
    found = find_limits(load_history(loop_dir).find(1))
    assert found is not None
    assert found.samples.value == 2  # its health was measured on two answers a problem
    assert found.verifier_gap == Figure(pytest.approx(0.6), pytest.approx(math.sqrt(0.6 * 0.4 / 99)))  # type: ignore[arg-type]


def test_a_verifier_that_is_not_used_limits_nothing(loop_dir, fake_loop):
    with_verifier(loop_dir, fake_loop, usable=False)
    found = find_limits(load_history(loop_dir).find(1))
    assert found is not None
    assert "verifier" not in found.gaps


def test_after_a_rejection_the_old_champion_is_searched(tmp_path, fake_loop):
    rejected = fake_loop.FakeRound(1, 1.0, "rejected", "no significant gain")
    loop = fake_loop.write_loop(tmp_path, (fake_loop.ROUNDS[0], rejected))
    history = load_history(loop)
    found = find_limits(history.find(1))
    assert found is not None
    assert found.search_gap is not None
    assert found.search_gap.value == pytest.approx(1 - history.base.metrics["test/pass_at_16"].value)
    assert found.greedy_after is not None


def test_nothing_measured_is_left_out(loop_dir):
    for round_name in ("round-000", "round-001"):
        for path in (loop_dir / round_name / "evaluate").glob("*-test.jsonl"):
            path.unlink()
    assert find_limits(load_history(loop_dir).find(1)) is None
    assert not [name for name in round_metrics(loop_dir, 1) if name.startswith("limits/")]


def test_the_page_the_summary_and_the_terminal_say_it(loop_dir, fake_loop, capsys):
    with_verifier(loop_dir, fake_loop)
    out = loop_dir / "round-001/report"
    write_round_report(loop_dir, 1, out)
    history = load_history(loop_dir)
    found = from_metrics(history.find(1).metrics)
    assert found is not None
    assert found.sentence()
    assert found.sentence() in (out / "report.html").read_text(encoding="utf-8").replace("&#39;", "'")
    assert found.sentence() in (out / "summary.md").read_text(encoding="utf-8")
    record = next(r for r in session.Loop.open(loop_dir.parent, "fake").state.rounds if r.folder == "round-001")
    session._summary(loop_dir, record)
    assert found.sentence() in capsys.readouterr().out


def test_a_smoke_round_measures_it(tmp_path):
    improve(load.load("smoke", TINY), Options(tmp_path), Silent())
    rows = [json.loads(line) for line in (tmp_path / "smoke/round-001/report/metrics.jsonl").open()]
    found = {row["name"]: row["value"] for row in rows}
    assert 0 <= found["limits/search_gap"] <= 1
    assert found["limits/samples"] == 4
    assert "limits/distillation_gap" in found
    assert "limits/verifier_gap" not in found
    assert found["limits/limited_by"] in (0, 2, 3)
    base = [json.loads(line)["name"] for line in (tmp_path / "smoke/round-000/report/metrics.jsonl").open()]
    assert "limits/search_gap" in base
