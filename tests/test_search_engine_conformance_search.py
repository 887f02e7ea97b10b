"""The conformance suite, part two: streams of requests, and searches that end in every way on every engine.

An engine that streams or not, a search leaves it ready for the next one, and loses nothing that was finished.
"""

from __future__ import annotations

import threading
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from search.answers import majority
from search.errors import EngineError
from search.policy import Policy, Sampler
from search.results import read_partial, read_results
from search.run import Plan, run_shards
from search.scheduler import run_together
from search.types import (
    Budget,
    CachingEngine,
    Candidate,
    Continuation,
    Engine,
    Finish,
    Problem,
    Request,
    StreamingEngine,
)
from tests import engine_zoo as zoo
from tests.engine_zoo import MAX_LENGTH, Exhibit, Letters, greedy, natural, needs
from tests.scripted_search import StepEngine


def streaming(exhibit: Exhibit) -> StreamingEngine:
    needs(isinstance(exhibit.engine, StreamingEngine), "to stream")
    assert isinstance(exhibit.engine, StreamingEngine)
    return exhibit.engine


# ---------------------------------------------------------------- streaming


def drained(engine: StreamingEngine) -> dict[int, Continuation]:
    """All that is in flight, each ticket once."""
    found: dict[int, Continuation] = {}
    while answers := engine.collect():
        assert not found.keys() & {ticket for ticket, _ in answers}
        found |= dict(answers)
    return found


def long_requests(exhibit: Exhibit, num: int = 12) -> list[Request]:
    """Greedy answers that fill the context: still running whenever they are looked at."""
    return [replace(greedy(exhibit)[n % 3], max_new_tokens=MAX_LENGTH - 40 - n) for n in range(num)]


def cut_short(exhibit: Exhibit, found: Continuation, whole: Continuation) -> bool:
    """Whether it was cancelled; then it has a beginning of the whole answer's ids."""
    if found.finish is Finish.CANCELLED:
        assert found.ids == whole.ids[: len(found.ids)] or not exhibit.engine.capabilities.token_ids
        assert len(found.ids) <= len(whole.ids)  # all of them: it ended while it was being cancelled
        return True
    assert (found.ids, found.finish) == (whole.ids, whole.finish)
    return False


def test_cancelled_requests_keep_what_they_have(exhibit: Exhibit) -> None:
    engine = streaming(exhibit)
    whole = natural(exhibit, long_requests(exhibit))
    short = [replace(request, max_new_tokens=2) for request in greedy(exhibit)]
    tickets = engine.submit(long_requests(exhibit))
    quick = set(engine.submit(short))
    found: dict[int, Continuation] = {}
    while not quick <= found.keys():
        found |= dict(engine.collect())
    engine.cancel(tickets)
    found |= drained(engine)
    assert found.keys() == {*tickets, *quick}
    num_cut = sum(cut_short(exhibit, found[ticket], c) for ticket, c in zip(tickets, whole, strict=True))
    assert num_cut > len(tickets) // 2
    assert engine.collect() == []
    assert [c.ids for c in natural(exhibit, long_requests(exhibit, 3))] == [c.ids for c in whole[:3]]


def test_cancelling_at_once_cancels_and_cancelling_late_does_nothing(exhibit: Exhibit) -> None:
    engine = streaming(exhibit)
    tickets = engine.submit(long_requests(exhibit))
    engine.cancel(tickets)
    found = drained(engine)
    assert found.keys() == set(tickets)
    assert all(c.finish is Finish.CANCELLED for c in found.values())
    engine.cancel([*tickets, max(tickets) + 1000])
    assert engine.collect() == []
    assert natural(exhibit, greedy(exhibit))


def test_whoever_waits_is_called_off(exhibit: Exhibit) -> None:
    engine = streaming(exhibit)
    whole = natural(exhibit, long_requests(exhibit))
    tickets = engine.submit(long_requests(exhibit))
    soon: Future[None] = Future()
    timer = threading.Timer(0.01, lambda: soon.set_result(None))
    timer.start()
    found = dict(engine.collect([Future(), soon]))  # comes back, whatever has finished by then
    timer.join()
    found |= dict(engine.collect([soon]))
    assert len(found) < len(tickets), "it waited all the same"
    found |= drained(engine)
    assert [(found[t].ids, found[t].finish) for t in tickets] == [(c.ids, c.finish) for c in whole]


def test_extend_leaves_what_is_in_flight_alone(exhibit: Exhibit) -> None:
    """Neither what is still running when it returns, nor what finished meanwhile."""
    engine = streaming(exhibit)
    expected = [[c.ids for c in natural(exhibit, greedy(exhibit, most))] for most in (2, 12, 40)]
    short, long = engine.submit(greedy(exhibit, 2)), engine.submit(greedy(exhibit, 40))
    assert [c.ids for c in natural(exhibit, greedy(exhibit, 12))] == expected[1]
    found = drained(engine)
    assert [found[ticket].ids for ticket in short] == expected[0]
    assert [found[ticket].ids for ticket in long] == expected[2]


@pytest.mark.parametrize("seed", range(4))
def test_requests_in_any_interleaving_are_answered_once_each(exhibit: Exhibit, seed: int) -> None:
    engine, draw = streaming(exhibit), zoo.rng("interleaving", seed)
    pool = [replace(greedy(exhibit)[n % 5], max_new_tokens=length) for n, length in enumerate((1, 2, 5, 11, 40, 90))]
    whole = natural(exhibit, pool)
    asked: dict[int, int] = {}
    cancelled: set[int] = set()
    found: dict[int, Continuation] = {}
    for _ in range(30):
        action = draw.random()
        if action < 0.5:
            chosen = [draw.randrange(len(pool)) for _ in range(draw.randint(0, 6))]
            asked |= dict(zip(engine.submit([pool[n] for n in chosen]), chosen, strict=True))
        elif action < 0.8:
            answers = dict(engine.collect())
            assert not answers.keys() & found.keys()
            found |= answers
        elif asked:
            chosen = draw.sample(sorted(asked), min(3, len(asked)))
            cancelled |= set(chosen)
            engine.cancel(chosen)
    found |= drained(engine)
    assert found.keys() == asked.keys()
    for ticket, n in asked.items():
        assert not cut_short(exhibit, found[ticket], whole[n]) or ticket in cancelled


# ---------------------------------------------------------------- in a search


async def by_steps(problem: Problem, policy: Policy, verifier: object, budget: Budget) -> list[Candidate]:
    """Two candidates: a step, a fork each, another step, and on to the end."""
    candidates = await policy.step(policy.start(2))
    forked = [child for c in candidates if c.open for child in policy.fork(c, 2)]
    stepped = await policy.step(forked)
    ended = await policy.finish([c for c in stepped if c.open])
    return [c for c in candidates + stepped if not c.open] + ended


PROBLEMS = [Problem(f"p{n}", f"{n}+{n}=", str(2 * n)) for n in range(12)]
PLAN = Plan("by_steps", by_steps, Budget("samples", 64), majority)


def sampler(engine: Engine, max_new_tokens: int = 40) -> Sampler:
    task: Any = Letters()
    return Sampler(engine, task, 1.0, max_new_tokens, (0, "zoo", "train"))


def policies(exhibit: Exhibit, num: int) -> list[Policy]:
    return [Policy(p, sampler(exhibit.engine), PLAN.budget) for p in PROBLEMS[:num]]


def nothing_in_flight(exhibit: Exhibit) -> None:
    if isinstance(exhibit.engine, StreamingEngine):
        assert exhibit.engine.collect() == []
    assert natural(exhibit, greedy(exhibit))


def test_a_search_gives_candidates_whose_ids_texts_and_steps_agree(exhibit: Exhibit, tmp_path: Path) -> None:
    run_shards(PROBLEMS, PLAN, sampler(exhibit.engine), tmp_path, shard_problems=6)
    results = list(read_results(tmp_path))
    assert [r.problem.key for r in results] == [p.key for p in PROBLEMS]
    assert all(r.approximate != exhibit.engine.capabilities.token_ids for r in results)
    candidates = [c for r in results for c in r.candidates]
    assert sum(len(c.step_ends) > 1 for c in candidates) > 10
    for c in candidates:
        assert c.text == exhibit.text(c.ids)
        ends = zip(c.step_ends, c.text_ends, strict=True)
        assert all(len(exhibit.text(c.ids[:end])) == text_end for end, text_end in ends)
        assert all("\n" in text for text in c.steps[:-1])
        assert c.finish in (Finish.EOS, Finish.LENGTH)


def test_a_search_says_which_requests_it_may_go_on_from() -> None:
    """Steps, not whole answers: those stop too where a few-shot prompt says what ends an answer."""
    engine = StepEngine(lambda prompt, written, *_: "x\n" if written.count("\n") < 3 else "A;")
    task: Any = Letters()
    task.end_text = ";"
    policy = Policy(PROBLEMS[0], Sampler(engine, task, 1.0, 40, (0, "zoo", "train")), PLAN.budget)
    run_together([by_steps(PROBLEMS[0], policy, None, PLAN.budget)], engine)
    assert {(r.stop, r.resumable) for r, _ in engine.log} == {("\n", True), (";", False)}


def test_a_search_leaves_nothing_behind_that_the_next_would_notice(exhibit: Exhibit, tmp_path: Path) -> None:
    """Not even in what it costs: a run that was interrupted must come out as one that was not."""
    needs(exhibit.engine.capabilities.seeds and not isinstance(exhibit.engine, StreamingEngine), "repeated runs")
    if isinstance(exhibit.engine, CachingEngine):
        exhibit.engine.reset()
    for name in ("first", "second"):
        run_shards(PROBLEMS[:2], PLAN, sampler(exhibit.engine), tmp_path / name, shard_problems=2)
    first, second = ((tmp_path / name / "shard-00000.jsonl").read_bytes() for name in ("first", "second"))
    assert first == second


def test_a_hard_cap_on_tokens_leaves_nothing_in_flight(exhibit: Exhibit) -> None:
    handles = policies(exhibit, 12)
    found = run_together([by_steps(p.problem, p, None, PLAN.budget) for p in handles], exhibit.engine, max_tokens=400)
    assert any(found)
    assert None in found
    assert sum(p.spend.generated_tokens for p in handles) <= 400
    nothing_in_flight(exhibit)


def test_an_error_in_a_strategy_leaves_nothing_in_flight(exhibit: Exhibit) -> None:
    """While the others are in the middle of their answers."""

    async def breaks(policy: Policy) -> list[Candidate]:
        await policy.sample(1)
        raise ValueError("a broken strategy")

    short = Policy(PROBLEMS[0], sampler(exhibit.engine, max_new_tokens=1), PLAN.budget)
    going = [p.sample(4, temperature=0.0) for p in policies(exhibit, 6)]
    with pytest.raises(ValueError, match="a broken strategy"):
        run_together([breaks(short), *going], exhibit.engine)
    nothing_in_flight(exhibit)


def test_a_prompt_that_fills_the_context_ends_its_candidates_and_not_the_run(exhibit: Exhibit, tmp_path: Path) -> None:
    long = Problem("long", "e" * (MAX_LENGTH - 4), "1")
    run_shards([PROBLEMS[0], long, PROBLEMS[1]], PLAN, sampler(exhibit.engine), tmp_path, shard_problems=3)
    first, squeezed, last = read_results(tmp_path)
    assert first.candidates
    assert last.candidates
    assert all(c.finish in (Finish.OVERFLOW, Finish.LENGTH, Finish.EOS) for c in squeezed.candidates)
    assert any(not c.complete for c in squeezed.candidates)
    assert not any(c.answer for c in squeezed.candidates if not c.complete)


@pytest.mark.parametrize("num", [0, 30, 45])
def test_an_engine_that_dies_loses_nothing_that_was_finished(exhibit: Exhibit, tmp_path: Path, num: int) -> None:
    streams = isinstance(exhibit.engine, StreamingEngine)
    dying: Any = (zoo.DyingStream if streams else zoo.Dying)(exhibit.engine, num)
    settings: dict[str, Any] = {"shard_problems": 3}
    with pytest.raises(EngineError, match="died"):
        run_shards(PROBLEMS, PLAN, sampler(dying), tmp_path, **settings)
    left = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    shards = sorted(name for name in left if name.endswith(".jsonl"))
    assert shards == [f"shard-{n:05d}.jsonl" for n in range(len(shards))]
    assert len(shards) < 4
    assert shards or num == 0
    kept = [r.to_json() for path in tmp_path.glob("*.partial") for r in read_partial(path)]
    if isinstance(exhibit.engine, StreamingEngine):  # what the wrapper forgot is still in flight inside
        exhibit.engine.cancel(range(100_000))
        drained(exhibit.engine)

    run_shards(PROBLEMS, PLAN, sampler(exhibit.engine), tmp_path, **settings)
    assert not list(tmp_path.glob("*.partial"))
    assert all((tmp_path / name).read_bytes() == left[name] for name in shards)
    results = [r.to_json() for r in read_results(tmp_path)]
    assert [r["key"] for r in results] == [p.key for p in PROBLEMS]
    assert all(row in results for row in kept)
    if not streams and exhibit.engine.capabilities.seeds:
        whole = tmp_path / "whole"
        run_shards(PROBLEMS, PLAN, sampler(exhibit.engine), whole, **settings)
        assert all(path.read_bytes() == (tmp_path / path.name).read_bytes() for path in whole.iterdir())


def test_finished_problems_of_the_interrupted_shard_are_kept(exhibit: Exhibit, tmp_path: Path) -> None:
    engine = streaming(exhibit)
    counting: Any = zoo.DyingStream(engine, 10**6)
    run_shards(PROBLEMS, PLAN, sampler(counting), tmp_path / "whole", shard_problems=len(PROBLEMS))
    dying: Any = zoo.DyingStream(engine, counting.num_answered - 8)
    with pytest.raises(EngineError, match="died"):
        run_shards(PROBLEMS, PLAN, sampler(dying), tmp_path / "cut", shard_problems=len(PROBLEMS))
    engine.cancel(range(100_000))
    drained(engine)
    (partial,) = (tmp_path / "cut").iterdir()
    assert 0 < len(read_partial(partial)) < len(PROBLEMS)
