"""Verifiers score steps or answers. `load_verifier` is the one place that knows which there are."""

from __future__ import annotations

from configs.schema import Config
from search.types import Task, Verifier


def load_verifier(config: Config, task: Task) -> Verifier | None:
    """The configured verifier; None where there is none. Raises ConfigError."""
    settings = config.verifier
    if settings.type == "none":
        return None
    from search.verifiers.oracle import Oracle

    return Oracle(task, settings, seed=config.loop.seed)
