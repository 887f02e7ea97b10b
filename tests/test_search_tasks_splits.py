from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from configs.schema import Splits
from search.errors import DataError
from search.tasks.splits import Exhausted, split_of, take_distinct
from search.types import Problem


def test_shares_come_out_as_asked() -> None:
    splits = Splits(train=0.5, fit=0.1, validation=0.1, gate=0.2, test=0.1)
    counts = Counter(split_of(str(i), splits) for i in range(20_000))
    for name, share in splits.model_dump().items():
        assert counts[name] / 20_000 == pytest.approx(share, abs=0.012)


def test_a_split_never_changes() -> None:
    # Literal expectations: a changed hash would move problems of existing loops between splits.
    found = [split_of(key, Splits()) for key in ("3,5,7>22", "1,2,3>6", "5+13*2", "a", "b", "c", "d", "e")]
    assert found == ["test", "train", "train", "validation", "train", "train", "gate", "train"]


@given(st.text())
def test_every_key_has_a_split_with_a_share(key: str) -> None:
    assert split_of(key, Splits(train=0, fit=1 / 3, validation=1 / 3, gate=1 / 3, test=0)) in {
        "fit",
        "validation",
        "gate",
    }


def stream(keys):
    while True:
        for key in keys:
            yield Problem(key, key)


def test_take_distinct_skips_repeats_and_used_ones() -> None:
    taken = take_distinct(stream("abcad"), 3, split="gate", exclude=frozenset("b"))
    assert [p.key for p in taken] == ["a", "c", "d"]


def test_an_exhausted_space_says_how_many_exist() -> None:
    with pytest.raises(
        Exhausted, match=r"5 new problems of the gate split .* only 3 exist besides 1 already used"
    ) as e:
        take_distinct(stream("abcad"), 5, split="gate", exclude=frozenset("b"))
    assert isinstance(e.value, DataError)
    assert [p.key for p in e.value.found] == ["a", "c", "d"]


def test_taking_none_reads_nothing() -> None:
    assert take_distinct(iter(()), 0, split="test", exclude=frozenset()) == []
