"""Approximate neighbours by faiss, for sets so large that the exact search takes too long."""

from __future__ import annotations

import logging
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastreid_uns.errors import MissingPackage
from fastreid_uns.pseudo_labels.search.candidates import nearest_of_listed
from fastreid_uns.pseudo_labels.search.exact import checked

logger = logging.getLogger(__name__)

APPROXIMATE = ("ivf", "hnsw")
_LINKS = 32  # of an image in the HNSW graph
_LISTS_ON_GPU = 2048  # that faiss looks through at most, and neighbours that it gives at most
_SAMPLE = 256  # images whose neighbours are searched exactly as well, to estimate the recall


@torch.no_grad()
def approximate_neighbours(feats: Tensor, k: int, *, search: str, effort: int) -> tuple[Tensor, Tensor]:
    """Nearly the k nearest images of each image, with true distances; warns with an estimate of the recall.

    Inverted lists are searched on the GPU that holds the features, if faiss was built for GPUs.

    Args:
        feats: (N, D) float, finite.
        k: neighbours of each image, itself included, 1..N.
        search: `ivf`, inverted lists around about 4 sqrt(N) centres, or `hnsw`, a graph of neighbours.
        effort: lists that are looked through, or candidates that are followed; more finds more and takes longer.

    Returns:
        As `nearest_neighbours`, on the CPU. An image for which fewer than k are found is searched exactly.

    Raises:
        ImportError: faiss is not installed.
        ValueError: as `nearest_neighbours`.

    Source: Jegou et al. 2011 (inverted lists); Malkov and Yashunin 2020 (HNSW).
    """
    rows = checked(feats, k).cpu()
    n = len(rows)
    found = _found_by_faiss(rows.numpy(), k, search, effort, feats.device)
    found[found == np.arange(n)[:, None]] = -1  # the image itself needs no search
    listed = np.take_along_axis(found, np.argsort(found < 0, axis=1, kind="stable"), 1).astype(np.int32)
    counts = (listed >= 0).sum(1).astype(np.int32)
    counts[counts < k - 1] = -1
    sq, index = nearest_of_listed(rows, k, np.arange(n), counts, listed)
    some = np.unique(np.linspace(0, n - 1, min(n, _SAMPLE)).astype(np.int64))
    exact = nearest_of_listed(rows, k, some, np.full(len(some), -1, np.int32), listed[some])[1]
    kept = (index[some][:, 1:, None] == exact[:, None, 1:]).any(2).float().mean() if k > 1 else torch.ones(())
    logger.warning(
        "PSEUDO_LABELS: SEARCH %s at SEARCH_EFFORT %d finds %.1f%% of the neighbours of %d images; labels suffer more "
        "than that tells. Raise SEARCH_EFFORT, or set SEARCH: exact.",
        search,
        effort,
        100 * float(kept),
        len(some),
    )
    return sq, index


def _found_by_faiss(rows: np.ndarray, k: int, search: str, effort: int, device: torch.device) -> np.ndarray:
    """(N, k) images in no order that matters, -1 where there are fewer."""
    try:
        import faiss
    except ImportError as error:
        raise MissingPackage(
            f"PSEUDO_LABELS: SEARCH is {search!r}, which needs faiss, and faiss is not installed. Run `pip install "
            f"faiss-cpu`, or set SEARCH: exact."
        ) from error
    faiss.omp_set_num_threads(torch.get_num_threads())
    n, d = rows.shape
    index: Any
    if search == "hnsw":
        index = faiss.IndexHNSWFlat(d, _LINKS)
        index.hnsw.efSearch = max(effort, k)
    else:
        lists = max(1, min(round(4 * n**0.5), n // 39))
        index = faiss.IndexIVFFlat(faiss.IndexFlatL2(d), d, lists)
        if device.type == "cuda" and on_gpu(faiss) and max(k, min(effort, lists)) <= _LISTS_ON_GPU:
            resources = faiss.StandardGpuResources()  # as long as the index is used
            index = faiss.index_cpu_to_gpu(resources, device.index or 0, index)
        index.nprobe = min(effort, lists)
        index.train(rows)
    index.add(rows)
    return index.search(rows, k)[1]


def on_gpu(faiss: Any) -> bool:
    """Whether this faiss was built for GPUs, and finds one."""
    return hasattr(faiss, "StandardGpuResources") and faiss.get_num_gpus() > 0
