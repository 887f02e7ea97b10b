"""The server engine against servers that do everything, little, or wrong: exact, or declared approximate."""

# ruff: noqa: F401, F811 (fixtures are imported and then named as parameters)

import threading
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest

from search.engines.server_reply import Abilities, prompt_text
from search.types import Continuation, Finish, Request, StreamingEngine
from tests.server_kit import (
    DELIMITER,
    EOS,
    NEWLINE,
    alike,
    connect,
    expected,
    outcome,
    random_policy,
    requests,
    serve,
    tokenizer,
    tokenizer_folder,
    wait_until,
)

# ---------------------------------------------------------------- exact servers


EXACT: list[dict[str, Any]] = [
    {},
    {"ids_among_logprobs": True},
    {"returns_eos": False},
    {"strips_stop": True, "tells_stop": False},  # silent: cut on this side
    {"ignores_stop": True},
    {"tells_stop": False},
    {"no_usage": True},
]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("switches", EXACT, ids=str)
def test_servers_that_return_ids_are_exact(switches, stream, serve, connect, tokenizer) -> None:
    server = serve(**switches)
    engine = connect(server, stream=stream)
    assert isinstance(engine, StreamingEngine)
    assert engine.capabilities.token_ids
    assert engine.capabilities.seeds
    asked = requests(tokenizer)
    found = engine.extend(asked)
    assert [outcome(c) for c in found] == [expected(server, r, tokenizer) for r in asked]
    assert {c.finish for c in found} == {Finish.STOP, Finish.EOS, Finish.LENGTH}
    ends = [tokenizer.decode(c.ids) for c in found if c.finish is Finish.STOP]
    assert any(text.endswith("c\n\nd") for text in ends), "a delimiter that ends inside a token"
    assert any(c.ids[-2:] == (NEWLINE, NEWLINE) for c in found), (
        "two newlines that the tokenizer would write as one token"
    )


def test_prompts_are_the_very_ids(serve, connect, tokenizer) -> None:
    server = serve()
    engine = connect(server)
    odd = Request((2, 4, 4, 3), 4, 0.0, key=1)  # ids that the tokenizer would not make of their text
    engine.extend([odd])
    assert server.bodies[0]["prompt"] == [2, 4, 4, 3]


def test_sampling_is_that_of_the_policy_alone(serve, connect, tokenizer) -> None:
    """A server that is told nothing samples by the model's own generation config."""
    server = serve()
    connect(server).extend(requests(tokenizer, 1, temperature=0.7))
    sent = server.bodies[0]
    assert (sent["temperature"], sent["top_p"], sent["top_k"], sent["min_p"]) == (0.7, 1.0, -1, 0.0)
    assert sent["repetition_penalty"] == 1.0
    assert "n" not in sent


def test_steps_of_one_candidate_draw_anew(serve, connect, tokenizer) -> None:
    """One key, two positions: a server starts its random numbers anew at each request."""
    server = serve()
    engine = connect(server)
    first = requests(tokenizer, 1)[0]
    engine.extend([first, Request((*first.prefix, 5), 24, 1.0, first.key, DELIMITER), first])
    seeds = [body["seed"] for body in sorted(server.bodies, key=lambda body: len(body["prompt"]))]
    assert seeds[0] == seeds[1] != seeds[2]


def test_without_seeds_nothing_is_claimed(serve, connect, tokenizer) -> None:
    server = serve()
    engine = connect(server, seeds=False)
    assert not engine.capabilities.seeds
    engine.extend(requests(tokenizer, 2))
    assert all("seed" not in body for body in server.bodies)
    assert not connect(serve(no_seeds=True)).capabilities.seeds


def test_without_seeds_alike_requests_go_out_as_one(serve, connect, tokenizer) -> None:
    server = serve()
    engine = connect(server, seeds=False)
    asked = alike(tokenizer, 5, 70, 1)
    found = engine.extend(asked)
    assert sorted(body.get("n", 1) for body in server.bodies) == [1, 5, 6, 64]
    assert len({c.ids for c in found}) > 40, "samples, not copies"
    told = {(tuple(b["prompt"]), tuple(a.ids)) for b in server.bodies for a in server.answers}
    assert all((r.prefix, c.ids) in told for r, c in zip(asked, found, strict=True))
    server.forget()
    engine.extend(asked[:3] * 2)
    engine.extend([asked[0], replace(asked[0], stop=None), replace(asked[0], max_new_tokens=3)])
    assert sorted(body.get("n", 1) for body in server.bodies) == [1, 1, 1, 2, 2, 2]


@pytest.mark.parametrize("most_choices", [0, 1, 2, 3])
@pytest.mark.parametrize("seeds", [False, True])
def test_servers_without_n_work(most_choices, seeds, serve, connect, tokenizer) -> None:
    """They refuse it, ignore it, or answer less often than they were asked to."""
    server = serve(most_choices=most_choices)
    engine = connect(server, seeds=seeds)
    found = engine.extend(alike(tokenizer, 8, 3))
    assert {c.finish for c in found} <= {Finish.STOP, Finish.EOS, Finish.LENGTH}
    assert all(c.ids for c in found)
    assert len({c.ids for c in found}) > 6
    if seeds or most_choices < 2:
        assert not any("n" in body for body in server.bodies)


def test_cancelling_some_of_one_request(serve, connect, tokenizer) -> None:
    """The others finish; what the cancelled ones cost is counted. When nobody waits any more, it is hung up on."""
    gate = threading.Event()

    def policy(prefix: Sequence[int], max_tokens: int, temperature: float, seed: int) -> list[int]:
        gate.wait(20)
        return [5] * max_tokens

    gate.set()
    server = serve(policy)
    engine = connect(server, seeds=False, max_concurrency=4)
    gate.clear()
    tickets = engine.submit(alike(tokenizer, 7, max_new_tokens=6))
    wait_until(lambda: server.num_running == 1)
    engine.cancel([tickets[1], *tickets[5:]])
    gate.set()
    got: dict[int, Continuation] = {}
    while found := engine.collect():
        got |= dict(found)
    cancelled = [t for t in tickets if got[t].finish is Finish.CANCELLED]
    assert cancelled == [tickets[1], *tickets[5:]]
    assert [len(got[t].ids) for t in tickets] == [6, 6, 6, 6, 6, 0, 0], "4 in flight, the last two never were"
    gate.clear()
    tickets = engine.submit(alike(tokenizer, 4))
    wait_until(lambda: server.num_running == 1)
    engine.cancel(tickets)
    dropped = [c for _, c in engine.collect()]
    assert [c.finish for c in dropped] == [Finish.CANCELLED] * 4
    assert sum(c.prefilled_tokens for c in dropped) == len(alike(tokenizer, 4)[0].prefix)
    gate.set()


def test_cached_tokens_are_counted(serve, connect, tokenizer) -> None:
    engine = connect(serve(caches=True))
    assert engine.capabilities.prefix_cache
    request = requests(tokenizer, 1)[0]
    found = engine.extend([request])[0]
    assert (found.prefilled_tokens, found.cached_tokens) == (1, len(request.prefix) - 1)
    plain = connect(serve()).extend([request])[0]
    assert (plain.prefilled_tokens, plain.cached_tokens) == (len(request.prefix), 0)


@pytest.mark.parametrize("switches", [{}, {"caches": True}, {"no_usage": True}], ids=str)
def test_answers_of_one_request_share_its_prefix(switches, serve, connect, tokenizer) -> None:
    server = serve(**switches)
    engine = connect(server, seeds=False)
    asked = alike(tokenizer, 16)
    num_prefix = len(asked[0].prefix)
    found = engine.extend(asked)
    assert [body["n"] for body in server.bodies] == [16]
    first = (1, num_prefix - 1) if "caches" in switches else (num_prefix, 0)
    assert [(c.prefilled_tokens, c.cached_tokens) for c in found] == [first] + [(0, num_prefix)] * 15


def test_a_strict_server_gets_standard_fields_only(serve, connect, tokenizer) -> None:
    server = serve(strict=True)
    engine = connect(server)
    assert not engine.capabilities.token_ids
    assert {c.finish for c in engine.extend(requests(tokenizer))} >= {Finish.STOP, Finish.EOS}
    standard = {"model", "prompt", "max_tokens", "temperature", "top_p", "stop", "seed", "stream", "stream_options"}
    assert set().union(*server.bodies) <= standard


def test_extra_body_is_added_to_every_request(serve, connect, tokenizer) -> None:
    server = serve()
    connect(server, extra_body={"priority": 3, "top_k": 20}).extend(requests(tokenizer, 3))
    assert all((body["priority"], body["top_k"]) == (3, 20) for body in server.bodies)


# ---------------------------------------------------------------- approximate servers


APPROXIMATE: list[dict[str, Any]] = [
    {"no_ids": True},
    {"no_ids": True, "strict": True},
    {"no_ids": True, "tells_stop": False, "strict": True},  # an end and a stop look the same: streamed, cut here
    {"no_ids": True, "tells_stop": False, "strict": True, "no_stream": True},
    {"no_ids": True, "ignores_stop": True},
    {"strips_stop": True},
    {"text_prompts": True},
    {"misreads_ids": True},
]


@pytest.mark.parametrize("switches", APPROXIMATE, ids=str)
def test_servers_without_ids_say_so_and_end_rightly(switches, serve, connect, tokenizer, caplog) -> None:
    server = serve(**switches)
    engine = connect(server)
    assert not engine.capabilities.token_ids
    assert "approximate" in caplog.text
    asked = requests(tokenizer)
    for continuation, request in zip(engine.extend(asked), asked, strict=True):
        ids, finish = expected(server, request, tokenizer)
        assert continuation.finish is finish
        text, exact = tokenizer.decode(continuation.ids), tokenizer.decode(ids)
        if finish is Finish.STOP:  # the token that completed the delimiter may have held more: nobody tells
            text, exact = text.partition(DELIMITER)[0] + DELIMITER, exact.partition(DELIMITER)[0] + DELIMITER
            assert DELIMITER in tokenizer.decode(continuation.ids)
        assert text == exact
        assert (continuation.ids[-1] == tokenizer.eos_token_id) == (finish is Finish.EOS)


def test_what_is_lost_without_ids(serve, connect, tokenizer) -> None:
    """The reason for all this: encoding the text anew is not what was generated."""
    asked = requests(tokenizer, stop=None)
    exact = [c.ids for c in connect(serve()).extend(asked)]
    approximate = [c.ids for c in connect(serve(no_ids=True)).extend(asked)]
    assert exact != approximate


def test_a_prompt_as_text_has_its_special_tokens_once(tokenizer, tmp_path) -> None:
    from tokenizers.processors import TemplateProcessing

    tokenizer.save_pretrained(tmp_path)
    adding = type(tokenizer).from_pretrained(tmp_path)
    adding.backend_tokenizer.post_processor = TemplateProcessing(single=f"{EOS} $A", special_tokens=[(EOS, 0)])
    ids = adding.encode("1+2=")
    assert ids[0] == 0
    flag = Abilities(False, "none", {"add_special_tokens": False})
    assert prompt_text(adding, ids, flag) == f"{EOS}1+2=", "the server adds nothing"
    assert prompt_text(adding, ids, Abilities(False, "none")) == "1+2=", "the server adds it"
    assert prompt_text(tokenizer, ids, Abilities(False, "none")) == f"{EOS}1+2=", "nobody adds it"


# ---------------------------------------------------------------- one bad request


@pytest.mark.parametrize("empty", ["choices", "text"])
@pytest.mark.parametrize("no_ids", [False, True])
def test_an_empty_reply_is_an_error_of_that_request(empty, no_ids, serve, connect, tokenizer, caplog) -> None:
    server = serve(no_ids=no_ids)
    engine = connect(server)
    server.switches.empty = empty
    found = engine.extend(requests(tokenizer, 3))
    assert [outcome(c) for c in found] == [((), Finish.ERROR)] * 3
    assert caplog.text.count("cannot be used") == 1
    server.switches.empty = None
    assert engine.extend(requests(tokenizer, 3))[0].finish is not Finish.ERROR


def test_an_end_at_once_is_no_empty_reply(serve, connect, tokenizer) -> None:
    """After its last step the policy writes EOS alone: the answer is complete."""

    def ends(prefix: Sequence[int], max_tokens: int, temperature: float, seed: int) -> list[int]:
        return [0] if prefix[-1] == 3 else random_policy(prefix, max_tokens, temperature, seed)

    prefix = (*tokenizer.encode("1+2="), 3)
    for switches in ({}, {"returns_eos": False}, {"no_ids": True}):
        found = connect(serve(ends, **switches)).extend([Request(prefix, 8, 1.0, 1, DELIMITER)])[0]
        assert outcome(found) == ((0,), Finish.EOS), switches


def test_a_full_context_ends_that_candidate_alone(serve, connect, tokenizer) -> None:
    engine = connect(serve(max_length=64))
    assert engine.facts.max_length == 64
    full = [Request((5,) * n, 24, 1.0, n, None) for n in (10, 60, 64, 300)]
    found = engine.extend(full)
    assert [c.finish for c in found[2:]] == [Finish.OVERFLOW] * 2
    assert len(found[1].ids) <= 4
    assert found[1].finish in (Finish.LENGTH, Finish.EOS)
    assert found[0].ids


def test_a_context_that_only_the_server_knows(serve, connect, tokenizer) -> None:
    engine = connect(serve(max_length=64, tells_length=False), max_length=500)
    found = engine.extend([Request((5,) * n, 24, 1.0, n, None) for n in (10, 300)])
    assert found[0].ids
    assert outcome(found[1]) == ((), Finish.OVERFLOW)


def test_a_refused_request_is_told_once(serve, connect, tokenizer, caplog) -> None:
    server = serve()
    engine = connect(server)
    server.switches.always = 422
    assert {c.finish for c in engine.extend(requests(tokenizer, 5))} == {Finish.ERROR}
    assert caplog.text.count("refuses a request") == 1
    assert server.num_completions == 5, "what is refused is not asked again"


def test_unusable_requests_never_leave(serve, connect, tokenizer) -> None:
    server = serve()
    bad = [Request((), 4, 1.0, 1), Request((10**6,), 4, 1.0, 1), Request((-1,), 4, 1.0, 1), Request((5,), 0, 1.0, 1)]
    found = connect(server).extend(bad)
    assert [c.finish for c in found] == [Finish.ERROR, Finish.ERROR, Finish.ERROR, Finish.LENGTH]
    assert server.num_completions == 0
