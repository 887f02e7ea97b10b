r"""Is an answer the gold one? Decided by text and exact arithmetic where that is certain, else left open.

`judge` never evaluates an expression. What it leaves open goes to search.tasks.symbolic in a worker process. Where it
decides that two answers are equal, the symbolic comparison agrees (tests hold it to that on real problems).

It is stricter than the symbolic comparison in one point. An answer may use a kind of operation (factorials and
binomials, sums and integrals, trigonometry, logarithms, extrema, number theory) only if the gold one does, and where
the gold answer is a literal number, only literal numbers, with unit, sign, fraction or power of ten, are answers. Else
"\binom{8}{4}" would be a right answer to "compute \binom{8}{4}".
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction

from search.tasks.math_answers import (
    AnswerType,
    Number,
    choice_letter,
    clean,
    extract,
    normal,
    number_text,
    parse_number,
    plain_words,
    refused,
    text_answer,
)
from search.types import Grade


@dataclass(frozen=True, slots=True)
class Judged:
    """A verdict and the canonical answer; None where only the symbolic comparison can tell."""

    grade: Grade | None
    canonical: str | None


_KINDS = {
    "combinatorics": re.compile(r"!|\\[dt]?binom|\\choose"),
    "sum": re.compile(r"\\(?:sum|prod|i{1,3}nt|oint|lim|det)(?![a-z])"),
    "trigonometry": re.compile(r"\\(?:arc)?(?:sin|cos|tan|cot|sec|csc)|\b(?:arc)?(?:sin|cos|tan)\b"),
    "logarithm": re.compile(r"\\(?:log|ln|lg|exp)(?![a-z])|\b(?:log|ln|exp)\b"),
    "extremum": re.compile(r"\\(?:max|min|sup|inf|gcd|lcm|bmod|pmod|mod|lfloor|lceil)(?![a-z])|\b(?:gcd|lcm)\b"),
}
_UNFINISHED = re.compile(r"[+*^!]|(?<=[\w})\]]) ?- ?(?=[\w\\({])|\\(?:cdot|times|div|sqrt|pi)(?![a-z])")
_UNITS = re.compile(
    r"\^\s*\{?\s*\\circ\s*\}?|(?:\\(?:text|mbox|mathrm)\s*\{[^{}]*\}|(?<= )[A-Za-z]{2,})(?:\s*\^\s*\{?[23]\}?)?"
)


def gold_answer(text: str, answer_type: AnswerType) -> str:
    r"""The answer inside a gold column: after "####" or in the last \boxed{}, else the text itself."""
    if "####" in text or re.search(r"\\(?:boxed|fbox)(?![A-Za-z])", text):
        marked = re.findall(r"####[ \t]*([^\n]*)", text)
        return (marked[-1] if marked else extract(text, answer_type).answer or "").strip()
    return text.strip()


def bad_gold(gold: str, answer_type: AnswerType) -> str | None:
    """Why nothing could be graded against this gold answer; None: it is usable."""
    if not clean(gold):
        return "the answer is empty"
    if reason := refused(gold):
        return f"the answer cannot be parsed: {reason}"
    if answer_type == "number" and parse_number(gold, words=True) is None:
        return f"the answer is not a number: {gold[:60]!r}"
    if answer_type == "choice" and choice_letter(gold) is None:
        return f"the answer is not one option letter: {gold[:60]!r}"
    if answer_type == "text" and not text_answer(gold):
        return "the answer is empty"
    if answer_type == "math" and gold.count("{") != gold.count("}"):
        return f"the answer cannot be parsed: unbalanced braces in {gold[:60]!r}"
    return None


def judge(gold: str | None, answer: str, answer_type: AnswerType) -> Judged:
    """Compare by text and exact numbers. gold None: only the canonical form, the grade stays UNGRADED."""
    if refused(answer):
        return Judged(Grade.WRONG if gold is not None else Grade.UNGRADED, None)
    if answer_type == "math":
        return _judge_math(gold, answer)
    canonical = canonical_simple(answer, answer_type)
    if gold is None:
        return Judged(Grade.UNGRADED, canonical)
    right = canonical is not None and canonical == canonical_simple(gold, answer_type)
    return Judged(Grade.CORRECT if right else Grade.WRONG, canonical)


def canonical_simple(answer: str, answer_type: AnswerType) -> str | None:
    """Canonical answer of the types that need no mathematics; equal strings are equal answers."""
    if answer_type == "number":
        number = parse_number(answer, words=True)
        return number_text(number.value) if number else None
    if answer_type == "choice":
        return choice_letter(answer)
    return text_answer(answer) or None


def _judge_math(gold: str | None, answer: str) -> Judged:
    number, words = parse_number(answer, words=False), plain_words(answer)
    canonical = None
    if number is not None:
        canonical = number_text(number.value) + ("%" if number.percent else "")
    elif words is not None:
        canonical = words
    return Judged(Grade.UNGRADED if gold is None else _grade_math(gold, answer, number, words), canonical)


def _grade_math(gold: str, answer: str, number: Number | None, words: str | None) -> Grade | None:
    gold_number, gold_words = parse_number(gold, words=False), plain_words(gold)
    if gold_words is not None and gold_number is None:
        return Grade.CORRECT if words == gold_words else Grade.WRONG
    if gold_number is not None:
        if number is not None:
            return _equal_numbers(gold_number, number)
        if words is not None or unfinished(answer):
            return Grade.WRONG
    elif normal(gold) == normal(answer):
        return Grade.CORRECT
    if kinds(answer) - kinds(gold) or _other_base(gold, answer):
        return Grade.WRONG
    return None


def _equal_numbers(gold: Number, number: Number) -> Grade | None:
    if gold.variable and number.variable and gold.variable != number.variable:
        return Grade.WRONG
    values = {number.value}
    if gold.percent != number.percent:  # "50%" and "0.5" are one answer, and so are "50%" and "50"
        values.add(number.value / 100 if number.percent else number.value * 100)
    if gold.value in values:
        return Grade.CORRECT
    # 0.333333 for 1/3: how much rounding is forgiven is left to the symbolic comparison.
    near = any(abs(gold.value - value) <= Fraction(1, 10**4) for value in values)
    return None if near else Grade.WRONG


def kinds(answer: str) -> frozenset[str]:
    """The kinds of operation an answer uses beyond arithmetic, powers and roots."""
    return frozenset(name for name, pattern in _KINDS.items() if pattern.search(answer))


def unfinished(answer: str) -> bool:
    """Whether arithmetic is left to do. The last side of a chain counts: "2^{10} = 1024" says 1024. Units do not."""
    last_side = _UNITS.sub("", clean(answer)).rpartition("=")[2].strip().lstrip("-+")
    return _UNFINISHED.search(last_side) is not None


def _other_base(gold: str, answer: str) -> bool:
    """Numerals in different bases, 52_8 and 52_9; the symbolic comparison ignores the base."""
    bases = [re.fullmatch(r"[\dA-F]+_\{?(?:\\text\{)?(\w+)\}{0,2}", normal(text)) for text in (gold, answer)]
    return all(bases) and len({base[1] for base in bases if base}) == 2


def is_echo(question: str, gold: str, answer: str) -> bool:
    """Whether an answer only repeats an expression of the question where the gold answer reads otherwise.

    "Simplify \\sqrt{50}" is not answered by \\sqrt{50}, though the two are equal.
    """
    written = normal(answer)
    if len(written) < 3 or written == normal(gold) or parse_number(answer, words=True) is not None:
        return False
    return plain_words(answer) is None and written in normal(question)
