"""Where a policy lies: a stage's `model` folder, or a `model.json` that names a folder or hub model elsewhere."""

from __future__ import annotations

import json
from pathlib import Path

from search.errors import ModelError


def policy_path(stage: Path) -> str:
    """The model of a stage's folder, as `from_pretrained` takes it. Raises ModelError."""
    if (stage / "model").is_dir():
        return str(stage / "model")
    reference = stage / "model.json"
    if reference.is_file():
        return str(json.loads(reference.read_text(encoding="utf-8"))["path"])
    raise ModelError(f"{stage} holds neither a model folder nor a model.json")
