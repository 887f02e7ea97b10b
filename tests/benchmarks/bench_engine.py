"""Speed of the transformers engine against `transformers.generate`, on the model of the embedded tasks.

    python tests/benchmarks/bench_engine.py [--problems 200] [--samples 16] [--rows 1024] [--threads 2] [--repeats 3]

Both sample the same prompts with the same number of rows a batch, in turns. "cpu" is process CPU time divided by the
threads, which other processes disturb less than the clock. Prints generated tokens a second (padding after EOS not
counted), medians over the repeats, and the ratio.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

os.environ.update(HF_HUB_OFFLINE="1", OMP_WAIT_POLICY="PASSIVE", GOMP_SPINCOUNT="0", HF_HUB_DISABLE_TELEMETRY="1")

import torch
import transformers

from configs.schema import Bootstrap, CountdownTask, Model, Splits
from configs.schema import TransformersEngine as EngineSettings
from distill.bootstrap import build_model
from search.engines.transformers import TransformersEngine
from search.randomness import key64
from search.tasks.countdown import Countdown
from search.tasks.tokenizer import build_tokenizer
from search.types import Request

MAX_NEW_TOKENS = 24


class Speed(NamedTuple):
    """Tokens a second."""

    cpu: float
    wall: float


def measure(generate: Callable[[], int], threads: int) -> Speed:
    cpu_s, wall_s = time.process_time(), time.perf_counter()
    num_tokens = generate()
    return Speed(num_tokens * threads / (time.process_time() - cpu_s), num_tokens / (time.perf_counter() - wall_s))


def plain(engine: TransformersEngine, requests: list[Request], rows: int) -> int:
    """The same work by `generate`: left-padded batches of prompts, ancestral sampling."""
    num_tokens = 0
    eos, pad = engine.tokenizer.eos_token_id, engine.tokenizer.pad_token_id
    with torch.inference_mode():
        for start in range(0, len(requests), rows):
            ids, mask = engine.pad([request.prefix for request in requests[start : start + rows]])
            output = engine.model.generate(
                ids,
                attention_mask=mask,
                do_sample=True,
                top_k=0,
                max_new_tokens=MAX_NEW_TOKENS,
                eos_token_id=eos,
                pad_token_id=pad,
            )
            num_tokens += int((output[:, ids.shape[1] :] != pad).sum())
    return num_tokens


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("problems", 200), ("samples", 16), ("rows", 1024), ("threads", 2), ("repeats", 3)):
        parser.add_argument(f"--{name}", type=int, default=default)
    args = parser.parse_args()
    transformers.logging.set_verbosity_error()
    task = Countdown(CountdownTask(type="countdown"), Splits(), 0)
    problems = task.draw("train", args.problems, stream="benchmark")
    with tempfile.TemporaryDirectory() as folder:
        tokenizer = build_tokenizer()
        build_model(Bootstrap(), tokenizer, seed=0).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        settings = EngineSettings(max_batch_rows=args.rows, batch_tokens=1 << 20, device="cpu")
        engine = TransformersEngine(Path(folder), settings, Model(), args.threads)
    requests = [
        Request(tuple(tokenizer.encode(task.prompt(p), add_special_tokens=False)), MAX_NEW_TOKENS, 1.0, key64(p.key, n))
        for p in problems
        for n in range(args.samples)
    ]
    ways: dict[str, Callable[[], int]] = {
        "engine": lambda: sum(len(c.ids) for c in engine.extend(requests)),
        "generate": lambda: plain(engine, requests, args.rows),
    }
    speeds: dict[str, list[Speed]] = {name: [] for name in ways}
    for _ in range(args.repeats):
        for name, generate in ways.items():
            speeds[name].append(measure(generate, args.threads))
    cpu = {name: statistics.median(speed.cpu for speed in found) for name, found in speeds.items()}
    wall = {name: statistics.median(speed.wall for speed in found) for name, found in speeds.items()}
    for name in ways:
        print(f"{name:10} {cpu[name]:10,.0f} tokens/s by cpu time {wall[name]:10,.0f} tokens/s by the clock")
    print(f"ratio      {cpu['engine'] / cpu['generate']:10.2f} {wall['engine'] / wall['generate']:34.2f}")


if __name__ == "__main__":
    main()
