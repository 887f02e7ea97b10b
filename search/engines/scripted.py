"""An engine that answers from a script, in no time. A product, not a mock: the smoke round, plans and tests use it.

Tokens are bytes; id 256 ends an answer, id 257 ends a prompt. A model folder holds `scripted.json`: {"skill": 2}.

A script writes whole answers (`reply`) or one step after another (`step`). A candidate that forked goes on with
another key than its text was written with: a reply then goes on with its own lines from the same place on, as if
another sample had taken over; a step is drawn anew at every place and so needs no such rule. An answer under one key is
the same, cut into steps or drawn whole.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from configs.schema import ScriptedEngine as ScriptedConfig
from search.engines.streaming import refusal
from search.errors import ModelError
from search.randomness import key64
from search.types import Capabilities, Continuation, Finish, ModelFacts, Request, Task

if TYPE_CHECKING:
    import numpy as np

EOS, SEPARATOR = 256, 257
Reply = Callable[[str, float, int], str]  # (prompt, temperature, key) -> the whole answer
# (prompt, what is written so far, temperature, a key of this place) -> the next step, its delimiter included; "" ends
Step = Callable[[str, str, float, int], str]


class ByteTokenizer:
    """UTF-8 bytes as tokens; encoding a prompt appends the separator."""

    eos_token_id = EOS

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        return [*text.encode(), SEPARATOR] if add_special_tokens else list(text.encode())

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        return bytes(i for i in token_ids if i < EOS).decode(errors="replace")

    def apply_chat_template(self, messages: Sequence[dict[str, str]], **_: Any) -> list[int]:
        return self.encode("\n".join(m["content"] for m in messages))


class ScriptedEngine:
    """`reply` or `step` is a pure function of its arguments, so samples repeat exactly."""

    capabilities = Capabilities(token_ids=True, seeds=True, prefix_cache=False)

    def __init__(
        self,
        reply: Reply | None = None,
        *,
        step: Step | None = None,
        fingerprint: str = "scripted",
        max_length: int = 4096,
    ):
        assert (reply is None) != (step is None), "a script is either whole replies or steps"
        self.tokenizer = ByteTokenizer()
        self.facts = ModelFacts(fingerprint, flops_parameters=1_000, max_length=max_length)
        self._reply = reply
        self._step = step

    @classmethod
    def of_task(cls, task: Task, model: Path, config: ScriptedConfig) -> ScriptedEngine:
        """Right with a chance that grows with the model's skill. Raises ModelError."""
        path = model / "scripted.json"
        if not path.is_file():
            raise ModelError(f"{model} is no scripted model: it has no scripted.json")
        data = path.read_bytes()
        accuracy = config.accuracy + config.skill_per_round * json.loads(data)["skill"]
        fingerprint = hashlib.sha256(data).hexdigest()[:16]
        return cls(_task_reply(task, accuracy, fingerprint), fingerprint=fingerprint)

    def extend(self, requests: Sequence[Request]) -> list[Continuation]:
        return [self._extend(request) for request in requests]

    def hidden_states(self, prefixes: Sequence[Sequence[int]]) -> np.ndarray:
        """Float32 [P, 1, 2, 2]: the script's own chance of each prompt, which it hides nowhere else, and the length."""
        import numpy as np

        chances_P = [key64(self.tokenizer.decode(prefix)) / 2**64 for prefix in prefixes]
        rows = [[[[chance, len(p)], [chance, len(p)]]] for chance, p in zip(chances_P, prefixes, strict=True)]
        return np.array(rows, dtype=np.float32)

    def close(self) -> None:
        """Nothing to free."""

    def _extend(self, request: Request) -> Continuation:
        refused = refusal(request, self.facts, SEPARATOR + 1)
        if refused is None and SEPARATOR not in request.prefix:
            refused = Finish.ERROR
        if refused is not None:
            return Continuation((), refused)
        boundary = len(request.prefix) - 1 - request.prefix[::-1].index(SEPARATOR)
        prompt = self.tokenizer.decode(request.prefix[:boundary])
        stop = request.stop.encode() if request.stop else None
        room = min(request.max_new_tokens, self.facts.max_length - len(request.prefix))
        rest = self._rest(prompt, bytes(i for i in request.prefix[boundary + 1 :] if i < EOS), request, stop, room)
        finish = Finish.EOS
        if stop and 0 <= (end := rest.find(stop)) <= room - len(stop):
            rest, finish = rest[: end + len(stop)], Finish.STOP
        elif len(rest) >= room:  # with the EOS it is one token longer
            rest, finish = rest[:room], Finish.LENGTH
        ids = (*rest, EOS) if finish is Finish.EOS else tuple(rest)
        return Continuation(ids, finish, prefilled_tokens=len(request.prefix))

    def _rest(self, prompt: str, written: bytes, request: Request, stop: bytes | None, room: int) -> bytes:
        """What the script writes after `written`; at least up to `stop` or `room`, where it gets there."""
        if self._reply is not None:
            whole = self._reply(prompt, request.temperature, request.key).encode()
            return whole[len(written) :] if whole.startswith(written) else _taken_over(whole, written, stop or b"\n")
        text = self._steps(prompt, b"", request, lambda text: len(text) >= len(written))
        if not text.startswith(written):  # written under another key
            text = written
        start = len(written)
        text = self._steps(
            prompt, text, request, lambda text: len(text) - start >= room or (stop is not None and stop in text[start:])
        )
        return text[start:]

    def _steps(self, prompt: str, text: bytes, request: Request, enough: Callable[[bytes], bool]) -> bytes:
        """`text` and the steps after it, until there is enough or the script ends."""
        assert self._step is not None
        while not enough(text):
            key = key64(request.key, len(text))
            piece = self._step(prompt, text.decode(errors="replace"), request.temperature, key).encode()
            if not piece:
                break
            text += piece
        return text


def _taken_over(whole: bytes, written: bytes, delimiter: bytes) -> bytes:
    """What follows in another reply at the place that `written` has come to: as many steps in, as far into the step."""
    *before, begun = written.split(delimiter)
    return delimiter.join(whole.split(delimiter)[len(before) :])[len(begun) :]


def _task_reply(task: Any, accuracy: float, fingerprint: str) -> Reply:
    """Right with a chance within 0.3 of `accuracy`, by problem; greedy is right where the chance is over 1/2."""

    def reply(prompt: str, temperature: float, key: int) -> str:
        question = prompt.strip().rsplit("\n\n", 1)[-1]  # a revision's prompt shows earlier attempts before it
        chance = accuracy + 0.6 * (key64(prompt) / 2**64 - 0.5)
        draw = 0.5 if temperature == 0 else key64(fingerprint, key) / 2**64
        solution = task.solve(task.parse(question)) if draw < chance else None
        return solution if solution is not None else "I do not know\n"

    return reply
