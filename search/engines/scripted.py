"""An engine that answers from a script, in no time. A product, not a mock: the smoke round, plans and tests use it.

Tokens are bytes; id 256 ends an answer, id 257 ends a prompt. A model folder holds `scripted.json`: {"skill": 2}.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from configs.schema import ScriptedEngine as ScriptedConfig
from search.errors import ModelError
from search.randomness import key64
from search.types import Capabilities, Continuation, Finish, ModelFacts, Request, Task

if TYPE_CHECKING:
    import numpy as np

EOS, SEPARATOR = 256, 257
Reply = Callable[[str, float, int], str]  # (prompt, temperature, key) -> the whole answer


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
    """`reply` is a pure function of prompt, temperature and key, so samples repeat exactly."""

    capabilities = Capabilities(token_ids=True, seeds=True, prefix_cache=False)

    def __init__(self, reply: Reply, *, fingerprint: str = "scripted", max_length: int = 4096):
        self.tokenizer = ByteTokenizer()
        self.facts = ModelFacts(fingerprint, flops_parameters=1_000, max_length=max_length)
        self._reply = reply

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
        room = min(request.max_new_tokens, self.facts.max_length - len(request.prefix))
        if room <= 0:
            return Continuation((), Finish.OVERFLOW, prefilled_tokens=0)
        boundary = len(request.prefix) - 1 - request.prefix[::-1].index(SEPARATOR)
        prompt, partial = request.prefix[:boundary], request.prefix[boundary + 1 :]
        whole = (*self._reply(self.tokenizer.decode(prompt), request.temperature, request.key).encode(), EOS)
        rest = whole[len(partial) :] if whole[: len(partial)] == partial else (EOS,)
        ids, finish = rest[:room], Finish.EOS
        if request.stop and (end := bytes(ids[:-1]).find(request.stop.encode())) >= 0:
            ids, finish = ids[: end + len(request.stop.encode())], Finish.STOP
        elif len(rest) > room:
            finish = Finish.LENGTH
        return Continuation(tuple(ids), finish, prefilled_tokens=len(request.prefix))


def _task_reply(task: Any, accuracy: float, fingerprint: str) -> Reply:
    """Right with a chance within 0.3 of `accuracy`, by problem; greedy is right where the chance is over 1/2."""

    def reply(prompt: str, temperature: float, key: int) -> str:
        chance = accuracy + 0.6 * (key64(prompt) / 2**64 - 0.5)
        draw = 0.5 if temperature == 0 else key64(fingerprint, key) / 2**64
        solution = task.solve(task.parse(prompt.strip())) if draw < chance else None
        return solution if solution is not None else "I do not know\n"

    return reply
