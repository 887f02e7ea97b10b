"""Step labels from data sets: layouts, labels, what is set aside and why, what is held out."""

import json
import random

import pytest

from configs.schema import StepLabels
from distill.step_data import DROPPED, read_step_data
from search.errors import DataError
from search.tasks.files import question_key
from search.types import Problem

QUESTIONS = [f"What is {n} plus {n}?" for n in range(40)]


class Words:
    """A task in natural language: any question, paragraphs as steps."""

    name = "words"
    generated = False

    def __init__(self, step_delimiter="\n\n"):
        self.step_delimiter = step_delimiter

    def parse(self, question):
        if not question.strip():
            raise DataError("the question is empty")
        return Problem(question_key(question), question.strip())


def write(path, rows):
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


@pytest.fixture
def source(tmp_path):
    return tmp_path / "steps.jsonl"


def read(path, *, task=None, held_out=(), alike=(), seed=0, **settings):
    keys, others = set(map(question_key, held_out)), set(map(question_key, alike))
    return read_step_data(
        StepLabels(path=str(path), **settings),
        task or Words(),
        held_out=keys.__contains__,
        overlapping=lambda problems: {p.key for p in problems} & others,
        seed=seed,
    )


def row(n=0, steps=("so a", "so b"), labels=(1, 0), **more):
    return {"question": QUESTIONS[n], "steps": [*steps], "labels": [*labels], **more}


def found(data):
    return [(e.problem.question, e.steps, e.labels) for e in data.examples]


def check_counts(data):
    assert data.counts["rows"] == sum(data.counts[name] for name in (*DROPPED, "kept"))
    assert data.counts["kept"] == len(data.examples)
    assert data.counts["rejected"] == len(data.rejected)
    labels = [label for example in data.examples for label in example.labels]
    assert len(labels) == sum(data.counts[name] for name in ("right", "wrong", "unlabelled"))


# ---------------------------------------------------------------- steps


def test_steps_get_the_delimiter_but_for_the_last(source):
    data = read(write(source, [row(steps=("a", "b\n\n", " c\n"), labels=(1, 1, 0))]))
    assert found(data) == [(QUESTIONS[0], ("a\n\n", "b\n\n", "c"), (1.0, 1.0, 0.0))]
    assert data.examples[0].source == "data"
    check_counts(data)


def test_a_solution_whose_last_step_ends_with_the_delimiter_goes_on(source):
    (example,) = read(write(source, [row(steps=("a", "b\n\n"))])).examples
    assert example.steps == ("a\n\n", "b\n\n")


def test_a_step_with_the_delimiter_in_its_middle_is_cut_and_its_end_has_the_label(source):
    data = read(write(source, [row(steps=("a\n\n\nb", "c\n\n# Answer\n\n7"), labels=(1, 0))]))
    steps = ("a\n\n", "b\n\n", "c\n\n", "# Answer\n\n", "7")
    assert found(data) == [(QUESTIONS[0], steps, (None, 1.0, None, None, 0.0))]
    assert (data.counts["unlabelled"], data.counts["right"], data.counts["wrong"]) == (3, 1, 1)


def test_another_delimiter_is_the_tasks(source):
    (example,) = read(write(source, [row(steps=("a;", "b"))]), task=Words(";")).examples
    assert example.steps == ("a;", "b")


# ---------------------------------------------------------------- labels


@pytest.mark.parametrize(
    ("scale", "given", "labels"),
    [
        ("auto", [[1, 0], [0, 1]], [(1, 0), (0, 1)]),
        ("auto", [[True, False], [1, 0.25]], [(1, 0), (1, 0.25)]),
        ("auto", [[1, 0], [0, -1]], [(1, 1), (1, 0)]),  # a 0 of any row is neutral where one is -1
        ("auto", [[1.0, 0.0], [0.0, -1.0]], [(1, 1), (1, 0)]),
        ("ratings", [[1, 0], [0, 1]], [(1, 1), (1, 1)]),
        ("unit", [[0, None], [None, 1]], [(0, None), (None, 1)]),
        ("auto", [[-1, None], [0, 1]], [(0, None), (1, 1)]),
    ],
)
def test_labels_are_shares_or_ratings(source, scale, given, labels):
    data = read(write(source, [row(n, labels=pair) for n, pair in enumerate(given)]), scale=scale)
    assert {question: found for question, _, found in found(data)} == dict(zip(QUESTIONS, labels, strict=False))
    assert data.counts["ratings"] == (2 if scale == "ratings" or any(-1 in pair for pair in given) else 0)
    check_counts(data)


def test_one_fraction_makes_a_minus_one_no_rating(source):
    rows = [*(row(n, labels=(1, 0)) for n in range(20)), row(20, labels=(0.5, 1)), row(21, labels=(-1, 0))]
    data = read(write(source, rows))
    assert [(r.line, r.reason) for r in data.rejected] == [(22, "the label -1 is not in 0..1")]
    assert dict((q, labels) for q, _, labels in found(data))[QUESTIONS[3]] == (1.0, 0.0)


# ---------------------------------------------------------------- layouts


def completion(text, rating):
    return {"text": text, "rating": rating, "flagged": None}


def step(*completions, chosen=None, human=None):
    return {"completions": list(completions), "human_completion": human, "chosen_completion": chosen}


def prm800k(n, steps, finish_reason="solution", pre_generated=None):
    question = {"problem": QUESTIONS[n], "ground_truth_answer": "7", "pre_generated_steps": pre_generated}
    return {
        "labeler": "340d89bc",
        "generation": 9,
        "question": question,
        "label": {"steps": steps, "total_time": 278270, "finish_reason": finish_reason},
    }


PRM800K = [
    prm800k(0, [step(completion("a", 0), chosen=0), step(completion("no", -1), completion("b", 1), chosen=1)]),
    # phase 2: labelled up to the first error, alternatives to which were rated as well
    prm800k(
        1,
        [step(completion("a", 1), chosen=0), step(completion("no", -1), completion("b", 0))],
        "found_error",
        ["a", "no", "c"],
    ),
    prm800k(2, [step(completion("a", 1), chosen=0), step(completion("no", -1))], "found_error", ["a", "other", "c"]),
    # phase 1: what the labeler wrote instead, in both shapes of it that are about
    prm800k(3, [step(completion("no", -1), human={"text": "a", "rating": None}), step(completion("b", 1), chosen=0)]),
    prm800k(4, [step(completion("no", -1), human="a"), step(completion("b", 1), chosen=0)]),
    prm800k(5, [step(completion("a", None), completion("b", 1)), step(completion("?", None))], "give_up"),
    prm800k(6, [step(completion("a", 1), chosen=0), {"completions": None, "chosen_completion": None}], "give_up"),
    prm800k(7, [step(completion("a", 1), chosen=0)], "bad_problem"),
]
EXPECTED = [
    (("a\n\n", "b"), (1.0, 1.0)),
    (("a\n\n", "no\n\n", "c"), (1.0, 0.0, None)),  # labelled no further
    (("a\n\n", "no\n\n"), (1.0, 0.0)),  # how it went on is not told
    (("a\n\n", "b"), (1.0, 1.0)),
    (("a\n\n", "b"), (1.0, 1.0)),
    (("b\n\n", "?\n\n"), (1.0, None)),
    (("a\n\n",), (1.0,)),
]


def by_question(data):
    return {e.problem.question: (e.steps, e.labels) for e in data.examples}


def test_prm800k_follows_the_chosen_or_the_first_rated_completion(source):
    data = read(write(source, PRM800K))
    assert by_question(data) == dict(zip(QUESTIONS, EXPECTED, strict=False))
    assert data.rejected == ()
    assert (data.counts["bad_problem"], data.counts["ratings"]) == (1, 7)
    check_counts(data)


def test_trls_stepwise_supervision(source):
    rows = [{"prompt": QUESTIONS[0], "completions": ["a", "b"], "labels": [True, False]}]
    assert found(read(write(source, rows))) == [(QUESTIONS[0], ("a\n\n", "b"), (1.0, 0.0))]


def test_columns_have_the_users_names(source):
    rows = [{"q": QUESTIONS[0], "s": ["a", "b"], "l": [1, 0], "prompt": "x", "completions": ["y"], "labels": [0]}]
    data = read(write(source, rows), question_column="q", steps_column="s", labels_column="l")
    assert found(data) == [(QUESTIONS[0], ("a\n\n", "b"), (1.0, 0.0))]


def test_layouts_may_be_mixed_and_each_0_means_what_its_own_says(source):
    data = read(write(source, [row(20, labels=(1, 0)), *PRM800K]))
    assert by_question(data)[QUESTIONS[20]][1] == (1.0, 0.0)
    assert by_question(data)[QUESTIONS[0]] == EXPECTED[0]


@pytest.mark.parametrize("rows", [PRM800K, [row(n) for n in range(7)]], ids=["prm800k", "plain"])
def test_a_data_set_of_the_hub_is_the_same(rows, tmp_path, monkeypatch):
    """A folder stands for it: `load_dataset` takes either by the same name."""
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "labelled").mkdir()
    rows = [r for r in rows if not isinstance(r.get("label", {}).get("steps", [{}])[0].get("human_completion"), str)]
    write(tmp_path / "labelled" / "train.jsonl", rows)
    write(tmp_path / "labelled.jsonl", rows)
    assert read("labelled") == read("labelled.jsonl")


def test_a_hub_name_offline_names_the_way_out():
    with pytest.raises(DataError, match=r"'no/such-set'.*set verifier\.steps\.path to a local \.jsonl file"):
        read("no/such-set")


# ---------------------------------------------------------------- rows set aside

BAD_ROWS = {
    "1 labels for 2 steps": row(labels=(1,)),
    "3 labels for 2 steps": row(labels=(1, 0, None)),
    "'steps' is empty": row(steps=(), labels=()),
    "has an entry that is empty": row(steps=("a", " ")),
    "or no text": row(steps=("a", 7)),
    "no 'steps'": {"question": "why?", "labels": [1]},
    "no 'labels'": {"question": "why?", "steps": ["a"]},
    "no 'question'": {"steps": ["a"], "labels": [1]},
    "(text)": row() | {"question": ["why?"]},
    "the label 1.5 is not in 0..1": row(labels=(1, 1.5)),
    "the label -0.1 is not in 0..1": row(labels=(1, -0.1)),
    "the label nan is not in 0..1": json.dumps(row(labels=(1, float("nan")))),
    "the label '+' is no number": row(labels=("+", 1)),
    "no step has a label": row(labels=(None, None)),
    "not JSON": "{",
    "not a JSON object": "[1]",
    "no text (NUL or half": '{"question": "why?", "steps": ["a\\ud800"], "labels": [1]}',
    "holds nothing but the step delimiter": row(steps=(";", "a")),
    "chosen_completion 2 is none of 1": prm800k(0, [step(completion("a", 1), chosen=2)]),
    "'label.steps' is no list of objects": prm800k(0, None),
    "'completions' is no list of objects": prm800k(0, [step("a")]),
    "the rating 2 is none of": prm800k(0, [step(completion("a", 2))]),
    "'label.steps' is empty": prm800k(0, []),
}


@pytest.mark.parametrize("reason", BAD_ROWS)
def test_a_bad_row_is_set_aside_with_its_line_and_reason(source, reason):
    rows = [row(n) for n in range(1, 31)]
    data = read(write(source, [*rows[:7], BAD_ROWS[reason], *rows[7:]]), task=Words(";"))
    (rejected,) = data.rejected
    assert (rejected.line, rejected.source) == (8, str(source))
    assert reason in rejected.reason
    assert len(data.examples) == 30
    check_counts(data)


def test_more_bad_rows_than_allowed_are_an_error(source):
    rows = [*(row(n) for n in range(18)), row(18, labels=(1,)), row(19, labels=(2, 2))]
    with pytest.raises(
        DataError, match=r"2 of 20 rows .*verifier\.steps\.max_bad_rows = 0\.05.*line 19: 1 labels for 2"
    ):
        read(write(source, rows))
    assert read(source, max_bad_rows=0.1).counts["rejected"] == 2


@pytest.mark.parametrize(
    ("rows", "said"),
    [([], "it is empty"), ([row(labels=(1,))], r"1 of 1 rows set aside \(line 1: 1 labels for 2 steps\)")],
)
def test_nothing_usable_is_an_error(source, rows, said):
    with pytest.raises(DataError, match=f"no usable row in .*{said}"):
        read(write(source, rows), max_bad_rows=1)


def test_a_missing_file_is_an_error(source):
    with pytest.raises(DataError, match=r"steps\.jsonl cannot be read"):
        read(source)


# ---------------------------------------------------------------- what is left out


def test_held_out_questions_and_those_too_like_one_are_dropped_and_counted(source):
    rows = [*(row(n) for n in range(10)), row(3, labels=(0, 0)), row(4, steps=("x", "y"))]
    rows.append(row() | {"question": f"  {QUESTIONS[3].upper()} "})  # the same question
    data = read(write(source, rows), held_out=[QUESTIONS[3]], alike=[QUESTIONS[4], QUESTIONS[3]])
    assert {e.problem.question for e in data.examples} == set(QUESTIONS[:10]) - {QUESTIONS[3], QUESTIONS[4]}
    assert (data.counts["held_out"], data.counts["overlapping"]) == (2, 2)
    assert data.counts["duplicate"] == 1
    check_counts(data)


def test_a_set_of_held_out_questions_alone_is_an_error(source):
    with pytest.raises(DataError, match=r"none of 1 rows of .* is left .*held_out 1.*leave \[verifier\.steps\] out"):
        read(write(source, [row(3)]), held_out=[QUESTIONS[3]])


def test_equal_rows_are_one_example_of_their_weight(source):
    data = read(write(source, [row(0), row(0), row(0, labels=(1, 1)), row(0)]))
    assert sorted((e.labels, e.weight) for e in data.examples) == [((1.0, 0.0), 3.0), ((1.0, 1.0), 1.0)]
    assert data.counts["duplicate"] == 2
    check_counts(data)


def test_the_cap_shares_over_the_questions_whatever_the_order(source):
    rows = [row(n, steps=(f"so {k}", "end")) for n in range(8) for k in range(1 + n % 4)]
    expected = read(write(source, rows), max_examples=12)
    per_question = [sum(e.problem.question == q for e in expected.examples) for q in QUESTIONS[:8]]
    assert (len(expected.examples), min(per_question), max(per_question)) == (12, 1, 2)
    assert expected.counts["over_cap"] == len(rows) - 12
    for seed in range(3):
        shuffled = random.Random(seed).sample(rows, len(rows))
        assert read(write(source, shuffled), max_examples=12) == expected
    assert read(source, max_examples=12, seed=1) != expected
    check_counts(expected)
