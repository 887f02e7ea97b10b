"""Runs the strategies of many problems together and merges what they ask for into full batches.

A strategy is a coroutine that awaits `Ask`s. A synchronous engine is called when every live coroutine waits, never
on a timer, so the batches, and with them the results, are a pure function of the problems.
"""

from __future__ import annotations

from collections.abc import Coroutine, Sequence
from typing import Any, TypeVar

from search.policy import Ask
from search.types import Engine

T = TypeVar("T")


def run_together(coroutines: Sequence[Coroutine[Ask, None, T]], engine: Engine) -> list[T]:
    """Every coroutine's result, in order. Raises what a coroutine raises, and EngineError; the others are closed."""
    results: dict[int, T] = {}
    try:
        waiting = _step([(i, coroutine, None) for i, coroutine in enumerate(coroutines)], results)
        while waiting:
            continuations = engine.extend([request for _, _, ask in waiting for request in ask.requests])
            taken = 0
            for _, _, ask in waiting:
                ask.reply = continuations[taken : taken + len(ask.requests)]
                taken += len(ask.requests)
            assert taken == len(continuations), f"the engine answered {len(continuations)} of {taken} requests"
            waiting = _step(waiting, results)
    finally:
        for coroutine in coroutines:
            coroutine.close()
    return [results[i] for i in range(len(coroutines))]


def _step(
    live: Sequence[tuple[int, Coroutine[Ask, None, T], Any]], results: dict[int, T]
) -> list[tuple[int, Coroutine[Ask, None, T], Ask]]:
    """Advance every coroutine to its next question; those that end leave their result."""
    waiting: list[tuple[int, Coroutine[Ask, None, T], Ask]] = []
    for i, coroutine, _ in live:
        try:
            waiting.append((i, coroutine, coroutine.send(None)))
        except StopIteration as end:
            results[i] = end.value
    return waiting
