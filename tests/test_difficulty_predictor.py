import dataclasses
import json
import subprocess
import sys

import numpy as np
import pytest

from configs.schema import Difficulty
from difficulty import mlp, predictor, probe, prompts, tokens
from difficulty.labels import Counts
from difficulty.predictor import estimator, evaluate, fit, load
from difficulty.prompts import Prompts
from difficulty.report import KINDS, Report, check_rates, too_good
from search import stats
from search.errors import DataError, ModelError
from search.types import Problem

NUM, LAYERS, HIDDEN = 600, 3, 24
RIDGE = Difficulty(predictors=("ridge",))
QUICK = Difficulty(predictors=("ridge", "mlp"))


@dataclasses.dataclass
class World:
    prompts: Prompts
    counts: Counts
    rates: np.ndarray
    metas: list

    def fit(self, config=QUICK, seed=0, **given):
        return fit(self.prompts, self.counts, config, seed=seed, metas_P=self.metas, **given)

    def evaluate(self, fitted, config=QUICK):
        return evaluate(fitted, self.prompts, self.counts, config, seed=0, metas_P=self.metas)


def make(num=NUM, *, samples=8, seed=0, informative=True, name="fit", alter=None):
    """States in which layer 1's mean (and nothing else) carries the logit of the pass rate."""
    direction = np.random.default_rng(99).normal(size=HIDDEN)  # the same for every draw
    generator = np.random.default_rng(seed)
    latent = generator.normal(size=num)
    states = generator.normal(size=(num, LAYERS, 2, HIDDEN)).astype(np.float32)
    if informative:
        states[:, 1, 1] += (latent[:, None] * direction).astype(np.float32)
    states[:, 0, 0] = direction.astype(np.float32)  # the last prompt token's embedding is the same everywhere
    rates = 1 / (1 + np.exp(1 - 2 * latent))
    totals = np.full(num, samples)
    successes = generator.binomial(totals, rates)
    lengths = generator.integers(5, 20, num)
    metas = [{"level": float(round(x)), "line": i} for i, x in enumerate(latent)]
    if alter:
        states, successes, totals, lengths = alter(states, successes, totals, lengths)
    keys = tuple(f"{name}{i}" for i in range(len(states)))
    prompts = Prompts([tuple(range(n)) for n in lengths], states=states)
    return World(prompts, Counts(keys, successes, totals, "abc"), rates, metas)


@pytest.fixture(scope="module")
def fitted():
    return make().fit()


def test_import_pulls_no_torch_or_scipy():
    code = "import sys, difficulty.predictor; print(*(m in sys.modules for m in ('torch', 'scipy', 'safetensors')))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.split() == ["False"] * 3


# ---------------------------------------------------------------- the ridge probe


def test_the_informative_layer_is_found_and_predicts_held_out_problems():
    fitted, report = make().fit(RIDGE)
    world = make(seed=1, name="val")
    held_out = world.evaluate(fitted, RIDGE)
    assert fitted.head.representation == "layer 1, mean"
    assert report.usable
    assert held_out.usable
    assert stats.spearman(fitted.predict(world.prompts), world.rates) > 0.9
    assert held_out.scores.spearman == pytest.approx(report.scores.spearman, abs=0.05)
    assert held_out.scores.brier_rate < 0.3 * held_out.baselines["constant"].brier_rate
    assert held_out.scores.ece < 0.05
    assert abs(held_out.baselines["length"].spearman) < 0.15 < held_out.scores.spearman < held_out.ceiling
    assert held_out.share == pytest.approx(held_out.scores.spearman / held_out.ceiling)
    for point in held_out.curve:
        assert point.observed == pytest.approx(point.predicted, abs=0.12)


def test_more_features_than_problems_are_solved_in_the_dual():
    fitted, _ = make(100).fit(RIDGE.model_copy(update={"layers": "all"}))
    assert fitted.head.representation == "all"
    assert fitted.head.model.weight_F.shape == (LAYERS * 2 * HIDDEN,)
    other = make(seed=1)
    assert stats.spearman(fitted.predict(other.prompts), other.rates) > 0.5


def test_all_layers_are_not_tried_unasked_where_they_are_huge(monkeypatch):
    monkeypatch.setattr(probe, "MAX_ALL_FEATURES", LAYERS * 2 * HIDDEN - 1)
    assert make(100).fit(RIDGE)[0].head.representation != "all"
    assert make(100).fit(RIDGE.model_copy(update={"layers": "all"}))[0].head.representation == "all"


def test_a_network_reads_fewer_layers_where_they_are_huge(monkeypatch):
    monkeypatch.setattr(mlp, "MAX_ALL_FEATURES", LAYERS * 2 * HIDDEN - 1)
    monkeypatch.setattr(prompts, "MAX_LAYERS", 2)
    fitted, _ = make(100).fit(Difficulty(predictors=("mlp",)))
    assert fitted.head.layers == (0, LAYERS - 1)
    assert len(fitted.head.weight_F_KU) == 2 * 2 * HIDDEN + 2
    assert np.isfinite(fitted.predict(make(20).prompts)).all()


def test_fitting_needs_no_order_of_magnitude():
    def scale(states, *rest):
        return states * np.float32(1000), *rest

    for config in (RIDGE, Difficulty(predictors=("mlp",))):
        first, scaled = make(200).fit(config)[0], make(200, alter=scale).fit(config)[0]
        assert scaled.predict(make(200, alter=scale).prompts) == pytest.approx(
            first.predict(make(200).prompts), abs=2e-3
        )


# ---------------------------------------------------------------- the network


def test_the_network_learns_what_no_line_can():
    """What is neither small nor large is easy."""

    def middle(states, successes, totals, lengths):
        generator = np.random.default_rng(len(states))
        latent = generator.normal(size=len(states))
        states = states * 0.2
        states[:, 1, 1] += latent[:, None]
        return states, generator.binomial(totals, np.where(np.abs(latent) < 0.67, 0.85, 0.15)), totals, lengths

    world, other = make(900, alter=middle), make(500, alter=middle, name="val")
    fitted, report = world.fit()
    assert fitted.kind == "mlp"
    assert report.scores.spearman > 0.6
    assert other.evaluate(fitted).scores.spearman == pytest.approx(report.scores.spearman, abs=0.1)
    by_kind = {tried.kind: tried for tried in report.tried}
    assert by_kind["ridge"].brier_rate > 2 * by_kind["mlp"].brier_rate


def test_a_network_stops_before_it_learns_noise():
    fitted, report = make(informative=False).fit(Difficulty(predictors=("mlp",)))
    assert not fitted.usable
    assert abs(report.scores.spearman) < 0.15
    predicted = fitted.predict(make(informative=False).prompts)
    assert predicted.std() < 0.1


def test_the_gradient_of_the_networks_is_that_of_their_loss():
    generator = np.random.default_rng(0)
    theta = [generator.normal(size=s) for s in ((2, 3, 4), (2, 4), (2, 4), (2,))]
    x, rates, weights = generator.normal(size=(2, 5, 3)), generator.random((2, 5)), generator.random((2, 5)) + 0.5

    def loss(parts):
        logits = mlp._forward(parts, x)[1]
        return ((np.logaddexp(0, logits) - rates * logits) * weights).mean(axis=1).sum()

    for part, gradient in zip(theta, mlp._gradient(theta, x, rates, weights), strict=True):
        for place in np.ndindex(part.shape):
            before, step = part[place], 1e-6
            part[place] = before + step
            up = loss(theta)
            part[place] = before - step
            down = loss(theta)
            part[place] = before
            assert gradient[place] == pytest.approx((up - down) / (2 * step), abs=1e-6)


# ---------------------------------------------------------------- every token


def tokenwise(num, seed, name="fit"):
    """Questions made of parts that each may fail: a part's chance lies in its token's state, and the parts multiply."""
    generator = np.random.default_rng(seed)
    direction = np.random.default_rng(7).normal(size=HIDDEN)
    lengths = generator.integers(3, 15, num)
    states, rates = [], []
    for length in lengths:
        hard = generator.random(length) < 0.2
        one = generator.normal(size=(length, 2, HIDDEN)) * 0.3
        one[:, 1] += hard[:, None] * direction
        states.append(one.astype(np.float32))
        rates.append(0.97 ** (~hard).sum() * 0.45 ** hard.sum())
    pooled = np.stack([np.stack([s[-1], s.mean(0)], axis=1) for s in states])
    totals = np.full(num, 16)
    counts = Counts(tuple(f"{name}{i}" for i in range(num)), generator.binomial(totals, rates), totals, "abc")
    prompts = Prompts([tuple(range(n)) for n in lengths], states=pooled, tokens=states)
    return World(prompts, counts, np.array(rates), [])


def test_what_can_go_wrong_adds_up_over_the_tokens():
    world, other = tokenwise(500, 0), tokenwise(400, 1, "val")
    fitted, report = world.fit(Difficulty(predictors=("ridge", "mlp", "tokens")))
    assert fitted.kind == "tokens"
    held_out = other.evaluate(fitted)
    assert stats.spearman(fitted.predict(other.prompts), other.rates) > 0.95
    assert held_out.scores.spearman > 0.95 * held_out.ceiling
    assert held_out.scores.ece < 0.05
    assert report.metrics()[5] == {"name": "difficulty/kind", "value": KINDS.index("tokens") + 1.0}


def test_the_gradient_of_the_hazards_is_that_of_their_loss(monkeypatch):
    world = tokenwise(30, 2)
    basis, _ = tokens._basis(world.prompts)
    read = tokens._Tokens.read(world.prompts, basis)
    read = dataclasses.replace(read, values_N_D=read.values_N_D.astype(np.float64))
    rates, losses = world.counts.successes_P / 16, []
    monkeypatch.setattr(tokens, "_minimise", lambda loss, start: losses.append((loss, start)) or start)
    tokens._path(read, rates, np.ones(30), (0.01,))
    loss, start = losses[0]
    theta = start + 0.1 * np.random.default_rng(0).normal(size=len(start))
    gradient = loss(theta)[1]
    for i in [*range(5), len(theta) - 2, len(theta) - 1]:
        step = np.eye(len(theta))[i] * 1e-2
        assert gradient[i] == pytest.approx((loss(theta + step)[0] - loss(theta - step)[0]) / 2e-2, abs=2e-4)


def test_without_the_states_of_tokens_the_other_kinds_are_kept():
    fitted, report = make(200).fit(Difficulty())
    assert fitted.kind in ("ridge", "mlp")
    assert [tried.why for tried in report.tried if tried.kind == "tokens"] == [
        "this engine does not show the hidden states of every token"
    ]
    with pytest.raises(DataError, match="nothing could be fitted: tokens: this engine does not show"):
        make(200).fit(Difficulty(predictors=("tokens",)))


# ---------------------------------------------------------------- honest reports


@pytest.mark.parametrize("config", [RIDGE, QUICK])
def test_an_out_of_fold_report_is_honest_about_noise(config):
    fitted, report = make(informative=False).fit(config)
    assert not fitted.usable
    assert abs(report.scores.spearman) < 0.15  # the same features fit the training labels far better than that
    assert "no better than none" in report.why


def test_difficulty_that_is_length_alone_is_seen_by_the_baseline():
    def by_length(states, successes, totals, lengths):
        return states, np.random.default_rng(0).binomial(totals, (lengths - 4) / 16), totals, lengths

    _, report = make(informative=False, alter=by_length).fit(RIDGE)
    assert report.baselines["length"].spearman > 0.7
    assert not report.usable


def test_what_the_task_says_of_its_questions_is_a_baseline():
    fitted, report = make().fit(RIDGE)
    held_out = make(seed=1, name="val").evaluate(fitted)
    assert fitted.baselines.names == ("level",)
    assert report.baselines["metadata"].spearman > 0.6
    assert held_out.baselines["metadata"].spearman == pytest.approx(report.baselines["metadata"].spearman, abs=0.06)
    world = make(100)
    assert "metadata" not in fit(world.prompts, world.counts, RIDGE, seed=0)[1].baselines


def test_fitting_is_deterministic():
    config = Difficulty(predictors=("ridge", "mlp", "tokens"))
    (first, report), (again, same) = (tokenwise(150, 3).fit(config, seed=3) for _ in range(2))
    assert report == same
    other = tokenwise(50, 4).prompts
    assert np.array_equal(first.predict(other), again.predict(other))


def test_validation_labels_do_not_move_the_predictor(fitted):
    """Choices are made on the fit split: evaluating on anything leaves the predictions alone."""
    world = make(seed=2, name="val")
    before = fitted[0].predict(world.prompts)
    world.counts = dataclasses.replace(world.counts, successes_P=world.counts.totals_P - world.counts.successes_P)
    world.evaluate(fitted[0])
    assert np.array_equal(before, fitted[0].predict(world.prompts))


def test_problems_without_samples_are_left_out(fitted):
    def unlabelled(states, successes, totals, lengths):
        zeros = np.zeros(5, dtype=int)
        states = np.concatenate([states, np.full_like(states[:5], np.nan)])
        return states, *(np.append(x, zeros) for x in (successes, totals)), np.append(lengths, zeros + 9)

    world = make(alter=unlabelled)
    world.metas = [*world.metas, *[{}] * 5]
    other, report = world.fit()
    assert report.n == NUM
    assert np.array_equal(other.predict(make().prompts), fitted[0].predict(make().prompts))


def test_the_spread_covers_the_true_rates(fitted):
    world = make(seed=6)
    predicted = fitted[0].predict(world.prompts)
    a, b = fitted[0].prior(predicted)
    assert a / (a + b) == pytest.approx(predicted)
    inside = np.abs(world.rates - predicted) < 1.645 * fitted[0].spread(predicted)
    assert inside.mean() == pytest.approx(0.9, abs=0.07)


# ---------------------------------------------------------------- what must be noticed


def test_few_problems_and_equal_labels_are_not_usable():
    assert "40 labelled problems, at least 50" in make(40).fit()[1].why

    def never(states, successes, totals, lengths):
        return states, successes * 0, totals, lengths

    fitted, report = make(60, alter=never).fit()
    assert not fitted.usable
    assert "every problem has the same pass rate, 0.00" in report.why
    assert fitted.predict(make(60).prompts) == pytest.approx(np.zeros(60), abs=0.01)


def test_states_that_are_not_finite_are_not_usable(fitted):
    def broken(states, *rest):
        states[3, 1, 1, 5] = np.nan
        return states, *rest

    world = make(alter=broken)
    other, report = world.fit()
    assert not other.usable
    assert "1 prompts have hidden states that are not finite" in report.why
    assert "1 prompts" in dataclasses.replace(world, counts=make(name="val").counts).evaluate(fitted[0]).why
    assert np.isnan(fitted[0].predict(world.prompts)).nonzero()[0].tolist() == [3]


def test_constant_states_are_not_usable():
    def constant(states, successes, totals, lengths):
        return np.ones_like(states), successes, totals, lengths * 0 + 7

    fitted, report = make(100, alter=constant).fit()
    assert not fitted.usable
    assert not report.usable


def test_a_leak_of_problems_is_noticed(fitted):
    world = make()
    world.counts = dataclasses.replace(world.counts, keys=tuple(f"fit{i + 1}" for i in range(NUM)))
    report = world.evaluate(fitted[0])
    assert not report.usable
    assert f"{NUM - 1} of {NUM} problems were used to fit it, first 'fit1'" in report.why


@pytest.mark.parametrize("kind", ["ridge", "mlp"])
def test_states_that_hold_the_answers_are_noticed(kind):
    """They know what the samples were, so that predictions come nearer to them than the true rates could."""

    def leak(states, successes, totals, lengths):
        states[:, 1] += 30 * (successes / totals)[:, None, None].astype(np.float32)
        return states, successes, totals, lengths

    fitted, report = make(alter=leak).fit(Difficulty(predictors=(kind,)))
    assert not fitted.usable
    assert "made from the answers, not from the questions" in report.why
    assert report.scores.spearman > 0.95
    held_out = make(seed=1, alter=leak, name="val").evaluate(fitted)
    assert "made from the answers" in held_out.why


def test_the_truth_is_not_too_good_to_be_true():
    generator = np.random.default_rng(0)
    for trial in range(50):
        rates, totals = generator.beta(0.3, 1 + trial % 5, 400), np.full(400, 2 + trial % 15)
        assert not too_good(rates, generator.binomial(totals, rates), totals)
    successes = generator.binomial(16, 0.5 * rates, 400)
    assert too_good(successes / 16, successes, np.full(400, 16))
    assert not too_good(np.array([1.0, 0.0]), np.array([1, 0]), np.array([1, 1]))  # single samples tell nothing


def test_a_predictor_that_broke_on_new_problems_is_noticed(fitted):
    """The policy changed under it: its states no longer carry the label."""
    report = make(seed=5, informative=False, name="val").evaluate(fitted[0])
    assert not report.usable
    assert "no better than none" in report.why


def test_an_unusable_predictor_stays_so_on_other_problems(fitted):
    broken = dataclasses.replace(fitted[0], usable=False, why="because")
    assert make(seed=1, name="val").evaluate(broken).why == "because"


def test_a_kind_that_cannot_be_fitted_leaves_the_others(monkeypatch):
    def diverged(prompts, rates, weights, *, seed):
        return None, np.full(len(prompts), np.nan)

    monkeypatch.setattr(mlp, "fit", diverged)
    fitted, report = make(200).fit()
    assert (fitted.kind, fitted.usable) == ("ridge", True)
    assert report.tried[1].why == "200 of 200 predictions are not finite"
    with pytest.raises(DataError, match="nothing could be fitted: mlp: 200 of 200"):
        make(200).fit(Difficulty(predictors=("mlp",)))


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
        ({"keys": ("a",)}, "different lengths"),
        ({"successes_P": np.full(4, 2)}, "more right answers than samples"),
        ({"totals_P": np.zeros(4, dtype=int)}, "no problem has a graded sample"),
    ],
)
def test_wrong_input_is_refused(change, message):
    given = {"successes_P": np.zeros(4, dtype=int), "totals_P": np.ones(4, dtype=int), "keys": tuple("abcd")} | change
    states = given.pop("states", np.zeros((4, 3, 2, 24), np.float32))
    with pytest.raises(DataError, match=message):
        fit(Prompts([(1,)] * 4, states=states), Counts(**given, model=""), RIDGE, seed=0)


@pytest.mark.parametrize("kind", ["ridge", "mlp"])
def test_states_of_another_policy_are_refused(kind):
    fitted, _ = make(60).fit(Difficulty(predictors=(kind,)))
    with pytest.raises(DataError, match="fitted to another policy"):
        fitted.predict(Prompts([(1,)], states=np.zeros((1, LAYERS, 2, HIDDEN + 1), np.float32)))
    with pytest.raises(DataError, match="without hidden states"):
        fitted.predict(Prompts([(1,)]))


# ---------------------------------------------------------------- in use


def test_estimator_falls_back_to_one_rate(fitted):
    found, _ = fitted
    states = make(3).prompts.states
    states[1] = np.nan
    problems = [Problem(f"q{i}", "?") for i in range(3)]

    def read(some):
        return Prompts([(1, 2)] * len(some), states=states)

    rates = estimator(found, read)(problems)
    assert rates[1] == found.mean_rate
    assert len({*rates}) == 3
    broken = dataclasses.replace(found, usable=False)
    assert estimator(broken, lambda _: pytest.fail("not asked"))(problems) == [found.mean_rate] * 3
    assert estimator(found, read)([]) == []


def test_bins_are_quantiles_from_easy_to_hard(fitted):
    rates = fitted[0].predict(make(seed=1).prompts)
    bins = fitted[0].bins(rates)
    assert set(bins) == {1, 2, 3, 4, 5}
    assert np.bincount(bins)[1:].min() > NUM / 10
    assert rates[bins == 1].min() > rates[bins == 5].max()
    absolute, _ = make(200).fit(RIDGE.model_copy(update={"binning": "absolute"}))
    assert absolute.edges == (0.1, 0.5)
    assert absolute.bins(np.array([0.9, 0.3, 0.05, np.nan])).tolist() == [1, 2, 3, 0]


def test_the_report_says_how_bins_agree(fitted):
    report = make(seed=1, name="val").evaluate(fitted[0])
    assert np.sum(report.bins.confusion) == NUM
    assert report.bins.agreement.exact > report.bins.agreement.chance + 0.15
    assert report.bins.agreement.within_one > 0.8
    assert make(seed=1, name="val").evaluate(fitted[0], QUICK.model_copy(update={"bins": 3})).bins is None


@pytest.mark.parametrize("kind", ["ridge", "mlp", "tokens"])
def test_a_saved_predictor_predicts_the_same(kind, tmp_path):
    fitted, report = tokenwise(120, 0).fit(Difficulty(predictors=(kind,)))
    baselines = dataclasses.replace(make(60).fit(RIDGE)[0].baselines, mean_rate=fitted.mean_rate)
    fitted = dataclasses.replace(fitted, baselines=baselines)
    other = tokenwise(40, 5).prompts
    fitted.save(tmp_path)
    loaded = load(tmp_path)
    assert np.array_equal(loaded.predict(other), fitted.predict(other))
    for name in ("kind", "edges", "fit_keys", "policy", "strength", "usable", "why", "mean_rate"):
        assert getattr(loaded, name) == getattr(fitted, name)
    assert loaded.flops(20) == fitted.flops(20)
    metas = [{"level": 2.0}] * 40
    for name, rates in fitted.baselines.rates(other, metas).items():
        assert np.array_equal(loaded.baselines.rates(other, metas)[name], rates)
    text = json.dumps(report.to_json(), allow_nan=False)
    assert Report.from_json(json.loads(text)) == report
    first = [(tmp_path / name).read_bytes() for name in (predictor.FACTS, predictor.WEIGHTS)]
    fitted.save(tmp_path)
    assert first == [(tmp_path / name).read_bytes() for name in (predictor.FACTS, predictor.WEIGHTS)]


@pytest.mark.parametrize("damage", ["no json", "no tensors", "torn json", "torn tensors", "other format", "other kind"])
def test_a_damaged_predictor_is_a_model_error(fitted, tmp_path, damage):
    fitted[0].save(tmp_path)
    path = tmp_path / (predictor.WEIGHTS if "tensors" in damage else predictor.FACTS)
    if damage.startswith("no"):
        path.unlink()
    elif damage == "other format":
        path.write_text(path.read_text().replace(f'"format": {predictor.FORMAT}', '"format": 9'))
    elif damage == "other kind":
        path.write_text(path.read_text().replace(f'"kind": "{fitted[0].kind}"', '"kind": "oracle"'))
    else:
        path.write_bytes(path.read_bytes()[:50])
    with pytest.raises(ModelError, match="fit it again"):
        load(tmp_path)


def test_metric_names(fitted):
    rows = fitted[1].metrics()
    names = [row["name"] for row in rows]
    assert len(names) == len(set(names))
    wanted = (
        "spearman brier brier_rate ece auroc spearman_ceiling spearman_share usable kind strength flops bin_agreement "
        "bin_agreement_within_one length_spearman constant_brier_rate metadata_spearman metadata_brier_rate"
    )
    assert {f"difficulty/{name}" for name in wanted.split()} <= set(names)
    json.dumps(rows, allow_nan=False)


@pytest.mark.parametrize("name", ["countdown", "arithmetic"])
def test_a_prediction_costs_under_a_hundredth_of_a_search(name):
    """At N = 16, of the embedded policies' FLOPs: 16 answers and the prompt that they share."""
    from configs import load as configs

    config = configs.load(name)
    size, layers = config.bootstrap.hidden_size, config.bootstrap.layers
    parameters = (
        layers * size**2 * (4 + 3 * config.bootstrap.feed_forward)
    )  # the output head not counted: a lower bound
    prompt, answer = {"countdown": (8, 18), "arithmetic": (5, 12)}[name]  # of the shortest questions, in tokens
    search = 2.0 * parameters * (prompt + 16 * answer)

    def embedded(states, successes, totals, lengths):
        generator = np.random.default_rng(0)
        return generator.normal(size=(len(lengths), layers + 1, 2, size)), successes, totals, lengths

    world = make(60, alter=embedded)
    everything = Difficulty(predictors=("ridge",), layers="all")
    heads = [world.fit(config)[0].head for config in (everything, Difficulty(predictors=("mlp",)))]
    heads.append(tokens.TokenHead(np.zeros((layers + 1, size)), 0.0, 0.0, heads[0].model.platt))
    for head in heads:
        assert head.flops(prompt) < 0.01 * search, head.kind
