"""Cells: what strategies came to, problem by problem, from stored pools and from searches."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from search import answers
from search.cells import (
    ROWS_KEPT,
    Cell,
    Grid,
    halves,
    outcome_cell,
    pool_cells,
    read_pools,
    searched_cell,
)
from search.errors import DataError
from search.evaluate import expected_spend, pool_figures, reduce_pool
from search.results import write_results
from search.stats import distinct_at_k
from search.types import Candidate, Finish, Grade, Problem, SearchResult, Spend
from tests.replay_kit import pool_of

FIELDS = tuple(Spend().to_json())


def candidate(text, answer, score=None, finish=Finish.EOS):
    grade = Grade.CORRECT if answer == "A" else Grade.WRONG
    return Candidate((1, 2, 3), text, finish, answer=answer, grade=grade, score=score, step_scores=(score or 0.0,))


def result(key, candidates, *, selected: int | None = 0, spend=None, failed=None):
    spend = spend or Spend(len(candidates), 3 * len(candidates), 2, 0, 9, 130.0, 150.0, 30.0, 30.0)
    problem = Problem(key, key, "A")
    return SearchResult(problem, "x", tuple(candidates), selected, spend, "m", "0", prompt_ids=(1, 2), failed=failed)


def one_cell(cells, arm, budget):
    (found,) = (c for c in cells if c.arm == arm and c.budget == budget)
    return found


# ---------------------------------------------------------------- from pools


RULES = {"pass": "pass", "majority": "majority", "best_of_n": "best_of_n", "best_of_n_weighted": "best_of_n_weighted"}


def test_pool_cells_are_the_figures_of_evaluate():
    pools = [
        pool_of(["A", "A", "B", None], [0.9, 0.2, 0.8, None], key="p", verifier=7.0),
        pool_of(["B", "C", "A", "B"], [0.1, 0.9, 0.5, 0.3], key="q", verifier=11.0),
        pool_of([None] * 4, [None] * 4, key="r", verifier=3.0),
    ]
    figures = pool_figures(pools, [1, 2, 4], list(RULES.values()))
    cells = pool_cells(pools, RULES, [4, 1, 2, 2])
    assert [(c.arm, c.budget) for c in cells] == [(arm, k) for arm in RULES for k in (1, 2, 4)]
    for c in cells:
        k = int(c.budget)
        assert c.solved_P.tolist() == list(figures.by_key(RULES[c.arm], k).values())
        assert c.found_P.tolist() == list(figures.by_key("pass", k).values())
        spent = [expected_spend(p, k, scored="best" in c.arm) for p in pools]
        assert c.flops_P.tolist() == [s[FIELDS.index("flops_ideal")] for s in spent]
        assert c.actual_P.tolist() == [s[FIELDS.index("flops_actual")] for s in spent]


def test_a_verifier_is_charged_to_the_arms_that_ask_it():
    pools = [pool_of(["A", "B"], [0.9, 0.2], verifier=100.0)]
    cells = pool_cells(pools, RULES, [2])
    policy = 2.0 * (10 + 5 * 2)
    assert one_cell(cells, "majority", 2).flops_P.tolist() == [policy]
    assert one_cell(cells, "best_of_n", 2).flops_P.tolist() == [policy + 200.0]


def test_rows_are_the_distinct_right_texts_expected():
    """x, x and y are right: one sample is with 3/4; two hold x and y, or one of them, and never none."""
    right = [candidate("x", "A"), candidate("x", "A"), candidate("y", "A"), candidate("w", "B")]
    pool = reduce_pool(result("p", right))
    (one, two, four) = pool_cells([pool], {"pass": "pass"}, [1, 2, 4])
    assert one.rows_P.tolist() == [0.75]
    pairs = list(itertools.combinations("xxyw", 2))
    assert two.rows_P[0] == pytest.approx(sum(len({*pair} - {"w"}) for pair in pairs) / len(pairs))
    assert four.rows_P.tolist() == [2.0]
    assert four.found_P.tolist() == [1.0]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 3), max_size=5), st.integers(0, 3), st.integers(1, 4))
def test_distinct_texts_are_counted_as_if_every_subset_were_looked_at(copies, wrong, most):
    names = [i for i, n in enumerate(copies) for _ in range(n)] + [-1] * wrong
    ks = [k for k in (1, 2, 3, 5) if k <= len(names)]
    if not ks:
        return
    found = distinct_at_k(len(names), copies, ks, most)
    for k, value in zip(ks, found, strict=True):
        drawn = [min(most, len({*subset} - {-1})) for subset in itertools.combinations(names, k)]
        assert value == pytest.approx(sum(drawn) / len(drawn))


def test_rows_stop_at_what_select_keeps():
    """Eight distinct right texts among sixteen: four are drawn on average, but seldom exactly four."""
    texts = [candidate(f"right {i}", "A") for i in range(8)] + [candidate("w", "B")] * 8
    (cell,) = pool_cells([reduce_pool(result("p", texts))], {"pass": "pass"}, [8])
    chances = [math.comb(8, d) * math.comb(8, 8 - d) / math.comb(16, 8) for d in range(9)]
    assert cell.rows_P[0] == pytest.approx(sum(p * min(d, ROWS_KEPT) for d, p in enumerate(chances)))
    assert cell.rows_P[0] < 3.7


def test_a_problem_that_failed_is_not_solved_and_one_without_scores_only_where_none_are_needed():
    failed = reduce_pool(result("p", [], selected=None, spend=Spend(), failed="its prompt is too long"))
    unscored = reduce_pool(result("q", [candidate("x", "A")] * 4, failed="the verifier gave NaN"))
    cells = pool_cells([failed, unscored], RULES, [1, 4])
    assert one_cell(cells, "majority", 4).solved_P.tolist() == [0, 1]
    assert one_cell(cells, "best_of_n", 4).solved_P.tolist() == [0, 0]
    assert one_cell(cells, "best_of_n", 4).found_P.tolist() == [0, 1]
    assert one_cell(cells, "pass", 4).flops_P[0] == 0


def test_pools_that_cannot_tell_are_refused():
    with pytest.raises(DataError, match="a budget of 4 needs 4 samples, 'q' has 2"):
        pool_cells([pool_of(["A"] * 2)], {"pass": "pass"}, [1, 4])
    with pytest.raises(DataError, match="answers without a score"):
        pool_cells([pool_of(["A"] * 2)], RULES, [1])


def test_without_the_policys_flops_every_arm_is_charged_in_samples():
    """A server's model of unknown size: the verifier's FLOPs alone would make the arms without one look free."""
    spend = Spend(2, 6, 2, 0, 9, 40.0, 50.0, 40.0, 50.0)
    scored = result("p", [candidate("x", "A", 0.9), candidate("y", "B", 0.1)], spend=spend)
    cells = pool_cells([reduce_pool(scored)], RULES, [1, 2])
    assert {c.arm: c.flops_P.tolist() for c in cells if c.budget == 2} == {arm: [2.0] for arm in RULES}
    assert one_cell(cells, "best_of_n", 1).actual_P.tolist() == [1.0]
    assert outcome_cell([scored], "beam", 2).flops_P.tolist() == [2.0]


# ---------------------------------------------------------------- from searches


def test_a_searched_cell_is_what_was_selected_in_the_order_of_the_grid(tmp_path):
    both = [candidate("x", "A", 0.2), candidate("y", "B", 0.9), candidate("z", "A", 0.1)]
    stored = [result("p", both, selected=0), result("q", both, selected=1), result("s", both, selected=None)]
    write_results(stored, tmp_path / "shard-00000.jsonl")
    cell = searched_cell(tmp_path, "beam", 4, ("s", "q", "p"))
    assert cell.name == "beam @ 4"
    assert cell.solved_P.tolist() == [0, 0, 1]
    assert cell.found_P.tolist() == [1, 1, 1]
    assert cell.rows_P.tolist() == [2, 2, 2]
    assert cell.flops_P.tolist() == [130.0] * 3
    assert cell.actual_P.tolist() == [150.0] * 3
    again = searched_cell(tmp_path, "beam(vote=highest)", 4, ("p",), answers.highest)
    assert again.solved_P.tolist() == [0]
    same = outcome_cell(stored[::-1], "beam", 4)
    assert same.solved_P.tolist() == cell.solved_P.tolist()


def test_a_truncated_or_failed_search_does_not_solve():
    cut = candidate("x", "A", finish=Finish.LENGTH)
    cell = outcome_cell([result("p", [cut]), result("q", [candidate("x", "A")], failed="no score")], "beam", 4)
    assert cell.solved_P.tolist() == [0, 0]
    assert cell.found_P.tolist() == [0, 1], "the answer of a failed search is still a row"
    assert cell.rows_P.tolist() == [0, 1]


def test_a_missing_problem_is_named(tmp_path):
    write_results([result("p", [candidate("x", "A")])], tmp_path / "shard-00000.jsonl")
    with pytest.raises(DataError, match=r"beam @ 4 lacks 2 of 3 problems, the first is 'q'"):
        searched_cell(tmp_path, "beam", 4, ("p", "q", "r"))


def test_pools_are_read_as_evaluate_reads_them(tmp_path):
    stored = [result("p", [candidate("x", "A"), candidate("y", None)]), result("q", [candidate("x", "B")] * 2)]
    write_results(stored, tmp_path / "pool.jsonl")
    assert read_pools(tmp_path / "pool.jsonl") == [reduce_pool(one) for one in stored]


def test_one_half_measures_and_the_other_tells_difficulty():
    pool = result("p", [candidate(str(i), "A") for i in range(6)])
    first, rest = halves(pool, 4)
    assert [c.text for c in first.candidates] == ["0", "1", "2", "3"]
    assert [c.text for c in rest.candidates] == ["4", "5"]
    assert (first.spend, rest.spend) == (pool.spend, Spend())


# ---------------------------------------------------------------- grids


def cell(arm, budget, *values):
    array = np.array(values, dtype=np.float64)
    return Cell(arm, budget, array, 10 * array + 1, 20 * array + 1, array, 4 * array)


GRID = Grid(("p", "q"), (cell("a", 1, 0, 1), cell("b", 1, 1, 1), cell("a", 2, 0.5, 1)))


def test_what_a_grid_holds():
    assert GRID.values().tolist() == [[0, 1], [1, 1], [0.5, 1]]
    assert GRID.flops().tolist() == [[1, 11], [11, 11], [6, 11]]
    assert GRID.flops(actual=True).tolist() == [[1, 21], [21, 21], [11, 21]]
    assert GRID.find("a", 2) is GRID.cells[2]
    assert GRID.find("b", 2) is None
    assert [c.name for c in GRID.only(["a", "c"]).cells] == ["a @ 1", "a @ 2"]
    with pytest.raises(DataError, match="none of the arms c, d was measured"):
        GRID.only(["d", "c"])


def test_for_training_data_problems_solved_count_first_and_then_rows():
    """Any right answer 1, all the rows that are kept a tenth more."""
    array = np.array([0.0, 1.0, 1.0])
    found = Cell("a", 1, array * 0, array, array, array, np.array([0.0, 1.0, ROWS_KEPT]))
    assert Grid(("p", "q", "r"), (found,)).values("rows").tolist() == [[0, 1 + 0.1 / ROWS_KEPT, 1.1]]


def test_cells_of_other_problems_are_refused():
    with pytest.raises(DataError, match="a @ 1 has 3 problems, the grid 2"):
        Grid(("p", "q"), (cell("a", 1, 0, 1, 1),))
