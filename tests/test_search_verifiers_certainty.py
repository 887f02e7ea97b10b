"""The policy's certainty against the formulas, token by token over whole sequences, and what it refuses."""

import itertools
import math

import pytest
import torch

from configs.load import load
from configs.schema import CertaintyVerifier, Model
from configs.schema import TransformersEngine as EngineSettings
from search.engines.transformers import TransformersEngine
from search.errors import ConfigError, ModelError
from search.prompts import prompt_ids
from search.randomness import rng
from search.types import Problem, ScoreRequest
from search.verifiers import describe, load_verifier
from search.verifiers.certainty import Certainty, CertaintyHead
from tests.scripted_search import LineTask, run_all

TASK = LineTask()
MEASURES = ["self_certainty", "logprob"]


def certainty(folder, **settings):
    return Certainty(
        TASK, CertaintyVerifier(type="certainty", device="cpu", **settings), Model(dtype="float32"), folder
    )


def requests(num, *, seed=0, alphabet="0123456789abcdef+=. "):
    """Answers of any number of steps, some not yet finished, of a few problems."""
    draw = rng("certainty", seed)
    made = []
    for i in range(num):
        steps = ["".join(draw.choices(alphabet, k=draw.randint(0, 9))) + "\n" for _ in range(draw.randint(1, 5))]
        last = draw.choice([None, "", "12+3"])
        steps += [] if last is None else [last]
        made.append(ScoreRequest(Problem(f"{i % 3}", f"{'12' * (i % 3)}+3="), tuple(steps)))
    return made


def by_formula(folder, request, measure):
    """Float64, one token after another, from the logits of the whole model."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="float32").eval()
    ids = list(prompt_ids(TASK, tokenizer, request.problem, request.attempts))
    spans = []
    for n, step in enumerate(request.steps):
        new = tokenizer.encode(step, add_special_tokens=False)
        if n + 1 == len(request.steps) and not step.endswith("\n"):
            new.append(tokenizer.eos_token_id)
        spans.append(range(len(ids), len(ids) + len(new)))
        ids += new
    with torch.inference_mode():
        logits = model(torch.tensor([ids])).logits[0, :, : len(tokenizer)].double()
    scores = []
    for span in spans:
        values = []
        for t in span:
            p = torch.softmax(logits[t - 1], -1)
            uniform = 1 / len(p)
            divergence = sum(uniform * math.log(uniform / q) for q in p.tolist())
            values.append(math.log(p[ids[t]]) if measure == "logprob" else divergence)
        mean = sum(values) / len(values)
        scores.append(math.exp(mean) if measure == "logprob" else mean / (1 + mean))
    return scores


@pytest.mark.parametrize("measure", MEASURES)
@pytest.mark.parametrize("folder", ["zoo_folder", "tiny_chat_model"])
def test_scores_are_those_of_the_formula(folder, measure, request):
    folder = request.getfixturevalue(folder)
    asked = requests(24)
    scored = certainty(folder, measure=measure).score(asked)
    assert len(scored) == 24
    for one, found in zip(asked, scored, strict=True):
        assert found.scores == pytest.approx(by_formula(folder, one, measure), abs=2e-5)
        assert all(0 <= score <= 1 for score in found.scores)
    distinct = {score for found in scored for score in found.scores}
    assert len(distinct) > 24  # they tell answers apart


@pytest.mark.parametrize("measure", MEASURES)
def test_small_batches_and_a_tiny_cache_change_nothing(zoo_folder, measure):
    asked = requests(24, seed=1)
    whole = [one.scores for one in certainty(zoo_folder, measure=measure).score(asked)]
    for settings in ({"batch_tokens": 64, "max_batch_rows": 3}, {"cache_tokens": 0}, {"cache_tokens": 40}):
        parts = [one.scores for one in certainty(zoo_folder, measure=measure, **settings).score(asked)]
        assert all(a == pytest.approx(b, abs=2e-5) for a, b in zip(whole, parts, strict=True))


@pytest.mark.parametrize("measure", MEASURES)
def test_step_by_step_is_the_same_as_at_once(zoo_folder, measure):
    verifier = certainty(zoo_folder, measure=measure)
    for one in requests(4, seed=2):
        grown = [
            verifier.score([ScoreRequest(one.problem, one.steps[:n])])[0].scores for n in range(1, len(one.steps) + 1)
        ]
        verifier.reset()
        (whole,) = verifier.score([one])
        assert all(a == pytest.approx(whole.scores[: len(a)], abs=2e-5) for a in grown)


def test_the_policy_reads_the_attempts_it_was_shown(zoo_folder):
    plain = ScoreRequest(Problem("p", "1+2="), ("3",))
    revised = ScoreRequest(Problem("p", "1+2="), ("3",), attempts=("12", "4"))
    first, second = certainty(zoo_folder).score([plain, revised])
    assert second.scores == pytest.approx(by_formula(zoo_folder, revised, "self_certainty"), abs=2e-5)
    assert first.scores != pytest.approx(second.scores, abs=1e-3)
    assert second.tokens > first.tokens


def test_the_cost_is_of_what_was_read(zoo_folder):
    verifier = certainty(zoo_folder)
    (scored,) = verifier.score([ScoreRequest(Problem("p", "1+2="), ("3\n", "4"))])
    assert (scored.prompt_tokens, scored.tokens, scored.computed_tokens) == (4, 8, 8)  # 3 \n 4 <eos>
    assert verifier.facts.flops_parameters > 10_000
    assert (verifier.facts.process, verifier.facts.aggregation) == (True, "mean")


def test_what_is_too_long_has_no_score_rather_than_a_zero(zoo_folder):
    long, short = ScoreRequest(Problem("p", "1="), ("1" * 2 + "+3" * 300,)), ScoreRequest(Problem("p", "1="), ("1",))
    first, second = certainty(zoo_folder).score([long, short])
    assert first.scores == ()
    assert "context" in (first.unscored or "")
    assert len(second.scores) == 1


# ---------------------------------------------------------------- values by hand


def head(measure, num_tokens=2):
    """States are the logits themselves."""
    output = torch.nn.Linear(3, 3, bias=False)
    output.weight.data = torch.eye(3)
    return CertaintyHead(output, measure, num_tokens)


@torch.inference_mode()
def test_values_by_hand():
    states = torch.tensor([[0.9, 0.1, 5.0], [0.5, 0.5, 1.0]]).log()  # the third row of the vocabulary is no token
    ids = torch.tensor([1, 0])
    certain = head("self_certainty")
    terms = certain.terms(states, ids)
    divergence = 0.5 * math.log(0.5 / 0.9) + 0.5 * math.log(0.5 / 0.1)
    assert terms.tolist() == pytest.approx([divergence, 0], abs=1e-6)
    scores = certain(states, torch.tensor([divergence, 0, 3 * divergence]), torch.tensor([1.0, 1, 2]))
    assert scores.tolist() == pytest.approx([0.5108256 / 1.5108256, 0, 0.7662384 / 1.7662384], abs=1e-6)
    likely = head("logprob")
    assert likely.terms(states, ids).tolist() == pytest.approx([math.log(0.1), math.log(0.5)], abs=1e-6)
    sums = torch.tensor([math.log(0.1) + math.log(0.9)])
    assert likely(states, sums, torch.tensor([2.0])).tolist() == pytest.approx([0.3])


@torch.inference_mode()
def test_the_order_is_kept_and_far_values_stay_apart():
    """Large vocabularies have divergences of tens."""
    means = torch.linspace(0, 40, 200)
    scores = head("self_certainty")(means, means, torch.ones(200)).tolist()
    assert all(b - a > 1e-5 for a, b in itertools.pairwise(scores))
    assert (scores[0], scores[-1] < 1) == (0, True)


@torch.inference_mode()
def test_long_vocabularies_are_read_in_chunks(monkeypatch):
    states, ids = torch.randn(17, 3), torch.randint(0, 2, (17,))
    for measure in MEASURES:
        whole = head(measure).terms(states, ids)
        with monkeypatch.context() as patch:
            patch.setattr("search.verifiers.certainty.CHUNK_LOGITS", 12)
            assert torch.equal(head(measure).terms(states, ids), whole)


# ---------------------------------------------------------------- refusals, and a search


def test_models_that_scale_their_logits_are_refused(tmp_path, zoo_folder):
    from transformers import AutoTokenizer, GraniteConfig, GraniteForCausalLM

    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    tokenizer = AutoTokenizer.from_pretrained(zoo_folder)
    model = GraniteForCausalLM(GraniteConfig(vocab_size=len(tokenizer), logits_scaling=0.01, **sizes))
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="scaled or capped"):
        certainty(tmp_path)


def test_what_cannot_be_is_refused_with_the_way_out(zoo_folder):
    with pytest.raises(ConfigError, match=r"set verifier\.runtime = 'transformers'"):
        certainty(zoo_folder, runtime="vllm")
    config = load("smoke", ["verifier.type=certainty"])
    with pytest.raises(ConfigError, match="policy's own weights"):
        load_verifier(config, TASK)


@pytest.mark.parametrize("strategy", ["best_of_n_weighted", "beam(width=2)"])
def test_it_serves_a_search(zoo_folder, strategy):
    config = load("smoke", ["verifier.type=certainty"])
    verifier, told = load_verifier(config, TASK, policy=zoo_folder), describe(config, TASK)
    assert verifier is not None
    assert told is not None
    assert (told.process, told.aggregation) == (verifier.facts.process, verifier.facts.aggregation)
    engine = TransformersEngine(zoo_folder, EngineSettings(device="cpu"), Model(dtype="float32"))
    problems = [Problem(f"{n}", f"{n}+{n}=", "7") for n in range(3)]
    results = run_all(strategy, 4, engine, problems, verifier, max_new_tokens=40)
    complete = [c for result in results for c in result.candidates if c.complete]
    assert complete
    assert all(c.score is not None and 0 < c.score < 1 for c in complete)
    for result in results:
        assert result.failed is None
        read = result.spend.verifier_tokens
        assert result.spend.verifier_flops_actual == 2.0 * verifier.facts.flops_parameters * read
        assert read > 0 or not any(c.complete for c in result.candidates)
