"""The command line as a user meets it: one clear line for what can be mended, the right exit code, stable JSON."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

RATCHET = [sys.executable, "-m", "flows.cli"]
TINY = Path(__file__).with_name("tiny.txt").read_text().split()  # a smoke round in a second
SETS = [part for pair in [*TINY, "tracking.mlflow=false"] for part in ("--set", pair)]


def ratchet(*args: object, cwd: Path, check: int | None = 0, **env: str) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [*RATCHET, *map(str, args)], cwd=cwd, capture_output=True, text=True, env=os.environ | env, timeout=200
    )
    if check is not None:
        assert done.returncode == check, done.stderr
    return done


@pytest.fixture(scope="module")
def loop(tmp_path_factory):
    """A folder in which one round of the smoke loop was run."""
    folder = tmp_path_factory.mktemp("loop")
    done = ratchet("round", "smoke", "--prefect", "off", *SETS, cwd=folder)
    return folder, done


def test_a_round_says_what_it_did(loop):
    _, done = loop
    for part in ("Round 1 was promoted", "greedy", "gain (95 %)", "points"):
        assert part in done.stdout
    for stage in ("problems", "baseline", "search", "select", "distill", "evaluate", "gate", "difficulty"):
        assert f"✓ {stage}" in done.stderr


def test_the_configuration_is_remembered(loop):
    folder, _ = loop
    assert "loop smoke, champion: round 1" in ratchet("status", cwd=folder).stdout


def test_status_json(loop):
    folder, _ = loop
    status = json.loads(ratchet("status", "--json", cwd=folder).stdout)
    assert status["champion"]["round"] == 1
    assert [r["verdict"] for r in status["rounds"]] == ["base", "promoted"]
    assert status["unfinished"] is None


def test_compare_json_is_the_documented_one(loop):
    folder, _ = loop
    found = json.loads(ratchet("compare", "--json", cwd=folder).stdout)
    assert found["loop"] == "smoke"
    assert [r["round"] for r in found["rounds"]] == [0, 1]
    assert all({"round", "verdict", "metrics", "gain", "spend", "models"} <= set(r) for r in found["rounds"])


def test_plan_spends_nothing(loop):
    folder, _ = loop
    before = sorted(p for p in (folder / "runs" / "smoke").rglob("*"))
    plan = json.loads(ratchet("plan", "--json", cwd=folder).stdout)
    assert plan["round"] == 2
    assert plan["samples"]["search"] == 20 * 8
    assert 0 < plan["gate"]["minimum_detectable_effect"] < 1
    assert sorted(p for p in (folder / "runs" / "smoke").rglob("*")) == before


def test_eval_reports_accuracy_against_budget(loop):
    folder, _ = loop
    done = ratchet("eval", "--budgets", "1,4", "--problems", "50", "--json", cwd=folder)
    found = json.loads(done.stdout)
    assert (found["task"], found["n"]) == ("countdown", 50)
    rows = {(r["strategy"], r["budget"]): r for r in found["results"]}
    assert set(rows) == {("greedy", 1), ("pass", 1), ("pass", 4), ("majority", 1), ("majority", 4)}
    assert rows["pass", 1]["accuracy"] < rows["pass", 4]["accuracy"]
    assert rows["pass", 4]["spend"]["generated_tokens"] > rows["pass", 1]["spend"]["generated_tokens"]


def test_one_command_reports_the_compute_optimal_choice_on_a_base_that_it_makes(tmp_path):
    strategies = "greedy,pass,majority,adaptive_majority"
    more = ["--set", "table.enabled=true", "--set", f"table.strategies={json.dumps(strategies.split(','))}"]
    asked = ["--model", "base", "--report", "--problems", "40", "--strategies", strategies, "--budgets", "1,2,4,8"]
    done = ratchet("eval", "smoke", *SETS, *more, *asked, cwd=tmp_path)
    assert "round 0 makes it" in done.stderr
    assert "✓ table" in done.stderr
    (page,) = (tmp_path / "runs" / "smoke").glob("eval-base-validation*/optimal.html")
    assert f"report: {page.relative_to(tmp_path)}" in done.stderr.replace(str(tmp_path) + "/", "")
    found = json.loads(ratchet("eval", "smoke", *SETS, *more, *asked, "--json", cwd=tmp_path).stdout)
    assert {row["bins"] for row in found["optimal"]["ratios"]} >= {"oracle", "random", "none"}
    assert not (tmp_path / "runs" / "smoke" / "round-001").exists()


def test_a_larger_model_belongs_to_a_report(tmp_path):
    done = ratchet("eval", "smoke", "--larger", "somewhere", cwd=tmp_path, check=2)
    assert "--report" in done.stderr


def test_eval_of_a_file_uses_the_problems_held_out_in_round_0(tmp_path):
    from configs import load
    from flows.evaluation import _problems
    from search.sets import draw_sets, write_sets
    from search.tasks import load_task

    path = tmp_path / "q.jsonl"
    rows = [json.dumps({"question": f"What is {i} plus {i}?", "answer": str(2 * i)}) + "\n" for i in range(600)]
    data = {"loop": {"name": "mine"}, "task": {"type": "jsonl", "path": str(path)}, "model": {"base": "somewhere"}}
    frozen = tmp_path / "mine" / "round-000" / "problems"
    frozen.mkdir(parents=True)
    path.write_text("".join(rows[:300]))
    task = load_task(load.parse(data))
    sets = draw_sets(task, load.parse(data), 0, None, {})
    write_sets(task, sets, None, frozen)
    path.write_text("".join(rows))
    grown = load_task(load.parse(data))
    assert len(grown.problems("validation")) > len(sets["validation"])
    assert _problems(grown, "validation", 1000, tmp_path / "mine") == list(sets["validation"])


def test_promote_and_rollback_are_recorded(loop):
    folder, _ = loop
    assert "round 0" in ratchet("rollback", "--reason", "worse in use", cwd=folder).stdout
    assert "round 1" in ratchet("promote", "--round", "1", "--reason", "it was not", cwd=folder).stdout
    moves = json.loads((folder / "runs" / "smoke" / "loop.json").read_text())["moves"]
    assert [m["reason"] for m in moves[-2:]] == ["worse in use", "it was not"]


def test_a_pool_made_elsewhere_is_evaluated(tmp_path):
    rows = [
        {"id": f"q{i}", "question": "What is 2+2?", "answer": "4", "responses": ["\\boxed{4}", "\\boxed{5}"]}
        for i in range(3)
    ]
    (tmp_path / "pool.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    done = ratchet("eval", "--pool", "pool.jsonl", "--task", "math", "--budgets", "1,2", "--json", cwd=tmp_path)
    found = json.loads(done.stdout)
    assert {(r["strategy"], r["budget"]): r["accuracy"] for r in found["results"]} == {
        ("pass", 1): 0.5,
        ("pass", 2): 1.0,
        ("majority", 1): 0.5,
        ("majority", 2): 0.5,
    }


def test_grade_writes_the_rows_back(tmp_path):
    rows = [{"answer": "4", "response": "\\boxed{4}"}, {"answer": "4", "responses": ["\\boxed{5}", "no idea"]}]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    done = ratchet("grade", "math", "a.jsonl", "--out", "b.jsonl", "--json", cwd=tmp_path)
    assert json.loads(done.stdout) == {"task": "math", "correct": 1, "wrong": 2, "ungraded": 0}
    graded = [json.loads(line) for line in (tmp_path / "b.jsonl").read_text().splitlines()]
    assert [g["correct"] for g in graded] == [True, [False, False]]


@pytest.mark.parametrize(
    ("args", "code", "parts"),
    [
        (["round", "nowhere"], 2, ["nowhere", "countdown"]),
        (["round", "smoke", "--set", "search.sample=3"], 2, ["search.sample", "samples"]),
        (["round", "smoke", "--set", "search.samples=many"], 2, ["search.samples", "many"]),
        (["round", "smoke", "--set", "search.strategy=baem"], 2, ["'baem'", "did you mean beam?"]),
        (["deploy", "smoke", "--set", "search.strategy=baem"], 2, ["'baem'", "did you mean beam?"]),
        (["loop", "smoke", "--set", "search.strategy=beam"], 2, ["beam needs a verifier", "verifier.type"]),
        (["round", "smoke", "--control", "none"], 2, ["--control none", "random or bootstrap"]),
        (["round", "smoke", "--nonsense"], 2, ["--nonsense"]),
        (["round", "smoke", "--prefect", "perhaps"], 2, ["--prefect perhaps", "auto, on or off"]),
        (["nonsense"], 2, ["nonsense"]),
        (["status"], 2, ["which configuration"]),
        (["status", "smoke"], 1, ["no loop 'smoke'", "ratchet round"]),
        (["rollback", "smoke"], 2, ["say why"]),
        (["eval", "smoke", "--budgets", "0,x"], 2, ["--budgets 0,x"]),
        (["grade", "math", "missing.jsonl"], 1, ["missing.jsonl"]),
        (["eval", "--pool", "missing.jsonl", "--task", "math"], 1, ["missing.jsonl"]),
        (["round", "smoke", "--prefect", "off", "--set", "tracking.uri=http://127.0.0.1:9"], 1, ["MLflow", "tracking"]),
    ],
)
def test_bad_input_gets_one_clear_line(tmp_path, args, code, parts):
    done = ratchet(*args, cwd=tmp_path, check=code)
    lines = done.stderr.strip().splitlines()
    assert lines[-1].startswith("ratchet: ")
    for part in parts:
        assert part in lines[-1]
    assert "Traceback" not in done.stderr


def test_a_second_round_of_the_loop_is_refused_with_4(tmp_path):
    from flows.state import Loop

    with Loop.locked(tmp_path / "runs", "smoke", "a round", task="countdown"):
        done = ratchet("round", "smoke", "--prefect", "off", *SETS, cwd=tmp_path, check=4)
    assert f"process {os.getpid()}" in done.stderr


def test_require_promotion_turns_a_rejection_into_3(tmp_path):
    flat = ["--set", "engine.skill_per_round=0"]
    done = ratchet("round", "smoke", "--prefect", "off", *SETS, *flat, "--require-promotion", cwd=tmp_path, check=3)
    assert "rejected" in done.stdout


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_ends_the_round_and_the_next_call_goes_on(tmp_path, number, code):
    command = [*RATCHET, "round", "smoke", "--prefect", "off", *SETS, "--set", "stages.in_process=false"]
    process = subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
    folder = tmp_path / "runs" / "smoke" / "round-000"
    deadline = time.monotonic() + 60
    while not (folder / "problems").is_dir() and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == code, errors
    assert "Traceback" not in errors
    done = ratchet("round", "smoke", "--prefect", "off", *SETS, cwd=tmp_path)
    assert "done earlier" in done.stderr


def test_help_needs_nothing_heavy():
    heavy = "{'torch', 'transformers', 'mlflow', 'prefect', 'trl', 'numpy'}"
    code = f"import sys, flows.cli; print(*{heavy} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""
