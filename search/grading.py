"""Grade responses against gold answers. What may hang, explode or crash runs in worker processes that can be killed.

Three layers: the answer is found and guarded by text alone (search.tasks.math_answers); what exact text and numbers
decide is decided in this process (search.tasks.compare); the rest goes to workers (search.tasks.symbolic) with a wall
clock, a CPU limit and a memory limit for every answer. Never a thread: nothing could stop it there. Any thread may wait
for them; batches of several take turns.

What the verdicts mean
- WRONG: no answer to be found, a refused answer (no honest answer looks like that), an answer that differs.
- UNGRADED: the grader itself failed on this answer (time, memory, crash). Its worker is replaced, the batch goes on.
A failure of the workers to start at all is no verdict but an EngineError.
"""

from __future__ import annotations

import collections
import contextlib
import json
import os
import selectors
import signal
import subprocess
import sys
import tempfile
import threading
import time
import weakref
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from search.errors import EngineError
from search.tasks.compare import bad_gold, gold_answer, is_echo, judge
from search.tasks.math_answers import AnswerType, extract, normal, refused
from search.types import Grade, Graded

_START_S = 120.0  # a worker imports sympy, on a machine that may be busy
_KILL_AFTER_S = 1.5  # past its own alarm, before the parent kills it
_MAX_FAILED_STARTS = 3
_MAX_KILLED_STARTS = 20


@dataclass(frozen=True, slots=True)
class Comparison:
    """What a worker found. `equal` None: not asked for, or `failed` ("time", "memory", "crash", "error: ...")."""

    equal: bool | None
    canonical: str | None
    failed: str | None = None


@dataclass(frozen=True, slots=True)
class Job:
    gold: str | None  # None: only the canonical form is wanted
    answer: str


class GraderPool:
    """`workers` processes, each answer limited to `seconds` of wall clock and of CPU.

    `memory_mib` is the address space a worker may have; an answer that takes a third of it is ungraded already.

    Workers start when the first answer needs one. Close the pool, or use it as a context; it is closed at exit.
    """

    def __init__(self, seconds: float = 5.0, memory_mib: int = 2048, workers: int = 2) -> None:
        self.seconds, self.memory_mib, self.num_workers = seconds, memory_mib, workers
        self.failures: collections.Counter[str] = collections.Counter()  # why answers went ungraded
        self._workers: list[_Worker] = []
        self._lock = threading.Lock()
        self._starter: tuple[int, ThreadPoolExecutor] | None = None  # and the process that it belongs to
        weakref.finalize(self, _stop, self._workers)

    def grade(
        self,
        pairs: Sequence[tuple[str | None, str]],
        answer_type: AnswerType = "math",
        questions: Sequence[str | None] = (),
    ) -> list[Graded]:
        """One verdict for every (gold, response), in order. Never raises for what a response contains.

        gold None gives UNGRADED with the canonical answer. `questions`, one a pair where given: an answer that only
        repeats an expression of its question is wrong. Raises EngineError where no worker can start.
        """
        drafts = [_draft(gold, response, answer_type) for gold, response in pairs]
        jobs = list(dict.fromkeys(job for _, job in drafts if job))
        done = dict(zip(jobs, self.compare(jobs), strict=True))  # equal pairs are compared once
        graded = [draft if job is None else _merge(draft, job, done[job]) for draft, job in drafts]
        if not questions or answer_type != "math":
            return graded
        return [_not_echoed(q, *p, g) for q, p, g in zip(questions, pairs, graded, strict=True)]

    def compare(self, jobs: Sequence[Job]) -> list[Comparison]:
        """The symbolic comparisons, in the workers; in order."""
        if not jobs:
            return []
        with self._lock:
            found = _Supervisor(self, self._workers, jobs).run()
        self.failures.update(c.failed.partition(":")[0] for c in found if c.failed)
        return found

    def start_worker(self) -> _Worker:
        """The parent-death signal fires when the thread that started a worker ends, so one that stays starts them all:
        whoever grades may end."""
        if self._starter is None or self._starter[0] != os.getpid():
            self._starter = os.getpid(), ThreadPoolExecutor(1, thread_name_prefix="grader-starter")
        return self._starter[1].submit(_Worker, self.seconds, self.memory_mib).result()

    def pids(self) -> list[int]:
        """Process ids of the live workers."""
        return [w.process.pid for w in self._workers if w.process.poll() is None]

    def close(self) -> None:
        with self._lock:
            _stop(self._workers)
            if self._starter is not None:
                self._starter[1].shutdown(wait=False)
                self._starter = None

    def __enter__(self) -> GraderPool:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def _draft(gold: str | None, response: str, answer_type: AnswerType) -> tuple[Graded, Job | None]:
    """The verdict without any mathematics, and what is left for a worker to find out."""
    if gold is not None:
        gold = gold_answer(gold, answer_type)
        if bad_gold(gold, answer_type):
            return Graded(Grade.UNGRADED, None), None
    answer = extract(response, answer_type).answer
    if answer is None or refused(answer):
        return Graded(Grade.WRONG if gold is not None else Grade.UNGRADED, None), None
    answer = " ".join(answer.split())  # runs of spaces cost the symbolic reader cubic time
    judged = judge(gold, answer, answer_type)
    draft = Graded(judged.grade or Grade.UNGRADED, judged.canonical)
    if judged.grade is None:
        return draft, Job(gold, answer)
    wanted = answer_type == "math" and judged.canonical is None
    return draft, Job(None, answer) if wanted else None


def _merge(draft: Graded, job: Job, found: Comparison) -> Graded:
    grade = draft.grade
    if job.gold is not None and found.equal is not None:
        grade = Grade.CORRECT if found.equal else Grade.WRONG
    return Graded(grade, draft.answer or found.canonical or normal(job.answer) or None)


def _not_echoed(question: str | None, gold: str | None, response: str, graded: Graded) -> Graded:
    if question is None or gold is None or graded.grade is not Grade.CORRECT:
        return graded
    answer = extract(response).answer
    if answer is not None and is_echo(question, gold_answer(gold, "math"), answer):
        return Graded(Grade.WRONG, graded.answer)
    return graded


def _stop(workers: list[_Worker]) -> None:
    for worker in workers:
        worker.kill()
    workers.clear()


class _Worker:
    """One worker process and the job it has in hand."""

    def __init__(self, seconds: float, memory_mib: int) -> None:
        root = str(Path(__file__).resolve().parents[1])
        path = os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])
        # The safe path keeps a folder named `search` in the current directory from being imported instead of ours.
        env = {**os.environ, "PYTHONPATH": path, "PYTHONSAFEPATH": "1", "OMP_NUM_THREADS": "1"}
        self.errors = tempfile.TemporaryFile()  # noqa: SIM115  it lives as long as the worker
        self.process = subprocess.Popen(
            [sys.executable, "-m", "search.tasks.symbolic", str(os.getpid()), str(seconds), str(memory_mib)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.errors,
            env=env,
        )
        self.ready = False
        self.job: int | None = None
        self.deadline = time.monotonic() + _START_S
        self._buffer = b""

    @property
    def fd(self) -> int:
        assert self.process.stdout is not None
        return self.process.stdout.fileno()

    @property
    def usable(self) -> bool:
        return self.process.poll() is None

    def send(self, index: int, job: Job, seconds: float) -> bool:
        """False where the worker is gone; the job was not begun."""
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(json.dumps({"gold": job.gold, "answer": job.answer}).encode() + b"\n")
            self.process.stdin.flush()
        except OSError:
            return False
        self.job, self.deadline = index, time.monotonic() + seconds
        return True

    def receive(self) -> list[dict[str, object]] | None:
        """Messages that have arrived; None: the worker is gone."""
        data = os.read(self.fd, 1 << 16)
        if not data:
            return None
        *lines, self._buffer = (self._buffer + data).split(b"\n")
        return [json.loads(line) for line in lines]

    def exit_code(self, patience_s: float) -> int:
        """How the process ended; it is killed where it has not within `patience_s`."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            return self.process.wait(patience_s)
        self.process.kill()
        return self.process.wait()

    def last_words(self) -> str:
        self.errors.seek(0)
        return self.errors.read()[-2000:].decode(errors="replace").strip()

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()
        for stream in (self.process.stdin, self.process.stdout, self.errors):
            with contextlib.suppress(OSError):
                if stream is not None:
                    stream.close()


class _Supervisor:
    """Runs one batch of jobs over the workers, replacing those that die or hang."""

    def __init__(self, pool: GraderPool, workers: list[_Worker], jobs: Sequence[Job]) -> None:
        self.pool, self.workers, self.jobs = pool, workers, jobs
        self.waiting = collections.deque(range(len(jobs)))
        self.found: dict[int, Comparison] = {}
        self.retried: set[int] = set()
        self.failed_starts = 0

    def run(self) -> list[Comparison]:
        try:
            while len(self.found) < len(self.jobs):
                self._staff()
                self._assign()
                self._listen()
                self._kill_late()
        except BaseException:
            _stop(self.workers)  # an interrupted batch leaves jobs in flight: start afresh next time
            raise
        return [self.found[i] for i in range(len(self.jobs))]

    def _staff(self) -> None:
        for worker in [w for w in self.workers if w.job is None and not w.usable]:
            self._lose(worker, "crash")
        wanted = min(self.pool.num_workers, len(self.jobs) - len(self.found))
        while len(self.workers) < wanted:
            self.workers.append(self.pool.start_worker())

    def _assign(self) -> None:
        for worker in [w for w in self.workers if w.ready and w.job is None]:
            if not self.waiting:
                return
            index = self.waiting.popleft()
            if not worker.send(index, self.jobs[index], self.pool.seconds + _KILL_AFTER_S):
                self.waiting.appendleft(index)
                self._lose(worker, "crash")

    def _listen(self) -> None:
        busy = [w for w in self.workers if w.job is not None or not w.ready]
        if not busy:
            return
        with selectors.DefaultSelector() as selector:
            for worker in busy:
                selector.register(worker.fd, selectors.EVENT_READ, worker)
            patience_s = max(0.0, min(w.deadline for w in busy) - time.monotonic())
            events = selector.select(patience_s)
        for key, _ in events:
            messages = key.data.receive()
            if messages is None:
                self._lose(key.data, "crash")
                continue
            for message in messages:
                self._take(key.data, message)

    def _take(self, worker: _Worker, message: dict[str, object]) -> None:
        if "ready" in message:
            worker.ready, self.failed_starts = True, 0
            return
        assert worker.job is not None
        if message.get("failed") == "memory":
            self._lose(worker, "memory")
            return
        failed, equal, canonical = message.get("failed"), message.get("equal"), message.get("canonical")
        self.found[worker.job] = Comparison(
            equal if isinstance(equal, bool) else None,
            canonical if isinstance(canonical, str) else None,
            str(failed) if failed else None,
        )
        worker.job = None

    def _kill_late(self) -> None:
        now = time.monotonic()
        for worker in [w for w in self.workers if (w.job is not None or not w.ready) and now > w.deadline]:
            self._lose(worker, "time")

    def _lose(self, worker: _Worker, why: str) -> None:
        """End a worker. A job it died over is tried once more, for it may have been killed from outside (or before it
        began), and so is one that found no memory, which earlier answers may have taken. A second failure, or the
        clock, leaves the job ungraded. A worker never ready counts against the next start.
        """
        code = worker.exit_code(2.0 if why == "crash" else 0.0)
        if code == -signal.SIGXCPU:
            why = "time"
        if worker.job is not None and why != "time" and worker.job not in self.retried:
            self.retried.add(worker.job)
            self.waiting.appendleft(worker.job)
        elif worker.job is not None:
            self.found[worker.job] = Comparison(None, None, why)
        elif not worker.ready:
            self.failed_starts += 1
        words = worker.last_words()
        worker.kill()
        self.workers.remove(worker)
        killed = why == "crash" and code < 0  # from outside: short of memory, perhaps; worth more attempts
        if self.failed_starts >= (_MAX_KILLED_STARTS if killed else _MAX_FAILED_STARTS):
            raise EngineError(
                f"the grading workers do not start ({why}): {words or 'no message'}; check that math-verify is "
                f"installed and that grader_memory_mib = {self.pool.memory_mib} is enough (512 at least)"
            )
