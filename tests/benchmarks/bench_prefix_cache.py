"""What the transformers engine gains by keeping the keys and values of prefixes between the steps of a search.

    python tests/benchmarks/bench_prefix_cache.py [--sizes tiny,larger] [--prompts 32,512] [--repeats 1] [--threads 1]

Random models (the embedded tasks' size, and 512 x 8 layers) write steps of 6 tokens on average; all problems advance
together, as the scheduler lets them. `best_of_n`: 16 whole answers in one call. `adaptive`: the same in calls of 4.
`beam`: 16 wide, the best 4 go on with 4 forks each. `chains`: 16 that never fork, as in step rejection. Prints the
tokens prefilled per token generated, counted, and the time with the cache against recomputing every prefix: process
CPU time, which other processes disturb less than the clock, and the clock; medians of the repeats, in turns.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.update(HF_HUB_OFFLINE="1", OMP_WAIT_POLICY="PASSIVE", GOMP_SPINCOUNT="0", HF_HUB_DISABLE_TELEMETRY="1")

import torch
import transformers

from configs.schema import Model
from configs.schema import TransformersEngine as EngineSettings
from search.engines.transformers import TransformersEngine
from search.randomness import key64
from search.types import Continuation, Finish, Request

N, M, ROUNDS, STEP_TOKENS, MAX_STEP = 16, 4, 6, 6, 24
NUM_TOKENS = 120
CACHE_TOKENS = 1 << 17
SHAPES = {"tiny": (96, 3, 4, 288), "larger": (512, 8, 8, 1536)}  # hidden, layers, heads, feed forward
PROBLEMS = {("tiny", 32): 100, ("tiny", 512): 24, ("larger", 32): 12, ("larger", 512): 4}


@dataclass
class Counts:
    generated: int = 0
    prefilled: int = 0

    def add(self, found: Sequence[Continuation]) -> None:
        self.generated += sum(len(c.ids) for c in found)
        self.prefilled += sum(c.prefilled_tokens for c in found)


# ---------------------------------------------------------------- searches


def best_of_n(engine: TransformersEngine, prompts: list[tuple[int, ...]], counts: Counts) -> None:
    whole = STEP_TOKENS * ROUNDS
    counts.add(engine.extend([Request(p, whole, 1.0, key64(i, n)) for i, p in enumerate(prompts) for n in range(N)]))


def adaptive(engine: TransformersEngine, prompts: list[tuple[int, ...]], counts: Counts) -> None:
    whole = STEP_TOKENS * ROUNDS
    for start in range(0, N, M):
        numbers = range(start, start + M)
        counts.add(engine.extend([Request(p, whole, 1.0, key64(i, n)) for i, p in enumerate(prompts) for n in numbers]))


def beam(engine: TransformersEngine, prompts: list[tuple[int, ...]], counts: Counts) -> None:
    by_steps(engine, prompts, counts, lambda ended: [c for c in best(ended, N // M) for _ in range(M)])


def chains(engine: TransformersEngine, prompts: list[tuple[int, ...]], counts: Counts) -> None:
    by_steps(engine, prompts, counts, lambda ended: ended)


def best(ended: list[tuple[int, ...]], num: int) -> list[tuple[int, ...]]:
    """A verifier without cost or sense."""
    return sorted(dict.fromkeys(ended), key=lambda ids: key64(*ids[-8:]))[:num]


def by_steps(
    engine: TransformersEngine,
    prompts: list[tuple[int, ...]],
    counts: Counts,
    choose: Callable[[list[tuple[int, ...]]], list[tuple[int, ...]]],
) -> None:
    live = [[prompt] * N for prompt in prompts]
    for depth in range(ROUNDS):
        asked = [
            (i, Request(prefix, MAX_STEP, 1.0, key64(i, depth, n), "\n", resumable=True))
            for i, prefixes in enumerate(live)
            for n, prefix in enumerate(prefixes)
        ]
        found = engine.extend([request for _, request in asked])
        counts.add(found)
        ended: list[list[tuple[int, ...]]] = [[] for _ in prompts]
        for (i, request), c in zip(asked, found, strict=True):
            if c.finish is Finish.STOP:
                ended[i].append(request.prefix + c.ids)
        live = [choose(prefixes) for prefixes in ended]


SEARCHES = {"best_of_n": best_of_n, "adaptive": adaptive, "beam": beam, "chains": chains}

# ---------------------------------------------------------------- models


def build_tokenizer() -> Any:
    """One token in STEP_TOKENS ends a step."""
    from tokenizers import Tokenizer, decoders, models

    words = [f"w{n}\n" if n % STEP_TOKENS == 0 else f"w{n} " for n in range(NUM_TOKENS)]
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(["<eos>", *words])}, unk_token="<eos>"))
    tokenizer.decoder = decoders.Fuse()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<eos>")


def save_model(folder: Path, size: str) -> None:
    hidden, layers, heads, feed_forward = SHAPES[size]
    config = transformers.LlamaConfig(
        vocab_size=NUM_TOKENS + 1,
        hidden_size=hidden,
        intermediate_size=feed_forward,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        max_position_embeddings=1024,
        eos_token_id=0,
        pad_token_id=0,
        bos_token_id=None,
    )
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    build_tokenizer().save_pretrained(folder)


def load(folder: Path, cache_tokens: int, threads: int) -> TransformersEngine:
    settings = EngineSettings(device="cpu", batch_tokens=1 << 17, max_batch_rows=2048, cache_tokens=cache_tokens)
    return TransformersEngine(folder, settings, Model(), threads)


# ---------------------------------------------------------------- measuring


def measure(engine: TransformersEngine, search: Callable[..., None], prompts: list[tuple[int, ...]]) -> Any:
    counts = Counts()
    engine.reset()
    cpu_s, wall_s = time.process_time(), time.perf_counter()
    search(engine, prompts, counts)
    return counts, time.process_time() - cpu_s, time.perf_counter() - wall_s


def compare(engines: dict[str, TransformersEngine], size: str, prompt: int, name: str, repeats: int) -> None:
    prompts = [tuple(1 + key64(i, t) % NUM_TOKENS for t in range(prompt)) for i in range(PROBLEMS[size, prompt])]
    rows: dict[str, list[Any]] = {way: [] for way in engines}
    for _ in range(repeats):
        for way, engine in engines.items():
            rows[way].append(measure(engine, SEARCHES[name], prompts))
    per_token = {way: found[0][0].prefilled / found[0][0].generated for way, found in rows.items()}
    cpu, wall = ({way: statistics.median(row[i] for row in found) for way, found in rows.items()} for i in (1, 2))
    print(
        f"{size:7} {prompt:4} {name:10} prefilled per generated token {per_token['recompute']:7.2f} ->"
        f" {per_token['cache']:6.2f}   CPU {cpu['recompute']:6.2f} s -> {cpu['cache']:6.2f} s:"
        f" {cpu['recompute'] / cpu['cache']:5.2f} times as fast, by the clock {wall['recompute'] / wall['cache']:5.2f}",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", default="tiny,larger")
    parser.add_argument("--prompts", default="32,512")
    parser.add_argument("--searches", default=",".join(SEARCHES))
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    transformers.logging.set_verbosity_error()
    for size in args.sizes.split(","):
        with tempfile.TemporaryDirectory() as folder:
            save_model(Path(folder), size)
            ways = {"recompute": 0, "cache": CACHE_TOKENS}
            engines = {way: load(Path(folder), tokens, args.threads) for way, tokens in ways.items()}
        for prompt in map(int, args.prompts.split(",")):
            for name in args.searches.split(","):
                compare(engines, size, prompt, name, args.repeats)


if __name__ == "__main__":
    main()
