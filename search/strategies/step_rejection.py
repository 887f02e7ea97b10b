"""Step rejection: spend where a step fails, instead of on whole answers.

Draw one step; keep it if the verifier's probability passes a threshold, else draw it again, at most K times; then the
best of the draws is kept. Several independent chains share a budget; their answers vote. A prototype of ours measured
it as the cheapest of all strategies under a good step verifier. `greedy`: the first draw of a step is the policy's own
best guess, which is right more often than a sample. `restart`: one chain after the other, until all steps of one are
accepted, so that an easy question pays for one. `trust`: a step that the policy wrote with at least this probability
is taken without asking the verifier. `give_up`: a chain with a step of which no draw was accepted is ended by the
policy alone: its answer is hardly right, so no more is paid for it. Left out: going back to an earlier step.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from search.policy import AGGREGATE, Policy, Scorer
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
    trust: float = 1.0,
    give_up: bool = False,
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
            step = _Step(policy, verifier, draws, threshold, trust, best_guess)
            stepped = await step.draw(ended, together)
            ended += [c for c in stepped if not c.open]
            hopeless = [c for c in stepped if c.open and give_up and chance(c) < threshold]
            ended += await policy.finish(hopeless)
            policy.keep(ended)
            together = [c for c in stepped if c.open and c not in hopeless]
        rest = await policy.finish(together)
        policy.keep([*ended, *rest])
        ended += await verifier.score(rest)
        if restart and accepted(ended[-1], threshold):
            break
    return ended


@dataclass(frozen=True, slots=True)
class _Step:
    """How one step of some chains is drawn."""

    policy: Policy
    verifier: Scorer
    draws: int
    threshold: float
    trust: float
    best_guess: bool  # the first draw of chain 0 is greedy

    async def draw(self, ended: Sequence[Candidate], chains: Sequence[Candidate]) -> list[Candidate]:
        """Each chain one step further: by the first draw that is accepted, else by the best one."""
        best: dict[int, Candidate] = {}
        waiting = list(chains)
        for draw in range(self.draws):
            greedily = [c for c in waiting if self.best_guess and draw == 0 and c.chain == 0]
            others = [c for c in waiting if c not in greedily]
            drawn = await self.policy.step([self.policy.fork(c, 1)[0] for c in greedily], temperature=0.0)
            drawn += await self.policy.step([self.policy.fork(c, 1)[0] for c in others])
            self.policy.keep([*ended, *best.values(), *drawn])  # until they are judged
            for c in await self._judged([*greedily, *others], drawn):
                best[chain_of(c)] = max(best.get(chain_of(c), c), c, key=chance)
            self.policy.keep([*ended, *best.values()])
            waiting = [c for c in waiting if chance(best[chain_of(c)]) < self.threshold]
            if not waiting:
                break
        return [best[chain_of(c)] for c in chains]

    async def _judged(self, before: Sequence[Candidate], after: Sequence[Candidate]) -> list[Candidate]:
        """With scores: the policy's own probability of a step where that is trusted, else the verifier's."""
        known = [self._trusted(old, new) for old, new in zip(before, after, strict=True)]
        scored = iter(await self.verifier.score([new for new, c in zip(after, known, strict=True) if c is None]))
        return [next(scored) if c is None else c for c in known]

    def _trusted(self, old: Candidate, new: Candidate) -> Candidate | None:
        if new.logprob is None or not (new.open or new.complete):
            return None
        probability = min(1.0, math.exp(new.logprob - (old.logprob or 0.0)))
        if self.trust >= 1 or probability < self.trust:
            return None
        scores = (*old.step_scores, probability)
        return replace(new, step_scores=scores, score=AGGREGATE[self.verifier.facts.aggregation](scores))


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
