"""Who listens to a round: the terminal, MLflow, a log. One that fails is warned about once and never stops a round."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

from configs.schema import Config
from flows import driver
from flows.driver import Observer
from flows.show import Display, count
from flows.state import RoundFolder, RoundRecord


class Silent:
    """Hears everything and says nothing. Base of the others."""

    def round_started(self, folder: RoundFolder, config: Config, expected_s: float | None) -> None: ...
    def stage_started(self, folder: RoundFolder, name: str, expected_s: float | None) -> None: ...
    def progress(self, name: str, done: float, total: float, **info: Any) -> None: ...
    def stage_finished(self, folder: RoundFolder, name: str, wall_s: float, resumed: bool) -> None: ...
    def stage_failed(self, folder: RoundFolder, name: str, message: str) -> None: ...
    def round_finished(self, folder: RoundFolder, record: RoundRecord) -> None: ...


class Several(Silent):
    """Tells several. The first failure of one is warned about; it is not asked again."""

    def __init__(self, observers: Sequence[Observer]) -> None:
        self._observers = list(observers)

    def _tell(self, tell: Callable[[Observer], None]) -> None:
        for observer in list(self._observers):
            try:
                tell(observer)
            except Exception as error:  # noqa: BLE001 - a listener must not take the round down
                self._observers.remove(observer)
                warnings.warn(f"{type(observer).__name__} stopped listening: {error}", stacklevel=2)

    def round_started(self, folder: RoundFolder, config: Config, expected_s: float | None) -> None:
        self._tell(lambda o: o.round_started(folder, config, expected_s))

    def stage_started(self, folder: RoundFolder, name: str, expected_s: float | None) -> None:
        self._tell(lambda o: o.stage_started(folder, name, expected_s))

    def progress(self, name: str, done: float, total: float, **info: Any) -> None:
        self._tell(lambda o: o.progress(name, done, total, **info))

    def stage_finished(self, folder: RoundFolder, name: str, wall_s: float, resumed: bool) -> None:
        self._tell(lambda o: o.stage_finished(folder, name, wall_s, resumed))

    def stage_failed(self, folder: RoundFolder, name: str, message: str) -> None:
        self._tell(lambda o: o.stage_failed(folder, name, message))

    def round_finished(self, folder: RoundFolder, record: RoundRecord) -> None:
        self._tell(lambda o: o.round_finished(folder, record))


WHAT = {
    "problems": "drawing the round's problems",
    "base": "training the base model",
    "baseline": "measuring the champion",
    "search": "searching for better answers",
    "select": "choosing what to learn from",
    "distill": "training the challenger",
    "evaluate": "measuring the challenger",
    "gate": "comparing the two",
    "difficulty": "fitting the difficulty predictor",
    "verifier": "training the verifier",
    "reviser": "training a policy that revises",
    "table": "measuring strategies, to choose by difficulty",
}


class Terminal(Silent):
    """The round in the terminal."""

    def __init__(self, display: Display) -> None:
        self._display = display
        self._shown: set[tuple[str, str]] = set()  # what was said once is not said again when Prefect takes over

    def _is_new(self, folder: RoundFolder, what: str) -> bool:
        new = (folder.path.name, what) not in self._shown
        self._shown.add((folder.path.name, what))
        return new

    def round_started(self, folder: RoundFolder, config: Config, expected_s: float | None) -> None:
        if not self._is_new(folder, ""):
            return
        control = f" · {folder.kind}" if folder.kind != "round" else ""
        base = " · the base model" if folder.round == 0 else ""
        self._display.round_started(f"Ratchet · {config.loop.name} · round {folder.round}{control}{base}", expected_s)

    def stage_started(self, folder: RoundFolder, name: str, expected_s: float | None) -> None:
        self._display.stage_started(name, WHAT.get(name, ""), expected_s)

    def progress(self, name: str, done: float, total: float, **info: Any) -> None:
        self._display.progress(name, done, total, **info)

    def stage_finished(self, folder: RoundFolder, name: str, wall_s: float, resumed: bool) -> None:
        if not self._is_new(folder, name):
            return
        metrics = driver.read_metrics(folder.path / name)
        self._display.stage_finished(name, wall_s, _note(name, metrics), resumed=resumed)

    def stage_failed(self, folder: RoundFolder, name: str, message: str) -> None:
        self._display.stage_failed(name)


def _note(name: str, m: dict[str, float]) -> str:
    """What a stage found, in a few words; empty where it wrote no such figures."""
    try:
        match name:
            case "problems":
                drawn = [(k, m[f"data/{k}_problems"]) for k in ("search", "gate", "test", "fit")]
                aside = m["data/rejected_problems"]
                return ", ".join(f"{n:g} {k}" for k, n in drawn if n) + (f"; {aside:g} rows set aside" if aside else "")
            case "baseline" | "evaluate":
                sets = [(s, m.get(f"{p}/accuracy_greedy")) for s, p in (("gate", "gate_set"), ("test", "test"))]
                return "greedy " + ", ".join(f"{100 * v:.1f} % on {s}" for s, v in sets if v is not None)
            case "search":
                lost = [("failed", "failed"), ("left unfinished by search.max_tokens", "unfinished")]
                found = [f"{m['search/solved']:g} of {m['search/problems']:g} problems solved"]
                parts = (("verifier", "unverified"), ("StrategyTable", "untabled"))
                if lacking := [part for part, k in parts if m.get(f"search/{k}")]:
                    found.append(f"by plain samples, the champion has no usable {' and no '.join(lacking)}")
                if m.get("search/predicted") == 0:
                    found.append("all questions alike, without a usable difficulty predictor")
                return "; ".join(found + [f"{n:g} {why}" for why, k in lost if (n := m.get(f"search/{k}"))])
            case "select":
                return f"{m['data/rows']:g} rows, {m['data/distinct_solutions']:g} distinct solutions"
            case "distill":
                return f"loss {m['distill/loss_first']:.3f} -> {m['distill/loss_last']:.3f}"
            case "base":
                tokens, parameters = m["bootstrap/trained_tokens"], m["bootstrap/parameters"]
                return f"{count(parameters)} parameters, {count(tokens)} tokens, loss {m['bootstrap/loss']:.3f}"
            case "gate":
                return f"{100 * m['gate/effect']:+.1f} points, p = {m['gate/p']:.2g}"
            case "verifier":
                named = (("AUC within problems", "auc_within"), ("over all", "auc"), ("Brier", "brier"))
                found = [f"{words} {m[f'verifier/{k}']:.3f}" for words, k in named if f"verifier/{k}" in m]
                return ", ".join(found) + ("" if m["verifier/usable"] else "; not usable: the one before stays")
            case "reviser":
                return "" if m["revision/usable"] else "not usable: the one before stays"
            case "table":
                if not m["table/usable"]:
                    return "not usable: the one before stays"
                saved = [(int(k.rpartition("_")[2]), v) for k, v in m.items() if k.startswith("table/saving_at_")]
                said = [_saved(n, v) for n, v in sorted(saved)[-1:]]
                return "; ".join([f"{m['table/bins']:g} bin" + "s" * (m["table/bins"] != 1), *said])
            case "difficulty":
                return f"Spearman {m['difficulty/spearman']:.2f}, Brier {m['difficulty/brier']:.3f}"
            case _:
                return ""
    except KeyError:
        return ""


def _saved(samples: int, times: float) -> str:
    if not times:
        return f"best-of-{samples} stays more accurate than any choice"
    return f"{times:.1f} x fewer FLOPs than best-of-{samples} at equal accuracy"
