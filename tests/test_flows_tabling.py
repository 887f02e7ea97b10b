"""The StrategyTable in a loop: fitted for the winner, asked by the next round's search, by solve and by eval."""

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from configs import load
from flows.driver import read_metrics
from flows.eval_run import plans_of
from flows.eval_store import Cell
from flows.evaluation import Request, evaluate_model
from flows.observers import Silent, _note
from flows.rating import predict_rates
from flows.runner import Options, improve
from flows.searching import check, search
from flows.solve import Question, ask
from flows.stages import Context, base, pool_job, run_jobs
from flows.state import Loop
from flows.table_text import choices, worth
from flows.tables import fitted_with, load_tables, measurable
from flows.tabling import _worth, table
from search.cells import Grid, pool_cells, read_pools
from search.choosing import choose_each, choose_together
from search.errors import BudgetError, ConfigError
from search.evaluate import read_pool
from search.results import merge_shards, read_results, write_results
from search.sets import read_problems, write_problems
from search.table import Rung, StrategyTable
from search.tasks import load_task
from search.types import Spend, VerifierFacts
from search.verifiers import describe, load_verifier

TINY = Path(__file__).with_name("tiny.txt").read_text().split()
ARMS = ["greedy", "pass", "majority", "adaptive_majority"]
TABLE = ["table.enabled=true", f"table.strategies={json.dumps(ARMS)}", "table.budgets=[1,2,4]", "table.problems=60"]
OPTIMAL = [*TINY, *TABLE, "search.strategy=optimal"]
TOLD = ["difficulty.problems=90", "difficulty.samples=8", "engine.accuracy=0.45"]  # what it takes to tell difficulty


def config(*overrides):
    return load.load("smoke", [*OPTIMAL, *overrides])


def quietly(*_, **__):
    """No progress."""


def read(path):
    return json.loads(path.read_text(encoding="utf-8"))


def a_round(runs, *overrides, observer=None):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("flows.runner.report", lambda loop, record: None)
        return improve(config(*overrides), Options(runs), observer or Silent())


@pytest.fixture(scope="module")
def told(tmp_path_factory):
    """Rounds 0 and 1 of a loop whose predictor tells difficulty."""
    runs = tmp_path_factory.mktemp("told")
    outcome = a_round(runs, *TOLD)
    assert [r.round for r in outcome.records] == [0, 1]
    return SimpleNamespace(runs=runs, loop=runs / "smoke", config=config(*TOLD), records=outcome.records)


@pytest.fixture(scope="module")
def blind(tmp_path_factory):
    """The same with too few problems for a predictor."""
    runs = tmp_path_factory.mktemp("blind")
    a_round(runs)
    return SimpleNamespace(runs=runs, loop=runs / "smoke", config=config())


# ---------------------------------------------------------------- in the loop


def test_every_round_leaves_the_tables_of_its_winner_in_the_bundle(told):
    loop = Loop.open(told.runs, "smoke")
    for number, bundle in enumerate(move.bundle for move in loop.state.moves):
        assert bundle.table is not None
        assert bundle.table.path == f"round-{number:03d}/table"
        tables = load_tables(loop.resolve(bundle.table))
        model = next(
            iter(read_results(told.loop / f"round-{number:03d}" / "difficulty" / "pool-validation.jsonl"))
        ).model
        for objective, one in tables.items():
            assert one.objective == objective
            assert (one.made_of["round"], one.made_of["policy"], one.made_of["verifier"]) == (number, model, None)
            assert one.made_of["problems"] == one.counts[0] == sum(one.counts[1:]) == 60
            assert one.num_bins > 1
        arms = {objective: {r.arm for r in one.ladders[0]} for objective, one in tables.items()}
        assert arms == {"answer": {*ARMS} - {"pass"}, "rows": {*ARMS}}
    assert read_metrics(told.loop / "round-001" / "table")["table/usable"] == 1


def test_cells_of_the_pool_are_its_figures_and_the_others_were_searched(told):
    stage = told.loop / "round-001" / "table"
    cells = {(c["arm"], c["budget"]): c for c in read(stage / "report.json")["cells"]}
    assert cells.keys() == {("greedy", 1), *((arm, n) for arm in ARMS[1:] for n in (1, 2, 4))}
    keys = {p.key for p in read_problems(told.loop / "round-001" / "problems" / "validation.jsonl")[:60]}
    stored = told.loop / "round-001" / "difficulty" / "pool-validation.jsonl"
    figures = read_pool(stored, [1, 2, 4])
    for rule in ("pass", "majority"):
        for n in (1, 2, 4):
            values = [v for key, v in figures.by_key(rule, n).items() if key in keys]
            assert cells[rule, n]["accuracy"] == pytest.approx(np.mean(values))
    drawn = list(read_results(stage / "cells" / "adaptive-majority-4"))
    assert {r.problem.key for r in drawn} == keys
    assert cells["adaptive_majority", 4]["flops"] == pytest.approx(np.mean([r.spend.flops_ideal for r in drawn]))
    spend = Spend(**read(stage / "spend.json"))
    searched = (r.spend for folder in (stage / "cells").iterdir() for r in read_results(folder))
    assert spend == sum(searched, Spend()), "without a verifier the pool costs nothing more"


def test_what_it_is_worth_was_measured_on_problems_that_it_did_not_see(told):
    report, metrics = read(told.loop / "round-001" / "table" / "report.json"), told.records[1].metrics
    assert report["difficulty"] == "predicted"
    assert report["left_out"] == []
    assert [row["budget"] for row in report["worth"]["budgets"]] == [1, 2, 4]
    for row in report["worth"]["budgets"]:
        assert row["accuracy"] == metrics[f"table/accuracy_at_{row['budget']:g}"]
        assert row["accuracy"] <= row["fixed_accuracy"] + 0.1
    assert [ratio["budget"] for ratio in report["worth"]["ratios"]] == [2, 4]
    assert metrics["table/bins"] == len(report["answer"]["edges"]) + 1


def test_the_regret_of_mis_binning_is_reported(told):
    """Bins by one half of the samples, strategies measured on the other."""
    report = read(told.loop / "round-001" / "table" / "report.json")["regret"]
    metrics = read_metrics(told.loop / "round-001" / "table")
    assert (report["budget"], report["problems"]) == (4, 60)
    assert report["loss"]["value"] == pytest.approx(report["oracle"]["value"] - report["predicted"]["value"])
    assert metrics["table/regret"] == report["loss"]["value"]
    assert metrics["table/gain_by_bins"] == report["gain"]["value"]
    assert abs(report["loss"]["value"]) < 0.3


def test_the_next_search_asks_the_table_of_the_champion(told):
    search_stage, old = told.loop / "round-001" / "search", told.loop / "round-000"
    problems = read_problems(told.loop / "round-001" / "problems" / "search.jsonl")
    inputs = {"policy": old / "base" / "model", "difficulty": old / "difficulty"}
    rates = predict_rates(told.config, inputs, problems).rates
    chosen = read(search_stage / "chosen.json")
    rows = load_tables(old / "table")["rows"]
    chooser = choose_together(rows, rates, chosen["mean_flops"])
    assert chosen["strategies"] == chooser.counts(problems)
    assert (chosen["difficulty"], chosen["predicted"]) == ("predicted", 20)
    for result in read_results(search_stage):
        assert result.strategy == f"plain(4) + {chooser.rung(result.problem).name}"
        assert len([c for c in result.candidates if not c.step_ends]) >= 4
    assert read_metrics(search_stage)["search/predicted"] == 20
    assert "search/untabled" not in read_metrics(search_stage)
    assert _note("search", read_metrics(search_stage)).endswith("problems solved")


def test_together_the_questions_cost_what_plain_samples_would(told):
    """As the table estimates: no more than 4 more plain samples on average."""
    chosen = read(told.loop / "round-001" / "search" / "chosen.json")
    rows = load_tables(told.loop / "round-000" / "table")["rows"]
    plain = next(r.flops for r in rows.ladders[0] if r.name == "pass @ 4")
    assert chosen["mean_flops"] == pytest.approx(plain)
    assert sum(chosen["strategies"].values()) == 20


def test_the_report_says_what_is_chosen_and_worth(told, blind):
    round_ = SimpleNamespace(folder=told.loop / "round-001")
    shown = choices(round_)  # pyright: ignore[reportArgumentType]
    assert shown.heads == ("difficulty", "at 1", "at 2", "at 4")
    assert shown.rows[0].cells[0] == "1, easiest"
    assert shown.rows[-1].cells[0].endswith(", hardest")
    assert not any("Every question" in line for line in worth(round_))  # pyright: ignore[reportArgumentType]
    dark = SimpleNamespace(folder=blind.loop / "round-001")
    assert [row.cells[0] for row in choices(dark).rows] == ["all"]  # pyright: ignore[reportArgumentType]
    said = worth(dark)  # pyright: ignore[reportArgumentType]
    assert said[-1].startswith("Every question gets the same: there is no difficulty predictor")


def test_without_a_usable_predictor_there_is_one_bin_and_the_round_says_so(blind):
    assert not read(blind.loop / "round-000" / "difficulty" / "report.json")["usable"]
    one = load_tables(blind.loop / "round-000" / "table")["rows"]
    assert (one.num_bins, one.edges) == (1, ())
    assert read(blind.loop / "round-001" / "table" / "report.json")["difficulty"] == "there is no difficulty predictor"
    search_stage = blind.loop / "round-001" / "search"
    chosen = read(search_stage / "chosen.json")
    assert (chosen["difficulty"], chosen["predicted"]) == ("there is no difficulty predictor", 0)
    assert len(chosen["strategies"]) == 1
    assert len({r.strategy for r in read_results(search_stage)}) == 1
    metrics = read_metrics(search_stage)
    assert metrics["search/predicted"] == 0
    assert "all questions alike, without a usable difficulty predictor" in _note("search", metrics)


def test_a_choice_that_never_gets_there_saves_nothing(tmp_path):
    """And ten bins come in their order."""
    row = {"budget": 4, "accuracy": 0.5, "se": 0.01, "flops": 3e5, "fixed": "majority @ 4", "fixed_accuracy": 0.5}
    ratio = {"baseline": "majority", "budget": 4, "value": 0.0, "low": 0.0, "high": 1.2}
    found = {"worth": {"budgets": [row | {"fixed_flops": 4e5}], "ratios": [ratio, ratio | {"value": 2.0, "low": 1.5}]}}
    found |= {
        "difficulty": "predicted",
        "answer": {"budgets": [4], "choices": {str(b): [f"s @ {b}"] for b in range(1, 11)}},
    }
    found["answer"]["choices"]["all"] = ["s @ 0"]
    (tmp_path / "table").mkdir()
    (tmp_path / "table" / "report.json").write_text(json.dumps(found, sort_keys=True))
    round_ = SimpleNamespace(folder=tmp_path)
    lines = worth(round_)  # pyright: ignore[reportArgumentType]
    assert lines[1] == "No choice is as accurate as majority at 4 samples."
    assert lines[2] == "majority at 4 samples takes 2.0 times the FLOPs for the same accuracy (90 %: 1.5 to 1.2)."
    rows = choices(round_).rows  # pyright: ignore[reportArgumentType]
    assert [r.cells for r in rows[::9]] == [("1, easiest", "s @ 1"), ("10, hardest", "s @ 10")]
    assert [r.cells[1] for r in rows] == [f"s @ {b}" for b in range(1, 11)]


class Bomb(Silent):
    """Raises when the first table is committed."""

    def stage_finished(self, folder, name, wall_s, resumed):
        if name == "table" and not resumed:
            raise KeyboardInterrupt


def test_a_round_broken_off_after_its_table_ends_byte_equal(blind, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        a_round(tmp_path, observer=Bomb())
    a_round(tmp_path)
    one, other = ({p.parent.relative_to(loop): read(p)["outputs"] for p in sorted(loop.glob("round-*/*/manifest.json"))}
                  for loop in (tmp_path / "smoke", blind.loop))  # fmt: skip
    assert one == other
    assert "table" in {path.name for path in one}


# ---------------------------------------------------------------- the stage


@pytest.fixture
def stage(tmp_path):
    """Runs the table stage on pools of 8 samples drawn here. Example: stage("verifier.type=oracle", problems=24)"""

    def work(*overrides, problems=24, samples=8, damage=None):
        settings = load.load("smoke", [*OPTIMAL, *TOLD, f"difficulty.samples={samples}", *overrides])
        sets, policy, pools, out = (tmp_path / name for name in ("sets", "base", "difficulty", "table"))
        for folder in (sets, policy, pools, out):
            folder.mkdir()
        context = Context(settings, 0, quietly)
        drawn = load_task(settings).draw("validation", problems, stream="x")
        write_problems(drawn, sets / "validation.jsonl")
        base(context, {}, policy)
        inputs = {"problems": sets, "policy": policy / "model", "pools": pools, **work.inputs}
        run_jobs(context, inputs, pools, [pool_job("validation", drawn, samples, "difficulty/0")])
        merge_shards(pools / "pool-validation", pools / "pool-validation.jsonl")
        if damage:
            write_results(
                [damage(r) for r in read_results(pools / "pool-validation.jsonl")], pools / "pool-validation.jsonl"
            )
        table(context, inputs, out)
        return out

    work.inputs = {}
    return work


SCORED = f"table.strategies={json.dumps(['greedy', 'pass', 'majority', 'best_of_n', 'beam(width=2)'])}"
ORACLE = ("verifier.type=oracle", "verifier.noise=0.1", "verifier.parameters=500")


def test_a_verifier_scores_the_pool_once_and_is_charged_for_it(stage):
    out = stage(*ORACLE, SCORED)
    cells = {(c["arm"], c["budget"]): c for c in read(out / "report.json")["cells"]}
    assert ("beam(width=2)", 1) not in cells, "no budget of it"
    assert {("beam(width=2)", 2), ("beam(width=2)", 4), ("best_of_n", 4)} <= cells.keys()
    assert cells["best_of_n", 4]["flops"] > cells["majority", 4]["flops"] == cells["pass", 4]["flops"]
    pool = list(read_results(out / "pool"))
    assert all(c.score is not None for r in pool for c in r.candidates)
    searched = sum((r.spend for folder in (out / "cells").iterdir() for r in read_results(folder)), Spend())
    spend = Spend(**read(out / "spend.json"))
    assert spend.generated_tokens == searched.generated_tokens
    scores = sum(r.spend.verifier_tokens for r in pool)
    assert spend.verifier_tokens == searched.verifier_tokens + scores > searched.verifier_tokens > 0
    assert spend.verifier_flops_ideal == searched.verifier_flops_ideal + sum(r.spend.verifier_flops_ideal for r in pool)
    assert load_tables(out)["answer"].made_of["verifier"] == "oracle-0.1-0"


def test_a_verifier_that_no_arm_asks_is_not_paid(stage):
    out = stage(*ORACLE)
    assert Spend(**read(out / "spend.json")).verifier_tokens == 0
    assert all(c.score is None for r in read_results(out / "pool") for c in r.candidates)


def test_budgets_beyond_the_stored_samples_are_left_out_and_named(stage):
    out = stage("table.budgets=[1,4,16]", samples=4)
    report = read(out / "report.json")
    assert report["left_out"] == ["pass @ 16", "majority @ 16"]
    assert ("adaptive_majority", 16) in {(c["arm"], c["budget"]) for c in report["cells"]}
    said = worth(SimpleNamespace(folder=out.parent))  # pyright: ignore[reportArgumentType]
    assert said[-1] == "Not measured: pass @ 16, majority @ 16: difficulty.samples are too few."


def test_bins_may_be_cut_at_fixed_rates(told, stage):
    """Where a predictor tells rates; without one there is nothing to cut."""
    absolute = ("difficulty.binning=absolute", "difficulty.edges=[0.05,0.4,0.99]")
    stage.inputs |= {"difficulty": told.loop / "round-000" / "difficulty"}
    out = stage(*absolute, problems=40)
    one = load_tables(out)["answer"]
    assert one.edges == (0.05, 0.4, 0.99)
    assert one.counts[0] == 40 == sum(one.counts[1:])
    assert one.counts[1] == 0, "no question is as easy"
    assert one.ladders[1][0].value == pytest.approx(one.ladders[0][0].value)
    assert read_metrics(out)["table/bins"] == sum(n > 0 for n in one.counts[1:])
    assert read(out / "report.json")["difficulty"] == "predicted"


def test_fixed_rates_cut_nothing_where_none_is_known(stage):
    one = load_tables(stage("difficulty.binning=absolute"))["answer"]
    assert (one.edges, one.counts) == ((), (24, 24))


def test_what_predicting_costs_is_charged_to_the_choice(told, monkeypatch):
    """A thousand FLOPs a question, where a token costs two thousand."""
    pool = told.loop / "round-001" / "difficulty" / "pool-validation.jsonl"
    keys = [p.key for p in read_problems(told.loop / "round-001" / "problems" / "validation.jsonl")[:60]]
    pools = {p.key: p for p in read_pools(pool)}
    grid = Grid(tuple(keys), tuple(pool_cells([pools[k] for k in keys], {"majority": "majority"}, [1, 2, 4])))
    monkeypatch.setattr("flows.tabling.DRAWS", 3)

    def bins(weights):
        return np.ones(60, dtype=np.intp)

    (free, _), (charged, _) = (_worth(grid, bins, flops) for flops in (0.0, 1000.0))
    assert [b["flops"] - a["flops"] for a, b in zip(free["budgets"], charged["budgets"], strict=True)] == [1000.0] * 3
    for a, b in zip(free["ratios"], charged["ratios"], strict=True):
        assert b["value"] < a["value"]


@pytest.mark.parametrize(
    ("overrides", "problems", "damage", "reason"),
    [
        ((), 12, None, "12 problems are too few to fit a table on: give at least 20"),
        (
            ('table.strategies=["majority"]',),
            24,
            lambda r: replace(r, candidates=(), failed="no room", selected=None, spend=Spend()),
            "none of the arms",
        ),
    ],
)
def test_where_nothing_can_be_fitted_the_stage_says_why_and_goes_on(stage, overrides, problems, damage, reason):
    out = stage(*overrides, problems=problems, damage=damage)
    report = read(out / "report.json")
    assert not report["usable"]
    assert reason in report["reason"]
    assert read_metrics(out) == {"table/usable": 0}
    assert _note("table", read_metrics(out)) == "not usable: the one before stays"
    assert choices(SimpleNamespace(folder=out.parent)).rows == ()  # pyright: ignore[reportArgumentType]


# ---------------------------------------------------------------- what can be asked for


PROCESS, OUTCOME = VerifierFacts("v", 0), VerifierFacts("v", 0, process=False)


@pytest.mark.parametrize(
    ("facts", "arms"),
    [
        (None, ["greedy", "pass", "majority"]),
        (OUTCOME, ["greedy", "pass", "majority", "best_of_n"]),
        (PROCESS, ["greedy", "pass", "majority", "best_of_n", "beam(width=2)"]),
    ],
)
def test_what_is_measured_is_what_the_verifier_allows(facts, arms):
    found = measurable(config(SCORED), facts)
    assert list(dict.fromkeys(spec.text for spec, _ in found)) == arms
    budgets = {arm: [b.amount for spec, b in found if spec.text == arm] for arm in arms}
    assert budgets["greedy"] == [1]
    assert budgets["majority"] == [1, 2, 4]
    assert budgets.get("beam(width=2)", [2, 4]) == [2, 4]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ('table.strategies=["beam", "pass"]',),
            "holds nothing that can be run here: add majority, or give a verifier",
        ),
        (('table.strategies=["pass"]',), "holds nothing that can be run here"),
        (('table.strategies=["majorty", "pass"]',), r"did you mean majority\?"),
        (('table.strategies=["optimal", "pass"]',), "optimal chooses by the StrategyTable"),
        (("table.enabled=false",), "set table.enabled = true"),
        (('table.strategies=["majority"]',), "table.strategies needs pass"),
        (("table.budgets=[4]",), "table.budgets two of them"),
    ],
)
def test_a_round_that_could_not_choose_is_refused_before_it_begins(overrides, message):
    with pytest.raises(ConfigError, match=message):
        check(config(*overrides))
    check(config())


def test_samples_must_be_left_beside_the_plain_ones():
    with pytest.raises(BudgetError, match=r"leaves search.strategy = 'optimal' nothing beside"):
        check(config("search.samples=4"))


# ---------------------------------------------------------------- a search without


def test_a_champion_without_a_table_searches_by_plain_samples_and_says_so(told, tmp_path):
    """As in the first round after table.enabled was set."""
    inputs = {"problems": told.loop / "round-001" / "problems", "policy": told.loop / "round-000" / "base" / "model"}
    search(Context(told.config, 1, quietly), inputs, tmp_path)
    assert {r.strategy for r in read_results(tmp_path)} == {"best_of_n(8)"}
    metrics = read_metrics(tmp_path)
    assert (metrics["search/untabled"], metrics["search/unverified"]) == (1, 0)
    assert "by plain samples, the champion has no usable StrategyTable" in _note("search", metrics)
    assert not (tmp_path / "chosen.json").exists()


def test_a_predictor_that_gives_all_the_same_is_noticed(told, tmp_path, monkeypatch):
    old = told.loop / "round-000"
    inputs = {"problems": told.loop / "round-001" / "problems", "policy": old / "base" / "model"}
    inputs |= {"table": old / "table", "difficulty": old / "difficulty"}
    monkeypatch.setattr("flows.rating.estimator", lambda *_: lambda problems: [0.4] * len(problems))
    search(Context(told.config, 1, quietly), inputs, tmp_path)
    chosen = read(tmp_path / "chosen.json")
    assert chosen["predicted"] == 0
    assert "cannot tell these questions apart: all 20 predictions are 0.400" in chosen["difficulty"]
    assert len(chosen["strategies"]) == 1


# ---------------------------------------------------------------- one question

ASKED = "3 5 7 > 22"


def solution(told, *overrides, **asked):
    return ask(load.load("smoke", [*OPTIMAL, *TOLD, *overrides]), told.runs, Question(ASKED, **asked))


def test_solve_asks_the_table_that_was_fitted_with_the_same_verifier(told):
    found = solution(told, budget=4)
    one = load_tables(told.loop / "round-001" / "table")["answer"]
    settings = told.config
    problem = load_task(settings).parse(ASKED)
    policy = Loop.open(told.runs, "smoke").state.champion.policy
    inputs = {"policy": told.loop / policy.path, "difficulty": told.loop / "round-001" / "difficulty"}
    rates = predict_rates(settings, inputs, [problem]).rates
    chooser = choose_each(one, rates, 4)
    assert found.by_table is not None
    assert (found.by_table["bin"], found.by_table["bins"]) == (chooser.bin_of(problem), one.num_bins)
    assert found.by_table["rate"] == pytest.approx(rates[problem.key])
    assert found.result.strategy == found.by_table["strategy"] == chooser.rung(problem).name
    assert found.to_json(tree=False, page=None)["by_table"]["why"] == "predicted"
    assert solution(told, budget=4, strategy="optimal").result == found.result


def test_a_strategy_that_is_named_overrides_the_table(told):
    found = solution(told, budget=4, strategy="majority")
    assert (found.result.strategy, found.by_table) == ("majority @ 4", None)


def test_another_verifier_than_the_tables_leaves_it_unasked(told):
    """The configured strategy is optimal: without the table that is the weighted vote."""
    found = solution(told, "verifier.type=oracle", budget=4)
    assert (found.result.strategy, found.by_table) == ("best_of_n_weighted @ 4", None)
    assert solution(told, "verifier.type=oracle", budget=4, strategy="optimal").by_table is not None


def test_a_smaller_budget_gets_a_smaller_rung(told):
    assert solution(told, budget=1).result.strategy.endswith(" @ 1")
    assert float(solution(told, budget=3).result.strategy.rpartition(" @ ")[2]) <= 2


@pytest.mark.parametrize("strategy", ["optimal(spread=true)", "optimal(vote=majority)"])
def test_one_question_takes_no_options_of_the_table(told, strategy):
    with pytest.raises(ConfigError, match="for one question the table chooses strategy, budget and vote") as caught:
        solution(told, strategy=strategy)
    assert caught.value.exit_code == 2


def test_optimal_without_a_table_says_what_to_do(told, tmp_path):
    (tmp_path / "scripted.json").write_text('{"skill": 0}')
    with pytest.raises(ConfigError, match=r"this model has no StrategyTable; run a round with table.enabled = true"):
        ask(told.config, told.runs, Question(ASKED, strategy="optimal"), str(tmp_path))
    assert ask(told.config, told.runs, Question(ASKED, budget=4), str(tmp_path)).result.strategy == "majority @ 4"


def test_the_tables_verifier_is_known_whatever_its_kind():
    """By its description, which needs no loading: a loaded one may call itself otherwise, as a judge does."""
    judge, other = ["verifier.type=judge", "verifier.url=http://localhost:1/v1"], load.load("smoke", [])
    settings = load.load("smoke", [*judge, "verifier.model=m"])
    task = load_task(settings)
    described = describe(settings, task)
    assert described is not None
    rung = (Rung("majority", 1, 0.5, 0.5, 0.0, 1.0),)
    one = StrategyTable("answer", (), (1, 1), (rung, rung), {"verifier": described.fingerprint})
    assert fitted_with(one, settings, task, {})
    assert not fitted_with(one, load.load("smoke", [*judge, "verifier.model=another"]), task, {})
    assert not fitted_with(one, other, task, {})
    none = replace(one, made_of={"verifier": None})
    assert fitted_with(none, other, task, {})
    assert not fitted_with(none, settings, task, {})


def test_an_oracle_without_a_gold_answer_is_refused_as_for_any_strategy(tmp_path):
    from flows import solve

    rung = (Rung("beam(width=2)", 2, 0.5, 0.5, 0.0, 1.0),)
    settings = load.load("smoke", ["verifier.type=oracle"])
    task = load_task(settings)
    verifier = load_verifier(settings, task)
    for objective in ("answer", "rows"):
        StrategyTable(objective, (), (1, 1), (rung, rung)).save(
            tmp_path / {"answer": "table.json", "rows": "rows.json"}[objective]
        )
    problem = replace(task.parse(ASKED), answer=None)
    asked = Question(ASKED, strategy="optimal", budget=2)
    with pytest.raises(ConfigError, match="scores by the gold answer, and this question has none"):
        solve._by_table(settings, {"table": tmp_path}, asked, problem, verifier, None)  # pyright: ignore


# ---------------------------------------------------------------- evaluated


def by_row(found):
    return {(r["strategy"], r["budget"]): r for r in found["results"]}


@pytest.fixture(scope="module")
def evaluated(told):
    """`optimal` and its sharing form beside fixed strategies, on 40 validation problems, in an `eval` folder."""
    request = Request((1, 2, 4), "greedy,majority,adaptive_majority,optimal,optimal(spread=true)")
    return evaluate_model(told.config, told.runs, "champion", "validation", 40, request, report=False)


def cell_of(told, name):
    folders = (p.parent for p in (told.loop / "eval").glob("*/cell.json"))
    return next(folder for folder in folders if read(folder / "cell.json")["name"] == name)


def test_eval_searches_every_problem_by_the_tables_choice(told, evaluated):
    rows = by_row(evaluated)
    assert {(s, b) for s, b in rows if s.startswith("optimal")} == {
        (s, b) for s in ("optimal", "optimal(spread=true)") for b in (1, 2, 4)
    }
    one = load_tables(told.loop / "round-001" / "table")["answer"]
    problems = load_task(told.config).draw("validation", 40, stream="validation")
    policy = Loop.open(told.runs, "smoke").state.champion.policy
    inputs = {"policy": told.loop / policy.path, "difficulty": told.loop / "round-001" / "difficulty"}
    rates = predict_rates(told.config, inputs, problems).rates
    chooser = choose_each(one, rates, 4)
    drawn = list(read_results(cell_of(told, "optimal @ 4")))
    assert [r.strategy for r in drawn] == [chooser.rung(p).name for p in problems]
    assert len({r.strategy for r in drawn}) > 1, "another strategy for another difficulty"
    row = rows["optimal", 4]
    assert row["accuracy"] == pytest.approx(
        np.mean([r.chosen is not None and r.chosen.grade == "correct" for r in drawn])
    )
    assert row["spend"]["flops_ideal"] == pytest.approx(sum(r.spend.flops_ideal for r in drawn))
    assert row["failed"] == 0


def test_sharing_costs_as_much_on_average_as_the_same_for_all(told, evaluated):
    rows = by_row(evaluated)
    for budget in (1, 2, 4):
        shared = rows["optimal(spread=true)", budget]["spend"]["flops_ideal"]
        assert shared <= 1.15 * rows["optimal", budget]["spend"]["flops_ideal"]


def test_what_the_table_chose_is_kept_until_the_table_is_another(told, evaluated, capsys):
    request = Request((4,), "optimal,optimal(spread=true)")
    again = evaluate_model(told.config, told.runs, "champion", "validation", 40, request, report=False)
    assert " searches are there already" in capsys.readouterr().err
    assert by_row(again)["optimal", 4]["accuracy"] == by_row(evaluated)["optimal", 4]["accuracy"]
    loop = Loop.open(told.runs, "smoke")
    assert read(cell_of(told, "optimal @ 4") / "cell.json")["chosen_by"]
    other = evaluate_model(told.config, told.runs, "base", "validation", 40, request, report=False)
    assert other["model"] == "base"
    assert loop.state.champion.round == 1
    names = [read(p)["name"] for p in (told.loop / "eval").glob("*/cell.json")]
    assert names.count("optimal @ 4") == 2


def test_a_budget_below_the_table_is_left_out_and_optimal_without_one_refused(told, tmp_path):
    (tmp_path / "scripted.json").write_text('{"skill": 0}')
    request = Request((4,), "majority,optimal")
    with pytest.raises(ConfigError, match=r"there is none here: run a round with table.enabled = true"):
        evaluate_model(told.config, told.runs, str(tmp_path), "validation", 4, request, report=False)


def test_sharing_among_a_few_problems_of_one_bin(told):
    one = load_tables(told.loop / "round-001" / "table")["answer"]
    cell = Cell(Path("x"), "optimal(spread=true) @ 4", "optimal(spread=true)", "samples", 4, 8)
    (problem,) = load_task(told.config).draw("validation", 1, stream="one")
    for rates in ({problem.key: 0.99}, {problem.key: 0.01}, {}):
        plans = plans_of(cell, verifier=None, table=one, rates=rates)
        assert plans(problem).budget.amount <= 4  # pyright: ignore
