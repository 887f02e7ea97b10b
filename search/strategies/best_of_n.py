"""Independent samples (Snell et al. 2024, section 5.2): greedy is one at temperature 0, best-of-N is N of them.

The adaptive ones stop as soon as more samples would hardly change the answer: majority by the Beta posterior that the
leading answer is ahead of the second (Aggarwal et al. 2023, "adaptive consistency", arXiv 2305.11860), best-of-N when
the verifier is certain of one.
"""

from __future__ import annotations

import math
from collections import Counter

from search.policy import Policy, Scorer
from search.strategies.sizes import num_samples
from search.types import Budget, Candidate, Problem


async def greedy(problem: Problem, policy: Policy, verifier: Scorer | None, budget: Budget) -> list[Candidate]:
    """The policy's own answer: one sample at temperature 0."""
    return await policy.sample(1, temperature=0.0, stream="greedy")


async def best_of_n(
    problem: Problem, policy: Policy, verifier: Scorer | None, budget: Budget, *, samples: int = 0
) -> list[Candidate]:
    """N independent samples, scored where there is a verifier; who is chosen among them is the rule's business."""
    candidates = await policy.sample(num_samples(budget, samples))
    policy.keep(candidates)
    return await verifier.score(candidates) if verifier else candidates


async def adaptive_majority(
    problem: Problem,
    policy: Policy,
    verifier: Scorer | None,
    budget: Budget,
    *,
    samples: int = 0,
    certainty: float = 0.95,
    batch: int = 2,
) -> list[Candidate]:
    """Samples until the leading answer is ahead with a posterior probability of `certainty`, at most N."""
    most, drawn = num_samples(budget, samples), list[Candidate]()
    while len(drawn) < most:
        drawn += await policy.answers(await policy.sample(min(batch, most - len(drawn))))
        policy.keep(drawn)
        votes = Counter(c.answer for c in drawn if c.complete and c.answer is not None).most_common(2)
        if votes and ahead(votes[0][1], votes[1][1] if len(votes) > 1 else 0) >= certainty:
            break
    return drawn


async def adaptive_best_of_n(
    problem: Problem,
    policy: Policy,
    verifier: Scorer,
    budget: Budget,
    *,
    samples: int = 0,
    certainty: float = 0.9,
    batch: int = 2,
) -> list[Candidate]:
    """Samples until the verifier gives one of them at least `certainty`, at most N."""
    most, drawn = num_samples(budget, samples), list[Candidate]()
    while len(drawn) < most:
        new = await policy.answers(await policy.sample(min(batch, most - len(drawn))))
        policy.keep([*drawn, *new])
        drawn += await verifier.score(new)
        if any(c.score is not None and c.score >= certainty for c in drawn if c.answer is not None):
            break
    return drawn


def ahead(votes: int, others: int) -> float:
    """P(p > 1/2) for p ~ Beta(votes + 1, others + 1): that more samples would keep this answer before the other."""
    total = votes + others + 1
    return sum(math.comb(total, k) for k in range(votes + 1)) / 2**total
