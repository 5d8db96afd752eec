"""A batch cut into the slices of two processes gives the losses of the whole batch."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from fastreid_uns.modeling import losses
from fastreid_uns.modeling.proxies import sum_over_cameras
from fastreid_uns.projects.ICE.losses import HardInstanceLoss, SoftInstanceLoss
from fastreid_uns.utils import comm


@pytest.fixture
def batch() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    names = ("feats", "teacher_feats", "weak_feats")
    views = {name: F.normalize(torch.randn(8, 5, dtype=torch.float64, generator=generator)) for name in names}
    losses = torch.rand(8, dtype=torch.float64, generator=generator)
    labels = torch.tensor([0, 0, 1, 2, 2, 1, 0, 3])
    return {**views, "losses": losses, "labels": labels, "cameras": torch.tensor([0, 1, 1, 2, 0, 0, 0, 3])}


LOSSES = [
    (HardInstanceLoss(), ("feats", "teacher_feats", "labels")),
    (SoftInstanceLoss(), ("feats", "teacher_feats", "weak_feats")),
    (sum_over_cameras, ("losses", "cameras")),
]


@pytest.mark.parametrize(("loss", "names"), LOSSES)
def test_mean_over_processes_is_the_loss_of_the_whole_batch(batch, loss, names, monkeypatch):
    whole = [batch[name].clone() for name in names]
    whole[0].requires_grad_()
    expected = loss(*whole)
    expected.backward()

    halves = [[batch[name][rows].clone() for name in names] for rows in (slice(4), slice(4, 8))]

    def all_gather(value: torch.Tensor, equal: bool = False) -> torch.Tensor:
        """What both processes hold, found by what this one does."""
        (full,) = [full for full in batch.values() if any(torch.equal(value, full[i : i + 4]) for i in (0, 4))]
        return full

    monkeypatch.setattr(comm, "world", lambda: 2)
    for module in (comm, losses):
        monkeypatch.setattr(module, "all_gather", all_gather)
    found = []
    for half in halves:
        half[0].requires_grad_()
        found.append(loss(*half))
        found[-1].backward()
    torch.testing.assert_close(torch.stack(found).mean(), expected)
    gradient = torch.cat([half[0].grad for half in halves]) / 2  # DistributedDataParallel averages
    torch.testing.assert_close(gradient, whole[0].grad)
