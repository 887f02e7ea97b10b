"""The read-outs of a trained verifier: from a language model's states to one logit a step.

scalar       a linear head at the last token of the step (the paper's PRM: Snell et al. 2024, appendix).
generative   z = head(state) + sum over the step's tokens of w(state before the token) x log p(token | before): the
             head, plus the model's own log-probability of what was written, each token weighted by what the model
             knows when it comes. The log-probability of a result says whether the model would have written it too.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import nn

from search.errors import ModelError
from search.verifiers.card import READOUT

CHUNK_TOKENS = 4096  # positions whose vocabulary-wide logits exist at once, in inference


class GenerativeReadout(nn.Module):
    """The trained part beside the language model. Shapes: B rows, T tokens, H hidden, S steps."""

    def __init__(self, hidden_size: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(hidden_size, 1)
        self.weight = nn.Linear(hidden_size, 1)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.weight.weight)
        nn.init.constant_(self.head.bias, 2.0)  # a step is right until its tokens surprise
        nn.init.constant_(self.weight.bias, 0.5)

    def token_terms(self, states_BTH: torch.Tensor, logprobs_BT: torch.Tensor) -> torch.Tensor:
        """[B, T]: of token t, whose log-probability is logprobs[:, t], given the states BEFORE it, states[:, t]."""
        return F.softplus(self.weight(states_BTH).squeeze(-1)) * logprobs_BT

    def forward(self, states_BTH: torch.Tensor, logprobs_BT: torch.Tensor, starts: Any, ends: Any) -> torch.Tensor:
        """Logits [B, S]. logprobs[:, t] = log p(id t | before); starts, ends [B, S]: first and last id of each step."""
        before = F.pad(states_BTH[:, :-1], (0, 0, 1, 0))
        summed = F.pad(self.token_terms(before, logprobs_BT).cumsum(1), (1, 0))  # [B, T + 1]
        terms = summed.gather(1, ends + 1) - summed.gather(1, starts)
        at_ends = states_BTH.gather(1, ends[..., None].expand(-1, -1, states_BTH.shape[-1]))
        return self.head(self.dropout(at_ends)).squeeze(-1) + terms

    def save(self, folder: Path) -> None:
        save_file(
            {name: value.detach().contiguous().cpu() for name, value in self.state_dict().items()}, folder / READOUT
        )

    @classmethod
    def load(cls, folder: Path, hidden_size: int, dropout: float = 0.0) -> GenerativeReadout:
        """Raises ModelError where the file lacks or does not fit the model's width."""
        readout = cls(hidden_size, dropout)
        try:
            readout.load_state_dict(load_file(folder / READOUT))
        except (OSError, RuntimeError) as error:
            raise ModelError(f"{folder / READOUT} does not fit its model: {error}") from error
        return readout


def token_logprobs(model: Any, states_BTH: torch.Tensor, ids_BT: torch.Tensor) -> torch.Tensor:
    """log p(id t | before) at every t, [B, T], float32; 0 at t = 0. `states`: the causal model's last hidden ones."""
    flat = flat_logprobs(model.get_output_embeddings(), states_BTH[:, :-1].flatten(0, 1), ids_BT[:, 1:].flatten())
    return F.pad(flat.view(len(ids_BT), -1), (1, 0))


def flat_logprobs(output: Any, before_NH: torch.Tensor, ids_N: torch.Tensor) -> torch.Tensor:
    """log p(ids[n] | before), float32 [N]; `output`: the model's output head, `before`: the state it reads."""
    size = len(ids_N) if torch.is_grad_enabled() else CHUNK_TOKENS
    parts = [
        -F.cross_entropy(output(before_NH[i : i + size]).float(), ids_N[i : i + size], reduction="none")
        for i in range(0, len(ids_N), max(1, size))
    ]
    return torch.cat(parts) if parts else before_NH.new_zeros(0, dtype=torch.float32)


def last_states(model: Any, ids_BT: torch.Tensor, mask_BT: torch.Tensor | None) -> torch.Tensor:
    """The states [B, T, H] that the output head reads, of a right-padded batch, without the head's logits.

    A causal model's states do not depend on what follows, so right padding needs no mask; without, it runs faster.
    """
    backbone = model.get_base_model() if hasattr(model, "get_base_model") else model
    return backbone.base_model(input_ids=ids_BT, attention_mask=mask_BT, use_cache=False).last_hidden_state
