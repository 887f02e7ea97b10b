"""What came of one question: the answer, what it cost, who voted for what; in words and as JSON. No drawing here."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from flows.show import count, harmless, seconds
from search.trace import Node
from search.types import Candidate, Grade, SearchResult

MOST_VOTES = 6  # answers listed
_UNCAP = "raise --max-tokens, or lower --budget"


@dataclass(frozen=True, slots=True)
class Vote:
    """How many finished candidates gave an answer, and the sum of their scores."""

    answer: str
    num: int
    weight: float | None
    grade: str | None


@dataclass(frozen=True, slots=True)
class Solution:
    """What came of a question. `nodes` is empty where no tree was asked for."""

    result: SearchResult
    nodes: tuple[Node, ...]
    task: str
    model: str  # as it was named: champion, base, or a folder
    search_s: float
    load_s: float
    delimiter: str  # of the task's steps
    capped: bool  # the token cap may have ended the search early
    by_table: Mapping[str, Any] | None = None  # what the StrategyTable chose: rate, bin, bins, why, strategy, value

    @property
    def chosen(self) -> Candidate | None:
        """Whose answer is given."""
        return self.result.chosen

    @property
    def answer(self) -> str | None:
        """On one line, whatever the model wrote."""
        found = self.chosen.answer if self.chosen else None
        return None if found is None else " ".join(harmless(found).split())

    @property
    def correct(self) -> bool | None:
        """None: there is no gold answer, the grader failed, or no answer was given."""
        grade = self.chosen.grade if self.chosen else None
        return None if grade in (None, Grade.UNGRADED) else grade is Grade.CORRECT

    def votes(self) -> list[Vote]:
        """By answer, the one given first, then the heaviest."""
        found: dict[str, list[Candidate]] = defaultdict(list)
        for candidate in self.result.candidates:
            if candidate.complete and candidate.answer is not None:
                found[candidate.answer].append(candidate)
        votes = [_vote(answer, given) for answer, given in found.items()]
        first = self.chosen.answer if self.chosen else None
        return sorted(votes, key=lambda v: (v.answer != first, -(v.weight or 0.0), -v.num))

    def to_json(self, *, tree: bool, page: Path | None) -> dict[str, Any]:
        """The stable form of `--json`."""
        result = self.result
        row: dict[str, Any] = {
            "task": self.task,
            "question": result.problem.question,
            "answer": self.answer,
            "correct": self.correct,
            "gold": result.problem.answer,
            "text": self.chosen.text if self.chosen else None,
            "strategy": result.strategy,
            "by_table": None if self.by_table is None else dict(self.by_table),
            "model": self.model,
            "fingerprint": result.model,
            "seed": result.seed,
            "approximate": result.approximate,
            "failed": result.failed,
            "spend": result.spend.to_json(),
            "seconds": {"search": round(self.search_s, 3), "load": round(self.load_s, 3)},
            "votes": [{"answer": v.answer, "votes": v.num, "weight": v.weight} for v in self.votes()],
            "silent": self.silent(),
            "page": None if page is None else str(page),
        }
        return row | ({"trace": [asdict(node) for node in self.nodes]} if tree else {})

    def silent(self) -> dict[str, int]:
        """Candidates that could not vote, by why."""
        whys: Counter[str] = Counter()
        for candidate in self.result.candidates:
            if not candidate.complete:
                whys[f"ended by {candidate.finish.value}"] += 1
            elif candidate.answer is None:
                whys["without an answer"] += 1
        return dict(whys)

    # ------------------------------------------------------------ in words

    def facts(self) -> list[tuple[str, str]]:
        """What the answer cost and how it was found, as names and values for people."""
        result, spend = self.result, self.result.spend
        tokens = f"{spend.generated_tokens:,} generated; of prefixes {spend.prefilled_tokens:,} computed"
        tokens += f", {spend.cached_tokens:,} from the cache"
        if spend.verifier_tokens:
            tokens += f"; {spend.verifier_tokens:,} read by the verifier"
        flops = f"{count(spend.flops_ideal)}, {count(spend.flops_actual)} with what was computed twice"
        note = [("note", "approximate: the server returned text, not token ids")] if result.approximate else []
        return [
            ("strategy", result.strategy + self._chosen_for()),
            ("samples", f"{spend.samples:,}, and {len(result.candidates):,} candidates at the end"),
            ("tokens", tokens),
            ("FLOPs", flops),
            ("time", f"{seconds(self.search_s)}, and {seconds(self.load_s)} to load"),
            ("model", f"{self.model} ({result.model})"),
            *note,
        ]

    def _chosen_for(self) -> str:
        if self.by_table is None:
            return ""
        if self.by_table["rate"] is None:
            return f", the table's choice for any question: {self.by_table['why']}"
        rate = f"a predicted pass rate of {100 * self.by_table['rate']:.0f} %"
        return f", chosen for {rate} (difficulty {self.by_table['bin']} of {self.by_table['bins']})"

    def verdict(self) -> str | None:
        """Whether the answer is right, in words; None where nobody can tell."""
        if self.correct is None:
            return None
        gold = harmless(self.result.problem.answer or "")
        return "right" if self.correct else f"wrong: expected {gold}"

    def votes_line(self) -> str:
        """Example: "(5*3)+7 12, (7-5)*3 3, without an answer 1" """
        votes = self.votes()
        shown = [
            f"{' '.join(harmless(v.answer).split())} {v.num}" + ("" if v.weight is None else f" (score {v.weight:.2f})")
            for v in votes[:MOST_VOTES]
        ]
        if len(votes) > MOST_VOTES:
            rest = votes[MOST_VOTES:]
            shown.append(f"{len(rest)} other answers {sum(v.num for v in rest)}")
        return ", ".join([*shown, *(f"{why} {num}" for why, num in self.silent().items())]) or "none"

    def why_not(self) -> str:
        """Why there is no answer, and the way out."""
        result, name = self.result, self.result.strategy
        if result.failed:
            return f"no answer: {result.failed}" + (f"; {_UNCAP}" if self.capped else "")
        if not result.candidates:
            return f"no answer: {name} finished nothing; " + (_UNCAP if self.capped else "give a larger --budget")
        silent = ", ".join(f"{num} {why}" for why, num in self.silent().items())
        ways = ["give a larger --budget"]
        if self.silent().get("ended by length"):
            ways.append("a larger --set sampling.max_new_tokens")
        return f"no answer in {len(result.candidates)} candidates ({silent}): {', or '.join(ways)}"


def _vote(answer: str, given: Sequence[Candidate]) -> Vote:
    scores = [c.score for c in given if c.score is not None]
    grade = given[0].grade
    return Vote(answer, len(given), sum(scores) if scores else None, grade.value if grade else None)
