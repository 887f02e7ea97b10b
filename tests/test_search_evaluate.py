import json
import tracemalloc
from dataclasses import replace

import pytest

from search import answers, evaluate, stats
from search.errors import DataError
from search.results import read_results, write_results
from search.standings import pool_rows
from search.types import Candidate, Finish, Grade, Problem, SearchResult, Spend


def candidate(answer, grade=Grade.CORRECT, finish=Finish.EOS, score=None):
    return Candidate((1, 2), answer or "", finish, answer=answer, grade=grade, score=score)


RIGHT = candidate("7")
WRONG = candidate("8", Grade.WRONG)
SILENT = candidate(None, Grade.WRONG)
TRUNCATED = candidate("7", Grade.CORRECT, Finish.LENGTH)  # a careless grader's mark must not count
UNGRADED = candidate("7", Grade.UNGRADED)


def result(key, candidates, selected=0):
    spend = Spend(samples=len(candidates), generated_tokens=10 * len(candidates), flops_ideal=1e3)
    return SearchResult(Problem(key, key, "7"), "pool", tuple(candidates), selected, spend, "f" * 16, "0/test")


@pytest.fixture
def write(tmp_path):
    def write(name, results):
        path = tmp_path / name
        write_results(results, path)
        return path

    return write


def test_greedy_counts_truncated_silent_and_ungraded_as_not_solved(write):
    path = write(
        "greedy.jsonl",
        [
            result("a", [RIGHT]),
            result("b", [TRUNCATED]),
            result("c", [SILENT], None),
            result("d", [UNGRADED]),
            result("e", [candidate(None, Grade.UNGRADED)], None),
        ],
    )
    outcomes = evaluate.read_outcomes(path)
    assert dict(outcomes.solved) == {"a": True, "b": False, "c": False, "d": False, "e": False}
    assert outcomes.num_ungraded == 2
    assert outcomes.accuracy.value == pytest.approx(0.2)
    assert outcomes.spend.generated_tokens == 50


def test_the_selected_candidate_counts_and_not_the_first(write):
    path = write("beam.jsonl", [result("a", [WRONG, RIGHT], 1), result("b", [RIGHT, WRONG], None)])
    assert dict(evaluate.read_outcomes(path).solved) == {"a": True, "b": False}


def test_rules_on_one_pool():
    scored = [candidate("7", score=0.6), candidate("8", Grade.WRONG, score=0.9), candidate("7", score=0.5), SILENT]
    pool = evaluate.reduce_pool(result("a", scored))
    assert evaluate.values_at(pool, "pass", [4]) == [1.0]
    assert evaluate.values_at(pool, "gold", [1]) == evaluate.values_at(pool, "pass", [1]) == [0.5]
    assert evaluate.values_at(pool, "majority", [4]) == [1.0]
    assert evaluate.values_at(pool, "best_of_n", [4]) == [0.0]
    assert evaluate.values_at(pool, "best_of_n_weighted", [4]) == [1.0]
    with pytest.raises(ValueError, match="unknown rule 'best'"):
        evaluate.values_at(pool, "best", [1])


def test_truncated_answers_never_vote():
    pool = evaluate.reduce_pool(result("a", [RIGHT, *[candidate("8", Grade.WRONG, Finish.LENGTH)] * 5]))
    assert evaluate.values_at(pool, "majority", [6]) == [1.0]
    assert pool.num_ungraded == 0


def test_summary_names_and_values(write):
    greedy = write("greedy.jsonl", [result("a", [RIGHT]), result("b", [WRONG])])
    pool = write("pool.jsonl", [result("a", [RIGHT, WRONG, RIGHT, SILENT]), result("b", [WRONG] * 4)])
    found = evaluate.summary(greedy, pool, (1, 4))
    names = {f"test/{n}_at_{k}" for n in ("pass", "maj", "search") for k in (1, 4)}
    assert set(found) == names | {"test/accuracy_greedy", "test/ungraded"}
    assert found["test/pass_at_1"] == stats.mean_estimate([0.5, 0.0])
    assert found["test/maj_at_4"].value == found["test/search_at_4"].value == 0.5
    assert evaluate.summary(greedy, pool, (4,), rule="majority")["test/search_at_4"].value == 0.5
    rows = evaluate.metric_rows(found)
    assert json.loads(json.dumps(rows)) == rows
    assert {"name": "test/accuracy_greedy", "value": 0.5, "se": pytest.approx(0.5)} in rows


def test_a_pool_smaller_than_k_is_named(write):
    pool = write("pool.jsonl", [result("a", [RIGHT] * 4), result("b", [RIGHT] * 2), result("c", [RIGHT] * 3)])
    with pytest.raises(DataError, match="k = 4 needs 4 samples of every problem, but 'b' has 2"):
        evaluate.read_pool(pool, (1, 4))


def test_uneven_pools_use_all_their_samples(write):
    pool = write("pool.jsonl", [result("a", [RIGHT, WRONG]), result("b", [RIGHT, WRONG, WRONG, WRONG])])
    figures = evaluate.read_pool(pool, (1, 2))
    assert figures.by_key("pass", 1) == {"a": 0.5, "b": 0.25}
    assert figures.counts == {"a": (1, 2), "b": (1, 4)}
    rows = pool_rows(figures, {"pass": "pass", "majority": "majority"})
    spends = {(row.strategy, row.budget): row.spend.generated_tokens for row in rows}
    assert spends == {("pass", 1): 20, ("pass", 2): 40, ("majority", 1): 20, ("majority", 2): 40}


def test_unscored_answers_cannot_be_ranked(write):
    pool = write("pool.jsonl", [result("a", [RIGHT, WRONG])])
    with pytest.raises(DataError, match="'a' has answers without a score"):
        evaluate.read_pool(pool, (1,), ("best_of_n",))


def test_bad_files_are_named(write, tmp_path):
    path = write("twice.jsonl", [result("a", [RIGHT]), result("a", [RIGHT])])
    with pytest.raises(DataError, match="problem 'a' comes twice"):
        evaluate.read_outcomes(path)
    with path.open("a") as file:
        file.write('{"key": 3\n')
    with pytest.raises(DataError, match=r"twice\.jsonl, line 3: not a search result"):
        list(read_results(path))
    with pytest.raises(DataError, match="cannot be read"):
        evaluate.read_outcomes(tmp_path / "missing.jsonl")


def test_shards_in_a_folder_are_read_in_order(write, tmp_path):
    for number in (1, 0):
        write(f"shard-{number:05d}.jsonl", [result(f"p{number}", [RIGHT, WRONG])])
    assert [r.problem.key for r in read_results(tmp_path)] == ["p0", "p1"]
    assert evaluate.total_spend(tmp_path).samples == 4


def test_a_failed_problem_is_not_solved_by_anything(write):
    failed = replace(result("b", [], None), failed="its prompt is too long")
    greedy = write("greedy.jsonl", [result("a", [RIGHT]), failed, replace(result("c", [RIGHT]), failed="no scores")])
    outcomes = evaluate.read_outcomes(greedy)
    assert dict(outcomes.solved) == {"a": True, "b": False, "c": False}
    assert outcomes.failures == ("its prompt is too long", "no scores")
    pool = write("pool.jsonl", [result("a", [RIGHT, RIGHT]), failed])
    figures = evaluate.read_pool(pool, (1, 2))
    assert figures.by_key("pass", 2) == {"a": 1.0, "b": 0.0}
    assert figures.failures == ("its prompt is too long",)


def test_a_verifier_that_failed_on_a_problem_costs_only_the_rules_that_need_it(write):
    scored = result("a", [candidate("7", score=0.6), candidate("7", score=0.5)])
    bad = replace(result("b", [RIGHT, RIGHT]), failed="the verifier returned nan")
    figures = evaluate.read_pool(write("pool.jsonl", [scored, bad]), (1,), ("majority", "best_of_n", "sharpened"))
    assert figures.by_key("majority", 1) == {"a": 1.0, "b": 1.0}
    assert figures.by_key("best_of_n", 1) == figures.by_key("sharpened", 1) == {"a": 1.0, "b": 0.0}
    assert (figures.failures, figures.unscored) == ((), ("the verifier returned nan",))


def test_another_rule_chooses_among_the_stored_candidates(write):
    found = [candidate("8", Grade.WRONG, score=0.9), candidate("7", score=0.5), candidate("7", score=0.3)]
    path = write("beam.jsonl", [result("a", found, 0)])
    assert dict(evaluate.read_outcomes(path).solved) == {"a": False}
    assert dict(evaluate.read_outcomes(path, answers.majority).solved) == {"a": True}


def test_sharpening_goes_towards_the_highest_score():
    scored = [candidate("8", Grade.WRONG, score=0.6), candidate("8", Grade.WRONG, score=0.6), candidate("7", score=0.9)]
    pool = evaluate.reduce_pool(result("a", scored))
    assert evaluate.values_at(pool, "best_of_n_weighted", [3]) == [0.0]
    assert evaluate.values_at(pool, "sharpened", [3]) == [1.0]


# ---------------------------------------------------------------- spend of a part of a pool


def drawn(texts, *, first=0, prompt=10, per_token=2.0, verifier_tokens=0):
    """A pool as an engine that computes a shared prompt once would leave it; a text of n characters has n tokens."""
    candidates = tuple(
        Candidate(tuple(range(len(t))), t, Finish.EOS, answer=t, grade=Grade.WRONG, path=(first + i,))
        for i, t in enumerate(texts)
    )
    generated = sum(map(len, texts))
    verifier = {"verifier_flops_ideal": 5.0 * verifier_tokens, "verifier_flops_actual": 7.0 * verifier_tokens}
    spend = Spend(
        samples=len(texts),
        generated_tokens=generated,
        prefilled_tokens=prompt,
        cached_tokens=prompt * (len(texts) - 1),
        verifier_tokens=verifier_tokens,
        flops_ideal=per_token * (generated + prompt) + verifier["verifier_flops_ideal"],
        flops_actual=per_token * (generated + prompt) + verifier["verifier_flops_actual"],
        **verifier,
    )
    return SearchResult(Problem("a", "a", "7"), "pool", candidates, 0, spend, "f" * 16, "0", prompt_ids=(1,) * prompt)


def spend_at(pool, k, *, scored=False):
    names = Spend().to_json()
    return dict(zip(names, evaluate.expected_spend(evaluate.reduce_pool(pool), k, scored=scored), strict=True))


def test_the_prompt_is_paid_once_however_few_samples_follow():
    pool = drawn(["xx", "yyyy", "zz", "wwww"])
    one = spend_at(pool, 1)
    assert one["generated_tokens"] == 3
    assert (one["prefilled_tokens"], one["cached_tokens"]) == (10, 0)
    assert one["flops_ideal"] == one["flops_actual"] == pytest.approx(2 * 13)
    assert spend_at(pool, 4) == pytest.approx(pool.spend.to_json())


def test_equal_answers_are_read_once_by_the_verifier():
    pool = drawn(["xx", "xx", "yy", "yy"], verifier_tokens=40)
    assert spend_at(pool, 4, scored=True) == pytest.approx(pool.spend.to_json())
    assert spend_at(pool, 1, scored=True)["verifier_tokens"] == pytest.approx(20)  # one of the two
    assert spend_at(pool, 2, scored=True)["verifier_tokens"] == pytest.approx(20 * (2 * 5 / 6))
    plain = spend_at(pool, 4)
    assert plain["verifier_tokens"] == plain["verifier_flops_ideal"] == 0
    assert plain["flops_ideal"] == pytest.approx(2 * (8 + 10))


def test_blocks_of_samples_are_one_pool(write):
    whole = drawn(["a", "bb", "ccc", "dddd"])
    blocks = [write("0.jsonl", [drawn(["a", "bb"])]), write("1.jsonl", [drawn(["ccc", "dddd"], first=2)])]
    order = {"a": 0}
    (found,) = evaluate.joined(blocks, order, 4)
    assert [c.path for c in found.candidates] == [(0,), (1,), (2,), (3,)]
    assert found.spend.generated_tokens == whole.spend.generated_tokens
    assert found.spend.flops_ideal == pytest.approx(whole.spend.flops_ideal)  # the prompt is distinct once
    assert found.spend.prefilled_tokens == 20  # and was computed twice
    (part,) = evaluate.joined([write("2.jsonl", [whole])], order, 3)
    assert [c.text for c in part.candidates] == ["a", "bb", "ccc"]
    assert part.spend.generated_tokens == 6
    assert part.spend.flops_ideal == pytest.approx(2 * (10 + 6))


def test_a_problem_that_a_block_lacks_is_left_out(write):
    first = write("0.jsonl", [result(key, [RIGHT]) for key in "abd"])
    second = write("1.jsonl", [result(key, [WRONG]) for key in "bcd"])
    found = list(evaluate.joined([first, second], {key: i for i, key in enumerate("abcd")}, 2))
    assert [(r.problem.key, len(r.candidates)) for r in found] == [("b", 2), ("d", 2)]


def test_accuracy_by_difficulty_keeps_ties_together():
    rates = {f"p{i}": r for i, r in enumerate([0, 0, 0, 0.1, 0.2, 0.3, 0.5, 0.7, 0.9, 1.0])}
    found = evaluate.by_difficulty({key: rate > 0.4 for key, rate in rates.items()}, rates)
    assert [b.bin for b in found] == sorted(b.bin for b in found)
    assert sum(b.accuracy.n for b in found) == 10
    assert (found[0].accuracy.value, found[-1].accuracy.value) == (1.0, 0.0)
    assert (found[-1].low, found[-1].high, found[-1].accuracy.n) == (0, 0, 3)
    with pytest.raises(DataError, match="1 problems have no base pass rate, the first is 'new'"):
        evaluate.by_difficulty({"new": 1.0}, rates)


def test_memory_stays_flat(tmp_path):
    """A file of 12 MB is summarised within 2 MB: of a problem only its figures stay."""
    heavy = Candidate(tuple(range(4000)), "x" * 4000, answer="7", grade=Grade.CORRECT, finish=Finish.EOS)
    path = tmp_path / "pool.jsonl"
    with path.open("w") as file:
        for i in range(100):
            file.write(json.dumps(result(f"p{i}", [heavy] * 5).to_json()) + "\n")
    assert path.stat().st_size > 10e6
    tracemalloc.start()
    try:
        evaluate.read_pool(path, (1, 4))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 2e6
