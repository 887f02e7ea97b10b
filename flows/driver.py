"""One round, stage by stage: what runs when, on which inputs, and what its end means for the champion.

Reads like design and README: baseline -> search -> select -> distill -> evaluate -> gate -> difficulty of the winner
-> promote or reject -> report. Every stage is committed once; a killed round goes on where it stopped. Nothing here
knows Prefect or MLflow: `flows.round` wraps `call` in Prefect tasks and listens as an observer.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from configs import load
from configs.schema import Config
from flows.artefacts import Manifest, StageDir, StageKey, code_version, sha256_json
from flows.searching import is_plain, uses_table, uses_verifier
from flows.state import Bundle, Loop, Part, RoundFolder, RoundRecord, folder_name
from search.errors import CorruptArtefact, TrainingError, UserError

# of the bundle, besides policy and difficulty; each is made by the stage of its name, the table with the verifier
PARTS = ("verifier", "reviser", "table")
IRRELEVANT = ("tracking", "orchestration", "stages")  # sections that change no result


class NothingToDo(Exception):
    """Every training problem is solved; no round is needed. Its folder is removed and nothing is recorded."""


class Observer(Protocol):
    """Is told what happens. Never raises into the round."""

    def round_started(self, folder: RoundFolder, config: Config, expected_s: float | None) -> None: ...
    def stage_started(self, folder: RoundFolder, name: str, expected_s: float | None) -> None: ...
    def progress(self, name: str, done: float, total: float, **info: Any) -> None: ...
    def stage_finished(self, folder: RoundFolder, name: str, wall_s: float, resumed: bool) -> None: ...
    def stage_failed(self, folder: RoundFolder, name: str, message: str) -> None: ...
    def round_finished(self, folder: RoundFolder, record: RoundRecord) -> None: ...


@dataclass(frozen=True, slots=True)
class Source:
    """An input of a stage: where it lies and what it is (a manifest id or the hash of a bundle's part)."""

    path: Path
    id: str


Execute = Callable[["StageCall", Callable[..., None]], None]  # runs a stage's function, here or in a child process
Call = Callable[[str, Callable[[], Manifest]], Manifest]  # lets Prefect see a stage as a task


@dataclass(frozen=True, slots=True)
class StageCall:
    """What a stage is run with. `function` is a name in flows.stages; `heavy` ones load torch."""

    function: str
    round: int
    control: str | None
    config: Config
    inputs: Mapping[str, Path]
    out: Path
    heavy: bool
    look: int


def plain_call(name: str, run: Callable[[], Manifest]) -> Manifest:
    """Without Prefect."""
    return run()


class RoundRun:
    """One round being run. Holds the lock's loop, the frozen configuration and how stages are executed."""

    def __init__(
        self, loop: Loop, folder: RoundFolder, observer: Observer, execute: Execute, call: Call = plain_call
    ) -> None:
        self.loop = loop
        self.folder = folder
        self.config = load.parse(json.loads(folder.config_json()), str(folder.path / "config.json"))
        self.control = folder.kind.removeprefix("control-") if folder.kind != "round" else None
        self._observer = observer
        self._execute = execute
        self._call = call

    # ------------------------------------------------------------ stages

    def stage(self, name: str, inputs: Mapping[str, Source], *, heavy: bool = True) -> Source:
        """Run a stage unless its result from these inputs is there already."""
        manifest = self._call(name, lambda: self._stage(name, heavy, inputs))
        return Source(self.folder.path / name, manifest.id)

    def _stage(self, name: str, heavy: bool, inputs: Mapping[str, Source]) -> Manifest:
        ids = {key: source.id for key, source in inputs.items()}
        stage = StageDir(self.folder.path, name)
        done = stage.committed(inputs=ids)
        if done is not None:
            self._observer.stage_finished(self.folder, name, wall_s(stage.path), resumed=True)
            return done
        key = StageKey(name, code_version(), self._config_sha(), ids)
        self._observer.stage_started(self.folder, name, self._expected(name))
        started_s = time.monotonic()
        out = stage.begin(key)
        paths = {key: source.path for key, source in inputs.items()}
        look = self.loop.state.look(gate_set(self.config, self.folder.round))
        call = StageCall(name, self.folder.round, self.control, self.config, paths, out, heavy, look)
        try:
            self._execute(call, lambda *a, **info: self._observer.progress(name, *a, **info))
        except Exception as error:
            self._observer.stage_failed(self.folder, name, str(error))
            raise
        took_s = time.monotonic() - started_s
        timing = read_timing(out) | {"wall_s": round(took_s, 3)}
        (out / "timing.json").write_text(json.dumps(timing) + "\n", encoding="utf-8")
        manifest = stage.commit(key)
        self._observer.stage_finished(self.folder, name, took_s, resumed=False)
        return manifest

    def _config_sha(self) -> str:
        return sha256_json(self.config.model_dump(mode="json", exclude=set(IRRELEVANT)))

    def _expected(self, name: str) -> float | None:
        """How long the stage took in the last round that ran it."""
        for record in reversed(self.loop.state.rounds):
            taken = wall_s(self.loop.path / record.folder / name)
            if taken and record.kind == "round":
                return taken
        return None

    # ------------------------------------------------------------ inputs

    def part(self, part: Part) -> Source:
        """A part of a bundle. Raises CorruptArtefact where the stage that made it is damaged."""
        round_name, stage, *_ = *Path(part.path).parts, "", ""
        if self.loop.state.find(round_name) is not None:
            self._finished(round_name, stage)
        return Source(self.loop.resolve(part), part.sha256)

    def earlier(self, stage: str) -> dict[str, Source]:
        """The stage's results in all finished rounds of this loop, as inputs `stage@001`, ... Raises CorruptArtefact.

        A round that was given up, or that found too little to train on, may have ended before the stage.
        """
        found: dict[str, Source] = {}
        for record in self.loop.state.rounds:
            if record.kind == "round" and 0 < record.round < self.folder.round:
                reached = record.verdict == "promoted" or (record.verdict == "rejected" and stage == "search")
                if reached or (self.loop.path / record.folder / stage).is_dir():
                    found[f"{stage}@{record.round:03d}"] = self._finished(record.folder, stage)
        return found

    def of_round(self, round_number: int, stage: str) -> Source:
        """A stage of a finished round. Raises CorruptArtefact."""
        return self._finished(folder_name(round_number), stage)

    def _finished(self, round_name: str, stage: str) -> Source:
        """Later rounds were built on it, so it is not made again: what is damaged needs a person."""
        folder = self.loop.path / round_name
        try:
            manifest = StageDir(folder, stage).read()
            if manifest is None:
                raise CorruptArtefact(f"{folder / stage} is missing")
        except CorruptArtefact as error:
            raise CorruptArtefact(
                f"{error}; {round_name} is finished and is not done again: restore {folder / stage} from a copy, or "
                "begin another loop with --set loop.name=NAME"
            ) from error
        return Source(folder / stage, manifest.id)


def read_timing(stage: Path) -> dict[str, float]:
    """What a stage's timing.json holds; empty where there is none."""
    try:
        return dict(json.loads((stage / "timing.json").read_text(encoding="utf-8")))
    except (OSError, ValueError):
        return {}


def wall_s(stage: Path) -> float:
    return float(read_timing(stage).get("wall_s", 0.0))


def read_metrics(stage: Path) -> dict[str, float]:
    """The values of a stage's metrics.jsonl; empty where there is none."""
    path = stage / "metrics.jsonl"
    if not path.exists():
        return {}
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return {row["name"]: row["value"] for row in rows}


# ---------------------------------------------------------------- rounds


def run_base(run: RoundRun) -> RoundRecord:
    """Round 0: the bundle of the base model, recorded like any other round."""
    problems = run.stage("problems", {}, heavy=False)
    base = run.stage("base", {"problems": problems})
    policy = _model(base.path)
    source = Source(policy, base.id)
    run.stage("evaluate", {"problems": problems, "policy": source})
    difficulty = run.stage("difficulty", {"problems": problems, "policy": source})
    parts = _fit_parts(run, problems, base, source, difficulty, {}, None)
    bundle = Bundle(0, run.loop.part(policy), difficulty=_fitted(run, difficulty), **parts)
    metrics: dict[str, float] = {}
    for stage in ("evaluate", "difficulty", *PARTS):
        metrics |= read_metrics(run.folder.path / stage)
    record = RoundRecord(
        0, "base", "the base model, as it is", metrics=metrics, models={"champion": bundle.policy.sha256}
    )
    return run.loop.finish(run.folder, record, bundle)


def run_improvement(run: RoundRun) -> RoundRecord:
    """One improvement round. The old champion stays unless the gate says otherwise."""
    champion = run.loop.state.champion
    assert champion is not None, "round 0 comes first"
    n = run.folder.round
    policy = run.part(champion.policy)
    earlier = run.earlier("search")
    problems = run.stage("problems", {**earlier, **_first_sets(run)}, heavy=False)
    if not _has_problems(problems.path):
        raise NothingToDo("nothing new and nothing unsolved: every training problem was searched and solved")
    baseline = run.stage("baseline", {"problems": problems, "policy": policy})
    searched = run.stage("search", {"problems": problems, "policy": policy, **_search_parts(run, champion)})
    base = run.of_round(0, "base")
    try:
        selected = run.stage(
            "select",
            {"problems": problems, "base": base, **earlier, **run.earlier("select"), f"search@{n:03d}": searched},
            heavy=False,
        )
        trained = run.stage("distill", {"rows": selected, "base": base, "policy": policy})
    except TrainingError as error:
        return _finish(run, "rejected", f"training failed, the champion stays: {error}", None)
    challenger = Source(_model(trained.path), trained.id)
    evaluation = run.stage("evaluate", {"problems": problems, "policy": challenger})
    gate = run.stage(
        "gate", {"problems": problems, "baseline": baseline, "evaluate": evaluation, "select": selected}, heavy=False
    )
    verdict = json.loads((gate.path / "verdict.json").read_text(encoding="utf-8"))
    winner = challenger if verdict["promoted"] else policy
    fresh = {} if verdict["promoted"] else {"search": searched}
    old = {"previous": run.part(champion.difficulty)} if champion.difficulty else {}
    difficulty = run.stage("difficulty", {"problems": problems, "policy": winner, **old, **fresh})
    answers = {**earlier, f"search@{n:03d}": searched}
    parts = _fit_parts(run, problems, base, winner, difficulty, answers, champion)
    reason = _reason(verdict)
    if verdict["promoted"]:
        bundle = Bundle(n, run.loop.part(challenger.path), difficulty=_fitted(run, difficulty), **parts)
        return _finish(run, "promoted", reason, bundle)
    refitted = replace(champion, difficulty=_fitted(run, difficulty) or champion.difficulty, **parts)
    return _finish(run, "rejected", reason, refitted if refitted != champion else None)


def _fit_parts(
    run: RoundRun,
    problems: Source,
    base: Source,
    policy: Source,
    pools: Source,
    answers: Mapping[str, Source],
    champion: Bundle | None,
) -> dict[str, Part | None]:
    """The trained parts of the bundle, fitted to the gate's winner; where one comes to nothing, the old one stays."""
    inputs = {"problems": problems, "base": base, "policy": policy, "pools": pools, **answers}
    config = run.config
    wanted = {"verifier": config.verifier.type == "trained", "reviser": config.revision.enabled}
    wanted["table"] = config.table.enabled
    parts: dict[str, Part | None] = {}
    for name in PARTS:
        old: Part | None = getattr(champion, name) if champion else None
        if not wanted[name]:
            parts[name] = None
            continue
        given = inputs | ({"previous": run.part(old)} if old else {})
        if name == "table":
            given = {"problems": problems, "policy": policy, "pools": pools}
            given |= _what_chooses(run, parts["verifier"], policy, pools, champion)
        made = run.stage(name, given)
        report = json.loads((made.path / "report.json").read_text(encoding="utf-8"))
        parts[name] = run.loop.part(made.path) if report["usable"] else old
    return parts


def _search_parts(run: RoundRun, champion: Bundle) -> dict[str, Source]:
    """The parts of the champion that the round's search asks."""
    wanted = {"verifier"} if uses_verifier(run.config) else set[str]()
    wanted |= {"difficulty", "table"} if uses_table(run.config) else set[str]()
    return {name: run.part(part) for name, part in champion.parts().items() if name in wanted}


def _what_chooses(
    run: RoundRun, verifier: Part | None, policy: Source, pools: Source, champion: Bundle | None
) -> dict[str, Source]:
    """What the winner's StrategyTable is fitted with: its verifier, and its difficulty predictor, if one is usable."""
    stayed = champion is not None and policy.id == champion.policy.sha256
    difficulty = _fitted(run, pools) or (champion.difficulty if champion and stayed else None)
    parts = {"verifier": verifier, "difficulty": difficulty}
    return {name: run.part(part) for name, part in parts.items() if part}


def run_control(run: RoundRun) -> RoundRecord:
    """What the gain is compared with: equal rows without search, or equal training on the base's own data.

    Starts from what the last finished round started from; never promotes and costs no look.
    """
    n = run.folder.round
    problems, selected = run.of_round(n, "problems"), run.of_round(n, "select")
    base = run.of_round(0, "base")
    policy = Source(_model(base.path), base.id)
    if run.control == "random":
        policy = _searched_with(run, n)
        plain, others = _searches(run)
        drawn = {"search": run.stage("search", others)} if others else {}
        rows = run.stage(
            "select", {"problems": problems, "base": base, "reference": selected, **plain, **drawn}, heavy=False
        )
    else:
        promoted = {name: source for name, source in run.earlier("select").items() if _promoted(run.loop, name)}
        rows = run.stage("select", {"problems": problems, "base": base, "reference": selected, **promoted}, heavy=False)
    trained = run.stage("distill", {"rows": rows, "base": base, "policy": policy})
    challenger = Source(_model(trained.path), trained.id)
    run.stage("evaluate", {"problems": problems, "policy": challenger})
    metrics = read_metrics(run.folder.path / "evaluate")
    reason = f"control: {run.control}"
    record = RoundRecord(n, "control", reason, kind=run.folder.kind, metrics=metrics)
    return run.loop.finish(run.folder, record)


def _finish(run: RoundRun, verdict: Any, reason: str, bundle: Bundle | None) -> RoundRecord:
    metrics: dict[str, float] = {}
    for stage in ("problems", "search", "select", "distill", "evaluate", "gate", "difficulty", *PARTS):
        metrics |= read_metrics(run.folder.path / stage)
    looked = (run.folder.path / "gate").is_dir()
    record = RoundRecord(
        run.folder.round,
        verdict,
        reason,
        config_changes=config_changes(run),
        metrics=metrics,
        gate_set=gate_set(run.config, run.folder.round) if looked else None,
    )
    return run.loop.finish(run.folder, record, bundle)


def _reason(verdict: Mapping[str, Any]) -> str:
    """Why, in one line: what the challenger won by, or every check it failed."""
    primary = verdict["primary"]
    if not verdict["promoted"] or primary is None:
        return "; ".join(verdict["reasons"])
    gain, low, high = (100 * primary[name] for name in ("effect", "low", "high"))
    measure = primary["measure"].replace("_", "@") if "pass" in primary["measure"] else primary["measure"]
    return f"{measure} {gain:+.1f} points on the gate (95 % {low:+.1f} to {high:+.1f}), p = {primary['p']:.2g}"


def gate_set(config: Config, round_number: int) -> str:
    """Names the gate set that looks are counted on: generated tasks draw a fresh one each round."""
    fresh = config.task.type in ("countdown", "arithmetic")
    return f"fresh-{round_number:03d}" if fresh else "gate"


def config_changes(run: RoundRun) -> dict[str, Any]:
    """What differs from the configuration of the round before: {"search.samples": [16, 32]}."""
    before = [record for record in run.loop.state.rounds if record.kind == "round"]
    if not before:
        return {}
    path = run.loop.path / before[-1].folder / "config.json"
    try:
        old = load.parse(json.loads(path.read_text(encoding="utf-8")), str(path))
    except (OSError, ValueError, load.InvalidConfig) as error:  # damaged, or of another version: the round still counts
        return {"unknown": [f"{path.parent.name}/config.json cannot be read", str(error)]}
    return {key: list(pair) for key, pair in load.difference(old, run.config).items()}


def _model(stage: Path) -> Path:
    """The policy a stage left: a model folder, or a model.json that refers to one elsewhere."""
    return stage / "model" if (stage / "model").is_dir() else stage / "model.json"


def _first_sets(run: RoundRun) -> dict[str, Source]:
    return {"problems@000": run.of_round(0, "problems")}


def _promoted(loop: Loop, name: str) -> bool:
    """Did the round of an input such as `select@002` make a champion?"""
    record = loop.state.find(f"round-{name.partition('@')[2]}")
    return record is not None and record.verdict == "promoted"


def _has_problems(sets: Path) -> bool:
    return bool(json.loads((sets / "counts.json").read_text(encoding="utf-8"))["search"])


def _fitted(run: RoundRun, difficulty: Source) -> Part | None:
    """The difficulty predictor as a part of the bundle; None where it was found unusable."""
    report = json.loads((difficulty.path / "report.json").read_text(encoding="utf-8"))
    return run.loop.part(difficulty.path) if report["usable"] else None


def _searches(run: RoundRun) -> tuple[dict[str, Source], dict[str, Source]]:
    """The searches whose answers the round's rows were chosen from, for a control that may have plain samples alone.

    First those that drew nothing else: their answers serve as they are, `search@001`, ... Then the others, each with
    the problems and the policy it had, to draw plain samples in their place.
    """
    n = run.folder.round
    searches = run.earlier("search") if run.config.select.rounds == "all" else {}
    plain: dict[str, Source] = {}
    others: dict[str, Source] = {}
    for name, source in {**searches, f"search@{n:03d}": run.of_round(n, "search")}.items():
        number = int(name.partition("@")[2])
        config = json.loads((source.path.parent / "config.json").read_text(encoding="utf-8"))
        if is_plain(config["search"]["strategy"], config.get("verifier", {}).get("type", "none")):
            plain[name] = source
        else:
            others |= {name: source, f"problems@{number:03d}": run.of_round(number, "problems")}
            others[f"policy@{number:03d}"] = _searched_with(run, number)
    return plain, others


def _searched_with(run: RoundRun, round_number: int) -> Source:
    """The champion that a round began with, by the hash its search noted."""
    manifest = StageDir(run.loop.path / folder_name(round_number), "search").read()
    used = manifest.inputs["policy"] if manifest else None
    for move in run.loop.state.moves:
        if move.bundle.policy.sha256 == used:
            return run.part(move.bundle.policy)
    raise UserError(f"no champion before round {round_number} is recorded")


def resume_or_begin(loop: Loop, config: Config, *, kind: str, round_number: int | None) -> RoundFolder:
    """The unfinished round of this kind, or a new one. Raises UserError (exit 2) where CONFIG is another one."""
    folder = loop.unfinished(kind)
    if folder is None:
        return loop.begin_round(load.dump(config), kind=kind, round=round_number)
    frozen = load.parse(json.loads(folder.config_json()), str(folder.path / "config.json"))
    changed = {k: v for k, v in load.difference(frozen, config).items() if k.split(".")[0] not in IRRELEVANT}
    if changed and not any(folder.path.glob("*/manifest.json")):  # nothing was done yet: nothing is lost
        shutil.rmtree(folder.path)
        return loop.begin_round(load.dump(config), kind=kind, round=folder.round)
    if changed:
        shown = ", ".join(f"{key} ({old!r} in the round, {new!r} now)" for key, (old, new) in changed.items())
        error = UserError(
            f"{folder.path.name} is unfinished and goes on with its own configuration, which differs in {shown}: "
            "run with that configuration to finish it, or give it up with --abandon"
        )
        error.exit_code = 2
        raise error
    return folder
