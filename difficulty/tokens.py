"""Every token of the prompt adds its own difficulty: rate = exp(-sum over tokens of softplus(weights . states + bias)).

A question is solved where all that it asks for goes right, so what can go wrong adds up over its parts: a survival
model whose hazard is linear in the policy's hidden states of each token. Where states are averaged first, as the other
predictors read them, the sum inside the exponent is lost. Fitted by L-BFGS on the soft-label cross-entropy, in the
directions in which tokens differ most; the penalty is chosen by cross-validation over the problems.

Axis legend: _P problems, _N tokens of all prompts, _L layers, _H hidden size, _D components, _A penalties.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from difficulty.basis import Basis, fit_basis
from difficulty.calibration import Floats, Platt, fit_platt
from difficulty.held_out import NUM_FOLDS, best, entropies, fold_of_each, honest_rates
from difficulty.prompts import Prompts
from search.errors import DataError

COMPONENTS = 96
BASIS_TOKENS = 2048  # read for the directions
PENALTIES = (0.03, 0.01, 0.003, 0.001, 0.0003)  # a problem's share; from strong to weak, each starting from the last
ITERATIONS = 40


@dataclass(frozen=True, slots=True, eq=False)
class TokenHead:
    """The hazard of a token is softplus(states . weight + offset); `level` is what every question has."""

    weight_L_H: Floats
    offset: float
    level: float
    platt: Platt
    kind: str = "tokens"

    def predict(self, prompts: Prompts) -> Floats:
        """Rates in [0, 1], shape [P]; nan where a state is not finite. Raises DataError on states of another shape."""
        logits = np.full(len(prompts), np.nan)
        weight = self.weight_L_H.reshape(-1)
        for row, states in prompts.each_token():
            if states.shape[1:] != self.weight_L_H.shape:
                raise DataError(
                    f"the predictor reads states of shape {self.weight_L_H.shape} of every token, not "
                    f"{states.shape[1:]}: it was fitted to another policy; fit it again"
                )
            hazards = _softplus(states.reshape(len(states), -1).astype(np.float64) @ weight + self.offset)
            logits[row] = _logit(np.array(hazards.sum() + _softplus(np.array(self.level))))
        rates = np.full(len(prompts), np.nan)
        finite = np.isfinite(logits)
        rates[finite] = self.platt(logits[finite])
        return rates

    def flops(self, num_prompt_tokens: int) -> float:
        return float(num_prompt_tokens * (2 * self.weight_L_H.size + 2))

    def tensors(self) -> dict[str, NDArray[Any]]:
        return {"weight": self.weight_L_H}

    def facts(self) -> dict[str, Any]:
        platt = {"slope": self.platt.slope, "offset": self.platt.offset}
        return {"offset": self.offset, "level": self.level, "platt": platt}

    @classmethod
    def load(cls, tensors: dict[str, NDArray[Any]], facts: dict[str, Any]) -> TokenHead:
        return cls(tensors["weight"], facts["offset"], facts["level"], Platt(**facts["platt"]))


def fit(prompts: Prompts, rates_P: Floats, weights_P: Floats, *, seed: object) -> tuple[TokenHead, Floats]:
    """The head, and calibrated predictions [P] by models that did not see the problem."""
    basis, shape = _basis(prompts)
    tokens = _Tokens.read(prompts, basis)
    weights = weights_P / weights_P.mean()
    folds = fold_of_each(len(rates_P), seed)
    logits_A_P = np.empty((len(PENALTIES), len(rates_P)))
    for fold in range(NUM_FOLDS):
        held, seen = np.flatnonzero(folds == fold), np.flatnonzero(folds != fold)
        unseen = tokens.take(held)
        for i, theta in enumerate(_path(tokens.take(seen), rates_P[seen], weights[seen], PENALTIES)):
            logits_A_P[i, held] = _logit(unseen.total(theta)[0])
    errors = entropies(logits_A_P, rates_P)
    chosen = best(errors, weights)
    theta = _path(tokens, rates_P, weights, PENALTIES[: chosen + 1])[-1]
    weight, offset = basis.fold(theta[:-2, None])
    head = TokenHead(
        weight_L_H=weight.reshape(shape),
        offset=float(offset[0] + theta[-2]),
        level=float(theta[-1]),
        platt=fit_platt(logits_A_P[chosen], rates_P, weights),
    )
    return head, honest_rates(logits_A_P, errors, rates_P, weights, folds)


def _softplus(x: Floats) -> Floats:
    return np.logaddexp(0, x)


def _sigmoid(x: Any) -> Any:
    return 0.5 + 0.5 * np.tanh(x / 2)


def _logit(hazard: Floats) -> Floats:
    """The logit of exp(-hazard)."""
    hazard = np.maximum(hazard, 1e-9)
    return -hazard - np.log(-np.expm1(-hazard))


def _basis(prompts: Prompts) -> tuple[Basis, tuple[int, ...]]:
    """From about BASIS_TOKENS tokens of prompts evenly spread over the problems; and the shape [L, H] of a state."""
    step = max(1, int(prompts.lengths_P.sum()) // BASIS_TOKENS)
    read = [states for _, states in prompts.take(np.arange(0, len(prompts), step)).each_token()]
    rows = np.nan_to_num(np.concatenate(read).astype(np.float64), posinf=0, neginf=0)
    return fit_basis(rows.reshape(len(rows), -1), COMPONENTS), rows.shape[1:]


@dataclass(frozen=True, slots=True, eq=False)
class _Tokens:
    """Components of every token, prompt after prompt, in single precision; `starts_P`: where each prompt begins."""

    values_N_D: NDArray[np.float32]
    starts_P: NDArray[np.intp]
    lengths_P: NDArray[np.int64]

    @classmethod
    def read(cls, prompts: Prompts, basis: Basis) -> _Tokens:
        lengths = prompts.lengths_P
        starts = np.concatenate([[0], np.cumsum(lengths)[:-1]]).astype(np.intp)
        values = np.empty((int(lengths.sum()), basis.axes_F_D.shape[1]), dtype=np.float32)
        for row, states in prompts.each_token():
            flat = np.nan_to_num(states.reshape(len(states), -1).astype(np.float64), posinf=0, neginf=0)
            values[starts[row] : starts[row] + lengths[row]] = basis(flat)
        return cls(values, starts, lengths)

    def take(self, rows: NDArray[np.intp]) -> _Tokens:
        lengths = self.lengths_P[rows]
        starts = np.concatenate([[0], np.cumsum(lengths)[:-1]]).astype(np.intp)
        places = np.repeat(self.starts_P[rows] - starts, lengths) + np.arange(int(lengths.sum()))
        return _Tokens(self.values_N_D[places], starts, lengths)

    def total(self, theta: Floats) -> tuple[Floats, Floats]:
        """The hazard of each problem [P], and the slope of each token's [N]; theta = weights, offset, level."""
        z = self.values_N_D @ theta[:-2].astype(np.float32) + np.float32(theta[-2])
        sums = np.add.reduceat(np.logaddexp(np.float32(0), z), self.starts_P).astype(np.float64)
        return sums + _softplus(theta[-1:]), _sigmoid(z)


def _path(tokens: _Tokens, rates_P: Floats, weights_P: Floats, penalties: tuple[float, ...]) -> list[Floats]:
    """The fitted theta for each penalty."""
    share_P = weights_P / weights_P.sum()
    mean = float(np.clip(share_P @ rates_P, 1e-3, 1 - 1e-3))
    each = -np.log(mean) / (float(tokens.lengths_P.mean()) + 1)  # the mean hazard, spread over the tokens
    start = float(np.log(np.expm1(each)))
    theta = np.concatenate([np.zeros(tokens.values_N_D.shape[1]), [start, start]])
    found: list[Floats] = []
    for penalty in penalties:

        def loss(theta: Floats, penalty: float = penalty) -> tuple[float, Floats]:
            hazard, slope_N = tokens.total(theta)
            hazard = np.maximum(hazard, 1e-9)
            wrong = -np.expm1(-hazard)
            nats = share_P @ (rates_P * hazard - (1 - rates_P) * np.log(wrong))
            pull_P = share_P * (rates_P - (1 - rates_P) * np.exp(-hazard) / wrong)
            pull_N = np.repeat(pull_P.astype(np.float32), tokens.lengths_P) * slope_N
            weights = theta[:-2]
            level = float(pull_P.sum()) * float(_sigmoid(theta[-1]))
            gradient = np.concatenate([(pull_N @ tokens.values_N_D) + 2 * penalty * weights, [pull_N.sum(), level]])
            return float(nats + penalty * (weights @ weights)), gradient

        theta = _minimise(loss, theta)
        found.append(theta)
    return found


def _minimise(loss: Callable[[Floats], tuple[float, Floats]], start: Floats) -> Floats:
    from scipy import optimize  # pyright: ignore[reportMissingTypeStubs]

    minimise: Any = optimize.minimize  # pyright: ignore[reportUnknownMemberType, reportUnknownVariableType]
    return np.asarray(minimise(loss, start, jac=True, method="L-BFGS-B", options={"maxiter": ITERATIONS}).x)
