"""Runs the verifiers that rounds train: a folder with a card, a model and a read-out (see card.py).

The model may be a whole one or a LoRA adapter, which is merged into its base.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from configs.schema import Model, VerifierRuntime
from search.engines.loading import (
    ADAPTER,
    check_weights,
    fingerprint,
    first_line,
    load_tokenizer,
    locate,
    max_length,
)
from search.errors import ModelError
from search.types import Scored, ScoreRequest, Task, VerifierFacts
from search.verifiers.card import READOUT, Card
from search.verifiers.heads import GenerativeHead, StateHead, calibrated
from search.verifiers.layout import OwnLayout
from search.verifiers.readout import GenerativeReadout
from search.verifiers.remembering import Remembering
from search.verifiers.runtimes import loading_device, start_scorer

MODEL = "model"
CLASSIFIERS = ("score", "classifier")  # what token classifiers of the library call their head


@dataclass(frozen=True, slots=True)
class TrainedParts:
    """A verifier of ours, in memory and checked."""

    card: Card
    model: Any  # in evaluation mode on its device; adapters are merged
    tokenizer: Any
    head: StateHead | GenerativeHead
    facts: VerifierFacts
    max_length: int


class Trained:
    """Implements search.types.Verifier for a verifier's folder.

    Raises ModelError where the folder cannot be loaded, or was trained for other steps than the task's.
    """

    def __init__(self, task: Task, folder: Path, settings: VerifierRuntime, model: Model) -> None:
        parts = load_trained(folder, task, model, device=loading_device(settings))
        self.facts = parts.facts
        self.card = parts.card
        self._delimiter = task.step_delimiter
        tokenizer = Remembering(parts.tokenizer)
        self._layout = OwnLayout(task, tokenizer, process=parts.facts.process, history=parts.card.history)
        self._scorer = start_scorer(parts.model.base_model, parts.head, settings, max_length=parts.max_length)

    def score(self, requests: Sequence[ScoreRequest]) -> list[Scored]:
        """The score of every step, or of the finished answer. What cannot be read is `unscored`, with the reason."""
        reasons = [unreadable(request, self._delimiter) for request in requests]
        results = {i: Scored((), unscored=reason) for i, reason in enumerate(reasons) if reason}
        rows = [i for i in range(len(requests)) if i not in results]
        encoded = [self._layout.encode(requests[i]) for i in rows]
        keep = [self.facts.process and self._delimiter in requests[i].steps[-1] for i in rows]
        results |= zip(rows, self._scorer.score(encoded, keep=keep), strict=True)
        return [results[i] for i in range(len(requests))]

    def reset(self) -> None:
        """Forget what earlier calls computed."""
        self._scorer.reset()

    def close(self) -> None:
        """Free what runs it."""
        self._scorer.close()


def unreadable(request: ScoreRequest, delimiter: str) -> str | None:
    """Why an answer has no steps that could be scored; None: it has."""
    if not request.steps:
        return "it has no step"
    if missing := [n for n, step in enumerate(request.steps[:-1], 1) if delimiter not in step]:
        return f"step {missing[0]} of {len(request.steps)} does not hold the step delimiter {delimiter!r}"
    return None


# ---------------------------------------------------------------- loading


def load_trained(folder: Path, task: Task, model: Model, *, device: torch.device) -> TrainedParts:
    """A verifier's folder, checked against the task. Raises ModelError."""
    card = Card.load(folder)
    if card.delimiter != task.step_delimiter:
        raise ModelError(
            f"the verifier {folder} was trained on steps that end with {card.delimiter!r}, but those of the task "
            f"'{task.name}' end with {task.step_delimiter!r}: set the same task.step_delimiter, or train another one"
        )
    weights = folder / MODEL
    base = _base(folder, card)
    for one in dict.fromkeys((weights, base)):
        check_weights(one)
    speaks = weights if (weights / "tokenizer_config.json").is_file() else base
    tokenizer = load_tokenizer(speaks, trust_remote_code=model.trust_remote_code)
    loaded = _load_weights(folder, base, card, model)
    _check_tokenizer(folder, loaded, tokenizer, card)
    loaded = loaded.to(device)
    if base != weights:
        from peft import PeftModel

        adapted: Any = PeftModel.from_pretrained(loaded, weights)
        loaded = adapted.merge_and_unload()
    loaded.eval().requires_grad_(False)
    head, num_head = _head(folder, loaded, card)
    facts = VerifierFacts(
        fingerprint=_fingerprint(folder, weights, base, card),
        flops_parameters=_flops_parameters(loaded, card) + num_head,
        process=card.kind == "prm",
        aggregation=card.aggregation,
    )
    return TrainedParts(card, loaded, tokenizer, head, facts, max_length(loaded, tokenizer))


def _base(folder: Path, card: Card) -> Path:
    """The folder of the whole model; the model's own unless it is an adapter."""
    weights = folder / MODEL
    if not weights.is_dir():
        raise ModelError(f"the verifier {folder} has no model: its folder {weights} is missing; train it again")
    if not (weights / ADAPTER).is_file():
        return weights
    if card.base is None:
        raise ModelError(
            f"{weights} is an adapter, but the card of the verifier {folder} names no base: train it again"
        )
    return locate(card.base)


def _load_weights(folder: Path, base: Path, card: Card, settings: Model) -> Any:
    """Without an adapter. A head that the files lack would be drawn at random, so it is refused."""
    from transformers import AutoModelForCausalLM, AutoModelForTokenClassification
    from transformers.utils import logging

    logging.disable_progress_bar()
    generative = card.readout == "generative"
    kind: Any = AutoModelForCausalLM if generative else AutoModelForTokenClassification
    extra: dict[str, Any] = {}
    if settings.attn_implementation != "auto":
        extra["attn_implementation"] = settings.attn_implementation
    adapter = base != folder / MODEL
    if adapter and not generative:
        extra["num_labels"] = 1
    level = logging.get_verbosity()
    logging.set_verbosity_error()  # what is missing is told below
    try:
        loaded, info = kind.from_pretrained(
            base,
            dtype=settings.dtype,
            use_safetensors=True,
            trust_remote_code=settings.trust_remote_code,
            output_loading_info=True,
            **extra,
        )
    except (OSError, ValueError, ImportError, RuntimeError) as error:
        what = "a causal language model" if generative else "a token classifier"
        raise ModelError(f"the verifier {folder} cannot be loaded as {what}: {first_line(error)}") from error
    finally:
        logging.set_verbosity(level)
    missing = set(info["missing_keys"])
    if adapter and not generative:
        missing = {name for name in missing if name.split(".")[0] not in CLASSIFIERS}
        missing |= _head_missing(folder / MODEL)
    if missing:
        raise ModelError(
            f"the verifier {folder} says that its read-out is {card.readout}, but its model lacks "
            f"{', '.join(sorted(missing)[:3])}: the card and the weights are of two trainings; train it again"
        )
    if not generative and loaded.config.num_labels != 1:
        raise ModelError(
            f"the verifier {folder} has {loaded.config.num_labels} labels, but ours have one: load a classifier from "
            "elsewhere with verifier.type = 'pretrained'"
        )
    return loaded


def _head_missing(adapter: Path) -> set[str]:
    """The head that a scalar verifier's adapter should bring, where it does not."""
    from safetensors import safe_open

    for path in adapter.glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            if any(part in CLASSIFIERS for name in file.keys() for part in name.split(".")):  # noqa: SIM118
                return set()
    return {"score.weight"}


def _check_tokenizer(folder: Path, model: Any, tokenizer: Any, card: Card) -> None:
    rows = model.get_input_embeddings().weight.shape[0]
    if len(tokenizer) > rows:
        raise ModelError(
            f"the tokenizer of the verifier {folder} has {len(tokenizer)} tokens, but its model only {rows}: they are "
            "of two models; copy the tokenizer that it was trained with beside it"
        )
    if tokenizer.eos_token_id is None:
        raise ModelError(f"the tokenizer of the verifier {folder} has no EOS token, which ends a finished answer")
    ids = list(tokenizer.encode(card.delimiter, add_special_tokens=False))
    if not ids or tokenizer.unk_token_id in ids:
        raise ModelError(
            f"the tokenizer of the verifier {folder} does not know its step delimiter {card.delimiter!r}: copy the "
            "tokenizer that it was trained with beside it"
        )


def _head(folder: Path, model: Any, card: Card) -> tuple[StateHead | GenerativeHead, int]:
    """The head, and its parameters that are not the model's own."""
    if card.readout == "scalar":
        head = next((module for name in CLASSIFIERS if (module := getattr(model, name, None)) is not None), None)
        if head is None:
            raise ModelError(f"the verifier {folder} is a {type(model).__name__}, whose head has an unknown name")
        return StateHead(head, calibrated(card.scale, card.shift)), 0
    readout = GenerativeReadout.load(folder, model.config.get_text_config().hidden_size)
    readout.to(model.device).eval().requires_grad_(False)
    head = GenerativeHead(readout, model.get_output_embeddings(), scale=card.scale, shift=card.shift)
    return head, size(readout)


def _flops_parameters(model: Any, card: Card) -> int:
    """All but the embeddings; with the output head, also where it is tied to them, if that is read."""
    total = size(model) - model.get_input_embeddings().weight.numel()
    if card.readout == "scalar":
        return total
    output = model.get_output_embeddings().weight
    return total + (output.numel() if output is model.get_input_embeddings().weight else 0)


def size(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def _fingerprint(folder: Path, weights: Path, base: Path, card: Card) -> str:
    """Of everything that decides the scores."""
    described = asdict(card) | {"base": None}  # where it lies decides nothing
    digest = hashlib.sha256(json.dumps(described, sort_keys=True).encode())
    digest.update(fingerprint(weights, base).encode())
    if card.readout == "generative":
        digest.update((folder / READOUT).read_bytes())
    return digest.hexdigest()[:16]
