"""Step rejection: spend where a step fails, instead of on whole answers.

Draw one step; keep it if the verifier's probability passes a threshold, else draw it again, at most K times; then the
best of the draws is kept. Several independent chains share a budget; their answers vote. A prototype of ours measured
it as the cheapest of all strategies under a good step verifier. Left out: going back to an earlier step.
"""

from __future__ import annotations

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
    max_rounds: int = 40,
) -> list[Candidate]:
    """N samples buy N / K chains of at most K draws a step (one chain of N draws where N < K).

    `threshold` belongs to the verifier: fit it on validation problems (`search.thresholds`).
    """
    num = num_samples(budget, samples)
    draws = min(draws, num)
    live = [replace(c, chain=i) for i, c in enumerate(policy.start(num // draws))]
    ended: list[Candidate] = []
    for _ in range(max_rounds):
        if not live:
            break
        best: dict[int, Candidate] = {}
        waiting = list(live)
        for _ in range(draws):
            drawn = await policy.step([policy.fork(c, 1)[0] for c in waiting])
            policy.keep([*ended, *best.values(), *drawn])  # until they are judged
            drawn = await verifier.score(drawn)
            for c in drawn:
                best[chain_of(c)] = max(best.get(chain_of(c), c), c, key=chance)
            policy.keep([*ended, *best.values()])
            waiting = [c for c, d in zip(waiting, drawn, strict=True) if chance(d) < threshold]
            if not waiting:
                break
        ended += [c for c in best.values() if not c.open]
        live = [c for c in best.values() if c.open]
    rest = await policy.finish(live)
    policy.keep([*ended, *rest])
    return ended + await verifier.score(rest)


def chance(candidate: Candidate) -> float:
    """The verifier's probability of the last step; -1 where there is none: truncated or failed."""
    return candidate.step_scores[-1] if candidate.score is not None else -1.0


def chain_of(candidate: Candidate) -> int:
    assert candidate.chain is not None
    return candidate.chain
