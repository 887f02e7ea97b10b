"""flows.plots_verifier: the health of a verifier is drawn, says its figures, and shows the alarm."""

import random
import struct
from dataclasses import replace

import pytest

from flows import plots_verifier
from flows.history import Figure, load_history
from flows.plot_style import render
from flows.plots_verifier import RoundHealth
from search.types import Candidate, Finish, Grade, Problem, SearchResult, Spend
from search.verifiers.health import Health, measure


def pools(*, problems=40, samples=8, exploits=0.0, lengths=(4, 30)):
    draw, found = random.Random(0), []
    for p in range(problems):
        rate, candidates = draw.random(), []
        for _ in range(samples):
            right = draw.random() < rate
            score = 0.2 + 0.4 * right + 0.3 * draw.random()
            if not right and draw.random() < exploits:
                score = 0.99
            ids, grade = tuple(range(draw.randrange(*lengths))), Grade.CORRECT if right else Grade.WRONG
            candidates.append(Candidate(ids, "text", Finish.EOS, "1" if right else "2", grade, score=score))
        found.append(SearchResult(Problem(f"p{p}", "q", "1"), "pool", tuple(candidates), None, Spend(), "m", "s"))
    return found


def texts(figure):
    import matplotlib.text

    return [t.get_text() for t in figure.findobj(matplotlib.text.Text) if t.get_text()]


def size(path):
    data = path.read_bytes()
    assert data.startswith(b"\x89PNG")
    return struct.unpack(">II", data[16:24])


def test_health_is_a_png_of_readable_size_that_says_its_figures(tmp_path):
    health = measure(pools())
    plots_verifier.save_health(health, tmp_path / "new" / "verifier.png")
    width, height = size(tmp_path / "new" / "verifier.png")
    assert width == 1110
    assert 700 < height < 1000
    shown = " ".join(texts(plots_verifier.draw_health(health)))
    for name in ("auc_within", "auc", "brier", "ece", "length_bias"):
        assert f"{health.figures[name].value:.3f}" in shown
    assert all(name in shown for name in ("majority", "best-of-N", "weighted", "any right"))
    assert "over-optimised" not in shown


def test_equal_health_gives_equal_bytes_stored_or_not():
    health = measure(pools())
    again = Health.from_json(health.to_json())
    one, other = (render(plots_verifier.draw_health(h), "png") for h in (health, again))
    assert one == other
    assert one != render(plots_verifier.draw_health(measure(pools(problems=20))), "png")


def test_an_alarm_is_marked():
    health = measure(pools(problems=100, samples=32, exploits=0.1))
    (fired,) = (alarm for alarm in health.selection.alarms if alarm.fired)
    text = f"over-optimised: \u2212{-100 * fired.change:.1f} points\nsince N = {fired.peak}"
    assert text in texts(plots_verifier.draw_health(health))


def right_only(found):
    right = [[c for c in p.candidates if c.grade is Grade.CORRECT] for p in found]
    return [p.with_candidates(some) for p, some in zip(found, right, strict=True) if some]


@pytest.mark.parametrize(
    "degenerate",
    [
        pools(problems=1),
        pools(samples=1),
        pools(lengths=(5, 6)),
        right_only(pools()),
        [p.with_candidates([replace(c, score=1.0) for c in p.candidates]) for p in pools()],
        [p.with_candidates([replace(c, score=0.0) for c in p.candidates]) for p in pools()],
    ],
    ids=["one problem", "one sample", "one length", "all right", "all certain", "all zero"],
)
def test_degenerate_health_is_drawn(degenerate, tmp_path):
    plots_verifier.save_health(measure(degenerate), tmp_path / "verifier.png")
    assert size(tmp_path / "verifier.png")[0] == 1110


def test_rounds_are_drawn_with_the_verifier_before():
    auc = [RoundHealth(0, Figure(0.82, 0.01), None), RoundHealth(1, Figure(0.86, 0.01), Figure(0.81))]
    brier = [RoundHealth(0, Figure(0.15), None), RoundHealth(1, Figure(0.14, 0.01), Figure(0.16))]
    figure = plots_verifier.draw_rounds(auc, brier)
    drawn = [line for line in figure.axes[0].lines if line.get_marker() == "D"]
    assert [list(line.get_ydata()) for line in drawn] == [[0.81]]
    assert render(figure, "png").startswith(b"\x89PNG")


def test_rounds_come_from_the_history(tmp_path, fake_loop):
    history = load_history(fake_loop.write_loop(tmp_path))
    assert not plots_verifier.save_rounds(history, tmp_path / "rounds.png")  # nothing measured a verifier
    assert not (tmp_path / "rounds.png").exists()
    found = {"verifier/auc_within": Figure(0.9, 0.01), "verifier/auc_within_previous": Figure(0.8)}
    rounds = tuple(replace(r, metrics={**r.metrics, **found}) if r.number == 1 else r for r in history.rounds)
    measured = replace(history, rounds=rounds)
    points = plots_verifier.over_rounds(measured, "auc_within")
    assert points == [RoundHealth(1, Figure(0.9, 0.01), Figure(0.8))]
    assert plots_verifier.save_rounds(measured, tmp_path / "rounds.png")  # without any Brier score
    assert size(tmp_path / "rounds.png")[0] == 1110
