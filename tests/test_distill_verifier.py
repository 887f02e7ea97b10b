import json
import math
import random
import shutil
from array import array
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForTokenClassification,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
)

from configs.schema import ArithmeticTask, Lora, Model, Splits, StepLabels, TrainedVerifier
from distill import checkpoints, lora
from distill.labels import STEP_DATA, StepExample, write_examples
from distill.prm_data import IGNORED, Row, collate, encode, split
from distill.prm_fit import Fitted, auc, auc_within, fit
from distill.prm_model import LUCK, StepScorer, instance_loss, loss_sum, num_terms, step_logits
from distill.step_data import read_step_data
from distill.verifier import Report, train
from search.errors import ConfigError, DataError, ModelError, TrainingError
from search.tasks.arithmetic import Arithmetic
from search.tasks.tokenizer import build_tokenizer
from search.types import Problem
from search.verifiers.card import Card
from search.verifiers.readout import GenerativeReadout

TASK = Arithmetic(ArithmeticTask(type="arithmetic"), Splits(), 0)
SETTINGS = TrainedVerifier(
    type="trained",
    learning_rate=3e-3,
    epochs=2,
    batch_size=16,
    micro_batch_size=8,
    checks=5,
    validation=0.25,
    max_length=64,
    dropout=0.1,
)
MUON = SETTINGS.model_copy(update={"optimizer": "muon", "learning_rate": 0.01, "adamw_learning_rate": 3e-3})
SCALAR = SETTINGS.model_copy(update={"readout": "scalar"})
LORA = SETTINGS.model_copy(update={"method": "lora", "lora": Lora(rank=2, alpha=4, dropout=0.2)})
SCALAR_LORA = LORA.model_copy(update={"readout": "scalar"})
ORM = SETTINGS.model_copy(update={"kind": "orm"})


class Killed(BaseException):
    """Stands for a kill: nothing in the training catches it."""


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "base"
    tokenizer = build_tokenizer()
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=128,
        tie_word_embeddings=True,  # shared weights are saved once
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def answers(num_questions: int, *, outcomes: bool = False) -> list[StepExample]:
    """Four answers to each of the chains a+b+c. A wrong step comes to 30. One label a step, or one outcome."""
    draw = random.Random(0)
    made: list[StepExample] = []
    for _ in range(num_questions):
        a, b, c = (draw.randrange(1, 13) for _ in range(3))
        problem = Problem(f"{a}+{b}+{c}", f"{a}+{b}+{c}", str((a + b + c) % 31))
        for _ in range(4):
            first = 30 if draw.random() < 0.3 else (a + b) % 29
            second = 30 if draw.random() < 0.3 else (first + c) % 29
            right = (first != 30, first != 30 and second != 30)
            steps = (f"{a}+{b}={first}\n", f"{first}+{c}={second}")
            labels = (None, None) if outcomes else tuple(map(float, right))
            made.append(StepExample(problem, steps, (), labels, right[1] if outcomes else None, "test", 1))
    return made


EXAMPLES = answers(24)


def run(
    out: Path,
    init: Path,
    settings: TrainedVerifier = SETTINGS,
    examples: Any = EXAMPLES,
    base: Path | None = None,
    progress: Callable[..., None] | None = None,
    seed: int = 5,
    **more: Any,
) -> Report:
    model, policy = Model(), "9f86d081884c7d65"
    return train(
        examples,
        init,
        base,
        out,
        settings,
        model,
        TASK,
        seed=seed,
        policy_fingerprint=policy,
        threads=1,
        progress=progress,
        device="cpu",
        **more,
    )


def bce(p: float, y: float) -> float:
    return -(y * math.log(p) + (1 - y) * math.log(1 - p))


def sigmoid(z: float) -> float:
    return 1 / (1 + math.exp(-z))


def row(targets: tuple[float, ...], outcome: float = IGNORED, weight: float = 1.0, key: str = "k") -> Row:
    steps = len(targets)
    ends = tuple(range(2, 2 + steps))
    return Row(
        key, array("l", range(3, 5 + steps)), ends, ends, (*targets, outcome), (weight,) * (steps + 1), 1.0, None
    )


# ------------------------------------------------------------ losses


def test_step_labels_are_soft_targets_of_a_binary_cross_entropy() -> None:
    batch = collate([row((0.25, 1.0), weight=2.0), row((IGNORED, 0.0, 0.5))])
    logits = torch.tensor([[0.3, -1.2, 9.0], [5.0, 0.7, -2.0]])
    by_hand = 2 * (bce(sigmoid(0.3), 0.25) + bce(sigmoid(-1.2), 1.0)) + bce(sigmoid(0.7), 0.0) + bce(sigmoid(-2.0), 0.5)
    assert float(loss_sum(logits, batch)) == pytest.approx(by_hand, rel=1e-5)
    assert float(num_terms(batch)) == 2 * 2 + 2


@pytest.mark.parametrize("outcome", [1.0, 0.0])
def test_an_outcome_is_that_of_all_steps_together(outcome: float) -> None:
    batch = collate([row((IGNORED, IGNORED), outcome, weight=3.0), row((IGNORED,) * 3)])
    logits = torch.tensor([[0.4, -0.6, 99.0], [1.0, 1.0, 1.0]])
    product = sigmoid(0.4) * sigmoid(-0.6)
    by_hand = 3 * bce(product + (1 - product) * LUCK, outcome)
    assert float(loss_sum(logits, batch)) == pytest.approx(by_hand, rel=1e-5)
    assert float(num_terms(batch)) == 3


@pytest.mark.parametrize("size", [0.0, 30.0, 200.0, -30.0, -200.0])
@pytest.mark.parametrize("outcome", [1.0, 0.0])
def test_the_loss_of_an_outcome_and_its_gradient_are_finite(size: float, outcome: float) -> None:
    logits = torch.tensor([[size, 2.0], [size, size]], requires_grad=True)
    loss = instance_loss(logits, torch.tensor([[True, False], [True, True]]), torch.full((2,), outcome))
    loss.sum().backward()
    assert bool(torch.isfinite(loss).all())
    assert logits.grad is not None
    assert bool(torch.isfinite(logits.grad).all())
    assert logits.grad[0, 1] == 0, "a step that is not there"


def load(base: Path, settings: TrainedVerifier = SETTINGS) -> StepScorer:
    scorer, _ = StepScorer.load(base, base, settings, Model(), "cpu")
    return scorer.eval()


@pytest.mark.parametrize("settings", [SETTINGS, SCALAR], ids=["generative", "scalar"])
def test_the_gradient_falls_on_labelled_steps_alone(settings: TrainedVerifier, base: Path) -> None:
    """And padding changes nothing: the logits of a row alone are those it has in a batch."""
    torch.manual_seed(1)
    scorer = load(base, settings)
    examples = [*answers(2), StepExample(answers(1)[0].problem, ("1+2=3\n",), (), (None,), None, "test")]
    none = [replace(e, labels=(0.0, None)) for e in examples[:1]]
    rows = encode([*none, *examples[1:-1]], all_of(settings), TASK, build_tokenizer(), history=False).train
    batch = collate(rows)
    logits = scorer(batch["input_ids"], batch["starts"], batch["ends"])
    logits.retain_grad()
    loss_sum(logits, batch).backward()
    assert logits.grad is not None
    assert torch.equal(logits.grad != 0, batch["labels"][:, :-1] != IGNORED)
    alone, _ = step_logits(scorer, rows, 1, "cpu")
    torch.testing.assert_close(torch.tensor(alone), logits.detach(), rtol=1e-4, atol=1e-5)


def all_of(settings: TrainedVerifier) -> TrainedVerifier:
    return settings.model_copy(update={"validation": 0.0})


def test_a_generative_logit_is_the_head_and_the_weighted_logprobs_of_the_step(base: Path) -> None:
    scorer = load(base)
    assert scorer.readout is not None
    torch.nn.init.normal_(scorer.readout.head.weight)
    torch.nn.init.normal_(scorer.readout.weight.weight)
    (one,) = encode(EXAMPLES[:1], all_of(SETTINGS), TASK, build_tokenizer(), history=False).train
    ids = torch.tensor([list(one.ids)])
    with torch.no_grad():
        output = scorer.language(input_ids=ids, output_hidden_states=True)
        states, logp = output.hidden_states[-1][0], output.logits[0].log_softmax(-1)
        for (start, end), got in zip(zip(one.starts, one.ends, strict=True), scorer_logits(scorer, one), strict=True):
            weights = [
                torch.nn.functional.softplus(scorer.readout.weight(states[t - 1])) for t in range(start, end + 1)
            ]
            terms = sum(float(w * logp[t - 1, ids[0, t]]) for w, t in zip(weights, range(start, end + 1), strict=True))
            assert got == pytest.approx(float(scorer.readout.head(states[end])) + terms, rel=1e-3, abs=1e-4)


def scorer_logits(scorer: StepScorer, one: Row) -> list[float]:
    logits, _ = step_logits(scorer, [one], 1, "cpu")
    return logits[0]


# ------------------------------------------------------------ data


def test_a_row_ends_its_steps_where_the_runtime_reads_them() -> None:
    tokenizer = build_tokenizer()
    (one,) = encode(EXAMPLES[:1], all_of(SETTINGS), TASK, tokenizer, history=False).train
    pieces = [tokenizer.decode(list(one.ids[s : e + 1])) for s, e in zip(one.starts, one.ends, strict=True)]
    assert pieces == [EXAMPLES[0].steps[0], EXAMPLES[0].steps[1] + tokenizer.eos_token]
    assert one.targets == (*EXAMPLES[0].labels, IGNORED)
    (whole,) = encode(EXAMPLES[:1], all_of(ORM), TASK, tokenizer, history=False).train
    assert whole.ends == one.ends[-1:]
    assert whole.targets == (EXAMPLES[0].labels[-1], IGNORED)
    judged = replace(EXAMPLES[0], labels=(None, None), outcome=False)
    (whole,) = encode([judged], all_of(ORM), TASK, tokenizer, history=False).train
    assert whole.targets == (0.0, IGNORED), "one score is no product"


def test_questions_are_held_out_not_answers() -> None:
    rows = encode(EXAMPLES, SETTINGS, TASK, build_tokenizer(), history=False)
    here, there = {r.key for r in rows.train}, {r.key for r in rows.validation}
    assert here.isdisjoint(there)
    assert len(rows.train) + len(rows.validation) == len(EXAMPLES)
    more = encode(answers(200), SETTINGS, TASK, build_tokenizer(), history=False)
    assert there <= {r.key for r in more.validation}, "the split of a question stays"
    assert 0.15 < len({r.key for r in more.validation}) / 200 < 0.35


def test_too_few_questions_to_split_is_an_error() -> None:
    with pytest.raises(DataError, match="3 questions are too few to split"):
        split([row((1.0,), key=str(n)) for n in range(3)], 0.01)
    train_rows, validation = split([row((1.0,))], 0.0)
    assert (len(train_rows), validation) == (1, [])


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"labels": (0.5, 1.5)}, "label 1.5 is not in 0..1"),
        ({"labels": (0.5, float("nan"))}, "label nan is not in 0..1"),
        ({"labels": (0.5,)}, "1 labels for 2 steps"),
        ({"steps": (), "labels": ()}, "without any step"),
        ({"weight": 0.0}, "weight 0.0"),
    ],
)
def test_examples_that_cannot_be_used_are_named(change: dict[str, Any], said: str, base: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=f"{EXAMPLES[0].problem.key.replace('+', '.')}.*{said}"):
        run(tmp_path, base, examples=[replace(EXAMPLES[0], **change), *EXAMPLES[1:]])


def test_answers_without_the_delimiter_are_an_error(base: Path, tmp_path: Path) -> None:
    whole = [replace(e, steps=("".join(e.steps).replace("\n", " "),), labels=e.labels[-1:]) for e in EXAMPLES]
    with pytest.raises(DataError, match="no step of 96 answers holds the task's step delimiter"):
        run(tmp_path, base, examples=whole)


def test_nothing_to_train_on_is_an_error(base: Path, tmp_path: Path) -> None:
    unlabelled = [replace(e, labels=(None, None)) for e in EXAMPLES]
    with pytest.raises(TrainingError, match=r"nothing to train a verifier on: of 96 answers 0 are longer.*96 have no"):
        run(tmp_path, base, examples=unlabelled)
    with pytest.raises(TrainingError, match=r"96 are longer than verifier\.max_length = 5"):
        run(tmp_path, base, SETTINGS.model_copy(update={"max_length": 5}))
    with pytest.raises(TrainingError, match="of 0 answers"):
        run(tmp_path, base, examples=[])


def test_wrong_answers_are_trained_on_in_proportion() -> None:
    tokenizer, settings = build_tokenizer(), SETTINGS.model_copy(update={"wrong_per_right": 1.0})
    everything = encode(EXAMPLES, SETTINGS, TASK, tokenizer, history=False)
    some = encode(EXAMPLES[::-1], settings, TASK, tokenizer, history=False)
    for key in {r.key for r in everything.train}:
        before = [r.right for r in everything.train if r.key == key]
        after = [r.right for r in some.train if r.key == key]
        assert after.count(1.0) == before.count(1.0)
        assert after.count(0.0) == min(before.count(0.0), max(1, before.count(1.0)))
    assert some.dropped_wrong == len(everything.train) - len(some.train) > 0
    same = {(r.key, tuple(r.ids)) for r in (*some.validation, *some.spare)}
    assert same == {(r.key, tuple(r.ids)) for r in everything.validation}, "held-out answers are all measured"
    assert some.spare


def test_labels_of_earlier_steps_may_weigh_less() -> None:
    settings = all_of(SETTINGS).model_copy(update={"prefix_weight": 0.25})
    (one,) = encode([replace(EXAMPLES[0], weight=2.0)], settings, TASK, build_tokenizer(), history=False).train
    assert one.weights == (0.5, 2.0, 2.0)
    batch = collate([replace(one, targets=(1.0, 0.0, IGNORED))])
    by_hand = 0.5 * bce(sigmoid(0.3), 1.0) + 2 * bce(sigmoid(-0.8), 0.0)
    assert float(loss_sum(torch.tensor([[0.3, -0.8]]), batch)) == pytest.approx(by_hand, rel=1e-5)
    assert float(num_terms(batch)) == 2.5


def test_the_newest_rounds_are_kept() -> None:
    examples = [replace(e, round=n % 3) for n, e in enumerate(EXAMPLES)]
    few = all_of(SETTINGS).model_copy(update={"max_examples": 40})
    rows = encode(examples, few, TASK, build_tokenizer(), history=False)
    assert len(rows.train) == 40
    newest = encode([e for e in examples if e.round == 2], all_of(SETTINGS), TASK, build_tokenizer(), history=False)
    assert rows.train[: len(newest.train)] == newest.train


@pytest.mark.parametrize(
    ("labels", "source", "right"),
    [
        ((1.0, 0.0, None), STEP_DATA, 0.0),  # labelled up to the first wrong step: the whole is wrong
        ((0.0, 1.0, 1.0), STEP_DATA, 0.0),
        ((1.0, None, 1.0), STEP_DATA, 1.0),
        ((1.0, 1.0, None), STEP_DATA, None),
        ((0.0, None, 1.0), "tree", 1.0),  # nothing succeeded from there, but this did
        ((0.0, 0.0, None), "siblings", None),
    ],
)
def test_a_solution_with_a_wrong_step_is_a_wrong_answer(labels: Any, source: str, right: float | None) -> None:
    example = replace(EXAMPLES[0], steps=("1+2=3\n", "3+4=7\n", "7+5=12"), labels=labels, source=source)
    going_on = replace(example, steps=(*example.steps[:2], "7+5=12\n"))
    finished, open_ended = encode([example, going_on], all_of(SETTINGS), TASK, build_tokenizer(), history=False).train
    assert (finished.right, open_ended.right) == (right, None)
    assert finished.targets == tuple(IGNORED if label is None else label for label in (*labels, None))


def test_labels_are_turned_round_alike_wherever_their_text_is() -> None:
    flipping = all_of(SETTINGS).model_copy(update={"flip_labels": 0.2})
    examples = answers(200)
    tokenizer = build_tokenizer()
    plain = encode(examples, all_of(SETTINGS), TASK, tokenizer, history=False).train
    turned = encode(examples, flipping, TASK, tokenizer, history=False)
    pairs = [
        (a, b) for p, t in zip(plain, turned.train, strict=True) for a, b in zip(p.targets, t.targets, strict=True)
    ]
    changed = [(a, b) for a, b in pairs if a != b]
    assert all(b == 1 - a for a, b in changed)
    assert turned.flipped == len(changed)
    assert 0.15 < len(changed) / (2 * len(examples)) < 0.25
    firsts: dict[tuple[str, tuple[int, ...]], set[float]] = {}
    for r in turned.train:
        firsts.setdefault((r.key, tuple(r.ids[: r.ends[0]])), set()).add(r.targets[0])
    assert all(len(values) == 1 for values in firsts.values()), "one text, one label"
    outcomes = encode(answers(200, outcomes=True), flipping, TASK, tokenizer, history=False)
    assert 0.12 < outcomes.flipped / len(examples) < 0.28


# ------------------------------------------------------------ aggregation and calibration


def test_auc_counts_pairs() -> None:
    rng = random.Random(1)
    right = torch.tensor([rng.random() < 0.4 for _ in range(60)]).numpy()
    scores = torch.tensor([rng.randrange(8) / 8 for _ in range(60)]).numpy()
    good, bad = scores[right], scores[~right]
    pairs = [(g > b) + 0.5 * (g == b) for g in good for b in bad]
    assert auc(right, scores) == pytest.approx(sum(pairs) / len(pairs))
    assert auc(right & False, scores) is None
    keys = [str(n % 7) for n in range(60)]
    each = [auc(right[k::7], scores[k::7]) for k in range(7)]
    known = [value for value in each if value is not None]
    assert auc_within(keys, right, scores) == pytest.approx(sum(known) / len(known))


def judged(logits: list[float], right: float, key: str) -> tuple[Row, list[float]]:
    return replace(row((IGNORED,) * len(logits), key=key), right=right), logits


def fitted(made: list[tuple[Row, list[float]]], wanted: Any, *, process: bool) -> Fitted:
    return fit([row for row, _ in made], [logits for _, logits in made], wanted, process=process)


def test_the_aggregation_is_chosen_where_it_tells_and_ties_go_to_the_simplest() -> None:
    draw = random.Random(2)
    by_any, by_last = list[tuple[Row, list[float]]](), list[tuple[Row, list[float]]]()
    for n in range(300):
        steps = [draw.random() < 0.7 for _ in range(4)]
        logits = [draw.gauss(2 if ok else -2, 0.5) for ok in steps]
        by_any.append(judged(logits, float(all(steps)), str(n % 30)))
        by_last.append(judged(logits, float(steps[-1]), str(n % 30)))
    wrong_anywhere = fitted(by_any, "choose", process=True)
    assert wrong_anywhere.aggregation == "min"
    assert wrong_anywhere.answer_auc_within["min"] > 0.95 > 0.8 > wrong_anywhere.answer_auc_within["last"]
    assert fitted(by_last, "choose", process=True).aggregation == "last"
    assert fitted(by_any, "mean", process=True).aggregation == "mean"
    assert fitted(by_any, "prod", process=False).aggregation == "last", "one score has nothing to join"


def test_the_calibration_makes_the_answers_score_a_probability() -> None:
    draw = random.Random(3)
    made = list[tuple[Row, list[float]]]()
    for n in range(4000):
        logits = [draw.gauss(1, 1.5) for _ in range(2)]
        chance = math.prod(sigmoid(0.5 * z + 0.8) for z in logits)
        made.append(judged(logits, float(draw.random() < chance), str(n % 100)))
    found = fitted(made, "prod", process=True)
    assert found.scale == pytest.approx(0.5, abs=0.1)
    assert found.shift == pytest.approx(0.8, abs=0.15)
    separable = [judged([z], float(z > 0), str(n % 5)) for n, z in enumerate([-3.0, 3.0] * 30)]
    assert fitted(separable, "choose", process=True).scale < 20, "no calibration runs away"


def test_without_answers_nothing_is_fitted() -> None:
    nothing = fit([row((1.0, 0.0))], [[2.0, -2.0]], "choose", process=True)
    assert (nothing.aggregation, nothing.scale, nothing.shift) == ("last", 1.0, 0.0)
    assert (nothing.answer_auc, nothing.step_auc) == (None, 1.0)
    assert fit([], [], "choose", process=True).answer_auc is None


# ------------------------------------------------------------ training


def test_training_learns_and_writes_a_verifiers_folder(base: Path, tmp_path: Path) -> None:
    calls: list[tuple[int, int]] = []
    examples = answers(50)
    file = tmp_path / "examples.jsonl"
    write_examples(examples, file)
    settings = MUON.model_copy(update={"epochs": 6, "checks": 2})
    report = run(tmp_path / "out", base, settings, file, progress=lambda done, total, **_: calls.append((done, total)))
    out = tmp_path / "out"
    assert {p.name for p in out.iterdir()} == {
        "model",
        "readout.safetensors",
        "verifier.json",
        "report.json",
        "metrics.jsonl",
        "timing.json",
    }
    assert report.loss_last < 0.7 * report.loss_first
    assert report.step_auc is not None
    assert report.step_auc > 0.75
    assert calls[-1] == (report.steps, report.steps)
    assert report.examples + report.validation_examples == len(examples)
    card = Card.load(out)
    assert (card.kind, card.readout, card.delimiter, card.policy) == ("prm", "generative", "\n", "9f86d081884c7d65")
    assert (card.aggregation, card.scale, card.shift) == (report.aggregation, report.scale, report.shift)
    assert card.base is None
    AutoTokenizer.from_pretrained(out / "model")
    language = AutoModelForCausalLM.from_pretrained(out / "model")
    readout = GenerativeReadout.load(out, 32)
    rows = encode(examples, settings, TASK, build_tokenizer(), history=False)
    logits, loss = step_logits(StepScorer(language, readout), rows.validation, 8, "cpu")
    assert loss == pytest.approx(report.validation_loss, rel=1e-4), "the saved weights are the reported ones"
    assert fit(rows.validation, logits, "choose", process=True).scale == pytest.approx(card.scale, rel=1e-3)
    again = run(tmp_path / "again", base, settings, examples)
    assert again == report, "a file of examples is those examples"
    assert (tmp_path / "again" / "metrics.jsonl").read_bytes() == (out / "metrics.jsonl").read_bytes()


def test_outcomes_alone_teach_the_steps(base: Path, tmp_path: Path) -> None:
    settings = SCALAR.model_copy(update={"epochs": 8, "labels": ("outcomes",), "checks": 1})
    run(tmp_path, base, settings, answers(100, outcomes=True))
    model = AutoModelForTokenClassification.from_pretrained(tmp_path / "model")
    rows = encode(answers(100), settings, TASK, build_tokenizer(), history=False)
    logits, _ = step_logits(StepScorer(model, None), rows.validation, 64, "cpu")
    found = fit(rows.validation, logits, "prod", process=True)
    assert found.step_auc is not None
    assert found.step_auc > 0.9
    assert found.answer_auc_within["prod"] > 0.9


@pytest.mark.parametrize("rated", [False, True])
def test_a_data_set_of_labelled_steps_teaches_a_verifier(base: Path, tmp_path: Path, rated: bool) -> None:
    """No policy answered anything. Of ratings a 0 is as good as a 1; after the first wrong step there is no label."""
    file = tmp_path / "steps.jsonl"
    with file.open("w") as lines:
        for n, example in enumerate(answers(90)):
            right = [label == 1.0 for label in example.labels]
            labels: list[Any] = [*right] if right[0] else [False, None]
            if rated:
                labels = [None if label is None else (n % 2 if label else -1) for label in labels]
            steps = [step.strip() for step in example.steps]
            lines.write(json.dumps({"question": example.problem.question, "steps": steps, "labels": labels}) + "\n")
    data_set = StepLabels(path=str(file))
    data = read_step_data(data_set, TASK, held_out=lambda key: False, overlapping=lambda problems: set())
    assert data.counts["ratings"] == (data.counts["kept"] + data.counts["duplicate"]) * rated
    changes = {"labels": ("gold",), "steps": data_set, "epochs": 6, "checks": 2, "max_examples": 1}
    settings = MUON.model_copy(update=changes)
    report = run(tmp_path / "out", base, settings, data.examples)
    assert report.examples + report.validation_examples == len(data.examples), "max_examples counts answers alone"
    language = AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "model")
    scorer = StepScorer(language, GenerativeReadout.load(tmp_path / "out", 32))
    rows = encode(data.examples, settings, TASK, build_tokenizer(), history=False)
    logits, _ = step_logits(scorer, rows.validation, 64, "cpu")
    found = fit(rows.validation, logits, "choose", process=True)
    assert not {r.key for r in rows.train} & {r.key for r in rows.validation}
    assert found.step_auc is not None
    assert found.step_auc > 0.9, "on questions that it was not trained on"


def test_the_best_weights_are_kept(base: Path, tmp_path: Path) -> None:
    """A learning rate that ruins the model late: what is saved has the lowest loss that was measured."""
    settings = SETTINGS.model_copy(update={"epochs": 8, "checks": 12, "learning_rate": 0.3, "schedule": "constant"})
    report = run(tmp_path, base, settings.model_copy(update={"warmup": 0.9}))
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").open()]
    curve = {r["step"]: r["value"] for r in rows if r["name"] == "verifier/validation_loss"}
    assert report.best_step < report.steps == max(curve)
    assert report.best_step == min(curve, key=lambda step: curve[step])
    assert report.validation_loss == pytest.approx(min(curve.values()), rel=1e-5)
    scorer = StepScorer(AutoModelForCausalLM.from_pretrained(tmp_path / "model"), GenerativeReadout.load(tmp_path, 32))
    held_out = encode(EXAMPLES, SETTINGS, TASK, build_tokenizer(), history=False).validation
    assert step_logits(scorer, held_out, 8, "cpu")[1] == pytest.approx(report.validation_loss, rel=1e-4)


def test_without_validation_the_last_weights_are_kept(base: Path, tmp_path: Path) -> None:
    report = run(tmp_path, base, all_of(SETTINGS))
    assert (report.best_step, report.validation_loss, report.scale) == (report.steps, None, 1.0)
    assert report.examples == len(EXAMPLES)


# ------------------------------------------------------------ folders


def test_a_scalar_verifier_is_a_token_classifier(base: Path, tmp_path: Path) -> None:
    report = run(tmp_path, base, SCALAR)
    assert not (tmp_path / "readout.safetensors").exists()
    assert Card.load(tmp_path).readout == "scalar"
    model = AutoModelForTokenClassification.from_pretrained(tmp_path / "model").eval()
    assert model.config.num_labels == 1
    held_out = encode(EXAMPLES, SETTINGS, TASK, build_tokenizer(), history=False).validation
    _, loss = step_logits(StepScorer(model, None), held_out, 8, "cpu")
    assert loss == pytest.approx(report.validation_loss, rel=1e-4)


def test_an_outcome_verifier_scores_the_end(base: Path, tmp_path: Path) -> None:
    report = run(tmp_path, base, ORM)
    assert (report.aggregation, report.step_auc) == ("last", None)
    assert report.answer_auc is not None
    assert Card.load(tmp_path).kind == "orm"


@pytest.mark.parametrize("settings", [LORA, SCALAR_LORA], ids=["generative", "scalar"])
def test_an_adapter_verifier_names_its_base_and_can_be_trained_on(
    settings: TrainedVerifier, base: Path, tmp_path: Path
) -> None:
    before = (base / "model.safetensors").read_bytes()
    report = run(tmp_path / "first", base, settings)
    assert (base / "model.safetensors").read_bytes() == before
    assert report.trainable_parameters < report.parameters / 2
    card = Card.load(tmp_path / "first")
    assert card.base == str(base)
    adapter = tmp_path / "first" / "model"
    assert lora.is_adapter(adapter)
    second = run(tmp_path / "second", tmp_path / "first", settings.model_copy(update={"learning_rate": 1e-5}), seed=6)
    assert second.validation_loss == pytest.approx(report.validation_loss, rel=0.02), "it goes on where it was"
    full = run(tmp_path / "full", tmp_path / "first", settings.model_copy(update={"method": "full"}))
    assert full.trainable_parameters == full.parameters
    assert Card.load(tmp_path / "full").base is None


def test_a_policys_adapter_becomes_a_scalar_verifiers(base: Path, tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(3)
    policy = get_peft_model(
        AutoModelForCausalLM.from_pretrained(base),
        LoraConfig(task_type="CAUSAL_LM", r=2, target_modules="all-linear", init_lora_weights=False),
    )
    policy.save_pretrained(str(tmp_path / "policy"))
    build_tokenizer().save_pretrained(tmp_path / "policy")
    scorer, _ = StepScorer.load(tmp_path / "policy", base, SCALAR_LORA, Model(), "cpu")
    ids = torch.tensor([[12, 13, 14]])
    with torch.no_grad():
        wanted = policy(input_ids=ids, output_hidden_states=True).hidden_states[-1]
        got = scorer.eval().language(input_ids=ids, output_hidden_states=True).hidden_states[-1]
    torch.testing.assert_close(got, wanted)
    with pytest.raises(ModelError, match="needs its full base model"):
        run(tmp_path / "out", tmp_path / "policy", SCALAR_LORA)


def test_a_warm_start_goes_on_from_the_older_verifier(base: Path, tmp_path: Path) -> None:
    first = run(tmp_path / "first", base, MUON.model_copy(update={"epochs": 6}))
    tiny = MUON.model_copy(update={"epochs": 1, "learning_rate": 1e-6, "adamw_learning_rate": 1e-6})
    second = run(tmp_path / "second", tmp_path / "first", tiny)
    assert second.validation_loss == pytest.approx(first.validation_loss, rel=0.01)
    with pytest.raises(ConfigError, match=r"prm with a generative read-out.*verifier.warm_start = false"):
        run(tmp_path / "third", tmp_path / "first", SCALAR)


def test_a_missing_model_is_a_user_error(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no tokenizer at"):
        run(tmp_path / "out", tmp_path / "nothing")


# ------------------------------------------------------------ resume


def kill_at(step: int) -> Callable[..., None]:
    def progress(done: int, total: int, **info: float) -> None:
        if done >= step:
            raise Killed

    return progress


def everything(out: Path) -> dict[str, bytes]:
    return {
        str(p.relative_to(out)): p.read_bytes()
        for p in sorted(out.rglob("*"))
        if p.is_file() and p.name != "timing.json"
    }


@pytest.mark.parametrize("settings", [MUON, LORA, SCALAR], ids=["muon", "lora", "scalar"])
def test_a_resumed_training_ends_in_the_same_bytes(settings: TrainedVerifier, base: Path, tmp_path: Path) -> None:
    settings = settings.model_copy(update={"epochs": 3, "checks": 5})
    run(tmp_path / "whole", base, settings)
    out = tmp_path / "out"
    for step in (6, 9):
        with pytest.raises(Killed):
            run(out, base, settings, progress=kill_at(step))
        assert not (out / "verifier.json").exists()
    run(out, base, settings)
    assert json.loads((out / "timing.json").read_text())["resumed_from_step"] > 0
    assert everything(out) == everything(tmp_path / "whole")


def test_a_damaged_checkpoint_and_those_of_another_training_are_not_used(base: Path, tmp_path: Path) -> None:
    settings = SETTINGS.model_copy(update={"epochs": 3})
    out, whole = tmp_path / "out", tmp_path / "whole"
    run(whole, base, settings)
    with pytest.raises(Killed):
        run(out, base, settings, progress=kill_at(12))
    newest = checkpoints.latest_valid_checkpoint(out / "checkpoints")
    assert newest is not None
    content = (newest / "model.safetensors").read_bytes()
    (newest / "model.safetensors").write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    kept = shutil.copytree(out, tmp_path / "kept")
    run(out, base, settings)
    resumed = json.loads((out / "timing.json").read_text())["resumed_from_step"]
    assert 0 < resumed < int(newest.name.removeprefix("checkpoint-"))
    assert everything(out) == everything(whole)
    run(kept, base, settings, EXAMPLES[:-4])
    assert json.loads((kept / "timing.json").read_text())["resumed_from_step"] == 0


def test_a_loss_that_is_not_finite_stops_before_the_update(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from distill.prm_trainer import StepTrainer

    plain = StepTrainer.compute_loss

    def poisoned(self: StepTrainer, *args: Any, **kwargs: Any) -> torch.Tensor:
        return plain(self, *args, **kwargs) * (float("nan") if self.state.global_step == 2 else 1)

    monkeypatch.setattr(StepTrainer, "compute_loss", poisoned)
    with pytest.raises(TrainingError, match=r"loss of step 3 is not finite.*lower verifier.learning_rate"):
        run(tmp_path, base)
    assert not (tmp_path / "verifier.json").exists()
