"""Files of every family, made from small networks whose tensors are all different."""

from __future__ import annotations

import argparse
import os
import sys
from collections import OrderedDict
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from fastreid_uns.errors import InvalidValue, MissingPackage
from fastreid_uns.modeling import weight_files
from fastreid_uns.modeling.backbones.base import Backbone
from fastreid_uns.modeling.backbones.osnet import OSNet
from fastreid_uns.modeling.backbones.small_net import SmallNet
from fastreid_uns.modeling.backbones.timm_net import TimmBackbone
from fastreid_uns.modeling.backbones.vit import ViT
from fastreid_uns.modeling.encoder import Encoder
from fastreid_uns.modeling.heads import EmbeddingHead
from fastreid_uns.modeling.norm import domain_batch_norm, ghost_batch_norm
from fastreid_uns.modeling.weights import load_weights

SIZE = (32, 16)
State = dict[str, Tensor]


def encoder_of(backbone: Backbone, **head) -> Encoder:
    return Encoder(backbone, EmbeddingHead(backbone.out_channels, **head), mean=[0.5] * 3, std=[0.5] * 3)


def other_values(state: State, seed: int = 0) -> State:
    """The same names and shapes, filled with numbers that no initialisation gives."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.rand(value.shape, generator=generator) + 7 if value.is_floating_point() else value + 3
        for name, value in state.items()
    }


def renamed(state: State, prefix: str) -> State:
    return {prefix + name: value for name, value in state.items()}


class ThinResNet(Backbone):
    """The names of a ResNet, with hardly a number in it."""

    def __init__(self) -> None:
        super().__init__()
        self.out_channels = 2
        self.conv1, self.bn1 = nn.Conv2d(3, 2, 1, bias=False), nn.BatchNorm2d(2)
        for i in (1, 2, 3, 4):
            block = nn.Module()
            block.conv1, block.bn1 = nn.Conv2d(2, 2, 3, bias=False), nn.BatchNorm2d(2)
            block.downsample = nn.Sequential(nn.Conv2d(2, 2, 1, bias=False), nn.BatchNorm2d(2))
            setattr(self, f"layer{i}", nn.Sequential(block))


def resnet_file(kind: str, state: State, head: State) -> object:
    """A ResNet checkpoint as the projects write it."""
    backbone = {name.removeprefix("backbone."): value for name, value in state.items() if name.startswith("backbone.")}
    fc = {"fc.weight": torch.ones(10, 512), "fc.bias": torch.ones(10)}
    neck = {name.removeprefix("head.embed.neck."): value for name, value in head.items() if "neck" in name}
    p = head["head.pool.p"]
    relu = 0 if kind == "sequential_without_relu" else 1
    places = {"conv1": 0, "bn1": 1, **{f"layer{i}": 2 + relu + i for i in (1, 2, 3, 4)}}
    base = {f"base.{places[k.split('.')[0]]}.{k.split('.', 1)[1]}": v for k, v in backbone.items()}
    spcl = {**base, **renamed(neck, "feat_bn."), "gap.p": p}
    fastreid = {**renamed(backbone, "backbone."), **renamed(neck, "heads.bottleneck.0."), "heads.pool_layer.p": p}
    return {
        "torchvision": OrderedDict({**backbone, **fc}),
        "torchreid": {
            "state_dict": renamed({**backbone, "classifier.weight": torch.ones(3, 3)}, "module."),
            "epoch": 5,
        },
        "moco": {
            "arch": "resnet18",
            "state_dict": {
                **renamed(renamed({**backbone, **{"fc.0.weight": torch.ones(3, 3)}}, "encoder_q."), "module."),
                **renamed(renamed({k: v * 0 for k, v in backbone.items()}, "encoder_k."), "module."),
                "module.queue": torch.zeros(4, 4),
            },
        },
        "fast-reid": {
            "model": {**fastreid, "heads.weight": torch.ones(3, 3), "pixel_mean": torch.ones(3)},
            "iteration": 3,
        },
        "sequential": {"state_dict": renamed(spcl, "module."), "epoch": 1, "best_mAP": np.float64(0.7)},
        "sequential_without_relu": {"state_dict": renamed(spcl, "module.")},
        "bag_of_tricks": {
            **renamed(backbone, "base."),
            **renamed(neck, "bottleneck."),
            "classifier.weight": fc["fc.weight"],
        },
        "transreid_ssl": {"state_dict": renamed({**backbone, **renamed(neck, "bottleneck.")}, "module.")},
        "dino": {"student": renamed(backbone, "module.backbone."), "args": argparse.Namespace(lr=1)},
        "ours": {"model": {**state, **head}},
        "ours_training": {
            "model": {**renamed({**state, **head}, "encoder."), "memory.features": torch.zeros(3, 2)},
            "labels": torch.zeros(4),
        },
        "ours_teacher": {
            "model": {
                **renamed({k: v * 0 for k, v in {**state, **head}.items()}, "encoder."),
                **renamed({**state, **head}, "teacher."),
            }
        },
    }[kind]


WITH_HEAD = ("fast-reid", "sequential", "sequential_without_relu", "ours", "ours_training", "ours_teacher")
FAMILY = {
    "torchvision": "plain",
    "torchreid": "plain",
    "moco": "MoCo",
    "fast-reid": "fast-reid",
    "sequential": "SpCL family",
    "sequential_without_relu": "SpCL family trained with STEM_RELU false",
    "bag_of_tricks": "Bag of Tricks",
    "transreid_ssl": "plain",
    "dino": "DINO",
    "ours": "fastreid_uns",
    "ours_training": "fastreid_uns checkpoint",
    "ours_teacher": "fastreid_uns checkpoint",
}


@pytest.mark.parametrize("kind", sorted(FAMILY))
def test_values_of_each_family_arrive(kind: str, tmp_path: Path) -> None:
    encoder = encoder_of(ThinResNet(), pooling="gem")
    wanted = other_values(encoder.state_dict())
    head = {name: value for name, value in wanted.items() if name.startswith("head.")}
    body = {name: value for name, value in wanted.items() if name.startswith("backbone.")}
    file = tmp_path / "weights.pth"
    torch.save(resnet_file(kind, body, head), file)
    report = load_weights(encoder, str(file))

    got = encoder.state_dict()
    arrived = body if kind not in WITH_HEAD else {**body, **head}
    if kind in ("bag_of_tricks", "transreid_ssl"):
        arrived = {**body, **{name: value for name, value in head.items() if "neck" in name}}
    for name, value in arrived.items():
        torch.testing.assert_close(got[name], value, msg=name)
    assert report.family == FAMILY[kind]
    assert report.share == 1.0
    assert sorted([*report.matched, *report.missing]) == sorted(wanted)
    assert set(report.missing) == {n for n in head if n not in arrived}
    assert report.unexpected == []


@pytest.mark.parametrize(
    ("backbone", "safe"),
    [
        (lambda: OSNet(SIZE, width=0.25), False),
        (lambda: TimmBackbone((64, 64), model="test_convnext", last_stride=2), True),
        (lambda: SmallNet(SIZE, width=4), False),
    ],
)
def test_plain_weights_of_other_networks(backbone, safe: bool, tmp_path: Path) -> None:
    made = backbone()
    own = made.net.state_dict() if isinstance(made, TimmBackbone) else made.state_dict()
    file = tmp_path / ("weights.safetensors" if safe else "weights.pth")
    content = {**other_values(own), "head.fc.weight": torch.ones(2, 2), "fc.weight": torch.ones(2)}
    (save_file if safe else torch.save)(content, file)
    report = load_weights(encoder_of(made), str(file))
    got = made.net.state_dict() if isinstance(made, TimmBackbone) else made.state_dict()
    for name in own:
        torch.testing.assert_close(got[name], content[name], msg=name)
    assert report.share == 1.0
    assert report.unexpected == []


def test_a_backbone_alone_can_be_loaded(tmp_path: Path) -> None:
    net = SmallNet(SIZE, width=4)
    wanted = other_values(net.state_dict())
    torch.save(wanted, tmp_path / "w.pth")
    assert load_weights(net, str(tmp_path / "w.pth")).share == 1.0
    torch.testing.assert_close(net.state_dict(), wanted)


def test_grouped_layers_take_plain_weights(tmp_path: Path) -> None:
    net = SmallNet(SIZE, width=4)
    torch.save(other_values(net.state_dict()), tmp_path / "w.pth")
    assert load_weights(ghost_batch_norm(net, 4), str(tmp_path / "w.pth")).share == 1.0


def test_the_target_domain_of_a_domain_checkpoint_is_taken(tmp_path: Path) -> None:
    trained = domain_batch_norm(encoder_of(SmallNet(SIZE, width=4)), 2)
    wanted = other_values(trained.state_dict())
    torch.save({"model": renamed(wanted, "encoder.")}, tmp_path / "w.pth")
    encoder = encoder_of(SmallNet(SIZE, width=4))
    load_weights(encoder, str(tmp_path / "w.pth"))
    for name, value in encoder.state_dict().items():
        place = name.rpartition(".")
        inside = f"{place[0]}.domains.0.{place[2]}"
        torch.testing.assert_close(value, wanted.get(name, wanted.get(inside)), msg=name)


def a_vit(size: tuple[int, int], **options) -> ViT:
    return ViT(size, width=48, depth=1, heads=3, **options)


def test_positions_are_resized_to_the_image(tmp_path: Path) -> None:
    """From 4x2 patches of 64x32 pixels to 6x3 of 96x48; the class token's row stays."""
    state = other_values(a_vit((64, 32)).state_dict())
    torch.save({"teacher": renamed(state, "backbone."), "student": renamed(state, "x.")}, tmp_path / "w.pth")
    backbone = a_vit((96, 48), pretrained_grid=[4, 2])
    report = load_weights(encoder_of(backbone), str(tmp_path / "w.pth"))
    old = state["pos_embed"][0, 1:].T.reshape(48, 4, 2)
    for channel in (0, 20):
        resized = F.interpolate(old[None, [channel]], size=(6, 3), mode="bicubic", align_corners=False)
        torch.testing.assert_close(backbone.pos_embed[0, 1:, channel], resized.flatten(), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(backbone.pos_embed[0, 0], state["pos_embed"][0, 0])
    assert report.reshaped == ["backbone.pos_embed (1, 9, 48) to (1, 19, 48)"]
    assert "backbone.pos_embed" in report.matched


def test_positions_of_a_timm_model_are_resized(tmp_path: Path) -> None:
    source = TimmBackbone((48, 48), model="test_vit", last_stride=2)
    torch.save(source.net.state_dict(), tmp_path / "w.pth")
    backbone = TimmBackbone((64, 32), model="test_vit", last_stride=2)
    report = load_weights(encoder_of(backbone), str(tmp_path / "w.pth"))
    assert len(report.reshaped) == 1
    assert report.share == 1.0


@pytest.mark.parametrize("part_tokens", [0, 3])
def test_part_tokens_of_pass(part_tokens: int, tmp_path: Path) -> None:
    state = other_values(a_vit((64, 32), conv_stem=True).state_dict())
    tokens = {f"part_token{i}": torch.full((1, 1, 48), float(i)) for i in (1, 2, 3)}
    places = {f"part{i}_pos": torch.full((1, 1, 48), 10.0 * i) for i in (1, 2, 3)}
    apart = {"cls_pos": state["pos_embed"][:, :1], "pos_embed": state["pos_embed"][:, 1:]}
    content = {"teacher": renamed({**state, **tokens, **places, **apart}, "module.backbone.")}
    content["teacher"]["module.head.mlp.0.weight"] = torch.ones(2)
    torch.save(content, tmp_path / "w.pth")
    backbone = a_vit((64, 32), conv_stem=True, part_tokens=part_tokens)
    report = load_weights(encoder_of(backbone), str(tmp_path / "w.pth"))
    assert report.family == "DINO, part tokens"
    torch.testing.assert_close(backbone.pos_embed.detach(), state["pos_embed"])
    torch.testing.assert_close(backbone.state_dict()["patch_embed.conv.4.IN.bias"], state["patch_embed.conv.4.IN.bias"])
    if part_tokens:
        assert backbone.part_tokens[0, :, 5].tolist() == [1.0, 2.0, 3.0]
        assert backbone.part_pos[0, :, 5].tolist() == [10.0, 20.0, 30.0]
        assert report.unexpected == []
    else:
        apart = [*(f"part_token{i}" for i in (1, 2, 3)), *(f"part{i}_pos" for i in (1, 2, 3))]
        assert report.unexpected == sorted(f"module.backbone.{name}" for name in apart)


def test_weights_of_another_network_are_refused_and_nothing_changes(tmp_path: Path) -> None:
    torch.save(SmallNet(SIZE, width=8).state_dict(), tmp_path / "w.pth")
    net = SmallNet(SIZE, width=4)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    with pytest.raises(RuntimeError, match=r"0\.0% of the backbone's tensors.*at least 90% are needed") as caught:
        load_weights(net, str(tmp_path / "w.pth"))
    assert "mismatched" in str(caught.value)
    assert "backbone.stem.0.0.weight (8, 3, 3, 3) for (4, 3, 3, 3)" in str(caught.value)
    torch.testing.assert_close(net.state_dict(), before)


def test_one_tensor_of_another_shape_is_refused(tmp_path: Path) -> None:
    """21 of 22 tensors would be enough, but the patches would stay random."""
    state = a_vit((64, 32)).state_dict()
    state["patch_embed.proj.weight"] = torch.ones(48, 3, 8, 8)
    torch.save(state, tmp_path / "w.pth")
    net = a_vit((64, 32))
    before = net.patch_embed.proj.weight.detach().clone()
    message = (
        r"1 tensors of the backbone have another shape.* of a network with PATCH 8 instead of 16\. Set MODEL\.BACK"
    )
    with pytest.raises(RuntimeError, match=message):
        load_weights(net, str(tmp_path / "w.pth"))
    assert torch.equal(net.patch_embed.proj.weight, before)


def test_a_head_of_another_shape_is_refused_or_starts_anew(tmp_path: Path) -> None:
    torch.save(other_values(encoder_of(SmallNet(SIZE, width=4), dim=6).state_dict()), tmp_path / "w.pth")
    encoder = encoder_of(SmallNet(SIZE, width=4), dim=5)
    before = {name: value.clone() for name, value in encoder.head.state_dict().items()}
    message = r"6 tensors of the head have another shape .* \(6,.*for \(5,.*MODEL\.WEIGHTS_HEAD to false"
    with pytest.raises(RuntimeError, match=message):
        load_weights(encoder, str(tmp_path / "w.pth"))
    report = load_weights(encoder, str(tmp_path / "w.pth"), head=False)
    assert report.share == 1.0
    assert len(report.passed_over) == 7  # projection and neck, with the counter of its batches
    torch.testing.assert_close(dict(encoder.head.state_dict()), before)


@pytest.mark.parametrize("absent", ["part2_pos", "cls_pos", "part_token2"])
def test_part_tokens_that_are_not_complete(absent: str, tmp_path: Path) -> None:
    state = {**a_vit((64, 32)).state_dict(), "cls_pos": torch.ones(1, 1, 48)}
    state |= {f"part_token{i}": torch.ones(1, 1, 48) for i in (1, 2, 3)}
    state |= {f"part{i}_pos": torch.ones(1, 1, 48) for i in (1, 2, 3)}
    del state[absent]
    torch.save(state, tmp_path / "w.pth")
    with pytest.raises(RuntimeError, match=rf"the file has part_token1 but no {absent}; part tokens are accepted with"):
        load_weights(a_vit((64, 32), part_tokens=3), str(tmp_path / "w.pth"))


def test_the_share_decides(tmp_path: Path) -> None:
    """23 of 25 tensors are 92 %, 22 are 88 %."""
    net = nn.Sequential(*(nn.Linear(2, 2, bias=False) for _ in range(25)))
    state = net.state_dict()
    for dropped, enough in ((2, True), (3, False)):
        torch.save({name: state[name] for name in list(state)[dropped:]}, tmp_path / "w.pth")
        if enough:
            report = load_weights(net, str(tmp_path / "w.pth"))
            assert report.share == 23 / 25
            assert report.missing == ["backbone.0.weight", "backbone.1.weight"]
        else:
            with pytest.raises(RuntimeError, match=r"88\.0%"):
                load_weights(net, str(tmp_path / "w.pth"))
    assert load_weights(net, str(tmp_path / "w.pth"), min_share=0.8).share == 22 / 25


def test_report_shows_counts_and_names(tmp_path: Path) -> None:
    net = nn.Sequential(*(nn.Linear(2, 2, bias=False) for _ in range(9)))
    torch.save({**net.state_dict(), "extra": torch.ones(1)}, tmp_path / "w.pth")
    text = str(load_weights(net, str(tmp_path / "w.pth")))
    assert "w.pth (plain): 100.0% of the backbone" in text
    assert "and 5 more" in text
    assert "extra" in text


def test_half_precision_weights_become_float32(tmp_path: Path) -> None:
    net = nn.Linear(2, 2)
    torch.save({"weight": torch.full((2, 2), 0.5).half(), "bias": torch.zeros(2).half()}, tmp_path / "w.pth")
    load_weights(net, str(tmp_path / "w.pth"))
    assert net.weight.dtype == torch.float32
    assert net.weight.tolist() == [[0.5, 0.5], [0.5, 0.5]]


class Harmful:
    def __reduce__(self) -> tuple:
        return os.mkdir, (str(Path(os.environ["HARM"])),)


def test_code_in_a_file_is_refused_and_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HARM", str(tmp_path / "harm"))
    torch.save({"state_dict": nn.Linear(2, 2).state_dict(), "x": Harmful()}, tmp_path / "w.pth")
    with pytest.raises(RuntimeError, match=r"w\.pth: refused, because it holds \w+\.mkdir .*save only its"):
        load_weights(nn.Linear(2, 2), str(tmp_path / "w.pth"))
    assert not (tmp_path / "harm").exists()


@pytest.mark.filterwarnings("ignore:.*TorchScript", "ignore:.*torch.jit.script")
def test_a_program_with_its_tensors_is_refused(tmp_path: Path) -> None:
    torch.jit.script(nn.Linear(2, 2)).save(str(tmp_path / "w.pt"))
    with pytest.raises(RuntimeError, match=r"w\.pt: a TorchScript archive, which holds a program.*Take a copy in that"):
        load_weights(nn.Linear(2, 2), str(tmp_path / "w.pt"))


@pytest.mark.parametrize("name", ["w.pth", "w.safetensors"])
@pytest.mark.parametrize(
    "content",
    [b"PK\x03\x04 cut", b"\x80\x02 cut", b"\x09\0\0\0\0\0\0\0{cut", b"\xff\0\0\0\0\0\0\0{}"],
)
def test_broken_files(name: str, content: bytes, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(RuntimeError, match=r"no readable (torch|safetensors) file.*cut short.*Download it again"):
        load_weights(nn.Linear(2, 2), str(tmp_path / name))


@pytest.mark.parametrize("content", [{}, {"state_dict": {"epoch": 3}}, [1, 2], None])
def test_files_without_tensors(content: object, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "w.pth")
    with pytest.raises(RuntimeError, match=r"no tensors found; a state dict is needed"):
        load_weights(nn.Linear(2, 2), str(tmp_path / "w.pth"))


def test_absent_file() -> None:
    with pytest.raises(FileNotFoundError, match=r"MODEL\.WEIGHTS nowhere/w\.pth: there is no such file"):
        load_weights(nn.Linear(2, 2), "nowhere/w.pth")


def test_imagenet_is_what_the_backbone_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    net = SmallNet(SIZE, width=4)
    torch.save(other_values(net.state_dict()), tmp_path / "published.pth")
    monkeypatch.setattr(net, "imagenet_url", lambda: str(tmp_path / "published.pth"))
    report = load_weights(encoder_of(net), "imagenet")
    assert report.source.endswith("published.pth")
    assert report.share == 1.0


def test_imagenet_without_publisher() -> None:
    with pytest.raises(RuntimeError, match=r"SmallNet: there are no published ImageNet weights"):
        load_weights(SmallNet(SIZE, width=4), "imagenet")


def test_failed_download_names_address_and_way_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(path: str) -> str:
        raise OSError("no route")

    monkeypatch.setattr(weight_files.path_manager, "get_local_path", fail)
    with pytest.raises(RuntimeError, match=r"https://example\.org/w\.pth: the download failed \(no route\).*by hand"):
        load_weights(nn.Linear(2, 2), "https://example.org/w.pth")


@pytest.mark.parametrize(("source", "file"), [("hub:me/net", "model.safetensors"), ("hub:me/net/a/b.pth", "a/b.pth")])
def test_hub(source: str, file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    net = nn.Linear(2, 2)
    torch.save(other_values(net.state_dict()), tmp_path / "w.pth")

    def download(repo_id: str, filename: str, revision: str | None) -> str:
        asked.append((repo_id, filename))
        return str(tmp_path / "w.pth")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    assert load_weights(net, source).share == 1.0
    assert asked == [("me/net", file)]


def test_hub_without_its_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(MissingPackage, match=r"hub:me/net: needs huggingface_hub; install the extra \[hub\]"):
        load_weights(nn.Linear(2, 2), "hub:me/net")


@pytest.mark.parametrize("source", ["hub:", "hub:x", "hub:/x", "hub:a/", "hub:a b/c", "hub:a/b@", "hub:a/b@/c"])
def test_hub_without_a_repository(source: str) -> None:
    with pytest.raises(InvalidValue, match=r"no repository is named; hub:user/name is accepted"):
        load_weights(nn.Linear(2, 2), source)


def test_a_folder_is_no_file_of_weights(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"this is a folder; a file is needed\. Name one of it: none\."):
        load_weights(nn.Linear(2, 2), str(tmp_path))
    for name in ("best.pth", "checkpoint_0003.pth", "w.safetensors", "log.txt"):
        (tmp_path / name).touch()
    with pytest.raises(FileNotFoundError, match=r"of it: best\.pth, checkpoint_0003\.pth, w\.safetensors\."):
        load_weights(nn.Linear(2, 2), str(tmp_path))
