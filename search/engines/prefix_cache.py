"""Keys and values of the prefixes that a search may go on from, kept between the calls of an engine or a verifier.

Each token's keys and values fill one slot of a pool; a prefix is a list of slots, and prefixes with a common beginning
share its slots, so the forks of a tree cost their own tokens only. What was used longest ago is forgotten first, but
nothing that the call in progress has used or added. Left out: finding the common beginning of two prefixes of which
neither was kept as such (prompts with the same examples).
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

Layers = Sequence[tuple[torch.Tensor, torch.Tensor]]  # of each layer: keys and values, [rows, heads, tokens, width]
NONE = np.zeros(0, dtype=np.int64)


class _Kept(NamedTuple):
    slots: np.ndarray
    call: int  # of its last use
    note: Any


class PrefixCache:
    """Slots of `capacity` tokens. A slot is free when no kept prefix and no lease holds it."""

    def __init__(self, capacity: int) -> None:
        self._pool: list[tuple[torch.Tensor, torch.Tensor]] = []  # of each layer: [capacity, heads, width]
        self._resize(capacity)
        self._kept: OrderedDict[tuple[int, ...], _Kept] = OrderedDict()  # what was used longest ago comes first
        self._lengths = Counter[int]()
        self._leases: list[np.ndarray] = []
        self._call = 0

    def _resize(self, capacity: int) -> None:
        self.capacity = capacity
        self._holders = np.zeros(capacity, dtype=np.int32)
        self._free = list(range(capacity - 1, -1, -1))

    @property
    def written(self) -> bool:
        return bool(self._pool)

    @property
    def num_used(self) -> int:
        return self.capacity - len(self._free)

    def bound(self, layers: Layers, num_bytes: int) -> None:
        """Before anything is kept: no more slots than `num_bytes` hold of tokens like those of the layers."""
        assert not self._kept, "bounded in use"
        states = [state for pair in layers for state in pair]
        token_bytes = sum(state.shape[1] * state.shape[3] * state.element_size() for state in states)
        self._resize(min(self.capacity, num_bytes // token_bytes))

    def clear(self) -> None:
        """Forget every prefix."""
        assert not self._leases, "cleared in the middle of a call"
        self._holders[:] = 0
        self._free = list(range(self.capacity - 1, -1, -1))  # from the first on: what was written before is used again
        self._kept.clear()
        self._lengths.clear()

    # ------------------------------------------------------------ one call

    def begin(self) -> None:
        self._call += 1

    def find(self, prefix: tuple[int, ...]) -> np.ndarray:
        """Slots of the longest known part of the prefix that leaves its last token; they stay until `end`."""
        shorter = sorted((n for n, num in self._lengths.items() if num and n < len(prefix) - 1), reverse=True)
        for length in (len(prefix), len(prefix) - 1, *shorter):
            known = prefix[:length]
            if known in self._kept:
                slots = self.slots(known)[: len(prefix) - 1]
                self._holders[slots] += 1
                self._leases.append(slots)
                return slots
        return NONE

    def end(self) -> None:
        for slots in self._leases:
            self._let_go(slots)
        self._leases = []

    # ------------------------------------------------------------ prefixes

    def allocate(self, num: int) -> np.ndarray | None:
        """Slots for `num` new tokens, to be kept at once; None where the call in progress needs all there are."""
        while len(self._free) < num:
            oldest = next(iter(self._kept), None)
            if oldest is None or self._kept[oldest].call == self._call:
                return None
            self._lengths[len(oldest)] -= 1
            self._let_go(self._kept.pop(oldest).slots)
        cut = len(self._free) - num
        slots = np.array(self._free[cut:], dtype=np.int64)
        del self._free[cut:]
        return slots

    def __contains__(self, prefix: tuple[int, ...]) -> bool:
        return prefix in self._kept

    def slots(self, prefix: tuple[int, ...]) -> np.ndarray:
        """Of a prefix that is kept; it stays so until the end of the call."""
        kept = self._kept[prefix] = self._kept[prefix]._replace(call=self._call)
        self._kept.move_to_end(prefix)
        return kept.slots

    def note(self, prefix: tuple[int, ...]) -> Any:
        """What was noted of a prefix that is kept."""
        return self._kept[prefix].note

    def keep(self, prefix: tuple[int, ...], slots: np.ndarray, note: Any = None) -> None:
        """`note`: what else is known of the prefix, forgotten with it."""
        assert prefix not in self._kept, "kept twice"
        self._holders[slots] += 1
        self._kept[prefix] = _Kept(slots, self._call, note)
        self._lengths[len(prefix)] += 1

    def release(self, prefix: tuple[int, ...]) -> None:
        """The call in progress needs it no more: where room is needed it goes first."""
        self._kept[prefix] = self._kept[prefix]._replace(call=self._call - 1)
        self._kept.move_to_end(prefix, last=False)

    def _let_go(self, slots: np.ndarray) -> None:
        self._holders[slots] -= 1
        self._free += slots[self._holders[slots] == 0].tolist()

    # ------------------------------------------------------------ keys and values

    def write(self, layers: Layers, rows: Sequence[int], columns: Sequence[int], slots: Sequence[int]) -> None:
        """Copy the keys and values of tokens (row, column) into slots."""
        device = layers[0][0].device
        row, column, slot = (torch.tensor(index, device=device) for index in (rows, columns, slots))
        if not self._pool:
            self._pool = [(_pool(keys, self.capacity), _pool(values, self.capacity)) for keys, values in layers]
        for pools, states in zip(self._pool, layers, strict=True):
            for pool, state in zip(pools, states, strict=True):
                pool.index_copy_(0, slot, state[row, :, column])

    def read(self, prefixes: Sequence[np.ndarray]) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Of each layer the keys and values of prefixes given as slots, left-padded: [rows, heads, longest, width]."""
        longest = max(len(slots) for slots in prefixes)
        written = next(slots[0] for slots in prefixes if len(slots))  # what pads is masked out, but nan times 0 is nan
        padded = np.full((len(prefixes), longest), written, dtype=np.int64)
        for row, slots in zip(padded, prefixes, strict=True):
            row[longest - len(slots) :] = slots
        index = torch.from_numpy(padded.ravel()).to(self._pool[0][0].device)

        def gathered(pool: torch.Tensor) -> torch.Tensor:
            return pool.index_select(0, index).view(len(prefixes), longest, *pool.shape[1:]).transpose(1, 2)

        return [(gathered(keys), gathered(values)) for keys, values in self._pool]


def _pool(states: torch.Tensor, capacity: int) -> torch.Tensor:
    """On a CPU memory is taken as slots are written."""
    _, heads, _, width = states.shape
    return states.new_empty(capacity, heads, width)
