"""Speed of beam search on vLLM: against the raw engine, and against one problem at a time.

    python tests/benchmarks/bench_search.py [--problems 100] [--repeats 3] [--model FOLDER] [--out runs/bench]

Beam search over many problems at once, a scripted verifier that costs nothing, N = 4 M = 2 and N = 16 M = 4. What it
asked of vLLM is recorded, and replayed on the same vLLM in the same process without our search: each request, with the
same parameters, as soon as those it depends on are answered. "bare" is a harder measure: the replay knows where each
answer will end and so looks for no stop text, and samples by vLLM's own means without seeds. "at once" replays without
dependencies, which no search can do. The prefix cache is emptied before every run. Runs take turns; medians.
"""

from __future__ import annotations

import argparse
import statistics
import time
import zlib
from collections import defaultdict
from collections.abc import Collection, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

from common import markdown, tiny_base

from configs.schema import Model, VllmEngine
from search.engines.vllm import VllmEngine as Engine
from search.policy import Sampler
from search.run import search
from search.strategies import parse
from search.tasks import load_task
from search.types import Budget, Continuation, Problem, Request, Scored, ScoreRequest, VerifierFacts

SIZES = ((4, 2), (16, 4))
REPLAYS = {"raw": {}, "bare": {"bare": True}, "at once": {"dependencies": False}}


class Free:
    """A verifier that costs nothing: a checksum of the last step."""

    facts = VerifierFacts("free", 0)

    def score(self, requests: Sequence[ScoreRequest]) -> list[Scored]:
        return [Scored(tuple(zlib.crc32(step.encode()) / 2**32 for step in request.steps)) for request in requests]


class Recorder:
    """Passes everything on to the engine and keeps, for each problem, its asks and the lengths of their answers."""

    def __init__(self, engine: Engine, prompts: dict[tuple[int, ...], int]):
        self.engine, self.prompts = engine, prompts
        self.capabilities, self.facts, self.tokenizer = engine.capabilities, engine.facts, engine.tokenizer
        self.asks: dict[int, list[list[int]]] = defaultdict(list)  # problem -> its asks, as tickets in their order
        self.requests: dict[int, Request] = {}
        self.answers: dict[int, Continuation] = {}
        self._lengths = sorted({len(prompt) for prompt in prompts}, reverse=True)

    def submit(self, requests: Sequence[Request]) -> list[int]:
        tickets = self.engine.submit(requests)
        prefix = requests[0].prefix
        problem = next(self.prompts[prefix[:n]] for n in self._lengths if prefix[:n] in self.prompts)
        self.asks[problem].append(tickets)
        self.requests |= dict(zip(tickets, requests, strict=True))
        return tickets

    def collect(self, until: Collection[Future[Any]] = ()) -> list[tuple[int, Continuation]]:
        found = self.engine.collect(until)
        self.answers |= dict(found)
        return found

    def extend(self, requests: Sequence[Request]) -> list[Continuation]:
        raise AssertionError("a streaming engine is fed by submit")

    def cancel(self, tickets: Sequence[int]) -> None:
        self.engine.cancel(tickets)

    def close(self) -> None:
        self.engine.close()


def replay(engine: Engine, recorder: Recorder, *, bare: bool = False, dependencies: bool = True) -> tuple[int, float]:
    """Tokens and seconds of vLLM alone for the recorded requests."""
    from vllm import SamplingParams
    from vllm.inputs import tokens_input
    from vllm.sampling_params import RequestOutputKind

    llm = engine._llm
    waiting = {problem: [list(ask) for ask in asks] for problem, asks in recorder.asks.items()}
    owner: dict[str, int] = {}
    unanswered: dict[int, int] = {}
    tokens, started = 0, time.perf_counter()

    def send(problem: int) -> None:
        ask = waiting[problem].pop(0)
        unanswered[problem] = len(ask)
        for ticket in ask:
            request, name = recorder.requests[ticket], f"replay-{ticket}"
            parameters = engine._parameters(request)
            if bare:
                parameters = SamplingParams(
                    temperature=request.temperature,
                    max_tokens=len(recorder.answers[ticket].ids),
                    ignore_eos=True,
                    detokenize=False,
                    output_kind=RequestOutputKind.FINAL_ONLY,
                )
            owner[name] = problem
            llm.add_request(name, tokens_input(list(request.prefix)), parameters)

    for problem in waiting:
        send(problem)
        while not dependencies and waiting[problem]:
            send(problem)
    while llm.has_unfinished_requests():
        for output in llm.step():
            tokens += len(output.outputs[0].token_ids)
            problem = owner[output.request_id]
            unanswered[problem] -= 1
            if dependencies and not unanswered[problem] and waiting[problem]:
                send(problem)
    return tokens, time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--problems", type=int, default=100)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--alone", type=int, default=25, help="problems run one at a time")
    parser.add_argument("--model", type=Path, help="default: a base model of the arithmetic task, trained here")
    parser.add_argument("--out", type=Path, default=Path("runs/bench"))
    options = parser.parse_args()
    config, model = tiny_base("arithmetic", options.out / "arithmetic-base")
    task = load_task(config)
    problems = task.draw("validation", options.problems, stream="bench")
    engine = Engine(options.model or model, VllmEngine(type="vllm"), Model(dtype="float32"))
    rows: list[list[str]] = []
    for num, width in SIZES:
        rows.append(measure(engine, config, task, problems, num, width, options.repeats, options.alone))
    engine.close()
    heads = ["beam search", "tokens/s", "raw engine: ratio", "bare: ratio", "at once: ratio"]
    heads += ["problems/s", "one problem at a time: ratio"]
    markdown(heads, rows)


def measure(engine, config, task, problems: Sequence[Problem], num: int, width: int, repeats: int, alone: int):
    spec = parse(f"beam(width={width})")
    plan = spec.plan(Budget("samples", num), Free.facts)
    sampler = Sampler(engine, task, config.sampling.temperature, config.sampling.max_new_tokens, (0, "bench", "x"))
    prompts = {tuple(engine.tokenizer.encode(task.prompt(p))): i for i, p in enumerate(problems)}
    rates: dict[str, list[float]] = defaultdict(list)
    together: list[float] = []
    one_by_one: list[float] = []
    for _ in range(repeats):
        recorder = Recorder(engine, prompts)
        engine._llm.reset_prefix_cache()
        started = time.perf_counter()
        results = search(problems, plan, Sampler(recorder, *_rest(sampler)), Free())  # type: ignore[arg-type]
        spent_s = time.perf_counter() - started
        tokens = sum(result.spend.generated_tokens for result in results)
        rates["ours"].append(tokens / spent_s)
        together.append(len(problems) / spent_s)
        for name, how in REPLAYS.items():
            engine._llm.reset_prefix_cache()
            replayed, seconds = replay(engine, recorder, **how)
            assert abs(replayed - tokens) < 0.02 * tokens, f"the replay generated {replayed} tokens, not {tokens}"
            rates[name].append(replayed / seconds)
        engine._llm.reset_prefix_cache()
        started = time.perf_counter()
        for problem in problems[:alone]:
            search([problem], plan, sampler, Free())
        one_by_one.append(alone / (time.perf_counter() - started))
    rate = {name: statistics.median(found) for name, found in rates.items()}
    many, single = statistics.median(together), statistics.median(one_by_one)
    return [
        f"N = {num}, M = {width}",
        f"{rate['ours']:,.0f}",
        *(f"{rate[name]:,.0f}: {rate['ours'] / rate[name]:.2f}" for name in REPLAYS),
        f"{many:.1f}",
        f"{single:.1f}: {many / single:.1f} x",
    ]


def _rest(sampler: Sampler):
    return sampler.task, sampler.temperature, sampler.max_new_tokens, sampler.seed


if __name__ == "__main__":
    main()
