"""Whole rounds with the scripted engine: promoted, rejected, resumed, controlled; the same bytes whatever happened."""

import json
import shutil
from pathlib import Path

import pytest

from configs import load
from flows.driver import NothingToDo, read_metrics
from flows.observers import Several, Silent
from flows.runner import Options, improve
from flows.state import Loop
from search.errors import ConfigError, CorruptArtefact, DataError, LockedError, UserError
from search.results import read_results

TINY = Path(__file__).with_name("tiny.txt").read_text().split()  # a smoke round in a second


@pytest.fixture(autouse=True)
def _no_reports(monkeypatch):
    """Plots and pages have their own tests."""
    monkeypatch.setattr("flows.runner.report", lambda loop, record: None)


def config(*overrides: str):
    return load.load("smoke", [*TINY, *overrides])


def a_round(runs: Path, *overrides: str, observer=None, **options):
    return improve(config(*overrides), Options(runs, **options), observer or Silent())


def content(loop: Path) -> dict[str, dict[str, str]]:
    """What every stage of every round holds, by its manifest: times and logs are not in it."""
    return {
        str(path.parent.relative_to(loop)): json.loads(path.read_text())["outputs"]
        for path in sorted(loop.glob("round-*/*/manifest.json"))
    }


class Bomb(Silent):
    """Raises when a stage ends, as a crash would: what was committed stays, the rest is not."""

    def __init__(self, stage: str) -> None:
        self.stage = stage

    def stage_finished(self, folder, name, wall_s, resumed):
        if name == self.stage and not resumed:
            raise KeyboardInterrupt


def test_a_round_makes_the_base_and_a_better_champion(tmp_path):
    outcome = a_round(tmp_path)
    assert [(r.round, r.verdict) for r in outcome.records] == [(0, "base"), (1, "promoted")]
    state = Loop.open(tmp_path, "smoke").state
    assert state.champion is not None
    assert state.champion.round == 1
    assert json.loads((tmp_path / "smoke" / "champion" / "policy" / "scripted.json").read_text())["skill"] == 1
    assert outcome.records[1].metrics["gate/effect"] > 0


def test_a_second_round_searches_other_problems_and_pools_the_rows(tmp_path):
    a_round(tmp_path)
    a_round(tmp_path)
    loop = tmp_path / "smoke"
    first, second = (
        {json.loads(line)["key"] for line in (loop / f"round-00{n}" / "problems" / "search.jsonl").open()}
        for n in (1, 2)
    )
    assert not first & second
    rows = [json.loads(line) for line in (loop / "round-002" / "select" / "rows.jsonl").open()]
    assert {row["round"] for row in rows} == {1, 2}
    assert read_metrics(loop / "round-002" / "select")["data/new_rows"] < len(rows)


def test_a_model_that_is_no_better_is_rejected_and_the_champion_stays(tmp_path):
    outcome = a_round(tmp_path, "engine.skill_per_round=0")
    assert outcome.records[-1].verdict == "rejected"
    assert Loop.open(tmp_path, "smoke").state.champion.round == 0


def test_too_few_rows_reject_the_round_and_keep_what_was_searched(tmp_path):
    outcome = a_round(tmp_path, "select.min_rows=10000")
    assert outcome.records[-1].verdict == "rejected"
    assert "min_rows = 10000" in outcome.records[-1].reason
    assert (tmp_path / "smoke" / "round-001" / "search" / "outcomes.json").exists()


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """What an unbroken call leaves."""
    runs = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("flows.runner.report", lambda loop, record: None)
        a_round(runs)
    return content(runs / "smoke")


@pytest.mark.parametrize("stage", ["problems", "base", "search", "select", "distill", "evaluate", "gate", "difficulty"])
def test_a_round_broken_off_anywhere_ends_byte_equal(tmp_path, whole, stage):
    with pytest.raises(KeyboardInterrupt):
        a_round(tmp_path, observer=Bomb(stage))
    a_round(tmp_path)
    assert content(tmp_path / "smoke") == whole
    assert len(whole) == 4 + 8


def test_search_goes_on_at_the_shard_where_it_stopped(tmp_path):
    seen = []

    class StopAtHalf(Silent):
        def progress(self, name, done, total, **info):
            if name == "search":
                seen.append(done)
                if done > 10 * 8:  # two shards are written, the third is begun
                    raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        a_round(tmp_path, observer=StopAtHalf())
    work = tmp_path / "smoke" / "round-001" / "search.work"
    before = {path.name: path.stat().st_mtime_ns for path in work.glob("shard-*.jsonl")}
    assert sorted(before) == ["shard-00000.jsonl", "shard-00001.jsonl"]
    a_round(tmp_path)
    search = tmp_path / "smoke" / "round-001" / "search"
    assert {name: (search / name).stat().st_mtime_ns for name in before} == before
    assert len(list(search.glob("shard-*.jsonl"))) == 4


def test_an_unfinished_round_keeps_its_configuration(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        a_round(tmp_path, observer=Bomb("search"))
    with pytest.raises(UserError, match=r"search.samples \(8 in the round, 12 now\).*--abandon") as caught:
        a_round(tmp_path, "search.samples=12")
    assert caught.value.exit_code == 2
    assert a_round(tmp_path, abandon=True).records[-1].verdict == "abandoned"
    outcome = a_round(tmp_path, "search.samples=12")
    assert outcome.records[-1].round == 2
    assert outcome.records[-1].config_changes == {"search.samples": [8, 12]}


def test_a_round_that_did_nothing_yet_takes_another_configuration(tmp_path):
    class AtOnce(Silent):
        def stage_started(self, folder, name, expected_s):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        a_round(tmp_path, observer=AtOnce())
    assert a_round(tmp_path, "search.samples=12").records[-1].verdict == "promoted"


def test_two_rounds_of_one_loop_exclude_each_other(tmp_path):
    with (
        Loop.locked(tmp_path, "smoke", "a round", task="countdown"),
        pytest.raises(LockedError, match="is being done by process"),
    ):
        a_round(tmp_path)


def test_controls_never_promote_and_cost_no_look(tmp_path):
    a_round(tmp_path)
    before = Loop.open(tmp_path, "smoke").state
    record = a_round(tmp_path, control="random").records[-1]
    after = Loop.open(tmp_path, "smoke").state
    assert (record.verdict, record.kind) == ("control", "control-random")
    assert after.champion == before.champion
    assert after.gate_looks == before.gate_looks
    rows = [json.loads(line) for line in (tmp_path / "smoke" / record.folder / "select" / "rows.jsonl").open()]
    original = [json.loads(line) for line in (tmp_path / "smoke" / "round-001" / "select" / "rows.jsonl").open()]
    assert len(rows) == len(original)
    assert a_round(tmp_path).records[-1].round == 2


def test_a_control_needs_a_round(tmp_path):
    with pytest.raises(UserError, match="run `ratchet round` first"):
        a_round(tmp_path, control="random")


def test_a_damaged_result_of_the_unfinished_round_is_done_again(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        a_round(tmp_path, observer=Bomb("select"))
    rows = tmp_path / "smoke" / "round-001" / "select" / "rows.jsonl"
    whole = rows.read_bytes()
    rows.write_bytes(whole[:-10])
    a_round(tmp_path)
    assert rows.read_bytes() == whole
    assert (tmp_path / "smoke" / "round-001" / "corrupt" / "select-1").is_dir()


@pytest.mark.parametrize(
    ("stage", "file"),
    [("baseline", "greedy-gate.jsonl"), ("search", "outcomes.json"), ("search", "manifest.json"), ("search", "")],
)
def test_whatever_is_damaged_in_the_unfinished_round_it_ends_the_same(tmp_path, whole, stage, file):
    with pytest.raises(KeyboardInterrupt):
        a_round(tmp_path, observer=Bomb("select"))
    damaged = tmp_path / "smoke" / "round-001" / stage / file
    if file:
        damaged.write_bytes(damaged.read_bytes()[:-2])
    else:
        shutil.rmtree(damaged)
    a_round(tmp_path)
    assert content(tmp_path / "smoke") == whole
    assert (tmp_path / "smoke" / "round-001" / "corrupt" / f"{stage}-1.txt").exists() == bool(file)


@pytest.mark.parametrize(
    ("file", "damage"),
    [
        ("round-000/problems/test.jsonl", "cut"),
        ("round-000/base/manifest.json", "cut"),
        ("round-001/search/shard-00001.jsonl", "cut"),
        ("round-001/search", "remove"),
        ("round-001/distill/model/scripted.json", "cut"),
    ],
)
def test_damage_in_a_finished_round_is_named_with_the_way_out(tmp_path, file, damage):
    a_round(tmp_path)
    path = tmp_path / "smoke" / file
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:-2])
    else:
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    with pytest.raises(CorruptArtefact, match=r"is finished and is not done again: restore .* loop.name") as caught:
        a_round(tmp_path)
    assert str(path) in str(caught.value)
    assert Loop.open(tmp_path, "smoke").state.next_round == 2


def test_giving_round_0_up_begins_the_loop_anew(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        a_round(tmp_path, observer=Bomb("evaluate"))
    assert "begins the loop anew" in (a_round(tmp_path, abandon=True).nothing or "")
    outcome = a_round(tmp_path, "search.samples=12")
    assert [(r.round, r.verdict) for r in outcome.records] == [(0, "base"), (1, "promoted")]


def test_giving_up_after_the_gate_spoke_costs_the_look(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        a_round(tmp_path, observer=Bomb("distill"))
    a_round(tmp_path, abandon=True)
    assert Loop.open(tmp_path, "smoke").state.gate_looks == {}
    with pytest.raises(KeyboardInterrupt):
        a_round(tmp_path, observer=Bomb("gate"))
    record = a_round(tmp_path, abandon=True).records[-1]
    assert Loop.open(tmp_path, "smoke").state.gate_looks == {record.gate_set: 1} == {"fresh-002": 1}


def test_a_round_whose_start_is_damaged_can_still_be_given_up(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        a_round(tmp_path, observer=Bomb("search"))
    started = tmp_path / "smoke" / "round-001" / "started.json"
    started.write_text("{")
    with pytest.raises(CorruptArtefact, match=r"started.json cannot be used .*--abandon"):
        a_round(tmp_path)
    assert a_round(tmp_path, abandon=True).records[-1].verdict == "abandoned"


def test_a_control_can_be_given_up_and_run_again(tmp_path):
    a_round(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        a_round(tmp_path, control="random", observer=Bomb("select"))
    record = a_round(tmp_path, control="random", abandon=True).records[-1]
    assert (record.kind, record.verdict) == ("control-random", "abandoned")
    record = a_round(tmp_path, control="random").records[-1]
    assert (record.folder, record.verdict) == ("round-001-control-random", "control")
    rounds = Loop.open(tmp_path, "smoke").state.rounds
    assert [(r.folder, r.verdict) for r in rounds[2:]] == [("round-001-control-random", "control")]
    with pytest.raises(DataError, match="is finished already"):
        a_round(tmp_path, control="random")
    assert a_round(tmp_path).records[-1].round == 2
    (tmp_path / "smoke" / "loop.json").unlink()
    (tmp_path / "smoke" / "loop.json.bak").unlink()
    with Loop.locked(tmp_path, "smoke", "a test", task="countdown") as rebuilt:
        assert rebuilt.state.find(record.folder).verdict == "control"


def rows_of(round_folder: Path) -> list[dict]:
    return [json.loads(line) for line in (round_folder / "select" / "rows.jsonl").open()]


def test_the_random_control_draws_on_the_problems_of_all_rounds(tmp_path):
    a_round(tmp_path)
    a_round(tmp_path)
    folder = tmp_path / "smoke" / a_round(tmp_path, control="random").records[-1].folder
    original = rows_of(tmp_path / "smoke" / "round-002")
    assert {row["round"] for row in rows_of(folder)} == {row["round"] for row in original} == {1, 2}
    assert len(rows_of(folder)) == len(original)
    assert not (folder / "search").exists(), "best-of-N drew plain samples: they serve as they are"


def test_the_control_of_a_round_that_used_the_last_searches_alone_does_so_too(tmp_path):
    a_round(tmp_path)
    a_round(tmp_path, "select.rounds=last")
    folder = tmp_path / "smoke" / a_round(tmp_path, "select.rounds=last", control="random").records[-1].folder
    assert {row["round"] for row in rows_of(folder)} == {2}


BEAM = ("search.strategy=beam(width=2)", "verifier.type=oracle", "verifier.parameters=1000")


def test_the_control_of_a_tree_search_never_sees_its_answers(tmp_path):
    a_round(tmp_path)  # best-of-N
    a_round(tmp_path, *BEAM)
    loop = tmp_path / "smoke"
    record = a_round(tmp_path, *BEAM, control="random").records[-1]
    control = loop / record.folder
    assert [p.name for p in sorted((control / "search").glob("round-*"))] == ["round-002"]
    manifest = json.loads((control / "search" / "manifest.json").read_text())
    searched = json.loads((loop / "round-002" / "search" / "manifest.json").read_text())
    assert manifest["inputs"]["policy@002"] == searched["inputs"]["policy"]
    results = list(read_results(control / "search" / "round-002"))
    assert len(results) == 20
    assert all(not c.step_ends for r in results for c in r.candidates)
    spent, arm = (
        json.loads((f / "search" / "spend.json").read_text())["flops_ideal"] for f in (control, loop / "round-002")
    )
    assert spent == pytest.approx(arm, rel=0.03)
    assert {row["round"] for row in rows_of(control)} == {1, 2}


def test_the_control_of_an_earlier_tree_search_uses_the_policy_it_had(tmp_path):
    a_round(tmp_path, *BEAM)
    a_round(tmp_path, *BEAM)
    loop = tmp_path / "smoke"
    control = loop / a_round(tmp_path, *BEAM, control="random").records[-1].folder
    for number in (1, 2):
        (drawn,) = {r.model for r in read_results(control / "search" / f"round-00{number}")}
        (searched,) = {r.model for r in read_results(loop / f"round-00{number}" / "search")}
        assert drawn == searched
    assert len({r.model for n in (1, 2) for r in read_results(control / "search" / f"round-00{n}")}) == 2


def test_a_round_with_a_tree_search_makes_a_champion_and_resumes_byte_equal(tmp_path):
    assert a_round(tmp_path / "whole", *BEAM).records[-1].verdict == "promoted"
    with pytest.raises(KeyboardInterrupt):
        a_round(tmp_path / "broken", *BEAM, observer=Bomb("search"))
    a_round(tmp_path / "broken", *BEAM)
    assert content(tmp_path / "broken" / "smoke") == content(tmp_path / "whole" / "smoke")


def test_a_search_that_cannot_be_run_is_refused_before_anything_is_written(tmp_path):
    with pytest.raises(ConfigError, match="did you mean beam"):
        a_round(tmp_path, "search.strategy=baem")
    assert list(tmp_path.iterdir()) == []


def test_problems_left_unfinished_by_the_cap_come_again(tmp_path):
    a_round(tmp_path, "search.max_tokens=900", "select.min_rows=1")
    loop = tmp_path / "smoke"
    done = json.loads((loop / "round-001" / "search" / "outcomes.json").read_text())
    assert 0 < len(done) < 20
    assert read_metrics(loop / "round-001" / "search")["search/unfinished"] == 20 - len(done)
    a_round(tmp_path, control="random")
    a_round(tmp_path)
    keys = {json.loads(line)["key"] for line in (loop / "round-002" / "problems" / "search.jsonl").open()}
    assert not keys & done.keys()


def test_a_report_that_fails_neither_undoes_the_round_nor_blocks_the_next(tmp_path, monkeypatch):
    def broken(loop, record):
        raise OSError("no font")

    monkeypatch.setattr("flows.runner.report", broken)
    with pytest.warns(UserWarning, match=r"no report of round-00\d: OSError: no font") as told:
        outcomes = [a_round(tmp_path), a_round(tmp_path)]
    assert [outcome.records[-1].verdict for outcome in outcomes] == ["promoted", "promoted"]
    tried = [str(warning.message).partition(":")[0][-3:] for warning in told]
    assert tried == ["000", "001", "000", "001", "002"], "the second call tries again"


def test_a_configuration_of_another_version_does_not_end_the_round(tmp_path):
    a_round(tmp_path)
    path = tmp_path / "smoke" / "round-001" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"gone": 1}))
    changes = a_round(tmp_path).records[-1].config_changes
    assert "round-001/config.json cannot be read" in changes["unknown"]


def test_nothing_new_and_nothing_unsolved_records_no_round(tmp_path, monkeypatch):
    a_round(tmp_path)

    def nothing(run):
        raise NothingToDo("nothing new and nothing unsolved")

    monkeypatch.setattr("flows.driver.run_improvement", nothing)
    outcome = a_round(tmp_path)
    assert outcome.nothing == "nothing new and nothing unsolved"
    assert Loop.open(tmp_path, "smoke").state.next_round == 2
    assert not (tmp_path / "smoke" / "round-002").exists()


def test_a_listener_that_fails_is_heard_no_more_and_harms_nothing(tmp_path):
    class Broken(Silent):
        def stage_started(self, folder, name, expected_s):
            raise RuntimeError("no terminal")

    with pytest.warns(UserWarning, match="Broken stopped listening: no terminal"):
        outcome = a_round(tmp_path, observer=Several([Broken(), Silent()]))
    assert outcome.records[-1].verdict == "promoted"
