"""The threshold of step rejection is fitted by running it: accuracy first, then cost."""

import pytest

from configs.schema import OracleVerifier
from search.errors import ConfigError
from search.strategies import parse
from search.thresholds import fit_threshold, needs_fit
from search.types import Budget, VerifierFacts
from search.verifiers.oracle import Oracle
from tests.scripted_search import ChainTask, chain_engine, sampler_of


def fitted(noise, text="step_rejection(draws=4, threshold=fit)"):
    task = ChainTask()
    problems = [task.problem(i, 5) for i in range(80)]
    verifier = Oracle(task, OracleVerifier(type="oracle", noise=noise))
    spec = parse(text)
    assert needs_fit(spec)
    sampler = sampler_of(chain_engine(0.6), task)
    return fit_threshold(spec, Budget("samples", 4), problems, sampler, verifier)


def test_a_threshold_that_separates_right_from_wrong_is_chosen_and_the_cheapest_of_them():
    spec, tried = fitted(noise=0.0)
    # the oracle says 0.9 or 0.1: below 0.1 nothing is drawn again, from 0.3 to 0.9 all wrong steps are
    assert spec.options["threshold"] == 0.3
    assert spec.options["draws"] == 4
    by_threshold = {t.threshold: t for t in tried}
    assert by_threshold[0.3].accuracy > by_threshold[0.1].accuracy + 0.2
    assert not needs_fit(spec)


def test_where_the_verifier_knows_nothing_drawing_again_is_not_paid_for():
    spec, tried = fitted(noise=0.5)
    assert spec.options["threshold"] == 0.1
    assert tried[0].flops < tried[2].flops / 1.4


def test_an_unfitted_threshold_is_refused_with_the_way_out():
    with pytest.raises(ConfigError, match=r"threshold=0\.5"):
        parse("step_rejection(threshold=fit)").plan(Budget("samples", 4), VerifierFacts("v", 0))
