"""How published verifiers want an answer written: a layout for each format, as their model cards use them. No torch.

format               checkpoints                              a step's score is read at
qwen_prm             Qwen/Qwen2.5-Math-PRM-7B, -72B           the "<extra_0>" after it, in the assistant's turn
math_shepherd        peiyi9979/math-shepherd-mistral-7b-prm   the " \\u043a\\u0438" after it, in plain text
rlhflow              RLHFlow/Llama3.1-8B-PRM-Deepseek-Data    the token before the assistant's "+", a turn each
skywork              Skywork/Skywork-o1-Open-PRM-Qwen-2.5-7B  the "\\n" after it; pieces are encoded one by one
token_classifier     what TRL's PRM trainer wrote             the last token of the separator after it, likewise
sequence_classifier  reward models with a chat template       the last token of the chat: one score an answer

Everywhere: a step's text is written without its delimiter and without the white space at its ends; so is the question.
A step without any text (an answer that ends right after a delimiter has one) adds nothing to read, so it has the score
of the step before it; as the first of all it is written as it is, with nothing before its mark. Attempts shown before
an answer are left out: none of these verifiers was trained to read them.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from configs.schema import PretrainedVerifier
from search.errors import ConfigError, ModelError
from search.types import Problem, ScoreRequest
from search.verifiers.layout import Encoded, Layout

QWEN_SYSTEM = "Please reason step by step, and put your final answer within \\boxed{}."
SHEPHERD_TAG = " \u043a\u0438"
TWO_TOKENS = ("math_shepherd", "rlhflow")  # the label is a token of the vocabulary
CHATS = ("qwen_prm", "rlhflow", "sequence_classifier")
CLASSIFIERS = ("token_classifier", "sequence_classifier")

_PROBE = ScoreRequest(Problem("probe", "What is 2 + 3?"), ("2 + 3 = 5.\n\n", "So it is 5.\n\n", "The answer is 5."))


@dataclass(frozen=True, slots=True)
class TaggedText:
    """One text in which a tag of one token ends every step: qwen_prm, math_shepherd."""

    tokenizer: Any
    delimiter: str
    before: str  # of the question
    after: str  # of the question
    between: str  # steps
    tag: str
    tag_id: int
    special: bool  # the tokenizer adds its special tokens; a chat template has written them already

    def encode(self, request: ScoreRequest) -> Encoded:
        text = prompt = f"{self.before}{request.problem.question.strip()}{self.after}"
        marks = list[int]()
        for n, step in enumerate(_contents(request, self.delimiter)):
            if n == 0:
                text += step + self.tag if step else self.tag.lstrip()
            elif step:
                text += self.between + step + self.tag
            marks.append(len(text))
        spans = _Spans.of(self.tokenizer, text, special=self.special)
        return spans.encoded(len(prompt), [spans.ending(mark, self.tag_id) for mark in marks])


@dataclass(frozen=True, slots=True)
class Turns:
    """A conversation: the user says a step, the assistant "+". Scores are read where that is predicted: rlhflow."""

    tokenizer: Any
    delimiter: str
    before: str  # of the first user's words
    answer: str  # from the user's last word to the assistant's first
    back: str  # from the assistant's last word to the user's next
    positive: str
    positive_id: int

    def encode(self, request: ScoreRequest) -> Encoded:
        text = prompt = self.before + request.problem.question.strip()
        marks = list[int]()
        for n, step in enumerate(_contents(request, self.delimiter)):
            if n == 0 or step:
                text += (f" {step}" if step else "") if n == 0 else self.back + step
                text += self.answer + self.positive
            marks.append(len(text) - len(self.positive))
        spans = _Spans.of(self.tokenizer, text, special=False)
        return spans.encoded(len(prompt), [spans.before(mark, self.positive_id) for mark in marks])


@dataclass(frozen=True, slots=True)
class Pieces:
    """Prompt, steps and separators encoded one by one: skywork, token_classifier."""

    tokenizer: Any
    delimiter: str
    first_ids: tuple[int, ...]  # before the question
    newline: str  # after the question
    separator_ids: tuple[int, ...]  # after each step

    def encode(self, request: ScoreRequest) -> Encoded:
        ids = [*self.first_ids, *_ids(self.tokenizer, request.problem.question.strip() + self.newline)]
        num_prompt, ends = len(ids), list[int]()
        for n, step in enumerate(_contents(request, self.delimiter)):
            if n == 0 or step:
                ids += [*(_ids(self.tokenizer, step) if step else ()), *self.separator_ids]
            ends.append(len(ids) - 1)
        return Encoded(tuple(ids), num_prompt, tuple(ends))


@dataclass(frozen=True, slots=True)
class WholeChat:
    """Question and answer as a chat, scored at its last token: sequence_classifier.

    The model's own classes skip padding when they look for that token, also where the chat itself ends with the id
    that pads: so does this.
    """

    tokenizer: Any
    parts: tuple[str, str, str]  # of the chat: before the question, between question and answer, after the answer
    pad_id: int | None

    def encode(self, request: ScoreRequest) -> Encoded:
        before, between, after = self.parts
        prompt = before + request.problem.question.strip() + between
        spans = _Spans.of(self.tokenizer, prompt + "".join(request.steps).strip() + after, special=False)
        last = max((i for i, one in enumerate(spans.ids) if one != self.pad_id), default=None)
        return spans.encoded(len(prompt), [last] if request.steps else [])


# ---------------------------------------------------------------- from settings and a tokenizer to a layout


def layout_of(settings: PretrainedVerifier, tokenizer: Any, delimiter: str, *, pad_id: int | None = None) -> Layout:
    """The layout of the format that the settings name. `delimiter`: of the task's steps; `pad_id`: the model's.

    Raises ConfigError for a setting that the format does not have, ModelError where the tokenizer does not fit it.
    """
    check_settings(settings)
    if not getattr(tokenizer, "is_fast", False):
        raise _unfit(settings, "its tokenizer does not tell where in the text its tokens lie (no tokenizer.json)")
    if settings.format in CHATS and not tokenizer.chat_template:
        raise _unfit(settings, "its tokenizer has no chat template: fetch chat_template.jinja, or check the format")
    match settings.format:
        case "qwen_prm":
            layout: Layout = _qwen_prm(settings, tokenizer, delimiter)
        case "math_shepherd":
            tag = settings.separator or SHEPHERD_TAG
            tag_id = _one_token(settings, tokenizer, "So it is 5", tag, "", "its separator")
            layout = TaggedText(tokenizer, delimiter, "", " ", "\n", tag, tag_id, special=True)
        case "rlhflow":
            layout = _rlhflow(settings, tokenizer, delimiter)
        case "skywork":
            if tokenizer.bos_token_id is None:
                raise _unfit(settings, "its tokenizer has no BOS token, which begins every input of this format")
            separator = (_single(settings, tokenizer, settings.separator or "\n", "its separator"),)
            layout = Pieces(tokenizer, delimiter, (tokenizer.bos_token_id,), "\n", separator)
        case "token_classifier":
            first = () if tokenizer.bos_token_id is None else (tokenizer.bos_token_id,)
            ending = tuple(_ids(tokenizer, settings.separator or "\n"))
            if not ending:
                raise _unfit(settings, "its tokenizer leaves the separator out: name the one it was trained with")
            layout = Pieces(tokenizer, delimiter, first, "", ending)
        case "sequence_classifier":
            before, between, after = _parts(settings, tokenizer, num_turns=1)
            layout = WholeChat(tokenizer, (before, between, after), pad_id)
        case "ratchet":
            raise AssertionError("a verifier of ours has a layout of its own")
    expected = 1 if settings.format == "sequence_classifier" else len(_PROBE.steps)
    if len(layout.encode(_PROBE).ends) != expected:
        raise _unfit(
            settings, "its tokenizer merges a step's end with the text beside it, so no score can be read there"
        )
    return layout


def check_settings(settings: PretrainedVerifier) -> None:
    """Raises ConfigError for a setting that the format does not have: it would be ignored."""
    has = {
        "system": settings.format in CHATS,
        "separator": settings.format not in ("rlhflow", "sequence_classifier", "ratchet"),
        "positive": settings.format in TWO_TOKENS or settings.format in CLASSIFIERS,
        "negative": settings.format in TWO_TOKENS,
    }
    if extra := [name for name, known in has.items() if not known and getattr(settings, name) is not None]:
        raise ConfigError(f"verifier.format = '{settings.format}' has no {' and no '.join(extra)}: leave it out")
    if settings.format == "ratchet" and settings.aggregation != "last":
        raise ConfigError("verifier.aggregation: a verifier of format 'ratchet' brings the one it was validated with")
    if settings.separator is not None and not settings.separator:
        raise ConfigError("verifier.separator is empty: give the text that ends a step, or leave it out")


def label_ids(settings: PretrainedVerifier, tokenizer: Any) -> tuple[int, int]:
    """The two tokens whose logits a two-token format compares: right, wrong. Raises ModelError."""
    positive, negative = settings.positive or "+", settings.negative or "-"
    if settings.format == "rlhflow":
        parts = _turn_parts(settings, tokenizer)
        ids = (_spoken_id(settings, tokenizer, parts, positive), _spoken_id(settings, tokenizer, parts, negative))
    else:
        ids = (_single(settings, tokenizer, positive, "a label"), _single(settings, tokenizer, negative, "a label"))
    if ids[0] == ids[1]:
        raise _unfit(settings, f"its tokenizer has one token for both labels, '{positive}' and '{negative}'")
    return ids


def _qwen_prm(settings: PretrainedVerifier, tokenizer: Any, delimiter: str) -> TaggedText:
    separator = settings.separator or "<extra_0>"
    tag_id = _single(settings, tokenizer, separator, "its separator")
    before, after, _ = _parts(settings, tokenizer, num_turns=1)
    return TaggedText(tokenizer, delimiter, before, after, "", separator, tag_id, special=False)


def _rlhflow(settings: PretrainedVerifier, tokenizer: Any, delimiter: str) -> Turns:
    parts, positive = _turn_parts(settings, tokenizer), settings.positive or "+"
    positive_id, _ = label_ids(settings, tokenizer)
    return Turns(tokenizer, delimiter, *parts, positive, positive_id)


def _turn_parts(settings: PretrainedVerifier, tokenizer: Any) -> tuple[str, str, str]:
    """What the template writes before the first user, between user and assistant, and before the next user."""
    before, answer, back, *more = _parts(settings, tokenizer, num_turns=3)
    if more[:3] != [answer, back, answer]:
        raise _unfit(settings, "its chat template does not write every turn alike, so turns cannot be scored in one go")
    return before, answer, back


def _parts(settings: PretrainedVerifier, tokenizer: Any, *, num_turns: int) -> list[str]:
    """What the chat template writes before, between and after the contents of that many pairs of turns."""
    default = QWEN_SYSTEM if settings.format == "qwen_prm" else None
    system = settings.system if settings.system is not None else default
    marks = [f"MARKED{n}CONTENT" for n in range(2 * num_turns)]
    messages = [{"role": "system", "content": system}] if system else []
    messages += [{"role": ("user", "assistant")[n % 2], "content": mark} for n, mark in enumerate(marks)]
    try:
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=False)
    except Exception as error:  # templates raise whatever they like
        raise _unfit(settings, f"its chat template refuses the messages of this format ({error})") from error
    parts = list[str]()
    for mark in marks:
        part, found, text = text.partition(mark)
        if not found or mark in text:
            raise _unfit(settings, "its chat template does not write each message once, in order")
        parts.append(part)
    return [*parts, text]


def _spoken_id(settings: PretrainedVerifier, tokenizer: Any, parts: tuple[str, str, str], label: str) -> int:
    """The one token that a label is, where the assistant says it."""
    before, answer, back = parts
    return _one_token(settings, tokenizer, f"{before}5{answer}", label, back, "the label")


def _one_token(settings: PretrainedVerifier, tokenizer: Any, before: str, text: str, after: str, what: str) -> int:
    """The id of a text that is one token where it stands, white space before it included. Raises ModelError."""
    start, end = len(before) + len(text) - len(text.lstrip()), len(before + text)
    spans = _Spans.of(tokenizer, before + text + after, special=False)
    over = [i for i, (a, b) in enumerate(spans.spans) if a < end and b > start]
    alone = over and spans.spans[over[0]][0] >= len(before) and spans.spans[over[-1]][1] == end
    if len(over) != 1 or not alone or spans.ids[over[0]] == tokenizer.unk_token_id:
        raise _unfit(settings, f"{what} '{text}' is not a single token of its own to its tokenizer")
    return spans.ids[over[0]]


def _single(settings: PretrainedVerifier, tokenizer: Any, text: str, what: str) -> int:
    """The id of a text that is one token when it is encoded alone. Raises ModelError."""
    ids = _ids(tokenizer, text)
    if len(ids) != 1 or ids[0] == tokenizer.unk_token_id:
        raise _unfit(settings, f"{what} '{text}' is not a single token of its own to its tokenizer")
    return ids[0]


def _unfit(settings: PretrainedVerifier, why: str) -> ModelError:
    return ModelError(f"the verifier {settings.path} is no '{settings.format}': {why}")


# ---------------------------------------------------------------- texts and ids


def _contents(request: ScoreRequest, delimiter: str) -> list[str]:
    """The steps' texts without delimiter and without white space at the ends; "" for a blank one."""
    return [step.removesuffix(delimiter).strip() for step in request.steps]


def _ids(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer.encode(text, add_special_tokens=False))


@dataclass(frozen=True, slots=True)
class _Spans:
    """A text's tokens, each with where it begins and ends in the text."""

    ids: Sequence[int]
    spans: Sequence[tuple[int, int]]

    @classmethod
    def of(cls, tokenizer: Any, text: str, *, special: bool) -> _Spans:
        found = tokenizer(text, add_special_tokens=special, return_offsets_mapping=True)
        ids, spans = found["input_ids"], found["offset_mapping"]
        while spans and spans[-1] == (0, 0):  # what the tokenizer adds at the end
            ids, spans = ids[:-1], spans[:-1]
        return cls(ids, spans)

    def ending(self, place: int, token: int) -> int | None:
        """Index of the token that ends at a place of the text; None where that is another one than expected."""
        return next((i for i in self._near(place) if self.spans[i][1] == place and self.ids[i] == token), None)

    def before(self, place: int, token: int) -> int | None:
        """Index of the token before the one that begins at a place; None where another one than expected does."""
        near = (i for i in self._near(place + 1) if self.spans[i][0] == place and self.ids[i] == token)
        return next((i - 1 for i in near if i), None)

    def _near(self, place: int) -> range:
        """Of the tokens that may end at a place, or just before or after it: not all of a long text."""
        last = bisect_right(self.spans, place, key=lambda span: span[1])
        return range(max(0, last - 2), min(len(self.spans), last + 2))

    def encoded(self, prompt_chars: int, ends: Sequence[int | None]) -> Encoded:
        """Up to the last score. No ends at all where one of them is None: then none of the scores can be trusted."""
        known = [end for end in ends if end is not None]
        found = tuple(known) if len(known) == len(ends) else ()
        ids = tuple(self.ids[: found[-1] + 1] if found else self.ids)
        shared = bisect_right(self.spans, prompt_chars, key=lambda span: span[1])
        return Encoded(ids, min(shared, len(ids)), found)
