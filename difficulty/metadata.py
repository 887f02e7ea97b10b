"""Features of what a task says of its problems (`Problem.meta`), as a baseline: numbers found without knowing the task.

    {"numbers": [3, 5, 7], "target": 22}   ->   target 22, numbers: 3 of them, least 3, most 7, mean 5
    {"level": "Level 5"}                   ->   level 5

Where a problem comes from (its line, its id) says nothing of it and is left out.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

PROVENANCE = ("line", "id")
GRADE = re.compile(r"[A-Za-z ]*(-?\d+(?:\.\d+)?)")


def features(metas_P: Sequence[Mapping[str, Any]]) -> tuple[tuple[str, ...], NDArray[np.float64]]:
    """Names of the numeric features and their values [P, F]; without any where the task says nothing in numbers.

    A problem that lacks a feature gets the mean of the others; features that never differ are left out.
    """
    rows = [_numbers(meta) for meta in metas_P]
    names = sorted({name for row in rows for name in row})
    values = np.array([[row.get(name, math.nan) for name in names] for row in rows], dtype=np.float64)
    values = values.reshape(len(rows), len(names))
    return _differing(names, values)


def features_like(names: Sequence[str], metas_P: Sequence[Mapping[str, Any]]) -> NDArray[np.float64]:
    """The named features of other problems [P, F]; nan where a problem lacks one."""
    rows = [_numbers(meta) for meta in metas_P]
    values = np.array([[row.get(name, math.nan) for name in names] for row in rows], dtype=np.float64)
    return values.reshape(len(rows), len(names))


def _differing(names: Sequence[str], values_P_F: NDArray[np.float64]) -> tuple[tuple[str, ...], NDArray[np.float64]]:
    known = np.isfinite(values_P_F)
    counts = np.maximum(known.sum(axis=0), 1)
    means = np.where(known, values_P_F, 0).sum(axis=0) / counts
    filled = np.where(known, values_P_F, means)
    keep = [i for i in range(len(names)) if len(filled) and np.ptp(filled[:, i]) > 0]
    return tuple(names[i] for i in keep), filled[:, keep]


def _numbers(meta: Mapping[str, Any]) -> dict[str, float]:
    found: dict[str, float] = {}
    for name, value in meta.items():
        if name in PROVENANCE:
            continue
        if isinstance(value, list | tuple):
            numbers = [n for item in value if (n := _number(item)) is not None]  # pyright: ignore[reportUnknownVariableType]
            found[f"{name}: how many"] = float(len(value))  # pyright: ignore[reportUnknownArgumentType]
            if numbers:
                found |= {f"{name}: least": min(numbers), f"{name}: most": max(numbers)}
                found[f"{name}: mean"] = math.fsum(numbers) / len(numbers)
        elif (number := _number(value)) is not None:
            found[name] = number
    return found


def _number(value: Any) -> float | None:
    """A finite number, also one that a short text ends with: "Level 5"; None for anything else."""
    if isinstance(value, str):
        match = GRADE.fullmatch(value.strip()) if len(value) < 40 else None
        return float(match[1]) if match else None
    if isinstance(value, int | float) and abs(value) < 1e15 and math.isfinite(value):
        return float(value)
    return None
