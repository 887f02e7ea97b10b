"""Step rejection: spend where a step fails, instead of on whole answers.

Draw one step; keep it if the verifier's probability passes a threshold, else draw it again, at most K times; then the
best of the draws is kept. Several independent chains share a budget; their answers vote. A prototype of ours measured
it as the cheapest of all strategies under a good step verifier. `greedy`: the first draw of a step is the policy's own
best guess, which is right more often than a sample. `restart`: one chain after the other, until all steps of one are
accepted, so that an easy question pays for one. Left out: going back to an earlier step.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from search.policy import Policy, Scorer
from search.strategies.sizes import num_samples
from search.types import Budget, Candidate, Problem


async def step_rejection(
    problem: Problem,
    policy: Policy,
    verifier: Scorer,
    budget: Budget,
    *,
    samples: int = 0,
    draws: int = 4,
    threshold: float = 0.5,
    greedy: bool = False,
    restart: bool = False,
    max_rounds: int = 40,
) -> list[Candidate]:
    """N samples buy N / K chains of at most K draws a step (one chain of N draws where N < K).

    `threshold` belongs to the verifier: fit it on validation problems (`search.thresholds`).
    """
    num = num_samples(budget, samples)
    draws = min(draws, num)
    live = [replace(c, chain=i) for i, c in enumerate(policy.start(num // draws))]
    ended: list[Candidate] = []
    for together in [[c] for c in live] if restart else [live]:
        best_guess = greedy and together[0].chain == 0  # once: it would be the same in every chain
        for _ in range(max_rounds):
            if not together:
                break
            stepped = await _step(policy, verifier, ended, together, draws, threshold, best_guess)
            ended += [c for c in stepped if not c.open]
            together = [c for c in stepped if c.open]
        rest = await policy.finish(together)
        policy.keep([*ended, *rest])
        ended += await verifier.score(rest)
        if restart and accepted(ended[-1], threshold):
            break
    return ended


async def _step(
    policy: Policy,
    verifier: Scorer,
    ended: Sequence[Candidate],
    chains: Sequence[Candidate],
    draws: int,
    threshold: float,
    best_guess: bool,
) -> list[Candidate]:
    """Each chain one step further: by the first draw that is accepted, else by the best one."""
    best: dict[int, Candidate] = {}
    waiting = list(chains)
    for draw in range(draws):
        greedily = [c for c in waiting if best_guess and draw == 0 and c.chain == 0]
        others = [c for c in waiting if c not in greedily]
        drawn = await policy.step([policy.fork(c, 1)[0] for c in greedily], temperature=0.0)
        drawn += await policy.step([policy.fork(c, 1)[0] for c in others])
        policy.keep([*ended, *best.values(), *drawn])  # until they are judged
        drawn = await verifier.score(drawn)
        for c in drawn:
            best[chain_of(c)] = max(best.get(chain_of(c), c), c, key=chance)
        policy.keep([*ended, *best.values()])
        refused = {chain_of(d) for d in drawn if chance(d) < threshold}
        waiting = [c for c in waiting if chain_of(c) in refused]
        if not waiting:
            break
    return [best[chain_of(c)] for c in chains]


def accepted(candidate: Candidate, threshold: float) -> bool:
    """Whether it is finished and the verifier passed every step of it."""
    scored = candidate.score is not None and candidate.complete
    return scored and min(candidate.step_scores, default=0.0) >= threshold


def chance(candidate: Candidate) -> float:
    """The verifier's probability of the last step; -1 where there is none: truncated or failed."""
    return candidate.step_scores[-1] if candidate.score is not None else -1.0


def chain_of(candidate: Candidate) -> int:
    assert candidate.chain is not None
    return candidate.chain
