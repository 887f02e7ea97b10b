"""How good a verifier is, from scored pools of held-out problems: ranking, calibration, steps, length, selection.

AUC within problems is the figure that counts for selection: the pooled one also rewards knowing which problems are
hard. A process verifier is a value model (Snell et al. 2024, section 5.1), so it is also held against fresh rollouts
of unfinished prefixes, and against step labels where a task has them. Everything is recomputed from stored results:
the pools must be fresh samples of the policy on problems that the verifier was not fitted to.

What counts: finished answers that can vote and that the grader judged. Others are counted, not measured. The numbers
themselves: `health_measures` and `health_selection`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import numpy as np

from search import evaluate, stats
from search.errors import DataError
from search.evaluate import Pool
from search.policy import AGGREGATE, steps_of
from search.stats import Estimate, Floats, PairedDifference
from search.types import Aggregation, Candidate, Grade, SearchResult, Task
from search.verifiers import health_measures as measures
from search.verifiers.health_measures import CalibrationPoint, LengthPoint, Steps, finite
from search.verifiers.health_selection import Alarm, Selection, selection

BINS = 20  # of the histogram, over [0, 1]
FEWEST = 10  # problems with which two verifiers are compared at all
Verdict = Literal["better", "not worse", "unclear", "worse"]


class PrefixValue(NamedTuple):
    """What the verifier predicted of an unfinished prefix, and how fresh rollouts from it ended.

    Without `key`, its problem, it counts as evidence of its own. Example: PrefixValue(0.7, 5, 8, "3,5,7>22")
    """

    predicted: float
    successes: int
    total: int
    key: str = ""


@dataclass(frozen=True, slots=True)
class OfProblem:
    """What two verifiers are compared by. `auc` None: all its answers are right, or all wrong."""

    auc: float | None
    brier: float
    num: int  # answers measured
    num_right: int


@dataclass(frozen=True, slots=True)
class Health:
    """A verifier's figures on one set of pools. What cannot be said (no wrong answers, no labels) is absent.

    `figures` by the names of `metrics`, without "verifier/". The rest is for drawing and for `compare`.
    """

    figures: Mapping[str, Estimate]
    selection: Selection
    calibration: tuple[CalibrationPoint, ...]
    lengths: tuple[LengthPoint, ...]
    histogram: Mapping[str, tuple[int, ...]]  # "right", "wrong": answers in equal bins of the score over [0, 1]
    counts: Mapping[str, int]
    by_problem: Mapping[str, OfProblem] = field(repr=False)

    @property
    def over_optimised(self) -> bool:
        return any(alarm.fired for alarm in self.selection.alarms)

    def metrics(self) -> list[dict[str, Any]]:
        """Rows {"name", "value", "se"}, finite values only; the names are the same in every round."""
        named = {f"verifier/{name}": estimate for name, estimate in self.figures.items()}
        for rule, curve in self.selection.accuracy.items():
            named |= {f"verifier/{rule}_at_{k}": e for k, e in zip(self.selection.ks, curve, strict=True)}
        for k, gain in zip(self.selection.ks, self.selection.gains, strict=True):
            named[f"verifier/weighted_gain_at_{k}"] = Estimate(gain.mean, gain.se, gain.n)
        alarm = float(self.over_optimised)
        rows = evaluate.metric_rows(named)
        rows += [{"name": "verifier/over_optimisation", "value": alarm}]
        rows += [{"name": f"verifier/{name}", "value": float(count)} for name, count in self.counts.items()]
        return [row for row in rows if math.isfinite(row["value"])]

    def to_json(self) -> dict[str, Any]:
        """Everything, in finite numbers and None."""
        chosen = self.selection
        return {
            "figures": {name: _estimate(e) for name, e in self.figures.items()},
            "counts": dict(self.counts),
            "samples": list(chosen.ks),
            "accuracy": {rule: [_estimate(e) for e in curve] for rule, curve in chosen.accuracy.items()},
            "selected_score": {rule: list(curve) for rule, curve in chosen.scores.items()},
            "weighted_gain": [_difference(gain) for gain in chosen.gains],
            "over_optimisation": [alarm.to_json() for alarm in chosen.alarms],
            "calibration": [point._asdict() for point in self.calibration],
            "lengths": [point.to_json() for point in self.lengths],
            "histogram": {name: list(bins) for name, bins in self.histogram.items()},
            "problems": {key: [p.auc, p.brier, p.num, p.num_right] for key, p in self.by_problem.items()},
        }

    @classmethod
    def from_json(cls, row: Mapping[str, Any]) -> Health:
        """Of what `to_json` gave."""
        return cls(
            figures={name: _to_estimate(e) for name, e in row["figures"].items()},
            selection=Selection(
                ks=tuple(row["samples"]),
                accuracy={rule: tuple(map(_to_estimate, curve)) for rule, curve in row["accuracy"].items()},
                scores={rule: tuple(curve) for rule, curve in row["selected_score"].items()},
                gains=tuple(map(_to_difference, row["weighted_gain"])),
                alarms=tuple(Alarm(**alarm) for alarm in row["over_optimisation"]),
            ),
            calibration=tuple(CalibrationPoint(**point) for point in row["calibration"]),
            lengths=tuple(map(LengthPoint.from_json, row["lengths"])),
            histogram={name: tuple(bins) for name, bins in row["histogram"].items()},
            counts=row["counts"],
            by_problem={key: OfProblem(*values) for key, values in row["problems"].items()},
        )


# ---------------------------------------------------------------- measuring


def measure(
    results: Iterable[SearchResult],
    *,
    task: Task | None = None,
    process: bool = True,
    aggregation: Aggregation = "last",
    values: Sequence[PrefixValue] = (),
    seed: object = 0,
) -> Health:
    """The figures of a verifier whose scores the candidates of `results` carry; one line is held at a time.

    `task`: with step labels (`task.step_labels`) the steps are measured too, unless `process` is False: an outcome
    verifier has one score an answer. A step is measured by the aggregated score up to it, as search uses it: a label
    says whether it and all before are right. Problems that failed are left out and counted. Raises DataError where
    nothing can be measured, for a score that is no number in [0, 1], for step scores that do not fit the steps, for
    impossible rollout counts, and for a problem that comes twice.
    """
    read = _Reader(task if process and hasattr(task, "step_labels") else None, aggregation)
    for result in results:
        read.add(result)
    if not read.keys:
        raise DataError("no answer has a score that could be measured: score the pools with the verifier first")
    scores, correct, lengths = (np.array(x, dtype=np.float64) for x in (read.scores, read.correct, read.lengths))
    by_problem = _by_problem(scores, correct, read.keys)
    figures = _answer_figures(scores, correct, read.keys, by_problem)
    points, figures["ece"] = measures.calibration(scores, correct, read.keys)
    figures |= _length_figures(scores, correct, lengths, np.array(read.num_steps, dtype=np.float64), read.keys)
    figures |= _step_figures(read.steps, seed) | _value_figures(values)
    read.counts |= {
        "problems": len(by_problem),
        "problems_both": sum(p.auc is not None for p in by_problem.values()),
        "answers": len(scores),
    }
    return Health(
        figures={name: e for name, e in figures.items() if math.isfinite(e.value)},
        selection=selection(read.pools, seed=seed),
        calibration=points,
        lengths=measures.score_by_length(lengths, scores, correct, read.keys),
        histogram={"right": _histogram(scores[correct == 1]), "wrong": _histogram(scores[correct == 0])},
        counts=read.counts,
        by_problem=by_problem,
    )


class _Reader:
    """Flat lists over all answers measured, and the pools of their problems."""

    def __init__(self, task: Any, aggregation: Aggregation) -> None:
        self._task = task
        self._aggregate = AGGREGATE[aggregation]
        self._seen: set[str] = set()
        self.pools: list[Pool] = []
        self.keys: list[str] = []  # of the problem of each answer
        self.scores: list[float] = []
        self.correct: list[bool] = []
        self.lengths: list[int] = []  # tokens; characters where an engine returns no ids
        self.num_steps: list[int] = []
        self.steps: list[Steps] = []
        self.counts: dict[str, int] = dict.fromkeys(("failed", "ungraded", "without_answer", "unscored"), 0)

    def add(self, result: SearchResult) -> None:
        key = result.problem.key
        if key in self._seen:
            raise DataError(f"problem '{key}' comes twice; each problem is one line, with all its samples")
        self._seen.add(key)
        if result.failed or not result.candidates:
            self.counts["failed"] += 1
            return
        self.pools.append(evaluate.reduce_pool(result))
        for number, candidate in enumerate(result.candidates):
            for score in (candidate.score, *candidate.step_scores):
                if score is not None and not -1e-6 <= score <= 1 + 1e-6:  # NaN is none either
                    raise DataError(f"problem '{key}', answer {number}: the score {score} is no number in [0, 1]")
            self._add_candidate(result, candidate, number)

    def _add_candidate(self, result: SearchResult, candidate: Candidate, number: int) -> None:
        key = result.problem.key
        if evaluate.ungraded(candidate):
            self.counts["ungraded"] += 1
            return
        if self._task is not None and candidate.complete and candidate.step_scores:
            self.steps.append(self._labelled(result, candidate, number))
        if not candidate.complete or candidate.answer is None:
            self.counts["without_answer"] += 1
        elif candidate.score is None:
            self.counts["unscored"] += 1
        else:
            self.keys.append(key)
            self.scores.append(min(max(candidate.score, 0.0), 1.0))
            self.correct.append(candidate.grade is Grade.CORRECT)
            self.lengths.append(len(candidate.ids) or len(candidate.text))
            self.num_steps.append(max(len(candidate.step_scores), len(candidate.text_ends)))

    def _labelled(self, result: SearchResult, candidate: Candidate, number: int) -> Steps:
        """The step labels of a finished answer. A last step that the task's checker does not see (nothing is written
        in it), and the end of the answer, are right where the answer is."""
        key, scores = result.problem.key, candidate.step_scores
        num = len(steps_of(candidate, self._task.step_delimiter))
        if len(scores) != num:
            raise DataError(
                f"problem '{key}', answer {number}: {len(scores)} step scores for {num} steps; say that the verifier "
                "is an outcome verifier, or score the pools anew with this task's step delimiter"
            )
        right = candidate.grade is Grade.CORRECT
        labels = [bool(label) for label in self._task.step_labels(result.problem, candidate.text)][:num]
        labels += [all(labels) and right] * (num - len(labels))
        labels[-1] = labels[-1] and right
        return Steps(key, tuple(self._aggregate(scores[: s + 1]) for s in range(num)), tuple(labels))


def _by_problem(scores_I: Floats, correct_I: Floats, keys_I: Sequence[str]) -> dict[str, OfProblem]:
    found: dict[str, OfProblem] = {}
    for key, i in measures.members(keys_I).items():
        area = stats.auroc(scores_I[i], correct_I[i] > 0)
        brier = float(np.mean((scores_I[i] - correct_I[i]) ** 2))
        found[str(key)] = OfProblem(finite(area), brier, len(i), int(correct_I[i].sum()))
    return found


def _answer_figures(
    scores_I: Floats, correct_I: Floats, keys_I: Sequence[str], by_problem: Mapping[str, OfProblem]
) -> dict[str, Estimate]:
    """brier_constant: what the share of right answers itself, said of every answer, would reach."""
    right = stats.mean_estimate(correct_I, keys_I)
    return {
        "auc_within": stats.mean_estimate([p.auc for p in by_problem.values() if p.auc is not None]),
        "auc": measures.weighted_auc(scores_I, correct_I, 1 - correct_I, keys_I),
        "brier": stats.mean_estimate((scores_I - correct_I) ** 2, keys_I),
        "brier_constant": stats.mean_estimate((right.value - correct_I) ** 2, keys_I),
        "right": right,
        "mean_score": stats.mean_estimate(scores_I, keys_I),
    }


def _length_figures(
    scores_I: Floats, correct_I: Floats, tokens_I: Floats, steps_I: Floats, keys_I: Sequence[str]
) -> dict[str, Estimate]:
    """Spearman of score with length within problems, among wrong and among right answers, and the mean of all."""
    found: dict[str, Estimate] = {}
    for name, lengths_I in (("length_bias", tokens_I), ("length_bias_steps", steps_I)):
        all_values: list[float] = []
        all_names: list[Any] = []
        for kind, wanted in (("wrong", 0), ("right", 1)):
            inside = np.flatnonzero(correct_I == wanted)
            keys = [keys_I[int(i)] for i in inside]
            values, names = measures.length_correlations(lengths_I[inside], scores_I[inside], keys)
            found[f"{name}_{kind}"] = stats.mean_estimate(values)
            all_values, all_names = all_values + values, all_names + names
        found[name] = stats.mean_estimate(all_values, all_names)
    return found


def _step_figures(steps: Sequence[Steps], seed: object) -> dict[str, Estimate]:
    """Of every step on its own, and of the first wrong one."""
    if not steps:
        return {}
    scores = [score for answer in steps for score in answer.scores]
    labels = np.array([label for answer in steps for label in answer.labels], dtype=np.float64)
    keys = [answer.key for answer in steps for _ in answer.scores]
    return {
        "step_auc": measures.weighted_auc(scores, labels, 1 - labels, keys),
        "step_auc_within": stats.mean_estimate(measures.auc_by_cluster(scores, labels, 1 - labels, keys)),
        "first_error_f1": measures.first_error_f1(steps, seed=seed),
    }


def _value_figures(values: Sequence[PrefixValue]) -> dict[str, Estimate]:
    """Of unfinished prefixes against rollouts; value_error has the rollouts' own noise subtracted from the Brier."""
    if not values:
        return {}
    for value in values:
        if not (0 <= value.successes <= value.total and value.total >= 1 and 0 <= value.predicted <= 1):
            raise DataError(f"impossible rollout figures: predicted {value.predicted}, {value.successes} of "
                            f"{value.total} right")  # fmt: skip
    predicted, successes, totals = (np.array(x, dtype=np.float64) for x in list(zip(*values, strict=True))[:3])
    rates = successes / totals
    keys = [value.key or i for i, value in enumerate(values)]
    squares = (predicted - rates) ** 2
    several = np.flatnonzero(totals >= 2)
    errors = squares[several] - (rates * (1 - rates))[several] / (totals[several] - 1)
    keyed = [i for i, value in enumerate(values) if value.key]
    within = measures.auc_by_cluster(
        predicted[keyed], successes[keyed], (totals - successes)[keyed], [keys[i] for i in keyed]
    )
    return {
        "value_auc": measures.weighted_auc(predicted, successes, totals - successes, keys),
        "value_auc_within": stats.mean_estimate(within),
        "value_brier": stats.mean_estimate(squares + rates * (1 - rates), keys),
        "value_error": stats.mean_estimate(errors, [keys[i] for i in several]),
        "value_prefixes": Estimate(float(len(values)), math.inf, len(values)),
    }


def _histogram(scores_I: Floats) -> tuple[int, ...]:
    return tuple(int(n) for n in np.histogram(scores_I, bins=BINS, range=(0.0, 1.0))[0])


# ---------------------------------------------------------------- two verifiers


@dataclass(frozen=True, slots=True)
class Comparison:
    """A retrained verifier against the old one on the same answers: paired over problems, new minus old, 95 %.

    `auc_within`, `brier`: the old and the new mean and the difference; `auc_within` is None where no problem has both
    outcomes. `verdict` is the worse one of the two, by the interval of the gain: better (above 0), not worse (above
    -margin), worse (below 0), unclear (it reaches from a loss beyond the margin to a gain, or there are fewer than 10
    problems). A higher AUC and a Brier score that is not worse are better.
    """

    auc_within: tuple[float, float, PairedDifference] | None
    brier: tuple[float, float, PairedDifference]
    margin: float
    verdict: Verdict

    @property
    def not_worse(self) -> bool:
        return self.verdict in ("better", "not worse")

    def metrics(self) -> list[dict[str, Any]]:
        """Rows: ..._previous is the old verifier's figure, ..._change new minus old with its 95 % interval."""
        rows: list[dict[str, Any]] = [{"name": "verifier/not_worse", "value": float(self.not_worse)}]
        for name, found in (("auc_within", self.auc_within), ("brier", self.brier)):
            if found is not None:
                old, _, change = found
                named = {"previous": old, "change": change.mean, "change_low": change.low, "change_high": change.high}
                rows += [
                    {"name": f"verifier/{name}_{key}", "value": value}
                    for key, value in named.items()
                    if math.isfinite(value)
                ]
        return rows

    def to_json(self) -> dict[str, Any]:
        """Like `metrics`, with the verdict in words."""
        named = {row["name"].removeprefix("verifier/"): row["value"] for row in self.metrics()}
        return {"verdict": self.verdict, "margin": self.margin, **named}


def compare(old: Health, new: Health, *, margin: float = 0.02) -> Comparison:
    """Whether the new verifier got worse. Raises DataError unless both scored the very same answers."""
    for key in old.by_problem.keys() | new.by_problem.keys():
        one, other = old.by_problem.get(key), new.by_problem.get(key)
        if one is None or other is None or (one.num, one.num_right) != (other.num, other.num_right):
            raise DataError(
                f"the two verifiers did not score the same answers of problem '{key}': score one pool with both"
            )
    pairs = [(old.by_problem[key], new.by_problem[key]) for key in old.by_problem]
    areas = [(a.auc, b.auc) for a, b in pairs if a.auc is not None and b.auc is not None]
    auc = _paired(areas) if areas else None
    scale = len(pairs) / sum(a.num for a, _ in pairs)  # each answer counts the same, as in the figure
    brier = _paired([(scale * a.num * a.brier, scale * b.num * b.brier) for a, b in pairs])
    verdicts: list[Verdict] = [_judge(-brier[2].high, -brier[2].low, brier[2].n, margin)]
    if auc is not None:
        verdicts.insert(0, _judge(auc[2].low, auc[2].high, auc[2].n, margin))
    order: tuple[Verdict, ...] = ("worse", "unclear", "not worse", "better")
    verdict = min(verdicts, key=order.index)
    if verdict == "not worse" and verdicts[0] == "better":
        verdict = "better"
    return Comparison(auc, brier, margin, verdict)


def _paired(pairs: Sequence[tuple[float, float]]) -> tuple[float, float, PairedDifference]:
    old, new = (np.array(x) for x in zip(*pairs, strict=True))
    return float(old.mean()), float(new.mean()), stats.paired_difference(old, new)


def _judge(low: float, high: float, num: int, margin: float) -> Verdict:
    """Of the interval of a gain, higher being better."""
    if num < FEWEST:
        return "unclear"
    if low > 0:
        return "better"
    if low > -margin:
        return "not worse"
    return "worse" if high < 0 else "unclear"


# ---------------------------------------------------------------- JSON


def _estimate(e: Estimate) -> list[Any]:
    return [finite(e.value), finite(e.se), e.n]


def _to_estimate(row: Sequence[Any]) -> Estimate:
    value, se, n = row
    return Estimate(math.nan if value is None else value, math.inf if se is None else se, n)


def _difference(d: PairedDifference) -> list[Any]:
    return [d.mean, finite(d.se), finite(d.low), finite(d.high), d.n]


def _to_difference(row: Sequence[Any]) -> PairedDifference:
    mean, se, low, high, n = row
    if se is None:
        return PairedDifference(mean, math.inf, -math.inf, math.inf, n)
    return PairedDifference(mean, se, low, high, n)
