"""Sequential revisions (Snell et al. 2024, section 6): chains of attempts, each shown the last few before it.

A sequential : parallel ratio says how a budget of N attempts is split into chains. The combinations at the end are
those the paper leaves open (section 8): search whose answers seed revision chains, and revisions whose steps are
searched.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from search.policy import Policy, Scorer
from search.strategies.sizes import chain_length, half_of, num_beams, num_samples
from search.strategies.trees import grow, top
from search.types import Budget, Candidate, Problem

Chain = list[Candidate]


async def revisions(
    problem: Problem,
    policy: Policy,
    verifier: Scorer | None,
    budget: Budget,
    *,
    samples: int = 0,
    ratio: float = 1.0,
    window: int = 4,
) -> list[Candidate]:
    """N attempts in chains, `ratio` = attempts in a row over chains side by side; the last four are shown."""
    num = num_samples(budget, samples)
    length = chain_length(num, ratio)
    firsts = [replace(c, chain=i) for i, c in enumerate(policy.start(num // length, stream="revisions"))]
    chains: list[Chain] = [[c] for c in await policy.finish(firsts)]
    return await _revise(policy, verifier, chains, length - 1, window)


async def beam_revisions(
    problem: Problem,
    policy: Policy,
    verifier: Scorer,
    budget: Budget,
    *,
    samples: int = 0,
    width: int = 4,
    chains: int = 2,
    window: int = 4,
    max_rounds: int = 40,
) -> list[Candidate]:
    """Half the budget is a beam search; its best answers seed chains of revisions that share the other half."""
    num = half_of(budget, samples, width)
    found = await grow(policy, verifier, [policy.start(num)], top(width), max_rounds=max_rounds)
    ranked = sorted(found, key=lambda c: (not c.complete, -(c.score or 0.0)))
    ranked = [replace(c, chain=i) for i, c in enumerate(ranked)]
    seeds = [c for c in ranked[: min(chains, num)] if c.complete]
    if not seeds:
        return ranked
    policy.keep(ranked[len(seeds) :], for_good=True)
    return ranked[len(seeds) :] + await _revise(policy, verifier, [[c] for c in seeds], num // len(seeds), window)


async def searched_revisions(
    problem: Problem,
    policy: Policy,
    verifier: Scorer,
    budget: Budget,
    *,
    samples: int = 0,
    width: int = 4,
    window: int = 4,
    max_rounds: int = 40,
) -> list[Candidate]:
    """One chain whose every attempt is searched: M first steps, the best one continued M times, and so on.

    The best answer of a turn is shown to the next; all answers of all turns are candidates, a turn being a chain.
    """
    shown: Chain = []
    found: list[Candidate] = []
    for turn in range(num_beams(budget, samples, width) // width):
        starts = policy.start(width, attempts=shown[-window:])
        tried = await grow(policy, verifier, [starts], top(width), max_rounds=max_rounds, chain=turn)
        policy.keep(tried, for_good=True)
        found += tried
        shown += sorted((c for c in tried if c.complete), key=lambda c: -(c.score or 0.0))[:1]
    return found


async def _revise(
    policy: Policy, verifier: Scorer | None, chains: Sequence[Chain], turns: int, window: int
) -> list[Candidate]:
    """`turns` more attempts in every chain; all attempts, turn by turn, scored where there is a verifier."""
    attempts = [chain[0] for chain in chains]
    policy.keep(attempts)
    for _ in range(turns):
        contexts = [[c for c in chain if c.complete][-window:] for chain in chains]
        starts = [policy.start(1, stream="revisions", attempts=context)[0] for context in contexts]
        starts = [replace(c, chain=chain[0].chain) for c, chain in zip(starts, chains, strict=True)]
        for chain, attempt in zip(chains, await policy.finish(starts), strict=True):
            chain.append(attempt)
            attempts.append(attempt)
        policy.keep(attempts)
    return await verifier.score(attempts) if verifier else attempts
