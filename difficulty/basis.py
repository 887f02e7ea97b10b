"""The directions in which hidden states differ most, so that small models are fitted to few features.

Principal components of standardised features, found in the smaller of the two spaces, features or rows. A linear map
of components folds back into one of the features: the components cost nothing at prediction.

Axis legend: _N rows, _F features, _D components, _K outputs. float64 throughout; deterministic.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True, eq=False)
class Basis:
    """component = (feature - mean) @ axes, with a mean variance of 1 over the components."""

    mean_F: Floats
    axes_F_D: Floats

    def __call__(self, features_N_F: Floats) -> Floats:
        return (features_N_F - self.mean_F) @ self.axes_F_D

    def fold(self, weights_D_K: Floats) -> tuple[Floats, Floats]:
        """(weights [F, K], offsets [K]): features @ weights + offsets is what components @ weights_D_K is."""
        weights_F_K = self.axes_F_D @ weights_D_K
        return weights_F_K, -(self.mean_F @ weights_F_K)


def fit_basis(features_N_F: Floats, most: int) -> Basis:
    """At most `most` components of finite features; none of features that do not differ."""
    mean = features_N_F.mean(axis=0)
    scale = features_N_F.std(axis=0)
    scale = np.where(scale > 1e-7 * (1 + np.abs(mean)), scale, np.inf)
    x = (features_N_F - mean) / scale
    dual = x.shape[0] < x.shape[1]
    values, vectors = np.linalg.eigh((x @ x.T if dual else x.T @ x) / len(x))
    values, vectors = values[::-1][:most], vectors[:, ::-1][:, :most]
    keep = values > 1e-9 * max(float(values[0]), 1e-300) if len(values) else np.zeros(0, dtype=bool)
    values, vectors = values[keep], vectors[:, keep]
    if dual:
        vectors = x.T @ vectors / np.sqrt(values * len(x))
    spread = np.sqrt(values.mean()) if len(values) and values.mean() > 0 else 1.0
    return Basis(mean, np.asarray(vectors / scale[:, None] / spread, dtype=np.float64))
