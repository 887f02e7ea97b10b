"""What the StrategyTable chooses, made into plans: for each question alone, or for many within one budget."""

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from search.choosing import arm_flops, choose_each, choose_together, plan_of
from search.errors import BudgetError, ConfigError, DataError
from search.run import Plan, search
from search.table import EVERYWHERE, Rung, StrategyTable
from search.types import Budget, Problem, VerifierFacts
from tests.scripted_search import TextVerifier, chain_engine, run_all, sampler_of

STEPS, OUTCOME = VerifierFacts("v", 0), VerifierFacts("v", 0, process=False)
EASY = (Rung("greedy", 1, 0.9, 0.9, 0.01, 10.0), Rung("majority", 4, 0.95, 0.95, 0.01, 40.0))
HARD = (
    Rung("greedy", 1, 0.1, 0.1, 0.01, 10.0),
    Rung("majority", 4, 0.2, 0.2, 0.01, 40.0),
    Rung("beam(width=2)", 4, 0.5, 0.5, 0.01, 60.0),
)
ALL = (Rung("greedy", 1, 0.5, 0.5, 0.01, 10.0), Rung("majority", 4, 0.6, 0.6, 0.01, 40.0))
TABLE = StrategyTable("answer", (0.5,), (20, 10, 10), (ALL, EASY, HARD))
RATES = {"easy": 0.9, "hard": 0.1, "odd": math.nan}


def asked(*keys):
    return [Problem(key, key, "x") for key in keys]


# ---------------------------------------------------------------- each question alone


def test_each_question_gets_what_its_bin_gets():
    chooser = choose_each(TABLE, RATES, 4, STEPS)
    easy, hard, odd, new = asked("easy", "hard", "odd", "new")
    assert [chooser.bin_of(p) for p in (easy, hard, odd, new)] == [1, 2, EVERYWHERE, EVERYWHERE]
    assert chooser(easy).name == "majority @ 4"
    assert chooser(hard).name == "beam(width=2) @ 4"
    assert chooser(odd).name == chooser(new).name == "majority @ 4", "what is best over all, where nothing is known"
    assert chooser.counts([easy, hard, odd, new]) == {"majority @ 4": 3, "beam(width=2) @ 4": 1}
    assert choose_each(TABLE, RATES, 3, STEPS)(hard).name == "greedy @ 1"


def test_a_plan_is_what_the_strategy_alone_would_be():
    plan = plan_of(HARD[2], STEPS)
    assert isinstance(plan, Plan)
    assert (plan.budget, plan.scored) == (Budget("samples", 4), True)
    assert not plan_of(EASY[1], None).scored


def test_what_cannot_be_chosen_is_refused():
    with pytest.raises(BudgetError, match=r"no strategy for 0.5 samples: give at least 1"):
        choose_each(TABLE, RATES, 0.5)
    with pytest.raises(ConfigError, match=r"beam.* needs a verifier"):
        choose_each(TABLE, RATES, 4, None)(asked("hard")[0])
    with pytest.raises(ConfigError, match="needs a verifier that scores steps"):
        choose_each(TABLE, RATES, 4, OUTCOME)(asked("hard")[0])
    with pytest.raises(BudgetError, match="costs as little as 9 FLOPs"):
        choose_together(TABLE, {}, 9)
    with pytest.raises(BudgetError, match="mean budget of 9 does not buy the cheapest offers: give at least 10"):
        choose_together(TABLE, RATES, 9)


# ---------------------------------------------------------------- many within one budget


def test_the_budget_goes_where_it_is_worth_most():
    """Three easy and one hard question, 22.5 each: greedy for the easy ones pays the beam."""
    rates = {"a": 0.9, "b": 0.8, "c": 0.7, "d": 0.2}
    chooser = choose_together(TABLE, rates, 22.5, STEPS)
    assert chooser.counts(asked(*rates)) == {"greedy @ 1": 3, "beam(width=2) @ 4": 1}
    assert chooser.allocation is not None
    assert chooser.allocation.cost == 22.5


def test_questions_of_one_bin_alone_are_no_trouble():
    """Also one question by itself, as a small evaluation has."""
    chooser = choose_together(TABLE, {"d": 0.2}, 60, STEPS)
    assert chooser(asked("d")[0]).name == "beam(width=2) @ 4"
    assert choose_together(TABLE, {"d": 0.2}, 59, STEPS)(asked("d")[0]).name == "greedy @ 1"


def test_a_bin_that_the_budget_cannot_move_as_a_whole_is_split_by_the_keys_alone():
    rates = {f"q{i}": 0.1 for i in range(400)}
    chooser = choose_together(TABLE, rates, 35, STEPS)  # 10 + 50 / 2
    counts = chooser.counts(asked(*rates))
    assert counts.keys() == {"greedy @ 1", "beam(width=2) @ 4"}
    assert 160 < counts["beam(width=2) @ 4"] < 240
    again = choose_together(TABLE, dict(reversed(rates.items())), 35, STEPS)
    assert [again.rung(p) for p in asked(*rates)] == [chooser.rung(p) for p in asked(*rates)]


def test_where_no_difficulty_is_known_each_gets_the_best_that_it_can_pay():
    for rates in ({}, {"easy": math.nan, "hard": math.nan}):
        chooser = choose_together(TABLE, rates, 39, STEPS)
        assert chooser.counts(asked("easy", "hard")) == {"greedy @ 1": 2}
        assert choose_together(TABLE, rates, 40, STEPS).counts(asked("easy", "hard")) == {"majority @ 4": 2}


def test_an_unknown_one_among_known_ones_is_paid_the_mean():
    chooser = choose_together(TABLE, {"a": 0.9, "d": 0.2}, 40, STEPS)
    assert chooser(asked("new")[0]).name == "majority @ 4"
    cheap = StrategyTable("answer", (0.5,), (20, 10, 10), (ALL, (Rung("greedy", 1, 0.9, 0.9, 0.0, 4.0),), HARD))
    assert choose_together(cheap, {"a": 0.9}, 5, STEPS)(asked("new")[0]).name == "greedy @ 1", "the cheapest there is"


@settings(max_examples=100, deadline=None)
@given(st.lists(st.floats(0, 1), min_size=1, max_size=60), st.floats(10, 70))
def test_shares_never_cost_more_than_the_mean(rates, mean):
    known = {f"q{i}": rate for i, rate in enumerate(rates)}
    allocation = choose_together(TABLE, known, mean, STEPS).allocation
    assert allocation is not None
    assert allocation.cost <= mean * (1 + 1e-9)
    single = [choose_together(TABLE, {"q": rate}, mean, STEPS).allocation for rate in rates]
    alone = [found.value for found in single if found is not None]
    assert allocation.value >= sum(alone) / len(alone) - 1 / len(alone)


# ---------------------------------------------------------------- searched


def test_every_problem_is_searched_by_its_own_plan():
    """As if it were alone with the strategy that was chosen: same draws, same answer, same spend."""
    engine, judge = chain_engine(0.8), TextVerifier(lambda text: 0.5 if len(text) % 3 else 0.9)
    problems = [Problem(f"p{i}", f"{i:03}", f"{i:03}") for i in range(9)]
    rates = {p.key: i / 8 for i, p in enumerate(problems)}
    chooser = choose_each(TABLE, rates, 4, judge.facts)
    together = search(problems, chooser, sampler_of(engine), judge)
    assert [r.strategy for r in together] == ["beam(width=2) @ 4"] * 5 + ["majority @ 4"] * 4
    for result in together:
        (alone,) = run_all(result.strategy.partition(" @")[0], 4, engine, [result.problem], judge)
        assert alone == result


# ---------------------------------------------------------------- what an arm costs


def test_the_price_of_samples_between_the_budgets_that_were_measured():
    ladder = tuple(Rung("pass", n, 0.5, 0.5, 0.0, f) for n, f in ((1, 10.0), (2, 18.0), (8, 60.0)))
    table = StrategyTable("rows", (), (9, 9), (ladder, ladder))
    assert [arm_flops(table, "pass", n) for n in (1, 2, 5, 8)] == [10, 18, 39, 60]
    assert arm_flops(table, "pass", 16) == 60 + 7 * 8, "beyond, as between the last two"
    assert arm_flops(table, "pass", 0.5) == 6


def test_an_arm_that_was_not_measured_twice_has_no_price():
    with pytest.raises(DataError, match=r"has greedy at 1 budgets, two are needed: add to table.budgets$"):
        arm_flops(TABLE, "greedy", 4)
    with pytest.raises(DataError, match=r"has pass at 0 budgets.* and pass to table.strategies$"):
        arm_flops(TABLE, "pass", 4)
