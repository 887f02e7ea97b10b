import json

import pytest

from search.errors import DataError
from search.pool import evaluate_file
from search.types import Grade, Graded


def grade(pairs):
    """The last word is the answer; "crash" makes the grader fail, a gold answer "?" cannot be read."""
    found = []
    for problem, text in pairs:
        if problem.answer == "?":
            raise DataError("gold answer '?' cannot be read")
        answer = text.split()[-1] if text.split() else None
        if answer == "crash":
            found.append(Graded(Grade.UNGRADED, None))
        else:
            found.append(Graded(Grade.CORRECT if answer == problem.answer else Grade.WRONG, answer))
    return found


@pytest.fixture
def write(tmp_path):
    def write(*rows):
        path = tmp_path / "pool.jsonl"
        path.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in rows))
        return path

    return write


def row(name, answer, responses, **more):
    return {"id": name, "question": "?", "answer": answer, "responses": responses, **more}


def accuracies(document):
    return {(r["strategy"], r["budget"]): r["accuracy"] for r in document["results"]}


def test_figures_without_scores(write):
    path = write(row("a", "7", ["it is 7", "7", "8", ""]), row("b", 9, ["crash", "9", "8", "8"]))
    document = evaluate_file(path, "jsonl", [4, 1, 2, 2], grade)
    assert (document["task"], document["n"], document["ungraded"]) == ("jsonl", 2, 1)
    found = accuracies(document)
    assert list(found) == [(s, k) for s in ("pass", "majority") for k in (1, 2, 4)]
    assert found["pass", 1] == pytest.approx((0.5 + 0.25) / 2)
    assert found["pass", 4] == 1.0
    assert found["majority", 4] == 0.5  # "a" by 2 votes to 1, "b" lost 1 to 2
    assert found["majority", 2] == pytest.approx((4 / 6 + (0.5 * 2 + 1) / 6) / 2)
    assert document["results"][1]["spend"]["samples"] == 4
    assert document["results"][1]["se"] > 0
    json.dumps(document, allow_nan=False)


@pytest.mark.parametrize(
    ("aggregation", "best"), [("last", 1.0), ("min", 0.0), ("product", 0.0)], ids=["last", "min", "product"]
)
def test_step_scores_are_aggregated(write, aggregation, best):
    path = write(row("a", "7", ["7", "8"], scores=[[0.1, 0.9], [0.8, 0.8]]))
    document = evaluate_file(path, "jsonl", [2], grade, aggregation=aggregation)
    found = accuracies(document)
    scored = ("best_of_n", "best_of_n_weighted", "best_of_n(vote=sharpened)")
    assert list(found) == [(s, 2) for s in ("pass", "majority", *scored)]
    assert found["best_of_n", 2] == best
    assert document["results"][0]["se"] is None  # one problem has no standard error


def test_scores_gain_over_the_majority_at_the_same_budget(write):
    rows = [row(f"p{i}", "7", ["8", "8", "7"], scores=[0.1, 0.1, 0.9]) for i in range(4)]
    document = evaluate_file(write(*rows), "jsonl", [3], grade)
    found = {r["strategy"]: r for r in document["results"]}
    assert found["best_of_n"]["gain"] == {"over": "majority", "value": 1.0, "low": 1.0, "high": 1.0, "n": 4}
    assert found["best_of_n"]["verifier_gain"]["value"] == 0.0
    assert found["majority"]["gain"] is None


def test_chosen_strategies_and_budgets_that_fit(write):
    path = write(row("a", "7", ["7"] * 20), row("b", "7", ["7"] * 17))
    found = accuracies(evaluate_file(path, "jsonl", None, grade, names={"majority": "majority"}))
    assert list(found) == [("majority", 1), ("majority", 4), ("majority", 16)]
    with pytest.raises(DataError, match="has no scores: 'best_of_n' needs one for every response"):
        evaluate_file(path, "jsonl", None, grade, names={"best_of_n": "best_of_n"})


def test_a_saving_without_tokens_counts_samples(write):
    rows = [row(f"p{i}", "7", ["7", "7", "8", "8"], scores=[0.9, 0.8, 0.1, 0.1]) for i in range(3)]
    document = evaluate_file(write(*rows), "jsonl", [1, 2, 4], grade)
    found = {(r["strategy"], r["budget"]): r for r in document["results"]}
    assert found["best_of_n_weighted", 1]["saving"]["over"] == "majority"
    assert found["best_of_n_weighted", 1]["saving"]["value"] == pytest.approx(1.0)
    assert found["best_of_n_weighted", 4]["saving"]["value"] is None  # no majority is right so often


def test_one_score_per_response_and_the_weighted_vote(write):
    path = write(
        row("a", "7", ["7", "8", "7"], scores=[0.5, 0.9, 0.5]), row("b", "1", ["1", "2", "2"], scores=[1, 0, 0])
    )
    found = accuracies(evaluate_file(path, "jsonl", [3], grade))
    assert found["best_of_n", 3] == 0.5
    assert found["best_of_n_weighted", 3] == 1.0
    assert found["majority", 3] == 0.5


def test_uneven_numbers_of_responses(write):
    path = write(row("a", "7", ["7", "8", "8", "8"]), row("short", "1", ["1", "2"]))
    assert accuracies(evaluate_file(path, "jsonl", [2], grade))["pass", 2] == pytest.approx((0.5 + 1) / 2)
    with pytest.raises(DataError, match="k = 4 needs 4 samples of every problem, but 'short' has 2"):
        evaluate_file(path, "jsonl", [1, 4], grade)


def test_id_and_question_may_be_left_out(write):
    path = write({"answer": "7", "responses": ["7"]}, {"answer": "7", "responses": ["8"]})
    assert evaluate_file(path, "jsonl", [1], grade)["n"] == 2


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        ("{not json", "line 2"),
        ("[1, 2]", "line 2"),
        ({"id": "b", "answer": "7"}, "line 2: 'responses' must be a list"),
        (row("b", "7", []), "line 2: 'responses' must be a list of at least one text"),
        (row("b", "7", ["7", 8]), "line 2: 'responses'"),
        (row("b", None, ["7"]), "line 2: 'answer' must be a text or a number"),
        (row("b", True, ["7"]), "line 2: 'answer'"),
        (row(1.5, "7", ["7"]), "line 2: 'id'"),
        (row("b", "7", ["7"], question=3), "line 2: 'question'"),
        (row("b", "?", ["7"], scores=[1]), r"line 2: gold answer '\?' cannot be read"),
        (row("a", "7", ["7"], scores=[1]), "problem 'a' comes twice"),
        (row("b", "7", ["7"]), "line 2: has no scores, but the rows before have them"),
        (row("b", "7", ["7"], scores=0.5), "line 2: 'scores' must be a list"),
        (row("b", "7", ["7"], scores=[0.5, 1]), "line 2: 2 scores for 1 responses"),
        (row("b", "7", ["7"], scores=[[]]), "line 2: the scores of response 1 are an empty list"),
        (row("b", "7", ["7"], scores=["x"]), "line 2: score 1 is not a finite number"),
        (row("b", "7", ["7"], scores=[[0.5, None]]), "line 2: score 1 is not a finite number"),
        (row("b", "7", ["7"], scores=[True]), "line 2: score 1 is not a finite number"),
    ],
)
def test_a_bad_row_is_named_with_its_reason(write, bad, reason):
    path = write(row("a", "7", ["7"], scores=[0.5]), bad, row("c", "7", ["7"], scores=[0.5]))
    with pytest.raises(DataError, match=reason):
        evaluate_file(path, "jsonl", [1], grade)


def test_scores_that_begin_later_are_refused(write):
    path = write(row("a", "7", ["7"]), row("b", "7", ["7"], scores=[0.5]))
    with pytest.raises(DataError, match="line 2: has scores, but the rows before have none"):
        evaluate_file(path, "jsonl", [1], grade)


@pytest.mark.parametrize("budgets", [[], [0, 1], [-4]])
def test_budgets_are_checked(write, budgets):
    with pytest.raises(DataError, match="give numbers of samples from 1 on"):
        evaluate_file(write(row("a", "7", ["7"])), "jsonl", budgets, grade)


def test_missing_and_empty_files(write, tmp_path):
    with pytest.raises(DataError, match="cannot be read"):
        evaluate_file(tmp_path / "none.jsonl", "jsonl", [1], grade)
    with pytest.raises(DataError, match="holds no problems"):
        evaluate_file(write(), "jsonl", [1], grade)


def test_responses_are_graded_in_chunks(write):
    sizes = []

    def counting(pairs):
        sizes.append(len(pairs))
        return grade(pairs)

    path = write(*(row(f"p{i}", "7", ["7"] * 100) for i in range(30)))
    assert evaluate_file(path, "jsonl", [1], counting)["n"] == 30
    assert sum(sizes) == 3000
    assert max(sizes) < 1200
