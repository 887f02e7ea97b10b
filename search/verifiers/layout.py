"""What a verifier's model reads, and where in it the steps end. One layout per checkpoint format; no torch.

A layout turns a ScoreRequest into token ids such that the ids of a longer candidate begin with those of a shorter one
(steps are encoded one by one), so that a runtime can go on from what it has computed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

from search.prompts import prompt_ids
from search.types import ScoreRequest, Task


@dataclass(frozen=True, slots=True)
class Encoded:
    """The input of one request. Example: Encoded((5, 9, 7, 3, 8, 2), num_prompt=2, ends=(3, 5)): two steps"""

    ids: tuple[int, ...]
    num_prompt: int  # of the ids, those that every candidate of the problem begins with
    ends: tuple[int, ...]  # index of the id at which each score is read; increasing; a single one for outcome verifiers

    @property
    def starts(self) -> tuple[int, ...]:
        """Index of the first id of each step."""
        return (self.num_prompt, *(end + 1 for end in self.ends[:-1]))

    def refusal(self, *, reads_tokens: bool, max_length: int, causal: bool = True) -> str | None:
        """Why no runtime can score it; None: it can be run. `reads_tokens`: its head reads every token of a step."""
        if not self.ids or not self.ends or (reads_tokens and not self.num_prompt):
            return "there is nothing to read: a verifier needs a prompt and a step"
        if reads_tokens and any(b < a for a, b in zip(self.starts, self.ends, strict=True)):
            return "one of its steps has no token of its own, so there is nothing to score: check the step delimiter"
        if (num := self.run_length(causal=causal)) > max_length:
            return f"it has {num} tokens, and the verifier's context only {max_length}: shorten answers or prompt"
        return None

    def run_length(self, *, causal: bool = True) -> int:
        """How many of the ids are run: what follows the last end tells a causal model nothing."""
        return self.ends[-1] + 1 if causal else len(self.ids)


class Layout(Protocol):
    """Implementations raise ModelError at construction where tokenizer or vocabulary do not fit the format."""

    def encode(self, request: ScoreRequest) -> Encoded: ...


@dataclass(frozen=True, slots=True)
class OwnLayout:
    """Ours: the policy's prompt, then the steps as they are; EOS where the answer ends.

    A step's score is read at its last id. The last step of a finished answer does not hold the delimiter (it may
    be empty), so it gets EOS: the verifier can tell a finished answer from one that goes on. `history`: attempts shown
    before the answer are part of the prompt, as the policy that revises reads them (Snell et al. 2024, section 6.1).
    """

    task: Task
    tokenizer: Any
    process: bool = True
    history: bool = False

    def encode(self, request: ScoreRequest) -> Encoded:
        attempts = request.attempts if self.history else ()
        ids = list(prompt_ids(self.task, self.tokenizer, request.problem, attempts))
        num_prompt, ends = len(ids), list[int]()
        for n, step in enumerate(request.steps):
            ids += self.tokenizer.encode(step, add_special_tokens=False)
            if n == len(request.steps) - 1 and request.finished(self.task.step_delimiter):
                ids.append(self.tokenizer.eos_token_id)
            ends.append(len(ids) - 1)
        return Encoded(tuple(ids), num_prompt, tuple(ends if self.process else ends[-1:]))
