"""Real GSM8K and MATH problems through the whole path: loading, chat template, search, grading, selection, SFT.

The policy is tiny and untrained, so it solves nothing: the published solutions stand in for answers that search would
have found, tokenised as the engine would have returned them.
"""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from configs import load
from distill import select as selection
from search import answers
from search.engines import load_engine
from search.policy import Sampler
from search.results import read_results, write_results
from search.run import Plan, grade, run_shards
from search.sets import draw_sets, write_sets
from search.strategies.best_of_n import best_of_n
from search.tasks import load_task
from search.types import Budget, Candidate, Finish, Grade

CASES = {
    "gsm8k": ("gsm8k_train.jsonl", "question", "answer"),
    "math": ("math500_test.jsonl", "problem", "answer"),
}


def config_of(name: str, data: Path, model: str):
    path, question, answer = CASES[name]
    task = {"type": name, "path": str(data / path), "question_column": question, "answer_column": answer}
    return load.parse(
        {
            "loop": {"name": name},
            "task": task,
            "model": {"base": model, "dtype": "float32"},
            "search": {"problems": 12, "samples": 4, "probe_samples": 2},
            "sampling": {"max_new_tokens": 12},
            "select": {"min_rows": 5, "replay": 0.0},
            "distill": {"learning_rate": 1e-3, "batch_size": 4, "micro_batch_size": 4, "epochs": 1, "method": "lora"},
            "stages": {"threads": 1},
        }
    )


def solution_of(name: str, data: Path) -> dict[str, str]:
    path, question, _ = CASES[name]
    rows = map(json.loads, (data / path).read_text(encoding="utf-8").splitlines())
    return {row[question].strip(): row.get("solution") or row["answer"] for row in rows}


@pytest.mark.parametrize("name", CASES)
def test_the_whole_path_with_real_problems(name, real_data, tiny_chat_model, tmp_path):
    config = config_of(name, real_data, str(tiny_chat_model))
    task = load_task(config)
    first = tmp_path / "round-000"
    first.mkdir()
    write_sets(task, draw_sets(task, config, 0, None, {}), None, first)
    problems = draw_sets(task, config, 1, first, {})["search"]
    assert len(problems) == 12

    engine = load_engine(config, str(tiny_chat_model), task)
    sampler = Sampler(engine, task, 1.0, 12, (0, "search/1", "train"))
    plan = Plan("best_of_n(4)", best_of_n, Budget("samples", 4), answers.gold)
    spend = run_shards(problems, plan, sampler, tmp_path / "search", shard_problems=5)
    results = list(read_results(tmp_path / "search"))
    assert [r.problem.key for r in results] == [p.key for p in problems]
    assert spend.samples == 48
    assert spend.generated_tokens == sum(len(c.ids) for r in results for c in r.candidates)
    assert all(c.grade is not Grade.CORRECT for r in results for c in r.candidates)
    template = engine.tokenizer.apply_chat_template(
        task.prompt(problems[0]), add_generation_prompt=True, tokenize=False
    )
    assert engine.tokenizer.decode(results[0].prompt_ids) == template

    solutions = solution_of(name, real_data)
    found = [with_solution(task, engine.tokenizer, r, solutions[r.problem.question]) for r in results]
    assert all(r.candidates[-1].grade is Grade.CORRECT for r in found)
    write_results(found, tmp_path / "found.jsonl")

    chosen = selection.select(
        selection.read_results([(1, tmp_path / "found.jsonl")]),
        config.select,
        replay=(),
        prompt_ids=lambda problem: [],
        solution_key=task.solution_key,
        seed=0,
        round_number=1,
        held_out=lambda key: False,
    )
    assert len(chosen.rows) == 12
    assert chosen.counts["candidates"] == 12 * 5
    selection.write_selection(chosen, tmp_path)

    from distill.sft import train

    out = tmp_path / "distill"
    out.mkdir()
    report = train(
        tmp_path / "rows.jsonl", Path(tiny_chat_model), Path(tiny_chat_model), out, config.distill, config.model, 0, 1
    )
    assert report.trained_tokens_per_epoch == sum(len(row.completion_ids) for row in chosen.rows)
    assert 0 < report.trainable_parameters < report.parameters
    distilled = load_engine(config, str(out / "model"), task)
    assert distilled.facts.fingerprint != engine.facts.fingerprint
    task.close()


def with_solution(task, tokenizer, result, text):
    """The result with the published solution as one more candidate."""
    ids = (*tokenizer.encode(text, add_special_tokens=False), tokenizer.eos_token_id)
    extra = Candidate(ids, tokenizer.decode(ids, skip_special_tokens=True), Finish.EOS)
    (graded,) = grade(task, [result.problem], [[extra]])
    return replace(result, candidates=(*result.candidates, *graded))
