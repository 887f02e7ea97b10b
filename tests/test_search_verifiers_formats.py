"""Public verifiers against references written as their model cards use them; and what they read of an answer."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from configs.load import load as load_config
from configs.schema import Model
from search.types import Scored, ScoreRequest
from search.verifiers import load_verifier
from search.verifiers.card import Card
from search.verifiers.formats import layout_of
from search.verifiers.pretrained import load_pretrained
from search.verifiers.trained import Trained
from tests.verifier_checkpoints import (
    CONFIG,
    DELIMITER,
    FORMATS,
    byte_level,
    llama_tokenizer,
    load,
    mistral_tokenizer,
    qwen_tokenizer,
    request,
    requests,
    save_qwen_prm,
    save_rlhflow,
    save_token_classifier,
    saved,
    settings_of,
)


@pytest.fixture(autouse=True)
def _seed() -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


@pytest.mark.parametrize("name", FORMATS)
def test_scores_are_those_of_the_published_snippet(name: str, tmp_path: Path) -> None:
    format, save, making, settings = FORMATS[name]
    reference = save(tmp_path, **making)
    with torch.inference_mode():
        expected = [reference(one) for one in requests()]
    for batching in ({}, {"max_batch_rows": 2}, {"batch_tokens": 1}):
        verifier = load(tmp_path, format, **settings, **batching)
        scored = verifier.score(requests())
        assert all(one.tokens >= one.computed_tokens > 0 for one in scored)
        for one, found, wanted in zip(requests(), scored, expected, strict=True):
            assert len(found.scores) == (len(one.steps) if verifier.facts.process else 1)
            assert found.scores == pytest.approx(wanted, abs=1e-5)
    assert len({round(score, 3) for wanted in expected for score in wanted}) > 4, (
        "a reference that says always the same"
    )


@pytest.mark.parametrize("name", ["qwen_prm", "math_shepherd without a window", "rlhflow", "skywork", "tokens"])
def test_growing_an_answer_step_by_step_scores_as_at_once_and_runs_only_what_is_new(name: str, tmp_path: Path) -> None:
    format, save, making, settings = FORMATS[name]
    save(tmp_path, **making)
    verifier = load(tmp_path, format, **settings)
    whole = requests()[4]
    at_once = verifier.score([whole])[0]
    verifier.reset()
    computed = 0
    for num in range(1, len(whole.steps) + 1):
        [grown] = verifier.score([ScoreRequest(whole.problem, whole.steps[:num])])
        assert grown.scores == pytest.approx(at_once.scores[:num], abs=1e-5)
        computed += grown.computed_tokens
    assert computed == at_once.tokens


def test_load_verifier_knows_the_type(tmp_path: Path) -> None:
    reference = save_token_classifier(tmp_path, labels=("reward",))
    keys = ["type=pretrained", f"path={tmp_path}", "format=token_classifier", "aggregation=min"]
    lines: Any = SimpleNamespace(name="lines", step_delimiter="\n")
    config = load_config("countdown", [f"verifier.{key}" for key in keys])
    verifier = load_verifier(config, lines)
    assert verifier is not None
    assert verifier.facts.aggregation == "min"
    assert verifier.facts.process
    asked = request("3 5 7 > 22", "3+5=8\n", "8+7=15\n")
    with torch.inference_mode():
        assert verifier.score([asked])[0].scores == pytest.approx(reference(asked), abs=1e-5)


def test_a_folder_that_a_round_trained_is_a_format_too(tmp_path: Path) -> None:
    save_token_classifier(tmp_path / "model", labels=("reward",))
    Card("prm", "scalar", "prod", DELIMITER, policy="0" * 16).save(tmp_path)
    task: Any = SimpleNamespace(name="sums", step_delimiter=DELIMITER, prompt=lambda problem: problem.question)
    verifier = load_pretrained(task, settings_of(tmp_path, "ratchet"))
    assert verifier.facts.aggregation == "prod"  # of its card
    trained = Trained(task, tmp_path, settings_of(tmp_path, "ratchet"), Model())
    asked = requests()
    assert [one.scores for one in verifier.score(asked)] == [one.scores for one in trained.score(asked)]
    assert len(verifier.score(asked)[0].scores) == 3


def test_facts_count_what_a_token_passes_through_and_name_what_decides_the_scores(tmp_path: Path) -> None:
    save_rlhflow(tmp_path)
    verifier = load(tmp_path, "rlhflow", device="cpu", dtype="float32")
    layer = 2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 64 + 2 * 32
    assert verifier.facts.flops_parameters == 2 * layer + 32 + 32  # layers, last norm, one row of the output head
    assert verifier.facts.process
    assert verifier.facts.fingerprint != load(tmp_path, "rlhflow", positive="5").facts.fingerprint


def test_bfloat16_is_as_the_settings_say(tmp_path: Path) -> None:
    reference = save_qwen_prm(tmp_path)
    verifier = load(tmp_path, "qwen_prm", dtype="bfloat16")
    with torch.inference_mode():
        expected = reference(requests()[0])
    scores = verifier.score(requests()[:1])[0].scores
    assert scores == pytest.approx(expected, abs=0.1)
    assert scores != pytest.approx(expected, abs=1e-5)


def test_a_classifier_that_reads_both_ways_is_found_out_and_never_reuses_anything(tmp_path: Path) -> None:
    from transformers import BertConfig, BertForTokenClassification

    names = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    tokenizer = byte_level(["[PAD]"], pad_token="[PAD]")
    sizes = {name: value for name, value in CONFIG.items() if name in names}
    model = BertForTokenClassification(BertConfig(vocab_size=len(tokenizer), num_labels=1, **sizes)).eval()
    model.save_pretrained(tmp_path)
    tokenizer = saved(tokenizer, tmp_path)
    verifier = load(tmp_path, "token_classifier")
    short, long = (ScoreRequest(requests()[4].problem, requests()[4].steps[:n]) for n in (1, 3))
    first = verifier.score([short])[0]
    assert verifier.score([long])[0].computed_tokens == verifier.score([long])[0].tokens
    assert verifier.score([long])[0].scores[0] != pytest.approx(first.scores[0], abs=1e-6)
    encoded = layout_of(settings_of(tmp_path, "token_classifier"), tokenizer, DELIMITER).encode(long)
    with torch.inference_mode():
        logits = model(torch.tensor([encoded.ids])).logits[0, list(encoded.ends), 0]
    for scored in (verifier.score([long, short])[0], verifier.score([short, long])[1]):
        assert scored.scores == pytest.approx(logits.sigmoid().tolist(), abs=1e-5)


# ---------------------------------------------------------------- steps without text, and answers that have no score


def test_an_answer_that_ends_right_after_a_delimiter_has_the_score_of_the_step_before(tmp_path: Path) -> None:
    question, first = "What is 2 + 3?", "2 + 3 = 5.\n\n"
    for name in ("qwen_prm", "math_shepherd", "rlhflow", "skywork", "tokens"):
        format, save, making, settings = FORMATS[name]
        save(tmp_path / name, **making)
        verifier = load(tmp_path / name, format, **settings)
        [one, ended, inner, plain_one] = verifier.score(
            [
                request(question, first),
                request(question, first, ""),
                request(question, first, "\n\n", "So 5.\n\n", " "),
                request(question, first, "So 5."),
            ]
        )
        assert ended.scores == pytest.approx((one.scores[0], one.scores[0]), abs=1e-6), name
        twice = [score for score in plain_one.scores for _ in range(2)]
        assert inner.scores == pytest.approx(twice, abs=1e-5), name


def test_blank_first_steps_are_read_and_answers_without_a_word_have_no_score(tmp_path: Path) -> None:
    for name in ("qwen_prm", "math_shepherd", "rlhflow", "skywork", "tokens", "sequences"):
        format, save, making, settings = FORMATS[name]
        save(tmp_path / name, **making)
        verifier = load(tmp_path / name, format, **settings)
        [leading, empty, ended, none, fine] = verifier.score(
            [
                request("Why?", "\n\n", "Because.\n\n", "Yes."),
                request("Why?", ""),
                request("Why?", "\n\n", " "),
                request("Why?"),
                request("Why?", "Because."),
            ]
        )
        assert len(leading.scores) == (3 if verifier.facts.process else 1), name
        assert all(0 < score < 1 for score in leading.scores), name
        assert empty == ended == Scored((), unscored="it has no text")
        assert none == Scored((), unscored="it has no step")
        assert len(fine.scores) == 1
        assert fine.unscored is None


def test_steps_without_the_delimiter_and_answers_that_are_too_long_have_no_score_and_a_reason(tmp_path: Path) -> None:
    save_qwen_prm(tmp_path)
    verifier = load(tmp_path, "qwen_prm")
    [glued, long, fine] = verifier.score(
        [request("Why?", "Because.", "So."), request("Why?", "Because " * 1000), request("Why?", "Because.")]
    )
    assert glued.scores == long.scores == ()
    assert "step 1 of 2" in str(glued.unscored)
    assert "context only 1024" in str(long.unscored)
    assert fine.unscored is None


# ---------------------------------------------------------------- layouts


def read_at(tokenizer: Any, layout: Any, one: ScoreRequest) -> list[str]:
    """The text up to each token at which a score is read."""
    encoded = layout.encode(one)
    return [tokenizer.decode(encoded.ids[: end + 1]) for end in encoded.ends]


def test_scores_are_read_after_the_tag_and_before_the_plus(tmp_path: Path) -> None:
    one = request("Is 5 + 5 = 10?", "Yes + no\n\n", "  It is + \n\n")
    qwen = saved(qwen_tokenizer(), tmp_path / "qwen")
    first, second = read_at(qwen, layout_of(settings_of("x", "qwen_prm"), qwen, DELIMITER), one)
    assert first.endswith("assistant\nYes + no<extra_0>")
    assert second == f"{first}It is +<extra_0>"
    llama = saved(llama_tokenizer(), tmp_path / "llama")
    layout = layout_of(settings_of("x", "rlhflow", system="Judge."), llama, DELIMITER)
    first, second = read_at(llama, layout, one)
    assert first.startswith("<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nJudge.<|eot_id|>")
    assert first.endswith("\n\nIs 5 + 5 = 10? Yes + no<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n")
    assert second.startswith(f"{first}+<|eot_id|><|start_header_id|>user<|end_header_id|>\n\nIt is +<|eot_id|>")
    assert second.endswith("assistant<|end_header_id|>\n\n")


def test_a_tag_that_the_policy_wrote_is_no_end_of_a_step(tmp_path: Path) -> None:
    tokenizer = saved(mistral_tokenizer(), tmp_path)
    layout = layout_of(settings_of("x", "math_shepherd"), tokenizer, DELIMITER)
    one = request("Why?", "so \u043a\u0438 it is\n\n", "is \u043a\u0438")
    first, second = read_at(tokenizer, layout, one)
    assert first.endswith("Why? so \u043a\u0438 it is \u043a\u0438")
    assert second.endswith("\u043a\u0438\nis \u043a\u0438 \u043a\u0438")


def test_every_candidate_of_a_problem_begins_with_the_prompt(tmp_path: Path) -> None:
    makers = {"qwen_prm": qwen_tokenizer, "rlhflow": llama_tokenizer, "math_shepherd": mistral_tokenizer}
    makers |= {"token_classifier": qwen_tokenizer, "sequence_classifier": qwen_tokenizer}
    for format, make in makers.items():
        tokenizer = saved(make(), tmp_path / format)
        layout = layout_of(settings_of("x", format), tokenizer, DELIMITER)
        encoded = [layout.encode(one) for one in requests()[:3]]
        [num_prompt] = {one.num_prompt for one in encoded}
        assert num_prompt > 5
        assert len({one.ids[:num_prompt] for one in encoded}) == 1, format
        assert "30 - 4" in tokenizer.decode(encoded[0].ids[:num_prompt])


def test_layouts_need_no_torch() -> None:
    code = "import sys, search.verifiers.formats; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[1])
