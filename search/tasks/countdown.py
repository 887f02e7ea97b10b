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


class Node(NamedTuple):
    """A number that is on the table: one of the given ones, or the result of a line. Example: Node(8, "3+5", ...)"""

    value: int
    expression: str  # canonical: commuted operands give the same text
    parts: tuple[Node, Node] | None = None


class Countdown:
    """The task; see the module. Raises DataError where a draw asks for more problems than exist."""

    name = "countdown"
    step_delimiter = "\n"
    generated = True

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

    # ------------------------------------------------------------ grading

    def grade(self, pairs: Sequence[tuple[Problem, str]]) -> list[Graded]:
        """Exact and total: any text, however long, gets a verdict in microseconds.

        The answer is the canonical expression of a complete legal play, right or wrong; None for anything else.
        """
        return [self._grade(problem, text) for problem, text in pairs]

    def _grade(self, problem: Problem, text: str) -> Graded:
        numbers, target = _split_key(problem.key)
        nodes = self._play(numbers, text)
        if len(nodes) != len(numbers) - 1:
            return Graded(Grade.WRONG, None)
        grade = Grade.CORRECT if nodes[-1].value == target else Grade.WRONG
        return Graded(grade, nodes[-1].expression)

    def step_labels(self, problem: Problem, text: str) -> list[bool]:
        """The perfect step checker: for each line, whether it and all before are legal and the end can be reached."""
        numbers, target = _split_key(problem.key)
        lines = text.removesuffix("\n").split("\n") if len(text) <= self._longest(numbers) else [text]
        labels: list[bool] = []
        for count in range(1, len(lines) + 1):
            left = self._table(numbers, lines[:count])
            labels.append(left is not None and self._finish([node.value for node in left], target) is not None)
        return labels

    def solution_key(self, problem: Problem, text: str) -> str:
        """The lines with operands and order made canonical: two responses with equal keys are the same solution."""
        numbers, _ = _split_key(problem.key)
        if not self._play(numbers, text):
            return text[:200]
        return ";".join(sorted(_canonical_line(line) for line in text.removesuffix("\n").split("\n")))

    def solved_keys(self, problem: Problem, text: str) -> frozenset[str]:
        """Keys of every problem that this text contains a solution of; empty for an illegal play."""
        numbers, _ = _split_key(problem.key)
        return self._solved(self._play(numbers, text))

    def _solved(self, nodes: Sequence[Node]) -> frozenset[str]:
        sizes = range(self.config.min_numbers, self.config.max_numbers + 1)
        return frozenset(
            _key(leaves, node.value)
            for node in nodes
            for leaves in _frontiers(node)
            if len(leaves) in sizes and leaves[-1] <= self.config.max_value
        )

    def _play(self, numbers: Sequence[int], text: str) -> list[Node]:
        """The results of a complete legal play's lines, in order; empty where the text is anything else."""
        lines = text.removesuffix("\n").split("\n") if len(text) <= self._longest(numbers) else []
        if len(lines) != len(numbers) - 1:
            return []
        made: list[Node] = []
        return made if self._table(numbers, lines, made) is not None else []

    def _table(self, numbers: Sequence[int], lines: Sequence[str], made: list[Node] | None = None) -> list[Node] | None:
        """What is on the table after the lines; None at the first illegal one. `made` collects the results."""
        table = [Node(value, str(value)) for value in numbers]
        for line in lines:
            match = LINE.fullmatch(line)
            if match is None:
                return None
            a, b = _take(table, int(match[1])), _take(table, int(match[3]))
            if a is None or b is None:
                return None
            result = apply(a.value, match[2], b.value)
            if result is None or result != int(match[4]) or result > self.config.max_intermediate:
                return None
            node = Node(result, _expression(a, match[2], b), (a, b))
            table.append(node)
            if made is not None:
                made.append(node)
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
        results = [(sign, apply(a, sign, b)) for sign in "+-*/"]
        top = self.config.max_intermediate
        return [(f"{a}{sign}{b}={r}", r) for sign, r in results if r is not None and r <= top]

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
        text, target = "\n".join(play[0]), other[1]
        keys = {_key(numbers, target), *self._solved(self._play(numbers, text))}
        if any(split_of(key, self.splits) != "train" for key in keys):
            return None
        return _problem(numbers, target), text

    def _stream(self, chance: random.Random, split: Split) -> Iterator[Problem]:
        while True:
            numbers = self._numbers(chance, chance.randint(self.config.min_numbers, self.config.max_numbers))
            play = self._random_play(chance, numbers)
            if play is not None and split_of(_key(numbers, play[1]), self.splits) == split:
                yield _problem(numbers, play[1])

    def _numbers(self, chance: random.Random, count: int) -> list[int]:
        return sorted(chance.randint(1, self.config.max_value) for _ in range(count))

    def _random_play(self, chance: random.Random, numbers: Sequence[int]) -> tuple[list[str], int] | None:
        """Lines of a random legal play and its result; None where it got stuck."""
        values, lines = list(numbers), list[str]()
        while len(values) > 1:
            a = values.pop(chance.randrange(len(values)))
            b = values.pop(chance.randrange(len(values)))
            moves = self._moves(a, b)
            if not moves:
                return None
            line, result = chance.choice(moves)
            lines.append(line)
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


def _take(table: list[Node], value: int) -> Node | None:
    """Remove a number from the table. Of equal ones the first by expression, so that line order does not matter."""
    found = min((node for node in table if node.value == value), key=lambda node: node.expression, default=None)
    if found is not None:
        table.remove(found)
    return found


def _expression(a: Node, sign: str, b: Node) -> str:
    left, right = (f"({x.expression})" if x.parts else x.expression for x in (a, b))
    if sign in "+*" and (b.value, right) > (a.value, left):
        left, right = right, left
    return left + sign + right


def _canonical_line(line: str) -> str:
    match = LINE.fullmatch(line)
    assert match is not None, "only lines of a legal play have a canonical form"
    a, b = int(match[1]), int(match[3])
    if match[2] in "+*":
        a, b = max(a, b), min(a, b)
    return f"{a}{match[2]}{b}={match[4]}"


def _frontiers(node: Node) -> set[tuple[int, ...]]:
    """Every set of numbers that the lines up to this node turn into its value, sorted; with the node itself."""
    if node.parts is None:
        return {(node.value,)}
    left, right = node.parts
    combined = {tuple(sorted(a + b)) for a in _frontiers(left) for b in _frontiers(right)}
    return combined | {(node.value,)}
