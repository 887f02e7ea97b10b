"""Rollouts from the steps of stored answers, on scripts whose values are known."""

import math
from dataclasses import replace
from typing import ClassVar

import pytest

from search import rollouts
from search.engines.scripted import EOS, ByteTokenizer
from search.errors import DataError, EngineError
from search.policy import Policy
from search.results import read_results
from search.rollouts import Rollouts, Value, prepare, split, values
from search.run import run_shards, search
from search.types import Budget, Candidate, Finish, Grade, Problem, SearchResult, Spend
from tests.scripted_search import (
    ChainTask,
    LineTask,
    ShuffledStream,
    StepEngine,
    by_table,
    chain_engine,
    count,
    run,
    run_all,
    sampler_of,
)

TOKENIZER = ByteTokenizer()
QUESTION = Problem("q", "q", "R")
PROMPT = tuple(TOKENIZER.encode("q"))


def stored(*answers: str, gold: str = "R", prompt: tuple[int, ...] = PROMPT, **more: object) -> SearchResult:
    """Answers drawn whole; the one whose last line is `gold` is right."""
    candidates = tuple(
        Candidate(
            (*text.encode(), EOS),
            text,
            Finish.EOS,
            answer=LineTask.answer(text),
            grade=Grade.CORRECT if LineTask.answer(text) == gold else Grade.WRONG,
            path=(n,),
        )
        for n, text in enumerate(answers)
    )
    result = SearchResult(QUESTION, "pool(4)", candidates, None, Spend(), "model", "seed", prompt_ids=prompt)
    return replace(result, **more)


def of_problem(problem: Problem, *answers: str) -> SearchResult:
    return replace(stored(*answers, prompt=tuple(TOKENIZER.encode(problem.question))), problem=problem)


def rolled(results, settings, engine, task=None, **more):
    sampler = sampler_of(engine, task)
    problems, plan = prepare(results, settings, sampler, **more)
    return search(problems, plan, sampler)


# ---------------------------------------------------------------- steps of answers drawn whole


class Merging:
    """Each id is a text of its own; 9 ends the answer."""

    eos_token_id = 9
    texts: ClassVar = {1: "a", 2: "\n", 3: "\n\n", 4: "b\nc", 5: "d", 9: ""}

    def decode(self, token_ids, *, skip_special_tokens=True):
        return "".join(self.texts[i] for i in token_ids)


@pytest.mark.parametrize(
    ("ids", "delimiter", "ends", "steps"),
    [
        ((1, 2, 5, 9), "\n", (2, 4), ("a\n", "d")),
        ((1, 3, 5, 9), "\n", (2, 4), ("a\n\n", "d")),  # one token completes it: never cut inside
        ((1, 4, 5, 9), "\n", (2, 4), ("ab\nc", "d")),
        ((1, 2, 2, 5, 9), "\n\n", (3, 5), ("a\n\n", "d")),  # completed by the second of two tokens
        ((1, 2, 3, 5, 9), "\n\n", (3, 5), ("a\n\n\n", "d")),
        ((1, 3, 2, 5, 9), "\n\n", (2, 5), ("a\n\n", "\nd")),  # what ended a step begins no other delimiter
        ((1, 2, 9), "\n", (2, 3), ("a\n", "")),
        ((2, 2, 9), "\n", (1, 2, 3), ("\n", "\n", "")),
        ((1, 5, 9), "\n", (3,), ("ad",)),
    ],
)
def test_a_step_ends_with_the_token_that_completes_the_delimiter(ids, delimiter, ends, steps):
    text = Merging().decode(ids)
    candidate = split(Candidate(ids, text, Finish.EOS), Merging(), delimiter)
    assert candidate.step_ends == ends
    assert candidate.steps == steps


def test_an_answer_drawn_whole_is_split_as_searching_it_would_have_cut_it():
    problems = [ChainTask().problem(n, 5) for n in range(4)]
    whole = run_all("majority", 8, chain_engine(0.6), problems, task=ChainTask())

    async def stepwise(policy):
        live, ended = policy.start(8, stream="sample"), []
        while live:
            grown = await policy.step(live)
            ended, live = ended + [c for c in grown if not c.open], [c for c in grown if c.open]
        return {c.ids: (c.step_ends, c.text_ends) for c in ended}

    for result in whole:
        engine = chain_engine(0.6)
        sampler = sampler_of(engine, ChainTask())
        searched = run(stepwise(Policy(result.problem, sampler, Budget("samples", 8))), engine)
        cut = [split(c, TOKENIZER, "\n") for c in result.candidates]
        assert {c.ids: (c.step_ends, c.text_ends) for c in cut} == searched


# ---------------------------------------------------------------- values


def test_the_value_of_a_prefix_is_the_share_of_right_ends():
    engine = StepEngine(by_table({"a\n": ["R", "X", "R", "R"], "b\n": ["X", "c\n", "X", "X"], "b\nc\n": "R"}))
    [result] = rolled([stored("a\nR", "b\nX", "a\nX", "b\nc\nR")], Rollouts(4), engine)
    assert values(result) == [Value(("a\n",), 3, 4), Value(("b\n",), 1, 4), Value(("b\n", "c\n"), 4, 4)]
    assert [v.share for v in values(result)] == [0.75, 0.25, 1.0]


def test_a_rollout_continues_the_very_ids_of_its_prefix_with_the_prompt_they_were_drawn_with():
    engine = StepEngine(by_table({"a\n": "R", "b\n": "X"}))
    shown = tuple(TOKENIZER.encode("an older prompt\n\nq"))
    answers = stored("a\nR", "b\nX", prompt=shown)
    [result] = rolled([answers], Rollouts(2), engine)
    assert [r.prefix for r, _ in engine.log] == [(*shown, *b"a\n")] * 2 + [(*shown, *b"b\n")] * 2
    for candidate in result.candidates:
        answer, steps, _ = candidate.path
        end = split(answers.candidates[answer], TOKENIZER, "\n").step_ends[steps - 1]
        assert candidate.ids[:end] == answers.candidates[answer].ids[:end]
        assert candidate.prompt_ids == shown


def test_equal_beginnings_are_rolled_out_once_and_every_draw_is_another():
    engine = chain_engine(0.5)
    task = ChainTask()
    problem = task.problem(0, 4)
    digits = problem.answer
    answers = of_problem(problem, "\n".join(digits), "\n".join([*digits[:2], "100", "101"]))
    [result] = rolled([answers], Rollouts(16), engine, task)
    first, second, third = (f"{d}\n" for d in digits[:3])
    assert [v.steps for v in values(result)] == [
        (first,),
        (first, second),
        (first, second, third),
        (first, second, "100\n"),
    ]
    assert len({r.key for r, _ in engine.log}) == len(engine.log) == 64
    assert values(result)[-1].num_correct == 0  # after a wrong step nothing is right


def test_more_rollouts_begin_with_the_fewer_ones():
    few, many = (
        rolled([stored("a\nR", "b\nX")], Rollouts(num), StepEngine(lambda *a: f"{a[3] % 97}"))[0] for num in (4, 16)
    )
    drawn = [[c.text for c in many.candidates if c.path[:2] == place] for place in ((0, 1), (1, 1))]
    assert [c.text for c in few.candidates] == drawn[0][:4] + drawn[1][:4]


def test_rollouts_agree_with_the_known_chance():
    task = ChainTask()
    problem = task.problem(1, 4)
    answers = of_problem(problem, "\n".join(problem.answer))
    [result] = rolled([answers], Rollouts(2000), chain_engine(0.7), task)
    for steps, value in enumerate(values(result), start=1):
        chance = 0.7 ** (4 - steps)
        assert abs(value.share - chance) < 4 * math.sqrt(chance * (1 - chance) / 2000)


def test_a_truncated_rollout_is_wrong_and_one_without_verdict_is_left_out():
    class Failing(LineTask):
        def grade(self, pairs):
            graded = super().grade(pairs)
            return [replace(g, grade=Grade.UNGRADED) if g.answer == "broken" else g for g in graded]

    pieces = ["R", "x" * 300, "broken", "R"]
    [result] = rolled([stored("a\nR")], Rollouts(4), StepEngine(by_table({"a\n": pieces})), Failing())
    assert values(result) == [Value(("a\n",), 2, 3)]
    [result] = rolled([stored("a\nR")], Rollouts(1), StepEngine(by_table({"a\n": "broken"})), Failing())
    assert values(result) == []


def test_a_limit_on_prefixes_takes_the_same_ones_every_time():
    answers = [stored("a\nb\nR", "c\nd\nR", "e\nR")]

    def script(prompt, written, temperature, key):
        return "R"

    every = values(rolled(answers, Rollouts(1), StepEngine(script))[0])
    some = [values(rolled(answers, Rollouts(1, prefixes=2), StepEngine(script))[0]) for _ in range(2)]
    assert len(every) == 5
    assert some[0] == some[1]
    assert len(some[0]) == 2
    assert set(some[0]) < set(every)


# ---------------------------------------------------------------- which answers


def test_answers_that_may_not_label_are_left_out():
    answers = stored("a\nR", "b\nR", "c\nR", "d\n", "e\nR", "f\nR")
    bad = [
        replace(answers.candidates[1], grade=Grade.UNGRADED),
        replace(answers.candidates[2], finish=Finish.LENGTH),
        replace(answers.candidates[3]),
        replace(answers.candidates[4], prompt_ids=(1, 2)),
        replace(answers.candidates[5], grade=None),
    ]
    results = [
        answers.with_candidates([answers.candidates[0], *bad]),
        replace(stored("z\nR"), failed="it broke"),
    ]
    engine = StepEngine(by_table({"a\n": "R", "d\n": "X"}))
    assert [v.steps for v in values(rolled(results, Rollouts(1), engine)[0])] == [("a\n",)]
    kept = rolled(results, Rollouts(1), engine, keep_unparsable=True)[0]
    assert [v.steps for v in values(kept)] == [("a\n",), ("d\n",)]


def test_answers_without_a_delimiter_are_refused():
    with pytest.raises(DataError, match=r"none of 2 answers holds the step delimiter '\\n'"):
        prepare([stored("R", "X")], Rollouts(2), sampler_of(StepEngine(by_table({}))))


def test_a_prefix_that_leaves_no_room_is_not_rolled_out():
    sampler = replace(sampler_of(StepEngine(by_table({"a\n": "R"}))), max_new_tokens=4)
    problems, plan = prepare([stored("a\nbb\nR")], Rollouts(2), sampler)
    [result] = search(problems, plan, sampler)
    assert values(result) == [Value(("a\n",), 2, 2)]


# ---------------------------------------------------------------- the first wrong step


LENGTH = 16


def lines(wrong: int | None) -> str:
    """LENGTH lines that are right up to the line `wrong`, counted from 1."""
    return "\n".join("x" if wrong is not None and n >= wrong else "r" for n in range(1, LENGTH + 1))


class AllRight(LineTask):
    @staticmethod
    def answer(text: str) -> str | None:
        return "W" if "x" in text else "R"


def hopeful(prompt, written, temperature, key):
    """After a wrong line nothing helps; from right ones half of the ends are right."""
    left = LENGTH - written.count("\n")
    return ("x" if "x" in written or key % 2 else "r") + "\nr" * (left - 1)


@pytest.mark.parametrize("wrong", range(1, LENGTH + 1))
def test_binary_search_finds_the_first_wrong_step_with_few_probes(wrong):
    engine = StepEngine(hopeful)
    answers = stored(lines(wrong))
    answers = answers.with_candidates([replace(answers.candidates[0], grade=Grade.WRONG, answer="W")])
    [result] = rolled([answers], Rollouts(16, first_error=True), engine, AllRight())
    probed = {len(v.steps): v.share for v in values(result)}
    assert len(probed) == math.log2(LENGTH)
    assert len(engine.log) == 16 * len(probed)
    bad = min((n for n, share in probed.items() if share == 0), default=LENGTH)
    good = max((n for n, share in probed.items() if share > 0), default=0)
    assert (good + 1, bad) == (wrong, wrong)


def test_right_answers_and_what_they_prove_cost_no_probe():
    answers = stored(lines(None), lines(9), lines(9))
    right, wrong, _ = answers.candidates
    wrong = replace(wrong, grade=Grade.WRONG, answer="W")
    alone = answers.with_candidates([replace(right, grade=Grade.CORRECT, answer="R")])
    settings = Rollouts(8, first_error=True)
    engine = StepEngine(hopeful)
    assert rolled([alone], settings, engine, AllRight())[0].candidates == ()
    both = alone.with_candidates([*alone.candidates, wrong, wrong])
    [result] = rolled([both], settings, engine, AllRight())
    assert sorted(len(v.steps) for v in values(result)) == [9, 10, 12]  # from 8 right lines on, once for both


def test_a_probe_without_verdict_ends_the_search_of_its_answer():
    class Broken(AllRight):
        def grade(self, pairs):
            return [replace(g, grade=Grade.UNGRADED) for g in super().grade(pairs)]

    answers = stored(lines(5))
    answers = answers.with_candidates([replace(answers.candidates[0], grade=Grade.WRONG)])
    engine = StepEngine(hopeful)
    assert values(rolled([answers], Rollouts(4, first_error=True), engine, Broken())[0]) == []
    assert len(engine.log) == 4


# ---------------------------------------------------------------- spend, shards, streams


class Batches(StepEngine):
    """Remembers which requests came together."""

    def extend(self, requests):
        continuations = super().extend(requests)
        self.batches = [*getattr(self, "batches", []), [*zip(requests, continuations, strict=True)]]
        return continuations


def ideal_tokens(batches) -> int:
    """All that was generated, and each token of what was continued that stood in nothing before its batch, once."""
    known: set[tuple[int, ...]] = set()
    total = 0
    for batch in batches:
        asked = {r.prefix[:n] for r, _ in batch for n in range(1, len(r.prefix) + 1)}
        total += len(asked - known) + sum(len(c.ids) for _, c in batch)
        known |= {(r.prefix + c.ids)[:n] for r, c in batch for n in range(1, len(r.prefix + c.ids) + 1)}
    return total


@pytest.mark.parametrize("first_error", [False, True])
@pytest.mark.parametrize("cache", [False, True])
def test_spend_equals_an_independent_count(first_error, cache):
    task = ChainTask()
    problem = task.problem(3, 5)
    [answers] = run_all("majority", 6, chain_engine(0.6), [problem], task=task)
    engine = Batches(chain_engine(0.6).script, cache=cache)
    [result] = rolled([answers], Rollouts(3, first_error=first_error), engine, task)
    counted, spend = count(engine), result.spend
    assert len(engine.log) == spend.samples == len(result.candidates) > 0
    assert (spend.generated_tokens, spend.prefilled_tokens, spend.cached_tokens) == (
        counted.generated,
        counted.prefilled,
        counted.cached,
    )
    assert spend.flops_ideal == 2000.0 * ideal_tokens(engine.batches)
    assert spend.flops_actual == counted.actual_flops


def searched(tmp_path, name, engine, *, first_error=False, **more):
    task = ChainTask()
    answers = run_all("majority", 6, chain_engine(0.6), [task.problem(n, 4) for n in range(7)], task=task)
    sampler = sampler_of(engine, task, max_new_tokens=20)
    problems, plan = prepare(answers, Rollouts(4, first_error=first_error), sampler)
    spend = run_shards(problems, plan, sampler, tmp_path / name, shard_problems=3, **more)
    return spend, {path.name: path.read_bytes() for path in (tmp_path / name).glob("shard-*.jsonl")}


@pytest.mark.parametrize("first_error", [False, True])
def test_shards_resume_to_the_same_bytes(tmp_path, first_error):
    spend, whole = searched(tmp_path, "whole", chain_engine(0.6), first_error=first_error)
    assert len(whole) == 3
    (tmp_path / "resumed").mkdir()
    (tmp_path / "resumed" / "shard-00001.jsonl").write_bytes(whole["shard-00001.jsonl"])
    engine = chain_engine(0.6)
    assert searched(tmp_path, "resumed", engine, first_error=first_error) == (spend, whole)
    generated = sum(len(c.ids) for _, c in engine.log)
    kept = sum(r.spend.generated_tokens for r in read_results(tmp_path / "whole" / "shard-00001.jsonl"))
    assert generated == spend.generated_tokens - kept


def test_a_cap_on_tokens_holds(tmp_path):
    spend, whole = searched(tmp_path, "whole", chain_engine(0.6))
    capped, some = searched(tmp_path, "capped", chain_engine(0.6), max_tokens=spend.generated_tokens // 2)
    assert 0 < capped.generated_tokens <= spend.generated_tokens // 2
    assert set(some) < set(whole)


@pytest.mark.parametrize("first_error", [False, True])
def test_a_streaming_engine_gives_the_same_values(tmp_path, first_error):
    _, whole = searched(tmp_path, "whole", chain_engine(0.6), first_error=first_error)
    for seed in range(3):
        stream = ShuffledStream(chain_engine(0.6), seed)
        assert searched(tmp_path, f"stream-{seed}", stream, first_error=first_error)[1] == whole
    with pytest.raises(EngineError):
        searched(tmp_path, "dies", ShuffledStream(chain_engine(0.6), 0, num_answers=40), first_error=first_error)
    assert searched(tmp_path, "dies", ShuffledStream(chain_engine(0.6), 1), first_error=first_error)[1] == whole


def test_results_say_what_they_are():
    assert Rollouts(16, first_error=True).text == "rollouts(16, first_error=true)"
    assert Rollouts(8, prefixes=2).text == "rollouts(8, prefixes=2)"
    [plain] = rolled([stored("a\nR")], Rollouts(1), StepEngine(by_table({"a\n": "R"})))
    assert rollouts.is_rollouts(plain)
    assert not rollouts.finds_first_error(plain)
    assert not rollouts.is_rollouts(stored("a\nR"))
