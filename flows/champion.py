"""The bundle that is used together, and the `champion` link that points to it, with a README: how to serve it."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flows.artefacts import atomic_write, disk_errors, sha256_json, sync_folder
from flows.crash import crash_point
from search.errors import DiskError


@dataclass(frozen=True, slots=True)
class Part:
    """A file or folder of the loop, by content. Example: Part("round-003/distill/model", "9f86...")"""

    path: str  # relative to the loop's folder
    sha256: str  # flows.artefacts.tree_sha


@dataclass(frozen=True, slots=True)
class Bundle:
    """What is used together: moved and rolled back as one."""

    round: int  # whose verdict made it
    policy: Part
    verifier: Part | None = None
    difficulty: Part | None = None
    table: Part | None = None
    reviser: Part | None = None  # the policy trained to revise, and the verifier of its chains

    @property
    def id(self) -> str:
        return f"round-{self.round:03d}-{sha256_json(dataclasses.asdict(self))[:8]}"

    def parts(self) -> dict[str, Part]:
        named = {name: getattr(self, name) for name in ("policy", "verifier", "difficulty", "table", "reviser")}
        return {name: part for name, part in named.items() if part is not None}

    @classmethod
    def from_json(cls, row: Mapping[str, Any]) -> Bundle:
        parts = {name: Part(**part) for name, part in row.items() if isinstance(part, Mapping)}
        return cls(round=int(row["round"]), **parts)


def link_champion(root: Path, bundle: Bundle) -> None:
    """Build the bundle's folder of links below `root` and point `champion` to it, in one rename. Raises DiskError."""
    link, target = root / "champion", f"bundles/{bundle.id}"
    with disk_errors(link):
        if link.exists() and not link.is_symlink():
            raise DiskError(f"{link} is not our link: move it away and run again")
        if link.is_symlink() and os.readlink(link) == target and (root / target).is_dir():
            return
        _write_bundle(root, bundle)
        crash_point("champion.bundle")
        temp = root / f".champion.tmp-{os.getpid()}"
        temp.unlink(missing_ok=True)
        temp.symlink_to(target)
        os.replace(temp, link)
        sync_folder(root)
    crash_point("champion.moved")


def _write_bundle(root: Path, bundle: Bundle) -> None:
    """bundles/<id>/: a link for each part, bundle.json, README.md. Built under another name, then renamed."""
    final = root / "bundles" / bundle.id
    temp = root / f".bundle.tmp-{os.getpid()}"
    shutil.rmtree(temp, ignore_errors=True)
    try:
        temp.mkdir()
        for name, part in bundle.parts().items():
            (temp / (name + Path(part.path).suffix)).symlink_to(os.path.join("..", "..", part.path))
        atomic_write(temp / "bundle.json", json.dumps(dataclasses.asdict(bundle), indent=1, sort_keys=True) + "\n")
        atomic_write(temp / "README.md", _readme(root, bundle))
        final.parent.mkdir(exist_ok=True)
        if final.exists():
            shutil.rmtree(final)
        os.rename(temp, final)
    except BaseException:
        shutil.rmtree(temp, ignore_errors=True)
        raise
    sync_folder(final.parent)


def _readme(root: Path, bundle: Bundle) -> str:
    policy = f"{root.name}/champion/policy"
    if (root / bundle.policy.path / "adapter_config.json").exists():
        serve = f"vllm serve BASE_MODEL --enable-lora --lora-modules champion={policy}"
        note = "The policy is a LoRA adapter; BASE_MODEL is `base_model_name_or_path` in its adapter_config.json.\n"
    else:
        serve, note = f"vllm serve {policy} --served-model-name champion", ""
    rows = "\n".join(f"| {name} | {part.path} | {part.sha256[:16]} |" for name, part in bundle.parts().items())
    return f"""# Champion of loop {root.name}, from round {bundle.round}

`champion` is a link: it moves when a round is promoted or rolled back. Read it once, at start.

| part | folder in the loop | sha256 |
|---|---|---|
{rows}

Answer one question with everything in this bundle:

    ratchet solve CONFIG "QUESTION"

Serve the policy (from the runs folder):

    {serve}

{note}Load it in Python: `AutoModelForCausalLM.from_pretrained("{policy}")`.
"""
