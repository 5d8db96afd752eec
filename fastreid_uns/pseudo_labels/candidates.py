"""The nearest neighbours on the CPU, exactly: candidates by fast products, then their true distances.

A product in 8 bits or float32 gives an estimate of the distance and a bound on how far it can be off. An image whose
estimate lies above those of k others by more than both can be off is not among the k nearest; all others are
candidates and are measured one by one. So the result is the same number for number, whatever the product.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

logger = logging.getLogger(__name__)

_CAPACITY = 256  # candidates of a row at least: the k nearest and those that the bound cannot tell from them
_LONGEST_LIST = 640  # candidates that 8 bits may ask for; more take longer than products in float32
_SMALL = 4096  # images below which float32 takes less time than the choice
_UNIT_ROUNDOFF = 2.0**-24  # of float32
_SLACK = 2.0**-19  # of both squared lengths: float32 arithmetic around the product, and rounding of the true distance
_LONGEST = 2**31 // 127**2  # numbers in a row whose product fits into 32 bits
_MANY = 1000  # rows measured against all images of which the log tells
_FASTER = 1.5  # times as fast as float32 must products of 8 bits be


def search_by_candidates(
    feats: Tensor, k: int, block: int, *, eight_bits: bool | None = None, farthest: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """Squared distances (N, k), images (N, k) and, if `farthest`, the largest squared distances (N,), else zeros.

    Args:
        feats: (N, D) float32, finite, contiguous, on the CPU.
        eight_bits: precision of the products; None = 8 bits where that is faster.
        farthest: take float32, which alone gives the farthest.
    """
    n = len(feats)
    far = np.zeros(n if farthest else 0, np.float32)
    if eight_bits is None and not farthest:
        coarse, capacity = _choose(feats, k)
    else:
        coarse, capacity = Coarse(feats, eight_bits=bool(eight_bits)), max(_CAPACITY, 4 * k)
    lists = _offer_each_pair_once(coarse, _Lists(coarse.errors, k, capacity), block, far)
    unsure = np.flatnonzero(lists.counts < 0)
    if coarse.eight_bits and len(unsure):
        coarse = Coarse(feats, eight_bits=False)
        lists.replace(unsure, _offer_all(coarse, unsure, _Lists(coarse.errors[unsure], k, capacity), block))
    alike = int((lists.counts < 0).sum())
    if alike > _MANY:
        logger.warning(
            "neighbours: %s of %s images have more than %d near-equal neighbours, which are measured one by one; that "
            "takes long. The network has mapped many images to one point: lower SOLVER.BASE_LR.",
            f"{alike:,}",
            f"{n:,}",
            lists.near.shape[1],
        )
    sq, index = _measured(feats, k, np.arange(n), *lists.candidates)
    return sq, index, torch.from_numpy(far)


def nearest_of_some(feats: Tensor, k: int, images: np.ndarray, block: int = 2048) -> tuple[Tensor, Tensor]:
    """Squared distances (M, k) and indices (M, k) of the nearest neighbours of M images among all, exactly."""
    coarse = Coarse(feats, eight_bits=False)
    lists = _offer_all(coarse, images, _Lists(coarse.errors[images], k, max(_CAPACITY, 4 * k)), block)
    return _measured(feats, k, images, *lists.candidates)


def nearest_of_listed(feats: Tensor, k: int, counts: np.ndarray, listed: np.ndarray) -> tuple[Tensor, Tensor]:
    """Squared distances (N, k) and indices (N, k) of the nearest of candidates that are given.

    Args:
        counts: (N,) int32 candidates, the image itself not among them; -1 for all images.
        listed: (N, C) int32, the candidates first.
    """
    n = len(feats)
    near = np.zeros(listed.shape, np.float32)
    return _measured(feats, k, np.arange(n), np.full(n, np.inf, np.float32), counts, near, listed)


def _measured(feats: Tensor, k: int, images: np.ndarray, *candidates: np.ndarray) -> tuple[Tensor, Tensor]:
    """The k nearest of the candidates of M images by true distances."""
    from fastreid_uns.pseudo_labels import kernels
    from fastreid_uns.utils.compiled import over_rows

    sq, index = np.empty((len(images), k), np.float32), np.empty((len(images), k), np.int64)
    over_rows(kernels.measure_listed, len(images), feats.numpy(), images, *candidates, sq, index)
    return torch.from_numpy(sq), torch.from_numpy(index)


def _choose(feats: Tensor, k: int) -> tuple[Coarse, int]:
    """The form of the products and the length of lists: 8 bits where they are faster and lists need not be too long."""
    if len(feats) >= _SMALL and eight_bits_pay(feats.shape[1], torch.get_num_threads()):
        coarse = Coarse(feats, eight_bits=True)
        capacity = coarse.capacity(k)
        if capacity <= max(_LONGEST_LIST, 4 * k):
            return coarse, capacity
    return Coarse(feats, eight_bits=False), max(_CAPACITY, 4 * k)


class _Lists:
    """Candidates of M images: estimates and indices in no order, and the limit above which none is taken."""

    def __init__(self, errors: np.ndarray, k: int, capacity: int) -> None:
        m = len(errors)
        self.need = max(k - 1, 1)
        self.errors, self.limits = errors, np.full(m, np.inf, np.float32)
        self.counts = np.zeros(m, np.int32)  # -1: given up
        self.near, self.listed = np.empty((m, capacity), np.float32), np.empty((m, capacity), np.int32)

    @property
    def candidates(self) -> tuple[np.ndarray, ...]:
        return self.errors, self.counts, self.near, self.listed

    def part(self, rows: slice) -> tuple[Any, ...]:
        """Arguments of the kernels for some of the images."""
        arrays = (self.errors, self.limits, self.counts, self.near, self.listed)
        return self.need, *(array[rows] for array in arrays)

    def replace(self, rows: np.ndarray, others: _Lists) -> None:
        for own, other in zip(self.candidates, others.candidates, strict=True):
            own[rows] = other


def _offer_each_pair_once(coarse: Coarse, lists: _Lists, block: int, farthest: np.ndarray) -> _Lists:
    """Upper triangle of blocks; each serves its rows and its columns."""
    from fastreid_uns.pseudo_labels import kernels
    from fastreid_uns.utils.compiled import Workers

    n = len(coarse.feats)
    images, held = np.arange(n), coarse.memory(min(block, n) ** 2)
    with Workers() as workers:
        for row0 in range(0, n, block):
            rows = slice(row0, row0 + block)
            above = coarse.part(rows)
            for col0 in range(row0, n, block):
                columns = slice(col0, col0 + block)
                beside = coarse.part(columns)
                block_of = (coarse.product(above, beside, held), coarse.scales, coarse.norms, images[rows], col0)
                workers.over_rows(kernels.offer_columns, len(above), *block_of, *lists.part(rows), slabs=1)
                if col0 > row0:
                    workers.over_rows(kernels.offer_rows, len(beside), *block_of, *lists.part(columns), slabs=1)
                if len(farthest):
                    kernels.keep_farthest(0, len(above), block_of[0], coarse.norms, row0, col0, farthest)
    return lists


def _offer_all(coarse: Coarse, images: np.ndarray, lists: _Lists, block: int) -> _Lists:
    """All images to a few, whose lists are given."""
    from fastreid_uns.pseudo_labels import kernels
    from fastreid_uns.utils.compiled import Workers

    held = coarse.memory(block**2)
    with Workers() as workers:
        for row0 in range(0, len(images), block):
            rows = slice(row0, row0 + block)
            above = coarse.part(images[rows])
            for col0 in range(0, len(coarse.feats), block):
                products = coarse.product(above, coarse.part(slice(col0, col0 + block)), held)
                args = (products, coarse.scales, coarse.norms, images[rows], col0, *lists.part(rows))
                workers.over_rows(kernels.offer_columns, len(above), *args, slabs=1)
    return lists


class Coarse:
    """Rows less their mean, in float32 or rounded to 8 bits with one scale for each row.

    With x the centred row, a = scale * row what is kept of it and r = x - a, the product of two rows is off by
    a_i.r_j + r_i.x_j, at most |a_i||r_j| + |r_i||x_j| (Cauchy-Schwarz); r is known, so the bound is, too. The product
    of 8-bit rows itself is exact; that of D float32 numbers, in any order, is off by at most D u / (1 - D u)
    times |a_i||a_j|, u = 2^-24 (Higham 2002, eq. 3.5).

    Args:
        feats: (N, D) float32, finite, contiguous.
        eight_bits: keep 8 bits; needs D <= 133,144.

    Attributes:
        scales: (N,) float32.
        norms: (N,) float32, squared lengths of the centred rows.
        errors: (N,) float32; an estimate norms[i] + norms[j] - 2 scales[i] scales[j] product lies at most
            min(errors[i], errors[j]) from the true squared distance.
    """

    def __init__(self, feats: Tensor, *, eight_bits: bool) -> None:
        from fastreid_uns.pseudo_labels import kernels
        from fastreid_uns.utils.compiled import over_rows

        n, d = feats.shape
        self.feats, self.eight_bits = feats, eight_bits
        self.mean = feats.mean(0)
        rows = np.empty((n, d) if eight_bits else (n, 0), np.int8)
        scales = np.ones(n, np.float32)
        lengths, kept, lost = (np.empty(n) for _ in range(3))
        arrays = (feats.numpy(), self.mean.numpy(), rows, scales, lengths, kept, lost)
        over_rows(kernels.round_rows, n, *arrays)
        self.rows = torch.from_numpy(rows)
        self.scales, self.norms = scales, (lengths**2).astype(np.float32)
        off = kept * lost.max(initial=0) + lost * lengths.max(initial=0)
        if not eight_bits:
            off += kept * kept.max(initial=0) * d * _UNIT_ROUNDOFF / (1 - d * _UNIT_ROUNDOFF)
        slack = _SLACK * (lengths**2 + lengths.max(initial=0) ** 2)
        self.errors = np.nextafter((2 * off + slack).astype(np.float32), np.float32(np.inf))

    def part(self, rows: slice | np.ndarray) -> Tensor:
        """(b, D) rows as `product` takes them."""
        return self.rows[rows] if self.eight_bits else self.feats[rows] - self.mean

    def product(self, above: Tensor, beside: Tensor, held: Tensor) -> np.ndarray:
        """(a, b) products of two parts, in the memory `held`."""
        out = held[: len(above) * len(beside)].view(len(above), len(beside))
        multiply = torch._int_mm if self.eight_bits else torch.mm
        return multiply(above, beside.T, out=out).numpy()

    def memory(self, size: int) -> Tensor:
        """For the products of parts, `size` at a time."""
        return torch.empty(size, dtype=torch.int32 if self.eight_bits else torch.float32)

    def capacity(self, k: int, sample: int = 64) -> int:
        """How long lists must be for nearly all images to find room for their candidates, judged by a sample."""
        n = len(self.feats)
        some = np.unique(np.linspace(0, n - 1, min(n, sample)).astype(np.int64))
        every, counts = self.part(slice(None)), []
        for few in np.array_split(some, 8):
            products = self.product(self.part(few), every, self.memory(len(few) * n))
            sq = self.norms[few, None] + self.norms - 2 * self.scales[few, None] * self.scales * products
            limits = np.partition(sq, k - 1, axis=1)[:, k - 1] + 2 * self.errors[few]
            counts.extend((sq <= limits[:, None]).sum(1))
        return max(_CAPACITY, 4 * k, round(1.25 * float(np.percentile(counts, 95))))


@cache
def eight_bits_pay(d: int, threads: int, size: int = 512) -> bool:
    """Whether this machine multiplies 8-bit rows of d numbers exactly, and fast enough; asked once in a process.

    Some processors add 8-bit products in 16 bits, where the largest ones overflow.
    """
    if not 2 <= d <= _LONGEST or not hasattr(torch, "_int_mm"):
        return False
    rows = torch.full((size, d), 127, dtype=torch.int8)
    rows[::2] = -127
    sign = rows[:, :1].sign().int()
    try:
        if not torch.equal(torch._int_mm(rows, rows.T), 127**2 * d * sign * sign.T):
            return False
    except (RuntimeError, NotImplementedError):  # this build of torch has no such product
        return False
    exact = rows.float()
    return _seconds(torch.mm, exact) > _FASTER * _seconds(torch._int_mm, rows)


def _seconds(multiply: Callable[[Tensor, Tensor], Tensor], rows: Tensor, times: int = 4) -> float:
    spent = []
    for _ in range(times):
        start = time.perf_counter()
        multiply(rows, rows.T)
        spent.append(time.perf_counter() - start)
    return min(spent)
