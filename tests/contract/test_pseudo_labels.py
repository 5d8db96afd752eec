"""What every registered pseudo-label generator must do, with the parameters that it has by default."""

from __future__ import annotations

import io

import pytest
import torch
import torch.nn.functional as F

from fastreid_uns import builtin  # noqa: F401
from fastreid_uns.pseudo_labels.base import PseudoLabelGenerator
from fastreid_uns.registry import PSEUDO_LABEL_REGISTRY
from fastreid_uns.structures import FeatureBank, PseudoLabels

NAMES = [name for name, _ in PSEUDO_LABEL_REGISTRY]


def build(name: str) -> PseudoLabelGenerator:
    return PSEUDO_LABEL_REGISTRY.build({"NAME": name})


@pytest.fixture(scope="module")
def bank() -> FeatureBank:
    """40 identities seen 15 times by 3 cameras, well apart, in random order."""
    generator = torch.Generator().manual_seed(0)
    identities = torch.arange(40).repeat(15)[torch.randperm(600, generator=generator)]
    middle = F.normalize(torch.randn(40, 32, generator=generator))
    feats = F.normalize(middle[identities] + 0.05 * torch.randn(600, 32, generator=generator))
    return FeatureBank(feats, torch.randint(0, 3, (600,), generator=generator))


def reordered(bank: FeatureBank, order: torch.Tensor) -> FeatureBank:
    return FeatureBank(bank.feats[order], bank.cameras[order])


@pytest.mark.parametrize("name", NAMES)
def test_labels_are_valid_and_the_bank_stays_as_it_was(name, bank):
    feats, cameras = bank.feats.clone(), bank.cameras.clone()
    generator = build(name)
    pseudo = generator(bank, 0)
    assert isinstance(pseudo, PseudoLabels)
    assert pseudo.labels.shape == (600,)
    assert pseudo.labels.dtype == torch.int64
    assert pseudo.labels.min() >= -1
    assert pseudo.labels.unique()[pseudo.labels.unique() >= 0].tolist() == list(range(pseudo.num_clusters))
    assert pseudo.centroids.shape == (pseudo.num_clusters, 32)
    assert pseudo.centroids.dtype == torch.float32
    torch.testing.assert_close(pseudo.centroids.norm(dim=1), torch.ones(pseudo.num_clusters))
    assert generator.seconds
    assert set(generator.seconds) <= {"neighbours", "cluster"}
    assert torch.equal(bank.feats, feats)
    assert torch.equal(bank.cameras, cameras)


@pytest.mark.parametrize("name", NAMES)
def test_same_input_gives_the_same_output(name, bank):
    first, second = build(name)(bank, 0), build(name)(bank, 0)
    assert torch.equal(first.labels, second.labels)
    assert torch.equal(first.centroids, second.centroids)


@pytest.mark.parametrize("name", [name for name in NAMES if PSEUDO_LABEL_REGISTRY.get(name).order_free])
def test_order_of_images_does_not_matter_up_to_the_numbering(name, bank):
    order = torch.randperm(600, generator=torch.Generator().manual_seed(1))
    labels = build(name)(bank, 0).labels[order]
    again = build(name)(reordered(bank, order), 0).labels
    assert torch.equal(labels < 0, again < 0)
    pairs = {(a, b) for a, b in zip(labels.tolist(), again.tolist(), strict=True)}
    assert len(pairs) == len({a for a, _ in pairs}) == len({b for _, b in pairs})


@pytest.mark.parametrize("name", NAMES)
def test_a_resumed_generator_goes_on_as_the_first(name, bank):
    first, resumed = build(name), build(name)
    first(bank, 0)
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    file.seek(0)
    resumed.load_state_dict(torch.load(file, weights_only=True))
    half = reordered(bank, torch.arange(550))
    expected, found = first(half, 1), resumed(half, 1)
    assert torch.equal(found.labels, expected.labels)
    assert torch.equal(found.centroids, expected.centroids)


@pytest.mark.parametrize("name", NAMES)
def test_broken_features_are_refused(name, bank):
    feats = bank.feats.clone()
    feats[5, 0] = torch.nan
    with pytest.raises(ValueError, match="the first is row 5"):
        build(name)(FeatureBank(feats, bank.cameras), 0)
