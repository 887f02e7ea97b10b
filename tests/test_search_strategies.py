"""How users name strategies, what a budget buys of each, and what is refused with the way out."""

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from search import answers
from search.errors import BudgetError, ConfigError
from search.strategies import STRATEGIES, VOTES, defaults, parse, parse_list
from search.types import Budget, VerifierFacts
from tests.scripted_search import StepEngine, TextVerifier, run_one

PROCESS = VerifierFacts("v", 0)
OUTCOME = VerifierFacts("v", 0, process=False)


def refused(text, samples=16, facts=PROCESS, unit="samples"):
    with pytest.raises((ConfigError, BudgetError)) as caught:
        parse(text).plan(Budget(unit, samples), facts)
    return str(caught.value)


# ---------------------------------------------------------------- names and options


def test_a_name_alone_has_the_defaults_of_the_paper():
    assert defaults(STRATEGIES["beam"].function) == {"samples": 0, "width": 4, "max_rounds": 40, "distinct": False}
    assert defaults(STRATEGIES["revisions"].function)["window"] == 4
    assert defaults(STRATEGIES["rebase"].function)["temperature"] == 0.2
    assert STRATEGIES["beam"].rule is STRATEGIES["best_of_n_weighted"].rule is answers.weighted
    assert STRATEGIES["revisions"].rule is answers.hierarchical
    assert STRATEGIES["revisions_majority"].rule is answers.majority


def test_options_are_read_by_the_type_of_their_default():
    spec = parse(" lookahead( width = 2,steps=3 , max_rounds=20, vote=majority ) ")
    assert spec.options == {"width": 2, "steps": 3, "max_rounds": 20}
    assert spec.rule is answers.majority
    assert spec.text == "lookahead(width=2, steps=3, max_rounds=20, vote=majority)"
    assert parse("beam(distinct=true)").options == {"distinct": True}
    assert parse("revisions(ratio=inf)").options == {"ratio": float("inf")}
    assert parse("rebase(temperature=1e-1)").text == "rebase(temperature=0.1)"


@pytest.mark.parametrize("name", STRATEGIES)
def test_what_a_strategy_is_called_can_be_read_again(name):
    options = ", ".join(f"{o}={v}" for o, v in defaults(STRATEGIES[name].function).items())
    spec = parse(f"{name}({options})" if options else name)
    assert parse(spec.text) == spec


def test_a_list_of_strategies():
    specs = parse_list("greedy, beam(width=2, max_rounds=3),best_of_n")
    assert [spec.text for spec in specs] == ["greedy", "beam(width=2, max_rounds=3)", "best_of_n"]
    with pytest.raises(ConfigError, match="no strategy given: there are greedy"):
        parse_list(" , ")


@pytest.mark.parametrize(
    ("text", "near"),
    [
        ("bean", "beam"),
        ("Beam", "beam"),
        ("majorty", "majority"),
        ("best-of-n", "best_of_n"),
        ("dvst(width=2)", "dvts"),
    ],
)
def test_an_unknown_strategy_is_answered_with_the_nearest(text, near):
    with pytest.raises(ConfigError) as caught:
        parse(text)
    message = str(caught.value)
    assert message.startswith(f"there is no strategy '{text}': did you mean {near}?")
    assert all(name in message for name in STRATEGIES)


def test_a_name_like_no_other_has_no_nearest():
    with pytest.raises(ConfigError, match=r"there is no strategy 'zzz': there are greedy, pass, "):
        parse("zzz")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("beam(widht=2)", "beam has no option 'widht=2': did you mean width? it has samples, width, max_rounds"),
        ("beam(2)", "beam has no option '2': it has"),
        ("greedy(samples=2)", "greedy has no option 'samples=2': it has vote"),
        ("beam(width=two)", "beam: width=two is none; write it like the default, width=4"),
        ("beam(width=2.5)", "width=2.5 is none"),
        ("beam(distinct=1)", "distinct=1 is none; write it like the default, distinct=False"),
        ("beam(vote=best)", "vote=best is none of majority, highest, weighted, sharpened, hierarchical"),
        ("beam(width=0)", "width=0 means nothing; give more than 0"),
        ("beam(width=-4)", "width=-4 means nothing; give more than 0"),
        ("rebase(temperature=0)", "temperature=0 means nothing"),
        ("rebase(temperature=nan)", "temperature=nan means nothing"),
        ("adaptive_majority(batch=0)", "batch=0 means nothing"),
        ("step_rejection(draws=0)", "draws=0 means nothing"),
        ("revisions(window=0)", "window=0 means nothing"),
        ("revisions(ratio=-1)", "ratio=-1 means nothing; give 0 or more"),
        ("best_of_n(samples=-1)", "samples=-1 means nothing; give 0 or more"),
        ("step_rejection(threshold=nan)", "threshold=nan means nothing"),
    ],
)
def test_an_option_that_means_nothing_is_named(text, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        parse(text)


def test_brackets_that_do_not_close_are_no_strategy():
    with pytest.raises(ConfigError, match=re.escape("there is no strategy 'beam(width=2': did you mean beam?")):
        parse("beam(width=2")


# ---------------------------------------------------------------- verifiers


@pytest.mark.parametrize("name", [name for name, entry in STRATEGIES.items() if entry.needs])
def test_a_strategy_that_needs_a_verifier_says_which_do_not(name):
    message = refused(name, facts=None)
    assert message.startswith(f"{name} needs a verifier: set verifier.type, or use one of greedy, pass, majority")


@pytest.mark.parametrize("name", [name for name, entry in STRATEGIES.items() if entry.needs == "process"])
def test_a_search_by_steps_needs_step_scores(name):
    assert refused(name, facts=OUTCOME) == (
        f"{name} needs a verifier that scores steps; this one scores finished answers only"
    )


@pytest.mark.parametrize("vote", [vote for vote in VOTES if vote != "majority"])
def test_a_vote_by_score_needs_a_verifier_too(vote):
    """Without it nobody would have a score, and the search would abstain on every problem."""
    assert refused(f"majority(vote={vote})", facts=None).startswith(f"majority(vote={vote}) needs a verifier")
    assert parse(f"majority(vote={vote})").plan(Budget("samples", 4), OUTCOME).rule is VOTES[vote]


# ---------------------------------------------------------------- budgets


@pytest.mark.parametrize(
    ("text", "samples", "message"),
    [
        ("beam", 6, "6 samples are no multiple of width 4: give 4 samples, or another width"),
        ("beam", 10, "give 8 samples"),
        ("beam(width=8)", 4, "4 samples are no multiple of width 8: give 8 samples"),
        ("dvts", 2, "2 samples are no multiple of width 4: give 4 samples"),
        ("lookahead(steps=3)", 24, "24 samples are no multiple of width 4 x 4 (every beam costs 1 + 3 rollout steps)"),
        ("lookahead(steps=3)", 24, "give 16 samples"),
        ("searched_revisions", 6, "6 samples are no multiple of width 4"),
        ("beam_revisions", 4, "4 samples are no multiple of 2 x width 4 (half of them are for the beams"),
        ("beam_revisions", 20, "give 16 samples, or another width"),
        ("beam_revisions", 1, "give 8 samples"),
        ("best_of_n", 0, "a budget of 0 samples buys no answer: give at least 1"),
        ("greedy", 0.5, "a budget of 0.5 samples buys no answer"),
        ("beam", -4, "a budget of -4 samples buys no answer"),
    ],
)
def test_a_budget_that_cannot_buy_one_unit_names_the_numbers_and_the_way_out(text, samples, message):
    assert message in refused(text, samples)


@pytest.mark.parametrize("unit", ["tokens", "flops"])
@pytest.mark.parametrize("name", [name for name in STRATEGIES if name not in ("greedy", "optimal")])
def test_a_budget_in_tokens_does_not_say_how_wide_to_search(name, unit):
    message = refused(name, 1000, unit=unit)
    assert message == (f"a budget in {unit} does not say how wide to search: give samples, as in best_of_n(samples=16)")
    parse(f"{name}(samples=8)").plan(Budget(unit, 1000), PROCESS)


def test_the_compute_optimal_choice_needs_a_table():
    message = refused("optimal", 16)
    for part in ("StrategyTable", "table.enabled", "beam"):
        assert part in message


def test_greedy_fits_any_budget():
    for unit in ("samples", "tokens", "flops"):
        parse("greedy").plan(Budget(unit, 1), None)


def test_plans_are_named_by_strategy_and_budget():
    assert parse("beam(width=2)").plan(Budget("samples", 4), PROCESS).name == "beam(width=2) @ 4"
    assert parse("beam(samples=4)").plan(Budget("tokens", 500), PROCESS).name == "beam(samples=4) @ 500 tokens"


def test_samples_may_be_fewer_than_the_budget_but_not_more():
    engine = StepEngine(lambda *_: "A")
    assert len(run_one("majority(samples=3)", 8, engine).candidates) == 3
    assert len(run_one("majority(samples=30)", 8, engine).candidates) == 8


@settings(deadline=None, max_examples=200)
@given(st.sampled_from(sorted(set(STRATEGIES) - {"optimal"})), st.integers(0, 70), st.integers(1, 9), st.integers(0, 4))
def test_what_a_plan_accepts_runs_and_what_it_refuses_names_its_numbers(name, samples, width, steps):
    """No budget and no option leads to anything but a search within the budget or a message to the user."""
    own = defaults(STRATEGIES[name].function)
    options = [f"{option}={value}" for option, value in (("width", width), ("steps", steps)) if option in own]
    text = f"{name}({', '.join(options)})"
    verifier = TextVerifier(lambda text: 0.5)
    engine = StepEngine(lambda prompt, written, *_: "x\n" if written.count("\n") < 2 else "A")
    try:
        parse(text).plan(Budget("samples", samples), verifier.facts)
    except BudgetError as refusal:
        message = str(refusal)
    else:
        message = None
    if message is not None:
        assert str(samples) in message
        assert "give" in message
        return
    result = run_one(text, samples, engine, verifier)
    assert result.failed is None
    assert 0 < result.spend.samples <= samples
    assert result.candidates
