"""The nearest neighbours on the CPU, exactly: candidates by fast products, then their true distances.

A product in 8 bits or float32 gives an estimate of the distance and a bound on how far it can be off. A pair whose
estimate lies above the k-th true distance that either image knows so far by more than that is left; all others are
measured. So the result is the same number for number, whatever the product and the order of the pairs.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, partial
from itertools import pairwise
from queue import SimpleQueue
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from fastreid_uns.pseudo_labels.search.keys import distance_of, index_of, keys_of
from fastreid_uns.utils import sharing
from fastreid_uns.utils.timing import least_seconds

if TYPE_CHECKING:
    from fastreid_uns.utils.compiled import Workers

logger = logging.getLogger(__name__)

_SMALL = 8192  # images below which float32 takes less time than the choice
_SIDE = 1024  # rows of a block: products of a pair of blocks fit into the cache
_NOTED = 1024  # images to which a process notes the estimates for the limits
_CLASSES = 4  # for each neighbour, into which these images are divided
_GROWTH = 2.0  # of the rounds done, after which processes join their lists again
_MEASURED = 1 / 30  # of all pairs that 8 bits may leave to be measured; more take longer than products in float32
_UNIT_ROUNDOFF = 2.0**-24  # of float32
_SLACK = 2.0**-19  # of both squared lengths: float32 arithmetic around the product, and rounding of the true distance
_LONGEST = 2**31 // 127**2  # numbers in a row whose product fits into 32 bits
_SAMPLED = 16  # images of a sample whose products with all are held at a time
_MANY = 4096  # measured pairs for each image of which the log tells
_FASTER = 1.5  # times as fast as float32 must products of 8 bits be


def search_by_candidates(
    feats: Tensor,
    k: int,
    block: int,
    *,
    int8: bool | None = None,
    farthest: bool = False,
    groups: np.ndarray | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Squared distances (N, k), images (N, k) and, if `farthest`, the largest squared distances (N,), else zeros.

    Args:
        feats: (N, D) float32, finite, contiguous, on the CPU.
        block: rows of a block at most.
        int8: precision of the products; None = 8 bits where that is faster.
        farthest: take float32, which alone gives the farthest.
        groups: (N,) int; neighbours are then images of other groups only. Places that none fills have distance inf
            and image N.
    """
    from fastreid_uns.pseudo_labels.search import kernels
    from fastreid_uns.utils.compiled import Workers

    n = len(feats)
    far = np.zeros(n if farthest else 0, np.float32)
    sq, index = np.full((n, k), np.inf, np.float32), np.full((n, k), n, np.int64)
    limits = np.full(n, np.inf, np.float32)  # above these, an estimate need not be measured
    first = int(groups is None)  # place that is not the image's own
    if groups is None:
        sq[:, 0], index[:, 0] = 0, np.arange(n)
        limits[:] = np.inf if k > 1 else -np.inf
    parted = np.zeros(0, np.int64) if groups is None else groups.astype(np.int64)
    coarse = _chosen(feats, k) if int8 is None and not farthest else CoarseFeatures(feats, int8=bool(int8))
    with Workers() as workers, _one_thread():
        threads = sum(sharing.from_all(workers.count))
        blocks = _Blocks(coarse, parted, workers, min(block, _SIDE, max(256, 64 * math.ceil(n / (256 * threads)))))
        if k > first:
            np.minimum(limits, _limits(blocks, n, k - first), out=limits)
        known = (coarse.scales, coarse.norms, coarse.errors, feats.numpy(), limits, sq, index, parted)

        def offer(products: np.ndarray, row0: int, col0: int) -> int:
            if farthest:
                kernels.keep_farthest(products, coarse.norms, row0, col0, far)
            return kernels.offer_to_each_other(products, row0, col0, *known)

        measured = 0
        for rounds in _stages(blocks.count):
            measured += blocks.show(offer, rounds)
            if sharing.ranks() > 1 and k > first:
                _join(sq[:, first:], index[:, first:])
                np.minimum(limits, sq[:, -1] + coarse.errors, out=limits)
    warn_of_clumps(sum(sharing.from_all(measured)), n)
    far = np.maximum.reduce(sharing.from_all(far))
    return torch.from_numpy(sq), torch.from_numpy(index), torch.from_numpy(far)


class _Blocks:
    """Blocks of images, whose products are shown to a function pair by pair.

    Args:
        groups: (N,) int, or (0,) for none; a pair of blocks of one group is left out.
        side: images of a block.
    """

    def __init__(self, coarse: CoarseFeatures, groups: np.ndarray, workers: Workers, side: int) -> None:
        n = len(coarse.norms)
        self.coarse, self.groups, self.workers, self.side = coarse, groups, workers, side
        self.count = math.ceil(n / side)
        self.memory: SimpleQueue[np.ndarray] = SimpleQueue()
        for _ in range(workers.count):
            self.memory.put(coarse.memory(min(side, n) ** 2))

    def show(self, to: Callable[[np.ndarray, int, int], int], rounds: range) -> int:
        """Sum of `to(products, row0, col0)` over the pairs of this process; an image meets a block in each round."""
        own = (_own(_round(turn, self.count), turn, self.count) for turn in rounds)
        return sum(sum(self.workers.pool.map(partial(self._one, to), pairs)) for pairs in own)

    def _one(self, to: Callable[[np.ndarray, int, int], int], pair: tuple[int, int]) -> int:
        row0, col0 = self.side * pair[0], self.side * pair[1]
        both = np.r_[self.groups[row0 : row0 + self.side], self.groups[col0 : col0 + self.side]]
        if len(both) and (both == both[0]).all():
            return 0  # one group, whose images do not meet
        rows, columns = (self.coarse.part(slice(start, start + self.side)) for start in (row0, col0))
        held = self.memory.get()
        try:
            return to(self.coarse.product(rows, columns, held), row0, col0)
        finally:
            self.memory.put(held)


def _limits(blocks: _Blocks, n: int, k: int) -> np.ndarray:
    """(N,) estimates above which no image is one of the k nearest others: from the estimates to some of all images.

    These are divided into classes, of which the least estimates are kept; the k-th of them is the true distance of k
    images at least, give or take the bound. Without these limits, most of the pairs that are measured would be those
    that each image meets first.
    """
    from fastreid_uns.pseudo_labels.search import kernels

    coarse = blocks.coarse
    least = np.full((n, max(k, min(64 * math.ceil(_CLASSES * k / 64), _NOTED))), np.inf, np.float32)

    def note(products: np.ndarray, row0: int, col0: int) -> int:
        kernels.note_least(products, row0, col0, coarse.scales, coarse.norms, least, blocks.groups)
        return 0

    blocks.show(note, range(min(blocks.count, math.ceil(_NOTED / blocks.side) * sharing.ranks())))
    lists = torch.cat(sharing.parts_of_own_rows(torch.from_numpy(least)), 1).numpy()
    lists.partition(k - 1, axis=1)
    last = np.concatenate(sharing.from_all(lists[:, k - 1].copy()))
    return np.nextafter(last + 2 * coarse.errors, np.float32(np.inf))


def _stages(rounds: int) -> list[range]:
    """All rounds, in parts if several processes are to join their lists between them.

    Limits fall as the logarithm of what was searched. Each part has as many rounds for each process.
    """
    world, ends = sharing.ranks(), [0]
    while world > 1 and (end := world * math.ceil(max(_GROWTH * ends[-1], 1) / world)) < rounds:
        ends.append(end)
    return [range(*ends_of) for ends_of in pairwise([*ends, rounds])]


def _join(sq: np.ndarray, index: np.ndarray) -> None:
    """Replace the lists (N, k) that each process has from its pairs by the nearest of all processes."""
    from fastreid_uns.pseudo_labels.search import kernels

    joined, *others = sharing.parts_of_own_rows(keys_of(torch.from_numpy(sq), torch.from_numpy(index)))
    for keys in others:
        kernels.join_lists(keys.numpy(), joined.numpy())
    every = torch.from_numpy(np.concatenate(sharing.from_all(joined.numpy())))
    sq[:], index[:] = distance_of(every).numpy(), index_of(every).numpy()


def warn_of_clumps(measured: int, n: int) -> None:
    """Tell of a search of n images in which many pairs had to be measured."""
    if measured > _MANY * n:
        logger.warning(
            "neighbours: %s images are so near each other that %d of them were measured for each, one by one; that "
            "takes long. The network has mapped many images to one point: lower SOLVER.BASE_LR.",
            f"{n:,}",
            measured // n,
        )


def nearest_of_listed(
    feats: Tensor, k: int, images: np.ndarray, counts: np.ndarray, listed: np.ndarray
) -> tuple[Tensor, Tensor]:
    """Squared distances (M, k) and indices (M, k) of the nearest of candidates that are given.

    Args:
        feats: (N, D) float32, contiguous, on the CPU.
        images: (M,) whose neighbours are asked for.
        counts: (M,) int32 candidates, the image itself not among them; -1 for all images.
        listed: (M, C) int32, the candidates first.
    """
    from fastreid_uns.pseudo_labels.search import kernels
    from fastreid_uns.utils.compiled import over_rows

    sq, index = np.empty((len(images), k), np.float32), np.empty((len(images), k), np.int64)
    over_rows(kernels.measure_listed, len(images), feats.numpy(), images, counts, listed, sq, index)
    return torch.from_numpy(sq), torch.from_numpy(index)


def _chosen(feats: Tensor, k: int) -> CoarseFeatures:
    """The form of the products: 8 bits where they are faster and do not leave too many pairs to be measured."""
    if len(feats) >= _SMALL and all(sharing.from_all(int8_pays(feats.shape[1], torch.get_num_threads()))):
        coarse = CoarseFeatures(feats, int8=True)
        if coarse.share_to_measure(k) <= _MEASURED:
            return coarse
    return CoarseFeatures(feats, int8=False)


def _round(turn: int, blocks: int) -> list[tuple[int, int]]:
    """Pairs of blocks, also of one with itself; each is once in a round, whose pairs so can run side by side.

    As many rounds as blocks give all pairs.
    """
    return [(a, (turn - a) % blocks) for a in range(blocks) if a <= (turn - a) % blocks]


def _own(pairs: list[tuple[int, int]], turn: int, blocks: int) -> list[tuple[int, int]]:
    """Of the pairs of a round those of this process: all or none, but a part where too few rounds are left for all.

    So each process meets all blocks equally often, from the first rounds on. One that has met a block late knows little
    of its images, and measures much in vain.
    """
    world = sharing.ranks()
    if turn >= blocks // world * world:
        return list(sharing.dealt(pairs))
    place = turn % (2 * world)
    return pairs if sharing.is_own(min(place, 2 * world - 1 - place)) else []


@contextmanager
def _one_thread() -> Iterator[None]:
    """Operations of torch take one thread each, and so do those of threads that begin meanwhile."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


class CoarseFeatures:
    """Rows less their mean, in float32 or rounded to 8 bits with one scale for each row.

    With x the centred row, a = scale * row what is kept of it and r = x - a, the product of two rows is off by
    a_i.r_j + r_i.x_j, at most |a_i||r_j| + |r_i||x_j| (Cauchy-Schwarz); r is known, so the bound is, too. The product
    of 8-bit rows itself is exact; that of D float32 numbers, in any order, is off by at most D u / (1 - D u)
    times |a_i||a_j|, u = 2^-24 (Higham 2002, eq. 3.5).

    Args:
        feats: (N, D) float32, finite, contiguous.
        int8: keep 8 bits; needs D <= 133,144.

    Attributes:
        scales: (N,) float32.
        norms: (N,) float32, squared lengths of the centred rows.
        errors: (N,) float32; an estimate norms[i] + norms[j] - 2 scales[i] scales[j] product lies at most
            min(errors[i], errors[j]) from the true squared distance.
    """

    def __init__(self, feats: Tensor, *, int8: bool) -> None:
        from fastreid_uns.pseudo_labels.search import kernels
        from fastreid_uns.utils.compiled import over_rows

        n, d = feats.shape
        self.feats, self.int8 = feats, int8
        self.mean = feats.mean(0)
        rows = np.empty((n, d) if int8 else (n, 0), np.int8)
        scales = np.ones(n, np.float32)
        lengths, kept, lost = (np.empty(n) for _ in range(3))
        arrays = (feats.numpy(), self.mean.numpy(), rows, scales, lengths, kept, lost)
        over_rows(kernels.round_rows, n, *arrays)
        self.rows = torch.from_numpy(rows)
        self.scales, self.norms = scales, (lengths**2).astype(np.float32)
        off = kept * lost.max(initial=0) + lost * lengths.max(initial=0)
        if not int8:
            off += kept * kept.max(initial=0) * d * _UNIT_ROUNDOFF / (1 - d * _UNIT_ROUNDOFF)
        slack = _SLACK * (lengths**2 + lengths.max(initial=0) ** 2)
        self.errors = np.nextafter((2 * off + slack).astype(np.float32), np.float32(np.inf))

    def part(self, rows: slice | np.ndarray) -> Tensor:
        """(b, D) rows as `product` takes them."""
        return self.rows[rows] if self.int8 else self.feats[rows] - self.mean

    def product(self, above: Tensor, beside: Tensor, held: np.ndarray) -> np.ndarray:
        """(a, b) products of two parts, in the memory `held`."""
        out = held[: len(above) * len(beside)].reshape(len(above), len(beside))
        multiply = torch._int_mm if self.int8 else torch.mm
        multiply(above, beside.T, out=torch.from_numpy(out))
        return out

    def memory(self, size: int) -> np.ndarray:
        """For the products of parts, `size` at a time; no tensor: inference mode would keep it from other threads."""
        return np.empty(size, np.int32 if self.int8 else np.float32)

    def share_to_measure(self, k: int, sample: int = 64) -> float:
        """Of all pairs, those that these estimates will leave to be measured, judged by a sample of images.

        Of c images that the bound cannot tell from the k nearest, a search in no particular order meets
        c (1 + ln(N / c)) before it knows the k nearest.
        """
        n = len(self.feats)
        some = np.unique(np.linspace(0, n - 1, min(n, sample)).astype(np.int64)).tolist()
        every, counts = self.part(slice(None)), []
        own = np.array(sharing.dealt(some), np.int64)
        for few in np.array_split(own, math.ceil(len(own) / _SAMPLED) or 1):
            products = self.product(self.part(few), every, self.memory(len(few) * n))
            sq = self.norms[few, None] + self.norms - 2 * self.scales[few, None] * self.scales * products
            limits = np.partition(sq, k - 1, axis=1)[:, k - 1] + self.errors[few]
            counts.extend((sq <= limits[:, None]).sum(1))
        candidates = float(np.mean(np.concatenate(sharing.from_all(counts))))
        return candidates / n * (1 + math.log(n / candidates))


@cache
def int8_pays(d: int, threads: int, size: int = 512) -> bool:
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
    float32, int8 = least_seconds(lambda: exact @ exact.T, lambda: torch._int_mm(rows, rows.T), rounds=8)
    return float32 > _FASTER * int8
