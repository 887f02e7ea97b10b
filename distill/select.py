"""Search results of all rounds -> training rows, with a count for every filter.

The rejection-sampling half of expert iteration (Zelikman et al. 2022, STaR; Singh et al. 2023, ReST-EM): keep the
distinct correct answers, at most a few of one problem, pooled over the rounds. Results are read one at a time; memory
holds the kept rows and one number for each distinct solution. Which solutions survive the cap is a pure function of
(seed, problem, solution), whatever the order of the files; of answers with the same solution the first one read is the
row. Left out: weighting rows by difficulty, and choosing by verifier score.
"""

from __future__ import annotations

import heapq
import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import cycle, islice
from pathlib import Path
from typing import Any, Literal

from configs.schema import Select
from search import results as results_module
from search.errors import CorruptArtefact, TrainingError
from search.randomness import key64, rng
from search.types import Candidate, Finish, Grade, Problem, SearchResult

Results = Iterable[tuple[int, SearchResult]]
SolutionKey = Callable[[Problem, str], str]

# In the order in which a candidate meets them; each candidate is counted once.
FILTERS = (
    "ungraded",
    "truncated",
    "wrong",
    "no_answer",
    "too_long",
    "held_out",
    "solves_held_out",
    "duplicate",
    "over_cap",
)
SHOWN_LEAKS = 20
MATCHING_PASSES = 20
SPARE = 4


@dataclass(frozen=True, slots=True)
class Row:
    """One training row; a line of `rows.jsonl`. The loss falls on `completion_ids`, EOS included.

    Example: Row("3,5,7>22", (14, 7, 16, ...), (14, 3, 18, ..., 1), "search", 1, "3*5=15;15+7=22")
    """

    key: str
    prompt_ids: tuple[int, ...]
    completion_ids: tuple[int, ...]
    source: Literal["search", "replay"]
    round: int
    solution: str

    @property
    def tokens(self) -> int:
        return len(self.prompt_ids) + len(self.completion_ids)

    def to_json(self) -> dict[str, Any]:
        row: dict[str, Any] = {"key": self.key, "prompt_ids": self.prompt_ids, "completion_ids": self.completion_ids}
        return row | {"source": self.source, "round": self.round, "solution": self.solution}


@dataclass(frozen=True, slots=True)
class Selection:
    """The rows of a round and where every candidate went.

    `counts["candidates"]` is the sum of `counts[f]` over FILTERS and of `counts["kept"]`. A leak (a searched problem
    that is held out) is never a row, and a non-empty `leaks` must block the promotion.
    """

    rows: tuple[Row, ...]
    counts: Mapping[str, int]
    distinct_solutions: int  # correct and different, before the cap
    problems_solved: int
    new_rows: int  # searched rows that no earlier round selected
    leaks: tuple[str, ...] = ()

    @property
    def tokens(self) -> int:
        return sum(row.tokens for row in self.rows)

    def metrics(self) -> dict[str, float]:
        replayed = sum(row.source == "replay" for row in self.rows)
        return {
            "data/rows": len(self.rows),
            "data/distinct_solutions": self.distinct_solutions,
            "data/new_rows": self.new_rows,
            "data/replay_rows": replayed,
            "data/problems_solved": self.problems_solved,
            "data/tokens": self.tokens,
            "data/leaks": len(self.leaks),
        }


def read_results(files: Iterable[tuple[int, Path]]) -> Iterator[tuple[int, SearchResult]]:
    """(round, result) of every line of every (round, file or folder of shards), one at a time. Raises DataError."""
    for round_number, path in files:
        for result in results_module.read_results(path):
            yield round_number, result


def read_rows(path: Path) -> Iterator[Row]:
    """The rows of a `rows.jsonl` or `replay.jsonl`, one at a time. Raises CorruptArtefact."""
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            try:
                data = json.loads(line)
                yield Row(
                    key=data["key"],
                    prompt_ids=tuple(map(int, data["prompt_ids"])),
                    completion_ids=tuple(map(int, data["completion_ids"])),
                    source=data.get("source", "replay"),
                    round=data.get("round", 0),
                    solution=data.get("solution", ""),
                )
            except (ValueError, KeyError, TypeError) as error:
                raise CorruptArtefact(f"{path}, line {number} is not a training row: {error!r}") from error


def identity(key: str, solution: str) -> int:
    """What makes two rows the same row, as 64 bits."""
    return key64("row", key, solution)


def select(
    results: Results,
    config: Select,
    *,
    replay: Iterable[Row],
    prompt_ids: Callable[[Problem], list[int]],
    solution_key: SolutionKey,
    seed: int,
    round_number: int,
    held_out: Callable[[str], bool],
    solved_keys: Callable[[Problem, str], Iterable[str]] | None = None,
    earlier: frozenset[int] | set[int] = frozenset(),
) -> Selection:
    """The training rows of a round.

    `held_out(key)` says whether a problem belongs to a held-out split; `solved_keys(problem, text)` names every
    problem that an answer happens to solve, so that no row shows a held-out problem's solution; `earlier` holds the
    `identity` of every row that an earlier round selected. `prompt_ids` serves results that carry no prompt.
    Raises TrainingError where fewer than `config.min_rows` searched rows remain.
    """
    if config.rounds == "last":
        results = ((n, result) for n, result in results if n == round_number)
    pool = _Pool(config, prompt_ids, solution_key, seed, held_out, solved_keys)
    for number, result in results:
        pool.add(number, result)
    rows = pool.rows()
    if len(rows) < config.min_rows:
        counts = ", ".join(f"{name} {count}" for name, count in pool.counts.items() if count)
        raise TrainingError(
            f"{len(rows)} training rows are fewer than select.min_rows = {config.min_rows} ({counts or 'no results'}): "
            "search more problems or samples, or lower select.min_rows"
        )
    return Selection(
        rows=tuple(rows + draw_replay(replay, len(rows), config.replay, seed)),
        counts=dict(pool.counts),
        distinct_solutions=sum(map(len, pool.seen.values())),
        problems_solved=len(pool.seen),
        new_rows=sum(identity(row.key, row.solution) not in earlier for row in rows),
        leaks=tuple(sorted(pool.leaks)),
    )


class _Pool:
    """Correct distinct rows of each problem, capped while they stream in."""

    def __init__(
        self,
        config: Select,
        prompt_ids: Callable[[Problem], list[int]],
        solution_key: SolutionKey,
        seed: int,
        held_out: Callable[[str], bool],
        solved_keys: Callable[[Problem, str], Iterable[str]] | None,
    ) -> None:
        self.config, self.seed = config, seed
        self.prompt_ids, self.solution_key = prompt_ids, solution_key
        self.held_out, self.solved_keys = held_out, solved_keys
        self.counts: Counter[str] = Counter(dict.fromkeys(("candidates", *FILTERS, "kept"), 0))
        self.seen: dict[str, set[int]] = {}  # problem key -> distinct correct solutions
        self.kept: dict[str, list[tuple[int, Row]]] = {}  # problem key -> heap, the worst rank first
        self.leaks: set[str] = set()

    def add(self, round_number: int, result: SearchResult) -> None:
        for candidate in result.candidates:
            self.counts["candidates"] += 1
            why = self._refuse(result.problem, candidate) or self._keep(round_number, result, candidate)
            self.counts[why] += 1

    def rows(self) -> list[Row]:
        """Sorted by problem and solution."""
        rows = [row for heap in self.kept.values() for _, row in heap]
        return sorted(rows, key=lambda row: (row.key, row.solution))

    def _refuse(self, problem: Problem, candidate: Candidate) -> str | None:
        """The filter that drops the candidate, or None."""
        reason = unusable(candidate, self.config.max_response_tokens)
        if reason:
            return reason
        reason = shows_held_out(problem, candidate.text, self.held_out, self.solved_keys)
        if reason == "held_out":
            self.leaks.add(problem.key)
        return reason

    def _keep(self, round_number: int, result: SearchResult, candidate: Candidate) -> str:
        """Keep the solution if it is new and ranks among the first `max_per_problem` of its problem."""
        key, solution = result.problem.key, self.solution_key(result.problem, candidate.text)
        solutions, heap = self.seen.setdefault(key, set()), self.kept.setdefault(key, [])
        if identity(key, solution) in solutions:
            return "duplicate"
        solutions.add(identity(key, solution))
        prompt = result.prompt_ids or tuple(self.prompt_ids(result.problem))
        row = Row(key, prompt, candidate.ids, "search", round_number, solution)
        entry = (-key64(self.seed, "select", key, solution), row)
        if len(heap) < self.config.max_per_problem:
            heapq.heappush(heap, entry)
            return "kept"
        heapq.heappushpop(heap, entry)  # one stays, one goes: "kept" is unchanged either way
        return "over_cap"


def unusable(candidate: Candidate, max_response_tokens: int | None) -> str | None:
    """Why a candidate by itself cannot be a training row; None: it can."""
    if candidate.grade is None or candidate.grade is Grade.UNGRADED:
        return "ungraded"
    if candidate.finish is not Finish.EOS:
        return "truncated"
    if candidate.grade is not Grade.CORRECT:
        return "wrong"
    if candidate.answer is None:
        return "no_answer"
    if max_response_tokens is not None and len(candidate.ids) > max_response_tokens:
        return "too_long"
    return None


def shows_held_out(
    problem: Problem,
    text: str,
    held_out: Callable[[str], bool],
    solved_keys: Callable[[Problem, str], Iterable[str]] | None,
) -> str | None:
    """The filter that keeps an answer to, or a solution of, a held-out problem from being a row; None: neither."""
    if held_out(problem.key):
        return "held_out"
    if solved_keys and any(map(held_out, solved_keys(problem, text))):
        return "solves_held_out"
    return None


def draw_replay(replay: Iterable[Row], num_rows: int, share: float, seed: int) -> list[Row]:
    """Rows that make up `share` of all rows beside `num_rows` others, or all there are. The same rows every time."""
    assert 0 <= share < 1, share
    wanted = round(num_rows * share / (1 - share))
    ranked = ((key64(seed, "replay", index), index, row) for index, row in enumerate(replay))
    return [row for _, _, row in heapq.nsmallest(wanted, ranked, key=lambda entry: entry[:2])] if wanted else []


@dataclass(slots=True)
class _Draw:
    """Rows drawn for the control and up to SPARE times as many others, in random order."""

    rows: list[Row]
    spare: list[Row]
    counts: Counter[str] = field(default_factory=Counter[str])


def select_control(
    plain: Results,
    like: Selection,
    config: Select,
    *,
    prompt_ids: Callable[[Problem], list[int]],
    solution_key: SolutionKey,
    seed: int,
    held_out: Callable[[str], bool],
    solved_keys: Callable[[Problem, str], Iterable[str]] | None = None,
) -> Selection:
    """Control `random`: as many rows and, as nearly as can be, as many tokens as `like`, from plain samples.

    `plain` holds independent samples of the same problems (first samples of a search, or a run of their own). Correct
    ones are drawn at random: no verifier, no quota, no removal of duplicates. As in `select`, `held_out` and
    `solved_keys` say what must not be trained on. The replay rows are those of `like`. Where a search found more than
    plain sampling did, its rows come several times, as `counts["repeated"]` tells, so that the training is as long.
    Raises TrainingError where no sample is correct.
    """
    searched = [row for row in like.rows if row.source == "search"]
    draw = _draw(plain, config, len(searched), prompt_ids, solution_key, seed, held_out, solved_keys)
    if searched and not draw.rows:
        raise TrainingError(
            f"none of the plain samples can be a row ({dict(draw.counts)}): there is nothing to compare with"
        )
    wanted = sum(row.tokens for row in searched)
    repeated = len(searched) - len(draw.rows)
    rows = match_tokens(list(islice(cycle(draw.rows), len(searched))), draw.spare, wanted)
    distinct = {identity(row.key, row.solution) for row in rows}
    return Selection(
        rows=(*sorted(rows, key=lambda row: (row.key, row.solution)), *(r for r in like.rows if r.source == "replay")),
        counts={
            **draw.counts,
            "kept": len(rows),
            "repeated": repeated,
            "tokens": sum(row.tokens for row in rows),
            "tokens_wanted": wanted,
        },
        distinct_solutions=len(distinct),
        problems_solved=len({row.key for row in rows}),
        new_rows=0,
    )


def _draw(
    plain: Results,
    config: Select,
    num_rows: int,
    prompt_ids: Callable[[Problem], list[int]],
    solution_key: SolutionKey,
    seed: int,
    held_out: Callable[[str], bool],
    solved_keys: Callable[[Problem, str], Iterable[str]] | None,
) -> _Draw:
    counts: Counter[str] = Counter()

    def usable() -> Iterator[tuple[int, int, Row]]:
        for number, result in plain:
            for index, candidate in enumerate(result.candidates):
                counts["candidates"] += 1
                problem = result.problem
                why = unusable(candidate, config.max_response_tokens)
                why = why or shows_held_out(problem, candidate.text, held_out, solved_keys)
                counts[why or "correct"] += 1
                if why is None:
                    prompt = result.prompt_ids or tuple(prompt_ids(problem))
                    solution = solution_key(problem, candidate.text)
                    rank = key64(seed, "control", number, problem.key, index)
                    yield (
                        rank,
                        counts["candidates"],
                        Row(problem.key, prompt, candidate.ids, "search", number, solution),
                    )

    drawn = [row for _, _, row in heapq.nsmallest((1 + SPARE) * num_rows, usable(), key=lambda entry: entry[:2])]
    return _Draw(drawn[:num_rows], drawn[num_rows:], counts)


def match_tokens(rows: Sequence[Row], spare: Sequence[Row], target: int) -> list[Row]:
    """Swap rows for spare ones, paired at random, wherever that brings the sum of tokens nearer to `target`.

    As many rows as were given, all of them from `rows` and `spare`.
    """
    rows, spare, total = list(rows), list(spare), sum(row.tokens for row in rows)
    for attempt in range(MATCHING_PASSES):
        order = rng("match_tokens", attempt).sample(range(len(rows)), len(rows))
        for other, index in zip(range(len(spare)), cycle(order), strict=False):
            change = spare[other].tokens - rows[index].tokens
            if abs(total + change - target) < abs(total - target):
                rows[index], spare[other], total = spare[other], rows[index], total + change
    return rows


def write_selection(selection: Selection, out: Path) -> None:
    """Write rows.jsonl, counts.json and metrics.jsonl into `out`; the same bytes for the same selection."""
    with (out / "rows.jsonl").open("w", encoding="utf-8") as file:
        for row in selection.rows:
            file.write(json.dumps(row.to_json(), ensure_ascii=False, separators=(",", ":")) + "\n")
    counts: dict[str, Any] = {**selection.counts, "rows": len(selection.rows), "leaks": len(selection.leaks)}
    counts["leaked_keys"] = list(selection.leaks[:SHOWN_LEAKS])
    (out / "counts.json").write_text(json.dumps(counts, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    lines = [json.dumps({"name": name, "value": value}) for name, value in selection.metrics().items()]
    (out / "metrics.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
