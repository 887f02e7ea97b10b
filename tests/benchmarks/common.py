"""What several benchmarks need: a tiny trained base model, and a table."""

from __future__ import annotations

import os
from pathlib import Path

from configs.load import load
from configs.schema import Config
from flows.quiet import silence

silence()
os.environ.update(GOMP_SPINCOUNT="0", HF_HUB_OFFLINE="1", OMP_WAIT_POLICY="PASSIVE")


def tiny_base(name: str, folder: Path, examples: int = 20_000) -> tuple[Config, Path]:
    """The configuration of an embedded task, and its base model, trained once on fewer examples than the loop's."""
    from distill import bootstrap

    config = load(name, [f"bootstrap.examples={examples}"])
    if not (folder / "model" / "config.json").is_file():
        folder.mkdir(parents=True, exist_ok=True)
        bootstrap.run(config, {}, folder)
    return config, folder / "model"


def markdown(heads: list[str], rows: list[list[str]]) -> None:
    """Print a table that can be pasted into the README."""
    print("| " + " | ".join(heads) + " |")
    print("|" + "---|" * len(heads))
    for row in rows:
        print("| " + " | ".join(row) + " |")
