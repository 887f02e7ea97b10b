"""The server engine: the policy behind any OpenAI-compatible completions server, fed continuously over HTTP.

One HTTP request a Request; `max_concurrency` of them in flight, the rest wait here. Without seeds, Requests of one
`submit` that differ in nothing but their keys go out as one with `n`. An event loop in a thread of its own sends them;
`submit`, `collect` and `cancel` hand over. Exact where the server takes and returns token ids (vLLM does), else
declared approximate by `capabilities.token_ids`; what a server can do is found out at the start. Left out: log
probabilities, hidden states, loading adapters into a running server.
"""

from __future__ import annotations

import asyncio
import functools
import itertools
import logging
import re
import threading
from collections import deque
from collections.abc import Coroutine, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

from configs.schema import Model
from configs.schema import ServerEngine as ServerSettings
from search.engines import server_model
from search.engines.server_http import Client, Received, Refused
from search.engines.server_probe import probe
from search.engines.server_reply import Abilities, Dialect, sharing
from search.engines.streaming import Answer, Streaming, refusal
from search.errors import ConfigError, EngineError, ModelError
from search.types import Capabilities, Continuation, Finish, Request

CLOSE_S = 10.0
MAX_MERGED = 64  # answers of one HTTP request
MAX_TOLD = 20  # kinds of refusals that are logged
OVERFLOW_WORDS = (
    "context length", "context size", "context window", "maximum length", "max_model_len", "max_seq_len",
    "maximum model length", "longer than the maximum", "too many tokens",
)  # fmt: skip
log = logging.getLogger(__name__)
T = TypeVar("T")


@dataclass(slots=True)
class _Work:
    """One HTTP request: what is asked, and who waits for it."""

    request: Request
    tickets: list[int]
    cancelled: set[int] = field(default_factory=set[int])
    task: asyncio.Task[list[Continuation]] | None = None
    received: Received = field(default_factory=Received)


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
        self._waiting: deque[_Work] = deque()  # this and the next two: in the loop's thread only
        self._work_of: dict[int, _Work] = {}  # open tickets
        self._num_running = 0  # tickets
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
        for future in self._until:
            future.add_done_callback(self._wake)
        with self._changed:
            self._changed.wait_for(lambda: self._finished or not self._num_open or self.called_off)
            found, self._finished = self._finished, []
            if found:
                return found
            if self._num_open and self.called_off:
                return []
            failure, self._failure = self._failure, None
        if failure is not None:
            raise failure
        return []

    def _wake(self, _: object) -> None:
        with self._changed:
            self._changed.notify_all()

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
        for work in self._works(requests):
            self._waiting.append(work)
            self._work_of |= dict.fromkeys(work.tickets, work)
        self._start()

    def _works(self, requests: dict[int, Request]) -> list[_Work]:
        if not self._dialect.merges:
            return [_Work(request, [ticket]) for ticket, request in requests.items()]
        works: list[_Work] = []
        growing: dict[Request, _Work] = {}
        for ticket, request in requests.items():
            alike = replace(request, key=0)
            work = growing.get(alike)
            if work is None or len(work.tickets) >= min(MAX_MERGED, self._settings.max_concurrency):
                work = growing[alike] = _Work(request, [])
                works.append(work)
            work.tickets.append(ticket)
        return works

    def _start(self) -> None:
        while self._waiting:
            work = self._waiting[0]
            if self._num_running and self._num_running + len(work.tickets) > self._settings.max_concurrency:
                return
            self._waiting.popleft()
            if not work.tickets:  # all cancelled
                continue
            self._num_running += len(work.tickets)
            work.task = self._loop.create_task(self._answer(work))
            work.task.add_done_callback(functools.partial(self._done, work))

    async def _answer(self, work: _Work) -> list[Continuation]:
        """Continuations for its tickets, in any order; fewer where the server answered fewer times."""
        assert self._client is not None
        request, num = work.request, len(work.tickets)
        if (refused := refusal(request, self.facts, self._num_tokens)) is not None:
            return [Continuation((), refused)] * num
        max_tokens = min(request.max_new_tokens, self.facts.max_length - len(request.prefix))
        body, work.received = self._dialect.body(request, max_tokens, num)
        try:
            received = await self._client.post("completions", body, work.received)
        except Refused as error:
            if any(word in error.reason.lower() for word in OVERFLOW_WORDS):
                return [Continuation((), Finish.OVERFLOW)] * num
            self._tell(f"the server refuses a request: {error}")
            return [Continuation((), Finish.ERROR)] * num
        parts = [received] if num == 1 else [received.part(i) for i in range(min(num, len(received.choices)))]
        read = [self._dialect.read(request, max_tokens, part) for part in parts]
        for reason in {reason for _, reason in read if reason is not None}:
            self._tell(f"the server's answer to a request cannot be used: {reason}")
        return [sharing(continuation) if i else continuation for i, (continuation, _) in enumerate(read)]

    def _done(self, work: _Work, task: asyncio.Task[list[Continuation]]) -> None:
        self._num_running -= len(work.tickets)
        if not task.cancelled() and (error := task.exception()) is not None:
            self._fail(error, work.tickets)
            return
        if task.cancelled():
            one = self._dialect.cancelled(work.request, work.received)
            found = [one, *[sharing(one)] * (len(work.tickets) - 1)]
        else:
            found = task.result()
        for ticket, continuation in zip(work.tickets, found, strict=False):
            stopped = ticket in work.cancelled
            self._deliver(ticket, replace(continuation, finish=Finish.CANCELLED) if stopped else continuation)
        for ticket in work.tickets[len(found) :]:  # the server sent fewer choices than it was asked for
            again = self._work_of[ticket] = _Work(work.request, [ticket])
            self._waiting.append(again)
        self._start()

    def _deliver(self, ticket: int, continuation: Continuation) -> None:
        del self._work_of[ticket]
        with self._changed:
            self._finished.append((ticket, continuation))
            self._num_open -= 1
            self._changed.notify_all()

    def _fail(self, error: BaseException, tickets: Sequence[int]) -> None:
        """Send nothing more and try nothing again; what is under way may still finish."""
        assert self._client is not None
        self._client.giving_up.set()
        dropped = [*tickets, *(ticket for work in self._waiting for ticket in work.tickets)]
        self._waiting.clear()
        for ticket in dropped:
            del self._work_of[ticket]
        with self._changed:
            self._failure = self._failure or error
            self._num_open -= len(dropped)
            self._changed.notify_all()

    def _stop(self, tickets: Sequence[int]) -> None:
        for ticket in tickets:
            work = self._work_of.get(ticket)
            if work is None:
                continue
            if work.task is None:
                work.tickets.remove(ticket)
                self._deliver(ticket, Continuation((), Finish.CANCELLED))
                continue
            work.cancelled.add(ticket)  # merged with others, it ends with them and counts what it cost
            if len(work.cancelled) == len(work.tickets):
                work.task.cancel()

    async def _shut(self) -> None:
        self._stop(list(self._work_of))
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
