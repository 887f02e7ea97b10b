"""Independent samples (Snell et al. 2024, section 5.2): greedy is one at temperature 0, best-of-N is N of them."""

from __future__ import annotations

from search.policy import Policy
from search.types import Budget, Candidate, Problem, Verifier


async def greedy(problem: Problem, policy: Policy, verifier: Verifier | None, budget: Budget) -> list[Candidate]:
    """The policy's own answer: one sample at temperature 0."""
    return await policy.sample(1, temperature=0.0, stream="greedy")


async def best_of_n(problem: Problem, policy: Policy, verifier: Verifier | None, budget: Budget) -> list[Candidate]:
    """As many independent samples as the budget buys; who is chosen among them is the selection rule's business."""
    return await policy.sample(int(budget.amount))
