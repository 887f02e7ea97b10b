"""The recorded tree is the tree that was generated: every step once, under its parent; recording changes nothing."""

import json

import pytest

from search.randomness import key64
from search.trace import Trace
from search.types import Finish, Problem
from tests.scripted_search import (
    ALL,
    PLAIN,
    QUESTION,
    ShuffledStream,
    StepEngine,
    TextVerifier,
    babbling,
    by_score,
    by_table,
    chain_engine,
    judging,
    run_all,
    run_one,
)


def traced(strategy, engine, verifier=None, samples=8, **more):
    trace = Trace()
    return run_one(strategy, samples, engine, verifier, traces=[trace], max_new_tokens=40, **more), trace.nodes


def way(nodes, node):
    """The nodes from the prompt to this one."""
    found = [node]
    while (parent := found[0].parent) is not None:
        found.insert(0, nodes[parent])
    return found


@pytest.mark.parametrize("strategy", ALL)
def test_every_continuation_is_a_node_once_with_its_tokens(strategy):
    for seed in range(4):
        engine = babbling(seed)
        result, nodes = traced(strategy, engine, None if strategy in PLAIN else judging(seed))
        assert [node.id for node in nodes] == [*range(len(engine.log))]
        assert [node.tokens for node in nodes] == [len(c.ids) for _, c in engine.log]
        assert [node.finish for node in nodes] == [c.finish.value for _, c in engine.log]
        assert sum(node.tokens for node in nodes) == result.spend.generated_tokens


@pytest.mark.parametrize("strategy", ALL)
def test_the_texts_on_the_way_to_a_node_are_what_its_request_had(strategy):
    for seed in range(4):
        engine = babbling(seed)
        _, nodes = traced(strategy, engine, None if strategy in PLAIN else judging(seed))
        for node, (request, _) in zip(nodes, engine.log, strict=True):
            start = len(request.prefix) - 1 - request.prefix[::-1].index(257)
            written = engine.tokenizer.decode(request.prefix[start + 1 :])
            assert "".join(n.text for n in way(nodes, node)[:-1]) == written


@pytest.mark.parametrize("strategy", ALL)
def test_every_answer_is_a_kept_way_through_the_tree(strategy):
    for seed in range(4):
        result, nodes = traced(strategy, babbling(seed), None if strategy in PLAIN else judging(seed))
        leaves = [node for node in nodes if node.kept and not any(n.parent == node.id and n.kept for n in nodes)]
        kept = sorted("".join(n.text for n in way(nodes, leaf)) for leaf in leaves)
        assert kept == sorted(c.text for c in result.candidates)
        chosen = [node for node in nodes if node.selected]
        assert bool(chosen) == (result.selected is not None)
        if result.selected is not None:
            answer = result.candidates[result.selected]
            assert "".join(n.text for n in chosen) == answer.text
            assert (chosen[-1].answer, chosen[-1].grade) == (answer.answer, answer.grade.value)


@pytest.mark.parametrize("strategy", ALL)
def test_looking_changes_nothing(strategy):
    for seed in range(3):
        verifier = None if strategy in PLAIN else judging(seed)
        result, _ = traced(strategy, babbling(seed), verifier)
        assert result == run_one(strategy, 8, babbling(seed), verifier, max_new_tokens=40)


def test_pruned_steps_and_rollouts_are_there_with_their_scores():
    table = {"": ["a\n", "b\n"], "b\n": ["A", "C"]}
    scores = {"a\nx": 0.2, "b\nY": 0.8, "b\nA": 0.5, "b\nC": 0.6}
    engine = StepEngine(by_table(table, {"a\n": "x", "b\n": "Y"}))
    _, nodes = traced("lookahead(width=2)", engine, by_score(scores), samples=4)
    seen = [(n.kind, n.text, n.parent, n.score, n.kept, n.selected) for n in nodes]
    assert seen == [
        ("step", "a\n", None, None, False, False),
        ("step", "b\n", None, None, True, True),
        ("lookahead", "x", 0, 0.2, False, False),
        ("lookahead", "Y", 1, 0.8, False, False),
        ("step", "A", 1, 0.5, True, False),
        ("step", "C", 1, 0.6, True, True),
    ]


def test_subtrees_chains_and_what_a_revision_was_shown():
    _, nodes = traced("dvts(width=2)", chain_engine(0.5), by_score({}), samples=4)
    assert [n.chain for n in nodes[:4]] == [0, 0, 1, 1]
    answers = iter("ABCD")
    _, nodes = traced("revisions(ratio=1)", StepEngine(lambda *_: next(answers)), by_score({}), samples=4)
    assert [(n.text, n.chain, n.shown) for n in nodes] == [("A", 0, ()), ("B", 1, ()), ("C", 0, (0,)), ("D", 1, (1,))]
    assert [n.score for n in nodes] == [0.5] * 4


def test_dead_ends_are_nodes_too():
    _, nodes = traced("majority", StepEngine(lambda *_: "x" * 99), samples=2)
    assert [(n.finish, n.tokens, n.kept) for n in nodes] == [(Finish.LENGTH.value, 40, True)] * 2


def test_each_problem_has_its_own_tree_in_any_order_of_completion():
    problems = [QUESTION, Problem("r", "123", "x"), Problem("s", "45", "x")]
    trees = []
    for engine in (babbling(1), ShuffledStream(babbling(1), 3)):
        traces = [Trace() for _ in problems]
        judge = TextVerifier(lambda text: key64(text) / 2**64)
        run_all("beam(width=2)", 4, engine, problems, judge, traces=traces, max_new_tokens=40)
        trees.append([trace.to_json() for trace in traces])
    assert trees[0] == trees[1]
    assert len(json.dumps(trees[0])) > 100
