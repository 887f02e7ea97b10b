"""The metered handle through which ONE problem's strategy asks the policy.

It owns the random stream, counts the Spend where it happens, and refuses what the budget cannot pay: a strategy can
neither overspend nor misreport. Every question to the policy is an `Ask`, which the scheduler merges with those of
other problems into full batches.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from search.errors import BudgetExceeded
from search.randomness import key64
from search.types import Budget, Candidate, Continuation, Engine, Finish, Problem, Request, Spend


class Ask:
    """Requests of one strategy, waiting for the engine. Awaiting it hands it to the scheduler."""

    def __init__(self, requests: Sequence[Request]):
        self.requests = requests
        self.reply: list[Continuation] = []

    def __await__(self) -> Generator[Ask, None, list[Continuation]]:
        yield self
        return self.reply


@dataclass(frozen=True, slots=True)
class Sampler:
    """How answers are drawn in one stage: shared by all its problems."""

    engine: Engine
    temperature: float
    max_new_tokens: int
    seed: tuple[object, ...]  # (loop seed, stage, split): first parts of every random key
    end_text: str | None = None  # what ends an answer besides EOS: a base model starts the next few-shot question


class Policy:
    """Ask the policy about one problem. `spend` is what it has cost so far."""

    def __init__(self, problem: Problem, prompt_ids: Sequence[int], sampler: Sampler, budget: Budget):
        self.problem = problem
        self.prompt_ids = tuple(prompt_ids)
        self.spend = Spend()
        self._sampler = sampler
        self._budget = budget
        self._drawn: dict[str, int] = {}  # candidates drawn from each stream

    async def sample(self, num: int, *, temperature: float | None = None, stream: str = "sample") -> list[Candidate]:
        """`num` whole answers. Successive calls on one stream continue it: 4 and then 12 are the same 16.

        Raises BudgetExceeded before spending anything.
        """
        max_new_tokens = self._affordable(num)
        first = self._drawn.get(stream, 0)
        self._drawn[stream] = first + num
        requests = [
            Request(
                prefix=self.prompt_ids,
                max_new_tokens=max_new_tokens,
                temperature=self._sampler.temperature if temperature is None else temperature,
                key=key64(*self._sampler.seed, self.problem.key, stream, first + i),
                stop=self._sampler.end_text,
            )
            for i in range(num)
        ]
        continuations = await Ask(requests)
        self._charge(continuations, num_samples=num)
        tokenizer = self._sampler.engine.tokenizer
        ended = [end_at(c, self._sampler.end_text, tokenizer) for c in continuations]
        return [
            Candidate(c.ids, tokenizer.decode(c.ids, skip_special_tokens=True), c.finish, logprob=c.logprob)
            for c in ended
        ]

    def _affordable(self, num: int) -> int:
        """The token limit that `num` more answers may have each. Raises BudgetExceeded."""
        limit = self._sampler.max_new_tokens
        match self._budget.unit:
            case "samples":
                left = self._budget.amount - self.spend.samples
                if num > left:
                    raise BudgetExceeded(f"{num} more samples asked for, {left:g} of {self._budget.amount:g} left")
                return limit
            case "tokens":
                left = self._budget.amount - self.spend.generated_tokens
            case "flops":
                flops_per_token = 2 * self._sampler.engine.facts.flops_parameters
                left = (self._budget.amount - self.spend.flops_ideal) / flops_per_token
                left -= len(self.prompt_ids) if not self.spend.samples else 0
        if left < num:
            raise BudgetExceeded(f"{num} more samples asked for, {left:g} tokens left of the budget {self._budget}")
        return min(limit, int(left // num))

    def _charge(self, continuations: Sequence[Continuation], num_samples: int) -> None:
        flops_per_token = 2 * self._sampler.engine.facts.flops_parameters
        generated = sum(len(c.ids) for c in continuations)
        prefilled = sum(c.prefilled_tokens for c in continuations)
        distinct = generated + (0 if self.spend.samples else len(self.prompt_ids))
        self.spend += Spend(
            samples=num_samples,
            generated_tokens=generated,
            prefilled_tokens=prefilled,
            cached_tokens=sum(c.cached_tokens for c in continuations),
            flops_ideal=float(flops_per_token * distinct),
            flops_actual=float(flops_per_token * (generated + prefilled)),
        )


def end_at(continuation: Continuation, end_text: str | None, tokenizer: Any) -> Continuation:
    """An answer that ran into `end_text` ends with EOS at the last token before it, as if the policy had ended it."""
    if end_text is None or continuation.finish is not Finish.STOP:
        return continuation
    ids = continuation.ids
    length = tokenizer.decode(ids, skip_special_tokens=True).find(end_text)
    num = next(n for n in range(len(ids), -1, -1) if len(tokenizer.decode(ids[:n], skip_special_tokens=True)) <= length)
    return replace(continuation, ids=(*ids[:num], tokenizer.eos_token_id), finish=Finish.EOS)
