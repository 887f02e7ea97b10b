import json
import tracemalloc

import pytest

from search import evaluate, stats
from search.errors import DataError
from search.results import read_results, write_results
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
    spends = {(row.strategy, row.budget): row.spend.generated_tokens for row in evaluate.table(figures)}
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


def test_eval_document(write):
    greedy = evaluate.read_outcomes(write("greedy.jsonl", [result("a", [RIGHT]), result("b", [UNGRADED])]))
    rows = [evaluate.outcome_row("greedy", 1, greedy)]
    document = json.loads(json.dumps(evaluate.to_json("countdown", 2, greedy.num_ungraded, rows)))
    assert (document["task"], document["n"], document["ungraded"]) == ("countdown", 2, 1)
    assert document["results"] == [
        {
            "strategy": "greedy",
            "budget": 1,
            "accuracy": 0.5,
            "se": pytest.approx(0.5),
            "spend": Spend(samples=2, generated_tokens=20, flops_ideal=2e3).to_json(),
        }
    ]


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
