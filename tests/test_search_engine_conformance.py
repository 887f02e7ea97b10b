"""Every engine is held to what it claims: one suite, all engines, the same requests.

A claim is `capabilities`, or being a StreamingEngine; what is not claimed is skipped and says so. Where an engine runs
a model, its tokens are compared with the model run plainly over whole sequences.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from search.types import Engine, Finish, Request, StreamingEngine
from tests import engine_zoo as zoo
from tests.engine_zoo import FEW, MAX_LENGTH, Exhibit, greedy, key, natural, needs, samples

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
    asked = samples(exhibit, 5, stop="\n", resumable=True)
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
