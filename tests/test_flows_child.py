"""Child processes: events, errors, limits, signals, and that nothing outlives its parent."""

import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import psutil
import pytest

from flows.child import run_child, signals_end_children, stop_children
from search.errors import ConfigError, DiskError, LockedError, StageFailed, TrainingError

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def module(tmp_path, monkeypatch):
    """Write a module for the child to run; its name is returned."""
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))

    def write(source: str, name: str = "toy_stage") -> str:
        (tmp_path / f"{name}.py").write_text(textwrap.dedent(source))
        return name

    return write


def run(module: str, tmp_path: Path, *args: str, **options):
    options.setdefault("timeout_s", 200)
    options.setdefault("grace_s", 2)
    return run_child([module, *args], what="stage toy", log_path=tmp_path / "log.txt", **options)


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
    """The process ids that the toy stage wrote, one a file."""
    return wait_until(lambda: found if len(found := [int(f.stem) for f in folder.glob("*.pid")]) == count else None)


SLEEPERS = """
    import os, signal, subprocess, sys, time
    from pathlib import Path
    folder = Path(sys.argv[1])
    stubborn = "import os, pathlib, signal, sys, time; signal.signal(signal.SIGTERM, signal.SIG_IGN);"
    stubborn += "pathlib.Path(sys.argv[1], f'{os.getpid()}.pid').touch(); time.sleep(600)"
    for session in (False, True):
        subprocess.Popen([sys.executable, "-c", stubborn, str(folder)], start_new_session=session)
    (folder / f"{os.getpid()}.pid").touch()
"""
SLEEP = SLEEPERS + "    time.sleep(600)\n"
BUSY_IN_C = SLEEPERS + "    pow(3, 10**9)\n"  # holds the GIL: no thread and no handler of the stage can run


def test_events_arrive_in_order_and_output_goes_to_the_log(module, tmp_path):
    name = module("""
        import sys
        from flows.child import emit
        print("hello", sys.argv[1])
        print("trouble", file=sys.stderr)
        for n in range(3):
            emit({"event": "progress", "done": n, "total": 3})
        emit({"event": "metric", "name": "x", "value": 0.5})
    """)
    events = []
    (tmp_path / "log.txt").write_text("before\n")
    result = run(name, tmp_path, "world", on_event=events.append)
    assert [e["done"] for e in events[:3]] == [0, 1, 2]
    assert events[3] == {"event": "metric", "name": "x", "value": 0.5}
    assert result.num_events == 4
    assert (tmp_path / "log.txt").read_text() == "before\nhello world\ntrouble\n"


def test_more_events_than_a_pipe_holds_are_all_delivered(module, tmp_path):
    name = module("""
        from flows.child import emit
        for n in range(5000):
            emit({"event": "progress", "done": n, "info": {"text": "x" * 200}})
    """)
    events = []
    run(name, tmp_path, on_event=events.append)
    assert [e["done"] for e in events] == list(range(5000))


@pytest.mark.parametrize(
    ("raised", "expected", "code"),
    [
        ("search.errors.TrainingError('loss is nan')", TrainingError, 1),
        ("search.errors.LockedError('held')", LockedError, 4),
        ("search.errors.ConfigError('bad key')", ConfigError, 2),
        ("configs.load.InvalidConfig('bad key')", ConfigError, 2),
        ("OSError(28, 'No space left on device')", DiskError, 1),
        ("RuntimeError('SafetensorError: No space left on device (os error 28)')", DiskError, 1),
        ("ZeroDivisionError('oops')", StageFailed, 1),
    ],
)
def test_errors_cross_the_process_boundary_by_class(module, tmp_path, raised, expected, code):
    name = module(f"import search.errors, configs.load\nraise {raised}\n")
    with pytest.raises(expected) as caught:
        run(name, tmp_path)
    assert type(caught.value) is expected
    assert caught.value.exit_code == code
    assert "Traceback" in (tmp_path / "log.txt").read_text()


def test_an_unknown_error_names_its_class_and_the_log(module, tmp_path):
    name = module("raise ZeroDivisionError('oops')")
    with pytest.raises(StageFailed, match=r"stage toy failed: ZeroDivisionError: oops; see .*log\.txt"):
        run(name, tmp_path)


def test_an_error_event_cannot_name_a_class_that_is_not_ours(module, tmp_path):
    name = module("""
        from flows.child import emit
        emit({"event": "error", "type": "annotations", "message": "m", "user": False, "exit_code": 1})
        raise SystemExit(1)
    """)
    with pytest.raises(StageFailed, match="annotations: m"):
        run(name, tmp_path)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("import os; os._exit(7)", "exit code 7"),
        ("import sys; sys.exit('usage: wrong')", "exit code 1"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", "SIGKILL: out of memory"),
        ("import ctypes; ctypes.string_at(0)", "SIGSEGV"),
        ("import nothing_of_this_name", "No module named"),
    ],
)
def test_every_way_to_die_is_a_failure_with_its_cause(module, tmp_path, source, message):
    with pytest.raises(StageFailed, match=message):
        run(module(source), tmp_path)


def test_a_missing_interpreter_is_a_configuration_error(tmp_path):
    with pytest.raises(ConfigError, match=r"stages\.python = '/nowhere/python'"):
        run("toy", tmp_path, python="/nowhere/python")


@pytest.mark.parametrize("source", [SLEEP, BUSY_IN_C], ids=["sleeping", "busy_in_c"])
def test_the_wall_clock_limit_ends_the_whole_tree(module, tmp_path, source):
    name = module(source)
    with pytest.raises(StageFailed, match="stopped after 3 s"):
        run(name, tmp_path, str(tmp_path), timeout_s=3, grace_s=0.5)
    assert not [pid for pid in pids(tmp_path, 3) if alive(pid)]


def test_a_stage_that_shows_no_progress_is_stopped(module, tmp_path):
    name = module("""
        import time
        from flows.child import emit
        for _ in range(8):
            emit({"event": "progress"})
            time.sleep(0.25)
        time.sleep(600)
    """)
    events = []
    with pytest.raises(StageFailed, match=r"no progress for 1\.5 s"):
        run(name, tmp_path, idle_timeout_s=1.5, on_event=events.append)
    assert len(events) == 8


def test_what_a_stage_leaves_running_ends_with_it(module, tmp_path):
    run(module(SLEEPERS + "    time.sleep(1)\n"), tmp_path, str(tmp_path))
    assert not [pid for pid in pids(tmp_path, 3) if alive(pid)]


def test_sigterm_reaches_the_stage_which_may_save(module, tmp_path):
    name = module("""
        import signal, sys, time
        from pathlib import Path
        def save(*_):
            Path(sys.argv[1], "saved").touch()
            sys.exit(143)
        signal.signal(signal.SIGTERM, save)
        Path(sys.argv[1], "ready").touch()
        time.sleep(600)
    """)

    def stop():
        wait_until((tmp_path / "ready").exists)
        stop_children()

    thread = threading.Thread(target=stop)
    thread.start()
    with pytest.raises(StageFailed, match="SIGTERM"):
        run(name, tmp_path, str(tmp_path), grace_s=20)
    thread.join()
    assert (tmp_path / "saved").exists()


def test_an_exception_in_the_parent_ends_the_child(module, tmp_path):
    name = module("""
        import os, sys, time
        from pathlib import Path
        from flows.child import emit
        Path(sys.argv[1], f"{os.getpid()}.pid").touch()
        emit({"event": "progress"})
        time.sleep(600)
    """)

    def fail(_event):
        raise ValueError("from the parent")

    with pytest.raises(ValueError, match="from the parent"):
        run(name, tmp_path, str(tmp_path), on_event=fail)
    assert not alive(pids(tmp_path, 1)[0])


PARENT = """
import sys
from pathlib import Path
from flows.child import run_child, signals_end_children
with signals_end_children():
    try:
        run_child([sys.argv[1], sys.argv[2]], what="stage", log_path=Path(sys.argv[2], "log.txt"), grace_s=0.5)
    except KeyboardInterrupt:
        sys.exit(130)
"""


def start_parent(name: str, tmp_path: Path, **options) -> subprocess.Popen:
    env = {**os.environ, "PYTHONPATH": f"{ROOT}:{tmp_path}"}
    return subprocess.Popen([sys.executable, "-c", PARENT, name, str(tmp_path)], env=env, **options)


@pytest.mark.parametrize("source", [SLEEP, BUSY_IN_C], ids=["sleeping", "busy_in_c"])
def test_after_kill_9_of_the_parent_nothing_is_left(module, tmp_path, source):
    parent = start_parent(module(source), tmp_path)
    found = pids(tmp_path, 3)
    everyone = [p.pid for p in psutil.Process(parent.pid).children(recursive=True)]
    assert set(found) < set(everyone)
    parent.kill()
    parent.wait()
    wait_until(lambda: not [pid for pid in everyone if alive(pid)], seconds=30)


def test_after_kill_9_of_the_guard_nothing_is_left_and_the_parent_knows(module, tmp_path):
    parent = start_parent(module(SLEEP), tmp_path, stderr=subprocess.PIPE)
    pids(tmp_path, 3)
    guard = psutil.Process(parent.pid).children()[0]
    in_group = [p.pid for p in guard.children(recursive=True) if os.getpgid(p.pid) == guard.pid]
    outside = [p for p in guard.children(recursive=True) if p.pid not in in_group]
    guard.kill()
    _, stderr = parent.communicate(timeout=90)
    assert parent.returncode == 1
    assert b"SIGKILL" in stderr
    assert len(in_group) == 2
    wait_until(lambda: not [pid for pid in in_group if alive(pid)], seconds=30)
    for process in outside:  # it left the group and its only keeper was killed: the documented limit
        process.kill()


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_to_the_parent_ends_the_tree_with_the_right_exit_code(module, tmp_path, number, code):
    parent = start_parent(module(SLEEP), tmp_path)
    found = pids(tmp_path, 3)
    parent.send_signal(number)
    assert parent.wait(90) == code
    wait_until(lambda: not [pid for pid in found if alive(pid)], seconds=30)


def test_handlers_are_put_back():
    before = signal.getsignal(signal.SIGTERM)
    with signals_end_children():
        assert signal.getsignal(signal.SIGTERM) is not before
    assert signal.getsignal(signal.SIGTERM) is before


def test_no_descriptor_is_leaked(module, tmp_path):
    name = module("raise SystemExit(int(__import__('sys').argv[1]))")
    run(name, tmp_path, "0")
    before = len(os.listdir("/proc/self/fd"))
    for code in "01":
        try:
            run(name, tmp_path, code)
        except StageFailed:
            assert code == "1"
    assert len(os.listdir("/proc/self/fd")) == before
