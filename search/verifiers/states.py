"""Runs a verifier's decoder over what a layout encoded, and reads the scores at the ends of steps.

Inputs are sorted by length and padded on the right, so a causal decoder needs no mask. What follows the last end is
never run.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from configs.schema import VerifierRuntime
from search.types import Scored
from search.verifiers.heads import Head
from search.verifiers.layout import Encoded


class StateScorer:
    """Scores Encoded inputs with a decoder and a head; the transformers runtime of every verifier.

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

    @torch.inference_mode()
    def score(self, inputs: Sequence[Encoded], keep: Sequence[bool] | None = None) -> list[Scored]:
        """One Scored an input, in order, with a score at each of its ends. `keep`: longer ones may follow.

        An input that cannot be run (longer than the context) has scores of nan, so that its problem alone fails.
        """
        assert keep is None or len(keep) == len(inputs)
        results: dict[int, Scored] = {}
        for rows in self._batches(inputs):
            results |= zip(rows, self._run([inputs[row] for row in rows]), strict=True)
        return [results[row] for row in range(len(inputs))]

    def reset(self) -> None:
        """Forget what earlier calls computed, so that the next ones do not depend on them, not even in rounding."""

    def _batches(self, inputs: Sequence[Encoded]) -> Iterator[list[int]]:
        settings, batch = self._settings, list[int]()
        for row in sorted(range(len(inputs)), key=lambda row: len(inputs[row].ids)):
            most = min(settings.max_batch_rows, settings.batch_tokens // len(inputs[row].ids))
            if batch and len(batch) >= most:
                yield batch
                batch = []
            batch.append(row)
        if batch:
            yield batch

    def _run(self, batch: Sequence[Encoded]) -> list[Scored]:
        usable = [one for one in batch if len(one.ids) <= self._max_length]
        states = iter(self._states(usable)) if usable else iter(())
        found: list[Scored] = []
        for one in batch:
            if len(one.ids) > self._max_length:
                found.append(Scored((math.nan,) * len(one.ends), len(one.ids), one.num_prompt))
                continue
            scores = self._read(one, next(states))
            found.append(Scored(scores, len(one.ids), one.num_prompt, len(one.ids)))
        return found

    def _states(self, batch: Sequence[Encoded]) -> torch.Tensor:
        longest = max(len(one.ids) for one in batch)
        ids = torch.tensor([[*one.ids, *[0] * (longest - len(one.ids))] for one in batch], device=self._device)
        lengths = torch.tensor([len(one.ids) for one in batch], device=self._device)
        mask = (torch.arange(longest, device=self._device)[None] < lengths[:, None]).long()
        return self._decoder(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state

    def _read(self, one: Encoded, states_TH: torch.Tensor) -> tuple[float, ...]:
        ends = torch.tensor(one.ends, device=self._device)
        starts = torch.tensor(one.starts, device=self._device)
        sums, counts = torch.zeros(len(ends), device=self._device), torch.ones(len(ends), device=self._device)
        if self._head.reads_tokens:
            ids = torch.tensor(one.ids, device=self._device)
            terms = self._head.terms(states_TH[one.num_prompt - 1 : ends[-1]], ids[one.num_prompt : ends[-1] + 1])
            total = torch.nn.functional.pad(terms.cumsum(0), (1, 0))
            sums = total[ends + 1 - one.num_prompt] - total[starts - one.num_prompt]
            counts = (ends + 1 - starts).float()
        return tuple(self._head(states_TH[ends], sums, counts).tolist())
