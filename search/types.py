"""The values that pass between the parts of Ratchet and the protocols they meet at. No heavy imports.

Axis legend, used in names of arrays and nested lists everywhere: _P problems, _N candidates of one problem,
_S steps of one candidate, _T tokens. `pass_rates_P`, `step_scores_N_S[n][s]`.
"""

from __future__ import annotations

import enum
from collections.abc import Collection, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal, Protocol, runtime_checkable

Split = Literal["train", "fit", "validation", "gate", "test"]
Aggregation = Literal["last", "min", "prod", "mean"]
SPLITS: tuple[Split, ...] = ("train", "fit", "validation", "gate", "test")


class Finish(enum.StrEnum):
    """Why a continuation ended."""

    STOP = "stop"  # the step delimiter was completed; the candidate may be continued
    EOS = "eos"  # the policy ended its answer
    LENGTH = "length"  # the token limit: a truncated answer is wrong
    OVERFLOW = "overflow"  # the prefix left no room in the context
    CANCELLED = "cancelled"  # the search ended first
    ERROR = "error"  # the engine failed on this one


class Grade(enum.StrEnum):
    """A grader's verdict. `UNGRADED`: the grader itself failed; it counts as not solved and is never a label."""

    CORRECT = "correct"
    WRONG = "wrong"
    UNGRADED = "ungraded"


@dataclass(frozen=True, slots=True)
class Problem:
    """One question. `key` is canonical: equal problems have equal keys, and the key alone decides the split.

    Example: Problem("3,5,7>22", "3 5 7 > 22", "22", {"numbers": [3, 5, 7], "target": 22})
    """

    key: str
    question: str
    answer: str | None = None  # None: open-ended, no gold answer
    meta: Mapping[str, Any] = field(default_factory=dict[str, Any])


@dataclass(frozen=True, slots=True)
class Spend:
    """What was computed, counted where it happened, pruned branches included.

    `flops_ideal` counts each distinct prefix token once (for comparisons); `flops_actual` what the engine did.
    FLOPs = 2 x (non-embedding + output head parameters) x tokens; the totals hold the verifier's too.
    `samples` are answers' worth of text: whole answers, plus the most steps generated at any one depth. So a beam of
    width N costs N, and lookahead over k steps N (k + 1), as the paper charges them (section 5.3).
    """

    samples: int = 0
    generated_tokens: int = 0
    prefilled_tokens: int = 0  # prompt and prefix tokens computed
    cached_tokens: int = 0  # prefix tokens whose keys and values were reused
    verifier_tokens: int = 0  # what the verifier computed, prompts and prefixes included
    flops_ideal: float = 0.0
    flops_actual: float = 0.0
    verifier_flops_ideal: float = 0.0  # the verifier's part of the totals
    verifier_flops_actual: float = 0.0

    def __add__(self, other: Spend) -> Spend:
        return Spend(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))

    def to_json(self) -> dict[str, float]:
        return {f.name: getattr(self, f.name) for f in fields(self)}


@dataclass(frozen=True, slots=True)
class Budget:
    """How much a search may spend on one problem, in one unit. Example: Budget("samples", 16)"""

    unit: Literal["samples", "tokens", "flops"]
    amount: float


@dataclass(frozen=True, slots=True)
class Candidate:
    """One (partial) answer. Immutable: extending it makes a new one.

    `ids` are the generated token ids, EOS included when the policy wrote it; `text` leaves special tokens out.
    `step_ends[s]` is the number of ids after step s, `text_ends[s]` the number of characters (both empty: never
    split). Scores are the verifier's, one a step. `path` is the place in the search tree: the number of the first
    draw, then the number of the fork at each place where the candidate forked.
    Example: Candidate((31, 7, 2), "3+4=7\n", Finish.EOS, answer="3+4=7", grade=Grade.CORRECT)
    """

    ids: tuple[int, ...] = ()
    text: str = ""
    finish: Finish = Finish.STOP
    answer: str | None = None  # extracted and canonical; None never votes
    grade: Grade | None = None  # None: not graded
    step_ends: tuple[int, ...] = ()
    text_ends: tuple[int, ...] = ()
    step_scores: tuple[float, ...] = ()
    score: float | None = None  # aggregated verifier score
    unscored: str | None = None  # why the verifier, asked, gave no score
    logprob: float | None = None  # sum over `ids` under the sampling distribution at temperature 1
    path: tuple[int, ...] = ()
    chain: int | None = None  # which chain of revisions it belongs to, or which independent subtree
    prompt_ids: tuple[int, ...] = ()  # its own prompt where that is not the result's: a revision shows attempts
    key: int = 0  # random stream of the next token; not stored

    @property
    def complete(self) -> bool:
        return self.finish is Finish.EOS

    @property
    def open(self) -> bool:
        """Whether another step may follow."""
        return self.finish is Finish.STOP

    @property
    def steps(self) -> tuple[str, ...]:
        """The texts of its steps, delimiters included; a candidate that was never split is one step."""
        ends = self.text_ends or (len(self.text),)
        return tuple(self.text[a:b] for a, b in zip((0, *ends), ends, strict=False))

    def to_json(self) -> dict[str, Any]:
        row: dict[str, Any] = {"ids": list(self.ids), "text": self.text, "finish": self.finish.value}
        row |= {"answer": self.answer, "grade": self.grade.value if self.grade else None}
        for name in ("step_ends", "text_ends", "step_scores", "path", "prompt_ids"):
            if value := getattr(self, name):
                row[name] = list(value)
        if self.chain is not None:
            row["chain"] = self.chain
        if self.score is not None:
            row["score"] = self.score
        if self.unscored is not None:
            row["unscored"] = self.unscored
        if self.logprob is not None:
            row["logprob"] = round(self.logprob, 5)
        return row

    @classmethod
    def from_json(cls, row: Mapping[str, Any]) -> Candidate:
        return cls(
            ids=tuple(row["ids"]),
            text=row["text"],
            finish=Finish(row["finish"]),
            answer=row["answer"],
            grade=Grade(row["grade"]) if row["grade"] else None,
            step_ends=tuple(row.get("step_ends", ())),
            text_ends=tuple(row.get("text_ends", ())),
            step_scores=tuple(row.get("step_scores", ())),
            score=row.get("score"),
            unscored=row.get("unscored"),
            logprob=row.get("logprob"),
            path=tuple(row.get("path", ())),
            chain=row.get("chain"),
            prompt_ids=tuple(row.get("prompt_ids", ())),
        )


@dataclass(frozen=True, slots=True)
class SearchResult:
    """Everything one search did for one problem; a line of `results.jsonl`. Any table is recomputed from these."""

    problem: Problem
    strategy: str  # "best_of_n(16)": name and settings
    candidates: tuple[Candidate, ...]
    selected: int | None  # index into candidates of the answer given; None: abstained
    spend: Spend
    model: str  # the policy's fingerprint (sha256 of its weights, 16 hex digits)
    seed: str  # the random stream: "seed/stage/split"
    approximate: bool = False  # True where the engine could not return its token ids
    prompt_ids: tuple[int, ...] = ()  # the very ids every candidate continues; training rows start with them
    failed: str | None = None  # why this one problem could not be searched to its end; it counts as not solved

    @property
    def chosen(self) -> Candidate | None:
        """Whose answer is given."""
        return None if self.selected is None else self.candidates[self.selected]

    def to_json(self) -> dict[str, Any]:
        row: dict[str, Any] = {
            "key": self.problem.key,
            "question": self.problem.question,
            "gold": self.problem.answer,
            "meta": dict(self.problem.meta),
            "strategy": self.strategy,
            "selected": self.selected,
            "spend": self.spend.to_json(),
            "model": self.model,
            "seed": self.seed,
            "approximate": self.approximate,
            "prompt_ids": list(self.prompt_ids),
            "candidates": [c.to_json() for c in self.candidates],
        }
        return row | ({"failed": self.failed} if self.failed else {})

    @classmethod
    def from_json(cls, row: Mapping[str, Any]) -> SearchResult:
        return cls(
            problem=Problem(row["key"], row["question"], row["gold"], row["meta"]),
            strategy=row["strategy"],
            candidates=tuple(Candidate.from_json(c) for c in row["candidates"]),
            selected=row["selected"],
            spend=Spend(**row["spend"]),
            model=row["model"],
            seed=row["seed"],
            approximate=row["approximate"],
            prompt_ids=tuple(row["prompt_ids"]),
            failed=row.get("failed"),
        )

    def with_candidates(self, candidates: Sequence[Candidate]) -> SearchResult:
        return replace(self, candidates=tuple(candidates))


@dataclass(frozen=True, slots=True)
class Request:
    """One continuation to generate.

    Token t of the continuation is drawn from stream `key` at absolute position len(prefix) + t, so a sample cut
    into steps equals the sample drawn whole. temperature 0 is greedy.
    """

    prefix: tuple[int, ...]
    max_new_tokens: int
    temperature: float
    key: int  # 64 bits
    stop: str | None = None  # end with the token that completes this text; None: only EOS and length end it
    resumable: bool = False  # where it stops, the search may go on: worth keeping in a cache. Changes no token


@dataclass(frozen=True, slots=True)
class Continuation:
    """What an engine returns for a Request: only the new ids, EOS included when it was generated."""

    ids: tuple[int, ...]
    finish: Finish
    prefilled_tokens: int = 0  # prefix tokens computed for this request
    cached_tokens: int = 0  # prefix tokens taken from a cache
    logprob: float | None = None


@dataclass(frozen=True, slots=True)
class Capabilities:
    """What an engine claims; the conformance tests hold it to every claim."""

    token_ids: bool  # returns the exact ids it generated
    seeds: bool  # the same Request gives the same Continuation (in a batch of the same membership)
    logprobs: bool = False
    prefix_cache: bool = False
    hidden_states: bool = False


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """What accounting and provenance need to know of a model."""

    fingerprint: str  # sha256 over the weight files, 16 hex digits
    flops_parameters: int  # non-embedding parameters plus the output head
    max_length: int  # context length in tokens


class Tokenizer(Protocol):
    """The part of a Hugging Face tokenizer that search uses."""

    @property
    def eos_token_id(self) -> Any: ...
    def encode(self, text: str, *, add_special_tokens: bool = ...) -> Any: ...
    def decode(self, token_ids: Any, *, skip_special_tokens: bool = ...) -> Any: ...


@runtime_checkable
class Engine(Protocol):
    """Continues token prefixes. Results come back in the order of the requests; one bad request never fails the
    others (it returns Finish.OVERFLOW or Finish.ERROR). A dead engine raises EngineError."""

    capabilities: Capabilities
    facts: ModelFacts
    tokenizer: Any

    def extend(self, requests: Sequence[Request]) -> list[Continuation]: ...
    def close(self) -> None: ...


@runtime_checkable
class CachingEngine(Engine, Protocol):
    """An engine that remembers earlier calls, so that its answers depend on them (in rounding)."""

    def reset(self) -> None:
        """Forget them: what follows depends on nothing before. Called at the start of every shard."""
        ...


@runtime_checkable
class StreamingEngine(Engine, Protocol):
    """An engine that works on while more requests arrive: vLLM in this process, a server. Fed continuously."""

    def submit(self, requests: Sequence[Request]) -> list[int]:
        """Take requests in; a ticket for each. Never blocks for long."""
        ...

    def collect(self, until: Collection[Future[Any]] = ()) -> list[tuple[int, Continuation]]:
        """(ticket, continuation) of all that finished since; waits for one, unless nothing is in flight: then []. Nor
        does it wait once one of `until` is done."""
        ...

    def cancel(self, tickets: Sequence[int]) -> None:
        """Stop these; `collect` returns them as CANCELLED with the ids they have. Finished ones are left alone."""
        ...


@dataclass(frozen=True, slots=True)
class ScoreRequest:
    """What a verifier reads: the step texts of one (partial) answer, and the attempts shown before it, if any."""

    problem: Problem
    steps: tuple[str, ...]
    attempts: tuple[str, ...] = ()

    def finished(self, delimiter: str) -> bool:
        """Whether nothing follows: the last step of an answer does not hold the delimiter, and may be empty. Of others
        the token that completes the delimiter may bring more text with it."""
        return delimiter not in self.steps[-1]


@dataclass(frozen=True, slots=True)
class Scored:
    """A verifier's scores in [0, 1], one a step, and what they cost in its own tokens."""

    scores: tuple[float, ...]
    tokens: int = 0  # of the whole input
    prompt_tokens: int = 0  # of that, the part that every candidate of the problem shares
    computed_tokens: int = 0  # what was really run: less than `tokens` where a cache served
    unscored: str | None = None  # why there are no scores of this one: it votes by none, and is never taken for a 0


@dataclass(frozen=True, slots=True)
class VerifierFacts:
    """What accounting, provenance and the strategies need to know of a verifier."""

    fingerprint: str
    flops_parameters: int
    process: bool = True  # False: it scores finished answers only (ORM), with one score
    aggregation: Aggregation = "last"  # of step scores; chosen on validation and kept with a trained verifier


class Verifier(Protocol):
    """Scores steps (PRM) or finished answers (ORM). Results come back in the order of the requests."""

    facts: VerifierFacts

    def score(self, requests: Sequence[ScoreRequest]) -> list[Scored]: ...


@runtime_checkable
class CachingVerifier(Verifier, Protocol):
    """A verifier that remembers earlier calls, so that its scores depend on them (in rounding)."""

    def reset(self) -> None:
        """Forget them: what follows depends on nothing before. Called at the start of every shard."""
        ...


class DifficultyEstimate(Protocol):
    """The predicted pass rate of the policy on each problem, from the question alone; shape [P], in [0, 1]."""

    def __call__(self, problems: Sequence[Problem]) -> Sequence[float]: ...


@dataclass(frozen=True, slots=True)
class Graded:
    """A grader's verdict on one response. `answer` is canonical (equal answers are equal strings); None: none found."""

    grade: Grade
    answer: str | None


class Task(Protocol):
    """Problems and their grader. `search.tasks.load_task(config)` builds one."""

    name: str
    step_delimiter: str
    generated: bool  # problems are drawn from a generator: fresh gate sets, no file
    end_text: str | None  # what ends an answer besides EOS; None for all but few-shot prompts

    def draw(self, split: Split, num: int, *, stream: str, exclude: frozenset[str] = ...) -> list[Problem]:
        """Generated tasks: `num` distinct problems of the split, a pure function of `stream` (and `exclude`). Raises
        Exhausted (see search.tasks.splits) with those that exist where they are fewer."""
        ...

    def problems(self, split: Split) -> list[Problem]:
        """Fixed tasks: every problem of the split, in file order."""
        ...

    def prompt(self, problem: Problem) -> str | list[dict[str, str]]:
        """Text (few-shot or plain), or chat messages for a model with a template."""
        ...

    def parse(self, question: str) -> Problem:
        """The problem of a question as a user types it, without a gold answer where the task needs one. Generated
        tasks: of its key too."""
        ...

    def grade(self, pairs: Sequence[tuple[Problem, str]]) -> list[Graded]: ...

    def answers(self, pairs: Sequence[tuple[Problem, str]]) -> list[str | None]:
        """The canonical answer of each response, without looking at the gold one; None: none found. It may be called in
        several threads at once, beside `grade`."""
        ...

    def solution_key(self, problem: Problem, text: str) -> str:
        """Canonical form of a solution: two responses with equal keys are the same solution (dedupe)."""
        ...
