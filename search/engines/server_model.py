"""Which model a server serves, whether it is the policy that is asked for, and the facts of it."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from configs.schema import Model
from configs.schema import ServerEngine as ServerSettings
from search.engines.server_http import Client, NotServed, Refused
from search.errors import ConfigError, ModelError
from search.types import ModelFacts

LONGEST = 10**9  # tokenizers without a limit claim more than this
log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Card:
    """What a server says of a model. `root`: the folder or hub name it was loaded from, where the server tells."""

    name: str
    root: str | None = None
    max_length: int | None = None


async def find_model(client: Client, settings: ServerSettings, policy: str | None) -> Card:
    """The configured model; else the one whose root is the policy; else the first. Raises ConfigError, EngineError."""
    try:
        listed = (await client.get("models")).get("data")
    except (Refused, NotServed) as error:
        if settings.model is None:
            raise
        log.info("the server does not list its models (%s); %s.model is taken at its word", error, client.section)
        return Card(settings.model)
    cards = [card for entry in listed if (card := _card(entry))] if isinstance(listed, list) else []
    if settings.model is not None:
        named = [card for card in cards if card.name == settings.model]
        if cards and not named:
            names = ", ".join(sorted(card.name for card in cards))
            raise ConfigError(
                f"the server at {client.url} has no model '{settings.model}': {client.section}.model is one of {names}"
            )
        return named[0] if named else Card(settings.model)
    if not cards:
        where = f"{client.section}.model"
        raise ConfigError(f"the server at {client.url} lists no models: name the one to use in {where}")
    return next((card for card in cards if policy is not None and same_model(card.root, policy)), cards[0])


def check_policy(card: Card, policy: str, settings: ServerSettings, base: str) -> None:
    """Refuse to take one model's answers for another's. Raises ConfigError.

    Sure is only what the server tells of its root, or the user in engine.policy; else the base is believed.
    """
    if any(same_model(one, policy) for one in (card.root, card.name, settings.policy)):
        return
    told = card.root is not None and (Path(card.root).is_dir() or settings.policy is not None)
    if not told and settings.policy is None and same_model(base, policy):
        return
    raise ConfigError(
        f"the server serves '{card.name}'"
        + (f" from {card.root}" if card.root else "")
        + f", not the policy {policy}: "
        "serve that one, or say in engine.policy that it is the one served; rounds, which make new policies, run on "
        "engine.type = 'transformers' or 'vllm'"
    )


def same_model(one: str | None, other: str) -> bool:
    """Whether two folders or hub names are the same model."""
    if one is None:
        return False
    if one == other:
        return True
    return Path(one).is_dir() and Path(other).is_dir() and Path(one).resolve() == Path(other).resolve()


def load_tokenizer(source: str, model: Model) -> Any:
    """Raises ModelError."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(
            source, revision=_revision(source, model), trust_remote_code=model.trust_remote_code
        )
    except (OSError, ValueError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ModelError(
            f"no tokenizer can be loaded from {source} ({reason}): set engine.tokenizer to the folder or hub name of "
            "the model that is served"
        ) from error
    if tokenizer.eos_token_id is None:
        raise ModelError(f"the tokenizer of {source} names no end-of-sequence token: set eos_token in its config")
    return tokenizer


def eos_ids(source: str, tokenizer: Any) -> tuple[int, ...]:
    """Every id that ends an answer: chat models list several in generation_config.json."""
    listed = _json(source, "generation_config.json").get("eos_token_id")
    ids = listed if isinstance(listed, list) else [listed]
    return tuple(sorted({i for i in (*ids, tokenizer.eos_token_id) if isinstance(i, int)}))


def facts(card: Card, settings: ServerSettings, source: str, tokenizer: Any, model: Model) -> ModelFacts:
    """Of the model served; the fingerprint is of its names, since nobody shows its weights. Raises ConfigError."""
    known = [n for n in (settings.max_length, card.max_length) if n]
    known = known or [n for n in (_positions(source), tokenizer.model_max_length) if n and n < LONGEST]
    if not known:
        raise ConfigError("neither the server nor the tokenizer tells the context length: set engine.max_length")
    digest = hashlib.sha256(json.dumps(["server", card.name, card.root]).encode()).hexdigest()
    return ModelFacts(digest[:16], _flops_parameters(settings, source, model), min(known))


def num_tokens(source: str, tokenizer: Any) -> int:
    """Ids below this are tokens: rows of the embedding where they are known."""
    size = _json(source, "config.json").get("vocab_size")
    return max(size if isinstance(size, int) else 0, len(tokenizer))


def _flops_parameters(settings: ServerSettings, source: str, model: Model) -> int:
    if settings.flops_parameters is not None:
        return settings.flops_parameters
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        config = AutoConfig.from_pretrained(
            source, revision=_revision(source, model), trust_remote_code=model.trust_remote_code
        )
        import torch

        from search.engines.loading import flops_parameters

        with torch.device("meta"):
            return flops_parameters(AutoModelForCausalLM.from_config(config))
    except (OSError, ValueError, ImportError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        log.warning("FLOPs count as 0: set engine.flops_parameters (%s)", reason)
        return 0


def _positions(source: str) -> int | None:
    config = _json(source, "config.json")
    inner = config.get("text_config")
    positions = (inner if isinstance(inner, dict) else config).get("max_position_embeddings")
    return positions if isinstance(positions, int) else None


def _json(source: str, name: str) -> Mapping[str, Any]:
    """A file of the model; empty where the source is no folder or has none."""
    path = Path(source) / name
    if not path.is_file():
        return {}
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ModelError(f"{path} is no JSON: save the model again ({error})") from error
    return data if isinstance(data, dict) else {}


def _card(entry: Any) -> Card | None:
    if not isinstance(entry, dict) or not isinstance(name := entry.get("id"), str):
        return None
    root, length = entry.get("root"), entry.get("max_model_len")
    return Card(name, root if isinstance(root, str) else None, length if type(length) is int and length > 0 else None)


def _revision(source: str, model: Model) -> str | None:
    return model.revision if source == model.base else None
