"""HTTP to an OpenAI-compatible server: bounded waits, retries with backoff, and secrets that stay out of messages.

Retried: connection errors, timeouts, 408, 409, 425, 429, 5xx, and replies that break off or are no JSON. Refused for
this request alone: other 4xx. Fatal at once: 401, 403, 404, 405 and redirects, which concern every request. Redirects
are never followed, so that prompts and key go to the configured host only; TLS is verified.

Every connection has a client of its own: httpx looks through all connections of a pool at every step of a request,
which at 128 of them cost ten times what the requests did.
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import json
import math
import os
import random
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any
from urllib.parse import urlsplit

import httpx

from configs.schema import ServerEngine as ServerSettings
from search.errors import ConfigError, EngineError

MAX_BACKOFF_S = 30.0
MAX_RETRY_AFTER_S = 300.0  # a server that asks for more is as good as gone
CONNECT_S = 10.0
KEEPALIVE_S = 3.0  # below the five seconds after which common servers hang up
SHOWN_CHARS = 300  # of what a server says, in messages
AGAIN = (408, 409, 425, 429)
FATAL = (401, 403, 404, 405)


class Refused(Exception):
    """The server will not answer this request, however often it is asked."""

    def __init__(self, status: int, reason: str) -> None:
        super().__init__(f"HTTP {status}: {reason}")
        self.status = status
        self.reason = reason


class NotServed(EngineError):
    """There is nothing at this address."""


class _Again(Exception):
    def __init__(self, reason: str, wait_s: float = 0.0) -> None:
        super().__init__(reason)
        self.wait_s = wait_s


@dataclass(slots=True)
class Received:
    """What came of one reply so far. A reply in one piece fills it at once; `stop` ends a stream on this side.

    The fields are those of the first choice; `part` gives the others of a reply to a body with `n`.
    """

    stop: str | None = None
    text: str = ""
    ids: list[Any] | None = None
    tokens: list[Any] | None = None  # as written among the logprobs
    choice: dict[str, Any] = field(default_factory=dict[str, Any])  # of the last piece that had one
    usage: dict[str, Any] = field(default_factory=dict[str, Any])
    choices: list[Any] = field(default_factory=list[Any])  # of the last piece that had any

    def take(self, data: Mapping[str, Any]) -> None:
        """Add a reply, or a piece of a stream."""
        if isinstance(usage := data.get("usage"), dict):
            self.usage = usage
        choices = data.get("choices")
        if not isinstance(choices, list) or not choices or not isinstance(choices[0], dict):
            return
        self.choices = choices
        self.choice |= {name: value for name, value in choices[0].items() if value is not None}
        self.text += text if isinstance(text := choices[0].get("text"), str) else ""
        if isinstance(ids := choices[0].get("token_ids"), list):
            self.ids = (self.ids or []) + ids
        logprobs = choices[0].get("logprobs")
        if isinstance(logprobs, dict) and isinstance(tokens := logprobs.get("tokens"), list):
            self.tokens = (self.tokens or []) + tokens

    def part(self, index: int) -> Received:
        """The choice of this index as a reply of its own."""
        one = Received(self.stop)
        one.take({"choices": [self.choices[index]], "usage": self.usage})
        return one

    def clear(self) -> None:
        """Begin anew: a retry owes nothing to the attempt before."""
        self.text, self.ids, self.tokens, self.choice, self.usage, self.choices = "", None, None, {}, {}, []

    @property
    def ended(self) -> bool:
        return "finish_reason" in self.choice or self.stopped

    @property
    def stopped(self) -> bool:
        return self.stop is not None and self.stop in self.text


class Client:
    """GET and POST below one base URL. Its methods run in one event loop.

    `section`: of the configuration, where the user finds the settings that messages name.
    """

    def __init__(
        self, settings: ServerSettings, environment: Mapping[str, str] | None = None, *, section: str = "engine"
    ) -> None:
        self.url = base_url(settings.url)
        self.section = section
        self._settings = settings
        self._key = _key(settings, os.environ if environment is None else environment, section)
        self.giving_up = asyncio.Event()  # set: no more retries, the search has failed already
        self._trusted = httpx.create_ssl_context()
        self._free: list[httpx.AsyncClient] = []  # with at most one open connection each; the last used comes first

    @property
    def in_clear(self) -> bool:
        """Whether the key travels unencrypted to another machine."""
        return bool(self._key) and self.url.startswith("http://") and not _loopback(self.url)

    async def get(self, path: str) -> dict[str, Any]:
        """The JSON object at `path`. Raises Refused, EngineError."""
        return await self._persist("GET", path, None, Received())

    async def post(self, path: str, body: Mapping[str, Any], received: Received) -> Received:
        """Fill `received` with the reply, streamed or in one piece. Raises Refused, EngineError."""
        await self._persist("POST", path, body, received)
        return received

    async def close(self) -> None:
        """Only once no request is under way."""
        while self._free:
            await self._free.pop().aclose()

    def redact(self, text: str) -> str:
        """Without the key, without control characters, and short."""
        text = text.replace(self._key, "[redacted]") if self._key else text
        return "".join(c if c.isprintable() else " " for c in text[:SHOWN_CHARS]).strip()

    async def _persist(
        self, method: str, path: str, body: Mapping[str, Any] | None, received: Received
    ) -> dict[str, Any]:
        last, attempt, attempts = "", 0, self._settings.retries + 1
        for attempt in range(attempts):
            received.clear()
            try:
                async with asyncio.timeout(self._settings.timeout_s):
                    return await self._attempt(method, path, body, received)
            except (TimeoutError, httpx.TimeoutException):
                last, wait_s = f"no answer within {self._settings.timeout_s:g} s ({self.section}.timeout_s)", 0.0
            except httpx.RequestError as error:
                last, wait_s = self.redact(str(error)) or type(error).__name__, 0.0
            except _Again as error:
                last, wait_s = str(error), error.wait_s
            if attempt + 1 == attempts or await self._pause(max(wait_s, self._backoff_s(attempt))):
                break
        raise EngineError(
            f"the server at {self.url} did not answer {path} in {attempt + 1} attempts; the last: {last}. See that it "
            f"runs and that {self.section}.url is right, then run the command again: what was finished is kept"
        )

    async def _attempt(
        self, method: str, path: str, body: Mapping[str, Any] | None, received: Received
    ) -> dict[str, Any]:
        async with self._connection() as http, http.stream(method, f"{self.url}/{path}", json=body) as response:
            if response.status_code != 200:
                await response.aread()
                self._raise_for(response, path)
            if response.headers.get("content-type", "").startswith("text/event-stream"):
                async for piece in self._events(response):
                    received.take(piece)
                    if received.stopped:
                        break
                if not received.ended:
                    raise _Again("the reply broke off")
                return {}
            data = self._json(await response.aread())
            received.take(data)
            return data

    @contextlib.asynccontextmanager
    async def _connection(self) -> AsyncIterator[httpx.AsyncClient]:
        """A client that nobody else uses meanwhile; after a failure it is not used again."""
        http = self._free.pop() if self._free else self._new_connection()
        try:
            yield http
        except BaseException:
            await http.aclose()
            raise
        self._free.append(http)

    def _new_connection(self) -> httpx.AsyncClient:
        timeout_s = self._settings.timeout_s
        return httpx.AsyncClient(
            headers={"Authorization": f"Bearer {self._key}"} if self._key else {},
            timeout=httpx.Timeout(timeout_s, connect=min(CONNECT_S, timeout_s)),
            limits=httpx.Limits(max_connections=1, max_keepalive_connections=1, keepalive_expiry=KEEPALIVE_S),
            follow_redirects=False,
            verify=self._trusted,
            trust_env=not _loopback(self.url),  # proxies are for hosts elsewhere
        )

    async def _events(self, response: httpx.Response) -> AsyncIterator[dict[str, Any]]:
        async for line in response.aiter_lines():
            content = line.removeprefix("data:").strip()
            if line.startswith("data:") and content and content != "[DONE]":
                yield self._json(content)

    def _json(self, content: bytes | str) -> dict[str, Any]:
        try:
            data = json.loads(content)
        except ValueError as error:
            raise _Again("the reply is no JSON") from error
        if not isinstance(data, dict):
            raise _Again("the reply is no JSON object")
        if error := data.get("error"):  # some send errors with status 200, and all do in a stream
            code = error.get("code") if isinstance(error, dict) else None
            if isinstance(code, int) and 400 <= code < 500 and code not in AGAIN:
                raise Refused(code, self._reason(content))
            raise _Again(self._reason(content))
        return data

    def _raise_for(self, response: httpx.Response, path: str) -> None:
        status, reason = response.status_code, self._reason(response.content)
        if 300 <= status < 400:
            target = self.redact(response.headers.get("location", "elsewhere"))
            raise EngineError(
                f"{self.url}/{path} redirects to {target}, which is not followed: give the final address as "
                f"{self.section}.url"
            )
        if status in (401, 403):
            name = self._settings.api_key_env
            how = f"name the variable of a key in {self.section}.api_key_env"
            how = f"see that {name} holds a valid key" if name else how
            raise EngineError(f"the server at {self.url} refuses access (HTTP {status}: {reason}): {how}")
        if status in FATAL:
            raise NotServed(
                f"{self.url}/{path} is not served (HTTP {status}: {reason}): {self.section}.url is the base address of "
                f"an OpenAI-compatible server with /completions, and {self.section}.model a model it lists"
            )
        if status in AGAIN or status >= 500:
            raise _Again(f"HTTP {status}: {reason}", _retry_after_s(response.headers.get("retry-after")))
        raise Refused(status, reason)

    def _reason(self, content: bytes | str) -> str:
        """What the server says went wrong: OpenAI's error object, FastAPI's detail, else the text."""
        text = content if isinstance(content, str) else content.decode(errors="replace")
        try:
            data = json.loads(text)
        except ValueError:
            return self.redact(text)
        if isinstance(data, dict):
            found: Any = data.get("error") or data.get("message") or data.get("detail") or data
            found = found.get("message", found) if isinstance(found, dict) else found
            return self.redact(found if isinstance(found, str) else json.dumps(found))
        return self.redact(text)

    def _backoff_s(self, attempt: int) -> float:
        return min(self._settings.backoff_s * 2**attempt, MAX_BACKOFF_S) * random.uniform(0.5, 1.5)

    async def _pause(self, wait_s: float) -> bool:
        """Wait, unless the search has failed already; whether it has."""
        try:
            await asyncio.wait_for(self.giving_up.wait(), wait_s)
        except TimeoutError:
            return False
        return True


def base_url(url: str) -> str:
    """The address below which /completions lies. Example: base_url("http://host:8000") == "http://host:8000/v1" """
    trimmed = url.rstrip("/").removesuffix("/completions")
    return trimmed if urlsplit(trimmed).path else f"{trimmed}/v1"


def _key(settings: ServerSettings, environment: Mapping[str, str], section: str) -> str:
    if settings.api_key_env is None:
        return ""
    key = environment.get(settings.api_key_env, "").strip()
    if not key:
        raise ConfigError(
            f"{section}.api_key_env names {settings.api_key_env}, which is not set: export it, or leave api_key_env "
            "out for a server without keys"
        )
    if not key.isascii() or not key.isprintable():
        raise ConfigError(f"the value of {settings.api_key_env} cannot be sent: it holds characters no key has")
    return key


def _loopback(url: str) -> bool:
    host = urlsplit(url).hostname or ""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _retry_after_s(header: str | None) -> float:
    """Seconds of a Retry-After header: a number or a date; 0 where there is none."""
    if not header:
        return 0.0
    try:
        wait_s = float(header)
    except ValueError:
        try:
            wait_s = (parsedate_to_datetime(header).astimezone(UTC) - datetime.now(UTC)).total_seconds()
        except ValueError:
            return 0.0
    return min(max(wait_s, 0.0), MAX_RETRY_AFTER_S) if math.isfinite(wait_s) else 0.0
