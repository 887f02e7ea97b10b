"""A chat server in this process whose judge is a function of the test: content -> what it says, or how it fails.

`FakeJudge(reply, no_chat=True)` serves at `.url` inside a `with`; bodies are kept in `.bodies`, those of the probe at
the start too, until `.forget()`. A reply is a text, or a dict: {"status": 429}, {"hangs": 5.0}, {"choices": []},
{"text": ..., "finish": "length"}.
"""

import json
import re
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Reply = Callable[[str], "str | dict[str, Any]"]
PROBE = "Say yes."


def fenced(content: str, name: str) -> str | None:
    """What stands between the marks of a name, as a reader of the prompt finds it; None: it is not there."""
    met = re.search(rf"<<<([0-9a-f]{{16}}) {name} begins>>>\n(.*)\n<<<\1 {name} ends>>>", content, re.DOTALL)
    return None if met is None else met[2]


class FakeJudge:
    def __init__(
        self,
        reply: Reply,
        *,
        no_chat: bool = False,
        refuses: tuple[str, ...] = (),
        key: str | None = None,
        no_usage: bool = False,
        cached: int = 0,
    ) -> None:
        self.reply = reply
        self.no_chat = no_chat
        self.refuses = refuses  # fields of a body
        self.key = key
        self.no_usage = no_usage
        self.cached = cached
        self.bodies: list[dict[str, Any]] = []
        self.most_running = self._running = 0
        self.lock = threading.Lock()

    def __enter__(self) -> "FakeJudge":
        fake = self

        class Handler(_Handler):
            judge = fake

        self.http = _Server(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_address[1]}/v1"
        threading.Thread(target=self.http.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.http.shutdown()
        self.http.server_close()

    def forget(self) -> None:
        with self.lock:
            self.bodies, self.most_running = [], 0

    @property
    def contents(self) -> list[str]:
        return [content_of(body) for body in self.bodies]

    def answer(self, body: dict[str, Any]) -> "tuple[int, dict[str, Any]]":
        content = content_of(body)
        if taken := [name for name in self.refuses if name in body]:
            return 400, {"error": {"message": f"unknown field {taken[0]}"}}
        with self.lock:
            self.bodies.append(body)
            self._running += 1
            self.most_running = max(self.most_running, self._running)
        said = "yes" if content.strip() == PROBE else self.reply(content)
        said = {"text": said} if isinstance(said, str) else said
        time.sleep(said.get("hangs", 0.0))
        with self.lock:
            self._running -= 1
        if "status" in said:
            return said["status"], {"error": {"message": f"status {said['status']}"}}
        shown = {"text": said["text"]} if "prompt" in body else {"message": {"content": said["text"]}}
        reply: dict[str, Any] = {"choices": [{"index": 0, "finish_reason": said.get("finish", "stop"), **shown}]}
        if not self.no_usage:
            reply["usage"] = {"prompt_tokens": len(content), "completion_tokens": len(said["text"] or "")}
            reply["usage"]["prompt_tokens_details"] = {"cached_tokens": self.cached}
        return 200, reply


def content_of(body: dict[str, Any]) -> str:
    return body["prompt"] if "prompt" in body else body["messages"][0]["content"]


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 256

    def handle_error(self, *_: object) -> None:
        """Clients that hang up are what is tested."""


class _Handler(BaseHTTPRequestHandler):
    judge: FakeJudge
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        """Silent."""

    def do_GET(self) -> None:
        self._send(200, {"data": [{"id": "judge-1"}, {"id": "judge-2"}]})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        if self.judge.key is not None and self.headers.get("authorization") != f"Bearer {self.judge.key}":
            self._send(401, {"error": {"message": f"wrong key {self.headers.get('authorization')}"}})
        elif self.path == "/v1/chat/completions" and self.judge.no_chat:
            self._send(404, {"error": {"message": "Not Found"}})
        else:
            self._send(*self.judge.answer(body))

    def _send(self, status: int, data: dict[str, Any]) -> None:
        content = json.dumps(data).encode()
        self.send_response(status)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)
