"""From photos to groups with a network of random weights: what every part promises, not how good the groups are."""

from __future__ import annotations

import copy
import dataclasses
import zlib
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from fastreid_uns.data.image_set import ImageSet
from fastreid_uns.modeling.backbones.timm_net import TimmBackbone
from fastreid_uns.modeling.encoder import Encoder
from fastreid_uns.modeling.heads import PooledHead
from fastreid_uns.modeling.whitening import MainDirections
from fastreid_uns.photos import view_store
from fastreid_uns.photos.adapt import Adaptation, adapt
from fastreid_uns.photos.cost import estimate
from fastreid_uns.photos.embed import (
    Stages,
    cache_activations,
    direct_features,
    pooled_features,
    view_augment,
    views,
    whitened,
)
from fastreid_uns.photos.group import Clock, Settings, cluster, embed, features, for_count, group
from fastreid_uns.photos.view_store import ViewStore
from fastreid_uns.pseudo_labels.constraints import Answer, Constraints
from fastreid_uns.structures import Record

SIZE = (32, 32)
FEW = Settings(views=3, adaptation=Adaptation(steps=3, batch=8), k1=(5,), k2=2)
START = Settings(views=3, adaptation=Adaptation(steps=0), k1=(5,), k2=2)


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


def test_cached_activations_give_the_features_of_the_network(encoder, photos, tmp_path):
    stages, whole = Stages.of(encoder, SIZE, trained=True), Stages.of(encoder, SIZE, trained=False)
    expected = direct_features(whole, image_set(photos), 2, 0)
    kept = cache_activations(stages, image_set(photos), 2, 0)
    assert (len(kept), kept.number) == (20, 2)
    found = pooled_features(stages, kept)
    torch.testing.assert_close(found, expected, atol=2e-3, rtol=0)  # activations are kept in half precision
    on_disk = cache_activations(stages, image_set(photos), 2, 0, ViewStore(tmp_path / "kept.bin"))
    assert (tmp_path / "kept.bin").stat().st_size == 4096 + 2 * kept.values.numel()
    assert torch.equal(pooled_features(stages, on_disk), found)


@torch.no_grad()
def test_features_are_those_of_a_loop_over_single_views(encoder, photos):
    own = copy.deepcopy(encoder).eval()
    pooled, augment = [], view_augment(SIZE)
    for pixels in (image_set(photos)[at] for at in range(20)):
        made = [pixels[None] / 255]
        draw = torch.Generator().manual_seed(zlib.crc32(pixels.numpy().tobytes(), START.seed))
        drawn = augment.sample_parameters(START.views - 1, SIZE, draw)
        for view in range(START.views - 1):
            made.append(augment(pixels[None], {name: values[view : view + 1] for name, values in drawn.items()}))
        pooled.append(torch.cat([own.head(own.backbone((one - own.mean) / own.std)).pooled for one in made]))
    found = MainDirections.of(torch.stack(pooled), own.head.dim)
    own.head.whitening.fit(found)
    groups = cluster(
        whitened(own.head, torch.stack(pooled)), dataclasses.replace(START, threshold=START.positives)
    ).labels
    own.head.whitening.fit(found, torch.from_numpy(groups))
    expected = whitened(own.head, torch.stack(pooled))
    found = embed(image_set(photos), copy.deepcopy(encoder), dataclasses.replace(START, amp="none")).feats
    torch.testing.assert_close(found @ found.T, expected @ expected.T, atol=1e-4, rtol=0)  # axes may be mirrored


def test_training_moves_the_last_stages_only(encoder, photos):
    own = copy.deepcopy(encoder)
    before = {name: value.clone() for name, value in own.state_dict().items()}
    stages = Stages.of(own, SIZE, trained=True)
    kept = cache_activations(stages, image_set(photos), 3, 0)
    stages.head.whitening.fit(MainDirections.of(pooled_features(stages, kept), stages.head.dim))
    space = {name: value.clone() for name, value in stages.head.whitening.state_dict().items()}
    losses = adapt(stages, kept, stages.head.whitening, Adaptation(steps=5, batch=10), torch.arange(20))
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
    sizes = [for_count(usual, count).k1 for count in (1, 20, 100, 625, 10_000)]
    assert sizes == [(3, 3, 3), (3, 4, 9), (5, 10, 20), (12, 25, 50), (12, 25, 50)]


def test_confidence_by_hand():
    """Two pairs of equal features and one alone: nothing is shared between groups."""
    feats = F.normalize(torch.tensor([[1.0, 0, 0], [1, 0, 0], [0, 1, 0], [0, 1, 0], [0, 0, 1]]))
    found = cluster(feats, Settings(k1=(2,), k2=1))
    assert found.labels.tolist()[:4] == [0, 0, 1, 1]
    assert found.confidence[:4].tolist() == [1] * 4


def test_what_grouping_takes(encoder):
    network = SimpleNamespace(encoder=copy.deepcopy(encoder), size=SIZE)
    trained, start = (estimate(1000, network, settings) for settings in (FEW, START))
    pixels = 1000 * 3 * 32 * 32
    assert trained.disk == pixels + 2 * 3000 * 112 * 2 * 2  # the stage before the last two: 112 channels, stride 16
    assert start.disk == pixels + 4 * 3000 * 2560  # average and GeM pooling of 1280 channels
    assert trained.memory == start.memory > 2 * 4 * 3000 * 2560
    assert trained.seconds > 0
    assert str(start._replace(seconds=90, memory=1.24e9)) == (
        "this will take about 1 min 30 s, 1.2 GB of memory and 0.0 GB of disk"
    )


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


def cosines(found: torch.Tensor, expected: torch.Tensor) -> torch.Tensor:
    """Of rows, after the turn that brings them together best: axes of a whitening may be mirrored."""
    left, _, right = torch.linalg.svd(found.double().T @ expected.double())
    return (found.double() @ left @ right * expected.double()).sum(1)


@pytest.mark.gpu
def test_a_gpu_sees_the_same_views(photos):
    (_, host), *_ = views(image_set(photos), 3, seed=1)
    (_, device), *_ = views(image_set(photos), 3, seed=1, device="cuda")
    torch.testing.assert_close(device.cpu(), host, rtol=0, atol=1e-4)


@pytest.mark.gpu
@pytest.mark.parametrize("settings", [START, FEW])
def test_a_gpu_gives_the_features_and_groups_of_the_cpu(encoder, photos, settings):
    exact = dataclasses.replace(settings, amp="none")
    host, device = copy.deepcopy(encoder), copy.deepcopy(encoder).cuda()
    expected, found = (group(image_set(photos), own, exact) for own in (host, device))
    assert found.feats.device.type == "cpu"
    assert cosines(found.feats, expected.feats).min() > 0.9999
    assert found.labels.tolist() == expected.labels.tolist()
    more, others = (features(image_set(photos), own, exact) for own in (device, host))
    assert cosines(more, others).min() > 0.9999


@pytest.mark.gpu
@pytest.mark.parametrize("share", [0.0, 0.5])
def test_a_gpu_trains_on_activations_wherever_they_are(encoder, photos, share, monkeypatch, tmp_path):
    monkeypatch.setattr(view_store, "_SHARE", share)
    stages = Stages.of(copy.deepcopy(encoder).cuda(), SIZE, trained=True)
    kept = cache_activations(stages, image_set(photos), 3, 0, ViewStore(tmp_path / "kept.bin"))
    assert kept.values.device.type == ("cuda" if share else "cpu")
    assert (tmp_path / "kept.bin").exists() == (not share)
    stages.head.whitening.fit(MainDirections.of(pooled_features(stages, kept), stages.head.dim))
    losses = adapt(stages, kept, stages.head.whitening, Adaptation(steps=5, batch=10), torch.arange(20))
    assert losses[-1] < losses[0]


def test_individuals_are_counted_as_if_they_had_equally_many_photos():
    feats = F.normalize(torch.eye(9)[torch.tensor([0, 0, 0, 1, 1, 1, 2, 2, 3])] + 0.01)
    found = cluster(feats, Settings(k1=(3,)))
    assert found.labels.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 3]
    assert found.individuals == pytest.approx(8**2 / (9 + 9 + 4))
    assert cluster(feats[:6], Settings(k1=(3,))).individuals == pytest.approx(2)
    assert cluster(torch.eye(9)[:2], Settings(k1=(3,))).individuals == 0
