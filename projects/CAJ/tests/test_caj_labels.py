"""The halves of the camera-aware distance one by one, against the switches of the official code."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from fastreid_uns.projects.CAJ.labels import CameraJaccardParts
from fastreid_uns.pseudo_labels.dbscan import DBSCANLabels
from fastreid_uns.pseudo_labels.jaccard import encoding_distance
from fastreid_uns.structures import FeatureBank

GOLDEN = Path(__file__).parents[3] / "tests/golden"
CAMERA, JOINT = "camera", "joint"


def load(name: str) -> tuple[dict[str, np.ndarray], FeatureBank, dict[str, int]]:
    """A file of the official code's results, its images, and its keys."""
    case = dict(np.load(GOLDEN / f"{name}.npz"))
    bank = FeatureBank(torch.from_numpy(case["in_features"]).float(), torch.from_numpy(case["in_cameras"]).long())
    names = ("k1", "k2", "k1_intra", "k1_inter", "k2_intra", "k2_inter")
    return case, bank, {name: int(case[f"par_{name}"]) for name in names}


def dense_distance(generator: DBSCANLabels, bank: FeatureBank, epoch: int = 1) -> np.ndarray:
    distance = encoding_distance(generator.encoding(bank, epoch))
    full = np.ones(distance.shape)
    full[np.repeat(np.arange(len(full)), np.diff(distance.indptr)), distance.indices] = distance.data
    return full


@pytest.mark.parametrize(
    ("name", "sets", "averages", "key"),
    [
        ("caj_01_n96", CAMERA, CAMERA, "out_dist"),
        ("caj_02_n240", CAMERA, CAMERA, "out_dist"),
        ("caj_03_smallcams", CAMERA, CAMERA, "var_dist_nospill"),
        ("caj_01_n96", CAMERA, JOINT, "var_dist_ckrnn_lqe"),
        ("caj_01_n96", JOINT, CAMERA, "var_dist_krnn_clqe"),
        ("caj_01_n96", JOINT, JOINT, "var_dist_plain"),
        ("caj_03_smallcams", JOINT, JOINT, "var_dist_plain"),
    ],
)
def test_distance_of_the_official_code(name, sets, averages, key):
    case, bank, keys = load(name)
    found = dense_distance(CameraJaccardParts(sets=sets, averages=averages, **keys), bank)
    np.testing.assert_allclose(found, case[key], atol=5e-6)


@pytest.mark.parametrize("epoch", [0, 1])
def test_both_camera_aware_is_the_distance_of_the_core(epoch):
    _, bank, keys = load("caj_02_n240")
    core = DBSCANLabels(distance="camera_jaccard", **keys)
    assert np.array_equal(dense_distance(CameraJaccardParts(**keys), bank, epoch), dense_distance(core, bank, epoch))


def test_the_first_epoch_acts_on_camera_aware_averages_only():
    _, bank, keys = load("caj_01_n96")
    found = {}
    for averages in (CAMERA, JOINT):
        generator = CameraJaccardParts(averages=averages, **keys)
        found[averages] = np.array_equal(dense_distance(generator, bank, 0), dense_distance(generator, bank, 1))
    assert found == {CAMERA: False, JOINT: True}


@pytest.mark.parametrize("averages", [CAMERA, JOINT])
@pytest.mark.parametrize("sets", [CAMERA, JOINT])
def test_fewer_images_than_a_list_is_long(sets, averages):
    feats = F.normalize(torch.randn(9, 4, generator=torch.Generator().manual_seed(0)))
    generator = CameraJaccardParts(sets=sets, averages=averages, min_samples=1, eps=0.9)
    labels = generator(FeatureBank(feats, torch.arange(9) % 2), epoch=1).labels
    assert labels.min() >= 0


def test_what_it_refuses():
    with pytest.raises(ValueError, match="SETS is 'own'; accepted: camera, joint"):
        CameraJaccardParts(sets="own")
    with pytest.raises(ValueError, match="DISTANCE is 'jaccard'; CameraJaccardParts takes camera_jaccard apart"):
        CameraJaccardParts(distance="jaccard")
