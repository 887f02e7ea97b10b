"""Engines continue token prefixes. `load_engine` is the one place that knows which there are."""

from __future__ import annotations

from pathlib import Path

from configs.schema import Config
from search.errors import ConfigError
from search.types import Engine, Task


def load_engine(config: Config, model: str | Path, task: Task) -> Engine:
    """The configured engine with a policy loaded. Heavy imports happen here. Raises ModelError, ConfigError."""
    match config.engine.type:
        case "scripted":
            from search.engines.scripted import ScriptedEngine

            return ScriptedEngine.of_task(task, Path(model), config.engine)
        case "transformers":
            from search.engines.transformers import TransformersEngine

            return TransformersEngine(str(model), config.engine, config.model, config.stages.threads)
        case "vllm":
            raise ConfigError("engine.type = 'vllm' is not in this version; use engine.type = 'transformers'")
