"""The pool of kept prefixes: what is read is what was written; no slot is lost, shared by mistake or held for ever."""

import numpy as np
import pytest
import torch

from search.engines.prefix_cache import NONE, PrefixCache
from search.randomness import rng


def value(prefix: tuple[int, ...]) -> float:
    """What stands for the keys and values of a prefix's last token: they depend on all before it."""
    return float(hash(prefix) % 100_003)


def states(prefix: tuple[int, ...]) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Two layers with one row, two heads, width 3."""
    tokens = torch.tensor([value(prefix[: n + 1]) for n in range(len(prefix))])
    one = tokens[None, None, :, None].expand(1, 2, -1, 3)
    return [(one, one + 0.25), (one + 0.5, one + 0.75)]


def add(cache: PrefixCache, prefix: tuple[int, ...], known: np.ndarray) -> bool:
    if prefix in cache or (fresh := cache.allocate(len(prefix) - len(known))) is None:
        return False
    columns = range(len(known), len(prefix))
    if len(fresh):
        cache.write(states(prefix), [0] * len(fresh), columns, fresh.tolist())
    cache.keep(prefix, np.concatenate([known, fresh]))
    return True


def check(cache: PrefixCache, prefixes: list[tuple[int, ...]], slots: list[np.ndarray]) -> None:
    pairs = [(p, s) for p, s in zip(prefixes, slots, strict=True) if len(s)]
    if not pairs:
        return
    longest = max(len(s) for _, s in pairs)
    for layer, (keys, values) in enumerate(cache.read([s for _, s in pairs])):
        assert keys.shape == values.shape == (len(pairs), 2, longest, 3)
        for row, (prefix, known) in enumerate(pairs):
            written = states(prefix[: len(known)])[layer]
            assert torch.equal(keys[row, :, longest - len(known) :], written[0][0])
            assert torch.equal(values[row, :, longest - len(known) :], written[1][0])


@pytest.mark.parametrize("capacity", [1, 10, 40, 400])
@pytest.mark.parametrize("seed", range(3))
def test_trees_of_prefixes_read_as_they_were_written(capacity: int, seed: int) -> None:
    cache, draw = PrefixCache(capacity), rng("prefix cache", seed)
    live, hits = [(1, 2, 3), (1, 2), (9, 9, 9, 9)], 0
    for _ in range(60):
        cache.begin()
        asked = [(*draw.choice(live), draw.randrange(3)) for _ in range(6)]
        found = [cache.find(prefix) for prefix in asked]
        assert all(len(slots) < len(prefix) for prefix, slots in zip(asked, found, strict=True))
        hits += sum(len(slots) > 0 for slots in found)
        check(cache, asked, found)
        for prefix, known in zip(asked, found, strict=True):
            add(cache, prefix, known)
        check(cache, asked, found)  # what is added in a call overwrites nothing that the call uses
        cache.end()
        live = [*live[:3], *[prefix for prefix in asked if len(prefix) < 12]]
    assert hits or capacity < 4
    held = [cache.slots(prefix) for prefix in list(cache._kept)]
    assert len(np.unique(np.concatenate([NONE, *held]))) + len(cache._free) == capacity
    assert len(set(cache._free)) == len(cache._free)
    cache.clear()
    cache.begin()
    assert not len(cache.find((1, 2, 3)))
    assert cache.allocate(capacity) is not None
    assert cache.allocate(1) is None


def test_forks_share_what_they_have_in_common() -> None:
    cache = PrefixCache(100)
    cache.begin()
    assert add(cache, tuple(range(50)), NONE)
    cache.end()
    cache.begin()
    for n in range(10):
        prefix = (*range(50), 100 + n, 7)
        known = cache.find(prefix)
        assert len(known) == 50
        assert add(cache, prefix, known)
    cache.end()
    assert cache.num_used == 50 + 10 * 2


def test_the_oldest_goes_first_and_what_is_used_stays() -> None:
    cache = PrefixCache(9)
    for first in (1, 2, 3):
        cache.begin()
        assert add(cache, (first,) * 3, NONE)
        cache.end()
    cache.begin()
    assert len(cache.find((1, 1, 1, 5))) == 3  # used again: 2 is now the oldest
    assert add(cache, (4,) * 3, NONE)
    assert (2, 2, 2) not in cache
    assert add(cache, (5,) * 3, NONE)
    assert (3, 3, 3) not in cache
    assert not add(cache, (6,) * 3, NONE)  # the rest is in use by this call
    assert all((first,) * 3 in cache for first in (1, 4, 5))
    cache.end()


def test_a_cache_of_no_size_keeps_nothing() -> None:
    cache = PrefixCache(0)
    cache.begin()
    assert not len(cache.find((1, 2)))
    assert cache.allocate(1) is None
    cache.end()
