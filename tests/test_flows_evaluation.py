"""`ratchet eval`: what is searched, what is shared, kept and reused, and what the rows say."""

import itertools
import json
import os
from dataclasses import replace

import pytest

from configs import load
from flows import eval_run, evaluation
from flows.eval_store import Store
from flows.evaluation import Request, evaluate_model, plan
from flows.state import Loop
from search import run as search_run
from search.errors import BudgetError, ConfigError, EngineError, LockedError
from search.results import read_results
from search.types import VerifierFacts
from search.verifiers import load_verifier
from tests import engine_zoo

PROCESS, OUTCOME = VerifierFacts("v", 0), VerifierFacts("v", 0, process=False)
BOTH = Request((1, 4), "greedy,pass,majority")


@pytest.fixture
def scripted(tmp_path):
    """A scripted model on countdown, in this process. Example: scripted(noise=0.2) has an oracle with noise."""
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "scripted.json").write_text('{"skill": 0}')
    data = {
        "loop": {"name": "mine"},
        "task": {"type": "countdown"},
        "model": {"base": "scripted"},
        "engine": {"type": "scripted", "accuracy": 0.4},
        "stages": {"in_process": True},
    }

    def make(noise=None, **more):
        verifier = {} if noise is None else {"verifier": {"type": "oracle", "noise": noise}}
        return load.parse(data | verifier | more)

    return make


@pytest.fixture
def run(tmp_path, scripted):
    """Evaluate it. Example: run(Request((4,), "majority"), noise=0.1)"""

    def run(request, *, problems=30, split="validation", report=False, config=None, **more):
        config = config or scripted(**more)
        return evaluate_model(config, tmp_path, str(tmp_path / "model"), split, problems, request, report=report)

    return run


@pytest.fixture
def searched(monkeypatch):
    """The names of the cells that are searched, in order, and the problems of each."""
    calls = []
    search = search_run.search

    def recording(problems, plan, *args, **more):
        calls.append((plan.name, len(problems)))
        return search(problems, plan, *args, **more)

    monkeypatch.setattr(search_run, "search", recording)
    return calls


def rows(found):
    return {(r["strategy"], r["budget"]): r for r in found["results"]}


def by_cell(tmp_path):
    """Name of the cell -> its folder."""
    folders = (p.parent for p in (tmp_path / "mine" / "eval").glob("*/cell.json"))
    return {json.loads((f / "cell.json").read_text())["name"]: f for f in folders}


# ---------------------------------------------------------------- what is planned


@pytest.mark.parametrize(
    ("facts", "expected"),
    [
        (None, ["greedy", "pass", "majority"]),
        (OUTCOME, ["greedy", "pass", "majority", "best_of_n", "best_of_n_weighted"]),
        (
            PROCESS,
            [
                "greedy",
                "pass",
                "majority",
                "best_of_n",
                "best_of_n_weighted",
                "beam",
                "dvts",
                "rebase",
                "step_rejection",
            ],
        ),
    ],
    ids=["no verifier", "of answers", "of steps"],
)
def test_default_strategies_are_those_that_the_verifier_allows(facts, expected):
    assert list(dict.fromkeys(item.spec.text for item in plan(Request((16,)), facts))) == expected


def test_what_a_budget_cannot_buy_is_left_out_with_a_line(capsys):
    items = plan(Request((1, 4), "majority,beam,beam(width=2)"), PROCESS)
    named = [(i.spec.text, i.budget.amount) for i in items]
    assert named == [("majority", 1), ("majority", 4), ("beam", 4), ("beam(width=2)", 4)]
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2
    assert lines[0].startswith("left out: beam at 1: 1 samples are no multiple of width 4")
    with pytest.raises(BudgetError, match="no multiple of width 4"):
        plan(Request((1, 2), "beam"), PROCESS)


def test_a_strategy_without_its_verifier_is_a_clear_error():
    with pytest.raises(ConfigError, match="beam needs a verifier"):
        plan(Request((4,), "majority,beam"), None)
    with pytest.raises(ConfigError, match="needs a verifier"):
        plan(Request((4,), "majority(vote=weighted)"), None)
    with pytest.raises(ConfigError, match="scores steps"):
        plan(Request((4,), "beam"), OUTCOME)
    with pytest.raises(ConfigError, match="--unit hours: expected samples, tokens or flops"):
        plan(Request((4,), unit="hours"), None)


@pytest.mark.parametrize(
    ("strategy", "unit", "rule"),
    [
        ("majority", "samples", "majority"),
        ("best_of_n(vote=sharpened)", "samples", "sharpened"),
        ("best_of_n(samples=2)", "samples", None),
        ("best_of_n_weighted(samples=4)", "tokens", None),
        ("beam", "samples", None),
        ("adaptive_majority", "samples", None),
    ],
)
def test_only_plain_samples_come_from_the_pool(strategy, unit, rule):
    (item,) = plan(Request((16,), strategy, unit), PROCESS)
    assert item.rule == rule


# ---------------------------------------------------------------- what is searched and shared


def test_independent_samples_share_one_pool_that_is_scored_once(run, searched, tmp_path):
    found = run(Request((1, 4), "greedy,pass,majority,best_of_n,best_of_n_weighted,beam(width=2)"), noise=0.1)
    assert sorted(searched) == [("beam(width=2) @ 4", 30), ("greedy @ 1", 30), ("pool(4)", 30)]
    names = ("pass", "majority", "best_of_n", "best_of_n_weighted")
    assert list(rows(found)) == [("greedy", 1), *((n, k) for n in names for k in (1, 4)), ("beam(width=2)", 4)]
    assert {*by_cell(tmp_path)} == {"greedy @ 1", "4 samples", "scores of 4 samples", "beam(width=2) @ 4"}
    by_row = rows(found)
    assert by_row["majority", 4]["spend"]["verifier_tokens"] == 0
    assert by_row["best_of_n", 4]["spend"]["verifier_tokens"] > by_row["best_of_n", 1]["spend"]["verifier_tokens"] > 0
    assert by_row["best_of_n", 4]["spend"]["generated_tokens"] == by_row["pass", 4]["spend"]["generated_tokens"]
    assert found["unit"] == "samples"


def test_a_perfect_verifier_finds_every_right_answer_of_the_pool(run):
    by_row = rows(run(Request((1, 4, 16), "pass,majority,best_of_n"), noise=0.0, problems=60))
    for k in (1, 4, 16):
        assert by_row["best_of_n", k]["accuracy"] == pytest.approx(by_row["pass", k]["accuracy"])
    best = by_row["best_of_n", 16]
    assert best["gain"]["over"] == "majority"
    assert best["gain"]["value"] == pytest.approx(best["accuracy"] - by_row["majority", 16]["accuracy"])


def test_a_pool_is_what_best_of_n_would_have_drawn(run, tmp_path):
    run(Request((4,), "majority,adaptive_majority(certainty=0.9999,batch=4)"))
    cells = by_cell(tmp_path)
    pool, searched = (
        [[c.text for c in r.candidates] for r in read_results(cells[name])]
        for name in ("4 samples", "adaptive_majority(certainty=0.9999, batch=4) @ 4")
    )
    assert pool == searched


def test_other_units_search_for_real(run, searched):
    found = run(Request((400, 800), "greedy,majority(samples=8)", unit="tokens"))
    assert [(r["strategy"], r["budget"]) for r in found["results"]] == [
        ("greedy", 1),
        ("majority(samples=8)", 400),
        ("majority(samples=8)", 800),
    ]
    assert ("majority(samples=8) @ 400 tokens", 30) in searched
    for r in found["results"][1:]:
        assert r["spend"]["generated_tokens"] <= r["budget"] * r["n"]


def test_one_search_serves_all_votes_on_it(run, searched):
    found = rows(run(Request((4,), "beam(width=2),beam(width=2, vote=majority)"), noise=0.3))
    assert searched == [("beam(width=2) @ 4", 30)]
    first, second = found["beam(width=2)", 4], found["beam(width=2, vote=majority)", 4]
    assert first["spend"] == second["spend"]


# ---------------------------------------------------------------- what is kept


def test_the_same_again_searches_nothing(run, searched, capsys):
    request = Request((1, 4), "greedy,majority,best_of_n,beam(width=2)")
    first = run(request, noise=0.1)
    capsys.readouterr()
    del searched[:]
    assert run(request, noise=0.1) == first
    assert searched == []
    assert "4 of 4 searches are there already" in capsys.readouterr().err
    again = run(Request((1, 4), request.strategies, fresh=True), noise=0.1)
    assert len(searched) == 3
    for r in [*again["results"], *first["results"]]:
        del r["wall_s"]
    assert again == first


def test_more_budgets_draw_only_what_lacks(run, searched, tmp_path):
    small = run(Request((1, 4), "majority,best_of_n"), noise=0.1)
    both = run(Request((1, 4, 16), "majority,best_of_n"), noise=0.1)
    assert searched == [("pool(4)", 30), ("pool(4+12)", 30)]
    del searched[:]
    once = run(Request((1, 4, 16), "majority,best_of_n"), noise=0.1, config=None, problems=30)
    assert once == both
    again = run(Request((1, 4), "majority,best_of_n"), noise=0.1)
    assert again == small
    assert searched == []


def test_a_pool_in_blocks_has_the_figures_of_one_drawn_whole(run, tmp_path, scripted):
    run(Request((4,), "majority"))
    blocks = run(Request((1, 4, 16), "pass,majority"))
    other = scripted(loop={"name": "other"})
    whole = run(Request((1, 4, 16), "pass,majority"), config=other)
    for a, b in zip(blocks["results"], whole["results"], strict=True):
        assert a["accuracy"] == b["accuracy"]
        for name in ("samples", "generated_tokens", "flops_ideal"):
            assert a["spend"][name] == pytest.approx(b["spend"][name])


@pytest.mark.parametrize(
    "change",
    [
        {"noise": 0.2},
        {"sampling": {"temperature": 0.5}},
        {"loop": {"name": "mine", "seed": 1}},
        {"task": {"type": "countdown", "max_numbers": 4}},
        {"engine": {"type": "scripted", "accuracy": 0.5}},
    ],
    ids=["verifier", "sampling", "seed", "problems", "engine"],
)
def test_results_of_other_settings_are_never_used(run, searched, change):
    request = Request((4,), "best_of_n,beam(width=2)")
    run(request, noise=0.1)
    first = list(searched)
    run(request, **({"noise": 0.1} | change))
    drawn = [name for name, _ in searched[len(first) :]]
    assert "beam(width=2) @ 4" in drawn
    assert ("pool(4)" in drawn) == (
        "noise" not in change
    )  # samples know no verifier; their scores are new all the same


def test_another_model_is_searched_anew(run, searched, tmp_path):
    run(BOTH)
    (tmp_path / "model" / "scripted.json").write_text('{"skill": 1}')
    del searched[:]
    run(BOTH)
    assert sorted(searched) == [("greedy @ 1", 30), ("pool(4)", 30)]


def test_fresh_samples_forget_all_scores_of_the_old_ones(run, tmp_path):
    run(Request((4,), "majority,best_of_n"), noise=0.1)
    scores = by_cell(tmp_path)["scores of 4 samples"]
    assert list(scores.glob("shard-*"))
    run(Request((4,), "majority", fresh=True))  # asks no verifier
    assert not list(scores.glob("shard-*"))


def test_an_interrupted_evaluation_goes_on(run, searched, tmp_path, monkeypatch):
    request = Request((4,), "majority,beam(width=2)")
    whole = run(request, noise=0.1, config=None)
    for folder in by_cell(tmp_path).values():
        (folder / "result.json").unlink(missing_ok=True)
    shard = by_cell(tmp_path)["beam(width=2) @ 4"] / "shard-00000.jsonl"
    kept = shard.read_text()
    shard.write_text("".join(kept.splitlines(keepends=True)[:12]))
    del searched[:]
    again = run(request, noise=0.1)
    assert searched == [("beam(width=2) @ 4", 18)]
    assert shard.read_text() == kept
    assert [r["accuracy"] for r in again["results"]] == [r["accuracy"] for r in whole["results"]]


def test_a_streaming_engine_that_dies_loses_nothing_that_was_finished(run, searched, tmp_path, monkeypatch):
    load_engine = eval_run.load_engine
    request = Request((4,), "majority,beam(width=2)")
    monkeypatch.setattr(
        eval_run, "load_engine", lambda *a, **m: engine_zoo.DyingStream(engine_zoo.Trickle(load_engine(*a, **m)), 200)
    )
    with pytest.raises(EngineError, match="the engine died"):
        run(request, noise=0.1)
    (partial,) = (tmp_path / "mine" / "eval").glob("*/*.partial")
    kept = len(partial.read_text().splitlines())
    assert 0 < kept < 30
    del searched[:]
    monkeypatch.setattr(eval_run, "load_engine", lambda *a, **m: engine_zoo.Trickle(load_engine(*a, **m)))
    resumed = run(request, noise=0.1)
    assert sum(num for _, num in searched) == 30 - kept
    assert not list((tmp_path / "mine" / "eval").glob("*/*.partial"))
    monkeypatch.setattr(eval_run, "load_engine", load_engine)
    whole = run(Request((4,), request.strategies, fresh=True), noise=0.1)
    assert [r["accuracy"] for r in resumed["results"]] == [r["accuracy"] for r in whole["results"]]


def test_two_evaluations_of_a_loop_do_not_run_at_once(run, tmp_path, monkeypatch):
    from flows.locks import lock

    (tmp_path / "mine" / "eval").mkdir(parents=True)
    with lock(tmp_path / "mine" / "eval" / ".lock", "an evaluation"), pytest.raises(LockedError, match="an evaluation"):
        run(BOTH)


# ---------------------------------------------------------------- failures, fits, reports


def test_a_failed_problem_counts_as_not_solved_and_is_told(run, monkeypatch):
    class Broken(load_verifier(load.load("smoke", ["verifier.type=oracle"]), None).__class__):
        def score(self, requests):
            scored = super().score(requests)
            bad = requests[0].problem.key
            return [
                s.__class__((float("nan"),) * len(s.scores)) if r.problem.key == bad else s
                for r, s in zip(requests, scored, strict=True)
            ]

    def load_broken(config, task, inputs):
        return Broken(task, config.verifier, seed=0)

    monkeypatch.setattr(eval_run, "load_chosen_verifier", load_broken)
    by_row = rows(run(Request((4,), "majority,best_of_n,beam(width=2)"), noise=0.0))
    assert by_row["majority", 4]["failed"] == 0
    assert by_row["best_of_n", 4]["failed"] == 1
    assert by_row["beam(width=2)", 4]["failed"] >= 1
    assert by_row["best_of_n", 4]["n"] == 30
    assert "nan" in by_row["best_of_n", 4]["failed_reason"]
    assert by_row["best_of_n", 4]["accuracy"] <= 29 / 30


def test_a_threshold_is_fitted_once_on_other_problems(run, tmp_path, capsys):
    request = Request((4,), "step_rejection(draws=4, threshold=fit)")
    found = run(request, noise=0.0)
    (path,) = tmp_path.glob("mine/eval/*/fit.json")
    fitted = json.loads(path.read_text())
    assert f"threshold {fitted['threshold']:g}, fitted on 100 other problems for {fitted['tokens']} tokens" in (
        capsys.readouterr().err
    )
    assert len(fitted["tried"]) == 5
    by_hand = run(Request((4,), f"step_rejection(draws=4, threshold={fitted['threshold']})"), noise=0.0)
    assert found["results"][0]["accuracy"] == by_hand["results"][0]["accuracy"]
    path.write_text(json.dumps(fitted | {"marked": True}))
    run(request, noise=0.0)
    assert json.loads(path.read_text())["marked"]  # not fitted again
    run(Request((4,), request.strategies, fresh=True), noise=0.0)
    assert json.loads(path.read_text()) == fitted


def test_a_fit_leaves_no_engine_in_the_process_that_forks_afterwards(run, tmp_path, monkeypatch):
    load_engine, pids = eval_run.load_engine, []

    def loading(*args, **more):
        pids.append(os.getpid())
        with (tmp_path / "pids").open("a") as file:
            file.write(f"{os.getpid()}\n")
        return load_engine(*args, **more)

    monkeypatch.setattr(eval_run, "load_engine", loading)
    run(Request((4,), "step_rejection(draws=4, threshold=fit)"), noise=0.0)
    in_fit, in_search = map(int, (tmp_path / "pids").read_text().split())
    assert in_fit != os.getpid()
    assert pids == [in_search] == [os.getpid()]


def test_the_report_is_drawn(run, tmp_path, capsys):
    run(Request((1, 4), "greedy,pass,majority,beam(width=2)"), noise=0.1, report=True)
    (folder,) = (tmp_path / "mine").glob("eval-*")
    assert (folder / "strategies.png").read_bytes().startswith(b"\x89PNG")
    told = capsys.readouterr().err
    assert f"report: {folder / 'strategies.png'}" in told
    assert f"report: {folder / 'optimal.html'}" in told
    assert (folder / "optimal.html").read_text(encoding="utf-8").lower().lstrip().startswith("<!doctype html>")


def test_too_few_problems_have_no_compute_optimal_report(run, tmp_path, capsys):
    found = run(Request((1, 4), "majority,beam(width=2)"), noise=0.1, report=True, problems=10)
    assert "optimal" not in found
    assert "no compute-optimal report: it needs 20 problems" in capsys.readouterr().err


def test_each_verifier_has_a_report_of_its_own(run, tmp_path):
    for noise in (None, 0.1, 0.2, 0.1):
        run(Request((4,), "majority"), noise=noise, report=True)
    start = f"eval-{tmp_path / 'model'}-validation".replace("/", "_")
    names = sorted(path.name for path in (tmp_path / "mine").glob("eval-*"))
    assert names == [start, f"{start}-oracle-0.1-0", f"{start}-oracle-0.2-0"]


def test_a_look_at_the_test_set_is_counted_whatever_the_model(run, tmp_path):
    run(BOTH, split="test")  # there is no loop yet
    loop = Loop.open(tmp_path, "mine", task="countdown")
    loop.save()
    run(BOTH)
    assert Loop.open(tmp_path, "mine").state.test_looks == 0
    run(BOTH, split="test")
    assert Loop.open(tmp_path, "mine").state.test_looks == 1
    with loop.lock("a round"), pytest.raises(LockedError, match="a round"):
        run(BOTH, split="test")


def test_progress_tells_problems_tokens_and_steps(scripted, tmp_path, monkeypatch):
    told = []
    monkeypatch.setattr(evaluation, "_bar", lambda what: _bar(told))
    config, request = scripted(noise=0.1), Request((4,), "majority,beam(width=2)")
    evaluate_model(config, tmp_path, str(tmp_path / "model"), "validation", 30, request, report=False)
    done, total, info = told[-1]
    assert done == total == 30 * 8
    assert info["problems"] == "60/60"  # of both searches
    assert all(a[0] <= b[0] and a[2]["tokens"] <= b[2]["tokens"] for a, b in itertools.pairwise(told))
    assert info["steps"] > 30 * 4


def test_scores_of_samples_that_are_there_are_shared_and_seen(run, scripted, tmp_path, monkeypatch):
    run(Request((4,), "majority"), noise=0.1)
    told = []
    monkeypatch.setattr(evaluation, "_bar", lambda what: _bar(told))
    run(Request((4,), "best_of_n"), noise=0.1)
    done, total, _ = told[-1]
    assert 0 < done == total < 30 * 4 / 10
    config = scripted(noise=0.1)
    store = Store(tmp_path / "two", config, tmp_path / "model", "validation", [], 2)
    block = replace(store.pool(4)[0], shard_problems=5)
    assigned = eval_run.assign(eval_run.shards_of([store.scores(block, "v")], 30), 2)
    assert [len(shards) for shards in assigned] == [3, 3]


def test_progress_tells_the_fit_too(scripted, tmp_path, monkeypatch):
    told = []
    monkeypatch.setattr(evaluation, "_bar", lambda what: _bar(told))
    config, request = scripted(noise=0.1), Request((4,), "step_rejection(draws=4, threshold=fit)")
    evaluate_model(config, tmp_path, str(tmp_path / "model"), "validation", 30, request, report=False)
    fitting = [row for row in told if row[2]["what"].startswith("fitting step_rejection")]
    assert len(fitting) > 5
    assert told[: len(fitting)] == fitting
    assert told[-1][:2] == (30 * 4 + 5 * 100 * 4,) * 2
    assert all(a[0] <= b[0] and a[2]["tokens"] <= b[2]["tokens"] for a, b in itertools.pairwise(told))


class _bar:
    def __init__(self, told):
        self.told = told

    def __enter__(self):
        return lambda done, total, **info: self.told.append((done, total, info))

    def __exit__(self, *raised):
        pass
