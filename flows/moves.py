"""Moving the champion by hand: recorded with its reason, never forgotten by the history."""

from __future__ import annotations

from pathlib import Path

from configs.schema import Config
from flows.artefacts import StageDir
from flows.state import Bundle, Loop
from search.errors import DataError


def promote(config: Config, runs_dir: Path, round_number: int, reason: str) -> str:
    """Make the model that a round made the champion. Raises DataError, LockedError, CorruptArtefact."""
    with Loop.locked(runs_dir, config.loop.name, "a promotion by hand") as loop:
        folder = loop.path / f"round-{round_number:03d}"
        stage = StageDir(folder, "distill" if round_number else "base")
        if stage.read(verify=True) is None:
            known = [r.round for r in loop.state.rounds if r.kind == "round"]
            raise DataError(f"round {round_number} of loop {config.loop.name} made no model; its rounds: {known}")
        model = stage.path / "model" if (stage.path / "model").is_dir() else stage.path / "model.json"
        bundle = next((m.bundle for m in reversed(loop.state.moves) if m.bundle.round == round_number), None)
        bundle = bundle or Bundle(round_number, loop.part(model))
        if loop.state.champion == bundle:
            raise DataError(f"the model of round {round_number} is the champion already")
        loop.promote(bundle, reason)
        fitted = "" if bundle.difficulty else "; it has no difficulty predictor of its own until the next round"
        return f"champion of {config.loop.name}: round {round_number} ({reason}){fitted}"


def rollback(config: Config, runs_dir: Path, reason: str) -> str:
    """Back to the champion before. Raises UserError where there is none, LockedError, CorruptArtefact."""
    with Loop.locked(runs_dir, config.loop.name, "a rollback") as loop:
        bundle = loop.rollback(reason)
        return f"champion of {config.loop.name}: round {bundle.round} ({reason})"
