"""Locks: one holder, named; free at once when the holder dies; never inherited."""

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from flows.locks import gpu_locks, holder, lock, visible_gpus
from search.errors import DiskError, LockedError

ROOT = Path(__file__).resolve().parent.parent
HOLD = """
import subprocess, sys, time
from pathlib import Path
from flows.locks import lock
with lock(Path(sys.argv[1]), "round 3 of loop toy"):
    if len(sys.argv) > 2:
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], close_fds=False)
        print(child.pid, flush=True)
    print("held", flush=True)
    time.sleep(600)
"""


@pytest.fixture
def held(tmp_path):
    """Start a process that holds the lock; all of them end with the test."""
    started = []

    def start(*args: str) -> subprocess.Popen:
        command = [sys.executable, "-c", HOLD, str(tmp_path / "lock"), *args]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT)
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


def take(path: Path, **options) -> None:
    with lock(path, "mine", **options):
        pass


def test_the_second_process_is_told_who_and_since_when(tmp_path, held):
    process = held()
    assert process.stdout.readline() == "held\n"
    with pytest.raises(LockedError, match=rf"round 3 of loop toy is being done by process {process.pid} on .* since"):
        take(tmp_path / "lock")
    found = holder(tmp_path / "lock")
    assert found is not None
    assert found.pid == process.pid
    assert LockedError.exit_code == 4


def test_a_killed_holder_frees_the_lock_at_once(tmp_path, held):
    process = held()
    process.stdout.readline()
    process.kill()
    process.wait()
    take(tmp_path / "lock")


def test_a_child_that_outlives_the_holder_does_not_keep_the_lock(tmp_path, held):
    process = held("with a child")
    child = int(process.stdout.readline())
    try:
        process.stdout.readline()
        process.kill()
        process.wait()
        os.kill(child, 0)
        take(tmp_path / "lock")
    finally:
        os.kill(child, signal.SIGKILL)


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_fork_does_not_keep_the_lock(tmp_path):
    context = multiprocessing.get_context("fork")
    with lock(tmp_path / "lock", "first"):
        process = context.Process(target=time.sleep, args=(600,))
        process.start()
    try:
        take(tmp_path / "lock")
    finally:
        process.kill()
        process.join()


def test_a_fork_that_unwinds_does_not_free_the_parents_lock(tmp_path):
    path = tmp_path / "lock"
    manager = lock(path, "first")
    with manager:
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                manager.__exit__(None, None, None)
                code = 0
            finally:
                os._exit(code)
        assert os.waitpid(pid, 0)[1] == 0
        with pytest.raises(LockedError, match="first is being done"):
            take(path)


def test_it_can_be_taken_again_and_again(tmp_path):
    for _ in range(3):
        take(tmp_path / "lock")
    assert holder(tmp_path / "lock") is None


def test_an_exception_inside_frees_it(tmp_path):
    with pytest.raises(ZeroDivisionError), lock(tmp_path / "lock", "x"):
        raise ZeroDivisionError
    assert holder(tmp_path / "lock") is None, "this process lives on, but holds it no more"
    take(tmp_path / "lock")
    assert holder(tmp_path / "lock") is None


def test_waiting_ends_when_the_holder_ends(tmp_path, held):
    process = held()
    process.stdout.readline()
    with pytest.raises(LockedError):
        take(tmp_path / "lock", wait_s=0.3)
    process.kill()
    take(tmp_path / "lock", wait_s=60)


def test_a_stale_name_is_not_shown(tmp_path):
    path = tmp_path / "lock"
    with lock(path, "x"):
        row = json.loads(path.read_text())
    path.write_text(json.dumps(row | {"process_started_s": row["process_started_s"] - 100}))
    assert holder(path) is None, "the pid was given to another process"
    path.write_text(json.dumps(row))
    assert holder(path) is not None
    path.write_text("{not json")
    assert holder(path) is None


def test_a_folder_that_cannot_be_written_is_a_disk_error(tmp_path):
    with pytest.raises(DiskError, match="cannot be written"):
        take(Path("/proc/1/lock") if os.geteuid() else Path("/sys/kernel/lock"))


@pytest.fixture
def locks_folder(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr("flows.locks.GPUS", tmp_path / "no GPU here")
    return tmp_path


def test_one_lock_per_gpu_whatever_the_order(locks_folder):
    told = []
    with gpu_locks(["GPU-8a/../x", "0"], "search", told.append):
        names = {path.name for path in locks_folder.iterdir()}
        assert names == {f"ratchet-{os.getuid()}-gpu-{device}.lock" for device in ("0", "GPU-8a----x")}
        with gpu_locks(["1"], "search", told.append):
            pass
        assert told == []
        for name in names:
            with pytest.raises(LockedError, match="search is being done"):
                take(locks_folder / name)
    with gpu_locks(["0"], "distill", told.append):
        assert told == []


@pytest.fixture
def four_gpus(tmp_path, locks_folder, monkeypatch):
    """What the kernel tells of them, in a folder."""
    folder = tmp_path / "gpus"
    for bus, uuid in (("1a", "GPU-8a01"), ("05", "GPU-8a77"), ("c1", "GPU-3f00"), ("2b", "GPU-????")):
        (folder / f"0000:{bus}:00.0").mkdir(parents=True)
        text = f"Model: \t\t NVIDIA H200\nIRQ:   \t\t 18\nGPU UUID: \t {uuid}\nBus Type: \t PCIe\nDevice Minor: \t 3\n"
        (folder / f"0000:{bus}:00.0" / "information").write_text(text)
    monkeypatch.setattr("flows.locks.GPUS", folder)
    return locks_folder


@pytest.mark.parametrize(
    ("name", "bus"),
    [("0", "05"), ("GPU-8a77", "05"), ("1", "1a"), ("GPU-8a0", "1a"), ("3", "c1"), ("GPU-3", "c1")],
)
def test_a_gpu_has_one_lock_whatever_it_is_called(four_gpus, name, bus):
    path = four_gpus / f"ratchet-{os.getuid()}-gpu-0000-{bus}-00-0.lock"
    with gpu_locks([name], "search", pytest.fail), pytest.raises(LockedError, match="search is being done"):
        take(path)


def test_a_gpu_that_is_named_twice_is_not_waited_for(four_gpus):
    with gpu_locks(["2", "0", "GPU-8a77"], "search", pytest.fail):
        assert len(list(four_gpus.glob("*.lock"))) == 2


@pytest.mark.parametrize("name", ["GPU-8a", "GPU-ff", "7", "MIG-8a01"])
def test_what_the_kernel_does_not_know_is_locked_by_its_name(four_gpus, name):
    with gpu_locks([name], "search", pytest.fail):
        assert [p.name for p in four_gpus.glob("*.lock")] == [f"ratchet-{os.getuid()}-gpu-{name}.lock"]


def test_a_busy_gpu_is_waited_for_and_told_once(locks_folder, held):
    path = locks_folder / f"ratchet-{os.getuid()}-gpu-0.lock"
    path.touch()
    os.link(path, locks_folder / "lock")  # the same file: `held` locks it
    process = held()
    assert process.stdout.readline() == "held\n"
    told = []

    def end_it(message):
        told.append(message)
        process.kill()

    with gpu_locks(["0"], "distill", end_it):
        assert len(told) == 1
    assert told[0].startswith(f"waiting for GPU 0: round 3 of loop toy is being done by process {process.pid}")


@pytest.mark.parametrize(
    ("chosen", "devices"),
    [(None, ["0", "1"]), ("", []), ("-1", []), ("1", ["1"]), ("GPU-8a, 0", ["GPU-8a", "0"]), ("0,-1,1", ["0"])],
)
def test_the_gpus_that_can_be_seen(monkeypatch, chosen, devices):
    monkeypatch.setattr(Path, "glob", lambda self, pattern: [Path("/dev/nvidia1"), Path("/dev/nvidia0")])
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if chosen is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", chosen)
    assert visible_gpus() == devices


def test_the_only_gpu_of_a_container_is_number_0(monkeypatch):
    monkeypatch.setattr(Path, "glob", lambda self, pattern: [Path("/dev/nvidia3")])
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert visible_gpus() == ["0"]


def test_without_a_gpu_none_is_seen(monkeypatch):
    monkeypatch.setattr(Path, "glob", lambda self, pattern: [])
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    assert visible_gpus() == []
