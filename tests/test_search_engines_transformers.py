"""The engine against plain transformers, on tiny random models: same tokens, same counts, no surprise at the edges."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from configs.schema import Model
from configs.schema import TransformersEngine as EngineSettings
from search.engines.drawing import uniform
from search.engines.growing import cache_bytes
from search.engines.loading import flops_parameters
from search.engines.stopping import CERTAIN, POSSIBLE, StopTable
from search.engines.transformers import TransformersEngine
from search.errors import ModelError
from search.randomness import key64
from search.tasks.tokenizer import build_tokenizer
from search.types import Continuation, Engine, Finish, Request

MAX_LENGTH = 64


def save_model(folder, *, sharpness: float = 1.0, **changes) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = build_tokenizer()
    shape = {
        "vocab_size": len(tokenizer), "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": MAX_LENGTH,
        "pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id, "bos_token_id": None,
    }  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        model = LlamaForCausalLM(LlamaConfig(**shape | changes))
        model.lm_head.weight.data *= 20 * sharpness  # an untrained head is nearly uniform: make it choose
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    save_model(path)
    return path


def load(folder, **settings) -> TransformersEngine:
    return TransformersEngine(folder, EngineSettings(device="cpu", **settings), Model(), threads=1)


@pytest.fixture(scope="module")
def engine(folder) -> TransformersEngine:
    return load(folder)


def ids_of(engine: TransformersEngine, text: str) -> tuple[int, ...]:
    return tuple(engine.tokenizer.encode(text, add_special_tokens=False))


PROMPTS = ["3,5,7>22\n", "1,2,3,4>10\n", "9,9>18\n", "2,4,6,8,10>30\n", "5,5,5>5\n"]


def requests(engine: TransformersEngine, samples: int = 3, **changes) -> list[Request]:
    made = [
        Request(ids_of(engine, prompt), 20, 1.0, key64("test", prompt, n)) for prompt in PROMPTS for n in range(samples)
    ]
    return [replace(request, **changes) for request in made]


# ---------------------------------------------------------------- the contract


def test_it_is_an_engine(engine: TransformersEngine) -> None:
    assert isinstance(engine, Engine)
    assert engine.facts.max_length == MAX_LENGTH
    assert len(engine.facts.fingerprint) == 16


def test_greedy_equals_transformers_generate(engine: TransformersEngine, folder) -> None:
    from transformers import AutoModelForCausalLM

    plain = AutoModelForCausalLM.from_pretrained(folder)
    found = engine.extend(requests(engine, samples=1, temperature=0.0, max_new_tokens=12))
    for prompt, continuation in zip(PROMPTS, found, strict=True):
        ids = torch.tensor([ids_of(engine, prompt)])
        expected = plain.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False, pad_token_id=0
        )
        assert continuation.ids == tuple(expected[0, ids.shape[1] :].tolist())


def test_the_same_requests_give_the_same_ids(engine: TransformersEngine) -> None:
    first, second = engine.extend(requests(engine)), engine.extend(requests(engine))
    assert first == second
    other = engine.extend([replace(r, key=r.key ^ 1) for r in requests(engine)])
    assert [c.ids for c in other] != [c.ids for c in first]


def test_results_do_not_depend_on_neighbours(engine: TransformersEngine, folder) -> None:
    together = engine.extend(requests(engine))
    alone = [engine.extend([request])[0] for request in requests(engine)]
    small = load(folder, max_batch_rows=4, batch_tokens=130).extend(requests(engine))
    backwards = engine.extend(requests(engine)[::-1])[::-1]
    for other in (alone, small, backwards):
        assert [c.ids for c in other] == [c.ids for c in together]


def test_a_sample_cut_into_steps_equals_the_whole(engine: TransformersEngine) -> None:
    delimiter = "\n"
    for request in requests(engine, samples=8, max_new_tokens=30):
        whole = engine.extend([request])[0]
        pieces: tuple[int, ...] = ()
        while True:
            step = replace(request, prefix=request.prefix + pieces, max_new_tokens=30 - len(pieces), stop=delimiter)
            piece = engine.extend([step])[0]
            assert delimiter not in engine.tokenizer.decode(piece.ids[:-1])
            pieces += piece.ids
            if piece.finish is not Finish.STOP or len(pieces) >= 30:
                break
            assert delimiter in engine.tokenizer.decode(piece.ids[-1:])
        assert pieces == whole.ids


def test_samples_follow_the_distribution(engine: TransformersEngine, folder) -> None:
    from transformers import AutoModelForCausalLM

    prefix, num, temperature = ids_of(engine, PROMPTS[0]), 20_000, 1.7
    drawn = engine.extend([Request(prefix, 1, temperature, key64("chi", n)) for n in range(num)])
    with torch.inference_mode():
        logits = AutoModelForCausalLM.from_pretrained(folder)(torch.tensor([prefix])).logits[0, -1].double()
    expected = (logits / temperature).softmax(-1).numpy()
    observed = np.bincount([c.ids[0] for c in drawn], minlength=len(expected)) / num
    errors = np.sqrt(expected * (1 - expected) / num)
    assert np.all(np.abs(observed - expected) < 5 * errors + 2 / num)
    plain = logits.log_softmax(-1)
    assert all(c.logprob == pytest.approx(float(plain[c.ids[0]]), abs=1e-4) for c in drawn[:50])


def test_logprob_is_the_sum_at_temperature_one(engine: TransformersEngine, folder) -> None:
    from transformers import AutoModelForCausalLM

    plain = AutoModelForCausalLM.from_pretrained(folder)
    for request in requests(engine, samples=1, temperature=0.7):
        found = engine.extend([request])[0]
        with torch.inference_mode():
            logits = plain(torch.tensor([request.prefix + found.ids])).logits[0, len(request.prefix) - 1 : -1]
        picked = logits.log_softmax(-1)[torch.arange(len(found.ids)), torch.tensor(found.ids)]
        assert found.logprob == pytest.approx(float(picked.sum()), abs=1e-3)


# ---------------------------------------------------------------- how it ends


def test_eos_ends_and_is_part_of_the_ids(tmp_path) -> None:
    save_model(tmp_path, sharpness=0.02)  # nearly uniform: ends after about 111 tokens on average
    engine = load(tmp_path)
    found = engine.extend([Request(ids_of(engine, "5,5>10\n"), 50, 1.0, n) for n in range(300)])
    ended = [c for c in found if c.finish is Finish.EOS]
    assert ended
    assert all(c.ids[-1] == engine.tokenizer.eos_token_id and c.ids.count(c.ids[-1]) == 1 for c in ended)
    cut = [c for c in found if c.finish is Finish.LENGTH]
    assert all(len(c.ids) == 50 and engine.tokenizer.eos_token_id not in c.ids for c in cut)
    assert len(ended) + len(cut) == 300


def test_bad_requests_leave_the_others_alone(engine: TransformersEngine) -> None:
    good = requests(engine, samples=1)
    full = replace(good[0], prefix=(5,) * MAX_LENGTH)
    nearly = replace(good[0], prefix=(5,) * (MAX_LENGTH - 2))
    bad = [full, replace(good[0], prefix=()), replace(good[0], prefix=(5, 10**6)), replace(good[0], max_new_tokens=0)]
    found = engine.extend([bad[0], good[0], bad[1], good[1], bad[2], good[2], bad[3], good[3], good[4], nearly])
    assert [found[i].finish for i in (0, 2, 4, 6)] == [Finish.OVERFLOW, Finish.ERROR, Finish.ERROR, Finish.LENGTH]
    assert all(found[i].ids == () for i in (0, 2, 4, 6))
    assert [found[i].ids for i in (1, 3, 5, 7, 8)] == [c.ids for c in engine.extend(good)]
    assert len(found[9].ids) <= 2


def test_nothing_asked_nothing_done(engine: TransformersEngine) -> None:
    assert engine.extend([]) == []


@pytest.mark.parametrize("stop", ["\n", "=", "12", "1=", "+1"])
def test_stop_is_completed_by_the_last_token_and_by_no_other(engine: TransformersEngine, stop: str) -> None:
    stopped = 0
    for found in engine.extend(requests(engine, samples=40, stop=stop, max_new_tokens=40)):
        text = engine.tokenizer.decode(found.ids, skip_special_tokens=True)
        before = engine.tokenizer.decode(found.ids[:-1], skip_special_tokens=True)
        assert stop not in before
        assert (stop in text) == (found.finish is Finish.STOP)
        stopped += found.finish is Finish.STOP
    assert stopped or len(stop) > 1


class PairTokenizer:
    """Tokens whose texts overlap the stop text in every way."""

    texts = ("x", "\n", "\n\n", ".\n", "\nx", "<", "eos", "a\n\nb")
    pad_token_id = 0

    def __len__(self) -> int:
        return len(self.texts)

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        return [0]

    def decode(self, ids, *, skip_special_tokens: bool) -> str:
        return "".join(self.texts[i] for i in ids)

    def batch_decode(self, rows, *, skip_special_tokens: bool) -> list[str]:
        return [self.decode(row, skip_special_tokens=skip_special_tokens) for row in rows]


def test_a_stop_text_that_spans_tokens_is_found() -> None:
    table = StopTable(PairTokenizer(), 8, [6], torch.device("cpu"))
    row = table.index("\n\n")
    verdicts = table.verdicts(torch.full((8,), row), torch.arange(8)).tolist()
    assert verdicts == [0, POSSIBLE, CERTAIN, 0, POSSIBLE, 0, 0, CERTAIN]
    assert table.completes("\n\n", [0, 3, 4])
    assert not table.completes("\n\n", [0, 0, 4])
    assert table.verdicts(torch.zeros(8, dtype=torch.long), torch.arange(8)).tolist() == [0] * 8


# ---------------------------------------------------------------- counting


def test_a_shared_prefix_is_prefilled_once(engine: TransformersEngine, folder) -> None:
    engine.reset()
    found = engine.extend(requests(engine, samples=4))
    for prompt, group in zip(PROMPTS, (found[i : i + 4] for i in range(0, len(found), 4)), strict=True):
        length = len(ids_of(engine, prompt))
        assert sum(c.prefilled_tokens for c in group) == length
        assert sum(c.cached_tokens for c in group) == 3 * length
        assert all(c.prefilled_tokens + c.cached_tokens == length for c in group)
    split = load(folder, max_batch_rows=2).extend(requests(engine, samples=4))
    assert sum(c.prefilled_tokens for c in split) == 2 * sum(len(ids_of(engine, p)) for p in PROMPTS)


# ---------------------------------------------------------------- the prefix cache


def tree(engine: TransformersEngine, forks: int = 2) -> tuple[list[list[Continuation]], list[int]]:
    """Three steps of every prompt, each forked; the answers of each call, and the tokens it prefilled."""
    asked = requests(engine, samples=4, stop="1", max_new_tokens=12, temperature=2.0, resumable=True)
    calls: list[list[Continuation]] = []
    for _ in range(3):
        found = engine.extend(asked)
        assert all(c.prefilled_tokens + c.cached_tokens == len(r.prefix) for r, c in zip(asked, found, strict=True))
        calls.append(found)
        asked = [
            replace(r, prefix=r.prefix + c.ids, key=key64(r.key, n))
            for r, c in zip(asked, found, strict=True)
            for n in range(forks)
            if c.finish is Finish.STOP
        ]
        assert asked
    return calls, [sum(c.prefilled_tokens for c in found) for found in calls]


def spoken(calls: list[list[Continuation]]) -> list[list[tuple]]:
    return [[(c.ids, c.finish) for c in found] for found in calls]


def test_a_step_costs_one_token_of_its_prefix(folder) -> None:
    caching, plain = load(folder), load(folder, cache_tokens=0)
    found, prefilled = tree(caching)
    expected, recomputed = tree(plain)
    assert spoken(found) == spoken(expected)
    assert prefilled[0] == recomputed[0]
    for step in (1, 2):
        assert prefilled[step] <= sum(c.finish is Finish.STOP for c in found[step - 1])
        assert prefilled[step] * 8 < recomputed[step]
    logprobs = [[c.logprob for c in calls] for calls in expected]
    assert [[c.logprob for c in calls] for calls in found] == [pytest.approx(row, abs=1e-3) for row in logprobs]


def test_more_samples_of_a_prompt_cost_its_last_token(folder) -> None:
    engine = load(folder)
    first, second = requests(engine, samples=2), requests(engine, samples=2, key=5)
    engine.extend(first)
    assert sum(c.prefilled_tokens for c in engine.extend(second)) == len(PROMPTS)
    assert [c.ids for c in engine.extend(second)] == [c.ids for c in load(folder, cache_tokens=0).extend(second)]


def test_ends_that_nobody_continues_are_not_kept(folder) -> None:
    """Few-shot answers end at a text too. Their prompts stay: another call may ask for more answers."""
    engine = load(folder)
    first = engine.extend(requests(engine, samples=4, stop="1", temperature=2.0))
    assert any(c.finish is Finish.STOP and len(c.ids) > 1 for c in first)
    prompts = {ids_of(engine, prompt) for prompt in PROMPTS}
    assert engine.cache.num_used == sum(map(len, prompts))
    assert all(prompt in engine.cache for prompt in prompts)
    more = engine.extend(requests(engine, samples=4, stop="1", temperature=2.0, key=5))
    assert sum(c.prefilled_tokens for c in more) == len(PROMPTS)
    assert engine.cache.num_used == sum(map(len, prompts))


@pytest.mark.parametrize("cache_tokens", [1, 7, 30, 60, 150])
def test_a_cache_too_small_changes_nothing(folder, cache_tokens: int) -> None:
    small = load(folder, cache_tokens=cache_tokens, max_batch_rows=6)
    for _ in range(3):
        assert spoken(tree(small)[0]) == spoken(tree(load(folder, cache_tokens=0))[0])


def test_a_reset_engine_is_like_a_new_one(folder) -> None:
    engine = load(folder)
    first = tree(engine)
    assert tree(engine)[1] != first[1]
    engine.reset()
    assert tree(engine) == first


def test_a_full_gpu_does_without_the_cache(folder, monkeypatch) -> None:
    engine = load(folder)
    expected = tree(load(folder, cache_tokens=0))[0]
    first = engine.extend(requests(engine, samples=4, stop="1", max_new_tokens=12, temperature=2.0, resumable=True))
    assert spoken([first]) == spoken(expected[:1])
    model, left = engine.model, [3]

    def full(*args, **kwargs):
        left[0] -= 1
        if left[0] == 0:
            raise torch.cuda.OutOfMemoryError("full")
        return model(*args, **kwargs)

    full.config = model.config
    monkeypatch.setattr(engine, "_model", full)
    assert spoken(tree(engine)[0]) == spoken(expected)
    assert left[0] < 0


@pytest.mark.parametrize("num_failures", [1, 2])
def test_a_lone_row_on_a_full_gpu_is_tried_without_the_cache(folder, monkeypatch, num_failures: int) -> None:
    engine = load(folder)
    request = requests(engine, samples=1)[0]
    expected = load(folder, cache_tokens=0).extend([request])[0]
    model, left = engine.model, [num_failures]

    def full(*args, **kwargs):
        left[0] -= 1
        if left[0] >= 0:
            raise torch.cuda.OutOfMemoryError("full")
        return model(*args, **kwargs)

    full.config = model.config
    monkeypatch.setattr(engine, "_model", full)
    found = engine.extend([request])[0]
    assert engine.cache.capacity == 0
    assert (found.ids, found.finish) == ((expected.ids, expected.finish) if num_failures == 1 else ((), Finish.ERROR))


def test_the_cache_takes_no_more_memory_than_there_is(folder, monkeypatch) -> None:
    token_bytes = 2 * 2 * 2 * 8 * 4  # layers, keys and values, heads, width, float32
    unbounded = load(folder)
    expected = tree(unbounded)[0]
    assert unbounded.cache.capacity == EngineSettings().batch_tokens
    for num_tokens in (50, 0):
        monkeypatch.setattr("search.engines.growing.CPU_CACHE_BYTES", num_tokens * token_bytes + token_bytes - 1)
        bounded = load(folder)
        assert spoken(tree(bounded)[0]) == spoken(expected)
        assert bounded.cache.capacity == num_tokens
        asked = load(folder, cache_tokens=60)
        tree(asked)
        assert asked.cache.capacity == 60
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (400, 1000))
    assert cache_bytes(torch.device("cuda")) == 100


def test_flops_parameters_leave_the_embedding_out_and_the_head_in(tmp_path) -> None:
    from transformers import AutoModelForCausalLM

    for tied in (False, True):
        save_model(tmp_path / str(tied), tie_word_embeddings=tied)
        model = AutoModelForCausalLM.from_pretrained(tmp_path / str(tied))
        inner = sum(p.numel() for name, p in model.named_parameters() if "embed" not in name and "lm_head" not in name)
        assert flops_parameters(model) == inner + 111 * 32


def test_the_fingerprint_follows_the_weights(tmp_path, folder, engine: TransformersEngine) -> None:
    assert load(folder).facts.fingerprint == engine.facts.fingerprint
    save_model(tmp_path, sharpness=1.01)
    assert load(tmp_path).facts.fingerprint != engine.facts.fingerprint


# ---------------------------------------------------------------- hidden states


def test_hidden_states_are_pooled_over_the_prompt_alone(engine: TransformersEngine, folder) -> None:
    from transformers import AutoModelForCausalLM

    plain = AutoModelForCausalLM.from_pretrained(folder)
    prefixes = [ids_of(engine, prompt) for prompt in PROMPTS]
    states = engine.hidden_states(prefixes)
    assert states.shape == (5, 3, 2, 32)
    assert states.dtype == np.float32
    for prefix, found in zip(prefixes, states, strict=True):
        with torch.inference_mode():
            layers = plain(torch.tensor([prefix]), output_hidden_states=True).hidden_states
        for layer, state in zip(layers, found, strict=True):
            np.testing.assert_allclose(state[0], layer[0, -1].numpy(), atol=1e-4)
            np.testing.assert_allclose(state[1], layer[0].mean(0).numpy(), atol=1e-4)


# ---------------------------------------------------------------- loading


def test_missing_folders_and_parts_are_named(tmp_path, folder) -> None:
    with pytest.raises(ModelError, match="no model folder"):
        load(tmp_path / "nothing")
    with pytest.raises(ModelError, match="no model folder"):
        load("nothing")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ModelError, match=r"no weights \(\*\.safetensors\).*save_pretrained"):
        load(tmp_path / "empty")
    bare = tmp_path / "bare"
    bare.mkdir()
    for name in ("config.json", "model.safetensors"):
        (bare / name).write_bytes((folder / name).read_bytes())
    with pytest.raises(ModelError, match="tokenizer"):
        load(bare)
    (bare / "config.json").write_text("{}")
    for path in folder.glob("tokenizer*"):
        (bare / path.name).write_bytes(path.read_bytes())
    with pytest.raises(ModelError, match=r"cannot be loaded|tokenizer"):
        load(bare)


def test_a_hub_name_without_network_is_an_error_with_the_way_out() -> None:
    with pytest.raises(ModelError, match=r"'no-such-org/no-such-model' is neither a folder.*local folder"):
        load("no-such-org/no-such-model")


def test_an_adapter_folder_is_merged_into_its_base(tmp_path, folder, engine: TransformersEngine) -> None:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    adapted = get_peft_model(
        AutoModelForCausalLM.from_pretrained(folder),
        LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False),
    )
    adapted.save_pretrained(tmp_path)
    loaded = load(tmp_path)
    assert loaded.facts.flops_parameters == engine.facts.flops_parameters
    assert loaded.facts.fingerprint != engine.facts.fingerprint
    request = requests(engine, samples=1, temperature=0.0)[0]
    ids = torch.tensor([request.prefix])
    expected = adapted.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=20, do_sample=False)
    assert loaded.extend([request])[0].ids == tuple(expected[0, ids.shape[1] :].tolist())


def test_a_closed_engine_refuses(folder) -> None:
    closed = load(folder)
    closed.extend(requests(closed))
    closed.close()
    assert not closed.cache.written
    with pytest.raises(AssertionError, match="closed"):
        closed.extend([Request((5,), 1, 1.0, 1)])


# ---------------------------------------------------------------- randomness


def reference_uniform(key: int, position: int) -> float:
    """The same hash in Python integers."""
    mask = (1 << 64) - 1
    z = (key + (position + 1) * 0x9E3779B97F4A7C15) & mask
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
    return ((z ^ (z >> 31)) >> 11) * 2.0**-53


def test_uniform_is_splitmix_and_uniform() -> None:
    keys = [key64("u", i) for i in range(500)]
    signed = torch.tensor([k - (1 << 64) if k >> 63 else k for k in keys])
    for position in (0, 1, 4095):
        found = uniform(signed, torch.full((500,), position))
        assert found.tolist() == [reference_uniform(k, position) for k in keys]
    values = uniform(signed[:, None], torch.arange(200)[None]).flatten()
    assert float(values.min()) >= 0
    assert float(values.max()) < 1
    assert float(values.mean()) == pytest.approx(0.5, abs=0.005)
    counts = torch.histc(values.float(), bins=20, min=0, max=1) / len(values)
    assert torch.all((counts - 0.05).abs() < 0.004)


def test_continuation_type(engine: TransformersEngine) -> None:
    assert all(isinstance(c, Continuation) for c in engine.extend(requests(engine)))


@pytest.mark.gpu
def test_gpu_gives_the_greedy_ids_of_the_cpu(engine: TransformersEngine, folder) -> None:
    gpu = TransformersEngine(folder, EngineSettings(device="cuda"), Model(dtype="float32"), threads=None)
    asked = requests(engine, samples=2, temperature=0.0, max_new_tokens=8)
    assert [c.ids for c in gpu.extend(asked)] == [c.ids for c in engine.extend(asked)]
