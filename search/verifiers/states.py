"""Runs a verifier's decoder over what a layout encoded, and reads the scores at the ends of steps.

Inputs are sorted by what is new in them and padded on the right, so that a causal decoder needs no mask for the
padding; what follows the last end is never run. The keys and values of prompts that several candidates share, and of
steps that longer candidates may go on from, are kept with the scores read so far: a candidate that grew by a step costs
that step, and forks of a tree share what they have in common. Left out: sharing between whole answers that were never
scored step by step, beyond their prompts.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np
import torch

from configs.schema import VerifierRuntime
from search.engines.growing import Writing, all_grow, cache_after, cache_bytes, growing_cache
from search.engines.prefix_cache import NONE, PrefixCache
from search.types import Scored
from search.verifiers.heads import Head
from search.verifiers.layout import Encoded

WASTE = 1.1  # a batch that computes this many times its tokens, for padding, is cut where lengths change
WORTH_TOKENS = 1024  # unless it is smaller: a pass has its own price
CPU_TOKENS = 2048  # of one pass on a CPU: what a layer hands to the next should stay in the processor's cache


class _Note(NamedTuple):
    """What is known of a kept prefix besides its keys and values."""

    num_prompt: int
    scores: dict[int, float]  # by the end they were read at
    state: torch.Tensor | None  # at its last token, where heads read tokens


@dataclass(frozen=True, slots=True)
class _Item:
    """One input, up to its last end. `slots`, `scores` and `state` are what is known of its beginning."""

    ids: tuple[int, ...]
    num_prompt: int
    ends: tuple[int, ...]
    keep: bool
    slots: np.ndarray = field(default_factory=lambda: NONE)
    scores: tuple[float, ...] = ()
    state: torch.Tensor | None = None

    @property
    def num_new(self) -> int:
        return len(self.ids) - len(self.slots)

    @property
    def prompt(self) -> tuple[int, ...]:
        return self.ids[: self.num_prompt]

    @property
    def bounds(self) -> list[int]:
        """Lengths of the prefixes that others may begin with: the prompt, and every step's end."""
        return [self.num_prompt, *(end + 1 for end in self.ends)]

    def unknown(self) -> _Item:
        return replace(self, slots=NONE, scores=(), state=None)


class StateScorer:
    """Scores Encoded inputs with a decoder and a head: how transformers runs every verifier.

    `decoder`: a transformers model without its head, on its device, in evaluation mode: its last_hidden_state is what
    the head reads. `max_length`: its context in tokens. `causal`: a state depends on what is before it alone; without,
    nothing is reused and all of the input is run.
    """

    def __init__(
        self, decoder: Any, head: Head, settings: VerifierRuntime, *, max_length: int, causal: bool = True
    ) -> None:
        assert causal or not head.reads_tokens, "the log-probability of a token needs a causal model"
        self._decoder = decoder
        self._head = head
        self._settings = settings
        self._max_length = max_length
        self._causal = causal
        self._device = next(decoder.parameters()).device
        room = settings.batch_tokens if settings.cache_tokens is None else settings.cache_tokens
        self._cache = PrefixCache(room if causal and all_grow(decoder.config) else 0)
        self._bounded = settings.cache_tokens is not None

    @property
    def cache(self) -> PrefixCache:
        return self._cache

    def reset(self) -> None:
        """Forget what earlier calls computed, so that the next ones do not depend on them, not even in rounding."""
        self._cache.clear()

    def close(self) -> None:
        self.reset()

    # ------------------------------------------------------------ one call

    @torch.inference_mode()
    def score(self, inputs: Sequence[Encoded], keep: bool | Sequence[bool] = False) -> list[Scored]:
        """One Scored an input, in order, with a score at each of its ends. `keep`: longer ones may follow.

        What begins with steps of an earlier call is kept too: others may go on from its steps, as after a look-ahead.
        One that cannot be run, longer than the context say, is `unscored`, with the reason.
        """
        kept = [keep] * len(inputs) if isinstance(keep, bool) else keep
        limits: Any = {"reads_tokens": self._head.reads_tokens, "max_length": self._max_length, "causal": self._causal}
        refused = {row: reason for row, one in enumerate(inputs) if (reason := one.refusal(**limits))}
        rows_of: dict[tuple[tuple[int, ...], tuple[int, ...]], list[int]] = {}
        for row, one in enumerate(inputs):
            if row not in refused:
                rows_of.setdefault((one.ids, one.ends), []).append(row)
        items = [self._item(inputs[rows[0]], keep=any(kept[row] for row in rows)) for rows in rows_of.values()]
        found = self._score_items(items)
        results = {row: Scored((), len(inputs[row].ids), unscored=reason) for row, reason in refused.items()}
        for item, one, rows in zip(items, found, rows_of.values(), strict=True):
            for row in rows:
                computed = one.computed_tokens if row == rows[0] else 0
                results[row] = replace(
                    one, tokens=len(item.ids), prompt_tokens=inputs[row].num_prompt, computed_tokens=computed
                )
        return [results[row] for row in range(len(inputs))]

    def _item(self, one: Encoded, *, keep: bool) -> _Item:
        num_prompt = min(one.num_prompt, one.ends[0])  # a score inside the prompt is no part of what is shared
        return _Item(one.ids[: one.run_length(causal=self._causal)], num_prompt, one.ends, keep and self._causal)

    def _score_items(self, items: Sequence[_Item]) -> list[Scored]:
        if items and not self._bounded:
            self._bound()
        found: dict[int, Scored] = {}
        self._cache.begin()
        try:
            known = [self._known(item) for item in items]
            for window in self._windows(known):
                prompts = self._shared_prompts([known[i] for i in window])
                charged = self._run_prompts(prompts)
                for i in window:
                    known[i] = self._known(known[i]) if known[i].prompt in prompts else known[i]
                for batch in self._batches(window, known):
                    found |= self._run(batch, {i: known[i] for i in batch})
                for i in window:
                    extra = charged.pop(known[i].prompt, 0)
                    found[i] = replace(found[i], computed_tokens=found[i].computed_tokens + extra)
                self._release(prompts, [known[i] for i in window])
        finally:
            self._cache.end()
        return [found[i] for i in range(len(items))]

    def _bound(self) -> None:
        """The cache gets no more memory than there is for it. One token tells what a token takes."""
        if self._cache.capacity:
            cache: Any = growing_cache(self._decoder.config, room=1)
            self._decoder(input_ids=torch.zeros(1, 1, dtype=torch.long, device=self._device), past_key_values=cache)
            self._cache.bound([(layer.keys, layer.values) for layer in cache.layers], cache_bytes(self._device))
        self._bounded = True

    def _known(self, item: _Item) -> _Item:
        """The item with the longest known part of it; kept where that holds steps, since a tree is searched then."""
        for bound in reversed(item.bounds):
            prefix = item.ids[:bound]
            if prefix in self._cache:
                note: _Note = self._cache.note(prefix)
                inside = [end for end in item.ends if end < bound]
                if note.num_prompt == item.num_prompt and set(note.scores) == set(inside):
                    scores = tuple(note.scores[end] for end in inside)
                    slots, keep = self._cache.slots(prefix), item.keep or bound > item.num_prompt
                    return replace(item, slots=slots, scores=scores, state=note.state, keep=keep)
        return item

    # ------------------------------------------------------------ prompts that several share

    def _windows(self, items: Sequence[_Item]) -> Iterator[list[int]]:
        """Items, by number, whose new shared prompts fit into half of the cache together: steps need the rest."""
        shared = self._shared_prompts(items)
        room = self._cache.capacity // 2
        by_prompt: dict[tuple[int, ...], list[int]] = {}
        for i, item in enumerate(items):
            by_prompt.setdefault(item.prompt if item.prompt in shared else (), []).append(i)
        window, used = by_prompt.pop((), []), 0
        for prompt, rows in by_prompt.items():
            if window and used + len(prompt) > room:
                yield window
                window, used = [], 0
            window, used = window + rows, used + len(prompt)
        if window:
            yield window

    def _shared_prompts(self, items: Sequence[_Item]) -> dict[tuple[int, ...], None]:
        """Unknown prompts that two or more items begin with, and that the cache could hold."""
        times: dict[tuple[int, ...], int] = {}
        for item in items:
            if not len(item.slots) and 0 < item.num_prompt <= self._cache.capacity // 2:
                times[item.prompt] = times.get(item.prompt, 0) + 1
        return {prompt: None for prompt, num in times.items() if num > 1}

    def _run_prompts(self, prompts: Mapping[tuple[int, ...], None]) -> dict[tuple[int, ...], int]:
        """Keep them; the tokens that each took."""
        items = [_Item(prompt, len(prompt), (), keep=True) for prompt in prompts]
        charged: dict[tuple[int, ...], int] = {}
        for batch in self._batches(range(len(items)), items):
            found = self._run(batch, {i: items[i] for i in batch})
            charged |= {items[i].ids: scored.computed_tokens for i, scored in found.items()}
        return charged

    def _release(self, prompts: Mapping[tuple[int, ...], None], items: Sequence[_Item]) -> None:
        """What whole answers alone began with may make room for the next."""
        going_on = {item.prompt for item in items if item.keep}
        for prompt in prompts:
            if prompt in self._cache and prompt not in going_on:
                self._cache.release(prompt)

    # ------------------------------------------------------------ one batch

    def _batches(self, numbers: Sequence[int], items: Sequence[_Item]) -> Iterator[list[int]]:
        """Numbers of items that are run together: alike in length, within the limits of rows and tokens."""
        settings, batch, total, longest = self._settings, list[int](), 0, 0
        limit = CPU_TOKENS if self._device.type == "cpu" else settings.batch_tokens
        for i in sorted(numbers, key=lambda i: (items[i].num_new, len(items[i].slots))):
            num, longest = items[i].num_new, max(longest, len(items[i].ids))
            most = min(settings.max_batch_rows, settings.batch_tokens // longest)
            padded = num * (len(batch) + 1)
            wasteful = total >= WORTH_TOKENS and padded > WASTE * (total + num)
            if batch and (len(batch) >= most or padded > limit or wasteful):
                yield batch
                batch, total, longest = [], 0, len(items[i].ids)
            batch.append(i)
            total += num
        if batch:
            yield batch

    def _run(self, numbers: Sequence[int], items: Mapping[int, _Item]) -> dict[int, Scored]:
        """Run a batch; where a GPU has too little memory for it, its halves, or a single row without the cache."""
        chosen = [items[i] if self._cache.capacity else items[i].unknown() for i in numbers]
        try:
            return dict(zip(numbers, self._forward(chosen), strict=True))
        except torch.cuda.OutOfMemoryError:
            if len(numbers) == 1 and not self._cache.capacity:
                reason = f"the GPU has no memory for its {len(chosen[0].ids)} tokens"
                return {numbers[0]: Scored((), unscored=reason)}
        self._cache = PrefixCache(0)  # a full GPU needs the room for what runs
        torch.cuda.empty_cache()
        half = max(1, len(numbers) // 2)
        found: dict[int, Scored] = {}
        for part in (numbers[:half], numbers[half:]):
            found |= self._run(part, items) if part else {}
        return found

    def _forward(self, batch: Sequence[_Item]) -> list[Scored]:
        keeping = _Keeping(self._cache, batch)
        rows = [row for row, item in enumerate(batch) if item.num_new and (item.ends or row in keeping.slots)]
        if not rows:
            return [Scored(item.scores) for item in batch]
        running = [batch[row] for row in rows]
        cache = None
        if keeping.slots or any(len(item.slots) for item in running):
            longest = max(item.num_new for item in running)
            cache = cache_after(self._decoder.config, self._cache, [item.slots for item in running], longest)
        states = self._decoder(**self._inputs(running), past_key_values=cache, use_cache=cache is not None)
        states_BTH = states.last_hidden_state
        scores = dict(zip(rows, self._read(running, states_BTH), strict=True))
        if cache is not None:
            keeping.write(cache, states_BTH if self._head.reads_tokens else None, rows, scores)
        return [
            Scored(scores[row], computed_tokens=item.num_new) if row in scores else Scored(item.scores)
            for row, item in enumerate(batch)
        ]

    def _inputs(self, batch: Sequence[_Item]) -> dict[str, torch.Tensor]:
        """What is new, padded on the right, after what is known, padded on the left. Masks only where they matter."""
        longest, device = max(item.num_new for item in batch), self._device
        ids = np.zeros((len(batch), longest), dtype=np.int64)
        for row, item in zip(ids, batch, strict=True):
            row[: item.num_new] = item.ids[len(item.slots) :]
        inputs = {"input_ids": torch.from_numpy(ids).to(device)}
        known = torch.tensor([len(item.slots) for item in batch], device=device)
        if not self._causal:
            new = torch.tensor([item.num_new for item in batch], device=device)
            inputs["attention_mask"] = (torch.arange(longest, device=device)[None] < new[:, None]).long()
        elif len({len(item.slots) for item in batch}) > 1:
            most = max(len(item.slots) for item in batch)
            seen = torch.arange(most, device=device)[None] >= most - known[:, None]
            inputs["attention_mask"] = torch.cat([seen, seen.new_ones(len(batch), longest)], 1).long()
            positions = known[:, None] + torch.arange(longest, device=device)[None]
            inputs["position_ids"] = positions.clamp(max=self._max_length - 1)  # of padding: it is never read
        return inputs

    # ------------------------------------------------------------ reading

    def _read(self, batch: Sequence[_Item], states_BTH: torch.Tensor) -> list[tuple[float, ...]]:
        """The scores at all ends of each item."""
        new = [[(row, end) for end in item.ends[len(item.scores) :]] for row, item in enumerate(batch)]
        places = [place for ends in new for place in ends]
        if not places:
            return [item.scores for item in batch]
        columns = [end - len(batch[row].slots) for row, end in places]
        ends_KH = states_BTH[self._index([row for row, _ in places]), self._index(columns)]
        sums, counts = torch.zeros(len(places), device=self._device), torch.ones(len(places), device=self._device)
        if self._head.reads_tokens:
            sums, counts = self._token_sums(batch, states_BTH)
        scores = iter(self._head(ends_KH, sums, counts).tolist())
        return [(*item.scores, *(next(scores) for _ in ends)) for item, ends in zip(batch, new, strict=True)]

    def _token_sums(self, batch: Sequence[_Item], states_BTH: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Of each new step the sum of its tokens' terms, and their number."""
        lengths: list[int] = []
        rows, columns = list[np.ndarray](), list[np.ndarray]()
        ids: list[int] = []
        for row, item in enumerate(batch):
            start = max(item.num_prompt, len(item.slots))
            bounds = [start, *(end + 1 for end in item.ends[len(item.scores) :])]
            lengths += np.diff(bounds).tolist()
            columns.append(np.arange(start, bounds[-1]) - len(item.slots))
            rows.append(np.full(len(columns[-1]), row))
            ids += item.ids[start : bounds[-1]]
        row_N, column_N = np.concatenate(rows), np.concatenate(columns)
        before_NH = states_BTH[self._index(row_N), self._index(np.maximum(column_N - 1, 0))]
        if len(first := np.flatnonzero(column_N == 0)):  # what was before them was run earlier
            states = [state for r in row_N[first] if (state := batch[r].state) is not None]
            before_NH[self._index(first)] = torch.stack(states)
        terms_N = self._head.terms(before_NH, self._index(ids))
        counts_K = self._index(lengths)
        return torch.segment_reduce(terms_N, "sum", lengths=counts_K), counts_K.float()

    def _index(self, values: Sequence[int] | np.ndarray) -> torch.Tensor:
        return torch.as_tensor(np.asarray(values, dtype=np.int64)).to(self._device)


class _Keeping:
    """The items of a batch that are kept; `slots`, by row: where, known and fresh ones."""

    def __init__(self, store: PrefixCache, batch: Sequence[_Item]) -> None:
        self._store = store
        self._batch = batch
        self.slots: dict[int, np.ndarray] = {}
        coming = set[tuple[int, ...]]()
        for row, item in enumerate(batch):
            if not item.keep or not item.num_new or item.ids in store or item.ids in coming:
                continue
            fresh = store.allocate(item.num_new)
            if fresh is None:
                break
            self.slots[row] = np.concatenate([item.slots, fresh])
            coming |= {item.ids[:bound] for bound in item.bounds}

    def write(
        self,
        cache: Any,
        states_BTH: torch.Tensor | None,
        rows: Sequence[int],
        scores: Mapping[int, tuple[float, ...]],
    ) -> None:
        """After the pass over `rows` of the batch. `states_BTH`: theirs, where the last of each prefix is needed."""
        writing = Writing(self._store, cache)
        most = max(len(self._batch[row].slots) for row in rows)
        named: dict[tuple[int, ...], tuple[int, int]] = {}  # prefix to its row and length
        for place, row in enumerate(rows):
            if row not in self.slots:
                continue
            item, slots = self._batch[row], self.slots[row]
            writing.copy(place, most, slots[len(item.slots) :])
            for bound in item.bounds:
                if bound > len(item.slots) and (prefix := item.ids[:bound]) not in self._store:
                    named.setdefault(prefix, (place, bound))
        states = self._last_states(states_BTH, rows, list(named.values()))
        for number, (prefix, (place, bound)) in enumerate(named.items()):
            row = rows[place]
            item = self._batch[row]
            inside = {end: score for end, score in zip(item.ends, scores[row], strict=True) if end < bound}
            note = _Note(item.num_prompt, inside, None if states is None else states[number])
            writing.name(prefix, self.slots[row][:bound], note)
        writing.finish()

    def _last_states(
        self, states_BTH: torch.Tensor | None, rows: Sequence[int], places: Sequence[tuple[int, int]]
    ) -> torch.Tensor | None:
        if states_BTH is None or not places:
            return None
        columns = [bound - 1 - len(self._batch[rows[place]].slots) for place, bound in places]
        return states_BTH[[place for place, _ in places], columns]
