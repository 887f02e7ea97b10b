"""What `ratchet eval` keeps under runs/<loop>/eval: a folder for each search of a set of problems.

A folder is named by a hash of all that decides what is in it (model, engine, sampling, seed, problems, strategy,
budget, verifier, the code that searches), so results of different settings never mix, and equal ones are reused. In
it: cell.json (what was hashed), shard-*.jsonl (search results), shard-*.unfinished.json (what problems cost that a cap
cut off, all calls together), timing.jsonl, and of a complete search result.json.
Independent samples are kept in blocks: samples 0..15, and later 16..63 beside them. Any folder may be deleted.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from configs.schema import Config
from flows.artefacts import atomic_write, sha256_file, sha256_json
from search.engines.reference import policy_path
from search.evaluate import Outcomes, joined, pool_figures, read_outcomes, reduce_pool
from search.evaluate import PoolFigures as Figures
from search.results import partial_path, read_partial, read_results, read_unfinished
from search.strategies import OPTIMAL, VOTES, Spec
from search.thresholds import GRID, needs_fit
from search.types import Budget, Problem, SearchResult, Spend

SHARD_SAMPLES = 4000  # about as many answers are committed together
_SCORING = 0.05  # of the work of drawing an answer, about
_ONLY_SPEED = frozenset(  # settings of engines that decide no result
    {"device", "batch_tokens", "max_batch_rows", "cache_tokens", "processes"}
    | {"tensor_parallel", "gpu_memory_fraction", "kv_cache_gib", "max_num_seqs", "block_size", "enforce_eager"}
    | {"own_process", "url", "api_key_env", "max_concurrency", "timeout_s", "retries", "backoff_s"}
)
_OF_A_MODEL = frozenset({".safetensors", ".json", ".jinja", ".model", ".txt"})  # weights, chat template, vocabulary


@dataclass(frozen=True, slots=True)
class Cell:
    """One search to be done or reused. Without `strategy`: samples `first`.. of the shared pool, or (`scores`) their
    scores."""

    folder: Path
    name: str  # "beam @ 16"
    strategy: str
    unit: str
    amount: float
    shard_problems: int
    first: int = 0
    verified: bool = False
    scores: Path | None = None  # the block that is scored

    @property
    def weight(self) -> float:
        """Answers' worth of work on a problem, about."""
        return self.amount * (_SCORING if self.scores else 1.0) if self.unit == "samples" else 1.0

    @property
    def budget(self) -> Budget:
        return Budget(self.unit, self.amount)  # pyright: ignore[reportArgumentType]

    def num_stored(self) -> int:
        """Problems whose results are there."""
        return sum(count_lines(path) for path in self.folder.glob("shard-*.jsonl"))

    def shard(self, number: int) -> Path:
        return self.folder / f"shard-{number:05d}.jsonl"

    def wall_s(self) -> float:
        """Seconds that its searches took, all calls together, on the processes that shared them."""
        path = self.folder / "timing.jsonl"
        lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        rows = [json.loads(line) for line in lines if line.endswith("}")]
        return sum(row["wall_s"] / row["processes"] for row in rows)

    def unfinished(self) -> Spend:
        """What problems have cost that a cap cut off, all calls together; in no result, also where they were done
        later."""
        return sum(map(read_unfinished, self._shards()), Spend())

    def generated_tokens(self) -> int:
        """All that was generated for it and is accounted for: results, what a cap cut off, and its threshold's fit."""
        if self.scores:  # their samples' own
            return 0
        fit = read_fit(self)
        finished = (result.spend.generated_tokens for path in self._shards() for result in kept(path).values())
        return (fit["tokens"] if fit else 0) + self.unfinished().generated_tokens + sum(finished)

    def _shards(self) -> list[Path]:
        """The shards that were begun, there or not."""
        names = {path.name.partition(".")[0] for path in self.folder.glob("shard-*")}
        return [self.folder / f"{name}.jsonl" for name in sorted(names)]

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | {"folder": str(self.folder), "scores": str(self.scores) if self.scores else None}

    @classmethod
    def from_json(cls, row: Mapping[str, Any]) -> Cell:
        scores = Path(row["scores"]) if row["scores"] else None
        return cls(**{**row, "folder": Path(row["folder"]), "scores": scores})


class Store:
    """The folders of one model on one set of problems."""

    def __init__(
        self,
        root: Path,
        config: Config,
        policy: Path,
        split: str,
        problems: Sequence[Problem],
        num: int,
        fit: Sequence[Problem] = (),
        choosing: Sequence[Path] = (),
    ):
        """`num`: processes that will share the problems, where shards are new. `fit`: where thresholds are fitted.
        `choosing`: folders of the StrategyTable and of the predictor that it is asked with."""
        self.root = root
        self._problems = problems
        self._processes = num
        hidden = {"path", "test_path", "grader_workers"}
        self._identity: dict[str, Any] = {
            "code": _code(),
            "model": fingerprint(policy, config),
            "engine": config.engine.model_dump(mode="json", exclude=set(_ONLY_SPEED)),
            "dtype": config.model.dtype,
            "task": config.task.model_dump(mode="json", exclude=hidden),
            "sampling": config.sampling.model_dump(mode="json"),
            "seed": [config.loop.seed, "evaluate", split],
            "problems": _hash_problems(problems),
            "num_problems": len(problems),
        }
        self._verifier = config.verifier.model_dump(mode="json")
        self._fit = {"fitted_on": _hash_problems(fit), "grid": list(GRID)}
        self._choosing = choosing

    @property
    def model(self) -> str:
        """The policy's fingerprint."""
        return self._identity["model"]

    def search(self, spec: Spec, budget: Budget, fingerprint: str | None) -> Cell:
        """A strategy's own search. `fingerprint` of the verifier that it asks; None: it asks none."""
        bare = Spec(spec.name, spec.options)
        plain = bare.text if bare.needs == spec.needs else spec.text  # how answers vote is no part of a search
        name = f"{plain} @ {budget.amount:g}" + ("" if budget.unit == "samples" else f" {budget.unit}")
        asked = {"fingerprint": fingerprint, **self._verifier} if fingerprint is not None else None
        what = {"strategy": plain, "unit": budget.unit, "amount": budget.amount, "verifier": asked}
        what |= self._fit if needs_fit(spec) else {}
        what |= {"chosen_by": _hash_folders(self._choosing)} if spec.name == OPTIMAL else {}
        return self._cell(name, what, strategy=plain, unit=budget.unit, amount=budget.amount, verified=bool(asked))

    def pool(self, num: int) -> list[Cell]:
        """The blocks that hold the first `num` independent samples of every problem: those there, and what lacks."""
        stored = [(row, list(folder.glob("shard-*.jsonl"))) for folder, row in self._known() if "first" in row]
        whole = len(self._problems)
        known = [(row["first"], row["amount"], sum(map(count_lines, s)) == whole) for row, s in stored if s]
        blocks: list[Cell] = []
        drawn = 0
        while drawn < num:
            usable = [n for first, n, done in known if first == drawn and (done or n <= num - drawn)]
            size = max(usable, default=num - drawn)
            what = {"first": drawn, "amount": size}
            name = f"samples {drawn}-{drawn + size - 1}" if drawn else f"{size} samples"
            blocks.append(self._cell(name, what, strategy="", unit="samples", amount=size, first=drawn))
            drawn += size
        return blocks

    def scores(self, block: Cell, fingerprint: str) -> Cell:
        """A verifier's scores of a block of samples."""
        what = {"scores": [block.first, block.amount], "verifier": {"fingerprint": fingerprint, **self._verifier}}
        return self._cell(
            f"scores of {block.name}",
            what,
            strategy="",
            unit="samples",
            amount=block.amount,
            first=block.first,
            verified=True,
            scores=block.folder,
            shard_problems=block.shard_problems,
        )

    def _cell(self, name: str, what: dict[str, Any], *, shard_problems: int = 0, **fields: Any) -> Cell:
        folder = self.root / sha256_json(self._identity | what)[:16]
        path = folder / "cell.json"
        if not path.exists():
            folder.mkdir(parents=True, exist_ok=True)
            wanted = SHARD_SAMPLES // max(1, int(fields["amount"] if fields["unit"] == "samples" else 16))
            shard_problems = shard_problems or max(1, min(wanted, -(-len(self._problems) // self._processes)))
            row = {"name": name, "shard_problems": shard_problems, **self._identity, **what}
            atomic_write(path, json.dumps(row, indent=1) + "\n")
        stored = json.loads(path.read_text(encoding="utf-8"))
        return Cell(folder, name, shard_problems=stored["shard_problems"], **fields)

    def forget(self, cells: Sequence[Cell]) -> None:
        """Delete what is stored of these, and the scores of their samples by any verifier, so that it is done again."""
        blocks = [[cell.first, cell.amount] for cell in cells if not cell.strategy and not cell.scores]
        scores = [folder for folder, row in self._known() if row.get("scores") in blocks]
        for folder in {*scores, *(cell.folder for cell in cells)}:
            files = [
                *folder.glob("shard-*"),
                *folder.glob("result*.json"),
                folder / "timing.jsonl",
                folder / "fit.json",
            ]
            for path in files:
                path.unlink(missing_ok=True)

    def _known(self) -> Iterator[tuple[Path, dict[str, Any]]]:
        """The folders of this model on these problems, and what was hashed of each."""
        for path in sorted(self.root.glob("*/cell.json")):
            row = json.loads(path.read_text(encoding="utf-8"))
            if all(row.get(name) == value for name, value in self._identity.items()):
                yield path.parent, row


# ---------------------------------------------------------------- reading


def kept(shard: Path) -> dict[str, SearchResult]:
    """By problem, what a shard holds and what an interrupted call had finished of it."""
    results = itertools.chain(read_partial(partial_path(shard)), read_results(shard) if shard.exists() else ())
    return {result.problem.key: result for result in results}


def fitted(cell: Cell) -> float | None:
    """The threshold that was fitted for a cell's strategy; None: there is none."""
    fit = read_fit(cell)
    return None if fit is None else fit["threshold"]


def read_fit(cell: Cell) -> dict[str, Any] | None:
    """{"threshold", "tried": [{"threshold", "accuracy", "flops"}], "tokens"}; None: nothing was fitted."""
    path = cell.folder / "fit.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def outcomes(cell: Cell, spec: Spec, order: Mapping[str, int]) -> Outcomes:
    """What a strategy's search came to, under its rule. Of a complete one the outcomes are kept."""
    path = cell.folder / ("result.json" if spec.vote is None else f"result-{spec.vote}.json")
    if path.exists():
        return _outcomes_of(json.loads(path.read_text(encoding="utf-8")))
    found = read_outcomes(cell.folder, VOTES[spec.vote] if spec.vote else None)
    if len(found.solved) == len(order):
        accuracy = found.accuracy
        row = {"accuracy": accuracy.value, "se": accuracy.se, "n": accuracy.n, "ungraded": found.num_ungraded}
        row |= {"failures": found.failures, "approximate": found.approximate}
        row |= {"spend": found.spend.to_json(), "solved": dict(found.solved)}
        atomic_write(path, json.dumps(row) + "\n")
    return found


def _outcomes_of(row: Mapping[str, Any]) -> Outcomes:
    spend = Spend(**row["spend"])
    return Outcomes(row["solved"], row["ungraded"], spend, tuple(row["failures"]), row.get("approximate", False))


def figures(
    blocks: Sequence[Cell], ks: Sequence[int], rules: Sequence[str], order: Mapping[str, int], delimiter: str
) -> Figures | None:
    """The figures of a pool in blocks, over the problems that all of them hold; None where there is none."""
    drawn = joined([block.folder for block in blocks], order, max(ks), delimiter)
    pools = (reduce_pool(result, delimiter) for result in drawn)
    first = next(pools, None)
    return pool_figures(itertools.chain([first], pools), ks, rules) if first else None


def count_lines(path: Path) -> int:
    """Results in a shard; 0 where there is none."""
    if not path.exists():
        return 0
    with path.open("rb") as file:
        return sum(chunk.count(b"\n") for chunk in iter(functools.partial(file.read, 1 << 20), b""))


# ---------------------------------------------------------------- what decides


def fingerprint(policy: Path, config: Config) -> str:
    """Of the policy: its weights, its configuration, tokenizer and chat template; for a server what it is asked for."""
    source = policy_path(policy)
    folder = Path(source)
    digest = hashlib.sha256()
    for place in [folder, *_base_of_adapter(folder)]:
        if not place.is_dir():
            digest.update(f"{place}@{config.model.revision}".encode())
            continue
        for path in sorted(p for p in place.iterdir() if p.is_file() and p.suffix in _OF_A_MODEL):
            digest.update(f"{path.name}\0{sha256_file(path)}\n".encode())
    if config.engine.type == "server":
        digest.update(f"{config.engine.url} {config.engine.model} {config.engine.policy}".encode())
    return digest.hexdigest()[:16]


def _base_of_adapter(folder: Path) -> list[Path]:
    path = folder / "adapter_config.json"
    return [Path(json.loads(path.read_text(encoding="utf-8"))["base_model_name_or_path"])] if path.is_file() else []


def _hash_problems(problems: Sequence[Problem]) -> str:
    rows = [[p.key, p.question, p.answer] for p in problems]
    return hashlib.sha256(json.dumps(rows).encode()).hexdigest()[:16]


def _hash_folders(folders: Sequence[Path]) -> str:
    files = (
        path for folder in folders for path in sorted(folder.iterdir()) if path.suffix in (".json", ".safetensors")
    )
    return sha256_json([[path.name, sha256_file(path)] for path in files])[:16]


def sources() -> list[Path]:
    """The code that decides what a search gives."""
    flows = Path(__file__).resolve().parent
    return [flows / "eval_run.py", *sorted((flows.parent / "search").rglob("*.py"))]


@functools.cache
def _code() -> str:
    """What other code left is not reused."""
    digest = hashlib.sha256()
    for path in sources():
        digest.update(f"{path.name}\0{sha256_file(path)}\n".encode())
    return digest.hexdigest()[:16]
