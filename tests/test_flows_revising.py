"""The reviser stage from stored answers to a part of the bundle, on a tiny untrained model."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from configs import load
from configs.schema import Config
from distill.bootstrap import build_model
from flows.revising import reviser
from flows.stages import Context
from search.results import read_results, write_results
from search.sets import write_problems
from search.tasks import load_task
from search.tasks.tokenizer import build_tokenizer
from search.types import Candidate, Finish, Grade, Problem, SearchResult, Spend
from search.verifiers.card import Card

SETTINGS = [
    "engine.processes=1",
    "stages.threads=1",
    "bootstrap.hidden_size=32",
    "bootstrap.layers=1",
    "bootstrap.heads=1",
    "revision.enabled=true",
    "revision.problems=4",
    "revision.samples=2",
    "revision.per_answer=4",
    "revision.checkpoints=2",
    "revision.turns=2",
    "revision.compared_problems=8",
    "revision.train.epochs=1",
    "revision.train.batch_size=8",
    "revision.train.micro_batch_size=8",
    "revision.train.learning_rate=0.001",
]


def settings(*more: str) -> Config:
    return load.load("countdown", [*SETTINGS, *more])


def quiet(*args: object, **kwargs: object) -> None:
    """No progress."""


def sample(text: str, tokenizer, *, right: bool) -> Candidate:
    grade = Grade.CORRECT if right else Grade.WRONG
    return Candidate((*tokenizer.encode(text), tokenizer.eos_token_id), text, Finish.EOS, answer=text, grade=grade)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> dict[str, Path]:
    """Sets of problems, an untrained policy, and a search that found a right and two wrong answers to each."""
    folder, config = tmp_path_factory.mktemp("inputs"), settings()
    task, tokenizer = load_task(config), build_tokenizer()
    places = {name: folder / name for name in ("problems", "policy", "base", "pools", "search@001")}
    for place in places.values():
        place.mkdir()
    for name in ("policy", "base"):
        build_model(config.bootstrap, tokenizer, seed=0).save_pretrained(places[name] / "model")
        tokenizer.save_pretrained(places[name] / "model")
    sizes = {"fit": 8, "validation": 8, "gate": 4, "test": 4}
    drawn = {name: task.draw(name, num, stream=name) for name, num in sizes.items()}
    drawn["labels"] = drawn["search"] = task.draw("train", 12, stream="search")
    for name, problems in drawn.items():
        write_problems(problems, places["problems"] / f"{name}.jsonl")
    write_results([searched(task, tokenizer, p) for p in drawn["search"]], places["search@001"] / "shard-00000.jsonl")
    return places


def searched(task, tokenizer, problem: Problem) -> SearchResult:
    texts = {task.solve(problem): True, "1+1=2\n2+1=3": False, "2*1=2\n2*2=4": False}
    samples = tuple(sample(text, tokenizer, right=right) for text, right in texts.items())
    return SearchResult(problem, "pool(3)", samples, 0, Spend(), "model", "seed", prompt_ids=(5,))


def run(inputs: dict[str, Path], out: Path, *more: str) -> dict:
    out.mkdir(exist_ok=True)
    reviser(Context(settings(*more), 1, quiet), inputs, out)
    return json.loads((out / "report.json").read_text())


def read_lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def metrics(out: Path) -> dict[str, float]:
    return {row["name"]: row["value"] for row in read_lines(out / "metrics.jsonl")}


NO_VERIFIER = ("revision.verified=false",)


def test_a_reviser_is_trained_chosen_and_measured(inputs, tmp_path):
    report = run(inputs, tmp_path / "out", *NO_VERIFIER)
    assert report["usable"]
    assert report["rows"] > 20
    steps = -(-report["rows"] // 8)
    assert set(report["checkpoints"]) == {f"step-{steps // 2:06d}", "end"}
    best = max(report["checkpoints"].values(), key=lambda found: found["revised"])
    assert report["checkpoints"][report["chosen"]] == best
    assert (tmp_path / "out" / "model" / "model.safetensors").is_file()
    found = metrics(tmp_path / "out")
    assert found["revision/usable"] == 1
    for name in ("accuracy_turn_1", "accuracy_turn_4", "sequential_majority", "parallel_majority", "gain_majority"):
        assert f"revision/{name}" in found
    assert {len(r.candidates) for r in read_results(tmp_path / "out" / "sequential")} == {4}
    spend = json.loads((tmp_path / "out" / "spend.json").read_text())
    assert spend["generated_tokens"] > 0


def test_only_right_answers_are_trained_on_and_prompts_are_those_of_search(inputs, tmp_path):
    run(inputs, tmp_path / "out", *NO_VERIFIER)
    task, tokenizer = load_task(settings()), build_tokenizer()
    rows = read_lines(tmp_path / "out" / "rows.jsonl")
    for row in rows:
        question = row["key"] + "\n"
        prompt = tokenizer.decode(row["prompt_ids"])
        assert prompt.endswith(question)
        assert prompt.count(question) == 1
        text = tokenizer.decode(row["completion_ids"][:-1])
        (graded,) = task.grade([(task.parse(row["key"].replace(",", " ")), text)])
        assert graded.grade is Grade.CORRECT


def test_the_verifier_of_chains_reads_the_attempts(inputs, tmp_path, monkeypatch):
    solve_some(monkeypatch)
    some = (
        "problems=12",
        "verifier.problems=12",
        "verifier.samples=16",
        "verifier.epochs=1",
        "verifier.validation=0.4",
    )
    report = run(inputs, tmp_path / "out", "revision.turns=4", *(f"revision.{setting}" for setting in some))
    assert report["verifier"] == {"usable": True, "training": report["verifier"]["training"]}
    card = Card.load(tmp_path / "out" / "verifier")
    assert (card.kind, card.history) == ("orm", True)
    rows = read_lines(tmp_path / "out" / "examples.jsonl")
    assert {len(row.get("attempts", ())) for row in rows} >= {0, 1}
    assert {row["outcome"] for row in rows} == {True, False}
    trained_on = {row["key"] for row in read_lines(tmp_path / "out" / "rows.jsonl")}
    asked = {result.problem.key for result in read_results(tmp_path / "out" / "chains-train")}
    assert len(asked) == 6
    assert not asked & trained_on  # there it would be right too often
    assert "revision/gain_verifier" in metrics(tmp_path / "out")
    assert json.loads((tmp_path / "out" / "spend.json").read_text())["verifier_tokens"] > 0


def test_the_reviser_in_use_stays_where_it_is_as_good(inputs, tmp_path):
    """An untrained model solves nothing: all are equal, and the one in use comes first."""
    report = run({**inputs, "previous": inputs["policy"]}, tmp_path / "out", *NO_VERIFIER)
    assert report["chosen"] == "previous"
    assert not report["usable"]
    assert "before it" in report["reason"]
    assert metrics(tmp_path / "out")["revision/kept_previous"] == 1


def test_nothing_to_learn_is_no_failure_of_the_round(inputs, tmp_path):
    few = {name: path for name, path in inputs.items() if not name.startswith("search@")}
    report = run(few, tmp_path / "out", *NO_VERIFIER)
    assert not report["usable"]
    assert "no trainable token" in report["reason"]
    assert metrics(tmp_path / "out") == {"revision/usable": 0.0}


def test_an_interrupted_stage_does_not_train_again(inputs, tmp_path, monkeypatch):
    class Killed(BaseException):
        pass

    def kill(*args, **kwargs):
        raise Killed

    whole = run(inputs, tmp_path / "whole", *NO_VERIFIER)
    with monkeypatch.context() as patched:
        patched.setattr("flows.revising._compare", kill)
        with pytest.raises(Killed):
            run(inputs, tmp_path / "cut", *NO_VERIFIER)
        patched.undo()
        patched.setattr("distill.sft.train", kill)
        assert run(inputs, tmp_path / "cut", *NO_VERIFIER) == whole
    same = "model/model.safetensors"
    assert (tmp_path / "cut" / same).read_bytes() == (tmp_path / "whole" / same).read_bytes()


def solve_some(monkeypatch) -> None:
    """Some answers of an untrained model are called right, so that there is something to verify."""
    from search import run as searching

    grade = searching.grade

    def generous(task, problems, candidates_P_N):
        graded = grade(task, problems, candidates_P_N)
        return [
            [replace(c, grade=Grade.CORRECT) if c.complete and n % 2 else c for n, c in enumerate(row)]
            for row in graded
        ]

    monkeypatch.setattr(searching, "grade", generous)
