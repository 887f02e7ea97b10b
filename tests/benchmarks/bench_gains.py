"""What three rounds bring, against the base and against controls: the figure and the first table of the README.

    .venv/bin/python tests/benchmarks/bench_gains.py [--runs-dir runs/gains] [--seeds 0 1] [--tasks countdown]

Runs what is missing (about 10 minutes a task and seed on two cores) and reports: greedy accuracy on 2000 test problems
that no model was trained on, base against the champion after three rounds, exact one-sided McNemar over the same
problems; and the same for the control, which spends the same training on more of the base's own data.
"""

import argparse
import subprocess
import sys
from pathlib import Path

from flows.history import History, greedy_outcomes, load_history
from flows.plot_style import BLUE, GREY, MUTED, canvas, percent_axis, render, styled
from search.stats import mcnemar_p

ROUNDS = 3


def run(runs: Path, task: str, seed: int) -> History:
    """The loop's history, its rounds and control run first where they are missing."""
    name = f"{task}-seed{seed}"
    base = [sys.executable, "-m", "flows.cli"]
    options = ["--runs-dir", str(runs), "--set", f"loop.name={name}", "--set", f"loop.seed={seed}"]
    if not (runs / name / f"round-{ROUNDS:03d}" / "record.json").exists():
        subprocess.run([*base, "loop", task, "--rounds", str(ROUNDS), "--no-until-flat", *options], check=True)
    if not (runs / name / f"round-{ROUNDS:03d}-control-bootstrap" / "record.json").exists():
        subprocess.run([*base, "round", task, "--control", "bootstrap", *options], check=True)
    return load_history(runs / name)


def row(history: History, task: str, seed: int) -> str:
    base = greedy_outcomes(history.base.folder)
    assert history.champion is not None
    champion = greedy_outcomes(history.champion.folder)
    control = greedy_outcomes(history.find(ROUNDS, "control-bootstrap").folder)
    assert base.keys() == champion.keys() == control.keys()
    wins = sum(champion[key] > base[key] for key in base)
    losses = sum(champion[key] < base[key] for key in base)
    p_value = mcnemar_p(losses, wins)
    before, after, other = (sum(o.values()) / len(o) for o in (base, champion, control))
    share = (other - before) / (after - before)
    cells = [f"{task}, seed {seed}", len(base), f"{100 * before:.1f} %", f"**{100 * after:.1f} %**"]
    cells += [f"{after / before:.1f} x", f"{p_value:.0e}", f"{100 * other:.1f} %", f"{100 * share:.0f} %"]
    return "| " + " | ".join(map(str, cells)) + " |"


@styled
def draw(histories: dict[tuple[str, int], History]):
    tasks = list(dict.fromkeys(task for task, _ in histories))
    figure, axes = canvas(3.0, len(tasks))
    for panel, task in zip(axes, tasks, strict=True):
        for (name, seed), history in histories.items():
            if name == task:
                _curve(panel, history, seed)
        panel.set_title(f"{task.capitalize()}: greedy accuracy")
        panel.set_xlabel("round (0 = the base model)")
        panel.set_xticks(range(ROUNDS + 1))
        panel.set_ylim(bottom=0)
        percent_axis(panel)
        panel.legend(loc="lower center" if panel.get_ylim()[1] > 0.5 else "upper left")
    return figure


def _curve(panel, history: History, seed: int) -> None:
    figures = [r.champion_metrics["test/accuracy_greedy"] for r in history.proper[: ROUNDS + 1]]
    aside = 0.03 * (2 * seed - 1)
    panel.errorbar(
        [r + aside for r in range(len(figures))],
        [f.value for f in figures],
        [f.half_width for f in figures],
        color=BLUE,
        marker="os"[seed % 2],
        alpha=1 - 0.35 * seed,
        label=f"champion, seed {seed}",
    )
    control = history.find(ROUNDS, "control-bootstrap").metrics["test/accuracy_greedy"]
    panel.errorbar(
        [ROUNDS + aside],
        [control.value],
        [control.half_width],
        color=MUTED,
        ecolor=GREY,
        marker="os"[seed % 2],
        markerfacecolor="white",
        linestyle="none",
        label="same training on more base data" if seed == 0 else None,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs-dir", type=Path, default=Path("runs/gains"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--tasks", nargs="+", default=["countdown", "arithmetic"])
    parser.add_argument("--figure", type=Path, default=Path(__file__).parents[2] / "infra" / "figures" / "rounds.png")
    options = parser.parse_args()
    histories = {(t, s): run(options.runs_dir, t, s) for t in options.tasks for s in options.seeds}
    print("| loop | test problems | base | after 3 rounds | ratio | p | control | control's share of the gain |")
    print("|---|---|---|---|---|---|---|---|")
    for (task, seed), history in histories.items():
        print(row(history, task, seed))
    options.figure.parent.mkdir(parents=True, exist_ok=True)
    options.figure.write_bytes(render(draw(histories), "png"))
    print(f"\nfigure: {options.figure}")


if __name__ == "__main__":
    main()
