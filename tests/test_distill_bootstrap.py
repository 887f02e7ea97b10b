"""The embedded base: bit for bit reproducible, learns, and leaves what the later stages need."""

import json
from itertools import islice

import pytest
import torch

from configs.load import parse
from configs.schema import Config
from distill import bootstrap
from distill.select import read_rows
from search.errors import TrainingError
from search.tasks import load_task
from search.tasks.splits import split_of
from search.types import Grade


def config(task: str = "countdown", **changes) -> Config:
    settings = {"hidden_size": 32, "layers": 1, "heads": 2, "examples": 256, "batch_size": 32}
    return parse(
        {
            "loop": {"name": "t"},
            "task": {"type": task},
            "bootstrap": settings | changes,
            "stages": {"threads": 1},
        }
    )


@pytest.fixture(scope="module", params=["countdown", "arithmetic"])
def made(request, tmp_path_factory):
    out = tmp_path_factory.mktemp(request.param)
    steps = []
    bootstrap.run(
        config(request.param), {}, out, progress=lambda done, total, **info: steps.append((done, total, info))
    )
    return config(request.param), out, steps


def test_it_leaves_a_model_that_transformers_loads(made) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    _, out, _ = made
    model, tokenizer = AutoModelForCausalLM.from_pretrained(out / "model"), AutoTokenizer.from_pretrained(out / "model")
    ids = tokenizer.encode("3,5,7>22\n", add_special_tokens=False)
    assert tokenizer.decode(ids) == "3,5,7>22\n"
    assert model.config.vocab_size == len(tokenizer)
    assert model(torch.tensor([ids])).logits.shape == (1, len(ids), len(tokenizer))
    assert (model.config.eos_token_id, model.config.pad_token_id) == (tokenizer.eos_token_id, tokenizer.pad_token_id)


def test_replay_rows_are_training_rows_of_the_train_split(made) -> None:
    settings, out, _ = made
    task, rows = load_task(settings), list(read_rows(out / "replay.jsonl"))
    assert len(rows) == settings.bootstrap.examples
    from search.tasks.tokenizer import build_tokenizer

    tokenizer = build_tokenizer()
    for row in rows:
        assert (row.source, row.round) == ("replay", 0)
        assert row.completion_ids[-1] == tokenizer.eos_token_id
        assert split_of(row.key, settings.splits) == "train"
        assert tokenizer.decode(row.prompt_ids) == row.key + "\n"
    problems = {p.key: p for p in (task.parse(row.key) for row in rows)}
    pairs = [(problems[row.key], tokenizer.decode(row.completion_ids, skip_special_tokens=True)) for row in rows]
    right = sum(g.grade is Grade.CORRECT for g in task.grade(pairs)) / len(rows)
    assert 0.2 < right < 0.8  # neither solved throughout nor never


def test_metrics_and_progress(made) -> None:
    settings, out, steps = made
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    metrics = {row["name"]: row["value"] for row in rows}
    assert metrics["bootstrap/examples"] == settings.bootstrap.examples
    assert metrics["bootstrap/steps"] == 8
    assert 0 < metrics["bootstrap/loss"] < 5
    assert steps[-1][:2] == (8, 8)
    assert steps[-1][2]["loss"] > 0
    assert set(json.loads((out / "timing.json").read_text())) == {"wall_s", "cpu_s"}


def test_a_seed_gives_the_same_files_byte_for_byte(made, tmp_path) -> None:
    settings, out, _ = made
    torch.manual_seed(999)  # the global random state has no part in it
    bootstrap.run(settings, {}, tmp_path)
    for name in ("model/model.safetensors", "replay.jsonl", "metrics.jsonl"):
        assert (tmp_path / name).read_bytes() == (out / name).read_bytes()


def test_another_seed_gives_another_model(made, tmp_path) -> None:
    settings, out, _ = made
    other = settings.model_copy(update={"loop": settings.loop.model_copy(update={"seed": 1})})
    bootstrap.run(other, {}, tmp_path)
    name = "model/model.safetensors"
    assert (tmp_path / name).read_bytes() != (out / name).read_bytes()


def test_it_learns(tmp_path) -> None:
    short, long = tmp_path / "short", tmp_path / "long"
    losses = []
    for out, examples in ((short, 64), (long, 2048)):
        out.mkdir()
        bootstrap.run(config(examples=examples, epochs=1), {}, out)
        losses.append(json.loads((out / "metrics.jsonl").read_text().splitlines()[0])["value"])
    assert losses[1] < 0.7 * losses[0]


def test_a_diverged_loss_is_an_error_that_names_the_knob(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(bootstrap, "_backward", lambda model, batch: float("nan"))
    with pytest.raises(TrainingError, match=r"bootstrap\.learning_rate"):
        bootstrap.run(config(), {}, tmp_path)
    assert not (tmp_path / "model").exists()


def test_every_row_is_seen_once_an_epoch() -> None:
    settings = config()
    rows = list(islice(bootstrap.more_rows(settings, load_task(settings), stream="x"), 100))
    batches = bootstrap._batches(rows, 25, seed=0)
    for _ in range(2):
        epoch = [row for _ in range(4) for row in next(batches)]
        assert sorted(map(repr, epoch)) == sorted(map(repr, rows))


def test_more_rows_are_other_rows() -> None:
    settings = config()
    task = load_task(settings)
    first = list(islice(bootstrap.more_rows(settings, task, stream="control/1"), 1500))
    assert first == list(islice(bootstrap.more_rows(settings, task, stream="control/1"), 1500))
    assert len({(row.key, row.completion_ids) for row in first}) > 1400  # chunks differ from each other
    assert first[:100] != list(islice(bootstrap.more_rows(settings, task, stream="control/2"), 100))


def test_gradients_by_length_equal_a_padded_batch() -> None:
    settings = config()
    rows = list(islice(bootstrap.more_rows(settings, load_task(settings), stream="x"), 24))
    assert len({len(row.completion_ids) for row in rows}) > 1
    from search.tasks.tokenizer import build_tokenizer

    model = bootstrap.build_model(settings.bootstrap, build_tokenizer(), seed=3)
    loss = bootstrap._backward(model, rows)
    grouped = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    longest = max(row.tokens for row in rows)
    ids = torch.tensor([[*r.prompt_ids, *r.completion_ids] + [0] * (longest - r.tokens) for r in rows])
    labels = torch.tensor(
        [[-100] * len(r.prompt_ids) + [*r.completion_ids] + [-100] * (longest - r.tokens) for r in rows]
    )
    logits = model(ids).logits[:, :-1]
    padded = torch.nn.functional.cross_entropy(logits.reshape(-1, logits.shape[-1]), labels[:, 1:].reshape(-1))
    padded.backward()
    assert loss == pytest.approx(float(padded.detach()), rel=1e-5)
    for a, p in zip(grouped, model.parameters(), strict=True):
        torch.testing.assert_close(a, p.grad, rtol=1e-3, atol=1e-6)
