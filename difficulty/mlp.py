"""A small network on the policy's hidden states of the prompt: one hidden layer over their principal components.

As in "Learning How Hard to Think" (arXiv 2410.04707) and Predictive Scheduling (2602.01237): soft-label cross-entropy
against the pass rate. One network a fold, each trained on the other folds; training stops where their loss on the
problems they do not see rises, and the mean of their logits predicts. All are trained side by side.

Axis legend: _P problems, _F features, _K networks (folds), _U hidden units, _E epochs. Left out: more layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from difficulty.basis import fit_basis
from difficulty.calibration import Floats, Platt, fit_platt
from difficulty.held_out import NUM_FOLDS, best, entropies, fold_of_each, honest_rates
from difficulty.probe import MAX_ALL_FEATURES, check_shape
from difficulty.prompts import Prompts, spaced_layers
from search.randomness import key64

COMPONENTS = 64
UNITS = 64
BATCH = 64
MAX_EPOCHS, PATIENCE = 100, 8
LEARNING_RATE, WEIGHT_DECAY, BETAS = 1e-3, 1.0, (0.9, 0.99)


@dataclass(frozen=True, slots=True, eq=False)
class MlpHead:
    """Rate = platt(tanh(features @ weight + bias) @ out + level): the networks side by side, `out` their mean.

    The features are the pooled states of its layers, and the prompt's length.
    """

    shape: tuple[int, int, int]  # (L, 2, H) of the policy's states
    layers: tuple[int, ...]  # that it reads
    weight_F_KU: Floats  # every network's first layer, side by side
    bias_KU: Floats
    out_KU: Floats
    level: float
    platt: Platt
    kind: str = "mlp"

    def predict(self, prompts: Prompts) -> Floats:
        """Rates in [0, 1], shape [P]; nan where a state is not finite. Raises DataError on states of another shape."""
        check_shape(prompts.states, self.shape)
        features = _features(prompts, self.layers)
        finite = np.isfinite(features).all(axis=1)
        rates = np.full(len(features), np.nan)
        hidden = np.tanh(features[finite] @ self.weight_F_KU + self.bias_KU)
        rates[finite] = self.platt(hidden @ self.out_KU + self.level)
        return rates

    def flops(self, num_prompt_tokens: int) -> float:
        averaged = len(self.layers) * self.shape[2] * num_prompt_tokens
        return float(averaged + 2 * (self.weight_F_KU.size + 2 * self.out_KU.size))

    def tensors(self) -> dict[str, NDArray[Any]]:
        return {"weight": self.weight_F_KU, "bias": self.bias_KU, "out": self.out_KU}

    def facts(self) -> dict[str, Any]:
        platt = {"slope": self.platt.slope, "offset": self.platt.offset}
        return {"shape": list(self.shape), "layers": list(self.layers), "level": self.level, "platt": platt}

    @classmethod
    def load(cls, tensors: dict[str, NDArray[Any]], facts: dict[str, Any]) -> MlpHead:
        layers, two, hidden = facts["shape"]
        parts = (tensors["weight"], tensors["bias"], tensors["out"])
        return cls(
            (layers, two, hidden), tuple(facts["layers"]), *parts, level=facts["level"], platt=Platt(**facts["platt"])
        )


def fit(prompts: Prompts, rates_P: Floats, weights_P: Floats, *, seed: object) -> tuple[MlpHead, Floats]:
    """The head, and calibrated predictions [P] by networks that did not see the problem."""
    num_layers, two, hidden = prompts.states.shape[1:]
    few = num_layers * two * hidden > MAX_ALL_FEATURES
    layers = tuple(spaced_layers(num_layers) if few else range(num_layers))
    features = _features(prompts, layers)
    basis = fit_basis(features, COMPONENTS)
    x, weights = basis(features), weights_P / weights_P.mean()
    folds = fold_of_each(len(rates_P), seed)
    networks, logits_E_P = _train(x, rates_P, weights, folds, seed)
    errors = entropies(logits_E_P, rates_P)
    first, bias_KU, out_KU, level_K = networks
    num = len(first)
    weight, offset = basis.fold(np.concatenate(list(first), axis=1))
    head = MlpHead(
        shape=(num_layers, two, hidden),
        layers=layers,
        weight_F_KU=weight,
        bias_KU=bias_KU.reshape(-1) + offset,
        out_KU=out_KU.reshape(-1) / num,
        level=float(level_K.mean()),
        platt=fit_platt(logits_E_P[best(errors, weights)], rates_P, weights),
    )
    return head, honest_rates(logits_E_P, errors, rates_P, weights, folds)


def _features(prompts: Prompts, layers: Sequence[int]) -> Floats:
    lengths = prompts.lengths_P.astype(np.float64)[:, None]
    states = prompts.states[:, list(layers)].reshape(len(prompts), -1).astype(np.float64)
    return np.concatenate([states, lengths, np.log1p(lengths)], axis=1)


# ---------------------------------------------------------------- training

Parameters = list[Floats]  # weight [K, D, U], bias [K, U], out [K, U], level [K]


def _train(
    x_P_D: Floats, rates_P: Floats, weights_P: Floats, folds_P: NDArray[np.intp], seed: object
) -> tuple[Parameters, Floats]:
    """The networks of the epoch that predicts the unseen problems best, and the unseen logits of every epoch [E, P]."""
    chance = np.random.Generator(np.random.Philox(key64("difficulty", "mlp", seed)))
    mean = float(np.clip(np.average(rates_P, weights=weights_P), 1e-4, 1 - 1e-4))
    num = x_P_D.shape[1]
    theta: Parameters = [
        chance.normal(size=(NUM_FOLDS, num, UNITS)) / np.sqrt(max(num, 1)),
        chance.normal(size=(NUM_FOLDS, UNITS)),  # not 0: units that are odd learn nothing even
        np.zeros((NUM_FOLDS, UNITS)),
        np.full(NUM_FOLDS, np.log(mean / (1 - mean))),
    ]
    moments = [[np.zeros_like(p), np.zeros_like(p)] for p in theta]
    seen = [np.flatnonzero(folds_P != fold) for fold in range(NUM_FOLDS)]
    size = min(len(rows) for rows in seen)  # of an epoch: the folds differ by one problem at most
    kept, logits_E_P, step = [p.copy() for p in theta], list[Floats](), 0
    while len(logits_E_P) < MAX_EPOCHS:
        order_K_S = np.stack([chance.permutation(rows)[:size] for rows in seen])
        for start in range(0, size, BATCH):
            rows_K_B, step = order_K_S[:, start : start + BATCH], step + 1
            gradient = _gradient(theta, x_P_D[rows_K_B], rates_P[rows_K_B], weights_P[rows_K_B])
            _adamw(theta, gradient, moments, step)
        logits_K_P = _forward(theta, np.broadcast_to(x_P_D, (NUM_FOLDS, *x_P_D.shape)))[1]
        logits_E_P.append(logits_K_P[folds_P, np.arange(len(rates_P))])
        reached = best(entropies(np.array(logits_E_P), rates_P), weights_P)
        if reached == len(logits_E_P) - 1:
            kept = [p.copy() for p in theta]
        elif len(logits_E_P) > reached + PATIENCE:
            break
    return kept, np.array(logits_E_P)


def _forward(theta: Parameters, x_K_B_D: Floats) -> tuple[Floats, Floats]:
    weight, bias, out, level = theta
    hidden = np.tanh(x_K_B_D @ weight + bias[:, None])
    return hidden, (hidden @ out[:, :, None])[..., 0] + level[:, None]


def _gradient(theta: Parameters, x_K_B_D: Floats, rates_K_B: Floats, weights_K_B: Floats) -> Parameters:
    """Of the mean weighted cross-entropy."""
    hidden, logits = _forward(theta, x_K_B_D)
    error = (0.5 + 0.5 * np.tanh(logits / 2) - rates_K_B) * weights_K_B / rates_K_B.shape[1]
    inner = error[..., None] * theta[2][:, None] * (1 - hidden**2)
    return [x_K_B_D.swapaxes(1, 2) @ inner, inner.sum(1), (error[..., None] * hidden).sum(1), error.sum(1)]


def _adamw(theta: Parameters, gradient: Parameters, moments: list[list[Floats]], step: int) -> None:
    """In place; matrices decay."""
    rate = LEARNING_RATE * np.sqrt(1 - BETAS[1] ** step) / (1 - BETAS[0] ** step)
    for p, g, m in zip(theta, gradient, moments, strict=True):
        m[0] += (1 - BETAS[0]) * (g - m[0])
        m[1] += (1 - BETAS[1]) * (g * g - m[1])
        if p.ndim == 3:
            p *= 1 - LEARNING_RATE * WEIGHT_DECAY
        p -= rate * m[0] / (np.sqrt(m[1]) + 1e-8)
