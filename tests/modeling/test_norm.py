"""Grouped and domain batch norm against separate plain layers, in one process and in two."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from fastreid_uns.modeling.norm import (
    DomainBatchNorm,
    GhostBatchNorm,
    domain_batch_norm,
    evaluated_domain,
    folded_norms,
    freeze_norm_statistics,
    frozen_statistics,
    ghost_batch_norm,
    rows_of_domains,
)

ROOT = Path(__file__).parents[2]


def a_norm(channels: int = 5, flat: bool = False) -> nn.Module:
    """A batch norm with parameters and statistics that are not the starting ones."""
    norm = (nn.BatchNorm1d if flat else nn.BatchNorm2d)(channels).double()
    with torch.no_grad():
        for value in (norm.weight, norm.bias, norm.running_mean):
            value.uniform_(0.5, 1.5)
        norm.running_var.uniform_(0.5, 2.0)
    return norm


class Operations(TorchDispatchMode):
    """Names of all operations, in order."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


def slow_groups(norm: nn.Module, x: torch.Tensor, group: int) -> tuple[torch.Tensor, nn.Module]:
    """Each group through a fresh copy of the layer; the copy of the first group has the expected statistics."""
    copies = [copy.deepcopy(norm) for _ in range(len(x) // group)]
    for made in copies:
        made.weight, made.bias = norm.weight, norm.bias
    return torch.cat([made(part) for made, part in zip(copies, x.split(group), strict=True)]), copies[0]


@pytest.mark.parametrize(
    ("shape", "flat"), [((12, 5, 3, 7), False), ((12, 5), True), ((12, 5, 1, 1), False), ((12, 5, 9), True)]
)
@pytest.mark.parametrize("group", [4, 6, 12])
def test_groups_equal_separate_layers(shape: tuple[int, ...], flat: bool, group: int) -> None:
    norm = a_norm(flat=flat)
    x = (torch.randn(shape, dtype=torch.float64) * 3 + 1).requires_grad_()
    upstream = torch.randn(shape, dtype=torch.float64)
    wanted, first = slow_groups(norm, x, group)
    wanted_grads = torch.autograd.grad((wanted * upstream).sum(), (x, norm.weight, norm.bias))

    grouped = ghost_batch_norm(copy.deepcopy(norm), group)
    got = grouped(x)
    grads = torch.autograd.grad((got * upstream).sum(), (x, grouped.weight, grouped.bias))

    torch.testing.assert_close(got, wanted)
    for a, b in zip(grads, wanted_grads, strict=True):
        torch.testing.assert_close(a, b)
    torch.testing.assert_close(grouped.state_dict(), first.state_dict())


@pytest.mark.parametrize(
    ("shape", "flat"), [((12, 5, 3, 7), False), ((12, 5), True), ((12, 5, 1, 1), False), ((12, 5, 9), True)]
)
@pytest.mark.parametrize("momentum", [0.1, None])
def test_the_compiled_form_equals_separate_layers(shape: tuple[int, ...], flat: bool, momentum: float | None) -> None:
    norm = a_norm(flat=flat)
    norm.momentum = momentum
    x = (torch.randn(shape, dtype=torch.float64) * 3 + 1).requires_grad_()
    upstream = torch.randn(shape, dtype=torch.float64)
    wanted, first = slow_groups(norm, x, 4)
    wanted_grads = torch.autograd.grad((wanted * upstream).sum(), (x, norm.weight, norm.bias))

    grouped = ghost_batch_norm(copy.deepcopy(norm), 4)
    torch._dynamo.reset()
    got = torch.compile(grouped, backend="eager", fullgraph=True)(x)
    grads = torch.autograd.grad((got * upstream).sum(), (x, grouped.weight, grouped.bias))

    torch.testing.assert_close(got, wanted)
    torch.testing.assert_close(grads, wanted_grads)
    torch.testing.assert_close(grouped.state_dict(), first.state_dict())


def test_the_compiled_form_computes_half_precision_in_float32() -> None:
    """A mean of 100 and a deviation of 1 are lost if sums are kept in bfloat16."""
    x = (torch.randn(8, 3, 16, 16) + 100).to(torch.bfloat16)
    got = torch.compile(GhostBatchNorm(nn.BatchNorm2d(3), 4), backend="eager", fullgraph=True)(x)
    assert got.dtype == torch.bfloat16
    wanted = torch.cat([nn.BatchNorm2d(3).double()(part.double()) for part in x.split(4)])
    torch.testing.assert_close(got.double(), wanted, rtol=0.01, atol=0.01)


def test_the_compiled_form_keeps_channels_last() -> None:
    x = torch.randn(6, 4, 5, 3).to(torch.bfloat16).contiguous(memory_format=torch.channels_last)
    torch._dynamo.reset()
    out = torch.compile(GhostBatchNorm(nn.BatchNorm2d(4), 2), backend="aot_eager", fullgraph=True)(x)
    assert out.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(out, GhostBatchNorm(nn.BatchNorm2d(4), 2)(x), rtol=0.02, atol=0.02)


def test_the_compiled_form_of_a_layer_without_parameters_or_statistics() -> None:
    norm = nn.BatchNorm2d(3, affine=False, track_running_stats=False)
    x = torch.randn(6, 3, 4, 4)
    got = torch.compile(GhostBatchNorm(norm, 3), backend="eager", fullgraph=True)(x)
    torch.testing.assert_close(got, torch.cat([norm(x[:3]), norm(x[3:])]))


def test_evaluation_is_plain_batch_norm_of_any_size() -> None:
    norm = a_norm().eval()
    x = torch.randn(7, 5, 3, 2, dtype=torch.float64)
    torch.testing.assert_close(GhostBatchNorm(norm, 4)(x), norm(x))


def test_one_group_takes_the_operations_of_a_plain_layer() -> None:
    plain = a_norm()
    counted = []
    for norm in (plain, ghost_batch_norm(copy.deepcopy(plain), 12)):
        with Operations() as operations:
            norm(torch.randn(12, 5, 3, 7, dtype=torch.float64, requires_grad=True)).sum().backward()
        counted.append(operations.names)
    assert counted[1] == counted[0]


def test_zero_leaves_plain_layers() -> None:
    model = ghost_batch_norm(nn.Sequential(nn.BatchNorm2d(3)), 0)
    assert type(model[0]) is nn.BatchNorm2d


def test_a_second_call_changes_the_group() -> None:
    model = nn.Sequential(nn.BatchNorm2d(3))
    layer = ghost_batch_norm(model, 4)[0]
    assert ghost_batch_norm(model, 8)[0] is layer
    assert layer.group == 8
    assert "group=8" in repr(layer)


def test_conversion_keeps_names_parameters_and_flags() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.InstanceNorm2d(4, affine=True), nn.BatchNorm1d(4))
    model[3].bias.requires_grad_(False)
    model[1].eval()
    before, parameters = model.state_dict(), list(model.parameters())
    ghost_batch_norm(model, 4)
    assert list(model.state_dict()) == list(before)
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    assert not model[3].bias.requires_grad
    assert not model[1].training
    assert isinstance(model[2], nn.InstanceNorm2d)
    model.load_state_dict(before)


@pytest.mark.parametrize("momentum", [0.1, None])
def test_statistics_over_several_steps(momentum: float | None) -> None:
    plain = nn.BatchNorm2d(3, momentum=momentum)
    grouped = GhostBatchNorm(copy.deepcopy(plain), 2)
    for _ in range(3):
        x = torch.randn(6, 3, 4, 4)
        plain(x[:2])
        grouped(x)
    torch.testing.assert_close(grouped.state_dict(), plain.state_dict())


def test_layer_without_parameters_or_statistics() -> None:
    norm = nn.BatchNorm2d(3, affine=False, track_running_stats=False)
    x = torch.randn(6, 3, 4, 4)
    torch.testing.assert_close(GhostBatchNorm(norm, 3)(x), torch.cat([norm(x[:3]), norm(x[3:])]))


def test_activation_inside_a_timm_layer_survives() -> None:
    from timm.layers import BatchNormAct2d

    norm = BatchNormAct2d(3)
    x = torch.randn(8, 3, 4, 4)
    wanted = torch.cat([norm(x[:4]), norm(x[4:])])
    torch.testing.assert_close(ghost_batch_norm(norm, 4)(x), wanted)
    assert (wanted >= 0).all()


def test_channels_last_and_half_precision_stay() -> None:
    grouped = GhostBatchNorm(nn.BatchNorm2d(4), 2)
    x = torch.randn(6, 4, 5, 3).to(torch.bfloat16).contiguous(memory_format=torch.channels_last)
    out = grouped(x)
    assert out.dtype == torch.bfloat16
    assert out.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(out.float(), GhostBatchNorm(nn.BatchNorm2d(4), 2)(x.float()), atol=0.02, rtol=0.02)


def test_batch_that_does_not_fit_names_the_numbers() -> None:
    with pytest.raises(ValueError, match=r"GHOST_BATCH is 4 and a norm layer got 6 images in each of 1 processes"):
        GhostBatchNorm(nn.BatchNorm2d(3), 4)(torch.zeros(6, 3, 2, 2))
    with pytest.raises(ValueError, match=r"GHOST_BATCH is 64 and a norm layer got 32"):
        GhostBatchNorm(nn.BatchNorm2d(3), 64)(torch.zeros(32, 3, 2, 2))


@pytest.mark.parametrize("group", [-1, 1])
def test_impossible_group_is_refused(group: int) -> None:
    with pytest.raises(ValueError, match=f"GHOST_BATCH is {group}; 0"):
        ghost_batch_norm(nn.BatchNorm2d(3), group)


def split_model() -> nn.Sequential:
    model = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), a_norm(4), nn.ReLU(), nn.Flatten(), a_norm(48, flat=True))
    model[4].bias.requires_grad_(False)
    return model.double()


@pytest.mark.parametrize("group_first", [True, False])
def test_domains_equal_separate_models(group_first: bool) -> None:
    """Source rows first; layer by layer, each domain through a layer of its own, in groups of 2."""
    plain = split_model()
    x = torch.randn(10, 3, 3, 4, dtype=torch.float64)
    domains = torch.tensor([2] * 4 + [1] * 2 + [0] * 4)
    model = copy.deepcopy(plain)
    if group_first:
        model = domain_batch_norm(ghost_batch_norm(model, 2), 3)
    else:
        model = ghost_batch_norm(domain_batch_norm(model, 3), 2)
    with rows_of_domains(model, domains):
        got = model(x)

    wanted, norms = x, {}
    for i, layer in enumerate(plain):
        if i in (1, 4):
            parts = []
            for domain in (2, 1, 0):
                out, norms[i, domain] = slow_groups(copy.deepcopy(layer), wanted[domains == domain], 2)
                parts.append(out)
            wanted = torch.cat(parts)
        else:
            wanted = layer(wanted)
    torch.testing.assert_close(got, wanted)
    for (i, domain), norm in norms.items():
        torch.testing.assert_close(model[i].domains[domain].running_mean, norm.running_mean)
        torch.testing.assert_close(model[i].domains[domain].running_var, norm.running_var)


def test_each_domain_starts_from_the_given_layer_and_keeps_its_flags() -> None:
    plain = split_model()
    model = domain_batch_norm(copy.deepcopy(plain), 2)
    for i in (1, 4):
        for norm in model[i].domains:
            torch.testing.assert_close(norm.state_dict(), plain[i].state_dict())
            assert norm.bias.requires_grad == (i == 1)
    assert model[1].domains[0].weight is not model[1].domains[1].weight


def test_another_domain_can_be_evaluated() -> None:
    model = domain_batch_norm(nn.Sequential(a_norm()), 3).eval()
    for number, norm in enumerate(model[0].domains):
        nn.init.constant_(norm.running_mean, number)
        nn.init.constant_(norm.running_var, 4.0)
        nn.init.constant_(norm.weight, 2.0 + number)
        nn.init.zeros_(norm.bias)
    x = torch.full((2, 5, 1, 1), 7.0, dtype=torch.float64)
    with evaluated_domain(model, 2):
        torch.testing.assert_close(model(x), torch.full_like(x, (7 - 2) / 2 * 4), rtol=1e-4, atol=0)
    torch.testing.assert_close(model(x), torch.full_like(x, 7 / 2 * 2), rtol=1e-4, atol=0)


def test_evaluation_and_unnamed_rows_use_the_target() -> None:
    model = domain_batch_norm(nn.Sequential(a_norm()), 2)
    x = torch.randn(4, 5, 2, 2, dtype=torch.float64)
    source_before = copy.deepcopy(model[0].domains[1].state_dict())
    model(x)
    torch.testing.assert_close(model[0].domains[1].state_dict(), source_before)
    model.eval()
    with rows_of_domains(model, torch.tensor([1, 1, 0, 0])):
        torch.testing.assert_close(model(x), model[0].domains[0](x))


def test_batch_of_one_domain_takes_its_layer() -> None:
    model = domain_batch_norm(nn.Sequential(a_norm()), 3)
    x = torch.randn(4, 5, 2, 2, dtype=torch.float64)
    with rows_of_domains(model, torch.tensor([2, 2, 2, 2])):
        model(x)
    assert [int(norm.num_batches_tracked) for norm in model[0].domains] == [0, 0, 1]


def test_domains_end_with_their_context_even_after_an_error() -> None:
    model = domain_batch_norm(nn.Sequential(a_norm()), 2)
    with pytest.raises(RuntimeError, match="stop"), rows_of_domains(model, torch.tensor([1, 0])):
        raise RuntimeError("stop")
    assert model[0].rows.runs is None


def test_a_copy_has_domains_of_its_own() -> None:
    model = domain_batch_norm(nn.Sequential(a_norm(), a_norm()), 2)
    teacher = copy.deepcopy(model)
    assert teacher[0].rows is teacher[1].rows
    assert teacher[0].rows is not model[0].rows
    with rows_of_domains(model, torch.tensor([1, 0])):
        assert teacher[0].rows.runs is None


def test_domains_without_domain_layers_change_nothing() -> None:
    model = nn.Sequential(a_norm())
    x = torch.randn(4, 5, 2, 2, dtype=torch.float64)
    wanted = copy.deepcopy(model)(x)
    with rows_of_domains(model, torch.tensor([0, 1, 0, 1])):
        torch.testing.assert_close(model(x), wanted)


def test_messages_of_domains() -> None:
    model = domain_batch_norm(nn.Sequential(a_norm()), 2)
    with pytest.raises(ValueError, match=r"scattered, domains change 2 times in a batch of 4"):
        rows_of_domains(model, torch.tensor([1, 0, 0, 1])).__enter__()
    with pytest.raises(ValueError, match=r"domains \[0, 5\], the model knows 0 to 1"):
        rows_of_domains(model, torch.tensor([5, 0])).__enter__()
    with pytest.raises(ValueError, match=r"1 domain; a target and at least one source"):
        domain_batch_norm(nn.BatchNorm2d(3), 1)
    with pytest.raises(ValueError, match=r"already. Call it once"):
        domain_batch_norm(model, 2)
    assert isinstance(model[0], DomainBatchNorm)


WORKER = """
import sys, torch
from torch import nn
from fastreid_uns.modeling.norm import GhostBatchNorm
rank, folder = int(sys.argv[1]), sys.argv[2]
torch.set_num_threads(1)
torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
case = torch.load(f"{folder}/case.pt")
results = {}
for name, (x, upstream, group, affine) in case.items():
    norm = nn.BatchNorm2d(x.shape[1], affine=affine).double()
    if affine:
        nn.init.constant_(norm.weight, 1.7)
    norm = GhostBatchNorm(norm, group)
    x = x.chunk(2)[rank].clone().requires_grad_()
    out = norm(x)
    (out * upstream.chunk(2)[rank]).sum().backward()
    results[name] = (out.detach(), x.grad, [p.grad for p in norm.parameters()], norm.state_dict())
message = ""
try:
    GhostBatchNorm(nn.BatchNorm2d(3), 12)(torch.zeros(4, 3, 2, 2))
except ValueError as error:
    message = str(error)
torch.save((results, message), f"{folder}/result{rank}.pt")
torch.distributed.barrier()
torch.distributed.destroy_process_group()
"""


def test_two_processes_equal_one_with_the_whole_batch(tmp_path: Path) -> None:
    torch.manual_seed(0)
    case = {}
    for name, group, affine in (("whole", 8, True), ("plain", 8, False), ("inside", 2, True)):
        x = torch.randn(8, 3, 4, 5, dtype=torch.float64) * 2 + 1
        case[name] = (x, torch.randn_like(x), group, affine)
    torch.save(case, tmp_path / "case.pt")
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", WORKER]
    running = [subprocess.Popen([*command, str(rank), str(tmp_path)], env=environment) for rank in range(2)]
    assert [process.wait(timeout=120) for process in running] == [0, 0]
    (first, message), (second, _) = (torch.load(tmp_path / f"result{rank}.pt") for rank in range(2))

    for name, (x, upstream, group, affine) in case.items():
        norm = nn.BatchNorm2d(3, affine=affine).double()
        if affine:
            nn.init.constant_(norm.weight, 1.7)
        x.requires_grad_()
        wanted, stats = slow_groups(norm, x, group)
        grads = torch.autograd.grad((wanted * upstream).sum(), [x, *norm.parameters()])
        torch.testing.assert_close(torch.cat([first[name][0], second[name][0]]), wanted)
        torch.testing.assert_close(torch.cat([first[name][1], second[name][1]]), grads[0])
        for a, b, both in zip(first[name][2], second[name][2], grads[1:], strict=True):
            torch.testing.assert_close(a + b, both)
        torch.testing.assert_close(first[name][3], {k: v.detach() for k, v in stats.state_dict().items()})
        if group == 8:
            torch.testing.assert_close(second[name][3], first[name][3])
    assert "GHOST_BATCH is 12 and a norm layer got 4 images in each of 2 processes" in message


@pytest.mark.parametrize("group", [0, 4])
@pytest.mark.parametrize("momentum", [0.1, None])
def test_frozen_statistics_normalise_by_the_batch_and_change_no_buffer(group: int, momentum: float | None) -> None:
    model = ghost_batch_norm(nn.Sequential(nn.BatchNorm1d(3, momentum=momentum)), group)
    x = torch.randn(8, 3, generator=torch.Generator().manual_seed(0))
    moved = copy.deepcopy(model)
    before = copy.deepcopy(model.state_dict())
    with frozen_statistics(model):
        frozen = model(x)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert torch.equal(frozen, moved(x))
    assert not torch.equal(moved.state_dict()["0.running_mean"], before["0.running_mean"])
    model(x)
    assert all(torch.equal(value, moved.state_dict()[name]) for name, value in model.state_dict().items())


class Reversed(nn.Sequential):
    """Its children, from the last to the first."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for child in reversed(self):
            x = child(x)
        return x


@pytest.mark.parametrize("frozen", [False, True])
def test_folded_norms_leave_the_output_and_the_model_alone(frozen):
    model = nn.Sequential(
        nn.Conv2d(3, 5, 3, bias=False), a_norm().float(), nn.ReLU(), nn.Conv2d(5, 4, 1), a_norm(4).float()
    )
    model = (freeze_norm_statistics(model) if frozen else model).eval()
    names, images = list(model.state_dict()), torch.randn(2, 3, 6, 6)
    folded = folded_norms(model, images)
    assert not any(isinstance(part, nn.modules.batchnorm._BatchNorm) for part in folded.modules())
    torch.testing.assert_close(folded(2 * images), model(2 * images))
    assert list(model.state_dict()) == names


@pytest.mark.parametrize("bias", [False, True])
def test_folded_norms_of_a_trained_model_give_its_weights_the_same_gradients(bias):
    conv = nn.Conv2d(3, 6, 3, groups=3, stride=2, padding=1, bias=bias)
    last = nn.BatchNorm2d(4, affine=False)
    last.running_mean.uniform_(0.5, 1.5)
    model = nn.Sequential(conv, a_norm(6).float(), nn.ReLU6(), nn.Conv2d(6, 4, 1), last).eval()
    images, scale = torch.randn(2, 3, 7, 7), torch.randn(2, 4, 4, 4)
    folded = folded_norms(model, images, trained=True)
    for _ in range(2):  # the second time after a step
        found = torch.autograd.grad((folded(images) * scale).sum(), list(model.parameters()))
        expected = torch.autograd.grad((model(images) * scale).sum(), list(model.parameters()))
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
        with torch.no_grad():
            for value in model.parameters():
                value += torch.randn_like(value)
    assert len(folded(images).grad_fn.next_functions) == 3  # the convolution comes last: no norm is left


def test_a_model_that_does_not_compute_in_the_order_of_its_children_is_not_folded():
    model = Reversed(nn.Conv2d(3, 3, 1), a_norm(3).float()).eval()
    assert folded_norms(model, torch.randn(2, 3, 6, 6)) is model
