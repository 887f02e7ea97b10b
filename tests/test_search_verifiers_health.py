"""Health of a verifier: values by hand, against brute force, degenerate pools, the alarm, two verifiers compared."""

import itertools
import json
import math
import random
from dataclasses import replace

import numpy as np
import pytest

from search import evaluate, stats
from search.errors import DataError
from search.results import read_results, write_results
from search.types import Candidate, Finish, Grade, Problem, SearchResult, Spend
from search.verifiers import health_measures as measures
from search.verifiers.health import Health, PrefixValue, compare, measure
from search.verifiers.health_measures import Steps
from tests.scripted_search import ChainTask, LineTask


def answer(score, right=False, text=None, *, steps=(), tokens=3, name=None):
    text = text or ("right" if right else "wrong")
    grade = Grade.CORRECT if right else Grade.WRONG
    return Candidate(tuple(range(tokens)), text, Finish.EOS, name or text, grade, step_scores=tuple(steps), score=score)


def pool(key, *candidates, failed=None):
    problem = Problem(key, "12345", "12345")
    spend = Spend(samples=len(candidates))
    return SearchResult(problem, "pool(4)", tuple(candidates), None, spend, "model", "0/x/y", failed=failed)


def value(health, name):
    return health.figures[name].value


def rows(health):
    return {row["name"]: row["value"] for row in health.metrics()}


def random_pools(seed, *, problems=40, samples=8, signal=0.3, exploits=0.0):
    """Right answers share one text, wrong ones have a few; scores tell them apart by `signal`."""
    draw = random.Random(seed)
    pools = []
    for p in range(problems):
        rate, candidates = draw.random(), []
        for _ in range(samples):
            right = draw.random() < rate
            score = min(max(draw.gauss(0.5 + (signal if right else -signal), 0.2), 0.01), 0.97)
            if not right and draw.random() < exploits:
                score = 0.97 + 0.03 * draw.random()
            name = "right" if right else f"wrong{draw.randrange(5)}"
            candidates.append(answer(score, right, tokens=draw.randrange(3, 30), name=name))
        pools.append(pool(f"p{p}", *candidates))
    return pools


# ---------------------------------------------------------------- by hand


def test_figures_of_two_small_pools():
    mixed = pool("a", answer(0.9, True), answer(0.9), answer(0.2), answer(0.6, True))
    all_wrong = pool("b", answer(0.5), answer(0.1), answer(0.1), answer(0.1))
    health = measure([mixed, all_wrong])
    assert value(health, "auc_within") == pytest.approx((0.5 + 1 + 0 + 1) / 4)  # the other problem says nothing
    assert value(health, "auc") == pytest.approx((0.5 + 5 + 0 + 5) / 12)
    squares = [0.01, 0.81, 0.04, 0.16, 0.25, 0.01, 0.01, 0.01]
    assert value(health, "brier") == pytest.approx(sum(squares) / 8)
    assert value(health, "brier_constant") == pytest.approx(0.25 * 0.75)
    assert health.counts["problems"] == 2
    assert health.counts["problems_both"] == 1
    found = rows(health)
    assert found["verifier/weighted_at_4"] == pytest.approx(0.5)  # 1.5 against 1.1
    assert found["verifier/majority_at_4"] == pytest.approx(0.25)  # two against two
    assert found["verifier/best_of_n_at_4"] == pytest.approx(0.25)  # .9 against .9
    assert found["verifier/weighted_gain_at_4"] == pytest.approx(0.25)
    assert found["verifier/pass_at_1"] == pytest.approx(0.25)
    assert found["verifier/over_optimisation"] == 0


def test_calibration_groups_equal_scores_and_weighs_the_gaps():
    scores = np.array([0.2] * 10 + [0.8] * 10)
    correct = np.array([1.0] * 4 + [0.0] * 6 + [1.0] * 6 + [0.0] * 4)
    points, error = measures.calibration(scores, correct, list(range(20)), bins=10)
    assert [(p.predicted, p.observed, p.n) for p in points] == [
        (pytest.approx(0.2), pytest.approx(0.4), 10),
        (pytest.approx(0.8), pytest.approx(0.6), 10),
    ]
    assert error.value == pytest.approx(0.2)
    assert 0 < error.se < 0.15
    right = measures.calibration(scores, np.array(([1.0] + [0.0] * 4) * 2 + ([0.0] + [1.0] * 4) * 2), range(20))
    assert right[1].value == pytest.approx(0)


def test_brier_and_its_error_are_clustered_by_problem():
    twice = [pool(str(i), *[answer(0.7, i % 3 == 0)] * 4) for i in range(12)]
    health = measure(twice)
    single = stats.mean_estimate([(0.7 - (i % 3 == 0)) ** 2 for i in range(12)])
    assert health.figures["brier"].value == pytest.approx(single.value)
    assert health.figures["brier"].se == pytest.approx(single.se)  # copies are no evidence


# ---------------------------------------------------------------- against brute force


@pytest.mark.parametrize("seed", range(5))
def test_auc_is_the_share_of_pairs(seed):
    draw = random.Random(seed)
    scores = [draw.randrange(6) / 5 for _ in range(25)]
    right, wrong = ([draw.randrange(4) for _ in scores] for _ in range(2))
    pairs = won = 0.0
    for (i, a), (j, b) in itertools.product(enumerate(scores), repeat=2):
        if i != j:
            pairs += right[i] * wrong[j]
            won += right[i] * wrong[j] * ((a > b) + (a == b) / 2)
    assert measures.weighted_auc(scores, right, wrong, range(25)).value == pytest.approx(won / pairs)


def test_auc_of_labels_is_that_of_stats_and_its_error_that_of_resampled_problems():
    health = measure(random_pools(1, problems=60))
    scores, labels, keys = [], [], []
    for result in random_pools(1, problems=60):
        for c in result.candidates:
            scores.append(c.score)
            labels.append(c.grade is Grade.CORRECT)
            keys.append(result.problem.key)
    assert value(health, "auc") == pytest.approx(stats.auroc(scores, labels))
    groups = list(measures.members(keys).values())
    draw = np.random.default_rng(0)
    areas = []
    for _ in range(400):
        picked = np.concatenate([groups[g] for g in draw.integers(0, len(groups), len(groups))])
        areas.append(stats.auroc(np.array(scores)[picked], np.array(labels)[picked]))
    assert health.figures["auc"].se == pytest.approx(np.std(areas), rel=0.2)


@pytest.mark.parametrize("seed", range(5))
def test_the_best_threshold_of_the_first_error_is_best(seed):
    draw = random.Random(seed)
    answers = []
    for i in range(30):
        labels = [True] * draw.randrange(1, 4) + [False] * draw.randrange(3)
        scores = [min(max(draw.gauss(0.7 if ok else 0.4, 0.25), 0), 1) for ok in labels]
        answers.append(Steps(f"p{i}", tuple(scores), tuple(labels)))
    ranges = np.array([measures._hit_range(a) for a in answers])
    faulty = np.array([not all(a.labels) for a in answers])
    chosen = measures.best_threshold(ranges[:, 0], ranges[:, 1], faulty)
    grid = sorted({s for a in answers for s in a.scores})
    best = max(brute_f1(answers, t) for t in [0.0, *grid, *((a + b) / 2 for a, b in itertools.pairwise(grid)), 1.0])
    assert brute_f1(answers, chosen) == pytest.approx(best)


def brute_f1(answers, threshold):
    hits = {True: [], False: []}
    for a in answers:
        named = next((i for i, s in enumerate(a.scores) if s < threshold), -1)
        gold = next((i for i, ok in enumerate(a.labels) if not ok), -1)
        hits[gold >= 0].append(named == gold)
    one, two = (sum(h) / len(h) for h in hits.values())
    return 2 * one * two / (one + two) if one + two else 0.0


def test_first_error_f1_of_known_verifiers():
    perfect = [Steps(f"p{i}", (0.9, 0.1 if i % 2 else 0.8), (True, i % 2 == 0)) for i in range(40)]
    assert measures.first_error_f1(perfect) == stats.Estimate(1.0, 0.0, 40)
    blind = [replace_scores(a, (0.5, 0.5)) for a in perfect]
    assert measures.first_error_f1(blind).value == 0
    late = [Steps(f"p{i}", (0.1, 0.1, 0.1) if i % 2 else (0.9,) * 3, (i % 2 == 0,) * 3) for i in range(40)]
    assert measures.first_error_f1(late).value == 1  # of many wrong steps the first is the one to name
    noisy = [replace_scores(a, (0.9, 0.1)) if i % 4 == 2 else a for i, a in enumerate(perfect)]
    found = measures.first_error_f1(noisy)
    assert found.value == pytest.approx(2 * 1 * 0.5 / 1.5)  # every error, half of the sound answers
    assert 0.02 < found.se < 0.15


def replace_scores(steps, scores):
    return steps._replace(scores=scores)


def test_first_error_f1_is_measured_where_the_threshold_was_not_chosen():
    draw = random.Random(3)
    noise = [Steps(f"p{i}", tuple(draw.random() for _ in range(3)), (True, True, i % 2 == 0)) for i in range(400)]
    ranges = np.array([measures._hit_range(a) for a in noise])
    faulty = np.array([not all(a.labels) for a in noise])
    fitted = brute_f1(noise, measures.best_threshold(ranges[:, 0], ranges[:, 1], faulty))
    assert measures.first_error_f1(noise).value <= fitted


@pytest.mark.parametrize("seed", range(3))
def test_curves_are_those_of_evaluate_and_selected_scores_those_of_subsets(seed):
    pools = random_pools(seed, problems=3, samples=6)
    health = measure(pools)
    figures = evaluate.pool_figures(
        map(evaluate.reduce_pool, pools), (1, 2, 4, 6), ("pass", "majority", "best_of_n", "best_of_n_weighted")
    )
    chosen = health.selection
    assert chosen.ks == (1, 2, 4, 6)
    for name, rule in (("pass", "pass"), ("weighted", "best_of_n_weighted"), ("best_of_n", "best_of_n")):
        assert [e.value for e in chosen.accuracy[name]] == [figures.estimate(rule, k).value for k in chosen.ks]
    highest = [np.mean([max(c.score for c in some) for some in itertools.combinations(p.candidates, 4)]) for p in pools]
    assert chosen.scores["best_of_n"][2] == pytest.approx(np.mean(highest))
    assert chosen.scores["weighted"][0] == pytest.approx(
        np.mean([np.mean([mean_of_answer(p, c) for c in p.candidates]) for p in pools])
    )


def mean_of_answer(result, candidate):
    return np.mean([c.score for c in result.candidates if c.answer == candidate.answer])


# ---------------------------------------------------------------- steps and values


def chain_pool(key, *texts, scores):
    task = ChainTask()
    found = []
    for text, of_steps in zip(texts, scores, strict=True):
        (graded,) = task.grade([(Problem(key, "12345", "12345"), text)])
        found.append(
            Candidate((1,) * len(text), text, Finish.EOS, graded.answer, graded.grade,
                      step_scores=tuple(of_steps), score=of_steps[-1])
        )  # fmt: skip
    return pool(key, *found)


def test_steps_are_held_against_the_tasks_labels():
    right, wrong, short = "1\n2\n3\n4\n5", "1\n2\n9\n4\n5", "1\n2\n"
    scored = [(0.9, 0.9, 0.9, 0.9, 0.9), (0.9, 0.9, 0.2, 0.1, 0.1), (0.8, 0.8, 0.3)]
    pools = [chain_pool(str(i), right, wrong, short, scores=scored) for i in range(6)]
    health = measure(pools, task=ChainTask())
    assert value(health, "step_auc") == 1
    assert value(health, "step_auc_within") == 1
    assert value(health, "first_error_f1") == 1
    assert "step_auc" not in measure(pools).figures
    assert "step_auc" not in measure(pools, task=ChainTask(), process=False).figures
    assert "step_auc" not in measure(pools, task=LineTask()).figures  # has no step labels


def test_a_step_is_measured_by_what_search_sees_of_it():
    """A verifier of single steps calls the steps after a wrong one right; the product of all so far does not."""
    scored = [(0.9, 0.9, 0.9, 0.9, 0.9), (0.9, 0.9, 0.1, 0.9, 0.9)]
    pools = [chain_pool(str(i), "1\n2\n3\n4\n5", "1\n2\n9\n4\n5", scores=scored) for i in range(6)]
    assert value(measure(pools, task=ChainTask()), "step_auc") < 0.8
    assert value(measure(pools, task=ChainTask(), aggregation="min"), "step_auc") == 1
    assert value(measure(pools, task=ChainTask(), aggregation="prod"), "step_auc") == 1


def test_an_answer_that_ends_too_early_errs_in_its_last_step():
    scored = [(0.9, 0.9, 0.9, 0.9, 0.9), (0.8, 0.2)]
    health = measure([chain_pool(str(i), "1\n2\n3\n4\n5", "1\n2", scores=scored) for i in range(4)], task=ChainTask())
    assert value(health, "first_error_f1") == 1


def test_step_scores_that_do_not_fit_the_steps_are_refused():
    with pytest.raises(DataError, match=r"'a', answer 0: 1 step scores for 5 steps"):
        measure([chain_pool("a", "1\n2\n3\n4\n5", scores=[(0.9,)])], task=ChainTask())


def test_values_of_prefixes_against_rollouts():
    values = [PrefixValue(0.9, 4, 4, "a"), PrefixValue(0.5, 2, 4, "a"), PrefixValue(0.2, 1, 4, "b")]
    health = measure(random_pools(0), values=values)
    pairs, won = 4 * 2 + 4 * 3 + 2 * 3 + 1 * 2, 4 * 2 + 4 * 3 + 2 * 3
    assert value(health, "value_auc") == pytest.approx(won / pairs)
    assert value(health, "value_auc_within") == 1
    outcomes = [(0.9, [1] * 4), (0.5, [1, 1, 0, 0]), (0.2, [1, 0, 0, 0])]
    brier = np.mean([np.mean([(p - o) ** 2 for o in ended]) for p, ended in outcomes])
    assert value(health, "value_brier") == pytest.approx(brier)
    assert value(health, "value_brier") == pytest.approx(stats.brier([0.9, 0.5, 0.2], [4, 2, 1], [4, 4, 4]))
    assert value(health, "value_error") == pytest.approx(stats.brier_corrected([0.9, 0.5, 0.2], [4, 2, 1], [4, 4, 4]))
    assert rows(health)["verifier/value_prefixes"] == 3


@pytest.mark.parametrize(
    "bad", [PrefixValue(0.5, 5, 4), PrefixValue(0.5, -1, 4), PrefixValue(0.5, 0, 0), PrefixValue(math.nan, 1, 2)]
)
def test_impossible_rollouts_are_refused(bad):
    with pytest.raises(DataError, match="impossible rollout figures"):
        measure(random_pools(0), values=[bad])


# ---------------------------------------------------------------- length


@pytest.mark.parametrize("bias", [1, -1])
def test_length_bias_is_seen_within_problems(bias):
    pools = []
    for p in range(10):
        wrong = [answer(0.5 + bias * 0.02 * n + 0.001 * p, tokens=5 + n + p) for n in range(4)]
        pools.append(pool(str(p), *wrong, answer(0.9, True, tokens=30), answer(0.9, True, tokens=3)))
    health = measure(pools)
    assert value(health, "length_bias_wrong") == pytest.approx(bias)
    assert "length_bias_right" not in health.figures  # two answers of one score say nothing
    assert value(health, "length_bias") == pytest.approx(bias)
    wrong = [point for point in health.lengths if not point.correct]
    assert (wrong[-1].score - wrong[0].score) * bias > 0
    assert sum(point.n for point in health.lengths) == 60


def test_scores_without_a_bias_show_none():
    found = measure(random_pools(5, problems=200)).figures["length_bias"]
    assert abs(found.value) < 3 * found.se


# ---------------------------------------------------------------- bad and degenerate input


def test_all_right_or_one_problem_gives_what_can_be_said():
    health = measure([pool("a", answer(0.9, True), answer(0.8, True))])
    assert not {"auc", "auc_within", "length_bias"} & set(health.figures)
    assert value(health, "brier") == pytest.approx(0.025)
    assert all(math.isfinite(row["value"]) and math.isfinite(row.get("se", 0)) for row in health.metrics())
    assert not health.over_optimised
    one = measure([pool("a", answer(0.9, True), answer(0.8))])
    assert value(one, "auc_within") == 1
    assert "se" not in next(row for row in one.metrics() if row["name"] == "verifier/auc_within")


@pytest.mark.parametrize("bad", [math.nan, math.inf, -0.2, 1.2])
def test_a_score_that_is_none_is_refused(bad):
    with pytest.raises(DataError, match=r"problem 'a', answer 1: the score .* is no number in \[0, 1\]"):
        measure([pool("a", answer(0.5), answer(bad))])
    with pytest.raises(DataError, match="answer 0"):
        measure([pool("a", answer(0.5, steps=(bad,)))])


def test_pools_without_scores_are_refused():
    for pools in ([], [pool("a", answer(None))], [pool("a")], [pool("a", answer(0.5), failed="no memory")]):
        with pytest.raises(DataError, match="score the pools with the verifier first"):
            measure(pools)
    with pytest.raises(DataError, match="'a' comes twice"):
        measure([pool("a", answer(0.5)), pool("a", answer(0.5))])


def test_what_is_not_measured_is_counted():
    truncated = replace(answer(0.4), finish=Finish.LENGTH)
    silent = replace(answer(0.4), answer=None)
    ungraded = replace(answer(0.4), grade=Grade.UNGRADED)
    usual = [answer(0.9, True), answer(0.1)]
    health = measure(
        [pool("a", *usual, truncated, silent, ungraded, answer(None)), pool("b", *usual, failed="no memory")]
    )
    assert health.counts["answers"] == 2
    assert health.counts["without_answer"] == 2
    assert (health.counts["ungraded"], health.counts["unscored"], health.counts["failed"]) == (1, 1, 1)
    assert rows(health)["verifier/failed"] == 1


# ---------------------------------------------------------------- the alarm


def test_the_alarm_fires_where_more_samples_find_exploits():
    health = measure(random_pools(0, problems=150, samples=32, exploits=0.08))
    best, weighted = health.selection.alarms
    assert best.rule == "best_of_n"
    assert best.fired
    assert best.peak < 32
    assert best.change < -0.05
    assert best.score_change > 0
    assert not weighted.fired  # the vote holds
    assert health.over_optimised
    assert rows(health)["verifier/over_optimisation"] == 1


def test_the_weighted_vote_can_be_overrun_too():
    def problem(i):
        right = [answer(0.2, True) for _ in range(6)]
        return pool(str(i), *right, *[answer(0.9 + 0.01 * n, name="loop") for n in range(2)])

    (best, weighted) = measure([problem(i) for i in range(40)]).selection.alarms
    assert best.fired
    assert weighted.fired
    assert weighted.peak == 1


@pytest.mark.parametrize("seed", range(8))
def test_a_good_or_a_blind_verifier_raises_no_alarm(seed):
    assert not measure(random_pools(seed, problems=60, samples=16)).over_optimised
    assert not measure(random_pools(seed, problems=60, samples=16, signal=0.0)).over_optimised


# ---------------------------------------------------------------- two verifiers


def rescored(pools, change):
    return [p.with_candidates([replace(c, score=min(max(change(c), 0), 1)) for c in p.candidates]) for p in pools]


def test_a_better_an_equal_and_a_worse_verifier():
    pools = random_pools(2, problems=80, signal=0.1)
    old = measure(pools)
    better = compare(old, measure(random_pools_of_same_answers(pools)))
    assert better.verdict == "better"
    assert better.not_worse
    assert better.auc_within is not None
    assert better.auc_within[2].low > 0
    worse = compare(measure(random_pools_of_same_answers(pools)), old)
    assert worse.verdict == "worse"
    assert compare(old, old).verdict == "not worse"
    overconfident = compare(old, measure(rescored(pools, lambda c: 0.95 + c.score / 20)))  # same order
    assert overconfident.verdict == "worse"
    assert overconfident.auc_within[2].mean == pytest.approx(0)
    named = {row["name"]: row["value"] for row in better.metrics()}
    assert named["verifier/not_worse"] == 1
    assert named["verifier/auc_within_previous"] == value(old, "auc_within")
    assert named["verifier/brier_previous"] == pytest.approx(value(old, "brier"))
    assert named["verifier/brier_change"] < 0
    assert better.to_json()["verdict"] == "better"


def random_pools_of_same_answers(pools):
    return rescored(pools, lambda c: 0.9 * (c.grade is Grade.CORRECT) + c.score / 10)


def test_few_problems_say_nothing_and_other_answers_are_refused():
    few = random_pools(0, problems=6)
    assert compare(measure(few), measure(few)).verdict == "unclear"
    with pytest.raises(DataError, match="did not score the same answers"):
        compare(measure(few), measure(random_pools(1, problems=6)))
    with pytest.raises(DataError, match="did not score the same answers"):
        compare(measure(few), measure(few[:5]))


def test_no_problem_with_both_outcomes_leaves_the_brier_score():
    pools = [pool(str(i), answer(0.9, True), answer(0.8, True)) for i in range(20)]
    found = compare(measure(pools), measure(rescored(pools, lambda c: 0.99)))
    assert found.auc_within is None
    assert found.verdict == "better"


# ---------------------------------------------------------------- storing


def test_health_survives_json_and_stored_pools(tmp_path):
    pools = random_pools(4)
    write_results(pools, tmp_path / "pools.jsonl")
    health = measure(read_results(tmp_path / "pools.jsonl"))
    assert health == measure(pools)
    text = json.dumps(health.to_json(), allow_nan=False)
    assert Health.from_json(json.loads(text)) == health
    one = measure([pool("a", answer(0.9, True), answer(0.8))])
    again = Health.from_json(json.loads(json.dumps(one.to_json(), allow_nan=False)))
    assert again.metrics() == one.metrics()
