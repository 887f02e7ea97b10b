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

from flows.locks import gpu_lock, holder, lock
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


def test_one_lock_per_gpu(tmp_path):
    with gpu_lock(tmp_path, "0", "search"), gpu_lock(tmp_path, "GPU-8a/../x", "search"):
        with pytest.raises(LockedError, match="search is being done"), gpu_lock(tmp_path, "0", "distill"):
            raise AssertionError
        assert {p.name for p in tmp_path.iterdir()} == {".gpu-0.lock", ".gpu-GPU-8a----x.lock"}
