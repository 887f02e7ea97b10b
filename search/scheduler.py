"""Runs the strategies of many problems together and merges what they ask for into full batches.

A strategy is a coroutine that awaits `Ask`s (of the engine), `Question`s (of the verifier) and `Reading`s (of the
task). A synchronous engine is called when every live coroutine waits for it, never on a timer, so the batches, and with
them the results, are a pure function of the problems. A streaming engine is fed as soon as there is something to ask,
and answers are read beside it.
"""

from __future__ import annotations

import abc
import contextlib
from collections.abc import Callable, Coroutine, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from search.errors import BudgetExceeded, EngineError, VerifierError
from search.policy import Ask, Question, Reading, Waiting
from search.types import Continuation, Engine, StreamingEngine, Task, Verifier

MAX_READERS = 8  # threads in which answers are read, beside streaming engines

T = TypeVar("T")
Searching = Coroutine[Waiting, None, T]


@dataclass(slots=True)
class Tick:
    """How far a search is; handed to the progress callback after every answer of the engine."""

    finished: int = 0  # problems
    tokens: int = 0  # generated
    steps: int = 0  # continuations: the size of all trees together


def run_together(
    coroutines: Sequence[Searching[T]],
    engine: Engine,
    verifier: Verifier | None = None,
    task: Task | None = None,
    *,
    max_tokens: int | None = None,
    finish_at_cap: bool = False,
    on_done: Callable[[int, T], None] | None = None,
    on_tick: Callable[[Tick], None] | None = None,
) -> list[T | None]:
    """Every coroutine's result, in order.

    `max_tokens` is a hard cap on what is generated: a request is made only if it fits even at its full length; what
    cannot be finished under it ends, with the result None, or with `finish_at_cap` is refused with BudgetExceeded, so
    that each coroutine can end with what it has. `on_done` gets each result as soon as it is there.
    Raises what a coroutine, the verifier or the task raises, and EngineError; the others are closed, and an engine's
    work in flight cancelled.
    """
    run = (_Streaming if isinstance(engine, StreamingEngine) else _Batched)(
        coroutines, engine, verifier, task, max_tokens, finish_at_cap, on_done, on_tick
    )
    try:
        try:
            run.run()
        except BaseException:
            with contextlib.suppress(Exception):  # an engine that died cannot cancel either: why it died is told
                run.stop()
            raise
        run.stop()
    finally:
        for coroutine in coroutines:
            coroutine.close()
    return [run.results.get(i) for i in range(len(coroutines))]


class _Run(abc.ABC, Generic[T]):
    """What both ways share: who waits for what."""

    def __init__(
        self,
        coroutines: Sequence[Searching[T]],
        engine: Any,
        verifier: Verifier | None,
        task: Task | None,
        max_tokens: int | None,
        finish_at_cap: bool,
        on_done: Callable[[int, T], None] | None,
        on_tick: Callable[[Tick], None] | None,
    ):
        self.coroutines = coroutines
        self.engine = engine
        self.verifier = verifier
        self.task = task
        self.max_tokens = max_tokens
        self.finish_at_cap = finish_at_cap
        self.on_done = on_done
        self.on_tick = on_tick
        self.results: dict[int, T] = {}
        self.asks: dict[int, Ask] = {}  # not yet with the engine
        self.questions: dict[int, Question] = {}
        self.readings: dict[int, Reading] = {}  # not yet with the task
        self.reserved = 0  # tokens that requests in flight may still generate
        self.tick = Tick()

    def run(self) -> None:
        for i in range(len(self.coroutines)):
            self.advance(i)
        while self.asks or self.questions or self.readings or self.in_flight:
            if self.read():
                continue
            if self.questions:
                self.answer()
            elif not self.generate():
                if not self.finish_at_cap:
                    return
                self.refuse()

    @property
    def in_flight(self) -> bool:
        return False

    @abc.abstractmethod
    def read(self) -> bool:
        """Have the task read what waits for it, and tell what it read; False where there is nothing to do."""

    @abc.abstractmethod
    def generate(self) -> bool:
        """Let the engine work; False where nothing can go on."""

    def stop(self) -> None:
        """Leave nothing in flight."""

    def refuse(self) -> None:
        """Tell everyone who waits for the engine that the cap is reached."""
        waiting, self.asks = sorted(self.asks), {}
        for i in waiting:
            self.advance(i, BudgetExceeded(f"the cap of {self.max_tokens} tokens leaves no room for more"))

    def advance(self, i: int, error: BudgetExceeded | None = None) -> None:
        """Run coroutine i to its next question."""
        try:
            waits_for = self.coroutines[i].throw(error) if error else self.coroutines[i].send(None)
        except StopIteration as end:
            self.results[i] = end.value
            self.tick.finished += 1
            if self.on_done:
                self.on_done(i, end.value)
            return
        match waits_for:
            case Ask():
                self.asks[i] = waits_for
            case Question():
                self.questions[i] = waits_for
            case Reading():
                self.readings[i] = waits_for

    def answer(self) -> None:
        """Put all waiting questions to the verifier in one batch."""
        assert self.verifier is not None, "a strategy asked for scores without a verifier"
        waiting = sorted(self.questions.items())
        self.questions = {}
        requests = [request for _, question in waiting for request in question.requests]
        scored = self.verifier.score(requests)
        if len(scored) != len(requests):
            raise VerifierError(f"the verifier answered {len(scored)} of {len(requests)} requests: it is not usable")
        taken = 0
        for i, question in waiting:
            question.reply = list(scored[taken : taken + len(question.requests)])
            taken += len(question.requests)
            self.advance(i)

    def take_readings(self) -> dict[int, Reading]:
        taken, self.readings = dict(sorted(self.readings.items())), {}
        return taken

    def answers(self, readings: Mapping[int, Reading]) -> list[str | None]:
        """What all of them ask for, in one call. Changes nothing here: it may run beside the rest."""
        assert self.task is not None, "a strategy asked for answers without a task"
        pairs = [pair for reading in readings.values() for pair in reading.pairs]
        found = self.task.answers(pairs)
        assert len(found) == len(pairs), f"the task '{self.task.name}' read {len(found)} of {len(pairs)} answers"
        return found

    def tell_answers(self, readings: Mapping[int, Reading], found: Sequence[str | None]) -> None:
        taken = 0
        for i, reading in readings.items():
            reading.reply = list(found[taken : taken + len(reading.pairs)])
            taken += len(reading.pairs)
            self.advance(i)

    def admit(self) -> list[tuple[int, Ask]]:
        """The asks that may be made now, in the order of the problems."""
        admitted: list[tuple[int, Ask]] = []
        for i, ask in sorted(self.asks.items()):
            needed = sum(request.max_new_tokens for request in ask.requests)
            if self.max_tokens is None or self.tick.tokens + self.reserved + needed <= self.max_tokens:
                self.reserved += needed
                admitted.append((i, self.asks.pop(i)))
        return admitted

    def count(self, continuations: Sequence[Continuation], reserved: int) -> None:
        self.reserved -= reserved
        self.tick.tokens += sum(len(c.ids) for c in continuations)
        self.tick.steps += len(continuations)

    def tell(self) -> None:
        if self.on_tick:
            self.on_tick(self.tick)


class _Batched(_Run[T]):
    """A synchronous engine gets everything that waits, at once."""

    def read(self) -> bool:
        waiting = self.take_readings()
        if waiting:
            self.tell_answers(waiting, self.answers(waiting))
        return bool(waiting)

    def generate(self) -> bool:
        admitted = self.admit()
        if not admitted:
            return False
        requests = [request for _, ask in admitted for request in ask.requests]
        continuations = self.engine.extend(requests)
        if len(continuations) != len(requests):
            raise EngineError(f"the engine answered {len(continuations)} of {len(requests)} requests")
        self.count(continuations, sum(request.max_new_tokens for request in requests))
        taken = 0
        for i, ask in admitted:
            ask.reply = continuations[taken : taken + len(ask.requests)]
            taken += len(ask.requests)
            self.advance(i)
        self.tell()
        return True


class _Streaming(_Run[T]):
    """A streaming engine gets every ask at once, and each coroutine goes on when its own ask is answered.

    Answers are read in threads of their own, for it may take long: neither the engine waits for that, nor do other
    problems. What there is no thread left for gathers, and is shared out over those that come free.
    """

    def __init__(self, *args: Any):
        super().__init__(*args)
        self.owners: dict[int, tuple[int, int]] = {}  # ticket -> (coroutine, position in its ask)
        self.pending: dict[int, tuple[Ask, dict[int, Continuation]]] = {}
        self.readers = ThreadPoolExecutor(MAX_READERS, thread_name_prefix="reader")  # each begins when it is needed
        self.being_read: dict[Future[list[str | None]], dict[int, Reading]] = {}

    @property
    def in_flight(self) -> bool:
        return bool(self.owners or self.being_read)

    def read(self) -> bool:
        read = [future for future in self.being_read if future.done()]
        for future in read:
            self.tell_answers(self.being_read.pop(future), future.result())
        free = MAX_READERS - len(self.being_read)
        given = [*self.take_readings().items()] if free else []
        for n in range(min(free, len(given))):
            some = dict(given[n::free])
            self.being_read[self.readers.submit(self.answers, some)] = some
        return bool(read or given)

    def generate(self) -> bool:
        for i, ask in self.admit():
            self.pending[i] = (ask, {})
            tickets = self.engine.submit(ask.requests)
            if len(tickets) != len(ask.requests):
                raise EngineError(f"the engine took {len(tickets)} of {len(ask.requests)} requests")
            self.owners |= {ticket: (i, position) for position, ticket in enumerate(tickets)}
        if self.owners:
            self.collect()
        elif self.being_read:
            wait(self.being_read, return_when=FIRST_COMPLETED)
        else:
            return False
        self.tell()
        return True

    def collect(self) -> None:
        """Wait until the engine has answered something, or the task has read something."""
        finished = self.engine.collect(self.being_read)
        if not finished and not any(future.done() for future in self.being_read):
            raise EngineError(f"the engine has nothing in flight, but {len(self.owners)} requests are unanswered")
        for ticket, continuation in finished:
            if ticket not in self.owners:
                raise EngineError(f"the engine answered ticket {ticket}, which is not in flight")
            i, position = self.owners.pop(ticket)
            ask, replies = self.pending[i]
            replies[position] = continuation
            self.count([continuation], ask.requests[position].max_new_tokens)
            if len(replies) == len(ask.requests):
                del self.pending[i]
                ask.reply = [replies[n] for n in range(len(replies))]
                self.advance(i)

    def stop(self) -> None:
        """Cancel what is in flight and take it back, so that the engine can serve another search. What is being read
        is left to end by itself."""
        self.readers.shutdown(wait=False, cancel_futures=True)
        if not self.owners:
            return
        self.engine.cancel(list(self.owners))
        while self.owners and (finished := self.engine.collect()):
            for ticket, _ in finished:
                self.owners.pop(ticket, None)
