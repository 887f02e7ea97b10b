"""The difficulty stage on an engine that offers no hidden states."""

import json

import pytest

from configs import load
from difficulty import predictor
from flows import predicting, stages
from flows.predicting import difficulty
from flows.stages import Context
from search.engines.transformers import TransformersEngine
from search.sets import write_problems
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
