"""Verifiers that rounds train: what is refused at load and why, adapters, facts, and a search that uses one."""

import json
import math
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from configs.load import load as load_config
from configs.schema import Model, VerifierRuntime
from search.errors import ModelError
from search.policy import steps_of
from search.tasks import load_task
from search.types import Problem, Scored, ScoreRequest
from search.verifiers import load_verifier
from search.verifiers.card import READOUT, Card
from search.verifiers.trained import Trained
from tests.scripted_search import LineTask, StepEngine, run_all
from tests.verifier_kit import Reference, Sums, answers, build_model, question, save_verifier, step


def load(folder: Path, task: Any = None) -> Trained:
    return Trained(task or Sums(), folder, VerifierRuntime(device="cpu"), Model())


def card(folder: Path, **changes: Any) -> None:
    replace(Card.load(folder), **changes).save(folder)


def other_labels(folder: Path) -> None:
    model = build_model("llama", tokens=111, classifier=True)
    model.num_labels = model.config.num_labels = 3
    model.score = torch.nn.Linear(32, 3)
    model.save_pretrained(folder / "model")


def causal_model(folder: Path) -> None:
    build_model("llama", tokens=111).save_pretrained(folder / "model")


def small_vocabulary(folder: Path) -> None:
    build_model("llama", tokens=50, classifier=True).save_pretrained(folder / "model")


def narrow_model(folder: Path) -> None:
    build_model("llama", tokens=111, hidden_size=64).save_pretrained(folder / "model")


def no_end(folder: Path) -> None:
    path = folder / "model" / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"eos_token": None}))


def no_weights(folder: Path) -> None:
    (folder / "model" / "model.safetensors").unlink()


def adapter_without_base(folder: Path) -> None:
    (folder / "model" / "adapter_config.json").write_text("{}")


@pytest.mark.parametrize(
    ("readout", "spoil", "reason"),
    [
        ("scalar", lambda f: card(f, delimiter="\n\n"), r"trained on steps that end with '\\n\\n'.*end with '\\n'"),
        ("scalar", other_labels, "has 3 labels, but ours have one"),
        ("scalar", causal_model, "its model lacks score"),
        ("generative", lambda f: card(f, readout="scalar"), "its model lacks score"),
        ("scalar", lambda f: card(f, readout="generative"), "its model lacks lm_head"),
        ("scalar", small_vocabulary, "has 111 tokens, but its model only 54"),
        ("generative", narrow_model, "does not fit its model"),
        ("generative", lambda f: (f / READOUT).unlink(), "does not fit its model"),
        ("scalar", no_end, "has no EOS token"),
        ("scalar", no_weights, "holds no weights"),
        ("scalar", adapter_without_base, "names no base"),
        ("scalar", lambda f: (f / "verifier.json").write_text("{}"), "does not describe a verifier"),
        ("scalar", lambda f: (f / "model").rename(f / "other"), "model is missing"),
    ],
)
def test_what_does_not_fit_is_refused_with_the_reason(
    tmp_path, readout: str, spoil: Callable[[Path], object], reason: str
) -> None:
    folder = save_verifier(tmp_path / "v", readout)
    load(folder)
    spoil(folder)
    with pytest.raises(ModelError, match=reason):
        load(folder)


def test_a_tokenizer_that_does_not_know_the_delimiter_is_refused(tmp_path) -> None:
    folder = save_verifier(tmp_path / "v", delimiter=";")
    with pytest.raises(ModelError, match="does not know its step delimiter ';'"):
        load(folder, Sums(step_delimiter=";"))


def facts(folder: Path) -> Any:
    return load(folder).facts


def test_facts_count_what_a_token_passes_and_name_everything_that_decides(tmp_path) -> None:
    generative = save_verifier(tmp_path / "generative")
    scalar = save_verifier(tmp_path / "scalar", "scalar", "orm", aggregation="last")
    layers = 2 * (32 * 32 * 2 + 32 * 16 * 2 + 32 * 64 * 3 + 2 * 32) + 32
    assert facts(generative).flops_parameters == layers + 115 * 32 + 2 * 33
    assert facts(scalar).flops_parameters == layers + 33
    assert (facts(generative).process, facts(generative).aggregation) == (True, "prod")
    assert (facts(scalar).process, facts(scalar).aggregation) == (False, "last")
    names = {facts(generative).fingerprint, facts(scalar).fingerprint}
    for change in ({"scale": 2.0}, {"aggregation": "min"}, {"history": True}):
        card(generative, **change)
        names.add(facts(generative).fingerprint)
    save_verifier(tmp_path / "other", seed=1)
    (tmp_path / "other" / READOUT).rename(generative / READOUT)
    names.add(facts(generative).fingerprint)
    assert len(names) == 6
    assert {len(name) for name in names} == {16}


@pytest.mark.parametrize("readout", ["generative", "scalar"])
def test_an_adapter_scores_as_the_whole_model_it_makes(tmp_path, readout: str) -> None:
    """Its base is a language model, as a policy's is: a scalar head comes with the adapter."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoModelForTokenClassification

    base = save_verifier(tmp_path / "base") / "model"
    folder, whole = save_verifier(tmp_path / "adapter", readout), save_verifier(tmp_path / "whole", readout)
    scalar = readout == "scalar"
    kind: Any = AutoModelForTokenClassification if scalar else AutoModelForCausalLM
    torch.manual_seed(4)
    model = kind.from_pretrained(base, **({"num_labels": 1} if scalar else {}))
    targets = ["q_proj", "o_proj", "down_proj"]
    settings = LoraConfig(task_type="TOKEN_CLS" if scalar else "CAUSAL_LM", r=4, target_modules=targets)
    adapted: Any = get_peft_model(model, settings)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name or "score" in name:
            torch.nn.init.normal_(parameter, std=0.5)
    shutil.rmtree(folder / "model")
    adapted.save_pretrained(folder / "model")
    card(folder, base=str(base))
    adapted.merge_and_unload().save_pretrained(whole / "model")

    reference, requests = Reference(whole), answers(3, 3)
    plain = Reference(base.parent)
    for scored, request in zip(load(folder).score(requests), requests, strict=True):
        assert scored.scores == pytest.approx(reference.scores(request), abs=1e-5)
        assert scored.scores != pytest.approx(plain.scores(request), abs=1e-2)
    fingerprint = facts(folder).fingerprint
    moved = base.rename(tmp_path / "moved")
    card(folder, base=str(moved))
    assert facts(folder).fingerprint == fingerprint
    card(folder, base=str(base))
    with pytest.raises(ModelError, match="there is no model folder"):
        load(folder)


def test_an_adapter_without_its_scalar_head_is_refused(tmp_path) -> None:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    base = save_verifier(tmp_path / "base") / "model"
    folder = save_verifier(tmp_path / "adapter", "scalar", base=str(base))
    model = AutoModelForCausalLM.from_pretrained(base)
    shutil.rmtree(folder / "model")
    adapted: Any = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear"))
    adapted.save_pretrained(folder / "model")
    with pytest.raises(ModelError, match="its model lacks score"):
        load(folder)


def test_a_round_loads_what_it_trained_and_has_none_before(tmp_path) -> None:
    config = load_config("countdown", ['verifier.type="trained"', 'verifier.device="cpu"'])
    task = load_task(config)
    assert load_verifier(config, task) is None
    folder = save_verifier(tmp_path / "v", delimiter=task.step_delimiter)
    verifier = load_verifier(config, task, trained=folder)
    assert isinstance(verifier, Trained)
    problem = Problem("1,2>3", "1 2 > 3", "3", {"numbers": [1, 2], "target": 3})
    scored = verifier.score([ScoreRequest(problem, ("1+2=3\n", ""))])[0]
    assert len(scored.scores) == 2
    assert all(0 < score < 1 for score in scored.scores)


class SumTask(LineTask):
    """What a search sees of the verifier kit's task."""

    def prompt(self, problem: Problem) -> str:
        return Sums().prompt(problem)


class Watched:
    """A verifier, and what it was asked."""

    def __init__(self, verifier: Trained) -> None:
        self.facts, self.verifier = verifier.facts, verifier
        self.asked: list[ScoreRequest] = []

    def score(self, requests: Sequence[ScoreRequest]) -> list[Scored]:
        self.asked += requests
        return self.verifier.score(requests)


@pytest.mark.parametrize("strategy", ["beam(width=2)", "lookahead(width=2)", "dvts(width=2)", "best_of_n"])
def test_a_search_reads_every_step_of_its_tree_once(tmp_path, strategy: str) -> None:
    """The scores that it keeps are those of a full pass, and the spend is what was computed."""
    folder = save_verifier(tmp_path / "v")
    verifier, reference = Watched(load(folder)), Reference(folder)

    def script(prompt: str, written: str, temperature: float, key: int) -> str:
        return step(prompt, key) if written.count("\n") < 3 else ("7=7", "")[key % 2]

    results = run_all(strategy, 8, StepEngine(script), [question(n) for n in range(3)], verifier, task=SumTask())
    for result in results:
        assert result.failed is None
        assert result.selected is not None
        finished = [c for c in result.candidates if c.complete]
        assert finished
        for candidate in finished:
            request = ScoreRequest(result.problem, steps_of(candidate, "\n"))
            assert candidate.step_scores == pytest.approx(reference.scores(request), abs=1e-5)
            assert candidate.score == pytest.approx(math.prod(candidate.step_scores))
    read: dict[tuple[str, tuple[str, ...]], int] = {}  # tokens of each node of the trees
    for request in verifier.asked:
        for n, piece in enumerate(reference.pieces(request)):
            read[request.problem.key, request.steps[:n]] = len(piece)
    spent = sum(result.spend.verifier_tokens for result in results)
    assert spent == sum(read.values())
    asked = sum(reference.num_tokens(request) for request in verifier.asked)
    assert spent < (0.8 if strategy == "best_of_n" else 0.5) * asked  # whole answers share their prompts only


def test_a_search_depends_on_no_earlier_one(tmp_path) -> None:
    verifier = load(save_verifier(tmp_path / "v"))

    def script(prompt: str, written: str, temperature: float, key: int) -> str:
        return step(prompt, key) if written.count("\n") < 3 else "7=7"

    def run() -> list[Any]:
        asked = [question(n) for n in range(2)]
        return [r.to_json() for r in run_all("beam(width=2)", 4, StepEngine(script), asked, verifier, task=SumTask())]

    assert run() == run()
