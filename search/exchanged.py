"""A small model that searches against a larger one that answers at once, at equal FLOPs (Snell et al. 2024, section 7).

In each bin of oracle difficulty the small model spends what the exchange allows it (`search.exchange`) by its
compute-optimal choice, fitted on the other half of the bin; the larger model answers greedily. Its verifier is in the
small model's FLOPs, also under v1, where the paper leaves it out.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from search import stats
from search.cells import Cell, Grid
from search.errors import DataError
from search.exchange import INFERENCE_FLOPS, RATIOS, VERSIONS, multiplier
from search.optimal import Cells, Ints, at_mean, by_price, outcomes, prices_of, quantile_bins
from search.stats import Floats


def exchanged(
    grid: Grid, larger: Cell, size: float, oracle_P: Floats, *, bins: int = 5, seed: object = 0
) -> dict[str, Any]:
    """The section "exchange" of the report. `larger`: its greedy answers to the grid's problems; `size`: M, its
    parameters over the small model's; `oracle_P`: pass rates of the small model, from other samples.

    Raises DataError without the small model's own greedy answers, ConfigError where M is below 1.
    """
    greedy = grid.find("greedy", 1)
    if greedy is None:
        raise DataError("the exchange needs the small model's greedy answers: add greedy to --strategies")
    cells, bins_P = Cells(grid), quantile_bins(oracle_P, bins)
    values_L_P, flops_L_P = outcomes(cells, bins_P, by_price(prices_of(cells, 200)), seed=seed)
    each = float(greedy.flops_P.mean())
    rows: list[dict[str, Any]] = []
    for version in VERSIONS:
        for ratio in RATIOS[version]:
            times = multiplier(size, ratio, version)
            allowed = times * each * INFERENCE_FLOPS[version] / INFERENCE_FLOPS["v1"]
            small_P = _within(values_L_P, flops_L_P, bins_P, allowed)
            row: dict[str, Any] = {"version": version, "R": ratio, "times": times, "flops": allowed}
            row["bins"] = [
                {"bin": int(b)} | _compared(small_P, larger.solved_P, bins_P == b) for b in np.unique(bins_P)
            ]
            rows.append(row | {"all": _compared(small_P, larger.solved_P, np.ones(len(bins_P), dtype=bool))})
    return {
        "multiplier": size,
        "larger": _model(larger.solved_P, float(larger.flops_P.mean())),
        "small": _model(greedy.solved_P, each),
        "rows": rows,
    }


def _within(values_L_P: Floats, flops_L_P: Floats, bins_P: Ints, allowed: float) -> Floats:
    """By problem, what the choice comes to where each bin may spend `allowed` a question; 0 where it buys nothing."""
    small_P = np.zeros(len(bins_P))
    for b in np.unique(bins_P):
        inside = bins_P == b
        found = at_mean(values_L_P[:, inside], flops_L_P[:, inside], allowed)
        small_P[inside] = 0.0 if found is None else found
    return small_P


def _compared(small_P: Floats, larger_P: Floats, inside: np.ndarray) -> dict[str, Any]:
    """Paired by problem; one problem alone has no interval."""
    difference = stats.paired_difference(larger_P[inside], small_P[inside])
    return {
        "n": difference.n,
        "small": float(small_P[inside].mean()),
        "larger": float(larger_P[inside].mean()),
        "gain": difference.mean,
        "low": difference.low if difference.n > 1 else None,
        "high": difference.high if difference.n > 1 else None,
    }


def _model(solved_P: Floats, flops: float) -> dict[str, Any]:
    accuracy = stats.mean_estimate(solved_P)
    return {"accuracy": accuracy.value, "se": accuracy.se, "flops": flops}
