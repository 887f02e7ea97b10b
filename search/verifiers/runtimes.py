"""What runs the decoder of a verifier: transformers in this process (states.py), or vLLM (vllm.py)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch

from configs.schema import VerifierRuntime
from search.errors import ModelError
from search.types import Scored
from search.verifiers.heads import GenerativeHead, StateHead
from search.verifiers.layout import Encoded
from search.verifiers.states import StateScorer


class Scorer(Protocol):
    """Scores inputs at their ends; see StateScorer."""

    def score(self, inputs: Sequence[Encoded], keep: bool | Sequence[bool] = False) -> list[Scored]: ...
    def reset(self) -> None: ...
    def close(self) -> None: ...


def loading_device(settings: VerifierRuntime) -> torch.device:
    """Where the model is to be loaded: vLLM takes its weights from the CPU."""
    if settings.runtime == "vllm":
        return torch.device("cpu")
    automatic = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(automatic if settings.device == "auto" else settings.device)


def start_scorer(
    decoder: Any,
    head: StateHead | GenerativeHead,
    settings: VerifierRuntime,
    *,
    max_length: int,
    causal: bool = True,
) -> Scorer:
    """The configured runtime, with a model that lies on the `loading_device`. vLLM leaves no weights in `decoder`.

    Raises ConfigError, ModelError, EngineError as that runtime does.
    """
    if settings.runtime == "transformers":
        return StateScorer(decoder, head, settings, max_length=max_length, causal=causal)
    if not causal:
        raise ModelError("the verifier is no causal model, which vLLM cannot run here: use verifier.runtime = "
                         "'transformers'")  # fmt: skip
    from search.verifiers.vllm import PoolingScorer

    return PoolingScorer(decoder, head, settings, max_length=max_length)
