"""Grade what is finished while a streaming engine goes on: whoever waits for a grader must not keep the engine waiting.

One thread does one piece of work after another. It only waits: gradings that may hang run in processes that can be
killed (see search.grading). What comes of them is delivered in order, in the thread that gave the work.
"""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Generic, TypeVar

MOST_WAITING = 64  # pieces of work: whoever gives more waits

T = TypeVar("T")
R = TypeVar("R")
Tick = TypeVar("Tick")


class Beside(Generic[T, R]):
    """`work` runs beside, `deliver` here: whenever more is given or ticks, and at the end of the context, which waits
    for all. All of these raise what `work` raised. With `here`, nothing runs beside."""

    def __init__(self, work: Callable[[T], R], deliver: Callable[[T, R], None], *, here: bool = False) -> None:
        self._work, self._deliver, self._here = work, deliver, here
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="beside")  # which begins with the first piece
        self._waiting: deque[tuple[T, Future[R]]] = deque()

    def give(self, piece: T) -> None:
        if self._here:
            self._deliver(piece, self._work(piece))
            return
        self._waiting.append((piece, self._thread.submit(self._work, piece)))
        self._deliver_all_but(MOST_WAITING)

    def delivering_before(self, on_tick: Callable[[Tick], None] | None) -> Callable[[Tick], None]:
        """The same, after delivering what is done by then."""

        def ticked(tick: Tick) -> None:
            self._deliver_all_but(len(self._waiting))
            if on_tick:
                on_tick(tick)

        return ticked

    def _deliver_all_but(self, num: int) -> None:
        while self._waiting and (len(self._waiting) > num or self._waiting[0][1].done()):
            piece, future = self._waiting.popleft()
            if future.exception() is not None:
                self._waiting.clear()  # the rest would fail as well, and may take long for it
            self._deliver(piece, future.result())

    def __enter__(self) -> Beside[T, R]:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        """After an error, what was finished before it is delivered still; after Ctrl-C only what is done already."""
        patient = kind is None or issubclass(kind, Exception)
        try:
            with contextlib.suppress(Exception) if kind else contextlib.nullcontext():  # the first error is told
                self._deliver_all_but(0 if patient else len(self._waiting))
        finally:
            self._thread.shutdown(wait=patient, cancel_futures=True)
