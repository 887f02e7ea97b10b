"""The paper's exchange of pre-training for inference, in both versions, against its printed anchors."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from search.errors import ConfigError
from search.exchange import (
    RATIOS,
    VERSIONS,
    Trained,
    allowance,
    break_even,
    grid,
    matched_multiplier,
    multiplier,
    questions_for,
)

versions = st.sampled_from(VERSIONS)
sizes = st.floats(1.01, 1000)
ratios = st.floats(1e-3, 1e3)


@pytest.mark.parametrize(
    ("version", "ratio", "expected"),
    [
        ("v1", 0.16, 257.75),
        ("v1", 0.79, 63.3671),
        ("v1", 22, 15.7727),
        ("iclr", 0.08, 257.75),
        ("iclr", 0.40, 62.75),
        ("iclr", 11, 15.7727),
    ],
)
def test_the_papers_ratios_are_its_budgets(version, ratio, expected):
    assert multiplier(14, ratio, version) == pytest.approx(expected, abs=1e-4)
    assert grid(version=version)[ratio] == pytest.approx(expected, abs=1e-4)
    assert tuple(grid(version=version)) == RATIOS[version]


@given(versions, sizes, ratios)
def test_the_multiplier_is_where_both_lives_cost_the_same(version, size, ratio):
    """From X and Y alone: X + k Y = M (X + Y)."""
    pretraining = 6 * 1e6 * 1e9
    inference = {"v1": 2, "iclr": 4}[version] * 1e6 * 1e9 * ratio
    k = multiplier(size, ratio, version)
    assert pretraining + k * inference == pytest.approx(size * (pretraining + inference))


@given(versions, sizes, ratios)
def test_break_even_is_the_inverse(version, size, ratio):
    assert break_even(size, multiplier(size, ratio, version), version) == pytest.approx(ratio, rel=1e-6)


def test_a_multiple_up_to_the_size_is_cheaper_at_any_ratio():
    assert break_even(14, 14) == break_even(14, 2) == math.inf
    assert multiplier(14, math.inf) == 14
    assert multiplier(1, 0.5) == 1
    assert break_even(14, 257.75, "iclr") == pytest.approx(0.08)


@given(versions, sizes, ratios, st.floats(1, 1e9), st.floats(1, 1e12), st.floats(1, 1e4))
def test_two_models_on_the_same_data_give_the_papers_formula(version, size, ratio, parameters, data, answer):
    small, large = Trained(parameters, data), Trained(size * parameters, data)
    tokens = ratio * data
    k = multiplier(size, ratio, version)
    assert matched_multiplier(small, large, tokens, tokens, version) == pytest.approx(k)
    questions = questions_for(ratio, small, answer)
    per_answer = small.inference_flops(answer, version)
    assert allowance(small, large, questions, answer, version) == pytest.approx(k * per_answer)


def test_models_as_they_are():
    """By hand: small 6*10*100 = 6e3 and 2*10 = 20 a token; large 6*30*200 = 36e3 and 60 a token, 5 tokens an answer."""
    small, large = Trained(10, 100), Trained(30, 200)
    assert small.pretraining_flops == 6_000
    assert large.inference_flops(5) == 300
    assert large.inference_flops(5, "iclr") == 600
    # 50 answers: 36,000 + 15,000 for the large one, 45,000 of it left for the small one's 50 x 4 tokens of 20
    assert matched_multiplier(small, large, 200, 250) == pytest.approx(45_000 / 4_000)
    assert allowance(small, large, 50, 5) == pytest.approx(900)
    assert matched_multiplier(large, small, 250, 200) < 0  # the other one costs less than training this one


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: multiplier(0.5, 1), "a model 0.5 times as large is no larger model: give at least 1"),
        (lambda: multiplier(math.nan, 1), "a model nan times as large"),
        (lambda: multiplier(14, 0), "R = 0 inference tokens per pre-training token: give more than 0"),
        (lambda: multiplier(14, math.nan), "R = nan"),
        (lambda: multiplier(14, 1, "v2"), "there is no version 'v2' of the exchange: there are v1, iclr"),
        (lambda: grid(14, "v2"), "there is no version 'v2'"),
        (lambda: break_even(14, 0), "inference 0 times as expensive means nothing: give more than 0"),
        (lambda: break_even(0, 20), "a model 0 times as large"),
        (lambda: matched_multiplier(Trained(1, 1), Trained(2, 1), 0, 1), "0 tokens of inference: give more than 0"),
        (lambda: allowance(Trained(1, 1), Trained(2, 1), 0, 1), "0 questions in a life: give more than 0"),
        (lambda: questions_for(0, Trained(1, 1), 5), "R = 0 with 5 tokens an answer: give both more than 0"),
    ],
)
def test_what_means_nothing_is_refused_with_the_way_out(call, message):
    with pytest.raises(ConfigError, match=message):
        call()
