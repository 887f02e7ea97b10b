"""Named crash points: places where a process may be made to die, so that tests can kill it at every one of them.

`RATCHET_CRASH_AT=stage.commit.manifest` ends the process there as SIGKILL would (no handlers, no flushing, exit 137);
`RATCHET_CRASH_AT=stage.commit.manifest:3` does so at the third passage. Without the variable a point costs a dict
look-up. The points stand before and after everything that becomes durable: file renames, stage commits, loop.json.
"""

from __future__ import annotations

import os
from collections import Counter

VARIABLE = "RATCHET_CRASH_AT"

POINTS = (
    "write.temp",  # a file is complete under its temporary name
    "write.renamed",  # the file has its name, the folder is not synced
    "round.begin.folder",  # the round's folder exists, empty
    "round.begin.started",  # started.json is there, config.json is not: the round has not begun
    "round.begin.done",
    "stage.begin.wiped",  # partial results under another key are gone
    "stage.begin.made",  # the work folder exists, without its key
    "stage.begin.done",
    "stage.commit.synced",  # every output is on disk, there is no manifest
    "stage.commit.manifest",  # the manifest is on disk, the folder has its work name
    "stage.commit.renamed",  # the folder has its name, the parent is not synced
    "stage.commit.done",
    "stage.set_aside.named",  # a damaged artefact's reason is written, the artefact is in its place
    "stage.set_aside.done",
    "round.finish.record",  # record.json is in the round's folder, loop.json does not know
    "loop.save.state",  # loop.json is written, its copy is not
    "loop.save.done",  # both are written, the champion link is not moved
    "champion.bundle",  # the new bundle's folder exists, the link points to the old one
    "champion.moved",
)

_passages: Counter[str] = Counter()


def crash_point(name: str) -> None:
    """Die here when RATCHET_CRASH_AT says so."""
    assert name in POINTS, name
    wanted = os.environ.get(VARIABLE)
    if not wanted:
        return
    point, _, nth = wanted.partition(":")
    if point == name:
        _passages[name] += 1
        if _passages[name] == int(nth or 1):
            os._exit(137)
