"""Checkpoints that a training may be resumed from: complete, undamaged, and of this very training.

A trainer writes a checkpoint file by file into its final folder, so a kill leaves one that looks finished. Here each
checkpoint gets a manifest, written last: the size and sha256 of every file. A checkpoint is valid if all of them
match; otherwise the one before is used. Nothing is loaded here, so a damaged file cannot do harm.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path

from search.errors import DiskError

MANIFEST = "manifest.json"
INPUTS = "inputs.json"
STATE = "trainer_state.json"
# What a resume reads; one file of each group must be there.
NEEDED = (
    ("model.safetensors", "model.safetensors.index.json", "adapter_model.safetensors"),
    ("optimizer.pt",),
    ("scheduler.pt",),
    ("rng_state.pth", "rng_state_0.pth"),
    (STATE,),
)


def open_folder(folder: Path, inputs: Mapping[str, object]) -> Path | None:
    """The checkpoint to resume from, or None. `inputs` names the training: checkpoints of another one are removed."""
    wanted = json.dumps(inputs, sort_keys=True)
    stored = folder / INPUTS
    if folder.is_dir() and not (stored.is_file() and stored.read_text(encoding="utf-8") == wanted):
        shutil.rmtree(folder)
    folder.mkdir(parents=True, exist_ok=True)
    _write(stored, wanted)
    return latest_valid_checkpoint(folder)


def latest_valid_checkpoint(folder: Path) -> Path | None:
    """The valid checkpoint with the most steps in `folder`; None where there is none."""
    for _, checkpoint in sorted(_checkpoints(folder), reverse=True):
        if damage(checkpoint) is None:
            return checkpoint
    return None


def damage(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint, in words; None: it is valid. Reads every byte once."""
    try:
        manifest = json.loads((checkpoint / MANIFEST).read_text(encoding="utf-8"))
        state = json.loads((checkpoint / STATE).read_text(encoding="utf-8"))
        for name, (size, digest) in manifest.items():
            path = checkpoint / name
            if path.stat().st_size != size or sha256_of(path) != digest:
                return f"{name} is not what was written"
        if f"checkpoint-{state['global_step']}" != checkpoint.name:
            return f"{STATE} is of step {state['global_step']}"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{type(error).__name__}: {error}"
    missing = [group[0] for group in NEEDED if not any(name in manifest for name in group)]
    return f"{missing[0]} is missing" if missing else None


def seal(checkpoint: Path) -> None:
    """Write the manifest of a finished checkpoint."""
    files = sorted(p for p in checkpoint.rglob("*") if p.is_file() and p.name != MANIFEST)
    manifest = {str(p.relative_to(checkpoint)): (p.stat().st_size, sha256_of(p)) for p in files}
    _write(checkpoint / MANIFEST, json.dumps(manifest, indent=1))


def require_space(folder: Path, needed_bytes: int) -> None:
    """Raises DiskError where the disk of `folder` has less than `needed_bytes` left."""
    free = shutil.disk_usage(folder).free
    if free < needed_bytes:
        raise DiskError(
            f"training needs about {needed_bytes / 1e9:.2f} GB in {folder} for checkpoints and the model, and "
            f"{free / 1e9:.2f} GB are free: make room, or raise distill.checkpoint_steps to keep fewer checkpoints"
        )


def sha256_of(path: Path) -> str:
    """The sha256 of a file, as hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _checkpoints(folder: Path) -> Iterator[tuple[int, Path]]:
    for path in folder.glob("checkpoint-*"):
        step = path.name.removeprefix("checkpoint-")
        if step.isdecimal() and path.is_dir():
            yield int(step), path


def _write(path: Path, text: str) -> None:
    """Replace a file as a whole."""
    new = path.with_name(path.name + ".new")
    with new.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(new, path)
