"""The parts of CAP one by one, by hand and by plain loops."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from fastreid_uns.modeling.losses import LossSet
from fastreid_uns.modeling.memory import ClusterMemory
from fastreid_uns.modeling.proxies import Proxies
from fastreid_uns.projects.CAP.losses import IntraCameraLoss
from fastreid_uns.projects.CAP.memory import ProxyMemory
from fastreid_uns.projects.CAP.model import CAPModel
from fastreid_uns.projects.CAP.sampler import ProxySampler
from fastreid_uns.structures import Batch, FeatureBank, HeadOutput, PseudoLabels


def unit(*rows: tuple[float, ...]) -> torch.Tensor:
    return F.normalize(torch.tensor(rows))


def batch_of(labels: list[int], cameras: list[int], feats: torch.Tensor | None = None) -> Batch:
    count = torch.arange(len(labels))
    views = torch.zeros(len(labels), 2) if feats is None else feats
    return Batch((views,), count, torch.tensor(labels), torch.tensor(cameras), torch.zeros_like(count))


@pytest.fixture
def memory() -> ProxyMemory:
    """Cluster 0 in cameras 0 and 2, cluster 1 in camera 2; one outlier."""
    feats = unit((1.0, 0.0), (0.0, 1.0), (1.0, 1.0), (1.0, 0.0), (0.0, 1.0))
    labels, cameras = torch.tensor([0, 0, 1, -1, 0]), torch.tensor([0, 2, 2, 1, 0])
    memory = ProxyMemory(2, momentum=0.2)
    memory.reset(PseudoLabels(labels, torch.zeros(2, 2)), FeatureBank(feats, cameras))
    return memory


def test_rows_are_means_of_a_cluster_in_a_camera(memory):
    assert (memory.labels.tolist(), memory.cameras.tolist()) == ([0, 0, 1], [0, 2, 2])
    half = math.sqrt(0.5)
    torch.testing.assert_close(memory.features, torch.tensor([[half, half], [0.0, 1.0], [half, half]]))
    assert memory.rows(batch_of([1, 0, 0], [2, 0, 2])).tolist() == [2, 0, 1]


def test_an_update_leaves_the_proxies_of_the_step(memory):
    before = memory.proxies
    memory(unit((0.6, -0.8)), torch.tensor([1]))
    assert before.features[1].tolist() == [0.0, 1.0]
    torch.testing.assert_close(memory.features[1], F.normalize(torch.tensor([0.48, 0.2 - 0.64]), dim=0))


def test_a_checkpoint_brings_clusters_and_cameras(memory):
    other = ProxyMemory(2)
    other.load_state_dict(memory.state_dict())
    assert other.rows(batch_of([1], [2])).tolist() == [2]


def test_intra_camera_loss_by_a_loop():
    generator = torch.Generator().manual_seed(0)
    feats, rows = (F.normalize(torch.randn(n, 4, dtype=torch.float64, generator=generator)) for n in (7, 6))
    proxies = Proxies(rows, torch.tensor([0, 0, 1, 1, 2, 3]), torch.tensor([0, 1, 0, 1, 1, 0]))
    labels, cameras = torch.tensor([0, 0, 1, 2, 3, 1, 1]), torch.tensor([0, 1, 0, 1, 0, 0, 1])
    losses: dict[int, list[float]] = {}
    for q, label, camera in zip(feats, labels.tolist(), cameras.tolist(), strict=True):
        logits = {
            int(proxies.labels[r]): float(q @ rows[r]) / 0.1 for r in range(6) if int(proxies.cameras[r]) == camera
        }
        losses.setdefault(camera, []).append(math.log(sum(map(math.exp, logits.values()))) - logits[label])
    expected = sum(sum(values) / len(values) for values in losses.values())
    found = IntraCameraLoss(temperature=0.1)(feats, labels, cameras, proxies)
    assert found.item() == pytest.approx(expected, rel=1e-12)


def test_an_image_without_a_proxy_costs_nothing():
    proxies = Proxies(torch.eye(2), torch.tensor([0, 1]), torch.tensor([0, 0]))
    feats = torch.eye(2).requires_grad_()
    loss = IntraCameraLoss()(feats, torch.tensor([0, 1]), torch.tensor([1, 1]), proxies)
    loss.backward()
    assert loss.item() == 0
    assert feats.grad.abs().sum() == 0


def test_temperature_out_of_range():
    with pytest.raises(ValueError, match="TEMPERATURE is 0"):
        IntraCameraLoss(temperature=0)


LABELS = torch.tensor([0] * 6 + [1] * 5 + [-1] * 3)
CAMERAS = torch.tensor([0] * 5 + [1] + [0, 0, 1, 1, 1] + [0, 1, 1])
PSEUDO = PseudoLabels(LABELS, torch.zeros(2, 2))  # proxies of 5, 1, 2 and 3 images


def test_a_batch_holds_proxies_of_different_images():
    sampler = ProxySampler(700, 3, 0, 1, batch_size=16, num_instances=4)
    sampler.set_epoch(0, PSEUDO, CAMERAS)
    of_two = set()
    for batch in sampler:
        groups = torch.tensor(batch).view(4, 4)
        assert (LABELS[groups] == LABELS[groups][:, :1]).all()
        assert (CAMERAS[groups] == CAMERAS[groups][:, :1]).all()
        by_proxy = {(int(LABELS[group[0]]), int(CAMERAS[group[0]])): sorted(group.tolist()) for group in groups}
        assert by_proxy.keys() == {(0, 0), (0, 1), (1, 0), (1, 1)}  # a pass over all proxies
        assert len(set(by_proxy[0, 0])) == 4
        assert set(by_proxy[0, 1]) == {5}
        of_two.add(by_proxy[1, 0].count(6))
    assert of_two == {0, 1, 2, 3, 4}  # from a list that holds each of the two four times


def test_too_few_proxies_are_repeated_with_a_warning(caplog):
    sampler = ProxySampler(2, 0, 0, 1, batch_size=32, num_instances=4)
    sampler.set_epoch(0, PSEUDO, CAMERAS)
    assert "a batch has 8 places for proxies and there are 4" in caplog.text
    assert [len(batch) for batch in sampler] == [32, 32]


class Given(torch.nn.Module):
    dim = 2

    def forward(self, images, domains) -> HeadOutput:
        return HeadOutput(images, F.normalize(images))


def model_of(memory=None, **keys) -> CAPModel:
    memory = ProxyMemory(2) if memory is None else memory
    return CAPModel(Given(), memory, LossSet({"intra": (IntraCameraLoss(), 1.0)}), 5, **keys).train()


def test_losses_see_the_proxies_before_the_step_moves_them(memory):
    model = model_of(memory)
    rows, feats = memory.features, unit((0.6, -0.8), (0.0, 1.0), (1.0, 0.0))
    batch = batch_of([0, 1, 0], [2, 2, 0], feats)
    inputs = model.loss_inputs(batch)
    assert torch.equal(inputs["proxies"].features, rows)
    assert not torch.equal(memory.features, rows)
    torch.testing.assert_close(inputs["logits"], feats @ rows.T)
    assert inputs["labels"].tolist() == [0, 1, 0]


def test_accuracy_is_that_of_the_cluster(memory):
    # the nearest row of both is row 1, of cluster 0, also where the own row is that of another camera
    batch = batch_of([0, 1], [0, 2], unit((0.0, 1.0), (-0.1, 1.0)))
    assert model_of(memory)(batch)["accuracy"].item() == 0.5


@pytest.mark.parametrize(
    ("cameras", "message"),
    [
        ([0, 1, 0, 1, -1], "1 are of an unknown camera and the others of 2"),
        ([-1] * 5, "5 are of an unknown camera and the others of 0"),
        ([3] * 5, "0 are of an unknown camera and the others of 1"),
    ],
)
def test_cameras_that_are_missing_are_refused(cameras, message):
    bank = FeatureBank(unit(*[(1.0, 0.5)] * 5), torch.tensor(cameras))
    with pytest.raises(ValueError, match=f"of the 5 clustered images {message}; each needs one"):
        model_of().update_memory(PseudoLabels(torch.tensor([0, 0, 0, 1, 1]), torch.zeros(2, 2)), bank)


def test_an_outlier_needs_no_camera():
    model = model_of()
    bank = FeatureBank(unit(*[(1.0, 0.5)] * 3), torch.tensor([0, 1, -1]))
    model.update_memory(PseudoLabels(torch.tensor([0, 0, -1]), torch.zeros(1, 2)), bank)
    assert model.memory.cameras.tolist() == [0, 1]


def test_labelled_sources_are_refused():
    bank = FeatureBank(torch.ones(5, 2), torch.arange(5), source_feats=torch.ones(1, 2), source_labels=torch.zeros(1))
    with pytest.raises(ValueError, match=r"DATASETS.SOURCES names labelled sets.*Drop"):
        model_of().update_memory(PseudoLabels(torch.zeros(5).long(), torch.zeros(1, 2)), bank)


def test_another_memory_and_a_momentum_encoder_are_refused():
    with pytest.raises(ValueError, match=r"MODEL\.MEMORY is ClusterMemory.*ProxyMemory"):
        model_of(ClusterMemory(2))
    with pytest.raises(ValueError, match="MOMENTUM_ENCODER is true"):
        model_of(momentum_encoder=True)
