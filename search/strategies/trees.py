"""Step-wise tree search against a verifier: beam search, lookahead, DVTS and REBASE are one loop.

They differ in how many trees share the budget and in how the places of the next round are shared among the open
candidates. A finished candidate leaves with its score and gives its place up: it is never copied to fill the width,
so a tree of N places returns at most N answers, all different draws.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

from search.policy import Policy, Scorer
from search.strategies.sizes import num_beams, num_samples
from search.types import Budget, Candidate, Problem

Allocate = Callable[[Sequence[float], int], list[int]]  # (scores of the open ones, places) -> children of each


async def beam_search(
    problem: Problem,
    policy: Policy,
    verifier: Scorer,
    budget: Budget,
    *,
    samples: int = 0,
    width: int = 4,
    max_rounds: int = 40,
    distinct: bool = False,
) -> list[Candidate]:
    """N beams: keep the best N / M, continue each M times, at most 40 rounds (Snell et al. section 5.2, BFS-V).

    `distinct`: beams with equal text are kept once; it helps a weak verifier and hurts a good one.
    """
    beams = policy.start(num_beams(budget, samples, width))
    return await grow(policy, verifier, [beams], top(width), max_rounds=max_rounds, distinct=distinct)


async def lookahead_search(
    problem: Problem,
    policy: Policy,
    verifier: Scorer,
    budget: Budget,
    *,
    samples: int = 0,
    width: int = 4,
    steps: int = 1,
    max_rounds: int = 40,
) -> list[Candidate]:
    """Beam search that scores each step at the end of a greedy rollout of k more (section 5.2); costs N (k + 1)."""
    beams = policy.start(num_beams(budget, samples, width, lookahead=steps))
    return await grow(policy, verifier, [beams], top(width), max_rounds=max_rounds, lookahead=steps)


async def dvts(
    problem: Problem,
    policy: Policy,
    verifier: Scorer,
    budget: Budget,
    *,
    samples: int = 0,
    width: int = 4,
    max_rounds: int = 40,
) -> list[Candidate]:
    """Diverse verifier tree search (Beeching et al. 2024): N / M trees, each keeps its best step alone."""
    roots = policy.start(num_beams(budget, samples, width))
    trees = [roots[i : i + width] for i in range(0, len(roots), width)]
    return await grow(policy, verifier, trees, top(width), max_rounds=max_rounds)


async def rebase(
    problem: Problem,
    policy: Policy,
    verifier: Scorer,
    budget: Budget,
    *,
    samples: int = 0,
    temperature: float = 0.2,
    max_rounds: int = 40,
) -> list[Candidate]:
    """Each open candidate gets its softmax share of the width by score (Wu et al. 2024, arXiv 2408.00724)."""
    roots = policy.start(num_samples(budget, samples))
    return await grow(policy, verifier, [roots], softmax(temperature), max_rounds=max_rounds)


async def grow(
    policy: Policy,
    verifier: Scorer,
    trees: Sequence[Sequence[Candidate]],
    allocate: Allocate,
    *,
    max_rounds: int,
    lookahead: int = 0,
    distinct: bool = False,
    chain: int = 0,
) -> list[Candidate]:
    """All trees to their ends, step by step and side by side: a tree has as many places as it starts candidates.

    Returns every candidate that ended, scored, in the order of the trees (its `chain`, counted from the one given).
    """
    places = [len(tree) for tree in trees]
    live = [[replace(c, chain=chain + t) for c in tree] for t, tree in enumerate(trees)]
    ended: list[list[Candidate]] = [[] for _ in trees]
    for _ in range(max_rounds):
        flat = [candidate for tree in live for candidate in tree]
        if not flat:
            break
        stepped = distinct_ends(flat, await policy.step(flat))
        policy.keep([*(c for tree in ended for c in tree), *stepped])
        stepped = await _scored(policy, verifier, stepped, lookahead)
        for t in range(len(trees)):
            grown = [c for c in stepped if c.chain == chain + t]
            ended[t] += [c for c in grown if not c.open]
            still = [c for c in grown if c.open]
            if distinct:
                still = [c for i, c in enumerate(still) if c.text not in {other.text for other in still[:i]}]
            counts = allocate([c.score or 0.0 for c in still], places[t] - len(ended[t])) if still else []
            live[t] = [child for c, num in zip(still, counts, strict=True) if num for child in policy.fork(c, num)]
    flat = [candidate for tree in live for candidate in tree]  # max_rounds is over
    rest = distinct_ends(flat, await policy.finish(flat))
    policy.keep([*(c for tree in ended for c in tree), *rest])
    rest = await verifier.score(rest)
    return [c for t, tree in enumerate(ended, chain) for c in (*tree, *(c for c in rest if c.chain == t))]


def distinct_ends(before: Sequence[Candidate], after: Sequence[Candidate]) -> list[Candidate]:
    """`after` without the copies: of the forks of one candidate that ended with nothing new, the first stays.

    An answer may be over before its end is seen (few-shot: at the blank line before the next question). It is open
    then and is forked, and every fork is cut back to it: copies of one draw, which may have one vote.
    """
    ended: set[tuple[int, ...]] = set()
    kept: list[Candidate] = []
    for old, new in zip(before, after, strict=True):
        if old.ids and new.complete and len(new.text) <= len(old.text):
            if old.path[:-1] in ended:
                continue
            ended.add(old.path[:-1])
        kept.append(new)
    return kept


async def _scored(policy: Policy, verifier: Scorer, candidates: list[Candidate], lookahead: int) -> list[Candidate]:
    """The candidates with scores; with lookahead, that of the rollout, whose text is thrown away."""
    if not lookahead:
        return await verifier.score(candidates)
    rolled = await verifier.score(await policy.look_ahead(candidates, lookahead))
    return [
        replace(c, score=r.score, step_scores=r.step_scores[: len(c.step_ends)], unscored=r.unscored)
        for c, r in zip(candidates, rolled, strict=True)
    ]


def top(width: int) -> Allocate:
    """The best places / width get `width` children each; the last of them what is left."""

    def allocate(scores: Sequence[float], places: int) -> list[int]:
        counts = [0] * len(scores)
        for i in sorted(range(len(scores)), key=lambda i: -scores[i]):  # stable: ties to the first
            counts[i] = min(width, places - sum(counts))
        return counts

    return allocate


def softmax(temperature: float) -> Allocate:
    """Shares of exp(score / temperature), in whole places by largest remainder."""

    def allocate(scores: Sequence[float], places: int) -> list[int]:
        highest = max(scores)
        weights = [math.exp((score - highest) / temperature) for score in scores]
        shares = [places * weight / sum(weights) for weight in weights]
        counts = [int(share) for share in shares]
        order = sorted(range(len(scores)), key=lambda i: counts[i] - shares[i])
        for i in order[: places - sum(counts)]:
            counts[i] += 1
        return counts

    return allocate
