"""Real problems, real formats: loading, prompts through a chat template, and gold answers graded against themselves."""

import json
import random

import pytest

from configs.load import parse
from search.grading import GraderPool
from search.tasks import load_task
from search.tasks.compare import bad_gold, gold_answer, judge
from search.types import SPLITS, Grade

# Problems whose own solution the grader does not accept, with the reason. Every exception has to be listed here.
GSM8K_EXCEPTIONS: dict[str, str] = {}
MATH_EXCEPTIONS: dict[str, str] = {}


@pytest.fixture(scope="module")
def pool():
    with GraderPool(seconds=60) as pool:
        yield pool


def read(path):
    with path.open(encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def config(**task):
    return parse({"loop": {"name": "t"}, "task": task, "model": {"base": "some-model"}})


def test_gsm8k_loads_whole_and_its_test_file_is_the_test_split(real_data):
    train, test = str(real_data / "gsm8k_train.jsonl"), str(real_data / "gsm8k_test.jsonl")
    task = load_task(config(type="gsm8k", path=train, test_path=test))
    assert task.rejected == ()
    assert {split: len(task.problems(split)) for split in SPLITS}["test"] == 1319
    assert sum(len(task.problems(split)) for split in SPLITS) == 7473 + 1319
    keys = [p.key for split in SPLITS for p in task.problems(split)]
    assert len(set(keys)) == len(keys)


def test_math_loads_whole_from_answers_and_from_solutions(real_data):
    path = str(real_data / "math500_test.jsonl")
    by_answer = load_task(config(type="math", path=path, id_column="unique_id"))
    by_solution = load_task(config(type="math", path=path, answer_column="solution"))
    assert by_answer.rejected == by_solution.rejected == ()
    assert sum(len(by_answer.problems(split)) for split in SPLITS) == 500
    for split in SPLITS:
        pairs = zip(by_answer.problems(split), by_solution.problems(split), strict=True)
        differing = [(a.answer, b.answer) for a, b in pairs if judge(a.answer, b.answer, "math").grade is Grade.WRONG]
        assert not differing


def test_every_gsm8k_answer_agrees_with_itself(real_data):
    rows = read(real_data / "gsm8k_train.jsonl") + read(real_data / "gsm8k_test.jsonl")
    with GraderPool() as pool:
        graded = pool.grade([(row["answer"], row["answer"]) for row in rows], "number")
        assert pool.pids() == []  # numbers need no mathematics
    failed = {row["question"]: g for row, g in zip(rows, graded, strict=True) if g.grade is not Grade.CORRECT}
    assert len(rows) == 8792
    assert failed.keys() == GSM8K_EXCEPTIONS.keys()


def test_every_math_solution_agrees_with_its_answer(real_data, pool):
    rows = read(real_data / "math500_test.jsonl")
    graded = pool.grade([(r["answer"], r["solution"]) for r in rows], questions=[r["problem"] for r in rows])
    failed = {row["unique_id"]: g for row, g in zip(rows, graded, strict=True) if g.grade is not Grade.CORRECT}
    assert len(rows) == 500
    assert failed.keys() == MATH_EXCEPTIONS.keys()


def test_answers_of_other_gsm8k_problems_are_wrong(real_data):
    rows = read(real_data / "gsm8k_test.jsonl")
    chance = random.Random(0)
    pairs = [chance.sample(rows, 2) for _ in range(5000)]
    different = [(a, b) for a, b in pairs if a["answer"].split("####")[1] != b["answer"].split("####")[1]]
    with GraderPool() as pool:
        graded = pool.grade([(a["answer"], b["answer"]) for a, b in different], "number")
    assert len(different) > 4500
    assert {g.grade for g in graded} == {Grade.WRONG}


def other_math_pairs(real_data, num):
    rows = read(real_data / "math500_test.jsonl")
    chance = random.Random(0)
    pairs = [chance.sample(rows, 2) for _ in range(num)]
    return [(a, b) for a, b in pairs if a["answer"] != b["answer"]]


def test_answers_of_other_math_problems_are_wrong(real_data, pool):
    pairs = other_math_pairs(real_data, 150)
    graded = pool.grade([(a["answer"], b["solution"]) for a, b in pairs])
    assert {g.grade for g in graded} == {Grade.WRONG}


@pytest.mark.slow
def test_answers_of_thousands_of_other_math_problems_are_wrong(real_data):
    pairs = other_math_pairs(real_data, 4000)
    with GraderPool(seconds=60) as pool:
        graded = pool.grade([(a["answer"], b["solution"]) for a, b in pairs])
    assert len(pairs) > 3800
    assert {g.grade for g in graded} == {Grade.WRONG}


@pytest.mark.slow
def test_what_text_decides_the_symbolic_comparison_decides_alike(real_data):
    """On every answer against itself and on thousands of other pairs."""
    from search.grading import Job

    rows = read(real_data / "math500_test.jsonl")
    pairs = [(a["answer"], b["answer"]) for a, b in other_math_pairs(real_data, 3000)]
    pairs += [(row["answer"], gold_answer(row["solution"], "math")) for row in rows]
    decided = [(p, judge(*p, "math").grade) for p in pairs]
    decided = [(p, grade) for p, grade in decided if grade is not None]
    with GraderPool(seconds=60) as pool:
        found = pool.compare([Job(*p) for p, _ in decided])
    assert len(decided) > 1500
    disagree = [(p, g) for (p, g), c in zip(decided, found, strict=True) if c.equal is not (g is Grade.CORRECT)]
    assert not disagree


@pytest.mark.parametrize("name", ["gsm8k_train", "gsm8k_test", "math500_test"])
def test_a_copy_of_the_question_is_never_right(real_data, pool, name):
    kind, column = ("math", "problem") if name.startswith("math") else ("number", "question")
    rows = read(real_data / f"{name}.jsonl")
    graded = pool.grade([(row["answer"], row[column]) for row in rows], kind)
    assert {g.grade for g in graded} == {Grade.WRONG}
    assert not [row for row in rows if bad_gold(gold_answer(row["answer"], kind), kind)]


def test_real_problems_become_prompt_ids_of_a_chat_model(real_data, tiny_chat_model):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_chat_model)
    sources = [("gsm8k", "gsm8k_test"), ("math", "math500_test")]
    for kind, name in sources:
        task = load_task(config(type=kind, path=str(real_data / f"{name}.jsonl")))
        for problem in task.problems("validation"):
            messages = task.prompt(problem)
            ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
            text = tokenizer.decode(ids)
            assert problem.question in text
            assert text.endswith("<|im_start|>assistant\n")
            assert tokenizer.eos_token_id not in ids[-12:]
            assert tokenizer.encode(tokenizer.decode(ids), add_special_tokens=False) == ids


def test_the_tiny_chat_model_generates(tiny_chat_model):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_chat_model)
    model = AutoModelForCausalLM.from_pretrained(tiny_chat_model)
    ids = tokenizer.encode("What is 3 \u00d7 4? \U0001f95a", add_special_tokens=False)
    assert tokenizer.decode(ids) == "What is 3 \u00d7 4? \U0001f95a"
    with torch.no_grad():
        logits = model(torch.tensor([ids])).logits
    assert logits.shape == (1, len(ids), len(tokenizer))
    assert torch.isfinite(logits).all()
