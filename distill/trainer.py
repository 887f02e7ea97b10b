"""TRL's SFTTrainer with our batches, optimizer, loss log and guards; see `distill.sft`."""

from __future__ import annotations

import json
import os
from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import yaml
from datasets import Dataset
from torch.utils.data import Sampler
from transformers import PrinterCallback, TrainerCallback
from trl.trainer.sft_config import SFTConfig
from trl.trainer.sft_trainer import SFTTrainer

from configs.schema import Distill, Model
from distill import checkpoints
from distill.optim import BETAS, build_optimizer
from search.errors import TrainingError
from search.randomness import key64

IGNORED = -100  # the label of a token that the loss leaves out
# Up to this many tokens the plain cross-entropy beats TRL's fused head, which also works out entropies.
SMALL_VOCABULARY = 8192
LOG_EVERY = 10


class Examples:
    """Tokenised rows: ids and, as labels, the completion's ids."""

    def __init__(self) -> None:
        self.ids: list[array[int]] = []
        self.prompt_lengths: list[int] = []
        self.dropped_too_long = 0
        self.dropped_empty = 0

    def add(self, prompt: Sequence[int], completion: Sequence[int], max_length: int) -> None:
        """Add a row, or count why not. Without a prompt the first generated token would have no context."""
        if not prompt or not completion:
            self.dropped_empty += 1
        elif len(prompt) + len(completion) > max_length:
            self.dropped_too_long += 1
        else:
            self.ids.append(array("q", (*prompt, *completion)))
            self.prompt_lengths.append(len(prompt))

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def lengths(self) -> list[int]:
        return [len(ids) for ids in self.ids]

    @property
    def num_tokens(self) -> int:
        return sum(self.lengths)

    @property
    def num_trained_tokens(self) -> int:
        return self.num_tokens - sum(self.prompt_lengths)

    def rows(self) -> Iterator[dict[str, list[int]]]:
        """What the trainer takes: {"input_ids": [...], "labels": [-100, ..., ids of the completion]}."""
        for ids, start in zip(self.ids, self.prompt_lengths, strict=True):
            tokens = ids.tolist()
            yield {"input_ids": tokens, "labels": [IGNORED] * start + tokens[start:]}


def trainer_settings(config: Distill, model: Model, device: str, micro_batch_size: int, seed: int) -> dict[str, Any]:
    """The part of TRL's SFTConfig that decides what is learnt; also written to trl.yaml."""
    return {
        "per_device_train_batch_size": micro_batch_size,
        "gradient_accumulation_steps": config.batch_size // micro_batch_size,
        "num_train_epochs": config.epochs,
        "max_steps": config.max_steps,
        "learning_rate": config.learning_rate,
        "lr_scheduler_type": "constant_with_warmup" if config.schedule == "constant" else config.schedule,
        "warmup_steps": min(config.warmup, 1 - 1e-9),  # below 1: a share of the steps
        "weight_decay": config.weight_decay,
        "adam_beta1": BETAS[0],
        "adam_beta2": BETAS[1],
        "max_grad_norm": config.max_grad_norm,
        "gradient_checkpointing": config.gradient_checkpointing,
        "bf16": device == "cuda" and model.dtype != "float32" and torch.cuda.is_bf16_supported(),
        "use_cpu": device == "cpu",
        "max_length": None,  # rows that are too long were dropped
        "packing": False,
        "completion_only_loss": False,  # the labels say it
        "dataset_kwargs": {"skip_prepare_dataset": True},
        "logging_steps": _log_every(config.checkpoint_steps),
        "logging_first_step": True,
        "logging_nan_inf_filter": False,
        "report_to": [],
        "seed": seed,
    }


def _log_every(checkpoint_steps: int) -> int:
    """A divisor of the checkpoint interval: a loss window cut by a resume would be averaged differently."""
    return max(n for n in range(1, LOG_EVERY + 1) if checkpoint_steps % n == 0)


class BatchOrder(Sampler[int]):
    """The order of the rows in one epoch: a pure function of (seed, epoch).

    Rows of one optimizer step are drawn at random; among them, rows of like length share a micro batch, which saves
    padding and, the loss being a mean over the step's tokens, changes nothing else.
    """

    def __init__(self, lengths: Sequence[int], batch_size: int, seed: int) -> None:
        self.lengths, self.batch_size, self.seed, self.epoch = lengths, batch_size, seed, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(key64(self.seed, "epoch", self.epoch) % 2**63)
        order = torch.randperm(len(self.lengths), generator=generator).tolist()
        for start in range(0, len(order), self.batch_size):
            yield from sorted(order[start : start + self.batch_size], key=lambda row: self.lengths[row])


class Trainer(SFTTrainer):
    """One training. `steps_done` counts the optimizer steps of this process."""

    config: Distill
    policy: Any
    lengths: list[int]
    vocabulary: int
    steps_done: int
    pending_loss: torch.Tensor | None

    @classmethod
    def build(
        cls,
        policy: Any,
        tokenizer: Any,
        examples: Examples,
        settings: Mapping[str, Any],
        config: Distill,
        folder: Path,
        kept_checkpoints: int,
        log: CurveLog,
    ) -> Trainer:
        args = SFTConfig(
            output_dir=str(folder),
            save_strategy="steps",
            save_steps=config.checkpoint_steps,
            save_total_limit=kept_checkpoints,
            disable_tqdm=True,
            dataloader_pin_memory=not settings["use_cpu"],
            **settings,
        )
        if args.n_gpu > 1:
            args._n_gpu = 1  # one process, one GPU: the first that is visible
        trainer = cls(
            model=policy,
            args=args,
            train_dataset=Dataset.from_list(list(examples.rows())),
            processing_class=tokenizer,
            callbacks=[log],
        )
        trainer.remove_callback(PrinterCallback)
        trainer.config, trainer.lengths = config, examples.lengths
        trainer.policy, trainer.vocabulary = policy, policy.config.get_text_config().vocab_size
        trainer.steps_done, trainer.pending_loss = 0, None
        return trainer

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        if self.optimizer is None:
            config = self.config
            self.optimizer = build_optimizer(
                self.policy if model is None else model,
                config.optimizer,
                config.learning_rate,
                config.adamw_learning_rate,
                config.weight_decay,
            )
        return self.optimizer

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler[int]:
        return BatchOrder(self.lengths, self.config.batch_size, self.args.seed)

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Mean negative log-likelihood over the loss tokens of the whole optimizer step."""
        small = self.vocabulary <= SMALL_VOCABULARY
        plain = small and self.accelerator.num_processes == 1 and not self.aux_loss_enabled
        if not plain or return_outputs or num_items_in_batch is None:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        labels = inputs.pop("labels")[:, 1:]
        logits = model(**inputs, use_cache=False).logits[:, :-1].float()
        loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED, reduction="sum")
        return loss / num_items_in_batch

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        loss = super().training_step(*args, **kwargs)
        self.pending_loss = loss if self.pending_loss is None else self.pending_loss + loss
        return loss

    def _clip_grad_norm(self, model: Any) -> Any:
        """Called once a step, between gradients and update. Raises TrainingError where either is not finite."""
        norm = super()._clip_grad_norm(model)
        for what, value in (("loss", self.pending_loss), ("gradient norm", norm)):
            if value is not None and not bool(torch.isfinite(torch.as_tensor(value)).all()):
                raise TrainingError(
                    f"the {what} of step {self.state.global_step + 1} is not finite: nothing was updated; lower "
                    f"distill.learning_rate = {self.config.learning_rate:g} or look for broken rows"
                )
        self.pending_loss = None
        self.steps_done += 1
        return norm

    def floating_point_ops(self, inputs: Any) -> int:
        return 0  # it walks over all parameters at every step, and we count tokens

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """No model card in a checkpoint."""

    def _send_telemetry(self) -> None:
        """Nobody is told that a model was trained."""


class CurveLog(TrainerCallback):
    """Reports progress, keeps the loss curve in metrics.jsonl, and seals checkpoints."""

    def __init__(self, path: Path, progress: Callable[..., None] | None) -> None:
        self.path, self.progress = path, progress

    def write(self, history: Sequence[Mapping[str, Any]], metrics: Mapping[str, float]) -> None:
        """The whole file: figures of the training, then the curve."""
        rows: list[dict[str, Any]] = [{"name": name, "value": value} for name, value in sorted(metrics.items())]
        rows += [_curve_row(entry) for entry in history if "loss" in entry]
        self.path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.write(state.log_history, {})

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step >= state.max_steps:
            control.should_log = True
            control.should_save = False  # the model itself is saved next

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if not logs or "loss" not in logs:
            return
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(_curve_row({**logs, "step": state.global_step})) + "\n")
        if self.progress:
            self.progress(state.global_step, state.max_steps, loss=logs["loss"])

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        checkpoints.seal(Path(args.output_dir) / f"checkpoint-{state.global_step}")


def _curve_row(entry: Mapping[str, Any]) -> dict[str, Any]:
    return {"name": "distill/loss", "value": entry["loss"], "step": entry["step"]}


def write_trl_yaml(
    settings: Mapping[str, Any], config: Distill, model: Model, base: Path, examples: Examples, out: Path
) -> None:
    """`trl.yaml` and `trl-rows.jsonl`: the same training by TRL's own command line, run inside `out`."""
    with (out / "trl-rows.jsonl").open("w", encoding="utf-8") as file:
        for row in examples.rows():
            file.write(json.dumps(row, separators=(",", ":")) + "\n")
    data: dict[str, Any] = {
        "model_name_or_path": os.path.relpath(base, out) if base.is_dir() else str(base),
        "datasets": [{"path": "json", "data_files": "trl-rows.jsonl"}],
        "output_dir": "trl-output",
        **settings,
    }
    if config.method == "lora":
        data |= {"use_peft": True, "lora_r": config.lora.rank, "lora_alpha": config.lora.alpha}
        data |= {"lora_dropout": config.lora.dropout, "lora_target_modules": config.lora.target_modules}
    if config.method == "full":
        data["dtype"] = "float32"
    elif model.dtype != "auto":
        data["dtype"] = model.dtype
    notes = "# `trl sft --config trl.yaml`, run in this folder, trains on the same rows in another random order.\n"
    if config.optimizer == "muon":
        notes += "# Ours used Muon for the hidden matrices, which TRL's command line does not offer: this is AdamW.\n"
        data["learning_rate"] = config.adamw_learning_rate
    (out / "trl.yaml").write_text(notes + yaml.safe_dump(data, sort_keys=False), encoding="utf-8")
