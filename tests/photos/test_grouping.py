"""From photos to groups with a network of random weights: what every part promises, not how good the groups are."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from fastreid_uns.data.image_set import ImageSet
from fastreid_uns.modeling.backbones.timm_net import TimmBackbone
from fastreid_uns.modeling.encoder import Encoder
from fastreid_uns.modeling.heads import PooledHead
from fastreid_uns.photos import embed
from fastreid_uns.photos.adapt import Adaptation, adapt
from fastreid_uns.photos.embed import Activations, Stages, cache_activations, direct_features, pooled_features, views
from fastreid_uns.photos.group import Clock, Settings, cluster, for_count, group
from fastreid_uns.pseudo_labels.constraints import Answer, Constraints
from fastreid_uns.structures import Record

SIZE = (32, 32)
FEW = Settings(views=3, adaptation=Adaptation(steps=3, batch=8), k1=5, k2=2)
START = Settings(views=3, adaptation=Adaptation(steps=0), k1=5, k2=2)


@pytest.fixture(scope="module")
def encoder() -> Encoder:
    torch.manual_seed(0)
    backbone = TimmBackbone(SIZE, model="tf_efficientnet_lite0")
    return Encoder(backbone, PooledHead(backbone.out_channels, dim=16), mean=[0.5] * 3, std=[0.5] * 3)


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> list[str]:
    """Four things of five photos each: one color pattern a thing, with a little noise."""
    folder, rng = tmp_path_factory.mktemp("photos"), np.random.default_rng(0)
    paths = []
    for thing in range(4):
        pattern = np.kron(rng.integers(0, 256, (4, 4, 3)), np.ones((8, 8, 1)))
        for photo in range(5):
            noisy = np.clip(pattern + rng.normal(0, 4, pattern.shape), 0, 255).astype(np.uint8)
            paths.append(str(folder / f"{thing}-{photo}.png"))
            Image.fromarray(noisy).save(paths[-1])
    return paths


def image_set(paths: list[str]) -> ImageSet:
    return ImageSet([Record(path, -1, -1) for path in paths], SIZE)


def test_views_are_the_photo_and_changes_of_it_equal_for_equal_seeds(photos):
    (rows, first), *_ = views(image_set(photos), 3, seed=1)
    (_, again), *_ = views(image_set(photos), 3, seed=1)
    (_, other), *_ = views(image_set(photos), 3, seed=2)
    assert first.shape == (20, 3, 3, 32, 32)
    assert (rows.start, rows.stop) == (0, 20)
    assert torch.equal(first, again)
    assert torch.equal(first[:, 0], other[:, 0])
    assert not torch.equal(first[:, 1], other[:, 1])
    torch.testing.assert_close(first[3, 0], image_set(photos)[3] / 255)


def test_the_parts_of_a_network_are_the_network(encoder):
    trunk, top = encoder.backbone.split()
    x = torch.randn(2, 3, *SIZE)
    encoder.eval()
    torch.testing.assert_close(top(trunk(x)), encoder.backbone(x))
    resnet = TimmBackbone(SIZE, model="resnet18").eval()
    trunk, top = resnet.split()
    torch.testing.assert_close(top(trunk(x)), resnet(x))
    with pytest.raises(RuntimeError, match="cannot be trained apart"):
        TimmBackbone(SIZE, model="convnext_atto").split()


def test_cached_activations_give_the_features_of_the_network(encoder, photos, monkeypatch, tmp_path):
    stages, whole = Stages.of(encoder, trained=True), Stages.of(encoder, trained=False)
    expected = direct_features(whole, image_set(photos), 2, 0)
    kept = cache_activations(stages, image_set(photos), 2, 0)
    assert (len(kept), kept.number) == (20, 2)
    found = pooled_features(stages, kept)
    torch.testing.assert_close(found, expected, atol=2e-3, rtol=0)  # activations are kept in half precision
    monkeypatch.setattr(embed, "IN_MEMORY", 0)
    on_disk = cache_activations(stages, image_set(photos), 2, 0, tmp_path)
    assert isinstance(on_disk.values, np.memmap)
    assert torch.equal(pooled_features(stages, on_disk), found)
    assert not list(tmp_path.iterdir())  # the file has no name, so nothing is left behind


def test_a_disk_without_space_for_activations_is_named(monkeypatch, tmp_path):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(embed, "IN_MEMORY", 0)
    monkeypatch.setattr(embed.os, "posix_fallocate", full)
    with pytest.raises(RuntimeError, match=r"0\.0 GB are needed there .* \(No space left on device\)"):
        Activations(2, 2, torch.Size([1, 1, 1]), tmp_path)


def test_activations_are_taken_by_photo_and_view():
    kept = Activations(3, 2, torch.Size([1, 1, 1]))
    kept.put(slice(0, 3), torch.arange(6.0).view(3, 2, 1, 1, 1))
    assert kept.take(slice(1, 3)).flatten().tolist() == [2, 3, 4, 5]
    assert kept.take(torch.tensor([2, 0]), torch.tensor([[1], [0]])).flatten().tolist() == [5, 0]


def test_training_moves_the_last_stages_only(encoder, photos):
    own = copy.deepcopy(encoder)
    before = {name: value.clone() for name, value in own.state_dict().items()}
    stages = Stages.of(own, trained=True)
    kept = cache_activations(stages, image_set(photos), 3, 0)
    stages.head.whitening.fit(pooled_features(stages, kept))
    space = {name: value.clone() for name, value in stages.head.whitening.state_dict().items()}
    losses = adapt(stages, kept, stages.head.whitening, Adaptation(steps=5, batch=10))
    assert len(losses) == 5
    assert losses[-1] < losses[0]
    changed = {name for name, value in own.state_dict().items() if not torch.equal(value, before[name])}
    last = ("backbone.net.blocks.5", "backbone.net.blocks.6", "backbone.net.conv_head", "backbone.net.bn2")
    assert changed
    assert all(name.startswith((*last, "head.whitening")) for name in changed)
    assert not any("running" in name or "num_batches" in name for name in changed)
    assert all(torch.equal(value, space[name]) for name, value in stages.head.whitening.state_dict().items())


def test_equal_seeds_give_equal_groups_and_progress_ends_at_one(encoder, photos):
    shares = []
    first = group(image_set(photos), copy.deepcopy(encoder), FEW, told=lambda stage, share, left: shares.append(share))
    again = group(image_set(photos), copy.deepcopy(encoder), FEW)
    assert shares == sorted(shares)
    assert shares[-1] == pytest.approx(1)
    assert torch.equal(first.feats, again.feats)
    assert np.array_equal(first.labels, again.labels)
    assert np.array_equal(first.confidence, again.confidence)


def test_photos_of_one_thing_come_together(encoder, photos):
    found = group(image_set(photos), copy.deepcopy(encoder), START)
    assert found.labels.tolist() == np.repeat(np.arange(4), 5).tolist()
    assert ((found.confidence > 0.5) & (found.confidence <= 1)).all()
    assert (found.nearest != found.labels).all()
    assert (np.abs(found.similarity) <= 1).all()
    torch.testing.assert_close(found.feats.norm(dim=1), torch.ones(20))


@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("settings", [START, FEW])
def test_very_few_photos(encoder, photos, count, settings):
    found = group(image_set(photos[:count]), copy.deepcopy(encoder), settings)
    assert found.labels.shape == found.confidence.shape == found.nearest.shape == (count,)
    assert found.feats.isfinite().all()
    torch.testing.assert_close(found.feats.norm(dim=1), torch.ones(count))


def test_equal_photos_are_one_group(encoder, photos):
    found = group(image_set([photos[0]] * 4), copy.deepcopy(encoder), FEW)
    assert len(found.labels) == 4
    assert found.feats.isfinite().all()


def test_no_photo_is_refused(encoder):
    with pytest.raises(ValueError, match="at least one is needed"):
        group(image_set([]), encoder, FEW)


def test_groups_keep_to_answers(encoder, photos):
    answers = [Answer(0, 4, False), Answer(5, 10, True)]
    feats = group(image_set(photos), copy.deepcopy(encoder), START).feats
    labels = cluster(feats, START, Constraints(20, answers)).labels
    assert labels[0] != labels[4]
    assert len(set(labels[5:15])) == 1


def test_of_few_photos_few_neighbours_vote():
    usual = Settings()
    assert [for_count(usual, count).k1 for count in (1, 20, 100, 625, 10_000)] == [3, 4, 10, 25, 25]
    assert [for_count(usual, count).k2 for count in (1, 20, 100, 625)] == [1, 1, 3, 6]


def test_confidence_by_hand():
    """Two pairs of equal features and one alone: nothing is shared between groups."""
    feats = F.normalize(torch.tensor([[1.0, 0, 0], [1, 0, 0], [0, 1, 0], [0, 1, 0], [0, 0, 1]]))
    found = cluster(feats, Settings(k1=2, k2=1))
    assert found.labels.tolist()[:4] == [0, 0, 1, 1]
    assert found.confidence[:4].tolist() == [1] * 4


def test_time_left():
    told = []
    clock = Clock(4, lambda *values: told.append(values))
    clock.stage = "train"
    clock.begin -= 10
    clock.add(1)
    clock.add(5)
    assert told[0][:2] == ("train", 0.25)
    assert told[0][2] == pytest.approx(30, abs=1)
    assert told[1][1:] == (1, 0)


def test_a_transformer_gives_features_without_training(photos):
    torch.manual_seed(0)
    backbone = TimmBackbone((160, 160), model="test_vit")
    vit = Encoder(backbone, PooledHead(backbone.out_channels, dim=8), mean=[0.5] * 3, std=[0.5] * 3)
    images = ImageSet([Record(path, -1, -1) for path in photos[:6]], (160, 160))
    found = group(images, vit, START)
    torch.testing.assert_close(found.feats.norm(dim=1), torch.ones(6))
    with pytest.raises(RuntimeError, match="cannot be trained apart"):
        group(images, vit, FEW)
