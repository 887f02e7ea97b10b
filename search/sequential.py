"""A sequential budget on stored pools: assess and solve are one process (Snell et al. 2024, section 8, second item).

Every question begins with a predicted rate of success (`search.belief`); each sample is judged by its verifier's score,
or without a verifier by agreement, and one more is drawn while it is worth its price. Correctness is never looked at.
The strategy `adaptive_budget` does the same for real.

Axis legend: _P problems, _R rows (problem x order), _K samples drawn so far.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from search.errors import DataError
from search.evaluate import Pool
from search.replay import NEVER, Replay, Run, Stopped, Vote, spend_table, stopped
from search.stats import Floats
from search.strategies.sequential import Sequential

Answer = Literal["highest", "weighted", "majority"]


@dataclass(frozen=True, slots=True)
class WorthMore:
    """Samples while the next one is worth its price, as `Sequential` decides. `answer` says who is given; "majority"
    also that there is no verifier: the doubt then comes from agreement."""

    beliefs: Mapping[str, Sequential]  # by problem key, before any sample
    least: int = 1  # samples drawn without asking; 0 may abstain
    batch: int = 1
    answer: Answer = "highest"
    label: str = "adaptive_budget"

    @property
    def name(self) -> str:
        return self.label

    @property
    def scored(self) -> bool:
        return self.answer != "majority"

    def _votes(self, replay: Replay) -> Vote:
        match self.answer:
            case "highest":
                return replay.highest
            case "weighted":
                return replay.weighted
            case "majority":
                return replay.majority

    def run(self, replay: Replay) -> Run:
        beliefs = [self.beliefs[pool.key] for pool in replay.pools]
        fields = [(s.prior_a, s.prior_b, s.base, s.price * s.cost_per_sample) for s in beliefs]
        a, b, base, least_gain = (replay.by_row(np.array(column))[:, None] for column in zip(*fields, strict=True))
        votes = self._votes(replay)
        left = _left_by(np.clip(replay.highest.top, 0, 1), a, b, base) if self.scored else 1 - votes.certainty()
        doubt_R_K = np.concatenate([np.ones((len(left), 1)), left], axis=1)
        num = np.arange(doubt_R_K.shape[1])
        stops = doubt_R_K * a / (a + b + num) < least_gain
        stops &= (num >= self.least) & ((num - self.least) % self.batch == 0)
        return Run(np.where(stops.any(axis=1), stops.argmax(axis=1), NEVER), votes.right)


def _left_by(scores_R_K: Floats, a: Floats, b: Floats, base: Floats) -> Floats:
    """`Sequential.left_by` of many."""
    right, wrong = scores_R_K * a * (1 - base), (1 - scores_R_K) * b * base
    known = (base > 0) & (right + wrong > 0)
    return np.where(known, wrong / np.where(known, right + wrong, 1.0), 1 - scores_R_K)


def simulate_sequential(
    pools: Sequence[Pool],
    priors: Mapping[str, tuple[float, float]],
    price: float,
    budgets: Sequence[int],
    *,
    cost_per_sample: Mapping[str, float] | float | None = None,
    base: float = 0.0,
    least: int = 1,
    batch: int = 1,
    answer: Answer = "highest",
    orders: int = 32,
    seed: object = 0,
) -> list[Stopped]:
    """The sequential budget on stored pools, at each cap on the samples: cells, and the samples drawn on average.

    `priors`: key -> (a, b) of the predicted rate (`search.belief.beta_prior`). `price`: what a FLOP must gain.
    `cost_per_sample`: FLOPs of one more sample, by key or for all; by default the pool's own mean. `base`: see
    `Sequential`. Raises DataError for a problem without a prior or cost, and as `search.replay.stopped` does.
    """
    costs = cost_per_sample if isinstance(cost_per_sample, Mapping) else {p.key: cost_per_sample for p in pools}
    if missing := [p.key for p in pools if p.key not in priors or p.key not in costs]:
        raise DataError(f"{len(missing)} problems have no prior or no cost, the first is '{missing[0]}'")
    beliefs = {
        p.key: Sequential(
            *priors[p.key], price, mean_cost(p, scored=answer != "majority") if cost is None else cost, base
        )
        for p in pools
        for cost in [costs[p.key]]
    }
    rule = WorthMore(beliefs, least, batch, answer, f"adaptive_budget(price={price:g})")
    return stopped(pools, [rule], budgets, orders=orders, seed=seed)[0]


def mean_cost(pool: Pool, *, scored: bool) -> float:
    """Ideal FLOPs that one more of the pool's samples costs on average, after the first; 0 for an empty pool."""
    size = len(pool.correct_N)
    table = spend_table(pool, size, scored=scored)[0]
    return float(table[size] - table[1]) / (size - 1) if size > 1 else float(table[-1])
