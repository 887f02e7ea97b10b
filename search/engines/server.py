"""The server engine: the policy behind any OpenAI-compatible completions server, fed continuously over HTTP.

One request a Request; `max_concurrency` of them in flight, the rest wait here. An event loop in a thread of its own
sends them; `submit`, `collect` and `cancel` hand over. Exact where the server takes and returns token ids (vLLM
does), else declared approximate by `capabilities.token_ids`; what a server can do is found out at the start. Left out:
merging by `n`, log probabilities, hidden states, loading adapters into a running server.
"""

from __future__ import annotations

import asyncio
import functools
import itertools
import logging
import re
import threading
from collections.abc import Coroutine, Sequence
from pathlib import Path
from typing import Any, TypeVar

from configs.schema import Model
from configs.schema import ServerEngine as ServerSettings
from search.engines import server_model
from search.engines.server_http import Client, Received, Refused
from search.engines.server_probe import probe
from search.engines.server_reply import Abilities, Dialect
from search.engines.streaming import Answer, Streaming, refusal
from search.errors import ConfigError, EngineError, ModelError
from search.types import Capabilities, Continuation, Finish, Request

CLOSE_S = 10.0
MAX_TOLD = 20  # kinds of refusals that are logged
OVERFLOW_WORDS = (
    "context length", "context size", "context window", "maximum length", "max_model_len", "max_seq_len",
    "maximum model length", "longer than the maximum", "too many tokens",
)  # fmt: skip
log = logging.getLogger(__name__)
T = TypeVar("T")


class ServerEngine(Streaming):
    """Implements search.types.StreamingEngine.

    `policy` is the folder or hub name of the model that should be served. Raises ConfigError where the settings are
    wrong or the server serves another model, ModelError where it does not answer as a completions server does.
    """

    def __init__(self, settings: ServerSettings, policy: str | Path | None = None, model: Model | None = None) -> None:
        super().__init__()
        self._settings = settings
        self._model = model or Model()
        self._policy = None if policy is None else str(policy)
        self._tickets = itertools.count()
        self._told: set[str] = set()
        self._changed = threading.Condition()  # guards the next three
        self._finished: list[Answer] = []
        self._num_open = 0  # submitted and not finished
        self._failure: BaseException | None = None
        self._pending: dict[int, Request] = {}  # this and the next two: in the loop's thread only
        self._running: dict[int, asyncio.Task[Continuation]] = {}
        self._received: dict[int, Received] = {}
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="server-engine", daemon=True)
        self._thread.start()
        self._client: Client | None = None
        try:
            self._connect()
        except BaseException:
            self.close()
            raise

    # ------------------------------------------------------------ the engine's surface

    def submit(self, requests: Sequence[Request]) -> list[int]:
        """Take requests in; a ticket for each. Raises EngineError where the engine was closed."""
        if not self._thread.is_alive():
            raise EngineError("the server engine was closed")
        admitted = {next(self._tickets): request for request in requests}
        with self._changed:
            self._num_open += len(admitted)
        self._loop.call_soon_threadsafe(self._admit, admitted)
        return list(admitted)

    def cancel(self, tickets: Sequence[int]) -> None:
        """Drop those that wait; close the connections of those under way, which most servers take as an abort."""
        if tickets and self._thread.is_alive():
            self._loop.call_soon_threadsafe(self._stop, tuple(tickets))

    def close(self) -> None:
        """Give everything up and end the thread. May be called twice."""
        if not self._thread.is_alive():
            return
        try:
            self._in_loop(self._shut())
        finally:
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join(CLOSE_S)
            if not self._thread.is_alive():
                self._loop.close()

    def _collect(self) -> list[Answer]:
        with self._changed:
            self._changed.wait_for(lambda: self._finished or not self._num_open)
            found, self._finished = self._finished, []
            if found:
                return found
            failure, self._failure = self._failure, None
        if failure is not None:
            raise failure
        return []

    # ------------------------------------------------------------ the start

    def _connect(self) -> None:
        settings = self._settings
        self._client = client = self._in_loop(self._new_client())
        if client.in_clear:
            log.warning("the key goes unencrypted to %s: use https", client.url)
        source = settings.tokenizer or settings.policy or self._policy
        if source is None:
            raise ConfigError(
                "nobody tells how to tokenize: set engine.tokenizer to the folder or hub name of the model"
            )
        try:
            card = self._in_loop(server_model.find_model(client, settings, self._policy))
            if self._policy is not None:
                server_model.check_policy(card, self._policy, settings, self._model.base)
            self.tokenizer = server_model.load_tokenizer(source, self._model)
            self.facts = server_model.facts(card, settings, source, self.tokenizer, self._model)
            self.abilities: Abilities = self._in_loop(probe(client, card.name, self.tokenizer, settings))
        except EngineError as error:
            raise ModelError(str(error)) from None
        except Refused as error:
            raise ModelError(f"the server at {client.url} refuses what it took before ({error})") from None
        self._num_tokens = server_model.num_tokens(source, self.tokenizer)
        self.capabilities = Capabilities(
            token_ids=self.abilities.exact, seeds=self.abilities.seeds, prefix_cache=self.abilities.cached_tokens
        )
        eos_ids = server_model.eos_ids(source, self.tokenizer)
        self._dialect = Dialect(
            card.name, self.tokenizer, eos_ids, self.abilities, extra_body=settings.extra_body, stream=settings.stream
        )
        self._tell_abilities(client.url)

    def _tell_abilities(self, url: str) -> None:
        if lacks := self.abilities.lacks():
            log.warning("approximate: the server at %s %s", url, lacks)
        if "top_k" not in self.abilities.fields:
            log.warning("the server at %s refuses top_k and min_p: it may cut off unlikely tokens by its defaults", url)
        if self._settings.seeds and not self.abilities.seeds:
            log.warning("the server at %s does not repeat a sample by its seed", url)

    async def _new_client(self) -> Client:
        return Client(self._settings)

    def _in_loop(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """Run it in the engine's thread and wait."""
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result()

    # ------------------------------------------------------------ in the loop's thread

    def _admit(self, requests: dict[int, Request]) -> None:
        assert self._client is not None
        with self._changed:
            if self._failure is not None:  # not told yet: this was sent in ignorance of it
                self._num_open -= len(requests)
                self._changed.notify_all()
                return
        self._client.giving_up.clear()
        self._pending |= requests
        self._start()

    def _start(self) -> None:
        while self._pending and len(self._running) < self._settings.max_concurrency:
            ticket = next(iter(self._pending))
            request = self._pending.pop(ticket)
            task = self._loop.create_task(self._answer(ticket, request))
            self._running[ticket] = task
            task.add_done_callback(functools.partial(self._done, ticket, request))

    async def _answer(self, ticket: int, request: Request) -> Continuation:
        assert self._client is not None
        if (refused := refusal(request, self.facts, self._num_tokens)) is not None:
            return Continuation((), refused)
        max_tokens = min(request.max_new_tokens, self.facts.max_length - len(request.prefix))
        body, received = self._dialect.body(request, max_tokens)
        self._received[ticket] = received
        try:
            await self._client.post("completions", body, received)
        except Refused as error:
            if any(word in error.reason.lower() for word in OVERFLOW_WORDS):
                return Continuation((), Finish.OVERFLOW)
            self._tell(f"the server refuses a request: {error}")
            return Continuation((), Finish.ERROR)
        continuation, reason = self._dialect.read(request, max_tokens, received)
        if reason is not None:
            self._tell(f"the server's answer to a request cannot be used: {reason}")
        return continuation

    def _done(self, ticket: int, request: Request, task: asyncio.Task[Continuation]) -> None:
        del self._running[ticket]
        received = self._received.pop(ticket, None)
        if task.cancelled():
            self._deliver(ticket, self._dialect.cancelled(request, received or Received()))
        elif (error := task.exception()) is not None:
            self._fail(error)
        else:
            self._deliver(ticket, task.result())
        self._start()

    def _deliver(self, ticket: int, continuation: Continuation) -> None:
        with self._changed:
            self._finished.append((ticket, continuation))
            self._num_open -= 1
            self._changed.notify_all()

    def _fail(self, error: BaseException) -> None:
        """Send nothing more and try nothing again; what is under way may still finish."""
        assert self._client is not None
        self._client.giving_up.set()
        with self._changed:
            self._failure = self._failure or error
            self._num_open -= 1 + len(self._pending)
            self._pending.clear()
            self._changed.notify_all()

    def _stop(self, tickets: Sequence[int]) -> None:
        for ticket in tickets:
            if self._pending.pop(ticket, None) is not None:
                self._deliver(ticket, Continuation((), Finish.CANCELLED))
            elif ticket in self._running:
                self._running[ticket].cancel()

    async def _shut(self) -> None:
        self._stop(list(self._pending))
        others = asyncio.all_tasks() - {asyncio.current_task()}
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)
        if self._client is not None:
            await self._client.close()

    def _tell(self, message: str) -> None:
        kind = re.sub(r"\d+", "0", message)
        if kind not in self._told and len(self._told) < MAX_TOLD:
            self._told.add(kind)
            log.warning("%s (told once)", message)
