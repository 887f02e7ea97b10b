"""Counter-based draws of tokens: the same (key, absolute position) draws at the same point of the distribution, on
every engine that samples here, whatever else is in the batch."""

from __future__ import annotations

import torch


def draw(scores: torch.Tensor, temperatures: torch.Tensor, points: torch.Tensor) -> torch.Tensor:
    """One token a row, int64 [rows]: the distribution of scores / temperature inverted at `points` (float64 [rows]).

    `scores` are logits, float32 [rows, vocabulary]; -inf excludes an id.
    """
    cumulative = (scores / temperatures.clamp(min=1e-6)[:, None]).softmax(-1).double().cumsum(-1)
    draws = points[:, None] * cumulative[:, -1:]
    return torch.searchsorted(cumulative, draws, right=True).squeeze(1).clamp(max=scores.shape[1] - 1)


def uniform(keys: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """Float64 in [0, 1) for each (64-bit key, position): splitmix64's finaliser over key + position * constant.

    Source: Steele, Lea, Flood, "Fast splittable pseudorandom number generators" (OOPSLA 2014). Signed arithmetic
    wraps, so it gives the same bits; shifts are made logical by a mask.
    """
    z = keys + (positions + 1) * signed(0x9E3779B97F4A7C15)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        z = (z ^ _shifted(z, shift)) * signed(factor)
    z = z ^ _shifted(z, 31)
    return _shifted(z, 11).double() * 2.0**-53


def signed(value: int) -> int:
    """The 64-bit pattern as the signed integer that torch holds."""
    value &= (1 << 64) - 1
    return value - (1 << 64) if value >> 63 else value


def _shifted(z: torch.Tensor, by: int) -> torch.Tensor:
    return (z >> by) & ((1 << (64 - by)) - 1)
