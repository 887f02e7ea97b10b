"""Forked stages: the same promises as started ones, and a refusal wherever a fork would not be safe."""

import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import psutil
import pytest

from flows import zygote as module
from flows.child import run_child
from flows.zygote import Zygote
from search.errors import StageFailed, TrainingError

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def stage(tmp_path, monkeypatch):
    """Write a module for the child to run; its name is returned."""
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))

    def write(source: str, name: str = "toy_stage") -> str:
        (tmp_path / f"{name}.py").write_text(textwrap.dedent(source))
        return name

    return write


@pytest.fixture
def no_gpu(monkeypatch):
    """These tests fork no CUDA: look for GPUs where there are none."""
    monkeypatch.setattr(module, "GPUS", "no-such-device*")


@pytest.fixture
def zygote(stage, no_gpu):
    """A zygote that imports nothing heavy. (After `stage`: it is born with that PYTHONPATH.)"""
    with Zygote({"OMP_NUM_THREADS": "1"}, preload=("json",)) as started:
        yield started


def run(name: str, tmp_path: Path, zygote: Zygote, *args: str, **options):
    options = {"timeout_s": 200, "grace_s": 2, "env": {"OMP_NUM_THREADS": "1"}} | options
    return run_child([name, *args], what="stage toy", log_path=tmp_path / "log.txt", zygote=zygote, **options)


def wait_until(condition, seconds: float = 90):
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < deadline, "did not happen in time"
        time.sleep(0.02)
    return found


def alive(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def pids(folder: Path, count: int) -> list[int]:
    return wait_until(lambda: found if len(found := [int(f.stem) for f in folder.glob("*.pid")]) == count else None)


SLEEP = """
    import os, signal, subprocess, sys, time
    from pathlib import Path
    folder = Path(sys.argv[1])
    stubborn = "import os, pathlib, signal, sys, time; signal.signal(signal.SIGTERM, signal.SIG_IGN);"
    stubborn += "pathlib.Path(sys.argv[1], f'{os.getpid()}.pid').touch(); time.sleep(600)"
    for session in (False, True):
        subprocess.Popen([sys.executable, "-c", stubborn, str(folder)], start_new_session=session)
    (folder / f"{os.getpid()}.pid").touch()
    time.sleep(600)
"""


def test_a_forked_stage_behaves_like_a_started_one(stage, zygote, tmp_path):
    name = stage("""
        import os, sys
        from flows.child import emit
        print("hello", *sys.argv[1:])
        emit({"event": "progress", "done": 1, "env": os.environ["COLOUR"], "cwd": os.getcwd(), "pid": os.getpid()})
    """)
    events = []
    env = {"OMP_NUM_THREADS": "1", "COLOUR": "red"}
    for _ in range(3):
        run(name, tmp_path, zygote, "a b", env=env, on_event=events.append)
    assert zygote.num_forks == 3
    assert {(e["done"], e["env"], e["cwd"]) for e in events} == {(1, "red", os.getcwd())}
    assert len({e["pid"] for e in events}) == 3
    assert (tmp_path / "log.txt").read_text() == "hello a b\n" * 3


def test_each_stage_has_its_own_memory(stage, zygote, tmp_path):
    name = stage("""
        import json
        assert not hasattr(json, "left_behind")
        json.left_behind = True
    """)
    for _ in range(2):
        run(name, tmp_path, zygote)
    assert zygote.num_forks == 2


@pytest.mark.parametrize(
    ("source", "error", "message"),
    [
        ("import search.errors\nraise search.errors.TrainingError('nan')", TrainingError, "nan"),
        ("import os; os._exit(7)", StageFailed, "exit code 7"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", StageFailed, "SIGKILL"),
        ("import os, signal; os.kill(os.getppid(), signal.SIGKILL)\nimport time; time.sleep(600)", StageFailed, "KILL"),
    ],
    ids=["error", "exit", "kill", "guard killed"],
)
def test_failures_cross_and_the_next_stage_is_not_harmed(stage, zygote, tmp_path, source, error, message):
    with pytest.raises(error, match=message):
        run(stage(source), tmp_path, zygote)
    run(stage("print('well')", "next_stage"), tmp_path, zygote)
    assert zygote.num_forks == 2


def test_the_limit_ends_the_whole_tree(stage, zygote, tmp_path):
    name = stage(SLEEP)
    with pytest.raises(StageFailed, match="no progress"):
        run(name, tmp_path, zygote, str(tmp_path), idle_timeout_s=5, grace_s=0.2)
    assert not [pid for pid in pids(tmp_path, 3) if alive(pid)]


def test_a_dead_zygote_means_the_plain_path(stage, zygote, tmp_path):
    name = stage("print('well')")
    run(name, tmp_path, zygote)
    for process in psutil.Process().children(recursive=True):
        process.kill()
    run(name, tmp_path, zygote)
    assert zygote.num_forks == 1
    assert (tmp_path / "log.txt").read_text() == "well\n" * 2


def test_other_thread_settings_and_interpreters_take_the_plain_path(stage, zygote, tmp_path):
    name = stage("import os; print(os.environ['OMP_NUM_THREADS'])")
    run(name, tmp_path, zygote, env={"OMP_NUM_THREADS": "2"})
    link = tmp_path / "python"
    link.symlink_to(sys.executable)
    run(name, tmp_path, zygote, python=str(link), env={"OMP_NUM_THREADS": "1", "PYTHONHOME": sys.base_prefix})
    assert zygote.num_forks == 0
    assert (tmp_path / "log.txt").read_text() == "2\n1\n"


def test_a_zygote_with_a_second_thread_refuses(stage, no_gpu, tmp_path):
    stage("import threading, time; threading.Thread(target=time.sleep, args=(600,), daemon=True).start()", "threaded")
    with Zygote({"OMP_NUM_THREADS": "1"}, preload=("threaded",)) as zygote:
        run(stage("print('well')"), tmp_path, zygote)
        assert zygote.num_forks == 0


def test_an_import_that_fails_means_the_plain_path(stage, no_gpu, tmp_path):
    with Zygote({"OMP_NUM_THREADS": "1"}, preload=("no_such_module",)) as zygote:
        run(stage("print('well')"), tmp_path, zygote)
        assert zygote.num_forks == 0


def test_where_there_is_a_gpu_nothing_is_forked(stage, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "GPUS", "null")  # any device will do
    with Zygote({"OMP_NUM_THREADS": "1"}, preload=("json",)) as zygote:
        run(stage("print('well')"), tmp_path, zygote)
        assert zygote.num_forks == 0


PARENT = """
import sys
from pathlib import Path
from flows import zygote as module
from flows.child import run_child, signals_end_children
module.GPUS = "no-such-device*"
with signals_end_children(), module.Zygote({}, preload=("json",)) as zygote:
    run_child(
        [sys.argv[1], sys.argv[2]], what="stage", log_path=Path(sys.argv[2], "log.txt"), grace_s=60, zygote=zygote
    )
"""


def start_parent(name: str, tmp_path: Path) -> subprocess.Popen:
    env = {**os.environ, "PYTHONPATH": f"{ROOT}:{tmp_path}"}
    return subprocess.Popen([sys.executable, "-c", PARENT, name, str(tmp_path)], env=env)


def test_after_kill_9_of_the_parent_nothing_is_left(stage, tmp_path):
    parent = start_parent(stage(SLEEP), tmp_path)
    pids(tmp_path, 3)
    everyone = [p.pid for p in psutil.Process(parent.pid).children(recursive=True)]
    assert len(everyone) == 6, "two guards, zygote, stage, its two children"
    parent.kill()
    parent.wait()
    wait_until(lambda: not [pid for pid in everyone if alive(pid)], seconds=30)


def test_after_kill_9_of_the_zygote_nothing_of_the_stage_is_left(stage, tmp_path):
    parent = start_parent(stage(SLEEP), tmp_path)
    found = pids(tmp_path, 3)
    stage_process = next(p for p in map(psutil.Process, found) if "-c" not in p.cmdline())
    psutil.Process(psutil.Process(stage_process.ppid()).ppid()).kill()
    assert parent.wait(90) == 1
    wait_until(lambda: not [pid for pid in found if alive(pid)], seconds=30)


def test_sigterm_leaves_the_stage_time_to_save(stage, tmp_path):
    name = stage("""
        import os, signal, sys, time
        from pathlib import Path
        def save(*_):
            time.sleep(1)
            Path(sys.argv[1], "saved").touch()
            sys.exit(143)
        signal.signal(signal.SIGTERM, save)
        Path(sys.argv[1], f"{os.getpid()}.pid").touch()
        time.sleep(600)
    """)
    parent = start_parent(name, tmp_path)
    found = pids(tmp_path, 1)
    parent.send_signal(signal.SIGTERM)
    assert parent.wait(90) == 143
    assert (tmp_path / "saved").exists()
    assert not alive(found[0])


def test_no_descriptor_is_leaked(stage, zygote, tmp_path):
    name = stage("raise SystemExit(int(__import__('sys').argv[1]))")
    run(name, tmp_path, zygote, "0")
    before = len(os.listdir("/proc/self/fd"))
    run(name, tmp_path, zygote, "0")
    with pytest.raises(StageFailed):
        run(name, tmp_path, zygote, "1")
    assert len(os.listdir("/proc/self/fd")) == before


@pytest.mark.slow
def test_torch_can_be_forked_and_computes_the_same(stage, no_gpu, tmp_path):
    name = stage("""
        import sys, torch, transformers, distill.sft, search.engines.transformers
        from flows.child import emit
        torch.manual_seed(0)
        config = transformers.LlamaConfig(hidden_size=64, intermediate_size=128, num_hidden_layers=2,
                                          num_attention_heads=4, vocab_size=50)
        model = transformers.LlamaForCausalLM(config)
        optimizer = torch.optim.AdamW(model.parameters())
        ids = torch.arange(512).remainder(50).reshape(16, 32)
        for _ in range(5):
            loss = model(ids, labels=ids).loss
            loss.backward()
            optimizer.step()
        emit({"event": "metric", "loss": loss.item().hex(), "threads": torch.get_num_threads()})
    """)
    events = []
    env = {"OMP_NUM_THREADS": "2", "HF_HUB_OFFLINE": "1"}
    with Zygote(env) as zygote:
        for one in (zygote, zygote, None):
            run(name, tmp_path, one, env=env, on_event=events.append)
        assert zygote.num_forks == 2, (tmp_path / "log.txt").read_text()
    assert len({e["loss"] for e in events}) == 1
    assert {e["threads"] for e in events} == {2}
