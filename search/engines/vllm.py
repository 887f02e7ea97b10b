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
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from configs.schema import Model
from configs.schema import VllmEngine as EngineSettings
from search.engines.drawing import signed
from search.engines.loading import Described, describe_model
from search.engines.streaming import Answer, Streaming, refusal
from search.engines.vllm_start import (
    CPU_BLOCK_SIZE,
    CPU_CACHE_GIB,
    Core,
    Words,
    explained,
    on_cpu,
    prepare,
    sentence,
    start,
)
from search.errors import ConfigError, EngineError, ModelError
from search.types import Capabilities, Continuation, Finish, Request

LORA_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # those vLLM takes
GREEDY = 1e-5  # vLLM takes temperatures below this for greedy
WAY_OUT = (
    "what was finished is kept: run the command again. Where no line above says why, it had too little memory: lower "
    "engine.max_num_seqs, engine.kv_cache_gib or engine.gpu_memory_fraction"
)
WORDS = Words(
    wanted="engine.type = 'vllm'",
    instead="engine.type = 'transformers'",
    memory="lower engine.max_model_len, or change engine.kv_cache_gib (0.5, 8, ...) or engine.gpu_memory_fraction",
)


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
        prepare(WORDS, threads, devices)
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
        self._core = _start(described, engine, model, self.facts.max_length, threads)
        self._llm: Any = self._core.llm
        self._counts_positions = bool(self._core.config.use_v2_model_runner)  # its seeds do, so it needs no help
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
        self._llm = None
        self._flying.clear()
        self._core.close()

    # ------------------------------------------------------------ at work

    def _collect(self) -> list[Answer]:
        assert self._llm is not None, "the engine was closed"
        while self._flying and not self._finished and self._dead is None and not self.called_off:
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
        cause = self._core.told(error)
        self._dead = EngineError(f"vLLM ended in the middle ({sentence(cause)}); {WAY_OUT}")
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
            raise explained(cause if isinstance(cause, Exception) else error, described.parts.folder, WORDS) from error

    def _add_adapter(self, described: Described) -> Any:
        from vllm.lora.request import LoRARequest

        number = int(self.facts.fingerprint[:7], 16) + 1
        lora = LoRARequest(self.facts.fingerprint, number, str(described.parts.folder))
        try:
            self._llm.add_lora(lora)
        except Exception as error:
            why = sentence(self._core.told(error))
            self.close()
            raise ModelError(
                f"vLLM cannot load the adapter {described.parts.folder} ({why}): use engine.type = "
                "'transformers', which merges it into its base"
            ) from error
        return lora


_FINISHES = {"stop": Finish.STOP, "length": Finish.LENGTH, "abort": Finish.CANCELLED}


# ---------------------------------------------------------------- start


def _start(described: Described, engine: EngineSettings, model: Model, max_length: int, threads: int | None) -> Core:
    def adjust(config: Any) -> None:
        counts_positions = bool(config.use_v2_model_runner)
        padded = described.vocab_size > len(described.tokenizer)
        if not counts_positions or padded:
            name = "Mask" if counts_positions else "Draws"
            config.model_config.logits_processors = [f"search.engines.vllm_worker:{name}"]

    try:
        arguments = _arguments(described, engine, model, max_length)
        return start(arguments, own_process=engine.own_process, threads=threads, adjust=adjust)
    except Exception as error:
        raise explained(error, described.parts.folder, WORDS) from error


def _arguments(described: Described, engine: EngineSettings, model: Model, max_length: int) -> dict[str, Any]:
    from search.engines.vllm_worker import NUM_TOKENS

    cache_gib = engine.kv_cache_gib or (CPU_CACHE_GIB if on_cpu() else None)
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
        "block_size": engine.block_size or (CPU_BLOCK_SIZE if on_cpu() else None),
        "enable_prefix_caching": True,
        "enforce_eager": engine.enforce_eager or on_cpu(),  # compiled is no faster there, and starts a minute later
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
