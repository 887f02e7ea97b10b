"""`extend` on top of submit and collect: other tickets, interruptions, an engine that ends."""

from collections.abc import Callable, Sequence

import pytest

from search.engines.streaming import Answer, Streaming, refusal
from search.errors import EngineError
from search.types import Continuation, Finish, ModelFacts, Request


class Stream(Streaming):
    """Answers one request a call, the last first, or the one at `place`; `on_collect` may raise."""

    def __init__(self) -> None:
        super().__init__()
        self.flying: list[Answer] = []
        self.number, self.place = 0, -1
        self.on_collect: Callable[[], None] = lambda: None

    def submit(self, requests: Sequence[Request]) -> list[int]:
        tickets = list(range(self.number, self.number + len(requests)))
        self.number += len(requests)
        self.flying += [(t, Continuation(r.prefix, Finish.EOS)) for t, r in zip(tickets, requests, strict=True)]
        return tickets

    def cancel(self, tickets: Sequence[int]) -> None:
        self.flying = [(t, Continuation((), Finish.CANCELLED) if t in tickets else c) for t, c in self.flying]

    def _collect(self) -> list[Answer]:
        self.on_collect()
        return [self.flying.pop(self.place)] if self.flying else []


def requests(*ids: int) -> list[Request]:
    return [Request((i,), 1, 1.0, i) for i in ids]


def drained(stream: Stream) -> dict[int, tuple[int, ...]]:
    found: dict[int, tuple[int, ...]] = {}
    while answers := stream.collect():
        assert not found.keys() & dict(answers).keys()
        found |= {ticket: c.ids for ticket, c in answers}
    return found


def test_answers_come_in_the_order_of_the_requests() -> None:
    assert [c.ids for c in Stream().extend(requests(5, 6, 7))] == [(5,), (6,), (7,)]
    assert Stream().extend([]) == []


def test_other_tickets_wait_for_collect() -> None:
    for place in (0, -1):
        stream = Stream()
        stream.place = place
        early = stream.submit(requests(1, 2))
        assert [c.ids for c in stream.extend(requests(3, 4))] == [(3,), (4,)]
        assert drained(stream) == {early[0]: (1,), early[1]: (2,)}


def test_nothing_of_an_interrupted_call_is_collected_later() -> None:
    stream = Stream()
    early = stream.submit(requests(1))
    calls = iter([None, KeyboardInterrupt()])

    def interrupt() -> None:
        if (error := next(calls)) is not None:
            raise error

    stream.on_collect = interrupt
    with pytest.raises(KeyboardInterrupt):
        stream.extend(requests(2, 3, 4))
    stream.on_collect = lambda: None
    assert [c.ids for c in stream.extend(requests(5))] == [(5,)]
    assert drained(stream) == {early[0]: (1,)}
    assert stream.collect() == []


def test_an_engine_that_stops_answering_is_an_error() -> None:
    stream = Stream()

    def lose() -> None:
        if len(stream.flying) == 1:
            stream.flying.clear()

    stream.on_collect = lose
    with pytest.raises(EngineError, match="left 1 of 3 requests unanswered"):
        stream.extend(requests(1, 2, 3))


def test_requests_that_cannot_be_started() -> None:
    facts = ModelFacts("", 1, max_length=4)
    cases = {
        (1, 2, 3): None,
        (1, 2, 3, 4): Finish.OVERFLOW,
        (): Finish.ERROR,
        (9, -1): Finish.ERROR,
        (10,): Finish.ERROR,
    }
    for prefix, finish in cases.items():
        assert refusal(Request(prefix, 5, 1.0, 0), facts, num_tokens=10) is finish
    assert refusal(Request((1,), 0, 1.0, 0), facts, num_tokens=10) is Finish.LENGTH
