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


@pytest.mark.parametrize("most", [None, 11, 23])
@pytest.mark.parametrize("labels", [[0] * 11 + [3, 1, 3, 2] * 3, list(range(23)), [4], [1] * 11, []])
def test_update_in_order_equals_the_loop_over_images_bit_for_bit(labels, most):
    """One row with many images, others with few or none, none twice, a single image, a single row, no image."""
    labels = torch.tensor(labels, dtype=torch.long)[torch.randperm(len(labels))]
    rows, feats = unit(25, 16), unit(len(labels), 16, seed=1)
    moved = move_in_order(rows, feats, labels, 0.3, most)
    loop = rows.clone()
    for feat, label in zip(feats, labels, strict=True):
        loop[label] = F.normalize((0.3 * loop[label] + (1.0 - 0.3) * feat)[None])[0]
    assert torch.equal(moved, loop)
    assert torch.equal(rows, unit(25, 16))


def test_hard_update_equals_the_loop_over_rows_bit_for_bit():
    rows, feats, labels = unit(7, 16), unit(23, 16, seed=1), torch.arange(23) % 5
    memory = ClusterMemory(16, momentum=0.3, hard=True)
    memory.features = rows
    memory.update(feats, labels)
    loop = rows.clone()
    for row in range(5):
        own = feats[labels == row]
        hardest = own[(own @ rows[row]).argmin()]
        loop[row] = F.normalize((0.3 * rows[row] + (1.0 - 0.3) * hardest)[None])[0]
    assert torch.equal(memory.features, loop)


def test_a_bound_on_the_images_of_a_row_shortens_the_update_and_a_wrong_one_is_noticed(monkeypatch):
    feats, six, turns = unit(8, 4), torch.tensor([0, 1, 2, 0, 1, 2]), []
    memory = ClusterMemory(4)
    memory.features = unit(3, 4)
    plain = F.normalize
    monkeypatch.setattr(F, "normalize", lambda x: turns.append(len(x)) or plain(x))
    memory.update(feats[:6], six)
    assert turns == [6, 3, 2, 1, 1, 1]
    memory.update(feats[:6], six, 2)
    assert turns[6:] == [6, 3]
    memory(feats[:6], six, 2)
    assert turns[8:] == [6, 3]
    with pytest.raises(RuntimeError, match="more than 2 images of one row"):
        memory.update(feats[:6], torch.tensor([0, 1, 0, 0, 1, 2]), 2)


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


def test_rows_that_do_not_move_stay_in_training():
    class Still(ClusterMemory):
        moves = False

    memory = Still(4, momentum=0.5)
    memory.features = unit(3, 4)
    memory(unit(2, 4, seed=1), torch.tensor([0, 2]))
    assert torch.equal(memory.features, unit(3, 4))
