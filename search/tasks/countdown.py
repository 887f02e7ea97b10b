"""Countdown: reach a target with every number used once; intermediate results stay whole, in 1..max_intermediate.

    question  "3 5 7 > 22"            key  "3,5,7>22"
    response  "5*3=15\n15+7=22"       one operation a line, nothing after the last

The numbers are sorted, so equal problems have equal keys. A play that misses its target still solves the problem
(numbers, result), and the tail of a play solves a smaller problem: `solved_keys` lists them all, and demonstrations
never contain one of a held-out split. Left out: brackets, negative and fractional intermediates.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator, Sequence
from itertools import combinations
from typing import NamedTuple

from configs.schema import Bootstrap, CountdownTask, Splits
from search.errors import DataError
from search.randomness import rng
from search.tasks.splits import split_of, take_distinct
from search.types import Grade, Graded, Problem, Split

LINE = re.compile(r"([1-9][0-9]?)([-+*/])([1-9][0-9]?)=([1-9][0-9]?)", re.ASCII)
QUESTION = re.compile(r"[0-9]{1,3}(?:[ ,]+[0-9]{1,3})*[ ]*(?:>|->|=)[ ]*[0-9]{1,3}", re.ASCII)
LONGEST_LINE = len("99+99=99")


class Line(NamedTuple):
    """One operation. Example: Line(5, "*", 3, 15)"""

    a: int
    sign: str
    b: int
    result: int


class Countdown:
    """The task; see the module. Raises Exhausted, a DataError, where a draw asks for more problems than exist."""

    name = "countdown"
    step_delimiter = "\n"
    generated = True
    end_text: str | None = None

    def __init__(self, config: CountdownTask, splits: Splits, seed: int) -> None:
        self.config = config
        self.splits = splits
        self.seed = seed

    # ------------------------------------------------------------ problems

    def draw(self, split: Split, num: int, *, stream: str, exclude: frozenset[str] = frozenset()) -> list[Problem]:
        """`num` distinct problems of `split`, a pure function of the arguments."""
        chance = rng(self.seed, "countdown", split, stream)
        return take_distinct(self._stream(chance, split), num, split=split, exclude=exclude)

    def problems(self, split: Split) -> list[Problem]:
        raise DataError(f"countdown problems are generated: draw the {split} split instead of listing it")

    def parse(self, question: str) -> Problem:
        """The problem of a question as a user types it: "3 5 7 > 22" or "7,5,3>22". Raises DataError."""
        text = question.strip()
        if len(text) > 100 or not QUESTION.fullmatch(text):
            raise DataError(f"'{text[:100]}' is no countdown question: write it like '3 5 7 > 22'")
        *numbers, target = (int(digits) for digits in re.findall("[0-9]+", text))
        smallest, largest = self.config.min_numbers, self.config.max_numbers
        if not smallest <= len(numbers) <= largest:
            raise DataError(f"'{text}' has {len(numbers)} numbers, not {smallest} to {largest}")
        if not all(1 <= value <= 99 for value in (*numbers, target)):
            raise DataError(f"'{text}' has a number outside 1..99")
        return _problem(sorted(numbers), target)

    def prompt(self, problem: Problem) -> str:
        return problem.key + "\n"

    def asked(self, problem: Problem) -> str:
        """Nothing is asked again with an earlier attempt: so more of them fit into a small context."""
        return ""

    # ------------------------------------------------------------ grading

    def grade(self, pairs: Sequence[tuple[Problem, str]]) -> list[Graded]:
        """Exact and total: any text, however long, gets a verdict in microseconds.

        The answer is the canonical expression of a complete legal play, right or wrong; None for anything else.
        """
        return [self._grade(problem, text) for problem, text in pairs]

    def answers(self, pairs: Sequence[tuple[Problem, str]]) -> list[str | None]:
        """Canonical answers, which here do not depend on whether they are right."""
        return [self._grade(problem, text).answer for problem, text in pairs]

    def _grade(self, problem: Problem, text: str) -> Graded:
        numbers, target = _split_key(problem.key)
        lines = self._lines(numbers, text)
        left = self._left(numbers, lines)
        if not lines or left is None:
            return Graded(Grade.WRONG, None)
        return Graded(Grade.CORRECT if left == [target] else Grade.WRONG, _expression(numbers, lines))

    def step_labels(self, problem: Problem, text: str) -> list[bool]:
        """The perfect step checker: for each line, whether it and all before are legal and the end can be reached."""
        numbers, target = _split_key(problem.key)
        lines = text.removesuffix("\n").split("\n") if len(text) <= self._longest(numbers) else [text[:1]]
        labels: list[bool] = []
        for count in range(1, len(lines) + 1):
            left = self._left(numbers, lines[:count]) if all(labels) else None
            labels.append(left is not None and self._finish(left, target) is not None)
        return labels

    def solution_key(self, problem: Problem, text: str) -> str:
        """The lines with operands and order made canonical: two responses with equal keys are the same solution."""
        numbers, _ = _split_key(problem.key)
        lines = self._lines(numbers, text)
        if not lines or self._left(numbers, lines) is None:
            return text[:200]
        return ";".join(sorted(map(_canonical_line, lines)))

    def solved_keys(self, problem: Problem, text: str) -> frozenset[str]:
        """Keys of every problem that lines of this text, in order, solve; empty for an illegal play."""
        numbers, _ = _split_key(problem.key)
        lines = self._lines(numbers, text)
        return self._solved(lines) if lines and self._left(numbers, lines) is not None else frozenset()

    def _solved(self, lines: Sequence[str]) -> frozenset[str]:
        parsed = [_parse_line(line) for line in lines]
        smallest = max(1, self.config.min_numbers - 1)
        chosen = (some for size in range(smallest, len(lines) + 1) for some in combinations(parsed, size))
        starts = ((_leaves(some), some[-1].result) for some in chosen)
        return frozenset(
            _key(leaves, result) for leaves, result in starts if leaves and leaves[-1] <= self.config.max_value
        )

    def _lines(self, numbers: Sequence[int], text: str) -> list[str]:
        """The lines of a text that has as many as a complete play; else none."""
        lines = text.removesuffix("\n").split("\n") if len(text) <= self._longest(numbers) else []
        return lines if len(lines) == len(numbers) - 1 else []

    def _left(self, numbers: Sequence[int], lines: Sequence[str]) -> list[int] | None:
        """The numbers on the table after the lines; None at the first illegal one."""
        table = list(numbers)
        for text in lines:
            if LINE.fullmatch(text) is None:
                return None
            line = _parse_line(text)
            for value in (line.a, line.b):
                if value not in table:
                    return None
                table.remove(value)
            if apply(line.a, line.sign, line.b) != line.result or line.result > self.config.max_intermediate:
                return None
            table.append(line.result)
        return table

    def _longest(self, numbers: Sequence[int]) -> int:
        return len(numbers) * (LONGEST_LINE + 1)

    # ------------------------------------------------------------ solutions and demonstrations

    def solve(self, problem: Problem) -> str | None:
        """One correct response, or None where there is none."""
        numbers, target = _split_key(problem.key)
        lines = self._finish(list(numbers), target)
        return None if lines is None else "\n".join(lines)

    def _finish(self, values: list[int], target: int) -> list[str] | None:
        """Lines that lead from the values to the target, by depth-first search that remembers dead ends."""
        dead: set[tuple[int, ...]] = set()

        def descend(values: tuple[int, ...]) -> list[str] | None:
            if len(values) == 1:
                return [] if values[0] == target else None
            if values in dead:
                return None
            for i, j in combinations(range(len(values)), 2):
                rest = [v for k, v in enumerate(values) if k not in (i, j)]
                for line, result in self._moves(values[i], values[j]):
                    lines = descend(tuple(sorted([*rest, result])))
                    if lines is not None:
                        return [line, *lines]
            dead.add(values)
            return None

        return descend(tuple(sorted(values)))

    def _moves(self, a: int, b: int) -> list[tuple[str, int]]:
        """Legal operations on two numbers, larger first: [("5+3=8", 8), ...]"""
        a, b = max(a, b), min(a, b)
        return [(f"{a}{sign}{b}={result}", result) for sign, result in self._results(a, b)]

    def _results(self, a: int, b: int) -> list[tuple[str, int]]:
        """Legal operations on a >= b: [("+", 8), ...]"""
        results = [(sign, apply(a, sign, b)) for sign in "+-*/"]
        top = self.config.max_intermediate
        return [(sign, result) for sign, result in results if result is not None and result <= top]

    def demonstrations(self, num: int, *, stream: str, bootstrap: Bootstrap) -> list[tuple[Problem, str]]:
        """What the base model learns from: legal play, mostly with an unrelated target.

        A share `bootstrap.solved` is shown with the target that the play reached. Every problem that a play solves
        is in the train split, and so is the problem it is shown with.
        """
        chance = rng(self.seed, "countdown", "demonstrations", stream)
        shown: list[tuple[Problem, str]] = []
        while len(shown) < num:
            count = chance.randint(self.config.min_numbers, self.config.max_numbers)
            one = None
            while one is None:  # held-out plays are drawn again at the same size, so sizes stay equally frequent
                one = self._demonstration(chance, count, solved=chance.random() < bootstrap.solved)
            shown.append(one)
        return shown

    def _demonstration(self, chance: random.Random, count: int, *, solved: bool) -> tuple[Problem, str] | None:
        """One play of `count` numbers; None where it got stuck or anything in it is held out."""
        numbers = self._numbers(chance, count)
        play = self._random_play(chance, numbers)
        other = play if solved else self._random_play(chance, numbers)
        if play is None or other is None:
            return None
        target = other[1]
        keys = {_key(numbers, target), *self._solved(play[0])}
        if any(split_of(key, self.splits) != "train" for key in keys):
            return None
        return _problem(numbers, target), "\n".join(play[0])

    def _stream(self, chance: random.Random, split: Split) -> Iterator[Problem]:
        while True:
            numbers = self._numbers(chance, chance.randint(self.config.min_numbers, self.config.max_numbers))
            play = self._random_play(chance, numbers)
            if play is not None and split_of(_key(numbers, play[1]), self.splits) == split:
                yield _problem(numbers, play[1])

    def _numbers(self, chance: random.Random, count: int) -> list[int]:
        top, draw = self.config.max_value, chance.random
        return sorted([1 + int(draw() * top) for _ in range(count)])

    def _random_play(self, chance: random.Random, numbers: Sequence[int]) -> tuple[list[str], int] | None:
        """Lines of a random legal play and its result; None where it got stuck."""
        values, lines, draw = list(numbers), list[str](), chance.random  # random() is the fastest draw there is
        while len(values) > 1:
            a = values.pop(int(draw() * len(values)))
            b = values.pop(int(draw() * len(values)))
            a, b = (a, b) if a >= b else (b, a)
            results = self._results(a, b)
            if not results:
                return None
            sign, result = results[int(draw() * len(results))]
            lines.append(f"{a}{sign}{b}={result}")
            values.append(result)
        return lines, values[0]


def apply(a: int, sign: str, b: int) -> int | None:
    """The result of one operation on positive numbers; None where it is not a positive whole number."""
    if sign == "+":
        return a + b
    if sign == "-":
        return a - b if a > b else None
    if sign == "*":
        return a * b
    return a // b if b and a % b == 0 else None


def _problem(numbers: Sequence[int], target: int) -> Problem:
    question = " ".join(map(str, numbers)) + f" > {target}"
    return Problem(_key(numbers, target), question, str(target), {"numbers": list(numbers), "target": target})


def _key(numbers: Sequence[int], target: int) -> str:
    return ",".join(map(str, numbers)) + f">{target}"


def _split_key(key: str) -> tuple[list[int], int]:
    numbers, _, target = key.partition(">")
    return [int(value) for value in numbers.split(",")], int(target)


def _parse_line(text: str) -> Line:
    match = LINE.fullmatch(text)
    assert match is not None, "only well-formed lines are parsed"
    return Line(int(match[1]), match[2], int(match[3]), int(match[4]))


def _canonical_line(text: str) -> str:
    a, sign, b, result = _parse_line(text)
    if sign in "+*":
        a, b = max(a, b), min(a, b)
    return f"{a}{sign}{b}={result}"


def _leaves(lines: Sequence[Line]) -> list[int]:
    """The numbers that these lines, alone and in this order, turn into the last one's result; [] if they do not.

    From the last line back, each result fills one place in a later line; the places that stay open are the numbers.
    """
    places: list[int] = []
    for line in reversed(lines):
        if places:
            if line.result not in places:
                return []
            places.remove(line.result)
        places += [line.a, line.b]
    return sorted(places)


def _expression(numbers: Sequence[int], lines: Sequence[str]) -> str:
    """A legal play as one expression; commuted operands give the same text. Example: "(5*3)+7" """
    table = [(value, str(value)) for value in numbers]
    for text in lines:
        line = _parse_line(text)
        operands: list[tuple[int, str]] = []
        for value in (line.a, line.b):  # of equal numbers the first by text, so that the order of lines hardly matters
            entry = min(entry for entry in table if entry[0] == value)
            table.remove(entry)
            operands.append((value, entry[1] if entry[1].isdigit() else f"({entry[1]})"))
        if line.sign in "+*":
            operands.sort(reverse=True)
        table.append((line.result, line.sign.join(text for _, text in operands)))
    return table[0][1]
