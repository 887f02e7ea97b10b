"""How step scores become an answer's score, and what a score is worth: chosen and fitted on held-out questions.

The aggregation is the one whose answer scores tell right from wrong answers of the same question best (mean AUC over
questions with both); where several do about as well, the simplest. The calibration is Platt's (1999): a score is
sigmoid(scale x logit + shift), with the two numbers that make the answer's score the likeliest probability of being
right. Left out: a calibration for each depth.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F

from distill.prm_data import IGNORED, Row
from search import stats
from search.types import Aggregation
from search.verifiers.health_measures import members

Wanted = Literal["choose", "last", "min", "prod", "mean"]

SIMPLEST_FIRST: tuple[Aggregation, ...] = ("last", "min", "prod", "mean")
TIE = 0.005  # of AUC
MIN_ANSWERS = 20  # fewer tell nothing
PRIOR = 1.0  # the calibration is drawn to none as by this many observations: data that separate perfectly have no best


@dataclass(frozen=True, slots=True)
class Fitted:
    """What validation says. The figures are None where it holds no question with right and wrong answers."""

    aggregation: Aggregation
    scale: float
    shift: float
    answer_auc_within: Mapping[str, float]  # of each aggregation
    answer_auc: float | None  # pooled over questions
    answer_brier: float | None
    step_auc: float | None  # pooled over labelled steps, right where the label is above one half


def fit(rows: Sequence[Row], logits: Sequence[Sequence[float]], wanted: Wanted, *, process: bool) -> Fitted:
    """Choose the aggregation (`wanted` = "choose", or the one to use) and calibrate it on rows with these logits."""
    answers = [i for i, row in enumerate(rows) if row.right is not None]
    keys = [rows[i].key for i in answers]
    right = np.array([rows[i].right for i in answers], dtype=float)
    padded, there = _padded([logits[i] for i in answers])
    enough = len(answers) >= MIN_ANSWERS and 0 < (right > 0.5).mean() < 1
    names = SIMPLEST_FIRST if process else SIMPLEST_FIRST[:1]
    raw = _answer_scores(names, padded, there) if answers else {}
    within = {name: auc_within(keys, right > 0.5, scores) for name, scores in raw.items()}
    found = {name: value for name, value in within.items() if value is not None}
    chosen: Aggregation = "last" if not process else wanted if wanted != "choose" else _best(found)
    scale, shift = 1.0, 0.0
    if enough:
        weights = torch.tensor([rows[i].copies for i in answers], dtype=torch.float64)
        scale, shift = _platt(chosen, padded, there, torch.tensor(right), weights)
    scores = AGGREGATE[chosen](scale * padded + shift, there).exp().numpy() if answers else np.zeros(0)
    return Fitted(
        aggregation=chosen,
        scale=scale,
        shift=shift,
        answer_auc_within=found,
        answer_auc=auc(right > 0.5, scores) if answers else None,
        answer_brier=float(np.mean((scores - right) ** 2)) if answers else None,
        step_auc=_step_auc(rows, logits) if process else None,
    )


def auc(right: np.ndarray, scores: np.ndarray) -> float | None:
    """The chance that a right one scores above a wrong one, ties half; None without both."""
    found = stats.auroc(scores, right)
    return None if math.isnan(found) else found


def auc_within(keys: Sequence[str], right: np.ndarray, scores: np.ndarray) -> float | None:
    """The mean AUC over the questions that have right and wrong answers; None where there is none."""
    found = [auc(right[some], scores[some]) for some in members(keys).values()]
    known = [value for value in found if value is not None]
    return float(np.mean(known)) if known else None


# ---------------------------------------------------------------- aggregation, in log space

Aggregate = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def _last(logits: torch.Tensor, there: torch.Tensor) -> torch.Tensor:
    return F.logsigmoid(logits.gather(1, there.sum(1, keepdim=True) - 1)[:, 0])


def _min(logits: torch.Tensor, there: torch.Tensor) -> torch.Tensor:
    return F.logsigmoid(logits.masked_fill(~there, torch.inf).amin(1))


def _prod(logits: torch.Tensor, there: torch.Tensor) -> torch.Tensor:
    return (F.logsigmoid(logits) * there).sum(1)


def _mean(logits: torch.Tensor, there: torch.Tensor) -> torch.Tensor:
    return ((torch.sigmoid(logits) * there).sum(1) / there.sum(1)).log()


AGGREGATE: Mapping[Aggregation, Aggregate] = {"last": _last, "min": _min, "prod": _prod, "mean": _mean}


def _padded(logits: Sequence[Sequence[float]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits [N, S] and which of them exist."""
    width = max(map(len, logits), default=1)
    values = torch.tensor([[*row, *[0.0] * (width - len(row))] for row in logits], dtype=torch.float64)
    there = torch.tensor([[s < len(row) for s in range(width)] for row in logits])
    return values.reshape(-1, width), there.reshape(-1, width)


def _answer_scores(names: Sequence[Aggregation], logits: torch.Tensor, there: torch.Tensor) -> dict[str, np.ndarray]:
    return {name: AGGREGATE[name](logits, there).exp().numpy() for name in names}


def _best(found: Mapping[str, float]) -> Aggregation:
    """The simplest of those that are about as good as the best; the last step's where nothing is known."""
    best = max(found.values(), default=0.0)
    for name in SIMPLEST_FIRST:
        if found.get(name, 0.0) >= best - TIE:
            return name
    return SIMPLEST_FIRST[0]


def _platt(
    name: Aggregation, logits: torch.Tensor, there: torch.Tensor, right: torch.Tensor, weights: torch.Tensor
) -> tuple[float, float]:
    """(scale, shift) of the likeliest calibration of the aggregated score."""
    log_scale = torch.zeros((), dtype=torch.float64, requires_grad=True)
    shift = torch.zeros((), dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([log_scale, shift], max_iter=100, line_search_fn="strong_wolfe")

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        log_p = AGGREGATE[name](log_scale.exp() * logits + shift, there).clamp(max=-1e-12)
        nats = -(right * log_p + (1 - right) * torch.log(-torch.expm1(log_p)))
        loss = (nats * weights).sum() + PRIOR * (log_scale**2 + shift**2) / 2
        loss.backward()
        return loss

    optimizer.step(closure)  # pyright: ignore[reportArgumentType]
    return float(log_scale.detach().exp()), float(shift.detach())


def _step_auc(rows: Sequence[Row], logits: Sequence[Sequence[float]]) -> float | None:
    pairs = [
        (target > 0.5, logit)
        for row, values in zip(rows, logits, strict=True)
        for target, logit in zip(row.targets[:-1], values, strict=True)
        if target != IGNORED
    ]
    if not pairs:
        return None
    return auc(np.array([right for right, _ in pairs]), np.array([logit for _, logit in pairs]))
