"""Where a stage runs: which GPUs it uses, and that two stages never share one."""

import subprocess
import sys

import pytest

from configs import load
from flows import stage as module
from flows.driver import StageCall
from flows.locks import lock
from flows.stage import Stages, used_gpus
from search.errors import LockedError


@pytest.fixture
def two_gpus(monkeypatch, tmp_path):
    monkeypatch.setattr(module, "visible_gpus", lambda: ["0", "GPU-8a"])
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))


def call(function: str, out, *overrides: str, name: str = "countdown") -> StageCall:
    config = load.load(name, overrides)
    return StageCall(function, 1, None, config, {}, out, heavy=True, look=1)


@pytest.mark.parametrize(
    ("function", "device", "devices"),
    [
        ("search", "auto", ["0"]),
        ("search", "cuda", ["0"]),
        ("evaluate", "cuda:1", ["GPU-8a"]),
        ("evaluate", "cuda:2", []),
        ("difficulty", "cpu", []),
        ("distill", "auto", ["0"]),
        ("distill", "cuda:1", ["GPU-8a"]),
        ("distill", "cpu", []),
    ],
)
def test_which_gpus_a_stage_uses(two_gpus, tmp_path, function, device, devices):
    assert used_gpus(call(function, tmp_path, f"engine.device={device}")) == devices


def test_a_script_uses_none(two_gpus, tmp_path):
    assert used_gpus(call("distill", tmp_path, name="smoke")) == []


def test_a_stage_holds_its_gpu_and_no_other(two_gpus, tmp_path, monkeypatch):
    seen = {}

    def run_child(*_, **__):
        for path in tmp_path.glob("*.lock"):
            try:
                with lock(path, "another"):
                    seen[path.name] = "free"
            except LockedError as error:
                seen[path.name] = str(error)

    monkeypatch.setattr(module, "run_child", run_child)
    Stages(load.load("smoke"))(call("evaluate", tmp_path, "engine.device=cuda:1"), lambda *_: None)
    ((name, what),) = seen.items()
    assert name.endswith("gpu-GPU-8a.lock")
    assert what.startswith(f"stage {tmp_path.name} of {tmp_path.parent} is being done")


def test_vllm_takes_every_gpu_and_the_training_between_one(two_gpus, tmp_path):
    for function, devices in (("search", ["0", "GPU-8a"]), ("distill", ["0"])):
        data = {"loop": {"name": "x"}, "task": {"type": "countdown"}, "engine": {"type": "vllm"}}
        config = load.parse(data)
        assert used_gpus(StageCall(function, 1, None, config, {}, tmp_path, heavy=True, look=1)) == devices


@pytest.mark.parametrize(("device", "seen"), [("cuda:1", "GPU-8a"), ("auto", "0"), ("cpu", None)])
def test_a_training_sees_its_own_gpu_alone(two_gpus, tmp_path, monkeypatch, device, seen):
    environments = []
    monkeypatch.setattr(module, "run_child", lambda *_, env, **__: environments.append(env))
    stages = Stages(load.load("smoke"))
    stages(call("distill", tmp_path, f"engine.device={device}"), lambda *_: None)
    stages(call("search", tmp_path, f"engine.device={device}"), lambda *_: None)
    assert environments[0].get("CUDA_VISIBLE_DEVICES") == seen
    assert "CUDA_VISIBLE_DEVICES" not in environments[1], "an engine picks by number"


def test_a_stage_waits_for_its_gpu_and_says_so(two_gpus, tmp_path, monkeypatch, capsys):
    hold = "import sys, time\nfrom pathlib import Path\nfrom flows.locks import gpu_locks\n"
    hold += "import tempfile; tempfile.tempdir = sys.argv[1]\n"
    hold += (
        "with gpu_locks(['0'], 'stage search of another loop', print):\n    print('held', flush=True); time.sleep(600)"
    )
    other = subprocess.Popen([sys.executable, "-c", hold, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert other.stdout is not None
    try:
        assert other.stdout.readline() == "held\n"
        ran = []
        monkeypatch.setattr(module, "run_child", lambda *_, **__: ran.append(other.poll()))
        tell = module._tell

        def end_the_other(message: str) -> None:
            tell(message)
            assert ran == []
            other.kill()
            other.wait()

        monkeypatch.setattr(module, "_tell", end_the_other)
        Stages(load.load("smoke"))(call("search", tmp_path), lambda *_: None)
    finally:
        other.kill()
        other.communicate()
    assert ran == [-9]
    assert "waiting for GPU 0: stage search of another loop is being done by process" in capsys.readouterr().err
