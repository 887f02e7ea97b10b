"""The difficulty stage: on an engine that offers no hidden states, and everything it reports and notices."""

import dataclasses
import json

import numpy as np
import pytest

from configs import load
from difficulty import predictor
from flows import predicting, rating, stages
from flows.predicting import difficulty
from flows.stages import Context
from search import stats
from search.engines import load_engine
from search.engines.transformers import TransformersEngine
from search.results import read_results
from search.sets import read_problems, write_problems
from search.tasks import load_task
from search.types import Capabilities, Problem


class NoStates:
    """Stands for vLLM, which shows no hidden states."""

    capabilities = Capabilities(token_ids=True, seeds=True)

    def __init__(self, engine: TransformersEngine) -> None:
        self.engine, self.facts, self.tokenizer = engine, engine.facts, engine.tokenizer

    def extend(self, requests):
        return self.engine.extend(requests)

    def close(self) -> None:
        self.engine.close()


@pytest.fixture
def settings(tiny_chat_model, tmp_path):
    path = tmp_path / "mine.jsonl"
    path.write_text(json.dumps({"question": "What is 1 + 1?", "answer": "2"}) + "\n")
    return load.parse(
        {
            "loop": {"name": "mine"},
            "task": {"type": "jsonl", "path": str(path), "answer_type": "text"},
            "model": {"base": str(tiny_chat_model), "dtype": "float32"},
            "engine": {"type": "vllm", "processes": 1},
            "sampling": {"max_new_tokens": 4},
            "difficulty": {"problems": 40, "samples": 2},
            "stages": {"threads": 1},
        }
    )


def test_states_come_from_transformers_where_the_engine_has_none(settings, tiny_chat_model, tmp_path, monkeypatch):
    drawn, states = [], []

    def sampling_engine(config, model, task, **given):
        assert not given.get("hidden_states")
        assert config.engine.type == "vllm"
        plain = config.model_copy(update={"engine": load.parse({**base, "engine": {"type": "transformers"}}).engine})
        drawn.append(NoStates(original(plain, model, task)))
        return drawn[-1]

    def states_engine(config, model, task, **given):
        states.append(original(config, model, task, **given))
        return states[-1]

    base = {"loop": {"name": "x"}, "task": {"type": "countdown"}}
    original = predicting.load_engine
    monkeypatch.setattr(stages, "load_engine", sampling_engine)
    monkeypatch.setattr(predicting, "load_engine", states_engine)
    sets = tmp_path / "sets"
    sets.mkdir()
    for name, num in (("fit", 40), ("validation", 20)):
        problems = [Problem(f"{name} {i}", f"What is {i} + {i}?", str(2 * i)) for i in range(num)]
        write_problems(problems, sets / f"{name}.jsonl")
    out = tmp_path / "out"
    out.mkdir()
    context = Context(settings, 1, lambda *_, **__: None)
    difficulty(context, {"problems": sets, "policy": tiny_chat_model}, out)
    assert len(drawn) == 1
    assert [type(engine) for engine in states] == [TransformersEngine]
    assert predictor.load(out).policy == states[0].facts.fingerprint
    assert json.loads((out / "report.json").read_text())["usable"] in (True, False)


# ---------------------------------------------------------------- with the scripted engine


@pytest.fixture
def scripted(tmp_path):
    """A smoke loop's inputs: problems, and a policy whose states show how likely it is to be right."""
    config = load.load("smoke", ["difficulty.problems=120", "difficulty.samples=8"])
    context = Context(config, 0, lambda *_, **__: None)
    for name in ("sets", "base", "out"):
        (tmp_path / name).mkdir()
    stages.problems(context, {}, tmp_path / "sets")
    stages.base(context, {"problems": tmp_path / "sets"}, tmp_path / "base")
    return context, {"problems": tmp_path / "sets", "policy": tmp_path / "base"}, tmp_path / "out"


def with_settings(context, **changes):
    settings = context.config.difficulty.model_copy(update=changes)
    return dataclasses.replace(context, config=context.config.model_copy(update={"difficulty": settings}))


def read(out):
    metrics = map(json.loads, (out / "metrics.jsonl").read_text().splitlines())
    return json.loads((out / "report.json").read_text()), {row["name"]: row["value"] for row in metrics}


def test_everything_is_reported_on_problems_it_was_not_fitted_to(scripted):
    context, inputs, out = scripted
    difficulty(context, inputs, out)
    report, metrics = read(out)
    assert (report["usable"], report["source"], report["n"]) == (True, "held out", 200)
    assert report["fitted"]["source"] == "out of fold"
    assert [tried["kind"] for tried in report["fitted"]["tried"]] == ["ridge", "mlp", "tokens"]
    wanted = (
        "spearman spearman_share spearman_ceiling brier ece auroc kind bin_agreement metadata_spearman strength flops"
    )
    assert {f"difficulty/{name}" for name in wanted.split()} <= set(metrics)
    assert metrics["difficulty/spearman_share"] == pytest.approx(report["share"])
    assert metrics["difficulty/spearman"] > metrics["difficulty/metadata_spearman"]
    assert sum(map(sum, report["bins"]["confusion"])) == 200
    assert predictor.load(out).usable


def test_search_asks_the_predictor_that_the_stage_left(scripted):
    context, inputs, out = scripted
    difficulty(context, inputs, out)
    problems = read_problems(inputs["problems"] / "validation.jsonl")
    predicted = rating.predict_rates(context.config, inputs | {"difficulty": out}, problems)
    assert len({*predicted.rates.values()}) > 100
    assert 0 < predicted.flops < 1000
    results = list(read_results(out / "pool-validation.jsonl"))
    truth = [sum(c.grade == "correct" for c in r.candidates) / len(r.candidates) for r in results]
    found = [predicted.rates[r.problem.key] for r in results]
    assert stats.spearman(found, truth) == pytest.approx(read(out)[0]["scores"]["spearman"])


def test_the_old_predictor_is_kept_where_it_is_better(scripted, tmp_path):
    context, inputs, out = scripted
    few = read_problems(inputs["problems"] / "fit.jsonl")[:60]
    poor = tmp_path / "poor"
    poor.mkdir()
    (tmp_path / "few").mkdir()
    write_problems(few, tmp_path / "few" / "fit.jsonl")
    write_problems(read_problems(inputs["problems"] / "validation.jsonl"), tmp_path / "few" / "validation.jsonl")
    difficulty(context, inputs, out)
    weak = with_settings(context, samples=1)
    difficulty(weak, inputs | {"problems": tmp_path / "few"}, poor)
    assert predictor.load(poor).fit_keys != predictor.load(out).fit_keys
    again = tmp_path / "again"
    again.mkdir()
    difficulty(context, inputs | {"problems": tmp_path / "few", "previous": out}, again)
    report, metrics = read(again)
    assert metrics["difficulty/kept_previous"] == 1.0
    assert metrics["difficulty/brier_previous"] == metrics["difficulty/brier"]
    assert predictor.load(again).fit_keys == predictor.load(out).fit_keys
    assert report["previous"]["scores"] == report["scores"]


def test_an_old_predictor_that_cannot_be_read_is_told_and_replaced(scripted, tmp_path):
    context, inputs, out = scripted
    old = tmp_path / "old"
    old.mkdir()
    difficulty(context, inputs | {"previous": old}, out)
    report, metrics = read(out)
    assert (report["usable"], metrics["difficulty/kept_previous"]) == (True, 0.0)
    assert "fit it again" in report["previous"]["why"]
    assert "difficulty/brier_previous" not in metrics


def test_what_cannot_be_fitted_ends_no_round(scripted):
    context, inputs, out = scripted
    difficulty(with_settings(context, predictors=("tokens",)), inputs, out)
    report, metrics = read(out)
    assert report["usable"] is False
    assert "nothing could be fitted: tokens: this engine does not show" in report["why"]
    assert metrics == {"difficulty/usable": 0.0}
    assert rating.predict_rates(context.config, inputs, []).why == "there is no difficulty predictor"


@pytest.mark.parametrize(
    ("broken", "why"),
    [
        ("constant", "all 200 predictions are"),
        ("nan", "have hidden states that are not finite"),
        ("answers", "made from the answers, not from the questions"),
    ],
)
def test_a_broken_predictor_is_noticed_and_all_questions_are_alike(scripted, monkeypatch, broken, why):
    """The states say nothing, are no numbers, or hold what the samples came to."""
    context, inputs, out = scripted
    original = predicting.load_engine

    def engine(*given, **named):
        found = original(*given, **named)
        rates = {
            r.prompt_ids: np.mean([c.grade == "correct" for c in r.candidates])
            for name in ("fit", "validation")
            for r in read_results(out / f"pool-{name}.jsonl")
        }
        values = {"constant": lambda _: 1.0, "nan": lambda _: np.nan, "answers": lambda ids: rates[tuple(ids)]}[broken]
        found.hidden_states = lambda prompts: np.array(
            [[[[values(ids), 0.0]] * 2] for ids in prompts], dtype=np.float32
        )
        return found

    monkeypatch.setattr(predicting, "load_engine", engine)
    difficulty(with_settings(context, predictors=("ridge",)), inputs, out)
    report, metrics = read(out)
    assert (report["usable"], metrics["difficulty/usable"]) == (False, 0.0)
    assert why in report["why"]
    assert why in rating.predict_rates(context.config, inputs | {"difficulty": out}, []).why


def test_prompts_that_show_the_answer_are_noticed(scripted):
    context, inputs, out = scripted
    difficulty(context, inputs, out)
    results = list(read_results(out / "pool-validation.jsonl"))
    task, engine = load_task(context.config), load_engine(context.config, inputs["policy"] / "model", None)
    reading = predicting._Reading(context.config, inputs["policy"], task, engine)
    assert reading.label(results).revealing == ""
    shown = [dataclasses.replace(r, prompt_ids=(*r.prompt_ids, *r.candidates[0].ids)) for r in results]
    assert "200 prompts are not made of the question alone, first that of" in reading.label(shown).revealing
