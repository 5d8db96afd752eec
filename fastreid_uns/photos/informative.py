"""Which pairs tell most about the groups, and what the answers say about the threshold."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from fastreid_uns.pseudo_labels.constraints import Constraints
from fastreid_uns.pseudo_labels.linkage import Dendrogram

_LEAST = 0.35  # chance of being right from which a merge pays: an error costs less than what is missed, as in F scores
_SPREAD = 0.06  # of heights around the threshold at which answers are uncertain
_PRIOR = 0.02  # standard deviation of the best threshold of a set around the default
_GRID = np.linspace(0.5, 0.99, 99)


class NodePair(NamedTuple):
    """Two photos, one of each side of a merge, whose answer is that of the merge."""

    first: int
    second: int
    height: float  # distance at which their sides merge
    weight: float  # uncertainty times the photos that the answer moves


def informative_pairs(
    tree: Dendrogram, feats: Tensor, threshold: float, count: int, constraints: Constraints | None = None
) -> list[NodePair]:
    """One pair for each of the merges whose answers would change most, the most informative first.

    An answer moves the photos of the smaller side. Pairs of photos would count large groups that lie far apart first,
    about which the answer is known: `tools/benchmark/README.md` has the figures.

    Args:
        tree: of `average_linkage` under the same constraints.
        feats: (N, D) unit length; the photo nearest to the centroid speaks for its side.
        threshold: at which the tree is cut.
        count: pairs at most.
        constraints: merges that these answer are left out.
    """
    sizes = np.concatenate([np.ones(tree.count, np.int64), tree.sizes])
    moved = sizes[tree.children].min(axis=1)
    chance = _same(tree.heights, threshold)
    weight = moved * chance * (1 - chance)
    found: list[NodePair] = []
    for m in np.argsort(-weight, kind="stable"):
        if len(found) == count:
            break
        sides = [tree.members(int(node)) for node in tree.children[m]]
        first, second = (_speaker(side, feats) for side in sides)
        if constraints is None or not _answered(sides, constraints):
            found.append(NodePair(first, second, float(tree.heights[m]), float(weight[m])))
    return found


def refitted_threshold(default: float, heights: np.ndarray, same: np.ndarray) -> float:
    """The most likely threshold after answers, around the default one.

    Args:
        default: threshold without answers.
        heights: (A,) distance at which the two photos of an answer come together, 1 if they never do.
        same: (A,) bool answers.
    """
    chance = np.clip(_same(np.asarray(heights)[:, None], _GRID), 1e-6, 1 - 1e-6)
    likelihood = np.where(np.asarray(same, bool)[:, None], np.log(chance), np.log(1 - chance)).sum(0)
    return float(_GRID[np.argmax(likelihood - (_GRID - default) ** 2 / (2 * _PRIOR**2))])


def meeting_heights(tree: Dendrogram, pairs: np.ndarray) -> np.ndarray:
    """(A,) float64 distance at which the two photos of each pair come together in a tree, 1 if they never do."""
    above = np.full(tree.count + len(tree.heights), -1, np.int64)
    above[tree.children.ravel()] = np.repeat(np.arange(len(tree.heights)) + tree.count, 2)
    result = np.ones(len(pairs))
    for place, (a, b) in enumerate(pairs):
        a, b = int(a), int(b)
        while a != b and min(a, b) >= 0:  # a node above another has the larger number
            a, b = (int(above[a]), b) if a < b else (a, int(above[b]))
        if a == b:
            result[place] = tree.heights[a - tree.count] if a >= tree.count else 0.0
    return result


def _same(heights: np.ndarray, threshold: float | np.ndarray) -> np.ndarray:
    """Chance that photos which come together at these heights are one individual; `_LEAST` at the threshold."""
    return 1 / (1 + (1 / _LEAST - 1) * np.exp((heights - threshold) / (_SPREAD / 2)))


def _speaker(side: np.ndarray, feats: Tensor) -> int:
    own = feats[torch.from_numpy(side)]
    return int(side[int((own @ F.normalize(own.mean(0), dim=0)).argmax())])


def _answered(sides: list[np.ndarray], constraints: Constraints) -> bool:
    """Some photos of both sides are known to belong together."""
    return bool(np.isin(constraints.unit[sides[0]], constraints.unit[sides[1]]).any())
