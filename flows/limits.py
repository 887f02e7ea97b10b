"""What limits the loop now: its verifier, its search, or its distillation? From a round's own figures; nothing new is
sampled. Three gaps, as shares of the problems, at the N samples of the round's search (fewer where fewer were
measured):

    verifier      pass@N - chosen@N                 the winner's samples hold a right answer, the verifier takes another
    search        1 - pass@N                        none of the winner's samples is right; slope: a doubling finds it
    distillation  search@N before - greedy after    the champion's samples held it, the challenger's own answer lacks it

The largest limits the loop where it exceeds each of the others by more than the error of their difference. The winner
is whichever model the gate left as champion; what distilling lost is told of the challenger, promoted or not.

metrics.jsonl of the report: limits/verifier_gap, limits/search_gap, limits/distillation_gap, what they are made of, and
limits/limited_by: 1 verifier, 2 search, 3 distillation, 0 cannot be told apart. What was not measured is left out.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path

from flows.history import Z95, Figure, Round, greedy_outcomes, read_json, shard_files
from search import stats
from search.evaluate import solved
from search.results import read_results
from search.stats import Estimate
from search.verifiers.health import Health

Counts = Mapping[str, tuple[int, int]]  # by problem: right answers, samples
CODES = {"verifier": 1, "search": 2, "distillation": 3}
_LEADS = {
    "verifier": "The verifier limits this loop",
    "search": "Search limits this loop",
    "distillation": "Distillation limits this loop",
    None: "What limits this loop cannot be told apart",
}


@dataclass(frozen=True, slots=True)
class Limits:
    """A field is a metric of its name; None: not measured.

    Example: Limits(samples=Figure(16), verifier_gap=Figure(.02, .008), search_gap=Figure(.33, .02), ...)
    """

    samples: Figure  # N
    verifier_gap: Figure | None = None
    contained: Figure | None = None  # pass@N of the answers that the verifier read
    chosen: Figure | None = None  # its weighted choice among N
    majority: Figure | None = None  # the vote of the same N
    search_gap: Figure | None = None
    search_slope: Figure | None = None  # what a doubling of the samples finds
    greedy: Figure | None = None  # the winner's own answer
    distillation_gap: Figure | None = None
    searched_before: Figure | None = None
    greedy_after: Figure | None = None

    @property
    def gaps(self) -> dict[str, Figure]:
        """Those that were measured, the largest first."""
        found = {"verifier": self.verifier_gap, "search": self.search_gap, "distillation": self.distillation_gap}
        known = {name: gap for name, gap in found.items() if gap is not None}
        return dict(sorted(known.items(), key=lambda item: -item[1].value))

    @property
    def limited_by(self) -> str | None:
        """The gap that exceeds every other by more than 1.96 standard errors of the difference; None: there is none."""
        if len(self.gaps) < 2:
            return None
        (name, largest), *others = self.gaps.items()
        return name if all(_exceeds(largest, other) for _, other in others) else None

    def metrics(self) -> dict[str, float | tuple[float, float]]:
        """Rows of metrics.jsonl, a tuple being (value, standard error)."""
        found = {f.name: getattr(self, f.name) for f in fields(self)}
        known: dict[str, Figure] = {f"limits/{name}": figure for name, figure in found.items() if figure is not None}
        rows = {n: f.value if f.se is None or not math.isfinite(f.se) else (f.value, f.se) for n, f in known.items()}
        return rows | ({"limits/limited_by": float(CODES.get(self.limited_by or "", 0))} if len(self.gaps) > 1 else {})

    def sentence(self) -> str:
        """For people; empty where there is nothing to compare."""
        if len(self.gaps) < 2:
            return ""
        clauses = {"verifier": self._of_verifier, "search": self._of_search, "distillation": self._of_distillation}
        return f"{_LEADS[self.limited_by]}: {'; '.join(clauses[name]() for name in self.gaps)}."

    def _of_verifier(self) -> str:
        besides = {"majority": self.majority, "greedy": self.greedy}
        told = "".join(f", {name} {_percent(figure)}" for name, figure in besides.items() if figure is not None)
        return (
            f"of {_percent(self.contained)} that {self._samples} of the policy hold, the verifier chooses "
            f"{_percent(self.chosen)} (gap {_points(self.verifier_gap)} points{told})"
        )

    def _of_search(self) -> str:
        slope = f", and a doubling finds {_points(self.search_slope)} points of it" if self.search_slope else ""
        return f"{self._samples} hold no right answer to {_points(self.search_gap)} % of the problems{slope}"

    def _of_distillation(self) -> str:
        gap = self.distillation_gap
        before = f"{self._samples} of the champion before held a right answer to {_percent(self.searched_before)}"
        lost = f"(gap {_points(gap)} points)" if gap and gap.value > 0 else "(no gap)"
        return f"{before}, the distilled model's own answer is right for {_percent(self.greedy_after)} {lost}"

    @property
    def _samples(self) -> str:
        num = round(self.samples.value)
        return f"{num} samples" if num != 1 else "one sample"


def from_metrics(metrics: Mapping[str, Figure]) -> Limits | None:
    """Of what `Limits.metrics` wrote; None where it wrote nothing."""
    found = {f.name: metrics.get(f"limits/{f.name}") for f in fields(Limits)}
    return Limits(**found) if found["samples"] else None  # pyright: ignore[reportArgumentType]


def _exceeds(gap: Figure, other: Figure) -> bool:
    """Beyond chance. An error that is not known is none that could be exceeded."""
    if gap.se is None or other.se is None:
        return False
    return gap.value - other.value > Z95 * math.hypot(gap.se, other.se)


def _percent(figure: Figure | None) -> str:
    return "?" if figure is None else f"{100 * figure.value:.1f} %"


def _points(figure: Figure | None) -> str:
    """With half of the 95 % interval: "22.4 ±3.1"."""
    if figure is None:
        return "?"
    return f"{100 * figure.value:.1f}" + (f" ±{100 * figure.half_width:.1f}" if figure.se else "")


# ---------------------------------------------------------------- measuring


def find_limits(round_: Round, before: Counts | None = None, after: Counts | None = None) -> Limits | None:
    """Of a round whose verdict stands; None of a control, and where nothing was measured.

    `before`, `after`: the test pools of the champion that it began with and of its challenger, read here unless given.
    """
    if round_.kind != "round":
        return None
    before = before or (read_counts(round_.before.folder) if round_.before else {})
    after = after or read_counts(round_.folder)
    promoted = round_.champion is not None and round_.champion.folder == round_.folder
    winner = after if promoted or round_.before is None else before
    health = read_health(round_.folder / "verifier")
    pools = [counts for counts in (winner, before) if counts]
    sizes = [float(n) for counts in pools for _, n in counts.values() if n]
    sizes += [float(round_.samples)] if round_.samples else []
    num = int(min(sizes, default=0))
    if health:
        num = max((k for k in health.selection.ks if k <= num or not num), default=0)
    if num < 1 or not (pools or health):
        return None
    found = {"samples": Figure(float(num)), "greedy": round_.champion_metrics.get("test/accuracy_greedy")}
    found |= of_verifier(health, num) if health else {}
    found |= of_search(winner, num) if winner else {}
    found |= of_distillation(before, greedy_outcomes(round_.folder), num) if round_.before else {}
    return Limits(**found)


def of_verifier(health: Health, num: int) -> dict[str, Figure]:
    """On the fresh answers that its health was measured on."""
    place = health.selection.ks.index(num)
    curves = health.selection.accuracy
    contained, chosen, majority = (curves[rule][place] for rule in ("pass", "weighted", "majority"))
    gap = max(contained.value - chosen.value, 0.0)
    # by problem the gap lies in [0, 1], so its variance is at most that of a coin with this mean
    coin = math.sqrt(gap * (1 - gap) / (contained.n - 1)) if contained.n > 1 else math.inf
    error = min(coin, math.hypot(contained.se, chosen.se))
    found = {"contained": contained, "chosen": chosen, "majority": majority}
    return {name: _figure(estimate) for name, estimate in found.items()} | {"verifier_gap": Figure(gap, error)}


def of_search(winner: Counts, num: int) -> dict[str, Figure]:
    """The slope is that between N and 4 N samples, or as far as the pools go; else of the last doubling."""
    most = min([4 * num, *(n for _, n in winner.values() if n)])
    first, last = (num, most) if most > num else (num // 2, num)
    found = {"search_gap": _figure(stats.mean_estimate([1 - value for value in _held(winner, num)]))}
    if first:
        pairs = zip(_held(winner, first), _held(winner, last), strict=True)
        gained = [(more - less) / math.log2(last / first) for less, more in pairs]
        found["search_slope"] = _figure(stats.mean_estimate(gained))
    return found


def of_distillation(before: Counts, greedy: Mapping[str, float], num: int) -> dict[str, Figure]:
    """Paired, over the problems that both the old champion's samples and the challenger answered."""
    keys = [key for key in before if key in greedy]
    if not keys:
        return {}
    searched = _held({key: before[key] for key in keys}, num)
    own = [greedy[key] for key in keys]
    gap = [a - b for a, b in zip(searched, own, strict=True)]
    named = {"searched_before": searched, "greedy_after": own, "distillation_gap": gap}
    return {name: _figure(stats.mean_estimate(values)) for name, values in named.items()}


def _held(counts: Counts, k: int) -> list[float]:
    """pass@k of each problem; one that failed, without samples, is not solved."""
    return [stats.pass_at_k(n, right, k) if n else 0.0 for right, n in counts.values()]


def _figure(estimate: Estimate) -> Figure:
    return Figure(estimate.value, estimate.se if math.isfinite(estimate.se) else None)


def read_counts(folder: Path) -> dict[str, tuple[int, int]]:
    """Of a round's model on the test problems that were sampled; empty without pools."""
    results = read_results(shard_files(folder, "pool-test"))
    return {r.problem.key: (sum(map(solved, r.candidates)), len(r.candidates)) for r in results}


def read_health(stage: Path) -> Health | None:
    """Of the verifier that the round trained; None without one, and where it is not used."""
    row = read_json(stage / "health.json")
    return Health.from_json(row) if row and read_json(stage / "report.json").get("usable") else None
