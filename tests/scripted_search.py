"""What the tests of search share: an engine that follows a script of the test, a verifier with scores of the test, a
chain task, a streaming engine that answers in any order, and counts of what was spent that owe nothing to the code.

Tokens are bytes, as in search.engines.scripted. A piece of text that ends with a newline is a step that may be followed
by another; any other ends the answer.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from search import answers
from search.engines.scripted import EOS, SEPARATOR, ByteTokenizer
from search.engines.streaming import Streaming
from search.errors import EngineError
from search.policy import Policy, Sampler
from search.randomness import key64, rng
from search.run import Plan, search
from search.scheduler import run_together
from search.strategies import parse
from search.types import (
    Budget,
    Capabilities,
    Continuation,
    Finish,
    Grade,
    Graded,
    ModelFacts,
    Problem,
    Request,
    Scored,
    ScoreRequest,
    SearchResult,
    VerifierFacts,
)

Script = Callable[[str, str, float, int], str]  # (prompt, written, temperature, key of this place) -> the next piece


class StepEngine:
    """Continues piece by piece as `script` says; `log` holds every request with its continuation.

    Draws depend on the key and the place alone, so an answer cut into steps is the answer drawn whole. With `cache` it
    tells which prefix tokens it has met before.
    """

    capabilities = Capabilities(token_ids=True, seeds=True)

    def __init__(self, script: Script, *, max_length: int = 4096, parameters: int = 1000, cache: bool = False):
        self.script = script
        self.tokenizer = ByteTokenizer()
        self.facts = ModelFacts("step-engine", parameters, max_length)
        self.log: list[tuple[Request, Continuation]] = []
        self._met: set[tuple[int, ...]] | None = set() if cache else None

    def extend(self, requests: Sequence[Request]) -> list[Continuation]:
        continuations = [self.extend_one(request) for request in requests]
        self.log += zip(requests, continuations, strict=True)
        return continuations

    def close(self) -> None:
        """Nothing to free."""

    def extend_one(self, request: Request) -> Continuation:
        if len(request.prefix) >= self.facts.max_length:
            return Continuation((), Finish.OVERFLOW)
        boundary = len(request.prefix) - 1 - request.prefix[::-1].index(SEPARATOR)
        prompt = self.tokenizer.decode(request.prefix[:boundary])
        written = self.tokenizer.decode(request.prefix[boundary + 1 :])
        room = min(request.max_new_tokens, self.facts.max_length - len(request.prefix))
        ids: list[int] = []
        finish = Finish.LENGTH
        while len(ids) <= room and finish is Finish.LENGTH:
            piece = self.script(prompt, written, request.temperature, key64(request.key, len(written)))
            ids += piece.encode()
            written += piece
            if not piece.endswith("\n"):
                ids, finish = [*ids, EOS], Finish.EOS
            elif request.stop is not None and request.stop in written[-len(piece) - len(request.stop) :]:
                finish = Finish.STOP
        if len(ids) > room:
            ids, finish = ids[:room], Finish.LENGTH
        return Continuation(tuple(ids), finish, **self._prefill(request.prefix, ids))

    def _prefill(self, prefix: tuple[int, ...], ids: Sequence[int]) -> dict[str, int]:
        """How much of the prefix is computed; at least its last token is, for the logits."""
        if self._met is None:
            return {"prefilled_tokens": len(prefix)}
        cached = next((n for n in range(len(prefix) - 1, 0, -1) if prefix[:n] in self._met), 0)
        whole = (*prefix, *ids)
        self._met |= {whole[:n] for n in range(1, len(whole) + 1)}
        return {"prefilled_tokens": len(prefix) - cached, "cached_tokens": cached}


def by_table(table: Mapping[str, str | Sequence[str]], greedy: Mapping[str, str] | None = None) -> Script:
    """Pieces by what is written: of several, one after another in the order they are asked for, and from the start
    again. `greedy`: those at temperature 0, where they differ from the first of the table."""
    asked: Counter[str] = Counter()

    def script(prompt: str, written: str, temperature: float, key: int) -> str:
        if temperature == 0 and written in (greedy or {}):
            return (greedy or {})[written]
        pieces = table[written]
        if temperature == 0:
            return pieces if isinstance(pieces, str) else pieces[0]
        if isinstance(pieces, str):
            return pieces
        asked[written] += 1
        return pieces[(asked[written] - 1) % len(pieces)]

    return script


class ShuffledStream(Streaming):
    """A streaming engine over a synchronous one: works on one request after another in any order, and gives the
    answers in lumps. It dies after `num_answers`."""

    def __init__(self, engine: StepEngine, seed: int, *, num_answers: int | None = None):
        super().__init__()
        self.engine, self.capabilities = engine, engine.capabilities
        self.facts, self.tokenizer = engine.facts, engine.tokenizer
        self.cancelled: list[int] = []
        self.flying: dict[int, Request] = {}
        self._rng = rng("stream", seed)
        self._tickets = 0
        self._left = num_answers

    def submit(self, requests: Sequence[Request]) -> list[int]:
        tickets = [*range(self._tickets, self._tickets + len(requests))]
        self._tickets += len(requests)
        self.flying |= dict(zip(tickets, requests, strict=True))
        return tickets

    def cancel(self, tickets: Sequence[int]) -> None:
        self.cancelled += [ticket for ticket in tickets if ticket in self.flying]

    def _collect(self) -> list[tuple[int, Continuation]]:
        if not self.flying:
            return []
        cancelled = [t for t in self.cancelled if t in self.flying]
        if cancelled:
            for ticket in cancelled:
                del self.flying[ticket]
            return [(ticket, Continuation((), Finish.CANCELLED)) for ticket in cancelled]
        if self._left == 0:
            self.flying.clear()
            raise EngineError("the engine died")
        num = self._rng.randint(1, min(3, len(self.flying)))
        num = num if self._left is None else min(num, self._left)
        taken = self._rng.sample(sorted(self.flying), num)
        self._left = None if self._left is None else self._left - num
        return [(ticket, self.engine.extend([self.flying.pop(ticket)])[0]) for ticket in taken]

    def close(self) -> None:
        """Nothing to free."""


# ---------------------------------------------------------------- verifiers


Judge = Callable[[str], float]


class TextVerifier:
    """Scores each step by `judge(the text up to its end)`; `log` holds every request. A token is a character."""

    def __init__(self, judge: Judge, *, parameters: int = 0, process: bool = True, aggregation: Any = "last"):
        self.judge = judge
        self.facts = VerifierFacts("text-verifier", parameters, process, aggregation)
        self.log: list[ScoreRequest] = []
        self.batches: list[int] = []

    def score(self, requests: Sequence[ScoreRequest]) -> list[Scored]:
        self.log += requests
        self.batches.append(len(requests))
        return [self._score(request) for request in requests]

    def _score(self, request: ScoreRequest) -> Scored:
        ends = range(1, len(request.steps) + 1) if self.facts.process else [len(request.steps)]
        scores = tuple(self.judge("".join(request.steps[:end])) for end in ends)
        prompt = len(request.problem.question) + sum(map(len, request.attempts))
        tokens = prompt + sum(map(len, request.steps))
        return Scored(scores, tokens=tokens, prompt_tokens=prompt, computed_tokens=tokens)


def by_score(table: Mapping[str, float], default: float = 0.5) -> TextVerifier:
    return TextVerifier(lambda text: table.get(text, default))


# ---------------------------------------------------------------- tasks


class LineTask:
    """The prompt is the question; the answer is the last line, right where it is the gold one."""

    name = "lines"
    step_delimiter = "\n"
    generated = False
    end_text: str | None = None

    def prompt(self, problem: Problem) -> str:
        return problem.question

    def answers(self, pairs: Sequence[tuple[Problem, str]]) -> list[str | None]:
        return [self.answer(text) for _, text in pairs]

    def grade(self, pairs: Sequence[tuple[Problem, str]]) -> list[Graded]:
        answers = [self.answer(text) for _, text in pairs]
        return [
            Graded(Grade.CORRECT if answer == problem.answer else Grade.WRONG, answer)
            for (problem, _), answer in zip(pairs, answers, strict=True)
        ]

    @staticmethod
    def answer(text: str) -> str | None:
        return text.rsplit("\n", 1)[-1] or None


class ChainTask(LineTask):
    """`length` digits, one a line, each with the right one before it: the answer is right where all of them are.

    The question names the digits, so that the script of `chain_engine` can be right with a known chance.
    """

    @staticmethod
    def answer(text: str) -> str | None:
        return text.replace("\n", "") or None

    def problem(self, number: int, length: int) -> Problem:
        digits = f"{key64('chain', number) % 10**length:0{length}}"
        return Problem(f"chain-{number}", digits, digits)

    def step_labels(self, problem: Problem, text: str) -> list[bool]:
        digits, lines = problem.answer or "", text.removesuffix("\n").split("\n")
        return [lines[: n + 1] == [*digits[: n + 1]] for n in range(len(lines))]


def chain_engine(chance: float, **options: Any) -> StepEngine:
    """Each step is right with probability `chance`, else one of 900 wrong ones."""

    def script(prompt: str, written: str, temperature: float, key: int) -> str:
        digits = prompt.rsplit("\n\n", 1)[-1]
        place = written.count("\n")
        digit = digits[place] if key64(key, "right") / 2**64 < chance else str(100 + key % 900)
        return digit if place + 1 == len(digits) else f"{digit}\n"

    return StepEngine(script, **options)


# ---------------------------------------------------------------- any strategy on any tree

PLAIN = ["greedy", "majority", "adaptive_majority", "adaptive_budget_majority", "revisions_majority(ratio=4)"]
SCORED = [
    "best_of_n",
    "best_of_n_weighted",
    "adaptive_best_of_n",
    "adaptive_budget",
    "revisions",
    "revisions(ratio=inf)",
]
STEPWISE = ["beam(width=2)", "beam(width=4)", "beam(width=2, distinct=true)", "lookahead(width=2)", "dvts(width=2)"]
STEPWISE += ["lookahead(width=1, steps=3)", "rebase", "step_rejection", "step_rejection(draws=8, max_rounds=2)"]
STEPWISE += ["beam_revisions(width=2)", "searched_revisions(width=2)", "beam(width=2, max_rounds=1)"]
ALL = [*PLAIN, *SCORED, *STEPWISE]


def babbling(seed: int, **options: Any) -> StepEngine:
    """Steps, ends, empty ends and endless steps, as the draw falls; the longer the answer the likelier its end."""
    pieces = ["a\n", "bb\n", "\n", "cc\n", "A", "BB", "", "x" * 99]

    def script(prompt: str, written: str, temperature: float, key: int) -> str:
        drawn = key64(seed, key if temperature else written)
        return pieces[drawn % (4 if len(written) < 6 else 8)]

    return StepEngine(script, **options)


def judging(seed: int, **options: Any) -> TextVerifier:
    return TextVerifier(lambda text: key64(seed, text) / 2**64, **options)


# ---------------------------------------------------------------- runs


QUESTION = Problem("q", "q", "A")


def run_one(
    strategy: str, samples: float, engine: Any, verifier: Any = None, *, max_new_tokens: int = 200, **more: Any
) -> SearchResult:
    """One question under a strategy, as `ratchet solve` would search it."""
    return run_all(strategy, samples, engine, [QUESTION], verifier, max_new_tokens=max_new_tokens, **more)[0]


def run_all(
    strategy: str,
    samples: float,
    engine: Any,
    problems: Sequence[Problem],
    verifier: Any = None,
    *,
    task: Any = None,
    unit: Any = "samples",
    max_new_tokens: int = 200,
    seed: object = 0,
    **more: Any,
) -> list[SearchResult]:
    budget = Budget(unit, samples)
    plan = parse(strategy).plan(budget, verifier.facts if verifier else None)
    sampler = sampler_of(engine, task, max_new_tokens=max_new_tokens, seed=seed)
    return search(problems, plan, sampler, verifier, **more)


def sampler_of(engine: Any, task: Any = None, *, max_new_tokens: int = 200, seed: object = 0) -> Sampler:
    return Sampler(engine, task or LineTask(), 1.0, max_new_tokens, (seed, "test", "test"))


def plan_of(strategy: Any, samples: float = 4, rule: answers.Rule = answers.majority, unit: Any = "samples") -> Plan:
    """A plan of a coroutine that the test wrote."""
    return Plan(f"own @ {samples}", strategy, Budget(unit, samples), rule)


def texts(result: SearchResult) -> list[str]:
    return [c.text for c in result.candidates]


def given(result: SearchResult) -> str | None:
    return None if result.chosen is None else result.chosen.answer


def accuracy(results: Sequence[SearchResult]) -> float:
    return sum(r.chosen is not None and r.chosen.grade is Grade.CORRECT for r in results) / len(results)


def check_company(strategy: str, digits: int, chance: float, *, num: int) -> None:
    """Results depend neither on the company a problem keeps nor on the order in which a stream completes."""
    problems = [Problem(f"p{n}", f"{key64(n) % 10**digits:0{digits}d}", "x") for n in range(num)]

    def judge() -> TextVerifier:
        return TextVerifier(lambda text: key64(text) / 2**64)

    alone = [run_all(strategy, 8, chain_engine(chance), [p], judge())[0] for p in problems]
    assert run_all(strategy, 8, chain_engine(chance), problems, judge()) == alone
    for seed in range(3):
        stream = ShuffledStream(chain_engine(chance), seed)
        assert run_all(strategy, 8, stream, problems, judge()) == alone


def policy_for(engine: Any, budget: Budget | None = None, **more: Any) -> Policy:
    return Policy(QUESTION, sampler_of(engine, **more), budget or Budget("samples", 8))


def run(coroutine: Any, engine: Any, verifier: Any = None) -> Any:
    """The result of one coroutine that asks a policy."""
    return run_together([coroutine], engine, verifier)[0]


# ---------------------------------------------------------------- independent counts


@dataclass(frozen=True)
class Count:
    """What a log of an engine and of a verifier add up to, counted from nothing but the logs."""

    generated: int
    prefilled: int
    cached: int
    verifier: int
    ideal_flops: float
    actual_flops: float


def count(engine: StepEngine, verifier: TextVerifier | None = None) -> Count:
    """Of a search of ONE problem."""
    generated = sum(len(c.ids) for _, c in engine.log)
    prefilled = sum(c.prefilled_tokens for _, c in engine.log)
    distinct, read, read_distinct = _distinct_tokens(engine.log), 0, 0
    policy, judge = engine.facts.flops_parameters, 0
    if verifier:
        judge = verifier.facts.flops_parameters
        inputs = [("".join([r.problem.question, *r.attempts]), *r.steps) for r in verifier.log]
        read = sum(sum(map(len, parts)) for parts in inputs)
        ways = {parts[:n]: len(parts[n - 1]) for parts in inputs for n in range(1, len(parts) + 1)}
        read_distinct = sum(ways.values())
    return Count(
        generated,
        prefilled,
        sum(c.cached_tokens for _, c in engine.log),
        read,
        2.0 * (policy * distinct + judge * read_distinct),
        2.0 * (policy * (generated + prefilled) + judge * read),
    )


def _distinct_tokens(log: Iterable[tuple[Request, Continuation]]) -> int:
    """Generated tokens, and of the prefixes what no earlier sequence held: a trie over all ids, in order."""
    trie: dict[int, Any] = {}
    distinct = 0
    for request, continuation in log:
        if not continuation.ids:
            continue
        node = trie
        for token in request.prefix:
            distinct += token not in node
            node = node.setdefault(token, {})
        for token in continuation.ids:
            distinct += 1
            node = node.setdefault(token, {})
    return distinct
