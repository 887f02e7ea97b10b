"""The values that pass between the parts of Ratchet and the protocols they meet at. No heavy imports.

Axis legend, used in names of arrays and nested lists everywhere: _P problems, _N candidates of one problem,
_S steps of one candidate, _T tokens. `pass_rates_P`, `step_scores_N_S[n][s]`.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal, Protocol, runtime_checkable

Split = Literal["train", "fit", "validation", "gate", "test"]
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
    FLOPs = 2 x (non-embedding + output head parameters) x tokens, policy and verifier each.
    """

    samples: int = 0
    generated_tokens: int = 0
    prefilled_tokens: int = 0  # prompt and prefix tokens computed
    cached_tokens: int = 0  # prefix tokens whose keys and values were reused
    verifier_tokens: int = 0
    flops_ideal: float = 0.0
    flops_actual: float = 0.0

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
    `step_ends[s]` is the number of ids after step s (empty: never split). Scores are the verifier's, one a step.
    Example: Candidate((31, 7, 2), "3+4=7\n", Finish.EOS, answer="3+4=7", grade=Grade.CORRECT)
    """

    ids: tuple[int, ...] = ()
    text: str = ""
    finish: Finish = Finish.STOP
    answer: str | None = None  # extracted and canonical; None never votes
    grade: Grade | None = None  # None: not graded
    step_ends: tuple[int, ...] = ()
    step_scores: tuple[float, ...] = ()
    score: float | None = None  # aggregated verifier score
    logprob: float | None = None  # sum over `ids` under the sampling distribution at temperature 1

    @property
    def complete(self) -> bool:
        return self.finish is Finish.EOS

    def to_json(self) -> dict[str, Any]:
        row: dict[str, Any] = {"ids": list(self.ids), "text": self.text, "finish": self.finish.value}
        row |= {"answer": self.answer, "grade": self.grade.value if self.grade else None}
        if self.step_ends:
            row["step_ends"] = list(self.step_ends)
        if self.step_scores:
            row["step_scores"] = list(self.step_scores)
        if self.score is not None:
            row["score"] = self.score
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
            step_scores=tuple(row.get("step_scores", ())),
            score=row.get("score"),
            logprob=row.get("logprob"),
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

    def to_json(self) -> dict[str, Any]:
        return {
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


class Verifier(Protocol):
    """Scores steps. One list a pair, one score in [0, 1] a step."""

    parameters: int

    def score(self, pairs: Sequence[tuple[Problem, Sequence[str]]]) -> list[list[float]]: ...


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
        """Generated tasks: `num` distinct problems of the split, a pure function of `stream` (and `exclude`)."""
        ...

    def problems(self, split: Split) -> list[Problem]:
        """Fixed tasks: every problem of the split, in file order."""
        ...

    def prompt(self, problem: Problem) -> str | list[dict[str, str]]:
        """Text (few-shot or plain), or chat messages for a model with a template."""
        ...

    def grade(self, pairs: Sequence[tuple[Problem, str]]) -> list[Graded]: ...

    def solution_key(self, problem: Problem, text: str) -> str:
        """Canonical form of a solution: two responses with equal keys are the same solution (dedupe)."""
        ...
