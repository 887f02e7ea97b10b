r"""The symbolic comparison (math-verify), and the worker process it runs in: `python -m search.tasks.symbolic PPID`.

Only search.grading starts this module. Its limits: wall clock by an alarm inside, CPU seconds and address space by the
kernel; the parent kills what does not answer in time. The worker dies with its parent: the kernel sends it SIGKILL
(parent-death signal), and it ends at the end of its input.

math-verify and sympy swallow errors, MemoryError too, and then call two answers different. So a verdict does not count
where the answer took a third of the memory left to the worker: what grows to that may have been refused more (lists,
dictionaries and numbers grow by at most doubling, on top of what they hold). A single allocation larger than the limit
out of nothing would still go unnoticed, and the answer be wrong.

Protocol, one JSON object a line. In: {"gold": str or null, "answer": str}. Out: {"ready": true} once, then for every
line {"equal": bool or null, "canonical": str or null} or {"failed": "time" | "memory" | "error: ..."}.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import resource
import signal
import sys
from collections.abc import Iterator
from fractions import Fraction
from typing import Any

from search.tasks.compare import kinds, unfinished
from search.tasks.math_answers import normal, number_text

_PARENT_DEATH_SIGNAL = 1  # PR_SET_PDEATHSIG
_CANONICAL_S = 1.0


class _OutOfTime(BaseException):
    """Not an Exception: math-verify and sympy swallow those."""


@functools.lru_cache(maxsize=512)
def parse(answer: str) -> list[Any]:
    """What math-verify reads in one answer: a sympy object where it can, and the string as the last resort."""
    from math_verify import LatexExtractionConfig
    from math_verify import parse as read

    config = LatexExtractionConfig(boxed_match_priority=0)
    options: Any = {"parsing_timeout": None, "extraction_mode": "first_match", "raise_on_error": True}
    try:
        return read(f"\\boxed{{{answer}}}", [config], **options)
    except MemoryError:
        raise
    except Exception:  # noqa: BLE001  what cannot be read has no symbolic form
        return []


def equal(gold: str, answer: str) -> bool:
    from math_verify import verify

    try:
        return verify(parse(gold), parse(answer), timeout_seconds=None, raise_on_error=True)
    except MemoryError:
        raise
    except Exception:  # noqa: BLE001  what cannot be compared (a set with a matrix) is not equal
        return False


def canonical(answer: str) -> str:
    """A string that is the same for equal answers, as far as automatic simplification sees it.

    Numbers are compared by value (sqrt(12) is 2*sqrt(3)), everything else by sympy's own form. Kinds of operation are
    part of it, since they decide the grade.
    """
    parsed = parse(answer)
    if not parsed or isinstance(parsed[0], str):
        return normal(answer)
    text = _literal(parsed[0], answer) or _text(parsed[0])
    written = "|".join([text, *sorted(kinds(answer))])
    return written if len(written) <= 1000 else normal(answer)


def _literal(expression: Any, answer: str) -> str | None:
    """A number written out ("12 apples") has the canonical form of that number, as search.tasks.compare gives it."""
    import sympy

    if "_" in answer or unfinished(answer) or not isinstance(expression, sympy.Integer | sympy.Rational):
        return None
    return number_text(Fraction(int(expression.p), int(expression.q)))


def _text(expression: Any) -> str:
    import sympy

    if isinstance(expression, sympy.FiniteSet):
        return "{" + ", ".join(sorted(_text(e) for e in expression.args)) + "}"
    if isinstance(expression, sympy.Tuple):
        return "(" + ", ".join(_text(e) for e in expression.args) + ")"
    if not isinstance(expression, sympy.Expr) or expression.has(sympy.Integral, sympy.Sum, sympy.Limit):
        return str(expression)
    if not expression.is_number:
        return str(sympy.expand(expression.doit()))
    value = complex(expression.evalf(15))
    parts = [0.0 if abs(part) < 1e-12 else part for part in (value.real, value.imag)]
    return "~" + ",".join(f"{part:.10g}" for part in (parts if parts[1] else parts[:1]))


def _answer(request: dict[str, Any]) -> dict[str, Any]:
    gold, answer = request["gold"], request["answer"]
    verdict = equal(gold, answer) if gold is not None else None
    # The verdict stands even where the canonical form takes too long.
    found = normal(answer)
    with contextlib.suppress(Exception, _OutOfTime), _alarm(_CANONICAL_S):
        found = canonical(answer)
    return {"equal": verdict, "canonical": found}


def _on_alarm(signum: int, frame: object) -> None:
    raise _OutOfTime


@contextlib.contextmanager
def _alarm(seconds: float) -> Iterator[None]:
    """Raise _OutOfTime inside after `seconds` of wall clock."""
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


def _limit_cpu(seconds: float) -> None:
    """The kernel ends this process when it has used `seconds` more of CPU (in whole seconds, rounded up)."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    limit = int(used.ru_utime + used.ru_stime + seconds) + 2
    resource.setrlimit(resource.RLIMIT_CPU, (limit, resource.RLIM_INFINITY))


def _peak_bytes() -> int:
    """The largest address space this process ever had; 0 where the system does not say."""
    with contextlib.suppress(OSError), open("/proc/self/status", encoding="ascii") as lines:
        return next((int(line.split()[1]) << 10 for line in lines if line.startswith("VmPeak:")), 0)
    return 0


def _serve_one(line: str, seconds: float, roomy_bytes: int) -> dict[str, Any]:
    """The reply to a line. A worker whose peak is past `roomy_bytes` answers nothing but "memory": replace it."""
    _limit_cpu(seconds)
    try:
        with _alarm(seconds):
            reply = _answer(json.loads(line))
        return reply if _peak_bytes() <= roomy_bytes else {"failed": "memory"}
    except _OutOfTime:
        return {"failed": "time"}
    except (MemoryError, RecursionError) as error:
        return {"failed": "memory" if isinstance(error, MemoryError) else "error: RecursionError"}
    except Exception as error:  # noqa: BLE001  the process boundary: a failure is reported, never raised
        return {"failed": f"error: {type(error).__name__}"}


def _die_with_parent(parent: int) -> None:
    import ctypes

    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PARENT_DEATH_SIGNAL, signal.SIGKILL)
    if os.getppid() != parent:  # it died before the signal was asked for
        os._exit(1)


def main() -> None:
    parent, seconds, memory_mib = int(sys.argv[1]), float(sys.argv[2]), int(sys.argv[3])
    _die_with_parent(parent)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    signal.signal(signal.SIGALRM, _on_alarm)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    out = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # nothing a library prints may reach the protocol
    import logging

    logging.disable(logging.CRITICAL)
    equal("1+x", "x+1")  # imports and parser tables, before the clock counts
    size = memory_mib << 20
    resource.setrlimit(resource.RLIMIT_AS, (size, size))
    used = _peak_bytes()
    roomy_bytes = used + (size - used) // 3
    print(json.dumps({"ready": True}), file=out, flush=True)
    for line in sys.stdin:
        print(json.dumps(_serve_one(line, seconds, roomy_bytes)), file=out, flush=True)


if __name__ == "__main__":
    main()
