"""What `--model` names: a policy, with the verifier that a round trained for it. For `ratchet eval` and `solve`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from configs.schema import Config
from flows.champion import Bundle
from flows.state import Loop
from search.engines.reference import policy_path
from search.errors import DataError
from search.types import Task, Verifier
from search.verifiers import load_verifier

NAMED = ("champion", "base", "reviser")


@dataclass(frozen=True, slots=True)
class Chosen:
    """`config` is the loop's, but that a reviser brings the settings of its own verifier."""

    config: Config
    policy: Path
    verifier: Path | None  # the folder of a trained one
    difficulty: Path | None = None  # of a predictor fitted to this very policy
    table: Path | None = None  # of the StrategyTables fitted to it

    @property
    def inputs(self) -> dict[str, Path]:
        """As inputs of a stage."""
        parts = {"verifier": self.verifier, "difficulty": self.difficulty, "table": self.table}
        return {"policy": self.policy} | {name: path for name, path in parts.items() if path}


def choose(config: Config, runs_dir: Path, model: str) -> Chosen:
    """`champion`, `base` (with the verifier that was trained for it), `reviser`, or a model folder, which gets the
    champion's verifier. Raises DataError, ModelError.
    """
    named = model in NAMED
    if not named and not Path(model).is_dir():
        raise DataError(f"--model {model}: no such folder; say {', '.join(NAMED)}, or a model folder")
    started = (runs_dir / config.loop.name / "loop.json").exists()
    loop = Loop.open(runs_dir, config.loop.name) if named or started else None
    champion = loop.state.champion if loop else None
    if not named and champion is None:
        return _usable(Chosen(config, Path(model), None))
    if loop is None or champion is None:
        raise DataError(f"loop {config.loop.name} has no champion yet: run `ratchet round` first")
    if model == "reviser":
        return _usable(_reviser(config, loop, champion))
    bundle, policy = champion, loop.resolve(champion.policy)
    if model == "base":
        bundle = next((m.bundle for m in reversed(loop.state.moves) if m.bundle.round == 0), champion)
        policy = loop.path / "round-000" / "base"
    verifier = loop.resolve(bundle.verifier) if bundle.verifier else None
    if not named:
        return _usable(Chosen(config, Path(model), verifier))
    parts = {name: loop.resolve(part) for name, part in bundle.parts().items() if name in ("difficulty", "table")}
    return _usable(Chosen(config, policy, verifier, **parts))


def _reviser(config: Config, loop: Loop, champion: Bundle) -> Chosen:
    if champion.reviser is None:
        raise DataError(f"loop {config.loop.name} has no reviser: set revision.enabled = true and run `ratchet round`")
    folder = loop.resolve(champion.reviser)
    own = folder / "verifier"
    settings = config.revision.verifier
    return Chosen(config.model_copy(update={"verifier": settings}), folder / "model", own if own.is_dir() else None)


def _usable(chosen: Chosen) -> Chosen:
    policy_path(chosen.policy)  # raises where there is no model
    return chosen


def load_chosen_verifier(config: Config, task: Task, inputs: Mapping[str, Path]) -> Verifier | None:
    """The configured verifier, of a stage's inputs. Raises ConfigError, ModelError."""
    return load_verifier(config, task, policy=policy_path(inputs["policy"]), trained=inputs.get("verifier"))
