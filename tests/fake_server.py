"""A small OpenAI-compatible completions server in this process, with the faults of real ones as switches.

`FakeServer(policy, tokenizer, Switches(no_ids=True))` serves at `.url` inside a `with`. The policy is a function
(prefix ids, max tokens, temperature, seed) -> new ids, EOS included: `engine_policy(engine)` makes one of any engine.
What was asked and what was answered is kept in `.bodies` and `.answers`, without the probes of the client's start
once `.forget()` was called.
"""

import itertools
import json
import select
import socket
import ssl
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from search.types import Engine, Request

Policy = Callable[[Sequence[int], int, float, int], list[int]]
STANDARD = {"model", "prompt", "max_tokens", "temperature", "top_p", "stop", "seed", "n", "stream", "stream_options"}


def engine_policy(engine: Engine) -> Policy:
    """The policy of a synchronous engine: its tokens, one request at a time."""
    lock = threading.Lock()

    def policy(prefix: Sequence[int], max_tokens: int, temperature: float, seed: int) -> list[int]:
        with lock:
            return list(engine.extend([Request(tuple(prefix), max_tokens, temperature, seed)])[0].ids)

    return policy


@dataclass
class Switches:
    no_ids: bool = False  # never returns token ids
    ids_among_logprobs: bool = False  # returns them as older vLLM servers do
    text_prompts: bool = False  # refuses ids as prompt
    misreads_ids: bool = False  # takes ids for several prompts
    strict: bool = False  # refuses fields that are not OpenAI's
    strips_stop: bool = False  # cuts the stop text off, from the ids too
    tells_stop: bool = True  # names the stop text in stop_reason
    ignores_stop: bool = False
    returns_eos: bool = True  # EOS among the ids
    no_seeds: bool = False  # every sample is another
    most_choices: int | None = None  # answers at most so often to `n`; 0: refuses `n`
    no_stream: bool = False  # answers in one piece, whatever was asked
    no_usage: bool = False
    caches: bool = False  # tells cached tokens: all but the last of the prompt
    max_length: int = 256
    tells_length: bool = True
    root: str | dict[str, str] | None = None  # where it says its models came from
    models: tuple[str, ...] = ("tiny",)
    key: str | None = None  # refuses other keys
    first: tuple[int, ...] = ()  # status codes of the first completions
    always: int | None = None  # status code of every completion
    retry_after: str | None = None
    break_off: int = 0  # completions that end in the middle
    garbage: int = 0  # completions that are no JSON
    empty: str | None = None  # "choices" or "text": what an answer lacks
    location: str | None = None  # redirects there
    tls: ssl.SSLContext | None = None
    delay_s: float = 0.0  # before each token of a stream, or before the answer
    hangs: Callable[[dict[str, Any]], bool] | None = None  # bodies that are never answered


@dataclass
class Answer:
    ids: list[int]
    finish: str
    stop_reason: str | None
    text: str


@dataclass
class FakeServer:
    policy: Policy
    tokenizer: Any
    switches: Switches = field(default_factory=Switches)
    bodies: list[dict[str, Any]] = field(default_factory=list)
    answers: list[Answer] = field(default_factory=list)
    paths: list[str] = field(default_factory=list)
    num_completions: int = 0  # refused ones included
    num_aborted: int = 0  # given up by the client
    num_running: int = 0
    most_running: int = 0

    def __post_init__(self) -> None:
        self.lock = threading.Lock()
        self.draws = itertools.count()  # for samples without a seed
        self.closing = threading.Event()

    def __enter__(self) -> "FakeServer":
        server = self

        class Handler(_Handler):
            fake = server

        self.http = _Server(("127.0.0.1", 0), Handler)
        if tls := self.switches.tls:
            self.http.socket = tls.wrap_socket(self.http.socket, server_side=True)
        self.url = f"{'https' if tls else 'http'}://127.0.0.1:{self.http.server_address[1]}/v1"
        threading.Thread(target=self.http.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.closing.set()
        self.http.shutdown()
        self.http.server_close()

    def forget(self) -> None:
        """Begin the records anew, after the client's probes."""
        with self.lock:
            self.bodies, self.answers, self.paths = [], [], []
            self.num_completions = self.num_aborted = self.most_running = 0

    def answer(self, body: dict[str, Any]) -> Answer:
        """What the policy says to a body, cut at the stop text or the limit."""
        switches, prefix = self.switches, self.prefix(body)
        seed = body["seed"] if "seed" in body and not switches.no_seeds else next(self.draws)
        ids = self.policy(prefix, body.get("max_tokens", 16), body.get("temperature", 1.0), seed)
        ids, finish = ids[: body.get("max_tokens", 16)], "length"
        stops = [] if switches.ignores_stop else list(body.get("stop") or [])
        for n in range(1, len(ids) + 1):
            if met := [stop for stop in stops if stop in self.text(ids[:n])]:
                return self._stopped(ids[:n], met[0], bool(body.get("include_stop_str_in_output")))
            if ids[n - 1] == self.tokenizer.eos_token_id:
                ids, finish = ids[: n if switches.returns_eos else n - 1], "stop"
                break
        return Answer(ids, finish, None, self.text(ids))

    def _stopped(self, ids: list[int], stop: str, include: bool) -> Answer:
        told = stop if self.switches.tells_stop else None
        text = self.text(ids)
        before = text.partition(stop)[0]
        if self.switches.strips_stop:
            kept = next(n for n in range(len(ids), -1, -1) if len(self.text(ids[:n])) <= len(before))
            return Answer(ids[:kept], "stop", told, before)
        return Answer(ids, "stop", told, before + stop if include else before)

    def prefix(self, body: dict[str, Any]) -> list[int]:
        prompt = body["prompt"]
        return list(prompt) if isinstance(prompt, list) else self.tokenizer.encode(prompt, add_special_tokens=False)

    def text(self, ids: Sequence[int]) -> str:
        return self.tokenizer.decode(list(ids), skip_special_tokens=True)


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 256

    def handle_error(self, *_: object) -> None:
        """Clients that hang up are what is tested."""


class _Handler(BaseHTTPRequestHandler):
    fake: FakeServer
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        """Silent."""

    def do_GET(self) -> None:
        fake, switches = self.fake, self.fake.switches
        fake.paths.append(self.path)
        if self._refused_before(switches):
            return
        if self.path != "/v1/models":
            self._error(404, "Not Found")
            return
        roots = switches.root if isinstance(switches.root, dict) else dict.fromkeys(switches.models, switches.root)
        cards: list[dict[str, Any]] = [{"id": name, "root": roots.get(name)} for name in switches.models]
        if switches.tells_length:
            cards = [card | {"max_model_len": switches.max_length} for card in cards]
        self._json(200, {"object": "list", "data": cards})

    def do_POST(self) -> None:
        fake, switches = self.fake, self.fake.switches
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        with fake.lock:
            fake.paths.append(self.path)
            fake.bodies.append(body)
            number = fake.num_completions
            fake.num_completions += 1
            fake.num_running += 1
            fake.most_running = max(fake.most_running, fake.num_running)
        try:
            self._complete(body, number, switches)
        except (BrokenPipeError, ConnectionResetError):
            with fake.lock:
                fake.num_aborted += 1
        finally:
            with fake.lock:
                fake.num_running -= 1

    def _refused_before(self, switches: Switches) -> bool:
        if switches.location is not None:
            self._json(307, {}, {"location": switches.location})
        elif switches.key is not None and self.headers.get("authorization") != f"Bearer {switches.key}":
            self._error(401, f"Incorrect API key provided: {self.headers.get('authorization')}")
        else:
            return False
        return True

    def _complete(self, body: dict[str, Any], number: int, switches: Switches) -> None:
        if self._refused_before(switches):
            return
        if self.path != "/v1/completions":
            self._error(404, "Not Found")
            return
        if switches.hangs is not None and switches.hangs(body):
            self._wait(3600.0)
            return
        status = switches.first[number] if number < len(switches.first) else switches.always
        if status is not None:
            headers = {"retry-after": switches.retry_after} if switches.retry_after else {}
            self._json(
                status, {"error": {"message": f"status {status} for {self.headers.get('authorization')}"}}, headers
            )
            return
        if refusal := self._refusal(body, switches):
            self._error(400, refusal)
            return
        if number < switches.garbage:
            self._send(200, b"<html>busy</html>", "text/html")
            return
        if body.get("stream") and not switches.no_stream:
            self._stream(body, switches, cut=number < switches.break_off)
            return
        self._wait(switches.delay_s)
        num = min(body.get("n", 1), switches.most_choices or body.get("n", 1))
        answers = [self.fake.answer(body) for _ in range(num)]
        with self.fake.lock:
            self.fake.answers += answers
        data = json.dumps(self._reply(body, answers, switches)).encode()
        self._send(200, data, "application/json", shown=len(data) // 2 if number < switches.break_off else None)

    def _refusal(self, body: dict[str, Any], switches: Switches) -> str:
        if switches.strict and (unknown := sorted(body.keys() - STANDARD)):
            return f"Unrecognized request arguments: {', '.join(unknown)}"
        if switches.most_choices == 0 and "n" in body:
            return "n is not supported"
        if switches.text_prompts and not isinstance(body["prompt"], str):
            return "prompt must be a string"
        length = len(self.fake.prefix(body)) + body.get("max_tokens", 16)
        if length > switches.max_length:
            return f"This model's maximum context length is {switches.max_length} tokens, you asked for {length}"
        return ""

    def _reply(self, body: dict[str, Any], answers: list[Answer], switches: Switches) -> dict[str, Any]:
        choices = [self._choice(body, answer, switches) | {"index": n} for n, answer in enumerate(answers)]
        if switches.misreads_ids and isinstance(body["prompt"], list):
            choices = [choices[0] | {"index": n} for n in range(len(body["prompt"]))]
        reply = {"object": "text_completion", "model": body["model"], "choices": choices}
        if switches.empty == "choices":
            reply["choices"] = []
        return reply if switches.no_usage else reply | {"usage": self._usage(body, answers, switches)}

    def _choice(self, body: dict[str, Any], answer: Answer, switches: Switches) -> dict[str, Any]:
        ids = [] if switches.empty == "text" else answer.ids
        choice: dict[str, Any] = {"index": 0, "text": "" if switches.empty == "text" else answer.text, "logprobs": None}
        choice |= {"finish_reason": answer.finish, "stop_reason": answer.stop_reason}
        if body.get("return_token_ids") and not switches.no_ids and not switches.ids_among_logprobs:
            choice["token_ids"] = ids
        if switches.ids_among_logprobs and body.get("return_tokens_as_token_ids") and "logprobs" in body:
            choice["logprobs"] = {"tokens": [f"token_id:{i}" for i in ids], "token_logprobs": [-0.5] * len(ids)}
        return choice

    def _usage(self, body: dict[str, Any], answers: list[Answer], switches: Switches) -> dict[str, Any]:
        num_new = 0 if switches.empty == "text" else sum(max(1, len(answer.ids)) for answer in answers)
        num_prompt = len(self.fake.prefix(body))
        usage: dict[str, Any] = {"prompt_tokens": num_prompt, "completion_tokens": num_new}
        if switches.caches:
            usage["prompt_tokens_details"] = {"cached_tokens": num_prompt - 1}
        return usage

    def _stream(self, body: dict[str, Any], switches: Switches, *, cut: bool) -> None:
        """Token by token; `cut`: hang up before the last."""
        fake = self.fake
        answer = fake.answer(body)
        self.send_response(200)
        self.send_header("content-type", "text/event-stream")
        self.send_header("connection", "close")
        self.end_headers()
        sent = 0
        for n in range(1, len(answer.ids) + 1):
            self._wait(switches.delay_s)
            if cut and n == len(answer.ids):
                self.close_connection = True
                return
            last = n == len(answer.ids)
            text = answer.text if last else answer.text[: len(fake.text(answer.ids[:n]))]
            piece = Answer([answer.ids[n - 1]], answer.finish, answer.stop_reason, text[sent:])
            choice = self._choice(body, piece, switches)
            choice |= {} if last else {"finish_reason": None, "stop_reason": None}
            self._event({"object": "text_completion", "choices": [choice]})
            sent = len(text)
        if not answer.ids:
            self._event({"choices": [self._choice(body, answer, switches)]})
        if (body.get("stream_options") or {}).get("include_usage"):
            self._event({"choices": [], "usage": self._usage(body, [answer], switches)})
        self.wfile.write(b"data: [DONE]\n\n")
        self.close_connection = True
        with fake.lock:
            fake.answers.append(answer)

    def _event(self, data: dict[str, Any]) -> None:
        self.wfile.write(f"data: {json.dumps(data)}\n\n".encode())
        self.wfile.flush()

    def _wait(self, seconds: float) -> None:
        """Sleep, but notice a client that hangs up."""
        end = time.monotonic() + seconds
        while (left := end - time.monotonic()) > 0 and not self.fake.closing.is_set():
            readable, _, _ = select.select([self.connection], [], [], min(left, 0.02))
            if readable and not self.connection.recv(1, socket.MSG_PEEK):
                raise BrokenPipeError

    def _error(self, status: int, message: str) -> None:
        self._json(status, {"error": {"message": message, "type": "BadRequestError", "code": status}})

    def _json(self, status: int, data: dict[str, Any], headers: dict[str, str] | None = None) -> None:
        self._send(status, json.dumps(data).encode(), "application/json", headers=headers)

    def _send(
        self, status: int, data: bytes, kind: str, *, headers: dict[str, str] | None = None, shown: int | None = None
    ) -> None:
        """`shown`: only so many bytes of it, then hang up."""
        self.send_response(status)
        for name, value in {"content-type": kind, "content-length": str(len(data)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data if shown is None else data[:shown])
        self.wfile.flush()
        self.close_connection = shown is not None
