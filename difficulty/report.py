"""What a predictor is worth, by predictions of problems it did not see, and whether it may be used at all.

A predictor that cannot be trusted says so: predictions that are not finite or all alike, too few problems, none better
than a constant, better than the truth could be (a leak), or fitted to the very problems it is measured on.

Axis legend: _P problems, _B bins.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any

import numpy as np

from difficulty.bins import Agreement, Bins, agreement, confusion
from difficulty.calibration import CurvePoint, Floats, Ints, Scores, curve, score
from search import stats

KINDS = ("ridge", "mlp", "tokens", "sequence")
MIN_PROBLEMS = 50
TOO_GOOD = 3.1  # standard errors below what the truth itself would score: by chance one time in a thousand


@dataclass(frozen=True, slots=True)
class BinReport:
    """The predictor's bins beside the oracle's, which are cut the same way on the sampled pass rates."""

    edges: tuple[float, ...]  # of predicted rates
    oracle_edges: tuple[float, ...]  # of sampled rates
    confusion: tuple[tuple[int, ...], ...]  # [oracle bin][predicted bin], easiest first
    agreement: Agreement

    @classmethod
    def of(cls, predicted_P: Floats, rates_P: Floats, cuts: Bins, oracle: Bins) -> BinReport | None:
        """None where the two have not as many bins: what was fitted is cut in another way than is asked for now."""
        if cuts.num != oracle.num:
            return None
        table = confusion(oracle(rates_P), cuts(predicted_P), oracle.num)
        rows = tuple(tuple(int(n) for n in row) for row in table.tolist())
        return cls(cuts.edges, oracle.edges, rows, agreement(table))

    @classmethod
    def from_json(cls, row: Mapping[str, Any]) -> BinReport:
        return cls(
            edges=tuple(row["edges"]),
            oracle_edges=tuple(row["oracle_edges"]),
            confusion=tuple(tuple(counts) for counts in row["confusion"]),
            agreement=Agreement(**row["agreement"]),
        )


@dataclass(frozen=True, slots=True)
class Tried:
    """One kind of predictor among those fitted, on the problems that all of them hold out."""

    kind: str
    brier_rate: float | None = None  # None: it came to nothing
    spearman: float | None = None
    flops: float | None = None  # of one prediction, beyond the policy's prefill
    why: str = ""  # it came to nothing


@dataclass(frozen=True, slots=True)
class Report:
    """What a predictor is worth. Example: Report("held out", 333, "tokens", ...)"""

    source: str  # out of fold, or held out
    n: int
    kind: str
    scores: Scores
    ceiling: float | None  # the Spearman of the true pass rates with these labels (split halves); None: unknown
    baselines: Mapping[str, Scores]  # constant, length, and metadata where the task has some
    curve: tuple[CurvePoint, ...]
    usable: bool
    why: str  # one line, also where it is usable
    bins: BinReport | None = None
    strength: float = 0.0  # how many samples' worth a prediction knows
    flops: float = 0.0  # of one prediction at the mean length of a prompt, beyond the policy's prefill
    tried: tuple[Tried, ...] = field(default=())

    @property
    def share(self) -> float | None:
        """The Spearman's share of its ceiling."""
        return self.scores.spearman / self.ceiling if self.ceiling else None

    def metrics(self) -> list[dict[str, Any]]:
        """Rows of metrics.jsonl, named `difficulty/...`."""
        s = self.scores
        rows: list[dict[str, Any]] = [
            {"name": "difficulty/spearman", "value": s.spearman, "se": s.spearman_se},
            {"name": "difficulty/brier", "value": s.brier},
            {"name": "difficulty/brier_rate", "value": s.brier_rate},
            {"name": "difficulty/ece", "value": s.ece},
            {"name": "difficulty/usable", "value": float(self.usable)},
            {"name": "difficulty/kind", "value": float(KINDS.index(self.kind) + 1)},
            {"name": "difficulty/strength", "value": self.strength},
            {"name": "difficulty/flops", "value": self.flops},
        ]
        optional = {"auroc": s.auroc, "spearman_ceiling": self.ceiling, "spearman_share": self.share}
        if self.bins:
            optional["bin_agreement"] = self.bins.agreement.exact
            optional["bin_agreement_within_one"] = self.bins.agreement.within_one
            optional["bin_agreement_chance"] = self.bins.agreement.chance
        rows += [{"name": f"difficulty/{name}", "value": v} for name, v in optional.items() if v is not None]
        for name, b in self.baselines.items():
            rows.append({"name": f"difficulty/{name}_spearman", "value": b.spearman, "se": b.spearman_se})
            rows.append({"name": f"difficulty/{name}_brier_rate", "value": b.brier_rate})
        return rows

    def unusable(self, why: str) -> Report:
        return replace(self, usable=False, why=why)

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | {"share": self.share}

    @classmethod
    def from_json(cls, row: Mapping[str, Any]) -> Report:
        special: dict[str, Any] = {
            "scores": Scores.from_json(row["scores"]),
            "baselines": {name: Scores.from_json(b) for name, b in row["baselines"].items()},
            "curve": tuple(CurvePoint(**point) for point in row["curve"]),
            "bins": BinReport.from_json(row["bins"]) if row["bins"] else None,
            "tried": tuple(Tried(**one) for one in row["tried"]),
        }
        return cls(**{f.name: row[f.name] for f in fields(cls) if f.name not in special}, **special)


def measure(
    source: str,
    kind: str,
    predicted_P: Floats,
    baselines: Mapping[str, Floats],
    successes_P: Ints,
    totals_P: Ints,
    seed: object,
) -> Report:
    """The report of predictions in [0, 1] of problems with at least one sample each."""
    scores = score(predicted_P, successes_P, totals_P, seed=seed)
    others = {name: score(rates, successes_P, totals_P, seed=seed) for name, rates in baselines.items()}
    ceiling = stats.spearman_ceiling(successes_P, totals_P, seed=seed)
    usable, why = judge(predicted_P, scores, others["constant"], successes_P, totals_P)
    return Report(
        source=source,
        n=len(predicted_P),
        kind=kind,
        scores=scores,
        ceiling=None if np.isnan(ceiling) else ceiling,
        baselines=others,
        curve=curve(predicted_P, successes_P / totals_P),
        usable=usable,
        why=why,
    )


def judge(predicted_P: Floats, scores: Scores, constant: Scores, successes_P: Ints, totals_P: Ints) -> tuple[bool, str]:
    """Whether the predictor may be used, and why or why not."""
    if len(predicted_P) < MIN_PROBLEMS:
        return False, f"{len(predicted_P)} labelled problems, at least {MIN_PROBLEMS} are needed"
    if len(np.unique(successes_P / totals_P)) < 2:
        return False, f"every problem has the same pass rate, {successes_P[0] / totals_P[0]:.2f}"
    usable, why = check_rates(predicted_P)
    if not usable:
        return False, why
    if leak := too_good(predicted_P, successes_P, totals_P):
        return False, leak
    # 99 %: predictions of one fold share a model, so they scatter more than the bootstrap over problems knows
    lower = scores.spearman - stats.normal_quantile(0.99) * scores.spearman_se
    usable = lower > 0 and constant.brier_rate > scores.brier_rate
    return usable, (
        f"Spearman {scores.spearman:.2f} (lower bound {lower:.2f}), Brier {scores.brier_rate:.4f} against "
        f"{constant.brier_rate:.4f} of a constant: {'better' if usable else 'no better'} than none"
    )


def check_rates(rates_P: Floats) -> tuple[bool, str]:
    """Whether predictions can order problems, and why not: some are not finite, or all are equal."""
    num_bad = int((~np.isfinite(rates_P)).sum())
    if num_bad:
        return False, f"{num_bad} of {len(rates_P)} predictions are not finite"
    if len(rates_P) > 1 and float(np.ptp(rates_P)) < 1e-6:
        return False, f"all {len(rates_P)} predictions are {float(rates_P[0]):.3f}"
    return True, "predictions differ"


def too_good(predicted_P: Floats, successes_P: Ints, totals_P: Ints) -> str:
    """Why predictions cannot be honest: they are nearer to the sampled rates than the true rates would be. Else empty.

    A prediction made from the question alone knows nothing of the luck of the samples, so its squared distance to the
    sampled rate, less the label's own variance, is at least 0 on average. States that hold the answers, or labels that
    found their way into the features, come out below.
    """
    keep = totals_P >= 2
    if keep.sum() < 2:
        return ""
    rate, totals = successes_P[keep] / totals_P[keep], totals_P[keep]
    found = stats.mean_estimate((predicted_P[keep] - rate) ** 2 - rate * (1 - rate) / (totals - 1))
    if not (math.isfinite(found.se) and found.value + TOO_GOOD * found.se < 0):
        return ""
    return (
        f"predictions are nearer to the sampled pass rates than the true ones could be (Brier less label noise "
        f"{found.value:.4f} ± {found.se:.4f}): they were made from the answers, not from the questions"
    )


def leaked(keys: Sequence[str], fitted: frozenset[int], hashed: Sequence[int]) -> str:
    """Why predictions of these problems are no test: the predictor was fitted to some. Else empty."""
    found = [key for key, value in zip(keys, hashed, strict=True) if value in fitted]
    return f"{len(found)} of {len(keys)} problems were used to fit it, first '{found[0]}'" if found else ""
