"""A tokenizer that encodes each text once. No torch.

A verifier reads a candidate's first steps again with every step that follows, and a prompt with every candidate; for a
tiny model, encoding them costs as much as running it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

TEXTS = 1 << 16  # that are remembered; prompts and steps are short


class Remembering:
    """The part of a Hugging Face tokenizer that layouts use, remembered; everything else is the tokenizer's own."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer

        @lru_cache(maxsize=TEXTS)
        def encode(text: str, add_special_tokens: bool) -> tuple[int, ...]:
            return tuple(tokenizer.encode(text, add_special_tokens=add_special_tokens))

        @lru_cache(maxsize=TEXTS)
        def template(turns: tuple[tuple[tuple[str, Any], ...], ...], options: tuple[tuple[str, Any], ...]) -> Any:
            return tokenizer.apply_chat_template([dict(turn) for turn in turns], **dict(options))

        self._encode, self._template = encode, template

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tokenizer, name)

    def encode(self, text: str, *, add_special_tokens: bool = True) -> Sequence[int]:
        return self._encode(text, add_special_tokens)

    def apply_chat_template(self, messages: Sequence[Mapping[str, str]], **options: Any) -> Any:
        """The caller must leave what it returns as it is."""
        turns = tuple(tuple(message.items()) for message in messages)
        return self._template(turns, tuple(options.items()))
