"""Engines continue token prefixes. `load_engine` is the one place that knows which there are."""

from __future__ import annotations

import os
from pathlib import Path

from configs.schema import Config
from search.errors import ConfigError
from search.types import Engine, Task


def num_processes(config: Config) -> int:
    """How many processes share the shards of a stage: one, but for tiny models on CPUs."""
    engine = config.engine
    if engine.type != "transformers" or config.stages.in_process or not engine.device.startswith(("auto", "cpu")):
        return 1
    if engine.device == "auto" and any(Path("/dev").glob("nvidia[0-9]*")):
        return 1
    return engine.processes or num_threads(config)


def num_threads(config: Config) -> int:
    """Threads of a stage: as configured, else one a core."""
    return config.stages.threads or os.cpu_count() or 1


def load_engine(config: Config, model: str | Path, task: Task, *, share: int = 1) -> Engine:
    """The configured engine with a policy loaded, for one of `share` processes that divide the threads.

    Heavy imports happen here. Raises ModelError, ConfigError.
    """
    engine = config.engine
    if engine.type == "scripted":
        from search.engines.scripted import ScriptedEngine

        return ScriptedEngine.of_task(task, Path(model), engine)
    if engine.type == "transformers":
        from search.engines.transformers import TransformersEngine

        return TransformersEngine(str(model), engine, config.model, max(1, num_threads(config) // share))
    if engine.type == "server":
        from search.engines.server import ServerEngine

        return ServerEngine(engine, str(model), config.model)
    raise ConfigError("engine.type = 'vllm' is not in this version; use engine.type = 'transformers'")
