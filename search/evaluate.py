"""Figures from stored results: greedy accuracy, pass@k, maj@k, search@N, each with its standard error.

Everything is recomputed from SearchResult files, read one line at a time; of a problem only its figures are kept. A
truncated, unfinished or answer-less candidate is wrong; an ungraded one counts as not solved, stays in the denominator
and is counted. The pool of a problem is its independent samples; see `search.stats` for the estimators.

Axis legend: _P problems, _N candidates of one problem, _K values of k.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np

from search import stats
from search.answers import Rule
from search.errors import DataError
from search.results import Paths, read_results
from search.stats import Estimate, Floats
from search.types import Candidate, Grade, SearchResult, Spend

RULES = ("pass", "gold", "majority", "best_of_n", "best_of_n_weighted", "sharpened")
SCORED_RULES = ("best_of_n", "best_of_n_weighted", "sharpened")
SHARPENED = 4.0  # power of the score in the sharpened vote
_COUNTS = [f.name for f in fields(Spend)]


@dataclass(frozen=True, slots=True)
class Pool:
    """The independent samples of one problem, reduced to what the figures need.

    Example: Pool("3,5,7>22", (True, False), ("3*5+7", None), (0.9, None), 0, Spend(samples=2))
    """

    key: str
    correct_N: tuple[bool, ...]
    answers_N: tuple[str | None, ...]  # None: truncated or answer-less, never votes
    scores_N: tuple[float | None, ...]
    num_ungraded: int
    spend: Spend
    copies: tuple[int, ...] = ()  # how often each distinct finished text was drawn: a verifier reads each once
    right_copies: tuple[int, ...] = ()  # of these, the right ones
    num_prompt_tokens: int = 0  # computed once, however many samples follow
    failed: str | None = None  # why nothing could be drawn
    unscored: str | None = None  # why the verifier's scores cannot be used
    num_unscored: int = 0  # samples with an answer on which the verifier gave no verdict: no vote by score
    approximate: bool = False
    reads: tuple[tuple[int, int], ...] = ()  # (samples, characters) of each distinct beginning's last step
    num_prompt_characters: float = 0.0  # about, as the samples' tokens are long

    @property
    def scored(self) -> bool:
        """Every sample that has an answer has a score, or the verifier was asked and gave none."""
        answered_N = zip(self.scores_N, self.answers_N, strict=True)
        return sum(s is None for s, a in answered_N if a is not None) <= self.num_unscored


@dataclass(frozen=True, slots=True)
class Outcomes:
    """One answer per problem: whether it was solved, and what that cost."""

    solved: Mapping[str, bool]
    num_ungraded: int
    spend: Spend
    failures: tuple[str, ...] = ()  # the reasons of the problems that failed; they are not solved
    approximate: bool = False  # some engine could not return its token ids

    @property
    def accuracy(self) -> Estimate:
        return stats.mean_estimate(list(self.solved.values()))


@dataclass(frozen=True, slots=True)
class PoolFigures:
    """Figures of a file of pools. `values_P_K[rule]` holds, by problem, the chance of being solved at each k."""

    keys: tuple[str, ...]
    ks: tuple[int, ...]
    values_P_K: Mapping[str, np.ndarray]  # rule -> [P, K] float64
    counts: Mapping[str, tuple[int, int]]  # key -> (correct, samples)
    num_ungraded: int
    spend: Spend  # of all samples
    spends_K: Mapping[bool, tuple[Spend, ...]]  # what k samples of every problem cost, without and with their scores
    failures: tuple[str, ...] = ()  # reasons of the problems of which nothing could be drawn
    unscored: tuple[str, ...] = ()  # reasons of those whose scores cannot be used; not solved by rules that need them
    num_unscored: int = 0  # samples on which the verifier gave no verdict
    approximate: bool = False

    def estimate(self, rule: str, k: int) -> Estimate:
        return stats.mean_estimate(self.values_P_K[rule][:, self.ks.index(k)])

    def by_key(self, rule: str, k: int) -> dict[str, float]:
        column = self.values_P_K[rule][:, self.ks.index(k)]
        return dict(zip(self.keys, map(float, column), strict=True))


@dataclass(frozen=True, slots=True)
class BinAccuracy:
    """Accuracy of the problems whose base pass rate lies in [low, high]; bin 1 is the easiest."""

    bin: int
    low: float
    high: float
    accuracy: Estimate


# ---------------------------------------------------------------- reading


def solved(candidate: Candidate) -> bool:
    """Finished and graded correct."""
    return candidate.complete and candidate.grade is Grade.CORRECT


def ungraded(candidate: Candidate) -> bool:
    """Finished, and the grader failed on it or never saw it. A truncated one is wrong without a grader."""
    return candidate.complete and candidate.grade in (None, Grade.UNGRADED)


def reduce_pool(result: SearchResult, delimiter: str | None = None) -> Pool:
    """Keep what the figures need of one stored pool. A failure that left finished answers is the verifier's.

    `delimiter` of the task's steps: what samples begin with in common, a verifier reads once.
    """
    candidates = result.candidates
    drawn = any(c.ids for c in candidates)
    num_ids = sum(len(c.ids) for c in candidates)
    characters = sum(len(c.text) for c in candidates) / num_ids if num_ids else 0.0
    return Pool(
        key=result.problem.key,
        correct_N=tuple(solved(c) for c in candidates),
        answers_N=tuple(c.answer if c.complete else None for c in candidates),
        scores_N=tuple(c.score if c.complete else None for c in candidates),
        num_ungraded=sum(ungraded(c) for c in candidates),
        spend=result.spend,
        copies=tuple(Counter(c.text for c in candidates if c.complete).values()),
        right_copies=tuple(Counter(c.text for c in candidates if solved(c)).values()),
        reads=_reads([c.text for c in candidates if c.complete], delimiter),
        num_prompt_tokens=len(result.prompt_ids),
        num_prompt_characters=len(result.prompt_ids) * characters,
        failed=None if drawn else result.failed,
        unscored=result.failed if drawn else None,
        num_unscored=sum(c.unscored is not None and c.complete and c.answer is not None for c in candidates),
        approximate=result.approximate,
    )


def _reads(texts: Sequence[str], delimiter: str | None) -> tuple[tuple[int, int], ...]:
    """Every distinct beginning that ends with a step: how many texts have it, and how long its last step is."""
    if delimiter is None:
        return ()
    found: Counter[tuple[str, int]] = Counter()
    for text in texts:
        start = 0
        while start < len(text):
            at = text.find(delimiter, start)
            end = len(text) if at < 0 else at + len(delimiter)
            found[text[:end], end - start] += 1
            start = end
    return tuple((count, length) for (_, length), count in found.items())


def read_outcomes(paths: Paths, rule: Rule | None = None) -> Outcomes:
    """The selected answer of every result: greedy files, or any strategy's. Abstaining is not solving, nor is failing.

    `rule` chooses among the stored candidates anew. Raises DataError for a file that cannot be read, and for a problem
    that comes twice.
    """
    by_key: dict[str, bool] = {}
    failures: list[str] = []
    num_ungraded, spend, approximate = 0, Spend(), False
    for result in read_results(paths):
        _refuse_twice(result.problem.key, by_key)
        approximate |= result.approximate
        index = result.selected if rule is None or result.failed else rule(result.candidates)
        chosen = None if index is None else result.candidates[index]
        by_key[result.problem.key] = chosen is not None and not result.failed and solved(chosen)
        looked_at = result.candidates if chosen is None else (chosen,)  # an ungraded answer may not be selectable
        num_ungraded += not by_key[result.problem.key] and any(map(ungraded, looked_at))
        failures += [result.failed] if result.failed else []
        spend += result.spend
    return Outcomes(by_key, num_ungraded, spend, tuple(failures), approximate)


def _refuse_twice(key: str, seen: Mapping[str, object]) -> None:
    if key in seen:
        raise DataError(f"problem '{key}' comes twice; each problem is one line, with all its samples")


# ---------------------------------------------------------------- figures of a pool


def values_at(pool: Pool, rule: str, ks: Sequence[int], *, seed: object = 0) -> list[float]:
    """The chance that `rule` solves this problem with k of its samples, for each k.

    pass, gold: any of the k is right. majority: the most frequent answer. best_of_n: the highest score.
    best_of_n_weighted: the answer with the largest sum of scores; sharpened: of their fourth powers.
    Raises ValueError for k above the pool.
    """
    if rule in ("pass", "gold"):
        return [stats.pass_at_k(len(pool.correct_N), sum(pool.correct_N), k) for k in ks]
    if rule == "majority":
        return stats.majority_at_k(pool.correct_N, pool.answers_N, ks)
    scores_N = [s if a is not None else None for s, a in zip(pool.scores_N, pool.answers_N, strict=True)]
    if rule == "best_of_n":
        return stats.best_at_k(pool.correct_N, scores_N, ks)
    if rule == "best_of_n_weighted":
        return stats.weighted_at_k(pool.correct_N, pool.answers_N, scores_N, ks, seed=f"{seed}/{pool.key}")
    if rule == "sharpened":
        powers_N = [None if s is None else max(s, 0.0) ** SHARPENED for s in scores_N]
        return stats.weighted_at_k(pool.correct_N, pool.answers_N, powers_N, ks, seed=f"{seed}/{pool.key}")
    raise ValueError(f"unknown rule '{rule}': one of {', '.join(RULES)}")


def pool_figures(pools: Iterable[Pool], ks: Sequence[int], rules: Sequence[str], *, seed: object = 0) -> PoolFigures:
    """The figures of every problem under every rule. Raises DataError naming the smallest pool below a k."""
    counts: dict[str, tuple[int, int]] = {}
    values: dict[str, list[list[float]]] = {rule: [] for rule in rules}
    num_ungraded, num_unscored, spend, smallest = 0, 0, Spend(), None
    failures: list[str] = []
    unscored: list[str] = []
    approximate = False
    spends = {scored: np.zeros((len(ks), len(_COUNTS))) for scored in (False, True)}
    for pool in pools:
        _refuse_twice(pool.key, counts)
        num = len(pool.correct_N)
        counts[pool.key] = (sum(pool.correct_N), num)
        num_ungraded, num_unscored = num_ungraded + pool.num_ungraded, num_unscored + pool.num_unscored
        spend += pool.spend
        failures += [pool.failed] if pool.failed else []
        unscored += [pool.unscored] if pool.unscored else []
        approximate |= pool.approximate
        if num < max(ks) and not pool.failed:
            smallest = min(smallest or (num, pool.key), (num, pool.key))
            continue
        for scored, spent in spends.items():
            spent += [expected_spend(pool, min(k, num), scored=scored) for k in ks]
        for rule in rules:
            values[rule].append(chances(pool, rule, ks, seed=seed))
    if smallest:
        raise DataError(
            f"k = {max(ks)} needs {max(ks)} samples of every problem, but '{smallest[1]}' has {smallest[0]}; "
            "lower k or leave that problem out"
        )
    if not counts:
        raise DataError("the pool holds no problems")
    arrays = {rule: np.array(rows, dtype=np.float64) for rule, rows in values.items()}
    spends_K = {scored: tuple(map(_rounded, spent)) for scored, spent in spends.items()}
    return PoolFigures(
        keys=tuple(counts),
        ks=tuple(ks),
        values_P_K=arrays,
        counts=counts,
        num_ungraded=num_ungraded,
        spend=spend,
        spends_K=spends_K,
        failures=tuple(failures),
        unscored=tuple(unscored),
        num_unscored=num_unscored,
        approximate=approximate,
    )


def chances(pool: Pool, rule: str, ks: Sequence[int], *, seed: object = 0) -> list[float]:
    """`values_at` of a pool that may have failed: then it is not solved. Raises DataError for answers without a score
    where the rule needs them."""
    if pool.failed or (pool.unscored and rule in SCORED_RULES):
        return [0.0] * len(ks)
    if rule in SCORED_RULES and not pool.scored:
        raise DataError(f"problem '{pool.key}' has answers without a score: '{rule}' needs one for each")
    return values_at(pool, rule, ks, seed=seed)


def expected_spend(pool: Pool, k: int, *, scored: bool) -> Floats:
    """What k of the pool's samples cost on average, in the order of Spend's fields; float64 [fields].

    The prompt is computed once, whatever k is; what else was computed of it, or taken from a cache, belongs to the
    samples after the first. Of the verifier's part each distinct answer costs the same.
    """
    num, spend, prompt = len(pool.correct_N), pool.spend, pool.num_prompt_tokens
    if num == 0:
        return np.zeros(len(_COUNTS))
    share, later = k / num, (k - 1) / (num - 1) if num > 1 else 1.0
    begun, read = (float(shares[0]) for shares in read_shares(pool, [k])) if scored else (0.0, 0.0)
    generated = spend.generated_tokens * share
    first = min(prompt, spend.prefilled_tokens)
    prefilled = first + (spend.prefilled_tokens - first) * later
    ideal = _ratio(prompt + generated, prompt + spend.generated_tokens, share)
    actual = _ratio(prefilled + generated, spend.prefilled_tokens + spend.generated_tokens, share)
    verifier_ideal, verifier_actual = spend.verifier_flops_ideal, spend.verifier_flops_actual
    expected = {
        "samples": spend.samples * share,
        "generated_tokens": generated,
        "prefilled_tokens": prefilled,
        "cached_tokens": spend.cached_tokens * later,
        "verifier_tokens": spend.verifier_tokens * read,
        "flops_ideal": (spend.flops_ideal - verifier_ideal) * ideal + verifier_ideal * begun,
        "flops_actual": (spend.flops_actual - verifier_actual) * actual + verifier_actual * read,
        "verifier_flops_ideal": verifier_ideal * begun,
        "verifier_flops_actual": verifier_actual * read,
    }
    return np.array([expected[name] for name in _COUNTS])


def read_shares(pool: Pool, ks: Sequence[int] | np.ndarray) -> tuple[Floats, Floats]:
    """The shares of what a verifier reads of the pool that k samples are expected to need, for each k: ideally, where
    the prompt and every common beginning is read once (steps not known: every distinct answer), and actually, where
    each distinct answer is read whole."""
    num = len(pool.correct_N)
    if not pool.copies:
        share = np.asarray(ks, dtype=np.float64) / num
        return share, share
    answers = stats.seen_at_k(num, pool.copies, np.ones(len(pool.copies)), ks)
    if not pool.reads:
        return answers, answers
    counts, lengths = zip(*pool.reads, strict=True)
    prompt, whole = pool.num_prompt_characters, float(sum(lengths))
    steps = stats.seen_at_k(num, counts, lengths, ks)
    any_read = np.asarray(ks) > 0
    return (prompt * any_read + whole * steps) / (prompt + whole), answers


def _ratio(part: float, whole: float, otherwise: float) -> float:
    return part / whole if whole else otherwise


def _rounded(values: Floats) -> Spend:
    whole = {name for name, value in Spend().to_json().items() if isinstance(value, int)}
    found: dict[str, Any] = {
        name: round(value) if name in whole else float(value) for name, value in zip(_COUNTS, values, strict=True)
    }
    return Spend(**found)


def joined(
    blocks: Sequence[Paths], order: Mapping[str, int], num: int, delimiter: str | None = None
) -> Iterator[SearchResult]:
    """Pools drawn in several blocks, put together and cut to their first `num` samples; bounded memory.

    Each block's results come in the order of the problems; problems that a block lacks are left out.
    """
    streams = [read_results(paths) for paths in blocks]
    heads = [next(stream, None) for stream in streams]
    while all(heads):
        places = [order[head.problem.key] for head in heads if head]
        if min(places) == max(places):
            yield _join([head for head in heads if head], num, delimiter)
        for i, place in enumerate(places):
            if place < max(places) or min(places) == max(places):
                heads[i] = next(streams[i], None)


def _join(parts: Sequence[SearchResult], num: int, delimiter: str | None) -> SearchResult:
    """The spend is that of the samples kept: generated tokens are counted, the rest is shared among the samples."""
    candidates = [c for part in parts for c in part.candidates]
    spend = sum((part.spend for part in parts), Spend())
    failed = next((part.failed for part in parts if part.failed), None)
    whole = replace(parts[0], candidates=tuple(candidates), spend=_once(parts, spend), failed=failed)
    if len(candidates) <= num:
        return whole
    ids, kept = (sum(len(c.ids) for c in some) for some in (candidates, candidates[:num]))
    spent = dict(zip(_COUNTS, expected_spend(reduce_pool(whole, delimiter), num, scored=True), strict=True))
    generated = whole.spend.generated_tokens * _ratio(kept, ids, num / len(candidates))
    flops = (generated - spent["generated_tokens"]) * _flops_per_token(whole)
    spent |= {"generated_tokens": generated}
    spent |= {name: spent[name] + flops for name in ("flops_ideal", "flops_actual")}
    return replace(whole, candidates=tuple(candidates[:num]), spend=_rounded(np.array(list(spent.values()))))


def _once(parts: Sequence[SearchResult], spend: Spend) -> Spend:
    """Ideally the prompt that every block began with is computed once."""
    repeats = sum(bool(part.spend.generated_tokens) for part in parts[1:])
    return replace(
        spend, flops_ideal=spend.flops_ideal - repeats * len(parts[0].prompt_ids) * _flops_per_token(parts[0])
    )


def _flops_per_token(result: SearchResult) -> float:
    """Of the policy, from a pool's own figures."""
    policy = result.spend.flops_ideal - result.spend.verifier_flops_ideal
    return _ratio(policy, len(result.prompt_ids) + result.spend.generated_tokens, 0.0)


def read_pool(paths: Paths, ks: Sequence[int], rules: Sequence[str] = ("pass", "majority")) -> PoolFigures:
    """The figures of stored pools. Raises DataError."""
    return pool_figures(map(reduce_pool, read_results(paths)), ks, rules)


def scale(spend: Spend, factor: float) -> Spend:
    """A spend times a factor; counts are rounded to whole ones."""
    return _rounded(np.array([getattr(spend, name) * factor for name in _COUNTS]))


# ---------------------------------------------------------------- summaries


def summary(
    greedy_path: Paths, pool_path: Paths | None, k: Sequence[int], *, rule: str = "gold"
) -> dict[str, Estimate]:
    """The metrics `test/...` of one model, by name, from its greedy and its pool file.

    `rule` is how the round's own search selects, for test/search_at_{n}; "gold" takes any right answer.
    test/ungraded is the ungraded share of the greedy answers. Raises DataError.
    """
    greedy = read_outcomes(greedy_path)
    shares = [1.0] * greedy.num_ungraded + [0.0] * (len(greedy.solved) - greedy.num_ungraded)
    metrics = {"test/accuracy_greedy": greedy.accuracy, "test/ungraded": stats.mean_estimate(shares)}
    if pool_path is None:
        return metrics
    figures = read_pool(pool_path, k, tuple(dict.fromkeys(("pass", "majority", rule))))
    for name, by_rule in (("pass", "pass"), ("maj", "majority"), ("search", rule)):
        for size in k:
            metrics[f"test/{name}_at_{size}"] = figures.estimate(by_rule, size)
    return metrics


def metric_rows(estimates: Mapping[str, Estimate]) -> list[dict[str, Any]]:
    """Rows of metrics.jsonl."""
    rows: list[dict[str, Any]] = []
    for name, estimate in estimates.items():
        row: dict[str, Any] = {"name": name, "value": estimate.value}
        if np.isfinite(estimate.se):
            row["se"] = estimate.se
        rows.append(row)
    return rows


def by_difficulty(
    values: Mapping[str, float], base_rates: Mapping[str, float], *, bins: int = 5, edges: Sequence[float] | None = None
) -> list[BinAccuracy]:
    """Accuracy within quantile bins of the base model's pass rate, easiest first.

    Equal rates share a bin, so bins can be uneven, or fewer. `edges` fixes the bins of an earlier round. The rates
    must come from other samples than the values, else the easy bins flatter. Raises DataError for a missing rate.
    """
    missing = [key for key in values if key not in base_rates]
    if missing:
        raise DataError(f"{len(missing)} problems have no base pass rate, the first is '{missing[0]}'")
    rates = np.array([base_rates[key] for key in values], dtype=np.float64)
    scores = np.array([float(v) for v in values.values()])
    index = stats.assign_bins(rates, stats.quantile_edges(rates, bins) if edges is None else edges)
    return [
        BinAccuracy(
            int(b),
            float(rates[index == b].min()),
            float(rates[index == b].max()),
            stats.mean_estimate(scores[index == b]),
        )
        for b in np.unique(index)
    ]


def total_spend(paths: Paths) -> Spend:
    """The sum over stored results."""
    total = Spend()
    for result in read_results(paths):
        total += result.spend
    return total
