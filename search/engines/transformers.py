"""The transformers engine: any Hugging Face causal language model or LoRA adapter folder, sampled by an own loop.

Requests are sorted by prefix length and batched; requests with the same prefix share its prefill; rows that finished
leave the batch. Token t of a request is drawn by inverting the cumulative distribution at uniform(key, position), so
it depends on the request alone, never on its neighbours (up to rounding: batches of another shape may round
differently). The keys and values of steps that a search may go on from are kept for its next call. Left out: refilling
a running batch, top-p.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers.cache_utils import DynamicCache

from configs.schema import Model
from configs.schema import TransformersEngine as EngineSettings
from search.engines.drawing import draw, signed, uniform
from search.engines.growing import Writing, all_grow, cache_after, cache_bytes
from search.engines.loading import Loaded, load_model
from search.engines.prefix_cache import NONE, PrefixCache
from search.engines.stopping import CERTAIN, POSSIBLE, StopTable
from search.types import Capabilities, Continuation, Finish, Request

SHRINK_BELOW = 0.8  # rows leave the batch once this share is still running: copying the cache has a price too
CUT_AT = 0.25  # a batch this full ends where the prefix length changes: equal lengths need no padding


@dataclass(frozen=True, slots=True)
class _Group:
    """Requests that share a prefix; `rows` index the call's requests, `known` the cache: its tokens come first."""

    prefix: tuple[int, ...]
    rows: tuple[int, ...]
    known: np.ndarray

    @property
    def num_new(self) -> int:
        return len(self.prefix) - len(self.known)


class TransformersEngine:
    """Implements search.types.Engine.

    Raises ModelError where the model cannot be loaded; see `search.engines.loading.load_model`.
    """

    def __init__(self, model_dir: Path | str, engine: EngineSettings, model: Model, threads: int | None = None) -> None:
        if threads is not None:
            torch.set_num_threads(threads)
        loaded: Loaded = load_model(model_dir, model, device=engine.device)
        self.capabilities = Capabilities(
            token_ids=True, seeds=True, logprobs=True, prefix_cache=True, hidden_states=True
        )
        self.facts = loaded.facts
        self.tokenizer = loaded.tokenizer
        self._engine = engine
        self._model: Any = loaded.model
        self._device = loaded.device
        self._vocab_size = loaded.vocab_size
        self._stops = StopTable(loaded.tokenizer, loaded.vocab_size, loaded.eos_ids, loaded.device)
        room = engine.batch_tokens if engine.cache_tokens is None else engine.cache_tokens
        self._cache = PrefixCache(room if all_grow(loaded.model.config) else 0)

    def close(self) -> None:
        self._model = None
        self._cache = PrefixCache(0)

    # ------------------------------------------------------------ generation

    @torch.inference_mode()
    def extend(self, requests: Sequence[Request]) -> list[Continuation]:
        """One continuation a request, in order. A prefix that fills the context: OVERFLOW; an unusable one: ERROR."""
        assert self._model is not None, "the engine was closed"
        results: dict[int, Continuation] = {}
        by_prefix: dict[tuple[int, ...], list[int]] = {}
        for row, request in enumerate(requests):
            refused = self._refuse(request)
            if refused is not None:
                results[row] = Continuation((), refused)
            else:
                by_prefix.setdefault(request.prefix, []).append(row)
        self._cache.begin()
        try:
            groups = [_Group(prefix, tuple(rows), self._cache.find(prefix)) for prefix, rows in by_prefix.items()]
            groups.sort(key=lambda group: (group.num_new, len(group.prefix)))
            for batch in self._batches(groups, requests):
                self._run(batch, requests, results)
        finally:
            self._cache.end()
        return [results[row] for row in range(len(requests))]

    def reset(self) -> None:
        """Forget what earlier calls computed, so that the next ones do not depend on them, not even in rounding."""
        self._cache.clear()

    def _refuse(self, request: Request) -> Finish | None:
        if len(request.prefix) >= self.facts.max_length:
            return Finish.OVERFLOW
        if not request.prefix or min(request.prefix) < 0 or max(request.prefix) >= self._vocab_size:
            return Finish.ERROR
        return Finish.LENGTH if request.max_new_tokens < 1 else None

    def _batches(self, groups: Sequence[_Group], requests: Sequence[Request]) -> Iterator[list[_Group]]:
        """Groups cut into batches within the row and token limits; a group too large for one is split."""
        batch: list[_Group] = []
        num_rows = longest = 0
        for group in groups:
            room = max(requests[row].max_new_tokens for row in group.rows)
            needed = min(len(group.prefix) + room, self.facts.max_length)
            most = max(1, min(self._engine.max_batch_rows, self._engine.batch_tokens // max(longest, needed)))
            changed = bool(batch) and len(batch[-1].prefix) != len(group.prefix)
            uneven = bool(batch) and batch[-1].num_new * 2 < group.num_new
            if batch and (num_rows + len(group.rows) > most or uneven or (changed and num_rows >= CUT_AT * most)):
                yield batch
                batch, num_rows, longest = [], 0, 0
                most = max(1, min(self._engine.max_batch_rows, self._engine.batch_tokens // needed))
            for start in range(0, len(group.rows), most):
                if batch and num_rows + len(group.rows) - start > most:
                    yield batch
                    batch, num_rows, longest = [], 0, 0
                rows = group.rows[start : start + most]
                batch.append(_Group(group.prefix, rows, group.known))
                num_rows, longest = num_rows + len(rows), max(longest, needed)
        if batch:
            yield batch

    def _run(self, batch: list[_Group], requests: Sequence[Request], results: dict[int, Continuation]) -> None:
        """Run a batch; where a GPU has too little memory for it, its halves, or a single row without the cache."""
        if not self._cache.capacity:
            batch = [replace(group, known=NONE) for group in batch]
        num_rows = sum(len(group.rows) for group in batch)
        try:
            results |= _Decoding(self, batch, requests).run()
            return
        except torch.cuda.OutOfMemoryError:
            if num_rows == 1 and not self._cache.capacity:
                results[batch[0].rows[0]] = Continuation((), Finish.ERROR)
                return
        self._cache = PrefixCache(0)  # a full GPU needs the room for what runs
        torch.cuda.empty_cache()
        single = [_Group(group.prefix, (row,), group.known) for group in batch for row in group.rows]
        for half in (single[: num_rows // 2], single[num_rows // 2 :]):
            if half:
                self._run(half, requests, results)

    def bound_cache(self, cache: DynamicCache) -> None:
        """Before the first write: the cache gets no more memory than there is for it, unless its size was set."""
        if self._engine.cache_tokens is None and not self._cache.written:
            layers: Any = cache.layers
            self._cache.bound([(layer.keys, layer.values) for layer in layers], cache_bytes(self._device))

    # ------------------------------------------------------------ hidden states

    @torch.inference_mode()
    def hidden_states(self, prefixes: Sequence[Sequence[int]]) -> np.ndarray:
        """Float32 [P, layers + 1, 2, hidden]: each layer's states at the last token, and their mean over all tokens."""
        assert self._model is not None, "the engine was closed"
        order = sorted(range(len(prefixes)), key=lambda i: len(prefixes[i]))
        found: dict[int, np.ndarray] = {}
        longest = max((len(prefix) for prefix in prefixes), default=1)
        size = max(1, min(self._engine.max_batch_rows, self._engine.batch_tokens // (4 * longest)))
        for start in range(0, len(order), size):
            rows = order[start : start + size]
            ids, mask = self.pad([prefixes[i] for i in rows])
            positions = (mask.cumsum(-1) - 1).clamp(min=0)
            output = self._model(input_ids=ids, attention_mask=mask, position_ids=positions, output_hidden_states=True)
            weights = (mask / mask.sum(-1, keepdim=True))[:, :, None].float()
            pooled = [torch.stack([h[:, -1].float(), (h.float() * weights).sum(1)], 1) for h in output.hidden_states]
            states = torch.stack(pooled, 1).cpu().numpy()
            found |= {row: states[i] for i, row in enumerate(rows)}
        return np.stack([found[i] for i in range(len(prefixes))])

    def pad(self, prefixes: Sequence[Sequence[int]]) -> tuple[torch.Tensor, torch.Tensor]:
        """Left-padded ids and their mask, both [rows, longest]."""
        longest = max(len(prefix) for prefix in prefixes)
        pad = self._stops.pad_id
        ids = torch.tensor([[pad] * (longest - len(p)) + list(p) for p in prefixes], device=self._device)
        lengths = torch.tensor([len(p) for p in prefixes], device=self._device)
        mask = torch.arange(longest, device=self._device)[None] >= longest - lengths[:, None]
        return ids, mask.long()

    @property
    def model(self) -> Any:
        return self._model

    @property
    def device(self) -> torch.device:
        return self._device

    @property
    def stops(self) -> StopTable:
        return self._stops

    @property
    def cache(self) -> PrefixCache:
        return self._cache


class _Decoding:
    """One batch from prefill to its last token. Tensors indexed by `rows` cover the rows still in the batch."""

    def __init__(self, engine: TransformersEngine, batch: list[_Group], requests: Sequence[Request]) -> None:
        self.engine = engine
        self.batch = batch
        self.order = [row for group in batch for row in group.rows]
        self.requests = [requests[row] for row in self.order]
        device = engine.device
        longest = engine.facts.max_length
        limits = [min(r.max_new_tokens, longest - len(r.prefix)) for r in self.requests]
        self.limits = torch.tensor(limits, device=device)
        self.starts = torch.tensor([len(r.prefix) for r in self.requests], device=device)
        self.keys = torch.tensor([signed(r.key) for r in self.requests], device=device)
        self.temperatures = torch.tensor([r.temperature for r in self.requests], device=device)
        self.stop_rows = torch.tensor([engine.stops.index(r.stop) for r in self.requests], device=device)
        self.ids = torch.zeros(len(self.order), max(limits), dtype=torch.long, device=device)
        self.lengths = torch.zeros(len(self.order), dtype=torch.long, device=device)
        self.logprobs = torch.zeros(len(self.order), dtype=torch.float64, device=device)
        self.ended = torch.zeros(len(self.order), dtype=torch.long, device=device)  # index into _FINISHES
        self.group_of = [number for number, group in enumerate(batch) for _ in group.rows]
        self.num_known = max(len(group.known) for group in batch)
        self.num_columns = self.num_known + max(group.num_new for group in batch)  # of the batch's cache: its prefixes
        self.slots: dict[int, np.ndarray] = {}  # of a group's prefix, where the engine's cache holds all of it

    def run(self) -> dict[int, Continuation]:
        logits, cache, mask = self._prefill()
        rows = torch.arange(len(self.order), device=self.engine.device)
        for step in range(self.ids.shape[1]):
            tokens = self._draw(rows, logits, step)
            running = self.ended[rows] == 0
            num_running = int(running.sum())
            if num_running == 0:
                self._keep_steps(rows.tolist(), range(len(rows)), cache)
                break
            if num_running <= SHRINK_BELOW * len(rows):
                self._keep_steps(rows.tolist(), (~running).nonzero().squeeze(1).tolist(), cache)
                keep = running.nonzero().squeeze(1)
                rows, tokens = rows[keep], tokens[keep]
                cache.batch_select_indices(keep)
                mask = mask[keep] if mask is not None else None
            if mask is not None:
                mask = torch.cat([mask, mask.new_ones(len(rows), 1)], 1)
            extra = (
                {} if mask is None else {"attention_mask": mask, "position_ids": (self.starts[rows] + step)[:, None]}
            )
            logits = self.engine.model(input_ids=tokens[:, None], past_key_values=cache, use_cache=True, **extra).logits
        return self._collect()

    def _prefill(self) -> tuple[torch.Tensor, DynamicCache, torch.Tensor | None]:
        """Each distinct prefix once, but for what is known of it; then repeated for every row that shares it."""
        model, batch = self.engine.model, self.batch
        ids, mask = self.engine.pad([group.prefix[len(group.known) :] for group in batch])
        lengths = torch.tensor([len(group.known) for group in batch], device=ids.device)
        padded = len({(len(group.known), group.num_new) for group in batch}) > 1
        extra: dict[str, Any] = {"logits_to_keep": 1}
        room = ids.shape[1] + self.ids.shape[1]
        cache = cache_after(model.config, self.engine.cache, [group.known for group in batch], room)
        if padded:
            known = torch.arange(self.num_known, device=ids.device)[None] >= self.num_known - lengths[:, None]
            extra["position_ids"] = (mask.cumsum(-1) - 1).clamp(min=0) + lengths[:, None]
            mask = extra["attention_mask"] = torch.cat([known.long(), mask], 1)
        logits = model(input_ids=ids, past_key_values=cache, use_cache=True, **extra).logits
        self._keep_prefixes(cache)
        if len(self.order) == len(batch):
            return logits, cache, mask if padded else None
        counts = torch.tensor([len(group.rows) for group in batch], device=ids.device)
        source = torch.arange(len(batch), device=ids.device).repeat_interleave(counts)
        cache.batch_select_indices(source)
        return logits[source], cache, mask[source] if padded else None

    # ------------------------------------------------------------ what the next call may go on from

    def _keep_prefixes(self, cache: DynamicCache) -> None:
        """Prefixes that were computed: others may begin with them."""
        store = self.engine.cache
        self.engine.bound_cache(cache)
        writing = Writing(store, cache)
        for number, group in enumerate(self.batch):
            if group.num_new > 1 and group.prefix in store:  # kept by another part of the group
                self.slots[number] = store.slots(group.prefix)
            elif group.num_new > 1 and (fresh := store.allocate(group.num_new)) is not None:
                self.slots[number] = np.concatenate([group.known, fresh])
                writing.add(number, self.num_columns - group.num_new, fresh, group.prefix, self.slots[number])
        writing.finish()

    def _keep_steps(self, rows: Sequence[int], places: Iterable[int], cache: DynamicCache) -> None:
        """Those of `rows` at the given places of the batch that may be gone on from. The last token was not yet run."""
        store = self.engine.cache
        if not store.capacity:
            return
        writing, ended, lengths = Writing(store, cache), self.ended.tolist(), self.lengths.tolist()
        for place in places:
            row, number = rows[place], self.group_of[rows[place]]
            if ended[row] != _STOP or not self.requests[row].resumable:
                continue
            group, num_new = self.batch[number], lengths[row] - 1
            prefix = group.prefix + tuple(self.ids[row, :num_new].tolist())
            if prefix in writing or prefix in store:
                continue
            num_rest = 0 if number in self.slots else group.num_new
            fresh = store.allocate(num_rest + num_new)
            if fresh is None:
                break
            if num_rest:
                self.slots[number] = np.concatenate([group.known, fresh[:num_rest]])
            slots = np.concatenate([self.slots[number], fresh[num_rest:]])
            writing.add(place, self.num_columns - num_rest, fresh, prefix, slots)
        writing.finish()

    def _draw(self, rows: torch.Tensor, logits: torch.Tensor, step: int) -> torch.Tensor:
        """Draw the next token of every row, record it where the row still runs, and note which rows end."""
        stops = self.engine.stops
        scores = logits[:, -1].float()
        if scores.shape[1] > stops.num_tokens:  # padding of the embedding: no token has these ids
            scores[:, stops.num_tokens :] = -math.inf
        temperatures = self.temperatures[rows]
        sampled = draw(scores, temperatures, uniform(self.keys[rows], self.starts[rows] + step))
        tokens = torch.where(temperatures > 0, sampled, scores.argmax(-1))
        picked = scores.gather(1, tokens[:, None]).squeeze(1) - scores.logsumexp(-1)

        running = self.ended[rows] == 0
        live, new = rows[running], tokens[running]
        self.ids[live, step] = new
        self.lengths[live] = step + 1
        self.logprobs[live] += picked[running].double()
        code = torch.where(self.limits[live] <= step + 1, _LENGTH, 0)
        verdict = stops.verdicts(self.stop_rows[live], new)
        code = torch.where(verdict == CERTAIN, _STOP, code)
        for i in (verdict == POSSIBLE).nonzero().squeeze(1).tolist():
            row = int(live[i])
            if stops.completes(self.requests[row].stop, self.ids[row, : step + 1].tolist()):
                code[i] = _STOP
        self.ended[live] = torch.where(stops.is_eos(new), _EOS, code)
        return tokens

    def _collect(self) -> dict[int, Continuation]:
        ids, lengths, ended = self.ids.tolist(), self.lengths.tolist(), self.ended.tolist()
        logprobs = self.logprobs.tolist()
        found: dict[int, Continuation] = {}
        computed = set[int]()  # the groups whose prefix is charged to an earlier row
        for i, row in enumerate(self.order):
            group = self.batch[self.group_of[i]]
            prefilled = 0 if self.group_of[i] in computed else group.num_new
            computed.add(self.group_of[i])
            found[row] = Continuation(
                ids=tuple(ids[i][: lengths[i]]),
                finish=_FINISHES[ended[i]],
                prefilled_tokens=prefilled,
                cached_tokens=len(group.prefix) - prefilled,
                logprob=logprobs[i],
            )
        return found


_FINISHES = (Finish.LENGTH, Finish.STOP, Finish.EOS, Finish.LENGTH)
_STOP, _EOS, _LENGTH = 1, 2, 3
