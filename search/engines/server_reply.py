"""How a server is asked and how its replies are read: from a Request to a body, from a reply to a Continuation.

Ids decide where there are any: a continuation ends with the first end-of-sequence id, or with the token that completes
the stop text. Replies that are text only are read by their finish reason and encoded: approximate. Left out: log
probabilities.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from search.engines.server_http import Received
from search.randomness import key64
from search.types import Continuation, Finish, Request

TOKEN_ID = "token_id:"  # how older vLLM servers write ids among the logprobs
SEED_BITS = 31  # what every server takes
_Ended = tuple[Sequence[int], Finish, str | None]


@dataclass(frozen=True, slots=True)
class Abilities:
    """What a server was found to do. `fields` are those of the body, beyond the standard ones, that it takes.

    `stop`: the stop text is "included" in the reply, or cut off but "told" in stop_reason, or the reply does not say
    whether it met the stop text ("silent"): then the reply is streamed and cut on this side.
    """

    prompt_ids: bool
    ids: Literal["token_ids", "logprobs", "none"]
    fields: Mapping[str, Any] = field(default_factory=dict[str, Any])
    stop: Literal["included", "told", "silent"] = "included"
    stream: Mapping[str, Any] | None = None  # the fields that ask for a stream; None: it has none
    seeds: bool = False
    several: bool = False  # answers `n` times
    cached_tokens: bool = False  # tells how much of a prompt it had cached

    @property
    def exact(self) -> bool:
        return self.prompt_ids and self.ids != "none" and self.stop != "told"

    def lacks(self) -> str:
        """What keeps it from being exact, in words; empty where nothing does."""
        faults = {
            "takes no token ids as prompt": not self.prompt_ids,
            "returns no token ids": self.ids == "none",
            "cuts off the text it stops at": self.stop == "told",
        }
        return ", ".join(text for text, found in faults.items() if found)


class Dialect:
    """Asks and reads in the way one server does."""

    def __init__(
        self,
        model: str,
        tokenizer: Any,
        eos_ids: Sequence[int],
        abilities: Abilities,
        *,
        extra_body: Mapping[str, Any],
        stream: bool = False,
    ) -> None:
        self._model = model
        self._tokenizer = tokenizer
        self._eos_id = tokenizer.eos_token_id
        self._eos_ids = frozenset(eos_ids)
        self._abilities = abilities
        self._extra_body = extra_body
        self._stream = stream

    # ------------------------------------------------------------ asking

    @property
    def merges(self) -> bool:
        """Whether requests of one prefix go out as one: not where each has a seed, or is read piece by piece."""
        abilities = self._abilities
        plain = abilities.ids != "none" and abilities.stop == "included" and not self._stream
        return abilities.several and plain and not abilities.seeds

    def body(self, request: Request, max_tokens: int, num: int = 1) -> tuple[dict[str, Any], Received]:
        """The body to send for `num` answers, and what will take its reply."""
        abilities = self._abilities
        prompt = (
            list(request.prefix) if abilities.prompt_ids else prompt_text(self._tokenizer, request.prefix, abilities)
        )
        body: dict[str, Any] = {"model": self._model, "prompt": prompt, "max_tokens": max_tokens}
        body |= {"temperature": request.temperature, "top_p": 1.0}
        body |= abilities.fields
        if abilities.seeds:  # another at each position: steps of one candidate must not repeat their draws
            body["seed"] = key64(request.key, len(request.prefix)) >> (64 - SEED_BITS)
        if num > 1:
            body["n"] = num
        silent = request.stop is not None and abilities.stop == "silent"
        if request.stop is not None and not silent:
            body["stop"] = [request.stop]
        if self._stream or silent:
            body |= abilities.stream or {}
        return body | dict(self._extra_body), Received(stop=request.stop if silent else None)

    # ------------------------------------------------------------ reading

    def read(self, request: Request, max_tokens: int, received: Received) -> tuple[Continuation, str | None]:
        """The continuation, and why it is an ERROR where it is one. `max_tokens` is the limit that was sent."""
        ids, finish, reason = self._ended(request, max_tokens, received)
        if len(ids) > max_tokens:
            ids, finish = ids[:max_tokens], Finish.LENGTH
        prefilled, cached = _prefix_tokens(received.usage, len(request.prefix))
        return Continuation(tuple(ids), finish, prefilled_tokens=prefilled, cached_tokens=cached), reason

    def cancelled(self, request: Request, received: Received) -> Continuation:
        """What a stream had brought when it was cancelled; the prefix counts as computed, as nobody tells."""
        ids = token_ids(received, self._abilities)
        ids = self._encode(received.text) if ids is None else ids
        return Continuation(tuple(ids), Finish.CANCELLED, prefilled_tokens=len(request.prefix))

    def _ended(self, request: Request, max_tokens: int, received: Received) -> _Ended:
        if not received.choices:
            return (), Finish.ERROR, "the reply holds no choices"
        why = received.choice.get("finish_reason")
        if why not in ("stop", "length") and not received.stopped:
            return (), Finish.ERROR, f"finish_reason is {why!r}"
        if self._abilities.ids == "none":
            return self._by_text(request, received)
        ids = token_ids(received, self._abilities)
        if ids is None:
            return (), Finish.ERROR, "the reply holds no token ids, though this server sent them before"
        return self._by_ids(request, max_tokens, ids, received)

    def _by_ids(self, request: Request, max_tokens: int, ids: list[int], received: Received) -> _Ended:
        told = received.choice.get("stop_reason")
        eos_ids = self._eos_ids | ({told} if isinstance(told, int) else set())
        eos = next((n for n, token in enumerate(ids, 1) if token in eos_ids), None)
        stop = self._completing(ids, request.stop)
        ends = sorted((n, finish) for n, finish in ((eos, Finish.EOS), (stop, Finish.STOP)) if n is not None)
        if ends:
            return ids[: ends[0][0]], ends[0][1], None
        if not ids and not generated(received.usage):
            return (), Finish.ERROR, "the reply is empty"
        if received.choice.get("finish_reason") == "length" or len(ids) >= max_tokens:
            return ids, Finish.LENGTH, None
        if request.stop and met_stop(received, request.stop):
            cut = received.text.removeprefix(self._tokenizer.decode(ids, skip_special_tokens=True))
            return [*ids, *self._encode(cut + request.stop)], Finish.STOP, None
        if received.stopped:
            return (), Finish.ERROR, "its text met the stop text, its token ids did not"
        return [*ids, told if isinstance(told, int) else self._eos_id], Finish.EOS, None

    def _by_text(self, request: Request, received: Received) -> _Ended:
        text, stop = received.text, request.stop
        ended = received.choice.get("finish_reason") == "stop"
        if not text and not (ended and generated(received.usage)):
            return (), Finish.ERROR, "the reply is empty"
        if stop and (stop in text or (ended and met_stop(received, stop))):
            return self._encode(text.partition(stop)[0] + stop), Finish.STOP, None
        return [*self._encode(text), *([self._eos_id] if ended else [])], Finish.EOS if ended else Finish.LENGTH, None

    def _encode(self, text: str) -> list[int]:
        """Ids of a text without the special tokens that end it, also where the server wrote them out."""
        ids = list(self._tokenizer.encode(text, add_special_tokens=False))
        while ids and ids[-1] in self._eos_ids:
            ids.pop()
        return ids

    def _completing(self, ids: Sequence[int], stop: str | None) -> int | None:
        """How many ids it takes to complete the stop text; None: they do not."""
        if not stop or not self._holds(ids, len(ids), stop):
            return None
        low, high = 0, len(ids)  # they complete it at `high`, not at `low`
        if not self._holds(ids, high - 1, stop):
            return high
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if self._holds(ids, middle, stop) else (middle, high)
        return high

    def _holds(self, ids: Sequence[int], num: int, stop: str) -> bool:
        return stop in self._tokenizer.decode(list(ids[:num]), skip_special_tokens=True)


def sharing(continuation: Continuation) -> Continuation:
    """The same, where an earlier answer of one reply is charged for the prefix that they share."""
    num_prefix = continuation.prefilled_tokens + continuation.cached_tokens
    return replace(continuation, prefilled_tokens=0, cached_tokens=num_prefix)


def prompt_text(tokenizer: Any, ids: Sequence[int], abilities: Abilities) -> str:
    """The prefix as text, special tokens written out; without the first one where the server adds that by itself."""
    ids = list(ids)
    adds = list(tokenizer.encode("1")) != list(tokenizer.encode("1", add_special_tokens=False))
    first = tokenizer.encode("1")[0]
    if "add_special_tokens" not in abilities.fields and adds and ids[:1] == [first]:
        ids = ids[1:]
    return str(tokenizer.decode(ids, skip_special_tokens=False))


def token_ids(received: Received, abilities: Abilities) -> list[int] | None:
    """The ids a reply holds; None: none, or not all."""
    if abilities.ids == "token_ids":
        ids = received.ids
        return ids if ids is not None and all(type(i) is int and i >= 0 for i in ids) else None
    if abilities.ids == "none" or received.tokens is None:
        return None
    numbers = [t.removeprefix(TOKEN_ID) for t in received.tokens if isinstance(t, str) and t.startswith(TOKEN_ID)]
    if len(numbers) != len(received.tokens) or not all(n.isascii() and n.isdigit() for n in numbers):
        return None
    return [int(n) for n in numbers]


def met_stop(received: Received, stop: str) -> bool:
    """Whether the server says that it stopped at the stop text."""
    return received.choice.get("stop_reason") == stop


def generated(usage: Mapping[str, Any]) -> bool:
    """Whether the policy wrote anything: an empty text after one token is its end of sequence."""
    num = usage.get("completion_tokens")
    return isinstance(num, int) and num > 0


def cached_tokens(usage: Mapping[str, Any]) -> int | None:
    """Prefix tokens taken from a cache; None: the server does not tell."""
    details = usage.get("prompt_tokens_details")
    num = details.get("cached_tokens") if isinstance(details, dict) else None
    return num if isinstance(num, int) else None


def _prefix_tokens(usage: Mapping[str, Any], num_prefix: int) -> tuple[int, int]:
    """(computed, cached) tokens of the prefix; all computed where the server does not tell."""
    total = usage.get("prompt_tokens")
    total = total if isinstance(total, int) and total > 0 else num_prefix
    cached = min(max(cached_tokens(usage) or 0, 0), total)
    return total - cached, cached
