import math

import pytest
import torch
from torch import nn

from fastreid_uns.config import load_config
from fastreid_uns.engine.solver import (
    build_optimizer,
    build_schedule,
    learning_rate_factor,
    precision,
)


def config(*overrides: str):
    return load_config(overrides=["SOLVER.ITERS_PER_EPOCH=10", "SOLVER.EPOCHS=6", *overrides])


def test_step_schedule_by_hand():
    cfg = config("SOLVER.STEP_EPOCHS=2", "SOLVER.GAMMA=0.5")
    assert [learning_rate_factor(cfg, step) for step in (0, 19, 20, 39, 40)] == [1, 1, 0.5, 0.5, 0.25]


def test_milestones_by_hand():
    cfg = config("SOLVER.SCHEDULE=milestones", "SOLVER.MILESTONES=[1,4]")
    assert [learning_rate_factor(cfg, step) for step in (9, 10, 39, 40)] == pytest.approx([1, 0.1, 0.1, 0.01])


def test_warm_up_rises_linearly_to_the_base_rate():
    cfg = config("SOLVER.SCHEDULE=constant", "SOLVER.WARMUP_EPOCHS=2", "SOLVER.WARMUP_FACTOR=0.1")
    assert [learning_rate_factor(cfg, step) for step in (0, 10, 20)] == pytest.approx([0.1, 0.55, 1.0])


def test_cosine_falls_from_the_base_rate_after_warm_up_to_the_lowest():
    cfg = config("SOLVER.SCHEDULE=cosine", "SOLVER.WARMUP_EPOCHS=2", "SOLVER.MIN_LR=3.5e-5")
    middle = 0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi / 2))
    assert [learning_rate_factor(cfg, step) for step in (20, 40, 60)] == pytest.approx([1.0, middle, 0.1])


def test_schedule_moves_the_rate_of_the_optimizer():
    model = nn.Linear(2, 2)
    cfg = config("SOLVER.STEP_EPOCHS=1", "SOLVER.BASE_LR=1.0")
    optimizer = build_optimizer(cfg, model)
    schedule = build_schedule(cfg, optimizer)
    for _ in range(10):
        optimizer.step()
        schedule.step()
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.1)


def test_unknown_schedule():
    with pytest.raises(ValueError, match=r"SOLVER\.SCHEDULE is 'cosin'; .*; did you mean cosine\?"):
        config("SOLVER.SCHEDULE=cosin")


def test_norm_weights_and_biases_have_a_decay_of_their_own_and_frozen_ones_are_left_out():
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    model[1].bias.requires_grad_(False)
    groups = build_optimizer(config("SOLVER.WEIGHT_DECAY_NORM=0.0"), model).param_groups
    assert [(len(g["params"]), g["weight_decay"]) for g in groups] == [(1, 5e-4), (2, 0.0)]


@pytest.mark.parametrize("name", ["SGD", "AdamW", "lars"])
def test_optimizers_of_torch_and_timm(name):
    model = nn.Linear(2, 2)
    optimizer = build_optimizer(config(f"SOLVER.OPTIMIZER={name}", "SOLVER.BASE_LR=0.1"), model)
    before = model.weight.detach().clone()
    model(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    assert not torch.equal(before, model.weight)


def test_unknown_optimizer_and_argument():
    with pytest.raises(KeyError, match=r"SOLVER\.OPTIMIZER: 'Adamm' is unknown; did you mean [Aa]dam"):
        build_optimizer(config("SOLVER.OPTIMIZER=Adamm"), nn.Linear(1, 1))
    with pytest.raises(KeyError, match=r"Adam takes no 'beta'; did you mean betas"):
        build_optimizer(config("SOLVER.OPTIMIZER_ARGS.beta=[0.9,0.99]"), nn.Linear(1, 1))


def test_precision_names():
    cpu = torch.device("cpu")
    assert precision("none", cpu) is None
    assert precision("bfloat16", cpu) is torch.bfloat16
    assert precision("auto", cpu) in (None, torch.bfloat16)
    with pytest.raises(ValueError, match=r"SOLVER\.AMP: 'half' is unknown; accepted: auto, bfloat16"):
        precision("half", cpu)


def test_layer_wise_rates_leave_out_what_does_not_decay():
    """Weights step by trust x |w| / (|g| + decay |w|) x (g + decay w) x rate, biases without decay by g x rate."""
    model = nn.Linear(2, 1)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[3.0, 4.0]]))
        model.bias.fill_(2.0)
    keys = ["SOLVER.OPTIMIZER=lars", "SOLVER.OPTIMIZER_ARGS={momentum: 0.9, trust_coeff: 0.001}", "SOLVER.BASE_LR=0.5"]
    optimizer = build_optimizer(config(*keys, "SOLVER.WEIGHT_DECAY=0.1", "SOLVER.WEIGHT_DECAY_NORM=0.0"), model)
    model.weight.grad = torch.tensor([[0.0, 2.0]])
    model.bias.grad = torch.tensor([1.0])
    optimizer.step()
    trust = 0.001 * 5 / (2 + 0.1 * 5)
    expected = torch.tensor([[3.0 - 0.5 * trust * 0.3, 4.0 - 0.5 * trust * 2.4]])
    torch.testing.assert_close(model.weight.detach(), expected, rtol=0, atol=1e-6)
    assert model.bias.item() == pytest.approx(1.5)


def closed_form(solver, step: int) -> float:
    """The rate as the keys define it, in the order of operations of version 0.1."""
    epoch = step / solver.ITERS_PER_EPOCH
    warm = 1.0
    if epoch < solver.WARMUP_EPOCHS:
        warm = solver.WARMUP_FACTOR + (1.0 - solver.WARMUP_FACTOR) * epoch / solver.WARMUP_EPOCHS
    if solver.SCHEDULE == "step":
        return warm * solver.GAMMA ** (int(epoch) // solver.STEP_EPOCHS)
    if solver.SCHEDULE == "milestones":
        return warm * solver.GAMMA ** sum(epoch >= milestone for milestone in solver.MILESTONES)
    if solver.SCHEDULE == "constant":
        return warm
    after = max(0.0, epoch - solver.WARMUP_EPOCHS) / max(1e-9, solver.EPOCHS - solver.WARMUP_EPOCHS)
    lowest = solver.MIN_LR / solver.BASE_LR
    return warm * (lowest + (1.0 - lowest) * 0.5 * (1.0 + math.cos(math.pi * min(1.0, after))))


@pytest.mark.parametrize("length", [(7, 13), (50, 400), (11, 1)])
@pytest.mark.parametrize("warmup", [0, 3])
@pytest.mark.parametrize(
    "keys",
    [
        ("step", "STEP_EPOCHS=3", "GAMMA=0.3"),
        ("step", "STEP_EPOCHS=1", "GAMMA=0.9"),
        ("step", "STEP_EPOCHS=60", "GAMMA=0.9"),
        ("milestones", "MILESTONES=[2, 5, 6]", "GAMMA=0.1"),
        ("milestones", "MILESTONES=[5, 2, 5, 0, 90]", "GAMMA=0.7"),
        ("milestones", "MILESTONES=[]", "GAMMA=0.7"),
        ("cosine", "MIN_LR=1e-6", "BASE_LR=0.003"),
        ("constant", "BASE_LR=0.003"),
    ],
)
def test_rates_are_those_of_the_closed_form_bit_for_bit(keys, warmup, length):
    epochs, iters = length
    schedule, *rest = keys
    cfg = load_config(
        overrides=[
            f"SOLVER.SCHEDULE={schedule}",
            f"SOLVER.EPOCHS={epochs}",
            f"SOLVER.ITERS_PER_EPOCH={iters}",
            f"SOLVER.WARMUP_EPOCHS={warmup}",
            *(f"SOLVER.{key}" for key in rest),
        ]
    )
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=cfg.SOLVER.BASE_LR)
    lambdas = build_schedule(cfg, optimizer).lr_lambdas
    steps = range(0, epochs * iters + 1, 1 if epochs * iters < 200 else 7)
    assert [lambdas[0](step) for step in steps] == [closed_form(cfg.SOLVER, step) for step in steps]
    assert [lambdas[0](epoch * iters) for epoch in range(epochs + 1)] == [
        closed_form(cfg.SOLVER, epoch * iters) for epoch in range(epochs + 1)
    ]
