"""What every training here shares: batches by (seed, epoch) alone, guards, the loss log, the device, small files."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from torch.utils.data import Sampler
from transformers import Trainer, TrainerCallback

from distill import checkpoints
from distill.optim import build_optimizer
from search.errors import ConfigError, TrainingError
from search.randomness import key64

Progress = Callable[..., None]
LOG_EVERY = 10


class Optimized(Protocol):
    """The part of a section of the configuration that says how weights change."""

    @property
    def optimizer(self) -> Literal["adamw", "muon"]: ...
    @property
    def learning_rate(self) -> float: ...
    @property
    def adamw_learning_rate(self) -> float: ...
    @property
    def weight_decay(self) -> float: ...
    @property
    def batch_size(self) -> int: ...


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


class Guarded(Trainer):
    """Our optimizer and row order, and a stop before an update that is not finite.

    `steps_done` counts the optimizer steps of this process. Set `config`, `lengths` and `policy` before training.
    """

    section = "distill"  # of the configuration, for messages
    config: Optimized
    policy: Any
    lengths: list[int]
    steps_done: int = 0
    pending_loss: torch.Tensor | None = None

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
                    f"{self.section}.learning_rate = {self.config.learning_rate:g} or look for broken rows"
                )
        self.pending_loss = None
        self.steps_done += 1
        return norm

    def floating_point_ops(self, inputs: Any) -> int:
        return 0  # it walks over all parameters at every step, and we count tokens

    def check(self, resume: Path | None, checkpoints_folder: Path) -> None:
        """Raises TrainingError unless every step was done and every trained weight is finite."""
        state = self.state
        if state.max_steps <= 0 or state.global_step != state.max_steps or self.steps_done == 0:
            since = f" resumed from {resume.name}" if resume else ""
            raise TrainingError(
                f"the training{since} did {self.steps_done} steps and ended at step {state.global_step} of "
                f"{state.max_steps}: remove {checkpoints_folder} to start afresh"
            )
        for name, parameter in self.policy.named_parameters():
            if parameter.requires_grad and not bool(torch.isfinite(parameter).all()):
                raise TrainingError(f"after training, {name} is not finite: lower {self.section}.learning_rate")


class CurveLog(TrainerCallback):
    """Reports progress, keeps the loss curves in metrics.jsonl, and seals checkpoints."""

    def __init__(self, path: Path, progress: Progress | None, *, prefix: str = "distill") -> None:
        self.path, self.progress, self.prefix = path, progress, prefix

    def write(self, history: Sequence[Mapping[str, Any]], metrics: Mapping[str, float]) -> None:
        """The whole file: figures of the training, then the curves."""
        rows: list[dict[str, Any]] = [{"name": name, "value": value} for name, value in sorted(metrics.items())]
        rows += [row for entry in history for row in self._curves(entry)]
        self.path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.write(state.log_history, {})

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step >= state.max_steps:
            control.should_log = True
            control.should_save = False  # the model itself is saved next

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        rows = self._curves({**(logs or {}), "step": state.global_step})
        with self.path.open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)
        if self.progress and logs and "loss" in logs:
            self.progress(state.global_step, state.max_steps, loss=logs["loss"])

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        checkpoints.seal(Path(args.output_dir) / f"checkpoint-{state.global_step}")

    def _curves(self, entry: Mapping[str, Any]) -> list[dict[str, Any]]:
        names = {"loss": "loss", "eval_loss": "validation_loss"}
        step = entry["step"]
        return [
            {"name": f"{self.prefix}/{name}", "value": entry[key], "step": step}
            for key, name in names.items()
            if key in entry
        ]


def log_every(checkpoint_steps: int) -> int:
    """A divisor of the checkpoint interval: a loss window cut by a resume would be averaged differently."""
    return max(n for n in range(1, LOG_EVERY + 1) if checkpoint_steps % n == 0)


def find_device(wanted: str, setting: str = "engine.device") -> str:
    """ "cpu" or "cuda" of a device as the configuration names it. Raises ConfigError where there is no such GPU."""
    kind = wanted.partition(":")[0]
    if kind == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if kind not in ("cpu", "cuda"):
        raise ConfigError(f"{setting} = '{wanted}': training runs on auto, cpu, cuda or cuda:N")
    if kind == "cuda" and not torch.cuda.is_available():
        raise ConfigError(f"{setting} = '{wanted}', but no CUDA device answers here: use auto or cpu")
    return kind


def smaller(micro_batch_size: int, batch_size: int, section: str = "distill") -> int:
    """The largest part of the batch at most half as big. Raises TrainingError below one row."""
    if micro_batch_size == 1:
        raise TrainingError(
            f"out of GPU memory with {section}.micro_batch_size = 1: set {section}.gradient_checkpointing = true, "
            f'{section}.method = "lora", or a smaller {section}.max_length'
        )
    return max(size for size in range(1, micro_batch_size // 2 + 1) if batch_size % size == 0)


def write_json(path: Path, data: object) -> None:
    """Replace a file as a whole."""
    new = path.with_name(path.name + ".new")
    new.write_text(json.dumps(data, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    os.replace(new, path)
