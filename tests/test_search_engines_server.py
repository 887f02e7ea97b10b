"""The server engine against servers that do everything, little, or wrong: exact, declared, or a clear error."""

import logging
import ssl
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from configs.load import InvalidConfig, parse
from configs.schema import Model
from configs.schema import ServerEngine as ServerSettings
from search.engines import load_engine
from search.engines.server import ServerEngine
from search.engines.server_http import base_url
from search.engines.server_reply import Abilities, prompt_text
from search.errors import ConfigError, EngineError, ModelError
from search.randomness import key64
from search.tasks import load_task
from search.types import Continuation, Finish, Request, StreamingEngine

SECRET = "sk-canary-4711-do-not-print"
DELIMITER = "\n\n"
# "c\n\nd" completes the delimiter inside a token; two "\n" encode to one "\n\n", so text loses what was generated.
PIECES = ["c\n\nd", "\n\n", "\n", *"abcdef123456789+="]
EOS = "<eos>"
NEWLINE = 4


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {token: index for index, token in enumerate([EOS, "<unk>", *PIECES])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("c\n\nd|\n\n|[\\s\\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    folder = tmp_path_factory.mktemp("tokenizer")
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=EOS, unk_token="<unk>", clean_up_tokenization_spaces=False
    ).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tokenizer(tokenizer_folder: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(tokenizer_folder)


def random_policy(prefix: Sequence[int], max_tokens: int, temperature: float, seed: int) -> list[int]:
    """Tokens that depend on seed and position alone; greedy ones on the position alone. Ends by itself now and then."""
    ids: list[int] = []
    while len(ids) < max_tokens and (not ids or ids[-1] != 0):
        draw = key64(seed if temperature > 0 else "greedy", len(prefix) + len(ids))
        token = 2 + draw % (len(PIECES) + 4)
        token = token if token < 2 + len(PIECES) else NEWLINE  # often, so that two come together
        ids.append(0 if draw % 29 == 0 and temperature > 0 else token)
    return ids


@pytest.fixture
def serve(fake_server: ModuleType, tokenizer: Any) -> Iterator[Callable[..., Any]]:
    """serve(no_ids=True, ...) -> a running FakeServer."""
    with ExitStack() as stack:

        def start(policy: Any = random_policy, **switches: Any) -> Any:
            server = fake_server.FakeServer(policy, tokenizer, fake_server.Switches(**switches))
            return stack.enter_context(server)

        yield start


@pytest.fixture
def connect(tokenizer_folder: Path) -> Iterator[Callable[..., ServerEngine]]:
    """connect(server, ...) -> an engine whose probes are done and forgotten."""
    with ExitStack() as stack:

        def start(server: Any, policy: str | None = None, base: str | None = None, **changes: Any) -> ServerEngine:
            engine = ServerEngine(settings(server.url, tokenizer_folder, **changes), policy, base and Model(base=base))
            stack.callback(engine.close)
            server.forget()
            return engine

        yield start


def settings(url: str, folder: Path | None, **changes: Any) -> ServerSettings:
    known = {"type": "server", "url": url, "tokenizer": str(folder) if folder else None, "flops_parameters": 100}
    return ServerSettings.model_validate(known | {"backoff_s": 0.01, "retries": 3, "timeout_s": 20} | changes)


def requests(tokenizer: Any, num: int = 40, **changes: Any) -> list[Request]:
    made = {"max_new_tokens": 24, "temperature": 1.0, "stop": DELIMITER} | changes
    return [Request(tuple(tokenizer.encode(f"{i % 7}+{i % 9}=")), key=key64("test", i), **made) for i in range(num)]


def expected(server: Any, request: Request, tokenizer: Any) -> tuple[tuple[int, ...], Finish]:
    """What the policy says to a request, worked out token by token."""
    seed = key64(request.key, len(request.prefix)) >> 33
    whole = random_policy(request.prefix, request.max_new_tokens, request.temperature, seed)
    for n in range(1, len(whole) + 1):
        if whole[n - 1] == tokenizer.eos_token_id:
            return tuple(whole[:n]), Finish.EOS
        if request.stop and request.stop in tokenizer.decode(whole[:n]):
            return tuple(whole[:n]), Finish.STOP
    return tuple(whole), Finish.LENGTH


def outcome(continuation: Continuation) -> tuple[tuple[int, ...], Finish]:
    return continuation.ids, continuation.finish


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


def alike(tokenizer: Any, *counts: int, **changes: Any) -> list[Request]:
    """So many requests for each of some prompts, mixed."""
    different = requests(tokenizer, len(counts), **changes)
    rows = [
        (n, replace(r, key=key64(r.key, n))) for r, count in zip(different, counts, strict=True) for n in range(count)
    ]
    return [request for _, request in sorted(rows, key=lambda row: row[0])]


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
    assert [c.finish for _, c in engine.collect()] == [Finish.CANCELLED] * 4
    gate.set()


def test_cached_tokens_are_counted(serve, connect, tokenizer) -> None:
    engine = connect(serve(caches=True))
    assert engine.capabilities.prefix_cache
    request = requests(tokenizer, 1)[0]
    found = engine.extend([request])[0]
    assert (found.prefilled_tokens, found.cached_tokens) == (1, len(request.prefix) - 1)
    plain = connect(serve()).extend([request])[0]
    assert (plain.prefilled_tokens, plain.cached_tokens) == (len(request.prefix), 0)


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


# ---------------------------------------------------------------- failures that pass, and that do not


@pytest.mark.parametrize(
    "switches",
    [{"first": (429, 429, 500)}, {"first": (503,) * 3, "retry_after": "0.01"}, {"break_off": 3}, {"garbage": 3}],
    ids=str,
)
@pytest.mark.parametrize("stream", [False, True])
def test_what_passes_is_tried_again(switches, stream, serve, connect, tokenizer) -> None:
    server = serve()
    engine = connect(server, stream=stream)
    for name, value in switches.items():
        setattr(server.switches, name, value)
    asked = requests(tokenizer, 20)
    assert [outcome(c) for c in engine.extend(asked)] == [expected(server, r, tokenizer) for r in asked]
    assert server.num_completions == 23


def test_retry_after_is_honoured(serve, connect, tokenizer) -> None:
    server = serve()
    engine = connect(server)
    server.switches.first, server.switches.retry_after = (429,), "0.5"
    start = time.monotonic()
    engine.extend(requests(tokenizer, 1))
    assert time.monotonic() - start >= 0.5


def test_a_server_that_fails_for_good(serve, connect, tokenizer) -> None:
    """What was finished is delivered first; then one error says where, what and how to go on."""
    server = serve()
    engine = connect(server, max_concurrency=4)
    good = engine.submit(requests(tokenizer, 10))
    delivered: list[int] = []
    while len(delivered) < 10:
        delivered += [ticket for ticket, _ in engine.collect()]
    assert sorted(delivered) == good
    server.forget()
    server.switches.always = 500
    engine.submit(requests(tokenizer, 50))
    with pytest.raises(EngineError, match=r"127\.0\.0\.1.* 4 attempts.*HTTP 500.*run the command again"):
        engine.collect()
    assert server.num_completions <= 16, "the first failure ends the search: the rest is not sent"
    assert engine.collect() == []
    server.switches.always = None
    asked = requests(tokenizer, 3)
    assert [outcome(c) for c in engine.extend(asked)] == [expected(server, r, tokenizer) for r in asked]


def test_one_that_fails_loses_nothing_of_the_others(serve, connect, tokenizer) -> None:
    server = serve()
    engine = connect(server, timeout_s=0.3, retries=1)
    asked = requests(tokenizer, 8)
    lost = list(asked[3].prefix)
    server.switches.hangs = lambda body: body["prompt"] == lost
    tickets = engine.submit(asked)
    delivered: dict[int, Continuation] = {}

    def drain() -> None:
        while found := engine.collect():
            delivered.update(found)

    with pytest.raises(EngineError, match=r"no answer within 0\.3 s"):
        drain()
    assert sorted(delivered) == [t for t in tickets if t != tickets[3]]


def test_concurrency_is_bounded(serve, connect, tokenizer) -> None:
    server = serve(delay_s=0.02)
    engine = connect(server, max_concurrency=3)
    engine.extend(requests(tokenizer, 12))
    assert server.most_running == 3


def test_results_come_as_they_finish_and_more_may_be_asked(serve, connect, tokenizer) -> None:
    gate = threading.Event()
    slow = [5, 5, 5]

    def policy(prefix: Sequence[int], max_tokens: int, temperature: float, seed: int) -> list[int]:
        if list(prefix) == slow:
            gate.wait(20)
        return random_policy(prefix, max_tokens, temperature, seed)

    engine = connect(serve(policy))
    first = engine.submit([Request(tuple(slow), 4, 1.0, 1), *requests(tokenizer, 2)])
    got = dict(engine.collect())
    while len(got) < 2:
        got |= dict(engine.collect())
    assert first[0] not in got
    more = engine.submit(requests(tokenizer, 1))
    assert [ticket for ticket, _ in engine.collect()] == more, "a slow one holds up nobody"
    gate.set()
    assert [ticket for ticket, _ in engine.collect()] == first[:1]
    assert engine.collect() == []


def test_cancelling(serve, connect, tokenizer) -> None:
    """Those that wait are dropped, those under way are hung up on, those finished are left alone."""
    server = serve()
    engine = connect(server, max_concurrency=2)
    done = engine.submit(requests(tokenizer, 1))
    finished = engine.collect()
    server.forget()
    server.switches.hangs = lambda body: True
    tickets = engine.submit(requests(tokenizer, 6))
    while server.num_running < 2:
        time.sleep(0.005)
    engine.cancel([*done, *tickets, 10**6])
    got: dict[int, Continuation] = {}
    while len(got) < 6:
        got |= dict(engine.collect())
    assert sorted(got) == tickets
    assert {c.finish for c in got.values()} == {Finish.CANCELLED}
    assert engine.collect() == []
    assert [ticket for ticket, _ in finished] == done
    assert server.num_completions == 2
    wait_until(lambda: server.num_aborted == 2)


@pytest.mark.parametrize("no_ids", [False, True])
def test_a_cancelled_stream_counts_what_it_had(no_ids, serve, connect, tokenizer) -> None:
    server = serve(lambda prefix, num, *_: [5 + n % 6 for n in range(num)], no_ids=no_ids)
    engine = connect(server, stream=True)
    server.switches.delay_s = 0.02
    ticket = engine.submit([Request((5, 6), 200, 1.0, 1)])[0]
    wait_until(lambda: ticket in engine._work_of and len(engine._work_of[ticket].received.text) >= 3)
    engine.cancel([ticket])
    [(_, found)] = engine.collect()
    assert found.finish is Finish.CANCELLED
    assert 3 <= len(found.ids) < 200
    assert list(found.ids) == [5 + n % 6 for n in range(len(found.ids))]
    assert found.prefilled_tokens == 2
    wait_until(lambda: server.num_aborted == 1)


def test_a_stream_that_met_its_stop_is_hung_up_on(serve, connect, tokenizer) -> None:
    """Where the server does not say why it stopped, no more is generated than the step."""
    server = serve(lambda prefix, num, *_: ([5, 3] + [6] * num)[:num], tells_stop=False, strict=True)
    engine = connect(server)
    server.switches.delay_s = 0.02
    found = engine.extend([Request((5, 6), 200, 1.0, 1, DELIMITER)])[0]
    assert outcome(found) == ((5, 3), Finish.STOP)
    wait_until(lambda: server.num_aborted == 1)


def test_closing_in_the_middle(serve, connect, tokenizer) -> None:
    server = serve(hangs=None)
    engine = connect(server)
    server.switches.hangs = lambda body: True
    tickets = engine.submit(requests(tokenizer, 3))
    wait_until(lambda: server.num_running == 3)
    engine.close()
    engine.close()
    assert {(t, c.finish) for t, c in engine.collect()} == {(t, Finish.CANCELLED) for t in tickets}
    assert engine.collect() == []
    with pytest.raises(EngineError, match="closed"):
        engine.submit(requests(tokenizer, 1))
    wait_until(lambda: server.num_aborted == 3)


def wait_until(condition: Callable[[], bool], seconds: float = 20.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.005)


# ---------------------------------------------------------------- the start


def test_nobody_answers(tokenizer_folder) -> None:
    with pytest.raises(ModelError, match=r"http://127\.0\.0\.1:1/v1 did not answer models in 4 attempts.*engine\.url"):
        ServerEngine(settings("http://127.0.0.1:1", tokenizer_folder))
    assert not [t for t in threading.enumerate() if t.name == "server-engine"]


def test_a_server_that_is_none(serve, connect, tokenizer_folder) -> None:
    server = serve()
    with pytest.raises(ModelError, match="is not served"):
        ServerEngine(settings(server.url + "/elsewhere", tokenizer_folder))


def test_the_model_is_the_first_or_the_named_or_the_policy(serve, connect, tokenizer, tmp_path) -> None:
    server = serve(models=("one", "two"))
    for name, sent in ((None, "one"), ("two", "two")):
        connect(server, model=name).extend(requests(tokenizer, 1))
        assert server.bodies[0]["model"] == sent
    with pytest.raises(ConfigError, match=r"has no model 'three': engine\.model is one of one, two"):
        connect(server, model="three")


def test_another_model_than_the_policy_is_refused(serve, connect, tmp_path) -> None:
    """A round's new policy must never be measured by the answers of the old one."""
    served, other = tmp_path / "served", tmp_path / "other"
    served.mkdir()
    other.mkdir()
    told = serve(root=str(served))
    assert connect(told, str(served)).facts.fingerprint
    with pytest.raises(ConfigError, match=f"serves 'tiny' from {served}, not the policy {other}"):
        connect(told, str(other), base=str(other))
    silent = serve()
    assert connect(silent, str(other), base=str(other)), "a server that does not tell is believed to serve the base"
    with pytest.raises(ConfigError, match=r"engine\.policy"):
        connect(silent, str(other), base="org/model")


def test_an_adapter_is_found_by_its_folder(serve, connect, tokenizer, tmp_path) -> None:
    folders = {name: str(tmp_path / name) for name in ("base", "round-1")}
    for folder in folders.values():
        Path(folder).mkdir()
    server = serve(models=tuple(folders), root=folders)
    connect(server, folders["round-1"], base=folders["base"]).extend(requests(tokenizer, 1))
    assert server.bodies[0]["model"] == "round-1"


def test_the_configuration_makes_one(serve, tokenizer, tokenizer_folder) -> None:
    given = {"type": "server", "url": serve().url, "flops_parameters": 1}
    model = {"base": str(tokenizer_folder)}
    config = parse({"loop": {"name": "a"}, "task": {"type": "arithmetic"}, "model": model, "engine": given})
    task = load_task(config)
    engine = load_engine(config, tokenizer_folder, task)
    assert engine.extend(requests(tokenizer, 3))[0].ids
    engine.close()
    with pytest.raises(ConfigError, match=r"engine\.policy"):
        load_engine(config, tokenizer_folder.parent, task)


def test_the_user_may_say_what_is_served(serve, tokenizer_folder) -> None:
    said = settings(serve().url, tokenizer_folder, policy="org/tuned")
    ServerEngine(said, "org/tuned", Model(base="org/model")).close()
    with pytest.raises(ConfigError, match="not the policy org/model"):
        ServerEngine(said, "org/model", Model(base="org/model"))


def test_the_wrong_tokenizer_is_found_out(serve, tokenizer_folder, tmp_path) -> None:
    from search.tasks.tokenizer import build_tokenizer

    build_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="the tokenizer is not the server's"):
        ServerEngine(settings(serve().url, tmp_path))
    with pytest.raises(ModelError, match=r"engine\.tokenizer"):
        ServerEngine(settings(serve().url, tmp_path / "nowhere"))
    with pytest.raises(ConfigError, match=r"engine\.tokenizer"):
        ServerEngine(settings(serve().url, None))


def test_facts(serve, connect, tokenizer_folder, caplog) -> None:
    first = connect(serve(root="org/model", max_length=128))
    again = connect(serve(root="org/model", max_length=128))
    assert first.facts == again.facts, "the address is no part of what a model is"
    assert first.facts.flops_parameters == 100
    assert first.facts.max_length == 128
    assert connect(serve(), max_length=99).facts.max_length == 99
    assert connect(serve(models=("other",))).facts.fingerprint != first.facts.fingerprint
    assert connect(serve(), flops_parameters=None).facts.flops_parameters == 0
    assert "FLOPs count as 0" in caplog.text
    with pytest.raises(ConfigError, match=r"engine\.max_length"):
        connect(serve(tells_length=False))


def test_flops_are_counted_from_the_config_alone(serve, tiny_chat_model, fake_server) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from search.engines.loading import flops_parameters

    speaks = AutoTokenizer.from_pretrained(tiny_chat_model)
    say = speaks.encode("abcdefgh")
    with fake_server.FakeServer(lambda prefix, num, *_: say[:num], speaks) as server:
        engine = ServerEngine(
            settings(server.url, None, flops_parameters=None), tiny_chat_model, Model(base=str(tiny_chat_model))
        )
        engine.close()
    assert engine.facts.flops_parameters == flops_parameters(AutoModelForCausalLM.from_pretrained(tiny_chat_model))


# ---------------------------------------------------------------- secrets and safety


def test_the_key_is_sent_and_never_shown(serve, connect, tokenizer, monkeypatch, caplog) -> None:
    caplog.set_level(logging.DEBUG)
    server = serve(key=SECRET)
    monkeypatch.setenv("TEST_SERVER_KEY", SECRET)
    engine = connect(server, api_key_env="TEST_SERVER_KEY", retries=0)
    assert engine.extend(requests(tokenizer, 1))[0].ids
    server.switches.always = 500  # the server's message quotes the key
    with pytest.raises(EngineError) as failure:
        engine.extend(requests(tokenizer, 1))
    assert "[redacted]" in str(failure.value)
    server.switches.always = 422
    engine.extend(requests(tokenizer, 1))
    assert "[redacted]" in caplog.text
    monkeypatch.setenv("TEST_SERVER_KEY", SECRET + "x")
    with pytest.raises(ModelError, match="see that TEST_SERVER_KEY holds a valid key") as refused:
        connect(server, api_key_env="TEST_SERVER_KEY")
    for shown in (str(failure.value), str(refused.value), caplog.text, repr(vars(engine)), repr(engine._settings)):
        assert SECRET not in shown


def test_keys_come_from_the_environment_only(serve, connect, monkeypatch) -> None:
    monkeypatch.delenv("TEST_SERVER_KEY", raising=False)
    with pytest.raises(ConfigError, match=r"TEST_SERVER_KEY, which is not set"):
        connect(serve(), api_key_env="TEST_SERVER_KEY")
    with pytest.raises(ModelError, match=r"name the variable of a key in engine\.api_key_env"):
        connect(serve(key=SECRET))


def test_redirects_are_not_followed(serve, connect, tokenizer, monkeypatch) -> None:
    monkeypatch.setenv("TEST_SERVER_KEY", SECRET)
    elsewhere = serve()
    server = serve()
    engine = connect(server, api_key_env="TEST_SERVER_KEY")
    server.switches.location = elsewhere.url + "/completions"
    with pytest.raises(EngineError, match=r"redirects to .*give the final address"):
        engine.extend(requests(tokenizer, 2))
    assert elsewhere.paths == []


def test_a_certificate_nobody_vouches_for_is_refused(serve, connect, tmp_path) -> None:
    pytest.importorskip("cryptography")
    server = serve(tls=self_signed(tmp_path))
    with pytest.raises(ModelError, match="CERTIFICATE_VERIFY_FAILED"):
        connect(server, retries=0)
    assert server.paths == []


def self_signed(folder: Path) -> ssl.SSLContext:
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "127.0.0.1")])
    now = datetime.now(UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(now - timedelta(days=1))
        .not_valid_after(now + timedelta(days=1))
        .sign(key, hashes.SHA256())
    )
    pem = serialization.Encoding.PEM
    form = (serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    path = folder / "self-signed.pem"
    path.write_bytes(key.private_bytes(pem, *form) + certificate.public_bytes(pem))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(path)
    return context


@pytest.mark.parametrize(
    ("bad", "says"),
    [
        ({"url": f"http://user:{SECRET}@host/v1"}, "api_key_env"),
        ({"url": f"http://host/v1?key={SECRET}"}, "api_key_env"),
        ({"api_key_env": SECRET}, "NAME"),
        ({"url": "file:///etc/passwd"}, "http://"),
        ({"url": "host:8000"}, "http://"),
        ({"extra_body": {"n": 4}}, "n: the search decides"),
        ({"timeout_s": 0}, "greater than 0"),
        ({"max_concurrency": 0}, "greater than 0"),
        ({"key": "x"}, "unknown key 'engine.key'"),
    ],
    ids=str,
)
def test_settings_that_cannot_be(bad, says) -> None:
    with pytest.raises(InvalidConfig) as error:
        parse({"loop": {"name": "a"}, "task": {"type": "countdown"}, "engine": {"type": "server"} | bad})
    assert says in str(error.value)
    assert SECRET not in str(error.value)


def test_addresses() -> None:
    for given in (
        "http://h:8000",
        "http://h:8000/",
        "http://h:8000/v1",
        "http://h:8000/v1/",
        "http://h:8000/v1/completions",
    ):
        assert base_url(given) == "http://h:8000/v1"
    assert base_url("https://h/api/openai") == "https://h/api/openai"
