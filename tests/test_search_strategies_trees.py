"""Tree searches on trees made by hand: who is kept, who is continued how often, what is returned and what it costs."""

import itertools
import math
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from search.engines.scripted import EOS, SEPARATOR
from search.randomness import key64
from search.strategies.trees import softmax, top
from search.types import Finish
from tests.scripted_search import (
    LineTask,
    StepEngine,
    TextVerifier,
    by_score,
    by_table,
    check_company,
    run_one,
    texts,
)
from tests.scripted_search import given as answer_given

STEPS = "\n"


def asked(engine):
    """What was written where each request came in, and whether it asked for one step or a whole answer."""
    found = []
    for request, _ in engine.log:
        start = request.prefix.index(SEPARATOR) + 1
        found.append((bytes(request.prefix[start:]).decode(), request.stop, request.temperature))
    return found


def prefixes(engine):
    return [written for written, _, _ in asked(engine)]


# ---------------------------------------------------------------- beam search

TWO_LEVELS = {
    "": ["a\n", "b\n", "c\n", "d\n"],
    "a\n": ["e\n", "f\n"],
    "c\n": ["g\n", "h\n"],
    "a\nf\n": ["A", "B"],
    "c\ng\n": ["A", "C"],
}
TWO_LEVEL_SCORES = {"a\n": 0.9, "b\n": 0.1, "c\n": 0.8, "d\n": 0.2, "a\ne\n": 0.3, "a\nf\n": 0.7, "c\ng\n": 0.6}
TWO_LEVEL_SCORES |= {"c\nh\n": 0.1, "a\nf\nA": 0.5, "a\nf\nB": 0.6, "c\ng\nA": 0.4, "c\ng\nC": 0.2}


def test_beam_keeps_the_best_n_over_m_and_continues_each_m_times():
    engine = StepEngine(by_table(TWO_LEVELS))
    result = run_one("beam(width=2)", 4, engine, by_score(TWO_LEVEL_SCORES))
    assert prefixes(engine) == [""] * 4 + ["a\n", "a\n", "c\n", "c\n"] + ["a\nf\n"] * 2 + ["c\ng\n"] * 2
    assert texts(result) == ["a\nf\nA", "a\nf\nB", "c\ng\nA", "c\ng\nC"]
    assert result.spend.samples == 4


def test_the_finished_beams_vote_with_the_score_of_their_last_step():
    result = run_one("beam(width=2)", 4, StepEngine(by_table(TWO_LEVELS)), by_score(TWO_LEVEL_SCORES))
    assert [c.score for c in result.candidates] == [0.5, 0.6, 0.4, 0.2]
    assert result.candidates[0].step_scores == (0.9, 0.7, 0.5)
    assert answer_given(result) == "A"  # 0.5 + 0.4 against 0.6
    engine = StepEngine(by_table(TWO_LEVELS))
    assert answer_given(run_one("beam(width=2, vote=highest)", 4, engine, by_score(TWO_LEVEL_SCORES))) == "B"


@pytest.mark.parametrize(("aggregation", "kept"), [("last", "b\n"), ("min", "a\n"), ("mean", "a\n"), ("prod", "a\n")])
def test_steps_are_ranked_by_the_verifiers_aggregation(aggregation, kept):
    table = {"": ["a\n", "b\n", "x\n", "y\n"], "a\n": "c\n", "b\n": "c\n", "a\nc\n": "A", "b\nc\n": "B"}
    scores = {"a\n": 0.9, "b\n": 0.2, "x\n": 0.1, "y\n": 0.1, "a\nc\n": 0.6, "b\nc\n": 0.7}
    verifier = TextVerifier(lambda text: scores.get(text, 0.5), aggregation=aggregation)
    result = run_one("beam(width=2)", 4, StepEngine(by_table(table)), verifier)
    assert {c.text[:2] for c in result.candidates} == {kept}
    own = {"last": lambda s: s[-1], "min": min, "mean": lambda s: sum(s) / 3, "prod": math.prod}[aggregation]
    assert all(c.score == pytest.approx(own(c.step_scores)) for c in result.candidates)


def test_beam_with_a_width_of_n_is_no_single_path():
    """A rival's BeamSearch(beam_width=4) at budget 4 follows one path; here 4 first steps compete."""
    table = {"": ["a\n", "b\n", "c\n", "d\n"], "c\n": ["A", "B", "C", "D"]}
    engine = StepEngine(by_table(table))
    result = run_one("beam(width=4)", 4, engine, by_score({"c\n": 0.9}))
    assert prefixes(engine) == [""] * 4 + ["c\n"] * 4
    assert texts(result) == ["c\nA", "c\nB", "c\nC", "c\nD"]


def test_a_search_is_at_most_40_rounds_and_then_the_beams_are_finished():
    engine = StepEngine(lambda prompt, written, *_: "x\n" if written.count("\n") < 44 else "A")
    result = run_one("beam(width=2)", 4, engine, by_score({}))
    ways = Counter(stop for _, stop, _ in asked(engine))
    assert ways == {STEPS: 160, None: 4}
    assert texts(result) == ["x\n" * 44 + "A"] * 4
    assert all(c.complete and c.score == 0.5 and len(c.step_ends) == 41 for c in result.candidates)
    assert result.spend.samples == 4


def test_rounds_can_be_fewer():
    engine = StepEngine(lambda prompt, written, *_: "x\n" if written.count("\n") < 9 else "A")
    run_one("beam(width=2, max_rounds=3)", 4, engine, by_score({}))
    assert Counter(stop for _, stop, _ in asked(engine)) == {STEPS: 12, None: 4}


def test_a_finished_beam_leaves_with_its_score_and_gives_its_place_up():
    table = {"": ["A", "b\n", "c\n", "d\n"], "b\n": ["B", "C"], "d\n": ["D"]}
    engine = StepEngine(by_table(table))
    verifier = by_score({"A": 0.95, "b\n": 0.7, "c\n": 0.1, "d\n": 0.6})
    result = run_one("beam(width=2)", 4, engine, verifier)
    assert prefixes(engine) == [""] * 4 + ["b\n", "b\n", "d\n"]  # three places are left
    assert texts(result) == ["A", "b\nB", "b\nC", "d\nD"]
    assert result.candidates[0].score == 0.95


def test_early_finishers_take_no_place_from_better_ones():
    """A rival fills its quota with those that finished first. Here a bad early answer stands beside the good ones."""
    table = {"": ["bad", "b\n", "c\n", "d\n"], "b\n": ["A"], "c\n": ["A"]}
    result = run_one("beam(width=2)", 4, StepEngine(by_table(table)), by_score({"bad": 0.1, "b\n": 0.9, "b\nA": 0.8}))
    assert texts(result) == ["bad", "b\nA", "b\nA", "c\nA"]
    assert answer_given(result) == "A"


def test_no_answer_is_copied_to_fill_the_width():
    """A rival pads the finished beams to N with copies, each of which votes again: 4 x 0.4 would win here."""
    table = {"": ["A", "b\n", "c\n", "d\n"], "b\n": ["B"]}
    verifier = by_score({"A": 0.4, "b\n": 0.9, "b\nB": 0.3})
    result = run_one("beam(width=4)", 4, StepEngine(by_table(table)), verifier)
    assert texts(result) == ["A", "b\nB", "b\nB", "b\nB"]
    assert len({c.path for c in result.candidates}) == 4  # three draws of B; A is one draw and one vote
    assert answer_given(result) == "B"


def test_a_search_whose_beams_all_end_at_once_stops():
    engine = StepEngine(by_table({"": ["A", "B", "C", "D"]}))
    assert texts(run_one("beam(width=2)", 4, engine, by_score({}))) == ["A", "B", "C", "D"]
    assert len(engine.log) == 4


def test_end_of_sequence_ends_a_beam():
    """A rival never sees EOS and writes on until the context overflows."""
    engine = StepEngine(by_table({"": ["a\n"], "a\n": ["", "b\n"], "a\nb\n": ["A"]}))
    result = run_one("beam(width=2)", 2, engine, by_score({}))
    assert result.candidates[0].ids == (*b"a\n", EOS)
    assert not any(EOS in request.prefix for request, _ in engine.log)


def test_a_dead_end_gives_its_place_up_and_never_votes():
    long = "x" * 300
    table = {"": [long, "b\n", "c\n", "d\n"], "b\n": ["A"], "c\n": ["B"]}
    result = run_one("beam(width=2)", 4, StepEngine(by_table(table)), by_score({"b\n": 0.9, "c\n": 0.8}))
    assert [c.finish for c in result.candidates] == [Finish.LENGTH] + [Finish.EOS] * 3
    assert result.candidates[0].score is None
    assert answer_given(result) == "A"


def test_equal_steps_are_different_draws_unless_told_otherwise():
    table = {"": ["a\n", "a\n", "b\n", "b\n"], "a\n": ["A"], "b\n": ["B"]}
    verifier = by_score({"a\n": 0.9, "b\n": 0.8})
    together = StepEngine(by_table(table))
    run_one("beam(width=2)", 4, together, verifier)
    assert prefixes(together)[4:] == ["a\n"] * 4
    apart = StepEngine(by_table(table))
    run_one("beam(width=2, distinct=true)", 4, apart, verifier)
    assert prefixes(apart)[4:] == ["a\n", "a\n", "b\n", "b\n"]


def test_distinct_beams_keep_their_order():
    table = {"": ["b\n", "a\n", "b\n", "a\n"], "a\n": ["A"], "b\n": ["B"]}
    engine = StepEngine(by_table(table))
    run_one("beam(width=4, distinct=true)", 4, engine, by_score({}))
    assert prefixes(engine)[4:] == ["b\n"] * 4  # a tie goes to the first


# ---------------------------------------------------------------- lookahead

ROLLED = {"": ["a\n", "b\n"], "b\n": ["A", "C"]}
ROLLOUTS = {"a\n": "x", "b\n": "Y"}
ROLLED_SCORES = {"a\n": 0.9, "b\n": 0.1, "a\nx": 0.2, "b\nY": 0.8, "b\nA": 0.5, "b\nC": 0.6}


def test_lookahead_scores_the_rollout_it_paid_for():
    """A rival generates the rollout and scores the step without it."""
    verifier = by_score(ROLLED_SCORES)
    result = run_one("lookahead(width=2)", 4, StepEngine(by_table(ROLLED, ROLLOUTS)), verifier)
    assert texts(result) == ["b\nA", "b\nC"]  # the step that looks worse leads to the better end
    plain = {"": ["a\n", "b\n"], "a\n": ["A"]}
    assert texts(run_one("beam(width=2)", 2, StepEngine(by_table(plain)), by_score(ROLLED_SCORES))) == ["a\nA"] * 2


def test_a_rollout_is_greedy_and_its_text_is_thrown_away():
    engine = StepEngine(by_table(ROLLED, ROLLOUTS))
    result = run_one("lookahead(width=2)", 4, engine, by_score(ROLLED_SCORES))
    assert asked(engine) == [
        ("", STEPS, 1.0),
        ("", STEPS, 1.0),
        ("a\n", STEPS, 0.0),
        ("b\n", STEPS, 0.0),
        ("b\n", STEPS, 1.0),
        ("b\n", STEPS, 1.0),
    ]
    assert not any("Y" in text for text in texts(result))


def test_lookahead_costs_n_times_k_plus_one():
    for steps, samples in ((1, 8), (3, 16)):
        engine = StepEngine(lambda prompt, written, *_: "x\n" if written.count("\n") < 6 else "A")
        result = run_one(f"lookahead(width=2, steps={steps})", samples, engine, by_score({}))
        assert prefixes(engine).count("") == samples // (steps + 1)
        assert result.spend.samples == samples
        assert result.spend.generated_tokens == sum(len(c.ids) for _, c in engine.log)


def test_a_rollout_goes_k_steps_and_no_further():
    engine = StepEngine(lambda prompt, written, *_: "x\n" if written.count("\n") < 9 else "A")
    run_one("lookahead(width=2, steps=3, max_rounds=1)", 8, engine, by_score({}))
    greedy = [written for written, _, temperature in asked(engine) if temperature == 0]
    assert greedy == ["x\n"] * 2 + ["x\n" * 2] * 2 + ["x\n" * 3] * 2


def test_a_rollout_that_ends_early_is_charged_in_full():
    engine = StepEngine(by_table(ROLLED, ROLLOUTS))
    result = run_one("lookahead(width=2, steps=3)", 8, engine, by_score(ROLLED_SCORES))
    assert result.spend.samples == 8


def test_a_finished_answer_has_its_own_score_under_lookahead():
    result = run_one("lookahead(width=2)", 4, StepEngine(by_table({"": ["A", "B"]})), by_score({"A": 0.3, "B": 0.4}))
    assert [c.score for c in result.candidates] == [0.3, 0.4]


def test_lookahead_of_no_steps_is_beam_search():
    beam = run_one("beam(width=2)", 4, StepEngine(by_table(TWO_LEVELS)), by_score(TWO_LEVEL_SCORES))
    none = run_one("lookahead(width=2, steps=0)", 4, StepEngine(by_table(TWO_LEVELS)), by_score(TWO_LEVEL_SCORES))
    assert none.candidates == beam.candidates
    assert none.spend == beam.spend


# ---------------------------------------------------------------- DVTS


def test_the_subtrees_of_dvts_do_not_compete():
    table = {"": ["a\n", "b\n", "c\n", "d\n"], "a\n": ["A", "B"], "c\n": ["C", "D"]}
    scores = {"a\n": 0.9, "b\n": 0.8, "c\n": 0.2, "d\n": 0.1}
    engine = StepEngine(by_table(table))
    result = run_one("dvts(width=2)", 4, engine, by_score(scores))
    assert prefixes(engine)[4:] == ["a\n", "a\n", "c\n", "c\n"]  # beam search would go on from a and b
    assert [(c.text, c.chain) for c in result.candidates] == [("a\nA", 0), ("a\nB", 0), ("c\nC", 1), ("c\nD", 1)]


def test_dvts_returns_nothing_unfinished_that_could_vote():
    """A rival returns the last steps of every subtree, finished or not."""
    engine = StepEngine(lambda prompt, written, temperature, key: "x\n" if key % 3 else "A")
    result = run_one("dvts(width=2)", 8, engine, by_score({}), max_new_tokens=9)
    assert {c.finish for c in result.candidates} <= {Finish.EOS, Finish.LENGTH}
    assert all(c.answer is None for c in result.candidates if not c.complete)


def test_a_subtree_that_ended_leaves_its_budget_to_nobody():
    table = {"": ["A", "B", "c\n", "d\n"], "c\n": ["C", "D"]}
    engine = StepEngine(by_table(table))
    result = run_one("dvts(width=2)", 4, engine, by_score({"c\n": 0.9}))
    assert prefixes(engine)[4:] == ["c\n", "c\n"]
    assert texts(result) == ["A", "B", "c\nC", "c\nD"]


# ---------------------------------------------------------------- REBASE


def test_rebase_shares_the_width_by_softmax():
    """By hand: weights 1, e^-2, e^-2, e^-4 of 1.289 are 6.21, 0.84, 0.84 and 0.11 of 8 places."""
    assert softmax(0.2)([0.9, 0.5, 0.5, 0.1], 8) == [6, 1, 1, 0]
    assert softmax(0.2)([0.5] * 4, 8) == [2, 2, 2, 2]
    assert softmax(0.2)([0.5] * 3, 8) == [3, 3, 2]
    assert softmax(1e-3)([0.0, 1.0], 5) == [0, 5]


def test_rebase_continues_each_by_its_share():
    table = {"": ["a\n", "b\n", "c\n", "d\n"] * 2, "a\n": ["A"], "b\n": ["B"], "c\n": ["C"], "d\n": ["D"]}
    engine = StepEngine(by_table(table))
    result = run_one("rebase", 8, engine, by_score({"a\n": 0.9, "b\n": 0.5, "c\n": 0.5, "d\n": 0.1}))
    shares = softmax(0.2)([0.9, 0.5, 0.5, 0.1] * 2, 8)
    expected = Counter(written for written, num in zip("abcdabcd", shares, strict=True) for _ in range(num))
    assert Counter(written[0] for written in prefixes(engine)[8:]) == expected
    assert len(result.candidates) == result.spend.samples == 8


def test_rebase_shares_only_what_the_finished_leave():
    table = {"": ["A", "b\n", "c\n", "B"], "b\n": ["C"], "c\n": ["D"]}
    engine = StepEngine(by_table(table))
    result = run_one("rebase", 4, engine, by_score({"A": 1.0, "B": 0.0, "b\n": 0.5, "c\n": 0.5}))
    assert prefixes(engine)[4:] == ["b\n", "c\n"]
    assert len(result.candidates) == 4


scores = st.lists(st.floats(0, 1), min_size=1, max_size=20)


@settings(deadline=None)
@given(scores, st.integers(0, 64), st.floats(0.01, 5))
def test_shares_sum_to_the_width_and_follow_the_scores(scores, places, temperature):
    counts = softmax(temperature)(scores, places)
    assert sum(counts) == places
    assert min(counts) >= 0
    ranked = [num for _, num in sorted(zip(scores, counts, strict=True), key=lambda pair: -pair[0])]
    assert all(better >= worse - 1 for better, worse in itertools.pairwise(ranked))


@settings(deadline=None)
@given(scores, st.integers(0, 64), st.integers(1, 8))
def test_the_best_get_their_width_until_the_places_are_gone(scores, places, width):
    counts = top(width)(scores, places)
    assert sum(counts) == min(places, width * len(scores))
    assert sum(0 < num < width for num in counts) <= 1  # only the last may get less
    worst = min((score for score, num in zip(scores, counts, strict=True) if num), default=1)
    assert all(score <= worst for score, num in zip(scores, counts, strict=True) if not num)


# ---------------------------------------------------------------- few-shot prompts


class FewShot(LineTask):
    """A step ends with a blank line, and so does an answer: only the next question tells them apart."""

    step_delimiter = "\n\n"
    end_text = "\n\nQuestion:"


@pytest.mark.parametrize("options", ["", "max_rounds=1"])
@pytest.mark.parametrize("name", ["beam", "dvts", "rebase", "step_rejection"])
def test_the_forks_of_an_answer_that_was_over_have_one_vote(name, options):
    """A is continued four times and cut back to the same ids each time: copies of one draw."""
    table = {"": ["A\n\n", "b\n\n", "c\n\n", "d\n\n"], "A\n\n": "Question: what else?"}
    engine = StepEngine(by_table(table))
    result = run_one(f"{name}({options})", 4, engine, by_score({"A\n\n": 0.9, "A": 0.9}, 0.1), task=FewShot())
    assert len(engine.log) == (4 + 4 if name != "step_rejection" else 1 + 1)
    assert [(c.text, c.ids, c.finish) for c in result.candidates] == [("A", (*b"A", EOS), Finish.EOS)]
    assert answer_given(result) == "A"


def test_forks_that_add_something_are_draws_of_their_own():
    table = {"": ["A\n\n"], "A\n\n": ["Question: what else?", "B", "Question:", "B"]}
    result = run_one("beam", 4, StepEngine(by_table(table)), by_score({}), task=FewShot())
    assert texts(result) == ["A", "A\n\nB", "A\n\nB"]


# ---------------------------------------------------------------- all of them

TREES = ["beam(width=2)", "beam(width=4)", "lookahead(width=2)", "dvts(width=2)", "dvts(width=4)", "rebase"]
TREES += ["step_rejection", "step_rejection(draws=2)", "searched_revisions(width=2)", "beam_revisions(width=2)"]


def restless(seed):
    """Answers of random shape: steps, ends, empty ends and steps that are too long."""
    pieces = ["a\n", "b\n", "\n", "A", "B", "", "x" * 90]

    def script(prompt, written, temperature, key):
        return pieces[key64(seed, key if temperature else written) % (4 if len(written) < 4 else 7)]

    return StepEngine(script)


@settings(deadline=None, max_examples=60)
@given(st.sampled_from(TREES), st.integers(0, 10**6))
def test_every_candidate_is_a_draw_of_its_own_and_ended(strategy, seed):
    verifier = TextVerifier(lambda text: key64(seed, text) / 2**64)
    engine = restless(seed)
    result = run_one(strategy, 8, engine, verifier, max_new_tokens=60)
    assert 1 <= len(result.candidates) <= 8
    assert len({c.path for c in result.candidates if not c.prompt_ids}) == sum(
        not c.prompt_ids for c in result.candidates
    )
    assert not any(c.open for c in result.candidates)
    assert result.spend.samples <= 8
    drawn = Counter(request.prefix + c.ids for request, c in engine.log)
    for c in result.candidates:
        assert drawn[(c.prompt_ids or result.prompt_ids) + c.ids] > 0


@pytest.mark.parametrize("strategy", TREES)
def test_results_depend_neither_on_company_nor_on_the_order_of_completion(strategy):
    check_company(strategy, 5, 0.6, num=5)
