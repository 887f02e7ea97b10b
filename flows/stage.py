"""One stage as a process: `python -m flows.stage SPEC` (started by `flows.child`), or in this process.

SPEC is JSON: what to run, on which inputs, into which folder. Spinning OpenMP threads collapse when another process
wants the cores, so they sleep instead.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from configs import load
from configs.schema import Config
from flows import zygote
from flows.child import emit, run_child
from flows.driver import StageCall
from flows.locks import gpu_locks, visible_gpus
from flows.quiet import QUIET

WHERE = {
    "search": "flows.searching",
    "select": "flows.learning",
    "distill": "flows.learning",
    "gate": "flows.learning",
    "difficulty": "flows.predicting",
    "verifier": "flows.verifying",
    "reviser": "flows.revising",
    "table": "flows.tabling",
    "sample": "flows.evaluation",
    "rate": "flows.rating",
    "solve": "flows.solve",
}  # the other stages lie in flows.stages


def in_process(call: StageCall, progress: Callable[..., None]) -> None:
    """Run the stage here: for light stages, tests and the smoke round."""
    from flows.stages import Context

    module = importlib.import_module(WHERE.get(call.function, "flows.stages"))
    context = Context(call.config, call.round, progress, call.control, call.look)
    getattr(module, call.function)(context, call.inputs, call.out)


class Stages:
    """Runs stages where the configuration wants them: one that loads torch has its own process and memory.

    Processes are forked from one whose imports are done, where that is safe (`flows.zygote`).
    """

    def __init__(self, config: Config) -> None:
        settings = config.stages
        threads = str(settings.threads or os.cpu_count() or 1)
        self._env = QUIET | {"OMP_NUM_THREADS": threads, "OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "0"}
        self._env |= {"TOKENIZERS_PARALLELISM": "false", **zygote.ENV}
        self._zygote = zygote.Zygote(self._env) if _forks(config) else None

    def __enter__(self) -> Stages:
        if self._zygote is not None:
            self._zygote.__enter__()
        return self

    def __exit__(self, *raised: Any) -> None:
        if self._zygote is not None:
            self._zygote.__exit__(*raised)

    def __call__(self, call: StageCall, progress: Callable[..., None]) -> None:
        settings = call.config.stages
        if settings.in_process or not call.heavy:
            in_process(call, progress)
            return

        def on_event(event: dict[str, Any]) -> None:
            if event.get("event") == "progress":
                progress(event["done"], event["total"], **event["info"])

        name = call.out.name.removesuffix(".work")
        gpus, env = used_gpus(call), self._env
        if call.function == "distill" and gpus:  # a trainer takes the first it sees
            env = env | {"CUDA_VISIBLE_DEVICES": gpus[0]}
        with gpu_locks(gpus, f"stage {name} of {call.out.absolute().parent}", _tell):
            run_child(
                ["flows.stage", _spec(call)],
                what=f"stage {name}",
                log_path=call.out / "log.txt",
                python=settings.python,
                env=env,
                timeout_s=settings.timeout_s,
                on_event=on_event,
                zygote=self._zygote,
            )


def used_gpus(call: StageCall) -> list[str]:
    """The GPUs that a stage will run on; none on CPU. Training runs where a transformers engine is told to."""
    engine = call.config.engine
    if engine.type == "scripted":
        return []
    visible = visible_gpus()
    if engine.type == "vllm":
        return visible[:1] if call.function == "distill" else visible
    if engine.type != "transformers":  # a server has its own, and makes no model
        return []
    if engine.device == "auto":
        return visible[:1]
    kind, _, index = engine.device.partition(":")
    first = int(index or 0)
    return visible[first : first + 1] if kind == "cuda" else []


def _tell(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


def _forks(config: Config) -> bool:
    plain = config.stages.in_process or config.engine.type != "transformers"
    return not plain and config.stages.python in (None, sys.executable)


def _spec(call: StageCall) -> str:
    return json.dumps(
        {
            "function": call.function,
            "round": call.round,
            "control": call.control,
            "config": call.config.model_dump(mode="json"),
            "inputs": {name: str(path) for name, path in call.inputs.items()},
            "out": str(call.out),
            "heavy": call.heavy,
            "look": call.look,
        }
    )


def _report(done: float, total: float, **info: object) -> None:
    emit({"event": "progress", "done": done, "total": total, "info": info})


def main(text: str) -> None:
    """Run the stage that a SPEC describes, reporting progress to the parent."""
    spec = json.loads(text)
    spec["config"] = load.parse(spec["config"], "the round's configuration")
    spec["inputs"] = {name: Path(path) for name, path in spec["inputs"].items()}
    spec["out"] = Path(spec["out"])
    in_process(StageCall(**spec), _report)


if __name__ == "__main__":
    main(sys.argv[1])
