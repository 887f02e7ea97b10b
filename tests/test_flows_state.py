"""The loop's folder: records, champion, looks, damage, rebuilding."""

import dataclasses
import json
import os
import shutil
import subprocess

import pytest

from flows.artefacts import StageDir, StageKey, atomic_write
from flows.history import load_history
from flows.locks import lock
from flows.state import Bundle, Loop, LoopState, RoundRecord, loop_path, rebuild
from search.errors import CorruptArtefact, DataError, DiskError, LockedError, UserError

CONFIG = '{"loop": {"name": "toy"}}\n'


@pytest.fixture
def runs(tmp_path):
    return tmp_path / "runs"


def model(loop: Loop, folder, text: str) -> Bundle:
    """Commit a stage with a policy and a table; the bundle of both."""
    key = StageKey("distill", "v1", text)
    stage = StageDir(folder.path, "distill")
    if stage.committed() is None:
        out = stage.begin(key)
        (out / "model").mkdir(exist_ok=True)
        atomic_write(out / "model" / "config.json", json.dumps({"weights": text}))
        atomic_write(out / "table.json", "{}")
        stage.commit(key)
    return Bundle(folder.round, loop.part(stage.path / "model"), table=loop.part(stage.path / "table.json"))


def do_round(loop: Loop, verdict: str = "promoted", *, gate_set: str | None = "fresh", **options) -> Bundle:
    folder = loop.begin_round(CONFIG)
    bundle = model(loop, folder, f"weights {folder.round}")
    verdict = "base" if folder.round == 0 else verdict
    record = RoundRecord(folder.round, verdict, f"because {folder.round}", gate_set=gate_set, **options)
    loop.finish(folder, record, bundle if verdict in ("base", "promoted") else None)
    return bundle


@pytest.fixture
def loop(runs):
    with Loop.locked(runs, "toy", "round 0", task="countdown") as opened:
        do_round(opened, gate_set=None)
        yield opened


def reopened(loop: Loop) -> Loop:
    return Loop.open(loop.path.parent, loop.path.name)


# ---------------------------------------------------------------- folder


@pytest.mark.parametrize("name", ["../x", "a/b", "", ".", "..", "A", "-x", "x" * 65, "a b", "a\n"])
def test_names_that_are_not_plain_folders_are_refused(runs, name):
    with pytest.raises(DataError, match="loop name"):
        loop_path(runs, name)


def test_a_loop_that_is_a_link_is_refused(runs, tmp_path):
    runs.mkdir()
    (tmp_path / "elsewhere").mkdir()
    (runs / "toy").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(DataError, match="--runs-dir"):
        Loop.open(runs, "toy", task="countdown")


def test_reading_makes_nothing(runs):
    with pytest.raises(DataError, match="no loop 'toy'"):
        Loop.open(runs, "toy")
    with pytest.raises(DataError, match="no loop 'toy'"), Loop.locked(runs, "toy", "solve"):
        raise AssertionError
    assert not runs.exists()


def test_one_writer(loop):
    with pytest.raises(LockedError, match="round 0 of loop toy"), Loop.locked(loop.path.parent, "toy", "round 1"):
        raise AssertionError
    with pytest.raises(LockedError), loop.lock("again"):
        raise AssertionError


def test_another_task_needs_another_loop(loop):
    with pytest.raises(DataError, match="has task 'countdown', not 'arithmetic'"):
        Loop.open(loop.path.parent, "toy", task="arithmetic")


# ---------------------------------------------------------------- rounds


def test_round_zero_makes_the_champion(loop):
    state = reopened(loop).state
    assert state.champion is not None
    assert state.champion.round == 0
    assert state.champion.policy.path == "round-000/distill/model"
    assert state.previous is None
    assert [m.action for m in state.moves] == ["base"]
    assert state.next_round == 1


def test_a_promotion_moves_and_a_rejection_does_not(loop):
    one = do_round(loop)
    do_round(loop, "rejected")
    state = reopened(loop).state
    assert state.champion == one
    assert state.previous is not None
    assert state.previous.round == 0
    assert [r.verdict for r in state.rounds] == ["base", "promoted", "rejected"]
    assert state.rounds[1].config_sha
    assert state.rounds[1].started_utc <= state.rounds[1].finished_utc
    assert state.rounds[1].started_utc.endswith("+00:00")


def test_a_round_resumes_with_its_own_configuration(loop):
    assert loop.unfinished() is None
    folder = loop.begin_round('{"alpha": 1}\n')
    found = reopened(loop).unfinished()
    assert found == folder
    assert found.config_json() == '{"alpha": 1}\n'
    (folder.path / "config.json").write_text('{"alpha": 2}\n')
    with pytest.raises(CorruptArtefact, match="--abandon"):
        found.config_json()


def test_a_folder_without_configuration_has_not_begun(loop):
    (loop.path / "round-001").mkdir()
    (loop.path / "round-notes").mkdir()
    assert loop.unfinished() is None
    assert loop.begin_round(CONFIG).round == 1


def test_abandon_records_it_and_counts_the_look(loop):
    folder = loop.begin_round(CONFIG)
    record = loop.abandon("by hand", gate_set="fresh")
    assert record.folder == folder.path.name
    assert loop.unfinished() is None
    assert loop.state.look("fresh") == 2
    assert loop.state.next_round == 2
    with pytest.raises(UserError, match="no unfinished round"):
        loop.abandon("again")


def test_controls_are_rounds_of_their_own(loop):
    do_round(loop)
    folder = loop.begin_round(CONFIG, kind="control-random", round=1)
    assert folder.path.name == "round-001-control-random"
    assert loop.unfinished() is None
    assert loop.unfinished("control") == loop.unfinished("control-random") == folder
    loop.finish(folder, RoundRecord(1, "control", "equal rows", kind="control-random", counters={"train": 5}))
    assert loop.state.next_round == 2
    assert loop.state.total("train") == 0
    with pytest.raises(DataError, match="finished already"):
        loop.begin_round(CONFIG, kind="control-random", round=1)


def test_counters_add_up(loop):
    do_round(loop, counters={"train": 100})
    do_round(loop, "rejected", counters={"train": 50, "recycled": 1})
    assert reopened(loop).state.total("train") == 150
    assert loop.state.total("recycled") == 1


def test_after_a_rejection_the_old_policy_may_have_a_new_verifier(loop):
    first = loop.state.champion
    do_round(loop)
    promoted = loop.state.champion
    folder = loop.begin_round(CONFIG)
    atomic_write(folder.path / "verifier.json", "{}")
    refitted = dataclasses.replace(promoted, verifier=loop.part(folder.path / "verifier.json"))
    loop.finish(folder, RoundRecord(2, "rejected", "no gain", gate_set="fresh"), refitted)
    state = reopened(loop).state
    assert state.champion == refitted
    assert (state.champion.round, state.champion.policy) == (1, promoted.policy)
    assert state.previous == first, "a rollback leaves the policy, not its verifier"
    assert state.look("fresh") == 2, "the gate goes on counting"
    assert state.moves[-1].action == "refit"
    history = load_history(loop.path)
    assert not history.moves_by_hand
    assert history.champion.path == promoted.policy.path
    assert rebuild(loop.path, "toy", "countdown") == state


def test_looks_count_per_set_until_a_promotion(loop):
    do_round(loop, "rejected", gate_set="file")
    do_round(loop, "rejected", gate_set="file")
    assert reopened(loop).state.look("file") == 3
    assert loop.state.look("fresh-3") == 1
    do_round(loop, gate_set="file")
    assert reopened(loop).state.look("file") == 1
    loop.count_test_look()
    assert reopened(loop).state.test_looks == 1


def test_a_changed_model_is_not_promoted(loop):
    folder = loop.begin_round(CONFIG)
    bundle = model(loop, folder, "weights 1")
    (folder.path / "distill" / "model" / "config.json").write_text('{"weights": "WEIGHTS 1"}')
    with pytest.raises(CorruptArtefact, match="policy"):
        loop.finish(folder, RoundRecord(1, "promoted", "better"), bundle)
    assert reopened(loop).state.champion == loop.state.champion
    assert loop.unfinished() == folder


# ---------------------------------------------------------------- champion


def test_rollback_exchanges_and_is_recorded(loop):
    base = loop.state.champion
    with pytest.raises(UserError, match="no previous champion"):
        loop.rollback("why not")
    one = do_round(loop, gate_set="file")
    do_round(loop, "rejected", gate_set="file")
    assert loop.rollback("worse in use") == base
    state = reopened(loop).state
    assert (state.champion, state.previous) == (base, one)
    assert state.moves[-1].reason == "worse in use"
    assert state.look("file") == 2, "only the gate starts the looks anew"
    assert loop.rollback("better after all") == one


def test_the_champion_is_not_moved_by_hand_in_a_round(loop):
    one = do_round(loop)
    loop.begin_round(CONFIG)
    for move in (lambda: loop.promote(one, "x"), lambda: loop.rollback("x")):
        with pytest.raises(UserError, match="round-002 is unfinished"):
            move()


def test_promote_by_hand(loop):
    folder = loop.begin_round(CONFIG)
    bundle = model(loop, folder, "weights 1")
    loop.finish(folder, RoundRecord(1, "rejected", "too close", gate_set="file"))
    loop.promote(bundle, "I want it")
    assert reopened(loop).state.champion == bundle
    assert loop.state.look("file") == 2


def test_the_link_leads_to_every_part_and_survives_a_move(loop, tmp_path):
    do_round(loop)
    champion = loop.path / "champion"
    assert json.loads((champion / "policy" / "config.json").read_text()) == {"weights": "weights 1"}
    assert (champion / "table.json").read_text() == "{}"
    readme = (champion / "README.md").read_text()
    assert "vllm serve toy/champion/policy" in readme
    assert "from round 1" in readme
    shutil.move(loop.path, tmp_path / "moved")
    assert (tmp_path / "moved" / "champion" / "policy" / "config.json").exists()
    again = Loop.open(tmp_path, "moved")
    assert again.state.champion is not None
    again.verify(again.state.champion)


def test_an_adapter_is_served_as_one(loop):
    folder = loop.begin_round(CONFIG)
    stage = StageDir(folder.path, "distill")
    key = StageKey("distill", "v1", "x")
    out = stage.begin(key)
    (out / "model").mkdir()
    atomic_write(out / "model" / "adapter_config.json", "{}")
    stage.commit(key)
    loop.finish(folder, RoundRecord(1, "promoted", "x"), Bundle(1, loop.part(stage.path / "model")))
    assert "--lora-modules champion=toy/champion/policy" in (loop.path / "champion" / "README.md").read_text()


def test_a_folder_in_the_links_place_is_not_deleted(loop):
    (loop.path / "champion").unlink()
    (loop.path / "champion").mkdir()
    with pytest.raises(DiskError, match="move it away"):
        do_round(loop)
    assert (loop.path / "champion").is_dir()


def test_parts_lie_inside_the_loop(loop, tmp_path):
    (tmp_path / "model").mkdir()
    with pytest.raises(CorruptArtefact, match="not inside"):
        loop.part(tmp_path / "model")
    (loop.path / "sneaky").symlink_to(tmp_path / "model")
    with pytest.raises(CorruptArtefact, match="not inside"):
        loop.part(loop.path / "sneaky")


# ---------------------------------------------------------------- damage


def test_the_state_survives_json(loop):
    do_round(loop, metrics={"test/accuracy": 0.5, "nested": {"a": [1, 2]}}, models={"policy": "9f"})
    row = json.loads(json.dumps(loop.state.to_json()))
    assert LoopState.from_json(row) == loop.state


def test_no_flipped_bit_in_loop_json_passes(loop):
    do_round(loop)
    path = loop.path / "loop.json"
    data = path.read_bytes()
    for position in range(0, len(data), 7):
        damaged = bytearray(data)
        damaged[position] ^= 1 << (position % 8)
        path.write_bytes(damaged)
        try:
            assert reopened(loop).state == loop.state  # the flip hit white space
        except CorruptArtefact as error:
            assert "`ratchet round` rebuilds it" in str(error)  # noqa: PT017 - either is right


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff\xfe", None], ids=repr)
@pytest.mark.parametrize("copy", [True, False], ids=["with copy", "without copy"])
def test_a_damaged_state_is_rebuilt(loop, runs, content, copy):
    do_round(loop, gate_set="file", counters={"train": 7}, metrics={"x": 0.5})
    do_round(loop, "rejected", gate_set="file")
    before = loop.state
    path = loop.path / "loop.json"
    path.unlink()
    if content is not None:
        path.write_bytes(content)
    if not copy:
        (loop.path / "loop.json.bak").write_bytes(b"damaged too")
    with pytest.raises(CorruptArtefact, match="rebuilds it"):
        Loop.open(runs, "toy")
    after = Loop.open(runs, "toy", repair=True).state
    assert after.rounds == before.rounds
    assert (after.champion, after.previous) == (before.champion, before.previous)
    assert (after.gate_looks, after.task) == (before.gate_looks, "countdown")
    assert reopened(loop).state == after
    assert bool(list(loop.path.glob("loop.json.damaged-*.txt"))) == (content is not None)


def test_a_copy_one_round_behind_is_brought_up_to_date(loop, runs):
    old = (loop.path / "loop.json").read_bytes()
    do_round(loop)
    (loop.path / "loop.json.bak").write_bytes(old)
    (loop.path / "loop.json").write_bytes(b"")
    assert Loop.open(runs, "toy", repair=True).state.rounds == loop.state.rounds


def test_a_newer_version_is_not_taken_for_damage(loop, runs):
    from flows.artefacts import sha256_json

    row = loop.state.to_json() | {"version": 99}
    del row["checksum"]
    (loop.path / "loop.json").write_text(json.dumps(row | {"checksum": sha256_json(row)}))
    for repair in (False, True):
        with pytest.raises(DataError, match="update it"):
            Loop.open(runs, "toy", repair=repair)


def test_the_lock_holder_puts_right_what_a_crash_left(runs):
    with Loop.locked(runs, "toy", "round 0", task="countdown") as loop:
        do_round(loop)
        do_round(loop)
        assert loop.state.previous is not None
        old = f"bundles/{loop.state.previous.id}"
        current = os.readlink(loop.path / "champion")
    (loop.path / "champion").unlink()
    (loop.path / "champion").symlink_to(old)
    (loop.path / "loop.json.bak").unlink()
    gone = subprocess.Popen(["true"])
    gone.wait()
    for folder in (loop.path, loop.path / "round-001"):
        (folder / f".x.json.tmp-{gone.pid}-1").write_text("half")
    (loop.path / f".bundle.tmp-{gone.pid}").mkdir()
    (loop.path / f".used.tmp-{os.getpid()}-1").write_text("another process is writing this")
    with Loop.locked(runs, "toy", "status"):
        pass
    assert os.readlink(loop.path / "champion") == current
    assert (loop.path / "loop.json.bak").read_bytes() == (loop.path / "loop.json").read_bytes()
    assert [p.name for p in loop.path.rglob(".*.tmp-*")] == [f".used.tmp-{os.getpid()}-1"]


def test_the_lock_is_free_after_use(runs):
    with Loop.locked(runs, "toy", "round 0", task="countdown"):
        pass
    with lock(runs / "toy" / ".lock", "x"):
        pass
    assert Loop.open(runs, "toy").state.task == "countdown"
