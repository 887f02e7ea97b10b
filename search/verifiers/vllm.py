"""Runs a verifier's decoder with vLLM's pooling runner: the same layouts and heads as in states.py, the same scores.

The decoder, adapters merged, is handed over as a plain checkpoint in a temporary folder, whatever format it came in. A
head of one linear layer goes with it as vLLM's classifier, so a few logits a token come back (task `token_classify`;
`classify` where only the last token is read). For other heads the states of all tokens do (`token_embed`, `embed`), and
the head reads them here. vLLM's own squashing and normalisation are off.

Of a prefix that vLLM has in its cache nothing comes back. So the scores read so far are remembered, and an input that
has an unknown one in its cached part is run whole. Left out: heads that read every token run the whole input each time;
decoders that are not causal; several GPUs.
"""

# pyright: reportMissingImports=false
from __future__ import annotations

import hashlib
import json
import math
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from configs.schema import VerifierRuntime
from search.engines.vllm_start import CPU_BLOCK_SIZE, CPU_CACHE_GIB, Words, explained, on_cpu, prepare, sentence, start
from search.errors import ConfigError, EngineError, ModelError
from search.types import Scored
from search.verifiers.heads import GenerativeHead, StateHead
from search.verifiers.layout import Encoded

WORDS = Words(
    wanted="verifier.runtime = 'vllm'",
    instead="verifier.runtime = 'transformers'",
    memory="change verifier.gpu_memory_fraction, or lower verifier.batch_tokens or engine.gpu_memory_fraction",
)
MAX_STEP_TOKENS = 16_384  # of all requests in one pass of vLLM; longer inputs are run in parts
MAX_KNOWN = 1 << 18  # scores that are remembered
GPU_BLOCK_SIZE = 16
EXAMPLE_TOKENS = 16  # run by both when vLLM has started
TOLERANCE = 0.1  # bfloat16 rounds differently in other kernels


@dataclass(frozen=True, slots=True)
class _Item:
    """One input, up to its last end."""

    ids: tuple[int, ...]
    num_prompt: int
    ends: tuple[int, ...]

    def keys(self) -> list[bytes]:
        """Names of the prefixes that end with each score."""
        digest, keys, start = hashlib.blake2b(digest_size=16), list[bytes](), 0
        for end in self.ends:
            digest.update(np.asarray(self.ids[start : end + 1], dtype=np.int64).tobytes())
            keys.append(digest.digest())
            start = end + 1
        return keys


@dataclass(frozen=True, slots=True)
class _Read:
    """What came back of one item: scores of the ends that were not in its cached part."""

    scores: tuple[float, ...]
    num_cached: int
    refused: str | None = None


class PoolingScorer:
    """Scores Encoded inputs with a causal decoder and a head, as search.verifiers.states.StateScorer does.

    `decoder`: a transformers model without its head, on the CPU: vLLM gets its weights, and it keeps none.
    `max_length`: its context in tokens. On CPUs vLLM runs in this process, unless another engine of it does.
    Raises ConfigError where vLLM or the device is missing, ModelError for a model that vLLM does not run, EngineError
    where it does not start.
    """

    def __init__(
        self, decoder: Any, head: StateHead | GenerativeHead, settings: VerifierRuntime, *, max_length: int
    ) -> None:
        prepare(WORDS)
        _check_device(settings)
        self._head = head
        self._linear = head.linear if isinstance(head, StateHead) else None
        example = _example(decoder, self._linear, max_length)
        self._max_length = max_length
        self._device = torch.device("cpu" if on_cpu() or self._linear is not None else "cuda")  # of the head
        self._dtype = decoder.dtype
        self._num_tokens = decoder.get_input_embeddings().weight.shape[0]
        self._caches = settings.cache_tokens != 0 and not head.reads_tokens
        self._known: dict[bytes, float] = {}
        self._num_asked = 0
        self._dead: EngineError | None = None
        try:
            with tempfile.TemporaryDirectory(prefix="ratchet-verifier-") as folder:
                save_decoder(decoder, self._linear, Path(folder))
                decoder.to("meta")
                arguments = _arguments(settings, Path(folder), max_length, self._linear is not None, self._caches)
                arguments["dtype"] = str(self._dtype).removeprefix("torch.")  # "auto" makes float32 less
                self._core = start(arguments, adjust=lambda config: _size_cache(config, settings, max_length))
        except Exception as error:
            raise explained(error, "the verifier", WORDS) from error
        self._llm: Any = self._core.llm
        head.to(self._device)
        try:
            self._prove(*example)
        except Exception:
            self.close()
            raise

    def reset(self) -> None:
        """Forget what earlier calls computed, so that the next ones do not depend on them, not even in rounding."""
        self._known.clear()
        if self._caches:
            self._llm.reset_prefix_cache()

    def close(self) -> None:
        """End vLLM and free its memory."""
        if self._llm is not None:
            self._llm = None
            self._core.close()

    # ------------------------------------------------------------ one call

    @torch.inference_mode()
    def score(self, inputs: Sequence[Encoded], keep: bool | Sequence[bool] = False) -> list[Scored]:
        """One Scored an input, in order, with a score at each of its ends. `keep` is not needed: vLLM decides.

        One that cannot be run, longer than the context say, is `unscored`, with the reason. Raises EngineError where
        vLLM has ended.
        """
        assert self._llm is not None, "the verifier was closed"
        refused = {row: why for row, one in enumerate(inputs) if (why := self._refuse(one))}
        results = {row: Scored((), len(inputs[row].ids), unscored=why) for row, why in refused.items()}
        rows_of: dict[_Item, list[int]] = {}
        for row, one in enumerate(inputs):
            if row not in refused:
                item = _Item(one.ids[: one.run_length()], min(one.num_prompt, one.ends[0]), one.ends)
                rows_of.setdefault(item, []).append(row)
        for (item, rows), scored in zip(rows_of.items(), self._score_items(list(rows_of)), strict=True):
            for row in rows:
                computed = scored.computed_tokens if row == rows[0] else 0
                prompt_tokens = inputs[row].num_prompt
                results[row] = replace(
                    scored, tokens=len(item.ids), prompt_tokens=prompt_tokens, computed_tokens=computed
                )
        return [results[row] for row in range(len(inputs))]

    def _refuse(self, one: Encoded) -> str | None:
        """Why an input cannot be scored."""
        if why := one.refusal(reads_tokens=self._head.reads_tokens, max_length=self._max_length):
            return why
        if (token := max(one.ids)) >= self._num_tokens:
            return f"its token {token} is none of the verifier's {self._num_tokens}"
        return None

    def _score_items(self, items: Sequence[_Item]) -> list[Scored]:
        keys = [item.keys() if self._caches else [] for item in items]
        found = self._run(items, cached=self._caches)
        for names, read in zip(keys, found, strict=True):
            self._remember(names, read)
        results = [self._whole(item, names, read) for item, names, read in zip(items, keys, found, strict=True)]
        missing = [n for n, scored in enumerate(results) if scored is None]
        for n in missing:  # one by one: what is alone is never interrupted
            read = self._run([items[n]], cached=False)[0]
            if read.refused is None and len(read.scores) < len(items[n].ends):
                raise EngineError(f"vLLM returned too few states of an input: use {WORDS.instead}")
            self._remember(keys[n], read)
            computed = 2 * len(items[n].ids) - found[n].num_cached
            results[n] = Scored(read.scores, computed_tokens=computed, unscored=read.refused)
        while len(self._known) > MAX_KNOWN:
            self._known.pop(next(iter(self._known)))  # the oldest
        return [scored for scored in results if scored is not None]

    def _remember(self, names: Sequence[bytes], read: _Read) -> None:
        if read.scores:
            self._known.update(zip(names[-len(read.scores) :], read.scores, strict=False))

    def _whole(self, item: _Item, names: Sequence[bytes], read: _Read) -> Scored | None:
        """With the scores of its cached part; None where one of them is not known."""
        if read.refused is not None:
            return Scored((), unscored=read.refused)
        before = [self._known.get(name) for name in names[: len(item.ends) - len(read.scores)]]
        known = [score for score in before if score is not None]
        if len(known) + len(read.scores) < len(item.ends):
            return None
        return Scored((*known, *read.scores), computed_tokens=len(item.ids) - read.num_cached)

    # ------------------------------------------------------------ vLLM

    def _run(self, items: Sequence[_Item], *, cached: bool) -> list[_Read]:
        """Run them together. `cached`: what vLLM has of their beginnings need not be run again."""
        from vllm.exceptions import VLLMClientError

        flying, found = dict[str, int](), dict[int, _Read]()
        if self._dead is not None:
            raise self._dead
        try:
            for n, item in enumerate(items):
                try:
                    flying[self._ask(item, cached=cached)] = n
                except VLLMClientError as error:
                    found[n] = _Read((), 0, refused=f"vLLM refused it: {sentence(error)}")
            while flying:
                for output in self._llm.step():
                    n = flying.pop(output.request_id, None)
                    if n is not None:  # else of a call that was interrupted
                        found[n] = self._read(items[n], output.outputs.data, output.num_cached_tokens or 0)
        except Exception as error:  # noqa: BLE001 - whatever ends vLLM
            cause = self._core.told(error)
            self._dead = EngineError(
                f"vLLM ended while it scored ({sentence(cause)}). If it had too little memory: {WORDS.memory}"
            )
            raise self._dead from cause
        return [found[n] for n in range(len(items))]

    def _ask(self, item: _Item, *, cached: bool) -> str:
        """Hand it to vLLM; its name there."""
        from vllm.inputs import tokens_input
        from vllm.pooling_params import PoolingParams

        self._num_asked += 1
        kind = "classify" if self._linear is not None else "embed"
        parameters = PoolingParams(
            task=kind if self._last_only(item) else f"token_{kind}",
            use_activation=False,
            skip_reading_prefix_cache=not cached,
        )
        self._llm.add_request(str(self._num_asked), tokens_input(list(item.ids)), parameters)
        return str(self._num_asked)

    def _last_only(self, item: _Item) -> bool:
        return len(item.ends) == 1 and not self._head.reads_tokens

    def _prove(self, ids: tuple[int, ...], expected_TX: torch.Tensor) -> None:
        """Some models that vLLM starts with end it at the first input, or come out otherwise. Raises ModelError."""
        outputs = list[torch.Tensor]()
        try:
            self._ask(_Item(ids, 1, tuple(range(len(ids)))), cached=False)
            while not outputs:
                outputs += [output.outputs.data for output in self._llm.step()]
        except Exception as error:
            raise explained(self._core.told(error), "the verifier", WORDS) from error
        found_TX = outputs[0].float().view_as(expected_TX)
        error = float((found_TX - expected_TX).norm() / (1 + expected_TX.norm()))
        if not error < TOLERANCE:
            raise ModelError(
                f"vLLM's states of the verifier are not those of transformers (off by {error:.0%}): use {WORDS.instead}"
            )

    # ------------------------------------------------------------ reading

    def _read(self, item: _Item, data: torch.Tensor, num_cached: int) -> _Read:
        """`data`: logits or states of the tokens after the cached ones, or of the last one alone."""
        start = len(item.ids) - 1 if self._last_only(item) else num_cached
        rows_TX = data.view(len(item.ids) - start, -1) if self._last_only(item) else data
        if len(rows_TX) != len(item.ids) - start:  # it was interrupted, for lack of memory, and begun again
            return _Read((), 0)
        ends = [end for end in item.ends if end >= start]
        if not ends:
            return _Read((), num_cached)
        ends_KX = rows_TX[torch.tensor(ends) - start].to(self._device)
        if self._linear is not None and isinstance(self._head, StateHead):
            return _Read(tuple(self._head.squash(ends_KX.float()).tolist()), num_cached)
        ends_KX = ends_KX.to(self._dtype)
        sums_K, counts_K = torch.zeros(len(ends)), torch.ones(len(ends))
        if self._head.reads_tokens:
            bounds = [item.num_prompt, *(end + 1 for end in item.ends)]
            before_NH = rows_TX[bounds[0] - 1 : bounds[-1] - 1].to(self._device, self._dtype)
            terms_N = self._head.terms(before_NH, torch.tensor(item.ids[bounds[0] : bounds[-1]], device=self._device))
            lengths_K = torch.tensor(np.diff(bounds))
            sums_K, counts_K = torch.segment_reduce(terms_N.cpu(), "sum", lengths=lengths_K), lengths_K.float()
        scores_K = self._head(ends_KX, sums_K.to(self._device), counts_K.to(self._device))
        return _Read(tuple(scores_K.tolist()), num_cached)


# ---------------------------------------------------------------- what vLLM loads


def save_decoder(decoder: Any, linear: nn.Linear | None, folder: Path) -> None:
    """A checkpoint of a causal language model without its output head, with a classifier `score` if there is one.

    Raises ModelError for an architecture that is none.
    """
    from safetensors.torch import save_file
    from transformers.core_model_loading import revert_weight_conversion
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    row = json.loads(decoder.config.to_json_string(use_diff=False))
    architecture = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(row["model_type"])
    if not isinstance(architecture, str):
        raise ModelError(f"vLLM runs verifiers that are causal language models, not '{row['model_type']}': use "
                         f"{WORDS.instead}")  # fmt: skip
    decoder._weight_conversions = None  # names as its class has them in files, whatever file it was loaded from
    state = revert_weight_conversion(decoder, decoder.state_dict())
    tensors = {f"{decoder.base_model_prefix}.{name}": value.contiguous() for name, value in state.items()}
    row |= {"architectures": [architecture], "dtype": str(decoder.dtype).removeprefix("torch.")}
    row |= {"head_dtype": "model"}  # states as they are
    for name in ("auto_map", "problem_type", "num_labels", "id2label", "label2id"):
        row.pop(name, None)
    if linear is not None:
        labels = {str(n): f"LABEL_{n}" for n in range(linear.out_features)}
        row |= {"head_dtype": "float32", "id2label": labels, "label2id": {name: int(n) for n, name in labels.items()}}
        tensors["score.weight"] = linear.weight.detach().float().contiguous()
        if linear.bias is not None:
            tensors["score.bias"] = linear.bias.detach().float().contiguous()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(row), encoding="utf-8")


@torch.inference_mode()
def _example(decoder: Any, linear: nn.Linear | None, max_length: int) -> tuple[tuple[int, ...], torch.Tensor]:
    """Some ids, and what vLLM is to return for them, float32 [T, X]."""
    rows = decoder.get_input_embeddings().weight.shape[0]
    ids = [n * (rows // EXAMPLE_TOKENS) for n in range(min(EXAMPLE_TOKENS, max_length))]
    states_TH = decoder(input_ids=torch.tensor([ids])).last_hidden_state[0]
    return tuple(ids), (states_TH if linear is None else linear(states_TH.to(linear.weight.dtype))).float()


def _arguments(
    settings: VerifierRuntime, folder: Path, max_length: int, classifies: bool, caches: bool
) -> dict[str, Any]:
    cpu = on_cpu()
    return {
        "model": str(folder),
        "skip_tokenizer_init": True,
        "runner": "pooling",
        "convert": "classify" if classifies else "embed",
        "load_format": "safetensors",
        "max_model_len": max_length,
        "gpu_memory_utilization": settings.gpu_memory_fraction,
        "kv_cache_memory_bytes": int(CPU_CACHE_GIB * 2**30) if cpu else None,
        "max_num_seqs": settings.max_batch_rows,
        "max_num_batched_tokens": max(min(settings.batch_tokens, MAX_STEP_TOKENS), settings.max_batch_rows),
        "block_size": CPU_BLOCK_SIZE if cpu else None,
        "enable_prefix_caching": caches,
        "enforce_eager": cpu,  # compiled is no faster there, and starts a minute later
        "disable_log_stats": True,
        "use_tqdm_on_load": False,
    }


def _size_cache(config: Any, settings: VerifierRuntime, max_length: int) -> None:
    """`cache_tokens`: blocks for these, and for the longest input beside them."""
    if settings.cache_tokens:
        size = config.cache_config.block_size or GPU_BLOCK_SIZE
        config.cache_config.num_gpu_blocks_override = math.ceil((settings.cache_tokens + max_length) / size) + 1


def _check_device(settings: VerifierRuntime) -> None:
    """Raises ConfigError for a device that this vLLM does not run on."""
    kind = "cpu" if on_cpu() else "cuda"
    if settings.device not in ("auto", kind):
        raise ConfigError(
            f"verifier.device = '{settings.device}', but with verifier.runtime = 'vllm' it is '{kind}' here: leave it "
            "out; CUDA_VISIBLE_DEVICES chooses among GPUs"
        )
