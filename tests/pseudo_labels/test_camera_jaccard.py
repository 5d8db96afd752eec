"""The camera-aware Jaccard distance against the official code's results and a plain loop."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from fastreid_uns.pseudo_labels.dbscan import DBSCANLabels
from fastreid_uns.pseudo_labels.jaccard import camera_jaccard_distance
from fastreid_uns.structures import FeatureBank

GOLDEN = Path(__file__).parents[1] / "golden"
CASES = ["caj_01_n96", "caj_02_n240", "caj_03_smallcams"]


def load(name: str) -> dict[str, np.ndarray]:
    return dict(np.load(GOLDEN / f"{name}.npz"))


def keys_of(case: dict[str, np.ndarray]) -> dict[str, int]:
    return {name: int(case[f"par_{name}"]) for name in ("k1_intra", "k1_inter", "k2_intra", "k2_inter")}


def dense(distance) -> np.ndarray:
    full = np.ones(distance.shape)
    rows = np.repeat(np.arange(distance.shape[0]), np.diff(distance.indptr))
    full[rows, distance.indices] = distance.data
    return full


def camera_aware(**keys) -> DBSCANLabels:
    return DBSCANLabels(distance="camera_jaccard", **keys)


def bank_of(case: dict[str, np.ndarray]) -> FeatureBank:
    return FeatureBank(torch.from_numpy(case["in_features"]).float(), torch.from_numpy(case["in_cameras"]).long())


def by_loop(feats, cameras, k1_intra, k1_inter, k2_intra, k2_inter) -> np.ndarray:
    """Section by section as the paper has it, in float64, without filling short lists."""
    n = len(feats)
    d = ((feats[:, None] - feats[None]) ** 2).sum(2)
    own, other = [], []
    for i in range(n):
        order = sorted(range(n), key=lambda j: (j != i, d[i, j], j))
        own.append([j for j in order if cameras[j] == cameras[i]])
        other.append([j for j in order if cameras[j] != cameras[i]])
    weights = np.zeros((n, n))
    for i in range(n):
        members = [j for j in own[i][: k1_intra + 1] if i in own[j][: k1_intra + 1]]
        members += [j for j in other[i][: k1_inter + 1] if i in other[j][: k1_inter + 1]]
        weights[i, members] = np.exp(-d[i, members])
    weights /= weights.sum(1, keepdims=True)
    mean = np.stack([weights[own[i][:k2_intra] + other[i][:k2_inter]].mean(0) for i in range(n)])
    shared = np.minimum(mean[:, None], mean[None]).sum(2)
    return np.maximum(0, 1 - shared / (2 - shared))


@pytest.mark.parametrize("name", CASES)
def test_distance_of_the_official_code(name):
    case = load(name)
    bank = bank_of(case)
    found = dense(camera_jaccard_distance(bank.feats, bank.cameras, **keys_of(case)))
    key = "var_dist_nospill" if "var_dist_nospill" in case else "out_dist"
    np.testing.assert_allclose(found, case[key], atol=5e-6)


@pytest.mark.parametrize("name", ["caj_01_n96", "caj_02_n240"])
@pytest.mark.parametrize("eps", [0.4, 0.45, 0.55, 0.6])
def test_labels_of_the_official_code(name, eps):
    case = load(name)
    labels = camera_aware(eps=eps, **keys_of(case))(bank_of(case), epoch=1).labels
    np.testing.assert_array_equal(labels.numpy(), case[f"out_labels_eps0{round(100 * eps)}"])


@pytest.mark.parametrize("name", ["caj_01_n96"])
def test_the_first_epoch_averages_over_three_and_three(name):
    case = load(name)
    bank = bank_of(case)
    first = camera_jaccard_distance(bank.feats, bank.cameras, **{**keys_of(case), "k2_intra": 3, "k2_inter": 3})
    np.testing.assert_allclose(dense(first), case["var_dist_warmup"], atol=5e-6)
    labels = [camera_aware(eps=0.5, k2_first=k)(bank, epoch=0).labels for k in (3, 0)]
    assert torch.equal(labels[0], camera_aware(eps=0.5, k2_intra=3, k2_inter=3)(bank, epoch=4).labels)
    assert torch.equal(labels[1], camera_aware(eps=0.5)(bank, epoch=4).labels)


def test_without_averaging():
    case = load("caj_01_n96")
    bank = bank_of(case)
    found = camera_jaccard_distance(bank.feats, bank.cameras, **{**keys_of(case), "k2_intra": 1, "k2_inter": 0})
    np.testing.assert_allclose(dense(found), case["var_dist_noexpand"], atol=5e-6)


@pytest.mark.parametrize("k1_intra", [0, 4])
@pytest.mark.parametrize("cameras", [torch.arange(60) % 3, torch.arange(60), (torch.arange(60) > 57).long()])
def test_equal_to_a_loop_with_small_cameras(cameras, k1_intra):
    feats = F.normalize(torch.randn(60, 6, generator=torch.Generator().manual_seed(3)))
    keys = {"k1_intra": k1_intra, "k1_inter": 7, "k2_intra": 2, "k2_inter": 3}
    expected = by_loop(feats.double().numpy(), cameras.tolist(), **keys)
    np.testing.assert_allclose(dense(camera_jaccard_distance(feats, cameras, **keys)), expected, atol=5e-6)


def features(count: int) -> torch.Tensor:
    return F.normalize(torch.randn(count, 4, generator=torch.Generator().manual_seed(0)))


@pytest.mark.parametrize("count", [2, 5, 12])
def test_fewer_images_than_a_list_is_long_all_vote(count):
    feats, cameras = features(count), torch.arange(count) % 2
    keys = {"k1_intra": 5, "k1_inter": 20, "k2_intra": 2, "k2_inter": 4}
    expected = by_loop(feats.double().numpy(), cameras.tolist(), **keys)
    np.testing.assert_allclose(dense(camera_jaccard_distance(feats, cameras, **keys)), expected, atol=5e-6)


def test_one_camera_is_refused():
    with pytest.raises(ValueError, match=r"all 20 images are of camera 3; two or more cameras are needed.*DISTANCE"):
        camera_jaccard_distance(features(20), torch.full((20,), 3))
    with pytest.raises(ValueError, match=r"all 20 images are of an unknown camera; two or more cameras are needed"):
        camera_aware()(FeatureBank(features(20), torch.full((20,), -1)), epoch=0)


def test_unknown_cameras_count_as_one():
    feats, cameras = features(20), torch.tensor([-1] * 3 + [0] * 17)
    with pytest.warns(UserWarning, match="3 images of unknown cameras count as those of one camera"):
        found = camera_jaccard_distance(feats, cameras)
    assert (found != camera_jaccard_distance(feats, cameras + 1)).nnz == 0


def test_cameras_of_some_images_are_refused():
    with pytest.raises(ValueError, match="19 cameras for 20 images; each needs one"):
        camera_jaccard_distance(features(20), torch.arange(19))


def test_numbers_out_of_range_are_refused():
    with pytest.raises(ValueError, match="k1_inter 0"):
        camera_jaccard_distance(features(20), torch.arange(20), k1_inter=0)
    with pytest.raises(ValueError, match="K2_INTRA is 0; it must be at least 1"):
        camera_aware(k2_intra=0)
    with pytest.raises(ValueError, match="DISTANCE is 'cosine'; accepted: jaccard, camera_jaccard"):
        DBSCANLabels(distance="cosine")
    with pytest.raises(ValueError, match="SEARCH is 'ivf' and DISTANCE is camera_jaccard"):
        camera_aware(search="ivf")


def test_it_brings_together_what_cameras_part():
    """Each identity looks alike within a camera, and its two cameras are further apart than strangers of one."""
    generator = torch.Generator().manual_seed(0)
    identity = torch.nn.functional.normalize(torch.randn(12, 32, generator=generator))
    bias = F.normalize(torch.randn(2, 32, generator=generator))
    labels, cameras = torch.arange(12).repeat_interleave(10), torch.arange(120) % 2
    feats = F.normalize(identity[labels] + 1.2 * bias[cameras] + 0.05 * torch.randn(120, 32, generator=generator))
    bank = FeatureBank(feats, cameras)

    def joined(found) -> float:
        pairs = (labels[:, None] == labels) & (cameras[:, None] != cameras)
        return float((found[:, None] == found)[pairs].float().mean())

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        aware = joined(camera_aware(eps=0.6, k1_inter=5)(bank, 1).labels)
    assert aware > joined(DBSCANLabels(eps=0.6, k1=10)(bank, 1).labels) + 0.3
