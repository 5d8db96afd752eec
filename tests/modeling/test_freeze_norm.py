"""`MODEL.FREEZE_NORM`: statistics of the backbone stay in every mode, weight and bias are trained."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from torch import nn

from fastreid_uns.config import load_config
from fastreid_uns.engine.default import DefaultTrainer
from fastreid_uns.errors import InvalidValue
from fastreid_uns.modeling.meta_arch import build_model
from fastreid_uns.modeling.norm import FrozenBatchNorm, freeze_norm_statistics, ghost_batch_norm


def a_net() -> nn.Sequential:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.InstanceNorm2d(4, affine=True), nn.Dropout(0.5))
    net[1].running_mean.uniform_(-1, 1)
    net[1].running_var.uniform_(1, 2)
    return net


def test_training_normalises_by_the_running_statistics_and_leaves_them_alone() -> None:
    plain = a_net()
    frozen = freeze_norm_statistics(copy.deepcopy(plain)).train()
    before = copy.deepcopy(dict(frozen.named_buffers()))
    x = torch.randn(8, 3, 2, 2)
    after_conv = plain[0](x)
    shape = (1, 4, 1, 1)
    wanted = (after_conv - plain[1].running_mean.view(shape)) / (plain[1].running_var.view(shape) + 1e-5).sqrt()
    torch.testing.assert_close(frozen[1](frozen[0](x)), wanted)
    frozen(x).square().sum().backward()
    for name, value in frozen.named_buffers():
        assert torch.equal(value, before[name]), name
    assert frozen[3].training


def test_weight_and_bias_are_trained() -> None:
    frozen = freeze_norm_statistics(a_net()).train()
    (frozen[1](torch.randn(8, 4, 2, 2)) * torch.rand(8, 4, 2, 2)).sum().backward()
    assert frozen[1].weight.grad.abs().min() > 0
    assert frozen[1].bias.grad.abs().min() > 0


def test_names_and_values_stay_and_layers_without_statistics_as_well() -> None:
    plain = nn.Sequential(nn.BatchNorm2d(3), nn.BatchNorm2d(3, track_running_stats=False), nn.LayerNorm(3))
    before = plain.state_dict()
    frozen = freeze_norm_statistics(plain)
    assert list(frozen.state_dict()) == list(before)
    assert [type(layer) for layer in frozen] == [FrozenBatchNorm, nn.BatchNorm2d, nn.LayerNorm]


def test_the_activation_inside_a_timm_layer_survives() -> None:
    from timm.layers import BatchNormAct2d

    norm = BatchNormAct2d(3).eval()
    x = torch.randn(4, 3, 2, 2)
    assert torch.equal(freeze_norm_statistics(copy.deepcopy(norm)).train()(x), norm(x))


def test_groups_leave_frozen_layers_frozen() -> None:
    net = ghost_batch_norm(freeze_norm_statistics(a_net()), 4).train()
    assert type(net[1]) is FrozenBatchNorm
    before = net[1].running_mean.clone()
    net(torch.randn(6, 3, 2, 2))  # no multiple of the group, which does not matter here
    assert torch.equal(net[1].running_mean, before)


def statistics(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.named_buffers() if "running" in name or "tracked" in name}


@pytest.mark.parametrize("buffers", ["own", "copy", "average"])
def test_training_leaves_the_statistics_of_both_encoders_alone(tiny: list[str], tiny_set: dict, buffers: str) -> None:
    """The neck of the head is fresh and is trained with the statistics of its batches, as always."""
    keys = ["MODEL.FREEZE_NORM=true", "MODEL.MOMENTUM_ENCODER=true", f"MODEL.MOMENTUM_BUFFERS={buffers}"]
    one_epoch = ["SOLVER.EPOCHS=1", "TEST.PERIOD=0", f"DATASETS.TRAIN={json.dumps(tiny_set)}"]
    trainer = DefaultTrainer(load_config(overrides=[*tiny, *keys, *one_epoch]))
    before, weights = statistics(trainer.model), copy.deepcopy(trainer.model.encoder.backbone.state_dict())
    trainer.train()
    after = statistics(trainer.model)
    backbone = {name for name in before if ".backbone." in name}
    assert len([name for name in backbone if name.startswith("teacher.")]) * 2 == len(backbone) > 0
    assert [name for name in backbone if not torch.equal(before[name], after[name])] == []
    assert not torch.equal(
        before["encoder.head.embed.neck.running_mean"], after["encoder.head.embed.neck.running_mean"]
    )
    norms = [m for m in trainer.model.encoder.backbone.modules() if isinstance(m, FrozenBatchNorm)]
    moved = [n for n, v in trainer.model.encoder.backbone.state_dict().items() if not torch.equal(v, weights[n])]
    assert any(name.endswith(".1.weight") for name in moved)  # of a norm layer
    assert not any(norm.training for norm in norms)


def test_norms_of_each_domain_are_refused() -> None:
    cfg = load_config(
        overrides=[
            "MODEL.FREEZE_NORM=true",
            "MODEL.DOMAIN_BN=true",
            "DATASETS.SOURCES={a: {NAME: synthetic}}",
            "MODEL.BACKBONE={NAME: SmallNet}",
        ]
    )
    with pytest.raises(InvalidValue, match=r"DOMAIN_BN and MODEL\.FREEZE_NORM are both true.*Set one"):
        build_model(cfg, 4)


@pytest.mark.parametrize("momentum_encoder", ["true", "false"])
def test_an_unknown_policy_for_the_statistics_is_refused_with_and_without_a_momentum_encoder(tiny, momentum_encoder):
    keys = [f"MODEL.MOMENTUM_ENCODER={momentum_encoder}", "MODEL.MOMENTUM_BUFFERS=mean"]
    with pytest.raises(ValueError, match=r"MOMENTUM_BUFFERS: 'mean' is unknown; accepted: own, copy, average"):
        build_model(load_config(overrides=[*tiny, *keys]), 4)
