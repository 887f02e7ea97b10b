"""Assess and solve at once: samples while one more is expected to be worth its price (`search.belief`).

The dynamic switch between judging how hard a question is and attempting it that Snell et al. 2024 name as future work
(section 8). It begins with a predicted rate of success and how many samples' worth of knowledge that is; every sample
that is not right makes the next one less promising. `search.sequential` replays the same on stored pools.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from search.belief import Sequential
from search.policy import Policy, Scorer
from search.strategies.best_of_n import ahead
from search.strategies.sizes import num_samples
from search.types import Budget, Candidate, Problem


async def adaptive_budget(
    problem: Problem,
    policy: Policy,
    verifier: Scorer | None,
    budget: Budget,
    *,
    samples: int = 0,
    rate: float = 0.5,
    strength: float = 2.0,
    price: float = 0.02,
    batch: int = 1,
) -> list[Candidate]:
    """Samples while one more raises the chance of a right answer by at least `price`, at most N.

    `rate`: how likely a sample is expected to be right; `strength`: how many samples' worth that knowledge is. What
    a sample taught is its verifier's score, without a verifier how far the answers agree. The first batch is drawn
    anyway.
    """
    most, drawn = num_samples(budget, samples), list[Candidate]()
    belief = Sequential(rate * strength, (1 - rate) * strength, price, 1.0)
    while len(drawn) < most and (not drawn or belief.worth_more()):
        new = await policy.answers(await policy.sample(min(batch, most - len(drawn))))
        policy.keep([*drawn, *new])
        new = await verifier.score(new) if verifier else new
        drawn += new
        belief = belief.update([score_of(c) for c in new]) if verifier else belief.agreed(len(drawn), certainty(drawn))
    return drawn


def score_of(candidate: Candidate) -> float | None:
    """None where it cannot be chosen: truncated, without an answer or a verdict."""
    return candidate.score if candidate.complete and candidate.answer is not None else None


def certainty(candidates: Sequence[Candidate]) -> float:
    """The posterior probability that the leading answer is ahead of the second for good; 0 without one."""
    votes = Counter(c.answer for c in candidates if c.complete and c.answer is not None).most_common(2)
    return ahead(votes[0][1], votes[1][1] if len(votes) > 1 else 0) if votes else 0.0
