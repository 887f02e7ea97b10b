"""The verifier stage from stored answers to a part of the bundle, on a tiny untrained model."""

import json
import math
import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from configs import load
from configs.schema import Config, TrainedVerifier
from distill.bootstrap import build_model
from distill.labels import read_examples
from flows import gold_steps, verifying
from flows.stages import Context, problems
from flows.verifying import score_answers, verifier
from search.errors import DataError
from search.results import read_results, write_results
from search.sets import read_problems, write_problems
from search.tasks import load_task
from search.tasks.tokenizer import build_tokenizer
from search.types import Candidate, Finish, Grade, Problem, Scored, SearchResult, Spend, VerifierFacts
from search.verifiers import describe, load_verifier
from search.verifiers.card import Card
from search.verifiers.health import Health

SETTINGS = [
    "engine.processes=1",
    "stages.threads=1",
    "bootstrap.hidden_size=32",
    "bootstrap.layers=1",
    "bootstrap.heads=1",
    "verifier.type=trained",
    'verifier.labels=["gold"]',
    "verifier.problems=4",
    "verifier.samples=2",
    "verifier.rollouts=2",
    "verifier.batch_size=8",
    "verifier.micro_batch_size=8",
    "verifier.optimizer=muon",
    "verifier.learning_rate=0.02",
    "verifier.epochs=40",
    "verifier.validation=0.25",
    "verifier.checks=2",
]


def settings(*more: str) -> Config:
    return load.load("arithmetic", [*SETTINGS, *more])


def quiet(*args: object, **kwargs: object) -> None:
    """No progress."""


def spoilt(right: str) -> str:
    """The answer with a wrong first step."""
    first, newline, rest = right.partition("\n")
    return first.rpartition("=")[0] + "=0" + newline + rest


def answered(task, tokenizer, problem: Problem, right: str | None = None) -> SearchResult:
    """The right answer twice, and one whose first step is wrong."""
    right = right or task.solve(problem)
    wrong = spoilt(right)
    texts = [(right, True), (right, True), (wrong, wrong == right)]

    def sample(text: str, correct: bool) -> Candidate:
        grade = Grade.CORRECT if correct else Grade.WRONG
        ids = (*tokenizer.encode(text), tokenizer.eos_token_id)
        return Candidate(ids, text, Finish.EOS, answer=text.rpartition("=")[2], grade=grade)

    samples = tuple(sample(*pair) for pair in texts)
    prompt = tuple(tokenizer.encode(task.prompt(problem)))
    return SearchResult(problem, "pool(3)", samples, 0, Spend(), "model", "seed", prompt_ids=prompt)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> dict[str, Path]:
    """Sets of problems, an untrained policy, a search of training problems, and pools of held-out ones."""
    folder, config = tmp_path_factory.mktemp("inputs"), settings()
    task, tokenizer = load_task(config), build_tokenizer()
    places = {name: folder / name for name in ("problems", "policy", "base", "pools", "search@001")}
    for place in places.values():
        place.mkdir()
    for name in ("policy", "base"):
        build_model(config.bootstrap, tokenizer, seed=0).save_pretrained(places[name] / "model")
        tokenizer.save_pretrained(places[name] / "model")
    sizes = {"fit": 12, "validation": 12, "gate": 4, "test": 4}
    drawn = {name: task.draw(name, num, stream=name) for name, num in sizes.items()}
    drawn |= {name: task.draw("train", 30, stream=name) for name in ("labels", "search")}
    for name, some in drawn.items():
        write_problems(some, places["problems"] / f"{name}.jsonl")

    def answers(name: str) -> list[SearchResult]:
        return [answered(task, tokenizer, problem) for problem in drawn[name]]

    # a held-out problem among the searched ones must not be learnt from
    write_results([*answers("search"), *answers("test")], places["search@001"] / "shard-00000.jsonl")
    for name in ("fit", "validation"):
        write_results(answers(name), places["pools"] / f"pool-{name}.jsonl")
    return places


def run(inputs: dict[str, Path], out: Path, *more: str) -> dict:
    out.mkdir(exist_ok=True)
    verifier(Context(settings(*more), 1, quiet), inputs, out)
    return json.loads((out / "report.json").read_text())


def metrics(out: Path) -> dict[str, float]:
    rows = map(json.loads, (out / "metrics.jsonl").read_text().splitlines())
    return {row["name"]: row["value"] for row in rows}


@pytest.fixture(scope="module")
def made(inputs, tmp_path_factory) -> tuple[Path, dict]:
    out = tmp_path_factory.mktemp("made") / "verifier"
    return out, run(inputs, out)


def test_a_verifier_is_trained_and_measured(inputs, made):
    out, report = made
    figures = metrics(out)
    assert report["usable"]
    assert figures["verifier/usable"] == 1
    assert figures["verifier/auc_within"] > 0.5, "a first step with a wrong result is easy to tell"
    assert figures["verifier/problems"] == 12
    assert Health.from_json(json.loads((out / "health.json").read_text())).figures["auc_within"].value > 0.5
    assert (out / "health.png").stat().st_size > 10_000
    assert Card.load(out).policy == "model"
    spend = json.loads((out / "spend.json").read_text())
    assert spend["generated_tokens"] > 0, "fresh answers of the winner"
    assert spend["verifier_tokens"] >= report["training"]["trained_tokens"]
    assert spend["verifier_flops_ideal"] <= spend["flops_ideal"]


def test_only_training_and_fit_problems_are_learnt_from(inputs, made):
    out, _ = made
    seen = {example.problem.key for example in read_examples(out / "examples.jsonl")}
    searched = {r.problem.key for r in read_results(inputs["search@001"])}
    fit = {r.problem.key for r in read_results(inputs["pools"] / "pool-fit.jsonl")}
    test = {json.loads(line)["key"] for line in (inputs["problems"] / "test.jsonl").read_text().splitlines()}
    assert not seen & test
    assert fit <= seen
    assert searched - test <= seen
    assert json.loads((out / "labels.json").read_text())["held_out"] == 3 * len(test)


def test_the_verifier_before_is_measured_on_the_same_answers(inputs, made, tmp_path):
    out, _ = made
    report = run(inputs | {"previous": out}, tmp_path / "next", "verifier.epochs=1")
    figures = metrics(tmp_path / "next")
    before = metrics(out)["verifier/auc_within"]
    assert figures["verifier/auc_within_previous"] == pytest.approx(before)
    assert report["compared"]["verdict"] in ("better", "not worse", "unclear", "worse")
    assert report["usable"] == (report["compared"]["verdict"] != "worse")


def test_what_got_worse_is_not_used(inputs, made, tmp_path, monkeypatch):
    out, _ = made
    found = verifying.compare

    def worse(old, new):
        return found(old, new).__class__(None, found(old, new).brier, 0.02, "worse")

    monkeypatch.setattr(verifying, "compare", worse)
    report = run(inputs | {"previous": out}, tmp_path / "next", "verifier.epochs=1")
    assert not report["usable"]
    assert "worse" in report["reason"]
    assert metrics(tmp_path / "next")["verifier/usable"] == 0


def test_rollouts_make_labels_and_values(inputs, tmp_path):
    config, out = settings(), tmp_path / "out"
    task, tokenizer = load_task(config), build_tokenizer()
    drawn = read_problems(inputs["problems"] / "labels.jsonl")[:4]
    (out / "pool-labels").mkdir(parents=True)  # as an interrupted stage leaves it
    write_results([answered(task, tokenizer, p) for p in drawn], out / "pool-labels" / "shard-00000.jsonl")
    report = run(inputs, out, 'verifier.labels=["rollouts", "gold"]', "verifier.epochs=1")
    assert "training" in report
    counts = json.loads((out / "labels.json").read_text())
    assert counts["rollouts"] > 0
    assert counts["examples/rollouts"] > 0
    assert counts["examples/gold"] > 0
    assert any(read_results(out / "values")), "steps of held-out answers are valued for the health"


# ---------------------------------------------------------------- step labels from a data set


def labelled_rows(task, problems) -> list[dict]:
    """A right and a wrong solution of each, as a data set holds them: without delimiters, or labels after an error."""
    rows = []
    for problem in problems:
        right = task.solve(problem)
        for text in (right, spoilt(right)):
            steps = text.split("\n")
            labels = [True] * len(steps) if text == right else [False, *[None] * (len(steps) - 1)]
            rows.append({"question": problem.question, "steps": steps, "labels": labels})
    return rows


def write_rows(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_step_labels_of_a_data_set_join_those_of_answers(inputs, tmp_path):
    """Arithmetic checks its steps itself, too; and what solves a held-out problem is learnt from nowhere."""
    task = load_task(settings())
    others = task.draw("train", 40, stream="elsewhere")
    held_out = [*read_problems(inputs["problems"] / "validation.jsonl")[:3], task.draw("gate", 1, stream="new")[0]]
    rows = [*labelled_rows(task, [*others, *held_out]), {"question": "five", "steps": ["5"], "labels": [1]}]
    more = ['verifier.labels=["tree", "gold"]', "verifier.epochs=4"]
    more.append(f"verifier.steps.path={write_rows(tmp_path / 'labelled.jsonl', rows)}")
    sets = Path(shutil.copytree(inputs["problems"], tmp_path / "problems"))
    config = settings(*more)
    assert isinstance(config.verifier, TrainedVerifier)
    assert config.verifier.steps is not None
    rejected, figures = gold_steps.freeze(Context(config, 1, quiet), config.verifier.steps, task, sets)
    assert [(row.line, "no chain of operations" in row.reason) for row in rejected] == [(len(rows), True)]
    assert (figures["data/steps_held_out"], figures["data/steps_rejected"]) == (8, 1)
    report = run(inputs | {"problems": sets}, tmp_path / "out", *more)
    examples = list(read_examples(tmp_path / "out" / "examples.jsonl"))
    found = Counter(example.source for example in examples)
    assert found["data"] == figures["data/steps_kept"] == report["steps"]["kept"] > 60
    assert found["tree"] == found["gold"] > 0
    counts = json.loads((tmp_path / "out" / "labels.json").read_text())
    assert {name: counts[f"examples/{name}"] for name in found} == dict(found)
    assert not {e.problem.key for e in examples} & {p.key for p in held_out}
    assert report["usable"]


def test_a_task_that_checks_no_step_learns_from_a_data_set_alone(tmp_path):
    """A whole stage: the policy's answers are measured, and none is drawn to be labelled."""
    chains = load_task(settings("task.max_operations=3"))
    drawn = {p.question: p for p in chains.draw("train", 70, stream="mine")}
    file = write_rows(tmp_path / "mine.jsonl", [{"question": q, "answer": p.answer} for q, p in drawn.items()])
    elsewhere = [*chains.draw("train", 80, stream="elsewhere"), *drawn.values()]
    data = write_rows(tmp_path / "labelled.jsonl", labelled_rows(chains, elsewhere))
    tokenizer, config = build_tokenizer(), settings()
    build_model(config.bootstrap, tokenizer, seed=0).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    task = {"type": "jsonl", "path": str(file), "answer_type": "number", "prompt": "plain", "step_delimiter": "\n"}
    verifier_settings = config.verifier.model_dump() | {"labels": ["gold"], "steps": {"path": str(data)}, "epochs": 8}
    config = load.parse(
        {
            "loop": {"name": "mine"},
            "task": task,
            "model": {"base": str(tmp_path / "model")},
            "engine": config.engine.model_dump(),
            "stages": {"threads": 1},
            "sampling": {"max_new_tokens": 8},
            "splits": {"train": 0.4, "fit": 0.1, "validation": 0.3, "gate": 0.1, "test": 0.1},
            "verifier": verifier_settings,
        }
    )
    context = Context(config, 0, quiet)
    places = {name: tmp_path / name for name in ("problems", "pools", "out")}
    for place in places.values():
        place.mkdir()
    problems(context, {}, places["problems"])
    assert not (places["problems"] / "labels.jsonl").exists()
    own = load_task(config)
    for name in ("fit", "validation"):
        sets = read_problems(places["problems"] / f"{name}.jsonl")
        found = [answered(own, tokenizer, p, chains.solve(drawn[p.question])) for p in sets]
        write_results(found, places["pools"] / f"pool-{name}.jsonl")
    verifier(context, {**places, "policy": tmp_path, "base": tmp_path}, places["out"])
    report = json.loads((places["out"] / "report.json").read_text())
    assert report["usable"], report
    assert metrics(places["out"])["verifier/auc_within"] > 0.9
    assert not (places["out"] / "pool-labels.jsonl").exists()
    steps = report["steps"]
    assert json.loads((places["out"] / "labels.json").read_text()) == {"examples/data": steps["kept"]}
    assert steps["held_out"] > 0
    held_out = json.loads((places["problems"] / "held_out.json").read_text())
    assert not {e.problem.key for e in read_examples(places["out"] / "examples.jsonl")} & set(held_out)
    assert metrics(places["problems"])["data/steps_held_out"] == steps["held_out"]


def test_a_data_set_that_cannot_be_used_ends_the_round_at_its_start(tmp_path):
    config = settings("verifier.steps.path=nowhere.jsonl", "difficulty.problems=20", "evaluate.test_problems=500")
    with pytest.raises(DataError, match=r"nowhere\.jsonl cannot be read"):
        problems(Context(config, 0, quiet), {}, tmp_path)


def test_nothing_to_learn_from_keeps_the_old_one(inputs, tmp_path):
    empty = tmp_path / "empty"
    (empty / "pools").mkdir(parents=True)
    write_results([], empty / "pools" / "pool-fit.jsonl")
    (empty / "pools" / "pool-validation.jsonl").write_bytes((inputs["pools"] / "pool-validation.jsonl").read_bytes())
    given = {name: path for name, path in inputs.items() if not name.startswith("search@")}
    report = run(given | {"pools": empty / "pools"}, tmp_path / "out")
    assert not report["usable"]
    assert "answer" in report["reason"]
    assert metrics(tmp_path / "out") == {"verifier/usable": 0.0}


def test_a_policy_that_answers_nothing_ends_no_round(inputs, tmp_path):
    empty = tmp_path / "pools"
    empty.mkdir()
    (empty / "pool-fit.jsonl").write_bytes((inputs["pools"] / "pool-fit.jsonl").read_bytes())
    drawn = list(read_results(inputs["pools"] / "pool-validation.jsonl"))
    cut = [r.with_candidates([replace(c, finish=Finish.LENGTH) for c in r.candidates]) for r in drawn]
    write_results(cut, empty / "pool-validation.jsonl")
    report = run(inputs | {"pools": empty}, tmp_path / "out", "verifier.epochs=1")
    assert not report["usable"]
    assert "measured" in report["reason"]


@pytest.mark.parametrize("more", [(), ("verifier.type=pretrained", "verifier.format=ratchet", "verifier.path={}")])
def test_a_described_verifier_is_the_loaded_one(made, more):
    out, _ = made
    config = load.load("arithmetic", [text.format(out) for text in more]) if more else settings()
    task = load_task(config)
    loaded = load_verifier(config, task, trained=None if more else out)
    told = describe(config, task, trained=None if more else out)
    assert loaded is not None
    assert told is not None
    assert (loaded.facts.process, loaded.facts.aggregation) == (told.process, told.aggregation)


def test_equal_answers_are_read_once(inputs):
    class Counting:
        facts = VerifierFacts("counting", 10, aggregation="prod")
        read = 0

        def score(self, requests):
            self.read += len(requests)
            return [Scored((0.5,) * len(r.steps), tokens=7, computed_tokens=7) for r in requests]

    task, counting = load_task(settings()), Counting()
    pool = list(read_results(inputs["pools"] / "pool-validation.jsonl"))
    scored, spend = score_answers(pool, counting, task)
    distinct = {(r.problem.key, c.text) for r in pool for c in r.candidates}
    assert counting.read == len(distinct)
    assert spend.verifier_tokens == 7 * len(distinct)
    assert spend.flops_ideal == 2 * 10 * 7 * len(distinct)
    for result in scored:
        for candidate in result.candidates:
            assert candidate.score == pytest.approx(math.prod(candidate.step_scores))


def test_what_the_verifier_cannot_read_has_no_score(inputs):
    class Refusing:
        facts = VerifierFacts("refusing", 10)

        def score(self, requests):
            read = [Scored((0.5,) * len(r.steps)) for r in requests]
            return [
                Scored((), unscored="too long") if "=0" in r.steps[0] else one
                for r, one in zip(requests, read, strict=True)
            ]

    pool = list(read_results(inputs["pools"] / "pool-validation.jsonl"))
    scored, _ = score_answers(pool, Refusing(), load_task(settings()))
    refused = [c for r in scored for c in r.candidates if c.unscored]
    assert refused
    assert all((c.score, c.step_scores, c.unscored) == (None, (), "too long") for c in refused)
    assert all(c.score == 0.5 for r in scored for c in r.candidates if not c.unscored)
