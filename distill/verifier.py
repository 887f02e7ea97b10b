"""Train a verifier on answers cut into steps: the paper's PRM and ORM (Snell et al. 2024, appendix), and more.

Step labels are soft targets of a binary cross-entropy at the steps' ends; answers of which only the outcome is known
train through a multiple-instance loss (see `distill.prm_model`). The read-out is a scalar head, or a generative one
that also reads the model's own log-probability of what was written (see `search.verifiers.readout`). Questions, not
answers, are held out: the weights with the lowest loss on them are kept, and on them the aggregation is chosen and
the scores are calibrated (see `distill.prm_fit`). A killed training goes on from its last valid checkpoint and, on
the same machine, ends in the same bytes. Left out: several GPUs in one process, packing.
"""

from __future__ import annotations

import gc
import shutil
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from transformers import set_seed
from transformers.utils import logging as transformers_logging

from configs.schema import Model, TrainedVerifier
from distill import checkpoints, lora
from distill.labels import StepExample, read_examples
from distill.prm_data import Row, Rows, encode
from distill.prm_fit import Fitted, fit
from distill.prm_model import StepScorer, place, step_logits
from distill.prm_trainer import KEPT_CHECKPOINTS, CheckLog, StepTrainer, num_steps, steps_between_checks
from distill.training import Progress, find_device, smaller, write_json
from search.randomness import key64
from search.types import Task
from search.verifiers.card import CARD, READOUT, Card


@dataclass(frozen=True, slots=True)
class Report:
    """What a training did; `report.json`. The same for a resumed training: wall time is in timing.json.

    The figures are of the held-out questions; None where those hold nothing that tells.
    """

    steps: int
    best_step: int
    examples: int  # trained on
    questions: int
    validation_examples: int
    validation_questions: int
    dropped_too_long: int
    dropped_unlabelled: int
    dropped_wrong: int  # surplus over `wrong_per_right`
    flipped_labels: int
    trained_tokens: int  # forward and backward, all epochs
    scored_tokens: int  # forward only: validation
    parameters: int
    trainable_parameters: int
    micro_batch_size: int  # smaller than configured where memory ran out
    loss_first: float
    loss_last: float
    validation_loss: float | None
    aggregation: str
    scale: float
    shift: float
    answer_auc_within: dict[str, float]  # by aggregation: mean over questions with right and wrong answers
    answer_auc: float | None
    answer_brier: float | None
    step_auc: float | None


def train(
    examples: Iterable[StepExample] | Path,
    init: Path,
    base: Path | None,
    out: Path,
    settings: TrainedVerifier,
    model: Model,
    task: Task,
    *,
    seed: int,
    policy_fingerprint: str,
    history: bool = False,
    threads: int | None = None,
    progress: Progress | None = None,
    device: str = "auto",
) -> Report:
    """Train the model at `init` on the examples (or a file of them) and write a verifier's folder into `out`.

    `init` is a policy's folder, or the folder of a verifier of ours, which is then trained on; `base` the full model
    under an adapter. `history`: it reads the attempts before an answer. `progress(steps, all_steps, loss=...)`.
    Writes model/, readout.safetensors, verifier.json (last: a folder that has it is whole), report.json,
    metrics.jsonl, timing.json. What an interrupted call left in `out/checkpoints` is used if it is of this training
    and undamaged.
    Raises DataError (labels, steps or questions that cannot be used), TrainingError (nothing to learn, not finite),
    ModelError, ConfigError, DiskError.
    """
    started = time.monotonic()
    kind = find_device(device, "verifier.device")
    if threads is not None:
        torch.set_num_threads(threads)
    out.mkdir(parents=True, exist_ok=True)
    folder, base = place(init, base)
    tokenizer = lora.load_tokenizer(folder, base, model)
    source = read_examples(examples) if isinstance(examples, Path) else examples
    rows = encode(source, settings, task, tokenizer, history=history)
    inputs = {
        "examples": rows.digest,
        "settings": settings.model_dump(mode="json"),
        "model": model.model_dump(mode="json"),
        "weights": {str(p.relative_to(init)): checkpoints.sha256_of(p) for p in sorted(init.rglob("*.safetensors"))},
        "seed": seed,
        "history": history,
    }
    size = settings.micro_batch_size
    while True:
        resume = checkpoints.open_folder(out / "checkpoints", inputs)
        run = _Run(rows, init, base, out, settings, model, seed, size, progress, kind)
        done = run.finish(resume)
        if done is not None:
            break
        size = smaller(size, settings.batch_size, "verifier")
        del run
        gc.collect()
        torch.cuda.empty_cache()
    report, fitted = done
    _card(settings, fitted, task, policy_fingerprint, history, base or folder).save(out)
    write_json(out / "report.json", asdict(report))
    resumed = int(resume.name.removeprefix("checkpoint-")) if resume else 0
    write_json(out / "timing.json", {"wall_s": round(time.monotonic() - started, 3), "resumed_from_step": resumed})
    shutil.rmtree(out / "checkpoints")
    return report


@contextmanager
def _quiet_loading() -> Iterator[None]:
    """A new head is no accident, so nobody is warned of it."""
    before = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(before)


class _Run:
    """One attempt at a training with one micro batch size."""

    def __init__(
        self,
        rows: Rows,
        init: Path,
        base: Path | None,
        out: Path,
        settings: TrainedVerifier,
        model: Model,
        seed: int,
        micro_batch_size: int,
        progress: Progress | None,
        device: str,
    ) -> None:
        self.rows, self.out, self.settings, self.micro_batch_size = rows, out, settings, micro_batch_size
        trainer_seed = key64(seed, "verifier") % 2**31
        set_seed(trainer_seed)  # a fresh head or adapter is drawn here
        with _quiet_loading():
            self.scorer, self.tokenizer = StepScorer.load(init, base, settings, model, device)
        folder, base = place(init, base)
        self.stored_type = lora.stored_type(lora.base_of(folder, base), model)
        self.log = CheckLog(
            out / "metrics.jsonl",
            progress,
            every=steps_between_checks(len(rows.train), settings),
            validate=bool(rows.validation),
        )
        checkpoints.require_space(out, self._needed_bytes())
        self.trainer = StepTrainer.build(
            self.scorer,
            rows.train,
            rows.validation,
            settings,
            out / "checkpoints",
            self.log,
            model=model,
            device=device,
            micro_batch_size=micro_batch_size,
            seed=trainer_seed,
        )

    def finish(self, resume: Path | None) -> tuple[Report, Fitted] | None:
        """Train to the end, go back to the best weights and save them. None: memory ran out. Raises TrainingError."""
        try:
            self.trainer.train(resume_from_checkpoint=str(resume) if resume else None)
        except torch.OutOfMemoryError:
            return None
        self.trainer.check(resume, self.out / "checkpoints")
        best = self.trainer.load_best()
        rows, device = self.rows, self.trainer.args.device
        logits, loss = step_logits(self.scorer, rows.validation, self.micro_batch_size, device)
        logits += step_logits(self.scorer, rows.spare, self.micro_batch_size, device)[0]
        process = self.settings.kind == "prm"
        fitted = fit([*rows.validation, *rows.spare], logits, self.settings.aggregation, process=process)
        report = self._report(best, loss if rows.validation else None, fitted)
        self._save()
        self.log.write(self.trainer.state.log_history, _metrics(report))
        return report, fitted

    def _save(self) -> None:
        (self.out / CARD).unlink(missing_ok=True)
        (self.out / READOUT).unlink(missing_ok=True)
        language, readout = self.scorer.language, self.scorer.readout
        language = language if self.settings.method == "lora" else language.to(self.stored_type)
        lora.save(language, self.tokenizer, self.out / "model")
        if readout is not None:
            readout.save(self.out)

    def _report(self, best: int, validation_loss: float | None, fitted: Fitted) -> Report:
        rows, state = self.rows, self.trainer.state
        losses = [entry["loss"] for entry in state.log_history if "loss" in entry]
        checks = sum("eval_loss" in entry for entry in state.log_history) + 1
        parameters = list(self.scorer.parameters())
        return Report(
            steps=state.global_step,
            best_step=best,
            examples=len(rows.train),
            questions=_questions(rows.train),
            validation_examples=len(rows.validation),
            validation_questions=_questions(rows.validation),
            dropped_too_long=rows.dropped_too_long,
            dropped_unlabelled=rows.dropped_unlabelled,
            dropped_wrong=rows.dropped_wrong,
            flipped_labels=rows.flipped,
            trained_tokens=round(_tokens(rows.train) * self.settings.epochs),
            scored_tokens=_tokens(rows.validation) * checks + _tokens(rows.spare),
            parameters=sum(p.numel() for p in parameters),
            trainable_parameters=sum(p.numel() for p in parameters if p.requires_grad),
            micro_batch_size=self.micro_batch_size,
            loss_first=losses[0],
            loss_last=losses[-1],
            validation_loss=validation_loss,
            aggregation=fitted.aggregation,
            scale=fitted.scale,
            shift=fitted.shift,
            answer_auc_within=dict(fitted.answer_auc_within),
            answer_auc=fitted.answer_auc,
            answer_brier=fitted.answer_brier,
            step_auc=fitted.step_auc,
        )

    def _needed_bytes(self) -> int:
        """The final model and the checkpoints that exist at once: weights and two float32 moments each."""
        parameters = list(self.scorer.parameters())
        trainable = sum(p.numel() for p in parameters if p.requires_grad)
        checks = (num_steps(len(self.rows.train), self.settings) - 1) // self.log.every
        return trainable * 4 * (1 + 3 * min(KEPT_CHECKPOINTS + 1, checks)) + 2**20


def _card(settings: TrainedVerifier, fitted: Fitted, task: Task, policy: str, history: bool, base: Path) -> Card:
    return Card(
        kind=settings.kind,
        readout=settings.readout,
        aggregation=fitted.aggregation,
        delimiter=task.step_delimiter,
        policy=policy,
        history=history,
        scale=fitted.scale,
        shift=fitted.shift,
        base=str(base) if settings.method == "lora" else None,
    )


def _questions(rows: Sequence[Row]) -> int:
    return len({row.key for row in rows})


def _tokens(rows: Sequence[Row]) -> int:
    return sum(len(row.ids) for row in rows)


def _metrics(report: Report) -> dict[str, float]:
    """What goes into metrics.jsonl under verifier/train_...: figures of the training itself."""
    names = ("steps", "best_step", "examples", "questions", "trained_tokens", "loss_first", "loss_last")
    names += ("validation_loss", "answer_auc", "answer_brier", "step_auc")
    values = {f"verifier/train_{name}": getattr(report, name) for name in names}
    values["verifier/train_answer_auc_within"] = report.answer_auc_within.get(report.aggregation)
    return {name: value for name, value in values.items() if value is not None}
