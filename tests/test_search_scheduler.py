"""The scheduler merges what strategies ask for; the policy handle counts and refuses."""

import pytest

from search import answers
from search.engines.scripted import ScriptedEngine
from search.errors import BudgetExceeded
from search.policy import Policy, Sampler
from search.randomness import key64
from search.scheduler import run_together
from search.strategies.best_of_n import best_of_n, greedy
from search.types import Budget, Candidate, Finish, Grade, Problem


class RecordingEngine(ScriptedEngine):
    """A scripted engine that keeps the sizes of the batches it was given."""

    def __init__(self, reply=lambda prompt, temperature, key: f"{prompt}:{key % 3}\n"):
        super().__init__(reply)
        self.batches = []

    def extend(self, requests):
        self.batches.append(len(requests))
        return super().extend(requests)


class EchoTask:
    """The prompt is the question; the answer is the text."""

    step_delimiter = "\n"

    def __init__(self, end_text=None):
        self.end_text = end_text

    def prompt(self, problem):
        return problem.question

    def answers(self, pairs):
        return [text or None for _, text in pairs]


EIGHT = Budget("samples", 8)


def policy_for(key, engine, budget=EIGHT, max_new_tokens=50):
    problem = Problem(key, key, "gold")
    return Policy(problem, Sampler(engine, EchoTask(), 1.0, max_new_tokens, (0, "test", "train")), budget)


def test_requests_of_all_problems_share_batches():
    engine = RecordingEngine()

    async def two_steps(policy, num):
        first = await policy.sample(num)
        return first + await policy.sample(1)

    policies = [policy_for(name, engine) for name in "abc"]
    results = run_together([two_steps(p, n) for p, n in zip(policies, (1, 2, 3), strict=True)], engine)
    assert engine.batches == [6, 3]
    assert [len(r) for r in results] == [2, 3, 4]
    assert all(c.text.startswith(name) for name, r in zip("abc", results, strict=True) for c in r)


def test_results_do_not_depend_on_the_company_a_problem_keeps():
    engine = RecordingEngine()

    def texts(names):
        budget = Budget("samples", 8)
        coroutines = [best_of_n(Problem(n, n), policy_for(n, engine), None, budget) for n in names]
        return dict(zip(names, [[c.text for c in r] for r in run_together(coroutines, engine)], strict=True))

    alone, together = texts("b"), texts("abc")
    assert alone["b"] == together["b"]
    assert len(set(alone["b"])) > 1


def test_four_and_then_four_samples_are_the_same_eight():
    engine = RecordingEngine()

    async def in_parts(policy):
        return [*await policy.sample(4), *await policy.sample(4)]

    whole, parts = run_together(
        [
            best_of_n(Problem("a", "a"), policy_for("a", engine), None, Budget("samples", 8)),
            in_parts(policy_for("a", engine)),
        ],
        engine,
    )
    assert whole == parts


@pytest.mark.parametrize("budget", [Budget("samples", 3), Budget("tokens", 3), Budget("flops", 2_000 * (2 + 3))])
def test_a_strategy_cannot_overspend(budget):
    engine = RecordingEngine()
    policy = policy_for("a", engine, budget)
    with pytest.raises(BudgetExceeded, match="4 more"):
        run_together([policy.sample(4)], engine)
    assert policy.spend.generated_tokens == 0
    assert engine.batches == []


def test_spend_equals_an_independent_count():
    engine = RecordingEngine()
    policy = policy_for("ab", engine)
    (candidates,) = run_together([policy.sample(5)], engine)
    generated = sum(len(c.ids) for c in candidates)
    assert policy.spend.samples == 5
    assert policy.spend.generated_tokens == generated
    assert policy.spend.prefilled_tokens == 5 * 3  # two bytes and the separator; the script caches nothing
    assert policy.spend.flops_ideal == 2 * 1_000 * (3 + generated)
    assert policy.spend.flops_actual == 2 * 1_000 * (15 + generated)


def test_a_token_budget_bounds_every_sample():
    engine = RecordingEngine(lambda *_: "x" * 100)
    policy = policy_for("a", engine, Budget("tokens", 40), max_new_tokens=50)
    (candidates,) = run_together([policy.sample(4)], engine)
    assert [len(c.ids) for c in candidates] == [10] * 4
    assert all(c.finish is Finish.LENGTH for c in candidates)


def test_a_failing_strategy_closes_the_others():
    engine = RecordingEngine()
    closed = []

    async def fails(policy):
        await policy.sample(1)
        raise ValueError("broken strategy")

    async def waits(policy):
        try:
            await policy.sample(1)
            await policy.sample(1)
        finally:
            closed.append(True)

    with pytest.raises(ValueError, match="broken strategy"):
        run_together([fails(policy_for("a", engine)), waits(policy_for("b", engine))], engine)
    assert closed == [True]


def test_greedy_ignores_the_key():
    engine = RecordingEngine(lambda prompt, temperature, key: f"{temperature}")
    ((candidate,),) = run_together(
        [greedy(Problem("a", "a"), policy_for("a", engine), None, Budget("samples", 1))], engine
    )
    assert candidate.text == "0.0"


def candidate(answer, finish=Finish.EOS, grade=Grade.WRONG):
    return Candidate((1,), str(answer), finish, answer, grade)


def test_majority_ignores_answerless_and_truncated_candidates():
    votes = [
        candidate(None),
        candidate(None),
        candidate("7"),
        candidate("8", Finish.LENGTH),
        candidate("8", Finish.LENGTH),
    ]
    assert answers.majority(votes) == 2
    assert answers.majority(votes[:2]) is None


def test_majority_breaks_ties_by_order_of_sampling():
    assert answers.majority([candidate("2"), candidate("1"), candidate("1"), candidate("2")]) == 0


def test_gold_takes_the_first_correct_one():
    assert (
        answers.gold([candidate("1"), candidate("2", grade=Grade.UNGRADED), candidate("3", grade=Grade.CORRECT)]) == 2
    )
    assert answers.gold([candidate("1")]) is None


def test_keys_are_joined_unambiguously():
    assert key64("a", "b") != key64("ab")
    assert key64(1, 2) == key64("1", "2")
    assert 0 <= key64("x") < 2**64


def test_an_answer_that_runs_into_the_next_question_ends_before_it():
    engine = RecordingEngine(lambda *_: "4\n\nQuestion: what else?")
    problem = Problem("a", "a", "4")
    policy = Policy(problem, Sampler(engine, EchoTask("\n\nQuestion:"), 1.0, 50, (0,)), EIGHT)
    ((candidate,),) = run_together([policy.sample(1)], engine)
    assert candidate.finish is Finish.EOS
    assert candidate.ids == (*b"4", engine.tokenizer.eos_token_id)
    assert policy.spend.generated_tokens == len("4\n\nQuestion:")


def test_what_meets_the_cap_is_dropped_or_ends_with_what_it_has():
    async def one_by_one(policy):
        try:
            return [(await policy.sample(1))[0].text for _ in range(4)]
        except BudgetExceeded:
            return [c.text for c in policy.finished]

    def run(**how):
        engine = RecordingEngine(lambda prompt, temperature, key: "abcde")  # six tokens, EOS included
        return run_together([one_by_one(policy_for("a", engine, max_new_tokens=6))], engine, max_tokens=14, **how)

    assert run() == [None]
    assert run(finish_at_cap=True) == [["abcde", "abcde"]]
