"""What `ratchet eval` prints: readable at 100 columns, whatever was asked for."""

import io

import pytest
from rich.console import Console

from flows import eval_table
from search.standings import Row, to_json
from search.types import Spend


def printed(found, width=100):
    console = Console(file=io.StringIO(), width=width, highlight=False)
    eval_table.show(found, console)
    return console.file.getvalue()


def row(strategy, budget, rate, *, tokens=30, verified=False, failures=(), n=50, wall_s=12.3):
    values = {str(i): float(i < rate * n) for i in range(n)}
    flops = 1.2e6 * tokens * budget * n
    spend = Spend(budget * n, tokens * budget * n, 9 * n, 40 * n, verified * 50 * n, flops, flops * 1.3)
    return Row(strategy, budget, values, spend if tokens else Spend(samples=budget * n), 0, failures, wall_s, verified)


@pytest.fixture
def everything():
    rows = [row("greedy", 1, 0.4)]
    for name, base in (("majority", 0.3), ("best_of_n_weighted", 0.42), ("beam(width=2, max_rounds=20)", 0.5)):
        rows += [row(name, k, base + 0.05 * i, verified=base > 0.4) for i, k in enumerate((4, 16, 64))]
    return to_json("arithmetic", 50, 0, rows) | {"unit": "samples", "model": "base", "split": "validation"}


def test_nothing_is_cut_at_100_columns(everything):
    text = printed(everything)
    assert "…" not in text
    assert max(map(len, text.splitlines())) <= 100
    assert text.startswith("base on arithmetic, validation: 50 problems, 0 ungraded")


def test_a_strategy_is_named_once_in_each_table(everything):
    assert printed(everything).count("beam(width=2, max_rounds=20)") == 2


def test_gains_savings_and_spend_are_shown(everything):
    lines = printed(everything).splitlines()
    weighted = next(line for line in lines if line.startswith("best_of_n_weighted"))
    assert weighted.split()[:6] == ["best_of_n_weighted", "4", "42.0", "%", "±", "13.8"]
    beam = lines[lines.index(next(line for line in lines if line.startswith("beam"))) + 1]
    assert "+16.0 ± 10.5 g" in beam  # 56 % against 36 of the majority and 40 of greedy: the better counts
    assert "+8.0 ±  7.8" in beam  # against the weighted vote


def test_failures_are_told_with_the_commonest_reason(everything):
    rows = [row("greedy", 1, 0.4), row("beam", 4, 0.4, failures=("too long", "nan", "nan"))]
    text = printed(to_json("arithmetic", 50, 0, rows))
    assert "beam @ 4: 3 of 50 problems failed; most often: nan" in text


def test_rows_of_fewer_problems_say_so():
    rows = [row("greedy", 1, 0.4), row("beam", 4, 0.4, n=20)]
    text = printed(to_json("arithmetic", 50, 0, rows))
    assert "problems" in text.splitlines()[1]
    assert "20" in text.splitlines()[3]


def test_what_a_cap_cut_off_is_told_besides(everything):
    line = "besides these: 31.4 k tokens for what --max-tokens cut off"
    assert line not in printed(everything)
    assert line in printed(everything | {"unfinished": Spend(generated_tokens=31_400).to_json()})


def test_a_pool_without_tokens_has_no_table_of_spend():
    text = printed(to_json("math", 50, 0, [row("majority", 4, 0.4, tokens=0, wall_s=None)]))
    assert "generated" not in text
    assert "40.0 %" in text


@pytest.mark.parametrize("width", [90, 80, 72])
def test_a_narrow_terminal_gets_fewer_columns(everything, width):
    accuracies, _, spends = printed(everything, width).partition("\n\n")
    assert "…" not in accuracies + spends
    assert max(map(len, accuracies.splitlines())) <= width
    assert "actual" not in spends.splitlines()[0]
    assert "FLOPs" in spends.splitlines()[0]
    assert "gain" in accuracies.splitlines()[1]


def test_a_baseline_that_never_gets_there_bounds_the_saving(everything):
    lines = printed(everything).splitlines()
    assert any("> " in line and " x" in line for line in lines)
    assert any("does not get there" in line for line in lines)


def test_an_engine_without_token_ids_is_told():
    values = {"a": 1.0}
    rows = [Row("greedy", 1, values, Spend(samples=1), approximate=True), Row("majority", 1, values, Spend(samples=1))]
    found = to_json("math", 1, 0, rows)
    assert found["results"][0]["approximate"]
    assert "approximate: the engine" in printed(found)
    assert "approximate" not in printed(to_json("math", 1, 0, rows[1:]))


def test_greedy_has_no_budget_of_tokens():
    rows = [row("greedy", 1, 0.4), row("majority(samples=4)", 500, 0.5), row("majority(samples=4)", 2_000_000, 0.5)]
    lines = printed(to_json("math", 50, 0, rows) | {"unit": "tokens"}).splitlines()
    assert lines[1].split()[:3] == ["strategy", "tokens", "accuracy"]
    assert lines[2].split()[:3] == ["greedy", "40.0", "%"]
    assert lines[3].split()[:2] == ["majority(samples=4)", "500"]
    assert lines[4].split()[:2] == ["2", "M"]
