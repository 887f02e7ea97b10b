import itertools
import json
import random
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from configs.schema import Select
from distill.leaks import near_duplicates, ngram_leaks
from distill.select import (
    FILTERS,
    Row,
    Selection,
    draw_replay,
    identity,
    match_tokens,
    read_results,
    read_rows,
    select,
    select_control,
    write_selection,
)
from search.errors import CorruptArtefact, DataError, TrainingError
from search.results import write_results
from search.types import Candidate, Finish, Grade, Problem, SearchResult, Spend

EOS = 1
NOTHING: list[Row] = []
ALL = Select(min_rows=1, replay=0)


def answer(text: str, grade: Grade | None = Grade.CORRECT, finish: Finish = Finish.EOS, num_ids: int = 3) -> Candidate:
    found = None if text == "no answer" else text
    ids = (*range(2, 1 + num_ids), EOS) if finish is Finish.EOS else tuple(range(2, 2 + num_ids))
    return Candidate(ids, text, finish, answer=found, grade=grade)


def result(key: str, *candidates: Candidate) -> SearchResult:
    problem = Problem(key, f"question {key}", "gold")
    return SearchResult(problem, "best_of_n(4)", candidates, 0, Spend(), "model", "seed", prompt_ids=(7, 8))


def solved(problem: Problem, text: str) -> list[str]:
    """What the text says that it solves besides its own problem."""
    return [text.split("solves ")[1]] if "solves " in text else []


def chosen(
    results: list[tuple[int, SearchResult]],
    config: Select = ALL,
    *,
    replay: list[Row] = NOTHING,
    held_out: frozenset[str] = frozenset(),
    seed: int = 0,
    round_number: int = 1,
    earlier: frozenset[int] = frozenset(),
) -> Selection:
    return select(
        results,
        config,
        replay=replay,
        prompt_ids=lambda _: [99],
        solution_key=lambda _, text: text.replace(" ", ""),
        seed=seed,
        round_number=round_number,
        held_out=held_out.__contains__,
        solved_keys=solved,
        earlier=earlier,
    )


def many(num_problems: int, num_solutions: int, round_number: int = 1) -> list[tuple[int, SearchResult]]:
    return [
        (round_number, result(f"p{p}", *(answer(f"s{s}", num_ids=3 + s) for s in range(num_solutions))))
        for p in range(num_problems)
    ]


def test_each_filter_counts_what_it_drops() -> None:
    candidates = {
        "ungraded": answer("a", Grade.UNGRADED),
        "truncated": answer("b", Grade.WRONG, Finish.LENGTH),
        "wrong": answer("c", Grade.WRONG),
        "no_answer": answer("no answer"),
        "too_long": answer("d", num_ids=11),
        "solves_held_out": answer("solves secret"),
    }
    kept = [answer("e"), answer("f")]
    results = [
        (1, result("p", *candidates.values(), *kept, answer(" e "))),
        (1, result("leaked", answer("g"))),
        (1, result("q", answer("h"), answer("i"), answer("j"))),
    ]
    config = Select(min_rows=1, replay=0, max_per_problem=2, max_response_tokens=10)
    selection = chosen(results, config, held_out=frozenset({"leaked", "secret"}))
    expected = dict.fromkeys(FILTERS, 1) | {"candidates": 13, "kept": 4}
    assert dict(selection.counts) == expected
    assert selection.leaks == ("leaked",)
    assert [row.key for row in selection.rows] == ["p", "p", "q", "q"]
    assert (selection.problems_solved, selection.distinct_solutions) == (2, 5)


def test_ungraded_and_never_graded_are_no_rows() -> None:
    with pytest.raises(TrainingError, match="ungraded 2"):
        chosen([(1, result("p", answer("a", None), answer("b", Grade.UNGRADED)))])


def test_counts_add_up_for_random_candidates() -> None:
    draw = random.Random(3)
    grades, finishes = [*Grade, None], list(Finish)
    results = [
        (
            draw.randrange(1, 4),
            result(
                f"p{draw.randrange(9)}",
                *(answer(f"s{draw.randrange(6)}", draw.choice(grades), draw.choice(finishes)) for _ in range(20)),
            ),
        )
        for _ in range(30)
    ]
    selection = chosen(results, Select(min_rows=1, replay=0, max_per_problem=3), held_out=frozenset({"p3"}))
    parts = sum(selection.counts[name] for name in (*FILTERS, "kept"))
    assert parts == selection.counts["candidates"] == 600
    assert selection.counts["kept"] == len(selection.rows)


def test_the_cap_keeps_distinct_solutions_whatever_the_order() -> None:
    config = Select(min_rows=1, replay=0, max_per_problem=3)
    results = many(5, 10)
    first = chosen(results, config)
    turned = [(n, replace(r, candidates=r.candidates[::-1])) for n, r in reversed(results)]
    assert chosen(turned, config).rows == first.rows
    assert [len({row.solution for row in rows}) for _, rows in itertools.groupby(first.rows, lambda r: r.key)] == [
        3
    ] * 5
    assert chosen(results, config, seed=1).rows != first.rows
    of_problems = {tuple(row.solution for row in rows) for _, rows in itertools.groupby(first.rows, lambda r: r.key)}
    assert len(of_problems) > 1, "the cap must not prefer the same solutions everywhere"


def test_rounds_are_merged_and_new_rows_counted() -> None:
    old = [(1, result("p", answer("a"), answer("b")))]
    new = [(2, result("p", answer("b"), answer("c")))]
    first = chosen(old)
    earlier = frozenset(identity(row.key, row.solution) for row in first.rows)
    both = chosen(old + new, round_number=2, earlier=earlier)
    assert [(row.solution, row.round) for row in both.rows] == [("a", 1), ("b", 1), ("c", 2)]
    assert both.new_rows == 1
    last = chosen(old + new, Select(min_rows=1, replay=0, rounds="last"), round_number=2)
    assert [(row.solution, row.round) for row in last.rows] == [("b", 2), ("c", 2)]


def test_rows_hold_the_very_ids_of_the_search() -> None:
    with_prompt = result("p", answer("a"))
    without = replace(with_prompt, problem=Problem("q", "", "gold"), prompt_ids=())
    rows = chosen([(1, with_prompt), (1, without)]).rows
    assert rows[0].to_json() == {
        "key": "p",
        "prompt_ids": (7, 8),
        "completion_ids": (2, 3, EOS),
        "source": "search",
        "round": 1,
        "solution": "a",
    }
    assert rows[1].prompt_ids == (99,)


def test_too_few_rows_say_where_they_went() -> None:
    with pytest.raises(TrainingError, match=r"2 training rows are fewer than select\.min_rows = 50 .*wrong 1"):
        chosen([(1, result("p", answer("a"), answer("b"), answer("c", Grade.WRONG)))], Select())
    with pytest.raises(TrainingError, match="no results"):
        chosen([], Select())


def replay_rows(num: int) -> list[Row]:
    return [Row(f"r{n}", (5,), (6, EOS), "replay", 0, "") for n in range(num)]


def test_replay_is_a_share_of_all_rows_and_the_same_every_time() -> None:
    config = Select(min_rows=1, replay=0.2, max_per_problem=4)
    selection = chosen(many(10, 4), config, replay=replay_rows(100))
    replayed = [row for row in selection.rows if row.source == "replay"]
    assert (len(replayed), len(selection.rows)) == (10, 50)
    assert replayed == draw_replay(iter(replay_rows(100)), 40, 0.2, seed=0)
    assert replayed != draw_replay(replay_rows(100), 40, 0.2, seed=1)
    assert len(draw_replay(replay_rows(3), 40, 0.2, seed=0)) == 3
    assert draw_replay(replay_rows(3), 40, 0.0, seed=0) == []


def test_selection_is_written_and_read_back(tmp_path: Path) -> None:
    selection = chosen(many(3, 6), held_out=frozenset({"p1"}))
    write_selection(selection, tmp_path)
    assert tuple(read_rows(tmp_path / "rows.jsonl")) == selection.rows
    counts = json.loads((tmp_path / "counts.json").read_text())
    assert counts["candidates"] == 18
    assert (counts["held_out"], counts["over_cap"], counts["rows"]) == (6, 4, 8)
    assert counts["leaked_keys"] == ["p1"]
    metrics = {row["name"]: row["value"] for row in map(json.loads, (tmp_path / "metrics.jsonl").open())}
    assert metrics["data/rows"] == 8
    assert metrics["data/distinct_solutions"] == 12
    assert metrics["data/new_rows"] == 8
    assert metrics["data/leaks"] == 1
    again = tmp_path / "again"
    again.mkdir()
    write_selection(selection, again)
    for name in ("rows.jsonl", "counts.json", "metrics.jsonl"):
        assert (again / name).read_bytes() == (tmp_path / name).read_bytes()


def test_results_stream_from_files_and_damage_is_named(tmp_path: Path) -> None:
    shard = tmp_path / "shard.jsonl"
    results = [r for _, r in many(4, 3)]
    write_results(results, shard)
    assert list(read_results([(2, shard)])) == [(2, r) for r in results]
    shard.write_text(shard.read_text()[:-30])
    stream = read_results([(1, shard)])
    assert next(stream)[1] == results[0], "read one at a time, not all before the first"
    with pytest.raises(DataError, match=r"shard\.jsonl, line 4"):
        list(stream)
    shard.write_text('{"key": "p", "prompt_ids": [1], "completion_ids": ["x"]}\n')
    with pytest.raises(CorruptArtefact, match="line 1"):
        list(read_rows(shard))


def control(plain: list[tuple[int, SearchResult]], like: Selection) -> Selection:
    return select_control(
        plain,
        like,
        Select(),
        prompt_ids=lambda _: [99],
        solution_key=lambda _, text: text,
        seed=0,
        held_out=frozenset({"secret"}).__contains__,
        solved_keys=solved,
    )


def test_the_random_control_has_equal_rows_and_near_equal_tokens() -> None:
    like = chosen(many(50, 8), Select(min_rows=1, replay=0.15, max_per_problem=2), replay=replay_rows(50))
    draw = random.Random(0)
    plain = [
        (
            1,
            result(
                f"p{p}", *(answer("same", num_ids=draw.randrange(3, 20)) for _ in range(8)), answer("w", Grade.WRONG)
            ),
        )
        for p in range(50)
    ]
    plain.append((1, result("secret", answer("x"))))
    selection = control(plain, like)
    assert len(selection.rows) == len(like.rows)
    assert abs(selection.tokens - like.tokens) <= 2
    assert [r for r in selection.rows if r.source == "replay"] == [r for r in like.rows if r.source == "replay"]
    assert max(sum(r.key == f"p{p}" for r in selection.rows) for p in range(50)) > 2, "no quota"
    assert selection.counts["wrong"] == 50
    assert selection.counts["held_out"] == 1
    assert control(plain, like).rows == selection.rows
    assert selection.counts["repeated"] == 0


def test_where_plain_sampling_found_less_its_rows_come_several_times() -> None:
    like = chosen(many(50, 2), Select(min_rows=1, max_per_problem=2))
    plain = [(1, result("p0", answer("a"), answer("b"), answer("c", Grade.WRONG)))]
    selection = control(plain, like)
    assert len(selection.rows) == 100
    assert {row.solution for row in selection.rows} == {"a", "b"}
    assert selection.counts["repeated"] == 98
    assert selection.distinct_solutions == 2
    with pytest.raises(TrainingError, match="none of the plain samples can be a row"):
        control([(1, result("p0", answer("c", Grade.WRONG)))], like)


def test_a_revised_answer_is_learnt_from_the_plain_prompt() -> None:
    shown = replace(answer("right after all"), prompt_ids=(7, 9, 9, 8), chain=0)
    (row,) = chosen([(1, result("p0", shown))]).rows
    assert row.prompt_ids == result("p0").prompt_ids == (7, 8)
    assert row.completion_ids == shown.ids


def test_what_a_failed_search_had_finished_can_be_a_row() -> None:
    failed = replace(result("p0", answer("a"), answer("b", Grade.WRONG)), failed="the verifier returned NaN")
    assert [row.solution for row in chosen([(1, failed)]).rows] == ["a"]


def test_the_random_control_reaches_the_tokens_of_longer_rows() -> None:
    like = chosen([(1, result(f"p{p}", answer(f"s{p}", num_ids=35))) for p in range(100)])
    plain = [(1, result(f"p{p}", *(answer("s", num_ids=10 if n < 6 else 40) for n in range(8)))) for p in range(100)]
    selection = control(plain, like)
    assert len(selection.rows) == 100
    assert selection.tokens == pytest.approx(like.tokens, rel=0.01)
    assert selection.counts["tokens_wanted"] == like.tokens
    assert selection.counts["kept"] == 100


def test_the_random_control_shows_no_solution_of_a_held_out_problem() -> None:
    like = chosen(many(4, 2))
    plain = [(1, result(f"p{p}", *[answer("solves secret", num_ids=3)] * 8, *[answer("s")] * 4)) for p in range(4)]
    selection = control(plain, like)
    assert {row.solution for row in selection.rows} == {"s"}
    assert selection.counts["solves_held_out"] == 32


def test_matching_tokens_only_ever_swaps() -> None:
    def rows(lengths: range) -> list[Row]:
        return [Row(f"k{n}", (0,) * n, (1,), "search", 1, "") for n in lengths]

    matched = match_tokens(rows(range(50, 60)), rows(range(10, 20)), target=400)
    assert len({row.key for row in matched}) == 10
    assert sum(row.tokens for row in matched) == 400
    assert match_tokens(rows(range(5)), [], target=0) == rows(range(5))


QUESTION = "Natalia sold 48 clips in April and then she sold half as many clips in May. How many clips?"


@pytest.mark.parametrize(
    "text",
    [
        QUESTION,
        QUESTION.upper(),
        QUESTION.replace(" ", "\n   "),
        QUESTION.replace(",", "").replace("?", " ?!"),
        f"Solve this: {QUESTION} Think step by step.",
    ],
)
def test_a_planted_question_is_found(text: str) -> None:
    (leak,) = ngram_leaks(["something else entirely", text], ["another question", QUESTION])
    assert (leak.train, leak.held_out) == (1, 1)
    assert "48 clips in april" in leak.shared


def test_other_numbers_are_another_question() -> None:
    other = "Ann sold 50 clips. Then sold 7 more clips on the second day of the market. How many now?"
    same = "Ann sold 51 clips. Then sold 9 more clips on the third day of the market. How many now?"
    assert ngram_leaks([same], [other]) == []
    assert near_duplicates([QUESTION.replace("48", "50")], [QUESTION]) == []


def test_short_texts_match_whole_only() -> None:
    assert len(ngram_leaks(["What is 2+2?"], ["what is 2 + 2"])) == 1
    assert ngram_leaks(["What is 2+3?", "", "?!"], ["what is 2 + 2", ""]) == []


def test_near_duplicates_survive_a_changed_word() -> None:
    changed = QUESTION.replace("Natalia", "Natasha")
    (found,) = near_duplicates(["nothing alike", changed], ["filler words only", QUESTION])
    assert (found.train, found.held_out) == (1, 1)
    assert float(found.shared) >= 0.8
    assert near_duplicates(["Natalia sold 48 books and bought a bicycle with the money"], [QUESTION]) == []


def test_a_duplicate_is_found_behind_a_more_similar_question_about_other_numbers() -> None:
    other_numbers = QUESTION.replace("48", "50")
    same_numbers = QUESTION.replace("clips?", "pins?").replace("half as", "twice as")
    (found,) = near_duplicates([QUESTION], [other_numbers, same_numbers], threshold=0.4)
    assert found.held_out == 1


def test_text_checks_read_the_training_texts_once() -> None:
    def texts() -> Iterator[str]:
        yield from ("a b c d e f g h i", QUESTION)

    assert [leak.train for leak in ngram_leaks(texts(), [QUESTION])] == [1]
    assert [leak.train for leak in near_duplicates(texts(), [QUESTION])] == [1]
