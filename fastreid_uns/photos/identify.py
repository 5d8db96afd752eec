"""Whether a photo shows a known individual, a new one, or whether that cannot be said."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastreid_uns.errors import InvalidValue
from fastreid_uns.modeling.whitening import MainDirections, ViewWhitening
from fastreid_uns.photos.audit import GOOD

FALSE_KNOWN = 0.05  # of photos of new individuals that may be called known
FALSE_NEW = 0.05  # of photos of known individuals that may be called new
STRICT = 0.65  # average distance up to which groups are merged before thresholds are set
SURE = 0.9  # pair precision from which strict groups are pure enough
STRICTER = 0.4  # instead of `STRICT` below it: individuals that look alike share a group and are no strangers there
_FOLDS = 10  # parts of the groups; more of them cost time and leave out less
_LEAST = 20  # scores from which a threshold can be taken

KINDS = ("known", "new", "unsure")


class Thresholds(NamedTuple):
    """Of the largest cosine to a photo of a group of at least two.

    A photo from `known` on is called known, one below `new` new; between them it is unsure. Where the groups are less
    pure, `doubtful` takes the place of `known`.
    """

    known: float
    new: float
    doubtful: float = -torch.inf

    def known_at(self, precision: float | None) -> float:
        """From where a photo is called known, by the pair precision that the audit found; None without an audit.

        Below 0.8 it is infinite, because thresholds do not hold there, and from 0.9 on it is `known`.
        """
        if precision is None or precision < GOOD:
            return torch.inf
        return self.known if precision >= SURE else max(self.known, self.doubtful)


class Identity(NamedTuple):
    """What is said about a photo."""

    kind: str  # one of KINDS
    group: int  # nearest group, also of a photo that is not called known; -1 if there is none
    similarity: float  # the largest cosine to a photo of that group


def fit_thresholds(
    feats: Tensor,
    groups: Tensor,
    individuals: float,
    *,
    false_known: float = FALSE_KNOWN,
    false_new: float = FALSE_NEW,
) -> Thresholds:
    """Thresholds from the known photos alone.

    To all groups but its own a photo is one of a new individual. `known` is what the largest similarity to these
    exceeds with a probability of `false_known` at most; `new` the `false_new` quantile of that to the other photos of
    its own group, and at most `known`.

    Args:
        feats: (N, D) unit length.
        groups: (N,) int64; strict ones, cut at `STRICT`, hold few photos of other individuals.
        individuals: effective number of those that are known, see `Grouping.individuals`.
        false_known: share of photos of new individuals that are called known; holds if groups are at least 80 % pure.
            Fewer than 1 / `false_known` - 1 individuals can promise one in their number + 1 only.
        false_new: share of photos of known individuals that are called new.

    Returns:
        Infinite `known` if there are fewer than 20 scores.
    """
    together = groups.bincount()[groups] > 1
    if not together.any():
        return Thresholds(torch.inf, -torch.inf)
    members, of = feats[together], groups[together]
    others, own = [], []
    for rows, group, at in zip(members.split(2048), of.split(2048), torch.arange(len(of)).split(2048), strict=True):
        similarity = rows @ members.T
        same = group[:, None] == of
        others.append(similarity.masked_fill(same, -torch.inf).amax(1))
        own.append(similarity.masked_fill(~same, -torch.inf).scatter_(1, at[:, None], -torch.inf).amax(1))
    known = _rarely_reached(torch.cat(others), individuals, false_known)
    inside = torch.cat(own).sort().values
    new = float(inside[int(false_new * len(inside))])
    return Thresholds(known, min(known, new))


def least_known(
    views: Tensor, groups: Tensor, individuals: float, *, false_known: float = FALSE_KNOWN, seed: int = 0
) -> float:
    """The threshold `known` by photos that were new to the whitening.

    A whitening pushes apart the photos that it is fitted to, the more so the fewer they are: their scores against other
    groups are lower than those of new individuals. So one tenth of the groups at a time is scored against the others by
    a whitening of the others. The few steps of training hardly push them apart; `tools/benchmark/known.py` measures it.

    Args:
        views: (N, V, C) features of the views of photos, after training, before the whitening.
        groups: (N,) int64, strict ones; those of at least two photos count.
        individuals, false_known: see `fit_thresholds`.
        seed: of the tenths.

    Returns:
        Infinite if there are fewer than 20 scores.
    """
    fold = torch.randperm(int(groups.max()) + 1, generator=torch.Generator().manual_seed(seed))[groups] % _FOLDS
    scores = torch.cat([left_out_scores(views, groups, fold == part) for part in range(_FOLDS)])
    return _rarely_reached(scores, individuals, false_known)


def left_out_scores(views: Tensor, groups: Tensor, out: Tensor) -> Tensor:
    """Largest cosine of photos to all others, by a whitening of the others; photos alone in their group do not count.

    Args:
        views: (N, V, C).
        groups: (N,) int64.
        out: (N,) bool, the photos that are left out, whole groups of them.

    Returns:
        (M,) of those that are left out; none where there are no others.
    """
    together = groups.bincount()[groups] > 1
    asked, others = together & out, together & ~out
    if not (asked.any() and others.any()):
        return torch.empty(0)
    known = MainDirections.of(views[~out], views.shape[2])
    whitening = ViewWhitening(views.shape[2], views.shape[2]).fit(known, groups[~out])
    feats = F.normalize(whitening(views.mean(1)))
    return torch.cat([(rows @ feats[others].T).amax(1) for rows in feats[asked].split(2048)])


def _rarely_reached(scores: Tensor, individuals: float, share: float) -> float:
    """The smallest score that a photo of one more individual reaches with a probability of at most `share`.

    Photos of one individual are alike, so it is individuals that are drawn at random: of one more nothing is known, and
    all of its photos may reach any score. A photo drawn at random is of an individual with many, so these are a share
    of 1 / (individuals + 1), where the effective number counts. If there are too few individuals to promise `share`, it
    is the smallest number above all scores.

    Source: Lee et al. 2023, hierarchical conformal prediction; photos count alike here, not individuals.
    """
    scores = scores[scores.isfinite()].sort(descending=True).values
    if len(scores) < _LEAST:
        return torch.inf
    reached = max(share - (1 - share) / max(individuals, 1), 0.0) * len(scores)
    return float(torch.nextafter(scores[int(reached + 1e-9)], torch.tensor(torch.inf)))


def identify(
    queries: Tensor, feats: Tensor, groups: Tensor, thresholds: Thresholds, *, precision: float | None
) -> list[Identity]:
    """What is said about each query.

    Args:
        queries: (Q, D) unit length, made as `feats`.
        feats: (N, D) of known photos.
        groups: (N,) int64, from 0 or 1; only those of at least two photos can be recognised.
        thresholds: of `fit_thresholds`.
        precision: pair precision that the audit found, None without one; see `Thresholds.known_at`.

    Raises:
        InvalidValue: features of another length.
    """
    if queries.shape[1] != feats.shape[1]:
        raise InvalidValue(
            f"identify: features have {queries.shape[1]} numbers, those of the known photos {feats.shape[1]}; they "
            f"must be made by the same network. Extract them again."
        )
    together = groups.bincount()[groups] > 1
    if not together.any():
        return [Identity("unsure", -1, 0.0)] * len(queries)
    known = thresholds.known_at(precision)
    found = []
    for rows in queries.split(2048):
        best = (rows @ feats[together].T).max(1)
        for score, at in zip(best.values.tolist(), best.indices, strict=True):
            kind = "new" if score < thresholds.new else "unsure"
            if score >= known:
                kind = "known"
            found.append(Identity(kind, int(groups[together][at]), score))
    return found
