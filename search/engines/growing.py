"""What every runtime that keeps keys and values shares: caches that grow in place, filled from and written into the
pool of kept prefixes (prefix_cache.py)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from transformers.cache_utils import DynamicCache, DynamicLayer

from search.engines.prefix_cache import PrefixCache

CPU_CACHE_BYTES = 1 << 30  # a process: countdown's 262,144 tokens take 600 MB of it
GPU_CACHE_SHARE = 0.25  # of the memory left beside the model and the first batch: what runs needs the rest


def cache_bytes(device: torch.device) -> int:
    """The memory there is for kept prefixes."""
    if device.type != "cuda":
        return CPU_CACHE_BYTES
    free, _ = torch.cuda.mem_get_info(device)
    return int(GPU_CACHE_SHARE * free)


def all_grow(config: Any) -> bool:
    """Whether the model's layers are all plain attention: of others no part can be taken from a pool."""
    return all(type(layer) is GrowingLayer for layer in growing_cache(config, 0).layers)


def growing_cache(config: Any, room: int) -> DynamicCache:
    """A cache whose plain attention layers grow in place; sliding windows and the like stay the library's."""
    cache = DynamicCache(config=config)
    cache.layers = [GrowingLayer(room) if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache


def cache_after(config: Any, store: PrefixCache, known: Sequence[np.ndarray], room: int) -> DynamicCache:
    """A growing cache that begins with the known prefixes of a batch (slots of `store`), left-padded."""
    cache = growing_cache(config, room)
    if any(len(slots) for slots in known):
        for layer, (keys, values) in enumerate(store.read(known)):
            cache.update(keys, values, layer)
    return cache


class GrowingLayer(DynamicLayer):
    """Keys and values written into one buffer with room for the whole answer, instead of copied at every token."""

    def __init__(self, room: int) -> None:
        super().__init__()
        self.room = room
        self.buffers: tuple[torch.Tensor, torch.Tensor] | None = None

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *_: Any, **__: Any) -> Any:
        held = 0 if self.buffers is None else self.get_seq_length()
        total = held + key_states.shape[-2]
        if self.buffers is None or total > self.buffers[0].shape[-2]:
            if self.buffers is None:
                self.lazy_initialization(key_states, value_states)
            self.buffers = (
                self._enlarged(self.keys, key_states, total),
                self._enlarged(self.values, value_states, total),
            )
        for buffer, states in zip(self.buffers, (key_states, value_states), strict=True):
            buffer[..., held:total, :] = states
        self.keys, self.values = (buffer[..., :total, :] for buffer in self.buffers)
        return self.keys, self.values

    def _enlarged(self, old: torch.Tensor | None, like: torch.Tensor, total: int) -> torch.Tensor:
        batch, heads, _, width = like.shape
        buffer = like.new_empty(batch, heads, total + self.room, width)
        if old is not None and old.numel():
            buffer[..., : old.shape[-2], :] = old
        return buffer

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        if self.buffers is None:
            return
        held = self.get_seq_length()
        fresh: list[torch.Tensor] = []
        for buffer in self.buffers:
            chosen = buffer.new_empty(len(indices), *buffer.shape[1:])
            chosen[..., :held, :] = buffer[..., :held, :].index_select(0, indices)
            fresh.append(chosen)
        self.buffers = (fresh[0], fresh[1])
        self.keys, self.values = (buffer[..., :held, :] for buffer in self.buffers)


class Writing:
    """Prefixes on their way from a batch into the pool, written together."""

    def __init__(self, store: PrefixCache, cache: DynamicCache) -> None:
        self._store = store
        self._cache = cache
        self._tokens: tuple[list[int], list[int], list[int]] = ([], [], [])  # rows, columns, slots
        self._prefixes: dict[tuple[int, ...], tuple[np.ndarray, Any]] = {}

    def __contains__(self, prefix: tuple[int, ...]) -> bool:
        return prefix in self._prefixes

    def name(self, prefix: tuple[int, ...], slots: np.ndarray, note: Any = None) -> None:
        """A prefix that lies in `slots`, written or being written; `note`: what else is known of it."""
        self._prefixes[prefix] = (slots, note)

    def add(self, row: int, first_column: int, fresh: np.ndarray, prefix: tuple[int, ...], slots: np.ndarray) -> None:
        """The tokens of a row from a column on go into `fresh` slots; the prefix lies in `slots`."""
        self.copy(row, first_column, fresh)
        self.name(prefix, slots)

    def copy(self, row: int, first_column: int, fresh: np.ndarray) -> None:
        """The tokens of a row from a column on go into `fresh` slots."""
        rows, columns, written = self._tokens
        rows += [row] * len(fresh)
        columns += range(first_column, first_column + len(fresh))
        written += fresh.tolist()

    def finish(self) -> None:
        layers: Any = self._cache.layers
        if self._tokens[0]:
            self._store.write([(layer.keys, layer.values) for layer in layers], *self._tokens)
        for prefix, (slots, note) in self._prefixes.items():
            self._store.keep(prefix, slots, note)
