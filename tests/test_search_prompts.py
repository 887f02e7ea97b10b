"""What the policy reads: the question, and the attempts that a revision is shown."""

import json

import pytest

from configs import load
from search.prompts import REVISE, prompt_ids
from search.tasks import load_task
from search.tasks.tokenizer import build_tokenizer
from search.types import SPLITS


class Letters:
    """A tokenizer whose tokens are characters, and whose template writes roles."""

    eos_token_id = 0

    def encode(self, text, **_):
        return [ord(letter) for letter in text]

    def apply_chat_template(self, messages, **_):
        return self.encode("".join(f"<{m['role']}>{m['content']}" for m in messages))


@pytest.fixture
def read(tmp_path):
    """The text that a policy is shown, as the task's `prompt` says."""
    path = tmp_path / "problems.jsonl"
    path.write_text(json.dumps({"question": "What is 1 plus 1?", "answer": "2"}) + "\n")

    def text(attempts=(), **task):
        section = {"type": "jsonl", "path": str(path), "answer_type": "number"} | task
        loaded = load_task(load.parse({"loop": {"name": "t"}, "task": section, "model": {"base": "some-model"}}))
        (problem,) = (p for split in SPLITS for p in loaded.problems(split))
        return "".join(map(chr, prompt_ids(loaded, Letters(), problem, attempts)))

    return text


def test_examples_come_once_and_the_question_with_every_attempt(read):
    plain = read(prompt="few_shot", instruction="Be brief.")
    revised = read([" It is 3.\n", " It is 4."], prompt="few_shot", instruction="Be brief.")
    examples, question = plain[: plain.rindex("Question:")], plain[plain.rindex("Question:") :]
    assert examples.startswith("Be brief.")
    assert revised == f"{examples}{question} It is 3.\n\n{question} It is 4.\n\n{question}"


def test_an_instruction_comes_once(read):
    assert read(["It is 3."], prompt="plain", instruction="Be brief.") == (
        "Be brief.\n\nWhat is 1 plus 1?\nIt is 3.\n\nWhat is 1 plus 1?\n"
    )


def test_attempts_are_turns_of_a_chat(read):
    plain = read(prompt="chat")
    assert read(["It is 3."], prompt="chat") == f"{plain}<assistant>It is 3.<user>{REVISE}"


@pytest.mark.parametrize("name", ["countdown", "arithmetic"])
def test_the_embedded_tasks_show_attempts_before_the_question_and_can_write_them(name):
    task, tokenizer = load_task(load.load(name)), build_tokenizer()
    for problem in task.draw("train", 50, stream="t"):
        attempts = [task.solve(problem), task.solve(problem)]
        ids = prompt_ids(task, tokenizer, problem, attempts)
        assert tokenizer.unk_token_id not in ids
        assert tokenizer.decode(ids) == f"{attempts[0]}\n\n{attempts[1]}\n\n{task.prompt(problem)}"
        assert prompt_ids(task, tokenizer, problem) == tokenizer.encode(task.prompt(problem))
