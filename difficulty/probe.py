"""The linear probe: ridge on the pass rate from the policy's hidden states of the prompt, then Platt scaling.

As in "LLMs Encode Their Failures" (arXiv 2602.09924) and "On Calibration of LLMs: From Response To Capability". Layer,
pooling and penalty are chosen by cross-validation over the problems of the fit split alone.

Axis legend: _P problems, _L layers, _H hidden size; states are float32 [P, L, 2, H], the 2 being (last token, mean).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from difficulty.calibration import Floats, Platt
from difficulty.prompts import POOLINGS, Prompts, States
from difficulty.ridge import Linear, fit_best
from search.errors import DataError

MAX_ALL_FEATURES = 32_768  # above, "all" layers together are only tried when asked for: they need gigabytes


@dataclass(frozen=True, slots=True, eq=False)
class RidgeHead:
    """A fitted probe. `representation` is "all" or, for example, "layer 2, mean"."""

    representation: str
    shape: tuple[int, int, int]  # (L, 2, H) of the states it reads
    model: Linear
    kind: str = "ridge"

    def predict(self, prompts: Prompts) -> Floats:
        """Rates in [0, 1], shape [P]; nan where a state is not finite. Raises DataError on states of another shape."""
        check_shape(prompts.states, self.shape)
        return self.model(_features(prompts.states, self.representation))

    def flops(self, num_prompt_tokens: int) -> float:
        layers, _, hidden = self.shape
        averaged = {"all": layers * hidden}.get(self.representation, hidden * self.representation.endswith("mean"))
        return float(averaged * num_prompt_tokens + 4 * self.model.weight_F.size)

    def tensors(self) -> dict[str, NDArray[Any]]:
        return {"mean": self.model.mean_F, "scale": self.model.scale_F, "weight": self.model.weight_F}

    def facts(self) -> dict[str, Any]:
        return {
            "representation": self.representation,
            "shape": list(self.shape),
            "bias": self.model.bias,
            "platt": {"slope": self.model.platt.slope, "offset": self.model.platt.offset},
        }

    @classmethod
    def load(cls, tensors: dict[str, NDArray[Any]], facts: dict[str, Any]) -> RidgeHead:
        layers, two, hidden = facts["shape"]
        parts = (tensors["mean"], tensors["scale"], tensors["weight"])
        linear = Linear(*parts, bias=facts["bias"], platt=Platt(**facts["platt"]))
        return cls(facts["representation"], (layers, two, hidden), linear)


def fit(
    prompts: Prompts,
    rates_P: Floats,
    weights_P: Floats,
    *,
    seed: object,
    layers: Literal["all", "choose"] = "choose",
) -> tuple[RidgeHead, Floats]:
    """The head, and calibrated predictions [P] by models that did not see the problem."""
    states = prompts.states
    names = _representations(states.shape, layers)
    fitted = fit_best({name: _reader(states, name) for name in names}, rates_P, weights_P, seed=seed)
    shape = (states.shape[1], states.shape[2], states.shape[3])
    return RidgeHead(fitted.name, shape, fitted.model), fitted.rates_P


def check_shape(states: States, shape: tuple[int, int, int]) -> None:
    """Raises DataError where these are not states of the policy that a predictor was fitted to."""
    if states.shape[1:] != shape:
        raise DataError(
            f"the predictor reads hidden states of shape {shape}, not {states.shape[1:]}: "
            "it was fitted to another policy; fit it again"
        )


def _representations(shape: tuple[int, ...], layers: Literal["all", "choose"]) -> list[str]:
    if layers == "all":
        return ["all"]
    names = [f"layer {layer}, {pooling}" for layer in range(shape[1]) for pooling in POOLINGS]
    return [*names, "all"] if shape[1] * shape[2] * shape[3] <= MAX_ALL_FEATURES else names


def _features(states: States, representation: str) -> Floats:
    """The features [P, F] of a representation by name."""
    if representation == "all":
        chosen = states.reshape(len(states), -1)
    else:
        layer, pooling = representation.removeprefix("layer ").split(", ")
        chosen = states[:, int(layer), POOLINGS.index(pooling)]
    return chosen.astype(np.float64)


def _reader(states: States, representation: str) -> Callable[[], Floats]:
    return lambda: _features(states, representation)
