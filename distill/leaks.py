"""Held-out questions that reappear in training text: shared word n-grams, and near-duplicates.

The n-gram test is the one used to decontaminate reasoning data (Muennighoff et al. 2025, s1): any 8 consecutive words
in common. It also finds stock phrases, so what it flags is to be dropped from training rather than called a leak;
a near-duplicate is the same question re-cased, re-spaced or re-punctuated, or with a few words changed. Numbers are
words like any other: the same question about other numbers is another question.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

WORD = re.compile(r"\w+(?:[.,]\d+)*")


@dataclass(frozen=True, slots=True)
class Overlap:
    """Training text `train` and held-out text `held_out` (indices) share something.

    Example: Overlap(17, 3, "how many apples does tom have if he")
    """

    train: int
    held_out: int
    shared: str  # the words in common, or the similarity as "0.93"


def words(text: str) -> list[str]:
    """Words and numbers, case folded; spacing and punctuation are gone."""
    return WORD.findall(text.casefold())


def ngram_leaks(train_texts: Iterable[str], heldout_texts: Sequence[str], n: int = 8) -> list[Overlap]:
    """The first word n-gram that each training text shares with a held-out one; none shared: no entry.

    A text shorter than n words counts as one n-gram. Memory holds the held-out n-grams only.
    """
    owner: dict[tuple[str, ...], int] = {}
    for index, text in enumerate(heldout_texts):
        for gram in _grams(words(text), n):
            owner.setdefault(gram, index)
    found: list[Overlap] = []
    for index, text in enumerate(train_texts):
        gram = next((gram for gram in _grams(words(text), n) if gram in owner), None)
        if gram is not None:
            found.append(Overlap(index, owner[gram], " ".join(gram)))
    return found


def near_duplicates(
    train_texts: Iterable[str], heldout_texts: Sequence[str], threshold: float = 0.8, n: int = 3
) -> list[Overlap]:
    """The most similar held-out text of each training text, where their Jaccard similarity over word n-grams reaches
    `threshold` (0 to 1) and both hold the same numbers. Time grows with the n-grams in common."""
    grams_P = [frozenset(_grams(words(text), n)) for text in heldout_texts]
    holders: defaultdict[tuple[str, ...], list[int]] = defaultdict(list)
    for index, grams in enumerate(grams_P):
        for gram in grams:
            holders[gram].append(index)
    found: list[Overlap] = []
    for index, text in enumerate(train_texts):
        grams = frozenset(_grams(words(text), n))
        common = Counter(other for gram in grams for other in holders.get(gram, ()))
        alike = ((count / len(grams | grams_P[other]), -other) for other, count in common.items())
        # by likeness first: the most similar text may be about other numbers, and the next one about these
        for similarity, other in sorted((pair for pair in alike if pair[0] >= threshold), reverse=True):
            if _numbers(text) == _numbers(heldout_texts[-other]):
                found.append(Overlap(index, -other, f"{similarity:.2f}"))
                break
    return found


def _grams(tokens: Sequence[str], n: int) -> Iterator[tuple[str, ...]]:
    if tokens and len(tokens) < n:
        yield tuple(tokens)
    for start in range(len(tokens) - n + 1):
        yield tuple(tokens[start : start + n])


def _numbers(text: str) -> Counter[str]:
    return Counter(word for word in words(text) if word[0].isdigit())
