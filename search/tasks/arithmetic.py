"""Arithmetic chains: apply operations left to right, modulo a prime, one a line.

    question  "5+12*2"               key  the same
    response  "5+12=17\n17*2=3"      every result is taken modulo 31 and written as 0..30

The base model learns from a teacher that slips: it drops a carry, forgets a borrow, is one short in the tables of 7, 8
and 9. Search finds the answers that are right all the same, so a round can outgrow the teacher. The modulus is prime,
so one slip rarely hides another. A chain solves every chain inside it: training chains hold none of a held-out split.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator, Sequence

from configs.schema import ArithmeticTask, Bootstrap, Splits
from search.errors import DataError
from search.randomness import rng
from search.tasks.splits import split_of, take_distinct
from search.types import Grade, Graded, Problem, Split

NUMBER = "(?:0|[1-9][0-9]?)"
LINE = re.compile(f"({NUMBER})([-+*])({NUMBER})=({NUMBER})")
CHAIN = re.compile(f"{NUMBER}(?:[-+*]{NUMBER})+")
LONGEST_LINE = len("96*96=96")
SHORT = 4  # operations of a short demonstration, at most
DROPPED_CARRY, FORGOTTEN_BORROW, SHORT_TABLE = 0.15, 0.6, 0.35
MAX_TRIES = 30  # extensions tried before a training chain that meets held-out ones is begun anew

Operation = tuple[str, int]


class Arithmetic:
    """The task; see the module. Raises Exhausted, a DataError, where a draw asks for more problems than exist."""

    name = "arithmetic"
    step_delimiter = "\n"
    generated = True
    end_text: str | None = None

    def __init__(self, config: ArithmeticTask, splits: Splits, seed: int) -> None:
        if config.min_operations > config.max_operations:
            raise DataError(
                f"task.min_operations = {config.min_operations} is more than max_operations = {config.max_operations}"
            )
        self.config = config
        self.splits = splits
        self.seed = seed

    # ------------------------------------------------------------ problems

    def draw(self, split: Split, num: int, *, stream: str, exclude: frozenset[str] = frozenset()) -> list[Problem]:
        """`num` distinct problems of `split`, a pure function of the arguments."""
        chance = rng(self.seed, "arithmetic", split, stream)
        return take_distinct(self._stream(chance, split), num, split=split, exclude=exclude)

    def problems(self, split: Split) -> list[Problem]:
        raise DataError(f"arithmetic problems are generated: draw the {split} split instead of listing it")

    def parse(self, question: str) -> Problem:
        """The problem of a question as a user types it: "5 + 12 * 2". Raises DataError."""
        text = question.replace(" ", "").rstrip("=\n")
        if len(text) > 200 or not CHAIN.fullmatch(text):
            raise DataError(f"'{text[:100]}' is no chain of operations: write it like '5+12*2'")
        first, operations = _parse(text)
        if not self.config.min_operations <= len(operations) <= self.config.max_operations:
            raise DataError(
                f"'{text}' has {len(operations)} operations, not {self.config.min_operations} to "
                f"{self.config.max_operations}"
            )
        return self._problem(first, operations)

    def prompt(self, problem: Problem) -> str:
        return problem.key + "\n"

    def asked(self, problem: Problem) -> str:
        """Nothing is asked again with an earlier attempt: so more of them fit into a small context."""
        return ""

    # ------------------------------------------------------------ grading

    def grade(self, pairs: Sequence[tuple[Problem, str]]) -> list[Graded]:
        """Exact and total: any text, however long, gets a verdict in microseconds.

        The answer is the last line's result where the lines follow the chain (each begins with the result of the one
        before). CORRECT means that every line is right; where slips happen to cancel, there is no answer, so that
        equal answers always have equal grades.
        """
        return [self._grade(problem, text) for problem, text in pairs]

    def answers(self, pairs: Sequence[tuple[Problem, str]]) -> list[str | None]:
        """Canonical answers, which here do not depend on whether they are right."""
        return [self._grade(problem, text).answer for problem, text in pairs]

    def _grade(self, problem: Problem, text: str) -> Graded:
        first, operations = _parse(problem.key)
        lines = self._lines(text, len(operations))
        labels, values = self._check(first, operations, lines)
        if len(lines) != len(operations) or len(values) != len(operations) + 1:
            return Graded(Grade.WRONG, None)
        written = str(values[-1])
        if all(labels):
            return Graded(Grade.CORRECT, written)
        return Graded(Grade.WRONG, None if written == problem.answer else written)

    def step_labels(self, problem: Problem, text: str) -> list[bool]:
        """The perfect step checker: for each line, whether it and all before are right."""
        first, operations = _parse(problem.key)
        lines = self._lines(text, len(operations))
        labels, _ = self._check(first, operations, lines)
        return [all(labels[: i + 1]) and i < len(labels) for i in range(len(lines))]

    def solution_key(self, problem: Problem, text: str) -> str:
        """A chain has one solution; wrong answers differ by their text."""
        return text.removesuffix("\n")[: self._longest(self.config.max_operations)]

    def solved_keys(self, problem: Problem, text: str) -> frozenset[str]:
        """Keys of every problem that a run of right lines solves, also where the text as a whole is wrong."""
        first, operations = _parse(problem.key)
        labels, values = self._check(first, operations, self._lines(text, len(operations)))
        found: set[str] = set()
        for end in range(1, len(values)):
            right = next((i + 1 for i in reversed(range(end)) if not labels[i]), 0)
            found.update(self._inner_keys(values[right : end + 1], operations[right:end]))
        return frozenset(found)

    def _lines(self, text: str, num_operations: int) -> list[str]:
        """The lines of a response; a text too long to be one comes back uncut."""
        return text.removesuffix("\n").split("\n") if len(text) <= self._longest(num_operations) else [text[:1]]

    def _check(self, first: int, operations: Sequence[Operation], lines: Sequence[str]) -> tuple[list[bool], list[int]]:
        """Whether each line that follows the chain is right, and the values written, `first` included.

        A line that leaves the chain is wrong and ends the list of values.
        """
        labels: list[bool] = []
        values = [first]
        for (sign, operand), line in zip(operations, lines, strict=False):
            match = LINE.fullmatch(line)
            if match is None or (int(match[1]), match[2], int(match[3])) != (values[-1], sign, operand):
                return [*labels, False], values
            written = int(match[4])
            labels.append(written == self.apply(values[-1], sign, operand))
            values.append(written)
        return labels, values

    def _longest(self, num_operations: int) -> int:
        return 2 * num_operations * (LONGEST_LINE + 1)

    def apply(self, a: int, sign: str, b: int) -> int:
        """One operation modulo the prime, in 0..modulus-1."""
        return (a + b if sign == "+" else a - b if sign == "-" else a * b) % self.config.modulus

    # ------------------------------------------------------------ solutions and demonstrations

    def solve(self, problem: Problem) -> str | None:
        """The one correct response."""
        first, operations = _parse(problem.key)
        values = self._values(first, operations)
        return "\n".join(f"{values[i]}{sign}{b}={values[i + 1]}" for i, (sign, b) in enumerate(operations))

    def demonstrations(self, num: int, *, stream: str, bootstrap: Bootstrap) -> list[tuple[Problem, str]]:
        """What the base model learns from: the flawed teacher's answers to training chains, `bootstrap.short` of them
        with at most four operations."""
        chance = rng(self.seed, "arithmetic", "demonstrations", stream)
        low, high = self.config.min_operations, self.config.max_operations
        shown: list[tuple[Problem, str]] = []
        for _ in range(num):
            brief = chance.random() < bootstrap.short
            length = chance.randint(low, max(low, min(SHORT, high)) if brief else high)
            shown.append(self._demonstration(chance, length, bootstrap.teacher_errors))
        return shown

    def _demonstration(self, chance: random.Random, length: int, errors: float) -> tuple[Problem, str]:
        """A training chain and the teacher's answer. After a slip other chains begin: none of them is held out."""
        while True:
            problem = self._training_chain(chance, length)
            text = self._taught(chance, problem, errors)
            if all(split_of(key, self.splits) == "train" for key in self.solved_keys(problem, text)):
                return problem, text

    def _taught(self, chance: random.Random, problem: Problem, errors: float) -> str:
        value, operations = _parse(problem.key)
        lines: list[str] = []
        for sign, operand in operations:
            result = self._slip(chance, value, sign, operand, errors)
            lines.append(f"{value}{sign}{operand}={result}")
            value = result
        return "\n".join(lines)

    def _slip(self, chance: random.Random, a: int, sign: str, b: int, errors: float) -> int:
        """The teacher's result: right, or wrong in one of its three ways."""
        luck = chance.random()
        result = self.apply(a, sign, b)
        if sign == "+" and a % 10 + b % 10 >= 10 and luck < DROPPED_CARRY * errors:
            return (result - 10) % self.config.modulus
        if sign == "-" and a % 10 < b % 10 and luck < FORGOTTEN_BORROW * errors:
            return (result + 10) % self.config.modulus
        if sign == "*" and b % 10 in (7, 8, 9) and luck < SHORT_TABLE * errors:
            return (result - a) % self.config.modulus
        return result

    def _stream(self, chance: random.Random, split: Split) -> Iterator[Problem]:
        while True:
            length = chance.randint(self.config.min_operations, self.config.max_operations)
            if split == "train":
                yield self._training_chain(chance, length)
                continue
            problem = self._problem(self._operand(chance), [self._operation(chance) for _ in range(length)])
            if split_of(problem.key, self.splits) == split:
                yield problem

    def _training_chain(self, chance: random.Random, length: int) -> Problem:
        """A chain of the train split that contains no chain of another split, built operation by operation."""
        while True:
            first = self._operand(chance)
            operations: list[Operation] = []
            for _ in range(length * MAX_TRIES):
                longer = [*operations, self._operation(chance)]
                keys = self._inner_keys(self._values(first, longer), longer)
                if all(split_of(key, self.splits) == "train" for key in keys):
                    operations = longer
                    if len(operations) == length:
                        return self._problem(first, operations)

    def _inner_keys(self, values: Sequence[int], operations: Sequence[Operation]) -> list[str]:
        """Keys of the problems inside a chain that end with its last operation, the chain itself included."""
        starts = range(len(operations) - self.config.min_operations + 1)
        return [_key(values[i], operations[i:]) for i in starts if 1 <= values[i] <= self.config.max_operand]

    def _values(self, first: int, operations: Sequence[Operation]) -> list[int]:
        values = [first]
        for sign, operand in operations:
            values.append(self.apply(values[-1], sign, operand))
        return values

    def _operand(self, chance: random.Random) -> int:
        return chance.randint(1, self.config.max_operand)

    def _operation(self, chance: random.Random) -> Operation:
        return chance.choice("+-*"), self._operand(chance)

    def _problem(self, first: int, operations: Sequence[Operation]) -> Problem:
        key = _key(first, operations)
        return Problem(key, key, str(self._values(first, operations)[-1]), {"operations": len(operations)})


def _key(first: int, operations: Sequence[Operation]) -> str:
    return str(first) + "".join(f"{sign}{operand}" for sign, operand in operations)


def _parse(key: str) -> tuple[int, list[Operation]]:
    first, *rest = re.split("([-+*])", key)
    return int(first), [(rest[i], int(rest[i + 1])) for i in range(0, len(rest), 2)]
