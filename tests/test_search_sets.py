"""A round's problems: held-out sets never move, slices recycle unsolved first, fresh gate sets are disjoint."""

import json
from pathlib import Path

import pytest

from configs import load
from search.errors import DataError
from search.sets import (
    Outcome,
    draw_sets,
    held_out_keys,
    read_outcomes,
    read_problems,
    take_slice,
    write_problems,
    write_sets,
)
from search.tasks import load_task
from search.tasks.splits import split_of
from search.types import Problem

SMOKE = load.load("smoke")
FEW = ["task.min_numbers=2", "task.max_numbers=2", "task.max_value=30", "search.problems=30"]
FEW += ["splits.train=0.04", "splits.fit=0.06", "splits.validation=0.3", "splits.gate=0.3", "splits.test=0.3"]
FEW += ["difficulty.problems=50", "gate.problems=200", "evaluate.test_problems=200"]


def file_config(tmp_path: Path, num: int, *overrides: str):
    """A jsonl task of `num` questions; called again with a larger `num` it has grown."""
    rows = [{"question": f"Question {i}: what is {i} plus {i}?", "answer": str(2 * i)} for i in range(num)]
    path = tmp_path / "mine.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    data = {
        "loop": {"name": "mine"},
        "task": {"type": "jsonl", "path": str(path), "answer_type": "number", "prompt": "plain"},
        "model": {"base": "somewhere"},
        "search": {"problems": 30},
    }
    config = load.parse(data)
    assert not overrides
    return config


def sets_of(config, number, frozen, searched=None, out=None):
    task = load_task(config)
    sets = draw_sets(task, config, number, frozen, searched or {})
    if out is not None:
        out.mkdir(parents=True)
        write_sets(task, sets, frozen, out)
    return {name: [p.key for p in problems] for name, problems in sets.items()}


def test_generated_sets_are_disjoint_and_gates_fresh():
    first, second = sets_of(SMOKE, 1, None), sets_of(SMOKE, 2, None)
    for sets in (first, second):
        keys = [key for keys in sets.values() for key in keys]
        assert len(keys) == len(set(keys))
    assert first["test"] == second["test"]
    assert set(first["gate"]) != set(second["gate"])
    assert all(split_of(key, SMOKE.splits) == "train" for key in first["search"])


def test_generated_search_problems_are_new_ones():
    first = sets_of(SMOKE, 1, None)["search"]
    searched = {key: Outcome(1, 8) for key in first}
    assert not set(first) & set(sets_of(SMOKE, 2, None, searched)["search"])


@pytest.fixture
def few(monkeypatch):
    """A countdown of 46 training problems, 30 a round."""
    monkeypatch.setattr("search.tasks.splits.MAX_REPEATS", 2000)  # enough for so few
    return load.load("smoke", FEW)


def all_at_once(config):
    return config.model_copy(update={"search": config.search.model_copy(update={"problems": 1000})})


def test_generated_problems_that_are_used_up_recycle_unsolved_first(few):
    first = sets_of(few, 1, None)["search"]
    chances = [0, 3, 1, 2]
    searched = {key: Outcome(chances[i % 4], 4) for i, key in enumerate(first)}
    task = load_task(few)
    drawn = draw_sets(task, few, 2, None, searched)["search"]
    again = [searched[p.key].correct for p in drawn if p.key in searched]
    assert len(drawn) == len({p.key for p in drawn}) == 30
    assert len(again) == 30 - 16  # the others are all that are new
    assert not any(p.key in searched for p in drawn[:16])
    assert again == sorted(searched[key].correct for key in first)[:14]
    assert drawn == draw_sets(task, few, 2, None, dict(reversed(searched.items())))["search"]

    searched |= {p.key: Outcome(0, 4) for p in drawn}
    third = draw_sets(task, few, 3, None, searched)["search"]
    assert len(third) == 30
    assert all(searched[p.key].correct <= 1 for p in third)


def test_generated_problems_that_are_all_solved_leave_nothing_to_search(few):
    everything = sets_of(all_at_once(few), 1, None)["search"]
    assert len(everything) == 46
    solved = {key: Outcome(1, 4) for key in everything}
    assert sets_of(few, 2, None, solved)["search"] == []
    solved[everything[7]] = Outcome(0, 4)
    assert sets_of(few, 2, None, solved)["search"][0] == everything[7]


def test_a_guard_problem_that_was_searched_once_is_not_recycled(few):
    task = load_task(few)
    first = draw_sets(task, few, 1, None, {})["search"]
    searched = {p.key: Outcome(0, 4) for p in first}
    again = draw_sets(task, few, 2, None, searched, guards=first[:20])["search"]
    assert len(again) == 46 - 20
    assert not {p.key for p in first[:20]} & {p.key for p in again}


def test_what_the_task_no_longer_poses_is_not_recycled(few):
    searched = {key: Outcome(0, 4) for key in (*sets_of(few, 1, None)["search"], "3,5,7>22")}
    assert len(sets_of(all_at_once(few), 2, None, searched)["search"]) == 46


def test_a_held_out_set_that_cannot_be_filled_is_an_error(few):
    many = few.model_copy(update={"gate": few.gate.model_copy(update={"problems": 1000})})
    with pytest.raises(DataError, match=r"1000 new problems of the gate split .* only \d+ exist"):
        sets_of(many, 1, None)


@pytest.mark.parametrize("name", ["countdown", "arithmetic"])
def test_a_generated_problem_is_read_back_from_its_key(name):
    task = load_task(load.load(name))
    for problem in task.draw("train", 200, stream="x"):
        assert task.parse(problem.key) == problem


def test_problems_of_a_guard_set_are_never_searched(tmp_path):
    """Else a guard would measure what was learnt by heart."""
    task = load_task(SMOKE)
    guards = draw_sets(task, SMOKE, 1, None, {})["search"][:5]
    left = draw_sets(task, SMOKE, 1, None, {}, guards=guards)["search"]
    assert not {p.key for p in guards} & {p.key for p in left}

    config, frozen = file_config(tmp_path, 200), tmp_path / "round-000"
    sets_of(config, 0, None, out=frozen)
    own = load_task(config)
    searched = draw_sets(own, config, 1, frozen, {})["search"]
    seen = []

    def watching(training, held_out):
        seen.extend(held_out)
        return set()

    again = draw_sets(own, config, 1, frozen, {}, watching, searched[:5])
    assert not set(p.key for p in searched[:5]) & set(p.key for p in again["search"])
    assert set(p.key for p in searched[:5]) <= set(p.key for p in seen)  # nor what is too like one of them

    write_problems(searched[:5], frozen / "guard-old.jsonl")
    assert {p.key for p in searched[:5]} <= held_out_keys(frozen)


def test_sets_survive_the_disk(tmp_path):
    task = load_task(SMOKE)
    sets = draw_sets(task, SMOKE, 1, None, {})
    write_sets(task, sets, None, tmp_path)
    assert {name: read_problems(tmp_path / f"{name}.jsonl") for name in sets} == dict(sets)
    assert {p.key for p in sets["gate"]} <= held_out_keys(tmp_path)


def test_appended_rows_join_training_and_move_nothing(tmp_path):
    small = file_config(tmp_path, 200)
    frozen = tmp_path / "round-000"
    before = sets_of(small, 0, None, out=frozen)
    assert before["search"] == []
    grown = file_config(tmp_path, 400)
    after = sets_of(grown, 1, frozen)
    for name in ("fit", "validation", "gate", "test"):
        assert after[name] == before[name]
    whole = sets_of(grown.model_copy(update={"search": grown.search.model_copy(update={"problems": 1000})}), 1, frozen)
    held_out = held_out_keys(frozen)
    assert not held_out & set(whole["search"])
    assert len(whole["search"]) == 400 - len(json.loads((frozen / "held_out.json").read_text()))


def test_what_is_appended_to_a_test_file_is_never_trained_on(tmp_path):
    def config(num_test):
        config = file_config(tmp_path, 200)
        rows = [{"question": f"Test {i}: what is {i} minus 1?", "answer": str(i - 1)} for i in range(num_test)]
        (tmp_path / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        task = config.task.model_copy(update={"test_path": str(tmp_path / "test.jsonl")})
        search = config.search.model_copy(update={"problems": 1000})
        return config.model_copy(update={"task": task, "search": search})

    frozen = tmp_path / "round-000"
    before = sets_of(config(20), 0, None, out=frozen)
    after = sets_of(config(50), 1, frozen)
    assert after["test"] == before["test"]
    assert not {p.key for p in load_task(config(50)).problems("test")} & set(after["search"])
    assert len(after["search"]) == 220 - len(held_out_keys(frozen))


def problems(num):
    return [Problem(f"p{i}", f"p{i}") for i in range(num)]


def test_new_problems_come_first_then_unsolved_ones():
    searched = {"p0": Outcome(4, 4), "p1": Outcome(0, 4), "p2": Outcome(1, 4)}
    assert [p.key for p in take_slice(problems(5), 4, searched)] == ["p3", "p4", "p1", "p2"]


def test_nothing_is_left_when_all_are_solved():
    searched = {f"p{i}": Outcome(1, 4) for i in range(5)}
    assert take_slice(problems(5), 4, searched) == []
    assert take_slice(problems(6), 4, searched)[0].key == "p5"


def test_outcomes_add_up_over_rounds(tmp_path):
    for name, rows in (("a", {"p": [0, 4]}), ("b", {"p": [1, 4], "q": [2, 4]})):
        (tmp_path / name).write_text(json.dumps(rows))
    assert read_outcomes([tmp_path / "a", tmp_path / "b"]) == {"p": Outcome(1, 8), "q": Outcome(2, 4)}


def test_an_empty_held_out_set_is_an_error_with_the_sizes(tmp_path):
    with pytest.raises(DataError, match=r"held-out set is empty.*\[splits\]"):
        sets_of(file_config(tmp_path, 4), 0, None)
