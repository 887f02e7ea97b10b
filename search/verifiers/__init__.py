"""Verifiers score steps or answers. `load_verifier` is the one place that knows which there are."""

from __future__ import annotations

from pathlib import Path

from configs.schema import Config
from search.types import Task, Verifier


def load_verifier(
    config: Config, task: Task, *, policy: str | Path | None = None, trained: Path | None = None
) -> Verifier | None:
    """The configured verifier; None where there is none, or none is trained yet. Raises ConfigError, ModelError.

    `policy`: the model that answers, whose own certainty may be the score. `trained`: the folder of a verifier that a
    round trained (see search.verifiers.card). Heavy imports happen here.
    """
    settings = config.verifier
    if settings.type == "oracle":
        from search.verifiers.oracle import Oracle

        return Oracle(task, settings, seed=config.loop.seed)
    return None
