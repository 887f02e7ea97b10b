"""Every engine of the conformance suite, over one tiny model whose tokens make life hard, and a plain reference.

The model is random and nearly indifferent, so that steps, both end tokens and tokens that hold a delimiter in their
middle come up all the time. `Reference` runs it without cache or batch, the slow and obvious way.
"""

from __future__ import annotations

import itertools
import zlib
from array import array
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import pytest
import torch

from configs.schema import Model
from configs.schema import TransformersEngine as TransformersSettings
from search.engines.drawing import draw, signed, uniform
from search.engines.scripted import ScriptedEngine
from search.engines.streaming import Answer, Streaming
from search.errors import EngineError
from search.randomness import key64, rng
from search.types import CachingEngine, Continuation, Engine, Finish, Graded, Request

MAX_LENGTH = 256
CHARACTERS = "0123456789abcdef+=. \n"
# "a\nb" and "\n\n1" end a step in their middle; "\n\n" is one token or two, or begins in ".\n".
MERGES = [("a", "\n"), ("a\n", "b"), ("\n", "\n"), ("\n\n", "1"), ("1", "2"), (".", "\n")]
SPECIALS = ["<pad>", "<eos>", "<end>"]  # <end> ends an answer too: the generation config says so


def build_tokenizer() -> Any:
    from tokenizers import Tokenizer, decoders, models
    from transformers import PreTrainedTokenizerFast

    tokens = [*SPECIALS, *CHARACTERS, *(a + b for a, b in MERGES)]
    model = models.BPE(vocab={token: index for index, token in enumerate(tokens)}, merges=MERGES)
    tokenizer = Tokenizer(model)
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="<eos>",
        additional_special_tokens=["<end>"],
        clean_up_tokenization_spaces=False,
        model_max_length=MAX_LENGTH,
    )


def save_model(folder: Path) -> None:
    """Vocabulary padded past the tokenizer's, as many models have it: no engine may draw what is no token."""
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = build_tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer) + 8,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,  # heads of 32: the smallest that vLLM knows
        num_key_value_heads=1,
        max_position_embeddings=MAX_LENGTH,
        tie_word_embeddings=False,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=None,
        dtype="float32",
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(88)  # greedy answers never end, and are no loop of one token
        model = LlamaForCausalLM(config)
        model.lm_head.weight.data *= 6
    model.generation_config.eos_token_id = [1, 2]
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


class Reference:
    """The model of a folder over whole sequences, one at a time."""

    def __init__(self, folder: Path) -> None:
        from transformers import AutoModelForCausalLM, AutoTokenizer

        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype="float32").eval()
        self.num_tokens = len(AutoTokenizer.from_pretrained(folder))

    @torch.inference_mode()
    def logits(self, ids: Sequence[int]) -> torch.Tensor:
        """Float32 [tokens, vocabulary]: row t predicts the token after ids[t]."""
        logits = self.model(torch.tensor([list(ids)]), use_cache=False).logits[0].float()
        logits[:, self.num_tokens :] = -torch.inf
        return logits

    def choices(self, request: Request, ids: Sequence[int]) -> tuple[int, ...]:
        """What each of `ids` had to be, given those before it: greedy, or drawn at its key and position."""
        start = len(request.prefix)
        scores = self.logits((*request.prefix, *ids))[start - 1 : start - 1 + len(ids)]
        if request.temperature == 0:
            return tuple(scores.argmax(-1).tolist())
        points = uniform(torch.full((len(ids),), signed(request.key)), torch.arange(start, start + len(ids)))
        return tuple(draw(scores, torch.full((len(ids),), request.temperature), points).tolist())

    def logprob(self, prefix: Sequence[int], ids: Sequence[int]) -> float:
        scores = self.logits((*prefix, *ids)).log_softmax(-1)[len(prefix) - 1 : -1]
        return float(scores[torch.arange(len(ids)), torch.tensor(ids)].double().sum())


@dataclass(frozen=True)
class Exhibit:
    """An engine and what the suite must know of it to test its claims."""

    engine: Engine
    eos_ids: tuple[int, ...]
    reference: Reference | HashModel | None = None  # None: no model runs
    positional: bool = True  # a sample cut into steps is the sample drawn whole
    drawn_here: bool = True  # and every token is drawn where the reference draws it
    long_tokens: bool = True  # it has tokens of several characters, which may hold a delimiter in their middle

    @cached_property
    def tokenizer(self) -> Any:
        return self.engine.tokenizer

    def text(self, ids: Sequence[int]) -> str:
        return self.tokenizer.decode(list(ids), skip_special_tokens=True)

    def prompt(self, number: int = 0) -> tuple[int, ...]:
        return tuple(self.tokenizer.encode(PROMPTS[number]))


PROMPTS = ["1+2=", "a.b\nc", "12 12\n\n1", "ff00+1", "e", "4+4=8\n8+1="]


# ---------------------------------------------------------------- scripts


def step(prompt: str, written: str, temperature: float, key: int) -> str:
    """Pieces of a few characters, with delimiters anywhere in them. Greedy never ends."""
    place = rng(key if temperature else f"{prompt}{written}")
    if temperature and place.random() < 0.08:
        return ""
    return "".join(place.choice([*CHARACTERS, "\n", "\n", "\n1", "12"]) for _ in range(place.randint(1, 4)))


def scripted() -> Exhibit:
    engine = ScriptedEngine(step=step, max_length=MAX_LENGTH)
    return Exhibit(engine, (engine.tokenizer.eos_token_id,), long_tokens=False)


class Trickle(Streaming):
    """A streaming engine as the protocol has it and no more: every `collect` gives each request one more token."""

    def __init__(self, engine: ScriptedEngine) -> None:
        super().__init__()
        self.capabilities, self.facts, self.tokenizer = engine.capabilities, engine.facts, engine.tokenizer
        self._engine = engine
        self._numbers = itertools.count()
        self._running: dict[int, tuple[Continuation, int]] = {}  # what it will say, and how much it has said
        self._done: list[Answer] = []

    def submit(self, requests: Sequence[Request]) -> list[int]:
        tickets = [next(self._numbers) for _ in requests]
        self._running |= {t: (c, 0) for t, c in zip(tickets, self._engine.extend(requests), strict=True)}
        return tickets

    def cancel(self, tickets: Sequence[int]) -> None:
        for ticket in tickets:
            if ticket in self._running:
                continuation, said = self._running.pop(ticket)
                prefilled = continuation.prefilled_tokens if said else 0
                self._done.append((ticket, Continuation(continuation.ids[:said], Finish.CANCELLED, prefilled)))

    def _collect(self) -> list[Answer]:
        while self._running and not self._done and not self.called_off:
            self._running = {t: (c, said + 1) for t, (c, said) in self._running.items()}
            ended = [t for t, (c, said) in self._running.items() if said >= len(c.ids)]
            self._done += [(t, self._running.pop(t)[0]) for t in ended]
        done, self._done = self._done, []
        return done

    def close(self) -> None:
        """Nothing to free."""


def trickle() -> Exhibit:
    inner = scripted()
    assert isinstance(inner.engine, ScriptedEngine)
    return Exhibit(Trickle(inner.engine), inner.eos_ids, long_tokens=False)


# ---------------------------------------------------------------- real models


def transformers(folder: Path, reference: Reference, **settings: Any) -> Exhibit:
    from search.engines.transformers import TransformersEngine

    engine = TransformersEngine(folder, TransformersSettings(device="cpu", **settings), Model(), threads=1)
    return Exhibit(engine, (1, 2), reference)


def vllm(folder: Path, reference: Reference) -> Exhibit:
    from configs.schema import VllmEngine as VllmSettings
    from search.engines.vllm import VllmEngine

    engine = VllmEngine(folder, VllmSettings(type="vllm", kv_cache_gib=0.25), Model(), threads=1)
    return Exhibit(engine, (1, 2), reference, drawn_here=not engine._counts_positions)


# ---------------------------------------------------------------- servers


class HashModel:
    """A model made of a hash: what comes next follows from every id before it, their number and the seed. Fast."""

    def __init__(self, tokenizer: Any) -> None:
        self.num_tokens = len(tokenizer)
        ends = [tokenizer.convert_tokens_to_ids(token) for token in SPECIALS[1:]]
        self._said = [i for i in range(self.num_tokens) if i not in (0, *ends)]
        newlines = [i for i in self._said if "\n" in tokenizer.decode([i])]
        self._drawn = [*self._said, *ends, *newlines]

    def next(self, ids: Sequence[int], seed: int | None) -> int:
        """`seed` None: greedy, which never ends."""
        place = zlib.crc32(array("h", ids).tobytes(), seed or 0)
        choices = self._said if seed is None else self._drawn
        return choices[(place * 2654435761 >> 7) % len(choices)]

    def policy(self, prefix: Sequence[int], max_tokens: int, temperature: float, seed: int) -> list[int]:
        ids = list(prefix)
        while len(ids) < len(prefix) + max_tokens:
            ids.append(self.next(ids, seed if temperature else None))
            if ids[-1] not in self._said:
                break
        return ids[len(prefix) :]

    def choices(self, request: Request, ids: Sequence[int]) -> tuple[int, ...]:
        assert request.temperature == 0, "a server's seeds are its own"
        return tuple(self.next((*request.prefix, *ids[:n]), None) for n in range(len(ids)))

    def logprob(self, prefix: Sequence[int], ids: Sequence[int]) -> float:
        raise NotImplementedError("a hash has no probabilities")


@contextmanager
def served(folder: Path, **switches: Any) -> Iterator[Exhibit]:
    """A server that takes a moment for every token, so that there is a middle to cancel in."""
    from transformers import AutoTokenizer

    from configs.schema import ServerEngine as ServerSettings
    from search.engines.server import ServerEngine
    from tests.fake_server import FakeServer, Switches

    class Server(FakeServer):
        """Both end tokens end an answer, as the generation config of the model says."""

        def answer(self, body: dict[str, Any]) -> Any:
            answer = super().answer(body)
            ended = answer.finish == "length" and answer.ids[-1:] in ([1], [2])
            return replace(answer, finish="stop") if ended else answer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = HashModel(tokenizer)
    with Server(model.policy, tokenizer, Switches(max_length=MAX_LENGTH, delay_s=0.001, **switches)) as server:
        settings = ServerSettings(
            type="server", url=server.url, tokenizer=str(folder), flops_parameters=100, stream=True, timeout_s=20
        )
        engine = ServerEngine(settings)
        try:
            yield Exhibit(engine, (1, 2), model, positional=False, drawn_here=False)
        finally:
            engine.close()


# ---------------------------------------------------------------- all of them


@contextmanager
def opened(name: str, folder: Callable[[], Path], reference: Callable[[], Reference]) -> Iterator[Exhibit]:
    """One of tests.conftest's ENGINES. The model and its reference are made for those that need them."""
    if name.startswith("server"):
        switches = {"no_ids": True, "text_prompts": True} if name.endswith("approximate") else {"caches": True}
        with served(folder(), **switches) as shown:
            yield shown
        return
    if name == "vllm":
        shown = vllm(folder(), reference())
    elif name.startswith("transformers"):  # its calls take several batches; its cache holds not all of a search
        room = {"max_batch_rows": 100, "batch_tokens": 5000, "cache_tokens": 700 if name.endswith("cache") else 0}
        shown = transformers(folder(), reference(), **room)
    else:
        shown = {"scripted": scripted, "trickle": trickle}[name]()
    yield shown
    shown.engine.close()


# ---------------------------------------------------------------- wrappers


class Dying:
    """A synchronous engine that answers `num` requests, then no more."""

    def __init__(self, engine: Any, num: int) -> None:
        self.engine, self.left, self.num_answered = engine, num, 0
        self.capabilities, self.facts, self.tokenizer = engine.capabilities, engine.facts, engine.tokenizer

    def extend(self, requests: Sequence[Request]) -> list[Continuation]:
        self.left -= len(requests)
        if self.left < 0:
            raise EngineError("the engine died")
        self.num_answered += len(requests)
        return self.engine.extend(requests)

    def reset(self) -> None:
        if isinstance(self.engine, CachingEngine):
            self.engine.reset()

    def close(self) -> None:
        """The engine inside is not ours."""


class DyingStream(Dying):
    """A streaming engine that answers `num` requests and then dies; what it had begun is gone."""

    def submit(self, requests: Sequence[Request]) -> list[int]:
        if self.left <= 0:
            raise EngineError("the engine died before")
        return self.engine.submit(requests)

    def cancel(self, tickets: Sequence[int]) -> None:
        self.engine.cancel(tickets)

    def collect(self, until: Collection[Future[Any]] = ()) -> list[Answer]:
        if self.left <= 0:
            raise EngineError("the engine died")
        answers = self.engine.collect(until)[: self.left]  # of a lump too large the rest is gone, too
        self.left -= len(answers)
        self.num_answered += len(answers)
        return answers


# ---------------------------------------------------------------- a task


class Letters:
    """Problems for any engine: an answer is right where it holds an even number of characters."""

    name = "letters"
    generated = False
    end_text = None
    step_delimiter = "\n"

    def prompt(self, problem: Any) -> str:
        return problem.question

    def answers(self, pairs: Sequence[tuple[Any, str]]) -> list[str | None]:
        return [text.strip() or None for _, text in pairs]

    def grade(self, pairs: Sequence[tuple[Any, str]]) -> list[Graded]:
        from search.types import Grade

        return [
            Graded(Grade.WRONG if len(text) % 2 else Grade.CORRECT, answer)
            for (_, text), answer in zip(pairs, self.answers(pairs), strict=True)
        ]


def key(*parts: object) -> int:
    return key64("zoo", *parts)


# ---------------------------------------------------------------- requests

NATURAL = (Finish.STOP, Finish.EOS, Finish.LENGTH)
FEW = 12  # samples of a prompt


def needs(claim: bool, what: str) -> None:
    if not claim:
        pytest.skip(f"does not claim {what}")


def samples(exhibit: Exhibit, num: int = FEW, **changes: Any) -> list[Request]:
    """`num` samples of every prompt."""
    asked = [Request(exhibit.prompt(p), 40, 1.0, key("sample", p, n)) for p in range(len(PROMPTS)) for n in range(num)]
    return [replace(request, **changes) for request in asked]


def greedy(exhibit: Exhibit, max_new_tokens: int = 24) -> list[Request]:
    """One answer a prompt; these models never end a greedy answer."""
    return samples(exhibit, 1, temperature=0.0, max_new_tokens=max_new_tokens)


def natural(exhibit: Exhibit, requests: list[Request]) -> list[Continuation]:
    """Every request answered, and ended as an answer ends."""
    found = exhibit.engine.extend(requests)
    assert len(found) == len(requests)
    assert all(isinstance(c, Continuation) and c.finish in NATURAL and c.ids for c in found)
    return found
