"""What the terminal shows."""

import io

import pytest
from rich.console import Console

from flows.show import Display, count


@pytest.mark.parametrize(
    ("value", "shown"),
    [(0, "0"), (12.2567, "12.3"), (950, "950"), (999.4, "999"), (48_210, "48.2 k"), (2.1e12, "2.1 T")],
)
def test_counts_have_few_digits(value, shown):
    assert count(value) == shown


def test_a_running_search_shows_its_speed_and_the_size_of_its_trees():
    out = io.StringIO()
    display = Display(Console(file=out, force_terminal=True, width=160))
    display.stage_started("search", "searching for better answers", None)
    display.progress("search", 96, 480, tokens=48_210, steps=2_300)
    display.stop()
    for part in ("96/480", "tok/s", "2.3 k steps", "left"):
        assert part in out.getvalue()
