"""The scripted engine step by step: forks go on plausibly, and cutting changes nothing."""

import json

import pytest

from configs.schema import CountdownTask, Splits
from configs.schema import ScriptedEngine as Settings
from search.engines.scripted import EOS, SEPARATOR, ScriptedEngine
from search.errors import ModelError
from search.policy import Policy, Sampler
from search.randomness import key64
from search.scheduler import run_together
from search.tasks.countdown import Countdown
from search.types import Budget, Finish, Grade, Request


def reply(prompt: str, temperature: float, key: int) -> str:
    return "".join(f"{prompt}{line}:{key64(key, line) % 10}\n" for line in range(3))


def step(prompt: str, written: str, temperature: float, key: int) -> str:
    """Four steps; each a digit drawn for its place."""
    return f"{key % 10}\n" if written.count("\n") < 4 else ""


@pytest.fixture(params=["reply", "step"])
def engine(request) -> ScriptedEngine:
    return ScriptedEngine(reply) if request.param == "reply" else ScriptedEngine(step=step)


def prefix(text: str, ids: tuple[int, ...] = ()) -> tuple[int, ...]:
    return (*text.encode(), SEPARATOR, *ids)


def drawn(engine: ScriptedEngine, ids: tuple[int, ...], key: int, stop: str | None = None, most: int = 99):
    (continuation,) = engine.extend([Request(prefix("p", ids), most, 1.0, key, stop)])
    return continuation


def test_an_answer_cut_anywhere_equals_the_answer_drawn_whole(engine) -> None:
    for key in range(5):
        whole = drawn(engine, (), key)
        assert whole.finish is Finish.EOS
        for cut in range(len(whole.ids)):
            assert drawn(engine, whole.ids[:cut], key).ids == whole.ids[cut:]
        pieces: tuple[int, ...] = ()
        while not pieces or pieces[-1] != EOS:
            pieces += drawn(engine, pieces, key, "\n").ids
        assert pieces == whole.ids


def test_a_fork_goes_on_from_where_it_forked_and_differs(engine) -> None:
    start = drawn(engine, (), 1, "\n").ids
    forks = [drawn(engine, start, key64("fork", n)) for n in range(20)]
    assert len({fork.ids for fork in forks}) > 10
    lines = engine.tokenizer.decode(drawn(engine, (), 1).ids).count("\n")
    for fork in forks:
        text = engine.tokenizer.decode(start + fork.ids)
        assert fork.finish is Finish.EOS
        assert text.count("\n") == lines
        assert len({len(line) for line in text.splitlines()}) == 1  # no step was lost, doubled or cut
    assert forks == [drawn(engine, start, key64("fork", n)) for n in range(20)]


def test_a_fork_in_the_middle_of_a_step_finishes_it() -> None:
    engine = ScriptedEngine(reply)
    whole = drawn(engine, (), 1).ids
    text = engine.tokenizer.decode(whole[:6] + drawn(engine, whole[:6], 2).ids)
    assert [line[:3] for line in text.splitlines()] == ["p0:", "p1:", "p2:"]


def test_what_has_no_more_steps_ends() -> None:
    engine = ScriptedEngine(lambda prompt, temperature, key: "one\n" * (1 + key))
    assert drawn(engine, tuple(b"one\ntwo\n"), 0).ids == (EOS,)
    assert drawn(engine, tuple(b"one\ntwo\n"), 2).ids == (*b"one\n", EOS)


def test_a_delimiter_that_only_just_fits_ends_the_step(engine) -> None:
    length = len(drawn(engine, (), 1, "\n").ids)
    assert drawn(engine, (), 1, "\n", length).finish is Finish.STOP
    assert drawn(engine, (), 1, "\n", length - 1).finish is Finish.LENGTH


def countdown_engine(folder, accuracy: float) -> tuple[Countdown, ScriptedEngine]:
    (folder / "scripted.json").write_text(json.dumps({"skill": 0}))
    task = Countdown(CountdownTask(type="countdown"), Splits(), 0)
    return task, ScriptedEngine.of_task(task, folder, Settings(type="scripted", accuracy=accuracy))


def test_the_smoke_script_can_be_searched_step_by_step_and_revised(tmp_path) -> None:
    task, engine = countdown_engine(tmp_path, 0.5)
    problems = task.draw("train", 40, stream="test")

    async def by_steps(policy):
        candidates = policy.start(4)
        while going := [c for c in candidates if c.open]:
            grown = await policy.step([child for c in going for child in policy.fork(c, 1)])
            candidates = [c for c in candidates if not c.open] + grown
        revised = await policy.finish(policy.start(1, stream="revision", attempts=candidates[:2]))
        return candidates, revised

    sampler = Sampler(engine, task, 1.0, 64, (0,))
    found = run_together([by_steps(Policy(p, sampler, Budget("samples", 99))) for p in problems], engine)
    pairs = [(p, c.text) for p, (candidates, _) in zip(problems, found, strict=True) for c in candidates]
    grades = [graded.grade for graded in task.grade(pairs)]
    assert 0 < grades.count(Grade.CORRECT) < len(grades)
    assert all(c.complete and len(c.step_ends) >= 2 for candidates, _ in found for c in candidates)
    assert all(c.complete and c.text for _, revised in found for c in revised)


def test_whole_answers_are_right_as_often_as_configured(tmp_path) -> None:
    task, engine = countdown_engine(tmp_path, 0.3)
    problems = task.draw("train", 300, stream="test")
    asked = [Request((*engine.tokenizer.encode(task.prompt(p)),), 64, 1.0, key64(p.key)) for p in problems]
    pairs = [(p, engine.tokenizer.decode(c.ids)) for p, c in zip(problems, engine.extend(asked), strict=True)]
    assert sum(graded.grade is Grade.CORRECT for graded in task.grade(pairs)) / 300 == pytest.approx(0.3, abs=0.08)


def test_a_folder_without_a_script_is_named(tmp_path) -> None:
    task = Countdown(CountdownTask(type="countdown"), Splits(), 0)
    with pytest.raises(ModelError, match=r"no scripted\.json"):
        ScriptedEngine.of_task(task, tmp_path, Settings(type="scripted"))
