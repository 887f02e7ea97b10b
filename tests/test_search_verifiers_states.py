"""A verifier's scores are those of one full pass a request, whatever the batches, the cache and the order; and what is
counted as computed is what was."""

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from configs.schema import Model, VerifierRuntime
from search.types import Scored, ScoreRequest
from search.verifiers.heads import StateHead, calibrated, linear_rows, softmax_of
from search.verifiers.layout import Encoded
from search.verifiers.states import StateScorer
from search.verifiers.trained import Trained
from tests.verifier_kit import MAX_LENGTH, Reference, Sums, answer, answers, build_model, question, save_verifier, step


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[tuple[str, str], Path]:
    root = tmp_path_factory.mktemp("verifiers")
    return {
        (readout, kind): save_verifier(root / f"{readout}-{kind}", readout, kind, history=True)
        for readout in ("generative", "scalar")
        for kind in ("prm", "orm")
    }


@pytest.fixture(scope="module")
def folder(folders) -> Path:
    return folders["generative", "prm"]


def load(folder: Path, **settings: Any) -> Trained:
    return Trained(Sums(), folder, VerifierRuntime(device="cpu", **settings), Model())  # type: ignore[arg-type]


def check(found: Sequence[Scored], requests: Sequence[ScoreRequest], reference: Reference) -> None:
    for scored, request in zip(found, requests, strict=True):
        assert scored.unscored is None
        assert scored.scores == pytest.approx(reference.scores(request), abs=1e-5)
        assert scored.tokens == reference.num_tokens(request)
        assert scored.prompt_tokens == len(reference.pieces(request)[0])


@pytest.mark.parametrize("readout", ["generative", "scalar"])
@pytest.mark.parametrize("kind", ["prm", "orm"])
@pytest.mark.parametrize(
    "settings",
    [{}, {"cache_tokens": 0}, {"batch_tokens": 90}, {"max_batch_rows": 3, "cache_tokens": 40}, {"batch_tokens": 1}],
    ids=str,
)
def test_scores_are_those_of_a_full_pass_each(folders, readout: str, kind: str, settings: dict[str, Any]) -> None:
    folder = folders[readout, kind]
    reference, requests = Reference(folder), answers(6, 5)
    expected = [score for request in requests for score in reference.scores(request)]
    assert statistics.stdev(expected) > 0.1, "scores that do not differ show nothing"
    verifier = load(folder, **settings)
    assert verifier.facts.process == (kind == "prm")
    check(verifier.score(requests), requests, reference)
    check(verifier.score(requests[::-1]), requests[::-1], reference)  # with what is kept by now


def tree(width: int, keep: int, rounds: int, problems: int) -> list[list[ScoreRequest]]:
    """The requests of a beam search, round by round; the last round's answers are finished."""
    live = [((), n) for n in range(problems)]
    asked: list[list[ScoreRequest]] = []
    for depth in range(rounds):
        last = depth == rounds - 1
        live = [
            ((*steps, step(n, steps, fork).strip() if last else step(n, steps, fork)), n)
            for steps, n in live
            for fork in range(width)
        ]
        asked.append([ScoreRequest(question(n), steps) for steps, n in live])
        live = [one for n in range(problems) for one in [o for o in live if o[1] == n][:keep]]
    return asked


@pytest.mark.parametrize("readout", ["generative", "scalar"])
def test_a_candidate_that_grew_costs_its_new_steps(folders, readout: str) -> None:
    folder = folders[readout, "prm"]
    reference, verifier, fresh = Reference(folder), load(folder), load(folder, cache_tokens=0)
    for depth, requests in enumerate(tree(width=4, keep=2, rounds=5, problems=3)):
        found = verifier.score(requests)
        check(found, requests, reference)
        for scored, plain in zip(found, fresh.score(requests), strict=True):
            assert scored.scores == pytest.approx(plain.scores, abs=1e-5)
            assert plain.computed_tokens == plain.tokens
        for n in range(3):
            mine = [i for i, request in enumerate(requests) if request.problem == question(n)]
            new = sum(len(reference.pieces(requests[i])[-1]) for i in mine)
            prompt = len(reference.pieces(requests[mine[0]])[0]) if depth == 0 else 0
            assert sum(found[i].computed_tokens for i in mine) == new + prompt


def test_what_is_known_whole_costs_nothing(folder) -> None:
    verifier = load(folder)
    requests = [answer(1, 2, ended=False)]
    first = verifier.score([*requests, *requests])
    assert [scored.computed_tokens for scored in first] == [first[0].tokens, 0]
    again = verifier.score(requests)[0]
    assert (again.scores, again.computed_tokens, again.tokens) == (first[0].scores, 0, first[0].tokens)
    verifier.reset()
    assert verifier.score(requests)[0] == first[0]


def test_every_step_of_what_was_read_can_be_gone_on_from(folder) -> None:
    """As after a look-ahead, which reads further than the search goes."""
    reference, verifier = Reference(folder), load(folder)
    steps = tuple(step(n) for n in range(4))
    verifier.score([ScoreRequest(question(0), steps)])
    for num in (4, 2, 1, 3):
        forked = ScoreRequest(question(0), (*steps[:num], "7=7"))
        scored = verifier.score([forked])[0]
        assert scored.computed_tokens == 4
        assert scored.scores == pytest.approx(reference.scores(forked), abs=1e-5)


def test_a_shared_prompt_is_read_once_a_call_and_finished_answers_are_not_kept(folder) -> None:
    reference, verifier = Reference(folder), load(folder)
    requests = [ScoreRequest(question(n), (step(n, k).strip(),)) for n in range(3) for k in range(4)]
    prompts = [len(reference.pieces(requests[4 * n])[0]) for n in range(3)]
    found = verifier.score(requests)
    check(found, requests, reference)
    assert sum(s.computed_tokens for s in found) == sum(s.tokens - s.prompt_tokens for s in found) + sum(prompts)
    assert verifier._scorer.cache.num_used == sum(prompts)
    again = verifier.score(requests)
    assert sum(s.computed_tokens for s in again) == sum(s.tokens - s.prompt_tokens for s in again)


@pytest.mark.parametrize("capacity", [10, 30, 70])
def test_a_cache_that_is_too_small_costs_time_only(folder, capacity: int) -> None:
    reference, verifier, large = Reference(folder), load(folder, cache_tokens=capacity), load(folder)
    computed = {"small": 0, "large": 0}
    for _ in range(2):
        for requests in tree(width=3, keep=2, rounds=4, problems=4):
            found = verifier.score(requests)
            check(found, requests, reference)
            computed["small"] += sum(s.computed_tokens for s in found)
            computed["large"] += sum(s.computed_tokens for s in large.score(requests))
            cache = verifier._scorer.cache
            held = {slot for kept in cache._kept.values() for slot in kept.slots.tolist()}
            assert len(held) == cache.num_used <= capacity, "a slot is lost"
    assert computed["small"] > computed["large"]


def test_what_does_not_fit_the_context_has_a_reason_and_harms_no_other(folder) -> None:
    verifier, reference = load(folder), Reference(folder)
    long = ScoreRequest(question(1), ("1+" * MAX_LENGTH,))
    requests = [answer(0, 1), long, answer(1, 1)]
    found = verifier.score(requests)
    assert found[1].scores == ()
    assert found[1].unscored is not None
    assert f"context only {MAX_LENGTH}" in found[1].unscored
    check([found[0], found[2]], [requests[0], requests[2]], reference)


def test_answers_without_readable_steps_have_a_reason(folder) -> None:
    found = load(folder).score([ScoreRequest(question(0), ("1+2", "3\n")), ScoreRequest(question(0), ())])
    assert [scored.scores for scored in found] == [(), ()]
    assert found[0].unscored == "step 1 of 2 does not hold the step delimiter '\\n'"
    assert found[1].unscored == "it has no step"


def test_a_full_gpu_halves_the_batch(folder, monkeypatch) -> None:
    """Played by a decoder that says so for more than two rows, or for any cache."""
    reference, verifier = Reference(folder), load(folder)
    scorer: Any = verifier._scorer
    decoder, tried = scorer._decoder, list[int]()

    def full(input_ids: torch.Tensor, **kwargs: Any) -> Any:
        tried.append(len(input_ids))
        if len(input_ids) > 2:
            raise torch.cuda.OutOfMemoryError("full")
        return decoder(input_ids=input_ids, **kwargs)

    full.config = decoder.config  # type: ignore[attr-defined]
    monkeypatch.setattr(scorer, "_decoder", full)
    requests = answers(3, 3)
    check(verifier.score(requests), requests, reference)
    assert max(tried) > 2
    assert scorer.cache.capacity == 0

    def none(**kwargs: Any) -> Any:
        raise torch.cuda.OutOfMemoryError("full")

    none.config = decoder.config  # type: ignore[attr-defined]
    monkeypatch.setattr(scorer, "_decoder", none)
    assert "no memory" in (verifier.score(requests)[0].unscored or "")


# ---------------------------------------------------------------- other heads, other models


def encoded(n: int, *, steps: int, prompt: int = 9, prompt_key: int = 0, tail: int = 0) -> Encoded:
    """Ids at random, a score every three."""
    from search.randomness import rng

    draw, shared = rng("ids", n), rng("prompt", prompt_key)
    ids = [shared.randrange(3, 40) for _ in range(prompt)] + [draw.randrange(3, 40) for _ in range(3 * steps + tail)]
    return Encoded(tuple(ids), prompt, tuple(prompt + 3 * s + 2 for s in range(steps)))


def plain_scores(model: Any, head: Any, one: Encoded, *, mask: bool = False) -> list[float]:
    with torch.inference_mode():
        states = model(input_ids=torch.tensor([one.ids])).last_hidden_state[0]
        ends = states[list(one.ends)]
        return head(ends, torch.zeros(len(ends)), torch.ones(len(ends))).tolist()


@pytest.mark.parametrize("changes", [{}, {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}])
def test_a_softmax_over_two_tokens_of_the_output_head(changes: dict[str, Any]) -> None:
    """Also of a model with a sliding window, of which nothing can be kept."""
    torch.manual_seed(5)
    model = build_model("qwen2", tokens=60, **changes).eval()
    head = StateHead(linear_rows(model.lm_head, [7, 11]), softmax_of(0))
    inputs = [encoded(n, steps=1 + n % 4, prompt_key=n % 2, tail=n % 3) for n in range(12)]
    scorer = StateScorer(model.model, head, VerifierRuntime(), max_length=128)
    for _ in range(2):
        found = scorer.score(inputs, keep=True)
        for one, scored in zip(inputs, found, strict=True):
            with torch.inference_mode():
                logits = model(input_ids=torch.tensor([one.ids])).logits[0][list(one.ends)][:, [7, 11]]
            assert list(scored.scores) == pytest.approx(logits.softmax(-1)[:, 0].tolist(), abs=1e-5)
            assert scored.tokens == one.ends[-1] + 1  # what follows the last end is not read
    assert sum(scored.computed_tokens for scored in found) == (0 if not changes else sum(s.tokens for s in found))


def test_a_step_without_text_has_the_score_of_the_one_before() -> None:
    """Formats in which an empty last step adds nothing to read repeat the last end."""
    torch.manual_seed(5)
    model = build_model("qwen2", tokens=60).eval()
    head = StateHead(linear_rows(model.lm_head, [7]), calibrated())
    scorer = StateScorer(model.model, head, VerifierRuntime(), max_length=128)
    one = encoded(0, steps=2)
    twice = Encoded(one.ids, one.num_prompt, (*one.ends, one.ends[-1]))
    first = scorer.score([one], keep=True)[0]
    second = scorer.score([twice])[0]
    assert second.scores == (*first.scores, first.scores[-1])
    assert second.computed_tokens == 0
    scorer.reset()
    assert scorer.score([twice], keep=[True])[0].scores == pytest.approx(second.scores, abs=1e-6)


def test_absolute_positions_are_counted_from_the_prompt_on() -> None:
    from transformers import GPT2Config, GPT2Model

    torch.manual_seed(3)
    model = GPT2Model(GPT2Config(vocab_size=64, n_positions=40, n_embd=32, n_layer=2, n_head=2)).eval()
    head = StateHead(torch.nn.Linear(32, 1), calibrated(3.0))
    scorer = StateScorer(model, head, VerifierRuntime(), max_length=40)
    for steps in range(1, 10):  # one stays at one step, so that the padding of the other reaches past the context
        inputs = [encoded(1, steps=steps, prompt_key=1), encoded(2, steps=max(1, 10 - steps), prompt=10, prompt_key=2)]
        for one, scored in zip(inputs, scorer.score(inputs, keep=True), strict=True):
            assert list(scored.scores) == pytest.approx(plain_scores(model, head, one), abs=1e-5)


def test_a_model_that_looks_both_ways_reads_everything_every_time() -> None:
    from transformers import BertConfig, BertModel

    torch.manual_seed(3)
    shape = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    model = BertModel(BertConfig(vocab_size=64, **shape)).eval()
    head = StateHead(torch.nn.Linear(32, 1), calibrated(3.0))
    scorer = StateScorer(model, head, VerifierRuntime(), max_length=128, causal=False)
    inputs = [encoded(n, steps=1 + n % 4, prompt_key=n % 2, tail=n % 3) for n in range(12)]
    for _ in range(2):
        found = scorer.score(inputs, keep=True)
        for one, scored in zip(inputs, found, strict=True):
            assert list(scored.scores) == pytest.approx(plain_scores(model, head, one), abs=1e-5)
            assert scored.computed_tokens == scored.tokens == len(one.ids)


@pytest.mark.gpu
def test_a_gpu_scores_as_the_reference(folder) -> None:
    reference, requests = Reference(folder), answers(6, 5)
    verifier = Trained(Sums(), folder, VerifierRuntime(device="cuda"), Model())  # type: ignore[arg-type]
    for _ in range(2):
        for scored, request in zip(verifier.score(requests), requests, strict=True):
            assert scored.scores == pytest.approx(reference.scores(request), abs=1e-3)
