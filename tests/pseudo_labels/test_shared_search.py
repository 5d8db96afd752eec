"""Processes that share search, encoding and distances find what one finds, and none waits for one that failed."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from fastreid_uns.errors import FailedElsewhere
from fastreid_uns.pseudo_labels.dbscan import CameraJaccardLabels, DBSCANLabels
from fastreid_uns.pseudo_labels.jaccard import reciprocal_encoding
from fastreid_uns.pseudo_labels.search import candidates, exact
from fastreid_uns.structures import FeatureBank, NoClusters
from fastreid_uns.utils import sharing

N = 700


def bank() -> FeatureBank:
    """Noisy identities, many doubles, and cameras that see all of them."""
    generator = torch.Generator().manual_seed(0)
    middle = F.normalize(torch.randn(40, 12, generator=generator))
    feats = F.normalize(middle.repeat(18, 1)[:N] + 0.15 * torch.randn(N, 12, generator=generator))
    feats[600:650] = feats[:50]
    return FeatureBank(feats, torch.arange(N) % 3)


def products_of(search: Callable[[], Any]) -> int:
    """Pairs of blocks that are multiplied."""
    shown, product = [], candidates.CoarseFeatures.product
    candidates.CoarseFeatures.product = lambda *args: shown.append(1) or product(*args)  # type: ignore[method-assign]
    try:
        search()
    finally:
        candidates.CoarseFeatures.product = product  # type: ignore[method-assign]
    return len(shown)


def everything(small: FeatureBank) -> dict[str, Any]:
    """What is shared, of one bank."""
    feats, cameras = small.feats, small.cameras
    encoding = reciprocal_encoding(feats, 12, 4)
    peaked = F.pad(torch.eye(100), (0, 0, 0, 1)) + 0.01 * torch.randn(
        101, 100, generator=torch.Generator().manual_seed(1)
    )
    with torch.no_grad():
        by_rows = exact._by_rows(feats, 7, 128)
    return {
        "8 bits": candidates.search_by_candidates(feats, 9, 64, int8=True)[:2],
        "farthest": exact.neighbours_and_farthest(feats, 9, block=64),
        "others": exact.nearest_of_others(feats, cameras, 9, block=64),
        "one neighbour": exact.nearest_neighbours(feats, 1),
        "by rows": by_rows,
        "encoding": (encoding.indptr, encoding.indices, encoding.data),
        "labels": DBSCANLabels(k1=12, k2=4)(small, 0).labels,
        "labels by cameras": CameraJaccardLabels(k1_intra=4, k1_inter=8)(small, 0).labels,
        "to be measured": candidates.CoarseFeatures(peaked, int8=True).share_to_measure(5),
        "one for all": sharing.from_first(partial(exact.nearest_neighbours, feats, 5)),
        "products": products_of(partial(exact.nearest_neighbours, feats, 9, block=64)),
    }


def fails(rank: int, world: int) -> dict[str, str]:
    """What each process gets to know of an error of the last, and of one of all."""
    result = {}
    try:
        with sharing.by_all_ranks():
            if rank == world - 1:
                raise MemoryError("no room")
            sharing.from_all(rank)
    except (MemoryError, FailedElsewhere) as error:
        result["one"] = f"{type(error).__name__}: {error}"
    try:
        with sharing.by_all_ranks():
            DBSCANLabels(min_samples=300, k1=12, k2=4)(bank(), 0)
    except NoClusters as error:
        result["all"] = str(error).partition(" is")[0]
    return result


def work(rank: int, world: int, folder: str) -> None:
    torch.set_num_threads(1 + rank)  # machines may differ
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world)
    with sharing.by_all_ranks():
        found = everything(bank())
    differs = torch.zeros(5, 2)
    differs[3, 1] = rank == world - 1
    found |= {
        "errors": fails(rank, world),
        "equal": [sharing.equal_on_all(bank().feats), sharing.equal_on_all(differs), sharing.ranks()],
    }
    torch.save(found, f"{folder}/{rank}.pth")
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def alone() -> dict[str, Any]:
    return everything(bank())


@pytest.fixture(scope="module", params=[2, 3])
def together(request, tmp_path_factory) -> list[dict[str, Any]]:
    folder: Path = tmp_path_factory.mktemp("processes")
    torch.multiprocessing.spawn(work, args=(request.param, str(folder)), nprocs=request.param)
    return [torch.load(folder / f"{rank}.pth", weights_only=False) for rank in range(request.param)]


def tensors(value: Any) -> list[torch.Tensor]:
    return [torch.as_tensor(part) for part in (value if isinstance(value, tuple) else (value,))]


def test_each_process_finds_what_one_finds(alone, together):
    assert int(alone["labels"].max()) > 10
    assert int(alone["labels by cameras"].max()) > 5
    for found in together:
        for name in alone.keys() - {"products"}:
            for a, b in zip(tensors(alone[name]), tensors(found[name]), strict=True):
                assert torch.equal(a, b), name


def test_each_process_multiplies_its_part_only(alone, together):
    """11 blocks of 64: 66 pairs for the limits and again for what is measured."""
    assert alone["products"] == 2 * 66
    assert sum(found["products"] for found in together) == 2 * 66
    assert all(found["products"] <= 2 * (66 // len(together) + 1) for found in together)


def test_a_process_that_fails_keeps_none_waiting(together):
    *others, failed = (found["errors"]["one"] for found in together)
    assert failed == "MemoryError: no room"
    assert set(others) == {f"FailedElsewhere: process {len(together) - 1}: MemoryError: no room"}


def test_an_error_of_all_is_that_of_each(together):
    assert {found["errors"]["all"] for found in together} == {"PSEUDO_LABELS: every one of 700 images"}


def test_banks_that_differ_by_a_number_are_told(together):
    assert all(found["equal"] == [True, False, 1] for found in together)


def test_outside_of_a_block_all_work_is_the_own_one():
    assert list(sharing.dealt(range(5))) == [0, 1, 2, 3, 4]
    assert sharing.own_rows(5) == range(5)
    assert all(map(sharing.is_own, range(5)))
    assert sharing.first()
    assert sharing.from_all("a") == sharing.on_first("a") == ["a"]
    assert sharing.from_first(lambda: "b") == "b"
    with pytest.raises(KeyError), sharing.by_all_ranks():
        raise KeyError


@pytest.mark.parametrize(("count", "world"), [(0, 2), (1, 3), (7, 3), (9, 3)])
def test_what_is_dealt_comes_back_in_order(count, world, monkeypatch):
    monkeypatch.setattr(sharing, "_shared", True)
    monkeypatch.setattr(sharing.comm, "world", lambda: world)
    lists, rows, own = [], [], []
    for rank in range(world):
        monkeypatch.setattr(sharing.comm, "rank", lambda rank=rank: rank)
        lists.append(list(sharing.dealt(range(count))))
        own.append([at for at in range(count) if sharing.is_own(at)])
        rows += sharing.own_rows(count)
    assert own == lists
    assert max(map(len, lists)) - min(map(len, lists)) <= 1
    assert sharing.in_order(lists) == rows == list(range(count))
