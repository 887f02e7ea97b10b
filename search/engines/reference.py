"""Where a policy lies: a model folder, or a `model.json` that names a folder or hub model elsewhere."""

from __future__ import annotations

import json
from pathlib import Path

from search.errors import ModelError


def policy_path(place: Path) -> str:
    """What `from_pretrained` takes, from a model folder, a model.json, or a stage with either. Raises ModelError."""
    if place.is_dir():
        inner = place / "model" if (place / "model").is_dir() else place / "model.json"
        if inner.exists():
            return policy_path(inner)
        return str(place)
    if place.is_file() and place.suffix == ".json":
        return str(json.loads(place.read_text(encoding="utf-8"))["path"])
    raise ModelError(f"no model at {place}: expected a model folder or a model.json")
