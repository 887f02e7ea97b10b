"""Who is chosen among the candidates: only finished ones with an answer vote, and equal answers vote together."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from search import answers
from search.types import Candidate, Finish, Grade


def candidate(answer, score=None, *, finish=Finish.EOS, chain=None, grade=Grade.WRONG):
    return Candidate((1,), str(answer), finish, answer, grade, score=score, chain=chain)


SCORED = [answers.highest, answers.weighted, answers.hierarchical]
RULES = [answers.first, answers.majority, *SCORED]
ENDS = [finish for finish in Finish if finish is not Finish.EOS]


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("finish", ENDS)
def test_what_did_not_come_to_its_end_never_votes(rule, finish):
    unfinished = [candidate("8", 1.0, finish=finish)] * 5
    assert rule([*unfinished, candidate("7", 0.1)]) == 5
    assert rule(unfinished) is None


@pytest.mark.parametrize("rule", RULES)
def test_an_answerless_candidate_never_votes_however_high_its_score(rule):
    assert rule([candidate(None, 0.99), candidate(None, 0.98), candidate("7", 0.01)]) == 2
    assert rule([candidate(None, 0.99)]) is None
    assert rule([]) is None


@pytest.mark.parametrize("rule", SCORED)
def test_a_candidate_without_a_score_has_no_say_where_scores_decide(rule):
    assert rule([candidate("1"), candidate("1"), candidate("2", 0.1)]) == 2
    assert rule([candidate("1")]) is None


def test_best_of_n_takes_the_highest_score_and_weighted_the_largest_sum():
    votes = [candidate("1", 0.6), candidate("2", 0.9), candidate("1", 0.5)]
    assert answers.highest(votes) == 1
    assert answers.weighted(votes) == 0  # 0.6 + 0.5 > 0.9
    assert answers.weighted(votes, power=4.0) == 1  # 0.1296 + 0.0625 < 0.6561
    assert answers.majority(votes) == 0


def test_the_weighted_vote_gives_the_best_candidate_of_the_winning_answer():
    votes = [candidate("1", 0.2), candidate("2", 0.5), candidate("1", 0.4)]
    assert answers.weighted(votes) == 2


def test_ties_go_to_the_answer_that_was_sampled_first():
    tie = [candidate("2", 0.5), candidate("1", 0.5), candidate("1", 0.5), candidate("2", 0.5)]
    assert [rule(tie) for rule in (answers.majority, answers.highest, answers.weighted)] == [0, 0, 0]


def test_scores_of_zero_still_choose():
    assert answers.weighted([candidate("1", 0.0), candidate("2", 0.0)]) == 0


def test_chains_choose_first_and_their_winners_among_each_other():
    """By hand. Chain 0: answer A weighs 1.6, its best scores 0.4. Chains 1 and 2: B with 0.5 and with 0.3.
    Among the winners B weighs 0.8 and A 0.4; one flat vote would give A."""
    first = [candidate("A", score, chain=0) for score in (0.4, 0.4, 0.4, 0.4)]
    votes = [*first, candidate("B", 0.3, chain=2), candidate("B", 0.5, chain=1)]
    assert answers.hierarchical(votes) == 5
    assert answers.weighted(votes) == 0


def test_within_a_chain_the_vote_is_weighted_and_its_best_solution_stands_for_it():
    """Chain 0: A weighs 0.5 + 0.4, B 0.8: A stands with 0.5. Chain 1: C with 0.55 beats it."""
    votes = [candidate("A", 0.4, chain=0), candidate("B", 0.8, chain=0), candidate("A", 0.5, chain=0)]
    assert answers.hierarchical(votes) == 2
    assert answers.hierarchical([*votes, candidate("C", 0.55, chain=1)]) == 3


def test_hierarchical_selection_without_chains_is_the_weighted_vote():
    votes = [candidate("1", 0.6), candidate("2", 0.9), candidate("1", 0.5)]
    assert answers.hierarchical(votes) == answers.weighted(votes)


voting = st.lists(
    st.builds(
        candidate,
        st.sampled_from(["1", "2", "3", None]),
        st.none() | st.floats(0, 1),
        finish=st.sampled_from([Finish.EOS, Finish.EOS, Finish.LENGTH, Finish.ERROR]),
        chain=st.none() | st.integers(0, 2),
    ),
    max_size=8,
)


@settings(deadline=None)
@given(voting, st.sampled_from([*RULES, answers.gold]))
def test_a_rule_gives_a_finished_answer_or_abstains(votes, rule):
    chosen = rule(votes)
    assert chosen is None or (votes[chosen].complete and votes[chosen].answer is not None)


@settings(deadline=None)
@given(voting)
def test_a_bystander_changes_no_vote(votes):
    """Answer-less and unfinished candidates in front of the others change nothing but the index."""
    bystanders = [candidate(None, 1.0), candidate("9", 1.0, finish=Finish.LENGTH)]
    for rule in RULES:
        chosen, among = rule(votes), rule([*bystanders, *votes])
        assert (among is None) == (chosen is None)
        assert chosen is None or among == chosen + len(bystanders)
