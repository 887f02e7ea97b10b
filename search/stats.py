"""Statistics for comparing models on one set of problems: unbiased best-of-k figures, paired tests, rank measures.

pass@k is the estimator of Chen et al. 2021 (arXiv 2107.03374); standard errors, clustered and paired, follow Miller
2024 (arXiv 2411.00640); the lower bound of a paired difference is Bonett and Price 2012 (JEBS 37).
Every best-of-k figure is an expectation over the k-subsets of one stored pool of n >= k independent samples: exact
for pass@k, maj@k and the best by score, over counter-based random subsets for the weighted vote.

Axis legend: _P problems, _N samples of one problem, _D random subsets. Left out: sequential tests other than alpha
spending, and any model with random effects.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
from numpy.typing import ArrayLike, NDArray

from search.randomness import key64

Floats = NDArray[np.float64]
NUM_SUBSETS = 400  # random subsets a problem for the weighted vote; 500 problems then add under 0.1 points of noise
_EXACT_SUBSETS = 500  # enumerate when there are at most this many subsets
_EXACT_POOL = 900  # above, binomials of the pool size leave the range of a double


@dataclass(frozen=True, slots=True)
class Estimate:
    """A mean over problems with its standard error. Example: Estimate(0.231, 0.0094, 2000)"""

    value: float
    se: float
    n: int


@dataclass(frozen=True, slots=True)
class PairedDifference:
    """Mean of b - a over the same problems, with a two-sided interval."""

    mean: float
    se: float
    low: float
    high: float
    n: int


# ---------------------------------------------------------------- means and their errors


def mean_estimate(values_P: ArrayLike, clusters_P: Sequence[Hashable] | None = None) -> Estimate:
    """Mean and CLT standard error; clustered where problems come in groups. n = 0 gives nan, n = 1 an infinite se."""
    values = np.asarray(values_P, dtype=np.float64)
    n = values.size
    if n == 0:
        return Estimate(math.nan, math.nan, 0)
    mean = float(values.mean())
    if clusters_P is None:
        se = float(values.std(ddof=1)) / math.sqrt(n) if n > 1 else math.inf
        return Estimate(mean, se, n)
    if len(clusters_P) != n:
        raise ValueError(f"{len(clusters_P)} clusters for {n} values")
    index = {name: i for i, name in enumerate(dict.fromkeys(clusters_P))}
    sums = np.bincount([index[name] for name in clusters_P], weights=values - mean)
    num = len(index)
    se = math.sqrt(float(sums @ sums) * num / (num - 1)) / n if num > 1 else math.inf
    return Estimate(mean, se, n)


def paired_difference(a_P: ArrayLike, b_P: ArrayLike, *, confidence: float = 0.95) -> PairedDifference:
    """Mean of b - a per problem with its t interval. Raises ValueError on unequal or empty input."""
    a, b = _paired(a_P, b_P)
    found = mean_estimate(b - a)
    half = t_quantile(0.5 + confidence / 2, found.n - 1) * found.se if found.n > 1 else math.inf
    return PairedDifference(found.value, found.se, found.value - half, found.value + half, found.n)


def paired_lower_bound(a_P: ArrayLike, b_P: ArrayLike, *, confidence: float = 0.95) -> float:
    """Lower one-sided bound of the mean of b - a, for values in [0, 1].

    Bonett and Price: a won and a lost pseudo-problem are added, so that a few problems without any difference do not
    pass for certainty. n problems without a difference give -z sqrt(2) / (n + 2): 115 problems are the fewest that
    can rule out a loss of 2 points.
    """
    a, b = _paired(a_P, b_P)
    difference, n = b - a, len(a) + 2
    mean = float(difference.sum()) / n
    variance = (float(difference @ difference) + 2) / n - mean**2
    return mean - normal_quantile(confidence) * math.sqrt(variance / n)


def minimum_detectable_effect(sd: float, n: int, *, alpha: float = 0.05, sides: int = 1, power: float = 0.8) -> float:
    """The true mean difference that a test of n pairs finds with the given power.

    `sd` is that of the paired difference: for one answer each, the root of the discordant share.
    Example: sqrt(.2), n = 500, two-sided 5 % gives .056.
    """
    if n < 1:
        return math.inf
    return (normal_quantile(1 - alpha / sides) + normal_quantile(power)) * sd / math.sqrt(n)


def normal_quantile(q: float) -> float:
    return NormalDist().inv_cdf(q)


def t_quantile(q: float, degrees: int) -> float:
    """Student's quantile; the normal one from 300 degrees on (they differ by less than 0.4 %)."""
    if degrees >= 300:
        return normal_quantile(q)
    from scipy.special import stdtrit

    return float(stdtrit(degrees, q))


def t_upper_p(t: float, degrees: int) -> float:
    """P(T >= t) for Student's T; the normal tail from 300 degrees on."""
    if degrees >= 300 or math.isinf(t):
        return 0.5 * math.erfc(t / math.sqrt(2))
    from scipy.special import stdtr

    return float(stdtr(degrees, -t))


def _paired(a_P: ArrayLike, b_P: ArrayLike) -> tuple[Floats, Floats]:
    a, b = np.asarray(a_P, dtype=np.float64), np.asarray(b_P, dtype=np.float64)
    if a.shape != b.shape or a.ndim != 1 or not a.size:
        raise ValueError(f"paired values need equal, non-empty lists, not {a.shape} and {b.shape}")
    return a, b


# ---------------------------------------------------------------- tests


def mcnemar_p(losses: int, wins: int, *, mid: bool = False) -> float:
    """Exact one-sided McNemar: P(at least `wins` of losses + wins fall on the winning side by chance).

    `mid` counts the observed number half: less conservative, no longer exact.
    """
    if losses < 0 or wins < 0:
        raise ValueError(f"counts cannot be negative: {losses}, {wins}")
    total = losses + wins
    term = math.comb(total, wins)
    tail = -term if mid else 0  # in halves of an outcome, so that everything stays an integer
    for i in range(wins, total + 1):
        tail += 2 * term
        term = term * (total - i) // (i + 1)
    return tail / 2 ** (total + 1)


def alpha_at_look(alpha: float, look: int) -> float:
    """What the j-th look may spend: alpha / (j (j + 1)). All looks together spend alpha."""
    if look < 1:
        raise ValueError(f"looks count from 1, not {look}")
    return alpha / (look * (look + 1))


def bootstrap(
    num: int,
    statistic: Callable[[NDArray[np.intp]], float],
    *,
    seed: object,
    draws: int = 1000,
    confidence: float = 0.9,
) -> tuple[float, float]:
    """Percentile interval of `statistic(indices)` over resampled problems. Each draw has its own counter."""
    values = np.empty(draws)
    for draw in range(draws):
        values[draw] = statistic(_generator("bootstrap", seed, draw).integers(0, num, num))
    tail = (1 - confidence) / 2
    low, high = np.quantile(values, [tail, 1 - tail])
    return float(low), float(high)


def _generator(*parts: object) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(key64(*parts)))


# ---------------------------------------------------------------- best of k from one pool


def pass_at_k(num: int, num_correct: int, k: int) -> float:
    """Chance that k of `num` samples, drawn without replacement, hold a correct one. Raises ValueError if k > num."""
    _check_k(num, k)
    if not 0 <= num_correct <= num:
        raise ValueError(f"{num_correct} correct of {num} samples")
    return _holds_one(num, num_correct, k)


@functools.lru_cache(maxsize=65_536)
def _holds_one(num: int, num_correct: int, k: int) -> float:
    if num - num_correct < k:
        return 1.0
    return 1.0 - math.prod(1 - k / i for i in range(num - num_correct + 1, num + 1))


def distinct_at_k(num: int, copies: Sequence[int], ks: Sequence[int], most: int) -> list[float]:
    """How many different texts are expected among k drawn samples, for each k, none counted beyond `most`.

    `copies`: how often each text is among the `num` samples; all others count for nothing. Exact; above 900 samples
    what is expected is cut at `most` instead, which is a little more.
    """
    for k in ks:
        _check_k(num, k)
    expected = [math.fsum(pass_at_k(num, n, k) for n in copies) for k in ks]
    if len(copies) <= most or num > _EXACT_POOL:
        return [min(float(most), one) for one in expected]
    degree = max(ks)
    ways = np.zeros((most, degree + 1))  # [d, j]: ways for j samples to hold d of the texts
    ways[0] = [math.comb(num - sum(copies), j) for j in range(degree + 1)]
    for size in copies:
        before = ways.copy()
        for j in range(1, min(size, degree) + 1):
            ways[1:, j:] += math.comb(size, j) * before[:-1, : degree + 1 - j]
    short = np.arange(most, 0, -1) @ ways  # how many each misses of `most`
    return [most - float(short[k]) / math.comb(num, k) for k in ks]


def seen_at_k(num: int, copies: ArrayLike, weights: ArrayLike, ks: ArrayLike) -> Floats:
    """The share of all weight that is expected among k drawn samples, for each k; exact.

    `copies`: how many of the `num` samples hold each thing, `weights`: what it counts; both of one shape.
    """
    copies, weights = np.asarray(copies, dtype=np.intp), np.asarray(weights, dtype=np.float64)
    by_copies = np.bincount(copies, weights=weights, minlength=1)
    some = np.flatnonzero(by_copies)
    drawn = np.arange(num)
    missed = np.cumprod(np.maximum(num - some[:, None] - drawn, 0) / (num - drawn), axis=1)
    missed = np.concatenate([np.ones((len(some), 1)), missed], axis=1)[:, np.asarray(ks, dtype=np.intp)]
    return 1 - by_copies[some] @ missed / by_copies.sum()


def best_at_k(correct_N: Sequence[float], scores_N: Sequence[float | None], ks: Sequence[int]) -> list[float]:
    """Chance that the highest score among k drawn samples is a correct one, for each k; exact, ties broken at random.

    Of other values than True and False: what the chosen one's is on average, 0 counted where none can be chosen.

    A sample without a score (None or nan: no answer) keeps its place among the k but is never chosen.
    """
    num = len(correct_N)
    groups: dict[float, list[float]] = {}
    for correct, score in zip(correct_N, scores_N, strict=True):
        if score is not None and not math.isnan(score):
            groups.setdefault(score, []).append(correct)
    ranked = [(len(groups[score]), sum(groups[score]) / len(groups[score])) for score in sorted(groups, reverse=True)]
    chances: list[float] = []
    for k in ks:
        _check_k(num, k)
        subsets, left, chance = _subsets(num, k), num, 0.0
        for size, mean in ranked:
            highest_here = subsets[left] - subsets[left - size]
            chance += highest_here / subsets[num] * mean
            left -= size
        chances.append(chance)
    return chances


@functools.lru_cache(maxsize=256)
def _subsets(num: int, k: int) -> tuple[int, ...]:
    """How many subsets of k samples there are of n samples, for n = 0..num."""
    return tuple(math.comb(n, k) for n in range(num + 1))


def majority_at_k(correct_N: Sequence[bool], answers_N: Sequence[str | None], ks: Sequence[int]) -> list[float]:
    """Chance that the most frequent answer of k drawn samples is right, for each k; ties are broken at random.

    Exact: for v votes of a right answer, the other answers' votes follow a product of truncated binomial polynomials,
    and a tie of T others counts 1/(T + 1), the integral of t^T, taken by a quadrature that is exact for its degree.
    Samples without an answer (None) never vote but keep their place among the k. Pools above 900 samples use random
    subsets.
    """
    num = len(correct_N)
    for k in ks:
        _check_k(num, k)
    if num > _EXACT_POOL:
        return weighted_at_k(correct_N, answers_N, [1.0] * num, ks, seed="majority")
    sizes: Counter[str] = Counter(a for a in answers_N if a is not None)
    right: Counter[str] = Counter(a for a, c in zip(answers_N, correct_N, strict=True) if a is not None and c)
    # answers of one size are exchangeable: sum their chances of being right
    right_by_size: dict[int, float] = {}
    for answer, count in right.items():
        right_by_size[sizes[answer]] = right_by_size.get(sizes[answer], 0.0) + count / sizes[answer]
    chances = np.zeros(max(ks) + 1)
    for size, weight in right_by_size.items():
        others = sorted(sizes.values())
        others.remove(size)
        for votes in range(1, min(size, max(ks)) + 1):
            rest = _rest_of_vote(others, num - sum(sizes.values()), votes, max(ks) - votes)
            chances[votes:] += weight * math.comb(size, votes) * rest
    return [float(min(chances[k] / math.comb(num, k), 1.0)) for k in ks]


def _rest_of_vote(others: Sequence[int], num_silent: int, votes: int, degree: int) -> Floats:
    """Ways for j other samples (j = 0..degree) to leave an answer with `votes` votes ahead, ties shared; shape [j]."""
    rivals = [size for size in others if size >= votes]
    free = num_silent + sum(size for size in others if size < votes)  # cannot reach `votes`: no restriction
    max_ties = min(len(rivals), degree // votes)
    t, weights = _quadrature(max_ties // 2 + 1)
    ways = np.tile(_subsets_of(free, degree), (len(t), 1))
    for size in rivals:
        product = ways.copy()
        for j in range(1, min(votes, degree) + 1):
            factor = math.comb(size, j) * (t[:, None] if j == votes else 1.0)
            product[:, j:] += factor * ways[:, : degree + 1 - j]
        ways = product
    return weights @ ways


@functools.lru_cache(maxsize=4096)
def _subsets_of(num: int, most: int) -> Floats:
    """How many subsets of k of n samples there are, for k = 0..most."""
    return np.array([math.comb(num, k) for k in range(most + 1)], dtype=np.float64)


@functools.cache
def _quadrature(num: int) -> tuple[Floats, Floats]:
    """Nodes and weights of Gauss and Legendre on 0..1."""
    nodes, weights = np.polynomial.legendre.leggauss(num)
    return (nodes + 1) / 2, weights / 2


def weighted_at_k(
    correct_N: Sequence[float],
    answers_N: Sequence[str | None],
    weights_N: Sequence[float | None],
    ks: Sequence[int],
    *,
    seed: object,
) -> list[float]:
    """Chance that the answer with the largest sum of weights among k drawn samples is right, for each k.

    Of other values than True and False: the mean of the winning answer's samples, 0 counted where nobody votes.
    Ties are shared. Exact where there are few subsets (always for k = 1 and k = n), else over 400 subsets whose
    prefixes are nested between the ks. A sample without answer or weight never votes but keeps its place.
    """
    num = len(correct_N)
    order = {a: i for i, a in enumerate(dict.fromkeys(a for a in answers_N if a is not None))}
    weight = np.array([math.nan if w is None else w for w in weights_N], dtype=np.float64)
    column = np.array([order[a] if a is not None else -1 for a in answers_N], dtype=np.intp)
    column[np.isnan(weight)] = -1
    weight = np.where(column < 0, 0.0, weight)
    right = np.zeros(len(order) + 1)  # the last column collects the silent and never wins
    for answer, i in order.items():
        votes = [c for a, c, j in zip(answers_N, correct_N, column, strict=True) if a == answer and j >= 0]
        right[i] = sum(votes) / len(votes) if votes else 0.0
    permutations_D_N: NDArray[np.intp] | None = None
    chances: list[float] = []
    for k in ks:
        _check_k(num, k)
        if math.comb(num, k) <= _EXACT_SUBSETS:
            subsets = np.array(list(itertools.combinations(range(num), k)), dtype=np.intp)
        else:
            if permutations_D_N is None:
                permutations_D_N = _generator("subsets", seed).random((NUM_SUBSETS, num)).argsort(axis=1)
            subsets = permutations_D_N[:, :k]
        chances.append(_vote(subsets, column, weight, right))
    return chances


def _vote(subsets_D_K: NDArray[np.intp], column_N: NDArray[np.intp], weight_N: Floats, right: Floats) -> float:
    num, width = len(subsets_D_K), len(right)
    cells = (np.arange(num)[:, None] * width + column_N[subsets_D_K] % width).ravel()
    sums = np.bincount(cells, weights=weight_N[subsets_D_K].ravel(), minlength=num * width).reshape(num, width)
    voted = np.bincount(cells, minlength=num * width).reshape(num, width) > 0
    voted[:, -1] = False
    sums = np.where(voted, sums, -np.inf)
    best = sums.max(axis=1, keepdims=True)
    # sums of equal weights in another order differ in the last bits: that is a tie
    winners = voted & (sums >= best - 1e-9 * np.maximum(1.0, np.abs(best)))
    share = winners / np.maximum(winners.sum(axis=1, keepdims=True), 1)
    return float((share @ right).mean())


def _check_k(num: int, k: int) -> None:
    if not 1 <= k <= num:
        raise ValueError(f"k = {k} needs a pool of at least {k} samples, not {num}")


# ---------------------------------------------------------------- predictors of a pass rate


def ranks(values_P: ArrayLike) -> Floats:
    """Ranks from 1; ties get their average."""
    values = np.asarray(values_P, dtype=np.float64)
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    ends = np.cumsum(counts)
    return (ends - (counts - 1) / 2)[inverse]


def spearman(a_P: ArrayLike, b_P: ArrayLike) -> float:
    """Rank correlation with ties averaged; 0 where either side is constant."""
    a, b = _paired(a_P, b_P)
    x, y = ranks(a), ranks(b)
    x, y = x - x.mean(), y - y.mean()
    scale = math.sqrt(float(x @ x) * float(y @ y))
    return float(x @ y) / scale if scale else 0.0


def spearman_ceiling(successes_P: ArrayLike, totals_P: ArrayLike, *, seed: object, splits: int = 20) -> float:
    """The Spearman that the true pass rates themselves would reach against labels this noisy.

    Each problem's samples are split into random halves; Spearman-Brown turns the halves' correlation into the
    reliability of the whole label, whose root is the ceiling. Problems with fewer than two samples are left out.
    """
    successes, totals = np.asarray(successes_P, dtype=np.int64), np.asarray(totals_P, dtype=np.int64)
    keep = totals >= 2
    successes, totals = successes[keep], totals[keep]
    if len(totals) < 3:
        return math.nan
    half = totals // 2
    correlations: list[float] = []
    for split in range(splits):
        first = _generator("split-half", seed, split).hypergeometric(successes, totals - successes, half)
        correlations.append(spearman(first / half, (successes - first) / (totals - half)))
    r = float(np.mean(correlations))
    return math.sqrt(2 * r / (1 + r)) if r > 0 else 0.0


def brier(predicted_P: ArrayLike, successes_P: ArrayLike, totals_P: ArrayLike) -> float:
    """Mean over problems of the mean squared distance to their single outcomes (0 or 1)."""
    predicted, rate, _ = _rates(predicted_P, successes_P, totals_P)
    return float(np.mean((predicted - rate) ** 2 + rate * (1 - rate)))


def brier_corrected(predicted_P: ArrayLike, successes_P: ArrayLike, totals_P: ArrayLike) -> float:
    """Unbiased estimate of the mean squared distance to the true pass rates: label noise is subtracted.

    A constant at the mean scores the variance of the pass rates. Needs two samples a problem; others are left out.
    """
    totals = np.asarray(totals_P, dtype=np.float64)
    keep = totals >= 2
    if not keep.any():
        return math.nan
    predicted, rate, n = _rates(np.asarray(predicted_P)[keep], np.asarray(successes_P)[keep], totals[keep])
    return float(np.mean((predicted - rate) ** 2 - rate * (1 - rate) / (n - 1)))


def calibration_error(predicted_P: ArrayLike, rates_P: ArrayLike, *, bins: int = 10) -> float:
    """Expected calibration error over equal-width bins of the prediction, weighted by their problems."""
    predicted, rates = _paired(predicted_P, rates_P)
    index = np.clip((predicted * bins).astype(np.intp), 0, bins - 1)
    return float(np.abs(np.bincount(index, weights=predicted - rates, minlength=bins)).sum() / len(predicted))


def auroc(scores_P: ArrayLike, positive_P: ArrayLike) -> float:
    """Chance that a positive scores above a negative, ties half; nan where one class is empty."""
    positive = np.asarray(positive_P, dtype=bool)
    num_positive, num_negative = int(positive.sum()), int((~positive).sum())
    if not num_positive or not num_negative:
        return math.nan
    total = float(ranks(scores_P)[positive].sum())
    return (total - num_positive * (num_positive + 1) / 2) / (num_positive * num_negative)


def _rates(predicted_P: ArrayLike, successes_P: ArrayLike, totals_P: ArrayLike) -> tuple[Floats, Floats, Floats]:
    predicted = np.asarray(predicted_P, dtype=np.float64)
    successes, totals = _paired(successes_P, totals_P)
    if predicted.shape != totals.shape or (totals < 1).any():
        raise ValueError("every prediction needs a label with at least one sample")
    return predicted, successes / totals, totals


# ---------------------------------------------------------------- quantile bins


def quantile_edges(rates_P: ArrayLike, bins: int = 5) -> tuple[float, ...]:
    """Inner edges of quantile bins, ascending. Ties never straddle an edge: repeated edges merge their bins."""
    rates = np.sort(np.asarray(rates_P, dtype=np.float64))
    if not rates.size:
        return ()
    inner = [float(rates[math.ceil(len(rates) * i / bins) - 1]) for i in range(1, bins)]
    return tuple(e for e in dict.fromkeys(inner) if e < rates[-1])


def assign_bins(rates_P: ArrayLike, edges: Sequence[float]) -> NDArray[np.intp]:
    """The bin of each pass rate, from 1 = easiest to len(edges) + 1 = hardest; a rate on an edge is below it."""
    below = np.searchsorted(np.asarray(edges, dtype=np.float64), np.asarray(rates_P, dtype=np.float64), side="left")
    return len(edges) + 1 - below
