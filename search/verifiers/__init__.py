"""Verifiers score steps or answers. `load_verifier` is the one place that knows which there are."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from configs.schema import Config
from search.errors import ConfigError
from search.types import Aggregation, Task, Verifier, VerifierFacts


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
    if settings.type == "judge":
        from search.verifiers.judge import Judge

        return Judge(task, settings, seed=config.loop.seed)
    if settings.type == "certainty":
        from search.verifiers.certainty import Certainty

        if policy is None:
            raise ConfigError("verifier.type = 'certainty' reads the policy's own weights: there are none here")
        return Certainty(task, settings, config.model, policy)
    if settings.type == "pretrained":
        from search.verifiers.pretrained import load_pretrained

        return load_pretrained(task, settings)
    if settings.type == "trained" and trained is not None:
        from search.verifiers.trained import Trained

        return Trained(task, trained, settings, config.model)
    return None


def describe(config: Config, task: Task, *, trained: Path | None = None) -> VerifierFacts | None:
    """What can be known of the configured verifier without loading it; None where there is none. Raises ModelError.

    Its fingerprint names the settings and the trained folder's files, its number of parameters is left out.
    """
    settings = config.verifier
    if settings.type == "none" or settings.type == "oracle":
        loaded = load_verifier(config, task)
        return loaded.facts if loaded else None
    digest = hashlib.sha256(json.dumps(settings.model_dump(mode="json"), sort_keys=True).encode())
    if settings.type == "trained" and trained is None:
        return None
    folder = trained if settings.type == "trained" else None
    if settings.type == "pretrained" and settings.format == "ratchet":
        folder = Path(settings.path)
    if folder is not None:
        from search.verifiers.card import CARD, READOUT, Card

        card = Card.load(folder)
        for path in (folder / CARD, folder / READOUT, *sorted((folder / "model").glob("*"))):
            if path.is_file():
                with path.open("rb") as file:
                    digest.update(hashlib.file_digest(file, "sha256").digest())
        return VerifierFacts(digest.hexdigest()[:16], 0, card.kind == "prm", card.aggregation)
    aggregation: Aggregation = "last"
    if settings.type == "pretrained":
        aggregation = settings.aggregation
    elif settings.type == "certainty":
        aggregation = "mean"
    elif settings.type == "judge" and settings.process:
        aggregation = "min"
    return VerifierFacts(digest.hexdigest()[:16], 0, settings.scores_steps, aggregation)
