"""The server engine against a real vLLM server: the tokens of plain transformers, and every claim it makes."""

import importlib.util
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from configs.schema import Model
from configs.schema import ServerEngine as ServerSettings
from configs.schema import TransformersEngine as TransformersSettings
from search.engines.server import ServerEngine
from search.engines.transformers import TransformersEngine
from search.errors import EngineError, ModelError
from search.randomness import key64
from search.tasks.tokenizer import build_tokenizer
from search.types import Continuation, Finish, Request

pytestmark = [
    pytest.mark.slow,
    pytest.mark.vllm,
    pytest.mark.timeout(900),
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed"),
]
MAX_LENGTH = 128
START_S = 600.0
PROMPTS = ["3,5,7>22\n", "1,2,3,4>10\n", "9,9>18\n", "2,4,6,8,10>30\n"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two layers, random, heads of 32: the least that vLLM's CPU attention takes."""
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = build_tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=MAX_LENGTH,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        model = LlamaForCausalLM(config)
        model.lm_head.weight.data *= 20  # an untrained head is nearly uniform: make it choose
    path = tmp_path_factory.mktemp("model")
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def server(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    """(url, process) of a server that answers."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder), "--port", str(port)]
    command += ["--host", "127.0.0.1", "--dtype", "float32", "--enforce-eager", "--max-model-len", str(MAX_LENGTH)]
    command += ["--enable-prompt-tokens-details"] + ([] if torch.cuda.is_available() else ["--block-size", "32"])
    log = tmp_path_factory.mktemp("server") / "log.txt"
    environment = os.environ | {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1"}
    with log.open("wb") as out:
        process = subprocess.Popen(command, stdout=out, stderr=out, env=environment, start_new_session=True)
    try:
        wait_for(f"http://127.0.0.1:{port}/health", process, log)
        yield f"http://127.0.0.1:{port}", process
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def wait_for(url: str, process: "subprocess.Popen[bytes]", log: Path) -> None:
    import httpx

    end = time.monotonic() + START_S
    while time.monotonic() < end:
        assert process.poll() is None, log.read_text()[-3000:]
        try:
            if httpx.get(url, trust_env=False).status_code == 200:
                return
        except httpx.TransportError:
            time.sleep(0.5)
    raise AssertionError(log.read_text()[-3000:])


def connect(server: tuple[str, Any], folder: Path, **changes: Any) -> ServerEngine:
    settings = ServerSettings.model_validate({"type": "server", "url": server[0], "retries": 1} | changes)
    return ServerEngine(settings, str(folder), Model(base=str(folder)))


@pytest.fixture(params=["whole", "streamed", "merged"])
def engine(request: pytest.FixtureRequest, server, folder: Path) -> Iterator[ServerEngine]:
    made = connect(server, folder, stream=request.param == "streamed", seeds=request.param != "merged")
    yield made
    made.close()


@pytest.fixture(scope="module")
def reference(folder: Path) -> TransformersEngine:
    return TransformersEngine(folder, TransformersSettings(device="cpu"), Model(), threads=1)


def requests(tokenizer: Any, samples: int = 8, **changes: Any) -> list[Request]:
    made = {"max_new_tokens": 60, "temperature": 1.0} | changes
    return [
        Request(tuple(tokenizer.encode(prompt, add_special_tokens=False)), key=key64(prompt, n), **made)
        for prompt in PROMPTS
        for n in range(samples)
    ]


def test_it_is_exact_and_knows_it(engine: ServerEngine, reference: TransformersEngine) -> None:
    assert engine.capabilities.token_ids
    assert engine.capabilities.prefix_cache
    assert engine.facts.max_length == MAX_LENGTH
    assert engine.facts.flops_parameters == reference.facts.flops_parameters
    asked = requests(engine.tokenizer, 1, temperature=0.0)
    found, plain = engine.extend(asked), reference.extend(asked)
    assert [(c.ids, c.finish) for c in found] == [(c.ids, c.finish) for c in plain]


def test_steps_and_ends(engine: ServerEngine, reference: TransformersEngine) -> None:
    found = engine.extend(requests(engine.tokenizer, 16, stop="\n", max_new_tokens=30))
    assert {c.finish for c in found} >= {Finish.STOP, Finish.EOS}
    for continuation in found:
        text, before = (engine.tokenizer.decode(ids) for ids in (continuation.ids, continuation.ids[:-1]))
        assert ("\n" in text) == (continuation.finish is Finish.STOP)
        assert "\n" not in before
        ended = continuation.ids[-1] == engine.tokenizer.eos_token_id
        assert ended == (continuation.finish is Finish.EOS)
        assert engine.tokenizer.eos_token_id not in continuation.ids[:-1]
        assert (len(continuation.ids) == 30) or continuation.finish is not Finish.LENGTH


def test_a_greedy_answer_cut_into_steps_equals_the_whole(engine: ServerEngine) -> None:
    for request in requests(engine.tokenizer, 1, temperature=0.0):
        whole, pieces = engine.extend([request])[0], list[int]()
        finish = Finish.STOP
        while finish is Finish.STOP and len(pieces) < 60:
            step = replace(request, prefix=(*request.prefix, *pieces), max_new_tokens=60 - len(pieces), stop="88")
            piece = engine.extend([step])[0]
            pieces, finish = [*pieces, *piece.ids], piece.finish
        assert tuple(pieces) == whole.ids


def test_samples_repeat_by_their_seed(engine: ServerEngine) -> None:
    asked = requests(engine.tokenizer)
    first, second = ([c.ids for c in engine.extend(asked)] for _ in range(2))
    assert (first == second) == engine.capabilities.seeds
    assert len(set(first)) > len(PROMPTS)


def test_the_context_and_bad_ids(engine: ServerEngine) -> None:
    asked = [Request((5,) * n, 99, 1.0, n) for n in (100, MAX_LENGTH - 1, MAX_LENGTH, 500)]
    found = engine.extend([*asked, Request((10**6,), 4, 1.0, 1), Request((5,), 3, 1.0, 1)])
    assert len(found[0].ids) <= 28
    assert len(found[1].ids) == 1
    assert [c.finish for c in found[2:5]] == [Finish.OVERFLOW, Finish.OVERFLOW, Finish.ERROR]
    assert len(found[5].ids) <= 3


def test_the_server_refuses_what_is_too_long(server, folder: Path, reference: TransformersEngine) -> None:
    """Where this side does not know the context length, the server's refusal ends that candidate alone."""
    engine = connect(server, folder)
    engine.facts = replace(engine.facts, max_length=10_000)
    found = engine.extend([Request((5,) * n, 20, 1.0, n) for n in (50, 300)])
    assert found[0].ids
    assert found[1] == Continuation((), Finish.OVERFLOW)
    engine.close()


def test_a_shared_prefix_is_cached(server, folder: Path) -> None:
    engine = connect(server, folder)
    request = Request(tuple(range(10, 80)), 4, 1.0, 1)
    engine.extend([request])
    again = engine.extend([request])[0]
    assert again.cached_tokens >= 32
    assert again.cached_tokens + again.prefilled_tokens == 70
    engine.close()


def test_cancelling(engine: ServerEngine) -> None:
    tickets = engine.submit([Request((5, 6), 120, 1.0, n) for n in range(40)])
    first = engine.collect()
    engine.cancel(tickets)
    got = dict(first)
    while found := engine.collect():
        got |= dict(found)
    assert sorted(got) == sorted(tickets)
    assert all(c.ids for _, c in first)


def test_a_server_that_dies_in_the_middle(server, folder: Path) -> None:
    """Last: what was finished is delivered, then one clear error; and no new engine starts."""
    engine = connect(server, folder, max_concurrency=4)
    tickets = engine.submit([Request((5, 6, n % 90 + 3), 120, 1.0, n) for n in range(400)])
    got = dict(engine.collect())
    os.killpg(server[1].pid, signal.SIGKILL)

    def drain() -> None:
        while found := engine.collect():
            got.update(found)

    with pytest.raises(EngineError, match=r"did not answer completions in 2 attempts.*was finished is kept"):
        drain()
    assert 0 < len(got) < len(tickets)
    assert all(c.ids and c.finish in (Finish.EOS, Finish.LENGTH) for c in got.values())
    engine.close()
    with pytest.raises(ModelError, match="did not answer models"):
        connect(server, folder)
