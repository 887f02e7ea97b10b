"""Supervised fine-tuning on selected rows, through TRL's SFTTrainer.

Rows come tokenised, with the very ids that were sampled; the loss falls on the completion ids, EOS included, and on
nothing else. What is added to the trainer: batches whose rows depend on (seed, epoch) alone, so that a resume on the
same machine ends in the same bytes; a stop before the optimizer step at a loss or gradient that is not finite;
checkpoints that are checked before they are used; half the micro batch when the GPU runs out of memory. Left out:
packing (it costs loss without FlashAttention), several GPUs in one process, evaluation during training.
"""

from __future__ import annotations

import copy
import gc
import json
import math
import shutil
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from transformers import set_seed

from configs.schema import Distill, Model
from distill import checkpoints, lora
from distill.trainer import Examples, Snapshots, Trainer, trainer_settings, write_trl_yaml
from distill.training import CurveLog, Progress, find_device, smaller, write_json
from search.errors import DataError, TrainingError
from search.randomness import key64

KEPT_CHECKPOINTS = 2  # the newest, and the one before in case the newest is damaged


@dataclass(frozen=True, slots=True)
class TrainReport:
    """What a training did; `report.json`. The same for a resumed training: wall time is in timing.json."""

    steps: int
    rows: int
    dropped_too_long: int
    dropped_empty: int
    tokens_per_epoch: int
    trained_tokens_per_epoch: int  # those the loss falls on
    parameters: int
    trainable_parameters: int
    micro_batch_size: int  # smaller than configured where memory ran out
    loss_first: float
    loss_last: float


def train(
    rows: Path,
    init_model: Path,
    base_model: Path | None,
    out: Path,
    config: Distill,
    model: Model,
    seed: int,
    threads: int | None = None,
    progress: Progress | None = None,
    device: str = "auto",
    snapshots: int = 1,
) -> TrainReport:
    """Train the model at `init_model` on the rows of a `rows.jsonl` and write it to `out/model`.

    `base_model` is the full model under an adapter. `progress(steps, all_steps, loss=...)` is called while it runs.
    `device`: "auto", "cpu" or "cuda"; of several GPUs, the first one that this process sees, so who names another one
    ("cuda:1") hides the rest in CUDA_VISIBLE_DEVICES.
    `snapshots`: the model is also saved, as `out/snapshots/step-000123`, at the steps that divide the training into so
    many parts; the last is `out/model` itself.
    What an interrupted call left in `out/checkpoints` is used if it belongs to this training and is undamaged.
    Also writes report.json, metrics.jsonl, trl.yaml with trl-rows.jsonl, and timing.json.
    Raises TrainingError (nothing to learn, not finite, no step done), DataError, ModelError, DiskError, ConfigError.
    """
    started = time.monotonic()
    kind = find_device(device)
    if threads is not None:
        torch.set_num_threads(threads)
    examples = read_examples(rows, config.max_length)
    inputs = {
        "rows": checkpoints.sha256_of(rows),
        "config": config.model_dump(mode="json"),
        "model": model.model_dump(mode="json"),
        "weights": {p.name: checkpoints.sha256_of(p) for p in sorted(init_model.glob("*.safetensors"))},
        "seed": seed,
    } | ({"snapshots": snapshots} if snapshots > 1 else {})
    micro_batch_size = config.micro_batch_size
    while True:
        resume = checkpoints.open_folder(out / "checkpoints", inputs)
        if resume is None:
            shutil.rmtree(out / "snapshots", ignore_errors=True)  # of another training
        run = _Run(
            examples, init_model, base_model, out, config, model, seed, micro_batch_size, progress, kind, snapshots
        )
        report = run.finish(resume)
        if report is not None:
            break
        micro_batch_size = smaller(micro_batch_size, config.batch_size)
        del run
        gc.collect()
        torch.cuda.empty_cache()
    write_json(out / "report.json", asdict(report))
    resumed = int(resume.name.removeprefix("checkpoint-")) if resume else 0
    write_json(out / "timing.json", {"wall_s": round(time.monotonic() - started, 3), "resumed_from_step": resumed})
    shutil.rmtree(out / "checkpoints")
    return report


def read_examples(rows: Path, max_length: int) -> Examples:
    """The token ids and labels of a `rows.jsonl`. Rows that are too long or empty are counted, never cut.

    Raises DataError for a line that is not a row, TrainingError where nothing to learn is left.
    """
    examples = Examples()
    with rows.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            try:
                row = json.loads(line)
                prompt, completion = row["prompt_ids"], row["completion_ids"]
                if not all(type(token) is int for token in (*prompt, *completion)):
                    raise TypeError("token ids must be whole numbers")
            except (ValueError, KeyError, TypeError) as error:
                raise DataError(f"{rows}, line {number} is not a training row: {error!r}") from error
            examples.add(prompt, completion, max_length)
    if not len(examples):
        raise TrainingError(
            f"no trainable token in {rows}: {examples.dropped_too_long} rows are longer than distill.max_length = "
            f"{max_length}, {examples.dropped_empty} have no prompt or no completion"
        )
    return examples


class _Run:
    """One attempt at a training with one micro batch size."""

    def __init__(
        self,
        examples: Examples,
        init_model: Path,
        base_model: Path | None,
        out: Path,
        config: Distill,
        model: Model,
        seed: int,
        micro_batch_size: int,
        progress: Progress | None,
        device: str,
        num_snapshots: int,
    ) -> None:
        self.examples, self.out, self.config, self.device = examples, out, config, device
        self.micro_batch_size, self.num_snapshots = micro_batch_size, num_snapshots
        trainer_seed = key64(seed, "sft") % 2**31
        set_seed(trainer_seed)  # a fresh adapter is drawn here
        self.policy = lora.load_trainable(init_model, base_model, config, model, self.device)
        self.tokenizer = lora.load_tokenizer(init_model, base_model, model)
        self.stored_type = lora.stored_type(lora.base_of(init_model, base_model), model)
        settings = trainer_settings(config, model, self.device, micro_batch_size, trainer_seed)
        write_trl_yaml(settings, config, model, lora.base_of(init_model, base_model), examples, out)
        self.log = CurveLog(out / "metrics.jsonl", progress)
        checkpoints.require_space(out, self._needed_bytes())
        self.trainer = Trainer.build(
            self.policy, self.tokenizer, examples, settings, config, out / "checkpoints", KEPT_CHECKPOINTS, self.log
        )
        self.trainer.add_callback(Snapshots(num_snapshots, self._save_snapshot))

    def finish(self, resume: Path | None) -> TrainReport | None:
        """Train to the end and save the model. None: memory ran out. Raises TrainingError."""
        try:
            self.trainer.train(resume_from_checkpoint=str(resume) if resume else None)
        except torch.OutOfMemoryError:
            return None
        self.trainer.check(resume, self.out / "checkpoints")
        report = self._report()
        self.log.write(self.trainer.state.log_history, _metrics(report))
        policy = self.policy if self.config.method == "lora" else self.policy.to(self.stored_type)
        lora.save(policy, self.tokenizer, self.out / "model")
        return report

    def _save_snapshot(self, step: int) -> None:
        whole = self.config.method != "lora" and self.policy.dtype != self.stored_type
        policy = copy.deepcopy(self.policy).to(self.stored_type) if whole else self.policy
        (self.out / "snapshots").mkdir(exist_ok=True)
        lora.save(policy, self.tokenizer, self.out / "snapshots" / f"step-{step:06d}")

    def _report(self) -> TrainReport:
        losses = [entry["loss"] for entry in self.trainer.state.log_history if "loss" in entry]
        parameters = list(self.policy.parameters())
        return TrainReport(
            steps=self.trainer.state.global_step,
            rows=len(self.examples),
            dropped_too_long=self.examples.dropped_too_long,
            dropped_empty=self.examples.dropped_empty,
            tokens_per_epoch=self.examples.num_tokens,
            trained_tokens_per_epoch=self.examples.num_trained_tokens,
            parameters=sum(p.numel() for p in parameters),
            trainable_parameters=sum(p.numel() for p in parameters if p.requires_grad),
            micro_batch_size=self.micro_batch_size,
            loss_first=losses[0],
            loss_last=losses[-1],
        )

    def _needed_bytes(self) -> int:
        """The final model and the checkpoints that exist at once: weights and two float32 moments each."""
        trainable = sum(p.numel() for p in self.policy.parameters() if p.requires_grad)
        steps = math.ceil(len(self.examples) / self.config.batch_size) * self.config.epochs
        due = self.config.max_steps if self.config.max_steps > 0 else math.ceil(steps)
        num_checkpoints = min(KEPT_CHECKPOINTS + 1, (due - 1) // self.config.checkpoint_steps)
        num_models = self.num_snapshots
        return trainable * 4 * (num_models + 3 * num_checkpoints) + 2**20 * (num_models + num_checkpoints)


def _metrics(report: TrainReport) -> dict[str, float]:
    return {
        "distill/loss_first": report.loss_first,
        "distill/loss_last": report.loss_last,
        "distill/rows": report.rows,
        "distill/steps": report.steps,
        "distill/dropped_rows": report.dropped_too_long + report.dropped_empty,
        "distill/trained_tokens": report.trained_tokens_per_epoch,
    }
