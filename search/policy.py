"""The metered handles through which ONE problem's strategy asks the policy and the verifier.

They own the random streams, count the Spend where it happens, and refuse what the budget cannot pay: a strategy can
neither overspend nor misreport. Whatever they ask is an `Ask`, a `Question` or a `Reading`, which the scheduler merges
with those of other problems into full batches.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from configs.schema import Config
from search.errors import BudgetExceeded, VerifierError
from search.prompts import prompt_ids, revision_prompt
from search.randomness import key64
from search.trace import Trace
from search.types import (
    Aggregation,
    Budget,
    Candidate,
    Continuation,
    Engine,
    Finish,
    Problem,
    Request,
    Scored,
    ScoreRequest,
    Spend,
    Task,
    Verifier,
)

AGGREGATE: dict[Aggregation, Callable[[Sequence[float]], float]] = {
    "last": lambda scores: scores[-1],
    "min": min,
    "prod": math.prod,
    "mean": lambda scores: math.fsum(scores) / len(scores),
}


_Read = tuple[tuple[str, ...], tuple[str, ...]]  # what a verifier reads besides the problem: attempts, steps


class Ask:
    """Requests of one strategy, waiting for the engine. Awaiting it hands it to the scheduler."""

    def __init__(self, requests: Sequence[Request]):
        self.requests = requests
        self.reply: list[Continuation] = []

    def __await__(self) -> Generator[Ask, None, list[Continuation]]:
        yield self
        return self.reply


class Question:
    """What one strategy wants scored, waiting for the verifier."""

    def __init__(self, requests: Sequence[ScoreRequest]):
        self.requests = requests
        self.reply: list[Scored] = []

    def __await__(self) -> Generator[Question, None, list[Scored]]:
        yield self
        return self.reply


class Reading:
    """Responses of one problem whose answers one strategy wants to know, waiting for the task to read them."""

    def __init__(self, pairs: Sequence[tuple[Problem, str]]):
        self.pairs = pairs
        self.reply: list[str | None] = []

    def __await__(self) -> Generator[Reading, None, list[str | None]]:
        yield self
        return self.reply


Waiting = Ask | Question | Reading  # what a strategy yields to the scheduler


@dataclass(frozen=True, slots=True)
class Sampler:
    """How answers are drawn in one stage: shared by all its problems."""

    engine: Engine
    task: Task
    temperature: float
    max_new_tokens: int  # of one answer, all its steps together
    seed: tuple[object, ...]  # (loop seed, stage, split): first parts of every random key

    @classmethod
    def of(cls, config: Config, engine: Engine, task: Task, stage: str, split: str) -> Sampler:
        """As the configuration says."""
        sampling = config.sampling
        return cls(engine, task, sampling.temperature, sampling.max_new_tokens, (config.loop.seed, stage, split))


class Policy:
    """Ask the policy about one problem.

    `spend` is what the problem has cost so far, the verifier included. `kept` is what the strategy said it has: what
    is left where the budget runs out in the middle.
    """

    def __init__(self, problem: Problem, sampler: Sampler, budget: Budget, trace: Trace | None = None):
        self.problem = problem
        self.prompt_ids = tuple(prompt_ids(sampler.task, sampler.engine.tokenizer, problem))
        self.spend = Spend()
        self.trace = trace
        self._sampler = sampler
        self._budget = budget
        self._kept: tuple[list[Candidate], list[Candidate]] = ([], [])  # for good, and so far
        self._answers: list[Candidate] = []  # whatever came to its end, for the ideal FLOPs
        self._drawn: Counter[str] = Counter()  # candidates drawn from each stream
        self._whole = 0  # answers drawn whole
        self._width: Counter[int] = Counter()  # steps generated at each depth
        self._prompts: list[tuple[int, ...]] = []  # prompts computed so far, for the ideal FLOPs
        self._resumed: dict[int, tuple[int, ...]] = {}  # by random stream: the ids that were generated elsewhere
        self._shown: dict[tuple[int, ...], tuple[str, ...]] = {}  # the attempts that a revision's prompt shows
        self._flops_per_token = 2.0 * sampler.engine.facts.flops_parameters
        self.verifier_flops_per_token = 0.0

    # ------------------------------------------------------------ candidates

    def start(self, num: int, *, stream: str = "tree", attempts: Sequence[Candidate] = ()) -> list[Candidate]:
        """`num` empty candidates, each with a random stream of its own; nothing is spent yet.

        Successive calls on one stream continue it. `attempts`: earlier answers shown in the prompt, oldest first; the
        oldest are left out where the context would have no room for another answer, but never the last.
        """
        first = self._drawn[stream]
        self._drawn[stream] += num
        shown: tuple[int, ...] = ()
        if attempts:
            sampler, texts = self._sampler, [a.text for a in attempts]
            room = sampler.engine.facts.max_length - sampler.max_new_tokens
            shown, fitting = revision_prompt(sampler.task, sampler.engine.tokenizer, self.problem, texts, room)
            self._shown[shown] = fitting
            attempts = attempts[-len(fitting) :]
        started = [
            Candidate(path=(n,), prompt_ids=shown, key=key64(*self._sampler.seed, self.problem.key, stream, n))
            for n in range(first, first + num)
        ]
        if self.trace and attempts:
            self.trace.start(started, attempts)
        return started

    def resume(self, begun: Candidate, num: int, *, stream: str = "resume") -> list[Candidate]:
        """`num` copies of an answer's beginning that was stored, each with a random stream of its own.

        Its ids are read, not generated; its steps count as no samples, and each copy as a whole one.
        """
        fresh = self.start(num, stream=f"{stream}/{key64(*begun.prompt_ids, '', *begun.ids)}")
        begun = replace(begun, step_ends=(), text_ends=())
        copies = [replace(begun, path=(*begun.path, *c.path), key=c.key) for c in fresh]
        self._resumed |= {c.key: begun.ids for c in copies}
        return copies

    def fork(self, candidate: Candidate, num: int) -> list[Candidate]:
        """`num` copies that go on independently."""
        first = self._drawn[f"fork/{candidate.key}/{len(candidate.ids)}"]
        self._drawn[f"fork/{candidate.key}/{len(candidate.ids)}"] += num
        children = [
            replace(candidate, path=(*candidate.path, n), key=key64(candidate.key, len(candidate.ids), n))
            for n in range(first, first + num)
        ]
        if self.trace:
            for child in children:
                self.trace.fork(candidate, child)
        return children

    def attempts(self, candidate: Candidate) -> tuple[str, ...]:
        """The texts of the earlier answers that it was shown, oldest first."""
        return self._shown.get(candidate.prompt_ids, ())

    async def answers(self, candidates: Sequence[Candidate]) -> list[Candidate]:
        """The candidates with their canonical answers read, without a look at the gold one."""
        pairs = [(self.problem, c.text) for c in candidates if c.complete]
        found = iter(await Reading(pairs) if pairs else ())
        return [replace(c, answer=next(found)) if c.complete else c for c in candidates]

    def keep(self, candidates: Sequence[Candidate], *, for_good: bool = False) -> None:
        """All that the strategy would return if it ended now; unfinished ones are left out.

        The next call replaces it, but what is kept `for_good` stays, before all that comes later.
        """
        good, complete = self._kept[0], [c for c in candidates if c.complete]
        self._kept = ([*good, *complete], []) if for_good else (good, complete)

    @property
    def kept(self) -> list[Candidate]:
        return [*self._kept[0], *self._kept[1]]

    # ------------------------------------------------------------ generation

    async def sample(self, num: int, *, temperature: float | None = None, stream: str = "sample") -> list[Candidate]:
        """`num` whole answers. Successive calls on one stream continue it: 4 and then 12 are the same 16.

        Raises BudgetExceeded before spending anything.
        """
        return await self.finish(self.start(num, stream=stream), temperature=temperature)

    async def step(self, candidates: Sequence[Candidate], *, temperature: float | None = None) -> list[Candidate]:
        """Each candidate one step further. Raises BudgetExceeded before spending anything."""
        return await self._grow(candidates, self._sampler.task.step_delimiter, temperature)

    async def finish(self, candidates: Sequence[Candidate], *, temperature: float | None = None) -> list[Candidate]:
        """Each candidate to its end. Raises BudgetExceeded before spending anything."""
        return await self._grow(candidates, None, temperature)

    async def look_ahead(self, candidates: Sequence[Candidate], num_steps: int) -> list[Candidate]:
        """Each candidate `num_steps` greedy steps further, or to its end: to be scored and thrown away.

        Every rollout costs `num_steps` samples of its width, ended early or not (section 5.3: N (k + 1)).
        Raises BudgetExceeded before spending anything; a rollout that the budget cannot pay to its end stops.
        """
        if going := [c for c in candidates if c.open]:
            self._affordable(going)
        rolled = [replace(c, key=key64(c.key, "lookahead")) for c in candidates]
        if self.trace:
            for candidate, copy in zip(candidates, rolled, strict=True):
                self.trace.fork(candidate, copy)
        charged = Counter[int]()
        for candidate in candidates:
            charged[max(0, len(candidate.step_ends) - 1)] += num_steps
        self._charge_samples(0, charged)
        for _ in range(num_steps):
            going = [i for i, candidate in enumerate(rolled) if candidate.open]
            if not going:
                break
            stop = self._sampler.task.step_delimiter
            try:
                grown = await self._ask([rolled[i] for i in going], stop, 0.0, kind="lookahead")
            except BudgetExceeded:  # scored where it is
                break
            for i, candidate in zip(going, grown, strict=True):
                rolled[i] = candidate
        return rolled

    async def _grow(
        self, candidates: Sequence[Candidate], stop: str | None, temperature: float | None
    ) -> list[Candidate]:
        assert all(c.open for c in candidates), "a candidate that ended cannot be continued"
        if not candidates:
            return []
        whole = 0 if stop else sum(not c.step_ends for c in candidates)
        depths = Counter(len(c.step_ends) for c in candidates if stop or c.step_ends)
        self._affordable(candidates)
        self._charge_samples(whole, depths)
        grown = await self._ask(candidates, stop, temperature, kind="step" if stop else "answer")
        self._answers += [c for c in grown if c.complete]
        return grown

    async def _ask(
        self, candidates: Sequence[Candidate], stop: str | None, temperature: float | None, *, kind: str
    ) -> list[Candidate]:
        sampler, room = self._sampler, self._affordable(candidates)
        requests = [
            Request(
                prefix=(c.prompt_ids or self.prompt_ids) + c.ids,
                max_new_tokens=min(room, sampler.max_new_tokens - len(c.ids)),
                temperature=sampler.temperature if temperature is None else temperature,
                key=c.key,
                stop=stop or sampler.task.end_text,
                resumable=stop is not None,
            )
            for c in candidates
        ]
        continuations = await Ask(requests)
        self._charge(candidates, continuations)
        tokenizer = sampler.engine.tokenizer
        grown = [
            extended(c, new, tokenizer, sampler.task.end_text, stepwise=stop is not None)
            for c, new in zip(candidates, continuations, strict=True)
        ]
        if self.trace:
            for before, after in zip(candidates, grown, strict=True):
                self.trace.grow(before, after, kind)
        return grown

    # ------------------------------------------------------------ accounting

    def _charge_samples(self, whole: int, steps: Counter[int]) -> None:
        width = self._width + steps
        samples = self._whole + whole + max(width.values(), default=0)
        if self._budget.unit == "samples" and samples > self._budget.amount:
            raise BudgetExceeded(
                f"{samples - self.spend.samples} more samples asked for, "
                f"{self._budget.amount - self.spend.samples:g} of {self._budget.amount:g} left"
            )
        self._whole, self._width = self._whole + whole, width
        self.spend = replace(self.spend, samples=samples)

    def _affordable(self, candidates: Sequence[Candidate]) -> int:
        """The token limit that one more continuation of each may have. Raises BudgetExceeded.

        Of FLOPs, what the verifier spends on reading all of it is kept back, a token for a token.
        """
        match self._budget.unit:
            case "samples":
                return self._sampler.max_new_tokens
            case "tokens":
                left = self._budget.amount - self.spend.generated_tokens
            case "flops":
                policy, verifier = self._flops_per_token, self.verifier_flops_per_token
                new = set(map(self._given, candidates)) - set(self._prompts)
                read = self.spend.generated_tokens + sum(len(p) for p in (*self._prompts, *new))
                spent = self.spend.flops_ideal - self.spend.verifier_flops_ideal
                spent += policy * sum(map(self._new_prompt_tokens, new))
                spent += max(self.spend.verifier_flops_ideal, verifier * read)
                left = (self._budget.amount - spent) / max(1.0, policy + verifier)
        if left < len(candidates):
            raise BudgetExceeded(
                f"{len(candidates)} more answers or steps asked for, but the budget of {self._budget.amount:g} "
                f"{self._budget.unit} has {max(0, int(left))} tokens left: give more of it"
            )
        return min(self._sampler.max_new_tokens, int(left // max(1, len(candidates))))

    def _charge(self, candidates: Sequence[Candidate], continuations: Sequence[Continuation]) -> None:
        generated = sum(len(c.ids) for c in continuations)
        prefilled = sum(c.prefilled_tokens for c in continuations)
        distinct = generated
        for candidate, new in zip(candidates, continuations, strict=True):
            given = self._given(candidate)
            if new.ids and given not in self._prompts:
                distinct += self._new_prompt_tokens(given)
                self._prompts.append(given)
        self.spend += Spend(
            generated_tokens=generated,
            prefilled_tokens=prefilled,
            cached_tokens=sum(c.cached_tokens for c in continuations),
            flops_ideal=self._flops_per_token * distinct,
            flops_actual=self._flops_per_token * (generated + prefilled),
        )

    def _given(self, candidate: Candidate) -> tuple[int, ...]:
        """The ids that it did not have to generate: its prompt, and what it was resumed from."""
        return (candidate.prompt_ids or self.prompt_ids) + self._resumed.get(candidate.key, ())

    def _new_prompt_tokens(self, prompt: tuple[int, ...]) -> int:
        """Tokens of a prompt that no earlier prompt or answer of this problem began with."""
        answers = ((c.prompt_ids or self.prompt_ids) + c.ids for c in self._answers)
        return len(prompt) - max((_common_prefix(prompt, known) for known in (*self._prompts, *answers)), default=0)


class Scorer:
    """Ask the verifier about one problem; the cost lands in the policy's `spend`. Equal steps are scored once."""

    def __init__(self, verifier: Verifier, policy: Policy, delimiter: str):
        self.facts = verifier.facts
        self._policy = policy
        self._delimiter = delimiter
        self._known: dict[_Read, Scored] = {}
        self._seen: set[_Read] = set()  # every prefix of what was read
        policy.verifier_flops_per_token = 2.0 * self.facts.flops_parameters

    async def score(
        self, candidates: Sequence[Candidate], *, aggregation: Aggregation | None = None
    ) -> list[Candidate]:
        """The candidates with `step_scores` and `score`; a truncated or failed one keeps none.

        The verifier reads the attempts that a candidate was shown too. An outcome verifier scores finished ones only.
        One on which the verifier gives no verdict has no score: it does not vote by score. Raises VerifierError for
        scores that cannot be used.
        """
        aggregate = AGGREGATE[aggregation or self.facts.aggregation]
        texts: dict[int, _Read] = {}
        for i, candidate in enumerate(candidates):
            if candidate.complete or (candidate.open and self.facts.process):
                texts[i] = (self._policy.attempts(candidate), steps_of(candidate, self._delimiter))
        new = [read for read in dict.fromkeys(texts.values()) if read not in self._known]
        if new:
            problem = self._policy.problem
            replies = await Question([ScoreRequest(problem, steps, attempts) for attempts, steps in new])
            for read, scored in zip(new, replies, strict=True):
                self._charge(read, scored)
            for read, scored in zip(new, replies, strict=True):
                self._check(read, scored)
        scored_all = list(candidates)
        for i, read in texts.items():
            scored = self._known[read]
            score = None if scored.unscored else aggregate(scored.scores)
            found = replace(candidates[i], step_scores=scored.scores, score=score, unscored=scored.unscored)
            scored_all[i] = found
            if self._policy.trace and score is not None:
                self._policy.trace.score(found)
        return scored_all

    def _check(self, read: _Read, scored: Scored) -> None:
        expected = (len(read[1]) if self.facts.process else 1) if scored.unscored is None else 0
        key = self._policy.problem.key
        if len(scored.scores) != expected:
            raise VerifierError(
                f"problem '{key}': the verifier returned {len(scored.scores)} scores for {expected} steps; check its "
                "step separator"
            )
        if bad := [s for s in scored.scores if not -1e-6 <= s <= 1 + 1e-6]:  # NaN is none either
            raise VerifierError(f"problem '{key}': the verifier returned the score {bad[0]}, which is not in 0..1")

    def _charge(self, read: _Read, scored: Scored) -> None:
        per_token = self._policy.verifier_flops_per_token
        ideal = per_token * max(0.0, scored.tokens - self._shared_tokens(read, scored))
        actual = per_token * scored.computed_tokens
        attempts, steps = read
        self._known[read] = scored
        self._seen |= {(attempts, steps[:n]) for n in range(len(steps) + 1)}
        self._policy.spend += Spend(
            verifier_tokens=scored.computed_tokens,
            flops_ideal=ideal,
            flops_actual=actual,
            verifier_flops_ideal=ideal,
            verifier_flops_actual=actual,
        )

    def _shared_tokens(self, read: _Read, scored: Scored) -> float:
        """Tokens of the longest prefix that was read before; by its share of the characters where only more was."""
        attempts, steps = read
        num = next((n for n in range(len(steps), -1, -1) if (attempts, steps[:n]) in self._seen), None)
        if num is None:
            return 0.0
        if known := self._known.get((attempts, steps[:num])):
            return float(known.tokens)
        share = sum(map(len, steps[:num])) / max(1, sum(map(len, steps)))
        return scored.prompt_tokens + share * (scored.tokens - scored.prompt_tokens)


def none_scored(candidates: Sequence[Candidate]) -> str | None:
    """Why the verifier, asked, scored none of those that ended; None: it scored one, or none ended or was asked."""
    ended = [c for c in candidates if c.complete]
    reasons = [c.unscored for c in ended if c.unscored]
    if not reasons or any(c.score is not None for c in ended):
        return None
    return f"the verifier scored none of {len(ended)} answers: {reasons[0]}"


# ---------------------------------------------------------------- texts and ids


def steps_of(candidate: Candidate, delimiter: str) -> tuple[str, ...]:
    """The step texts, delimiters included: as they were searched, else split at the delimiter.

    An answer that ends right after a delimiter has an empty last step, searched or split: so a verifier can tell it
    from the same text still going on.
    """
    if candidate.text_ends:
        return candidate.steps
    *pieces, last = candidate.text.split(delimiter)
    steps = tuple(piece + delimiter for piece in pieces)
    return (*steps, last) if last or candidate.complete or not steps else steps


def extended(
    candidate: Candidate, new: Continuation, tokenizer: Any, end_text: str | None, *, stepwise: bool
) -> Candidate:
    """The candidate with what the engine added. A stop that brought no token is the engine's failure."""
    finish = Finish.ERROR if not new.ids and new.finish in (Finish.STOP, Finish.EOS) else new.finish
    ids = candidate.ids + new.ids
    text = tokenizer.decode(ids, skip_special_tokens=True)
    if end_text is not None and finish in (Finish.STOP, Finish.EOS, Finish.LENGTH) and end_text in text:
        ids, text = ended_at(ids, text.find(end_text), tokenizer)
        finish = Finish.EOS
    logprob = None if new.logprob is None else (candidate.logprob or 0.0) + new.logprob
    step_ends, text_ends = candidate.step_ends, candidate.text_ends
    if stepwise or step_ends:
        step_ends = (*(e for e in step_ends if e < len(ids)), len(ids))
        text_ends = (*text_ends[: len(step_ends) - 1], len(text))
    return replace(
        candidate, ids=ids, text=text, finish=finish, step_ends=step_ends, text_ends=text_ends, logprob=logprob
    )


def ended_at(ids: tuple[int, ...], length: int, tokenizer: Any) -> tuple[tuple[int, ...], str]:
    """The ids that decode to at most `length` characters, ended by EOS as if the policy had ended there; their text."""
    for num in range(len(ids), -1, -1):
        text = tokenizer.decode(ids[:num], skip_special_tokens=True)
        if len(text) <= length:
            return (*ids[:num], tokenizer.eos_token_id), text
    raise AssertionError("no ids decode to no text")


def _common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    """How many items two sequences begin alike with; by halves, since slices are compared fast."""
    same, most = 0, min(len(a), len(b))
    while same < most:
        middle = (same + most + 1) // 2
        same, most = (middle, most) if a[same:middle] == b[same:middle] else (same, middle - 1)
    return same
