"""Configuration as MLflow parameters, and secrets kept out of everything that leaves the runs folder.

What counts as a secret: a string under a name that ends like one ("hf_token", "api_key"; not "max_tokens"), the value
of an environment variable with such a name wherever it occurs, and the password in a URL.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from typing import Any

MAX_VALUE_CHARS = 500  # of a parameter: what every MLflow version since 1.28 takes


def metric_name(name: str) -> str:
    """A name every MLflow takes: letters, digits, '_', '-', '.', ' ' and '/', no empty or dotted part, 240 at most.

    Example: metric_name("test/pass@64") == "test/pass_64"
    """
    parts = [re.sub(r"[^A-Za-z0-9_\-. ]", "_", part) for part in name.split("/")]
    clean = "/".join(part for part in parts if part.strip(". "))
    return clean[:240].rstrip("/. ") or "unnamed"


def parameters(config: Mapping[str, Any]) -> dict[str, str]:
    """Flat scalars: {"search.samples": "16"}. Long values are cut; the whole configuration is an artefact."""
    flat: dict[str, str] = {}

    def walk(prefix: str, value: Any) -> None:
        if isinstance(value, Mapping):
            for name, inner in value.items():
                walk(f"{prefix}.{name}" if prefix else str(name), inner)
        elif value is not None:
            text = value if isinstance(value, str) else json.dumps(value)
            flat[metric_name(prefix)] = text if len(text) <= MAX_VALUE_CHARS else text[: MAX_VALUE_CHARS - 3] + "..."

    walk("", config)
    return flat


_SECRET_NAME = re.compile(
    r"(?i)(token|secret|passw(or)?d|api_?key|access_?key|private_?key|credentials?|authorization)$"
)
_USER_INFO = re.compile(r"(\w+://)[^/\s:@]*:[^/\s@]+@")
REDACTED = "[redacted]"


class Redactor:
    """Replaces secrets: strings under a secret's name, values of such environment variables, passwords in URLs."""

    def __init__(self, environment: Mapping[str, str] | None = None) -> None:
        environment = os.environ if environment is None else environment
        values = {v for name, v in environment.items() if _SECRET_NAME.search(name) and len(v) >= 8}
        self._values = sorted(values, key=len, reverse=True)

    def text(self, text: str) -> str:
        for value in self._values:
            text = text.replace(value, REDACTED)
        return _USER_INFO.sub(rf"\1{REDACTED}@", text)

    def __call__(self, value: Any, name: str = "") -> Any:
        """The same JSON value without secrets."""
        if isinstance(value, Mapping):
            return {self.text(str(key)): self(inner, str(key)) for key, inner in value.items()}
        if isinstance(value, (list, tuple)):
            return [self(inner, name) for inner in value]
        if isinstance(value, str):
            return REDACTED if value and _SECRET_NAME.search(name) else self.text(value)
        return value
