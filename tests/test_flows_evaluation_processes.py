"""`ratchet eval` searches as a round does: in a process of its own, shared among the cores."""

import json
from pathlib import Path

import pytest

from configs import load
from flows.evaluation import Request, evaluate_model
from search.errors import DataError, StageFailed

BOTH = Request((1, 4), "greedy,pass,majority")


@pytest.fixture
def config_of(tmp_path, tiny_chat_model):
    """The configuration of a file task with the tiny chat model. Example: config_of(processes=2)"""
    lines = [json.dumps({"question": f"What is {i} plus {i}?", "answer": str(2 * i)}) for i in range(600)]
    (tmp_path / "q.jsonl").write_text("\n".join(lines) + "\n")
    data = {
        "loop": {"name": "mine"},
        "task": {"type": "jsonl", "path": str(tmp_path / "q.jsonl"), "grader_workers": 1},
        "model": {"base": str(tiny_chat_model), "dtype": "float32"},
        "engine": {"type": "transformers", "device": "cpu"},
        "sampling": {"max_new_tokens": 8},
        "stages": {"threads": 2},
    }

    def make(**engine):
        return load.parse(data | {"engine": data["engine"] | engine})

    return make


@pytest.fixture(autouse=True)
def own_temporary_folder(tmp_path, monkeypatch):
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "tmp"))


def test_any_number_of_processes_gives_the_same_figures(config_of, tiny_chat_model, tmp_path):
    one, two = (
        evaluate_model(config_of(processes=num), runs, str(tiny_chat_model), "validation", 30, BOTH, report=False)
        for num, runs in ((1, tmp_path / "one"), (2, tmp_path / "two"))
    )
    for row in [*one["results"], *two["results"]]:
        assert row.pop("wall_s") > 0
    assert one == two
    assert one["n"] == 30
    assert [(r["strategy"], r["budget"]) for r in one["results"]] == [
        ("greedy", 1),
        ("pass", 1),
        ("pass", 4),
        ("majority", 1),
        ("majority", 4),
    ]
    assert list((tmp_path / "tmp").glob("ratchet-eval-*")) == []


def test_a_failure_leaves_the_log_that_it_names(config_of, tiny_chat_model, tmp_path):
    config = config_of()
    broken = config.model_copy(update={"stages": config.stages.model_copy(update={"timeout_s": 1})})
    with pytest.raises(StageFailed, match=r"stage eval was stopped after 1 s .*; see (\S+log.txt)") as caught:
        evaluate_model(broken, tmp_path, str(tiny_chat_model), "validation", 30, BOTH, report=False)
    log = str(caught.value).partition("see ")[2].partition(" ")[0]
    assert Path(log).is_file()


def test_a_split_without_problems_is_an_error(config_of, tiny_chat_model, tmp_path):
    config = config_of()
    lines = (tmp_path / "q.jsonl").read_text().splitlines()[:1]
    (tmp_path / "q.jsonl").write_text(lines[0] + "\n")
    splits = config.splits.model_copy(update={"train": 1.0, "validation": 0.0, "fit": 0.0, "gate": 0.0, "test": 0.0})
    alone = config.model_copy(update={"splits": splits})
    with pytest.raises(DataError, match="--split validation: the task has no problem in it"):
        evaluate_model(alone, tmp_path, str(tiny_chat_model), "validation", 5, BOTH, report=False)
