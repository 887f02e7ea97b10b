"""Tiny random verifiers in our own format, and the slow and obvious way to score with them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from search.randomness import rng
from search.tasks.tokenizer import build_tokenizer
from search.types import Problem, ScoreRequest
from search.verifiers.card import Card
from search.verifiers.readout import GenerativeReadout

MAX_LENGTH = 256


@dataclass(frozen=True)
class Sums:
    """As much of a task as a verifier sees."""

    name: str = "sums"
    step_delimiter: str = "\n"

    def prompt(self, problem: Problem) -> str:
        return problem.question + "\n"


def save_verifier(
    folder: Path,
    readout: str = "generative",
    kind: str = "prm",
    *,
    family: str = "llama",
    seed: int = 0,
    shape: Mapping[str, Any] | None = None,
    **card: Any,
) -> Path:
    """A folder as training writes it. The weights are large, so that every token matters."""
    torch.manual_seed(seed)
    tokenizer = build_tokenizer()
    model = build_model(family, tokens=len(tokenizer), classifier=readout == "scalar", **(shape or {}))
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.data *= 5
    if readout == "scalar":
        model.score.weight.data *= 4
    (folder / "model").mkdir(parents=True)
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    if readout == "generative":
        trained = GenerativeReadout(32)
        torch.nn.init.normal_(trained.head.weight)
        torch.nn.init.normal_(trained.weight.weight, std=0.3)
        torch.nn.init.constant_(trained.weight.bias, -4.0)  # scores that are neither 0 nor 1
        trained.save(folder)
    settings: dict[str, Any] = {
        "aggregation": "prod",
        "delimiter": "\n",
        "policy": "0" * 16,
        "scale": 0.7,
        "shift": 0.2,
    }
    Card(kind=kind, readout=readout, **(settings | card)).save(folder)  # type: ignore[arg-type]
    return folder


def build_model(family: str, *, tokens: int, classifier: bool = False, **changes: Any) -> Any:
    import transformers

    names = {"llama": "Llama", "qwen2": "Qwen2"}
    shape: dict[str, Any] = {
        "vocab_size": tokens + 4,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": MAX_LENGTH,
        "pad_token_id": 0,
        "eos_token_id": 1,
        "bos_token_id": None,
        "tie_word_embeddings": False,
    }
    config = getattr(transformers, f"{names[family]}Config")(**(shape | changes))
    if not classifier:
        return getattr(transformers, f"{names[family]}ForCausalLM")(config)
    config.num_labels = 1
    return getattr(transformers, f"{names[family]}ForTokenClassification")(config)


class Reference:
    """One request at a time, whole, token by token."""

    def __init__(self, folder: Path) -> None:
        from transformers import AutoModelForCausalLM, AutoModelForTokenClassification, AutoTokenizer

        self.card = Card.load(folder)
        generative = self.card.readout == "generative"
        kind: Any = AutoModelForCausalLM if generative else AutoModelForTokenClassification
        self.model = kind.from_pretrained(folder / "model", dtype="float32").eval()
        self.tokenizer = AutoTokenizer.from_pretrained(folder / "model")
        self.readout = GenerativeReadout.load(folder, 32).eval() if generative else None

    def pieces(self, request: ScoreRequest) -> list[list[int]]:
        """The ids of the prompt, and of every step."""
        attempts = request.attempts if self.card.history else ()
        prompt = "".join(f"{request.problem.question}\n{attempt.strip()}\n\n" for attempt in attempts)
        pieces = [self.tokenizer.encode(prompt + request.problem.question + "\n")]
        for step in request.steps:
            pieces.append(self.tokenizer.encode(step))
        if not request.steps[-1].endswith("\n"):
            pieces[-1].append(self.tokenizer.eos_token_id)
        return pieces

    def num_tokens(self, request: ScoreRequest) -> int:
        return sum(map(len, self.pieces(request)))

    @torch.inference_mode()
    def scores(self, request: ScoreRequest) -> tuple[float, ...]:
        prompt, *steps = self.pieces(request)
        if self.card.kind == "orm":
            steps = [[token for step in steps for token in step]]
        ids = [*prompt, *(token for step in steps for token in step)]
        out = self.model(torch.tensor([ids]), use_cache=False, output_hidden_states=True)
        scores: list[float] = []
        place = len(prompt)
        for step in steps:
            place += len(step)
            if self.readout is None:
                logit = float(out.logits[0, place - 1, 0])
            else:
                logit = float(self.readout.head(out.hidden_states[-1][0, place - 1]))
                for t in range(place - len(step), place):
                    logprob = float(out.logits[0, t - 1].log_softmax(-1)[ids[t]])
                    weight = float(torch.nn.functional.softplus(self.readout.weight(out.hidden_states[-1][0, t - 1])))
                    logit += weight * logprob
            scores.append(float(torch.sigmoid(torch.tensor(self.card.scale * logit + self.card.shift))))
        return tuple(scores)


# ---------------------------------------------------------------- answers


def question(n: int) -> Problem:
    draw = rng("verifier kit", "question", n)
    text = ",".join(str(draw.randrange(100)) for _ in range(2 + n % 4)) + ">7"
    return Problem(text, text)


def step(*parts: object) -> str:
    """Some random text that ends a step."""
    draw = rng("verifier kit", "step", *parts)
    return "".join(f"{draw.randrange(100)}{draw.choice('+-*=')}" for _ in range(1 + draw.randrange(4))) + "\n"


def answer(n: int, k: int, *, ended: bool = True) -> ScoreRequest:
    """Answer k to question n: one to five steps."""
    draw = rng("verifier kit", "answer", n, k)
    steps = tuple(step(n, k, s) for s in range(draw.randrange(5)))
    last = ("",) if ended and k % 3 == 0 else (step(n, k, "last").strip() if ended else step(n, k, "last"),)
    attempts = tuple(step(n, k, "attempt", a) for a in range(k % 3))
    return ScoreRequest(question(n), steps + last, attempts)


def answers(problems: int, each: int, *, ended: bool = True) -> Sequence[ScoreRequest]:
    """In an order that is no one's: lengths and problems mixed."""
    found = [answer(n, k, ended=ended) for n in range(problems) for k in range(each)]
    rng("verifier kit", "order").shuffle(found)
    return found
