"""Load a causal language model for inference (folder, hub name or LoRA adapter folder) and state its facts; or state
them alone, from everything but the weights, for engines that load a model themselves."""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from configs.schema import Model
from search.errors import ModelError
from search.types import ModelFacts

HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")
ADAPTER = "adapter_config.json"


@dataclass(frozen=True, slots=True)
class Parts:
    """Where the parts of a model lie. `folder` is `base` unless it holds an adapter."""

    folder: Path
    base: Path
    speaks: Path  # the folder of the tokenizer

    @property
    def adapter(self) -> Path | None:
        """The adapter's configuration; None: a whole model."""
        path = self.folder / ADAPTER
        return path if path.is_file() else None


@dataclass(frozen=True, slots=True)
class Described:
    """A model without its weights."""

    parts: Parts
    tokenizer: Any
    facts: ModelFacts
    vocab_size: int  # rows of the output head
    eos_ids: tuple[int, ...]
    dtype: str  # of the weights as saved: "bfloat16"; "auto" where the configuration does not say


@dataclass(frozen=True, slots=True)
class Loaded:
    model: Any
    tokenizer: Any
    device: torch.device
    facts: ModelFacts
    vocab_size: int  # rows of the output head
    eos_ids: tuple[int, ...]


def load_model(source: Path | str, settings: Model, *, device: str) -> Loaded:
    """The model in evaluation mode on its device; adapters are merged into their base.

    Raises ModelError where the folder or hub name does not exist or lacks weights or a tokenizer.
    """
    from transformers.utils import logging

    logging.disable_progress_bar()  # loading a small model is no work to watch, and a large one is told by its stage
    parts = find_parts(source, settings)
    chosen = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device)
    tokenizer = load_tokenizer(parts.speaks, trust_remote_code=settings.trust_remote_code)
    model = _load_weights(parts.base, settings).to(chosen)
    if parts.adapter is not None:
        from peft import PeftModel

        merged: Any = PeftModel.from_pretrained(model, parts.folder)
        model = merged.merge_and_unload()
    model.eval().requires_grad_(False)
    facts = _facts(parts, model, tokenizer)
    eos_ids = _eos_ids(model.generation_config, tokenizer)
    return Loaded(model, tokenizer, chosen, facts, _head(model).weight.shape[0], eos_ids)


def describe_model(source: Path | str, settings: Model) -> Described:
    """What `load_model` would say of the model, without its weights in memory. Raises ModelError as that does."""
    from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

    parts = find_parts(source, settings)
    tokenizer = load_tokenizer(parts.speaks, trust_remote_code=settings.trust_remote_code)
    trust = settings.trust_remote_code
    try:
        config = AutoConfig.from_pretrained(parts.base, trust_remote_code=trust)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=trust)
    except (OSError, ValueError, ImportError) as error:
        raise _unloadable(parts.base, error) from error
    try:
        generation = GenerationConfig.from_pretrained(parts.base)
    except OSError:
        generation = model.generation_config
    return Described(
        parts=parts,
        tokenizer=tokenizer,
        facts=_facts(parts, model, tokenizer),
        vocab_size=_head(model).weight.shape[0],
        eos_ids=_eos_ids(generation, tokenizer),
        dtype=str(config.get_text_config().dtype or "auto").removeprefix("torch."),
    )


def find_parts(source: Path | str, settings: Model) -> Parts:
    """Raises ModelError where the folder or hub name does not exist or lacks weights."""
    folder = locate(source, settings.revision)
    adapter = folder / ADAPTER
    base = locate(_base_of(adapter), settings.revision) if adapter.is_file() else folder
    for one in dict.fromkeys((folder, base)):
        check_weights(one)
    return Parts(folder, base, folder if (folder / "tokenizer_config.json").is_file() else base)


def locate(source: Path | str, revision: str | None = None) -> Path:
    """The local folder of a model: as given, or a snapshot of the hub's. Raises ModelError."""
    if Path(source).is_dir():
        return Path(source)
    if isinstance(source, Path) or not HUB_NAME.fullmatch(source):
        raise ModelError(
            f"there is no model folder {source}: give a folder with config.json, or a hub name 'org/model'"
        )
    from huggingface_hub import snapshot_download

    try:
        return Path(
            snapshot_download(
                source, revision=revision, allow_patterns=["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]
            )
        )
    except (OSError, ValueError) as error:  # every hub error is one of the two
        raise ModelError(
            f"the model '{source}' is neither a folder nor can it be fetched from the hub ({first_line(error)}): "
            "check the name, its revision and HF_HUB_OFFLINE, or give a local folder"
        ) from error


def flops_parameters(model: Any) -> int:
    """Parameters a token passes through: all but the embeddings, plus the output head (also where it is tied)."""
    ends = {id(p): p for p in (model.get_input_embeddings().weight, _head(model).weight)}
    inner = sum(p.numel() for p in model.parameters() if id(p) not in ends)
    return inner + _head(model).weight.numel()


def _head(model: Any) -> Any:
    return model.get_output_embeddings()


def _base_of(adapter: Path) -> str:
    try:
        return str(json.loads(adapter.read_text(encoding="utf-8"))["base_model_name_or_path"])
    except (ValueError, KeyError) as error:
        raise ModelError(f"{adapter} does not name its base model: train the adapter again") from error


def check_weights(folder: Path) -> None:
    """Raises ModelError where the folder holds no weights that may be loaded."""
    if not any(folder.glob("*.safetensors")):
        raise ModelError(
            f"{folder} holds no weights (*.safetensors): point to the folder that save_pretrained wrote; "
            "pickled weights (*.bin) are never loaded, convert them first"
        )


def load_tokenizer(folder: Path, *, trust_remote_code: bool = False) -> Any:
    """Raises ModelError where the folder has none."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        raise ModelError(
            f"{folder} has no usable tokenizer: save it there with tokenizer.save_pretrained ({first_line(error)})"
        ) from error


def _load_weights(base: Path, settings: Model) -> Any:
    from transformers import AutoModelForCausalLM

    extra = {} if settings.attn_implementation == "auto" else {"attn_implementation": settings.attn_implementation}
    try:
        return AutoModelForCausalLM.from_pretrained(
            base, dtype=settings.dtype, use_safetensors=True, trust_remote_code=settings.trust_remote_code, **extra
        )
    except (OSError, ValueError, ImportError) as error:
        raise _unloadable(base, error) from error


def _unloadable(base: Path, error: Exception) -> ModelError:
    return ModelError(f"{base} cannot be loaded as a causal language model: {first_line(error)}")


def _facts(parts: Parts, model: Any, tokenizer: Any) -> ModelFacts:
    return ModelFacts(fingerprint(parts.folder, parts.base), flops_parameters(model), max_length(model, tokenizer))


def fingerprint(*folders: Path) -> str:
    """sha256 over the weight files of the folders, 16 hex digits."""
    digest = hashlib.sha256()
    for folder in dict.fromkeys(folders):
        for path in sorted(folder.glob("*.safetensors")):
            with path.open("rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()[:16]


def max_length(model: Any, tokenizer: Any) -> int:
    """The context in tokens, as far as model or tokenizer tell; 2048 where neither does."""
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    known = [n for n in (positions, tokenizer.model_max_length) if n is not None and n < 10**9]
    return int(min(known)) if known else 2048


def _eos_ids(generation: Any, tokenizer: Any) -> tuple[int, ...]:
    """Every id that ends an answer: chat models list several in their generation config."""
    listed = getattr(generation, "eos_token_id", None)
    ids = listed if isinstance(listed, list) else [listed]
    return tuple(sorted({i for i in (*ids, tokenizer.eos_token_id) if i is not None}))


def first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
