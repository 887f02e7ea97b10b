"""Verifiers from elsewhere: a decoder and a head from a published checkpoint, run over what its format's layout writes.

Every head comes down to one logit a step, in float32: a difference of two labels' rows (a softmax over two labels is
the sigmoid of their difference), so the logits of a whole vocabulary are never computed. The decoder is always one of
transformers' own classes; heads that only exist in a checkpoint's own code (Qwen2.5-Math-PRM, Skywork) are built from
their weights, so those checkpoints need no `trust_remote_code`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn

from configs.schema import Model, PretrainedVerifier
from search.engines.loading import (
    check_weights,
    fingerprint,
    first_line,
    load_tokenizer,
    locate,
    max_length,
)
from search.errors import ConfigError, ModelError
from search.types import Scored, ScoreRequest, Task, Verifier, VerifierFacts
from search.verifiers.formats import check_settings, label_ids, layout_of
from search.verifiers.heads import StateHead, calibrated
from search.verifiers.layout import Encoded, Layout
from search.verifiers.runtimes import Scorer, loading_device, start_scorer
from search.verifiers.trained import Trained, size, unreadable

VALUE_HEAD = "v_head.summary."
WRAPPED = "pretrained_model"  # what a value-head wrapper may put before the names of the model inside


@dataclass(frozen=True, slots=True)
class Parts:
    """A checkpoint taken apart. `logit`: from states [K, H] to one logit each, [K, 1], in float32."""

    decoder: Any
    logit: nn.Module
    pad_id: int | None = None


class Pretrained:
    """Implements search.types.Verifier for every format but our own. `delimiter`: of the task's steps."""

    def __init__(self, layout: Layout, scorer: Scorer, facts: VerifierFacts, delimiter: str) -> None:
        self.facts = facts
        self._layout = layout
        self._scorer = scorer
        self._delimiter = delimiter

    def score(self, requests: Sequence[ScoreRequest]) -> list[Scored]:
        """A score a step, or one an answer. One that cannot be read is `unscored`, with the reason."""
        results: dict[int, Scored] = {}
        inputs: dict[int, Encoded] = {}
        for i, request in enumerate(requests):
            if why := unreadable(request, self._delimiter) or _blank(request, self._delimiter):
                results[i] = Scored((), unscored=why)
            elif (one := self._layout.encode(request)).ends:
                inputs[i] = one
            else:
                results[i] = Scored((), unscored="the verifier's tokenizer merges the end of a step with what follows")
        going_on = [self.facts.process and self._delimiter in requests[i].steps[-1] for i in inputs]
        results |= zip(inputs, self._scorer.score(list(inputs.values()), going_on), strict=True)
        return [results[i] for i in range(len(requests))]

    def reset(self) -> None:
        """Forget what earlier calls computed."""
        self._scorer.reset()

    def close(self) -> None:
        """Free what runs it."""
        self._scorer.close()


def load_pretrained(task: Task, settings: PretrainedVerifier) -> Verifier:
    """The verifier on its device. Raises ConfigError, ModelError."""
    check_settings(settings)
    if settings.format == "ratchet":
        model = Model(base=settings.path, dtype=settings.dtype, trust_remote_code=settings.trust_remote_code)
        return Trained(task, locate(settings.path, settings.revision), settings, model)
    folder = locate(settings.path, settings.revision)
    check_weights(folder)
    tokenizer = load_tokenizer(folder, trust_remote_code=settings.trust_remote_code)
    layout_of(settings, tokenizer, task.step_delimiter)  # refuse what cannot be used before its weights are in memory
    with _quiet():
        parts = take_apart(settings, folder, tokenizer)
    _check_vocabulary(settings, parts.decoder, tokenizer)
    device = loading_device(settings)
    decoder = parts.decoder.to(device).eval().requires_grad_(False)
    logit = parts.logit.to(device).eval().requires_grad_(False)
    head, length = StateHead(logit, calibrated()), max_length(decoder, tokenizer)
    scorer = start_scorer(decoder, head, settings, max_length=length, causal=_is_causal(decoder))
    facts = VerifierFacts(
        fingerprint=_fingerprint(settings, folder),
        flops_parameters=size(decoder) - decoder.get_input_embeddings().weight.numel() + size(logit),
        process=settings.format != "sequence_classifier",
        aggregation=settings.aggregation,
    )
    layout = layout_of(settings, tokenizer, task.step_delimiter, pad_id=parts.pad_id)
    return Pretrained(layout, scorer, facts, task.step_delimiter)


def take_apart(settings: PretrainedVerifier, folder: Path, tokenizer: Any) -> Parts:
    """Decoder and head of the checkpoint in a folder, on the CPU. Raises ConfigError, ModelError."""
    match settings.format:
        case "qwen_prm" | "skywork":
            return _headless(settings, folder)
        case "math_shepherd" | "rlhflow":
            return _two_tokens(settings, folder, label_ids(settings, tokenizer))
        case "token_classifier" | "sequence_classifier":
            return _classifier(settings, folder)
        case "ratchet":
            raise AssertionError("a verifier of ours is loaded elsewhere")


# ---------------------------------------------------------------- checkpoints by kind


def _headless(settings: PretrainedVerifier, folder: Path) -> Parts:
    """A bare decoder, whose head transformers does not know: built from its weights."""
    from transformers import AutoModel

    unwrapped = {rf"^{WRAPPED}\.": ""}
    decoder = _load(settings, folder, AutoModel, config=_plain_config(settings, folder), key_mapping=unwrapped)
    width = decoder.config.hidden_size
    if settings.format == "skywork":
        weights = _tensors(settings, folder, VALUE_HEAD, {"weight": (1, width), "bias": (1,)})
        return Parts(decoder, _linear(weights["weight"], weights["bias"]))
    shapes = {"0.weight": (width, width), "0.bias": (width,), "2.weight": (2, width), "2.bias": (2,)}
    weights = _tensors(settings, folder, "score.", shapes)
    inner = _linear(weights["0.weight"], weights["0.bias"])
    outer = _linear(*(_difference(weights[name], 1, 0) for name in ("2.weight", "2.bias")))
    return Parts(decoder, nn.Sequential(inner, nn.ReLU(), outer))


def _two_tokens(settings: PretrainedVerifier, folder: Path, labels: tuple[int, int]) -> Parts:
    """A language model whose next token is the label: of its output head, the rows of the two labels are enough."""
    from transformers import AutoModelForCausalLM

    model = _load(settings, folder, AutoModelForCausalLM)
    output = model.get_output_embeddings()
    if max(labels) >= len(output.weight):
        raise _unfit(settings, f"its output head has {len(output.weight)} tokens, and token {max(labels)} is a label")
    if getattr(model.config.get_text_config(), "final_logit_softcapping", None):
        raise _unfit(settings, "it caps its logits, so its labels cannot be compared by their rows alone")
    bias = None if output.bias is None else _difference(output.bias.detach(), *labels)
    return Parts(model.base_model, _linear(_difference(output.weight.detach(), *labels), bias))


def _classifier(settings: PretrainedVerifier, folder: Path) -> Parts:
    """A classifier of tokens or of sequences with a linear head and one or two labels."""
    from transformers import AutoModelForSequenceClassification, AutoModelForTokenClassification

    tokens = settings.format == "token_classifier"
    model = _load(settings, folder, AutoModelForTokenClassification if tokens else AutoModelForSequenceClassification)
    head = getattr(model, "score", None) or (getattr(model, "classifier", None) if tokens else None)
    width = model.config.get_text_config().hidden_size
    if not isinstance(head, nn.Linear) or head.in_features != width:
        raise _unfit(settings, f"{type(model).__name__} has no linear head `score` on the states of its last layer")
    rows, bias = head.weight.detach(), None if head.bias is None else head.bias.detach()
    if len(rows) == 1:
        if settings.positive is not None:
            raise ConfigError(
                f"verifier.positive = '{settings.positive}', but {settings.path} has a single label: leave it out"
            )
    elif len(rows) == 2:
        right = _positive_label(settings, model.config.id2label)
        rows = _difference(rows, right, 1 - right)
        bias = None if bias is None else _difference(bias, right, 1 - right)
    else:
        raise _unfit(settings, f"it has {len(rows)} labels, and a verifier has one or two")
    pad_id = model.config.get_text_config().pad_token_id
    return Parts(model.base_model, _linear(rows, bias), pad_id)


def _positive_label(settings: PretrainedVerifier, names: Mapping[int, str]) -> int:
    """Which of two labels means right: by name, else the second, as TRL's trainer counts (False, True)."""
    if settings.positive is None:
        return 1
    found = [number for number, name in names.items() if name == settings.positive]
    if len(found) != 1:
        listed = " and ".join(f"'{name}'" for name in names.values())
        raise _unfit(settings, f"its labels are {listed}, and verifier.positive is '{settings.positive}'")
    return int(found[0])


# ---------------------------------------------------------------- weights


def _load(settings: PretrainedVerifier, folder: Path, kind: Any, **extra: Any) -> Any:
    """A model of which no weight is missing. Raises ModelError."""
    if "config" not in extra:
        extra["trust_remote_code"] = settings.trust_remote_code
    try:
        model, info = kind.from_pretrained(
            folder,
            dtype=settings.dtype,
            use_safetensors=True,
            ignore_mismatched_sizes=True,  # found out below
            output_loading_info=True,
            **extra,
        )
    except (OSError, ValueError, ImportError, RuntimeError, KeyError) as error:
        raise _unfit(settings, f"it cannot be loaded ({first_line(error)})") from error
    if mismatched := [str(one[0] if isinstance(one, tuple) else one) for one in info["mismatched_keys"]]:
        raise _unfit(settings, f"its weights do not have the shapes that its config.json says: {_some(mismatched)}")
    if missing := list(info["missing_keys"]):
        raise _unfit(settings, f"it lacks weights: {_some(missing)}. Is it a checkpoint of another format?")
    if getattr(model.config, "is_encoder_decoder", False):
        raise _unfit(settings, "it is an encoder with a decoder, which has no states at the ends of steps")
    return model


def _plain_config(settings: PretrainedVerifier, folder: Path) -> Any:
    """The configuration as transformers' own class of that architecture reads it, whatever code the folder names.

    A type that only that code knows counts as the one that it extends: "qwen2_rm" as "qwen2".
    """
    from transformers import CONFIG_MAPPING

    try:
        row = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        known = name = str(row["model_type"])
        while known not in CONFIG_MAPPING and "_" in known:
            known = known.rpartition("_")[0]
        if known not in CONFIG_MAPPING:
            raise ValueError(f"transformers knows no model_type '{name}'")
    except (OSError, ValueError, KeyError) as error:
        raise _unfit(settings, f"its config.json cannot be used ({error})") from error
    row = {key: value for key, value in row.items() if key not in ("model_type", "auto_map", "architectures")}
    return CONFIG_MAPPING[known].from_dict(row)


def _tensors(
    settings: PretrainedVerifier, folder: Path, prefix: str, shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, torch.Tensor]:
    """The head's weights by name, without prefix. Raises ModelError where they are not there in these shapes."""
    found: dict[str, torch.Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118
                plain = name.removeprefix(f"{WRAPPED}.")
                if plain.startswith(prefix) and plain.removeprefix(prefix) in shapes:
                    found[plain.removeprefix(prefix)] = file.get_tensor(name)
    for name, shape in shapes.items():
        if name not in found:
            raise _unfit(settings, f"it lacks the head's weights {prefix}{name}. Is it a checkpoint of another format?")
        if tuple(found[name].shape) != shape:
            raise _unfit(settings, f"its {prefix}{name} is {tuple(found[name].shape)}, not {shape}")
    return found


def _linear(weight: torch.Tensor, bias: torch.Tensor | None) -> nn.Linear:
    """A layer of given weights, in float32."""
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    layer.weight = nn.Parameter(weight.float().clone(), requires_grad=False)
    if bias is not None:
        layer.bias = nn.Parameter(bias.float().clone(), requires_grad=False)
    return layer


def _difference(rows: torch.Tensor, right: int, wrong: int) -> torch.Tensor:
    """Row `right` less row `wrong`, as the only row."""
    return (rows[right].float() - rows[wrong].float())[None]


# ---------------------------------------------------------------- checks


def _check_vocabulary(settings: PretrainedVerifier, decoder: Any, tokenizer: Any) -> None:
    """Raises ModelError where the tokenizer writes tokens that the model does not have; padding is never run."""
    rows = decoder.get_input_embeddings().weight.shape[0]
    beyond = sorted((number, name) for name, number in tokenizer.get_vocab().items() if number >= rows)
    if extra := [name for number, name in beyond if number != tokenizer.pad_token_id]:
        raise _unfit(settings, f"its tokenizer has tokens beyond the {rows} of its model: {_some(extra)}")


@torch.inference_mode()
def _is_causal(decoder: Any) -> bool:
    """Whether the states before a token are the same whatever that token is: measured, since no config tells."""
    ids = torch.tensor([[5, 6, 7, 8], [5, 6, 7, 9]], device=next(decoder.parameters()).device)
    states = decoder(input_ids=ids, attention_mask=torch.ones_like(ids)).last_hidden_state[:, :3].float()
    return torch.allclose(states[0], states[1], rtol=1e-3, atol=1e-4)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without transformers' reports of weights that were not used: a head is missing there on purpose."""
    from transformers.utils import logging

    level = logging.get_verbosity()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)


def _fingerprint(settings: PretrainedVerifier, folder: Path) -> str:
    """Of everything that decides the scores."""
    said = settings.model_dump(mode="json", include={"format", "separator", "positive", "negative", "system"})
    return hashlib.sha256((json.dumps(said, sort_keys=True) + fingerprint(folder)).encode()).hexdigest()[:16]


def _blank(request: ScoreRequest, delimiter: str) -> str | None:
    """Why an answer that ended without a word has no score; None: it has words, or may yet."""
    if delimiter not in request.steps[-1] and not "".join(request.steps).replace(delimiter, "").strip():
        return "it has no text"
    return None


def _some(names: Sequence[str]) -> str:
    return ", ".join(list(names)[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _unfit(settings: PretrainedVerifier, why: str) -> ModelError:
    return ModelError(f"the verifier {settings.path} is no '{settings.format}': {why}")
