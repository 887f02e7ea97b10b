"""Searches of many problems: order, resumption without loss or duplicates, the cap over shards, flat memory."""

import gc
import itertools
import json

import pytest

from search import answers
from search.errors import BudgetError, EngineError
from search.policy import Sampler
from search.randomness import key64
from search.results import read_partial, read_results, write_unfinished
from search.run import grade, run_shards, search
from search.strategies import parse
from search.types import Budget, Candidate, Finish, Grade, Graded, ModelFacts, Problem, SearchResult, Spend
from tests.scripted_search import (
    ChainTask,
    LineTask,
    ShuffledStream,
    StepEngine,
    TextVerifier,
    by_score,
    chain_engine,
    given,
    plan_of,
    run_all,
    sampler_of,
)

TASK = ChainTask()
PROBLEMS = [TASK.problem(number, 3) for number in range(20)]
STRATEGIES = ["majority", "beam(width=2)", "revisions"]


def judge():
    return TextVerifier(lambda text: key64(text) / 2**64)


def plan(strategy="beam(width=2)", samples=4):
    return parse(strategy).plan(Budget("samples", samples), judge().facts)


def shards(engine, out, problems=PROBLEMS, *, strategy="beam(width=2)", size=6, verifier=None, **more):
    sampler = sampler_of(engine, TASK, max_new_tokens=40)
    return run_shards(problems, plan(strategy), sampler, out, shard_problems=size, verifier=verifier or judge(), **more)


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def content(folder):
    return {path.name: path.read_text() for path in folder.iterdir()}


# ---------------------------------------------------------------- one search


def test_every_result_says_where_it_came_from():
    (result,) = run_all("beam(width=2)", 4, chain_engine(0.8), PROBLEMS[:1], judge(), task=TASK)
    assert result.strategy == "beam(width=2) @ 4"
    assert (result.model, result.seed, result.approximate) == ("step-engine", "0/test/test", False)
    assert result.prompt_ids == (*PROBLEMS[0].question.encode(), 257)
    assert SearchResult.from_json(json.loads(json.dumps(result.to_json()))).to_json() == result.to_json()


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_results_are_the_same_alone_together_and_told_one_by_one(strategy):
    together = run_all(strategy, 4, chain_engine(0.8), PROBLEMS, judge(), task=TASK)
    alone = [run_all(strategy, 4, chain_engine(0.8), [p], judge(), task=TASK)[0] for p in PROBLEMS]
    told = []
    run_all(strategy, 4, chain_engine(0.8), PROBLEMS, judge(), task=TASK, on_result=told.append)
    assert together == alone
    assert sorted(told, key=lambda r: PROBLEMS.index(r.problem)) == together


MIXED = ["greedy", "majority", "beam(width=2)", "best_of_n_weighted"]


def mixed(problem):
    """A plan for each problem: another strategy, and 2 or 4 samples."""
    number = PROBLEMS.index(problem)
    return plan(MIXED[number % len(MIXED)], 2 + number % 2 * 2)


@pytest.mark.parametrize("streaming", [False, True])
def test_each_problem_may_have_a_plan_of_its_own(streaming):
    """Searched together they come out as each alone under its plan; who needs no scores pays no verifier."""
    engine = ShuffledStream(chain_engine(0.8), 3) if streaming else chain_engine(0.8)
    together = search(PROBLEMS, mixed, sampler_of(engine, TASK, max_new_tokens=40), judge())
    for problem, result in zip(PROBLEMS, together, strict=True):
        sampler = sampler_of(chain_engine(0.8), TASK, max_new_tokens=40)
        assert [result] == search([problem], mixed(problem), sampler, judge())
        assert result.strategy == mixed(problem).name
        assert (result.spend.verifier_tokens > 0) == (mixed(problem).scored)
    assert {result.strategy for result in together} == {mixed(p).name for p in PROBLEMS}


def test_a_plan_that_a_problem_cannot_have_ends_the_search_before_anything_is_spent():
    engine = chain_engine(0.8)
    engine.facts = ModelFacts("unknown size", 0, 4096)

    def in_flops(problem):
        return plan_of(parse("majority").plan(Budget("samples", 2)).strategy, 1e6, unit="flops")

    with pytest.raises(BudgetError, match=r"set engine\.flops_parameters"):
        search(PROBLEMS, lambda p: in_flops(p) if p is PROBLEMS[7] else plan("majority"), sampler_of(engine, TASK))
    assert not engine.log


@pytest.mark.parametrize("size", [1, 3, 20])
def test_plans_of_their_own_do_not_depend_on_the_shards(tmp_path, size):
    sampler = sampler_of(chain_engine(0.8), TASK, max_new_tokens=40)
    spend = run_shards(PROBLEMS, mixed, sampler, tmp_path / "own", shard_problems=size, verifier=judge())
    found = list(read_results(tmp_path / "own"))
    whole = search(PROBLEMS, mixed, sampler_of(chain_engine(0.8), TASK, max_new_tokens=40), judge())
    assert [result.to_json() for result in found] == [result.to_json() for result in whole]
    assert spend == sum((result.spend for result in found), Spend())


def test_each_result_is_told_as_soon_as_its_problem_is_done():
    engine = StepEngine(lambda prompt, written, *_: "x\n" if written.count("\n") < int(prompt) else "A")
    told = []
    problems = [Problem(key, key, "A") for key in ("3", "0", "2")]
    results = run_all(
        "dvts(width=1)",
        1,
        engine,
        problems,
        by_score({}),
        on_result=lambda result: told.append((result.problem.key, len(engine.log))),
    )
    assert told == [("0", 3), ("2", 7), ("3", 8)]
    assert [r.problem.key for r in results] == ["3", "0", "2"]


def test_grading_asks_the_task_once_for_all():
    class Counting(LineTask):
        calls = 0

        def grade(self, pairs):
            self.calls += 1
            return super().grade(pairs)

    task = Counting()
    run_all("majority", 4, StepEngine(lambda *_: "A"), [Problem(k, k, "A") for k in "abc"], task=task)
    assert task.calls == 1


@pytest.mark.parametrize("answer", ["A", None])
def test_what_is_not_complete_is_wrong_whatever_it_says_and_no_grader_sees_it(answer):
    seen = []

    class Watching(LineTask):
        def answers(self, pairs):
            seen.extend(text for _, text in pairs)
            return super().answers(pairs)

        def grade(self, pairs):
            seen.extend(text for _, text in pairs)
            return super().grade(pairs)

    candidates = [Candidate((1,), "A", finish) for finish in (Finish.LENGTH, Finish.EOS, Finish.ERROR)]
    (graded,) = grade(Watching(), [Problem("q", "q", answer)], [candidates])
    assert [c.answer for c in graded] == [None, "A", None]
    assert [c.grade for c in graded] == ([Grade.WRONG, Grade.CORRECT, Grade.WRONG] if answer else [None] * 3)
    assert seen == ["A"]


def test_a_grader_that_failed_makes_no_answer_wrong_or_right():
    class Failing(LineTask):
        def grade(self, pairs):
            return [Graded(Grade.UNGRADED, None) for _ in pairs]

    (result,) = run_all("majority", 2, StepEngine(lambda *_: "A"), [Problem("q", "q", "A")], task=Failing())
    assert [c.grade for c in result.candidates] == [Grade.UNGRADED] * 2
    assert result.selected is None


def test_without_a_gold_answer_the_answers_are_read_and_vote():
    answers_ = iter("ABBx")
    engine = StepEngine(lambda *_: next(answers_))
    (result,) = run_all("majority", 4, engine, [Problem("q", "q")])
    assert [c.answer for c in result.candidates] == list("ABBx")
    assert {c.grade for c in result.candidates} == {None}
    assert given(result) == "B"


def test_a_strategy_of_the_users_own_is_searched_like_any_other():
    async def second_thought(problem, policy, verifier, budget):
        first = await policy.sample(1)
        return first + await policy.sample(1, temperature=0.0)

    engine = StepEngine(lambda prompt, written, temperature, key: f"{temperature}")
    (result,) = search([PROBLEMS[0]], plan_of(second_thought, rule=answers.first), sampler_of(engine))
    assert [c.text for c in result.candidates] == ["1.0", "0.0"]
    assert result.strategy == "own @ 4"


# ---------------------------------------------------------------- shards


def test_shards_hold_fixed_problems_in_order(tmp_path):
    spend = shards(chain_engine(0.8), tmp_path)
    assert names(tmp_path) == [f"shard-{n:05d}.jsonl" for n in range(4)]
    stored = list(read_results(tmp_path))
    assert [r.problem.key for r in stored] == [p.key for p in PROBLEMS]
    assert sum((r.spend for r in stored), Spend()) == spend


@pytest.mark.parametrize("size", [1, 7, 20, 50])
def test_results_do_not_depend_on_the_size_of_shards(tmp_path, size):
    shards(chain_engine(0.8), tmp_path, size=size)
    expected = search(PROBLEMS, plan(), sampler_of(chain_engine(0.8), TASK, max_new_tokens=40), judge())
    assert [r.to_json() for r in read_results(tmp_path)] == [r.to_json() for r in expected]


def test_shards_that_are_there_are_kept(tmp_path):
    shards(chain_engine(0.8), tmp_path)
    before = content(tmp_path)
    (tmp_path / "shard-00002.jsonl").unlink()
    engine = chain_engine(0.8)
    shards(engine, tmp_path)
    assert content(tmp_path) == before
    assert {bytes(r.prefix[:3]).decode() for r, _ in engine.log} == {p.question for p in PROBLEMS[12:18]}


def test_parts_share_the_shards_and_make_the_same_files(tmp_path):
    shards(chain_engine(0.8), tmp_path / "whole")
    for part in ((1, 2), (0, 2)):
        shards(chain_engine(0.8), tmp_path / "parts", part=part)
    assert content(tmp_path / "parts") == content(tmp_path / "whole")


def test_a_synchronous_engine_that_dies_redoes_its_shard_to_the_same_bytes(tmp_path):
    class Dying(StepEngine):
        left = 5

        def extend(self, requests):
            self.left -= 1
            if not self.left:
                raise EngineError("the engine died")
            return super().extend(requests)

    with pytest.raises(EngineError):
        shards(Dying(chain_engine(0.8).script), tmp_path / "broken")
    assert len(names(tmp_path / "broken")) < 4
    shards(chain_engine(0.8), tmp_path / "broken")
    shards(chain_engine(0.8), tmp_path / "whole")
    assert content(tmp_path / "broken") == content(tmp_path / "whole")


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_streaming_engine_that_dies_again_and_again_loses_and_doubles_nothing(tmp_path, strategy):
    for attempt in range(30):
        before = {result.problem.key for path in tmp_path.glob("*.partial") for result in read_partial(path)}
        plain = chain_engine(0.8)
        engine = ShuffledStream(plain, attempt, num_answers=60)
        try:
            shards(engine, tmp_path, strategy=strategy)
        except EngineError:
            asked = {bytes(r.prefix[:3]).decode() for r, _ in plain.log}
            assert not asked & {p.question for p in PROBLEMS if p.key in before}  # what was finished is not redone
            continue
        break
    assert attempt > 0
    assert [path for path in names(tmp_path) if path.endswith(".partial")] == []
    stored = list(read_results(tmp_path))
    assert [r.problem.key for r in stored] == [p.key for p in PROBLEMS]
    alone = run_all(strategy, 4, chain_engine(0.8), PROBLEMS, judge(), task=TASK, max_new_tokens=40)
    assert [r.to_json() for r in stored] == [r.to_json() for r in alone]


def test_an_engine_that_remembers_forgets_before_every_shard(tmp_path):
    class Remembering(StepEngine):
        resets = ()

        def reset(self):
            self.resets = (*self.resets, len(self.log))

    engine = Remembering(chain_engine(0.8).script)
    shards(engine, tmp_path, strategy="majority")
    per_shard = [6 * 4, 6 * 4, 6 * 4]
    assert engine.resets == tuple(itertools.accumulate([0, *per_shard]))


def test_a_partial_file_that_was_cut_in_a_line_is_resumed(tmp_path):
    with pytest.raises(EngineError):
        shards(ShuffledStream(chain_engine(0.8), 0, num_answers=220), tmp_path, size=20)
    partial = tmp_path / "shard-00000.partial"
    whole = partial.read_bytes()
    assert whole.count(b"\n") >= 2
    partial.write_bytes(whole[:-20])
    shards(ShuffledStream(chain_engine(0.8), 1), tmp_path, size=20)
    stored = list(read_results(tmp_path))
    assert [r.problem.key for r in stored] == [p.key for p in PROBLEMS]


# ---------------------------------------------------------------- the cap


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("cap", [0, 100, 300, 500])
def test_the_cap_holds_over_all_shards_and_what_is_finished_is_written(tmp_path, cap, streaming):
    plain = chain_engine(0.8)
    engine = ShuffledStream(plain, 0) if streaming else plain
    spend = shards(engine, tmp_path, max_tokens=cap)
    assert spend.generated_tokens == sum(len(c.ids) for _, c in plain.log) <= cap
    stored = list(read_results(tmp_path))
    assert spend.generated_tokens >= sum(r.spend.generated_tokens for r in stored)
    assert shards(plain, tmp_path, max_tokens=cap) == spend  # read again
    assert len(stored) == len({r.problem.key for r in stored}) < len(PROBLEMS)
    whole = {r.problem.key: r for r in run_all("beam(width=2)", 4, chain_engine(0.8), PROBLEMS, judge(), task=TASK)}
    assert all(r.candidates == whole[r.problem.key].with_candidates(r.candidates).candidates for r in stored)


def test_what_the_unfinished_of_a_shard_cost_is_not_spent_again_in_the_next(tmp_path):
    """Six problems begin side by side and one of them ends: the tokens of the others are gone too."""
    for cap in range(60, 400, 20):
        engine = StepEngine(lambda *_: "AB")
        strategy = "adaptive_majority(batch=1, certainty=1, samples=30)"
        sampler = sampler_of(engine, max_new_tokens=10)
        plan = parse(strategy).plan(Budget("samples", 30))
        run_shards(PROBLEMS, plan, sampler, tmp_path / str(cap), shard_problems=6, max_tokens=cap)
        assert sum(len(c.ids) for _, c in engine.log) <= cap


def test_the_unfinished_of_a_capped_search_are_paid_for(tmp_path):
    """Every problem has begun and none is finished: all of it is spent."""
    engine = StepEngine(lambda *_: "AB")
    plan = parse("adaptive_majority(batch=1, certainty=1, samples=30)").plan(Budget("samples", 30))
    run = {"shard_problems": 6, "max_tokens": 60}
    spend = run_shards(PROBLEMS, plan, sampler_of(engine, max_new_tokens=3), tmp_path, **run)
    assert names(tmp_path) == ["shard-00000.jsonl", "shard-00000.unfinished.json"]
    assert list(read_results(tmp_path)) == []
    assert spend.generated_tokens == sum(len(c.ids) for _, c in engine.log) > 0
    assert spend.flops_actual == 2 * 1000 * sum(len(c.ids) + c.prefilled_tokens for _, c in engine.log)
    assert run_shards(PROBLEMS, plan, sampler_of(engine, max_new_tokens=3), tmp_path, **run) == spend


def test_what_an_attempt_without_a_shard_left_behind_is_not_counted(tmp_path):
    write_unfinished(Spend(generated_tokens=7), tmp_path / "shard-00000.jsonl")
    spend = shards(chain_engine(0.8), tmp_path)
    assert spend == shards(chain_engine(0.8), tmp_path / "clean")
    assert not list(tmp_path.glob("*.unfinished.json"))


def test_the_cap_counts_what_an_interrupted_attempt_finished(tmp_path):
    with pytest.raises(EngineError):
        shards(ShuffledStream(chain_engine(0.8), 0, num_answers=60), tmp_path, size=20, strategy="majority")
    kept = sum(r.spend.generated_tokens for r in read_partial(tmp_path / "shard-00000.partial"))
    assert kept > 0
    plain = chain_engine(0.8)
    spend = shards(ShuffledStream(plain, 1), tmp_path, size=20, strategy="majority", max_tokens=kept + 300)
    new = sum(len(c.ids) for _, c in plain.log)
    assert 0 < new <= 300
    assert spend.generated_tokens == kept + new


def test_a_cap_that_was_met_stays_met_when_run_again(tmp_path):
    shards(chain_engine(0.8), tmp_path, max_tokens=600)
    before = content(tmp_path)
    engine = chain_engine(0.8)
    shards(engine, tmp_path, max_tokens=600)
    assert content(tmp_path) == before
    assert engine.log == []


def test_a_cap_that_is_never_met_changes_nothing(tmp_path):
    shards(chain_engine(0.8), tmp_path / "capped", max_tokens=10**6)
    shards(chain_engine(0.8), tmp_path / "free")
    assert content(tmp_path / "capped") == content(tmp_path / "free")


# ---------------------------------------------------------------- progress and memory


@pytest.mark.parametrize("streaming", [False, True])
def test_progress_rises_to_the_end_and_tells_what_was_spent(tmp_path, streaming):
    heard = []
    plain = chain_engine(0.8)
    engine = ShuffledStream(plain, 0) if streaming else plain
    spend = shards(engine, tmp_path, progress=lambda done, total, **more: heard.append((done, total, more)))
    assert heard[-1] == (20, 20, {"tokens": spend.generated_tokens, "steps": len(plain.log)})
    for earlier, later in itertools.pairwise(heard):
        assert later[0] >= earlier[0]
        assert later[2]["tokens"] >= earlier[2]["tokens"]
        assert later[2]["steps"] >= earlier[2]["steps"]


@pytest.mark.parametrize("streaming", [False, True])
def test_memory_holds_a_shard_and_no_more(tmp_path, streaming):
    """Live results and candidates of 2000 problems, counted at the end of every shard of 50."""
    plain = StepEngine(lambda prompt, written, temperature, key: "x\n" if not written else "AB"[key % 2])
    engine = ShuffledStream(plain, 0) if streaming else plain
    problems = [Problem(f"p{n}", f"p{n}", "A") for n in range(2000)]
    live = []

    def count():
        kinds = [type(thing) for thing in gc.get_objects()]
        return kinds.count(SearchResult), kinds.count(Candidate)

    others = count()  # what other tests' fixtures hold

    def progress(done, total, **more):
        plain.log.clear()
        if done >= 400 * (len(live) + 1):  # a look at every object takes long
            live.append(tuple(now - before for now, before in zip(count(), others, strict=True)))

    shards(engine, tmp_path, problems, size=50, strategy="majority", progress=progress)
    assert len(live) >= 5
    assert max(results for results, _ in live) <= 2 * 50
    assert max(candidates for _, candidates in live) <= 2 * 50 * 2 * 4  # as searched and as graded
    assert sum(1 for _ in read_results(tmp_path)) == 2000


def test_approximate_engines_are_said_to_be(tmp_path):
    engine = chain_engine(0.8)
    engine.capabilities = type(engine.capabilities)(token_ids=False, seeds=False)
    sampler = Sampler(engine, TASK, 1.0, 40, (0,))
    (result,) = search(PROBLEMS[:1], plan(), sampler, judge())
    assert result.approximate
