"""Pools and rows for the tests of rules that stop early."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np

from search.evaluate import Pool
from search.replay import NEVER, Replay, StopRule
from search.types import Candidate, Finish, Grade, Spend


def pool_of(
    answers: Sequence[str | None],
    scores: Sequence[float | None] | None = None,
    *,
    right: str = "A",
    key: str = "q",
    verifier: float = 0.0,
    prompt: int = 10,
) -> Pool:
    """A pool whose right answer is `right`; a sample is 5 tokens, a token 2 FLOPs, a read answer `verifier` FLOPs."""
    texts = Counter(a for a in answers if a is not None)
    num = len(answers)
    policy, judge = 2.0 * (prompt + 5 * num), verifier * len(texts)
    spend = Spend(
        samples=num,
        generated_tokens=5 * num,
        prefilled_tokens=prompt * num,
        flops_ideal=policy + judge,
        flops_actual=2.0 * (prompt + 5) * num + judge,
        verifier_flops_ideal=judge,
        verifier_flops_actual=judge,
    )
    return Pool(
        key,
        tuple(a == right for a in answers),
        tuple(answers),
        tuple(scores) if scores else (None,) * num,
        0,
        spend,
        tuple(texts.values()),
        (texts[right],) if texts[right] else (),
        prompt,
        num_unscored=num if scores and None in scores else 0,
    )


def in_order(
    answers: Sequence[str | None], scores: Sequence[float | None] | None = None, *, right: str = "A"
) -> Replay:
    """One row: the samples as they were drawn."""
    pool = pool_of(answers, scores, right=right)
    names = list(dict.fromkeys(a for a in answers if a is not None))
    column = np.array([[len(names) if a is None else names.index(a) for a in answers]])
    values = [np.nan if s is None or a is None else s for s, a in zip(pool.scores_N, answers, strict=True)]
    shares = np.array([[float(name == right) for name in names] + [0.0]])
    return Replay((pool,), 1, column, np.array([values]), np.array([pool.correct_N]), shares)


def stops_at(rule: StopRule, answers: Sequence[str | None], scores: Sequence[float | None] | None = None) -> int | None:
    """Samples after which the rule stops; None: it goes on."""
    drawn = int(rule.run(in_order(answers, scores)).drawn_R[0])
    return None if drawn == NEVER else drawn


def candidates_of(answers: Sequence[str | None], scores: Sequence[float | None], right: str = "A") -> list[Candidate]:
    return [
        Candidate((1,), a or "", Finish.EOS, answer=a, score=s, grade=Grade.CORRECT if a == right else Grade.WRONG)
        for a, s in zip(answers, scores, strict=True)
    ]
