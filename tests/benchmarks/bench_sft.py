"""Speed of `distill.trainer.Trainer` against a plain training loop, on the model of the embedded tasks.

    python tests/benchmarks/bench_sft.py [--rows 6400] [--threads 2] [--repeats 3] [--length 41]

Both train the same model on the same rows in the same order, in turns. "cpu" is process CPU time, which other
processes on the machine disturb less than the clock. Prints tokens (padding not counted) a second and the ratio.
"""

from __future__ import annotations

import argparse
import logging
import os
import random
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

os.environ.update(HF_HUB_OFFLINE="1", OMP_WAIT_POLICY="PASSIVE", GOMP_SPINCOUNT="0", HF_HUB_DISABLE_TELEMETRY="1")

import torch
import torch.nn.functional as F
from transformers import Qwen2Config, Qwen2ForCausalLM, get_cosine_schedule_with_warmup

from configs.schema import Distill, Model
from distill.optim import build_optimizer
from distill.trainer import BatchOrder, CurveLog, Examples, Trainer, trainer_settings
from search.tasks.tokenizer import build_tokenizer

CONFIG = Distill(optimizer="muon", learning_rate=0.02, epochs=1, max_length=256, checkpoint_steps=10**6)


def make_model() -> Qwen2ForCausalLM:
    torch.manual_seed(0)
    size = {"hidden_size": 96, "intermediate_size": 256, "num_hidden_layers": 3, "max_position_embeddings": 256}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 4, "tie_word_embeddings": True}
    return Qwen2ForCausalLM(Qwen2Config(vocab_size=len(build_tokenizer()), **size, **heads))


def make_examples(num_rows: int, mean_length: int) -> Examples:
    """Rows of 60 % to 140 % of the mean length, a quarter of each being prompt."""
    draw, examples = random.Random(0), Examples()
    for _ in range(num_rows):
        ids = [draw.randrange(3, 111) for _ in range(round(mean_length * draw.uniform(0.6, 1.4)))]
        examples.add(ids[: len(ids) // 4], ids[len(ids) // 4 :], CONFIG.max_length)
    return examples


def plain_loop(examples: Examples) -> Callable[[], None]:
    """The shortest loop that does the same: every logit computed, no log, no checks."""
    model, rows = make_model().train(), list(examples.rows())
    steps = -(-len(rows) // CONFIG.batch_size)
    optimizer = build_optimizer(model, "muon", CONFIG.learning_rate, CONFIG.adamw_learning_rate, 0.0)
    schedule = get_cosine_schedule_with_warmup(optimizer, round(steps * CONFIG.warmup), steps)
    order = list(BatchOrder(examples.lengths, CONFIG.batch_size, 0))

    def run() -> None:
        for start in range(0, len(order), CONFIG.batch_size):
            batch = [rows[index] for index in order[start : start + CONFIG.batch_size]]
            width = max(len(row["input_ids"]) for row in batch)
            ids, labels = torch.zeros(len(batch), width, dtype=torch.long), torch.full((len(batch), width), -100)
            for index, row in enumerate(batch):
                ids[index, : len(row["input_ids"])] = torch.tensor(row["input_ids"])
                labels[index, : len(row["labels"])] = torch.tensor(row["labels"])
            logits = model(input_ids=ids, attention_mask=(ids > 0).long(), use_cache=False).logits[:, :-1]
            F.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), CONFIG.max_grad_norm)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()

    return run


def trainer_loop(examples: Examples) -> Callable[[], None]:
    folder = Path(tempfile.mkdtemp())
    settings = trainer_settings(CONFIG, Model(), "cpu", CONFIG.micro_batch_size, 0)
    log = CurveLog(folder / "metrics.jsonl", None)
    trainer = Trainer.build(make_model(), build_tokenizer(), examples, settings, CONFIG, folder, 2, log)
    return lambda: [trainer.train()].clear()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("rows", 6400), ("threads", 2), ("repeats", 3), ("length", 41)):
        parser.add_argument(f"--{name}", type=int, default=default)
    args = parser.parse_args()
    logging.disable(logging.WARNING)
    torch.set_num_threads(args.threads)
    examples = make_examples(args.rows, args.length)
    plain_loop(make_examples(640, args.length))()  # warm-up
    loops = {"plain loop": plain_loop, "trainer": trainer_loop}
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in loops}
    for _ in range(args.repeats):
        for name, make in loops.items():
            run = make(examples)
            wall, cpu = time.perf_counter(), time.process_time()
            run()
            seconds[name].append((time.perf_counter() - wall, time.process_time() - cpu))
    print(f"{args.rows} rows, {examples.num_tokens} tokens, {args.threads} threads, median of {args.repeats}")
    middle = {name: [statistics.median(column) for column in zip(*rows, strict=True)] for name, rows in seconds.items()}
    for name, (wall, cpu) in middle.items():
        rate = examples.num_tokens / wall
        print(
            f"{name:>10}: {wall:6.2f} s wall, {cpu:6.2f} s cpu, {rate:8.0f} tokens/s, {rate / args.threads:8.0f} each"
        )
    ratios = [a / b for a, b in zip(middle["plain loop"], middle["trainer"], strict=True)]
    print(f"trainer / plain loop: {ratios[0]:.2f} by the clock, {ratios[1]:.2f} by cpu time")


if __name__ == "__main__":
    main()
