"""`ratchet plan` tells what the next round would really see."""

import json
from pathlib import Path

import pytest

from configs import load
from flows.observers import Silent
from flows.plan import make_plan, show
from flows.runner import Options, improve
from flows.stages import overlapping
from flows.state import Loop, RoundRecord
from search.errors import ConfigError
from search.sets import draw_sets, read_outcomes, write_sets
from search.tasks import load_task

TINY = Path(__file__).with_name("tiny.txt").read_text().split()  # a smoke round in a second


@pytest.fixture
def rows(tmp_path):
    """Writes a file of the first n problems. Example: rows(300)"""

    def write(num: int) -> str:
        names = ("apples", "boxes", "coins", "doors", "eggs")
        lines = [
            json.dumps({"question": f"Add {i} and {i * i} {names[i % 5]}: how many, {i**3}?", "answer": str(i + i * i)})
            for i in range(num)
        ]
        path = tmp_path / "mine.jsonl"
        path.write_text("\n".join(lines) + "\n")
        return str(path)

    return write


def config_of(path: str):
    data = {"loop": {"name": "mine"}, "task": {"type": "jsonl", "path": path}, "model": {"base": "somewhere"}}
    data |= {"search": {"problems": 40}}
    return load.parse(data)


def test_rows_that_were_appended_are_training_problems(rows, tmp_path):
    config = config_of(rows(300))
    before = make_plan(config, tmp_path)["problems"]
    loop = Loop.open(tmp_path, "mine", task="jsonl")
    first = tmp_path / "mine" / "round-000" / "problems"
    first.mkdir(parents=True)
    sets = draw_sets(load_task(config), config, 0, None, {}, overlapping)
    write_sets(load_task(config), sets, None, first)
    loop.save()
    assert make_plan(config, tmp_path)["problems"] == before
    assert before["this_round"] == 40
    assert before["training"] == before["never_searched"] == len(load_task(config).problems("train"))

    config = config_of(rows(500))
    after = make_plan(config, tmp_path)["problems"]
    assert after["training"] == before["training"] + 200, "whatever split their hash would have given them"

    folder = loop.begin_round("{}", round=1)
    search = folder.path / "search"
    search.mkdir()
    drawn = draw_sets(load_task(config), config, 1, first, {}, overlapping)["search"]
    outcomes = {p.key: [i % 2, 4] for i, p in enumerate(drawn)}
    (search / "outcomes.json").write_text(json.dumps(outcomes))
    loop.finish(folder, RoundRecord(1, "rejected", "no gain"))
    later = make_plan(config, tmp_path)["problems"]
    assert later == after | {"never_searched": after["training"] - 40, "searched": 40, "unsolved": 20}
    assert len(read_outcomes([search / "outcomes.json"])) == 40


@pytest.mark.parametrize("search", [[], ["search.strategy=beam(width=2)", "verifier.type=oracle"]])
def test_the_plan_is_what_the_round_then_does(tmp_path, monkeypatch, search):
    monkeypatch.setattr("flows.runner.report", lambda loop, record: None)
    config = load.load("smoke", ["search.problems=30", "gate.problems=250", *search])
    plan = make_plan(config, tmp_path)
    assert plan["search"] == ("plain(4) + beam(width=2) @ 4" if search else "best_of_n(8)")
    improve(config, Options(tmp_path), Silent())
    for stage in ("baseline", "search", "evaluate", "difficulty"):
        spend = json.loads((tmp_path / "smoke" / "round-001" / stage / "spend.json").read_text())
        assert plan["samples"][stage] == spend["samples"], stage
    assert plan["gate"]["problems"] == 250


def test_generated_problems_recycle_until_all_are_solved(tmp_path, monkeypatch, capsys):
    """46 training problems, 30 a round; the plan tells each time what the round then takes, and that none is left."""
    monkeypatch.setattr("flows.runner.report", lambda loop, record: None)
    monkeypatch.setattr("search.tasks.splits.MAX_REPEATS", 2000)  # enough for so few
    few = ["task.min_numbers=2", "task.max_numbers=2", "task.max_value=30", "search.problems=30"]
    few += ["splits.train=0.04", "splits.fit=0.06", "splits.validation=0.3", "splits.gate=0.3", "splits.test=0.3"]
    config = load.load("smoke", [*TINY, *few, "engine.accuracy=0.5"])
    loop, seen, recycled = tmp_path / "smoke", set(), []
    outcome, planned = None, {}
    while (outcome is None or not outcome.nothing) and len(recycled) < 10:
        planned = make_plan(config, tmp_path)["problems"]
        outcome = improve(config, Options(tmp_path), Silent())
        if not outcome.nothing:
            folder = loop / outcome.records[-1].folder
            drawn = {json.loads(line)["key"] for line in (folder / "problems" / "search.jsonl").open()}
            recycled.append(len(drawn & seen))
            assert (planned["this_round"], planned["recycled"]) == (len(drawn), recycled[-1])
            seen |= drawn
            searched = json.loads((folder / "search" / "outcomes.json").read_text())
            assert set(searched) == drawn
    assert recycled[:2] == [0, 14]
    assert len(seen) == 46
    assert outcome is not None
    assert outcome.nothing == "nothing new and nothing unsolved: every training problem was searched and solved"
    assert (planned["this_round"], planned["searched"], planned["unsolved"]) == (0, 46, 0)
    show(make_plan(config, tmp_path))
    assert "problems: 0 this round (nothing new and nothing unsolved; 46 searched" in capsys.readouterr().out


def test_what_a_round_refuses_has_no_plan(tmp_path):
    with pytest.raises(ConfigError, match="did you mean step_rejection"):
        make_plan(load.load("smoke", ["search.strategy=step_rejektion"]), tmp_path)


def test_what_the_verifier_computes_is_planned_for_the_search_alone(tmp_path, monkeypatch):
    monkeypatch.setattr("flows.runner.report", lambda loop, record: None)
    beam = [*TINY, "search.strategy=beam(width=2)", "verifier.type=oracle"]
    flops: dict[int, float] = {}
    for parameters in (0, 10**6):
        config = load.load("smoke", [*beam, f"verifier.parameters={parameters}"])
        improve(config, Options(tmp_path / str(parameters)), Silent())
        flops[parameters] = make_plan(config, tmp_path / str(parameters))["flops"]
    spend = json.loads((tmp_path / str(10**6) / "smoke" / "round-001" / "search" / "spend.json").read_text())
    assert flops[10**6] - flops[0] == pytest.approx(spend["verifier_flops_actual"])
    assert make_plan(load.load("smoke", TINY), tmp_path / str(10**6))["flops"] == pytest.approx(flops[0], rel=0.05)
