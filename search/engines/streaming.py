"""What every streaming engine shares: `extend` built on submit and collect, and requests refused before they start.

An engine derives from `Streaming` and gives `submit`, `cancel` and `_collect`, which is `collect` as the protocol has
it. Calls of `extend` may come while other tickets are in flight: their answers are kept for the next `collect`.
"""

from __future__ import annotations

import abc
from collections.abc import Collection, Sequence
from concurrent.futures import Future
from typing import Any

from search.errors import EngineError
from search.types import Continuation, Finish, ModelFacts, Request

Answer = tuple[int, Continuation]  # a ticket and its continuation


class Streaming(abc.ABC):
    """The part of search.types.StreamingEngine that follows from the rest."""

    def __init__(self) -> None:
        self._aside: list[Answer] = []  # came while `extend` waited for others
        self._unwanted: set[int] = set()  # tickets of an `extend` that was interrupted
        self._until: Collection[Future[Any]] = ()  # of the `collect` under way

    @abc.abstractmethod
    def submit(self, requests: Sequence[Request]) -> list[int]:
        """Take requests in; a ticket for each, never used before. Raises EngineError where the engine is dead."""

    @abc.abstractmethod
    def cancel(self, tickets: Sequence[int]) -> None:
        """Stop these; `_collect` returns them as CANCELLED. Those that are finished or unknown are left alone."""

    @abc.abstractmethod
    def _collect(self) -> list[Answer]:
        """What finished since; waits for one, unless nothing is in flight: then []. Nor does it wait once `called_off`.
        Raises EngineError: all that finished before was returned, and nothing more will come."""

    @property
    def called_off(self) -> bool:
        """Whoever waits in `collect` has something else to do."""
        return any(future.done() for future in self._until)

    def collect(self, until: Collection[Future[Any]] = ()) -> list[Answer]:
        """(ticket, continuation) of all that finished since; waits for one, unless nothing is in flight: then []. Nor
        does it wait once one of `until` is done.

        Raises EngineError once everything that finished before the engine's end was returned.
        """
        self._until = until
        while True:
            found, self._aside = self._aside, []
            found = found or self._collect()
            wanted = [answer for answer in found if answer[0] not in self._unwanted]
            self._unwanted.difference_update(ticket for ticket, _ in found)
            if wanted or not found:
                return wanted

    def extend(self, requests: Sequence[Request]) -> list[Continuation]:
        """One continuation a request, in order. Raises EngineError."""
        tickets = self.submit(requests)
        missing, found, others = set(tickets), dict[int, Continuation](), list[Answer]()
        try:
            while missing:
                answers = self.collect()
                if not answers:
                    raise EngineError(
                        f"the engine left {len(missing)} of {len(tickets)} requests unanswered: run the command again, "
                        "what was finished is kept"
                    )
                for ticket, continuation in answers:
                    if ticket in missing:
                        missing.discard(ticket)
                        found[ticket] = continuation
                    else:
                        others.append((ticket, continuation))
        except BaseException:  # interrupted: nobody will ask for these tickets again
            self._unwanted |= missing
            self.cancel(sorted(missing))
            raise
        finally:
            self._aside += others
        return [found[ticket] for ticket in tickets]


def refusal(request: Request, facts: ModelFacts, num_tokens: int) -> Finish | None:
    """How a request ends that cannot be started; None: it can. `num_tokens`: ids below it are tokens."""
    if len(request.prefix) >= facts.max_length:
        return Finish.OVERFLOW
    if not request.prefix or min(request.prefix) < 0 or max(request.prefix) >= num_tokens:
        return Finish.ERROR
    return Finish.LENGTH if request.max_new_tokens < 1 else None
