"""`ratchet eval --max-tokens`: one cap over all searches and all calls, and what it cut off is told."""

import json
import re
import shutil

import pytest

from configs import load
from flows import eval_run
from flows.evaluation import Request, evaluate_model
from search.engines.scripted import ScriptedEngine
from search.errors import ConfigError, EngineError
from search.results import read_results
from tests import engine_zoo


@pytest.fixture
def run(tmp_path):
    """Evaluate a scripted model with an oracle. Example: run(Request((4,), "majority"), noise=0.1)"""
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "scripted.json").write_text('{"skill": 0}')

    def run(request, *, noise, problems=30):
        data = {
            "loop": {"name": "mine"},
            "task": {"type": "countdown"},
            "model": {"base": "scripted"},
            "engine": {"type": "scripted", "accuracy": 0.4},
            "stages": {"in_process": True},
            "verifier": {"type": "oracle", "noise": noise},
        }
        model = str(tmp_path / "model")
        return evaluate_model(load.parse(data), tmp_path, model, "validation", problems, request, report=False)

    return run


@pytest.fixture
def generating(monkeypatch):
    """The tokens of every answer from then on. Example: generating(streaming=True) -> [12, 30, ...]"""
    load_engine, extend, tokens = eval_run.load_engine, ScriptedEngine.extend, []

    def counting(engine, requests):
        found = extend(engine, requests)
        tokens.extend(len(c.ids) for c in found)
        return found

    monkeypatch.setattr(ScriptedEngine, "extend", counting)

    def start(streaming, dies_after=10**9):
        def load(*args, **more):
            engine = load_engine(*args, **more)
            return engine_zoo.DyingStream(engine_zoo.Trickle(engine), dies_after) if streaming else engine

        monkeypatch.setattr(eval_run, "load_engine", load)
        return tokens

    return start


@pytest.fixture
def finished(tmp_path):
    """The tokens of all stored results."""
    cells = tmp_path / "mine" / "eval"
    return lambda: sum(
        r.spend.generated_tokens for path in cells.glob("*/cell.json") for r in read_results(path.parent)
    )


def test_a_cap_ends_cleanly_and_the_figures_say_of_how_many(run, capsys, finished):
    request = Request((4,), "greedy,majority,beam(width=2)", max_tokens=6000)
    found = run(request, noise=0.1, problems=60)
    assert 0 < finished() <= 6000
    assert found["n"] == 60
    lacking = {r["strategy"]: 60 - r["n"] for r in found["results"]}
    assert sum(lacking.values()) > 0
    message = capsys.readouterr().err
    assert re.search(rf"--max-tokens 6000: up to {max(lacking.values())} of 60 problems are left out", message)
    whole = run(Request((4,), request.strategies), noise=0.1, problems=60)
    assert all(r["n"] == 60 for r in whole["results"])
    assert whole["results"][0]["accuracy"] is not None


@pytest.mark.parametrize("streaming", [False, True])
def test_a_cap_holds_over_all_calls_and_what_it_cut_off_is_told(run, generating, streaming, capsys, finished):
    """One batch after another is drawn until the vote is sure: what is cut off in between was spent all the same."""
    strategies = "majority,adaptive_majority(certainty=0.9999, batch=2)"
    tokens = generating(streaming)
    for cap in (2000, 2000, 4000, 4000, 6000):
        found = run(Request((8,), strategies, max_tokens=cap), noise=0.1, problems=60)
        assert found["generated_tokens"] == sum(tokens) <= cap < 2 * sum(tokens)
        assert f"{sum(tokens)} tokens were generated, stored searches included" in capsys.readouterr().err
    whole = run(Request((8,), strategies), noise=0.1, problems=60)
    assert whole["unfinished"]["generated_tokens"] == sum(tokens) - finished() > 0
    again = run(Request((8,), strategies, max_tokens=1), noise=0.1, problems=60)
    assert again["generated_tokens"] == sum(tokens)
    assert "unfinished" not in run(Request((8,), strategies, fresh=True), noise=0.1, problems=60)


def test_what_an_interrupted_call_finished_counts_against_the_cap(run, generating):
    tokens = generating(True, dies_after=200)
    with pytest.raises(EngineError, match="the engine died"):
        run(Request((4,), "majority,beam(width=2)"), noise=0.1)
    lost = sum(tokens)
    tokens.clear()
    generating(True)
    found = run(Request((4,), "majority,beam(width=2)", max_tokens=4000), noise=0.1)
    assert 0 < sum(tokens) < found["generated_tokens"] <= min(4000, lost + sum(tokens))


def test_a_cap_that_buys_nothing_leaves_rows_without_figures(run):
    found = run(Request((4,), "majority", max_tokens=1), noise=0.1)
    (r,) = found["results"]
    assert (r["n"], r["accuracy"], r["gain"]) == (0, None, None)
    json.dumps(found, allow_nan=False)


def test_a_fit_counts_against_the_cap(run, tmp_path, capsys):
    strategy = "step_rejection(draws=4, threshold=fit)"
    run(Request((4,), strategy), noise=0.0)
    (path,) = tmp_path.glob("mine/eval/*/fit.json")
    tokens = json.loads(path.read_text())["tokens"]
    shutil.rmtree(tmp_path / "mine")
    cap = tokens + 300
    run(Request((4,), strategy, max_tokens=cap), noise=0.0)
    spent = sum(r.spend.generated_tokens for r in read_results(path.parent))
    assert json.loads(path.read_text())["tokens"] == tokens
    assert 0 < spent <= 300
    shutil.rmtree(tmp_path / "mine")
    capsys.readouterr()
    run(Request((4,), strategy, max_tokens=tokens // 2), noise=0.0)
    assert re.search(r"--max-tokens ended that after [1-4] of 5 thresholds", capsys.readouterr().err)
    with pytest.raises(ConfigError, match="does not let one threshold be tried on 100 problems"):
        run(Request((8,), strategy, max_tokens=50), noise=0.0)
