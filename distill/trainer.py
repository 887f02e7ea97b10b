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
from transformers import PrinterCallback, TrainerCallback
from trl.trainer.sft_config import SFTConfig
from trl.trainer.sft_trainer import SFTTrainer

from configs.schema import Distill, Model
from distill.optim import BETAS
from distill.training import CurveLog, Guarded, log_every

IGNORED = -100  # the label of a token that the loss leaves out
# Up to this many tokens the plain cross-entropy beats TRL's fused head, which also works out entropies.
SMALL_VOCABULARY = 8192


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
        "logging_steps": log_every(config.checkpoint_steps),
        "logging_first_step": True,
        "logging_nan_inf_filter": False,
        "report_to": [],
        "seed": seed,
    }


class Trainer(Guarded, SFTTrainer):
    """One training."""

    vocabulary: int

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
        return trainer

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

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """No model card in a checkpoint."""

    def _send_telemetry(self) -> None:
        """Nobody is told that a model was trained."""


class Snapshots(TrainerCallback):
    """Has the model saved at the ends of `num` equal parts of the training, but for the last, which is its end.

    It happens before the checkpoint of the same step: a training resumed from that one has its snapshot.
    """

    def __init__(self, num: int, save: Callable[[int], None]) -> None:
        self.num, self.save = num, save

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step in (part * state.max_steps // self.num for part in range(1, self.num)):
            self.save(state.global_step)


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
