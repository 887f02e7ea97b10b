"""Load problems from a local JSONL file or a hub data set; set aside, with a reason, every row that cannot be used.

A row is set aside, never mended in silence, where its bytes are not UTF-8 or not JSON, it is not an object, question
or answer are missing, or its gold answer cannot be graded against. Rows that say the same twice count once; a question
that comes with different answers is set aside in all its rows. The key of a problem is a hash of its question with
whitespace and case normalised, so rows appended later never move old ones between splits.
"""

from __future__ import annotations

import collections
import hashlib
import json
import os
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from configs.schema import FileTask as FileConfig
from search.errors import DataError
from search.types import Problem

MAX_LINE_BYTES = 4 << 20
MAX_QUESTION_CHARS = 100_000
LEVEL_COLUMN = "level"  # difficulty as people set it, MATH's say: a baseline for the predicted one


@dataclass(frozen=True, slots=True)
class Rejected:
    """A row set aside. Example: Rejected("train.jsonl", 17, "no 'answer'", '{"question": "2+2?"}')"""

    source: str
    line: int  # from 1; of a hub data set: the row
    reason: str
    text: str = ""  # its beginning, control characters escaped

    def to_json(self) -> dict[str, Any]:
        return {"source": self.source, "line": self.line, "reason": self.reason, "text": self.text}


@dataclass(frozen=True, slots=True)
class Row:
    line: int
    data: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Loaded:
    """The problems of one source, in file order. `num_duplicates`: rows that repeat a problem word for word."""

    problems: tuple[Problem, ...]
    rejected: tuple[Rejected, ...] = ()
    num_duplicates: int = 0


def question_key(question: str) -> str:
    """Canonical key: 16 hex digits of the question's hash; whitespace, case and Unicode width do not matter."""
    text = " ".join(unicodedata.normalize("NFKC", question).casefold().split())
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def load(
    path: str,
    config: FileConfig,
    *,
    hub_split: str,
    gold: Callable[[str], str],
    bad_gold: Callable[[str], str | None],
    same: Callable[[str, str], bool],
) -> Loaded:
    """Every usable problem of `path`. `gold` finds the answer in the answer column, `bad_gold` says why it is unusable.

    Raises DataError where the source cannot be read, nothing usable is left, or more than `max_bad_rows` are unusable.
    """
    rejected: list[Rejected] = []
    rows = read_jsonl(Path(path), rejected) if is_local(path) else _read_hub_problems(path, config, hub_split)
    builder = _Builder(path, config, gold, bad_gold, same, rejected)
    for row in rows:
        builder.add(row)
    loaded = builder.finish()
    check_share(
        path,
        len(loaded.problems) + loaded.num_duplicates,
        loaded.rejected,
        config.max_bad_rows,
        what="problem",
        section="task",
        columns="task.question_column and task.answer_column",
    )
    return loaded


def is_local(path: str) -> bool:
    """A file of this machine rather than the name of a hub data set."""
    return path.endswith((".jsonl", ".json", ".ndjson")) or path.startswith((".", "/", "~")) or Path(path).is_file()


# ---------------------------------------------------------------- sources


def read_jsonl(path: Path, rejected: list[Rejected]) -> Iterator[Row]:
    """The JSON objects of a file, line by line in bounded memory; what is none goes to `rejected`. Raises DataError."""
    path = path.expanduser()
    source = str(path)
    try:
        with path.open("rb") as file:
            for line, raw in enumerate(_lines(file), start=1):
                data = raw.removeprefix(b"\xef\xbb\xbf") if line == 1 else raw
                if not data.strip():
                    continue
                parsed = _parse(data)
                if isinstance(parsed, str):
                    rejected.append(Rejected(source, line, parsed, _excerpt(data)))
                else:
                    yield Row(line, parsed)
    except OSError as error:
        raise DataError(f"the file {path} cannot be read: {error.strerror}; check the path") from error


def _lines(file: Any) -> Iterator[bytes]:
    """Lines of a binary file; one that is too long comes cut just above the limit, the rest of it is skipped."""
    while raw := file.readline(MAX_LINE_BYTES + 1):
        yield raw
        while len(raw) > MAX_LINE_BYTES and not raw.endswith(b"\n"):
            if not (raw := file.readline(MAX_LINE_BYTES + 1)):
                return


def _parse(data: bytes) -> dict[str, Any] | str:
    """The object on a line, or why there is none."""
    if len(data) > MAX_LINE_BYTES:
        return f"longer than {MAX_LINE_BYTES >> 20} MiB"
    if b"\x00" in data:
        return "holds a NUL byte"
    try:
        value = json.loads(data.decode("utf-8"), object_pairs_hook=_no_doubles)
    except UnicodeDecodeError as error:
        return f"not UTF-8 (byte {error.start + 1})"
    except RecursionError:
        return "JSON nested too deeply"
    except ValueError as error:
        return f"not JSON: {str(error)[:120]}"
    return value if isinstance(value, dict) else f"not a JSON object but {type(value).__name__}"


def _no_doubles(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        name = next(name for name, num in collections.Counter(n for n, _ in pairs).items() if num > 1)
        raise ValueError(f"the name {name!r} stands twice in one object")
    return found


def _excerpt(data: bytes | str) -> str:
    text = data[:400].decode(errors="backslashreplace") if isinstance(data, bytes) else data
    return ascii(text.strip()[:120])[1:-1]


def _read_hub_problems(name: str, config: FileConfig, hub_split: str) -> Iterator[Row]:
    columns = f"'{config.question_column}' and '{config.answer_column}'"
    way_out = f"set task.path to a local .jsonl file with the columns {columns}"
    return read_hub(name, config.hub_config, hub_split, config.revision, way_out=way_out)


def read_hub(name: str, hub_config: str | None, hub_split: str, revision: str | None, *, way_out: str) -> Iterator[Row]:
    """The rows of a hub data set, from the cache where the machine is offline. Raises DataError; `way_out` ends it."""
    import datasets

    try:
        data = datasets.load_dataset(name, hub_config, split=hub_split, revision=revision)
    except Exception as error:  # the hub client raises a dozen kinds
        offline = os.environ.get("HF_HUB_OFFLINE") == "1" or os.environ.get("HF_DATASETS_OFFLINE") == "1"
        state = " (offline mode is on)" if offline else ""
        raise DataError(
            f"the data set '{name}' ({hub_config or 'default'}, split '{hub_split}') could not be loaded{state}:"
            f" {type(error).__name__}: {str(error)[:200]}; {way_out}, or run once with a connection to fill the cache"
        ) from error
    for index, row in enumerate(data, start=1):
        yield Row(index, dict(row))


# ---------------------------------------------------------------- rows to problems


@dataclass(slots=True)
class _Builder:
    """Collects problems by key and settles rows that share one."""

    source: str
    config: FileConfig
    gold: Callable[[str], str]
    bad_gold: Callable[[str], str | None]
    same: Callable[[str, str], bool]
    rejected: list[Rejected]
    problems: dict[str, Problem] = field(default_factory=dict[str, Problem])
    lines: dict[str, list[int]] = field(default_factory=dict[str, list[int]])
    contradicted: set[str] = field(default_factory=set[str])
    ids: dict[str, str] = field(default_factory=dict[str, str])
    num_duplicates: int = 0

    def add(self, row: Row) -> None:
        made = self._problem(row)
        if isinstance(made, str):
            self.rejected.append(set_aside(self.source, row, made))
            return
        known = self.problems.setdefault(made.key, made)
        self.lines.setdefault(made.key, []).append(row.line)
        if known is made:
            return
        if self.same(known.answer or "", made.answer or ""):
            self.num_duplicates += 1
        else:
            self.contradicted.add(made.key)

    def _problem(self, row: Row) -> Problem | str:
        """The problem of a row, or why there is none."""
        question = text_cell(row.data, self.config.question_column)
        answer = text_cell(row.data, self.config.answer_column)
        for name, value in ((self.config.question_column, question), (self.config.answer_column, answer)):
            if value is None:
                return f"no '{name}' (text or a number); the row has: {', '.join(map(str, row.data))[:100]}"
            if not is_text(value):
                return f"'{name}' holds characters that are no text (NUL or half a surrogate pair)"
        assert question is not None
        assert answer is not None
        if len(question) > MAX_QUESTION_CHARS:
            return f"'{self.config.question_column}' is longer than {MAX_QUESTION_CHARS} characters"
        gold = self.gold(answer)
        if reason := self.bad_gold(gold):
            return reason
        meta: dict[str, Any] = {"line": row.line}
        level = text_cell(row.data, LEVEL_COLUMN)
        if level is not None and is_text(level) and self.config.answer_column != LEVEL_COLUMN:
            meta[LEVEL_COLUMN] = level[:40]
        key = question_key(question)
        if self.config.id_column is not None:
            name = text_cell(row.data, self.config.id_column)
            if name is None:
                return f"no '{self.config.id_column}'"
            if self.ids.setdefault(name, key) != key:
                return f"'{self.config.id_column}' {name[:60]!r} already belongs to another question"
            meta["id"] = name
        return Problem(key, question.strip(), gold, meta)

    def finish(self) -> Loaded:
        for key in sorted(self.contradicted, key=lambda k: self.lines[k]):
            lines = self.lines[key]
            reason = f"one question with different answers in lines {', '.join(map(str, lines[:6]))}"
            question = self.problems.pop(key).question
            self.rejected += [Rejected(self.source, line, reason, _excerpt(question)) for line in lines]
        rejected = sorted(self.rejected, key=lambda r: r.line)
        return Loaded(tuple(self.problems.values()), tuple(rejected), self.num_duplicates)


def text_cell(data: Mapping[str, Any], column: str) -> str | None:
    """A cell as text. Numbers are taken as written; anything else but text is missing."""
    value = data.get(column)
    if isinstance(value, bool):
        return None
    if isinstance(value, int | float):
        return repr(value)
    return value if isinstance(value, str) and value.strip() else None


def is_text(value: str) -> bool:
    """Whether it holds no character that is none: NUL, or half a surrogate pair."""
    return not any("\ud800" <= c <= "\udfff" or c == "\0" for c in value)


def set_aside(source: str, row: Row, reason: str) -> Rejected:
    return Rejected(source, row.line, reason, _excerpt(_shown(row.data)))


def _shown(data: Mapping[str, Any]) -> str:
    return ", ".join(f"{name}: {str(value)[:40]}" for name, value in list(data.items())[:4])


def check_share(
    path: str,
    num_usable: int,
    rejected: Sequence[Rejected],
    max_bad_rows: float,
    *,
    what: str,
    section: str,
    columns: str,
) -> None:
    """Raises DataError where no row is usable, or more are not than `section` allows."""
    bad, total = len(rejected), len(rejected) + num_usable
    reasons = "; ".join(f"line {r.line}: {r.reason}" for r in rejected[:3])
    if not num_usable:
        raise DataError(f"no usable {what} in {path}: {bad} of {total} rows set aside ({reasons or 'it is empty'})")
    if bad > max_bad_rows * total:
        raise DataError(
            f"{bad} of {total} rows of {path} cannot be used, more than {section}.max_bad_rows = {max_bad_rows:g} "
            f"allows ({reasons}); mend them, check {columns}, or raise the limit"
        )


def write_rejected(rejected: Iterable[Rejected], path: Path) -> None:
    """`rejected.jsonl`: one row set aside a line. An unreadable half is never left: it appears by rename."""
    part = path.with_name(path.name + ".part")
    part.write_text("".join(json.dumps(r.to_json()) + "\n" for r in rejected), encoding="utf-8")
    part.replace(path)
