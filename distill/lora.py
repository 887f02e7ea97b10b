"""Load a policy for training, whole or with a LoRA adapter (Hu et al. 2021), and merge an adapter into its base.

A model folder is a full model or an adapter folder (`adapter_config.json`); an adapter sits on the loop's base model,
wherever the path inside its configuration points. Left out: quantised bases, other kinds of adapters.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForTokenClassification, AutoTokenizer

from configs.schema import Lora, Model
from search.errors import ModelError

ADAPTER = "adapter_config.json"


class Adapting(Protocol):
    """The part of a section of the configuration that says which weights are trained."""

    @property
    def method(self) -> Literal["full", "lora"]: ...
    @property
    def lora(self) -> Lora: ...


def load_trainable(
    init: Path, base: Path | None, config: Adapting, model: Model, device: str, *, token_dropout: float | None = None
) -> Any:
    """The policy at `init` with the parameters of `config.method` trainable, on the CPU. Raises ModelError.

    "full" trains a full model (an adapter is merged first); "lora" goes on with the adapter at `init`, or adds a
    fresh one to a full model. Weights to be trained are float32, whatever type they are stored in and go back to.
    `token_dropout`: load it as a token classifier with one label and this dropout before its head, which is drawn at
    random where `init` has none.
    """
    tokens = token_dropout is not None
    policy = _load_full(base_of(init, base), model, _weight_type(config, model, device), token_dropout)
    if config.method == "full":
        merged = _adapted(policy, init, False, tokens).merge_and_unload() if is_adapter(init) else policy
        return merged.requires_grad_(True)  # a merge leaves the weights frozen
    if is_adapter(init):
        return _adapted(policy, init, True, tokens)
    from peft import LoraConfig, get_peft_model

    lora = config.lora
    targets = lora.target_modules if "," not in lora.target_modules else lora.target_modules.split(",")
    settings = LoraConfig(
        task_type="TOKEN_CLS" if tokens else "CAUSAL_LM",
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=targets,
        exclude_modules=["score", "classifier"] if tokens else None,  # such a head is trained whole
    )
    return get_peft_model(policy, settings)


def load_tokenizer(init: Path, base: Path | None, model: Model) -> Any:
    """The tokenizer beside the model, or the base's; with a padding token. Raises ModelError."""
    place = init if not is_adapter(init) or (init / "tokenizer_config.json").exists() else base_of(init, base)
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(place), **_hub(place, model))
    except (OSError, ValueError) as error:
        raise ModelError(f"no tokenizer at {place}: {error}") from error
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def is_adapter(folder: Path) -> bool:
    return (folder / ADAPTER).is_file()


def base_of(init: Path, base: Path | None) -> Path:
    """The full model that training starts from. Raises ModelError for an adapter without a base."""
    if not is_adapter(init):
        return init
    if base is None or is_adapter(base):
        raise ModelError(f"{init} is an adapter and needs its full base model, not {base}")
    return base


def stored_type(place: Path, model: Model) -> torch.dtype:
    """The type the weights of a model are stored in; a full model goes back to it after training."""
    if model.dtype != "auto":
        return getattr(torch, model.dtype)
    stored = AutoConfig.from_pretrained(str(place), **_hub(place, model)).dtype
    return stored if isinstance(stored, torch.dtype) else torch.float32


def save(policy: Any, tokenizer: Any, out: Path) -> None:
    """Write model (or adapter) and tokenizer as the folder `out`, which appears whole."""
    work = out.with_name(out.name + ".new")
    shutil.rmtree(work, ignore_errors=True)
    policy.save_pretrained(work)
    tokenizer.save_pretrained(work)
    (work / "README.md").unlink(missing_ok=True)  # peft's model card: a form that nobody filled in
    shutil.rmtree(out, ignore_errors=True)
    os.replace(work, out)


def merge_adapter(adapter: Path, base: Path, out: Path, model: Model) -> None:
    """Write the full model that `adapter` on `base` makes, in the base's own weight type. Raises ModelError."""
    stored = stored_type(base, model)
    policy = _adapted(_load_full(base_of(adapter, base), model, torch.float32), adapter, False)
    save(policy.merge_and_unload().to(stored), load_tokenizer(adapter, base, model), out)


def _adapted(policy: Any, adapter: Path, trainable: bool, tokens: bool = False) -> Any:
    """`tokens`: the adapter may be a language model's; a token classifier takes it, and keeps its own head."""
    from peft import PeftConfig, PeftModel, get_peft_model, get_peft_model_state_dict
    from peft.utils.save_and_load import load_peft_weights, set_peft_model_state_dict

    try:
        if not tokens:
            return PeftModel.from_pretrained(policy, str(adapter), is_trainable=trainable)
        settings = PeftConfig.from_pretrained(str(adapter))
        settings.task_type, settings.inference_mode = "TOKEN_CLS", not trainable
        adapted = get_peft_model(policy, settings)
        own = get_peft_model_state_dict(adapted)  # the head, where the adapter has none
        set_peft_model_state_dict(adapted, {**own, **load_peft_weights(str(adapter), device="cpu")})
        return adapted
    except (OSError, ValueError, RuntimeError) as error:
        raise ModelError(f"the adapter {adapter} does not fit its base model: {error}") from error


def _load_full(place: Path, model: Model, dtype: torch.dtype | str, token_dropout: float | None = None) -> Any:
    chosen: dict[str, Any] = {}
    if model.attn_implementation != "auto":
        chosen["attn_implementation"] = model.attn_implementation
    try:
        if token_dropout is None:
            return AutoModelForCausalLM.from_pretrained(str(place), dtype=dtype, **chosen, **_hub(place, model))
        config = AutoConfig.from_pretrained(str(place), **_hub(place, model))
        config.num_labels, config.classifier_dropout = 1, token_dropout
        return AutoModelForTokenClassification.from_pretrained(
            str(place), config=config, dtype=dtype, **chosen, **_hub(place, model)
        )
    except (OSError, ValueError, ImportError) as error:
        raise ModelError(f"no model that can be trained at {place}: {error}") from error


def _weight_type(config: Adapting, model: Model, device: str) -> torch.dtype | str:
    """A frozen base may stay in its own type; on the CPU float32 is faster and exact.

    Weights that are trained whole are float32: most updates of a usual learning rate are below bfloat16's resolution.
    """
    if config.method == "full":
        return torch.float32
    if model.dtype != "auto":
        return getattr(torch, model.dtype)
    return "auto" if device != "cpu" else torch.float32


def _hub(place: Path, model: Model) -> dict[str, Any]:
    """Keyword arguments that only a hub name needs."""
    revision = {"revision": model.revision} if model.revision and not place.is_dir() else {}
    return {"trust_remote_code": model.trust_remote_code, **revision}
