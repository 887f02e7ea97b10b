import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from configs.schema import Difficulty
from difficulty import bins
from search.errors import DataError
from search.evaluate import Pool, expected_spend, reduce_pool
from search.types import Candidate, Finish, Grade, Problem, SearchResult, Spend


def pool(correct, answers=None, scores=None, **given):
    num = len(correct)
    spend = Spend(samples=num, generated_tokens=10 * num, prefilled_tokens=5, flops_ideal=100.0 * num)
    return Pool(
        "3,5>8",
        tuple(correct),
        answers or ("8",) * num,
        scores or (None,) * num,
        0,
        spend,
        num_prompt_tokens=5,
        **given,
    )


# ---------------------------------------------------------------- edges


def test_quantile_bins_are_even_and_number_from_the_easiest():
    values = np.random.default_rng(0).random(500)
    fixed = bins.fix(values)
    assert (fixed.num, np.bincount(fixed(values))[1:].tolist()) == (5, [100] * 5)
    assert values[fixed(values) == 1].min() > values[fixed(values) == 2].max()


def test_edges_stay_where_they_were_fixed():
    fixed = bins.fix(np.linspace(0, 1, 101), num=4)
    assert fixed([0.99, 0.01, np.nan, np.inf]).tolist() == [1, 4, 0, 0]


@pytest.mark.parametrize(
    ("rates", "expected"),
    [
        ([0.0] * 60 + [0.1] * 20 + [0.2] * 20, {0.0: 4, 0.1: 2, 0.2: 1}),  # the middle of bins 3 to 5
        ([1.0] * 60 + [0.5] * 20 + [0.1] * 20, {1.0: 2, 0.5: 4, 0.1: 5}),
        ([0.5] * 10, {0.5: 3}),
    ],
)
def test_equal_rates_share_the_bin_of_their_middle(rates, expected):
    fixed = bins.fix(rates)
    assert fixed.num == 5
    assert {rate: int(b) for rate, b in zip(rates, fixed(rates), strict=True)} == expected


@settings(deadline=None)
@given(st.lists(st.integers(0, 16), min_size=1, max_size=60), st.integers(1, 6))
def test_harder_never_gets_an_easier_bin(counts, num):
    rates = np.array(counts) / 16
    found = bins.fix(rates, num=num)(rates)
    assert ((found >= 1) & (found <= num)).all()
    order = np.argsort(rates)
    assert (np.diff(found[order]) <= 0).all()


def test_absolute_bins_are_those_of_liu_and_configurable():
    fixed = bins.fix([0.9, 0.9], binning="absolute")
    assert fixed([1.0, 0.51, 0.5, 0.11, 0.1, 0.0]).tolist() == [1, 1, 2, 2, 3, 3]
    assert bins.fixed_by(Difficulty(binning="absolute", edges=(0.3,)), [0.5])([0.5, 0.2]).tolist() == [1, 2]
    assert bins.fixed_by(Difficulty(bins=2), [0.1, 0.2, 0.3, 0.4]).num == 2


@pytest.mark.parametrize("edges", [(), (0.5, 0.1), (0.1, 0.1)])
def test_edges_ascend(edges):
    with pytest.raises(ValueError, match="edges"):
        Difficulty(edges=edges)


# ---------------------------------------------------------------- what they are made of


def test_values_of_a_pool():
    drawn = pool([True, False, False, False], ("8", "7", None, "6"), (0.9, 0.3, None, None), num_unscored=1)
    assert bins.oracle_rate(drawn) == 0.25
    assert bins.verifier_rate(drawn) == pytest.approx((0.9 + 0.3 + 0.0) / 3)  # no answer is 0, no verdict is none
    assert np.isnan(bins.verifier_rate(pool([True])))
    assert np.isnan(bins.oracle_rate(pool([])))


def test_halves_are_disjoint_and_whole_and_depend_on_the_seed():
    drawn = pool([i % 3 == 0 for i in range(16)], tuple(map(str, range(16))), tuple(i / 16 for i in range(16)))
    first, second = bins.halves(drawn, seed=1)
    assert sorted((*first.answers_N, *second.answers_N), key=int) == list(drawn.answers_N)
    assert len(first.correct_N) == len(second.correct_N) == 8
    assert all(drawn.correct_N[int(a)] == c for a, c in zip(first.answers_N, first.correct_N, strict=True))
    assert all(score == int(a) / 16 for a, score in zip(second.answers_N, second.scores_N, strict=True))
    assert bins.halves(drawn, seed=1) == (first, second)
    assert bins.halves(drawn, seed=2)[0] != first
    assert first.spend.generated_tokens == 80
    assert first.spend.flops_ideal == pytest.approx(expected_spend(drawn, 8, scored=True).tolist()[5])


def test_halves_of_a_stored_result():
    candidates = tuple(
        Candidate((i,), str(i), Finish.EOS, answer=str(i), grade=Grade.CORRECT if i < 3 else Grade.WRONG)
        for i in range(5)
    )
    result = SearchResult(
        Problem("q", "q", "8"),
        "pool(5)",
        candidates,
        2,
        Spend(samples=5, generated_tokens=5),
        "m",
        "0",
        prompt_ids=(1,),
    )
    first, second = bins.halves(result)
    assert (len(first.candidates), len(second.candidates)) == (2, 3)
    assert {c.text for c in first.candidates} | {c.text for c in second.candidates} == set("01234")
    chosen = [half.chosen for half in (first, second) if half.chosen]
    assert [c.text for c in chosen] == ["2"]
    assert [c.text for c in first.candidates] == list(bins.halves(reduce_pool(result))[0].answers_N)


def test_one_sample_has_no_halves():
    with pytest.raises(DataError, match="'3,5>8' has 1 samples"):
        bins.halves(pool([True]))


# ---------------------------------------------------------------- agreement


def test_confusion_and_agreement():
    table = bins.confusion([1, 1, 2, 3, 0], [1, 2, 2, 1, 1], 3)
    assert table.tolist() == [[1, 1, 0], [0, 1, 0], [1, 0, 0]]
    found = bins.agreement(table)
    assert (found.exact, found.within_one) == (0.5, 0.75)
    assert found.chance == pytest.approx((2 * 2 + 1 * 2 + 1 * 0) / 16)


def test_the_truth_agrees_with_itself_and_chance_is_what_unrelated_bins_reach():
    generator = np.random.default_rng(0)
    oracle, other = generator.integers(1, 6, 20_000), generator.integers(1, 6, 20_000)
    assert bins.agreement(bins.confusion(oracle, oracle, 5)).exact == 1
    found = bins.agreement(bins.confusion(oracle, other, 5))
    assert found.exact == pytest.approx(found.chance, abs=0.01)
