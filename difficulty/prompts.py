"""What a predictor reads of questions: the ids of their prompts, and what the policy makes of them.

Hidden states are computed when a predictor asks for them; the pooled ones are kept, those of every token are handed on
batch by batch. Where the search runs the same policy, both come with the prefill that it needs anyway.

Axis legend: _P problems, _L layers (embeddings first), _H hidden size, _T tokens of one prompt.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from configs.schema import Model
from search.errors import DataError

States = NDArray[np.float32]  # [P, L, 2, H], the 2 being POOLINGS
POOLINGS = ("last", "mean")
MAX_LAYERS = 8  # of which the states of every token are read, evenly spaced
BATCH_TOKENS = 16_384  # of one forward pass that keeps the states of every token


class Prompts:
    """The prompts of some problems under one policy.

    `engine` shows hidden states (`search.engines.load_engine(..., hidden_states=True)`); `states` and `tokens` (one
    float32 [T, L, H] a prompt) are given where they are known already. `policy` and `model`: where the policy lies and
    how it is loaded, for predictors that have weights of their own.
    """

    def __init__(
        self,
        ids_P: Sequence[Sequence[int]],
        engine: Any = None,
        *,
        states: States | None = None,
        tokens: Sequence[States] | None = None,
        policy: str | Path | None = None,
        model: Model | None = None,
    ) -> None:
        self.ids_P = ids_P
        self.engine = engine
        self.policy = policy
        self.model = model or Model()
        self._states = states
        self._tokens = tokens

    def __len__(self) -> int:
        return len(self.ids_P)

    @property
    def lengths_P(self) -> NDArray[np.int64]:
        """Tokens of each prompt."""
        return np.array([len(ids) for ids in self.ids_P], dtype=np.int64)

    @property
    def states(self) -> States:
        """Each layer's states at the last token, and their mean over all tokens. Raises DataError without a policy."""
        if self._states is None:
            if self.engine is None:
                raise DataError("these prompts come without hidden states: give the engine that has the policy loaded")
            self._states = np.asarray(self.engine.hidden_states(self.ids_P), dtype=np.float32)
        return self._states

    @property
    def shows_tokens(self) -> bool:
        """Whether the states of every token can be read."""
        return self._tokens is not None or hasattr(self.engine, "model")

    def each_token(self) -> Iterator[tuple[int, States]]:
        """The states of every token of each prompt, (row, float32 [T, at most MAX_LAYERS, H]), shortest prompts first.

        Raises DataError where they cannot be read.
        """
        if self._tokens is not None:
            yield from enumerate(np.asarray(tokens, dtype=np.float32) for tokens in self._tokens)
        elif self.shows_tokens:
            yield from _read_tokens(self.engine, self.ids_P)
        else:
            raise DataError("this engine does not show the hidden states of every token")

    def with_states(self, states: States) -> Prompts:
        """The same prompts with these pooled states."""
        return Prompts(
            self.ids_P, self.engine, states=states, tokens=self._tokens, policy=self.policy, model=self.model
        )

    def take(self, rows: NDArray[np.intp]) -> Prompts:
        """Some of the prompts, in the order of `rows`."""
        chosen: list[int] = rows.tolist()
        return Prompts(
            [self.ids_P[i] for i in chosen],
            self.engine,
            states=None if self._states is None else self._states[rows],
            tokens=None if self._tokens is None else [self._tokens[i] for i in chosen],
            policy=self.policy,
            model=self.model,
        )


def _read_tokens(engine: Any, ids_P: Sequence[Sequence[int]]) -> Iterator[tuple[int, States]]:
    import torch

    order = sorted(range(len(ids_P)), key=lambda i: len(ids_P[i]))
    while order:
        size = max(1, min(len(order), BATCH_TOKENS // max(1, len(ids_P[order[0]]))))
        rows = [i for i in order[:size] if len(ids_P[i]) * size <= 2 * BATCH_TOKENS] or order[:1]
        order = order[len(rows) :]
        with torch.inference_mode():
            ids, mask = engine.pad([ids_P[i] for i in rows])
            positions = (mask.cumsum(-1) - 1).clamp(min=0)
            output = engine.model(input_ids=ids, attention_mask=mask, position_ids=positions, output_hidden_states=True)
            chosen = [output.hidden_states[layer] for layer in spaced_layers(len(output.hidden_states))]
            states = torch.stack([h.float() for h in chosen], 2).cpu().numpy()
        for place, row in enumerate(rows):
            yield row, states[place, states.shape[1] - len(ids_P[row]) :]


def spaced_layers(num: int) -> list[int]:
    """At most MAX_LAYERS of `num`, evenly spaced, the first and the last included."""
    return sorted({round(i) for i in np.linspace(0, num - 1, min(num, MAX_LAYERS)).tolist()})
