import math

import pytest
import torch
from torch import nn

from fastreid_uns.config import load_config
from fastreid_uns.engine.solver import (
    build_optimizer,
    build_schedule,
    freeze,
    learning_rate_factor,
    precision,
)
from fastreid_uns.errors import InvalidValue


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


def test_warm_up_by_epoch_is_constant_within_an_epoch():
    cfg = config(
        "SOLVER.SCHEDULE=constant", "SOLVER.WARMUP_EPOCHS=4", "SOLVER.WARMUP_FACTOR=0.2", "SOLVER.WARMUP_BY=epoch"
    )
    by_hand = {0: 0.2, 9: 0.2, 10: 0.4, 19: 0.4, 20: 0.6, 39: 0.8, 40: 1.0}
    assert {step: learning_rate_factor(cfg, step) for step in by_hand} == pytest.approx(by_hand)


def test_without_a_number_of_steps_the_schedule_counts_epochs():
    warmup = ["SOLVER.WARMUP_EPOCHS=2", "SOLVER.WARMUP_FACTOR=0.5", "SOLVER.WARMUP_BY=epoch"]
    cfg = load_config(overrides=["SOLVER.ITERS_PER_EPOCH=0", "SOLVER.STEP_EPOCHS=3", *warmup])
    expected = [0.5, 0.75, 1, 0.1, 0.1, 0.1, 0.01]
    assert [learning_rate_factor(cfg, epoch) for epoch in range(7)] == pytest.approx(expected)


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


class Net(nn.Module):
    """Two modules whose names begin alike."""

    def __init__(self):
        super().__init__()
        self.block1 = nn.Linear(2, 2)
        self.block10 = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))


def rates(cfg, model: nn.Module) -> dict[str, float]:
    names = {id(p): name for name, p in model.named_parameters()}
    groups = build_optimizer(cfg, model).param_groups
    return {names[id(p)]: group["lr"] for group in groups for p in group["params"]}


def test_frozen_parameters_are_left_out_and_told(caplog):
    model = Net()
    with caplog.at_level("INFO", logger="fastreid_uns"):
        cfg = config("SOLVER.FREEZE=[block1, block10.0.weight]")
        freeze(cfg, model)
    assert "SOLVER.FREEZE: block1, 2 tensors do not train" in caplog.text
    assert list(rates(cfg, model)) == ["block10.0.bias", "block10.1.weight", "block10.1.bias"]
    assert [p.requires_grad for p in model.block1.parameters()] == [False, False]


def test_the_longest_beginning_of_a_name_sets_the_factor_on_its_rate():
    cfg = config(
        "SOLVER.BASE_LR=0.5", "SOLVER.RATE_FACTORS={block10.1: 4, block10: 0.1}", "SOLVER.WEIGHT_DECAY_NORM=0.0"
    )
    model = Net()
    expected = {"block1.weight": 0.5, "block1.bias": 0.5, "block10.0.weight": 0.05, "block10.0.bias": 0.05}
    assert rates(cfg, model) == pytest.approx({**expected, "block10.1.weight": 2.0, "block10.1.bias": 2.0})
    optimizer = build_optimizer(cfg, model)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [5e-4, 0.0, 5e-4, 0.0, 0.0]
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([0.5, 0.5, 0.05, 0.05, 2.0])
    schedule = build_schedule(config("SOLVER.STEP_EPOCHS=1"), optimizer)
    for _ in range(10):
        optimizer.step()
        schedule.step()
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([0.05, 0.05, 0.005, 0.005, 0.2])


@pytest.mark.parametrize(
    ("change", "kind", "message"),
    [
        (
            "FREEZE=[block1x]",
            KeyError,
            r"FREEZE: 'block1x' begins the name of no parameter that .*; did you mean block1",
        ),
        ("FREEZE=[block]", KeyError, r"Names begin with block1, block1\.bias, .*block10\.1"),
        ("FREEZE=[block1, block10]", ValueError, "SOLVER.FREEZE leaves no parameter that trains"),
        ("RATE_FACTORS={head: 2.0}", KeyError, "SOLVER.RATE_FACTORS: 'head' begins the name of no parameter"),
        ("RATE_FACTORS={block1: 0}", ValueError, r"RATE_FACTORS: block1 is 0; a number above 0 .*SOLVER\.FREEZE"),
        ("RATE_FACTORS={block1: fast}", ValueError, "block1 is 'fast'; a number above 0"),
        ("RATE_FACTORS={block1: .inf}", ValueError, "inf"),
    ],
)
def test_wrong_names_and_factors(change, kind, message):
    model, cfg = Net(), config(f"SOLVER.{change}")

    def prepare() -> None:
        freeze(cfg, model)
        build_optimizer(cfg, model)

    with pytest.raises(kind, match=message):
        prepare()


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


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("{betas: [0.9]}", r"OPTIMIZER_ARGS is \{'betas': \[0\.9\]\}, which Adam does not accept \(IndexError"),
        ("{betas: [2, 2]}", "which Adam does not accept .ValueError: Invalid beta"),
        ("{eps: small}", "which Adam does not accept .TypeError"),
        ("{lr: 3}", r"OPTIMIZER_ARGS: lr is given by SOLVER\.BASE_LR\. Take it out"),
        ("{weight_decay: 0.1}", r"weight_decay is given by SOLVER\.WEIGHT_DECAY"),
        ("{params: 3}", r"params is given by the model"),
    ],
)
def test_arguments_that_the_optimiser_does_not_accept(arguments, message):
    with pytest.raises(InvalidValue, match=message):
        build_optimizer(config(f"SOLVER.OPTIMIZER_ARGS={arguments}"), nn.Linear(1, 1))


@pytest.mark.parametrize("name", ["LBFGS", "SparseAdam"])
def test_optimisers_that_cannot_train_a_network(name):
    with pytest.raises(InvalidValue, match=rf"SOLVER\.OPTIMIZER: {name} .* Choose another one"):
        build_optimizer(config(f"SOLVER.OPTIMIZER={name}"), nn.Linear(1, 1))
