"""A verifier in training: a language model, its read-out, and the losses (Snell et al. 2024, appendix on PRMs).

step labels   binary cross-entropy with soft targets at the step ends (the paper's)
outcomes      multiple-instance loss: an answer is right with probability P + (1 - P) eps, P being the product of its
              steps' p and eps the chance that wrong steps cancel; binary cross-entropy of that, in log space
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import nn

from configs.schema import Model, TrainedVerifier
from distill import lora
from distill.prm_data import IGNORED, Row, collate
from search.errors import ConfigError, CorruptArtefact
from search.verifiers.card import CARD, Card
from search.verifiers.readout import GenerativeReadout, last_states, token_logprobs

LUCK = 0.01  # eps
SURE = -1e-30  # log P is kept below 0 by this much, so that log(1 - P) stays finite


class StepScorer(nn.Module):
    """Ids and step places to one logit a step. `readout`: of the generative kind; None: a token classifier's head."""

    def __init__(self, language: Any, readout: GenerativeReadout | None) -> None:
        super().__init__()
        self.language = language
        self.readout = readout

    def forward(self, input_ids: torch.Tensor, starts: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
        """Logits [B, S] of ids [B, T] padded on the right: a causal model's states do not depend on what follows."""
        if self.readout is None:
            return self.language(input_ids=input_ids, use_cache=False).logits[..., 0].float().gather(1, ends)
        states = last_states(self.language, input_ids, None)
        return self.readout(states, token_logprobs(self.language, states, input_ids), starts, ends)

    def get_output_embeddings(self) -> Any:
        """For the optimizer, which treats the output head apart."""
        return self.language.get_output_embeddings() if self.readout is not None else None

    # ------------------------------------------------------------ files

    @classmethod
    def load(
        cls, init: Path, base: Path | None, settings: TrainedVerifier, model: Model, device: str
    ) -> tuple[StepScorer, Any]:
        """The scorer, with what `settings.method` names trainable, and its tokenizer.

        `init`: a policy's folder, or one of a verifier of ours that is trained on. Raises ModelError, ConfigError.
        """
        folder, base = place(init, base)
        card = Card.load(init) if (init / CARD).is_file() else None
        if card and (card.readout, card.kind) != (settings.readout, settings.kind):
            raise ConfigError(
                f"{init} is a {card.kind} with a {card.readout} read-out, and a {settings.kind} with a "
                f"{settings.readout} one cannot go on from it: set verifier.warm_start = false"
            )
        dropout = settings.dropout if settings.readout == "scalar" else None
        language = lora.load_trainable(folder, base, settings, model, device, token_dropout=dropout)
        if settings.gradient_checkpointing:
            language.gradient_checkpointing_enable({"use_reentrant": False})
            if settings.method == "lora":
                language.enable_input_require_grads()
        readout = None
        if settings.readout == "generative":
            width = language.config.get_text_config().hidden_size
            readout = GenerativeReadout.load(init, width, settings.dropout) if card else None
            readout = readout or GenerativeReadout(width, settings.dropout)
        return cls(language, readout), lora.load_tokenizer(folder, base, model)

    def trained(self) -> dict[str, nn.Parameter]:
        """What training changes, shared weights once."""
        return {name: p for name, p in self.named_parameters() if p.requires_grad}

    def save_weights(self, path: Path) -> None:
        """What training changes, for a checkpoint."""
        save_file({name: p.detach().contiguous().cpu() for name, p in self.trained().items()}, path)

    @torch.no_grad()
    def load_weights(self, path: Path) -> None:
        """Raises CorruptArtefact where the file is of another training."""
        stored, wanted = load_file(path), self.trained()
        if stored.keys() != wanted.keys():
            raise CorruptArtefact(f"{path} holds other weights than those in training")
        for name, parameter in wanted.items():
            parameter.copy_(stored[name])


def place(init: Path, base: Path | None) -> tuple[Path, Path | None]:
    """The model folder at `init`, which may be a verifier of ours, and the full model under it."""
    if not (init / CARD).is_file():
        return init, base
    stored = Card.load(init).base
    return init / "model", base or (Path(stored) if stored else None)


# ---------------------------------------------------------------- losses


def loss_sum(logits: torch.Tensor, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """The weighted sum of all terms: logits [B, S], labels and weights [B, S + 1]. Divide by `num_terms`."""
    labels, weights = batch["labels"], batch["weights"]
    steps, outcomes = labels[:, :-1], labels[:, -1]
    marked = steps != IGNORED
    safe = torch.where(marked, steps, torch.zeros_like(steps))
    nats = F.binary_cross_entropy_with_logits(logits, safe, reduction="none") * marked
    total = (nats * weights[:, :-1]).sum()
    known = outcomes != IGNORED
    if bool(known.any()):
        some = instance_loss(logits[known], batch["ends"][known] > 0, outcomes[known])
        total = total + (some * weights[known, -1]).sum()
    return total


def instance_loss(logits: torch.Tensor, there: torch.Tensor, outcomes: torch.Tensor) -> torch.Tensor:
    """-log of the probability of each outcome, [B]; `there` [B, S] marks the steps that exist."""
    log_all_right = (F.logsigmoid(logits) * there).sum(1).clamp(max=SURE)
    log_some_wrong = torch.log(-torch.expm1(log_all_right))
    log_luck = torch.log(torch.tensor(LUCK, device=logits.device))
    right = torch.logaddexp(log_all_right, log_some_wrong + log_luck)
    wrong = log_some_wrong + torch.log1p(-log_luck.exp())
    return -torch.where(outcomes > 0.5, right, wrong)


def num_terms(batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """The weighted number of terms of `loss_sum`."""
    return ((batch["labels"] != IGNORED) * batch["weights"]).sum()


@torch.no_grad()
def step_logits(scorer: StepScorer, rows: Sequence[Row], size: int, device: Any) -> tuple[list[list[float]], float]:
    """The logits of each row's steps, and the mean loss over all. In batches of `size` rows of like length."""
    training = scorer.training
    scorer.eval()
    order = sorted(range(len(rows)), key=lambda i: len(rows[i].ids))
    found: list[list[float]] = [[] for _ in rows]
    total, terms = 0.0, 0.0
    for start in range(0, len(order), size):
        part = order[start : start + size]
        batch = {name: tensor.to(device) for name, tensor in collate([rows[i] for i in part]).items()}
        logits = scorer(batch["input_ids"], batch["starts"], batch["ends"]).float()
        total, terms = total + float(loss_sum(logits, batch)), terms + float(num_terms(batch))
        for i, values in zip(part, logits.tolist(), strict=True):
            found[i] = values[: len(rows[i].ends)]
    scorer.train(training)
    return found, total / max(terms, 1e-12)
