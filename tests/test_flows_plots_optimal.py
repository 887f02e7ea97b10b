"""flows.plots_optimal and flows.plots_curves: every figure of the compute-optimal report, also of thin documents."""

import copy
import json

import numpy as np
import pytest

from flows import optimal_text as text
from flows import plots_curves, plots_optimal
from flows.plot_style import render
from tests.optimal_document import document, ratio

EARLY = "early_best_of_n(threshold=0.9)"
ALL = ["accuracy", "ratios", "samples", "choices", "bins", "across", "exchange", "quality"]


def texts(figure):
    from matplotlib.text import Text

    return [t.get_text() for t in figure.findobj(Text) if t.get_text()]


def test_every_section_has_its_figure(tmp_path):
    figures = plots_optimal.draw_all(document())
    assert list(figures) == ALL
    paths = plots_optimal.save(figures, tmp_path / "new" / "plots")
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in paths.values())


def test_equal_documents_give_equal_bytes():
    one, two = (render(plots_curves.draw_accuracy(document()), "svg") for _ in range(2))
    assert one == two


def test_the_title_says_what_the_data_say():
    found = document()
    saved = texts(plots_curves.draw_accuracy(found))
    assert "As accurate as best-of-8 for 1/3.0 of its FLOPs; with the paper's arms alone 1/2.0" in saved
    assert "3.0 x less" in saved
    for row in found["ratios"]:
        row |= {"value": 0.5, "low": 0.4, "high": 0.7}
    assert "The choice costs 2.0 times the FLOPs of best-of-8" in texts(plots_curves.draw_accuracy(found))
    assert "2.0 x more" in texts(plots_curves.draw_accuracy(found))
    for row in found["ratios"]:
        row |= {"value": 1.1, "low": 0.8, "high": 1.6}
    assert "The choice is not shown to be cheaper than best-of-8" in texts(plots_curves.draw_accuracy(found))
    for row in found["ratios"]:
        row |= {"value": 0.0, "low": 0.0, "high": 0.0}
    never = plots_curves.draw_accuracy(found)
    assert "The choice never reaches the accuracy of best-of-8" in texts(never)
    assert not [t for t in texts(never) if " x " in t]
    assert texts(plots_optimal.draw_ratios(found)).count("accuracy never reached") == len(found["ratios"])


def test_no_panel_has_more_than_seven_lines():
    found = document()
    found["fixed"][EARLY] = found["fixed"]["best_of_n"]
    for row in found["ratios"]:
        row["cheapest_baseline"] = EARLY
    lines = plots_curves.curves(found, "all")
    assert len(lines) == plots_curves.MOST_LINES
    assert [line.label for line in lines][1] == "always early best-of-N (threshold=0.9)"
    assert "optimal, random bins" not in [line.label for line in lines]  # the control stays in the ratios
    assert all(len(axes.lines) <= plots_curves.MOST_LINES for axes in plots_curves.draw_samples(found).axes)


def test_what_is_missing_has_no_figure():
    assert plots_optimal.draw_all({"n": 0}) == {}
    found = document()
    for name in ("exchange", "quality", "across", "by_bin", "known"):
        del found[name]
    assert list(plots_optimal.draw_all(found)) == ["accuracy", "ratios", "samples", "choices"]
    found |= {"exchange": None, "quality": None, "choices": None, "ratios": []}
    assert list(plots_optimal.draw_all(found)) == ["accuracy", "samples"]


@pytest.mark.parametrize("kind", ["oracle", "verifier", "question"])
def test_one_kind_one_bin_one_set(kind):
    found = document()
    found["optimal"] = {"all": {kind: found["optimal"]["all"][kind]}}
    found["ratios"] = [r for r in found["ratios"] if r["arms"] == "all" and r["bins"] == kind]
    found["by_bin"] = {kind: found["by_bin"]["oracle"][:1]}
    del found["arms"]["paper"]
    found["choices"] |= {"rungs": found["choices"]["rungs"][:1], "counts": [40], "edges": []}
    assert text.main_kind(found) == kind
    figures = plots_optimal.draw_all(found)
    assert list(figures) == ALL
    assert len(figures["accuracy"].axes) == 1
    assert "The choice at each budget, for all problems alike" in texts(figures["choices"])


def test_one_arm_at_one_budget():
    found = document()
    found["arms"], found["fixed"] = {"all": ["best_of_n"]}, {"best_of_n": {"accuracy": [0.3], "flops": [1e7]}}
    found["cells"] = [c for c in found["cells"] if (c["arm"], c["budget"]) == ("best_of_n", 8)]
    found["optimal"] = {"all": {"none": {"accuracy": [0.3], "flops": [1e7]}}}
    found["ratios"] = [ratio("all", "none", 8, 1.0)]
    found["by_bin"], found["across"] = {}, []
    rung = found["choices"]["rungs"][0][0] | {"arm": "best_of_n", "budget": 8}
    found["choices"] = {"budgets": [8], "edges": [], "counts": [40], "rungs": [[rung]]}
    figures = plots_optimal.draw_all(found)
    assert list(figures) == ["accuracy", "ratios", "samples", "choices", "exchange", "quality"]
    assert "One strategy is chosen everywhere: best-of-N" in texts(figures["choices"])
    for figure in figures.values():
        assert render(figure, "svg")


def test_null_is_drawn_as_not_known():
    found = document()
    for row in found["ratios"]:
        row |= {"value": None, "low": None, "high": None}
    for row in found["across"][:2]:
        row |= {"uniform": None, "across": None, "gain": None}
    for point in found["quality"]["points"]:
        point["auc"] = None
    for row in found["exchange"]["rows"]:
        row["all"] = {**row["all"], "gain": None, "low": None, "high": None}
    found["cells"][3]["accuracy"] = found["cells"][4]["se"] = None
    found["choices"]["rungs"][0][0] = found["choices"]["rungs"][0][0] | {"value": None}
    figures = plots_optimal.draw_all(found)
    assert list(figures) == ["accuracy", "samples", "choices", "bins", "across", "exchange"]
    assert "Accuracy against FLOPs" in texts(figures["accuracy"])
    assert np.size(figures["across"].axes[0].lines[0].get_xdata()) == 3


def test_names_are_no_mathematics():
    found = document()
    evil = json.dumps("beam(vote=$\\frac{1}{)")[1:-1]
    found = json.loads(json.dumps(found).replace("beam(width=2)", evil))
    found["quality"]["points"][0]["verifier"] = "$x_{$\x1b[2J"
    for figure in plots_optimal.draw_all(found).values():
        assert render(figure, "svg")


def test_tokens_have_a_panel_where_they_were_counted():
    found = document()
    assert len(plots_curves.draw_samples(found).axes) == 1
    for cell in found["cells"]:
        cell["tokens"] = 30.0 * cell["budget"]
    line = copy.deepcopy(found["optimal"]["all"]["question"]) | {"tokens": [30.0, 60.0, 90.0, 200.0]}
    found["optimal"]["all"]["question"] = line
    samples, tokens = plots_curves.draw_samples(found).axes
    assert tokens.get_xlabel() == "tokens a problem"
    assert len(tokens.lines) == len(samples.lines)


def test_the_choices_name_strategy_and_value():
    shown = texts(plots_optimal.draw_choices(document()))
    assert "60 %" in shown
    assert "as before" in shown
    assert "step rejection\ndraws=4" in shown  # at N = 2; "as before" at more
    assert "All bins choose the same kind of strategy; its settings differ at 4 of 5 budgets" in shown


@pytest.mark.parametrize(("low", "high"), [(3e7, 1e9), (1e6, 1e12), (5.0, 6.0), (7e8, 7e8)])
def test_axes_carry_few_readable_ticks(low, high):
    _, (axes,) = plots_curves.canvas(2.0)
    plots_curves.log_axis(axes, [low, high], "FLOPs")
    assert 1 <= len(axes.get_xticks()) <= 8


def test_a_report_in_actual_flops_starts_its_arrows_there():
    found = document() | {"actual": True}
    (line, *_) = plots_curves.curves(found, "all")
    assert line.label == "strongest best-of-N"
    assert line.x[0] == pytest.approx(1.2 * 2e7)
    assert plots_curves.draw_accuracy(found).axes[0].get_xlabel() == "FLOPs a problem, as computed"


def test_a_long_finding_takes_two_lines():
    figure, _ = plots_curves.canvas(2.0)
    plots_curves.title(figure, "word " * 30)
    assert figure.get_suptitle().count("\n") == 1
