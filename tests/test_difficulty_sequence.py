import dataclasses

import numpy as np
import pytest

from configs.schema import Difficulty, Model, SequencePredictor
from difficulty import predictor, sequence
from difficulty.labels import Counts
from difficulty.prompts import Prompts
from search import stats
from search.errors import DataError, ModelError, TrainingError

MODEL = Model(dtype="float32")
QUICK = SequencePredictor(epochs=6, batch_size=16, micro_batch_size=16, learning_rate=5e-3)


def questions(folder, num, seed, name="fit"):
    """The chance to be right is high where the prompt's first letter is an A, whatever follows."""
    generator = np.random.default_rng(seed)
    easy = generator.random(num) < 0.5
    prompts = [(40 if e else 41, *generator.integers(50, 90, generator.integers(2, 6)).tolist()) for e in easy]
    totals = np.full(num, 8)
    successes = generator.binomial(totals, np.where(easy, 0.8, 0.15))
    states = np.zeros((num, 1, 2, 2), np.float32)
    counts = Counts(tuple(f"{name}{i}" for i in range(num)), successes, totals, "abc")
    return Prompts(prompts, states=states, policy=folder, model=MODEL), counts


def config(**changes):
    return Difficulty(predictors=("sequence",), sequence=QUICK.model_copy(update=changes))


@pytest.mark.parametrize(("method", "pooling"), [("lora", "last"), ("full", "tokens")])
def test_it_learns_what_the_prompt_says_and_is_saved_whole(tiny_chat_model, tmp_path, method, pooling):
    prompts, counts = questions(tiny_chat_model, 200, 0)
    settings = config(method=method, pooling=pooling)
    fitted, report = predictor.fit(prompts, counts, settings, seed=0, out=tmp_path)
    assert (fitted.kind, report.n) == ("sequence", 40)  # judged on the part that was held out
    fresh, labels = questions(tiny_chat_model, 100, 1, "val")
    held_out = predictor.evaluate(fitted, fresh, labels, settings, seed=0)
    easy = np.array([ids[0] == 40 for ids in fresh.ids_P])
    predicted = fitted.predict(fresh)
    assert (predicted[easy].mean(), predicted[~easy].mean()) == pytest.approx((0.8, 0.15), abs=0.12)
    assert held_out.scores.brier_rate < 0.2 * held_out.baselines["constant"].brier_rate
    fitted.save(tmp_path)
    assert (tmp_path / sequence.WEIGHTS).exists() == (method == "full")
    loaded = predictor.load(tmp_path)
    assert loaded.predict(fresh) == pytest.approx(fitted.predict(fresh), abs=1e-5)
    assert stats.spearman(loaded.predict(fresh), fitted.predict(fresh)) > 0.999
    assert loaded.flops(10) == fitted.flops(10)


def test_its_whole_forward_pass_is_charged(tiny_chat_model, tmp_path):
    from search.engines.loading import load_model

    prompts, counts = questions(tiny_chat_model, 60, 0)
    fitted, _ = predictor.fit(prompts, counts, config(epochs=1), seed=0, out=tmp_path)
    policy = load_model(tiny_chat_model, MODEL, device="cpu")
    head = policy.vocab_size * policy.model.config.hidden_size
    assert fitted.flops(7) == pytest.approx(2 * 7 * (policy.facts.flops_parameters - head), rel=0.01)


def test_it_is_chosen_only_where_it_is_better(tiny_chat_model, tmp_path):
    """On the problems that it holds out, the other kinds are measured too."""
    prompts, counts = questions(tiny_chat_model, 120, 2)
    first = np.array([ids[0] == 40 for ids in prompts.ids_P], dtype=np.float32)
    known = prompts.with_states(first[:, None, None, None] * np.ones((1, 1, 2, 2), np.float32))
    settings = Difficulty(predictors=("ridge", "sequence"), sequence=QUICK.model_copy(update={"epochs": 1}))
    fitted, report = predictor.fit(known, counts, settings, seed=0, out=tmp_path)
    assert fitted.kind == "ridge"
    assert [tried.kind for tried in report.tried] == ["ridge", "sequence"]
    assert report.tried[1].flops > 1000 * report.tried[0].flops


def test_training_stops_where_the_held_out_loss_rises(tiny_chat_model, tmp_path, monkeypatch):
    prompts, _ = questions(tiny_chat_model, 60, 0)
    noise = np.random.default_rng(0).random(60)
    seen = []
    original = sequence._Training._unseen
    monkeypatch.setattr(sequence._Training, "_unseen", lambda self, held: seen.append(1) or original(self, held))
    settings = QUICK.model_copy(update={"epochs": 40, "patience": 1, "learning_rate": 2e-2})
    sequence.fit(prompts, noise, np.ones(60), settings, tmp_path, seed=0)
    assert 2 <= len(seen) < 20


def test_training_is_a_function_of_the_seed(tiny_chat_model, tmp_path):
    prompts, _ = questions(tiny_chat_model, 60, 0)
    rates = np.random.default_rng(0).random(60)
    settings = QUICK.model_copy(update={"epochs": 2})
    found = [sequence.fit(prompts, rates, np.ones(60), settings, tmp_path, seed=s)[1] for s in (0, 0, 1)]
    assert np.array_equal(found[0], found[1], equal_nan=True)
    assert not np.array_equal(found[0], found[2], equal_nan=True)


def test_what_cannot_be_trained_is_said(tiny_chat_model, tmp_path):
    prompts, counts = questions(tiny_chat_model, 60, 0)
    with pytest.raises(TrainingError, match=r"lower difficulty\.sequence\.learning_rate"):
        sequence.fit(prompts, np.full(60, np.nan), np.ones(60), QUICK, tmp_path, seed=0)
    few = Counts(counts.keys[:30], counts.successes_P[:30], counts.totals_P[:30], "abc")
    with pytest.raises(DataError, match="nothing could be fitted: sequence: 30 labelled problems are too few"):
        predictor.fit(prompts.take(np.arange(30)), few, config(), seed=0, out=tmp_path)
    nowhere = Prompts(prompts.ids_P, states=prompts.states)
    with pytest.raises(DataError, match="say where the policy lies"):
        predictor.fit(nowhere, counts, config(), seed=0, out=tmp_path)


def test_lost_weights_are_a_model_error(tiny_chat_model, tmp_path):
    prompts, counts = questions(tiny_chat_model, 60, 0)
    fitted, _ = predictor.fit(prompts, counts, config(method="full", epochs=1), seed=0, out=tmp_path)
    lost = dataclasses.replace(fitted.head, folder=tmp_path / "nowhere", decoder=None)
    with pytest.raises(ModelError, match="fit it again"):
        lost.predict(prompts)
