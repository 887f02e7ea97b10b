"""What MLflow should hold of a loop, read from its folder: a pure function of `runs/<loop>/`, without MLflow.

One run for the loop (metrics with step = round: the curves people look at), one a round, one a stage. Files are read
leniently: a damaged or missing one leaves its figures out and never fails. Times come from the files, not from a clock,
so replaying writes the same points. Secrets are redacted here, before anything reaches a tracking server.

A round's figures come from the last stage that wrote them; those of the `baseline` stage, the old champion's, come
under `baseline/`, and `champion/test/...` follows whichever model is champion after the round.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

from flows.folders import ROUND, Live, Point, Round, Stage, Status, loop_id, mapping, mtime_ms, read_json, read_round
from flows.redact import Redactor, metric_name, parameters

Kind = Literal["loop", "round", "stage"]
CURVES = ("champion/", "data/", "difficulty/", "distill/", "gain/", "gate/", "limits/", "revision/", "spend/")
CURVES += ("table/", "test/", "verifier/")
SHOWN = (".html", ".png", ".svg", ".json", ".md")
MAX_SHOWN_BYTES = 8 * 2**20
MAX_NOTE_CHARS = 5000


class Key(NamedTuple):
    """Which run. Example: Key("stage", "round-003", "gate")"""

    kind: Kind
    round: str = ""  # the folder's name, controls included
    stage: str = ""


@dataclass(frozen=True, slots=True)
class Artefact:
    """A file to show beside a run: copied from `source`, or `text` itself."""

    path: str
    sha256: str
    source: Path | None = None
    text: str | None = None


@dataclass(frozen=True, slots=True)
class DatasetInput:
    """Problems or training rows a round used. Example: DatasetInput("gate", "9f86...", "/runs/...", "eval", 4000)"""

    name: str
    digest: str  # of the file, 32 hex digits
    uri: str
    context: str
    num_rows: int


@dataclass(frozen=True, slots=True)
class RunRecord:
    """One MLflow run as it should be. Equal folders give equal records, times apart."""

    key: Key
    name: str
    status: Status
    start_ms: int
    end_ms: int | None
    tags: Mapping[str, str] = field(default_factory=dict[str, str])
    params: Mapping[str, str] = field(default_factory=dict[str, str])
    points: tuple[Point, ...] = ()
    artefacts: tuple[Artefact, ...] = ()
    datasets: tuple[DatasetInput, ...] = ()
    num_dropped: int = 0  # metric values that were not finite numbers

    @property
    def digest(self) -> str:
        """Of everything but the times."""
        points = [(p.name, p.value, p.step) for p in self.points]
        artefacts = [(a.path, a.sha256) for a in self.artefacts]
        datasets = [(d.name, d.digest, d.context) for d in self.datasets]
        parts = [self.name, self.status, dict(self.tags), dict(self.params), points, artefacts, datasets]
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]


@dataclass(frozen=True, slots=True)
class ModelRecord:
    """A model a round made: one version in the registry."""

    round: int
    verdict: str
    card: Mapping[str, Any]  # what model.json says


@dataclass(frozen=True, slots=True)
class LoopRecord:
    """Everything MLflow should hold of a loop; parents come before their children."""

    name: str
    id: str
    runs: tuple[RunRecord, ...]
    models: tuple[ModelRecord, ...]
    aliases: Mapping[str, int]  # alias -> round of the model


def read(loop_dir: Path, live: Live | None = None) -> LoopRecord:
    """The record of the loop in `loop_dir`. Stages that were begun and not committed count as killed unless `live`."""
    live = live or Live()
    redact = Redactor()
    state = read_json(loop_dir / "loop.json")
    rounds = _rounds(loop_dir, live)
    models = [model for r in rounds if not r.control and (model := _model(loop_dir, r)) is not None]
    cards = {model.round: model for model in models}
    common = {"ratchet.loop": loop_dir.name, "ratchet.loop_id": loop_id(loop_dir)}
    runs = [_loop_run(loop_dir, state, rounds, live, common)]
    for found in rounds:
        runs.append(_round_run(found, cards.get(found.number) if not found.control else None, common, redact))
        runs += [_stage_run(found, stage, live, common) for stage in found.stages]
    return LoopRecord(loop_dir.name, common["ratchet.loop_id"], tuple(runs), tuple(models), _aliases(state, models))


def _rounds(loop_dir: Path, live: Live) -> list[Round]:
    folders = [path for path in loop_dir.glob("round-*") if path.is_dir() and ROUND.fullmatch(path.name)]
    champion: dict[str, float] = {}
    rounds: list[Round] = []
    for folder in sorted(folders, key=lambda path: (int(path.name.split("-")[1]), path.name)):
        found = read_round(folder, live, champion)
        rounds.append(found)
        if found.verdict is not None and not found.control:
            champion = {k.removeprefix("champion/"): v for k, v in found.metrics.items() if k.startswith("champion/")}
    return rounds


# ---------------------------------------------------------------- runs


def _tags(common: Mapping[str, str], kind: Kind, more: Mapping[str, Any]) -> dict[str, str]:
    tags = {**common, "ratchet.kind": kind, "mlflow.source.name": "ratchet", "mlflow.source.type": "LOCAL"}
    return tags | {name: str(value) for name, value in more.items() if value}


def _points(metrics: Mapping[str, float], step: int, time_ms: int) -> tuple[Point, ...]:
    return tuple(Point(name, value, step, time_ms) for name, value in sorted(metrics.items()))


def _stage_run(found: Round, stage: Stage, live: Live, common: Mapping[str, str]) -> RunRecord:
    status: Status = "FINISHED" if stage.committed else "KILLED"
    if not stage.committed and (found.folder, stage.name) in live.failed:
        status = "FAILED"
    elif not stage.committed and (live.round, live.stage) == (found.folder, stage.name):
        status = "RUNNING"
    timing = {metric_name(f"timing/{name}"): value for name, value in stage.timing.items()}
    more = {"ratchet.round": found.folder, "ratchet.stage": stage.name}
    more |= {f"ratchet.{name}": str(stage.manifest.get(name) or "") for name in ("key", "code_version")}
    return RunRecord(
        key=Key("stage", found.folder, stage.name),
        name=f"{found.folder} {stage.name}",
        status=status,
        start_ms=stage.start_ms,
        end_ms=None if status == "RUNNING" else stage.end_ms,
        tags=_tags(common, "stage", more),
        points=_points({**timing, **stage.metrics}, found.number, stage.end_ms) + stage.curves,
        artefacts=tuple(_files(stage.path)) if stage.committed else (),
        num_dropped=stage.num_dropped,
    )


def _round_run(found: Round, model: ModelRecord | None, common: Mapping[str, str], redact: Redactor) -> RunRecord:
    config = redact(found.config)
    artefacts = [_text("config.json", config)] if config else []
    artefacts += [_text("model/model.json", model.card)] if model is not None else []
    for stage in (stage for stage in found.stages if stage.committed):
        files = _files(stage.path)
        plots = [replace(a, path=f"{stage.name}/{a.path}") for a in files if a.path.endswith((".png", ".svg", ".html"))]
        artefacts += files if stage.name == "report" else plots
    started = read_json(found.path / "started.json")
    git_sha = started.get("git_sha")
    more = {"ratchet.round": found.folder, "verdict": found.verdict, "git.sha": git_sha}
    more["config.sha"] = str(found.record.get("config_sha") or started.get("config_sha") or "")[:16]
    more |= {"mlflow.source.git.commit": git_sha, "mlflow.note.content": redact.text(_note(found))}
    return RunRecord(
        key=Key("round", found.folder),
        name=found.folder,
        status=found.status,
        start_ms=found.start_ms,
        end_ms=found.end_ms,
        tags=_tags(common, "round", more),
        params=parameters(config),
        # a round's figures are final with its report; until then its stages show theirs
        points=_points(found.metrics, found.number, found.end_ms or 0) if found.final else (),
        artefacts=tuple(artefacts),
        datasets=tuple(_datasets(found)),
        num_dropped=sum(stage.num_dropped for stage in found.stages),
    )


def _loop_run(
    loop_dir: Path, state: Mapping[str, Any], rounds: list[Round], live: Live, common: Mapping[str, str]
) -> RunRecord:
    proper = [r for r in rounds if not r.control and r.final]
    artefacts = _files(loop_dir, ("loop.json", "tracking.json"))
    reports = [s for r in proper for s in r.stages if s.committed and s.name == "report"]
    shown = {artefact.path for artefact in artefacts}
    artefacts += [a for stage in reports[-1:] for a in _files(stage.path) if a.path not in shown]
    number = mapping(state.get("champion")).get("round")
    more = {"ratchet.champion": f"round-{number:03d}" if isinstance(number, int) else ""}
    more["mlflow.note.content"] = _table(loop_dir.name, proper)
    first = parameters(Redactor()(rounds[0].config)) if rounds else {}
    start_ms = min((r.start_ms for r in rounds), default=mtime_ms(loop_dir / "tracking.json"))
    return RunRecord(
        key=Key("loop"),
        name=f"loop {loop_dir.name}",
        status="RUNNING" if live.round else "FINISHED",
        start_ms=start_ms,
        end_ms=None if live.round else max((r.end_ms or r.start_ms for r in rounds), default=start_ms),
        tags=_tags(common, "loop", more),
        params={name: first[name] for name in ("loop.name", "loop.seed", "task.type", "model.base") if name in first},
        points=tuple(p for r in proper for p in _points(_curves(r.metrics), r.number, r.end_ms or 0)),
        artefacts=tuple(artefacts),
    )


def _curves(metrics: Mapping[str, float]) -> dict[str, float]:
    """What people look at over the rounds; the rest is in the rounds' own runs."""
    return {name: value for name, value in metrics.items() if name.startswith(CURVES)}


def _note(found: Round) -> str:
    """The round in a few lines of Markdown."""
    verdict = found.verdict or "unfinished"
    lines = [f"**{found.folder}: {verdict}**", "", _plain(str(found.record.get("reason") or "")), ""]
    names = [n for n in sorted(found.metrics) if n.startswith(("gain/", "gate/", "test/", "champion/test/"))]
    names = [n for n in names if not n.endswith("_se")][:40]
    if names:
        lines += ["| figure | value | se |", "|---|---|---|"]
    for name in names:
        se = found.metrics.get(f"{name}_se")
        lines.append(f"| {_plain(name)} | {found.metrics[name]:.4g} | {'' if se is None else f'{se:.2g}'} |")
    return "\n".join(lines)[:MAX_NOTE_CHARS]


def _table(name: str, rounds: Iterable[Round]) -> str:
    lines = [
        f"**Loop {name}**: one row a round.",
        "",
        "| round | verdict | test accuracy | champion |",
        "|---|---|---|---|",
    ]
    for r in list(rounds)[-60:]:
        figures = [r.metrics.get(n) for n in ("test/accuracy_greedy", "champion/test/accuracy_greedy")]
        cells = ["" if figure is None else f"{figure:.4f}" for figure in figures]
        lines.append(f"| {r.number} | {r.verdict} | {cells[0]} | {cells[1]} |")
    return "\n".join(lines)[:MAX_NOTE_CHARS]


def _plain(text: str) -> str:
    """Text that Markdown and HTML leave alone: it may come from a model."""
    return re.sub(r"[<>|`\[\]!*\\]", " ", text).replace("\n", " ")[:1000]


# ---------------------------------------------------------------- parts of a run


def _text(path: str, value: Any) -> Artefact:
    text = json.dumps(value, indent=1, sort_keys=True) + "\n"
    return Artefact(path, hashlib.sha256(text.encode()).hexdigest(), text=text)


def _files(folder: Path, skip: tuple[str, ...] = ("manifest.json", "timing.json", "model.json")) -> list[Artefact]:
    """Small files worth showing, directly in a folder or in its `plots`."""
    found: list[Artefact] = []
    candidates = [p for p in (*folder.glob("*"), *folder.glob("plots/*")) if p.suffix in SHOWN]
    for path in sorted(candidates):
        if path.name in skip or path.name.startswith(".") or path.is_symlink() or not path.is_file():
            continue
        if path.stat().st_size <= MAX_SHOWN_BYTES:
            sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
            found.append(Artefact(path.relative_to(folder).as_posix(), sha256, source=path))
    return found


def _datasets(found: Round) -> Iterable[DatasetInput]:
    """Problem sets and training rows, by the hashes their manifests hold."""
    contexts = {"search": "train", "rows": "train"}
    for stage in found.stages:
        if stage.name not in ("problems", "select"):
            continue
        for name, output in sorted(mapping(stage.manifest.get("outputs")).items()):
            stem = Path(name).stem
            if name.endswith(".jsonl") and "/" not in name and stem not in ("metrics", "rejected"):
                path = stage.path / name
                digest = str(mapping(output).get("sha256"))[:32]
                yield DatasetInput(stem, digest, str(path.absolute()), contexts.get(stem, "eval"), _num_rows(path))


def _num_rows(path: Path) -> int:
    try:
        with path.open("rb") as file:
            return sum(1 for _ in file)
    except OSError:
        return 0


def _model(loop_dir: Path, found: Round) -> ModelRecord | None:
    """The model a round made: the challenger, or round 0's base."""
    stage = next((s for s in found.stages if s.name in ("distill", "base") and s.committed), None)
    if stage is None:
        return None
    outputs = sorted(mapping(stage.manifest.get("outputs")).items())
    inside = {name: mapping(output).get("sha256") for name, output in outputs if name.startswith("model")}
    path = stage.path / "model"
    reference = read_json(stage.path / "model.json").get("path")
    if not path.exists() and reference is None:
        return None
    card = {
        "loop": loop_dir.name,
        "round": found.number,
        "path": str(path.absolute() if path.exists() else reference),
        "sha256": hashlib.sha256(json.dumps(inside, sort_keys=True).encode()).hexdigest(),
        "base": mapping(found.config.get("model")).get("base"),
        "adapter": (path / "adapter_config.json").exists(),
    }
    return ModelRecord(found.number, found.verdict or "pending", card)


def _aliases(state: Mapping[str, Any], models: list[ModelRecord]) -> dict[str, int]:
    """champion and previous as loop.json has them; challenger: the newest model that is neither."""
    rounds = {model.round for model in models}
    found: dict[str, int] = {}
    for alias in ("champion", "previous"):
        number = _policy_round(mapping(state.get(alias)))
        if number in rounds and isinstance(number, int):
            found[alias] = number
    newest = max(rounds, default=None)
    if newest is not None and newest not in found.values():
        found["challenger"] = newest
    return found


def _policy_round(bundle: Mapping[str, Any]) -> int | None:
    """The round whose stage made the bundle's policy: later bundles may keep an older policy."""
    match = ROUND.match(str(mapping(bundle.get("policy")).get("path")))
    return int(match[1]) if match else bundle.get("round")
