"""transformers' Trainer for verifiers, with our batches, losses, guards and validation; see `distill.verifier`."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import PrinterCallback, TrainingArguments

from configs.schema import Model, TrainedVerifier
from distill import checkpoints
from distill.optim import BETAS
from distill.prm_data import Row, collate
from distill.prm_model import StepScorer, loss_sum, num_terms, step_logits
from distill.training import CurveLog, Guarded, Progress, log_every
from search.errors import TrainingError

WEIGHTS = "model.safetensors"
KEPT_CHECKPOINTS = 2  # the newest, and the best or the one before


def num_steps(rows: int, settings: TrainedVerifier) -> int:
    """Optimizer steps of the whole training."""
    return max(1, math.ceil(math.ceil(rows / settings.batch_size) * settings.epochs))


def steps_between_checks(rows: int, settings: TrainedVerifier) -> int:
    return math.ceil(num_steps(rows, settings) / settings.checks)


class CheckLog(CurveLog):
    """Measures the validation loss and saves every so many steps, and measures it at the end."""

    def __init__(self, path: Path, progress: Progress | None, *, every: int, validate: bool) -> None:
        super().__init__(path, progress, prefix="verifier")
        self.every, self.validate = every, validate

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        over = state.global_step >= state.max_steps
        due = state.global_step % self.every == 0
        control.should_log = control.should_log or over
        control.should_evaluate = self.validate and (due or over)
        control.should_save = due and not over  # the model itself is saved next


class StepTrainer(Guarded):
    """One training of a verifier."""

    section = "verifier"
    settings: TrainedVerifier
    validation: Sequence[Row]

    @classmethod
    def build(
        cls,
        scorer: StepScorer,
        rows: Sequence[Row],
        validation: Sequence[Row],
        settings: TrainedVerifier,
        folder: Path,
        log: CheckLog,
        *,
        model: Model,
        device: str,
        micro_batch_size: int,
        seed: int,
    ) -> StepTrainer:
        args = _arguments(settings, model, folder, log.every, device, micro_batch_size, seed)
        args.max_steps = num_steps(len(rows), settings)
        if args.n_gpu > 1:
            args._n_gpu = 1  # one process, one GPU: the first that is visible
        trainer = cls(
            model=scorer,
            args=args,
            train_dataset=rows,  # pyright: ignore[reportArgumentType]  # a sequence is all that is asked of it
            data_collator=collate,  # pyright: ignore[reportArgumentType]
            callbacks=[log],
        )
        trainer.remove_callback(PrinterCallback)
        trainer.config = trainer.settings = settings
        trainer.policy, trainer.lengths = scorer, [len(row.ids) for row in rows]
        trainer.validation, trainer.micro_batch_size = validation, micro_batch_size
        trainer.model_accepts_loss_kwargs = True  # the loss is divided by the terms of the whole optimizer step
        return trainer

    micro_batch_size: int

    def _get_num_items_in_batch(self, batch_samples: list[Any], device: Any) -> Any:
        return sum((num_terms(batch) for batch in batch_samples), torch.zeros(())).to(device)

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Mean loss over the terms of the whole optimizer step."""
        logits = model(inputs["input_ids"], inputs["starts"], inputs["ends"]).float()
        loss = loss_sum(logits, inputs) / (num_terms(inputs) if num_items_in_batch is None else num_items_in_batch)
        return (loss, logits) if return_outputs else loss

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """The mean loss on the held-out questions, into the log. Raises TrainingError where it is not finite."""
        _, loss = step_logits(self.policy, self.validation, self.micro_batch_size, self.args.device)
        if not math.isfinite(loss):
            raise TrainingError(
                f"the validation loss of step {self.state.global_step} is not finite: lower verifier.learning_rate"
            )
        metrics = {"eval_loss": loss}
        self.log(dict(metrics))
        return metrics

    def load_best(self) -> int:
        """Go back to the weights with the lowest validation loss; their step. Raises TrainingError."""
        best, last = self.state.best_global_step, self.state.global_step
        if not best or best == last:
            return last
        folder = Path(str(self.args.output_dir)) / f"checkpoint-{best}"
        if fault := checkpoints.damage(folder):
            raise TrainingError(f"the best weights, {folder}, are damaged ({fault}): remove its folder to start afresh")
        self.policy.load_weights(folder / WEIGHTS)
        return best

    # ------------------------------------------------------------ checkpoints hold what is trained

    def _save(self, output_dir: str | None = None, state_dict: Mapping[str, Any] | None = None) -> None:
        folder = Path(str(output_dir or self.args.output_dir))
        folder.mkdir(parents=True, exist_ok=True)
        self.policy.save_weights(folder / WEIGHTS)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        self.policy.load_weights(Path(resume_from_checkpoint) / WEIGHTS)


def _arguments(
    settings: TrainedVerifier, model: Model, folder: Path, every: int, device: str, micro_batch_size: int, seed: int
) -> TrainingArguments:
    return TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=micro_batch_size,
        gradient_accumulation_steps=settings.batch_size // micro_batch_size,
        learning_rate=settings.learning_rate,
        lr_scheduler_type="constant_with_warmup" if settings.schedule == "constant" else settings.schedule,
        warmup_steps=min(settings.warmup, 1 - 1e-9),  # below 1: a share of the steps
        weight_decay=settings.weight_decay,
        adam_beta1=BETAS[0],
        adam_beta2=BETAS[1],
        max_grad_norm=settings.max_grad_norm,
        bf16=device == "cuda" and model.dtype != "float32" and torch.cuda.is_bf16_supported(),
        use_cpu=device == "cpu",
        save_strategy="steps",
        save_steps=every,
        save_total_limit=KEPT_CHECKPOINTS,
        metric_for_best_model="eval_loss",
        greater_is_better=False,
        logging_steps=log_every(every),
        logging_first_step=True,
        logging_nan_inf_filter=False,
        report_to=[],
        disable_tqdm=True,
        remove_unused_columns=False,
        dataloader_pin_memory=device != "cpu",
        seed=seed,
    )
