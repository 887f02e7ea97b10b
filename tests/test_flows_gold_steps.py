"""Step labels of a data set are frozen with a round's problems, without what is or resembles a held-out one."""

import json

import pytest

from configs.load import parse
from flows.gold_steps import COUNTS, EXAMPLES
from flows.stages import Context, problems
from search.sets import HELD_OUT, read_problems
from search.tasks import load_task

NAMES = ["Ada", "Ben", "Cleo", "Dan", "Eve", "Finn", "Gus", "Hana", "Ida", "Jon"]
THINGS = ["apples", "books", "coins", "dolls", "eggs", "forks", "gems", "hats"]


def question(n: int) -> str:
    name, thing = NAMES[n % 10], THINGS[n // 10]
    return f"{name} has {n + 2} {thing} in the {thing} box of {name} and finds {n} more {thing}: how many now?"


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def labelled(text, **more):
    return {"question": text, "steps": ["I add both.", "So it is 7."], "labels": [1, 0]} | more


@pytest.fixture
def config(tmp_path):
    rows = [{"question": question(n), "answer": str(2 * n + 2)} for n in range(80)]
    guard = write(tmp_path / "guard.jsonl", [{"question": "How tall is the guard of the old gate?", "answer": "2"}])
    return parse(
        {
            "loop": {"name": "t"},
            "task": {"type": "jsonl", "path": str(write(tmp_path / "mine.jsonl", rows)), "answer_type": "number"},
            "model": {"base": "some-model"},
            "splits": {"train": 0.6, "fit": 0.1, "validation": 0.1, "gate": 0.1, "test": 0.1},
            "gate": {"guards": [{"name": "old", "path": str(guard)}]},
            "verifier": {
                "type": "trained",
                "labels": ["gold"],
                "steps": {"path": str(tmp_path / "steps.jsonl"), "max_bad_rows": 0.5},
            },
        }
    )


def test_what_is_or_resembles_a_held_out_question_is_dropped(config, tmp_path):
    task = load_task(config)
    held_out = {split: task.problems(split)[0].question for split in HELD_OUT}
    reworded = held_out["test"].replace(" finds ", " really finds ").replace("how many now", "how many are there now")
    rows = [labelled(question(n)) for n in range(80)]
    rows += [labelled("A question of quite another kind?"), labelled("How tall is the guard of the old gate?")]
    rows += [labelled(reworded), labelled("Half a row?", labels=[1])]
    write(tmp_path / "steps.jsonl", rows)
    out = tmp_path / "problems"
    out.mkdir()
    problems(Context(config, 0, lambda *_, **__: None), {}, out)
    examples = [json.loads(line) for line in (out / EXAMPLES).read_text().splitlines()]
    kept = {row["question"] for row in examples}
    every = {split: {p.question for p in read_problems(out / f"{split}.jsonl")} for split in HELD_OUT}
    assert all(every[split] for split in HELD_OUT)
    assert not kept & set.union(*every.values())
    assert "A question of quite another kind?" in kept
    assert "How tall is the guard of the old gate?" not in kept
    assert reworded not in kept
    counts = json.loads((out / COUNTS).read_text())
    assert counts["held_out"] == sum(map(len, every.values())) + 1
    assert counts["overlapping"] >= 1
    assert counts["kept"] == len(examples) == len(rows) - counts["held_out"] - counts["overlapping"] - 1
    (rejected,) = map(json.loads, (out / "rejected.jsonl").read_text().splitlines())
    assert (rejected["source"], rejected["line"]) == (str(tmp_path / "steps.jsonl"), len(rows))
    metrics = {row["name"]: row["value"] for row in map(json.loads, (out / "metrics.jsonl").read_text().splitlines())}
    assert metrics["data/rejected_problems"] == 0
    assert {name: metrics[f"data/steps_{name}"] for name in counts} == counts
