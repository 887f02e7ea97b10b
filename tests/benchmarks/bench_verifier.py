"""What scoring costs beside a bare forward pass of the same model on the same tokens, and what reuse saves.

    python tests/benchmarks/bench_verifier.py [--sizes tiny,larger] [--readouts generative,scalar] [--repeats 3] \
        [--threads 1]

Verifiers of ours with random weights (the embedded tasks' size, and 512 x 8 layers) read countdown answers, 16 to a
problem, from their texts to their scores. `answers`: whole ones in one call. `beam`: 16 wide, the best 4 of a problem
go on with 4 forks each, all problems together, as the scheduler lets them. `bare` is the model's forward pass alone,
head included, on the very ids of every request, in batches of equal length and the size that is fastest here: nothing
is padded, read out or reused. `plain` is the verifier without reuse, `reuse` with it. Figures of speed are ratios of
CPU seconds, which other processes disturb less than the clock; medians of the repeats, in turns.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from common import markdown

from configs.load import load
from configs.schema import Bootstrap, Model, VerifierRuntime
from distill.bootstrap import build_model
from search.randomness import rng
from search.tasks import load_task
from search.tasks.tokenizer import build_tokenizer
from search.types import Problem, ScoreRequest
from search.verifiers.card import Card
from search.verifiers.layout import OwnLayout
from search.verifiers.readout import GenerativeReadout
from search.verifiers.trained import Trained, load_trained

N, WIDTH, ROUNDS = 16, 4, 5
BATCH_TOKENS = 2048  # of the bare pass
SHAPES = {
    "tiny": Bootstrap(),
    "larger": Bootstrap(hidden_size=512, layers=8, heads=8, feed_forward=3),
}
PROBLEMS = {"tiny": 100, "larger": 8}

# ---------------------------------------------------------------- what is read


def whole_answers(texts: Sequence[str], problems: Sequence[Problem]) -> list[list[ScoreRequest]]:
    """One call."""
    draw = rng("bench", "answers")
    return [[ScoreRequest(p, tuple(draw.choice(texts).splitlines(keepends=True))) for p in problems for _ in range(N)]]


def beam(texts: Sequence[str], problems: Sequence[Problem]) -> list[list[ScoreRequest]]:
    """A call a round: steps as they come in answers, then the answer's end."""
    draw = rng("bench", "beam")
    steps = [step for text in texts for step in text.splitlines(keepends=True) if step.endswith("\n")]
    calls: list[list[ScoreRequest]] = []
    live: list[list[tuple[str, ...]]] = [[()] * N for _ in problems]
    for depth in range(ROUNDS):
        last = depth == ROUNDS - 1
        live = [[(*one, "" if last else draw.choice(steps)) for one in beams] for beams in live]
        calls.append([ScoreRequest(p, one) for p, beams in zip(problems, live, strict=True) for one in beams])
        live = [[one for one in draw.sample(beams, N // WIDTH) for _ in range(WIDTH)] for beams in live]
    return calls


# ---------------------------------------------------------------- ways to read it


def save_verifier(folder: Path, shape: Bootstrap, readout: str) -> None:
    tokenizer = build_tokenizer()
    model = build_model(shape, tokenizer, seed=0)
    torch.manual_seed(0)
    if readout == "generative":
        GenerativeReadout(shape.hidden_size).save(folder)
    else:
        from transformers import LlamaForTokenClassification

        model.config.num_labels = 1
        classifier = LlamaForTokenClassification(model.config)
        classifier.model.load_state_dict(model.model.state_dict())
        model = classifier
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    Card("prm", "generative" if readout == "generative" else "scalar", "prod", "\n", "0" * 16).save(folder)


def bare_pass(model: Any, layout: OwnLayout, calls: Sequence[Sequence[ScoreRequest]]) -> Callable[[], None]:
    """Encoded beforehand: the pass alone is measured."""
    batches: list[torch.Tensor] = []
    for requests in calls:
        by_length: dict[int, list[tuple[int, ...]]] = {}
        for request in requests:
            ids = layout.encode(request).ids
            by_length.setdefault(len(ids), []).append(ids)
        for length, rows in by_length.items():
            size = BATCH_TOKENS // length
            batches += [torch.tensor(rows[i : i + size]) for i in range(0, len(rows), size)]

    @torch.inference_mode()
    def run() -> None:
        for ids in batches:
            model(input_ids=ids, use_cache=False)

    return run


def scoring(verifier: Trained, calls: Sequence[Sequence[ScoreRequest]], counts: dict[str, int]) -> Callable[[], None]:
    def run() -> None:
        verifier.reset()
        found = [scored for requests in calls for scored in verifier.score(requests)]
        counts["tokens"] = sum(scored.tokens for scored in found)
        counts["computed"] = sum(scored.computed_tokens for scored in found)

    return run


# ---------------------------------------------------------------- measuring


def measure(ways: dict[str, Callable[[], None]], repeats: int) -> dict[str, float]:
    """CPU seconds of each way: medians of the repeats, in turns, after one round that is not counted."""
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    for repeat in range(repeats + 1):
        for way, run in ways.items():
            started = time.process_time()
            run()
            if repeat:
                seconds[way].append(time.process_time() - started)
    return {way: statistics.median(found) for way, found in seconds.items()}


def compare(size: str, readout: str, args: argparse.Namespace) -> list[list[str]]:
    config = load("countdown")
    task: Any = load_task(config)
    shown = task.demonstrations(400, stream="bench", bootstrap=config.bootstrap)
    texts, problems = [text for _, text in shown], [problem for problem, _ in shown][: PROBLEMS[size]]
    rows: list[list[str]] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        save_verifier(folder, SHAPES[size], readout)
        parts = load_trained(folder, task, Model(), device=torch.device("cpu"))
        for what, calls in (("answers", whole_answers(texts, problems)), ("beam", beam(texts, problems))):
            counts: dict[str, dict[str, int]] = {"plain": {}, "reuse": {}}
            verifiers = {
                way: Trained(task, folder, VerifierRuntime(device="cpu", cache_tokens=room), Model())
                for way, room in (("plain", 0), ("reuse", None))
            }
            ways = {way: scoring(verifier, calls, counts[way]) for way, verifier in verifiers.items()}
            ways["bare"] = bare_pass(parts.model, OwnLayout(task, parts.tokenizer), calls)
            seconds = measure(ways, args.repeats)
            tokens, computed = counts["reuse"]["tokens"], counts["reuse"]["computed"]
            rows.append(
                [
                    *(size, readout, what, f"{tokens}", f"{tokens / seconds['bare']:.0f}"),
                    *(f"{seconds['bare'] / seconds['plain']:.2f}", f"{seconds['bare'] / seconds['reuse']:.2f}"),
                    *(f"{computed / tokens:.2f}", f"{seconds['plain'] / seconds['reuse']:.2f}"),
                ]
            )
            print(*rows[-1], flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", default="tiny,larger")
    parser.add_argument("--readouts", default="generative,scalar")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    rows = [row for size in args.sizes.split(",") for r in args.readouts.split(",") for row in compare(size, r, args)]
    print()
    heads = ["model", "read-out", "calls", "tokens read", "bare, tokens/s", "speed plain / bare", "reuse / bare"]
    markdown([*heads, "tokens computed per token read", "speed reuse / plain"], rows)


if __name__ == "__main__":
    main()
