"""The server engine when servers fail, refuse, hang or lie; its start, and the secrets it keeps."""

# ruff: noqa: F401, F811 (fixtures are imported and then named as parameters)

import logging
import ssl
import threading
import time
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from configs.load import InvalidConfig, parse
from configs.schema import Model
from search.engines import load_engine
from search.engines.server import ServerEngine
from search.engines.server_http import base_url
from search.errors import ConfigError, EngineError, ModelError
from search.tasks import load_task
from search.types import Continuation, Finish, Request
from tests.fake_server import FakeServer
from tests.server_kit import (
    DELIMITER,
    connect,
    expected,
    outcome,
    random_policy,
    requests,
    serve,
    settings,
    tokenizer,
    tokenizer_folder,
    wait_until,
)

SECRET = "sk-canary-4711-do-not-print"


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


# ---------------------------------------------------------------- the start


def test_nobody_answers(tokenizer_folder) -> None:
    before = set(threading.enumerate())
    with pytest.raises(ModelError, match=r"http://127\.0\.0\.1:1/v1 did not answer models in 4 attempts.*engine\.url"):
        ServerEngine(settings("http://127.0.0.1:1", tokenizer_folder))
    assert not [t for t in set(threading.enumerate()) - before if t.name == "server-engine"]


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


def test_flops_are_counted_from_the_config_alone(serve, tiny_chat_model) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from search.engines.loading import flops_parameters

    speaks = AutoTokenizer.from_pretrained(tiny_chat_model)
    say = speaks.encode("abcdefgh")
    with FakeServer(lambda prefix, num, *_: say[:num], speaks) as server:
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
