import copy

import pytest
import torch
from torch import nn

from distill.optim import MuonAdamW, build_optimizer


def tiny() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Embedding(11, 8), nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8), nn.LayerNorm(8))


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int, scheduler=None) -> float:
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(0, 11, (64,), generator=generator)
    wanted = torch.randn(64, 8, generator=generator)
    loss = torch.zeros(())
    for _ in range(steps):
        loss = (model(ids) - wanted).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if scheduler is not None:
            scheduler.step()
    return float(loss.detach())


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_every_trainable_parameter_is_in_exactly_one_group_and_moves(name: str) -> None:
    model = tiny()
    model[1].bias.requires_grad_(False)
    optimizer = build_optimizer(model, name, 0.02, 2e-3, 0.01)
    grouped = [id(p) for group in optimizer.param_groups for p in group["params"]]
    assert sorted(grouped) == sorted(id(p) for p in model.parameters() if p.requires_grad)
    before = copy.deepcopy(model.state_dict())
    train(model, optimizer, 2)
    still = {key for key, value in model.state_dict().items() if torch.equal(value, before[key])}
    assert still == {"1.bias"}


def test_muon_gets_the_hidden_matrices_and_nothing_else() -> None:
    model = tiny()
    optimizer = build_optimizer(model, "muon", 0.02, 2e-3, 0.0)
    assert isinstance(optimizer, MuonAdamW)
    assert {id(p) for p in optimizer.param_groups[0]["params"]} == {id(model[1].weight), id(model[3].weight)}
    assert [group["lr"] for group in optimizer.param_groups] == [0.02, 2e-3, 2e-3]


def test_one_scheduler_moves_both_learning_rates() -> None:
    model = tiny()
    optimizer = build_optimizer(model, "muon", 0.02, 2e-3, 0.0)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.0 if step else 1.0)
    train(model, optimizer, 1, scheduler)
    frozen = copy.deepcopy(model.state_dict())
    train(model, optimizer, 2)  # rate 0 now
    assert all(torch.equal(value, frozen[key]) for key, value in model.state_dict().items())


def test_a_resumed_run_equals_an_unbroken_one(tmp_path) -> None:
    whole = tiny()
    optimizer = build_optimizer(whole, "muon", 0.02, 2e-3, 0.01)
    train(whole, optimizer, 3)
    resumed = copy.deepcopy(whole)
    state = copy.deepcopy(optimizer.state_dict())
    train(whole, optimizer, 3)
    again = build_optimizer(resumed, "muon", 0.5, 0.5, 0.5)
    again.load_state_dict(state)
    train(resumed, again, 3)
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), resumed.parameters(), strict=True))


def test_muon_reduces_the_loss() -> None:
    model = tiny()
    optimizer = build_optimizer(model, "muon", 0.02, 2e-3, 0.0)
    first = train(model, optimizer, 1)
    assert train(model, optimizer, 60) < 0.7 * first


def test_nothing_trainable_is_an_error_that_names_the_way_out() -> None:
    model = tiny().requires_grad_(False)
    with pytest.raises(ValueError, match="unfreeze"):
        build_optimizer(model, "adamw", 1e-3, 1e-3, 0.0)
