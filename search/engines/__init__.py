"""Engines continue token prefixes. `load_engine` is the one place that knows which there are."""

from __future__ import annotations

from pathlib import Path

from configs.schema import Config
from search.errors import ConfigError
from search.types import Engine, Task


def load_engine(config: Config, model: str | Path, task: Task) -> Engine:
    """The configured engine with a policy loaded. Heavy imports happen here. Raises ModelError, ConfigError."""
    engine = config.engine
    if engine.type == "scripted":
        from search.engines.scripted import ScriptedEngine

        return ScriptedEngine.of_task(task, Path(model), engine)
    if engine.type == "transformers":
        from search.engines.transformers import TransformersEngine

        return TransformersEngine(str(model), engine, config.model, config.stages.threads)
    raise ConfigError("engine.type = 'vllm' is not in this version; use engine.type = 'transformers'")
