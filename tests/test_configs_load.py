"""The configuration is strict, and an error names the key and the way out."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from configs.load import SHIPPED, InvalidConfig, difference, dump, load, parse

MINIMAL = '[loop]\nname = "x"\n[task]\ntype = "countdown"\n'


@pytest.fixture
def config_file(tmp_path: Path):
    def write(text: str) -> Path:
        path = tmp_path / "c.toml"
        path.write_text(text, encoding="utf-8")
        return path

    return write


@pytest.mark.parametrize("path", sorted(SHIPPED.glob("*.toml")), ids=lambda p: p.stem)
def test_every_shipped_config_loads(path):
    config = load(path)
    assert parse(json.loads(dump(config))) == config


def test_the_shipped_configs_are_the_promised_ones():
    names = {p.stem for p in SHIPPED.glob("*.toml")}
    assert {"countdown", "arithmetic", "smoke", "gsm8k_qwen2.5_0.5b", "math_qwen2.5_1.5b"} <= names


def test_shipped_configs_are_found_by_name_and_by_path():
    assert load("smoke") == load("smoke.toml") == load("configs/smoke.toml") == load(SHIPPED / "smoke.toml")


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("[search]\nsample = 3", ["search.sample", "'samples'"]),
        ("[serch]\nsamples = 3", ["serch", "'search'"]),
        ("[search]\nmax_per_problem = 3", ["search.max_per_problem", "'select.max_per_problem'"]),
        ("[search]\nsamples = 'many'", ["search.samples", "'many'", "integer"]),
        ("[search]\nsamples = 0", ["search.samples", "0", "greater than 0"]),
        ("[search]\nsamples = 2\nprobe_samples = 4", ["search", "probe_samples = 4", "samples = 2"]),
        ("[splits]\ntrain = 0.9", ["splits", "1.2", "not 1"]),
        ("[engine]\ntype = 'vlm'", ["engine", "vlm", "vllm"]),
        ("[distill]\nbatch_size = 48", ["batch_size = 48", "micro_batch_size = 64"]),
        ("[gate]\nproblems = 10", ["gate.problems = 10", "200"]),
        ("[model]\nbase = 'scripted'", ["scripted", "go together"]),
        ("[evaluate]\nk = [1, 128]", ["k = 128", "64"]),
    ],
)
def test_a_bad_value_is_named_with_the_way_out(config_file, text, parts):
    with pytest.raises(InvalidConfig) as caught:
        load(config_file(MINIMAL + text))
    for part in parts:
        assert part in str(caught.value)


def test_all_bad_keys_are_named_at_once(config_file):
    with pytest.raises(InvalidConfig, match=r"gate.bar.*foo"):
        load(config_file(MINIMAL + "[foo]\n[gate]\nbar = 1"))


def test_a_tag_in_a_union_is_checked_against_its_own_keys(config_file):
    with pytest.raises(InvalidConfig, match=r"unknown key 'task.max_number' \(did you mean 'max_numbers'\?\)"):
        load(config_file(MINIMAL + "max_number = 3"))


@pytest.mark.parametrize("text", ["[loop", "\xff not toml"])
def test_broken_toml_is_named(config_file, text):
    with pytest.raises(InvalidConfig, match="not valid TOML"):
        load(config_file(text))


def test_a_missing_config_lists_the_shipped_ones():
    with pytest.raises(InvalidConfig, match=r"nowhere.*smoke"):
        load("nowhere")


def test_a_bootstrap_model_needs_a_generated_task(config_file):
    with pytest.raises(InvalidConfig, match=r"bootstrap.*gsm8k"):
        load(config_file('[loop]\nname = "x"\n[task]\ntype = "gsm8k"\n'))


@pytest.mark.parametrize(
    ("override", "value"),
    [("search.samples=32", 32), ("evaluate.k=[1,2]", (1, 2)), ("model.base=Qwen/Qwen2.5-0.5B", "Qwen/Qwen2.5-0.5B")],
)
def test_overrides_are_toml_or_strings(config_file, override, value):
    config = load(config_file(MINIMAL), [override])
    section, key = override.partition("=")[0].split(".")
    assert getattr(getattr(config, section), key) == value


def test_another_type_begins_its_section_anew_wherever_it_stands():
    config = load("countdown", ["engine.max_num_seqs=8", "engine.type=vllm"])
    assert (config.engine.type, config.engine.max_num_seqs) == ("vllm", 8)
    same = load("countdown", ["engine.type=transformers"])
    assert same == load("countdown")


def test_an_unknown_key_of_a_verifier_is_named_as_the_user_wrote_it():
    with pytest.raises(InvalidConfig, match=r"'verifier\.nois' .*did you mean 'noise'"):
        load("countdown", ["verifier.type=oracle", "verifier.nois=0.1"])


@pytest.mark.parametrize("base", ["arithmetic", "countdown", "gsm8k_qwen2.5_0.5b"])
@pytest.mark.parametrize("kind", ["prm", "orm"])
def test_gold_labels_need_a_task_that_checks_steps_or_a_data_set(base, kind):
    checks = base in ("arithmetic", "countdown")
    given = ["verifier.type=trained", f"verifier.kind={kind}", 'verifier.labels=["tree", "gold"]']
    if checks or kind == "orm":  # which is asked for outcomes alone
        assert load(base, given).answer_labels == ("tree", "gold")
        return
    with pytest.raises(InvalidConfig, match=r"task\.type = 'gsm8k' cannot check a step: set verifier\.steps\.path to"):
        load(base, given)
    config = load(base, [*given, "verifier.steps.path=steps.jsonl"])
    assert config.answer_labels == ("tree",)
    assert parse(json.loads(dump(config))) == config


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (['verifier.labels=["tree"]'], r"\[verifier\] steps\.path = 's\.jsonl' is read where labels has 'gold'"),
        (['verifier.labels=["gold"]', "verifier.kind=orm"], r"kind = 'orm' learns from none"),
        (['verifier.labels=["gold"]', "verifier.steps.pth=x"], r"'verifier\.steps\.pth' \(did you mean 'path'\?\)"),
        (["revision.verifier.steps.path=x"], "chains are labelled by their outcomes"),
    ],
)
def test_a_data_set_of_step_labels_that_nothing_reads_is_refused(overrides, said):
    with pytest.raises(InvalidConfig, match=said):
        load("arithmetic", ["verifier.steps.path=s.jsonl", *overrides])


@pytest.mark.parametrize("override", ["samples", "=3", "a..b=1", "loop.name.x=1"])
def test_bad_overrides_are_refused(config_file, override):
    with pytest.raises(InvalidConfig, match="--set"):
        load(config_file(MINIMAL), [override])


def test_difference_names_what_changed(config_file):
    old = load(config_file(MINIMAL))
    new = load(config_file(MINIMAL), ["search.samples=32", "loop.seed=1"])
    assert difference(old, new) == {"search.samples": (16, 32), "loop.seed": (0, 1)}


def test_the_schema_imports_nothing_heavy():
    heavy = "{'torch', 'mlflow', 'prefect', 'vllm', 'numpy'}"
    code = f"import sys, configs.load; print(*{heavy} & set(sys.modules))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.strip() == ""
