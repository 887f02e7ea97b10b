"""The search stage of a round: any strategy after a few plain samples; a control that draws plain samples alone."""

import asyncio
import json
import math
from dataclasses import replace

import pytest

from configs import load
from difficulty.labels import count_samples
from flows import stages
from flows.searching import check, equal_flops, is_plain, round_plan, search
from flows.stages import Context, base
from search.engines.scripted import ScriptedEngine
from search.errors import BudgetError, ConfigError
from search.results import read_results
from search.sets import write_problems
from search.tasks import load_task
from search.types import Candidate, Finish, Problem, Scored, Spend, VerifierFacts

BEAM = ("search.strategy=beam(width=2)", "verifier.type=oracle")


def config(*overrides: str):
    return load.load("smoke", ["search.problems=12", "search.shard_problems=5", *overrides])


@pytest.fixture
def run(tmp_path):
    """Runs the search stage of round 1 and returns its folder. Example: run("search.samples=6")"""

    def work(*overrides, name="search", context=None, inputs=None, progress=lambda *_, **__: None):
        settings = config(*overrides)
        sets = tmp_path / "sets"
        sets.mkdir(exist_ok=True)
        write_problems(load_task(settings).draw("train", 12, stream="x"), sets / "search.jsonl")
        policy = tmp_path / "base"
        policy.mkdir(exist_ok=True)
        base(Context(settings, 0, progress), {}, policy)
        out = tmp_path / name
        out.mkdir(exist_ok=True)
        given = {"problems": sets, "policy": policy / "model", **(inputs or {})}
        search(replace(context or Context(settings, 1, progress), config=settings), given, out)
        return out

    return work


def figures(out) -> dict[str, float]:
    return {row["name"]: row["value"] for row in map(json.loads, (out / "metrics.jsonl").open())}


def spend_of(out) -> Spend:
    return Spend(**json.loads((out / "spend.json").read_text()))


# ---------------------------------------------------------------- what is run


@pytest.mark.parametrize(
    ("overrides", "name"),
    [
        ((), "best_of_n(8)"),
        (("search.strategy=best_of_n(samples=6)",), "best_of_n(6)"),
        (("search.strategy=majority",), "majority(8)"),
        (("search.strategy=best_of_n_weighted", "verifier.type=oracle"), "best_of_n_weighted(8)"),
        (BEAM, "plain(4) + beam(width=2) @ 4"),
        (("search.strategy=adaptive_majority", "search.probe_samples=2"), "plain(2) + adaptive_majority @ 6"),
    ],
)
def test_the_configured_strategy_follows_the_plain_samples(overrides, name):
    assert round_plan(config(*overrides)).name == name
    check(config(*overrides))


@pytest.mark.parametrize(
    ("overrides", "error", "message"),
    [
        (("search.strategy=baem",), ConfigError, r"no strategy 'baem': did you mean beam\?"),
        (("search.strategy=beam(wdith=2)", BEAM[1]), ConfigError, "no option 'wdith=2'"),
        ((BEAM[0],), ConfigError, "needs a verifier: set verifier.type"),
        (("search.strategy=best_of_n_weighted",), ConfigError, "best_of_n_weighted needs a verifier"),
        (("search.strategy=beam(width=3)", BEAM[1]), BudgetError, r"has 4 of search.samples = 8.*give 3 samples"),
        ((*BEAM, "search.probe_samples=8"), BudgetError, "search.samples = 8 leaves .* nothing beside"),
        (("search.strategy=majority(samples=2)",), BudgetError, "fewer than search.probe_samples = 4"),
    ],
)
def test_what_cannot_be_run_is_refused_with_exit_code_2(overrides, error, message):
    with pytest.raises(error, match=message) as caught:
        check(config(*overrides))
    assert caught.value.exit_code == 2


def test_rounds_are_refused_on_a_server():
    settings = load.parse({"loop": {"name": "x"}, "task": {"type": "countdown"}, "engine": {"type": "server"}})
    with pytest.raises(ConfigError, match=r"serves one policy.*'transformers' or 'vllm'"):
        check(settings)


def test_which_searches_drew_plain_samples_alone():
    assert is_plain("best_of_n", "none")
    assert is_plain("majority", "oracle"), "it does not ask the verifier"
    assert is_plain("best_of_n", "oracle"), "a round chooses by gold answers"
    assert not is_plain("best_of_n_weighted", "oracle"), "the verifier costs"
    assert not is_plain("majority(vote=highest)", "oracle"), "its vote asks the verifier"
    assert not is_plain("beam(width=2)", "oracle")
    assert not is_plain("adaptive_majority", "none"), "when it stops depends on what it drew"


# ---------------------------------------------------------------- the stage


def test_plain_samples_come_first_and_are_those_of_best_of_n(run):
    pool = list(read_results(run(name="pool")))
    searched = list(read_results(run(*BEAM, name="beam")))
    assert [r.problem.key for r in searched] == [r.problem.key for r in pool]
    for one, other in zip(searched, pool, strict=True):
        assert one.candidates[:4] == other.candidates[:4]
        assert all(not c.step_ends for c in one.candidates[:4])
        assert len(one.candidates) > 4
        assert all(c.step_ends and c.score is not None for c in one.candidates[4:])
        assert one.spend.samples == other.spend.samples == 8
    labels = count_samples(searched, 4)
    assert labels.totals_P.tolist() == [4] * 12
    assert labels.successes_P.tolist() == count_samples(pool, 4).successes_P.tolist()


def test_the_spend_holds_plain_samples_strategy_and_verifier(run):
    out = run(*BEAM, "verifier.parameters=500")
    results = list(read_results(out))
    total = spend_of(out)
    assert total == sum((r.spend for r in results), Spend())
    assert total.samples == 8 * 12
    plain = sum(len(c.ids) for r in results for c in r.candidates[:4])
    assert total.generated_tokens > plain
    assert 0 < total.verifier_flops_ideal < total.flops_ideal


def test_answers_are_chosen_by_gold_and_every_finished_one_is_a_candidate(run):
    results = list(read_results(run(*BEAM, "verifier.noise=1.0")))  # a verifier that is always wrong
    assert any(c.grade == "correct" for r in results for c in r.candidates)
    for r in results:
        right = [i for i, c in enumerate(r.candidates) if c.grade == "correct"]
        assert r.selected == (right[0] if right else None)


def test_where_nothing_is_graded_the_strategy_chooses():
    plan = round_plan(config(*BEAM))
    texts = [("a", 0.2), ("b", 0.9), ("a", 0.3)]
    ungraded = [Candidate((1,), a, Finish.EOS, answer=a, score=s) for a, s in texts]
    assert plan.rule(ungraded) == 1
    unscored = [replace(c, score=None) for c in ungraded]
    assert plan.rule(unscored) is None
    assert round_plan(config()).rule(unscored) == 0, "without a verifier, by majority"


def test_the_cap_leaves_problems_unfinished_and_says_so(run):
    whole = run(name="whole")
    out = run("search.max_tokens=700", name="capped")
    assert spend_of(out).generated_tokens <= 700
    outcomes = json.loads((out / "outcomes.json").read_text())
    told = figures(out)
    assert 0 < len(outcomes) < 12
    assert told["search/problems"] == len(outcomes)
    assert told["search/unfinished"] == 12 - len(outcomes)
    assert told["search/failed"] == 0
    everything = json.loads((whole / "outcomes.json").read_text())
    assert outcomes == {key: everything[key] for key in outcomes}


@pytest.mark.parametrize("cap", [300, 500, 700, 1000])
def test_the_cap_holds_for_what_was_thrown_away_too(run, monkeypatch, cap):
    generated = []
    extend = ScriptedEngine.extend

    def counting(self, requests):
        found = extend(self, requests)
        generated.extend(len(c.ids) for c in found)
        return found

    monkeypatch.setattr(ScriptedEngine, "extend", counting)
    out = run(*BEAM, f"search.max_tokens={cap}", "search.shard_problems=1")
    assert 0 < sum(generated) <= cap
    assert figures(out)["search/unfinished"] > 0


def test_a_problem_that_failed_counts_as_not_solved_and_is_told(run, monkeypatch):
    class Broken:
        facts = VerifierFacts("broken", 0)

        def score(self, requests):
            bad = [len(r.problem.question) % 2 == 0 for r in requests]
            return [Scored(tuple(math.nan if b else 1.0 for _ in r.steps)) for r, b in zip(requests, bad, strict=True)]

    monkeypatch.setattr(stages, "load_chosen_verifier", lambda *given: Broken())
    out = run(*BEAM)
    results = {r.problem.key: r for r in read_results(out)}
    failed = {key for key, r in results.items() if r.failed}
    assert failed == {r.problem.key for r in results.values() if len(r.problem.question) % 2 == 0}
    assert 0 < len(failed) < 12
    outcomes = json.loads((out / "outcomes.json").read_text())
    assert {key for key, (correct, _) in outcomes.items() if correct == 0} >= failed
    assert figures(out)["search/failed"] == len(failed)
    pool = {r.problem.key: r for r in read_results(run(name="pool"))}
    for key in failed:  # their plain samples are still whole, and in their place
        assert results[key].candidates[:4] == pool[key].candidates[:4]


def test_progress_tells_tokens_and_the_size_of_trees(run):
    heard = []
    run(*BEAM, progress=lambda done, total, **info: heard.append((done, total, info)))
    assert heard[-1][:2] == (96, 96)
    assert heard[-1][2]["tokens"] > 0
    assert heard[-1][2]["steps"] > 96
    assert [h[2]["steps"] for h in heard] == sorted(h[2]["steps"] for h in heard)
    plain = []
    run(name="pool", progress=lambda done, total, **info: plain.append(info))
    assert "steps" not in plain[-1]


# ---------------------------------------------------------------- the control


def test_the_control_draws_plain_samples_for_as_many_flops(run, tmp_path):
    arm = run(*BEAM, "verifier.parameters=1000", name="arm")
    inputs = {"search@001": arm, "problems@001": tmp_path / "sets", "policy@001": tmp_path / "base" / "model"}
    out = run(*BEAM, name="control", context=Context(config(*BEAM), 1, lambda *_, **__: None, "random"), inputs=inputs)
    arms = {r.problem.key: r for r in read_results(arm)}
    drawn = {r.problem.key: r for r in read_results(out / "round-001")}
    assert drawn.keys() == arms.keys()
    for key, result in drawn.items():
        assert all(not c.step_ends and c.score is None for c in result.candidates)
        dearest = 2_000 * (max(len(c.ids) for c in result.candidates) + 1)
        assert abs(result.spend.flops_ideal - arms[key].spend.flops_ideal) <= dearest
    assert spend_of(out).flops_ideal == pytest.approx(spend_of(arm).flops_ideal, rel=0.03)
    assert spend_of(out).samples > spend_of(arm).samples, "what the verifier cost is drawn, too"
    assert spend_of(out).verifier_tokens == 0


def test_problems_that_the_search_did_not_finish_are_not_drawn(run, tmp_path):
    arm = run(*BEAM, "search.max_tokens=700", name="arm")
    inputs = {"search@001": arm, "problems@001": tmp_path / "sets", "policy@001": tmp_path / "base" / "model"}
    context = Context(config(*BEAM), 1, lambda *_, **__: None, "random")
    out = run(*BEAM, "search.max_tokens=700", name="control", context=context, inputs=inputs)
    keys = [r.problem.key for r in read_results(out / "round-001")]
    assert keys == [r.problem.key for r in read_results(arm)]
    assert 0 < len(keys) < 12


def test_an_engine_that_returns_nothing_ends_the_control(run):
    class Dead:
        prompt_ids = (1, 2)
        spend = Spend()

        async def sample(self, num):
            return [None] * num

    problem = Problem("p", "?", "1")
    drawn = asyncio.run(equal_flops(problem, Dead(), None, None, first=4, flops={"p": 100.0}))
    assert len(drawn) == 4
    assert asyncio.run(equal_flops(problem, Dead(), None, None, first=4, flops={"p": 0.0})) == []
