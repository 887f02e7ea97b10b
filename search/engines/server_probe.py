"""Find out what a server can do, by a few requests of eight tokens, before anything depends on it.

What is tried: token ids as prompt, token ids in the reply, the fields beyond the standard ones, how the reply shows a
stop text (the greedy text is asked for twice, the second time with a piece of it as stop), and whether a seed repeats.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Literal

from configs.schema import ServerEngine as ServerSettings
from search.engines.server_http import Client, Received, Refused
from search.engines.server_reply import Abilities, cached_tokens, met_stop, prompt_text, token_ids
from search.errors import ConfigError, ModelError

PROMPT = "1+2=3\n4+5="
NUM_TOKENS = 8
LOGPROBS = {"logprobs": 0, "return_tokens_as_token_ids": True}  # ids from vLLM before 0.10.2
# Sent where the server takes them. Without the third a server may sample by the model's own generation config.
OPTIONAL: tuple[dict[str, Any], ...] = (
    {"return_token_ids": True},
    {"include_stop_str_in_output": True},
    {"top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0},
    {"add_special_tokens": False},
)
SEED = {"seed": 7}
STREAM: dict[str, Any] = {"stream": True}
USAGE = {"stream_options": {"include_usage": True}}


async def probe(client: Client, model: str, tokenizer: Any, settings: ServerSettings) -> Abilities:
    """What the server can do. Raises EngineError, ModelError, and ConfigError where the tokenizer is not its own."""
    return await _Probe(client, model, tokenizer, settings).run()


class _Probe:
    def __init__(self, client: Client, model: str, tokenizer: Any, settings: ServerSettings) -> None:
        self._client = client
        self._model = model
        self._tokenizer = tokenizer
        self._settings = settings
        self._ids = list(tokenizer.encode(PROMPT))

    async def run(self) -> Abilities:
        abilities, received = await self._first()
        if received.ids is None:
            abilities = await self._ids_among_logprobs(abilities)
        if abilities.ids == "token_ids":
            self._check_tokenizer(received, abilities)
        abilities = replace(abilities, stop=await self._stop(abilities, received))
        if self._settings.stream or abilities.stop == "silent":
            abilities = replace(abilities, stream=await self._stream(abilities))
        if self._settings.seeds:
            abilities = replace(abilities, seeds=await self._seeds(abilities))
        else:  # nothing to lose by asking for several at once
            abilities = replace(abilities, several=await self._several(abilities))
        again = await self._ask(abilities)
        return replace(abilities, cached_tokens=cached_tokens(again.usage) is not None)

    async def _ask(self, abilities: Abilities, **changes: Any) -> Received:
        prompt = self._ids if abilities.prompt_ids else prompt_text(self._tokenizer, self._ids, abilities)
        body: dict[str, Any] = {"model": self._model, "prompt": prompt, "max_tokens": NUM_TOKENS}
        body |= {"temperature": 0.0, "top_p": 1.0} | dict(abilities.fields) | changes | dict(self._settings.extra_body)
        return await self._client.post("completions", body, Received())

    async def _first(self) -> tuple[Abilities, Received]:
        """The greedy reply to ids, else to text, with all optional fields, else with those that are taken."""
        everything = {name: value for group in OPTIONAL for name, value in group.items()}
        reason = ""
        for prompt_ids in (True, False):
            for fields in (everything, {}):
                asked = Abilities(prompt_ids, "token_ids", fields)
                try:
                    received = await self._ask(asked)
                except Refused as refused:
                    reason = str(refused)
                    continue
                if prompt_ids and not self._understood(received):
                    break
                if not fields:
                    asked = await self._accepted(asked)
                    received = await self._ask(asked)
                return asked, received
        raise ModelError(
            f"the server at {self._client.url} refuses a plain completion of the model '{self._model}' ({reason}): "
            "engine.type = 'server' needs /v1/completions; a server with chat only cannot continue a search"
        )

    def _understood(self, received: Received) -> bool:
        """Whether it read the ids as one prompt of these very tokens."""
        counted = received.usage.get("prompt_tokens")
        read = received.choice.get("prompt_token_ids")
        return len(received.choices) == 1 and counted in (None, len(self._ids)) and read in (None, self._ids)

    async def _accepted(self, asked: Abilities) -> Abilities:
        """Which optional fields a strict server takes."""
        fields: dict[str, Any] = {}
        for group in OPTIONAL:
            try:
                await self._ask(asked, **group)
            except Refused:
                continue
            fields |= group
        return replace(asked, fields=fields)

    async def _ids_among_logprobs(self, abilities: Abilities) -> Abilities:
        fields = {name: value for name, value in abilities.fields.items() if name != "return_token_ids"}
        without = replace(abilities, ids="none", fields=fields)
        tried = replace(abilities, ids="logprobs", fields=fields | LOGPROBS)
        try:
            received = await self._ask(tried)
        except Refused:
            return without
        return tried if token_ids(received, tried) else without

    def _check_tokenizer(self, received: Received, abilities: Abilities) -> None:
        """The same ids must read as the same text here and there; spaces and broken characters aside."""
        ids = token_ids(received, abilities) or []
        here = [self._tokenizer.decode(ids, skip_special_tokens=skip) for skip in (True, False)]
        if _bare(received.text) not in map(_bare, here):
            raise ConfigError(
                f"the tokenizer is not the server's: ids {ids} read {here[0]!r} here and {received.text!r} there; "
                "set engine.tokenizer to the folder or hub name of the model that is served"
            )

    async def _stop(self, abilities: Abilities, greedy: Received) -> Literal["included", "told", "silent"]:
        piece = _piece(greedy.text)
        if not piece:  # nothing to stop at
            return "silent" if abilities.ids == "none" else "included"
        try:
            received = await self._ask(abilities, stop=[piece])
        except Refused:
            return "silent"
        ids, before = token_ids(received, abilities), token_ids(greedy, abilities)
        text = received.text if ids is None else self._tokenizer.decode(ids, skip_special_tokens=True)
        told = met_stop(received, piece)
        if piece not in text:
            return "told" if told else "silent"
        shorter = len(text) < len(greedy.text) if ids is None or before is None else len(ids) < len(before)
        ended = received.choice.get("finish_reason") == "stop"
        return "included" if told or (ended and shorter) else "silent"  # else it ignores stop texts

    async def _stream(self, abilities: Abilities) -> Mapping[str, Any] | None:
        for fields in (STREAM | USAGE, STREAM):
            try:
                await self._ask(abilities, **fields)
            except Refused:
                continue
            return fields
        return None

    async def _several(self, abilities: Abilities) -> bool:
        try:
            return len((await self._ask(abilities, temperature=1.0, n=2)).choices) == 2
        except Refused:
            return False

    async def _seeds(self, abilities: Abilities) -> bool:
        try:
            first, second = [await self._ask(abilities, temperature=1.0, **SEED) for _ in range(2)]
        except Refused:
            return False
        return (first.text, first.ids) == (second.text, second.ids)


def _bare(text: str) -> str:
    return "".join(text.replace("\ufffd", "").split())


def _piece(text: str) -> str:
    """A character or two from the first half of a text, plain ones: a server that stops there has more to say."""
    half = text[: max(1, len(text) // 2)]
    plain = [c for c in half if c.isascii() and (c.isprintable() or c == "\n")]
    return plain[-1] if plain else ""
