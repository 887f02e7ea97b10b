"""Which tokens end a continuation: end-of-sequence ids, and the token that completes a stop text.

Most tokens are decided by a table built once a stop text: the token's own text holds it, or cannot have part in it.
Only a token that may complete a text begun earlier is decided by decoding.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

CERTAIN, POSSIBLE = 1, 2
TAIL_TOKENS = 8  # besides one for each character of the stop text


class StopTable:
    """Verdicts on tokens, for every stop text met so far."""

    def __init__(self, tokenizer: Any, vocab_size: int, eos_ids: Sequence[int], device: torch.device) -> None:
        self._tokenizer = tokenizer
        self._device = device
        self._vocab_size = vocab_size
        self.num_tokens = min(len(tokenizer), vocab_size)
        self.pad_id = next(i for i in (tokenizer.pad_token_id, *eos_ids, 0) if i is not None)
        self._eos = torch.zeros(vocab_size, dtype=torch.bool, device=device)
        self._eos[list(eos_ids)] = True
        self._index: dict[str | None, int] = {None: 0}
        self._verdicts = torch.zeros(1, vocab_size, dtype=torch.int8, device=device)
        self._texts: list[str] | None = None

    def is_eos(self, tokens: torch.Tensor) -> torch.Tensor:
        return self._eos[tokens]

    def index(self, stop: str | None) -> int:
        """The row of the verdict table for a stop text; built on first use."""
        if stop not in self._index:
            assert stop, "a stop text is not empty"
            row = torch.tensor([_verdict(text, stop) for text in self._token_texts()], dtype=torch.int8)
            table = torch.zeros(1, self._vocab_size, dtype=torch.int8)
            table[0, : len(row)] = row
            self._index[stop] = len(self._index)
            self._verdicts = torch.cat([self._verdicts, table.to(self._device)])
        return self._index[stop]

    def verdicts(self, stop_rows: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        return self._verdicts[stop_rows, tokens]

    def completes(self, stop: str | None, ids: Sequence[int]) -> bool:
        """Whether the generated ids end with the token that completes the stop text."""
        assert stop is not None
        tail = list(ids)[-(len(stop) + TAIL_TOKENS) :]
        return stop in self._tokenizer.decode(tail, skip_special_tokens=True)

    def _token_texts(self) -> list[str]:
        """Each token's text after another token: some tokenizers drop a space at the start of a text."""
        if self._texts is None:
            before = self._tokenizer.encode("1", add_special_tokens=False)[-1:]
            cut = len(self._tokenizer.decode(before, skip_special_tokens=True))
            pairs = [[*before, token] for token in range(self.num_tokens)]
            self._texts = [text[cut:] for text in self._tokenizer.batch_decode(pairs, skip_special_tokens=True)]
        return self._texts


def _verdict(text: str, stop: str) -> int:
    if stop in text:
        return CERTAIN
    partial = any(text.startswith(stop[i:]) for i in range(1, len(stop)))
    # A token may also hold the middle of a long stop text, or a fragment of a character.
    return POSSIBLE if partial or "�" in text else 0
