"""Assess and solve at once: samples while one more is expected to be worth its price.

The dynamic switch between judging how hard a question is and attempting it that Snell et al. 2024 name as future work
(section 8). It begins with a predicted rate of success, Beta(a, b) (`search.belief`); every sample that is not right
makes the next one less promising. With a perfect verifier the gain only falls, so that looking one sample ahead is the
optimal rule. `search.sequential` replays the same on stored pools.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from search.policy import Policy, Scorer
from search.strategies.best_of_n import ahead
from search.strategies.sizes import num_samples
from search.types import Budget, Candidate, Problem


@dataclass(frozen=True, slots=True)
class Sequential:
    """Whether one more sample of this question is worth its price. Example: Sequential(0.4, 1.6, 1e-9, 5e6)

    `price` is what a FLOP must gain in the chance of a right answer, `cost_per_sample` the FLOPs of one more sample;
    in other units, so long as they agree.
    """

    prior_a: float
    prior_b: float
    price: float
    cost_per_sample: float
    base: float = 0.0  # mean rate of the questions on which the verifier is calibrated; 0: it knows this question's own
    num: int = 0  # samples looked at
    doubt: float = 1.0  # the chance that the answer it would give now is wrong

    @property
    def gain(self) -> float:
        """What one more sample is expected to add to the chance of a right answer.

        The doubt times the rate believed if none so far was right, a / (a + b + num). Exact for a verifier that tells
        right from wrong; for another it takes its scores for calibrated and hopes that it will know the right answer.
        """
        return self.doubt * self.prior_a / (self.prior_a + self.prior_b + self.num)

    def worth_more(self) -> bool:
        return self.gain >= self.price * self.cost_per_sample

    def update(self, scores: Iterable[float | None]) -> Sequential:
        """After more samples, by their verifier's scores in 0..1 (outcomes are scores of 0 and 1); None, for a sample
        without an answer or a verdict, scores 0. The doubt is what the best of all scores leaves."""
        found = [0.0 if s is None else min(max(s, 0.0), 1.0) for s in scores]
        doubt = min([self.doubt, *(self.left_by(s) for s in found)])
        return replace(self, num=self.num + len(found), doubt=doubt)

    def left_by(self, score: float) -> float:
        """The chance that an answer with this score is wrong. With a `base` the odds that the score gives are taken
        from there to this question's predicted rate (Bayes): a good score of a hopeless question is mostly luck."""
        if not self.base:
            return 1 - score
        right, wrong = score * self.prior_a * (1 - self.base), (1 - score) * self.prior_b * self.base
        return wrong / (right + wrong) if right + wrong else 1 - score

    def agreed(self, num: int, certainty: float) -> Sequential:
        """Without a verifier: after `num` samples in all, whose leading answer is ahead for good with this chance
        (adaptive consistency, Aggarwal et al. 2023): what is left of it is the doubt."""
        return replace(self, num=num, doubt=1 - certainty)


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
    base: float = 0.0,
    batch: int = 1,
) -> list[Candidate]:
    """Samples while one more raises the chance of a right answer by at least `price`, at most N.

    `rate`: how likely a sample is expected to be right; `strength`: how many samples' worth that knowledge is. What
    a sample taught is its verifier's score, seen from the `base` rate where one is given; without a verifier how far
    the answers agree. The first batch is drawn anyway.
    """
    most, drawn = num_samples(budget, samples), list[Candidate]()
    belief = Sequential(rate * strength, (1 - rate) * strength, price, 1.0, base)
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
