"""Snapshots of a training: saved at even parts of it, the same after a resume, never those of another training."""

import json
import random
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from configs.schema import Bootstrap, Distill, Lora, Model
from distill.bootstrap import build_model
from distill.sft import train
from search.tasks.tokenizer import build_tokenizer

EOS, NUM_ROWS = 1, 32
CONFIG = Distill(learning_rate=2e-3, batch_size=8, micro_batch_size=4, epochs=3, checkpoint_steps=5, max_length=64)
LORA = CONFIG.model_copy(update={"method": "lora", "lora": Lora(rank=2, alpha=4)})


class Killed(BaseException):
    """Stands for a kill: nothing in the training catches it."""


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "base"
    tokenizer = build_tokenizer()
    build_model(Bootstrap(hidden_size=32, layers=1, heads=1), tokenizer, seed=0).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    draw = random.Random(0)
    prompts = [[draw.randrange(11, 30) for _ in range(draw.randrange(2, 10))] for _ in range(NUM_ROWS)]
    lines = [json.dumps({"prompt_ids": p, "completion_ids": [*reversed(p), EOS]}) for p in prompts]
    path.write_text("".join(line + "\n" for line in lines))
    return path


def run(rows: Path, base: Path, out: Path, config: Distill = CONFIG, snapshots: int = 4, kill_at: int = 0) -> None:
    def progress(done: int, total: int, **info: float) -> None:
        if done == kill_at:
            raise Killed

    out.mkdir(exist_ok=True)
    train(rows, base, base, out, config, Model(), 0, threads=1, progress=progress, device="cpu", snapshots=snapshots)


def snapshots(out: Path) -> dict[str, bytes]:
    files = out.glob("snapshots/*/*.safetensors")
    return {path.parent.name: path.read_bytes() for path in files}


def test_the_model_is_saved_at_even_parts_of_the_training(rows: Path, base: Path, tmp_path: Path) -> None:
    run(rows, base, tmp_path / "out")
    found = snapshots(tmp_path / "out")
    assert sorted(found) == ["step-000003", "step-000006", "step-000009"]  # of 12 steps; the last is the model
    assert len({*found.values(), (tmp_path / "out" / "model" / "model.safetensors").read_bytes()}) == 4
    run(rows, base, tmp_path / "plain", snapshots=1)
    assert not (tmp_path / "plain" / "snapshots").exists()
    whole, plain = (load_file(tmp_path / name / "model" / "model.safetensors") for name in ("out", "plain"))
    assert all(torch.equal(whole[name], plain[name]) for name in whole)  # saving changes nothing


@pytest.mark.parametrize("config", [CONFIG, LORA], ids=["full", "lora"])
def test_a_resumed_training_ends_with_the_same_snapshots(
    config: Distill, rows: Path, base: Path, tmp_path: Path
) -> None:
    run(rows, base, tmp_path / "whole", config)
    with pytest.raises(Killed):
        run(rows, base, tmp_path / "killed", config, kill_at=10)  # its checkpoints: steps 5 and 10
    assert sorted(snapshots(tmp_path / "killed")) == ["step-000003", "step-000006", "step-000009"]
    run(rows, base, tmp_path / "killed", config)
    assert snapshots(tmp_path / "killed") == snapshots(tmp_path / "whole")


def test_snapshots_of_another_training_are_removed(rows: Path, base: Path, tmp_path: Path) -> None:
    run(rows, base, tmp_path, snapshots=4)
    run(rows, base, tmp_path, snapshots=2)
    assert sorted(snapshots(tmp_path)) == ["step-000006"]


def test_a_snapshot_has_the_type_the_model_is_stored_in(rows: Path, base: Path, tmp_path: Path) -> None:
    train(rows, base, None, tmp_path, CONFIG, Model(dtype="bfloat16"), 0, threads=1, device="cpu", snapshots=2)
    saved = load_file(tmp_path / "snapshots" / "step-000006" / "model.safetensors")
    assert {weight.dtype for weight in saved.values()} == {torch.bfloat16}
    final = load_file(tmp_path / "model" / "model.safetensors")
    assert any(not torch.equal(saved[name], final[name]) for name in saved)
