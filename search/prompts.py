"""From a problem to the token ids that every answer continues. The chat template is applied here and nowhere else."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from search.types import Problem, Task

REVISE = "This answer may be wrong. Look for a mistake, then write a complete, corrected answer."


def prompt_ids(task: Task, tokenizer: Any, problem: Problem, attempts: Sequence[str] = ()) -> list[int]:
    """The prompt's ids: text is encoded as the tokenizer does by default, messages go through the template.

    `attempts`, oldest first (sequential revisions, Snell et al. section 6.1), are shown as the turns of a chat, or as
    answers to what the task asks again with each: a few-shot prompt's question, but not its examples. Where that is
    nothing, they come before the question.
    """
    prompt = task.prompt(problem)
    if isinstance(prompt, str):
        asked = getattr(task, "asked", None)
        question = asked(problem) if asked else prompt
        before = "".join(f"{question}{attempt.rstrip()}\n\n" for attempt in attempts)
        end = question or prompt
        return list(tokenizer.encode(prompt.removesuffix(end) + before + end))
    messages = list(prompt)
    for attempt in attempts:
        messages += [{"role": "assistant", "content": attempt}, {"role": "user", "content": REVISE}]
    return list(tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_dict=False))


def revision_prompt(
    task: Task, tokenizer: Any, problem: Problem, attempts: Sequence[str], room: int
) -> tuple[tuple[int, ...], tuple[str, ...]]:
    """The prompt's ids and the attempts that it shows: as many of the last ones as fit into `room` tokens, and always
    the last."""
    shown = tuple(attempts)
    while True:
        ids = tuple(prompt_ids(task, tokenizer, problem, shown))
        if len(ids) <= room or len(shown) < 2:
            return ids, shown
        shown = shown[1:]
