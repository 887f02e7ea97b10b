"""The gate: may the challenger replace the champion? Pure: evidence in, verdict out.

Primary test: greedy answers on the same problems, exact one-sided McNemar at alpha / (j (j + 1)), j being the looks at
this gate set since the last promotion; or the mean pass@1 of sampled answers, paired t. Coverage (pass@k) and every
guard set must not be worse: the lower one-sided 95 % bound of the paired difference against a margin. Any error, leak,
tie or missing figure rejects. Left out: futility stopping, and pooling evidence over looks.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from configs.schema import Gate
from search import evaluate, stats
from search.errors import DataError

Outcomes = Mapping[str, bool]  # problem key -> solved
PassCounts = Mapping[str, tuple[int, int]]  # problem key -> (right samples, samples)


@dataclass(frozen=True, slots=True)
class Guard:
    """Greedy outcomes on a set of problems the challenger must not do worse on."""

    name: str
    champion: Outcomes
    challenger: Outcomes


@dataclass(frozen=True, slots=True)
class Evidence:
    """What the gate decides on. Champion and challenger answered the same problems with the same seeds."""

    look: int  # from 1: looks at this gate set since the last promotion, this one included
    champion_greedy: Outcomes
    challenger_greedy: Outcomes
    champion_pool: PassCounts
    challenger_pool: PassCounts
    guards: tuple[Guard, ...] = ()
    leaks: tuple[str, ...] = ()  # held-out problems found in the training rows, and the like
    ungraded_share: float = 0.0  # the largest of all files
    training_rows: int = 0
    min_rows: int = 0
    errors: tuple[str, ...] = ()  # of any stage


@dataclass(frozen=True, slots=True)
class Comparison:
    """Challenger against champion on one measure. `low`: lower one-sided 95 % bound of the difference."""

    name: str
    n: int
    champion: float
    challenger: float
    difference: float
    se: float
    low: float
    margin: float


@dataclass(frozen=True, slots=True)
class Primary:
    """The primary test. `low` and `high`: two-sided 95 % interval of the effect; `mde`: what this test could find."""

    measure: str
    n: int
    champion: float
    challenger: float
    effect: float
    se: float
    low: float
    high: float
    wins: int  # problems that only the challenger solved (pass_at_1: solved more often)
    losses: int
    p: float
    alpha: float
    mde: float


@dataclass(frozen=True, slots=True)
class Verdict:
    """The decision. `reasons`: if promoted, what it passed; if not, what it failed. `checks` holds all lines."""

    promoted: bool
    reasons: tuple[str, ...]
    checks: tuple[tuple[bool, str], ...]
    look: int
    primary: Primary | None
    comparisons: tuple[Comparison, ...]

    def to_json(self) -> dict[str, Any]:
        row = asdict(self)
        row["checks"] = [{"passed": passed, "text": text} for passed, text in self.checks]
        return {"promoted": row.pop("promoted"), **{k: list(v) if isinstance(v, tuple) else v for k, v in row.items()}}

    @classmethod
    def from_json(cls, row: Mapping[str, Any]) -> Verdict:
        return cls(
            promoted=row["promoted"],
            reasons=tuple(row["reasons"]),
            checks=tuple((check["passed"], check["text"]) for check in row["checks"]),
            look=row["look"],
            primary=Primary(**row["primary"]) if row["primary"] else None,
            comparisons=tuple(Comparison(**c) for c in row["comparisons"]),
        )

    def metrics(self) -> list[dict[str, Any]]:
        """Rows of metrics.jsonl, named `gate/...`."""
        rows: list[dict[str, Any]] = [
            {"name": "gate/promoted", "value": float(self.promoted)},
            {"name": "gate/look", "value": self.look},
        ]
        if self.primary:
            first = self.primary
            rows.append({"name": "gate/effect", "value": first.effect, "se": first.se})
            for name in ("low", "high", "p", "alpha", "mde", "wins", "losses", "n", "champion", "challenger"):
                rows.append({"name": f"gate/{name}", "value": getattr(first, name)})
        for c in self.comparisons:
            rows.append({"name": f"gate/{c.name}", "value": c.difference, "se": c.se})
            rows.append({"name": f"gate/{c.name}_low", "value": c.low})
        return rows


def decide(config: Gate, evidence: Evidence) -> Verdict:
    """Promote only if every check passes. Never raises on bad evidence: what cannot be judged is a failed check."""
    checks = _formal_checks(config, evidence)
    primary, comparisons = None, []
    try:
        primary = _primary(config, evidence)
        checks += _primary_checks(config, primary, evidence.look)
    except ValueError as error:
        checks.append((False, f"the primary test cannot be made: {error}"))
    try:
        comparisons.append(_coverage(config, evidence))
    except ValueError as error:
        checks.append((False, f"coverage cannot be compared: {error}"))
    margins = {g.name: g.margin for g in config.guards}
    for guard in evidence.guards:
        try:
            a, b = _aligned(guard.champion, guard.challenger)
            comparisons.append(_compare(f"guard_{guard.name}", a, b, margins.get(guard.name, config.margin)))
        except ValueError as error:
            checks.append((False, f"guard '{guard.name}' cannot be compared: {error}"))
    missing = margins.keys() - {g.name for g in evidence.guards}
    checks += [(False, f"guard '{name}' was not measured") for name in sorted(missing)]
    checks += [_comparison_check(c) for c in comparisons]
    promoted = all(passed for passed, _ in checks)
    reasons = tuple(text for passed, text in checks if passed == promoted)
    return Verdict(promoted, reasons, tuple(checks), evidence.look, primary, tuple(comparisons))


def gather(
    config: Gate,
    champion: Path,
    challenger: Path,
    *,
    look: int,
    leaks: Sequence[str] = (),
    training_rows: int,
    min_rows: int,
    errors: Sequence[str] = (),
) -> Evidence:
    """Evidence from two folders of results: greedy-gate.jsonl, pool-gate.jsonl, greedy-guard-NAME.jsonl.

    A file that is missing or damaged becomes an error of the evidence, and so a rejection.
    """
    found, shares = list(errors), [0.0]

    def greedy(folder: Path, name: str) -> Outcomes:
        try:
            outcomes = evaluate.read_outcomes(folder / f"greedy-{name}.jsonl")
        except DataError as error:
            found.append(str(error))
            return {}
        shares.append(outcomes.num_ungraded / max(len(outcomes.solved), 1))
        return outcomes.solved

    def pool(folder: Path) -> PassCounts:
        try:
            figures = evaluate.read_pool(folder / "pool-gate.jsonl", (1,), ())
        except DataError as error:
            found.append(str(error))
            return {}
        shares.append(figures.num_ungraded / max(sum(n for _, n in figures.counts.values()), 1))
        return figures.counts

    return Evidence(
        look=look,
        champion_greedy=greedy(champion, "gate"),
        challenger_greedy=greedy(challenger, "gate"),
        champion_pool=pool(champion),
        challenger_pool=pool(challenger),
        guards=tuple(
            Guard(g.name, greedy(champion, f"guard-{g.name}"), greedy(challenger, f"guard-{g.name}"))
            for g in config.guards
        ),
        leaks=tuple(leaks),
        ungraded_share=max(shares),
        training_rows=training_rows,
        min_rows=min_rows,
        errors=tuple(found),
    )


# ---------------------------------------------------------------- the checks


def _formal_checks(config: Gate, evidence: Evidence) -> list[tuple[bool, str]]:
    checks = [(False, f"a stage failed: {error}") for error in evidence.errors]
    leaks = evidence.leaks
    text = "no leak" if not leaks else f"{len(leaks)} leaks between training and held-out problems, first: {leaks[0]}"
    checks.append((not leaks, text))
    share, limit = evidence.ungraded_share, config.max_ungraded
    # written so that a share of nan fails
    checks.append(
        (0 <= share <= limit, f"{100 * share:.2f} % of the answers are ungraded, at most {100 * limit:g} % may be")
    )
    rows, least = evidence.training_rows, evidence.min_rows
    checks.append((rows >= least, f"{rows} training rows, at least {least} are needed"))
    return checks


def _primary(config: Gate, evidence: Evidence) -> Primary:
    alpha = stats.alpha_at_look(config.alpha, evidence.look)
    if config.primary == "greedy":
        a, b = _aligned(evidence.champion_greedy, evidence.challenger_greedy)
    else:
        champion, challenger = _same_keys(evidence.champion_pool, evidence.challenger_pool)
        a, b = [_pass_at(c, 1) for c in champion], [_pass_at(c, 1) for c in challenger]
    wins, losses = sum(y > x for x, y in zip(a, b, strict=True)), sum(y < x for x, y in zip(a, b, strict=True))
    found = _difference(a, b)
    if config.primary == "greedy":
        p = stats.mcnemar_p(losses, wins)
    else:  # the same difference everywhere leaves no error to judge by
        p = stats.t_upper_p(found.mean / found.se, found.n - 1) if found.se > 0 else 1.0
    # one won and one lost problem more, so that a set without any difference does not promise to find anything
    sd = math.sqrt((sum((y - x) ** 2 for x, y in zip(a, b, strict=True)) + 2) / (found.n + 2))
    return Primary(
        measure="greedy accuracy" if config.primary == "greedy" else "mean pass@1",
        n=found.n,
        champion=sum(a) / found.n,
        challenger=sum(b) / found.n,
        effect=found.mean,
        se=found.se,
        low=found.low,
        high=found.high,
        wins=wins,
        losses=losses,
        p=p,
        alpha=alpha,
        mde=stats.minimum_detectable_effect(sd, found.n, alpha=alpha),
    )


def _primary_checks(config: Gate, primary: Primary, look: int) -> list[tuple[bool, str]]:
    enough = primary.n >= config.min_problems
    better = primary.effect > 0 and primary.p <= primary.alpha
    text = (
        f"{primary.measure} {_percent(primary.champion)} -> {_percent(primary.challenger)} "
        f"({100 * primary.effect:+.1f} points, 95 % interval {100 * primary.low:+.1f} to {100 * primary.high:+.1f}; "
        f"{primary.wins} won, {primary.losses} lost; p = {primary.p:.2g}, alpha = {primary.alpha:.2g} at look {look})"
    )
    if not better:
        text += f": not shown to be better; this test finds gains from {100 * primary.mde:.1f} points on"
    return [
        (enough, f"{primary.n} gate problems, at least {config.min_problems} are needed"),
        (better, text),
    ]


def _coverage(config: Gate, evidence: Evidence) -> Comparison:
    champion, challenger = _same_keys(evidence.champion_pool, evidence.challenger_pool)
    k = config.coverage_k
    return _compare(
        f"pass_at_{k}", [_pass_at(c, k) for c in champion], [_pass_at(c, k) for c in challenger], config.margin
    )


def _compare(name: str, a: Sequence[float], b: Sequence[float], margin: float) -> Comparison:
    found = _difference(a, b)
    low = stats.paired_lower_bound(a, b)
    return Comparison(name, found.n, sum(a) / found.n, sum(b) / found.n, found.mean, found.se, low, margin)


def _difference(a: Sequence[float], b: Sequence[float]) -> stats.PairedDifference:
    if len(a) < 2:
        raise ValueError("one problem alone has no standard error")
    return stats.paired_difference(a, b)


def _comparison_check(c: Comparison) -> tuple[bool, str]:
    passed = c.low >= -c.margin
    text = (
        f"{c.name} {_percent(c.champion)} -> {_percent(c.challenger)} on {c.n} problems "
        f"({100 * c.difference:+.1f} points, lower 95 % bound {100 * c.low:+.1f}, allowed {-100 * c.margin:+.1f})"
    )
    if not passed and c.difference >= -c.margin:
        text += ": too few problems to rule out a loss beyond the margin"
    return passed, text


def _aligned(champion: Outcomes, challenger: Outcomes) -> tuple[list[float], list[float]]:
    a, b = _same_keys(champion, challenger)
    return [float(x) for x in a], [float(x) for x in b]


def _same_keys(champion: Mapping[str, Any], challenger: Mapping[str, Any]) -> tuple[list[Any], list[Any]]:
    """Values of both in the champion's order. Raises ValueError unless both hold the same problems, at least one."""
    if not champion and not challenger:
        raise ValueError("no problems")
    if champion.keys() != challenger.keys():
        odd = sorted(champion.keys() ^ challenger.keys())
        raise ValueError(
            f"champion and challenger answered different problems: {len(champion)} and {len(challenger)}, "
            f"{len(odd)} not in both, first '{odd[0]}'"
        )
    return list(champion.values()), [challenger[key] for key in champion]


def _pass_at(count: tuple[int, int], k: int) -> float:
    right, num = count
    return stats.pass_at_k(num, right, k)


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"
