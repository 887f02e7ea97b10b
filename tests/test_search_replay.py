"""Stored pools in random orders: votes as `search.answers` counts them, spend as `search.evaluate` does."""

from dataclasses import dataclass, replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from search import answers, stats
from search.cells import pool_cells
from search.errors import DataError
from search.evaluate import expected_spend
from search.replay import BLOCK, NEVER, Replay, Run, first_stop, replays, spend_table, stopped
from search.strategies.best_of_n import ahead
from search.types import Spend
from tests.replay_kit import candidates_of, in_order, pool_of

samples = st.lists(
    st.tuples(st.sampled_from(["A", "B", "C", "D", None]), st.sampled_from([None, 0.0, 0.1, 0.3, 0.5, 0.9, 1.0])),
    min_size=1,
    max_size=12,
)
FIELDS = tuple(Spend().to_json())


@dataclass(frozen=True)
class At:
    """Stops after so many samples, whatever they are."""

    num: int = NEVER
    answer: str = "majority"
    scored: bool = False
    name: str = "at"

    def run(self, replay: Replay) -> Run:
        rows = len(replay.answers_R_K)
        return Run(np.full(rows, self.num), getattr(replay, self.answer).right)


# ---------------------------------------------------------------- votes


@settings(deadline=None)
@given(samples)
def test_after_every_sample_the_vote_is_that_of_the_answers_so_far(pairs):
    given_answers, scores = [a for a, _ in pairs], [s if a is not None else None for a, s in pairs]
    replay = in_order(given_answers, scores)
    candidates = candidates_of(given_answers, scores)
    rules = {"majority": answers.majority, "weighted": answers.weighted, "highest": answers.highest}
    for name, rule in rules.items():
        vote = getattr(replay, name)
        for num in range(1, len(pairs) + 1):
            chosen = rule(candidates[:num])
            right = chosen is not None and candidates[chosen].answer == "A"
            assert vote.right[0, num - 1] == right, (name, num)


@settings(deadline=None)
@given(samples)
def test_weights_of_the_first_two_and_of_all(pairs):
    given_answers, scores = [a for a, _ in pairs], [s if a is not None else None for a, s in pairs]
    vote = in_order(given_answers, scores).weighted
    for num in range(1, len(pairs) + 1):
        sums: dict[str, float] = {}
        for answer, score in zip(given_answers[:num], scores[:num], strict=True):
            if answer is not None and score is not None:
                sums[answer] = sums.get(answer, 0.0) + score
        first, second, *_ = [*sorted(sums.values(), reverse=True), 0.0, 0.0]
        found = (vote.top[0, num - 1], vote.second[0, num - 1], vote.total[0, num - 1])
        assert found == pytest.approx((first, second, sum(sums.values())))


def test_certainty_is_the_posterior_of_adaptive_consistency():
    vote = in_order([None, "A", "B", "A", "C", "A", "A"]).majority
    expected = [0.0, ahead(1, 0), ahead(1, 1), ahead(2, 1), ahead(2, 1), ahead(3, 1), ahead(4, 1)]
    assert vote.certainty()[0].tolist() == expected


def test_the_first_stop_is_looked_for_between_batches():
    stops = np.array([[0, 0, 1, 0, 1, 0], [1, 1, 1, 1, 1, 1], [0, 0, 0, 0, 0, 0]], dtype=bool)
    assert first_stop(stops).tolist() == [3, 1, NEVER]
    assert first_stop(stops, 2).tolist() == [NEVER, 2, NEVER]
    assert first_stop(stops, 5).tolist() == [5, 5, NEVER]
    assert first_stop(stops, 7).tolist() == [NEVER] * 3


# ---------------------------------------------------------------- spend


@pytest.mark.parametrize("scored", [False, True])
@pytest.mark.parametrize("num", [1, 2, 9])
def test_so_many_samples_cost_what_the_evaluation_says(num, scored):
    pool = pool_of((["A", "B", "A", None, "C", "A", "D", "D", None] * 2)[:num], verifier=7.0)
    tables = spend_table(pool, num, scored=scored)
    assert tables[:, 0].tolist() == [0, 0]
    for k in range(1, num + 1):
        spent = dict(zip(FIELDS, expected_spend(pool, k, scored=scored), strict=True))
        assert tables[:, k] == pytest.approx([spent["flops_ideal"], spent["flops_actual"]])


def test_where_flops_are_not_known_samples_are_counted():
    pool = replace(pool_of(["A", "B", "A"]), spend=Spend(samples=3, generated_tokens=15), copies=())
    assert spend_table(pool, 3, scored=True).tolist() == [[0, 1, 2, 3]] * 2


# ---------------------------------------------------------------- cells


def test_a_rule_that_never_stops_is_the_expectation_over_the_whole_pool():
    """At k = N every order holds all samples: the cells of the plain rules, exactly."""
    pools = [
        pool_of(["A", "B", "A", "C"], [0.2, 0.9, 0.3, 0.1], key="a", verifier=3.0),
        pool_of(["B", "B", "A", None], [0.2, 0.1, 0.9, None], key="b", verifier=3.0),
    ]
    for answer, rule in (("majority", "majority"), ("weighted", "best_of_n_weighted"), ("highest", "best_of_n")):
        plain = pool_cells(pools, {"x": rule}, [4])[0]
        found = stopped(pools, [At(answer=answer, scored=answer != "majority")], [4])[0][0].cell
        for name in ("solved_P", "flops_P", "actual_P", "found_P", "rows_P"):
            assert getattr(found, name) == pytest.approx(getattr(plain, name)), (answer, name)
        assert (found.arm, found.budget) == ("at", 4)


def test_at_smaller_budgets_it_is_the_expectation_over_subsets_within_chance():
    rng = np.random.default_rng(0)
    pools = [
        pool_of([str(a) for a in rng.choice(list("AABCDE"), 16)], rng.random(16).tolist(), key=str(i), verifier=1.0)
        for i in range(60)
    ]
    budgets = [1, 3, 7, 16]
    for answer, rule in (("majority", "majority"), ("highest", "best_of_n"), ("weighted", "best_of_n_weighted")):
        plain = pool_cells(pools, {"x": rule}, budgets)
        found = stopped(pools, [At(answer=answer, scored=True)], budgets, orders=200)[0]
        for cell, one in zip(plain, found, strict=True):
            assert one.cell.solved_P.mean() == pytest.approx(cell.solved_P.mean(), abs=0.02)
            assert one.cell.found_P.mean() == pytest.approx(cell.found_P.mean(), abs=0.02)
            assert one.samples_P.tolist() == [cell.budget] * 60
            if rule != "majority":
                assert one.cell.flops_P == pytest.approx(cell.flops_P)


def test_what_is_drawn_is_capped_by_the_budget_and_nothing_is_nothing():
    pools = [pool_of(["A"] * 8)]
    found = [[one.samples_P[0] for one in by_budget] for by_budget in stopped(pools, [At(3), At(0)], [2, 4, 8])]
    assert found == [[2, 3, 3], [0, 0, 0]]
    nothing = stopped(pools, [At(0)], [8])[0][0].cell
    values = (nothing.solved_P, nothing.flops_P, nothing.actual_P, nothing.found_P, nothing.rows_P)
    assert [v[0] for v in values] == [0.0] * 5


def test_right_texts_count_once_and_four_at_most():
    texts = replace(pool_of(["A"] * 8), right_copies=(4, 2, 1, 1))
    found = [one.cell.rows_P[0] for one in stopped([texts], [At()], [1, 2, 8])[0]]
    assert found == pytest.approx([1.0, sum(stats.pass_at_k(8, n, 2) for n in (4, 2, 1, 1)), 4.0])
    many = replace(pool_of(["A"] * 8), right_copies=(1,) * 8)
    assert stopped([many], [At()], [8])[0][0].cell.rows_P.tolist() == [4.0]
    wrong = pool_of(["B"] * 8)
    assert stopped([wrong], [At()], [8])[0][0].cell.rows_P.tolist() == [0.0]


def test_an_order_depends_on_its_problem_alone():
    pools = [pool_of(list("ABCDEF"), key=str(i)) for i in range(BLOCK + 5)]
    together = np.concatenate([r.answers_R_K for r in replays(pools, 6, orders=3, seed=1)])
    alone = np.concatenate([next(replays([pool], 6, orders=3, seed=1)).answers_R_K for pool in pools])
    assert (together == alone).all()
    assert (np.sort(together, axis=1) == np.arange(6)).all()
    other = np.concatenate([r.answers_R_K for r in replays(pools, 6, orders=3, seed=2)])
    assert (together != other).any()
    assert len({tuple(row) for row in together}) > 400  # of 720
    cells = [stopped(some, [At()], [2])[0][0].cell for some in (pools, pools[:9])]
    assert (cells[0].solved_P[:9] == cells[1].solved_P).all()


def test_failed_problems_are_not_solved_at_what_they_cost():
    fine = pool_of(["A"] * 4, [0.9] * 4, key="a", verifier=1.0)
    failed = replace(pool_of([], key="b"), failed="its prompt is too long", spend=Spend())
    unscored = replace(pool_of(["A"] * 4, key="c"), unscored="the verifier returned nan")
    by_score = stopped([fine, failed, unscored], [At(1, "highest", True)], [4])[0][0]
    assert by_score.cell.solved_P.tolist() == [1, 0, 0]
    assert by_score.samples_P.tolist() == [1, 0, 4]
    assert by_score.cell.flops_P[1] == 0
    assert by_score.cell.flops_P[2] == unscored.spend.flops_ideal
    by_vote = stopped([fine, failed, unscored], [At(1)], [4])[0][0]
    assert by_vote.cell.solved_P.tolist() == [1, 0, 1]


def test_no_problems_are_empty_cells():
    assert [one.cell.solved_P.shape for one in stopped([], [At()], [1, 2])[0]] == [(0,), (0,)]


@pytest.mark.parametrize(
    ("pools", "budgets", "orders", "message"),
    [
        ([pool_of(["A"] * 4)], [8], 2, "a budget of 8 needs 8 samples, 'q' has 4"),
        ([pool_of(["A"] * 4)], [2], 2, "problem 'q' has answers without a score"),
        ([], [], 2, "give at least one budget of 1 or more"),
        ([], [0], 2, "give at least one budget of 1 or more"),
        ([], [1], 0, "in 0 orders: .* 1 order"),
    ],
)
def test_what_cannot_be_replayed_is_refused(pools, budgets, orders, message):
    with pytest.raises(DataError, match=message):
        stopped(pools, [At(scored=True)], budgets, orders=orders)
