"""Files that survive anything: atomic writes, stage folders that appear whole or not at all, verification.

A stage writes into `<stage>.work/`, which may hold valid partial results. `StageDir.commit` drops temporary files,
syncs every file, writes `manifest.json` last and renames the folder to `<stage>/`: execution is at least once, commit
exactly once. Reading checks sizes and safetensors headers; `verify=True` checks every hash. What is damaged is moved to
`<round>/corrupt/`, what was made from other inputs to `<round>/stale/`, and the stage is done again.

Logs and wall times are not hashed (`UNHASHED`), so an interrupted round ends byte-equal to an unbroken one. Left out:
deduplication of equal files, remote stores.
"""

from __future__ import annotations

import contextlib
import errno
import fnmatch
import functools
import hashlib
import itertools
import json
import os
import shutil
import stat
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from flows.crash import crash_point
from search.errors import CorruptArtefact, DiskError

UNHASHED = ("log.txt", "timing.json", "*.log", "stdout*", "stderr*")
MANIFEST = "manifest.json"
KEY = ".key"
TEMPORARY = ".*.tmp-*"

_counter = itertools.count()
_os_write = os.write  # tests replace it to fill the disk at a chosen byte


# ---------------------------------------------------------------- files


def atomic_write(path: str | Path, data: str | bytes) -> None:
    """Replace `path` with `data`: readers see the old or the new content, never a mixture, also after a power cut.

    The mode of an existing file is kept; a new one gets what the umask allows. Raises DiskError.
    """
    path = Path(path)
    content = data.encode() if isinstance(data, str) else data
    temp = path.with_name(f".{path.name}.tmp-{os.getpid()}-{next(_counter)}")
    with disk_errors(path, len(content)):
        try:
            _write_new(temp, content, _mode_of(path))
            crash_point("write.temp")
            os.replace(temp, path)
        except BaseException:
            with contextlib.suppress(FileNotFoundError):
                temp.unlink()
            raise
        crash_point("write.renamed")
        sync_folder(path.parent)


def _mode_of(path: Path) -> int | None:
    try:
        return stat.S_IMODE(path.stat().st_mode)
    except OSError:
        return None


def _write_new(path: Path, content: bytes, mode: int | None) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o666)
    try:
        if mode is not None:
            os.fchmod(descriptor, mode)
        rest = memoryview(content)
        while rest:
            rest = rest[_os_write(descriptor, rest) :]
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_folder(path: Path) -> None:
    """Make the names in a folder durable."""
    _sync(path, os.O_RDONLY | os.O_DIRECTORY)


def _sync(path: Path, flags: int = os.O_RDONLY) -> None:
    descriptor = os.open(path, flags)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256_file(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_json(value: object) -> str:
    """Hash of a JSON value, independent of the order of keys."""
    return hashlib.sha256(canonical_json(value).encode()).hexdigest()


def canonical_json(value: object) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)


@contextlib.contextmanager
def disk_errors(path: Path, num_bytes: int | None = None) -> Iterator[None]:
    """Turn a full or read-only disk into a DiskError that names the numbers and the way out."""
    try:
        yield
    except DiskError:
        raise
    except OSError as error:
        message = explain_disk_error(error, path, num_bytes)
        if message is None:
            raise
        raise DiskError(message) from error


def explain_disk_error(error: OSError, path: Path, num_bytes: int | None = None) -> str | None:
    """What to tell the user of an OSError; None where it has nothing to do with space or rights."""
    wanted = "" if num_bytes is None else f" ({num_bytes:,} bytes)"
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return (
            f"no space left to write {path}{wanted}: {_free(path)} free on its disk; make room and run the same "
            "command again, nothing that was committed is lost"
        )
    if error.errno == errno.EFBIG:
        return f"{path}{wanted} is larger than files may be here (ulimit -f); raise the limit and run again"
    if error.errno in (errno.EROFS, errno.EACCES, errno.EPERM):
        return f"{path} cannot be written ({error.strerror}); choose another folder with --runs-dir"
    return None


def require_space(path: Path, num_bytes: float, what: str) -> None:
    """Before hours of work: is there room for what it will write? `path` need not exist. Raises DiskError."""
    free = shutil.disk_usage(_existing(path)).free
    if free < num_bytes:
        raise DiskError(
            f"{what} needs about {num_bytes / 2**20:,.0f} MiB in {path}, where {free / 2**20:,.0f} MiB are free; "
            "make room, or choose another folder with --runs-dir"
        )


def _free(path: Path) -> str:
    try:
        return f"{shutil.disk_usage(_existing(path)).free / 2**20:,.1f} MiB"
    except OSError:
        return "unknown space"


def _existing(path: Path) -> Path:
    path = path.absolute()
    return next(folder for folder in (path, *path.parents) if folder.exists())


def check_safetensors(path: Path) -> None:
    """Header readable and the file exactly as long as it says. Raises CorruptArtefact."""
    size = path.stat().st_size
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if not 2 <= length <= size - 8:
                raise ValueError(f"a header of {length} bytes in a file of {size}")
            header = json.loads(file.read(length))
        ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
        if max(ends, default=0) != size - 8 - length:
            raise ValueError(f"{size - 8 - length} bytes of tensors instead of {max(ends, default=0)}")
    except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise CorruptArtefact(f"{path} is not a complete safetensors file: {error}") from error


# ---------------------------------------------------------------- manifests


@dataclass(frozen=True, slots=True)
class Output:
    """One file of a stage. `link`: it is a symbolic link with this relative target; then sha256 is the target's text.

    Example: Output("9f86...", 11)
    """

    sha256: str
    size: int  # bytes
    link: str | None = None

    def to_json(self) -> dict[str, Any]:
        row: dict[str, Any] = {"sha256": self.sha256, "size": self.size}
        return row if self.link is None else row | {"link": self.link}


@dataclass(frozen=True, slots=True)
class StageKey:
    """What a stage's result follows from. Partial results are kept only under an equal digest.

    Example: StageKey("search", code_version(), sha256_json({"samples": 16}), {"base": "9f86..."})
    """

    stage: str
    code_version: str
    config_sha: str
    inputs: Mapping[str, str] = field(default_factory=dict[str, str])

    @property
    def digest(self) -> str:
        return sha256_json([self.stage, self.code_version, self.config_sha, dict(self.inputs)])


@dataclass(frozen=True, slots=True)
class Manifest:
    """What a committed stage holds and where it came from."""

    key: StageKey
    outputs: Mapping[str, Output]

    @property
    def stage(self) -> str:
        return self.key.stage

    @property
    def inputs(self) -> Mapping[str, str]:
        return self.key.inputs

    @property
    def id(self) -> str:
        """Names the content, whatever it was made from: sha256 over the outputs."""
        return sha256_json({name: output.to_json() for name, output in self.outputs.items()})

    def to_json(self) -> dict[str, Any]:
        body: dict[str, Any] = {
            "stage": self.key.stage,
            "code_version": self.key.code_version,
            "config_sha": self.key.config_sha,
            "key": self.key.digest,
            "inputs": dict(self.key.inputs),
            "outputs": {name: output.to_json() for name, output in self.outputs.items()},
            "id": self.id,
        }
        return body | {"seal": sha256_json(body)}

    @classmethod
    def from_json(cls, row: Any) -> Manifest:
        """Raises CorruptArtefact where the row is not what `to_json` wrote."""
        try:
            body = {name: value for name, value in row.items() if name != "seal"}
            if sha256_json(body) != row["seal"]:
                raise ValueError("its seal does not match")
            key = StageKey(row["stage"], row["code_version"], row["config_sha"], row["inputs"])
            return cls(key, {name: Output(**output) for name, output in row["outputs"].items()})
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise CorruptArtefact(f"not a manifest: {error}") from error


def describe(folder: Path, root: Path) -> dict[str, Output]:
    """Every hashed file below `folder`, by its relative name, in order. Links must stay inside `root` and be relative.

    Raises CorruptArtefact for a link that leaves `root` and for what is neither file nor link.
    """
    outputs: dict[str, Output] = {}
    for path in _files(folder):
        name = path.relative_to(folder).as_posix()
        if path.is_symlink():
            target = os.readlink(path)
            _check_link(path, target, root)
            outputs[name] = Output(hashlib.sha256(target.encode()).hexdigest(), 0, target)
        elif path.is_file():
            outputs[name] = Output(sha256_file(path), path.stat().st_size)
        else:
            raise CorruptArtefact(f"{path} is neither a file nor a link")
    return outputs


def tree_sha(path: Path, root: Path) -> str:
    """Hash of a file, or of a folder's names and contents: what a bundle's part is known by."""
    if path.is_file():
        return sha256_file(path)
    if not path.is_dir():
        raise CorruptArtefact(f"{path} is missing")
    return sha256_json({name: output.to_json() for name, output in describe(path, root).items()})


def _files(folder: Path) -> list[Path]:
    found: list[Path] = []
    for parent, folders, files in os.walk(folder):
        links = [name for name in folders if Path(parent, name).is_symlink()]
        found += [Path(parent, name) for name in (*files, *links) if _hashed(name)]
    return sorted(found, key=lambda path: path.relative_to(folder).as_posix())


def _hashed(name: str) -> bool:
    return name not in (MANIFEST, KEY) and not any(fnmatch.fnmatchcase(name, p) for p in (*UNHASHED, TEMPORARY))


def _check_link(path: Path, target: str, root: Path) -> None:
    if os.path.isabs(target) or not path.resolve().is_relative_to(root.resolve()):
        raise CorruptArtefact(f"{path} links to {target}, outside {root}: copy the file instead")
    if not path.exists():
        raise CorruptArtefact(f"{path} links to {target}, which is missing")


@functools.cache
def code_version() -> str:
    """Hash of the source of the five packages: partial results of other code are not continued."""
    root = Path(__file__).resolve().parent.parent
    digest = hashlib.sha256()
    for package in ("configs", "difficulty", "distill", "flows", "search"):
        for path in sorted((root / package).rglob("*.py")):
            digest.update(f"{path.relative_to(root)}\0{sha256_file(path)}\n".encode())
    return digest.hexdigest()[:16]


# ---------------------------------------------------------------- stage folders


@dataclass(frozen=True, slots=True)
class StageDir:
    """The folder of one stage of one round; also fit for a checkpoint inside a work folder.

    `root` bounds where links may point; default: the folder above the round, which is the loop's.

        stage = StageDir(round_dir, "search")
        manifest = stage.committed(inputs=key.inputs)
        if manifest is None:
            out = stage.begin(key)
            ...  # write into out
            manifest = stage.commit(key)
    """

    round_dir: Path
    name: str
    root: Path | None = None

    @property
    def path(self) -> Path:
        return self.round_dir / self.name

    @property
    def work(self) -> Path:
        return self.round_dir / f"{self.name}.work"

    @property
    def _root(self) -> Path:
        return self.root or self.round_dir.parent

    def read(self, *, verify: bool = False) -> Manifest | None:
        """The manifest, or None where the stage is not committed. Changes nothing. Raises CorruptArtefact."""
        if not self.path.is_dir():
            return None
        try:
            manifest = Manifest.from_json(json.loads((self.path / MANIFEST).read_bytes()))
        except (OSError, ValueError, CorruptArtefact) as error:
            raise CorruptArtefact(f"{self.path / MANIFEST} cannot be used: {error}") from error
        for name, output in manifest.outputs.items():
            _check_output(self.path / name, output, self._root)
        if verify:
            _check_hashes(self.path, manifest)
        return manifest

    def committed(self, *, inputs: Mapping[str, str] | None = None, verify: bool = False) -> Manifest | None:
        """The manifest of a usable result, else None: the stage is to be done (again).

        A damaged result is moved to `corrupt/`; one made from other inputs than `inputs` to `stale/`. Needs the lock.
        """
        try:
            manifest = self.read(verify=verify)
        except CorruptArtefact as error:
            self.set_aside("corrupt", str(error))
            return None
        if manifest is not None and inputs is not None and dict(manifest.inputs) != dict(inputs):
            self.set_aside("stale", f"made from {dict(manifest.inputs)}, now {dict(inputs)}")
            return None
        return manifest

    def set_aside(self, kind: str, reason: str) -> Path:
        """Move the committed folder to `<round>/<kind>/<stage>-N`, with `<stage>-N.txt` saying why."""
        folder = self.round_dir / kind
        with disk_errors(folder):
            folder.mkdir(exist_ok=True)
            number = next(n for n in itertools.count(1) if not (folder / f"{self.name}-{n}").exists())
            target = folder / f"{self.name}-{number}"
            atomic_write(folder / f"{target.name}.txt", reason + "\n")
            crash_point("stage.set_aside.named")
            os.rename(self.path, target)
            sync_folder(folder)
            sync_folder(self.round_dir)
        crash_point("stage.set_aside.done")
        return target

    def begin(self, key: StageKey) -> Path:
        """The work folder, with the partial results of an interrupted attempt under the same key, else empty."""
        assert not self.path.exists(), f"{self.path} is committed"
        with disk_errors(self.work):
            if self.work.is_symlink() or self.work.is_file():
                self.work.unlink()
            if self.work.exists() and self._work_key() != key.digest:
                (self.work / KEY).unlink(missing_ok=True)  # first: a wipe that is interrupted stays a wipe
                shutil.rmtree(self.work)
                crash_point("stage.begin.wiped")
            if self.work.exists():
                _drop_temporary(self.work)
                (self.work / MANIFEST).unlink(missing_ok=True)
            else:
                self.work.mkdir()
                crash_point("stage.begin.made")
                atomic_write(self.work / KEY, key.digest)
        crash_point("stage.begin.done")
        return self.work

    def _work_key(self) -> str | None:
        try:
            return (self.work / KEY).read_text()
        except (OSError, UnicodeDecodeError):
            return None

    def commit(self, key: StageKey) -> Manifest:
        """Make the work folder the stage's result, durably. Raises DiskError, CorruptArtefact (links)."""
        assert self._work_key() == key.digest, f"{self.work} was begun under another key"
        with disk_errors(self.work):
            _drop_temporary(self.work)
            manifest = Manifest(key, describe(self.work, self._root))
            _sync_tree(self.work)
            crash_point("stage.commit.synced")
            atomic_write(self.work / MANIFEST, json.dumps(manifest.to_json(), indent=1, sort_keys=True) + "\n")
            crash_point("stage.commit.manifest")
            os.rename(self.work, self.path)
            crash_point("stage.commit.renamed")
            sync_folder(self.round_dir)
            (self.path / KEY).unlink()
        crash_point("stage.commit.done")
        return manifest


def _check_output(path: Path, output: Output, root: Path) -> None:
    """Size, kind and header, without reading the file through."""
    if output.link is not None:
        if not path.is_symlink() or os.readlink(path) != output.link:
            raise CorruptArtefact(f"{path} is no longer a link to {output.link}")
        _check_link(path, output.link, root)
        return
    if path.is_symlink() or not path.is_file():
        raise CorruptArtefact(f"{path} is missing")
    size = path.stat().st_size
    if size != output.size:
        raise CorruptArtefact(f"{path} has {size} bytes instead of {output.size}")
    if path.suffix == ".safetensors":
        check_safetensors(path)


def _check_hashes(folder: Path, manifest: Manifest) -> None:
    for name, output in manifest.outputs.items():
        if output.link is None and sha256_file(folder / name) != output.sha256:
            raise CorruptArtefact(f"{folder / name} does not match its sha256 in {MANIFEST}")


def drop_abandoned(path: Path) -> None:
    """Delete a temporary file or folder (`.name.tmp-PID...`) whose process is gone; another may be in use."""
    import psutil

    pid = path.name.rpartition(".tmp-")[2].partition("-")[0]
    if pid.isdigit() and not psutil.pid_exists(int(pid)):
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink(missing_ok=True)


def _drop_temporary(folder: Path) -> None:
    for path in [*folder.rglob(TEMPORARY)]:
        if path.is_file() or path.is_symlink():
            path.unlink()


def _sync_tree(folder: Path) -> None:
    for parent, _, files in os.walk(folder, topdown=False):
        for name in files:
            path = Path(parent, name)
            if not path.is_symlink():
                _sync(path)
        sync_folder(Path(parent))
