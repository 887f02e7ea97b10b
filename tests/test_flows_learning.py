"""What a stage hands to selection and training."""

import json
import sys
from types import ModuleType

import pytest

from configs import load
from flows.learning import distill, select
from flows.stages import Context
from search.results import write_results
from search.tasks import load_task
from search.tasks.splits import split_of
from search.types import Candidate, Finish, Grade, Problem, SearchResult, Spend


def silent(*_, **__) -> None:
    pass


def result(problem: Problem, text: str) -> SearchResult:
    candidate = Candidate((*text.encode(), 256), text, Finish.EOS, answer=text, grade=Grade.CORRECT)
    return SearchResult(problem, "best_of_n(1)", (candidate,), 0, Spend(), "model", "seed", prompt_ids=(7,))


@pytest.fixture
def inputs(tmp_path):
    """A round's folders; its search found one answer that also solves a held-out problem, and some that do not."""
    config = load.load("smoke", ["select.min_rows=1"])
    task = load_task(config)
    clean: list[SearchResult] = []
    leaky: list[SearchResult] = []
    for problem in task.draw("train", 400, stream="x"):
        text = task.solve(problem)
        others = {key for key in task.solved_keys(problem, text) if split_of(key, config.splits) != "train"}
        (leaky if others else clean).append(result(problem, text))
    assert leaky
    folders = {name: tmp_path / name for name in ("problems", "search", "reference", "base")}
    for folder in folders.values():
        folder.mkdir()
    (folders["problems"] / "held_out.json").write_text("[]")
    for name in ("search", "fit", "validation", "gate", "test"):
        (folders["problems"] / f"{name}.jsonl").write_text("")
    write_results([*leaky, *clean[: len(leaky)]], folders["search"] / "shard-00000.jsonl")
    return config, folders, {r.problem.key for r in leaky}


def test_neither_a_round_nor_its_control_shows_a_held_out_solution(inputs, tmp_path):
    config, folders, leaky = inputs
    out, control = folders["reference"], tmp_path / "control"
    control.mkdir()
    given = {"problems": folders["problems"], "base": folders["base"], "search@001": folders["search"]}
    select(Context(config, 1, silent), given, out)
    select(Context(config, 1, silent, "random"), {**given, "reference": out}, control)
    for folder in (out, control):
        keys = {json.loads(line)["key"] for line in (folder / "rows.jsonl").open()}
        assert keys
        assert not keys & leaky
        counts = json.loads((folder / "counts.json").read_text())
        assert counts["solves_held_out"] == len(leaky)


@pytest.mark.parametrize(
    ("engine", "device"),
    [
        ({"type": "transformers", "device": "cpu"}, "cpu"),
        ({"type": "transformers", "device": "cuda:1"}, "cuda:1"),
        ({"type": "transformers"}, "auto"),
        ({"type": "vllm"}, "auto"),
    ],
)
def test_training_runs_where_the_engine_is_told_to(monkeypatch, tmp_path, engine, device):
    told = []
    fake = ModuleType("distill.sft")
    fake.train = lambda *_, device, **__: told.append(device)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "distill.sft", fake)
    config = load.parse({"loop": {"name": "x"}, "task": {"type": "countdown"}, "engine": engine})
    distill(Context(config, 1, silent), {"base": tmp_path, "policy": tmp_path, "rows": tmp_path}, tmp_path)
    assert told == [device]
