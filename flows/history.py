"""What a loop has done so far, read from its folder: verdicts, figures with their errors, gains, costs, models.

Nothing is computed twice: stages wrote their figures, this collects them and pairs the rounds. Unfinished rounds and
controls are included as far as they got. No Prefect, no MLflow, no torch; pools are not read, so it answers at once.

distill/efficiency = (pass@1 after - before) / (search@N before - pass@1 before), all on the held-out test problems:
the share of what search gained over one sample that distilling kept. Near 1 the round was limited by its search, near
0 by its distillation. N is the number of samples of the round's search (of a pool, where that is smaller); before the
report is written, the largest measured k up to it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from flows.champion import Bundle
from flows.folders import STAGES
from flows.state import Loop, LoopState, RoundRecord
from search import evaluate, stats
from search.errors import CorruptArtefact, DataError
from search.stats import PairedDifference
from search.types import Spend

Z95 = 1.959964


# ---------------------------------------------------------------- values


@dataclass(frozen=True, slots=True)
class Figure:
    """A measured value with its standard error. Example: Figure(0.231, 0.0094)"""

    value: float
    se: float | None = None

    @property
    def half_width(self) -> float:
        """Half of the 95 % interval, 0 where no error is known."""
        return Z95 * self.se if self.se else 0.0

    @property
    def low(self) -> float:
        return self.value - self.half_width

    @property
    def high(self) -> float:
        return self.value + self.half_width


@dataclass(frozen=True, slots=True)
class Efficiency:
    """distill/efficiency, see the module, with its 95 % interval where it is known.

    Example: Efficiency(0.36, 0.25, 0.47, samples=16, searched=0.69)
    """

    value: float
    low: float | None
    high: float | None
    samples: int  # N
    searched: float  # search@N before


@dataclass(frozen=True, slots=True)
class Cost:
    """What a stage cost. `wall_s` of an unfinished stage is 0."""

    spend: Spend = field(default_factory=Spend)
    wall_s: float = 0.0

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.spend + other.spend, self.wall_s + other.wall_s)

    @property
    def tokens(self) -> int:
        """Tokens computed: generated, prefilled and scored; cached ones are free."""
        return self.spend.generated_tokens + self.spend.prefilled_tokens + self.spend.verifier_tokens


@dataclass(frozen=True, slots=True)
class ModelRef:
    """A model of the loop. Example: ModelRef("round-001/distill/model", "9f86d081884c7d65", Path(...))"""

    path: str  # relative to the loop's folder where it lies inside
    fingerprint: str | None  # sha256 of its weights, 16 hex digits; None: not measured yet
    folder: Path  # the round it comes from: its test figures lie there


@dataclass(frozen=True, slots=True)
class Round:
    """One round or control. Mappings are empty as long as their stage has not run.

    `verdict`: base, promoted, rejected, abandoned, control or unfinished.
    """

    number: int
    kind: str  # "round", "control-random", "control-bootstrap"
    folder: Path
    verdict: str
    reason: str
    before: ModelRef | None  # the champion that the round began with
    challenger: ModelRef | None  # what it made; the base in round 0
    champion: ModelRef | None  # after the round
    metrics: Mapping[str, Figure]  # of all stages; test/... are the challenger's
    before_metrics: Mapping[str, Figure]  # test/... of the champion that the round began with
    champion_metrics: Mapping[str, Figure]  # test/... of the champion after the round
    gains: Mapping[str, PairedDifference]  # "accuracy_greedy", ...: challenger minus champion before, paired, 95 %
    efficiency: Efficiency | None
    costs: Mapping[str, Cost]  # by stage, in order
    filters: Mapping[str, int]  # where the candidates went
    gate: Mapping[str, Any]  # gate/verdict.json
    samples: int | None  # N of the round's search

    @property
    def name(self) -> str:
        """Example: "1", "1 control-random"."""
        return str(self.number) if self.kind == "round" else f"{self.number} {self.kind}"

    @property
    def total(self) -> Cost:
        return sum(self.costs.values(), Cost())

    def group(self, prefix: str) -> dict[str, Figure]:
        """The metrics below a prefix: group("data/")["rows"]."""
        return {name.removeprefix(prefix): f for name, f in self.metrics.items() if name.startswith(prefix)}


@dataclass(frozen=True, slots=True)
class History:
    """A loop's rounds in order, each followed by its controls."""

    name: str
    task: str
    path: Path
    rounds: tuple[Round, ...]
    champion: ModelRef | None
    moves_by_hand: tuple[str, ...] = field(default=())

    @property
    def proper(self) -> list[Round]:
        """Without controls."""
        return [r for r in self.rounds if r.kind == "round"]

    @property
    def base(self) -> Round:
        return self.rounds[0]

    def find(self, number: int, kind: str = "round") -> Round:
        """Raises DataError where there is no such round."""
        found = next((r for r in self.rounds if (r.number, r.kind) == (number, kind)), None)
        if found is None:
            have = ", ".join(r.name for r in self.rounds) or "none"
            raise DataError(f"loop '{self.name}' has no round {number} ({kind}); it has: {have}")
        return found

    def controls(self, number: int) -> list[Round]:
        return [r for r in self.rounds if r.number == number and r.kind != "round"]


# ---------------------------------------------------------------- loading


def load_history(loop_dir: Path, *, gains: Mapping[tuple[int, str], Path] | None = None) -> History:
    """Everything the loop has written so far. Raises DataError where there is no loop, or none of its rounds.

    `gains`: folders whose metrics.jsonl is the report's of (round, kind), for reports that are not committed yet.
    """
    if not loop_dir.is_dir():
        raise DataError(f"no loop in {loop_dir}: start one with `ratchet round CONFIG`, or give --runs-dir")
    loop = Loop.open(loop_dir.parent, loop_dir.name)
    champions = _Champions(loop)
    records = {record.folder: record for record in loop.state.rounds}
    rounds = [
        _load_round(
            loop,
            folder,
            number,
            kind,
            records.get(folder.name),
            champions,
            (gains or {}).get((number, kind), folder / "report"),
        )
        for folder, number, kind in _folders(loop, records)
    ]
    if not rounds:
        raise DataError(f"loop '{loop_dir.name}' has no round yet: start one with `ratchet round CONFIG`")
    return History(
        name=loop.state.name,
        task=loop.state.task,
        path=loop_dir,
        rounds=tuple(rounds),
        champion=champions.now(),
        moves_by_hand=tuple(champions.by_hand),
    )


def _folders(loop: Loop, records: Mapping[str, RoundRecord]) -> list[tuple[Path, int, str]]:
    found = {record.folder: (record.round, record.kind) for record in records.values()}
    for path in loop.path.glob("round-*"):
        number, _, kind = path.name.removeprefix("round-").partition("-")
        if path.name not in found and number.isdigit() and (path / "config.json").exists():
            found[path.name] = (int(number), kind or "round")
    # a control sorts behind its round
    order = sorted(found.items(), key=lambda item: (item[1][0], item[1][1] != "round", item[1][1]))
    return [(loop.path / name, number, kind) for name, (number, kind) in order]


class _Champions:
    """Who was champion before and after each round: the moves of loop.json, replayed between its rounds."""

    def __init__(self, loop: Loop) -> None:
        self.loop = loop
        self.before: dict[str, Bundle | None] = {}
        self.after: dict[str, Bundle | None] = {}
        self.by_hand: list[str] = []
        self._replay(loop.state)

    def _replay(self, state: LoopState) -> None:
        """Times decide only where a move by hand stands among rejected rounds: rounds may take less than a second."""
        moves, champion, owner = list(state.moves), None, _owners(state)
        for record in state.rounds:
            if record.kind != "round":
                continue
            while moves and id(moves[0]) not in owner and moves[0].utc <= record.started_utc:
                champion = self._note(moves.pop(0))
            own = next((i for i, move in enumerate(moves) if owner.get(id(move)) == record.folder), None)
            for move in moves[:own] if own else ():
                champion = self._note(move)
            self.before[record.folder] = champion
            if own is not None:
                champion = moves[own].bundle
                moves = moves[own + 1 :]
            self.after[record.folder] = champion
        for move in moves:
            self._note(move)

    def _note(self, move: Any) -> Bundle:
        verb = "rolled back" if move.action == "rollback" else "moved"
        self.by_hand.append(f"champion {verb} to {move.bundle.policy.path} on {move.utc[:10]}: {move.reason}")
        return move.bundle

    def of(self, folder: Path, number: int) -> tuple[ModelRef | None, ModelRef | None]:
        """The champion before and after a round or control; an unfinished one began with today's."""
        round_name = f"round-{number:03d}"
        before = self.before.get(round_name, self.loop.state.champion)
        after = before if folder.name != round_name else self.after.get(round_name, self.loop.state.champion)
        return self._ref(before), self._ref(after)

    def now(self) -> ModelRef | None:
        return self._ref(self.loop.state.champion)

    def _ref(self, bundle: Bundle | None) -> ModelRef | None:
        if bundle is None:
            return None
        folder = self.loop.path / bundle.policy.path.split("/", 1)[0]
        return ModelRef(bundle.policy.path, _fingerprint(folder), folder)


def _owners(state: LoopState) -> dict[int, str]:
    """Which moves were made by a round: id of the move -> the round's folder. The others were made by hand."""
    waiting = [record for record in state.rounds if record.verdict in ("base", "promoted", "rejected")]
    owners: dict[int, str] = {}
    for move in state.moves:
        for record in waiting:
            made = move.bundle.round == record.round and record.verdict != "rejected"
            if move.action == "refit":
                made = any(part.path.startswith(f"{record.folder}/") for part in move.bundle.parts().values())
            if made and move.reason == record.reason and move.action != "rollback":
                owners[id(move)] = record.folder
                waiting.remove(record)
                break
    return owners


def _load_round(
    loop: Loop, folder: Path, number: int, kind: str, record: RoundRecord | None, champions: _Champions, report: Path
) -> Round:
    before, after = champions.of(folder, number)
    challenger = _challenger(loop.path, folder)
    gate = read_json(folder / "gate" / "verdict.json")
    verdict, reason = _verdict(record, gate, number)
    if record is None and verdict == "promoted":  # the report is written before the verdict is recorded
        after = challenger
    metrics = _all_metrics(folder) | read_metrics(report)
    before_metrics = _test_metrics(before.folder) if before and number else {}
    samples = read_json(folder / "config.json").get("search", {}).get("samples")
    gains, efficiency = _stored_gains(report)
    if number and before and not gains:
        gains = greedy_gain(before.folder, folder)
        efficiency = distill_efficiency(before_metrics, metrics, samples)
    return Round(
        number=number,
        kind=kind,
        folder=folder,
        verdict=verdict,
        reason=reason,
        before=before if number else None,
        challenger=challenger,
        champion=after,
        metrics=metrics,
        before_metrics=before_metrics,
        champion_metrics=_test_metrics(after.folder) if after else {},
        gains=gains,
        efficiency=efficiency,
        costs=_costs(folder),
        filters={name: n for name, n in read_json(folder / "select" / "counts.json").items() if isinstance(n, int)},
        gate=gate,
        samples=samples,
    )


def _verdict(record: RoundRecord | None, gate: Mapping[str, Any], number: int) -> tuple[str, str]:
    if record is not None:
        return record.verdict, record.reason
    if gate and number:
        return ("promoted" if gate.get("promoted") else "rejected"), "; ".join(map(str, gate.get("reasons", ())))
    return "unfinished", "not finished: `ratchet round` resumes it"


def _challenger(loop_path: Path, folder: Path) -> ModelRef | None:
    for stage in ("distill", "base"):
        model = folder / stage / "model"
        if model.is_dir():
            return ModelRef(model.relative_to(loop_path).as_posix(), _fingerprint(folder), folder)
        reference = read_json(folder / stage / "model.json")
        if reference:
            return ModelRef(str(reference.get("path")), _fingerprint(folder), folder)
    return None


# ---------------------------------------------------------------- gains


def distill_efficiency(
    before: Mapping[str, Figure], after: Mapping[str, Figure], samples: int | None
) -> Efficiency | None:
    """See the module. None where a figure is missing, or search gained nothing over one sample."""
    sizes = [k for k in measured_sizes(before, "search") if samples is None or k <= samples]
    one, then = before.get("test/pass_at_1"), after.get("test/pass_at_1")
    searched = before[f"test/search_at_{sizes[-1]}"] if sizes else None
    if one is None or then is None or searched is None or searched.value <= one.value:
        return None
    ratio = (then.value - one.value) / (searched.value - one.value)
    return Efficiency(ratio, None, None, sizes[-1], searched.value)


def measured_sizes(metrics: Mapping[str, Figure], figure: str) -> list[int]:
    """The k of test/{figure}_at_{k}, ascending: measured_sizes(metrics, "pass") -> [1, 4, 16, 64]."""
    start = f"test/{figure}_at_"
    return sorted(int(name.removeprefix(start)) for name in metrics if name.removeprefix(start).isdigit())


def paired(before: Mapping[str, float], after: Mapping[str, float]) -> PairedDifference | None:
    """after - before over the problems that both hold, with a 95 % interval; None where there are fewer than two."""
    keys = [key for key in before if key in after]
    if len(keys) < 2:
        return None
    return stats.paired_difference([before[key] for key in keys], [after[key] for key in keys])


def greedy_gain(before: Path, after: Path) -> dict[str, PairedDifference]:
    a, b = greedy_outcomes(before), greedy_outcomes(after)
    gain = paired(a, b) if a and b else None
    return {"accuracy_greedy": gain} if gain else {}


def greedy_outcomes(folder: Path) -> dict[str, float]:
    """Problem key -> 1 solved, 0 not, by the greedy answers of a round's model to the test problems."""
    shards = shard_files(folder, "greedy-test")
    return {key: float(right) for key, right in evaluate.read_outcomes(shards).solved.items()} if shards else {}


def shard_files(folder: Path, name: str) -> list[Path]:
    """The result files of a finished evaluation of a round: merged, or its shards."""
    merged = folder / "evaluate" / f"{name}.jsonl"
    return [merged] if merged.exists() else sorted((folder / "evaluate" / name).glob("shard-*.jsonl"))


def _stored_gains(report: Path) -> tuple[dict[str, PairedDifference], Efficiency | None]:
    """What the round's report wrote."""
    rows = read_metrics(report)
    gains: dict[str, PairedDifference] = {}
    for name, figure in rows.items():
        bounds = [rows[end].value for part in ("low", "high", "n") if (end := f"{name}_{part}") in rows]
        if name.startswith("gain/") and figure.se is not None and len(bounds) == 3:
            low, high, n = bounds
            gains[name.removeprefix("gain/")] = PairedDifference(figure.value, figure.se, low, high, int(n))
    found = [rows.get(f"distill/efficiency{end}") for end in ("", "_low", "_high", "_samples", "_searched")]
    values = [figure.value for figure in found if figure is not None]
    if len(values) < len(found):
        return gains, None
    value, low, high, samples, searched = values
    return gains, Efficiency(value, low, high, int(samples), searched)


# ---------------------------------------------------------------- files


def read_metrics(stage: Path) -> dict[str, Figure]:
    """A stage's metrics.jsonl; empty where it has not run. Raises CorruptArtefact for what is not its format."""
    path = stage / "metrics.jsonl"
    try:
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        return {row["name"]: Figure(float(row["value"]), row.get("se")) for row in rows if row["value"] is not None}
    except FileNotFoundError:
        return {}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CorruptArtefact(f"{path} is not a metrics file ({error!r}): `ratchet round` redoes its stage") from error


def _all_metrics(folder: Path) -> dict[str, Figure]:
    merged: dict[str, Figure] = {}
    for stage in STAGES:
        if stage != "baseline":  # the champion's figures, under the same names
            merged |= read_metrics(folder / stage)
    return merged


def _test_metrics(folder: Path) -> dict[str, Figure]:
    return {name: figure for name, figure in read_metrics(folder / "evaluate").items() if name.startswith("test/")}


def _costs(folder: Path) -> dict[str, Cost]:
    return dict(_each_cost(folder))


def _each_cost(folder: Path) -> Iterator[tuple[str, Cost]]:
    for stage in STAGES:
        path = folder / stage
        if not path.is_dir():
            continue
        known = Spend().to_json()
        spend = Spend(**{name: n for name, n in read_json(path / "spend.json").items() if name in known})
        yield stage, Cost(spend, float(read_json(path / "timing.json").get("wall_s", 0.0)))


def _fingerprint(folder: Path) -> str | None:
    """Of the model that answered the test problems: written in every result, so the first line is enough."""
    for path in shard_files(folder, "greedy-test")[:1]:
        with path.open(encoding="utf-8") as lines:
            first = lines.readline()
        return str(json.loads(first)["model"]) if first else None
    return None


def read_json(path: Path) -> dict[str, Any]:
    """A small JSON object; empty where the file is not there (yet). Raises CorruptArtefact."""
    try:
        data = json.loads(path.read_bytes())
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise CorruptArtefact(f"{path} is not JSON ({error}): `ratchet round` redoes its stage") from error
    if not isinstance(data, dict):
        raise CorruptArtefact(f"{path} holds no JSON object: `ratchet round` redoes its stage")
    return data
