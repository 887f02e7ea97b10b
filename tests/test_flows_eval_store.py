"""What `ratchet eval` keeps: which settings are part of what a stored search is, and which are not."""

import pytest

from configs import load
from flows import eval_store
from flows.eval_store import Store
from search.strategies import parse
from search.tasks import load_task
from search.types import Budget


@pytest.fixture
def scripted(tmp_path):
    """A configuration on countdown, and a model folder. Example: scripted(verifier={"type": "oracle"})"""
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "scripted.json").write_text('{"skill": 0}')
    data = {
        "loop": {"name": "mine"},
        "task": {"type": "countdown"},
        "model": {"base": "scripted"},
        "engine": {"type": "scripted"},
    }
    return lambda **more: load.parse(data | more)


def test_what_only_makes_a_search_faster_is_no_part_of_what_it_is(tmp_path, scripted):
    def folder(**engine):
        config = scripted(engine={"type": "server"} | engine, model={"base": "served"})
        return Store(tmp_path, config, tmp_path / "model", "validation", [], 1).pool(4)[0].folder

    assert folder(max_concurrency=4, retries=0, timeout_s=5, backoff_s=1, api_key_env="KEY") == folder()
    assert len({folder(), folder(max_length=64), folder(seeds=False), folder(extra_body={"top_k": 5})}) == 4


@pytest.mark.parametrize("name", ["chat_template.jinja", "tokenizer.model", "merges.txt"])
def test_another_tokenizer_or_chat_template_is_another_model(tmp_path, scripted, name):
    (tmp_path / "model" / name).write_text("one")
    before = eval_store.fingerprint(tmp_path / "model", scripted())
    (tmp_path / "model" / name).write_text("two")
    assert eval_store.fingerprint(tmp_path / "model", scripted()) != before


def test_all_code_that_decides_a_search_is_part_of_what_it_is():
    names = {"/".join(path.parts[-2:]) for path in eval_store.sources()}
    assert {"engines/transformers.py", "search/thresholds.py", "search/scheduler.py", "search/types.py"} <= names
    assert {"strategies/trees.py", "verifiers/oracle.py", "tasks/countdown.py", "flows/eval_run.py"} <= names


def test_a_threshold_belongs_to_the_problems_and_the_grid_of_its_fit(tmp_path, scripted, monkeypatch):
    task = load_task(scripted())
    first, other = task.draw("fit", 5, stream="fit"), task.draw("fit", 5, stream="other")

    def folder(fit, threshold="fit"):
        store = Store(tmp_path, scripted(verifier={"type": "oracle"}), tmp_path / "model", "validation", [], 1, fit)
        return store.search(parse(f"step_rejection(threshold={threshold})"), Budget("samples", 4), "v").folder

    fitted, given = folder(first), folder(first, 0.5)
    assert folder(first) == fitted
    assert folder(other) != fitted
    assert folder(other, 0.5) == given
    monkeypatch.setattr(eval_store, "GRID", (0.2, 0.4))
    assert folder(first) != fitted
