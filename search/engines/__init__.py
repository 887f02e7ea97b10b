"""Engines continue token prefixes. `load_engine` is the one place that knows which there are."""

from __future__ import annotations

import os
from pathlib import Path

from configs.schema import Config
from configs.schema import TransformersEngine as TransformersSettings
from search.errors import ConfigError
from search.types import Engine, Task


def num_processes(config: Config) -> int:
    """How many processes share the shards of a stage: for vLLM one a GPU (or group of them), else one, but for tiny
    models on CPUs."""
    engine = config.engine
    if config.stages.in_process:
        return 1
    if engine.type == "vllm":
        gpus = visible_gpus()
        return max(1, len(gpus) // engine.tensor_parallel) if gpus else engine.processes or num_threads(config)
    if engine.type != "transformers" or not engine.device.startswith(("auto", "cpu")):
        return 1
    if engine.device == "auto" and visible_gpus():
        return 1
    return engine.processes or num_threads(config)


def visible_gpus() -> tuple[str, ...]:
    """The GPUs as CUDA_VISIBLE_DEVICES names them, found without touching CUDA: a process may fork afterwards."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if named is not None:
        return tuple(name.strip() for name in named.split(",") if name.strip() not in ("", "-1"))
    return tuple(str(i) for i, _ in enumerate(Path("/dev").glob("nvidia[0-9]*")))


def own_gpus(config: Config, index: int, share: int) -> tuple[str, ...] | None:
    """The GPUs of process `index` of `share`; None: all. Raises ConfigError where there are too few for one model."""
    assert config.engine.type == "vllm"
    gpus, each = visible_gpus(), config.engine.tensor_parallel
    if gpus and len(gpus) < each:
        raise ConfigError(
            f"engine.tensor_parallel = {each}, but only {len(gpus)} GPU{'s' * (len(gpus) > 1)} can be seen here: "
            "lower it, or check CUDA_VISIBLE_DEVICES"
        )
    return gpus[index * each : (index + 1) * each] if gpus and share > 1 else None


def num_threads(config: Config) -> int:
    """Threads of a stage: as configured, else one a core."""
    return config.stages.threads or os.cpu_count() or 1


def load_engine(
    config: Config, model: str | Path, task: Task, *, share: int = 1, index: int = 0, hidden_states: bool = False
) -> Engine:
    """The configured engine with a policy loaded, for process `index` of `share` that divide the threads, or the GPUs.

    With `hidden_states`, an engine that offers them: the transformers engine instead of one that does not.
    Heavy imports happen here; with `share` > 1, call it in the forked process. Raises ModelError, ConfigError.
    """
    engine = config.engine
    if hidden_states and engine.type in ("vllm", "server"):
        engine = TransformersSettings()
    if engine.type == "scripted":
        from search.engines.scripted import ScriptedEngine

        return ScriptedEngine.of_task(task, Path(model), engine)
    if engine.type == "transformers":
        from search.engines.transformers import TransformersEngine

        return TransformersEngine(str(model), engine, config.model, max(1, num_threads(config) // share))
    if engine.type == "server":
        from search.engines.server import ServerEngine

        return ServerEngine(engine, str(model), config.model)
    from search.engines.vllm import VllmEngine

    threads = max(1, num_threads(config) // share)
    return VllmEngine(str(model), engine, config.model, threads, own_gpus(config, index, share))
