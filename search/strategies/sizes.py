"""How many of its units a strategy can buy with a budget; what cannot be bought is refused with the way out."""

from __future__ import annotations

import math

from search.errors import BudgetError
from search.types import Budget


def num_samples(budget: Budget, samples: int = 0) -> int:
    """Answers to draw: as many as a budget of samples buys; with one of tokens or FLOPs, `samples` says how many.

    Raises BudgetError.
    """
    if budget.unit != "samples":
        if samples < 1:
            raise BudgetError(
                f"a budget in {budget.unit} does not say how wide to search: give samples, as in best_of_n(samples=16)"
            )
        return samples
    if budget.amount < 1 or samples < 0:
        given = f"samples = {samples}" if samples < 0 else f"a budget of {budget.amount:g} samples"
        raise BudgetError(f"{given} buys no answer: give at least 1")
    return int(min(budget.amount, samples or budget.amount))


def num_beams(budget: Budget, samples: int, width: int, lookahead: int = 0) -> int:
    """Beams of a search that expands each by `width`: N / (k + 1), a multiple of the width. Raises BudgetError."""
    num, each = num_samples(budget, samples), lookahead + 1
    if width < 1 or lookahead < 0:
        raise BudgetError(f"width = {width} and steps = {lookahead}: give a width of at least 1, steps of at least 0")
    if num % (each * width):
        cost = f" x {each} (every beam costs 1 + {lookahead} rollout steps)" if lookahead else ""
        nearest = max(each * width, num // (each * width) * each * width)
        raise BudgetError(
            f"{num} samples are no multiple of width {width}{cost}: give {nearest} samples, or another width"
        )
    return num // each


def half_of(budget: Budget, samples: int, width: int) -> int:
    """Beams of a search that spends half of the budget, a multiple of the width. Raises BudgetError."""
    num = num_samples(budget, samples)
    if width < 1 or num % (2 * width):
        nearest = max(1, num // (2 * max(1, width))) * 2 * max(1, width)
        raise BudgetError(
            f"{num} samples are no multiple of 2 x width {width} (half of them are for the beams, half for revisions): "
            f"give {nearest} samples, or another width"
        )
    return num // 2


def chain_length(num: int, ratio: float) -> int:
    """Attempts a chain so that length : chains comes nearest to `ratio`, length x chains = num (ICLR table 1).

    ratio 0 is fully parallel, math.inf fully sequential. Example: chain_length(16, 4) == 8, in two chains.
    """
    if ratio < 0:
        raise BudgetError(f"ratio = {ratio:g}: give attempts in a row over attempts side by side, 0 or more")
    if ratio == 0 or math.isinf(ratio):
        return num if ratio else 1
    lengths = [length for length in range(1, num + 1) if num % length == 0]
    return min(lengths, key=lambda length: abs(math.log(length * length / num / ratio)))
