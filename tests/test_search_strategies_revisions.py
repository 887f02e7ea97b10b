"""Revisions: chains of attempts that are shown the last four, the ratios of the paper, and their combinations."""

import math
from collections import Counter

import pytest

from search.errors import BudgetError
from search.prompts import REVISE
from search.strategies.sizes import chain_length
from search.types import Finish
from tests.scripted_search import (
    LineTask,
    StepEngine,
    TextVerifier,
    by_score,
    check_company,
    given,
    run_one,
    texts,
)


def prompts(engine):
    return [engine.tokenizer.decode(request.prefix[: request.prefix.index(257)]) for request, _ in engine.log]


def attempts_shown(prompt):
    """The attempts in a prompt of LineTask: each follows the question "q"."""
    return [part.removeprefix("q") for part in prompt.split("\n\n")[:-1]]


def counting():
    """The first attempt is 1, and each revision the last one that it was shown and one more."""
    return StepEngine(lambda prompt, *_: str(int((attempts_shown(prompt) or ["0"])[-1]) + 1))


# Snell et al., ICLR 2025, table 1: budget -> sequential : parallel
TABLE = {
    1: ["1:1"],
    2: ["1:2", "2:1"],
    4: ["1:4", "1:1", "4:1"],
    8: ["1:8", "1:2", "2:1", "8:1"],
    16: ["1:16", "1:4", "1:1", "4:1", "16:1"],
    32: ["1:32", "1:8", "1:2", "2:1", "8:1", "32:1"],
    64: ["1:64", "1:16", "1:4", "1:1", "4:1", "16:1", "64:1"],
    128: ["1:128", "1:32", "1:8", "1:2", "2:1", "8:1", "32:1", "128:1"],
    256: ["1:256", "1:16", "1:1", "16:1", "256:1"],
}
RATIOS = [(num, *map(int, ratio.split(":"))) for num, ratios in TABLE.items() for ratio in ratios]


@pytest.mark.parametrize(("num", "sequential", "parallel"), RATIOS)
def test_chain_lengths_of_the_papers_ratios(num, sequential, parallel):
    length = chain_length(num, sequential / parallel)
    assert num % length == 0
    assert length * parallel == num // length * sequential


def test_the_ends_of_the_ratio_and_what_is_none():
    assert chain_length(16, 0) == 1
    assert chain_length(16, math.inf) == 16
    assert chain_length(128, 8) == 32  # in four chains
    with pytest.raises(BudgetError, match="ratio = -1"):
        chain_length(16, -1)


def test_attempts_are_made_in_chains_of_the_asked_shape():
    result = run_one("revisions_majority(ratio=4)", 16, counting())
    assert Counter(c.chain for c in result.candidates) == {0: 8, 1: 8}
    assert [c.text for c in result.candidates if c.chain == 0] == [str(n) for n in range(1, 9)]
    assert result.spend.samples == 16


def test_fully_parallel_revisions_are_first_attempts():
    engine = counting()
    result = run_one("revisions_majority(ratio=0)", 8, engine)
    assert texts(result) == ["1"] * 8
    assert set(prompts(engine)) == {"q"}


def test_the_window_rolls_over_the_last_four_attempts():
    engine = counting()
    run_one("revisions_majority(ratio=inf)", 8, engine)
    shown = [attempts_shown(prompt) for prompt in prompts(engine)]
    assert shown == [[str(n) for n in range(max(1, turn - 4), turn)] for turn in range(1, 9)]
    assert shown[7] == ["4", "5", "6", "7"]


def test_a_window_of_one_shows_the_last_attempt_alone():
    engine = counting()
    run_one("revisions_majority(ratio=inf, window=1)", 4, engine)
    assert [attempts_shown(prompt) for prompt in prompts(engine)] == [[], ["1"], ["2"], ["3"]]


def test_an_attempt_that_ends_in_a_newline_is_shown_like_any_other():
    engine = StepEngine(lambda prompt, written, *_: "" if written else "A\n")
    result = run_one("revisions_majority(ratio=inf)", 2, engine)
    assert texts(result) == ["A\n", "A\n"]
    assert prompts(engine) == ["q", "qA\n\nq"]


def test_an_attempt_that_was_cut_off_is_not_shown():
    def script(prompt, *_):
        shown = attempts_shown(prompt)
        return "x" * 300 if len(shown) == 1 else "A"

    engine = StepEngine(script)
    result = run_one("revisions_majority(ratio=inf)", 4, engine)
    assert [c.finish for c in result.candidates] == [Finish.EOS] + [Finish.LENGTH] * 3
    assert [attempts_shown(prompt) for prompt in prompts(engine)] == [[], ["A"], ["A"], ["A"]]
    assert given(result) == "A"


def test_attempts_of_one_chain_are_independent_draws():
    engine = StepEngine(lambda prompt, written, temperature, key: str(key % 1000))
    result = run_one("revisions_majority(ratio=1)", 16, engine)
    assert len(set(texts(result))) == 16


def test_the_oldest_attempts_are_left_out_where_an_answer_would_have_no_room():
    """An attempt takes 23 tokens of the prompt, an answer 21 of the 25 that it may have."""
    engine = StepEngine(lambda prompt, *_: f"{len(attempts_shown(prompt))}" * 20, max_length=100)
    verifier = by_score({})
    result = run_one("revisions(ratio=inf)", 6, engine, verifier, max_new_tokens=25)
    assert [len(attempts_shown(prompt)) for prompt in prompts(engine)] == [0, 1, 2, 3, 3, 3]
    assert [len(r.attempts) for r in verifier.log] == [0, 1, 2, 3, 3, 3]
    assert all(c.complete for c in result.candidates)


def test_a_revision_that_outgrows_the_context_ends_alone():
    """A rival loses the whole problem to one overflow."""
    engine = StepEngine(lambda prompt, *_: f"{len(attempts_shown(prompt))}" * 20, max_length=25)
    result = run_one("revisions_majority(ratio=inf)", 3, engine, max_new_tokens=22)
    assert [c.finish for c in result.candidates] == [Finish.EOS] + [Finish.OVERFLOW] * 2
    assert result.failed is None
    assert given(result) == "0" * 20


def test_the_verifier_reads_what_the_attempt_was_shown():
    verifier = by_score({})
    run_one("revisions(ratio=inf)", 3, counting(), verifier)
    assert [(r.attempts, r.steps) for r in verifier.log] == [((), ("1",)), (("1",), ("2",)), (("1", "2"), ("3",))]


def test_revisions_are_chosen_chain_by_chain_and_majority_is_flat():
    """Chain 0 says A, A; chain 1 B, B; both twice: the vote over all is a tie, the chains' winners decide."""
    answers = iter("ABAB")
    engine = StepEngine(lambda *_: next(answers))
    result = run_one("revisions(ratio=1)", 4, engine, by_score({"A": 0.4, "B": 0.6}))
    assert [(c.text, c.chain) for c in result.candidates] == [("A", 0), ("B", 1), ("A", 0), ("B", 1)]
    assert given(result) == "B"
    answers = iter("ABCA")
    assert given(run_one("revisions_majority(ratio=1)", 4, StepEngine(lambda *_: next(answers)))) == "A"


def test_chat_models_are_shown_attempts_as_turns():
    class ChatTask(LineTask):
        def prompt(self, problem):
            return [{"role": "user", "content": problem.question}]

    engine = StepEngine(lambda prompt, *_: str(prompt.count(REVISE)))
    sent = []
    plain = engine.tokenizer.apply_chat_template
    engine.tokenizer.apply_chat_template = lambda messages, **how: (sent.append(messages), plain(messages, **how))[1]
    result = run_one("revisions_majority(ratio=inf)", 3, engine, task=ChatTask())
    assert texts(result) == ["0", "1", "2"]
    assert [m["role"] for m in sent[-1]] == ["user", "assistant", "user", "assistant", "user"]
    assert [m["content"] for m in sent[-1]] == ["q", "0", REVISE, "1", REVISE]


# ---------------------------------------------------------------- combinations


def searching():
    """First answers are one step and a letter by the draw; a revision says what it was shown."""

    def script(prompt, written, temperature, key):
        if shown := attempts_shown(prompt):
            return "+".join(part.replace("\n", "/") for part in shown)
        return f"{'abcd'[key % 4]}\n" if not written else "ABCD"[key % 4]

    return StepEngine(script)


def last_letter(text):
    return "abcdABCD".find(text.strip()[-1:]) / 10 + 0.1


def test_beam_search_seeds_chains_that_share_the_other_half():
    engine = searching()
    result = run_one("beam_revisions(width=2, chains=2)", 16, engine, TextVerifier(last_letter))
    found = [c for c in result.candidates if not c.prompt_ids]
    revised = [c for c in result.candidates if c.prompt_ids]
    assert len(found) == 8
    assert len(revised) == 8
    assert result.spend.samples == 16
    best = sorted((c.score for c in found), reverse=True)[:2]
    seeds = [c for c in found if c.chain in (0, 1)]
    assert sorted((c.score for c in seeds), reverse=True) == best
    assert Counter(c.chain for c in revised) == {0: 4, 1: 4}
    assert len({c.chain for c in found}) == 8  # what seeds no chain is one of its own
    first = prompts(engine).index(next(p for p in prompts(engine) if p != "q"))
    assert {attempts_shown(p)[0].replace("\n", "") for p in prompts(engine)[first : first + 2]} == {
        c.text.replace("\n", "") for c in seeds
    }


def test_beams_that_were_cut_off_are_no_seeds_and_are_counted():
    engine = StepEngine(lambda prompt, written, temperature, key: "x" * 300 if key % 2 else "A")
    result = run_one("beam_revisions(width=2)", 16, engine, by_score({"A": 0.9}))
    assert len(result.candidates) == 16
    cut = [c for c in result.candidates if c.finish is Finish.LENGTH and not c.prompt_ids]
    assert cut
    assert not any(c.score for c in cut)
    assert given(result) == "A"


def test_beams_that_all_fail_seed_nothing():
    result = run_one("beam_revisions(width=2)", 8, StepEngine(lambda *_: "x" * 300), by_score({}))
    assert [c.finish for c in result.candidates] == [Finish.LENGTH] * 4
    assert result.selected is None


def test_every_attempt_of_searched_revisions_is_a_search_that_sees_the_best_before():
    def script(prompt, written, temperature, key):
        turn = len(attempts_shown(prompt))
        return f"{turn}{'abcd'[key % 4]}\n" if not written else f"{turn}{'ABCD'[key % 4]}"

    engine = StepEngine(script)
    result = run_one("searched_revisions(width=4)", 12, engine, TextVerifier(last_letter))
    assert Counter(c.chain for c in result.candidates) == {0: 4, 1: 4, 2: 4}
    assert result.spend.samples == 12
    best = [max((c for c in result.candidates if c.chain == turn), key=lambda c: c.score).text for turn in range(3)]
    last = max(prompts(engine), key=len)
    assert last == f"q{best[0]}\n\nq{best[1]}\n\nq"


COMBINED = ["revisions(ratio=1)", "revisions_majority(ratio=inf)", "beam_revisions(width=2)"]


@pytest.mark.parametrize("strategy", [*COMBINED, "searched_revisions(width=2)"])
def test_results_depend_neither_on_company_nor_on_the_order_of_completion(strategy):
    check_company(strategy, 3, 0.8, num=5)
