"""The StrategyTable: which strategy to run, by predicted difficulty and budget (Snell et al. 2024, sections 3.1-3.2).

A bin of difficulty has a ladder of rungs, one for each strategy and budget that was measured, with what it is
estimated to be worth and to cost there. A budget per question chooses a rung in each bin; a mean budget over many
questions chooses them together, so that hard questions may get more. `search.optimal` fits it; here it is read,
written and asked. Left out: interpolation between budgets.

Axis legend: _P problems, _B bins, from 1 = easiest; 0 stands for all problems together.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from search import stats
from search.allocate import Allocation, Ladder, allocate
from search.errors import BudgetError, DataError

Objective = Literal["answer", "rows"]
FORMAT = 1
TOLERANCE = 0.5  # standard errors by which a cheaper rung may be worse
EVERYWHERE = 0  # the bin of a problem whose difficulty is not known


@dataclass(frozen=True, slots=True)
class Rung:
    """One strategy at one budget, in one bin.

    `value` is shrunken (see `search.optimal`), `mean` what was measured, `se` its standard error beside the other
    rungs of the bin; `flops` a problem's ideal FLOPs. Example: Rung("beam(width=2)", 8, .61, .62, .02, 3.1e8)
    """

    arm: str
    budget: float
    value: float
    mean: float
    se: float
    flops: float

    @property
    def name(self) -> str:
        return f"{self.arm} @ {self.budget:g}"

    @classmethod
    def from_json(cls, row: Mapping[str, Any]) -> Rung:
        """Raises TypeError, ValueError for what cannot be one."""
        rung = cls(**row)
        numbers = [rung.budget, rung.value, rung.mean, rung.se, rung.flops]
        if not isinstance(rung.arm, str) or not all(map(math.isfinite, numbers)):
            raise ValueError(f"{row} is no rung")
        return rung


@dataclass(frozen=True, slots=True)
class StrategyTable:
    """`ladders[b]` holds the rungs of bin b, cheapest first; `ladders[0]` those of all problems together.

    `edges` cut predicted pass rates into bins (`search.stats.assign_bins`). `made_of` says what data made it: numbers
    of problems, fingerprints of policy and verifier, arms, seed.
    """

    objective: Objective
    edges: tuple[float, ...]
    counts: tuple[int, ...]  # problems of each bin it was fitted on; counts[0] all of them
    ladders: tuple[tuple[Rung, ...], ...]
    made_of: Mapping[str, Any] = field(default_factory=dict[str, Any])

    @property
    def num_bins(self) -> int:
        return len(self.ladders) - 1

    def bins(self, rates_P: Sequence[float]) -> NDArray[np.intp]:
        """The bin of each predicted pass rate, from 1 = easiest; 0 where the rate is not finite."""
        rates = np.asarray(rates_P, dtype=np.float64)
        bins = stats.assign_bins(np.nan_to_num(rates), self.edges)
        return np.where(np.isfinite(rates), np.minimum(bins, self.num_bins), EVERYWHERE)

    def choose(self, bin: int, budget: float) -> Rung:
        """The rung for a budget of samples a question. Raises BudgetError where nothing in the table is as cheap."""
        affordable = [rung for rung in self.ladders[bin] if rung.budget <= budget]
        if not affordable:
            least = min(rung.budget for rung in self.ladders[bin])
            raise BudgetError(f"the table knows no strategy for {budget:g} samples: give at least {least:g}")
        return affordable[pick(affordable)]

    def best_within(self, bin: int, flops: float) -> Rung:
        """The rung with the most value that costs at most so much. Raises BudgetError."""
        affordable = [rung for rung in self.ladders[bin] if rung.flops <= flops]
        if not affordable:
            raise BudgetError(f"no strategy of the table costs as little as {flops:.3g} FLOPs: give more")
        return max(affordable, key=lambda rung: (rung.value, -rung.flops))

    def spread(self, mean_flops: float, counts: Sequence[int], *, abstain: bool = False) -> Allocation:
        """Offers for the bins, from bin 1 on, so that questions cost at most `mean_flops` on average and are worth the
        most: indices of rungs in each bin's ladder. `counts`: questions in each bin; where there is none, the offer is
        the cheapest. `abstain`: no answer, for free, may be an offer. Raises BudgetError where even the cheapest rungs
        cost more."""
        ladders = [Ladder([r.flops for r in steps], [r.value for r in steps]) for steps in self.ladders[1:]]
        asked = [b for b, count in enumerate(counts) if count]
        found = allocate([ladders[b] for b in asked], mean_flops, counts=[counts[b] for b in asked], abstain=abstain)
        choice_P = np.zeros(len(ladders), dtype=np.intp)
        choice_P[asked] = found.choice_P
        splits = tuple(split._replace(ladder=asked[split.ladder]) for split in found.splits)
        return replace(found, choice_P=choice_P, splits=splits)

    def to_json(self) -> dict[str, Any]:
        return {
            "format": FORMAT,
            "objective": self.objective,
            "edges": list(self.edges),
            "counts": list(self.counts),
            "ladders": [[asdict(rung) for rung in ladder] for ladder in self.ladders],
            "made_of": dict(self.made_of),
        }

    @classmethod
    def from_json(cls, row: Mapping[str, Any], source: str = "this table") -> StrategyTable:
        """Raises DataError for another format, and for a table that does not hold together."""
        try:
            if (format := row["format"]) != FORMAT:
                raise DataError(f"{source} has format {format!r}, this Ratchet reads {FORMAT}: fit it again")
            table = cls(
                objective=row["objective"],
                edges=tuple(map(float, row["edges"])),
                counts=tuple(map(int, row["counts"])),
                ladders=tuple(tuple(Rung.from_json(rung) for rung in ladder) for ladder in row["ladders"]),
                made_of=dict(row["made_of"]),
            )
        except (KeyError, TypeError, ValueError) as error:
            if isinstance(error, DataError):
                raise
            raise DataError(f"{source} is no strategy table ({error!r}): fit it again") from error
        if wrong := table._wrong():
            raise DataError(f"{source}: {wrong}: fit it again")
        return table

    def _wrong(self) -> str | None:
        """What does not hold together."""
        if self.objective not in get_args(Objective):
            return f"objective '{self.objective}' is none of {', '.join(get_args(Objective))}"
        if len(self.counts) != len(self.ladders) or not all(self.ladders) or self.num_bins != len(self.edges) + 1:
            return "edges, counts and ladders do not fit together"
        if not np.isfinite(self.edges).all() or list(self.edges) != sorted(set(self.edges)):
            return "its edges do not rise"
        if any([rung.flops for rung in ladder] != sorted(rung.flops for rung in ladder) for ladder in self.ladders):
            return "the rungs of a bin are not in the order of their FLOPs"
        return None

    def save(self, path: Path) -> None:
        path.write_text(json.dumps(self.to_json(), indent=1) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: Path) -> StrategyTable:
        """Raises DataError."""
        try:
            row = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise DataError(f"{path} cannot be read as a strategy table ({error})") from error
        return cls.from_json(row, str(path))


def pick(rungs: Sequence[Rung]) -> int:
    """The cheapest of those that are worse than the best one by at most half a standard error of the difference.

    Half: a whole one gave away three points of accuracy in trials, none at all lets luck choose what is dear.
    """
    best = max(rungs, key=lambda rung: (rung.value, -rung.flops))
    fair = [
        i
        for i, rung in enumerate(rungs)
        if best.value - rung.value <= TOLERANCE * np.hypot(best.se, rung.se) or rung is best
    ]
    return min(fair, key=lambda i: rungs[i].flops)
