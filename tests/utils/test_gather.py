"""Rows gathered over processes carry gradients as those of one process."""

import os

import torch
import torch.distributed
from torch import nn

from fastreid_uns.utils import comm

ROWS = torch.tensor([[1.0, 2.0], [0.5, -1.0], [2.0, 0.0], [-1.0, 3.0]])


def loss_of(outputs: torch.Tensor) -> torch.Tensor:
    """A scalar in which every row meets every other."""
    return (outputs @ outputs.T).square().mean()


def model() -> nn.Module:
    linear = nn.Linear(2, 3, bias=False)
    with torch.no_grad():
        linear.weight.copy_(torch.tensor([[1.0, 0.5], [-0.5, 2.0], [0.25, 1.0]]))
    return linear


def work(rank: int, folder: str) -> None:
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2"}
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    linear = model()
    own = ROWS[2 * rank : 2 * rank + 2]
    parallel = comm.wrap(linear, torch.device("cpu"), False)
    gathered = comm.all_gather_with_gradient(parallel(own))
    loss = loss_of(gathered)
    loss.backward()
    numbers = comm.all_gather_with_gradient(torch.tensor([rank, rank + 5]))
    torch.save([gathered.detach(), loss.detach(), linear.weight.grad, numbers], f"{folder}/{rank}.pth")
    torch.distributed.destroy_process_group()


def test_two_processes_give_the_loss_and_the_gradient_of_one(tmp_path):
    torch.multiprocessing.spawn(work, args=(str(tmp_path),), nprocs=2)
    linear = model()
    outputs = linear(ROWS)
    loss = loss_of(outputs)
    loss.backward()
    for rank in range(2):
        found, value, grad, numbers = torch.load(tmp_path / f"{rank}.pth")
        torch.testing.assert_close(found, outputs.detach())
        torch.testing.assert_close(value, loss.detach())
        torch.testing.assert_close(grad, linear.weight.grad)
        assert numbers.tolist() == [0, 5, 1, 6]


def test_one_process_keeps_its_rows():
    assert comm.all_gather_with_gradient(ROWS) is ROWS
