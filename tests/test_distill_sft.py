import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import yaml
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen2Config, Qwen2ForCausalLM

from configs.schema import Distill, Lora, Model
from distill import checkpoints, lora
from distill import trainer as trainer_module
from distill.sft import TrainReport, read_examples, train
from distill.trainer import Examples, Trainer, trainer_settings
from distill.training import BatchOrder, CurveLog, find_device
from search.errors import ConfigError, DataError, DiskError, ModelError, TrainingError
from search.tasks.tokenizer import build_tokenizer

EOS, NUM_ROWS = 1, 40
CONFIG = Distill(
    learning_rate=2e-3, batch_size=8, micro_batch_size=4, epochs=3, checkpoint_steps=4, max_length=64, warmup=0.2
)
MUON = CONFIG.model_copy(update={"optimizer": "muon", "learning_rate": 0.02})
LORA = CONFIG.model_copy(update={"method": "lora", "lora": Lora(rank=2, alpha=4, dropout=0.2)})


class Killed(BaseException):
    """Stands for a kill: nothing in the training catches it."""


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "base"
    tokenizer = build_tokenizer()
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=64,
        tie_word_embeddings=True,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    Qwen2ForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def write_rows(path: Path, rows: list[tuple[list[int], list[int]]]) -> Path:
    lines = [json.dumps({"key": f"k{n}", "prompt_ids": p, "completion_ids": c}) for n, (p, c) in enumerate(rows)]
    path.write_text("".join(line + "\n" for line in lines))
    return path


def reversals(num: int) -> list[tuple[list[int], list[int]]]:
    """Prompts of 2 to 9 numbers and, as completions, the numbers reversed."""
    draw = random.Random(0)
    prompts = [[draw.randrange(11, 30) for _ in range(draw.randrange(2, 10))] for _ in range(num)]
    return [(prompt, [*reversed(prompt), EOS]) for prompt in prompts]


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_rows(tmp_path_factory.mktemp("rows") / "rows.jsonl", reversals(NUM_ROWS))


def run(
    rows: Path, base: Path, out: Path, config: Distill = CONFIG, progress: Callable[..., None] | None = None
) -> TrainReport:
    out.mkdir(exist_ok=True)
    return train(rows, base, base, out, config, Model(), seed=5, threads=1, progress=progress)


def kill_at(step: int) -> Callable[..., None]:
    def progress(done: int, total: int, **info: float) -> None:
        if done >= step:
            raise Killed

    return progress


def interrupted(rows: Path, base: Path, out: Path, config: Distill, step: int) -> None:
    with pytest.raises(Killed):
        run(rows, base, out, config, kill_at(step))
    assert not (out / "model").exists()


def weights(out: Path) -> bytes:
    (file,) = (out / "model").glob("*.safetensors")
    return file.read_bytes()


def build(rows: Path, base: Path, out: Path, config: Distill = CONFIG) -> Trainer:
    policy = lora.load_trainable(base, base, config, Model(), "cpu")
    settings = trainer_settings(config, Model(), "cpu", config.micro_batch_size, 0)
    examples = read_examples(rows, config.max_length)
    tokenizer = lora.load_tokenizer(base, base, Model())
    return Trainer.build(policy, tokenizer, examples, settings, config, out, 2, CurveLog(out / "log", None))


# ------------------------------------------------------------ what the loss falls on


@pytest.mark.parametrize("pad_is_eos", [False, True])
def test_labels_of_real_batches_are_exactly_the_generated_ids(
    pad_is_eos: bool, rows: Path, base: Path, tmp_path: Path
) -> None:
    if pad_is_eos:
        base = Path(shutil.copytree(base, tmp_path / "base"))
        tokenizer = AutoTokenizer.from_pretrained(base)
        tokenizer.pad_token = tokenizer.eos_token
        tokenizer.save_pretrained(base)
    seen: list[tuple[list[int], list[int]]] = []
    padded = 0
    for batch in build(rows, base, tmp_path).get_train_dataloader():
        for ids, mask, labels in zip(batch["input_ids"], batch["attention_mask"], batch["labels"], strict=True):
            length, trained = int(mask.sum()), (labels != -100).nonzero().flatten().tolist()
            assert mask[:length].all(), "padding is on the right"
            assert trained == list(range(trained[0], length)), "one run of labels that ends where the row ends"
            assert labels[trained].tolist() == ids[trained].tolist()
            seen.append((ids[: trained[0]].tolist(), labels[trained].tolist()))
            padded += len(ids) - length
    assert sorted(seen) == sorted(reversals(NUM_ROWS))
    assert padded > 0, "the test must see padding"


def gradients(trainer: Trainer, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    trainer.model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in trainer.model.named_parameters() if p.grad is not None}


def first_batch(trainer: Trainer) -> tuple[Any, torch.Tensor]:
    batch = next(iter(trainer.get_train_dataloader()))
    return batch, (batch["labels"][:, 1:] != -100).sum()


def test_the_gradient_ignores_prompt_and_padding(rows: Path, base: Path, tmp_path: Path) -> None:
    """The gradient at each logit is zero but for the predictions of generated ids; the whole equals a plain sum."""
    trainer = build(rows, base, tmp_path)
    batch, num_trained = first_batch(trainer)
    kept: list[torch.Tensor] = []

    def keep(_module: Any, _inputs: Any, output: torch.Tensor) -> None:
        output.retain_grad()
        kept.append(output)

    handle = trainer.model.lm_head.register_forward_hook(keep)
    got = gradients(trainer, trainer.compute_loss(trainer.model, dict(batch), num_items_in_batch=num_trained))
    handle.remove()
    assert kept[0].grad is not None
    touched = kept[0].grad.abs().sum(-1) > 0
    predicts_generated = F.pad(batch["labels"][:, 1:] != -100, (0, 1), value=False)
    assert torch.equal(touched, predicts_generated)
    total = torch.zeros(())
    for ids, labels in zip(batch["input_ids"], batch["labels"], strict=True):
        start = int((labels != -100).nonzero()[0])
        end = start + int((labels != -100).sum())
        logits = trainer.model(input_ids=ids[None, :end]).logits[0, start - 1 : end - 1]
        total = total - logits.log_softmax(-1).gather(-1, ids[start:end, None]).sum()
    wanted = gradients(trainer, total / num_trained)
    assert got.keys() == wanted.keys()
    for name, gradient in wanted.items():
        torch.testing.assert_close(got[name], gradient, rtol=1e-4, atol=1e-6)


def test_our_loss_is_that_of_trl(rows: Path, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = build(rows, base, tmp_path)
    batch, num_trained = first_batch(trainer)
    ours = trainer.compute_loss(trainer.model, dict(batch), num_items_in_batch=num_trained)
    our_gradients = gradients(trainer, ours)
    monkeypatch.setattr(trainer_module, "SMALL_VOCABULARY", 0)
    theirs = trainer.compute_loss(trainer.model, dict(batch), num_items_in_batch=num_trained)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    for name, gradient in gradients(trainer, theirs).items():
        torch.testing.assert_close(our_gradients[name], gradient, rtol=1e-4, atol=1e-6)


def test_rows_that_cannot_be_trained_are_counted(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "rows.jsonl", [([3, 4], [5, EOS]), ([3] * 8, [4] * 8), ([3], []), ([], [4, EOS])])
    examples = read_examples(path, max_length=15)
    assert (len(examples), examples.dropped_too_long, examples.dropped_empty) == (1, 1, 2)
    assert list(examples.rows()) == [{"input_ids": [3, 4, 5, EOS], "labels": [-100, -100, 5, EOS]}]
    assert (examples.num_tokens, examples.num_trained_tokens) == (4, 2)
    assert len(read_examples(path, max_length=16)) == 2


def test_nothing_to_train_on_is_an_error(base: Path, tmp_path: Path) -> None:
    for rows in ([], [([3], [])], [([3] * 40, [4] * 40)]):
        path = write_rows(tmp_path / "rows.jsonl", rows)
        with pytest.raises(TrainingError, match="no trainable token"):
            run(path, base, tmp_path / "out")
    assert not (tmp_path / "out" / "model").exists()


@pytest.mark.parametrize("line", ["{", '{"prompt_ids": [1]}', '{"prompt_ids": [1], "completion_ids": ["2"]}', "[]"])
def test_a_broken_row_is_named(line: str, tmp_path: Path) -> None:
    path = write_rows(tmp_path / "rows.jsonl", reversals(2))
    path.write_text(path.read_text() + line + "\n")
    with pytest.raises(DataError, match="line 3"):
        read_examples(path, 64)


# ------------------------------------------------------------ training


def test_training_learns_and_reports(rows: Path, base: Path, tmp_path: Path) -> None:
    calls: list[tuple[int, int]] = []
    config = MUON.model_copy(update={"epochs": 20, "checkpoint_steps": 40})
    report = run(rows, base, tmp_path / "out", config, lambda done, total, **info: calls.append((done, total)))
    assert report.steps == 100
    assert report.loss_last < 0.7 * report.loss_first
    assert report.rows == NUM_ROWS
    assert report.trained_tokens_per_epoch == sum(len(c) for _, c in reversals(NUM_ROWS))
    assert calls[0] == (1, 100)
    assert calls[-1] == (100, 100)
    out = tmp_path / "out"
    names = {path.name for path in out.iterdir()}
    assert names == {"model", "report.json", "metrics.jsonl", "timing.json", "trl.yaml", "trl-rows.jsonl"}
    metrics = [json.loads(line) for line in (out / "metrics.jsonl").open()]
    curve = [row["value"] for row in metrics if row["name"] == "distill/loss"]
    assert curve[0] == report.loss_first
    assert curve[-1] == report.loss_last
    AutoTokenizer.from_pretrained(out / "model")
    trained = AutoModelForCausalLM.from_pretrained(out / "model")
    assert trained.dtype == torch.float32
    prompt, completion = reversals(1)[0]
    with torch.no_grad():
        logits = trained(input_ids=torch.tensor([[*prompt, *completion]])).logits[0, len(prompt) - 1 : -1]
    loss = F.cross_entropy(logits, torch.tensor(completion)).item()
    assert loss < 0.7 * report.loss_first, "the saved model is the trained one"


def test_a_model_goes_back_to_the_type_it_is_stored_in(rows: Path, base: Path, tmp_path: Path) -> None:
    small = tmp_path / "bfloat16"
    AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16).save_pretrained(small)
    AutoTokenizer.from_pretrained(base).save_pretrained(small)
    run(rows, small, tmp_path / "out", CONFIG.model_copy(update={"max_steps": 2}))
    stored = load_file(tmp_path / "out" / "model" / "model.safetensors")
    assert {tensor.dtype for tensor in stored.values()} == {torch.bfloat16}


def test_trained_weights_are_float32_whatever_type_the_model_runs_in(base: Path, tmp_path: Path) -> None:
    model = Model(dtype="bfloat16")
    for config in (CONFIG, LORA):
        policy = lora.load_trainable(base, base, config, model, "cpu")
        assert {p.dtype for p in policy.parameters() if p.requires_grad} == {torch.float32}


def test_lora_trains_an_adapter_that_merges(rows: Path, base: Path, tmp_path: Path) -> None:
    before = (base / "model.safetensors").read_bytes()
    report = run(rows, base, tmp_path / "out", LORA)
    assert report.trainable_parameters < report.parameters / 2
    assert (base / "model.safetensors").read_bytes() == before
    adapter = tmp_path / "out" / "model"
    assert (adapter / "adapter_model.safetensors").stat().st_size < len(before)
    assert not (adapter / "model.safetensors").exists()
    lora.merge_adapter(adapter, base, tmp_path / "merged", Model())
    ids = torch.tensor([[12, 13, 14, 15]])
    from peft import PeftModel

    plain = AutoModelForCausalLM.from_pretrained(base)
    untrained = plain(input_ids=ids).logits.detach()
    adapted = PeftModel.from_pretrained(plain, str(adapter)).eval()(input_ids=ids).logits
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")(input_ids=ids).logits
    torch.testing.assert_close(merged, adapted, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(adapted, untrained, atol=1e-4)


def test_an_adapter_can_be_trained_on_or_made_whole(rows: Path, base: Path, tmp_path: Path) -> None:
    run(rows, base, tmp_path / "first", LORA)
    adapter = tmp_path / "first" / "model"
    for name, config in (("on", LORA), ("whole", CONFIG)):
        (tmp_path / name).mkdir()
        train(rows, adapter, base, tmp_path / name, config, Model(), seed=6, threads=1)
    assert lora.is_adapter(tmp_path / "on" / "model")
    assert weights(tmp_path / "on") != weights(tmp_path / "first")
    merged = load_file(tmp_path / "whole" / "model" / "model.safetensors")
    assert merged.keys() == load_file(base / "model.safetensors").keys()
    with pytest.raises(ModelError, match="needs its full base model"):
        train(rows, adapter, None, tmp_path / "on", LORA, Model(), seed=6)


def test_gradient_checkpointing_gives_the_same_model(rows: Path, base: Path, tmp_path: Path) -> None:
    few = CONFIG.model_copy(update={"max_steps": 4})
    run(rows, base, tmp_path / "plain", few)
    run(rows, base, tmp_path / "saving", few.model_copy(update={"gradient_checkpointing": True}))
    plain = load_file(tmp_path / "plain" / "model" / "model.safetensors")
    for name, tensor in load_file(tmp_path / "saving" / "model" / "model.safetensors").items():
        torch.testing.assert_close(tensor, plain[name])


@pytest.mark.parametrize(
    ("wanted", "there", "found"),
    [
        ("auto", False, "cpu"),
        ("auto", True, "cuda"),
        ("cpu", True, "cpu"),
        ("cuda", True, "cuda"),
        ("cuda:1", True, "cuda"),
    ],
)
def test_training_runs_on_the_device_that_is_named(
    monkeypatch: pytest.MonkeyPatch, wanted: str, there: bool, found: str
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: there)
    assert find_device(wanted) == found


@pytest.mark.parametrize("wanted", ["cuda:0", "tpu"])
def test_a_device_that_is_not_there_is_a_user_error(
    rows: Path, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wanted: str
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match=f"engine.device = '{wanted}'.*"):
        train(rows, base, base, tmp_path, CONFIG, Model(), seed=5, device=wanted)


def test_training_told_to_stay_on_the_cpu_stays_there(
    rows: Path, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: set[str] = set()
    step = Trainer.training_step

    def watched(self: Trainer, model: Any, inputs: Any, *rest: Any) -> torch.Tensor:
        seen.update(str(tensor.device) for tensor in (*inputs.values(), *model.parameters()))
        return step(self, model, inputs, *rest)

    monkeypatch.setattr(Trainer, "training_step", watched)
    train(rows, base, base, tmp_path, CONFIG, Model(), seed=5, threads=1, device="cpu")
    assert seen == {"cpu"}


def test_a_missing_model_is_a_user_error(rows: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no model that can be trained"):
        run(rows, tmp_path / "nothing", tmp_path / "out")


# ------------------------------------------------------------ order of the rows


def test_each_epoch_takes_every_row_once_in_its_own_order() -> None:
    lengths = [random.Random(n).randrange(5, 50) for n in range(100)]
    order = BatchOrder(lengths, 16, seed=3)
    epochs: list[list[int]] = []
    for epoch in range(3):
        order.set_epoch(epoch)
        epochs.append(list(order))
        assert sorted(epochs[-1]) == list(range(100))
        assert list(order) == epochs[-1]
    assert epochs[0] != epochs[1] != epochs[2]
    assert list(BatchOrder(lengths, 16, seed=4)) != epochs[0]
    for start in range(0, 100, 16):
        batch = [lengths[row] for row in epochs[0][start : start + 16]]
        assert batch == sorted(batch)
    flat = BatchOrder([7] * 100, 16, seed=3)
    members = [set(epochs[0][s : s + 16]) for s in range(0, 100, 16)]
    assert [set(list(flat)[s : s + 16]) for s in range(0, 100, 16)] == members, "lengths must not choose the batch"


# ------------------------------------------------------------ resume


@pytest.mark.parametrize("config", [CONFIG, MUON, LORA], ids=["adamw", "muon", "lora"])
def test_a_resumed_training_ends_in_the_same_bytes(config: Distill, rows: Path, base: Path, tmp_path: Path) -> None:
    """Checkpoints every 4 of 15 steps, 5 steps an epoch: killed in the second epoch, then again in the third."""
    whole = run(rows, base, tmp_path / "whole", config)
    out = tmp_path / "out"
    interrupted(rows, base, out, config, step=9 if config is not CONFIG else 8)
    interrupted(rows, base, out, config, step=12)
    assert run(rows, base, out, config) == whole
    assert json.loads((out / "timing.json").read_text())["resumed_from_step"] > 0
    assert weights(out) == weights(tmp_path / "whole")
    for name in ("report.json", "metrics.jsonl", "trl.yaml", "trl-rows.jsonl"):
        assert (out / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name


def test_damage_to_any_file_of_a_checkpoint_is_seen(rows: Path, base: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    interrupted(rows, base, out, CONFIG, step=9)
    folder = out / "checkpoints"
    last, before = folder / "checkpoint-8", folder / "checkpoint-4"
    assert checkpoints.latest_valid_checkpoint(folder) == last
    files = sorted(path for path in last.iterdir())
    assert {"model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json"} <= {
        path.name for path in files
    }
    for path in files:
        content = path.read_bytes()
        flipped = bytes([*content[:-3], content[-3] ^ 1, *content[-2:]])
        for damaged in (content[: len(content) // 2], flipped, b"", None):
            path.unlink()
            if damaged is not None:
                path.write_bytes(damaged)
            assert checkpoints.damage(last) is not None, path.name
            assert checkpoints.latest_valid_checkpoint(folder) == before
            path.write_bytes(content)
    assert checkpoints.latest_valid_checkpoint(folder) == last
    (last / "optimizer.pt").unlink()
    checkpoints.seal(last)
    assert checkpoints.damage(last) == "optimizer.pt is missing"
    whole = tmp_path / "whole"
    run(rows, base, whole)
    run(rows, base, out)
    assert json.loads((out / "timing.json").read_text())["resumed_from_step"] == 4
    assert weights(out) == weights(whole)


def test_checkpoints_of_another_training_are_not_used(rows: Path, base: Path, tmp_path: Path) -> None:
    other = write_rows(tmp_path / "other.jsonl", reversals(NUM_ROWS)[::-1])
    interrupted(rows, base, tmp_path / "out", CONFIG, step=9)
    run(other, base, tmp_path / "out")
    assert json.loads((tmp_path / "out" / "timing.json").read_text())["resumed_from_step"] == 0
    run(other, base, tmp_path / "whole")
    assert weights(tmp_path / "out") == weights(tmp_path / "whole")


def test_checkpoints_from_other_initial_weights_are_not_used(rows: Path, base: Path, tmp_path: Path) -> None:
    other = Path(shutil.copytree(base, tmp_path / "base"))
    weights_file = other / "model.safetensors"
    save_file({name: -tensor for name, tensor in load_file(weights_file).items()}, weights_file, {"format": "pt"})
    assert weights_file.stat().st_size == (base / "model.safetensors").stat().st_size
    interrupted(rows, base, tmp_path / "out", CONFIG, step=9)
    run(rows, other, tmp_path / "out", CONFIG)
    assert json.loads((tmp_path / "out" / "timing.json").read_text())["resumed_from_step"] == 0


def test_a_resume_that_does_no_step_is_an_error(rows: Path, base: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    interrupted(rows, base, out, CONFIG, step=9)
    last = (out / "checkpoints" / "checkpoint-8").rename(out / "checkpoints" / "checkpoint-15")
    state = json.loads((last / "trainer_state.json").read_text())
    (last / "trainer_state.json").write_text(json.dumps(state | {"global_step": 15}))
    checkpoints.seal(last)
    with pytest.raises(TrainingError, match="resumed from checkpoint-15 did 0 steps"):
        run(rows, base, out)
    assert not (out / "model").exists()


@pytest.mark.slow
def test_a_training_killed_by_the_kernel_resumes(rows: Path, base: Path, tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path;"
        "from configs.schema import Distill, Model; from distill.sft import train;"
        "rows, base, out, config = sys.argv[1:];"
        "train(Path(rows), Path(base), None, Path(out), Distill.model_validate_json(config), Model(), 5, 1)"
    )
    config = MUON.model_copy(update={"epochs": 200})
    out = tmp_path / "out"
    out.mkdir()
    child = subprocess.Popen([sys.executable, "-c", code, rows, base, out, config.model_dump_json()])
    while len(list(out.glob("checkpoints/checkpoint-*"))) < 2:
        assert child.poll() is None, "the training ended before it could be killed"
        time.sleep(0.01)
    os.kill(child.pid, signal.SIGKILL)
    child.wait()
    assert not (out / "model").exists()
    run(rows, base, out, config)
    assert json.loads((out / "timing.json").read_text())["resumed_from_step"] >= 4
    run(rows, base, tmp_path / "whole", config)
    assert weights(out) == weights(tmp_path / "whole")


# ------------------------------------------------------------ faults


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_stops_before_the_update(
    value: float, rows: Path, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, steps = Trainer.compute_loss, []

    def poisoned(self: Trainer, *args: Any, **kwargs: Any) -> torch.Tensor:
        return plain(self, *args, **kwargs) + (value if self.state.global_step == 2 else 0)

    monkeypatch.setattr(Trainer, "compute_loss", poisoned)
    real = torch.optim.AdamW.step
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda self, *a, **k: (steps.append(1), real(self, *a, **k))[1])
    with pytest.raises(TrainingError, match="loss of step 3 is not finite: nothing was updated"):
        run(rows, base, tmp_path / "out")
    assert len(steps) == 2
    assert not (tmp_path / "out" / "model").exists()


def test_a_gradient_that_is_not_finite_stops_before_the_update(
    rows: Path, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = Trainer.compute_loss

    def poisoned(self: Trainer, model: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        weight = next(model.parameters())
        # the square root's slope at 0 is infinite: a finite loss with a gradient that is not
        return plain(self, model, *args, **kwargs) + ((weight - weight.detach()).sum().abs()).sqrt()

    monkeypatch.setattr(Trainer, "compute_loss", poisoned)
    with pytest.raises(TrainingError, match="gradient norm of step 1 is not finite"):
        run(rows, base, tmp_path / "out")


def test_a_weight_that_is_not_finite_is_never_saved(
    rows: Path, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = Path(shutil.copytree(base, tmp_path / "broken"))
    model = AutoModelForCausalLM.from_pretrained(base)
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[0, 0] = float("nan")
    model.save_pretrained(broken)
    with pytest.raises(TrainingError, match="step 1 is not finite"):
        run(rows, broken, tmp_path / "out")
    plain = torch.optim.AdamW.step

    def poison(self: torch.optim.AdamW, *args: Any, **kwargs: Any) -> None:
        plain(self, *args, **kwargs)
        self.param_groups[0]["params"][0].data[0, 0] = float("inf")

    monkeypatch.setattr(torch.optim.AdamW, "step", poison)
    with pytest.raises(TrainingError, match=r"after training, .* is not finite"):
        run(rows, base, tmp_path / "out", CONFIG.model_copy(update={"max_steps": 1}))
    assert not (tmp_path / "out" / "model").exists()


def test_too_little_disk_is_told_before_the_start(
    rows: Path, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=2_000_000))
    with pytest.raises(DiskError, match=r"needs about 0\.0[0-9] GB .* 0\.00 GB are free"):
        run(rows, base, tmp_path / "out", CONFIG, kill_at(0))


def test_half_the_micro_batch_when_memory_runs_out(
    rows: Path, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, limit = Trainer.compute_loss, 3

    def limited(self: Trainer, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        if len(inputs["input_ids"]) > limit and self.state.global_step >= 6:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return plain(self, model, inputs, *args, **kwargs)

    monkeypatch.setattr(Trainer, "compute_loss", limited)
    report = run(rows, base, tmp_path / "out")
    assert report.micro_batch_size == 2
    assert report.steps == 15
    assert json.loads((tmp_path / "out" / "timing.json").read_text())["resumed_from_step"] == 4
    monkeypatch.undo()
    run(rows, base, tmp_path / "whole")
    plain_model = load_file(tmp_path / "whole" / "model" / "model.safetensors")
    for name, tensor in load_file(tmp_path / "out" / "model" / "model.safetensors").items():
        torch.testing.assert_close(tensor, plain_model[name], rtol=1e-2, atol=1e-4)
    limit = 0
    monkeypatch.setattr(Trainer, "compute_loss", limited)
    with pytest.raises(TrainingError, match="out of GPU memory with distill"):
        run(rows, base, tmp_path / "never")


# ------------------------------------------------------------ the same training by TRL's own command line


@pytest.mark.parametrize("config", [CONFIG, LORA], ids=["full", "lora"])
def test_trl_yaml_trains_with_trl_alone(
    config: Distill, rows: Path, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from trl.scripts import sft as trl_sft

    out = tmp_path / "out"
    report = run(rows, base, out, config.model_copy(update={"max_steps": 2}))
    monkeypatch.chdir(out)
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    parser = trl_sft.make_parser()
    parsed = parser.parse_args_and_config(args=["--config", "trl.yaml"], fail_with_unknown_args=True)
    settings = yaml.safe_load((out / "trl.yaml").read_text())
    assert parsed[1].learning_rate == settings["learning_rate"] == config.learning_rate
    trl_sft.main(*parsed)
    state = json.loads((out / "trl-output" / "checkpoint-2" / "trainer_state.json").read_text())
    assert state["log_history"][0]["loss"] == pytest.approx(report.loss_first, rel=0.1)
    name = "adapter_model.safetensors" if config is LORA else "model.safetensors"
    assert (out / "trl-output" / name).exists()


def test_examples_keep_ids_exactly() -> None:
    examples = Examples()
    examples.add([200_000], [151_643, 3], 8)
    assert next(examples.rows()) == {"input_ids": [200_000, 151_643, 3], "labels": [-100, 151_643, 3]}
