"""What a verifier is trained on: answers cut into steps, with a label for each step or one outcome. No torch.

Sources of labels, mixable; each gives every answer one example of its own, but that outcomes join the first other one.
A last step's label is the outcome, but of siblings.
- tree: the mean success of the problem's answers that begin with exactly these steps (free). Only independent draws
  count: pools, and the plain samples that a search began with. What a pruned search kept lies where a verifier
  wanted it, so its mean is the value of search, not of the policy; such answers are examples, labelled at the
  prefixes that some independent draw shares and at their end. Truncated draws count as failures. A prefix that one
  draw alone has gets that draw's outcome: noisy, but right on average.
- rollouts: Monte Carlo values of the prefixes (search.rollouts; Snell et al. 2024, app. PRM training). Where they come
  from a binary search for the first wrong step, a step that was not probed has 0 after that one and no label before.
- siblings: the rollout value of a step over the best of those beside it, itself, and its parent's value: "was this
  step a good one to take here", whatever went wrong before. The best sibling is the estimate of what could be reached;
  the parent's value is a floor under it, so that the best of several bad steps is not taken for a good one, and is all
  there is for an only child (its share of the parent's value, cut at 1). Where nothing beside it ever succeeds, or
  nothing beside it is known, a step has no label: both 0 and 1 would be inventions.
- tree_siblings: the same of the values of `tree`, free.
- outcomes: no step has a label; the answer has its outcome, for a multiple-instance loss.
- gold: the task's own step checker. The labels of a data set are gold too, and come as examples of their own
  (distill.step_data).
An outcome verifier (kind "orm") gets one label, the outcome, at the last step, whatever the sources.

Values of several rounds are averaged though the policies differ: give the rounds that are meant. Left out: dropping
answers that happen to solve a held-out problem under another question, since a verifier reads the question too.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from configs.schema import LabelSource
from search import rollouts
from search.errors import CorruptArtefact, DataError
from search.policy import steps_of
from search.randomness import key64
from search.strategies import STRATEGIES
from search.types import Candidate, Grade, Problem, SearchResult, Task

Results = Iterable[tuple[int, SearchResult]]
Steps = tuple[str, ...]
Labels = tuple[float | None, ...]
Read = tuple[Steps, Steps]  # attempts, steps

# Why an answer is no example of its own; each is counted once.
FILTERS = ("failed", "held_out", "revision", "ungraded", "truncated", "no_answer", "duplicate", "over_cap")
STEP_DATA = "data"  # the source of examples that come from a data set
_POOLS = {"pool", *(name for name, entry in STRATEGIES.items() if entry.pool)}
_PLAIN_FIRST = re.compile(r"plain\((\d+)\) \+ ")


@dataclass(frozen=True, slots=True)
class StepExample:
    """One answer, cut into steps; a line of `examples.jsonl`.

    `labels` has one label a step, in [0, 1]; None: no loss there. `outcome` is set where only the whole answer has a
    label (multiple-instance loss). `weight` is the number of equal answers that it stands for.
    Example: StepExample(problem, ("3*5=15\\n", "15+7=22"), labels=(0.75, 1.0), source="tree", round=1)
    """

    problem: Problem
    steps: tuple[str, ...]
    attempts: tuple[str, ...] = ()
    labels: tuple[float | None, ...] = ()
    outcome: bool | None = None
    source: str = ""
    round: int = 0
    weight: float = 1.0

    def to_json(self) -> dict[str, Any]:
        problem = {"key": self.problem.key, "question": self.problem.question, "gold": self.problem.answer}
        row: dict[str, Any] = problem | {"meta": dict(self.problem.meta), "steps": list(self.steps)}
        if self.attempts:
            row["attempts"] = list(self.attempts)
        row |= {"labels": list(self.labels), "outcome": self.outcome, "source": self.source, "round": self.round}
        return row | {"weight": self.weight}

    @classmethod
    def from_json(cls, row: Mapping[str, Any]) -> StepExample:
        """Raises ValueError for labels outside [0, 1] or not one a step."""
        example = cls(
            problem=Problem(row["key"], row["question"], row["gold"], row["meta"]),
            steps=tuple(row["steps"]),
            attempts=tuple(row.get("attempts", ())),
            labels=tuple(row["labels"]),
            outcome=row["outcome"],
            source=row["source"],
            round=row["round"],
            weight=row.get("weight", 1.0),
        )
        if len(example.labels) != len(example.steps):
            raise ValueError(f"{len(example.labels)} labels for {len(example.steps)} steps")
        if bad := [label for label in example.labels if label is not None and not 0 <= label <= 1]:
            raise ValueError(f"the label {bad[0]} is not in 0..1")
        return example


# ---------------------------------------------------------------- labels


@dataclass(frozen=True, slots=True)
class Labelled:
    """The examples and where every answer went.

    `counts["answers"]` is the sum over FILTERS and of "kept" (distinct answers); each kept one is one of
    "examples/SOURCE" or "unlabelled/SOURCE" for every source. "rollouts" are those that gave values.
    """

    examples: tuple[StepExample, ...]
    counts: Mapping[str, int]


@dataclass(slots=True)
class _Answer:
    problem: Problem
    attempts: Steps
    steps: Steps
    outcome: bool
    round: int
    copies: int = 1


@dataclass(slots=True)
class _Known:
    """What is known of one problem."""

    answers: dict[Read, _Answer] = field(default_factory=dict[Read, _Answer])
    drawn: dict[Read, tuple[int, int]] = field(default_factory=dict[Read, tuple[int, int]])  # (right, all) by prefix
    rolled: dict[Steps, tuple[int, int]] = field(default_factory=dict[Steps, tuple[int, int]])
    bisected: bool = False


def label(
    results: Results,
    sources: Sequence[LabelSource],
    task: Task,
    *,
    held_out: Callable[[str], bool],
    max_examples: int,
    kind: Literal["prm", "orm"] = "prm",
    keep_unparsable: bool = False,
    split: Callable[[Candidate], Candidate] | None = None,
    attempts: Callable[[SearchResult, Candidate], Steps] | None = None,
    seed: int = 0,
) -> Labelled:
    """Examples from (round, result) pairs, rollouts among them where a source needs those.

    `held_out(key)` says whether a problem belongs to a held-out split: its answers are never examples. At most
    `max_examples` answers, the newest rounds first, and every problem's first answer before any one's second. Equal
    answers are one example of their summed weight. `split` cuts answers drawn whole into the steps that search would
    show (search.rollouts.split); without it they are cut at the delimiter. `attempts` tells what a revision was shown;
    without it revisions are left out. The same examples for the same results, in whatever order.
    Raises DataError where a source lacks what it needs, no answer is left, or none holds a step delimiter.
    """
    pool = _Pool(task, held_out, keep_unparsable, split, attempts)
    for number, result in results:
        pool.add(number, result)
    _check(pool, task, sources, kind)
    kept = _newest(pool.known, max_examples, seed)
    pool.counts["over_cap"] = pool.counts["kept"] - len(kept)
    pool.counts["kept"] = len(kept)
    labellers = {source: _labeller(source, task) for source in dict.fromkeys(sources)}
    joined = next((source for source in labellers if source != "outcomes"), "outcomes")
    outcomes = labellers.pop("outcomes", None)
    if outcomes is not None and not labellers:
        labellers["outcomes"] = outcomes
    examples: list[StepExample] = []
    for answer in kept:
        if kind == "orm":
            examples.append(_example(answer, (*_nothing(answer)[1:], float(answer.outcome)), None, "outcomes"))
            continue
        known = pool.known[answer.problem.key]
        for source, labeller in labellers.items():
            labels = labeller(known, answer)
            outcome = answer.outcome if outcomes is not None and source == joined else None
            there = outcome is not None or any(value is not None for value in labels)
            pool.counts[f"{'examples' if there else 'unlabelled'}/{source}"] += 1
            if there:
                examples.append(_example(answer, labels, outcome, source))
    return Labelled(tuple(examples), dict(pool.counts))


class _Pool:
    """The answers and the prefix values of every problem, while the results stream in."""

    def __init__(
        self,
        task: Task,
        held_out: Callable[[str], bool],
        keep_unparsable: bool,
        split: Callable[[Candidate], Candidate] | None,
        attempts: Callable[[SearchResult, Candidate], Steps] | None,
    ) -> None:
        self.delimiter = task.step_delimiter
        self.held_out, self.keep_unparsable = held_out, keep_unparsable
        self.split, self.attempts = split, attempts
        self.known: dict[str, _Known] = {}
        self.counts: Counter[str] = Counter(dict.fromkeys(("answers", *FILTERS, "kept", "rollouts"), 0))

    def add(self, round_number: int, result: SearchResult) -> None:
        if rollouts.is_rollouts(result):
            if not self.held_out(result.problem.key):
                self._add_rollouts(result)
            return
        plain = num_plain(result)
        for index, candidate in enumerate(result.candidates):
            self.counts["answers"] += 1
            self.counts[self._add(round_number, result, candidate, independent=index < plain)] += 1

    def _add(self, round_number: int, result: SearchResult, candidate: Candidate, *, independent: bool) -> str:
        """The filter that drops the candidate, or "kept"."""
        if result.failed is not None:
            return "failed"
        if self.held_out(result.problem.key):
            return "held_out"
        if candidate.prompt_ids and candidate.prompt_ids != result.prompt_ids and self.attempts is None:
            return "revision"
        shown = self.attempts(result, candidate) if self.attempts else ()
        steps = steps_of(self.split(candidate) if self.split else candidate, self.delimiter)
        known = self.known.setdefault(result.problem.key, _Known())
        if independent:
            _count(known, shown, candidate, steps, self.delimiter)
        refused = rollouts.refusal(result, candidate, keep_unparsable=self.keep_unparsable)
        if refused:
            return refused
        if (same := known.answers.get((shown, steps))) is not None:
            same.copies, same.round = same.copies + 1, max(same.round, round_number)
            return "duplicate"
        right = candidate.grade is Grade.CORRECT
        known.answers[shown, steps] = _Answer(result.problem, shown, steps, right, round_number)
        return "kept"

    def _add_rollouts(self, result: SearchResult) -> None:
        known = self.known.setdefault(result.problem.key, _Known())
        known.bisected = known.bisected or rollouts.finds_first_error(result)
        for value in rollouts.values(result):
            right, num = known.rolled.get(value.steps, (0, 0))
            known.rolled[value.steps] = (right + value.num_correct, num + value.num)
            self.counts["rollouts"] += value.num


def num_plain(result: SearchResult) -> int:
    """How many of its candidates, the first ones, are independent draws of the policy."""
    if plain := _PLAIN_FIRST.match(result.strategy):
        return min(int(plain[1]), len(result.candidates))
    name = result.strategy.partition("(")[0].partition(" ")[0]
    return len(result.candidates) if name in _POOLS else 0


def _count(known: _Known, attempts: Steps, candidate: Candidate, steps: Steps, delimiter: str) -> None:
    """Add an independent draw to the success of each prefix; of a truncated one the step cut off is none."""
    if candidate.grade not in (Grade.CORRECT, Grade.WRONG) or candidate.finish not in rollouts.JUDGED:
        return
    whole = len(steps) - (not candidate.complete and delimiter not in steps[-1])
    for num in range(whole + 1):
        right, total = known.drawn.get((attempts, steps[:num]), (0, 0))
        known.drawn[attempts, steps[:num]] = (right + (candidate.grade is Grade.CORRECT), total + 1)


def _check(pool: _Pool, task: Task, sources: Sequence[LabelSource], kind: str) -> None:
    counts = ", ".join(f"{name} {count}" for name, count in pool.counts.items() if count)
    if not pool.counts["kept"]:
        raise DataError(f"no answer can be a verifier's example ({counts or 'no results'}): search more problems")
    if kind == "orm":
        return
    if not any(len(steps) > 1 for known in pool.known.values() for _, steps in known.answers):
        raise DataError(
            f"none of {pool.counts['kept']} answers holds the step delimiter {task.step_delimiter!r} before its end: "
            "set the task's step_delimiter to what separates its steps, or train verifier.kind = 'orm'"
        )
    if "gold" in sources and not hasattr(task, "step_labels"):
        raise DataError(f"the task '{task.name}' cannot check a step: choose verifier.labels without 'gold'")
    needs = [source for source in ("rollouts", "siblings") if source in sources]
    if needs and not any(known.rolled for known in pool.known.values()):
        raise DataError(f"verifier.labels = '{needs[0]}' needs rollouts, and there are none ({counts})")


def _newest(known: Mapping[str, _Known], max_examples: int, seed: int) -> list[_Answer]:
    """The answers kept under the cap, sorted by problem and steps."""
    ranked: list[tuple[tuple[int, int, int], _Answer]] = []
    for key, one in known.items():
        answers = sorted(one.answers.values(), key=lambda a: key64(seed, "answer", *a.attempts, "", *a.steps))
        ranks: Counter[int] = Counter()
        for answer in answers:
            ranked.append(((-answer.round, ranks[answer.round], key64(seed, "label", key)), answer))
            ranks[answer.round] += 1
    ranked.sort(key=lambda entry: entry[0])
    kept = [answer for _, answer in ranked[:max_examples]]
    return sorted(kept, key=lambda a: (a.problem.key, a.attempts, a.steps))


def _example(answer: _Answer, labels: Labels, outcome: bool | None, source: str) -> StepExample:
    return StepExample(
        problem=answer.problem,
        steps=answer.steps,
        attempts=answer.attempts,
        labels=labels,
        outcome=outcome,
        source=source,
        round=answer.round,
        weight=float(answer.copies),
    )


# ---------------------------------------------------------------- sources


def _labeller(source: LabelSource, task: Any) -> Callable[[_Known, _Answer], Labels]:
    match source:
        case "tree":
            return _tree
        case "rollouts":
            return _rolled
        case "siblings":
            return _Siblings(_rolled)
        case "tree_siblings":
            return _Siblings(_tree)
        case "outcomes":
            return lambda _, answer: _nothing(answer)
        case "gold":
            return lambda _, answer: _gold(answer, task)


def _nothing(answer: _Answer) -> Labels:
    return (None,) * len(answer.steps)


def _tree(known: _Known, answer: _Answer) -> Labels:
    prefixes = (answer.steps[:num] for num in range(1, len(answer.steps)))
    shares = (_share(known.drawn.get((answer.attempts, prefix))) for prefix in prefixes)
    return (*shares, float(answer.outcome))


def _rolled(known: _Known, answer: _Answer) -> Labels:
    """Nothing for an answer whose problem has no rollouts, and for revisions, which are not rolled out."""
    if not known.rolled or answer.attempts:
        return _nothing(answer)
    shares = [_share(known.rolled.get(answer.steps[:num])) for num in range(1, len(answer.steps))]
    labels = [*shares, float(answer.outcome)]
    if known.bisected and not answer.outcome:
        good = max((s for s, share in enumerate(labels) if share), default=-1)
        bad = next(s for s, share in enumerate(labels) if s > good and share == 0)
        labels[bad:] = [0.0] * (len(labels) - bad)
    return tuple(labels)


def _share(counted: tuple[int, int] | None) -> float | None:
    return counted[0] / counted[1] if counted else None


class _Siblings:
    """Labels of steps relative to those beside them; the values of a problem's steps are gathered once."""

    def __init__(self, valued: Callable[[_Known, _Answer], Labels]) -> None:
        self._valued = valued
        self._of: _Known | None = None
        self._values: dict[Steps, float] = {}
        self._best: dict[Steps, float] = {}  # by parent
        self._children: Counter[Steps] = Counter()

    def __call__(self, known: _Known, answer: _Answer) -> Labels:
        if answer.attempts or all(value is None for value in self._valued(known, answer)):
            return _nothing(answer)
        if self._of is not known:
            self._gather(known)
        return tuple(self._relative(answer.steps[:num]) for num in range(1, len(answer.steps) + 1))

    def _gather(self, known: _Known) -> None:
        self._of, self._values, self._best, self._children = known, {}, {}, Counter()
        for answer in (answer for answer in known.answers.values() if not answer.attempts):
            values = zip(range(1, len(answer.steps) + 1), self._valued(known, answer), strict=True)
            self._values |= {answer.steps[:num]: value for num, value in values if value is not None}
        for steps, value in self._values.items():
            self._best[steps[:-1]] = max(value, self._best.get(steps[:-1], 0.0))
            self._children[steps[:-1]] += 1
        if (root := _share(known.drawn.get(((), ())))) is not None:
            self._values[()] = root

    def _relative(self, steps: Steps) -> float | None:
        value, parent = self._values.get(steps), self._values.get(steps[:-1])
        if value is None or (parent is None and self._children[steps[:-1]] < 2):
            return None
        reach = max(self._best[steps[:-1]], parent or 0.0)
        return value / reach if reach > 0 else None


def _gold(answer: _Answer, task: Any) -> Labels:
    """The checker's labels, one a step; the last step is right where the answer is."""
    checked = list(task.step_labels(answer.problem, "".join(answer.steps)))[: len(answer.steps)]
    checked += [False] * (len(answer.steps) - len(checked))  # more text than any answer has
    checked[-1] = answer.outcome
    return tuple(map(float, checked))


# ---------------------------------------------------------------- on disk


def write_examples(examples: Iterable[StepExample], path: Path) -> None:
    """One JSON line an example; the same bytes for the same examples."""
    with path.open("w", encoding="utf-8") as file:
        for example in examples:
            file.write(json.dumps(example.to_json(), ensure_ascii=False, separators=(",", ":")) + "\n")


def read_examples(path: Path) -> Iterator[StepExample]:
    """The examples of a file, one at a time. Raises CorruptArtefact naming the line."""
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            try:
                yield StepExample.from_json(json.loads(line))
            except (ValueError, KeyError, TypeError) as error:
                raise CorruptArtefact(f"{path}, line {number} is not a training example: {error!r}") from error
