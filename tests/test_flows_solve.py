"""`ratchet solve`: one question, one answer, what it cost; and every way in which there is none."""

import json
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from configs import load
from flows import solve
from flows.solve import Question, ask
from search.errors import BudgetError, ConfigError, DataError

RATCHET = [sys.executable, "-m", "flows.cli"]
ASKED = "3 5 7 > 22"


@pytest.fixture
def model(tmp_path) -> Path:
    """A scripted model that is right every other time."""
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "scripted.json").write_text('{"skill": 1}')
    return folder


@pytest.fixture(autouse=True)
def own_temporary_folder(tmp_path, monkeypatch):
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "tmp"))


def smoke(*overrides):
    return load.load("smoke", overrides)


def ratchet(*args: object, cwd: Path, check: int = 0, **env: str) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [*RATCHET, *map(str, args)], cwd=cwd, capture_output=True, text=True, env=os.environ | env, timeout=200
    )
    assert done.returncode == check, done.stderr
    return done


# ---------------------------------------------------------------- asking


def test_a_question_is_answered_and_the_answer_is_judged(model, tmp_path):
    solution = ask(smoke(), tmp_path, Question(ASKED, budget=16), str(model))
    assert solution.result.strategy == "majority @ 16"  # no verifier: the configured best-of-N is a majority vote
    assert solution.answer is not None
    assert solution.correct is (value_of(solution.answer) == 22)
    assert sum(v.num for v in solution.votes()) + sum(solution.silent().values()) == 16
    assert solution.votes()[0].answer == solution.answer
    assert solution.nodes == ()
    assert list((tmp_path / "tmp").iterdir()) == []


def value_of(expression):
    """A Countdown expression's value, without Python's own evaluation of foreign text."""
    import ast
    import operator

    signs = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv}

    def value(node):
        return (
            node.value if isinstance(node, ast.Constant) else signs[type(node.op)](value(node.left), value(node.right))
        )

    return value(ast.parse(expression, mode="eval").body)


def test_the_same_question_has_the_same_answer_and_its_spelling_does_not_matter(model, tmp_path):
    one, two = (ask(smoke(), tmp_path, Question(text, trace=True), str(model)) for text in (ASKED, " 7,5,3>22 "))
    assert one.result == two.result
    assert one.nodes == two.nodes
    assert len(one.nodes) == one.result.spend.samples == 8
    other = ask(smoke("loop.seed=1"), tmp_path, Question(ASKED, trace=True), str(model))
    assert other.nodes != one.nodes


def test_a_search_by_steps_with_a_verifier(model, tmp_path):
    config = smoke("verifier.type=oracle")
    solution = ask(config, tmp_path, Question(ASKED, "beam(width=2)", 8, trace=True), str(model))
    assert solution.result.strategy == "beam(width=2) @ 8"
    assert any(node.parent is not None for node in solution.nodes)
    assert any(node.selected for node in solution.nodes)
    assert solution.votes()[0].weight is not None
    told = dict(solution.facts())
    assert "read by the verifier" in told["tokens"]


def test_the_configured_strategy_is_used_as_far_as_there_is_a_verifier(model, tmp_path):
    def run(*overrides):
        return ask(smoke(*overrides), tmp_path, Question(ASKED, budget=4), str(model)).result.strategy

    assert run("search.strategy=revisions") == "revisions_majority @ 4"
    assert run("search.strategy=pass") == "majority @ 4"
    assert run("verifier.type=oracle") == "best_of_n @ 4"
    with pytest.raises(ConfigError, match="beam needs a verifier"):
        run("search.strategy=beam")


@pytest.mark.parametrize(
    ("question", "overrides", "error", "message"),
    [
        (Question("what is love"), (), ConfigError, "is no countdown question: write it like '3 5 7 > 22'"),
        (Question(""), (), ConfigError, "is no countdown question"),
        (Question("3 > 7"), (), ConfigError, "has 1 numbers, not 3 to 4"),
        (Question("3 5 7 > 22\udcff"), (), ConfigError, "not UTF-8"),
        (Question(ASKED, "beem"), (), ConfigError, "did you mean beam"),
        (Question(ASKED, "pass"), (), ConfigError, "picks by the gold answer"),
        (Question(ASKED, "beam"), (), ConfigError, "beam needs a verifier"),
        (Question(ASKED, "beam(width=3)", 8), ("verifier.type=oracle",), BudgetError, "8 samples are no multiple"),
    ],
)
def test_what_cannot_be_asked_says_so_and_how(model, tmp_path, question, overrides, error, message):
    with pytest.raises(error, match=message.replace("(", r"\(")) as caught:
        ask(smoke(*overrides), tmp_path, question, str(model))
    assert caught.value.exit_code == 2
    assert list((tmp_path / "tmp").iterdir()) == []


def test_a_missing_model_says_what_to_do(tmp_path):
    with pytest.raises(DataError, match="no such folder; say champion, base, reviser, or"):
        ask(smoke(), tmp_path, Question(ASKED), "nowhere")
    with pytest.raises(DataError, match=r"start it with `ratchet round`$"):
        ask(smoke(), tmp_path, Question(ASKED))
    with pytest.raises(DataError, match="start it with `ratchet round`; `--model base` answers without one"):
        ask(load.load("countdown", ["model.base=some/where"]), tmp_path, Question(ASKED))


def test_a_cap_ends_the_search_with_what_it_has(model, tmp_path):
    strategy = "adaptive_majority(certainty=1, batch=1)"  # one answer after another, never certain
    whole = ask(smoke(), tmp_path, Question(ASKED, strategy, 16), str(model))
    cut = ask(smoke(), tmp_path, Question(ASKED, strategy, 16, max_tokens=120), str(model))
    assert 1 <= len(cut.result.candidates) < len(whole.result.candidates)
    assert cut.result.spend.generated_tokens <= 120
    assert cut.result.candidates == whole.result.candidates[: len(cut.result.candidates)]
    nothing = ask(smoke(), tmp_path, Question(ASKED, strategy, 16, max_tokens=10), str(model))
    assert nothing.answer is None
    assert "10 tokens" in nothing.why_not()
    assert "raise --max-tokens, or lower --budget" in nothing.why_not()


def test_another_interpreter_answers_in_a_child_and_the_same(model, tmp_path):
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\necho noise\nexec {sys.executable} "$@"\n')
    python.chmod(python.stat().st_mode | stat.S_IXUSR)
    config = smoke("stages.in_process=false", f"stages.python={python}")
    here = ask(smoke(), tmp_path, Question(ASKED, trace=True), str(model))
    there = ask(config, tmp_path, Question(ASKED, trace=True), str(model))
    assert (here.result, here.nodes) == (there.result, there.nodes)
    with pytest.raises(ConfigError, match="no countdown question"):
        ask(config, tmp_path, Question("what is love"), str(model))
    assert list((tmp_path / "tmp").iterdir()) == []


def test_what_a_model_prints_is_no_result(model, tmp_path, monkeypatch, capsys):
    def loud(*args, **how):
        print("downloading shards: 100 %")
        return original(*args, **how)

    original = solve.load_engine
    monkeypatch.setattr(solve, "load_engine", loud)
    ask(smoke(), tmp_path, Question(ASKED), str(model))
    out, err = capsys.readouterr()
    assert out == ""
    assert "downloading" in err


# ---------------------------------------------------------------- questions of a file


@pytest.fixture
def chat_config(tmp_path, tiny_chat_model):
    lines = [json.dumps({"question": f"What is {i} plus {i}?", "answer": str(2 * i)}) for i in range(20)]
    (tmp_path / "q.jsonl").write_text("\n".join(lines) + "\n")
    return load.parse(
        {
            "loop": {"name": "mine"},
            "task": {"type": "jsonl", "path": str(tmp_path / "q.jsonl"), "grader_workers": 1},
            "model": {"base": str(tiny_chat_model), "dtype": "float32"},
            "engine": {"type": "transformers", "device": "cpu"},
            "sampling": {"max_new_tokens": 8},
            "stages": {"threads": 1},
        }
    )


def test_an_open_question_to_the_users_own_model_needs_no_round(chat_config, tmp_path):
    solution = ask(chat_config, tmp_path / "runs", Question("Why is the sky blue?", budget=2, trace=True), "base")
    assert solution.result.problem.answer is None
    assert solution.correct is None
    assert solution.verdict() is None
    assert solution.result.spend.generated_tokens == sum(node.tokens for node in solution.nodes) > 0
    assert solution.answer is None  # random weights say nothing
    assert "give a larger --budget" in solution.why_not()
    assert "sampling.max_new_tokens" in solution.why_not()
    assert not (tmp_path / "runs").exists()


def test_a_question_of_the_file_comes_with_its_answer_but_the_oracle_needs_one(chat_config):
    from search.tasks import load_task

    task = load_task(chat_config)
    try:
        assert solve.find_problem(task, "what is 7  plus 7?").answer == "14"
        unknown = solve.find_problem(task, "What is 7 plus 8?")
        assert unknown.answer is None
        oracle = load.parse(chat_config.model_dump(mode="json") | {"verifier": {"type": "oracle"}})
        with pytest.raises(ConfigError, match="scores by the gold answer, and this question has none"):
            solve.make_plan(oracle, Question("x", "best_of_n"), unknown, None)
        assert not solve.make_plan(oracle, Question("x", "majority"), unknown, None).scored
    finally:
        task.close()


# ---------------------------------------------------------------- the command


def test_the_answer_stands_alone_on_the_first_line(model, tmp_path):
    done = ratchet("solve", "smoke", ASKED, "--model", model, "--budget", "16", cwd=tmp_path)
    answer, verdict, *lines = done.stdout.splitlines()
    expected = ask(smoke(), tmp_path, Question(ASKED, budget=16), str(model))
    assert answer == expected.answer
    assert verdict == expected.verdict()
    assert [line.split()[0] for line in lines] == ["strategy", "samples", "tokens", "FLOPs", "time", "model", "votes"]
    assert done.stderr == ""
    assert not list(tmp_path.rglob("*.html"))
    again = ratchet("solve", ASKED, "--model", model, "--budget", "16", cwd=tmp_path)  # the configuration used last
    assert again.stdout.splitlines()[0] == answer


def test_trace_prints_the_tree_and_writes_the_page_where_it_says(model, tmp_path):
    done = ratchet("solve", "smoke", ASKED, "--model", model, "--trace", cwd=tmp_path)
    page = tmp_path / done.stdout.splitlines()[-1].split(maxsplit=1)[1]
    assert page.parent == tmp_path  # there is no loop
    assert "<!doctype html>" in page.read_text()
    assert "★" in done.stdout
    assert max(map(len, done.stdout.splitlines()[9:-1])) <= 100
    (tmp_path / "runs" / "smoke").mkdir(parents=True, exist_ok=True)
    (tmp_path / "runs" / "smoke" / "loop.json").write_text("{}")
    solution = ask(smoke(), tmp_path, Question(ASKED, trace=True), str(model))
    path = solve.page_path(solution, tmp_path / "runs", "smoke")
    assert path == tmp_path / "runs" / "smoke" / "traces" / page.name
    assert solve.write_page(solution, path).is_file()


def test_json_is_the_documented_one(model, tmp_path):
    args = ("solve", "smoke", ASKED, "--model", model, "--json")
    found = json.loads(ratchet(*args, "--html", "out/page.html", cwd=tmp_path).stdout)
    assert (found["task"], found["gold"], found["strategy"]) == ("countdown", "22", "majority @ 8")
    assert found["page"] == "out/page.html"
    assert (tmp_path / "out" / "page.html").is_file()
    assert found["spend"]["samples"] == sum(v["votes"] for v in found["votes"]) + sum(found["silent"].values()) == 8
    assert "trace" not in found
    traced = json.loads(ratchet(*args, "--trace", cwd=tmp_path).stdout)
    assert len(traced["trace"]) == 8
    assert {"id", "parent", "kind", "text", "tokens", "finish", "score", "selected"} <= set(traced["trace"][0])


def test_no_answer_leaves_stdout_empty_and_exits_with_1(model, tmp_path):
    args = ("solve", "smoke", ASKED, "--model", model, "--set", "sampling.max_new_tokens=2")
    done = ratchet(*args, cwd=tmp_path, check=1)
    assert done.stdout == ""
    last = done.stderr.splitlines()[-1]
    assert last.startswith("ratchet: no answer in 8 candidates (8 ended by length): give a larger --budget")
    found = json.loads(ratchet(*args, "--json", cwd=tmp_path, check=1).stdout)
    assert found["answer"] is None
    assert found["correct"] is None


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("smoke", "what is love", "--model", "model"), "ratchet: 'what is love' is no countdown question"),
        (("smoke",), "ratchet: which question for smoke?"),
        ((), "ratchet: which question?"),
        (("smoke", ASKED, "--budget", "0"), "ratchet: Invalid value for '--budget'"),
    ],
)
def test_bad_usage_exits_with_2(model, tmp_path, args, message):
    done = ratchet("solve", *args, cwd=tmp_path, check=2)
    assert done.stderr.startswith(message)
    assert done.stdout == ""


def test_help_stays_fast():
    seen = "import sys; sys.argv = ['ratchet', 'solve', '--help']\nimport flows.cli\n"
    seen += "try:\n flows.cli.main()\nexcept SystemExit: pass\n"
    seen += "print([m for m in ('torch', 'jinja2', 'numpy', 'search.strategies') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", seen], capture_output=True, text=True, timeout=60)
    assert done.stdout.splitlines()[-1] == "[]", done.stdout + done.stderr
