"""Stages that turn search results into a better bundle: select, distill, gate, difficulty. See `flows.stages`."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path

from configs.schema import Config
from distill import gate as gates
from distill import select as selection
from flows.stages import Context, Inputs, earlier, overlapping, write_json, write_metrics
from search.engines.reference import policy_path
from search.errors import TrainingError
from search.sets import HELD_OUT, held_out_keys, read_problems
from search.tasks import load_task
from search.tasks.splits import split_of
from search.types import Problem, Task

# ---------------------------------------------------------------- select


def select(context: Context, inputs: Inputs, out: Path) -> None:
    """Training rows from the results of all rounds; in a control round, rows to compare with."""
    config, task = context.config, load_task(context.config)
    held_out = is_held_out(config, task, inputs["problems"])
    if context.control == "bootstrap":
        chosen = _more_bootstrap(context, inputs, task)
    elif context.control == "random":
        chosen = selection.select_control(
            selection.read_results(_plain_shards(inputs)),
            _selection_of(inputs["reference"]),
            config.select,
            prompt_ids=_no_prompt,
            solution_key=task.solution_key,
            seed=config.loop.seed,
            held_out=held_out,
            solved_keys=getattr(task, "solved_keys", None),
        )
    else:
        chosen = selection.select(
            selection.read_results(_shards(searched(inputs))),
            config.select,
            replay=_replay(inputs["base"]),
            prompt_ids=_no_prompt,
            solution_key=task.solution_key,
            seed=config.loop.seed,
            round_number=context.round,
            held_out=held_out,
            solved_keys=getattr(task, "solved_keys", None),
            earlier=_rows_before(earlier(inputs, "select")),
        )
    selection.write_selection(chosen, out)


def searched(inputs: Inputs) -> dict[int, Path]:
    """The inputs search@001, search@002, ... by their rounds."""
    return {int(name.partition("@")[2]): path for name, path in inputs.items() if name.startswith("search@")}


def _plain_shards(inputs: Inputs) -> Iterator[tuple[int, Path]]:
    """Of a control: searches that were plain samples themselves, and those that it drew in the place of others."""
    drawn = sorted(inputs["search"].glob("round-*")) if "search" in inputs else []
    return _shards(searched(inputs) | {int(folder.name.removeprefix("round-")): folder for folder in drawn})


def _shards(searched: dict[int, Path]) -> Iterator[tuple[int, Path]]:
    for number, folder in sorted(searched.items()):
        for shard in sorted(folder.glob("shard-*.jsonl")):
            yield number, shard


def _no_prompt(problem: Problem) -> list[int]:
    raise AssertionError(f"the search of {problem.key} left no prompt ids")


def _replay(base: Path) -> Iterator[selection.Row]:
    path = base / "replay.jsonl"
    return selection.read_rows(path) if path.exists() else iter(())


def _rows_before(folders: list[Path]) -> set[int]:
    rows = (row for folder in folders for row in selection.read_rows(folder / "rows.jsonl"))
    return {selection.identity(row.key, row.solution) for row in rows if row.source == "search"}


def _selection_of(folder: Path) -> selection.Selection:
    return selection.Selection(tuple(selection.read_rows(folder / "rows.jsonl")), {}, 0, 0, 0)


def is_held_out(config: Config, task: Task, sets: Path) -> Callable[[str], bool]:
    """Does this problem belong to a held-out split? Generated tasks decide by the key alone."""
    keys = held_out_keys(sets)
    if not task.generated:
        return keys.__contains__
    return lambda key: key in keys or split_of(key, config.splits) != "train"


def _more_bootstrap(context: Context, inputs: Inputs, task: Task) -> selection.Selection:
    """Control `bootstrap`: as many tokens as the champion was trained on, all of the base's own kind of data.

    Where each round starts from the champion, that is the training of all rounds so far.
    """
    from distill.bootstrap import more_rows

    folders = [inputs["reference"]]
    if context.config.distill.init != "base":
        folders += earlier(inputs, "select")
    wanted = sum(row.tokens for folder in folders for row in selection.read_rows(folder / "rows.jsonl"))
    rows: list[selection.Row] = []
    total = 0
    for row in more_rows(context.config, task, stream=f"control/{context.round}"):
        if total + row.tokens > wanted:
            break
        rows.append(row)
        total += row.tokens
    return selection.Selection(tuple(rows), {"kept": len(rows)}, len(rows), len({r.key for r in rows}), 0)


# ---------------------------------------------------------------- distill


def distill(context: Context, inputs: Inputs, out: Path) -> None:
    """The challenger: SFT on the selected rows, from the base or from the champion."""
    config = context.config
    base, champion = policy_path(inputs["base"]), policy_path(inputs["policy"])
    init = base if config.distill.init == "base" or context.control == "bootstrap" else champion
    if config.engine.type == "scripted":
        _distill_script(context, inputs, Path(champion), out)
        return
    from distill.sft import train

    train(
        inputs["rows"] / "rows.jsonl",
        Path(init),
        Path(base),
        out,
        config.distill,
        config.model,
        seed=config.loop.seed,
        threads=config.stages.threads,
        progress=context.progress,
        device=config.engine.device if config.engine.type == "transformers" else "auto",
    )


def _distill_script(context: Context, inputs: Inputs, champion: Path, out: Path) -> None:
    """A scripted model learns by one: its skill is the number of times it was distilled from its own answers."""
    rows = sum(1 for _ in islice(selection.read_rows(inputs["rows"] / "rows.jsonl"), 1))
    if not rows:
        raise TrainingError("no training rows")
    skill = json.loads((champion / "scripted.json").read_text(encoding="utf-8"))["skill"]
    (out / "model").mkdir(exist_ok=True)
    learnt = 0 if context.control == "bootstrap" else 1
    write_json(out / "model" / "scripted.json", {"skill": skill + learnt, "round": context.round})
    write_metrics(out, {"distill/loss_first": 1.0, "distill/loss_last": 0.5})


# ---------------------------------------------------------------- gate


def gate(context: Context, inputs: Inputs, out: Path) -> None:
    """Compare challenger and champion on the same problems, and decide."""
    config = context.config
    counts = json.loads((inputs["select"] / "counts.json").read_text(encoding="utf-8"))
    found = list(counts["leaked_keys"]) + _question_leaks(context, inputs)
    evidence = gates.gather(
        config.gate,
        inputs["baseline"],
        inputs["evaluate"],
        look=context.look,
        leaks=found,
        training_rows=counts["kept"],
        min_rows=config.select.min_rows,
    )
    verdict = gates.decide(config.gate, evidence)
    write_json(out / "verdict.json", verdict.to_json())
    write_json(out / "leaks.json", found)
    with (out / "metrics.jsonl").open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in verdict.metrics())


def _question_leaks(context: Context, inputs: Inputs) -> list[str]:
    """Training questions in natural language that share words with held-out ones. Generated tasks compare keys."""
    task = load_task(context.config)
    if task.generated:
        return []
    keys = {row.key for row in selection.read_rows(inputs["select"] / "rows.jsonl")}
    trained = [p for p in read_problems(inputs["problems"] / "search.jsonl") if p.key in keys]
    held_out = [p for name in HELD_OUT for p in read_problems(inputs["problems"] / f"{name}.jsonl")]
    return sorted(overlapping(trained, held_out))
