"""Ranking of a gallery for each query: distances in blocks, AP, CMC and mINP, and the lists behind them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from fastreid_uns.errors import InvalidValue
from fastreid_uns.structures import PROTOCOLS, Record, ReIDData
from fastreid_uns.utils.precision import full_precision

BLOCK_ELEMENTS = 2**22  # distances held at a time: 16 MiB, which malloc reuses instead of asking the system
BLOCK_ROWS = 64  # at least: fewer are not worth a second thread
RANKS = (1, 5, 10)


def block_rows(gallery_size: int) -> int:
    """Queries in one block of distances."""
    return max(BLOCK_ROWS, BLOCK_ELEMENTS // max(1, gallery_size))


def distance_blocks(query: Tensor, gallery: Tensor, rows: int | None = None) -> Iterator[Tensor]:
    """Squared Euclidean distances, a few queries at a time.

    Args:
        query: (Q,D) float32, unit length.
        gallery: (G,D) float32, unit length, same device.
        rows: queries in a block; None = see `block_rows`.

    Yields:
        (b,G) float32, 2 - 2 cos, on the device of the features; rounding may leave it slightly below 0.
    """
    two = query.new_tensor(2.0)
    for part in query.split(rows or block_rows(len(gallery))):
        with full_precision(part.device):
            block = torch.addmm(two, part, gallery.T, alpha=-2)
        yield block


class QueryScores(NamedTuple):
    """Scores of Q queries, on the CPU; a query without a match has no score: NaN, and rank 0."""

    average_precision: Tensor  # (Q,) float64, 0..1, not interpolated: mean precision at the matches
    inverse_penalty: Tensor  # (Q,) float64, 0..1, number of matches / rank of the last match
    first_rank: Tensor  # (Q,) int64, rank of the first match, from 1

    def summary(self) -> dict[str, float]:
        """mAP, mINP and rank1, rank5, rank10 in percent over the `queries` that have a match.

        Source: mINP from Ye et al. 2021, "Deep Learning for Person Re-Identification: A Survey and Outlook", eq. 2.
        """
        valid = self.first_rank > 0
        first = self.first_rank[valid]
        metrics = {
            "mAP": 100 * self.average_precision[valid].mean().item(),
            "mINP": 100 * self.inverse_penalty[valid].mean().item(),
        }
        metrics.update({f"rank{k}": 100 * (first <= k).double().mean().item() for k in RANKS})
        return {**metrics, "queries": float(valid.sum())}


class Ranker:
    """Who matches whom in one query-gallery task, and how well a distance puts matches first.

    `cross_camera` takes images of the query's identity and camera out of the gallery; `plain` and `one_per_identity`
    take out nothing. Junk (identity -1) is out for every query. Equal distances rank by position in the gallery.

    Args:
        query_identities: (Q,) int64.
        query_cameras: (Q,) int64, -1 unknown.
        gallery_identities: (G,) int64.
        gallery_cameras: (G,) int64, -1 unknown.
        protocol: one of `PROTOCOLS`.

    Raises:
        ValueError: unknown protocol, row counts that disagree, or several gallery images of an identity under
            `one_per_identity`.

    Example:
        >>> identities, cameras = torch.tensor([7, 8, 7]), torch.tensor([0, 1, 1])  # of the gallery
        >>> ranker = Ranker(torch.tensor([7]), torch.tensor([0]), identities, cameras, "cross_camera")
        >>> distance = torch.tensor([[0.1, 0.2, 0.3]])
        >>> ranker.lists([distance], k=3)  # image 0 shows the same identity to the same camera, so it does not count
        tensor([[ 1,  2, -1]])
        >>> ranker.score([distance]).summary()
        {'mAP': 50.0, 'mINP': 50.0, 'rank1': 0.0, 'rank5': 100.0, 'rank10': 100.0, 'queries': 1.0}
    """

    def __init__(
        self,
        query_identities: Tensor,
        query_cameras: Tensor,
        gallery_identities: Tensor,
        gallery_cameras: Tensor,
        protocol: str,
    ) -> None:
        if protocol not in PROTOCOLS:
            raise InvalidValue(f"evaluation: protocol {protocol!r} is unknown. Use one of {', '.join(PROTOCOLS)}.")
        query, gallery = query_identities.cpu(), gallery_identities.cpu()
        for split, identities, cameras in (("query", query, query_cameras), ("gallery", gallery, gallery_cameras)):
            if len(identities) != len(cameras):
                raise InvalidValue(
                    f"evaluation: the {split} has {len(identities)} identities and {len(cameras)} cameras; there must "
                    f"be one of each for an image. Use camera -1 where it is unknown."
                )
        if protocol == "one_per_identity":
            _check_one_per_identity(gallery)
        self.junk = (gallery < 0).nonzero().flatten()
        self.query_size, self.gallery_size = len(query), len(gallery)
        query = query.masked_fill(query < 0, int(gallery.max().clamp_min(0)) + 1 if len(gallery) else 0)
        rows, columns = _pairs(query, gallery)
        same_camera = query_cameras.cpu()[rows] == gallery_cameras.cpu()[columns]
        self._removed = same_camera if protocol == "cross_camera" else torch.zeros_like(same_camera)
        self._rows, self._columns = rows, columns
        if self._removed.all():
            self._raise_without_match(query, gallery)

    @classmethod
    def of(cls, data: ReIDData) -> Ranker:
        """The ranker of the query and gallery records of a data set."""
        return cls(*_labels(data.query), *_labels(data.gallery), data.protocol)

    def score(self, blocks: Iterable[Tensor], first_query: int = 0) -> QueryScores:
        """Scores of the queries `first_query`, `first_query` + 1, ... whose distances the blocks hold.

        Args:
            blocks: (b,G) float32 each, smaller = nearer, rows in order of the queries; not changed.
            first_query: number of the query in the first row.

        Memory: that of one block. Time: one comparison for each match and entry of its row, vectorised.
        """
        # one tensor from the start: small ones that stay would keep malloc from using the memory of a block again
        before, filled, end = torch.empty(len(self._rows), dtype=torch.long), 0, first_query
        for first, block in self._numbered(blocks, first_query):
            if len(self.junk) > 0:
                block = block.index_fill(1, self.junk.to(block.device), torch.inf)
            rows, columns, _ = self._slice(first, len(block))
            closer = count_closer(block, _offsets(rows, len(block)), columns)
            if bool((closer < 0).any()):
                _raise_for_nan(block, first)
            before[filled : filled + len(rows)] = closer
            filled, end = filled + len(rows), first + len(block)
        rows, _, removed = self._slice(first_query, end - first_query)
        return _score(before[:filled], rows, removed, _offsets(rows, end - first_query))

    def lists(self, blocks: Iterable[Tensor], k: int, first_query: int = 0) -> Tensor:
        """The k nearest gallery images of each query, without those that the score leaves out.

        Returns:
            (rows, k) int64 on the CPU, positions in the gallery, nearest first; -1 where fewer than k are left.
        """
        found = [torch.zeros((0, k), dtype=torch.long)]
        for first, block in self._numbered(blocks, first_query):
            if block.numel() > 0 and bool(block.amin().isnan()):
                _raise_for_nan(block, first)
            rows, columns, removed = (index.to(block.device) for index in self._slice(first, len(block)))
            valid = block.index_fill(1, self.junk.to(block.device), torch.inf)
            valid[rows[removed], columns[removed]] = torch.inf
            distance, order = valid.sort(dim=1, stable=True)
            order = order[:, :k].masked_fill(distance[:, :k] == torch.inf, -1).cpu()
            found.append(nn.functional.pad(order, (0, k - order.shape[1]), value=-1))
        return torch.cat(found)

    def is_match(self, query: int, gallery: int) -> bool:
        """Whether a gallery image counts as a hit for a query."""
        first, end = torch.searchsorted(self._rows, torch.tensor([query, query + 1])).tolist()
        found = self._columns[first:end] == gallery
        return bool((found & ~self._removed[first:end]).any())

    def _numbered(self, blocks: Iterable[Tensor], first: int) -> Iterator[tuple[int, Tensor]]:
        for block in blocks:
            if block.shape[1] != self.gallery_size or first + len(block) > self.query_size:
                raise InvalidValue(
                    f"evaluation: distances of queries {first}..{first + len(block) - 1} to {block.shape[1]} gallery "
                    f"images do not fit {self.query_size} queries and {self.gallery_size} gallery images. "
                    f"Features and records must come from the same split."
                )
            yield first, block
            first += len(block)

    def _slice(self, first: int, count: int) -> tuple[Tensor, Tensor, Tensor]:
        """Pairs of equal identity of some queries: row counted from `first`, column, and whether it is removed."""
        start, end = torch.searchsorted(self._rows, torch.tensor([first, first + count])).tolist()
        return self._rows[start:end] - first, self._columns[start:end], self._removed[start:end]

    def _raise_without_match(self, query: Tensor, gallery: Tensor) -> None:
        if len(self._rows) > 0:
            raise InvalidValue(
                f"evaluation: 0 of {len(query)} queries have a match in the gallery: all matches are from the query's "
                f'own camera. Set protocol "plain" if cameras are unknown.'
            )
        raise InvalidValue(
            f"evaluation: 0 of {len(query)} queries have a match in the gallery: none of {len(query.unique())} query "
            f"identities is among the {len(gallery.unique())} of the gallery. Number identities alike in both splits."
        )


def retrieve(query: Tensor, gallery: Tensor, data: ReIDData) -> dict[str, float]:
    """mAP, mINP, rank1, rank5 and rank10 in percent, and the number of `queries` with a match, of given features.

    Args:
        query: (Q,D) float32, unit length, of the query records.
        gallery: (G,D) float32, unit length, of the gallery records, same device.
        data: identities, cameras and protocol.
    """
    return Ranker.of(data).score(distance_blocks(query, gallery)).summary()


def count_closer(block: Tensor, offsets: Tensor, columns: Tensor) -> Tensor:
    """How many entries of its row stand before each of P chosen ones, equal values by position.

    Args:
        block: (b,G) float32, on any device.
        offsets: (b+1,) int64 on the CPU: the chosen ones of row i are offsets[i]..offsets[i+1]-1.
        columns: (P,) int64 on the CPU.

    Returns:
        (P,) int64 on the CPU; -1 in a row that holds NaN.
    """
    if block.device.type == "cpu":
        from fastreid_uns.evaluation import ranking_kernels
        from fastreid_uns.utils.compiled import over_rows

        count = torch.empty(len(columns), dtype=torch.long)
        arrays = (tensor.numpy() for tensor in (block.contiguous(), offsets, columns, count))
        over_rows(ranking_kernels.count_closer, len(block), *arrays)
        return count
    return count_closer_torch(block, offsets, columns)


def count_closer_torch(block: Tensor, offsets: Tensor, columns: Tensor) -> Tensor:
    """`count_closer` where no compiled loop reaches: compares copies of the rows, some at a time."""
    rows = torch.repeat_interleave(torch.arange(len(block)), offsets.diff()).to(block.device)
    position = torch.arange(block.shape[1], device=block.device)
    counts = []
    for row, column in zip(
        *(i.split(block_rows(block.shape[1])) for i in (rows, columns.to(block.device))), strict=True
    ):
        values = block[row]
        own = values.gather(1, column[:, None])
        count = ((values < own) | ((values == own) & (position < column[:, None]))).sum(1)
        counts.append(count.masked_fill(values.isnan().any(1), -1))
    return torch.cat(counts).cpu() if counts else torch.zeros(0, dtype=torch.long)


def _raise_for_nan(block: Tensor, first: int) -> None:
    raise InvalidValue(
        f"evaluation: {int(block.isnan().any(1).sum())} of the queries {first}..{first + len(block) - 1} "
        f"have a distance that is NaN; all must be numbers. The features hold NaN or infinite values: "
        f"check the weights, and lower the learning rate if training has diverged."
    )


def _labels(records: Sequence[Record]) -> tuple[Tensor, Tensor]:
    """Identities and cameras."""
    identities = torch.tensor([record.identity for record in records], dtype=torch.int64)
    return identities, torch.tensor([record.camera for record in records], dtype=torch.int64)


def _pairs(query: Tensor, gallery: Tensor) -> tuple[Tensor, Tensor]:
    """All (query, gallery) positions of equal identity, by query."""
    values, order = gallery.sort(stable=True)
    first, end = torch.searchsorted(values, query), torch.searchsorted(values, query, right=True)
    found = end - first
    rows = torch.repeat_interleave(torch.arange(len(query)), found)
    nth = torch.arange(len(rows)) - torch.repeat_interleave(found.cumsum(0) - found, found)
    return rows, order[first[rows] + nth]


def _offsets(rows: Tensor, count: int) -> Tensor:
    """(count+1,) where the entries of each row begin; `rows` ascends."""
    return nn.functional.pad(torch.bincount(rows, minlength=count).cumsum(0), (1, 0))


def _score(before: Tensor, rows: Tensor, removed: Tensor, offsets: Tensor) -> QueryScores:
    """Scores of some queries.

    Args:
        before: (P,) gallery images ahead of each one of the query's identity, the removed ones counted.
        rows: (P,) the query of each, ascending.
        removed: (P,) whether it is left out of the gallery.
        offsets: where each query begins among the P.
    """
    order = (rows * (before.amax() + 1) + before).argsort() if len(before) > 0 else rows
    before, out = before[order], removed[order]
    out_before = nn.functional.pad(out.long().cumsum(0), (1, 0))
    ranks = (1 + before - out_before[:-1] + out_before[offsets[:-1]][rows])[~out]
    rows, count = rows[~out], len(offsets) - 1
    offsets = _offsets(rows, count)
    matches = offsets.diff()
    valid = matches > 0
    nth = torch.arange(len(ranks)) - offsets[:-1][rows] + 1
    precision = torch.zeros(count, dtype=torch.double).index_add(0, rows, nth.double() / ranks)
    nan, none = torch.full((count,), torch.nan, dtype=torch.double), torch.zeros(count, dtype=torch.long)
    return QueryScores(
        average_precision=precision / matches,
        inverse_penalty=nan.masked_scatter(valid, matches[valid].double() / ranks[offsets[1:][valid] - 1]),
        first_rank=none.masked_scatter(valid, ranks[offsets[:-1][valid]]),
    )


def _check_one_per_identity(gallery: Tensor) -> None:
    identities, count = gallery[gallery >= 0].unique(return_counts=True)
    if len(count) > 0 and int(count.max()) > 1:
        raise InvalidValue(
            f"evaluation: the gallery has {int(count.max())} images of identity {int(identities[count.argmax()])}; "
            f'protocol "one_per_identity" expects one of each. Set protocol "plain", or draw one.'
        )
