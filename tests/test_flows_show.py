"""Progress in the terminal, and in a log where there is none."""

import io
import re

import pytest
from rich.console import Console

from flows import show


@pytest.fixture
def log(monkeypatch):
    """(display, text so far): no terminal, a line as soon as anything is told."""
    monkeypatch.setattr(show, "LINE_S", 0.0)
    file = io.StringIO()
    display = show.Display(Console(file=file, width=200, highlight=False))
    display.stage_started("eval", "200 problems", None)
    return display, file


def test_a_log_hears_problems_speed_size_of_the_trees_and_what_is_left(log):
    display, file = log
    display.progress("eval", 30, 120, tokens=5000, steps=1234, problems="50/200", what="beam @ 16")
    line = file.getvalue()
    assert re.search(r"eval +beam @ 16 · 50/200 problems · .* tok/s · 1\.23 k steps · about .* left", line)


def test_other_stages_tell_what_they_have(log):
    display, file = log
    display.progress("distill", 3, 8, loss=0.5)
    assert re.search(r"distill +3/8 · loss 0\.500", file.getvalue())


def test_a_log_is_not_flooded(monkeypatch):
    file = io.StringIO()
    display = show.Display(Console(file=file, width=200))
    display.stage_started("search", "", None)
    for i in range(50):
        display.progress("search", i, 50)
    assert file.getvalue() == ""


def test_a_terminal_has_one_line_that_moves():
    file = io.StringIO()
    display = show.Display(Console(file=file, width=160, force_terminal=True))
    display.stage_started("search", "searching for better answers", None)
    display.progress("search", 10, 100, tokens=100, problems="10/100", steps=40)
    display._progress.refresh()
    display.stop()
    assert "10/100 problems" in file.getvalue()
    assert "40 steps" in file.getvalue()
