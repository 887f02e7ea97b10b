"""Break a toy round in every way; run it again; it must end as if nothing had happened."""

import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from flows.crash import POINTS

pytestmark = pytest.mark.slow

HERE = Path(__file__).resolve().parent
ROUNDS = 3
RARE = ("stage.begin.wiped", "stage.set_aside.named", "stage.set_aside.done")  # need a scenario of their own


def command(runs: Path, *rest: str) -> list[str]:
    return [sys.executable, str(HERE / "toy_round.py"), str(runs), str(ROUNDS), *rest]


def toy(runs: Path, *rest: str, **env: str) -> subprocess.CompletedProcess:
    runs.mkdir(exist_ok=True)
    return subprocess.run(
        command(runs, *rest), env={**os.environ, **env}, capture_output=True, text=True, timeout=60, check=False
    )


def final(runs: Path) -> dict[str, str]:
    """Every file that must not depend on what happened on the way: name -> content."""
    found = {}
    for path in sorted((runs / "toy").rglob("*")):
        name = path.relative_to(runs / "toy").as_posix()
        if path.is_symlink():
            found[name] = f"-> {os.readlink(path)}"
        elif path.is_file() and not path.match("loop.json.damaged*") and may_not_differ(path):
            found[name] = content(path)
    return found


def may_not_differ(path: Path) -> bool:
    timed = path.name in ("log.txt", "started.json", ".lock", ".key")
    return not timed and not {"corrupt", "stale"} & set(path.parts)


def content(path: Path) -> str:
    if path.name not in ("loop.json", "loop.json.bak", "record.json"):
        return path.read_bytes().hex()
    return json.dumps(without_times(json.loads(path.read_bytes())), sort_keys=True)


def without_times(value):
    if isinstance(value, dict):
        timed = ("utc", "started_utc", "finished_utc", "checksum")
        return {k: without_times(v) for k, v in value.items() if k not in timed}
    return [without_times(v) for v in value] if isinstance(value, list) else value


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory) -> dict[str, str]:
    runs = tmp_path_factory.mktemp("unbroken")
    assert toy(runs).returncode == 0
    return final(runs)


def done(runs: Path) -> set[str]:
    """Work that is on disk for good: shards, and committed stages."""
    loop = runs / "toy"
    found = {f"{p.parent.parent.name}/search/{p.name}" for p in loop.glob("round-*/search*/shard-*.jsonl")}
    return found | {f"{p.parent.name}/{p.name}" for p in loop.glob("round-*/*") if p.name in ("select", "distill")}


def work_log(runs: Path) -> list[str]:
    path = runs / "work.log"
    return [line.replace(".work", "") for line in path.read_text().splitlines()] if path.exists() else []


def resume(runs: Path, unbroken: dict[str, str], *rest: str, **env: str) -> None:
    """Run to the end; nothing that was on disk is made again, and the end is that of the unbroken run."""
    kept, before = done(runs), len(work_log(runs))
    result = toy(runs, *rest, **env)
    assert result.returncode == 0, result.stderr
    assert not kept & set(work_log(runs)[before:]), "committed work was done again"
    assert final(runs) == unbroken


# ---------------------------------------------------------------- crash points


@pytest.mark.parametrize("point", [p for p in POINTS if p not in RARE])
def test_a_crash_at_every_passage_of_every_point(point, tmp_path, unbroken):
    passages = 0
    for nth in range(1, 200):
        runs = tmp_path / str(nth)
        code = toy(runs, RATCHET_CRASH_AT=f"{point}:{nth}").returncode
        if code == 0:
            break
        assert code == 137
        passages += 1
        resume(runs, unbroken)
        shutil.rmtree(runs)
    assert passages >= ROUNDS - 1, "the point is not on the way"


def test_crashes_during_recovery(tmp_path, unbroken):
    chance = random.Random(0)
    for attempt in range(15):
        runs = tmp_path / str(attempt)
        for _ in range(6):
            point = chance.choice([p for p in POINTS if p not in RARE])
            toy(runs, RATCHET_CRASH_AT=f"{point}:{chance.randint(1, 6)}")
        resume(runs, unbroken)


@pytest.mark.parametrize("point", ["stage.set_aside.named", "stage.set_aside.done"])
def test_a_crash_while_a_damaged_artefact_is_set_aside(point, tmp_path, unbroken):
    toy(tmp_path, RATCHET_CRASH_AT="stage.commit.done:5")
    (tmp_path / "toy" / "round-001" / "search" / "shard-00002.jsonl").write_text("damaged")
    assert toy(tmp_path, RATCHET_CRASH_AT=point).returncode == 137
    assert toy(tmp_path).returncode == 0
    assert final(tmp_path) == unbroken


def test_a_crash_while_results_of_other_code_are_dropped(tmp_path):
    toy(tmp_path, TOY_CODE="v1", RATCHET_CRASH_AT="stage.commit.synced:4")
    assert toy(tmp_path, TOY_CODE="v2", RATCHET_CRASH_AT="stage.begin.wiped").returncode == 137
    before = len(work_log(tmp_path))
    assert toy(tmp_path, TOY_CODE="v2").returncode == 0
    again = work_log(tmp_path)[before:]
    assert "round-001/search/shard-00000.jsonl" in again, "partial results of other code are not continued"
    assert not [line for line in again if line.startswith("round-000")], "what is committed stays"
    manifests = {p.parent.parent.name: json.loads(p.read_text()) for p in tmp_path.glob("toy/*/search/manifest.json")}
    assert [manifests[f"round-00{n}"]["code_version"] for n in range(3)] == ["v1", "v2", "v2"]


# ---------------------------------------------------------------- kills


def tree(pid: int) -> list[psutil.Process]:
    try:
        process = psutil.Process(pid)
        return [process, *process.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def left(processes) -> list[psutil.Process]:
    return [p for p in processes if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]


@pytest.mark.parametrize("seed", range(4))
def test_random_kills_of_a_round_with_child_processes(tmp_path, unbroken, seed):
    chance = random.Random(seed)
    env = {**os.environ, "TOY_SLOW_S": "0.1", "TOY_GRANDCHILD": "1"}
    kills = 0
    for attempt in range(40):
        tmp_path.mkdir(exist_ok=True)
        process = subprocess.Popen(command(tmp_path, "children"), env=env, stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        assert process.stdout.readline() == "locked\n", "the lock of a killed round must be free at once"
        try:
            process.wait(chance.uniform(0, 0.4 + attempt * 0.05))
        except subprocess.TimeoutExpired:
            everyone, with_guard = tree(process.pid), False
            victim = chance.choice(everyone) if chance.random() < 0.5 and everyone else psutil.Process(process.pid)
            with contextlib.suppress(psutil.NoSuchProcess):  # one that ended by itself meanwhile is none to kill
                with_guard = victim.pid in {p.pid for p in psutil.Process(process.pid).children()}
                victim.kill()  # the command, a guard, a stage, or what it started
            time.sleep(chance.uniform(0, 0.1))
            everyone += [p for p in tree(process.pid) if p not in everyone]
            process.kill()
            process.wait()
            kills += 1
            deadline = time.monotonic() + 5
            while left(everyone) and time.monotonic() < deadline:
                time.sleep(0.05)
            assert with_guard or not left(everyone), f"{left(everyone)} outlived the round"
            for survivor in left(everyone):
                survivor.kill()  # a grandchild in a session of its own, whose guard was killed: the documented limit
        finally:
            process.stdout.close()
        if process.returncode == 0:
            break
    else:
        assert toy(tmp_path, "children").returncode == 0
    assert kills >= 3
    assert final(tmp_path) == unbroken


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 1)])
def test_a_signal_ends_the_round_and_the_next_call_resumes(tmp_path, unbroken, number, code):
    env = {**os.environ, "TOY_SLOW_S": "0.2", "TOY_GRANDCHILD": "1"}
    process = subprocess.Popen(command(tmp_path, "children"), env=env, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 30
    while len(work_log(tmp_path)) < 3 and time.monotonic() < deadline:
        time.sleep(0.02)
    everyone = tree(process.pid)
    process.send_signal(number)
    assert process.wait(20) in (code, -number)
    assert not left(everyone)
    resume(tmp_path, unbroken, "children")


def test_children_and_no_children_give_the_same_round(tmp_path, unbroken):
    assert toy(tmp_path, "children").returncode == 0
    assert final(tmp_path) == unbroken


# ---------------------------------------------------------------- damage


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 3] ^= 4
    path.write_bytes(data)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.mark.parametrize("damage", [flip, truncate, os.unlink], ids=["flip", "truncate", "delete"])
def test_every_file_of_an_unfinished_round_may_be_damaged(tmp_path, unbroken, damage):
    broken = tmp_path / "broken"
    assert toy(broken, RATCHET_CRASH_AT="round.finish.record:2").returncode == 137
    names = [p.relative_to(broken) for p in (broken / "toy" / "round-001").glob("*/**/*") if p.is_file()]
    names = [name for name in names if name.name != "log.txt"]
    assert len(names) == SHARD_FILES
    for name in names:
        runs = tmp_path / "runs"
        shutil.copytree(broken, runs, symlinks=True)
        damage(runs / name)
        result = toy(runs, TOY_VERIFY="1")
        assert result.returncode == 0, result.stderr
        assert final(runs) == unbroken, name
        assert [*runs.glob("toy/round-001/corrupt/*.txt")], name
        shutil.rmtree(runs)


SHARD_FILES = 4 + 1 + 1 + 3  # shards, rows, model, a manifest each


@pytest.mark.parametrize("damage", [flip, truncate, os.unlink], ids=["flip", "truncate", "delete"])
@pytest.mark.parametrize("names", [("loop.json",), ("loop.json.bak",), ("loop.json", "loop.json.bak")], ids="+".join)
def test_the_state_may_be_damaged_between_rounds(tmp_path, unbroken, damage, names):
    assert toy(tmp_path, RATCHET_CRASH_AT="stage.begin.done:7").returncode == 137
    for name in names:
        damage(tmp_path / "toy" / name)
    resume(tmp_path, unbroken)


def test_a_damaged_record_of_the_configuration_names_the_way_out(tmp_path):
    assert toy(tmp_path, RATCHET_CRASH_AT="stage.begin.done:5").returncode == 137
    truncate(tmp_path / "toy" / "round-001" / "config.json")
    result = toy(tmp_path)
    assert result.returncode == 1
    assert "--abandon" in result.stderr


# ---------------------------------------------------------------- disk


def test_a_disk_that_fills_at_any_byte(tmp_path, unbroken):
    total = 0
    for num_bytes in range(0, 40_000, 997):
        runs = tmp_path / str(num_bytes)
        result = toy(runs, TOY_FULL_AFTER=str(num_bytes))
        if result.returncode == 0:
            break
        assert result.returncode == 1
        assert "DiskError: no space left to write" in result.stderr
        assert not [*(runs / "toy").rglob(".*.tmp-*")], "a failed write leaves nothing"
        resume(runs, unbroken)
        shutil.rmtree(runs)
        total += 1
    assert total > 8


def test_a_real_full_file_system(tmp_path):
    runs = tmp_path / "small"
    runs.mkdir()
    inside = f"mount -t tmpfs -o size=16k none {runs} && {' '.join(command(runs))}; echo code $?; ls {runs}/toy >&2;"
    inside += f"mount -o remount,size=4m {runs} && {' '.join(command(runs))}; echo code $?"
    result = subprocess.run(["unshare", "-rm", "sh", "-c", inside], capture_output=True, text=True, check=False)
    if "mount:" in result.stderr or "unshare:" in result.stderr:
        pytest.skip("no private mounts here")
    assert [line for line in result.stdout.splitlines() if line.startswith("code")] == ["code 1", "code 0"]
    assert "DiskError: no space left to write" in result.stderr


# ---------------------------------------------------------------- two at once


def test_two_rounds_at_once_and_the_next_after_a_kill(tmp_path, unbroken):
    first = subprocess.Popen(
        command(tmp_path, "children"), env={**os.environ, "TOY_SLOW_S": "5"}, stdout=subprocess.PIPE, text=True
    )
    assert first.stdout is not None
    assert first.stdout.readline() == "locked\n"
    second = toy(tmp_path)
    assert second.returncode == 4
    assert f"the toy round of loop toy is being done by process {first.pid}" in second.stderr
    first.kill()
    first.wait()
    first.stdout.close()
    resume(tmp_path, unbroken)


def test_eight_at_once_make_one_loop(tmp_path, unbroken):
    env = {**os.environ, "TOY_SLOW_S": "0.05"}
    started = [subprocess.Popen(command(tmp_path), env=env, stderr=subprocess.DEVNULL) for _ in range(8)]
    codes = sorted(process.wait(60) for process in started)
    assert codes[0] == 0
    assert set(codes) <= {0, 4}
    assert final(tmp_path) == unbroken
    assert len(work_log(tmp_path)) == len(set(work_log(tmp_path))), "nothing was done twice"
