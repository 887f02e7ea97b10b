"""Stage: problems -> graded results, in shards of fixed membership that are committed one by one.

On a synchronous engine a shard that was interrupted is redone whole; since its batches depend on nothing but its
problems, it comes out the same. On a streaming engine, where nothing comes out the same twice, the finished problems
of an interrupted shard are kept and the rest is done. Memory holds one shard.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Coroutine, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from search.answers import Rule
from search.errors import BudgetError, BudgetExceeded, VerifierError
from search.grading_beside import Beside
from search.policy import Policy, Sampler, Scorer, Waiting, none_scored
from search.results import (
    append_result,
    partial_path,
    read_partial,
    read_results,
    read_unfinished,
    write_results,
    write_unfinished,
)
from search.scheduler import Tick, run_together
from search.trace import Trace
from search.types import (
    Budget,
    CachingEngine,
    CachingVerifier,
    Candidate,
    Engine,
    Grade,
    Graded,
    Problem,
    SearchResult,
    Spend,
    StreamingEngine,
    Task,
    Verifier,
)

Strategy = Callable[[Problem, Policy, "Scorer | None", Budget], Coroutine[Waiting, None, list[Candidate]]]
Progress = Callable[..., None]
Found = tuple[list[Candidate], "str | None"]  # the answers, and why the search failed, if it did


@dataclass(frozen=True, slots=True)
class Plan:
    """What is run on a problem. Example: Plan("best_of_n(16)", best_of_n, Budget("samples", 16), answers.gold)"""

    name: str
    strategy: Strategy
    budget: Budget
    rule: Rule
    scored: bool = True  # False: the strategy and the rule need no scores, and no verifier is paid


Plans = Plan | Callable[[Problem], Plan]  # one for all problems, or one for each


def search(
    problems: Sequence[Problem],
    plan: Plans,
    sampler: Sampler,
    verifier: Verifier | None = None,
    *,
    max_tokens: int | None = None,
    keep_unfinished: bool = False,
    on_tick: Callable[[Tick], None] | None = None,
    on_result: Callable[[SearchResult], None] | None = None,
    on_unfinished: Callable[[Spend], None] | None = None,
    traces: Sequence[Trace] | None = None,
) -> list[SearchResult]:
    """Run the plan, or each problem's own, on all problems together and grade every candidate.

    A problem that `max_tokens` left unfinished is missing from the results, or with `keep_unfinished` has the answers
    that were finished; one that failed carries its reason and selects nothing. `on_result` gets each result as soon as
    its problem is done and graded, for which a streaming engine does not wait; `on_unfinished` what those that are
    missing have cost. Raises EngineError, and BudgetError for a budget of FLOPs where the engine does not know how many
    a token costs.
    """
    plans = [plan if isinstance(plan, Plan) else plan(problem) for problem in problems]
    for budget in {each.budget for each in plans}:
        _check_budget(budget, sampler.engine)
    if isinstance(sampler.engine, CachingEngine):  # a shard follows from its problems alone
        sampler.engine.reset()
    if isinstance(verifier, CachingVerifier):
        verifier.reset()
    recorders: Sequence[Trace | None] = traces or [None] * len(problems)
    policies = [
        Policy(problem, sampler, each.budget, trace)
        for problem, each, trace in zip(problems, plans, recorders, strict=True)
    ]
    results: dict[int, SearchResult] = {}

    def graded(found: Mapping[int, Found]) -> list[list[Candidate]]:
        return grade(sampler.task, [problems[i] for i in found], [candidates for candidates, _ in found.values()])

    def finish(found: Mapping[int, Found], graded_P_N: list[list[Candidate]]) -> None:
        for (i, (searched, failed)), candidates_N in zip(found.items(), graded_P_N, strict=True):
            results[i] = _result(plans[i], policies[i], sampler, candidates_N, failed)
            if (trace := recorders[i]) is not None:
                trace.finish(zip(searched, candidates_N, strict=True), results[i].selected)
            if on_result:
                on_result(results[i])

    with Beside(graded, finish, here=not isinstance(sampler.engine, StreamingEngine)) as beside:
        found_P = run_together(
            [_search_one(policy, each, sampler, verifier) for policy, each in zip(policies, plans, strict=True)],
            sampler.engine,
            verifier,
            sampler.task,
            max_tokens=max_tokens,
            finish_at_cap=keep_unfinished,
            on_done=(lambda i, found: beside.give({i: found})) if on_result else None,
            on_tick=beside.delivering_before(on_tick),
        )
    if not on_result:  # graded together, which is faster
        together = {i: found for i, found in enumerate(found_P) if found is not None}
        finish(together, graded(together))
    if on_unfinished:  # a problem that generated nothing has asked only: nothing was drawn
        unfinished = (p.spend for i, p in enumerate(policies) if i not in results)
        on_unfinished(sum((spend for spend in unfinished if spend.generated_tokens), Spend()))
    return [results[i] for i in sorted(results)]


def _check_budget(budget: Budget, engine: Engine) -> None:
    if budget.unit == "flops" and not engine.facts.flops_parameters:
        raise BudgetError(
            "a budget of FLOPs means nothing to an engine that does not know its model's size: set "
            "engine.flops_parameters, or give the budget in samples or tokens"
        )


async def _search_one(policy: Policy, plan: Plan, sampler: Sampler, verifier: Verifier | None) -> Found:
    """One problem. What concerns it alone ends it alone, with what its strategy has by then."""
    longest = sampler.engine.facts.max_length
    if len(policy.prompt_ids) >= longest:
        return [], f"its prompt has {len(policy.prompt_ids)} tokens, and the model's context only {longest}"
    scorer = Scorer(verifier, policy, sampler.task.step_delimiter) if verifier and plan.scored else None
    try:
        found = await plan.strategy(policy.problem, policy, scorer, plan.budget)
        return found, none_scored(found) if scorer else None
    except BudgetExceeded as error:
        if not policy.spend.generated_tokens:
            return [], str(error)
    except VerifierError as error:
        return policy.kept, str(error)
    try:
        found = await scorer.score(policy.kept) if scorer else policy.kept
        return found, none_scored(found) if scorer else None
    except VerifierError as error:
        return policy.kept, str(error)


def _result(
    plan: Plan, policy: Policy, sampler: Sampler, candidates: Sequence[Candidate], failed: str | None
) -> SearchResult:
    if not failed and candidates and not any(c.ids for c in candidates):
        ends = ", ".join(sorted({c.finish.value for c in candidates}))
        failed = f"the engine returned nothing for any of its {len(candidates)} candidates ({ends})"
    return SearchResult(
        problem=policy.problem,
        strategy=plan.name,
        candidates=tuple(candidates),
        selected=None if failed else plan.rule(candidates),
        spend=policy.spend,
        model=sampler.engine.facts.fingerprint,
        seed="/".join(str(part) for part in sampler.seed),
        approximate=not sampler.engine.capabilities.token_ids,
        prompt_ids=policy.prompt_ids,
        failed=failed,
    )


def grade(task: Task, problems: Sequence[Problem], candidates_P_N: list[list[Candidate]]) -> list[list[Candidate]]:
    """Every candidate with its answer and grade. One that is not complete is wrong, and no grader sees it."""
    golden = [
        (problem, candidate.text)
        for problem, candidates in zip(problems, candidates_P_N, strict=True)
        for candidate in candidates
        if problem.answer is not None and candidate.complete
    ]
    verdicts = iter(task.grade(golden) if golden else [])
    graded: list[list[Candidate]] = []
    for problem, candidates in zip(problems, candidates_P_N, strict=True):
        if problem.answer is not None:
            wrong = Graded(Grade.WRONG, None)
            graded.append([_graded(c, next(verdicts) if c.complete else wrong) for c in candidates])
        else:  # nothing to grade against: the answers are read
            found = iter(task.answers([(problem, c.text) for c in candidates if c.complete]))
            graded.append([replace(c, answer=next(found) if c.complete else None) for c in candidates])
    return graded


def _graded(candidate: Candidate, verdict: Graded) -> Candidate:
    return replace(candidate, answer=verdict.answer, grade=verdict.grade)


def run_shards(
    problems: Sequence[Problem],
    plan: Plans,
    sampler: Sampler,
    out: Path,
    *,
    shard_problems: int,
    verifier: Verifier | None = None,
    progress: Progress | None = None,
    max_tokens: int | None = None,
    part: tuple[int, int] = (0, 1),
) -> Spend:
    """Write `out/shard-00000.jsonl`, ... and return their spend. Shards already there are kept.

    `max_tokens`: a hard cap on the generated tokens; what is finished under it is written, and a shard that it left
    incomplete is the last; what the unfinished cost is in the spend, and in a file beside it. `part` = (i, n): only
    every n-th shard from the i-th on, for process i of n.
    `progress(done, total, tokens=, steps=)`.
    """
    out.mkdir(parents=True, exist_ok=True)
    total, done, steps = Spend(), 0, 0
    for number, start in enumerate(range(0, len(problems), shard_problems)):
        if number % part[1] != part[0]:
            continue
        left = None if max_tokens is None else max_tokens - total.generated_tokens
        if left is not None and left <= 0:
            break
        path, shard = out / f"shard-{number:05d}.jsonl", problems[start : start + shard_problems]
        tick = Tick()

        def report(now: Tick, done: int = done, before: Spend = total, steps: int = steps) -> None:
            nonlocal tick
            tick = now
            if progress:
                tokens = before.generated_tokens + now.tokens
                progress(done + now.finished, len(problems), tokens=tokens, steps=steps + now.steps)

        if not path.exists():
            kept = read_partial(partial_path(path))
            search_shard(
                shard,
                kept,
                plan,
                sampler,
                path,
                verifier=verifier,
                max_tokens=None if left is None else left - sum(r.spend.generated_tokens for r in kept),
                on_tick=report,
                on_unfinished=functools.partial(write_unfinished, shard=path),
            )
        spends = [result.spend for result in read_results(path)]
        total = sum(spends, total + read_unfinished(path))
        done, steps = done + len(spends), steps + tick.steps
        if progress:
            progress(done, len(problems), tokens=total.generated_tokens, steps=steps)
        if len(spends) < len(shard):  # the cap was met
            break
    return total


def search_shard(
    problems: Sequence[Problem],
    kept: Iterable[SearchResult],
    plan: Plans,
    sampler: Sampler,
    path: Path,
    *,
    verifier: Verifier | None = None,
    max_tokens: int | None = None,
    on_tick: Callable[[Tick], None] | None = None,
    on_unfinished: Callable[[Spend], None] | None = None,
) -> None:
    """Search what `kept`, finished earlier, lacks, and write the shard in the order of the problems.

    On a streaming engine what is finished lies in `partial_path(path)` until then.
    """
    partial, found = partial_path(path), {result.problem.key: result for result in kept}
    streaming = isinstance(sampler.engine, StreamingEngine)
    new = search(
        [p for p in problems if p.key not in found],
        plan,
        sampler,
        verifier,
        max_tokens=max_tokens,
        on_tick=on_tick,
        on_result=(lambda result: append_result(result, partial)) if streaming else None,
        on_unfinished=on_unfinished,
    )
    found |= {result.problem.key: result for result in new}
    write_results([found[p.key] for p in problems if p.key in found], path)
    partial.unlink(missing_ok=True)
