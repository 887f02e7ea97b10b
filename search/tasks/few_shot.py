r"""Worked examples for base models without a chat template. Written for this project; none comes from a benchmark."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

NEXT_QUESTION = "\n\nQuestion:"  # a base model that goes on writing the prompt has ended its answer


class Example(NamedTuple):
    """A question, the steps of its solution, and the answer as it stands in the box."""

    question: str
    steps: tuple[str, ...]
    answer: str


def render(instruction: str | None, examples: Sequence[Example], question: str, step_delimiter: str) -> str:
    """The prompt of a base model: examples whose steps end as the policy's shall, then the question."""
    parts = [instruction] if instruction else []
    for example in examples:
        last = f"The answer is \\boxed{{{example.answer}}}."
        solution = step_delimiter.join((*example.steps, last))
        parts.append(f"Question: {example.question}\nSolution: {solution}")
    return "\n\n".join([*parts, f"Question: {question}\nSolution:"])


NUMBER = (
    Example(
        "A bakery fills 6 trays with 15 rolls each. By noon 52 rolls are sold. How many rolls are left?",
        ("The bakery starts with 6 * 15 = 90 rolls.", "After selling 52 there are 90 - 52 = 38 rolls left."),
        "38",
    ),
    Example(
        "Ines cycles for 3 hours at 18 km per hour and then walks the last 4 km. How long is her way?",
        ("She cycles 3 * 18 = 54 km.", "With the walk the way is 54 + 4 = 58 km long."),
        "58",
    ),
    Example(
        "A jacket costs 80 dollars. It is reduced by a quarter, then 5 dollars more are taken off. What is its price?",
        (
            "A quarter of 80 dollars is 80 / 4 = 20 dollars.",
            "The reduced price is 80 - 20 = 60 dollars.",
            "With 5 dollars more off it costs 60 - 5 = 55 dollars.",
        ),
        "55",
    ),
    Example(
        "Two pumps empty a pool of 2400 litres, one with 25 litres a minute, one with 35. How many minutes pass?",
        ("Together they pump 25 + 35 = 60 litres a minute.", "The pool is empty after 2400 / 60 = 40 minutes."),
        "40",
    ),
)

MATH = (
    Example(
        "Find the sum of the solutions of $x^2 - 7x + 10 = 0$.",
        ("The left side factors as $(x - 2)(x - 5)$.", "So $x = 2$ or $x = 5$, and their sum is $2 + 5 = 7$."),
        "7",
    ),
    Example(
        "A right triangle has legs of length $4$ and $6$. How long is its hypotenuse?",
        (
            "By the theorem of Pythagoras the square of the hypotenuse is $4^2 + 6^2 = 52$.",
            "Its length is $\\sqrt{52} = 2\\sqrt{13}$.",
        ),
        "2\\sqrt{13}",
    ),
    Example(
        "A bag holds 3 red and 5 blue marbles. Two are drawn without putting the first back. "
        "What is the probability that both are red?",
        (
            "The first is red with probability $\\frac{3}{8}$.",
            "Then 2 of the 7 marbles left are red, so the second is red with probability $\\frac{2}{7}$.",
            "Both are red with probability $\\frac{3}{8} \\cdot \\frac{2}{7} = \\frac{3}{28}$.",
        ),
        "\\frac{3}{28}",
    ),
    Example(
        "For which $x$ is $3x - 4 \\le 11$ and $x > 1$? Give an interval.",
        ("From $3x - 4 \\le 11$ follows $3x \\le 15$, so $x \\le 5$.", "Together with $x > 1$ this is $1 < x \\le 5$."),
        "(1,5]",
    ),
)

CHOICE = (
    Example(
        "Which of these is a prime number? (A) 21 (B) 27 (C) 29 (D) 33",
        ("21 = 3 * 7, 27 = 3 * 9 and 33 = 3 * 11 are not prime.", "29 has no divisor but 1 and itself."),
        "C",
    ),
    Example(
        "A train leaves at 9:40 and arrives 75 minutes later. When does it arrive? (A) 10:45 (B) 10:55 (C) 11:05",
        ("After 60 minutes it is 10:40.", "15 minutes more make it 10:55."),
        "B",
    ),
)

TEXT = (
    Example(
        "Which day comes three days after Sunday?",
        ("One day after Sunday is Monday, two days after is Tuesday.", "Three days after is Wednesday."),
        "Wednesday",
    ),
    Example(
        "Spell the word 'stop' backwards.",
        ("Its letters are s, t, o, p.", "From the last to the first they are p, o, t, s."),
        "pots",
    ),
)
