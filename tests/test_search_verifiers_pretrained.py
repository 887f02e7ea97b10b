"""Checkpoints, tokenizers and settings that are not of the format that they are said to be."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from search.errors import ConfigError, ModelError
from search.verifiers.pretrained import load_pretrained
from tests.verifier_checkpoints import (
    FORMATS,
    TASK,
    load,
    qwen_tokenizer,
    save_qwen_prm,
    save_sequence_classifier,
    save_token_classifier,
    saved,
    settings_of,
)


@pytest.fixture(autouse=True)
def _seed() -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


def edit_config(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not None}))


def edit_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize(
    ("name", "settings", "why"),
    [
        ("qwen_prm", {"separator": "<extra_1>"}, "'<extra_1>' is not a single token"),
        ("skywork", {"separator": "\n\n step"}, "not a single token"),
        ("math_shepherd", {"separator": " the end"}, "' the end' is not a single token"),
        ("math_shepherd", {"positive": "good"}, "'good' is not a single token"),
        ("math_shepherd", {"negative": "+"}, "one token for both labels"),
        ("rlhflow", {"negative": "--- no"}, "'--- no' is not a single token"),
        ("rlhflow", {"negative": "+"}, "one token for both labels"),
        ("tokens", {"positive": "good"}, "its labels are 'wrong' and 'right', and verifier.positive is 'good'"),
    ],
)
def test_texts_that_are_no_tokens_or_labels_are_refused(
    name: str, settings: dict[str, Any], why: str, tmp_path: Path
) -> None:
    format, save, making, _ = FORMATS[name]
    save(tmp_path, **making)
    with pytest.raises(ModelError, match=why):
        load(tmp_path, format, **settings)


@pytest.mark.parametrize(
    ("format", "settings", "why"),
    [
        ("rlhflow", {"separator": "\n"}, "has no separator"),
        ("sequence_classifier", {"separator": "\n", "negative": "x"}, "has no separator and no negative"),
        ("qwen_prm", {"positive": "+"}, "has no positive"),
        ("skywork", {"system": "Judge."}, "has no system"),
        ("token_classifier", {"separator": ""}, "separator is empty"),
        ("ratchet", {"aggregation": "min"}, "brings the one"),
        ("ratchet", {"system": "Judge."}, "has no system"),
    ],
)
def test_settings_that_a_format_does_not_have_are_refused(format: str, settings: dict[str, Any], why: str) -> None:
    with pytest.raises(ConfigError, match=why):
        load_pretrained(TASK, settings_of("nowhere", format, **settings))


def test_a_single_label_has_no_name(tmp_path: Path) -> None:
    save_token_classifier(tmp_path, labels=("reward",))
    with pytest.raises(ConfigError, match="has a single label"):
        load(tmp_path, "token_classifier", positive="reward")


@pytest.mark.parametrize(
    ("name", "template", "why"),
    [
        ("qwen_prm", None, "no chat template"),
        ("rlhflow", None, "no chat template"),
        ("sequences", None, "no chat template"),
        ("qwen_prm", "{{ messages[-1]['content'] }}", "does not write each message once"),
        (
            "qwen_prm",
            "{{ raise_exception('no system message') }}",
            "refuses the messages of this format .no system message",
        ),
        ("rlhflow", "{% for m in messages %}{{ loop.index }}: {{ m.content }}\n{% endfor %}", "every turn alike"),
    ],
)
def test_a_chat_template_that_does_not_fit_is_refused(
    name: str, template: str | None, why: str, tmp_path: Path
) -> None:
    format, save, making, settings = FORMATS[name]
    save(tmp_path, **making)
    (tmp_path / "chat_template.jinja").unlink()
    if template is not None:
        (tmp_path / "chat_template.jinja").write_text(template)
    with pytest.raises(ModelError, match=why):
        load(tmp_path, format, **settings)


@pytest.mark.parametrize(
    ("name", "lost", "why"),
    [
        ("qwen_prm", "score.2.weight", "lacks the head's weights score.2.weight"),
        ("skywork", "v_head.summary.bias", "lacks the head's weights v_head.summary.bias"),
        ("math_shepherd", "lm_head.weight", "lacks weights: lm_head.weight"),
        ("tokens", "score.weight", "lacks weights: score.weight"),
        ("sequences", "score.weight", "lacks weights: score.weight"),
        ("qwen_prm", "model.layers.1.mlp.up_proj.weight", "lacks weights: layers.1.mlp.up_proj.weight"),
    ],
)
def test_a_checkpoint_that_lacks_weights_is_refused(name: str, lost: str, why: str, tmp_path: Path) -> None:
    format, save, making, settings = FORMATS[name]
    save(tmp_path, **making)
    edit_weights(tmp_path, lambda weights: weights.pop(lost))
    with pytest.raises(ModelError, match=why):
        load(tmp_path, format, **settings)


def test_heads_of_other_shapes_are_refused(tmp_path: Path) -> None:
    save_qwen_prm(tmp_path / "qwen")
    edit_weights(tmp_path / "qwen", lambda w: w.update({"score.2.weight": torch.zeros(3, 32)}))
    with pytest.raises(ModelError, match=r"score.2.weight is \(3, 32\), not \(2, 32\)"):
        load(tmp_path / "qwen", "qwen_prm")
    save_token_classifier(tmp_path / "three", labels=("bad", "neutral", "good"))
    with pytest.raises(ModelError, match="it has 3 labels"):
        load(tmp_path / "three", "token_classifier")
    save_sequence_classifier(tmp_path / "sequence", num_labels=2)
    edit_config(tmp_path / "sequence", id2label={"0": "reward"}, label2id={"reward": 0})
    with pytest.raises(ModelError, match=r"do not have the shapes .* score.weight"):
        load(tmp_path / "sequence", "sequence_classifier")


def test_a_head_that_reads_a_pooled_state_is_refused(tmp_path: Path) -> None:
    from transformers import BertConfig, BertForSequenceClassification

    tokenizer = qwen_tokenizer()
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    config = BertConfig(vocab_size=len(tokenizer), num_labels=1, **sizes)
    BertForSequenceClassification(config).save_pretrained(tmp_path)
    saved(tokenizer, tmp_path)
    with pytest.raises(ModelError, match="no linear head"):
        load(tmp_path, "sequence_classifier")


def test_another_models_tokenizer_is_refused(tmp_path: Path) -> None:
    save_token_classifier(tmp_path)
    larger = qwen_tokenizer()
    larger.add_tokens([f"<new_{n}>" for n in range(5)])
    larger.save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"tokens beyond the \d+ of its model: <new_0>, <new_1>, <new_2> and 2 more"):
        load(tmp_path, "token_classifier")


def test_a_tokenizer_without_bos_is_no_skywork(tmp_path: Path) -> None:
    save_token_classifier(tmp_path)
    with pytest.raises(ModelError, match="no BOS token"):
        load(tmp_path, "skywork")


def test_another_format_than_the_checkpoints_is_refused(tmp_path: Path) -> None:
    save_qwen_prm(tmp_path)
    for format in ("token_classifier", "sequence_classifier", "rlhflow"):
        with pytest.raises(ModelError, match="lacks weights"):
            load(tmp_path, format)


def test_pickled_weights_and_unknown_architectures_are_refused(tmp_path: Path) -> None:
    save_qwen_prm(tmp_path)
    edit_config(tmp_path, model_type="mystery_rm")
    with pytest.raises(ModelError, match="knows no model_type 'mystery_rm'"):
        load(tmp_path, "qwen_prm")
    (tmp_path / "model.safetensors").rename(tmp_path / "pytorch_model.bin")
    with pytest.raises(ModelError, match="pickled weights"):
        load(tmp_path, "qwen_prm")
