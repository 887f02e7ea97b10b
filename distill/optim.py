"""Optimizers by name: AdamW, or Muon for the hidden matrices with AdamW for everything else.

Muon (K. Jordan, 2024, "Muon: an optimizer for hidden layers in neural networks") orthogonalises the momentum of each
hidden matrix. On the tiny embedded models it learns in a minute what AdamW does not learn in ten. Embeddings, the
output head, norms and biases stay with AdamW. Left out: distributed Muon.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Literal

import torch
from torch import nn

BETAS = (0.9, 0.95)


class MuonAdamW(torch.optim.Optimizer):
    """One optimizer over two: schedulers, `state_dict` and the HF Trainer see a single list of parameter groups.

    This object owns groups and state; the wrapped optimizers look at the same dictionaries, so a learning rate that a
    scheduler sets here is the one they step with.
    """

    def __init__(
        self,
        matrices: list[nn.Parameter],
        rest: list[dict[str, Any]],
        *,
        learning_rate: float,
        adamw_learning_rate: float,
        weight_decay: float,
    ) -> None:
        self._muon = torch.optim.Muon(matrices, lr=learning_rate, weight_decay=weight_decay)
        self._adamw = torch.optim.AdamW(rest, lr=adamw_learning_rate, betas=BETAS)
        groups = [*self._muon.param_groups, *self._adamw.param_groups]
        super().__init__([dict(group) for group in groups], {})
        self._share()

    def _share(self) -> None:
        num_muon = len(self._muon.param_groups)
        self._muon.param_groups = self.param_groups[:num_muon]
        self._adamw.param_groups = self.param_groups[num_muon:]
        self._muon.state = self._adamw.state = self.state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Raises ValueError where the groups do not match. Loading replaces groups and state, so share them anew."""
        super().load_state_dict(state_dict)
        self._share()

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._muon.step()
        self._adamw.step()
        return loss


def build_optimizer(
    model: nn.Module,
    name: Literal["adamw", "muon"],
    learning_rate: float,
    adamw_learning_rate: float,
    weight_decay: float,
) -> torch.optim.Optimizer:
    """The optimizer of the parameters of `model` that require gradients.

    `learning_rate` is Muon's (or AdamW's, alone); with Muon everything but the hidden matrices follows
    `adamw_learning_rate`. Norms and biases never decay. Raises ValueError where nothing is trainable.
    """
    trainable = [p for p in model.parameters() if p.requires_grad]
    if not trainable:
        raise ValueError("the model has no trainable parameter: unfreeze it or add an adapter")
    hidden = _hidden_matrices(model) if name == "muon" else []
    taken = {id(p) for p in hidden}
    rest = _decay_groups((p for p in trainable if id(p) not in taken), weight_decay)
    if not hidden:
        return torch.optim.AdamW(rest, lr=learning_rate, betas=BETAS)
    if not rest:  # adapters: nothing but matrices
        return torch.optim.Muon(hidden, lr=learning_rate, weight_decay=weight_decay)
    return MuonAdamW(
        hidden,
        rest,
        learning_rate=learning_rate,
        adamw_learning_rate=adamw_learning_rate,
        weight_decay=weight_decay,
    )


def _hidden_matrices(model: nn.Module) -> list[nn.Parameter]:
    """Trainable 2-D weights that are neither an embedding nor the output head, nor a single row (a head's)."""
    ends = {id(p) for module in model.modules() if isinstance(module, nn.Embedding) for p in module.parameters()}
    output = getattr(model, "get_output_embeddings", lambda: None)()
    if output is not None:
        ends |= {id(p) for p in output.parameters()}
    wide = (p for p in model.parameters() if p.requires_grad and p.ndim == 2 and p.shape[0] > 1)
    return [p for p in wide if id(p) not in ends]


def _decay_groups(parameters: Iterable[nn.Parameter], weight_decay: float) -> list[dict[str, Any]]:
    decayed: list[nn.Parameter] = []
    plain: list[nn.Parameter] = []
    for parameter in parameters:
        (decayed if parameter.ndim >= 2 else plain).append(parameter)
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": plain, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]
