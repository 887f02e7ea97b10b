"""Train the embedded base model: a tiny Llama, from scratch, on demonstrations of its task.

An own loop instead of the HF Trainer: with rows grouped by length nothing is padded, and every hidden matrix follows
Muon. It stops after a number of steps, never after a time, so a seed and a thread count give the same weights bit for
bit. Left out: checkpoints within the stage (it takes about a minute), mixed precision.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import count, islice
from pathlib import Path
from typing import Any, Protocol

import torch

from configs.schema import Bootstrap, Config
from distill.optim import build_optimizer
from distill.select import Row
from search.errors import TrainingError
from search.randomness import key64, rng
from search.tasks import load_task
from search.tasks.tokenizer import build_tokenizer
from search.types import Problem, Task

MAX_LENGTH = 256  # tokens; the longest chain needs 131
MAX_GRAD_NORM = 1.0
REPLAY_ROWS = 20_000  # demonstrations kept for replay
CHUNK = 1000  # demonstrations generated together by `more_rows`
REPORT_STEPS = 10

Progress = Callable[..., None]


class Teaching(Protocol):
    """The part of a task that a base model is trained with."""

    def demonstrations(self, num: int, *, stream: str, bootstrap: Bootstrap) -> list[tuple[Problem, str]]: ...


def run(config: Config, inputs: Mapping[str, Path], out: Path, progress: Progress | None = None) -> None:
    """Write `model/`, `replay.jsonl`, `metrics.jsonl` and `timing.json` into `out`. Raises TrainingError."""
    started_s, cpu_s = time.monotonic(), time.process_time()
    settings = config.bootstrap
    if config.stages.threads is not None:
        torch.set_num_threads(config.stages.threads)
    rows = list(islice(_rows(config, load_task(config), "bootstrap", settings.examples), settings.examples))
    tokenizer = build_tokenizer()
    model = build_model(settings, tokenizer, seed=key64(config.loop.seed, "bootstrap"))
    loss = _train(model, rows, settings, seed=config.loop.seed, progress=progress or _silent)
    model.save_pretrained(out / "model")
    tokenizer.save_pretrained(out / "model")
    with (out / "replay.jsonl").open("w", encoding="utf-8") as file:
        for row in rows[:REPLAY_ROWS]:
            file.write(json.dumps(row.to_json()) + "\n")
    metrics = {
        "bootstrap/loss": loss,
        "bootstrap/examples": len(rows),
        "bootstrap/steps": _num_steps(len(rows), settings),
        "bootstrap/trained_tokens": sum(row.tokens for row in rows) * settings.epochs,
        "bootstrap/parameters": sum(p.numel() for p in model.parameters()),
    }
    with (out / "metrics.jsonl").open("w", encoding="utf-8") as file:
        for name, value in metrics.items():
            file.write(json.dumps({"name": name, "value": value}) + "\n")
    timing = {"wall_s": time.monotonic() - started_s, "cpu_s": time.process_time() - cpu_s}
    (out / "timing.json").write_text(json.dumps(timing) + "\n", encoding="utf-8")


def more_rows(config: Config, task: Task, *, stream: str) -> Iterator[Row]:
    """Endless rows of the kind that the base was trained on, other ones for another `stream`."""
    for number in count():
        yield from _rows(config, task, f"{stream}/{number}", CHUNK)


def _rows(config: Config, task: Any, stream: str, num: int) -> Iterator[Row]:
    tokenizer = build_tokenizer()
    teacher: Teaching = task
    for problem, response in teacher.demonstrations(num, stream=stream, bootstrap=config.bootstrap):
        yield Row(
            key=problem.key,
            prompt_ids=tuple(tokenizer.encode(task.prompt(problem), add_special_tokens=False)),
            completion_ids=(*tokenizer.encode(response, add_special_tokens=False), tokenizer.eos_token_id),
            source="replay",
            round=0,
            solution=task.solution_key(problem, response),
        )


def build_model(settings: Bootstrap, tokenizer: Any, *, seed: int) -> Any:
    """An untrained Llama of the configured size, float32; the global random state is left as it was."""
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=settings.hidden_size,
        intermediate_size=settings.feed_forward * settings.hidden_size,
        num_hidden_layers=settings.layers,
        num_attention_heads=settings.heads,
        num_key_value_heads=settings.key_value_heads or settings.heads,
        max_position_embeddings=MAX_LENGTH,
        tie_word_embeddings=False,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(shape)


# ---------------------------------------------------------------- training


def _num_steps(num_rows: int, settings: Bootstrap) -> int:
    return math.ceil(num_rows * settings.epochs / settings.batch_size)


def _train(model: Any, rows: Sequence[Row], settings: Bootstrap, *, seed: int, progress: Progress) -> float:
    """Train in place; the mean loss of the last tenth of the steps, per completion token. Raises TrainingError."""
    steps = _num_steps(len(rows), settings)
    optimizer = build_optimizer(model, "muon", settings.learning_rate, settings.adamw_learning_rate, 0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _rate(step, steps, settings.warmup))
    batches = _batches(rows, settings.batch_size, seed)
    losses: list[float] = []
    model.train()
    for step in range(1, steps + 1):
        # ---- the step
        loss = _backward(model, next(batches))
        torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_GRAD_NORM)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        # ---- once in a while
        losses.append(loss)
        if not math.isfinite(loss):
            raise TrainingError(f"the base model's loss is {loss} at step {step}: lower bootstrap.learning_rate")
        if step % REPORT_STEPS == 0 or step == steps:
            progress(step, steps, loss=loss)
    model.eval()
    last = losses[-max(1, steps // 10) :]
    return sum(last) / len(last)


def _rate(step: int, steps: int, warmup: float) -> float:
    """Linear warm-up, then linear decay to zero."""
    rising = warmup * steps
    return (step + 1) / rising if step + 1 < rising else (steps - step) / max(1.0, steps - rising)


def _batches(rows: Sequence[Row], size: int, seed: int) -> Iterator[list[Row]]:
    """Endless batches; every row once an epoch, in an order drawn anew."""
    waiting: list[Row] = []
    for epoch in count():
        order = list(range(len(rows)))
        rng(seed, "bootstrap", "epoch", epoch).shuffle(order)
        waiting.extend(rows[i] for i in order)
        while len(waiting) >= size:
            yield waiting[:size]
            del waiting[:size]


def _backward(model: Any, batch: Sequence[Row]) -> float:
    """Accumulate the gradients of the mean loss over the batch's completion tokens. One pass a length: no padding."""
    by_length: dict[tuple[int, int], list[Row]] = {}
    for row in batch:
        by_length.setdefault((len(row.prompt_ids), len(row.completion_ids)), []).append(row)
    num_labels = sum(len(row.completion_ids) for row in batch)
    total = 0.0
    for (prompt, _), group in sorted(by_length.items()):
        ids = torch.tensor([[*row.prompt_ids, *row.completion_ids] for row in group])
        logits = model(input_ids=ids[:, :-1]).logits[:, prompt - 1 :]
        labels = ids[:, prompt:].reshape(-1)
        loss = torch.nn.functional.cross_entropy(logits.reshape(len(labels), -1), labels, reduction="sum") / num_labels
        loss.backward()
        total += float(loss.detach())
    return total


def _silent(*_: object, **__: object) -> None:
    """The progress callback of callers that want none."""
