"""A round of three stages without models, driven through flows.state, flows.artefacts and flows.child.

    python toy_round.py RUNS ROUNDS [children]   rounds until ROUNDS are done, resuming an unfinished one

Every piece of work is noted in RUNS/work.log before it is done. TOY_FULL_AFTER=k: the disk is full after k bytes.
TOY_CODE: the code version. TOY_SLOW_S: seconds a shard takes. TOY_VERIFY: check hashes in full.
"""

import errno
import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path

from flows import artefacts
from flows.artefacts import StageDir, StageKey, atomic_write, sha256_json
from flows.child import emit, run_child, signals_end_children
from flows.state import Bundle, Loop, RoundFolder, RoundRecord
from search.errors import RatchetError

SHARDS = 4
CONFIG = json.dumps({"shards": SHARDS}) + "\n"
STUBBORN = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(600)"


def note(line: str) -> None:
    with Path(os.environ["TOY_LOG"]).open("a") as file:
        file.write(line + "\n")


def digest(*parts: object) -> str:
    return hashlib.sha256(repr(parts).encode()).hexdigest()


def search(number: int, inputs: Mapping[str, Path], out: Path) -> None:
    if os.environ.get("TOY_GRANDCHILD"):
        subprocess.Popen([sys.executable, "-c", STUBBORN], start_new_session=bool(number % 2))
    policy = (inputs["policy"] / "model.safetensors").read_bytes() if "policy" in inputs else b""
    for shard in range(SHARDS):
        path = out / f"shard-{shard:05d}.jsonl"
        if not path.exists():
            note(f"{out.parent.name}/search/{path.name}")
            time.sleep(float(os.environ.get("TOY_SLOW_S", "0")))
            atomic_write(path, json.dumps({"shard": shard, "value": digest(number, shard, policy)}) + "\n")
        emit({"event": "progress", "done": shard + 1, "total": SHARDS})
    (out / "log.txt").write_text(f"pid {os.getpid()}\n")


def select(_number: int, inputs: Mapping[str, Path], out: Path) -> None:
    note(f"{out.parent.name}/select")
    rows = [p.read_text() for p in sorted(inputs["search"].glob("shard-*.jsonl"))]
    atomic_write(out / "rows.jsonl", "".join(rows))


def distill(_number: int, inputs: Mapping[str, Path], out: Path) -> None:
    note(f"{out.parent.name}/distill")
    weights = hashlib.sha512((inputs["select"] / "rows.jsonl").read_bytes()).digest()
    header = json.dumps({"w": {"dtype": "U8", "shape": [64], "data_offsets": [0, 64]}}).encode()
    (out / "model").mkdir(exist_ok=True)
    atomic_write(out / "model" / "model.safetensors", len(header).to_bytes(8, "little") + header + weights)


STAGES = {"search": search, "select": select, "distill": distill}


def one_stage(loop: Loop, folder: RoundFolder, name: str, inputs: Mapping[str, Path], children: bool) -> Path:
    stage = StageDir(folder.path, name)
    ids = {key: artefacts.tree_sha(path, loop.path) for key, path in inputs.items()}
    verify = bool(os.environ.get("TOY_VERIFY"))
    if stage.committed(inputs=ids, verify=verify) is None:
        key = StageKey(name, os.environ.get("TOY_CODE", "v1"), sha256_json(CONFIG), ids)
        out = stage.begin(key)
        if children:
            arguments = [f"{key}={path}" for key, path in inputs.items()]
            run_child(
                ["toy_round", "stage", name, str(folder.round), str(out), *arguments],
                what=f"stage {name}",
                log_path=out / "log.txt",
                env={"PYTHONPATH": str(Path(__file__).parent)},
                timeout_s=60,
                grace_s=0.2,
            )
        else:
            STAGES[name](folder.round, inputs, out)
        stage.commit(key)
    return stage.path


def one_round(loop: Loop, children: bool) -> None:
    folder = loop.unfinished() or loop.begin_round(CONFIG)
    folder.config_json()
    champion = loop.state.champion
    inputs = {} if champion is None else {"policy": loop.resolve(champion.policy)}
    for name in STAGES:
        path = one_stage(loop, folder, name, inputs, children)
        inputs = {name: path}
    bundle = Bundle(folder.round, loop.part(path / "model"))
    verdict = "base" if folder.round == 0 else "promoted" if folder.round % 2 else "rejected"
    gate_set = "file" if folder.round else None
    record = RoundRecord(folder.round, verdict, "toy", counters={"train": SHARDS}, gate_set=gate_set)
    loop.finish(folder, record, bundle if verdict != "rejected" else None)


def fill_disk_after(num_bytes: int) -> None:
    left = [num_bytes]

    def write(descriptor: int, data: memoryview) -> int:
        if not left[0]:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        part = bytes(data)[: left[0]]
        left[0] -= len(part)
        return os.write(descriptor, part)

    artefacts._os_write = write


def main(runs: str, rounds: str, *rest: str) -> None:
    if full := os.environ.get("TOY_FULL_AFTER"):
        fill_disk_after(int(full))
    os.environ.setdefault("TOY_LOG", str(Path(runs, "work.log")))
    with signals_end_children(), Loop.locked(Path(runs), "toy", "the toy round", task="toy") as loop:
        print("locked", flush=True)
        while loop.state.next_round < int(rounds):
            one_round(loop, "children" in rest)


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if sys.argv[1] == "stage":
        given = dict(argument.split("=", 1) for argument in sys.argv[5:])
        STAGES[sys.argv[2]](int(sys.argv[3]), {name: Path(path) for name, path in given.items()}, Path(sys.argv[4]))
    else:
        try:
            main(*sys.argv[1:])
        except RatchetError as error:
            print(f"{type(error).__name__}: {error}", file=sys.stderr)
            raise SystemExit(error.exit_code) from None
