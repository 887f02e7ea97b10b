import dataclasses
import json
import subprocess
import sys

import numpy as np
import pytest

from difficulty import probe as module
from difficulty.probe import Probe, check_rates, estimator, evaluate, fit
from search import stats
from search.errors import DataError, ModelError
from search.types import Problem

NUM, LAYERS, HIDDEN = 600, 3, 24


def make(num=NUM, *, samples=8, seed=0, informative=True):
    """States in which layer 1's mean (and nothing else) carries the logit of the pass rate."""
    world = np.random.default_rng(99)  # the same directions for every draw
    direction = world.normal(size=HIDDEN)
    generator = np.random.default_rng(seed)
    latent = generator.normal(size=num)
    states = generator.normal(size=(num, LAYERS, 2, HIDDEN)).astype(np.float32)
    if informative:
        states[:, 1, 1] += (latent[:, None] * direction).astype(np.float32)
    states[:, 0, 0] = direction.astype(np.float32)  # the last prompt token's embedding is the same everywhere
    rates = 1 / (1 + np.exp(1 - 2 * latent))
    totals = np.full(num, samples)
    return states, generator.binomial(totals, rates), totals, generator.integers(5, 20, num), rates


@pytest.fixture(scope="module")
def fitted():
    states, successes, totals, lengths, _ = make()
    return fit(states, successes, totals, lengths, 0, keys=[f"fit{i}" for i in range(NUM)], policy="abc")


def test_import_pulls_no_torch_or_scipy():
    code = "import sys, difficulty.probe; print(*(m in sys.modules for m in ('torch', 'scipy', 'safetensors')))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.split() == ["False"] * 3


def test_the_informative_layer_is_found_and_predicts_held_out_problems(fitted):
    probe, report = fitted
    states, successes, totals, lengths, rates = make(seed=1)
    held_out = evaluate(probe, states, successes, totals, lengths, 0, keys=[f"val{i}" for i in range(NUM)])
    assert probe.representation == "layer 1, mean"
    assert report.usable
    assert held_out.usable
    assert stats.spearman(probe.predict(states), rates) > 0.9
    assert held_out.scores.spearman == pytest.approx(report.scores.spearman, abs=0.05)
    assert held_out.scores.brier_rate < 0.3 * held_out.baselines["constant"].brier_rate
    assert held_out.scores.ece < 0.05
    assert held_out.ceiling is not None
    assert abs(held_out.baselines["length"].spearman) < 0.15 < held_out.scores.spearman < held_out.ceiling
    for point in held_out.curve:
        assert point.observed == pytest.approx(point.predicted, abs=0.12)


def test_out_of_fold_report_is_honest_about_noise():
    states, successes, totals, lengths, _ = make(informative=False)
    probe, report = fit(states, successes, totals, lengths, 0)
    assert not probe.usable
    assert abs(report.scores.spearman) < 0.15  # the same features fit the training labels far better than that
    assert "no better than none" in report.why


def test_difficulty_that_is_length_alone_is_seen_by_the_baseline():
    states, _, totals, lengths, _ = make(informative=False)
    successes = np.random.default_rng(0).binomial(totals, (lengths - 4) / 16)
    _, report = fit(states, successes, totals, lengths, 0)
    assert report.baselines["length"].spearman > 0.7
    assert not report.usable


def test_fitting_is_deterministic_and_needs_no_order_of_magnitude():
    states, successes, totals, lengths, _ = make(200)
    first, again = (fit(states, successes, totals, lengths, 3) for _ in range(2))
    assert first[1] == again[1]
    assert np.array_equal(first[0].predict(states), again[0].predict(states))
    scaled, _ = fit(states * np.float32(1000), successes, totals, lengths, 3)
    assert scaled.predict(states * np.float32(1000)) == pytest.approx(first[0].predict(states), abs=1e-3)


def test_validation_labels_do_not_move_the_probe(fitted):
    """Choices are made on the fit split: evaluating on anything leaves the predictions alone."""
    probe, _ = fitted
    states, successes, totals, lengths, _ = make(seed=2)
    before = probe.predict(states)
    evaluate(probe, states, totals - successes, totals, lengths, 0)
    assert np.array_equal(before, probe.predict(states))


def test_problems_without_samples_are_left_out(fitted):
    states, successes, totals, lengths, _ = make()
    more = np.concatenate([states, np.full_like(states[:5], np.nan)])
    zeros = np.zeros(5, dtype=int)
    probe, report = fit(
        more, np.append(successes, zeros), np.append(totals, zeros), np.append(lengths, zeros), 0, keys=()
    )
    assert report.n == NUM
    assert np.array_equal(probe.predict(states), fitted[0].predict(states))


def test_more_features_than_problems_are_solved_in_the_dual():
    states, successes, totals, lengths, _ = make(100)
    probe, _ = fit(states, successes, totals, lengths, 0, layers="all")
    assert probe.representation == "all"
    assert probe.model.weight_F.shape == (LAYERS * 2 * HIDDEN,)
    assert stats.spearman(probe.predict(make(seed=1)[0]), make(seed=1)[4]) > 0.5


def test_all_layers_are_not_tried_unasked_where_they_are_huge(monkeypatch):
    monkeypatch.setattr(module, "MAX_ALL_FEATURES", LAYERS * 2 * HIDDEN - 1)
    states, successes, totals, lengths, _ = make(100)
    assert fit(states, successes, totals, lengths, 0)[0].representation != "all"
    assert fit(states, successes, totals, lengths, 0, layers="all")[0].representation == "all"


# ---------------------------------------------------------------- what must be noticed


def test_few_problems_and_equal_labels_are_not_usable():
    states, successes, totals, lengths, _ = make(40)
    assert "40 labelled problems, at least 50" in fit(states, successes, totals, lengths, 0)[1].why
    states, successes, totals, lengths, _ = make(60)
    probe, report = fit(states, np.zeros(60, dtype=int), totals, lengths, 0)
    assert not probe.usable
    assert "every problem has the same pass rate, 0.00" in report.why
    assert probe.predict(states) == pytest.approx(np.zeros(60), abs=0.01)


def test_states_that_are_not_finite_are_not_usable(fitted):
    states, successes, totals, lengths, _ = make()
    states[3, 1, 1, 5] = np.nan
    probe, report = fit(states, successes, totals, lengths, 0)
    assert not probe.usable
    assert "1 prompts have hidden states that are not finite" in report.why
    assert "1 prompts" in evaluate(fitted[0], states, successes, totals, lengths, 0).why
    assert np.isnan(fitted[0].predict(states)).nonzero()[0].tolist() == [3]


def test_constant_states_are_not_usable():
    states, successes, totals, lengths, _ = make(100)
    probe, report = fit(np.ones_like(states), successes, totals, lengths, 0)
    assert not probe.usable
    assert not report.usable


def test_a_leak_is_noticed(fitted):
    states, successes, totals, lengths, _ = make()
    report = evaluate(fitted[0], states, successes, totals, lengths, 0, keys=[f"fit{i + 1}" for i in range(NUM)])
    assert not report.usable
    assert f"{NUM - 1} of {NUM} problems were used to fit it, first 'fit1'" in report.why


def test_a_probe_that_broke_on_new_problems_is_noticed(fitted):
    """The policy changed under the probe: its states no longer carry the label."""
    states, successes, totals, lengths, _ = make(seed=5, informative=False)
    report = evaluate(fitted[0], states, successes, totals, lengths, 0)
    assert not report.usable
    assert "no better than none" in report.why


@pytest.mark.parametrize(
    ("rates", "why"),
    [([0.2, np.nan], "1 of 2 predictions are not finite"), ([0.3, 0.3, 0.3], "all 3 predictions are 0.300")],
)
def test_check_rates(rates, why):
    assert check_rates(np.array(rates)) == (False, why)
    assert check_rates(np.array([0.1, 0.2]))[0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"states": np.zeros((4, 3, 24), np.float32)}, "shape \\(4, 3, 24\\), expected"),
        ({"totals_P": np.ones(3, dtype=int)}, "different lengths"),
        ({"keys": ["a"]}, "different lengths"),
        ({"successes_P": np.full(4, 2)}, "more right answers than samples"),
        ({"totals_P": np.zeros(4, dtype=int), "successes_P": np.zeros(4, dtype=int)}, "no problem has a graded sample"),
    ],
)
def test_wrong_input_is_refused(change, message):
    arguments = {
        "states": np.zeros((4, 3, 2, 24), np.float32),
        "successes_P": np.zeros(4, dtype=int),
        "totals_P": np.ones(4, dtype=int),
        "lengths_P": np.ones(4, dtype=int),
        "seed": 0,
    }
    with pytest.raises(DataError, match=message):
        fit(**(arguments | change))


def test_states_of_another_policy_are_refused(fitted):
    with pytest.raises(DataError, match="fitted to another policy"):
        fitted[0].predict(np.zeros((1, LAYERS, 2, HIDDEN + 1), np.float32))


# ---------------------------------------------------------------- in use


def test_estimator_falls_back_to_one_rate(fitted):
    probe, _ = fitted
    states = make(3)[0]
    states[1] = np.nan
    problems = [Problem(f"q{i}", "?") for i in range(3)]
    rates = estimator(probe, lambda _: states)(problems)
    assert rates[1] == probe.mean_rate
    assert len({*rates}) == 3
    broken = dataclasses.replace(probe, usable=False)
    assert estimator(broken, lambda _: states)(problems) == [probe.mean_rate] * 3
    assert estimator(probe, lambda _: states)([]) == []


def test_bins_are_quantiles_from_easy_to_hard(fitted):
    probe, _ = fitted
    rates = probe.predict(make(seed=1)[0])
    bins = probe.bins(rates)
    assert set(bins) == {1, 2, 3, 4, 5}
    assert np.bincount(bins)[1:].min() > NUM / 10
    assert rates[bins == 1].min() > rates[bins == 5].max()


def test_a_saved_probe_predicts_the_same(fitted, tmp_path):
    probe, report = fitted
    states = make(seed=4)[0]
    probe.save(tmp_path)
    loaded = Probe.load(tmp_path)
    assert np.array_equal(loaded.predict(states), probe.predict(states))
    for name in ("edges", "fit_keys", "policy", "shape", "usable", "why", "mean_rate", "representation"):
        assert getattr(loaded, name) == getattr(probe, name)
    text = json.dumps(report.to_json(), allow_nan=False)
    assert module.Report.from_json(json.loads(text)) == report
    first = [(tmp_path / name).read_bytes() for name in ("probe.json", "probe.safetensors")]
    probe.save(tmp_path)
    assert first == [(tmp_path / name).read_bytes() for name in ("probe.json", "probe.safetensors")]


@pytest.mark.parametrize("damage", ["no json", "no tensors", "torn json", "torn tensors", "other format"])
def test_a_damaged_probe_is_a_model_error(fitted, tmp_path, damage):
    fitted[0].save(tmp_path)
    path = tmp_path / ("probe.json" if "json" in damage or "format" in damage else "probe.safetensors")
    if damage.startswith("no"):
        path.unlink()
    elif damage == "other format":
        path.write_text(path.read_text().replace('"format": 1', '"format": 9'))
    else:
        path.write_bytes(path.read_bytes()[:50])
    with pytest.raises(ModelError, match="fit it again"):
        Probe.load(tmp_path)


def test_metric_names(fitted):
    rows = fitted[1].metrics()
    names = [row["name"] for row in rows]
    assert len(names) == len(set(names))
    wanted = "spearman brier brier_rate ece auroc spearman_ceiling usable length_spearman constant_brier_rate"
    assert {f"difficulty/{name}" for name in wanted.split()} <= set(names)
    json.dumps(rows, allow_nan=False)
