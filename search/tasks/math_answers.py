r"""Find the answer in a response and compare it with the gold one, by text and exact arithmetic alone.

Everything here is linear in the length of its input and never evaluates anything: it is safe on hostile text and
runs in the caller's process. What it cannot decide (symbolic mathematics) it leaves to search.tasks.symbolic, which
runs in a killable worker (search.grading).

Where an answer is looked for, in this order:
1. the last \boxed{...}; one that is empty or never closed is no answer (a truncated response)
2. the last line "#### answer" (the convention of GSM8K)
3. after the last "answer is" / "answer:"
4. the whole response, where it is nothing but a short answer on one line
There is no "last number in the text": a copy of the question, or a list of every option, must not score.

An answer is refused (wrong, without a look at its value) where no honest answer looks like that: too long, nested too
deeply, towers of powers, control characters. An answer that leaves the work undone, such as \binom{8}{4} or 3+4 where
the gold answer is a number, is wrong too: the loop would learn to repeat the question inside the box.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal

AnswerType = Literal["math", "number", "choice", "text"]

MAX_ANSWER_CHARS = 4000
MAX_NESTING = 64
MAX_DIGITS = 1000
MAX_BARE_CHARS = 200


@dataclass(frozen=True, slots=True)
class Extracted:
    """The answer part of a response; None: there is none. `marked` counts \\boxed and #### marks: above 1 is a flag."""

    answer: str | None
    marked: int = 0


@dataclass(frozen=True, slots=True)
class Number:
    """A literal number. `percent`: it carries a percent sign; `variable`: it was given as "x = 5"."""

    value: Fraction
    percent: bool = False
    variable: str | None = None


# ---------------------------------------------------------------- extraction

_BOXED = re.compile(r"\\(?:boxed|fbox)(?![A-Za-z])")
_HASHES = re.compile(r"^[ \t]*####[ \t]*(\S[^\n]*)$", re.MULTILINE)
_PHRASE = re.compile(r"\banswer\b[*_]{0,3}\s{0,3}(?:is\b|:|=)[*_]{0,3}[:\s]{0,4}", re.IGNORECASE)
_DELIMITED = (("$$", "$$"), ("\\[", "\\]"), ("\\(", "\\)"), ("$", "$"))
_WORD = re.compile(r"(?<![\\A-Za-z])[A-Za-z]{3,}")


def extract(response: str, answer_type: AnswerType = "math") -> Extracted:
    """The answer part of a response. Reasoning before a closing </think> is not looked at."""
    response = response.rpartition("</think>")[2]
    boxes = [m.end() for m in _BOXED.finditer(response)]
    hashes = _HASHES.findall(response)
    if boxes:
        return Extracted(_nonempty(_braced(response, boxes[-1])), len(boxes))
    if hashes:
        return Extracted(_nonempty(hashes[-1]), len(hashes))
    phrases = [m.end() for m in _PHRASE.finditer(response)]
    if phrases:
        return Extracted(_nonempty(_after_phrase(response[phrases[-1] :][:MAX_BARE_CHARS], answer_type)))
    bare = response.strip()
    if bare and "\n" not in bare and len(bare) <= MAX_BARE_CHARS and _is_bare(bare, answer_type):
        return Extracted(bare)
    return Extracted(None)


def _nonempty(text: str | None) -> str | None:
    return text.strip() or None if text else None


def _braced(text: str, start: int) -> str | None:
    """What stands in the braces at `start` (or the one token there); None where they never close."""
    rest = text[start : start + 2 * MAX_ANSWER_CHARS]
    body = rest.lstrip()
    if not body.startswith("{"):
        token = re.match(r"\\?[A-Za-z]+|-?\d[\d,.]*", body)
        return token.group().rstrip(".,") if token else None
    depth, escaped = 0, False
    for i, char in enumerate(body):
        if escaped:
            escaped = False
        elif char == "\\":
            escaped = True
        elif char == "{":
            depth += 1
        elif char == "}":
            depth -= 1
            if depth == 0:
                return body[1:i]
    # Never closed. A closed box that is longer than any answer is handed on, to be refused for its length.
    return body[1:] if len(body) > MAX_ANSWER_CHARS else None


def _after_phrase(text: str, answer_type: AnswerType) -> str:
    for opening, closing in _DELIMITED:
        if text.startswith(opening) and closing in text[len(opening) :]:
            inside, _, rest = text[len(opening) :].partition(closing)
            return inside + ("%" if rest.startswith("%") else "")
    line = text.split("\n", 1)[0]
    sentence = re.split(r"[.!?](?:\s|$)", line, maxsplit=1)[0] if answer_type != "choice" else line
    if answer_type == "number":
        sentence = re.split(r"[,;]\s", sentence, maxsplit=1)[0]
    return sentence.strip().strip("*_").strip()


def _is_bare(text: str, answer_type: AnswerType) -> bool:
    """Whether a whole response is nothing but an answer."""
    if answer_type == "number":
        return parse_number(text, words=True) is not None
    if answer_type == "choice":
        return choice_letter(text) is not None
    return answer_type == "text" or len(_WORD.findall(_TEXT.sub("", text))) <= 3


# ---------------------------------------------------------------- guards

_CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\u202a-\u202e\ud800-\udfff]")
_BIG_EXPONENT = re.compile(r"(?:\^|\*\*)[{(]*[-+]?\d{5}")
_BIG_FACTORIAL = re.compile(r"\d{4}[)}\]]*!|![)}\]]*!")


def refused(answer: str) -> str | None:
    """Why no honest answer looks like this; None: it may be graded."""
    if len(answer) > MAX_ANSWER_CHARS:
        return f"longer than {MAX_ANSWER_CHARS} characters"
    if _CONTROL.search(answer):
        return "control characters"
    if _nesting(answer) > MAX_NESTING:
        return f"brackets nested deeper than {MAX_NESTING}"
    if sum(c.isdigit() for c in answer) > MAX_DIGITS:
        return f"more than {MAX_DIGITS} digits"
    if answer.count("&") + answer.count("\\\\") > 200 or answer.count("\\") > 500:
        return "too large a table or too many commands"
    compact = re.sub(r"\s+", "", answer)
    if _BIG_EXPONENT.search(compact) or _BIG_FACTORIAL.search(compact) or _is_tower(compact):
        return "a power or a factorial too large to write out"
    return None


def _nesting(text: str) -> int:
    depth = deepest = 0
    for char in text:
        if char in "{([":
            depth += 1
            deepest = max(deepest, depth)
        elif char in "})]":
            depth = max(0, depth - 1)
    return deepest


def _is_tower(answer: str) -> bool:
    """A power of a power of plain numbers: 9^{9^9}. Towers with a letter in them (e^{x^2}) are honest."""
    compact = re.sub(r"[{}()\[\]]|\\left|\\right|\\,", "", answer).replace("**", "^")
    for tower in re.finditer(r"\d+(?:\^-?\d+){2,}", compact):
        exponents = [int(e) for e in tower.group().split("^")[1:]]
        if len(exponents) > 2 or len(str(abs(exponents[0]))) * max(exponents[1], 1) > 4:
            return True
    return len(re.findall(r"\^", compact)) > 60


# ---------------------------------------------------------------- normal forms

_SPACING = re.compile(r"(?<!\\)\\(?:[!,;:> ]|quad\b|qquad\b|displaystyle\b|limits\b|left(?![a-z])|right(?![a-z]))|~")
_TEXT = re.compile(r"\\(?:text|mbox|textbf|textrm|textit|mathrm|mathbf|operatorname)\s*\{([^{}]*)\}")
_DEGREES = re.compile(r"\^\s*\{?\s*\\circ\s*\}?|\\degree\b|\u00b0")
_SAME = {"\u2212": "-", "\u2013": "-", "\u00d7": "\\times ", "\u00b7": "\\cdot ", "\u00f7": "/", "\u03c0": "\\pi "}


def clean(answer: str) -> str:
    """Without typesetting that carries no meaning: delimiters, spacing, emphasis, a final full stop."""
    text = answer.strip()
    for old, new in _SAME.items():
        text = text.replace(old, new)
    for opening, closing in (*_DELIMITED, ("**", "**")):
        if text.startswith(opening) and text.endswith(closing) and len(text) > len(opening) + len(closing):
            text = text[len(opening) : -len(closing)].strip()
    text = re.sub(r"\\[dtc]frac\b", r"\\frac", text)
    text = re.sub(r",\s*\\!\s*|\{,\}", ",", text)
    text = _SPACING.sub(" ", text).replace("\\%", "%").replace("\\$", "$")
    text = re.sub(r"[ \t\n]+", " ", text).strip()
    return text[:-1].rstrip() if text.endswith(".") else text


def normal(answer: str) -> str:
    """A normal form of the written answer: answers with equal normal forms mean the same."""
    text = _DEGREES.sub("", clean(answer))
    text = re.sub(r"\\frac\s*(\d)\s*(\d)", r"\\frac{\1}{\2}", text)
    text = re.sub(r"\\frac\s*(\d)\s*\{", r"\\frac{\1}{", text)
    text = re.sub(r"(\\frac\{[^{}]*\})\s*(\d)", r"\1{\2}", text)
    text = re.sub(r"\\sqrt\s*(\w)", r"\\sqrt{\1}", text)
    text = re.sub(r"([_^])\s*\{\s*(\w)\s*\}", r"\1\2", text)
    text = re.sub(r"(?<![\d.])\.(\d)", r"0.\1", text)
    # A space between two letters or two digits or after a command separates; all others are for the eye.
    text = re.sub(r"(\\[A-Za-z]+) (?=[A-Za-z])", "\\1\0", text)
    return re.sub(r"(?<=[A-Za-z]) (?=[A-Za-z])|(?<=\d) (?=\d)", "\0", text).replace(" ", "").replace("\0", " ")


_UNSIGNED = r"(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d*)?|\.\d+"
_NUMBER = re.compile(
    r"(?P<sign>[-+]?)\s*(?:\\?[$\u20ac\u00a3\u00a5]|\\text\{[$]\})?\s*(?P<sign2>-?)\s*(?:"
    rf"(?:(?P<whole>\d+)\s*)?\\frac\s*(?:\{{\s*(?P<n>-?\d+)\s*\}}|(?P<n1>\d))\s*(?:\{{\s*(?P<d>\d+)\s*\}}|(?P<d1>\d))"
    r"|(?P<mixed>\d+)\s+(?P<mn>\d+)\s*/\s*(?P<md>\d+)"
    rf"|(?P<a>{_UNSIGNED})(?:\s*/\s*(?P<b>{_UNSIGNED}))?"
    r"(?:\s*(?:\\times|\\cdot|\*|x)\s*10\s*(?:\^|\*\*)\s*[{(]?\s*(?P<power>[-+]?\d{1,3})\s*[})]?|[eE](?P<e>[-+]?\d{1,3}))?"
    r")\s*(?P<rest>.*)",
    re.DOTALL,
)
_UNIT = re.compile(
    r"(?P<percent>%|percent\b)?\s*(?:\\(?:text|mbox|textbf|textrm|mathrm)\s*\{[^{}\d]*\}(?:\s*\^\s*\{?[23]\}?)?\s*[/.]?\s*)*"
    r"(?:(?:square |sq |cubic )?(?:mm|cm|dm|km|kg|ft|inch(?:es)?|foot|feet|yards?|miles?"
    r"|(?:kilo|centi|milli)?met(?:er|re)s?"
    r"|units?|cents?|dollars?|degrees?|hours?|minutes?|seconds?|days?|weeks?|years?|grams?)(?:\s*\^\s*\{?[23]\}?)?)?"
)
_WORDS = re.compile(r"[A-Za-z\u00b2\u00b3][A-Za-z\u00b2\u00b3 .\-/']{0,60}(?:\^\s*\{?[23]\}?)?")
_MULTIPLES = {"dozen": 12, "hundred": 10**2, "thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12}


def parse_number(answer: str, *, words: bool) -> Number | None:
    """A literal number with its unit, exactly; None for anything else. `words`: plain words may follow as its unit.

    Example: parse_number("1\\frac{4}{5}", words=False).value == Fraction(9, 5)
    """
    if len(answer) > MAX_BARE_CHARS:
        return None
    text = _DEGREES.sub("", clean(answer))
    variable = None
    if named := re.match(r"(?:\\?([A-Za-z]{1,8})\s*=)\s*(?=[-+.\d\\$])", text):
        variable, text = named.group(1), text[named.end() :]
    match = _NUMBER.fullmatch(text)
    if match is None:
        return None
    value, rest = _value(match), match["rest"].strip()
    unit = _UNIT.match(rest)
    if value is None or unit is None:
        return None
    left = rest[unit.end() :].strip()
    if left and words and _WORDS.fullmatch(left):
        value *= _MULTIPLES.get(left.split()[0].lower(), 1)
        left = ""
    return None if left else Number(value, unit["percent"] is not None or left == "%", variable)


def _value(match: re.Match[str]) -> Fraction | None:
    """The value of a _NUMBER match; None for a division by zero."""
    part = match.groupdict()
    if part["a"] is not None:
        top, bottom = _decimal(part["a"]), _decimal(part["b"] or "1")
        power = int(part["power"] or part["e"] or 0)
        top *= Fraction(10) ** power
        whole = Fraction(0)
    else:
        whole = Fraction(part["whole"] or part["mixed"] or 0)
        top = Fraction(part["n"] or part["n1"] or part["mn"])
        bottom = Fraction(part["d"] or part["d1"] or part["md"])
    if bottom == 0:
        return None
    value = whole + top / bottom
    return -value if (part["sign"] == "-") != (part["sign2"] == "-") else value


def _decimal(text: str) -> Fraction:
    text = text.replace(",", "").rstrip(".")
    return Fraction(text if not text.startswith(".") else "0" + text)


def number_text(value: Fraction) -> str:
    """Canonical: "72", "13.5", "1/3"."""
    if value.denominator == 1:
        return str(value.numerator)
    rest, twos, fives = value.denominator, 0, 0
    while rest % 2 == 0:
        rest, twos = rest // 2, twos + 1
    while rest % 5 == 0:
        rest, fives = rest // 5, fives + 1
    places = max(twos, fives)
    if rest != 1 or places > 12:
        return f"{value.numerator}/{value.denominator}"
    digits = str(abs(value.numerator) * 10**places // value.denominator).rjust(places + 1, "0")
    return ("-" if value < 0 else "") + digits[:-places] + "." + digits[-places:]


_CHOICE = re.compile(r"(?:\(([A-Za-z])\)|([A-Z])(?![A-Za-z]))\s*[).:,]?(?:\s+(.*))?", re.DOTALL)


def choice_letter(answer: str) -> str | None:
    """The option letter: "B", "(b)", "B) 42", "\\text{(B)}". Several options are none."""
    text = _TEXT.sub(r"\1", clean(answer)).strip().strip("*")
    if re.fullmatch(r"[a-z]", text):
        return text.upper()
    match = _CHOICE.fullmatch(text)
    if match is None or re.search(r"(?<![A-Za-z])[A-J](?![A-Za-z'])", match[3] or ""):
        return None
    return (match[1] or match[2]).upper()


def plain_words(answer: str) -> str | None:
    """The words of an answer that is words, not mathematics: "\\text{Evelyn}", "(C)", "the east"; else None."""
    text = clean(answer)
    inner = _TEXT.sub(r" \1 ", text)
    marked = inner != text
    bare = re.sub(r"[().,:;'\"\s]+", " ", inner).strip()
    if not re.fullmatch(r"[^\W\d_](?:[^\W_]|[ \-])*", bare):
        return None
    is_words = re.search(r"[^\W\d_]{3}", bare) or re.fullmatch(r"[A-Z]", bare)
    if not marked and not is_words:
        return None
    return bare.casefold() if len(bare) > 1 else bare.upper()


def text_answer(answer: str) -> str:
    """Canonical form of free text: case, spacing, quotes and a final full stop do not matter."""
    text = _TEXT.sub(r"\1", clean(answer)).casefold()
    return re.sub(r"\s+", " ", text).strip(" .,;:!?\"'`*_")
