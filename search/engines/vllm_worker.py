"""What Ratchet runs inside vLLM's own processes: how tokens are drawn, and the end that follows the parent's.

Token t of a request is drawn at uniform(key, absolute position), as everywhere. vLLM has two kinds of workers. On CPUs
(its model runner V1) a request's own seed is a stateful generator: a sample cut into steps would not be the sample
drawn whole, and a long prompt computed in parts ends the engine. `Draws` replaces it: it draws the token by inverting
the cumulative distribution and leaves only that token possible, and vLLM, told to be greedy, takes it. On GPUs (model
runner V2) vLLM's own seeds count by position already; there `Mask` only keeps ids that are no tokens from being drawn.
"""

# pyright: reportMissingImports=false
from __future__ import annotations

import ctypes
import logging
import math
import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch
from vllm.v1.executor.multiproc_executor import MultiprocExecutor
from vllm.v1.executor.uniproc_executor import UniProcExecutor
from vllm.v1.sample.logits_processor import BatchUpdate, LogitsProcessor, MoveDirectionality
from vllm.v1.worker.gpu.sample.logits_processor import LogitsProcessor as LogitsProcessorV2

from search.engines.drawing import draw, signed, uniform

# In vLLM's additional_config: ids below the first are tokens; a core in its own process serves the process PARENT and
# writes why it ends into the file DIARY.
NUM_TOKENS, PARENT, DIARY = "ratchet_num_tokens", "ratchet_parent", "ratchet_diary"
KEY, TEMPERATURE = "ratchet_key", "ratchet_temperature"  # in a request's extra_args


class Draws(LogitsProcessor):
    """Rows of the batch with a key are drawn here; the others are greedy."""

    def __init__(self, vllm_config: Any, device: torch.device, is_pin_memory: bool) -> None:
        self._num_tokens = int(vllm_config.additional_config[NUM_TOKENS])
        self._device = device
        self._rows: dict[int, tuple[int, float, int, list[int]]] = {}  # key, temperature, prefix length, new ids
        self._order: list[int] = []
        self._keys = self._temperatures = self._indices = torch.empty(0)

    def is_argmax_invariant(self) -> bool:
        return False

    def update_state(self, batch_update: BatchUpdate | None) -> None:
        """Follow requests that enter, leave and move between rows of the batch."""
        if batch_update is None:
            return
        for row in batch_update.removed:
            self._rows.pop(row, None)
        for row, params, prompt, output in batch_update.added:
            self._rows.pop(row, None)
            extra = params.extra_args or {}
            if KEY in extra:
                self._rows[row] = (signed(extra[KEY]), extra[TEMPERATURE], len(prompt or ()), output)
        for source, target, direction in batch_update.moved:
            moved, replaced = self._rows.pop(source, None), self._rows.pop(target, None)
            if moved is not None:
                self._rows[target] = moved
            if replaced is not None and direction is MoveDirectionality.SWAP:
                self._rows[source] = replaced
        self._order = sorted(self._rows)
        known = [self._rows[row] for row in self._order]
        self._indices = torch.tensor(self._order, dtype=torch.long, device=self._device)
        self._keys = torch.tensor([row[0] for row in known], dtype=torch.long, device=self._device)
        self._temperatures = torch.tensor([row[1] for row in known], dtype=torch.float32, device=self._device)

    def apply(self, logits: torch.Tensor) -> torch.Tensor:
        """Float32 [rows, vocabulary], changed in place."""
        if logits.shape[1] > self._num_tokens:
            logits[:, self._num_tokens :] = -math.inf
        if not self._order:
            return logits
        known = (self._rows[row] for row in self._order)
        positions = torch.tensor([prefix + len(output) for _, _, prefix, output in known], device=self._device)
        everything = len(self._order) == logits.shape[0]
        scores = logits if everything else logits[self._indices]
        tokens = draw(scores, self._temperatures, uniform(self._keys, positions))
        logits.index_fill_(0, self._indices, -math.inf)
        logits[self._indices, tokens] = 0.0
        return logits


class Mask(LogitsProcessorV2):
    """For vLLM's model runner V2."""

    def __init__(self, vllm_config: Any, req_states: Any) -> None:
        self._num_tokens = int(vllm_config.additional_config[NUM_TOKENS])

    def apply(self, logits: torch.Tensor, ctx: Any) -> torch.Tensor:
        logits[:, self._num_tokens :] = -math.inf
        return logits


# ---------------------------------------------------------------- the core's own process


class _Mortal:
    """An executor of a core that the kernel kills when its parent ends (Linux); vLLM's own would live on for ever.

    And one that says why it ends: vLLM tells its parent to look into the log.
    """

    vllm_config: Any

    def _init_executor(self) -> None:
        told = self.vllm_config.additional_config
        logging.getLogger("vllm").addHandler(_Diary(Path(told[DIARY])))
        if sys.platform == "linux":
            ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, ctypes.c_ulong(signal.SIGKILL), 0, 0, 0)
            if os.getppid() != told[PARENT]:
                os._exit(137)
        super()._init_executor()  # pyright: ignore[reportAttributeAccessIssue]


class _Diary(logging.Handler):
    """Keeps the first exception that is logged: the cause of the others."""

    def __init__(self, path: Path) -> None:
        super().__init__(logging.ERROR)
        self._path = path

    def emit(self, record: logging.LogRecord) -> None:
        error = record.exc_info[1] if record.exc_info else None
        if error is not None and not self._path.stat().st_size:
            self._path.write_text(str(error) or type(error).__name__, encoding="utf-8")


class OneWorker(_Mortal, UniProcExecutor):
    """One GPU: the worker is the core's process."""


class Workers(_Mortal, MultiprocExecutor):
    """A process a GPU; they end with the core."""


_PR_SET_PDEATHSIG = 1
