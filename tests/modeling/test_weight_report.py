"""Every tensor of the file and of the model is accounted for, whatever stands before the names."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from fastreid_uns.errors import InvalidState
from fastreid_uns.modeling.backbones.base import Backbone
from fastreid_uns.modeling.backbones.osnet import OSNet
from fastreid_uns.modeling.backbones.small_net import SmallNet
from fastreid_uns.modeling.backbones.timm_net import TimmBackbone
from fastreid_uns.modeling.backbones.vit import ViT
from fastreid_uns.modeling.encoder import Encoder
from fastreid_uns.modeling.heads import EmbeddingHead
from fastreid_uns.modeling.weight_names import without_wrappers
from fastreid_uns.modeling.weights import WeightReport, load_weights

SIZE = (32, 16)
State = dict[str, Tensor]


def encoder_of(backbone: Backbone, **head) -> Encoder:
    return Encoder(backbone, EmbeddingHead(backbone.out_channels, **head), mean=[0.5] * 3, std=[0.5] * 3)


def other_values(state: State) -> State:
    generator = torch.Generator().manual_seed(0)
    return {
        name: torch.rand(value.shape, generator=generator) + 7 if value.is_floating_point() else value + 3
        for name, value in state.items()
    }


def renamed(state: State, prefix: str) -> State:
    return {prefix + name: value for name, value in state.items()}


def load(encoder: nn.Module, content: object, folder: Path) -> WeightReport:
    torch.save(content, folder / "w.pth")
    return load_weights(encoder, str(folder / "w.pth"))


def assert_all_accounted(report: WeightReport, model: nn.Module, file: State) -> None:
    """Each name of the model once; as many names of the file as there are tensors that were not used."""
    mismatched = [name.split()[0] for name in report.mismatched]
    names = sorted([*report.matched, *report.missing, *mismatched])
    assert names == sorted(name.replace("backbone.net.", "backbone.") for name in model.state_dict())
    left = [*report.unexpected, *(name for name in report.passed_over if not name.endswith("(whole)"))]
    assert len(left) == len(set(left))
    assert set(left) <= set(file)
    assert len(report.matched) + len(mismatched) + len(left) == len(file)


WRAPPED = [
    ("_orig_mod.module.", None),
    ("module._orig_mod.", None),
    ("module.module.", None),
    ("model.", "state_dict"),
    ("model.module._orig_mod.", "state_dict"),
    ("", "model_state_dict"),
    ("_orig_mod.", "model_state_dict"),
    ("net.", "state_dict"),
    ("module.", "net"),
]


@pytest.mark.parametrize(("prefix", "key"), WRAPPED)
@pytest.mark.parametrize("whole", [False, True], ids=["backbone", "encoder"])
def test_wrappers_are_taken_off_until_nothing_changes(
    prefix: str, key: str | None, whole: bool, tmp_path: Path
) -> None:
    encoder = encoder_of(SmallNet(SIZE, width=4))
    wanted = other_values((encoder if whole else encoder.backbone).state_dict())
    state = renamed(wanted, prefix)
    report = load(encoder, state if key is None else {key: state, "epoch": 3}, tmp_path)
    torch.testing.assert_close(dict((encoder if whole else encoder.backbone).state_dict()), wanted)
    assert report.unexpected == []
    assert_all_accounted(report, encoder, state)


UNKNOWN = ["encoder.", "visual.", "teacher.", "student.module.backbone.", "net.feature_extractor.", "model.trunk.net."]


@pytest.mark.parametrize("prefix", UNKNOWN)
def test_a_prefix_that_nobody_knows_is_found(prefix: str, tmp_path: Path) -> None:
    encoder = encoder_of(SmallNet(SIZE, width=4))
    wanted = other_values(encoder.backbone.state_dict())
    state = {"projector.weight": torch.ones(2, 2), **renamed(wanted, prefix)}
    report = load(encoder, state, tmp_path)
    torch.testing.assert_close(dict(encoder.backbone.state_dict()), wanted)
    assert report.unexpected == ["projector.weight"]
    assert_all_accounted(report, encoder, state)


@pytest.mark.parametrize("key", ["params_ema", "ema_state_dict", "backbone", "net_state_dict"])
def test_a_part_of_a_checkpoint_that_nobody_knows_is_found(key: str, tmp_path: Path) -> None:
    encoder = encoder_of(SmallNet(SIZE, width=4))
    wanted = other_values(encoder.backbone.state_dict())
    optimiser = {"state": {0: {"exp_avg": torch.ones(2)}}}
    report = load(encoder, {"optimizer": optimiser, key: renamed(wanted, "module."), "epoch": 3}, tmp_path)
    torch.testing.assert_close(dict(encoder.backbone.state_dict()), wanted)
    assert report.unexpected == ["optimizer.state.0.exp_avg"]


@pytest.mark.parametrize("first", ["student", "teacher"])
def test_of_teacher_and_student_the_teacher_counts(first: str, tmp_path: Path) -> None:
    encoder = encoder_of(SmallNet(SIZE, width=4))
    teacher = other_values(encoder.backbone.state_dict())
    parts = {
        "teacher": renamed(teacher, "teacher.net1."),
        "student": renamed(dict(encoder.backbone.state_dict()), "student.net1."),
    }
    second = "teacher" if first == "student" else "student"
    load(encoder, {**parts[first], **parts[second]}, tmp_path)
    torch.testing.assert_close(dict(encoder.backbone.state_dict()), teacher)


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (lambda value: value * float("nan"), "with NaN or infinite values"),
        (lambda value: value / 0, "with NaN or infinite values"),
        (lambda value: value.to("meta"), "without values"),
        (lambda value: value.to_sparse(), "sparse or quantised"),
    ],
)
def test_one_tensor_without_finite_numbers_is_refused(change, what: str, tmp_path: Path) -> None:
    encoder = encoder_of(SmallNet(SIZE, width=4))
    before = other_values(encoder.state_dict())
    encoder.load_state_dict(before)
    state = other_values(encoder.backbone.state_dict())
    name = next(name for name, value in state.items() if value.dim() == 4)
    with pytest.raises(InvalidState, match=f"1 of its tensors cannot be used, such as backbone.{name} {what}; finite"):
        load(encoder, {**state, name: change(state[name])}, tmp_path)
    torch.testing.assert_close(dict(encoder.state_dict()), before)


def test_whole_numbers_are_no_weights(tmp_path: Path) -> None:
    encoder = encoder_of(SmallNet(SIZE, width=4))
    state = {name: value.to(torch.int8) for name, value in other_values(encoder.backbone.state_dict()).items()}
    with pytest.raises(InvalidState, match=r"torch.int8 for torch.float32"):
        load(encoder, state, tmp_path)


def test_lightning_with_an_optimiser_and_a_loss_beside_the_model(tmp_path: Path) -> None:
    encoder = encoder_of(SmallNet(SIZE, width=4))
    state = {**renamed(other_values(encoder.backbone.state_dict()), "model."), "criterion.centers": torch.ones(3, 2)}
    optimiser = {"state": {0: {"exp_avg": torch.ones(2)}}}
    content = {
        "state_dict": state,
        "pytorch-lightning_version": "2.4",
        "optimizer_states": [optimiser],
        "ema": {"x": torch.ones(1)},
    }
    report = load(encoder, content, tmp_path)
    assert report.share == 1.0
    assert report.unexpected == ["criterion.centers"]
    assert report.passed_over == {"ema (whole)": "another part of the file"}
    assert_all_accounted(report, encoder, state)


def test_names_with_a_wrapper_inside_the_network_survive() -> None:
    assert without_wrappers("module._orig_mod.model.layer1.module.weight") == "layer1.module.weight"


class Wrapping(Backbone):
    """A plug-in whose network is an attribute with the name of a wrapper."""

    def __init__(self) -> None:
        super().__init__()
        self.out_channels = 2
        self.model = nn.Conv2d(3, 2, 1)


@pytest.mark.parametrize("prefix", ["", "model.", "module.model.", "backbone.model.", "encoder.backbone.model."])
def test_a_backbone_whose_own_names_begin_like_a_wrapper(prefix: str, tmp_path: Path) -> None:
    encoder = encoder_of(Wrapping())
    wanted = other_values(encoder.backbone.model.state_dict())
    assert load(encoder, renamed(wanted, prefix), tmp_path).share == 1.0
    torch.testing.assert_close(dict(encoder.backbone.model.state_dict()), wanted)


def test_our_checkpoint_of_a_timm_network(tmp_path: Path) -> None:
    trained = encoder_of(TimmBackbone((64, 64), model="test_convnext"))
    wanted = other_values(trained.state_dict())
    encoder = encoder_of(TimmBackbone((64, 64), model="test_convnext"))
    state = {**renamed(wanted, "encoder."), "memory.features": torch.ones(3, 2)}
    report = load(encoder, {"model": state}, tmp_path)
    torch.testing.assert_close(dict(encoder.state_dict()), wanted)
    assert report.missing == []
    assert report.passed_over == {"memory.features": "of the training, not of the encoder"}


@pytest.mark.parametrize("neck", ["bnneck", "none"])
def test_the_neck_of_an_old_fast_reid(neck: str, tmp_path: Path) -> None:
    encoder = encoder_of(SmallNet(SIZE, width=4), neck=neck)
    norm = other_values(nn.BatchNorm1d(32).state_dict())
    state = {
        **renamed(other_values(encoder.backbone.state_dict()), "backbone."),
        **renamed(norm, "heads.bnneck."),
        "heads.classifier.weight": torch.ones(9, 32),
        "pixel_mean": torch.ones(1, 3, 1, 1),
    }
    report = load(encoder, {"model": state, "optimizer": {"lr": 1.0}}, tmp_path)
    assert report.family == "fast-reid"
    if neck == "bnneck":
        torch.testing.assert_close(dict(encoder.head.embed.neck.state_dict()), norm)
        assert report.unexpected == []
    else:
        assert report.unexpected == [f"heads.bnneck.{end}" for end in ("bias", "running_mean", "running_var", "weight")]
    assert set(report.passed_over) >= {"heads.classifier.weight", "pixel_mean"}
    assert_all_accounted(report, encoder, state)


def test_the_projection_of_fast_reid(tmp_path: Path) -> None:
    """Its 1x1 convolution is our linear layer, whose bias it lacks."""
    encoder = encoder_of(SmallNet(SIZE, width=4), dim=6)
    state = {
        **renamed(other_values(encoder.backbone.state_dict()), "backbone."),
        "heads.bottleneck.0.weight": torch.rand(6, 32, 1, 1),
        **renamed(other_values(nn.BatchNorm2d(6).state_dict()), "heads.bottleneck.1."),
    }
    report = load(encoder, {"model": state}, tmp_path)
    torch.testing.assert_close(
        encoder.head.embed.project.weight.detach(), state["heads.bottleneck.0.weight"][:, :, 0, 0]
    )
    torch.testing.assert_close(encoder.head.embed.neck.running_mean, state["heads.bottleneck.1.running_mean"])
    assert report.missing == ["head.embed.project.bias"]
    assert_all_accounted(report, encoder, state)


def test_the_linear_layer_of_torchreid_is_passed_over_and_said_so(tmp_path: Path) -> None:
    encoder = encoder_of(OSNet(SIZE, width=0.25))
    after = nn.Sequential(nn.Linear(128, 512), nn.BatchNorm1d(512))
    extra = {**renamed(dict(after.state_dict()), "fc."), "classifier.weight": torch.ones(5, 512)}
    state = renamed({**other_values(encoder.backbone.state_dict()), **extra}, "module.")
    report = load(encoder, {"state_dict": state, "epoch": 60, "rank1": 0.9}, tmp_path)
    assert (report.family, report.share) == ("plain", 1.0)
    counter = "module.fc.1.num_batches_tracked"
    assert {name for name in report.passed_over if name != counter} == {f"module.{n}" for n in extra} - {counter}
    assert report.passed_over["module.fc.0.weight"] == "classifier, or linear layer before one; MODEL.HEAD replaces it"
    assert "module.fc.0.weight" in str(report)
    assert_all_accounted(report, encoder, state)


def test_transreid(tmp_path: Path) -> None:
    """Its camera embedding and its branch for patches have no place here, and the report says so."""
    backbone = ViT((64, 32), width=48, depth=1, heads=3)
    encoder = encoder_of(backbone)
    neck = other_values(nn.BatchNorm1d(48).state_dict())
    foreign = {
        "base.sie_embed": torch.ones(6, 1, 48),
        "b2.0.attn.qkv.weight": torch.ones(2, 2),
        "b2.1.weight": torch.ones(2),
    }
    state = {
        **renamed(other_values(backbone.state_dict()), "base."),
        **foreign,
        **renamed(neck, "bottleneck."),
        **renamed(neck, "bottleneck_1."),
        "base.fc.weight": torch.ones(2, 48),
        "classifier_1.weight": torch.ones(3, 48),
    }
    report = load(encoder, state, tmp_path)
    assert (report.family, report.share) == ("Bag of Tricks", 1.0)
    torch.testing.assert_close(dict(encoder.head.embed.neck.state_dict()), neck)
    assert set(report.unexpected) >= set(foreign)
    assert "base.fc.weight" in report.passed_over
    assert_all_accounted(report, encoder, state)


def test_our_checkpoint_with_both_encoders(tmp_path: Path) -> None:
    encoder = encoder_of(SmallNet(SIZE, width=4))
    wanted = other_values(encoder.state_dict())
    state = {**renamed({k: v * 0 for k, v in wanted.items()}, "encoder."), **renamed(wanted, "teacher.")}
    report = load(encoder, {"model": state, "optimizer": {"state": {0: {"exp_avg": torch.ones(2)}}}}, tmp_path)
    assert report.unexpected == []
    assert report.passed_over["optimizer (whole)"] == "another part of the file"
    assert report.passed_over["encoder.head.embed.neck.weight"] == "the other one of encoder and momentum encoder"
    assert_all_accounted(report, encoder, state)


def test_two_tensors_of_one_name(tmp_path: Path) -> None:
    net = nn.Linear(2, 2)
    state = {"weight": torch.full((2, 2), 1.0), "module.weight": torch.full((2, 2), 2.0), "bias": torch.zeros(2)}
    report = load(net, state, tmp_path)
    assert net.weight.tolist() == [[1.0, 1.0], [1.0, 1.0]]
    assert report.unexpected == ["module.weight"]


def test_parts_of_our_own_head_are_no_classifier(tmp_path: Path) -> None:
    encoder = encoder_of(SmallNet(SIZE, width=4), neck="none")
    state = other_values(encoder_of(SmallNet(SIZE, width=4), pooling="gem").state_dict())
    report = load(encoder, {"model": state}, tmp_path)
    assert set(report.unexpected) == {n for n in state if n.startswith("head.") and "tracked" not in n}
    assert_all_accounted(report, encoder, state)
