"""FLOPs-matched exchange: search with a small model, or a larger model trained on the same data (Snell et al. 2024,
section 7 of v1; method.md section 6)?

Both versions of the paper give pre-training X = 6 N D_pre FLOPs (N parameters, D_pre tokens). They differ in inference
over D_inf tokens: arXiv v1 charges Y = 2 N D_inf, ICLR 2025 twice that, Y = 4 N D_inf, for the verifier. A model M
times as large costs M (X + Y) if it answers greedily; for as much, the small model's inference may be multiplied by

    v1:   M + 3   (M - 1) / R        ICLR:   M + 3/2 (M - 1) / R        with R = D_inf / D_pre

The paper's R are no natural constants: at M = 14 they are budgets of about 256, 64 and 16 generations.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from search.errors import ConfigError

Version = Literal["v1", "iclr"]
VERSIONS: tuple[Version, ...] = ("v1", "iclr")
INFERENCE_FLOPS: dict[Version, float] = {"v1": 2.0, "iclr": 4.0}  # per parameter and token; 4 pays the verifier
PRETRAINING_FLOPS = 6.0
RATIOS: dict[Version, tuple[float, float, float]] = {"v1": (0.16, 0.79, 22.0), "iclr": (0.08, 0.40, 11.0)}
PAPER_SIZE = 14.0  # how many times as large the paper's larger model is


@dataclass(frozen=True, slots=True)
class Trained:
    """A model by what its FLOPs depend on. Example: Trained(parameters=1.2e6, pretraining_tokens=4.1e7)

    `parameters` as everywhere in Ratchet: non-embedding plus output head.
    """

    parameters: float
    pretraining_tokens: float

    @property
    def pretraining_flops(self) -> float:
        """X = 6 N D_pre."""
        return PRETRAINING_FLOPS * self.parameters * self.pretraining_tokens

    def inference_flops(self, tokens: float, version: Version = "v1") -> float:
        """Y of `tokens` generated tokens: 2 N D_inf (v1) or 4 N D_inf (iclr). Raises ConfigError."""
        return _per_token(version) * self.parameters * tokens


def multiplier(size: float, ratio: float, version: Version = "v1") -> float:
    """How many times the small model's inference may cost what greedy answers cost it.

    `size`: M, how many times as large the other model is, at least 1. `ratio`: R = D_inf / D_pre, above 0; math.inf
    gives M. Example: multiplier(14, 0.16) == 257.75. Raises ConfigError.
    """
    factor = PRETRAINING_FLOPS / _per_token(version)
    if not size >= 1 or math.isinf(size):
        raise ConfigError(f"a model {size:g} times as large is no larger model: give at least 1")
    if not ratio > 0:
        raise ConfigError(f"R = {ratio:g} inference tokens per pre-training token: give more than 0")
    return size + factor * (size - 1) / ratio


def break_even(size: float, multiple: float, version: Version = "v1") -> float:
    """The R at which `multiple` times the small model's inference costs as much as the model `size` times as large.

    Below it search is the cheaper one. math.inf where it is so at any R: a multiple up to M. The inverse of
    `multiplier`. Raises ConfigError.
    """
    multiplier(size, 1.0, version)  # refuses what means nothing
    if not multiple > 0:
        raise ConfigError(f"inference {multiple:g} times as expensive means nothing: give more than 0")
    factor = PRETRAINING_FLOPS / _per_token(version)
    return factor * (size - 1) / (multiple - size) if multiple > size else math.inf


def grid(size: float = PAPER_SIZE, version: Version = "v1") -> dict[float, float]:
    """R -> multiplier for the three R of that version. At M = 14: 257.75, 63.4 (v1) or 62.75 (iclr), 15.8."""
    _per_token(version)
    return {ratio: multiplier(size, ratio, version) for ratio in RATIOS[version]}


# ---------------------------------------------------------------- two real models


def matched_multiplier(
    small: Trained,
    large: Trained,
    small_tokens: float,
    large_tokens: float,
    version: Version = "v1",
) -> float:
    """`multiplier` for two models as they are: any sizes, any training tokens, answers of any length.

    `small_tokens`, `large_tokens`: all tokens that each generates in its life when it answers greedily. May be below
    1 or negative where the large model costs less altogether. Raises ConfigError.
    """
    for tokens in (small_tokens, large_tokens):
        if not tokens > 0:
            raise ConfigError(f"{tokens:g} tokens of inference: give more than 0")
    whole = large.pretraining_flops + large.inference_flops(large_tokens, version)
    return (whole - small.pretraining_flops) / small.inference_flops(small_tokens, version)


def allowance(small: Trained, large: Trained, questions: float, large_tokens: float, version: Version = "v1") -> float:
    """FLOPs a question that the small model may spend so that both lives cost the same: where to read its measured
    curve of accuracy against total FLOPs.

    `questions`: how many are answered in a life. `large_tokens`: of one greedy answer of the large model. Under "iclr"
    the small model's own measure must hold its verifier. Raises ConfigError.
    """
    if not questions > 0:
        raise ConfigError(f"{questions:g} questions in a life: give more than 0")
    saved = (large.pretraining_flops - small.pretraining_flops) / questions
    return saved + large.inference_flops(large_tokens, version)


def questions_for(ratio: float, small: Trained, small_tokens: float) -> float:
    """How many questions in a life make R = D_inf / D_pre, at `small_tokens` a greedy answer. Raises ConfigError."""
    if not (ratio > 0 and small_tokens > 0):
        raise ConfigError(f"R = {ratio:g} with {small_tokens:g} tokens an answer: give both more than 0")
    return ratio * small.pretraining_tokens / small_tokens


def _per_token(version: str) -> float:
    for name, flops in INFERENCE_FLOPS.items():
        if name == version:
            return flops
    raise ConfigError(f"there is no version '{version}' of the exchange: there are {', '.join(VERSIONS)}")
