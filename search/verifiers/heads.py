"""From a model's last hidden states to scores in [0, 1]: what a checkpoint format brings besides its layout.

Shapes: K steps, N tokens of steps, H hidden, L labels. Every runtime (transformers, vLLM) reads states through these.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import nn

from search.verifiers.readout import GenerativeReadout, flat_logprobs


class Head(Protocol):
    """What turns states into scores. `reads_tokens`: a step's score also depends on each of its tokens."""

    reads_tokens: bool

    def terms(self, before_NH: torch.Tensor, ids_N: torch.Tensor) -> torch.Tensor:
        """What each token adds to its step, float32 [N]: ids[n] was written after the state before[n].

        Called only where `reads_tokens`.
        """
        ...

    def __call__(self, ends_KH: torch.Tensor, sums_K: torch.Tensor, counts_K: torch.Tensor) -> torch.Tensor:
        """Scores in [0, 1], float32 [K], from the state at each step's end, the sum of its tokens' terms and their
        number (zeros and ones where tokens are not read)."""
        ...


class StateHead:
    """Reads the state at a step's end alone. `logits`: [K, H] to [K, L] or [K]; `squash`: float32 logits to [K] scores.

    Example: StateHead(model.score, calibrated()); of a two-label classifier StateHead(model.score, softmax_of(1))
    """

    reads_tokens = False

    def __init__(self, logits: nn.Module, squash: Callable[[torch.Tensor], torch.Tensor]):
        self._logits = logits
        self._dtype = next(logits.parameters()).dtype
        self.squash = squash

    @property
    def linear(self) -> nn.Linear | None:
        """The whole head up to `squash`, where it is one layer: a runtime may compute that with its decoder."""
        return self._logits if isinstance(self._logits, nn.Linear) else None

    def to(self, device: torch.device) -> None:
        self._logits.to(device)

    def terms(self, before_NH: torch.Tensor, ids_N: torch.Tensor) -> torch.Tensor:
        raise AssertionError("a state head reads no tokens")

    def __call__(self, ends_KH: torch.Tensor, sums_K: torch.Tensor, counts_K: torch.Tensor) -> torch.Tensor:
        return self.squash(self._logits(ends_KH.to(self._dtype)).float())


class GenerativeHead:
    """Our generative read-out: the state at the end, and the log-probability of every token (see readout.py)."""

    reads_tokens = True

    def __init__(self, readout: GenerativeReadout, output: Any, *, scale: float = 1.0, shift: float = 0.0):
        """`output`: the language model's output head."""
        self._readout = readout
        self._output = output
        self._squash = calibrated(scale, shift)

    def to(self, device: torch.device) -> None:
        self._readout.to(device)
        self._output.to(device)

    def terms(self, before_NH: torch.Tensor, ids_N: torch.Tensor) -> torch.Tensor:
        logprobs_N = flat_logprobs(self._output, before_NH, ids_N)
        return self._readout.token_terms(before_NH.to(self._readout.weight.weight.dtype), logprobs_N).float()

    def __call__(self, ends_KH: torch.Tensor, sums_K: torch.Tensor, counts_K: torch.Tensor) -> torch.Tensor:
        head = self._readout.head
        return self._squash(head(ends_KH.to(head.weight.dtype)).squeeze(-1).float() + sums_K)


def calibrated(scale: float = 1.0, shift: float = 0.0) -> Callable[[torch.Tensor], torch.Tensor]:
    """sigmoid(scale * logit + shift) of one logit a step, [K] or [K, 1]."""
    return lambda logits: (scale * logits.reshape(len(logits)) + shift).sigmoid()


def softmax_of(index: int) -> Callable[[torch.Tensor], torch.Tensor]:
    """The probability of one of the L labels."""
    return lambda logits: logits.softmax(-1)[:, index]


def linear_rows(output: Any, ids: list[int]) -> nn.Linear:
    """The rows of a language model's output head for a few tokens: their logits without the vocabulary's."""
    bias = getattr(output, "bias", None)
    rows = nn.Linear(output.weight.shape[1], len(ids), bias=bias is not None, device="meta")
    rows.weight = nn.Parameter(output.weight.detach()[ids].clone(), requires_grad=False)
    if bias is not None:
        rows.bias = nn.Parameter(bias.detach()[ids].clone(), requires_grad=False)
    return rows
