"""flows.history and flows.findings on a whole fake loop: who was champion when, gains, costs, unfinished rounds."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from flows import findings, history
from flows.history import Efficiency, Figure, load_history
from flows.report import round_metrics
from flows.state import Loop
from search import evaluate
from search.errors import CorruptArtefact, DataError, UserError


@pytest.fixture(scope="module")
def loop_dir(tmp_path_factory, fake_loop) -> Path:
    return fake_loop.write_loop(tmp_path_factory.mktemp("runs"))


@pytest.fixture
def own_loop(tmp_path, loop_dir) -> Path:
    """A copy that a test may change."""
    return Path(shutil.copytree(loop_dir, tmp_path / "fake", symlinks=True))


def test_rounds_come_in_order_each_followed_by_its_controls(loop_dir):
    loaded = load_history(loop_dir)
    names = [(r.name, r.verdict) for r in loaded.rounds]
    assert names[:4] == [
        ("0", "base"),
        ("1", "promoted"),
        ("1 control-bootstrap", "control"),
        ("1 control-random", "control"),
    ]
    assert names[4:] == [("2", "promoted"), ("3", "rejected"), ("4", "promoted")]
    assert [r.kind for r in loaded.controls(1)] == ["control-bootstrap", "control-random"]


def test_a_rejected_round_leaves_the_champion_and_the_next_compares_with_it(loop_dir):
    loaded = load_history(loop_dir)
    rejected, after = loaded.find(3), loaded.find(4)
    assert rejected.before is not None
    assert rejected.before.path == "round-002/distill/model"
    assert rejected.champion == rejected.before
    assert rejected.challenger is not None
    assert rejected.challenger.path == "round-003/distill/model"
    assert rejected.champion_metrics == rejected.before_metrics
    assert rejected.champion_metrics["test/pass_at_1"] != rejected.metrics["test/pass_at_1"]
    assert after.before == rejected.before
    assert after.champion == loaded.champion == after.challenger


def test_controls_compare_with_the_champion_their_round_began_with(loop_dir):
    loaded = load_history(loop_dir)
    for control in loaded.controls(1):
        assert control.before == loaded.base.challenger
        assert control.champion == control.before


def test_the_gain_is_paired_over_the_same_problems(loop_dir):
    r = load_history(loop_dir).find(1)
    old = evaluate.read_outcomes(loop_dir / "round-000/evaluate/greedy-test.jsonl").solved
    new = evaluate.read_outcomes(loop_dir / "round-001/evaluate/greedy-test.jsonl").solved
    won, lost = sum(new[k] and not old[k] for k in old), sum(old[k] and not new[k] for k in old)
    gain = r.gains["accuracy_greedy"]
    assert gain.n == 240
    assert gain.mean == pytest.approx((won - lost) / 240)
    assert gain.se == pytest.approx((((won + lost) - (won - lost) ** 2 / 240) / 239 / 240) ** 0.5)
    assert gain.low < gain.mean < gain.high


def test_pairing_uses_keys_not_the_order_of_lines(own_loop):
    expected = load_history(own_loop).find(2).gains
    path = own_loop / "round-002/evaluate/greedy-test.jsonl"
    path.write_text("".join(reversed(path.read_text().splitlines(keepends=True))))
    assert load_history(own_loop).find(2).gains == expected


def test_efficiency_is_the_share_of_what_search_gained():
    before = {"test/pass_at_1": Figure(0.2), "test/search_at_8": Figure(0.5), "test/search_at_64": Figure(0.9)}
    after = {"test/pass_at_1": Figure(0.35)}
    assert history.distill_efficiency(before, after, 16) == Efficiency(pytest.approx(0.5), None, None, 8, 0.5)
    assert history.distill_efficiency(before, after, 64) == Efficiency(pytest.approx(0.15 / 0.7), None, None, 64, 0.9)
    assert history.distill_efficiency({**before, "test/search_at_8": Figure(0.2)}, after, 16) is None
    assert history.distill_efficiency({}, after, 16) is None


def test_the_report_measures_efficiency_at_the_searchs_own_samples(own_loop):
    """12 is no measured k: it comes from the stored pools."""
    path = own_loop / "round-001/config.json"
    path.write_text(path.read_text().replace('"samples": 16', '"samples": 12'))
    rows = round_metrics(own_loop, 1)
    pool = evaluate.read_pool(own_loop / "round-000/evaluate/pool-test.jsonl", [1, 12], ["pass"])
    one, searched = pool.estimate("pass", 1).value, pool.estimate("pass", 12).value
    then = load_history(own_loop).find(1).metrics["test/pass_at_1"].value
    assert rows["distill/efficiency_samples"] == 12
    assert rows["distill/efficiency_searched"] == pytest.approx(searched)
    assert rows["distill/efficiency"] == pytest.approx((then - one) / (searched - one))


def test_round_metrics_agree_with_the_stages_and_hold_no_time(loop_dir):
    r, rows = load_history(loop_dir).find(2), round_metrics(loop_dir, 2)
    value, se = rows["gain/pass_at_16"]
    assert value == pytest.approx(r.metrics["test/pass_at_16"].value - r.before_metrics["test/pass_at_16"].value)
    assert se > 0
    assert rows["gain/pass_at_16_low"] < value < rows["gain/pass_at_16_high"]
    assert rows["gain/pass_at_16_n"] == 120
    assert rows["distill/efficiency_low"] < rows["distill/efficiency"] < rows["distill/efficiency_high"]
    assert rows["spend/generated_tokens"] == r.total.spend.generated_tokens
    assert rows["spend/flops"] == r.total.spend.flops_ideal
    assert not [name for name in rows if "wall" in name]
    assert round_metrics(loop_dir, 2) == rows
    assert not [name for name in round_metrics(loop_dir, 0) if name.startswith("gain/")]


def test_stored_gains_are_used_instead_of_reading_answers_again(own_loop):
    rows = {"gain/accuracy_greedy": 0.5, "gain/accuracy_greedy_low": 0.4, "gain/accuracy_greedy_high": 0.6}
    lines = [{"name": n, "value": v} | ({"se": 0.05} if n == "gain/accuracy_greedy" else {}) for n, v in rows.items()]
    lines.append({"name": "gain/accuracy_greedy_n", "value": 240})
    (own_loop / "round-001/report").mkdir()
    (own_loop / "round-001/report/metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))
    assert load_history(own_loop).find(1).gains["accuracy_greedy"].mean == 0.5


def test_costs_are_kept_by_stage_and_add_up(loop_dir):
    r = load_history(loop_dir).find(1)
    assert list(r.costs) == ["baseline", "search", "select", "distill", "evaluate", "gate", "difficulty"]
    assert r.total.wall_s == pytest.approx(sum(cost.wall_s for cost in r.costs.values()))
    assert r.costs["search"].tokens == 1_350_000 + 1_350_000 // 4
    assert r.total.spend.samples == 126_000


def test_an_unfinished_round_shows_what_it_has(tmp_path, fake_loop):
    rounds = (*fake_loop.ROUNDS[:2], fake_loop.FakeRound(2, 1.4, "unfinished"))
    loop = fake_loop.write_loop(tmp_path, rounds)
    for stage in ("evaluate", "gate", "difficulty"):
        shutil.rmtree(loop / "round-002" / stage)
    r = load_history(loop).find(2)
    assert r.verdict == "unfinished"
    assert r.gains == {}
    assert r.champion == r.before
    assert list(r.costs) == ["baseline", "search", "select", "distill"]
    assert r.challenger is not None
    assert r.challenger.fingerprint is None


def test_a_gate_verdict_that_is_not_recorded_yet_counts(tmp_path, fake_loop):
    loop = fake_loop.write_loop(tmp_path, fake_loop.ROUNDS[:2])
    state = json.loads((loop / "round-001/record.json").read_text())
    assert state["record"]["verdict"] == "promoted"
    begun = Loop.open(tmp_path, "fake").begin_round(fake_loop.CONFIG)
    shutil.copytree(loop / "round-001/gate", begun.path / "gate")
    assert load_history(loop).find(2).verdict == "promoted"


def test_a_rollback_by_hand_changes_who_the_next_round_meets(tmp_path, fake_loop):
    path = fake_loop.write_loop(tmp_path, (*fake_loop.ROUNDS[:2], fake_loop.ROUNDS[4]))
    Loop.open(tmp_path, "fake").rollback("worse on my own questions")
    loaded = load_history(path)
    assert loaded.champion is not None
    assert loaded.champion.path == "round-001/distill/model"
    assert [r.champion.path for r in loaded.proper if r.champion] == [
        "round-000/base/model",
        "round-001/distill/model",
        "round-002/distill/model",
    ]
    assert "worse on my own questions" in loaded.moves_by_hand[0]


@pytest.mark.parametrize("second", ["2026-01-01T00:00:00+00:00", None])
def test_rounds_within_one_second_are_told_apart(tmp_path, fake_loop, monkeypatch, second):
    if second:
        monkeypatch.setattr("flows.state.utc_now", lambda: second)
    loaded = load_history(fake_loop.write_loop(tmp_path, sizes=fake_loop.Sizes(12, 6, 4)))
    before = [r.before.path[:9] for r in loaded.proper if r.before]
    assert before == ["round-000", "round-001", "round-002", "round-002"]
    assert loaded.moves_by_hand == ()


def test_errors_name_the_way_out(tmp_path, fake_loop):
    with pytest.raises(DataError, match="ratchet round"):
        load_history(tmp_path / "nothing")
    Loop.open(tmp_path, "empty", task="countdown").save()
    with pytest.raises(UserError, match="no round yet: start one with `ratchet round"):
        load_history(tmp_path / "empty")
    loop = fake_loop.write_loop(tmp_path, fake_loop.ROUNDS[:2])
    with pytest.raises(DataError, match="it has: 0, 1"):
        load_history(loop).find(9)
    (loop / "round-001/select/metrics.jsonl").write_text("{broken")
    with pytest.raises(CorruptArtefact, match="select/metrics"):
        load_history(loop)


def test_reading_history_loads_nothing_heavy():
    heavy = "{'torch', 'mlflow', 'prefect', 'matplotlib'}"
    code = f"import sys, flows.history, flows.compare; print({heavy} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


# ---------------------------------------------------------------- findings


def test_bins_stay_those_of_round_0_and_cover_every_pool_problem(loop_dir):
    loaded = load_history(loop_dir)
    first, last = (findings.find(loaded, loaded.find(n)).bins for n in (1, 4))
    assert [(row.low, row.high, row.num, row.base) for row in first] == [
        (row.low, row.high, row.num, row.base) for row in last
    ]
    assert sum(row.num for row in first) == 120
    lows = [row.low for row in first]
    assert lows == sorted(lows, reverse=True)
    for row in last:
        assert row.left is not None
        assert row.left.greedy + row.left.searched + row.left.unsolved == pytest.approx(1)


def test_the_hardest_bin_is_not_zero_by_construction(tmp_path, fake_loop):
    sizes = fake_loop.Sizes(400, 400, 16)
    loop = load_history(fake_loop.write_loop(tmp_path, fake_loop.ROUNDS[:2], sizes))
    hardest = findings.find(loop, loop.find(1)).bins[-1]
    assert hardest.high == 0
    assert hardest.base.value > 0


def test_newly_solved_and_lost_problems_are_counted_and_shown(loop_dir):
    loaded = load_history(loop_dir)
    found = findings.find(loaded, loaded.find(1))
    gain = loaded.find(1).gains["accuracy_greedy"]
    assert (found.num_solved - found.num_lost) / gain.n == pytest.approx(gain.mean)
    assert len(found.solved) == min(found.num_solved, findings.EXAMPLES)
    assert all(example.after.startswith("3+4=7") for example in found.solved)
    assert all(example.before.startswith("3+4=7") for example in found.lost)


@pytest.mark.parametrize("text", ["\x1b[31mred", "a\u202eb", "bell\x07", "null\x00", "a\u200bb", "\ud800"])
def test_clean_leaves_nothing_that_steers_a_terminal_or_reorders_text(text):
    shown = findings.clean(text)
    assert "\N{REPLACEMENT CHARACTER}" in shown
    assert shown.isprintable()


def test_clean_keeps_lines_and_cuts_long_text():
    assert findings.clean("a\n\tb é 漢") == "a\n\tb é 漢"
    assert len(findings.clean("x" * 10_000)) < 800
