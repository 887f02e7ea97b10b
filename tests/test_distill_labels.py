"""Step labels by hand, from every source; filters, counts, caps."""

import functools
import itertools
import json
import random
from dataclasses import replace

import pytest

from configs.load import load
from configs.schema import CHECKS_STEPS
from distill.labels import FILTERS, StepExample, label, num_plain, read_examples, write_examples
from search.errors import CorruptArtefact, DataError
from search.rollouts import Rollouts, prepare, split
from search.run import search
from search.tasks import load_task
from search.tasks.file_task import FileTask
from search.types import Candidate, Finish, Grade, Problem, SearchResult, Spend
from tests.scripted_search import ChainTask, LineTask, StepEngine, by_table, chain_engine, run_all, sampler_of

EOS = 256
PROMPT = (*b"q", 257)


def answer(text: str, grade: Grade | None = None, finish: Finish = Finish.EOS, **more) -> Candidate:
    """Right where the last line is R."""
    found = LineTask.answer(text)
    if grade is None:
        grade = Grade.CORRECT if found == "R" and finish is Finish.EOS else Grade.WRONG
    ids = (*text.encode(), EOS) if finish is Finish.EOS else tuple(text.encode())
    return Candidate(ids, text, finish, answer=found, grade=grade, **more)


def result(*candidates: Candidate | str, key: str = "q", strategy: str = "pool(4)", **more) -> SearchResult:
    answers = tuple(answer(c) if isinstance(c, str) else c for c in candidates)
    made = SearchResult(Problem(key, key, "R"), strategy, answers, None, Spend(), "m", "s", prompt_ids=PROMPT)
    return replace(made, **more)


def rollouts_of(results, table, num=4, **settings) -> list[SearchResult]:
    sampler = sampler_of(StepEngine(by_table(table)))
    problems, plan = prepare(results, Rollouts(num, **settings), sampler)
    return search(problems, plan, sampler)


def labelled(results, *sources, task=None, held_out=frozenset(), max_examples=1000, round_number=1, **more):
    pairs = [r if isinstance(r, tuple) else (round_number, r) for r in results]
    return label(pairs, sources, task or LineTask(), held_out=held_out.__contains__, max_examples=max_examples, **more)


def by_text(examples) -> dict[str, tuple]:
    return {"".join(e.steps): e.labels for e in examples}


# ---------------------------------------------------------------- tree


def test_tree_labels_are_the_mean_success_of_the_answers_that_share_a_prefix():
    made = labelled([result("a\nb\nR", "a\nb\nX", "a\nc\nX", "a\nb\nR", "d\nR")], "tree")
    assert by_text(made.examples) == {
        "a\nb\nR": (2 / 4, 2 / 3, 1.0),
        "a\nb\nX": (2 / 4, 2 / 3, 0.0),
        "a\nc\nX": (2 / 4, 0.0, 0.0),
        "d\nR": (1.0, 1.0),
    }
    assert {("".join(e.steps), e.weight) for e in made.examples} == {
        ("a\nb\nR", 2),
        ("a\nb\nX", 1),
        ("a\nc\nX", 1),
        ("d\nR", 1),
    }
    assert all(e.source == "tree" and e.outcome is None and e.round == 1 for e in made.examples)


def test_what_a_pruned_search_kept_makes_no_values_but_gets_them():
    plain = result("a\nX", "a\nR", strategy="plain(2) + beam(width=2) @ 4")
    searched = [answer("a\nR\n", path=(0, 1)), answer("a\nb\nR", path=(0, 0)), answer("z\nR", path=(1, 0))]
    made = labelled([plain.with_candidates([*plain.candidates, *searched])], "tree")
    assert by_text(made.examples)["a\nX"] == (0.5, 0.0)  # not 3 of 4
    assert by_text(made.examples)["a\nb\nR"] == (0.5, None, 1.0)
    assert by_text(made.examples)["z\nR"] == (None, 1.0)


@pytest.mark.parametrize(
    ("strategy", "num"),
    [
        ("pool(64)", 3),
        ("pool(16+64)", 3),
        ("best_of_n(16)", 3),
        ("majority @ 4", 3),
        ("best_of_n_weighted(vote=sharpened) @ 16", 3),
        ("plain(2) + beam(width=2) @ 12", 2),
        ("plain(9) + dvts(width=2) @ 12", 3),
        ("greedy", 0),
        ("beam(width=2) @ 16", 0),
        ("adaptive_majority @ 16", 0),
        ("step_rejection(draws=8) @ 16", 0),
        ("revisions(ratio=4) @ 16", 0),
    ],
)
def test_only_independent_draws_of_the_policy_count(strategy, num):
    assert num_plain(result("a\nR", "b\nX", "c\nX", strategy=strategy)) == num


def test_truncated_draws_are_failures_of_what_they_began_with():
    cut = [answer("a\nb\nc", finish=Finish.LENGTH), answer("a\nb\n", finish=Finish.LENGTH)]
    lost = [answer("a\nb", finish=Finish.ERROR), answer("a\nb\nR", Grade.UNGRADED)]
    made = labelled([result("a\nb\nR", *cut, *lost)], "tree")
    assert by_text(made.examples) == {"a\nb\nR": (1 / 3, 1 / 3, 1.0)}
    assert made.counts["truncated"] == 3


def test_values_join_over_results_and_rounds_and_the_newest_names_the_example():
    made = labelled([(1, result("a\nR")), (3, result("a\nX", "a\nR")), (2, result("a\nX"))], "tree")
    assert by_text(made.examples) == {"a\nR": (0.5, 1.0), "a\nX": (0.5, 0.0)}
    assert [(e.round, e.weight) for e in made.examples] == [(3, 2.0), (3, 2.0)]


def test_problems_do_not_share_prefixes():
    made = labelled([result("a\nR", key="p"), result("a\nX", key="q")], "tree")
    assert [(e.problem.key, e.labels) for e in made.examples] == [("p", (1.0, 1.0)), ("q", (0.0, 0.0))]


# ---------------------------------------------------------------- rollouts and siblings

ANSWERS = ["a\nb\nR", "a\nc\nX", "d\nX", "e\nR"]
# The values: a 2/4, a b 4/4, a c 1/4, d 0, e 1/4.
TABLE = {"a\n": ["R", "X"], "a\nb\n": "R", "a\nc\n": ["R", "X", "X", "X"], "d\n": "X", "e\n": ["X", "X", "R", "X"]}


def test_rollout_labels_are_the_share_of_right_rollouts_and_the_outcome_at_the_end():
    answers = [result(*ANSWERS)]
    made = labelled([*answers, *rollouts_of(answers, TABLE)], "rollouts")
    assert by_text(made.examples) == {
        "a\nb\nR": (0.5, 1.0, 1.0),
        "a\nc\nX": (0.5, 0.25, 0.0),
        "d\nX": (0.0, 0.0),
        "e\nR": (0.25, 1.0),
    }
    assert made.counts["rollouts"] == 20
    assert made.counts["answers"] == made.counts["examples/rollouts"] == 4


def test_rollouts_of_the_same_prefix_add_up():
    answers = [result(*ANSWERS)]
    twice = [*rollouts_of(answers, TABLE), *rollouts_of(answers, dict(TABLE, **{"a\n": "R"}), num=2)]
    assert by_text(labelled([*answers, *twice], "rollouts").examples)["a\nb\nR"][0] == 4 / 6


def test_sibling_labels_are_relative_to_the_best_beside_them_with_the_parent_as_floor():
    answers = [result(*ANSWERS)]
    made = labelled([*answers, *rollouts_of(answers, TABLE)], "siblings")
    assert by_text(made.examples) == {
        # The first steps a .5, d 0, e .25 are siblings, and so are a b and a c; the root's value is 2/4.
        "a\nb\nR": (1.0, 1.0, 1.0),
        "a\nc\nX": (1.0, 0.25, 0.0),  # its last step: 0 of a parent's .25
        "d\nX": (0.0, None),  # nothing was to be reached from d: its step is neither good nor bad
        "e\nR": (0.5, 1.0),
    }


def test_the_best_of_bad_siblings_is_not_taken_for_a_good_step():
    table = {"a\n": "R", "a\nb\n": ["R", "X", "X", "X"], "a\nc\n": "X"}
    answers = [result("a\nb\nX", "a\nc\nX", "a\nR")]
    table["a\n"] = ["R", "R", "R", "X"]  # .75; a b .25, a c 0, and the answer "a R" 1
    made = labelled([*answers, *rollouts_of(answers, table)], "siblings")
    assert by_text(made.examples)["a\nb\nX"] == (1.0, 0.25, 0.0)
    answers = [result("a\nb\nX", "a\nc\nX")]
    made = labelled([*answers, *rollouts_of(answers, table)], "siblings")
    assert by_text(made.examples)["a\nb\nX"] == (1.0, pytest.approx(1 / 3), 0.0)  # .25 of the parent's .75


def test_an_only_child_has_its_share_of_the_parents_value_cut_at_one():
    answers = [result("a\nb\nR", "a\nb\nX")]
    made = labelled([*answers, *rollouts_of(answers, {"a\n": ["R", "R", "R", "X"], "a\nb\n": ["R", "X"]})], "siblings")
    assert by_text(made.examples)["a\nb\nR"] == (1.0, pytest.approx(2 / 3), 1.0)
    made = labelled([*answers, *rollouts_of(answers, {"a\n": ["R", "X"], "a\nb\n": "R"})], "siblings")
    assert by_text(made.examples)["a\nb\nR"] == (1.0, 1.0, 1.0)


def test_after_a_binary_search_what_follows_the_first_wrong_step_is_zero():
    text = "1\n2\n3\n4\n5\n6\n7\n8"
    table = {"1\n2\n3\n4\n": ["R", "X"], "1\n2\n3\n4\n5\n": "R", "1\n2\n3\n4\n5\n6\n": "X"}
    answers = [result(text, "o\np\nR")]
    made = labelled([*answers, *rollouts_of(answers, table, first_error=True)], "rollouts")
    assert by_text(made.examples) == {
        text: (None, None, None, 0.5, 1.0, 0.0, 0.0, 0.0),
        "o\np\nR": (None, None, 1.0),
    }
    made = labelled([*answers, *rollouts_of(answers, table, first_error=True)], "siblings")
    assert by_text(made.examples)[text] == (None, None, None, None, 1.0, 0.0, None, None)


def test_the_last_step_is_the_wrong_one_where_all_before_it_can_be_saved():
    answers = [result("1\n2\n3\nX")]
    table = {"1\n2\n": ["R", "X"], "1\n2\n3\n": ["X", "X", "X", "R"]}
    made = labelled([*answers, *rollouts_of(answers, table, first_error=True)], "rollouts")
    assert by_text(made.examples) == {"1\n2\n3\nX": (None, 0.5, 0.25, 0.0)}


def test_answers_whose_problem_has_no_rollouts_get_no_rollout_labels():
    some = [result(*ANSWERS)]
    made = labelled([*some, result("a\nR", key="other"), *rollouts_of(some, TABLE)], "rollouts", "tree")
    assert {e.problem.key for e in made.examples if e.source == "rollouts"} == {"q"}
    assert {e.problem.key for e in made.examples if e.source == "tree"} == {"q", "other"}
    assert made.counts["unlabelled/rollouts"] == 1
    assert made.counts["examples/tree"] == 5


# ---------------------------------------------------------------- outcomes, gold, outcome verifiers


def test_outcomes_label_the_answer_and_no_step():
    made = labelled([result("a\nR", "b\nX")], "outcomes")
    assert [(e.labels, e.outcome) for e in made.examples] == [((None, None), True), ((None, None), False)]


def test_gold_labels_are_the_tasks_own():
    task = ChainTask()
    [pool] = run_all("majority", 32, chain_engine(0.7), [task.problem(0, 4)], task=task)
    made = labelled([pool], "gold", task=task)
    digits = pool.problem.answer
    assert len({e.labels for e in made.examples}) > 3
    for example in made.examples:
        right = [step.strip() == digit for step, digit in zip(example.steps, digits, strict=True)]
        assert example.labels == tuple(float(all(right[: n + 1])) for n in range(4))


def test_gold_where_the_task_has_none_is_refused():
    with pytest.raises(DataError, match="'lines' cannot check a step"):
        labelled([result("a\nR")], "gold")


def test_the_tasks_that_the_configuration_takes_for_step_checkers_are():
    for name in CHECKS_STEPS:
        assert hasattr(load_task(load(name)), "step_labels")
    assert not hasattr(FileTask, "step_labels")


def test_an_outcome_verifier_gets_the_outcome_at_the_last_step_alone():
    made = labelled([result("a\nb\nR", "X")], "tree", "outcomes", kind="orm")
    assert [(e.steps, e.labels, e.outcome) for e in made.examples] == [
        (("X",), (0.0,), None),
        (("a\n", "b\n", "R"), (None, None, 1.0), None),
    ]


def test_sources_mix_and_each_labels_every_answer():
    made = labelled([result("a\nR", "b\nX")], "tree", "tree_siblings", "outcomes")
    found = {(e.source, e.steps): (e.labels, e.outcome) for e in made.examples}
    assert found == {
        ("tree", ("a\n", "R")): ((1.0, 1.0), True),  # outcomes join the first source
        ("tree", ("b\n", "X")): ((0.0, 0.0), False),
        ("tree_siblings", ("a\n", "R")): ((1.0, 1.0), None),
        ("tree_siblings", ("b\n", "X")): ((0.0, None), None),  # nothing after b ever succeeds
    }
    alone = labelled([result("a\nR", "b\nX")], "outcomes")
    assert {(e.source, e.outcome) for e in alone.examples} == {("outcomes", True), ("outcomes", False)}


# ---------------------------------------------------------------- filters, counts, caps


def test_every_answer_is_counted_once():
    candidates = [
        answer("a\nR"),
        answer("a\nR"),
        answer("b\nR", Grade.UNGRADED),
        replace(answer("b\nX"), grade=None),
        answer("c\nX", finish=Finish.LENGTH),
        answer("c\nX", finish=Finish.ERROR),
        answer("d\n"),
        answer("e\nR", prompt_ids=(1, 2)),
        answer("f\nX"),
        answer("g\nX"),
    ]
    results = [
        result(*candidates),
        result("a\nR", "b\nR", key="secret"),
        result("a\nR", key="broken", failed="it broke"),
    ]
    made = labelled(results, "tree", held_out=frozenset({"secret"}), max_examples=2)
    expected = {"failed": 1, "held_out": 2, "revision": 1, "ungraded": 2, "truncated": 2, "no_answer": 1}
    assert {name: made.counts[name] for name in FILTERS} == {**expected, "duplicate": 1, "over_cap": 1}
    assert made.counts["kept"] == len(made.examples) == 2
    assert made.counts["answers"] == 13 == sum(made.counts[name] for name in (*FILTERS, "kept"))


def test_no_held_out_problem_is_ever_an_example_nor_are_its_rollouts_counted():
    secret = [result(*ANSWERS, key="secret")]
    answers = [result(*ANSWERS)]
    mixed = [*secret, *answers, *rollouts_of(secret, TABLE), *rollouts_of(answers, TABLE)]
    for kind, sources in (("prm", ["tree", "rollouts", "siblings", "outcomes"]), ("orm", ["tree"])):
        made = labelled(mixed, *sources, held_out=frozenset({"secret"}), kind=kind)
        assert {e.problem.key for e in made.examples} == {"q"}
        assert made.counts["rollouts"] == 20


def test_unparsable_answers_can_be_kept_as_wrong_ones():
    made = labelled([result("a\nR", "a\n")], "tree", keep_unparsable=True)
    assert by_text(made.examples) == {"a\nR": (0.5, 1.0), "a\n": (0.5, 0.0)}
    assert made.examples[0].steps == ("a\n", "")  # an answer that ended after its delimiter


def test_revisions_come_with_what_they_were_shown():
    shown = answer("a\nR", prompt_ids=(1, 2))
    made = labelled([result("a\nX", shown)], "tree", attempts=lambda r, c: ("a\nX",) if c.prompt_ids else ())
    assert [(e.attempts, e.labels) for e in made.examples] == [((), (0.0, 0.0)), (("a\nX",), (1.0, 1.0))]


def test_the_cap_takes_the_newest_rounds_first_and_shares_them_over_the_problems():
    old = [(1, result(*(f"{n}\nX" for n in range(9)), key=f"old-{p}")) for p in range(3)]
    new = [(2, result(*(f"{n}\nX" for n in range(num)), key=f"new-{num}")) for num in (1, 4, 9)]
    held = [labelled([*old, *new], "tree", max_examples=cap) for cap in (3, 7, 14, 17)]
    counts = [{key: sum(e.problem.key == key for e in made.examples) for key in ("new-1", "new-4")} for made in held]
    assert [len(made.examples) for made in held] == [3, 7, 14, 17]
    assert counts == [{"new-1": 1, "new-4": 1}, {"new-1": 1, "new-4": 3}] + [{"new-1": 1, "new-4": 4}] * 2
    assert [sum(e.round == 1 for e in made.examples) for made in held] == [0, 0, 0, 3]
    assert {e.problem.key for e in held[3].examples if e.round == 1} == {"old-0", "old-1", "old-2"}
    for fewer, more in itertools.pairwise(held):
        assert set(map(repr, fewer.examples)) < set(map(repr, more.examples))


def test_the_examples_do_not_depend_on_the_order_of_the_results():
    task = ChainTask()
    problems = [task.problem(n, 4) for n in range(6)]
    pools = run_all("majority", 8, chain_engine(0.6), problems, task=task)
    sampler = sampler_of(chain_engine(0.6), task)
    chosen, plan = prepare(pools, Rollouts(4, first_error=True), sampler)
    pairs = [(n % 3, r) for n, r in enumerate([*pools, *search(chosen, plan, sampler)])]
    sources = ("tree", "rollouts", "siblings", "outcomes", "gold")
    expected = labelled(pairs, *sources, task=task, max_examples=20)
    assert len(expected.examples) > 60
    for seed in range(3):
        shuffled = random.Random(seed).sample(pairs, len(pairs))
        assert labelled(shuffled, *sources, task=task, max_examples=20) == expected
    assert labelled(pairs, *sources, task=task, max_examples=20, seed=1) != expected


def test_answers_are_cut_into_steps_as_search_would_show_them():
    class Pairs(LineTask):
        step_delimiter = ";"

    class Tokenizer:
        """Two letters a token."""

        def decode(self, token_ids, *, skip_special_tokens=True):
            return "".join("" if i == EOS else {1: "a;", 2: ";b", 3: "R"}[i] for i in token_ids)

    candidate = Candidate((1, 2, 3, EOS), "a;;bR", Finish.EOS, answer="R", grade=Grade.CORRECT)
    cut = functools.partial(split, tokenizer=Tokenizer(), delimiter=";")
    [example] = labelled([result(candidate)], "tree", task=Pairs(), split=cut).examples
    assert example.steps == ("a;", ";b", "R")
    [example] = labelled([result(candidate)], "tree", task=Pairs()).examples
    assert example.steps == ("a;", ";", "bR")


# ---------------------------------------------------------------- bad input, files


@pytest.mark.parametrize(
    ("results", "sources", "message"),
    [
        ([], ["tree"], "no answer can be a verifier's example .no results.*search more problems"),
        ([result(answer("a\nR", Grade.UNGRADED))], ["tree"], r"answers 1, ungraded 1"),
        ([result("R", "X")], ["tree"], r"none of 2 answers holds the step delimiter '\\n'.*kind = 'orm'"),
        ([result("a\nR")], ["tree", "rollouts"], "verifier.labels = 'rollouts' needs rollouts"),
        ([result("a\nR")], ["siblings"], "verifier.labels = 'siblings' needs rollouts"),
    ],
)
def test_what_cannot_be_labelled_is_refused(results, sources, message):
    with pytest.raises(DataError, match=message):
        labelled(results, *sources)


def test_examples_are_read_as_they_were_written(tmp_path):
    problem = Problem("k", "How många?", "7", {"numbers": [1, 2]})
    examples = [
        StepExample(problem, ("a\n", "7"), ("1", "2"), (None, 0.25), None, "tree", 3, 2.0),
        StepExample(problem, ("7",), labels=(None,), outcome=True, source="outcomes"),
    ]
    write_examples(examples, tmp_path / "examples.jsonl")
    assert list(read_examples(tmp_path / "examples.jsonl")) == examples


@pytest.mark.parametrize("labels", [[0.5], [0.5, 1.5], [0.5, -0.1], [0.5, float("nan")], [0.5, "x"], 3])
def test_labels_that_mean_nothing_are_refused_with_their_line(tmp_path, labels):
    good = StepExample(Problem("k", "q", "7"), ("a\n", "7"), labels=(0.0, 1.0), source="tree")
    path = tmp_path / "examples.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in (good.to_json(), good.to_json() | {"labels": labels})))
    with pytest.raises(CorruptArtefact, match="line 2 is not a training example"):
        list(read_examples(path))
