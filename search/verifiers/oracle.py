"""A verifier whose quality is known: the task's own checker, with errors at a given rate.

It sees the gold answers, so what it scores shows what search could do with such a verifier, never what a loop does.
A step is right when it and all before it are legal and the right answer can still be reached; a finished answer when
it is right. Two kinds of error, both fixed by the text of the prefix:
- noise flips a score (Snell et al., ICLR version, appendix K);
- an exploit is a wrong prefix that scores above every right one. The wider the search, the surer it finds one: so
  over-optimisation appears at large N, as the paper reports of real verifiers (section 5.3).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from configs.schema import OracleVerifier
from search.randomness import key64
from search.types import Grade, Problem, Scored, ScoreRequest, Task, VerifierFacts

RIGHT, WRONG, EXPLOIT = 0.9, 0.1, 1.0


class Oracle:
    """Implements search.types.Verifier. A task without a step checker gets finished answers scored only.

    Its tokens are characters: it has no tokenizer of its own.
    """

    def __init__(self, task: Task, settings: OracleVerifier, *, seed: int = 0):
        self._task: Any = task
        self._settings = settings
        self._seed = seed
        fingerprint = f"oracle-{settings.noise:g}-{settings.exploits:g}"
        process = hasattr(task, "step_labels")
        self.facts = VerifierFacts(fingerprint, settings.parameters, process)

    def score(self, requests: Sequence[ScoreRequest]) -> list[Scored]:
        """Scores of 0.9 for right and 0.1 for wrong, flipped by noise; 1 for an exploit."""
        texts = ["".join(request.steps) for request in requests]
        graded = self._task.grade([(r.problem, text) for r, text in zip(requests, texts, strict=True)])
        scored: list[Scored] = []
        for request, text, verdict in zip(requests, texts, graded, strict=True):
            labels = self._labels(request, text, verdict.grade is Grade.CORRECT)
            scores = tuple(
                self._noisy(request.problem, "".join(request.steps[: s + 1]), label) for s, label in enumerate(labels)
            )
            prompt = len(request.problem.question) + sum(map(len, request.attempts))
            tokens = prompt + len(text)
            scored.append(Scored(scores, tokens=tokens, prompt_tokens=prompt, computed_tokens=tokens))
        return scored

    def _labels(self, request: ScoreRequest, text: str, correct: bool) -> list[bool]:
        if not self.facts.process:
            return [correct]
        labels = list(self._task.step_labels(request.problem, text))[: len(request.steps)]
        labels += [False] * (len(request.steps) - len(labels))  # more text than any answer has
        if request.finished(self._task.step_delimiter):
            labels[-1] = correct
        return labels

    def _noisy(self, problem: Problem, prefix: str, label: bool) -> float:
        draw = key64("oracle", self._seed, problem.key, prefix) / 2**64
        if not label and draw >= 1 - self._settings.exploits:
            return EXPLOIT
        return RIGHT if label != (draw < self._settings.noise) else WRONG
