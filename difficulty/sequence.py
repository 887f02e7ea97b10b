# pyright: standard
"""A fine-tuned copy of the policy that says how often the policy will be right.

A head on the prompt's last token, or on every token (see `difficulty.tokens`), over weights trained whole or with LoRA,
as the LoRA predictors of "Learning How Hard to Think" (arXiv 2410.04707): soft-label cross-entropy against the pass
rate. Training stops where the loss on held-out problems of the fit split rises. Unlike the other kinds it costs a
forward pass of its own. Left out: quantised weights, several GPUs. Heavy imports happen where it runs.

Axis legend: _P problems, _E epochs, _H hidden size.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from configs.schema import Model, SequencePredictor
from difficulty.calibration import Floats, Platt, fit_platt
from difficulty.held_out import best, entropies, honest_rates
from difficulty.prompts import Prompts
from search.errors import DataError, ModelError, TrainingError
from search.randomness import key64

Pooling = Literal["last", "tokens"]
WEIGHTS = "sequence"  # the folder of weights that were trained whole
MIN_HELD_OUT = 10
ADAPTER = "adapter."


@dataclass(eq=False)
class SequenceHead:
    """The tuned decoder is loaded when it is first asked. `adapter`: LoRA's weights, which lie on the policy's own."""

    pooling: Pooling
    weight_H: Floats
    bias: float
    platt: Platt
    parameters: int  # that a token passes through
    batch_size: int
    folder: Path | None = None  # of weights trained whole; None: an adapter
    adapter: dict[str, NDArray[Any]] = field(default_factory=dict[str, NDArray[Any]])
    settings: dict[str, Any] = field(default_factory=dict[str, Any])  # of the adapter
    decoder: Any = None
    kind: str = "sequence"

    def predict(self, prompts: Prompts) -> Floats:
        """Rates in [0, 1], shape [P]; nan where a logit is not finite. Raises ModelError, DataError."""
        if self.decoder is None:
            self.decoder = self._load(prompts)
        logits = _logits(self.decoder, self._head(), self.pooling, prompts.ids_P, self.batch_size)
        rates = np.full(len(prompts), np.nan)
        finite = np.isfinite(logits)
        rates[finite] = self.platt(logits[finite])
        return rates

    def flops(self, num_prompt_tokens: int) -> float:
        return 2.0 * (self.parameters + len(self.weight_H)) * num_prompt_tokens

    def tensors(self) -> dict[str, NDArray[Any]]:
        return {"weight": self.weight_H} | {ADAPTER + name: tensor for name, tensor in self.adapter.items()}

    def facts(self) -> dict[str, Any]:
        row: dict[str, Any] = {name: getattr(self, name) for name in ("pooling", "bias", "parameters", "batch_size")}
        platt = {"slope": self.platt.slope, "offset": self.platt.offset}
        return row | {"whole": self.folder is not None, "adapter": self.settings, "platt": platt}

    @classmethod
    def load(cls, folder: Path, tensors: dict[str, NDArray[Any]], facts: dict[str, Any]) -> SequenceHead:
        return cls(
            **{name: facts[name] for name in ("pooling", "bias", "parameters", "batch_size")},
            weight_H=tensors["weight"],
            platt=Platt(**facts["platt"]),
            folder=folder / WEIGHTS if facts["whole"] else None,
            adapter={name.removeprefix(ADAPTER): t for name, t in tensors.items() if name.startswith(ADAPTER)},
            settings=facts["adapter"],
        )

    def _head(self) -> Any:
        import torch

        device = next(self.decoder.parameters()).device
        return _Head(torch.tensor(self.weight_H, dtype=torch.float32, device=device), self.bias)

    def _load(self, prompts: Prompts) -> Any:
        import torch

        if self.folder is None:
            decoder = _adapted(_policy(prompts), self.settings, prompts.model)
            from peft import set_peft_model_state_dict  # pyright: ignore[reportUnknownVariableType]

            set_peft_model_state_dict(decoder, {name: torch.tensor(t) for name, t in self.adapter.items()})
            return decoder.merge_and_unload().eval()
        from transformers import AutoModel

        try:
            decoder: Any = AutoModel.from_pretrained(
                str(self.folder), dtype=torch.float32, trust_remote_code=prompts.model.trust_remote_code
            )
        except (OSError, ValueError) as error:
            raise ModelError(f"{self.folder} holds no readable sequence model ({error}); fit it again") from error
        return decoder.to("cuda" if torch.cuda.is_available() else "cpu").eval()


@dataclass(eq=False)
class _Head:
    """logit = states . weight + bias"""

    weight: Any
    bias: Any

    def __call__(self, states: Any) -> Any:
        return states.float() @ self.weight + self.bias


def fit(
    prompts: Prompts,
    rates_P: Floats,
    weights_P: Floats,
    config: SequencePredictor,
    out: Path,
    *,
    seed: object,
) -> tuple[SequenceHead, Floats]:
    """The head, and calibrated predictions of the problems that were held out, nan for the others.

    Raises DataError for too few problems, TrainingError where the loss is not finite.
    """
    import torch

    chance = np.random.Generator(np.random.Philox(key64("difficulty", "sequence", seed)))
    order = chance.permutation(len(rates_P))
    num_held = round(config.held_out * len(order))
    if num_held < MIN_HELD_OUT or len(order) - num_held < MIN_HELD_OUT:
        raise DataError(f"{len(order)} labelled problems are too few to hold {config.held_out:.0%} of them out")
    held, seen = np.sort(order[:num_held]), order[num_held:]
    weights = weights_P / weights_P.mean()
    with torch.random.fork_rng(), torch.enable_grad():
        torch.manual_seed(key64("difficulty", "sequence", seed) % 2**63)
        trained = _Training(prompts, rates_P, weights, config)
        logits_E_P = trained.run(seen, held, chance)
    errors = entropies(logits_E_P, rates_P[held])
    unseen = np.full(len(rates_P), np.nan)
    halves = np.arange(num_held) % 2  # each half's epoch is chosen by the other's errors
    unseen[held] = honest_rates(logits_E_P, errors, rates_P[held], weights[held], halves)
    platt = fit_platt(logits_E_P[best(errors, weights[held])], rates_P[held], weights[held])
    return trained.finish(platt, out), unseen


class _Training:
    """One training, and its best weights so far."""

    def __init__(self, prompts: Prompts, rates_P: Floats, weights_P: Floats, config: SequencePredictor) -> None:
        import torch

        self.config, self.ids_P = config, prompts.ids_P
        self.rates_P, self.weights_P = rates_P, weights_P
        decoder = _policy(prompts)
        self.parameters = _flops_parameters(decoder)
        self.settings: dict[str, Any] = {}
        if config.method == "full":
            decoder = decoder.float().requires_grad_(True)
        else:
            self.settings = config.lora.model_dump()
            decoder = _adapted(decoder, self.settings, prompts.model)
        self.decoder = decoder.train()
        device = next(decoder.parameters()).device
        mean = float(np.clip(np.average(rates_P, weights=weights_P), 1e-3, 1 - 1e-3))
        tokens = float(prompts.lengths_P.mean())
        level = (
            math.log(mean / (1 - mean)) if config.pooling == "last" else math.log(math.expm1(-math.log(mean) / tokens))
        )
        width = _text_config(decoder).hidden_size
        self.head = _Head(
            torch.zeros(width, device=device, requires_grad=True),
            torch.full((), level, device=device, requires_grad=True),
        )

    def run(self, seen: NDArray[np.intp], held: NDArray[np.intp], chance: np.random.Generator) -> Floats:
        """Train on `seen`; the logits of `held` after every epoch, [E, P]. The best epoch's weights are kept."""
        import torch

        config = self.config
        tuned = [p for p in self.decoder.parameters() if p.requires_grad]
        everything = [*tuned, self.head.weight, self.head.bias]
        optimizer = torch.optim.AdamW(everything, lr=config.learning_rate, weight_decay=config.weight_decay)
        num_steps = config.epochs * math.ceil(len(seen) / config.batch_size)
        warm = max(1, round(config.warmup * num_steps))
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i: min((i + 1) / warm, 1 - i / num_steps))
        logits_E_P: list[Floats] = []
        self._kept: Any = None
        for _ in range(config.epochs):
            rows = chance.permutation(seen)
            for start in range(0, len(rows), config.batch_size):
                self._step(rows[start : start + config.batch_size])
                torch.nn.utils.clip_grad_norm_(everything, config.max_grad_norm)
                optimizer.step()
                optimizer.zero_grad()
                schedule.step()
            logits_E_P.append(self._unseen(held))
            reached = best(entropies(np.array(logits_E_P), self.rates_P[held]), self.weights_P[held])
            if reached == len(logits_E_P) - 1:
                self._kept = copy.deepcopy([p.detach() for p in everything])
            elif len(logits_E_P) > reached + config.patience:
                break
        with torch.no_grad():
            for parameter, value in zip(everything, self._kept, strict=True):
                parameter.copy_(value)
        return np.array(logits_E_P)

    def _step(self, rows: NDArray[np.intp]) -> None:
        """The gradient of the mean weighted cross-entropy of a batch."""
        import torch

        device = self.head.weight.device
        for start in range(0, len(rows), self.config.micro_batch_size):
            some: list[int] = rows[start : start + self.config.micro_batch_size].tolist()
            logits = _forward(self.decoder, self.head, self.config.pooling, [self.ids_P[i] for i in some])
            rates, weights = (
                torch.tensor(x[some], dtype=torch.float32, device=device) for x in (self.rates_P, self.weights_P)
            )
            nats = torch.nn.functional.binary_cross_entropy_with_logits(logits, rates, weights, reduction="sum")
            if not torch.isfinite(nats):
                raise TrainingError(
                    "the loss of the sequence model is not finite: lower difficulty.sequence.learning_rate"
                )
            (nats / len(rows)).backward()

    def _unseen(self, held: NDArray[np.intp]) -> Floats:
        self.decoder.eval()
        ids = [self.ids_P[i] for i in held.tolist()]
        logits = _logits(self.decoder, self.head, self.config.pooling, ids, self.config.micro_batch_size)
        self.decoder.train()
        if not np.isfinite(logits).all():
            raise TrainingError("the sequence model predicts no finite rates: lower difficulty.sequence.learning_rate")
        return logits

    def finish(self, platt: Platt, out: Path) -> SequenceHead:
        """The head with the best weights: written to `out` where they were trained whole."""
        adapter: dict[str, NDArray[Any]] = {}
        folder = None
        if self.config.method == "full":
            folder = out / WEIGHTS
            self.decoder.save_pretrained(folder)
        else:
            from peft import get_peft_model_state_dict  # pyright: ignore[reportUnknownVariableType]

            state: dict[str, Any] = get_peft_model_state_dict(self.decoder)
            adapter = {name: tensor.detach().float().cpu().numpy() for name, tensor in state.items()}
            self.decoder = self.decoder.merge_and_unload()
        return SequenceHead(
            pooling=self.config.pooling,
            weight_H=self.head.weight.detach().double().cpu().numpy(),
            bias=float(self.head.bias.detach()),
            platt=platt,
            parameters=self.parameters,
            batch_size=self.config.micro_batch_size,
            folder=folder,
            adapter=adapter,
            settings=self.settings,
            decoder=self.decoder.eval().requires_grad_(False),
        )


# ---------------------------------------------------------------- the model


def _policy(prompts: Prompts) -> Any:
    """The policy without its output head. Raises ModelError."""
    from search.engines.loading import load_model

    if prompts.policy is None:
        raise DataError("a sequence model is tuned from the policy's weights: say where the policy lies")
    return load_model(prompts.policy, prompts.model, device="auto").model.base_model


def _adapted(decoder: Any, settings: dict[str, Any], model: Model) -> Any:
    from peft import LoraConfig, get_peft_model

    targets: str = settings["target_modules"]
    lora = LoraConfig(
        task_type="FEATURE_EXTRACTION",
        r=settings["rank"],
        lora_alpha=settings["alpha"],
        lora_dropout=settings["dropout"],
        target_modules=targets.split(",") if "," in targets else targets,
    )
    return get_peft_model(decoder, lora)


def _text_config(decoder: Any) -> Any:
    return decoder.config.get_text_config()


def _flops_parameters(decoder: Any) -> int:
    embeddings = decoder.get_input_embeddings().weight
    return sum(p.numel() for p in decoder.parameters() if p is not embeddings)


def _forward(decoder: Any, head: _Head, pooling: Pooling, ids_P: Sequence[Sequence[int]]) -> Any:
    """One logit a prompt. Padded on the right: a causal decoder needs no mask for it, others get one."""
    import torch
    from torch.nn.functional import softplus

    device = head.weight.device
    lengths = torch.tensor([len(ids) for ids in ids_P], device=device)
    longest = int(lengths.max())
    ids = torch.tensor([[*one, *[0] * (longest - len(one))] for one in ids_P], device=device)
    mask = torch.arange(longest, device=device)[None] < lengths[:, None]
    states = decoder(input_ids=ids, attention_mask=mask.long()).last_hidden_state
    if pooling == "last":
        return head(states[torch.arange(len(ids_P), device=device), lengths - 1])
    hazard = (softplus(head(states)) * mask).sum(1).clamp(min=1e-6)
    return -hazard - torch.log(-torch.expm1(-hazard))


def _logits(decoder: Any, head: _Head, pooling: Pooling, ids_P: Sequence[Sequence[int]], size: int) -> Floats:
    """The logits of all prompts, computed in batches of similar lengths; float64 [P]."""
    import torch

    logits = np.empty(len(ids_P))
    with torch.no_grad():
        for rows in _batches(ids_P, size):
            logits[rows] = _forward(decoder, head, pooling, [ids_P[i] for i in rows]).double().cpu().numpy()
    return logits


def _batches(ids_P: Sequence[Sequence[int]], size: int) -> Iterator[list[int]]:
    order = sorted(range(len(ids_P)), key=lambda i: len(ids_P[i]))
    for start in range(0, len(order), size):
        yield order[start : start + size]
