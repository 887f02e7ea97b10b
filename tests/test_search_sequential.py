"""The sequential budget replayed on stored pools: the object sample by sample, the strategy, and what it is worth."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from search.belief import beta_prior
from search.early_stopping import stopped_cells
from search.errors import DataError
from search.evaluate import expected_spend
from search.replay import NEVER
from search.sequential import WorthMore, mean_cost, simulate_sequential
from search.strategies.best_of_n import ahead
from search.strategies.sequential import Sequential
from search.types import Spend
from tests.replay_kit import in_order, pool_of, stops_at
from tests.scripted_search import LineTask, StepEngine, TextVerifier, by_table, run_one

scored_lists = st.lists(
    st.tuples(st.sampled_from(["A", "B", "C", None]), st.sampled_from([0.0, 0.3, 0.6, 0.9])), min_size=1, max_size=14
)
prices = st.sampled_from([0.013, 0.047, 0.11, 0.23])


def rule(price, *, a=1.0, b=1.0, cost=1.0, base=0.0, **options):
    return WorthMore({"q": Sequential(a, b, price, cost, base)}, **options)


class NumberedTask(LineTask):
    @staticmethod
    def answer(text):
        return text.partition(":")[2] or None


# ---------------------------------------------------------------- when it stops


@settings(deadline=None)
@given(scored_lists, prices, st.integers(0, 2), st.floats(0.1, 4), st.floats(0.1, 4), st.sampled_from([0, 0.2, 0.7]))
def test_the_replay_is_the_object_sample_by_sample(pairs, price, least, a, b, base):
    answers, scores = [x for x, _ in pairs], [s if x else None for x, s in pairs]
    belief, expected = Sequential(a, b, price, 2.0, base), None
    for num in range(len(pairs) + 1):
        if num >= least and not belief.worth_more():
            expected = num
            break
        belief = belief.update(scores[num : num + 1])
    assert stops_at(rule(price, a=a, b=b, cost=2.0, base=base, least=least), answers, scores) == expected


@settings(deadline=None)
@given(scored_lists, prices, st.integers(1, 3), st.sampled_from([0.0, 0.2]))
def test_the_replay_is_the_strategy(pairs, price, batch, base):
    texts = [f"{n}:{answer or ''}" for n, (answer, _) in enumerate(pairs)]
    table = {text: score for text, (_, score) in zip(texts, pairs, strict=True)}
    answers, scores = [x for x, _ in pairs], [s if x else None for x, s in pairs]
    for name, answer in (("adaptive_budget", "highest"), ("adaptive_budget_majority", "majority")):
        strategy, verifier = f"{name}(price={price}, batch={batch}, base={base})", TextVerifier(table.__getitem__)
        result = run_one(strategy, len(pairs), StepEngine(by_table({"": texts})), verifier, task=NumberedTask())
        drawn = stops_at(rule(price, base=base, least=batch, batch=batch, answer=answer), answers, scores)
        assert len(result.candidates) == min(drawn or len(pairs), len(pairs))


def test_without_a_verifier_agreement_decides():
    answers = ["A", "B", "A", "A", None, "A"]
    expected, votes = None, [(0, 0), (1, 0), (1, 1), (2, 1), (3, 1), (3, 1), (4, 1)]
    for num, (first, second) in enumerate(votes):
        belief = Sequential(1, 1, 0.04, 1).agreed(num, ahead(first, second) if first else 0.0)
        if num and not belief.worth_more() and expected is None:
            expected = num
    assert stops_at(rule(0.04, answer="majority"), answers) == expected


def test_a_question_that_does_not_pay_is_not_begun():
    assert stops_at(rule(0.6, least=0), ["A"] * 4, [1.0] * 4) == 0
    assert stops_at(rule(0.6), ["A"] * 4, [1.0] * 4) == 1
    found = simulate_sequential([pool_of(["A"] * 4, [1.0] * 4)], {"q": (1, 1)}, 0.6, [4], cost_per_sample=1, least=0)
    assert found[0].samples_P.tolist() == [0]
    assert (found[0].cell.solved_P[0], found[0].cell.flops_P[0]) == (0, 0)


def test_the_answer_is_chosen_as_asked():
    answers, scores = ["B", "A", "A"], [0.6, 0.5, 0.5]
    right = {
        a: rule(0.0, answer=a).run(in_order(answers, scores)).right_R_K[0].tolist()
        for a in ("highest", "weighted", "majority")
    }
    assert right == {"highest": [0, 0, 0], "weighted": [0, 0, 1], "majority": [0, 0, 1]}
    drawn = rule(0.0).run(in_order(answers, scores)).drawn_R
    assert drawn.tolist() == [NEVER]


# ---------------------------------------------------------------- cells


def test_a_cap_is_kept_and_costs_are_those_of_the_samples_drawn():
    """All wrong and all scored 0 under Beta(1, 1): gains 1/2, 1/3, 1/4; a price of 0.3 stops after two."""
    pool = pool_of(["B"] * 8, [0.0] * 8, verifier=3.0)
    found = simulate_sequential([pool], {"q": (1.0, 1.0)}, 0.3, [1, 2, 8], cost_per_sample={"q": 1.0})
    assert [one.samples_P[0] for one in found] == [1, 2, 2]
    fields = tuple(Spend().to_json())
    for one, k in zip(found, (1, 2, 2), strict=True):
        spent = dict(zip(fields, expected_spend(pool, k, scored=True), strict=True))
        assert one.cell.flops_P[0] == pytest.approx(spent["flops_ideal"])
        assert one.cell.actual_P[0] == pytest.approx(spent["flops_actual"])
    assert [one.cell.name for one in found] == [f"adaptive_budget(price=0.3) @ {k}" for k in (1, 2, 8)]


def test_a_sample_costs_its_pools_mean_unless_said_otherwise():
    pool = pool_of(["B", "C", "B", "B"], [0.0] * 4, verifier=3.0)
    whole, one = 2 * (10 + 20) + 6, 2 * (10 + 5) + 3
    assert mean_cost(pool, scored=True) == pytest.approx((whole - one) / 3)
    assert mean_cost(pool, scored=False) == pytest.approx(10)
    assert mean_cost(pool_of(["B"]), scored=False) == pytest.approx(30)
    price = 0.3 / mean_cost(pool, scored=True)
    drawn = simulate_sequential([pool], {"q": (1, 1)}, price, [4])[0].samples_P[0]
    assert drawn == 2
    assert simulate_sequential([pool], {"q": (1, 1)}, price, [4], cost_per_sample=1.0)[0].samples_P[0] == 4


def many_pools(num=300, size=32):
    """Very unequal questions, and a verifier that is often wrong."""
    rng = np.random.default_rng(3)
    rates, pools = rng.beta(0.4, 0.8, num), []
    for i, rate in enumerate(rates):
        right = rng.random(size) < rate
        answers = ["A" if r else f"w{rng.integers(5)}" for r in right]
        scores = [float(np.clip(rng.normal(0.8 if r else 0.3, 0.15), 0, 1)) for r in right]
        pools.append(pool_of(answers, scores, key=str(i), verifier=2.0))
    return pools, rates


def test_correctness_decides_nothing():
    pools, rates = many_pools(40)
    priors = {p.key: tuple(map(float, beta_prior(r, 4))) for p, r in zip(pools, rates, strict=True)}
    turned = [replace(p, correct_N=tuple(not c for c in p.correct_N)) for p in pools]
    found, other = (simulate_sequential(some, priors, 1e-3, [32])[0] for some in (pools, turned))
    assert (found.samples_P == other.samples_P).all()
    assert (found.cell.flops_P == other.cell.flops_P).all()


def test_it_beats_the_same_number_of_samples_for_all():
    """At the mean it spends, and more so where the rates were predicted well."""
    pools, rates = many_pools()
    cells = [
        stopped_cells(pools, WorthMore({p.key: Sequential(1, 1, 0, 1) for p in pools}), [k])[0] for k in range(1, 33)
    ]
    uniform = [(cell.flops_P.mean(), cell.solved_P.mean()) for cell in cells]
    for strength, priors in ((1.2, np.full(len(pools), rates.mean())), (20.0, rates)):
        by_key = {p.key: tuple(map(float, beta_prior(r, strength))) for p, r in zip(pools, priors, strict=True)}
        for price in (3e-3, 1e-3):
            found = simulate_sequential(pools, by_key, price, [32])[0].cell
            same_cost = np.interp(found.flops_P.mean(), *zip(*uniform, strict=True))
            assert found.solved_P.mean() > same_cost + 0.03


def test_a_problem_without_a_prior_is_refused():
    pools = [pool_of(["A"] * 2, [0.5] * 2, key=key) for key in "ab"]
    with pytest.raises(DataError, match="1 problems have no prior or no cost, the first is 'b'"):
        simulate_sequential(pools, {"a": (1, 1)}, 0.1, [2])
    with pytest.raises(DataError, match="the first is 'a'"):
        simulate_sequential(pools, {"a": (1, 1), "b": (1, 1)}, 0.1, [2], cost_per_sample={"b": 1.0})
