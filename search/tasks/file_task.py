"""The task over a fixed set of problems: splits, prompts, grading. gsm8k, math and jsonl are this with their own words.

With `test_path`, its problems are exactly the test split; a problem of the main source that is also among them is left
out there, and the main source's own share of test goes to train.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence
from hashlib import blake2b
from pathlib import Path
from typing import Any

from configs.schema import FileTask as FileConfig
from configs.schema import Splits
from search.errors import DataError
from search.grading import GraderPool
from search.randomness import key64
from search.tasks import files
from search.tasks.compare import bad_gold, gold_answer, judge
from search.tasks.few_shot import NEXT_QUESTION, Example, render
from search.tasks.math_answers import AnswerType
from search.tasks.splits import split_of
from search.types import Grade, Graded, Problem, Split

INSTRUCTIONS: dict[AnswerType, str] = {
    "math": "Solve the problem step by step, with an empty line between steps. "
    "Write the final answer once, at the end, in \\boxed{}.",
    "number": "Solve the problem step by step, with an empty line between steps. "
    "Write the final answer once, at the end, as a plain number in \\boxed{}.",
    "choice": "Think step by step, with an empty line between steps. "
    "Write the letter of the right option once, at the end, in \\boxed{}.",
    "text": "Think step by step, with an empty line between steps. "
    "Write the final answer once, at the end, in \\boxed{}.",
}


class FileTask:
    """Problems from a file or a hub data set. `rejected` lists the rows set aside; `num_duplicates` those repeated."""

    generated = False
    end_text: str | None = None

    def __init__(
        self,
        config: FileConfig,
        splits: Splits,
        seed: int,
        *,
        name: str,
        answer_type: AnswerType,
        examples: Sequence[Example] = (),
    ) -> None:
        """Reads the source. Raises DataError."""
        self.name, self.step_delimiter = name, config.step_delimiter
        self.answer_type: AnswerType = answer_type
        self.config, self.splits, self.seed = config, splits, seed
        self._examples = tuple(examples)
        self.end_text = NEXT_QUESTION if config.prompt == "few_shot" else None
        self._pool = GraderPool(config.grader_seconds, config.grader_memory_mib, config.grader_workers)
        main = self._load(config.path, config.hub_split)
        test = self._load(config.test_path, config.hub_test_split) if config.test_path else files.Loaded(())
        self.rejected = (*main.rejected, *test.rejected)
        self.num_duplicates = main.num_duplicates + test.num_duplicates
        self._by_split = self._divide(main.problems, test.problems)

    def _load(self, path: str, hub_split: str) -> files.Loaded:
        kind = self.answer_type
        return files.load(
            path,
            self.config,
            hub_split=hub_split,
            gold=functools.partial(gold_answer, answer_type=kind),
            bad_gold=functools.partial(bad_gold, answer_type=kind),
            same=lambda a, b: a == b or judge(a, b, kind).grade is Grade.CORRECT,
        )

    def _divide(self, main: Sequence[Problem], test: Sequence[Problem]) -> dict[Split, list[Problem]]:
        divided: dict[Split, list[Problem]] = {"train": [], "fit": [], "validation": [], "gate": [], "test": list(test)}
        in_test = {p.key for p in test}
        for problem in main:
            if problem.key in in_test:
                continue
            split = split_of(problem.key, self.splits)
            divided["train" if test and split == "test" else split].append(problem)
        return divided

    def problems(self, split: Split) -> list[Problem]:
        """Every problem of the split, in file order."""
        return list(self._by_split[split])

    def draw(self, split: Split, num: int, *, stream: str, exclude: frozenset[str] = frozenset()) -> list[Problem]:
        """`num` distinct problems of the split, chosen by `stream`. Raises DataError where there are fewer."""
        left = [p for p in self._by_split[split] if p.key not in exclude]
        if len(left) < num:
            raise DataError(
                f"the {split} split of {self.config.path} has {len(left)} unused problems, not {num}; "
                "ask for fewer, add problems, or give the split a larger share"
            )
        return sorted(left, key=lambda p: key64(self.seed, self.name, split, stream, p.key))[:num]

    def load_extra(self, path: str) -> list[Problem]:
        """Problems of another source, read and graded like the task's own (guard sets). Raises DataError."""
        return list(self._load(path, self.config.hub_test_split).problems)

    def parse(self, question: str) -> Problem:
        """A question without a gold answer (`ratchet solve`). Raises DataError."""
        if not question.strip():
            raise DataError("the question is empty")
        return Problem(files.question_key(question), question.strip())

    def write_rejected(self, path: Path) -> None:
        files.write_rejected(self.rejected, path)

    # ------------------------------------------------------------ prompts

    @property
    def instruction(self) -> str:
        return self.config.instruction or INSTRUCTIONS[self.answer_type]

    def prompt(self, problem: Problem) -> str | list[dict[str, str]]:
        """Chat messages, a few-shot text or the plain question, as `task.prompt` says."""
        if self.config.prompt == "chat":
            return [
                {"role": "system", "content": self.instruction},
                {"role": "user", "content": problem.question},
            ]
        if self.config.prompt == "few_shot":
            return render(self.config.instruction, self._examples, problem.question, self.step_delimiter)
        prefix = f"{self.config.instruction}\n\n" if self.config.instruction else ""
        return f"{prefix}{problem.question}\n"

    def asked(self, problem: Problem) -> str:
        """The end of a text prompt, without instruction and examples: asked again with each attempt of a revision."""
        if self.config.prompt == "few_shot":
            return render(None, (), problem.question, self.step_delimiter)
        return f"{problem.question}\n"

    # ------------------------------------------------------------ grading

    def grade(self, pairs: Sequence[tuple[Problem, str]]) -> list[Graded]:
        """Verdicts in order. An answer that only repeats an expression of the question is wrong."""
        questions = [problem.question for problem, _ in pairs]
        return self._pool.grade([(p.answer, text) for p, text in pairs], self.answer_type, questions)

    def answers(self, pairs: Sequence[tuple[Problem, str]]) -> list[str | None]:
        """Canonical answers, the gold one unseen."""
        return [graded.answer for graded in self._pool.grade([(None, text) for _, text in pairs], self.answer_type)]

    def solution_key(self, problem: Problem, text: str) -> str:
        """The numbers and formulas of a solution in their order; words, layout and typesetting do not count."""
        return solution_key(text)

    def close(self) -> None:
        self._pool.close()

    def __enter__(self) -> FileTask:
        return self

    def __exit__(self, *exc: Any) -> None:
        self.close()


_CALCULATOR = re.compile(r"<<[^<>]*>>")
_TYPESETTING = re.compile(
    r"\\(?:text|mbox|textbf|mathrm)\s*\{[^{}]*\}|\\(?:left|right|displaystyle|boxed|[,;:! ])(?![a-z])"
)
_WORDS = re.compile(r"(?<![\\A-Za-z])[A-Za-z]{2,}")


def solution_key(text: str) -> str:
    """See FileTask.solution_key. Example: "He has 3 + 4 = 7 eggs, all 7 fresh." -> "3+4=7" """
    body = text.replace("\u2212", "-").replace("\u00d7", "*").replace("\\times", "*").replace("\\cdot", "*")
    body = re.sub(r"\\[dt]frac\b", r"\\frac", _CALCULATOR.sub("", body))
    body = re.sub(r"(?<=\d) ?x ?(?=\d)", "*", re.sub(r"(?<=\d),(?=\d{3})", "", body))
    body = _WORDS.sub(" ; ", _TYPESETTING.sub(" ", body))
    body = re.sub(r"[$`*_#]{2,}|[$`#'\"?!]|\\[\[\]()]", " ", body)
    # Punctuation that ends a clause separates formulas; a formula keeps no spaces.
    clauses = re.split(r"[;\n]|[.,:](?=\s|$)", body)
    formulas = [f for f in (re.sub(r"\s+", "", clause).strip("{}.,") for clause in clauses) if re.search(r"[\d=+^]", f)]
    equations = [f for f in formulas if "=" in f]
    written = " ".join(equations or formulas) or " ".join(text.casefold().split())
    return written if len(written) <= 200 else blake2b(written.encode(errors="replace"), digest_size=16).hexdigest()
