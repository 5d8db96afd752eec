from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from fastreid_uns.modeling.memory import ClusterMemory, InstanceMemory, move_in_order
from fastreid_uns.structures import Batch, FeatureBank, PseudoLabels

GOLDEN = Path(__file__).parents[1] / "golden"


def unit(*shape: int, seed: int = 0) -> torch.Tensor:
    return F.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)))


@pytest.mark.parametrize("case", ["plain_small", "plain_large", "hard_small", "hard_large"])
def test_cluster_memory_equals_the_reference(case):
    golden = np.load(GOLDEN / f"cc_memory_{case}.npz")
    before = torch.from_numpy(golden["memory_before"])
    memory = ClusterMemory(
        before.shape[1],
        momentum=float(golden["momentum"]),
        temperature=float(golden["temp"]),
        hard=bool(golden["use_hard"]),
    )
    memory.features = before
    for step, (raw, targets) in enumerate(zip(golden["inputs"], golden["targets"], strict=True)):
        inputs = torch.from_numpy(raw).requires_grad_()
        labels = torch.from_numpy(targets).long()
        loss = F.cross_entropy(memory(F.normalize(inputs), labels), labels)
        loss.backward()
        torch.testing.assert_close(loss.item(), float(golden["loss"][step]), rtol=1e-5, atol=2e-6)
        torch.testing.assert_close(inputs.grad, torch.from_numpy(golden["grad_inputs"][step]), rtol=0, atol=3e-6)
        if step == 0:
            torch.testing.assert_close(
                memory.features, torch.from_numpy(golden["memory_after_step1"]), rtol=0, atol=1e-6
            )
    torch.testing.assert_close(memory.features, torch.from_numpy(golden["memory_after"]), rtol=0, atol=1e-6)


def test_update_in_order_equals_the_loop_over_images_bit_for_bit():
    rows, feats = unit(5, 16), unit(23, 16, seed=1)
    labels = torch.randint(0, 5, (23,), generator=torch.Generator().manual_seed(2))
    moved = move_in_order(rows, feats, labels, 0.3)
    loop = rows.clone()
    for feat, label in zip(feats, labels, strict=True):
        loop[label] = F.normalize((0.3 * loop[label] + (1.0 - 0.3) * feat)[None])[0]
    assert torch.equal(moved, loop)
    assert torch.equal(rows, unit(5, 16))


def test_an_update_that_cancels_out_stays_finite():
    moved = move_in_order(torch.tensor([[1.0, 0.0]]), torch.tensor([[-1.0, 0.0]]), torch.tensor([0]), 0.5)
    assert torch.isfinite(moved).all()


def test_source_centroids_come_before_clusters():
    memory = ClusterMemory(2)
    source = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 1.0]])
    bank = FeatureBank(unit(2, 2), torch.zeros(2), {}, source, torch.tensor([1, 0, 0]))
    memory.reset(PseudoLabels(torch.tensor([0, 0]), torch.tensor([[0.6, 0.8]])), bank)
    assert memory.features.tolist() == [[0.0, 1.0], [1.0, 0.0], pytest.approx([0.6, 0.8])]


def test_instance_memory_rows_of_source_and_target_images():
    memory = InstanceMemory(2)
    bank = FeatureBank(unit(3, 2), torch.zeros(3), {}, torch.eye(2), torch.tensor([0, 1]))
    pseudo = PseudoLabels(torch.tensor([0, 0, -1]), unit(1, 2))
    memory.reset(pseudo, bank)
    index, labels = torch.tensor([4, 2, 0]), torch.tensor([1, 5, 2])
    rows = memory.rows(Batch((), index, labels, torch.zeros(3), torch.tensor([1, 0, 0])))
    assert rows.tolist() == [1, 4, 2]
    memory.reset(pseudo, FeatureBank(memory.features[2:], torch.zeros(3)))
    assert memory.features.tolist() == torch.cat([torch.eye(2), bank.feats]).tolist()


@pytest.mark.parametrize(("key", "value"), [("momentum", 1.5), ("temperature", 0.0)])
def test_parameters_out_of_range_name_their_key(key, value):
    with pytest.raises(ValueError, match=f"MODEL.MEMORY.{key.upper()} is {value}"):
        ClusterMemory(4, **{key: value})
