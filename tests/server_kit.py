"""What the tests of the server engine share: a tokenizer that loses what was generated, a policy, and fixtures.

A test module imports the fixtures by name.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from configs.schema import Model
from configs.schema import ServerEngine as ServerSettings
from search.engines.server import ServerEngine
from search.randomness import key64
from search.types import Continuation, Finish, Request
from tests.fake_server import FakeServer, Switches

DELIMITER = "\n\n"
# "c\n\nd" completes the delimiter inside a token; two "\n" encode to one "\n\n", so text loses what was generated.
PIECES = ["c\n\nd", "\n\n", "\n", *"abcdef123456789+="]
EOS = "<eos>"
NEWLINE = 4


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {token: index for index, token in enumerate([EOS, "<unk>", *PIECES])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("c\n\nd|\n\n|[\\s\\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    folder = tmp_path_factory.mktemp("tokenizer")
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=EOS, unk_token="<unk>", clean_up_tokenization_spaces=False
    ).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tokenizer(tokenizer_folder: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(tokenizer_folder)


def random_policy(prefix: Sequence[int], max_tokens: int, temperature: float, seed: int) -> list[int]:
    """Tokens that depend on seed and position alone; greedy ones on the position alone. Ends by itself now and then."""
    ids: list[int] = []
    while len(ids) < max_tokens and (not ids or ids[-1] != 0):
        draw = key64(seed if temperature > 0 else "greedy", len(prefix) + len(ids))
        token = 2 + draw % (len(PIECES) + 4)
        token = token if token < 2 + len(PIECES) else NEWLINE  # often, so that two come together
        ids.append(0 if draw % 29 == 0 and temperature > 0 else token)
    return ids


@pytest.fixture
def serve(tokenizer: Any) -> Iterator[Callable[..., FakeServer]]:
    """serve(no_ids=True, ...) -> a running FakeServer."""
    with ExitStack() as stack:

        def start(policy: Any = random_policy, **switches: Any) -> FakeServer:
            return stack.enter_context(FakeServer(policy, tokenizer, Switches(**switches)))

        yield start


@pytest.fixture
def connect(tokenizer_folder: Path) -> Iterator[Callable[..., ServerEngine]]:
    """connect(server, ...) -> an engine whose probes are done and forgotten."""
    with ExitStack() as stack:

        def start(server: Any, policy: str | None = None, base: str | None = None, **changes: Any) -> ServerEngine:
            engine = ServerEngine(settings(server.url, tokenizer_folder, **changes), policy, base and Model(base=base))
            stack.callback(engine.close)
            server.forget()
            return engine

        yield start


def settings(url: str, folder: Path | None, **changes: Any) -> ServerSettings:
    known = {"type": "server", "url": url, "tokenizer": str(folder) if folder else None, "flops_parameters": 100}
    return ServerSettings.model_validate(known | {"backoff_s": 0.01, "retries": 3, "timeout_s": 20} | changes)


def requests(tokenizer: Any, num: int = 40, **changes: Any) -> list[Request]:
    made = {"max_new_tokens": 24, "temperature": 1.0, "stop": DELIMITER} | changes
    return [Request(tuple(tokenizer.encode(f"{i % 7}+{i % 9}=")), key=key64("test", i), **made) for i in range(num)]


def expected(server: Any, request: Request, tokenizer: Any) -> tuple[tuple[int, ...], Finish]:
    """What the policy says to a request, worked out token by token."""
    seed = key64(request.key, len(request.prefix)) >> 33
    whole = random_policy(request.prefix, request.max_new_tokens, request.temperature, seed)
    for n in range(1, len(whole) + 1):
        if whole[n - 1] == tokenizer.eos_token_id:
            return tuple(whole[:n]), Finish.EOS
        if request.stop and request.stop in tokenizer.decode(whole[:n]):
            return tuple(whole[:n]), Finish.STOP
    return tuple(whole), Finish.LENGTH


def outcome(continuation: Continuation) -> tuple[tuple[int, ...], Finish]:
    return continuation.ids, continuation.finish


def alike(tokenizer: Any, *counts: int, **changes: Any) -> list[Request]:
    """So many requests for each of some prompts, mixed."""
    different = requests(tokenizer, len(counts), **changes)
    rows = [
        (n, replace(r, key=key64(r.key, n))) for r, count in zip(different, counts, strict=True) for n in range(count)
    ]
    return [request for _, request in sorted(rows, key=lambda row: row[0])]


def wait_until(condition: Callable[[], bool], seconds: float = 20.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.005)
