"""The threshold of step rejection is fitted by running it: accuracy first, then cost."""

import pytest

from configs.schema import OracleVerifier
from search.errors import ConfigError
from search.strategies import parse
from search.thresholds import fit_threshold, needs_fit
from search.types import Budget, VerifierFacts
from search.verifiers.oracle import Oracle
from tests.scripted_search import ChainTask, chain_engine, sampler_of


def fitted(noise, text="step_rejection(draws=4, threshold=fit)", **options):
    task = ChainTask()
    problems = [task.problem(i, 5) for i in range(80)]
    verifier = Oracle(task, OracleVerifier(type="oracle", noise=noise))
    spec = parse(text)
    assert needs_fit(spec)
    sampler = sampler_of(chain_engine(0.6), task)
    return fit_threshold(spec, Budget("samples", 4), problems, sampler, verifier, **options)


def test_a_threshold_that_separates_right_from_wrong_is_chosen_and_the_cheapest_of_them():
    fit = fitted(noise=0.0)
    spec, tried = fit.spec, fit.tried
    # the oracle says 0.9 or 0.1: below 0.1 nothing is drawn again, from 0.3 to 0.9 all wrong steps are
    assert spec.options["threshold"] == 0.3
    assert spec.options["draws"] == 4
    by_threshold = {t.threshold: t for t in tried}
    assert by_threshold[0.3].accuracy > by_threshold[0.1].accuracy + 0.2
    assert not needs_fit(spec)


def test_where_the_verifier_knows_nothing_drawing_again_is_not_paid_for():
    fit = fitted(noise=0.5)
    assert fit.spec.options["threshold"] == 0.1
    assert fit.tried[0].flops < fit.tried[2].flops / 1.4


def test_progress_and_cost_are_of_all_thresholds_together():
    heard = []
    fit = fitted(noise=0.0, on_tick=lambda tick: heard.append((tick.finished, tick.tokens, tick.steps)))
    assert heard == sorted(heard)
    assert 4 * 80 <= heard[-1][0] <= 5 * 80
    assert heard[-1][1:] == (fit.tokens, fit.steps)


def test_a_cap_ends_the_grid_and_what_was_tried_decides():
    whole = fitted(noise=0.0)
    cap = whole.tokens // 2
    fit = fitted(noise=0.0, max_tokens=cap)
    assert 0 < fit.tokens <= cap
    assert 1 <= len(fit.tried) < 5
    assert fit.tried == whole.tried[: len(fit.tried)]
    assert fit.spec.options["threshold"] in [one.threshold for one in fit.tried]


@pytest.mark.parametrize("cap", [0, 20])
def test_a_cap_under_which_nothing_can_be_tried_is_an_error(cap):
    with pytest.raises(ConfigError, match=rf"a cap of {cap} tokens does not let one threshold be tried on 80 problems"):
        fitted(noise=0.0, max_tokens=cap)


def test_an_unfitted_threshold_is_refused_with_the_way_out():
    with pytest.raises(ConfigError, match=r"threshold=0\.5"):
        parse("step_rejection(threshold=fit)").plan(Budget("samples", 4), VerifierFacts("v", 0))
