"""The figure of `ratchet eval --report`."""

import pytest

from flows import plots_search
from search.types import Spend


def results(strategies, budgets=(1, 4, 16), tokens=30):
    return [
        {
            "strategy": name,
            "budget": k,
            "n": 100,
            "accuracy": 0.2 + 0.02 * i + 0.03 * j,
            "se": 0.04,
            "spend": Spend(samples=100 * k, generated_tokens=100 * k * tokens, flops_ideal=1e6 * k * tokens).to_json(),
        }
        for i, name in enumerate(strategies)
        for j, k in enumerate(budgets)
    ]


def document(rows):
    return {"task": "countdown", "n": 100, "results": rows}


def test_three_costs_of_all_strategies_with_one_legend(tmp_path):
    names = [*plots_search.LOOKS, "beam(width=2)", "revisions", "beam_revisions", "searched_revisions"]
    plots_search.save_comparison(document(results(names)), tmp_path / "new" / "eval.png")
    assert (tmp_path / "new" / "eval.png").read_bytes().startswith(b"\x89PNG")
    figure = plots_search.comparison(document(results(names)))
    assert [a.get_xlabel().partition(" per")[0] for a in figure.axes] == [
        "samples",
        "generated tokens",
        "FLOPs (ideal)",
    ]
    shown = [text.get_text() for text in figure.legends[0].get_texts()]
    assert shown == [name.replace("_", " ") for name in names]
    looks = list(plots_search._looks(results(names)))
    assert len(set(map(str, looks))) == len(names)  # no two alike


def test_a_file_of_samples_has_samples_only():
    figure = plots_search.comparison(document(results(["pass", "majority"], tokens=0)))
    assert len(figure.axes) == 1


def test_rows_without_figures_are_left_out():
    rows = [*results(["majority"]), *results(["beam"], budgets=(4,))]
    rows[-1]["accuracy"] = None
    rows.append(results(["greedy"], budgets=(1,))[0] | {"se": None})
    figure = plots_search.comparison(document(rows))
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["majority", "greedy"]


@pytest.mark.parametrize("low", [1, 7, 40_000])
def test_axes_carry_readable_ticks(low):
    rows = results(["majority"], budgets=(1, 16, 64), tokens=low)
    figure = plots_search.comparison(document(rows))
    for axes in figure.axes:
        assert 1 <= len(axes.get_xticks()) <= 5
