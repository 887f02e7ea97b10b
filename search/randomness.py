"""Counter-based randomness: every draw is a pure function of what it is for, so nothing depends on order.

A key is blake2b of the parts (loop seed, stage, split, problem key, stream, candidate); an engine then draws token t
from the key and the token's absolute position. Strategies that sample independently use the same stream name,
"sample", and so share one pool.
"""

from __future__ import annotations

import hashlib
import random


def key64(*parts: object) -> int:
    """A 64-bit key. Parts are joined unambiguously: key64("a", "b") != key64("ab")."""
    digest = hashlib.blake2b(digest_size=8)
    for part in parts:
        data = str(part).encode()
        digest.update(len(data).to_bytes(4, "little") + data)
    return int.from_bytes(digest.digest(), "little")


def rng(*parts: object) -> random.Random:
    """A Python random generator seeded by the parts."""
    return random.Random(key64(*parts))
