"""Rules that stop drawing samples early, replayed on stored pools: the baselines that a compute-optimal choice has to
beat. All look at the answers and scores drawn so far, never at correctness. Our own is in `search.sequential`.

| rule | stops when | gives |
|---|---|---|
| `EarlyStopping` | a whole window of answers agrees (Li et al. 2024, ESC, arXiv 2401.10480) | majority |
| `AdaptiveMajority` | the leader is ahead for good (Aggarwal et al. 2023, arXiv 2305.11860) | majority |
| `OptScale` | enough samples for the score aimed at (Wang et al. 2026, arXiv 2506.22376) | highest score |
| `EarlyBestOfN` | a score passes a threshold | highest score |
| `EarlyWeighted`, `AdaptiveWeighted` | the leader's share of the weight, or its lead, suffices | weighted vote |

Axis legend: _P problems, _R rows (problem x order), _K samples drawn so far, from 1.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from search.cells import Cell
from search.errors import ConfigError, DataError
from search.evaluate import Pool
from search.replay import NEVER, Replay, Run, StopRule, Vote, first_stop, stopped, vote
from search.stats import Floats, paired_difference


def stopped_cells(
    pools: Sequence[Pool], rule: StopRule, budgets: Sequence[int], *, orders: int = 32, seed: object = 0
) -> list[Cell]:
    """The rule's cells, one a budget (the most samples it may draw), as `search.cells.pool_cells` gives them.

    Means over `orders` random orders of each pool. FLOPs are those of the samples drawn, the prompt once, and the
    verifier where the rule asks it. Raises DataError as `search.replay.stopped` does.
    """
    return many_stopped_cells(pools, [rule], budgets, orders=orders, seed=seed)


def many_stopped_cells(
    pools: Sequence[Pool], rules: Sequence[StopRule], budgets: Sequence[int], *, orders: int = 32, seed: object = 0
) -> list[Cell]:
    """`stopped_cells` of several rules, one rule after another; what they share is computed once."""
    found = stopped(pools, rules, budgets, orders=orders, seed=seed)
    return [one.cell for by_budget in found for one in by_budget]


def fitted(pools: Sequence[Pool], rules: Sequence[StopRule], budget: int, *, seed: object = 0) -> StopRule:
    """The rule to use on other problems, of several that differ in a threshold: the cheapest of those that are not
    worse than the most accurate by more than one standard error (paired), as `search.thresholds` fits its own.

    Raises DataError for no rules.
    """
    if not rules:
        raise DataError("no rules to choose from: give at least one")
    cells = many_stopped_cells(pools, rules, [budget], seed=seed)
    best = max(cells, key=lambda cell: (cell.solved_P.mean(), -cell.flops_P.mean()))
    lost = [paired_difference(cell.solved_P, best.solved_P) for cell in cells]
    fair = [i for i, d in enumerate(lost) if d.mean <= (d.se if math.isfinite(d.se) else 0.0)]
    return rules[min(fair, key=lambda i: cells[i].flops_P.mean())]


# ---------------------------------------------------------------- by agreement


@dataclass(frozen=True, slots=True)
class EarlyStopping:
    """Early-stopping self-consistency: windows of samples, until all answers of one are the same; then, or at the end
    of the budget, the vote of all that were drawn. A window with a sample without an answer does not agree."""

    window: int = 4
    scored = False

    def __post_init__(self) -> None:
        _refuse(self.window >= 2, f"a window of {self.window} always agrees: give at least 2")

    @property
    def name(self) -> str:
        return f"early_stopping(window={self.window})"

    def run(self, replay: Replay) -> Run:
        answers, num = replay.answers_R_K, replay.answers_R_K.shape[1]
        agree = np.zeros(answers.shape, dtype=np.bool_)
        for end in range(self.window, num + 1, self.window):
            window = answers[:, end - self.window : end]
            agree[:, end - 1] = (window == window[:, :1]).all(axis=1) & (window[:, 0] != replay.none)
        return Run(first_stop(agree), replay.majority.right)


@dataclass(frozen=True, slots=True)
class AdaptiveMajority:
    """Adaptive consistency: until the leading answer is ahead of the second with a posterior probability (Beta) of
    `certainty`. The same as the strategy `adaptive_majority`, which looks after every second sample."""

    certainty: float = 0.95
    batch: int = 2
    scored = False

    def __post_init__(self) -> None:
        _refuse(self.batch >= 1, f"a batch of {self.batch} samples: give at least 1")

    @property
    def name(self) -> str:
        return _named("adaptive_majority", certainty=(self.certainty, 0.95), batch=(self.batch, 2))

    def run(self, replay: Replay) -> Run:
        votes = replay.majority
        return Run(first_stop(votes.certainty() >= self.certainty, self.batch), votes.right)


# ---------------------------------------------------------------- by score


@dataclass(frozen=True, slots=True)
class EarlyBestOfN:
    """Best-of-N until a score reaches `threshold`: fit it on other problems (`fitted`)."""

    threshold: float = 0.9
    batch: int = 1
    scored = True

    def __post_init__(self) -> None:
        _refuse(self.batch >= 1, f"a batch of {self.batch} samples: give at least 1")

    @property
    def name(self) -> str:
        return f"early_best_of_n({self.threshold:g}{'' if self.batch == 1 else f', batch={self.batch}'})"

    def run(self, replay: Replay) -> Run:
        best = replay.highest
        seen = np.maximum.accumulate(~np.isnan(replay.scores_R_K), axis=1)
        return Run(first_stop(seen & (best.top >= self.threshold), self.batch), best.right)


@dataclass(frozen=True, slots=True)
class EarlyWeighted:
    """Best-of-N weighted until the leading answer has `share` of all weight, after `least` samples at the earliest."""

    share: float = 0.9
    least: int = 3
    power: float = 1.0  # of the scores: 4 sharpens
    scored = True

    def __post_init__(self) -> None:
        _refuse(self.least >= 1, f"a first look after {self.least} samples: give at least 1")

    @property
    def name(self) -> str:
        return (
            f"early_weighted({', '.join([f'{self.share:g}', *_options(least=(self.least, 3), power=(self.power, 1))])})"
        )

    def run(self, replay: Replay) -> Run:
        votes = _weighted(replay, self.power)
        stops = (votes.total > 0) & (votes.top >= self.share * votes.total)
        stops[:, : self.least - 1] = False
        return Run(first_stop(stops), votes.right)


@dataclass(frozen=True, slots=True)
class AdaptiveWeighted:
    """Best-of-N weighted until the leader cannot be overtaken any more with probability `certainty`: the posterior of
    adaptive consistency, with weights in the place of votes."""

    certainty: float = 0.95
    power: float = 1.0
    scored = True

    @property
    def name(self) -> str:
        return _named("adaptive_weighted", certainty=(self.certainty, 0.95), power=(self.power, 1.0))

    def run(self, replay: Replay) -> Run:
        from scipy.special import betainc

        votes = _weighted(replay, self.power)
        drawn, live = np.full(len(votes.top), NEVER), np.arange(len(votes.top))
        for k in range(votes.top.shape[1]):
            # P(p > 1/2) for Beta(top + 1, second + 1)
            certain = betainc(votes.second[live, k] + 1, votes.top[live, k] + 1, 0.5) >= self.certainty
            certain &= votes.total[live, k] > 0
            drawn[live[certain]] = k + 1
            live = live[~certain]
        return Run(drawn, votes.right)


@dataclass(frozen=True, slots=True)
class OptScale:
    """OptScale: as many samples as make the best score reach `target` with probability `confidence`.

    Scores are taken for independent draws from a normal distribution truncated to 0..1, with cdf F. The best of N is
    below the target with probability F(target)^N, so the least N is log(1 - confidence) / log F(target). F is fitted
    to the first `peek` scores: by maximum likelihood (OptScale^0), or from `prior` = (mu, sigma), each with a normal
    prior of standard deviation 0.1 (OptScale^t). Where no N within the budget does, all of it is drawn.

    Simplified: fitted once, as in the authors' code, over a grid of (mu, sigma) instead of by L-BFGS; the prior is
    one for all questions where theirs comes from a fine-tuned model; a sample without an answer scores 0.
    """

    target: float = 0.95
    confidence: float = 0.95
    peek: int = 3
    prior: tuple[float, float] | None = None
    scored = True

    def __post_init__(self) -> None:
        inside = 0 < self.target < 1 and 0 < self.confidence < 1
        _refuse(inside, f"target = {self.target:g}, confidence = {self.confidence:g}: give both between 0 and 1")
        _refuse(self.peek >= 1, f"a peek at {self.peek} samples: give at least 1")

    @property
    def name(self) -> str:
        prior = "" if self.prior is None else f", prior={self.prior[0]:g}/{self.prior[1]:g}"
        peek = "" if self.peek == 3 else f", peek={self.peek}"
        return f"optscale(target={self.target:g}, confidence={self.confidence:g}{peek}{prior})"

    def run(self, replay: Replay) -> Run:
        scores = np.clip(np.nan_to_num(replay.scores_R_K[:, : self.peek]), 0.0, 1.0)
        below = truncated_normal_below(scores, self.target, self.prior)
        needed = np.ceil(np.log1p(-self.confidence) / np.minimum(np.log(np.maximum(below, 1e-300)), -1e-12))
        drawn = np.where(needed > replay.scores_R_K.shape[1], NEVER, np.maximum(needed, self.peek).astype(np.int64))
        return Run(drawn, replay.highest.right)


def truncated_normal_below(scores_R_K: Floats, target: float, prior: tuple[float, float] | None = None) -> Floats:
    """F(target) of the normal distribution truncated to 0..1 that fits each row of scores best; shape [R]."""
    from scipy.special import ndtr

    mu, sigma = (g.ravel() for g in np.meshgrid(np.linspace(-1, 2, 61), np.geomspace(0.005, 1, 16)))

    def between(low: float, high: float) -> Floats:
        sign = np.where(mu < 0.5, -1.0, 1.0)  # on the side where differences of small numbers are exact
        return sign * (ndtr(sign * (high - mu) / sigma) - ndtr(sign * (low - mu) / sigma))

    whole = between(0.0, 1.0)
    possible = whole > 1e-200
    mu, sigma, whole, below = (g[possible] for g in (mu, sigma, whole, between(0.0, target)))
    num = scores_R_K.shape[1]
    moments = np.stack([np.ones(len(scores_R_K)), scores_R_K.sum(axis=1), (scores_R_K**2).sum(axis=1)], axis=1)
    terms = np.stack([-num * (mu**2 / (2 * sigma**2) + np.log(sigma * whole)), mu / sigma**2, -0.5 / sigma**2])
    if prior is not None:
        terms[0] -= ((mu - prior[0]) ** 2 + (sigma - prior[1]) ** 2) / (2 * 0.1**2)
    return (below / whole)[(moments @ terms).argmax(axis=1)]


# ---------------------------------------------------------------- shared


def _weighted(replay: Replay, power: float) -> Vote:
    return replay.weighted if power == 1 else vote(replay, np.maximum(replay.scores_R_K, 0.0) ** power)


def _options(**options: tuple[float, float]) -> list[str]:
    """Of name=(value, default), those that are not the default."""
    return [f"{name}={value:g}" for name, (value, default) in options.items() if value != default]


def _named(name: str, **options: tuple[float, float]) -> str:
    given = ", ".join(_options(**options))
    return f"{name}({given})" if given else name


def _refuse(fine: bool, message: str) -> None:
    if not fine:
        raise ConfigError(message)
