"""Stage: problems -> graded results, in shards of fixed membership that are committed one by one.

A shard that was interrupted is redone whole; since its batches depend on nothing but its problems, it comes out the
same. Memory holds one shard.
"""

from __future__ import annotations

from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from search.answers import Rule
from search.policy import Ask, Policy, Sampler
from search.results import read_results, write_results
from search.scheduler import run_together
from search.types import Budget, Candidate, Finish, Grade, Problem, SearchResult, Spend, Task, Verifier

Strategy = Callable[[Problem, Policy, "Verifier | None", Budget], Coroutine[Ask, None, list[Candidate]]]
Progress = Callable[..., None]


@dataclass(frozen=True, slots=True)
class Plan:
    """What is run on every problem. Example: Plan("best_of_n(16)", best_of_n, Budget("samples", 16), answers.gold)"""

    name: str
    strategy: Strategy
    budget: Budget
    rule: Rule


def prompt_ids(task: Task, tokenizer: Any, problem: Problem) -> list[int]:
    """The prompt's token ids: text is encoded as the tokenizer does by default, messages go through the template."""
    prompt = task.prompt(problem)
    if isinstance(prompt, str):
        return list(tokenizer.encode(prompt))
    return list(tokenizer.apply_chat_template(prompt, add_generation_prompt=True, tokenize=True, return_dict=False))


def search(
    problems: Sequence[Problem], plan: Plan, task: Task, sampler: Sampler, verifier: Verifier | None = None
) -> list[SearchResult]:
    """Run the plan on all problems together and grade every candidate. Raises EngineError."""
    engine = sampler.engine
    policies = [Policy(p, prompt_ids(task, engine.tokenizer, p), sampler, plan.budget) for p in problems]
    coroutines = [plan.strategy(p, policy, verifier, plan.budget) for p, policy in zip(problems, policies, strict=True)]
    candidates_P_N = grade(task, problems, run_together(coroutines, engine))
    return [
        SearchResult(
            problem=problem,
            strategy=plan.name,
            candidates=tuple(candidates_N),
            selected=plan.rule(candidates_N),
            spend=policy.spend,
            model=engine.facts.fingerprint,
            seed="/".join(str(part) for part in sampler.seed),
            approximate=not engine.capabilities.token_ids,
            prompt_ids=policy.prompt_ids,
        )
        for problem, policy, candidates_N in zip(problems, policies, candidates_P_N, strict=True)
    ]


def grade(task: Task, problems: Sequence[Problem], candidates_P_N: list[list[Candidate]]) -> list[list[Candidate]]:
    """Every candidate with its answer and grade. One that is not complete is wrong, whatever it says."""
    pairs = [
        (problem, candidate.text)
        for problem, candidates in zip(problems, candidates_P_N, strict=True)
        for candidate in candidates
    ]
    verdicts = iter(task.grade(pairs))
    return [
        [
            replace(
                c,
                answer=verdict.answer if c.finish is Finish.EOS else None,
                grade=verdict.grade if c.finish is Finish.EOS else Grade.WRONG,
            )
            for c, verdict in zip(candidates, verdicts, strict=False)
        ]
        for candidates in candidates_P_N
    ]


def run_shards(
    problems: Sequence[Problem],
    plan: Plan,
    task: Task,
    sampler: Sampler,
    out: Path,
    *,
    shard_problems: int,
    progress: Progress | None = None,
    max_tokens: int | None = None,
    part: tuple[int, int] = (0, 1),
) -> Spend:
    """Write `out/shard-00000.jsonl`, ... and return their spend. Shards already there are kept.

    Ends cleanly after `max_tokens` generated tokens, with the shards that are finished. `part` = (i, n): only every
    n-th shard from the i-th on, for process i of n.
    """
    out.mkdir(parents=True, exist_ok=True)
    total, done = Spend(), 0
    for number, start in enumerate(range(0, len(problems), shard_problems)):
        if number % part[1] != part[0]:
            continue
        if max_tokens is not None and total.generated_tokens >= max_tokens:
            break
        path = out / f"shard-{number:05d}.jsonl"
        results = None if path.exists() else search(problems[start : start + shard_problems], plan, task, sampler)
        if results is not None:
            write_results(results, path)
        total = sum((r.spend for r in results or read_results(path)), total)
        done += min(shard_problems, len(problems) - start)
        if progress:
            progress(done, len(problems), tokens=total.generated_tokens)
    return total
