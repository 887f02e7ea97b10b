"""Search results on disk: JSON lines, in shards that appear whole or not at all; read one at a time."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from search.errors import DataError
from search.types import SearchResult, Spend

Paths = Path | Iterable[Path]


def read_results(paths: Paths) -> Iterator[SearchResult]:
    """The stored results of files, or of all shards in folders, one at a time.

    Raises DataError naming file and line of one that cannot be read.
    """
    given = [paths] if isinstance(paths, Path) else paths
    for path in (f for p in given for f in (sorted(p.glob("shard-*.jsonl")) if p.is_dir() else [p])):
        try:
            with path.open(encoding="utf-8") as lines:
                for number, line in enumerate(lines, 1):
                    try:
                        yield SearchResult.from_json(json.loads(line))
                    except (ValueError, KeyError, TypeError, AttributeError) as error:
                        raise DataError(f"{path}, line {number}: not a search result ({error!r})") from error
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"{path} cannot be read: {error}") from error


def write_results(results: Sequence[SearchResult], path: Path) -> None:
    """One JSON line a result; the file appears whole or not at all."""
    temporary = path.with_name(f".{path.name}.tmp-{os.getpid()}")
    with temporary.open("w", encoding="utf-8") as file:
        for result in results:
            file.write(json.dumps(result.to_json(), ensure_ascii=False, separators=(",", ":")) + "\n")
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def unfinished_path(shard: Path) -> Path:
    return shard.with_suffix(".unfinished.json")


def write_unfinished(spend: Spend, shard: Path) -> None:
    """What the problems cost that the cap kept out of a shard, beside it; written before the shard, which ends it."""
    path = unfinished_path(shard)
    if spend == Spend():
        path.unlink(missing_ok=True)  # of an attempt that never came to its shard
        return
    temporary = path.with_name(f".{path.name}.tmp-{os.getpid()}")
    temporary.write_text(json.dumps(spend.to_json()) + "\n", encoding="utf-8")
    temporary.replace(path)


def read_unfinished(shard: Path) -> Spend:
    """What `write_unfinished` wrote. Raises DataError."""
    path = unfinished_path(shard)
    if not path.exists():
        return Spend()
    try:
        return Spend(**json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise DataError(f"{path} cannot be read: {error}") from error


def partial_path(shard: Path) -> Path:
    """Where the finished results of a shard lie while a streaming engine works on it."""
    return shard.with_suffix(".partial")


def append_result(result: SearchResult, path: Path) -> None:
    """One more line of a file that grows while a shard is searched."""
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(result.to_json(), ensure_ascii=False, separators=(",", ":")) + "\n")


def read_partial(path: Path) -> list[SearchResult]:
    """What `append_result` wrote; a last line that a kill cut off is dropped, and cut from the file."""
    if not path.exists():
        return []
    lines = path.read_bytes().splitlines(keepends=True)
    whole = [line for line in lines if line.endswith(b"\n")]
    if len(whole) < len(lines):
        with path.open("r+b") as file:
            file.truncate(sum(map(len, whole)))
    return [SearchResult.from_json(json.loads(line)) for line in whole]


def merge_shards(folder: Path, path: Path) -> None:
    """One file of a folder's shards, which goes. Interrupted, it is done again."""
    if not folder.is_dir():
        return
    temporary = path.with_name(f".{path.name}.tmp-{os.getpid()}")
    with temporary.open("wb") as file:
        for shard in sorted(folder.glob("shard-*.jsonl")):
            with shard.open("rb") as lines:
                shutil.copyfileobj(lines, file)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    shutil.rmtree(folder)
