"""Answers of people to the question whether two images show the same individual, and what they mean for clusters."""

from __future__ import annotations

import csv
from collections import defaultdict, deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from fastreid_uns.errors import InvalidValue, MissingFile, shown
from fastreid_uns.pseudo_labels.base import PseudoLabelGenerator, centroids
from fastreid_uns.structures import FeatureBank, PseudoLabels
from fastreid_uns.utils.paths import path_manager
from fastreid_uns.utils.places import expanded

ANSWERS = ("same", "different", "unsure")


class Answer(NamedTuple):
    """Whether two images, given by their indices, show the same individual, and where that is written."""

    first: int
    second: int
    same: bool
    origin: str = "an answer"

    def __str__(self) -> str:
        return f"{self.origin} ({'same' if self.same else 'different'})"


@dataclass(frozen=True)
class Constraints:
    """Pairs of images that belong together (must-link) and that do not (cannot-link).

    Must-links are transitive: if a goes with b, and b with c, then a with c; and what a is kept apart from, b and c are
    kept apart from as well.

    Args:
        count: N, images that the indices count.
        answers: in any order; an answer that is repeated counts once.

    Attributes:
        must: (M, 2) int64, pairs that span the units, the lower image first.
        cannot: (C, 2) int64, the first images of units that must stay apart, the lower first.
        unit: (N,) int64, the first image of the unit of each; images that belong together are a unit.

    Raises:
        InvalidValue: an index outside 0..N-1, or answers that contradict each other; the message names them.
    """

    count: int
    answers: Sequence[Answer] = ()
    must: np.ndarray = field(init=False)
    cannot: np.ndarray = field(init=False)
    unit: np.ndarray = field(init=False)

    def __post_init__(self) -> None:
        for answer in self.answers:
            if not (0 <= answer.first < self.count and 0 <= answer.second < self.count):
                raise InvalidValue(
                    f"decisions: {answer.origin} names images {answer.first} and {answer.second}; 0 to "
                    f"{self.count - 1} are accepted, the images of the set. Correct or remove it."
                )
        unit = _units(self.count, [answer for answer in self.answers if answer.same])
        for answer in self.answers:
            if not answer.same and unit[answer.first] == unit[answer.second]:
                raise InvalidValue(_contradiction(answer, self.answers))
        rest = np.flatnonzero(unit != np.arange(self.count))
        apart = [sorted((unit[a.first], unit[a.second])) for a in self.answers if not a.same]
        object.__setattr__(self, "unit", unit)
        object.__setattr__(self, "must", np.stack([unit[rest], rest], axis=1))
        object.__setattr__(self, "cannot", np.unique(np.array(apart, np.int64).reshape(-1, 2), axis=0))

    def __bool__(self) -> bool:
        return len(self.must) + len(self.cannot) > 0

    def apply(self, labels: Tensor, feats: Tensor) -> Tensor:
        """Labels that keep to the answers, made from those of any clustering.

        Clusters with images of one unit are merged. A cluster with units that must stay apart is split into as few
        parts as a greedy coloring of these units needs; its other units go to the part of the nearest centroid.

        Args:
            labels: (N,) int64 clusters 0..K-1, -1 outliers; an outlier of a unit joins the cluster of its unit.
            feats: (N, D) unit length.

        Returns:
            (N,) int64 on the device of `labels`, numbered by the first image of a cluster.
        """
        found = _merged(labels.cpu().numpy(), self.unit)
        neighbours = self._kept_apart()
        nodes = np.array(sorted(neighbours), np.int64)
        shared = [cluster for cluster in np.unique(found[nodes]) if cluster >= 0] if len(nodes) else []
        for cluster in shared:
            inside = {int(node) for node in nodes[found[nodes] == cluster]}
            conflicts = {node: neighbours[node] & inside for node in sorted(inside) if neighbours[node] & inside}
            if conflicts:
                images = np.flatnonzero(found == cluster)
                part = _split(images, self.unit[images], _coloring(conflicts), feats.cpu())
                found[images[part > 0]] = found.max() + part[part > 0]
        result = np.full(len(found), -1, np.int64)
        inside_any = found >= 0
        _, first, inverse = np.unique(found[inside_any], return_index=True, return_inverse=True)
        result[inside_any] = np.argsort(np.argsort(first))[inverse]
        return torch.from_numpy(result).to(labels.device)

    def apart(self) -> np.ndarray:
        """(P, 2) int64, all pairs of images that must stay apart, each in both orders."""
        members: dict[int, list[int]] = defaultdict(list)
        for image, unit in enumerate(self.unit.tolist()):
            members[unit].append(image)
        pairs = [(x, y) for a, b in self.cannot.tolist() for x in members[a] for y in members[b]]
        both = np.array(pairs, np.int64).reshape(-1, 2)
        return np.concatenate([both, both[:, ::-1]])

    def _kept_apart(self) -> dict[int, set[int]]:
        """Units from which a unit must stay apart."""
        neighbours: dict[int, set[int]] = defaultdict(set)
        for a, b in self.cannot.tolist():
            neighbours[a].add(b)
            neighbours[b].add(a)
        return dict(neighbours)


def _units(count: int, same: Iterable[Answer]) -> np.ndarray:
    unit = np.arange(count)

    def root(image: int) -> int:
        while unit[image] != image:
            unit[image] = unit[unit[image]]
            image = int(unit[image])
        return image

    for answer in same:
        low, high = sorted((root(answer.first), root(answer.second)))
        unit[high] = low
    return np.array([root(image) for image in range(count)], np.int64)


def _contradiction(different: Answer, answers: Sequence[Answer]) -> str:
    """The message for two images that an answer keeps apart and a chain of others joins; the shortest one is named."""
    links: dict[int, list[tuple[int, Answer]]] = defaultdict(list)
    for answer in answers:
        if answer.same:
            links[answer.first].append((answer.second, answer))
            links[answer.second].append((answer.first, answer))
    reached: dict[int, tuple[int, Answer] | None] = {different.first: None}
    waiting = deque([different.first])
    while waiting and different.second not in reached:
        image = waiting.popleft()
        for other, answer in links[image]:
            if other not in reached:
                reached[other] = image, answer
                waiting.append(other)
    chain, image = [], different.second
    while (step := reached[image]) is not None:
        image = step[0]
        chain.append(str(step[1]))
    given = " and ".join(reversed(chain)) or "an image is the same as itself"
    return f"decisions: {different} contradicts {given}; answers must agree, also over several pairs. Undo one of them."


def _merged(labels: np.ndarray, unit: np.ndarray) -> np.ndarray:
    """Labels in which clusters that share a unit are one, and outliers of a unit of several images are in one."""
    from scipy.sparse import coo_matrix
    from scipy.sparse.csgraph import connected_components

    n = len(labels)
    linked = np.bincount(unit, minlength=n)[unit] > 1
    clusters = int(labels.max(initial=-1)) + 1
    node = np.where(labels >= 0, labels, clusters + np.arange(n))
    pairs = node[linked], clusters + n + unit[linked]
    size = clusters + 2 * n
    graph = coo_matrix((np.ones(linked.sum(), np.int8), pairs), shape=(size, size))
    component = connected_components(graph, directed=False)[1][node]
    return np.where((labels >= 0) | linked, component, -1)


def _coloring(conflicts: dict[int, set[int]]) -> dict[int, int]:
    """A number for each unit, different where units must stay apart; units with most conflicts choose first."""
    colors: dict[int, int] = {}
    for node in sorted(conflicts, key=lambda node: (-len(conflicts[node]), node)):
        taken = {colors[other] for other in conflicts[node] if other in colors}
        colors[node] = next(color for color in range(len(taken) + 1) if color not in taken)
    return colors


def _split(images: np.ndarray, units: np.ndarray, colors: dict[int, int], feats: Tensor) -> np.ndarray:
    """(n,) part of each image of a cluster: the color of its unit, or that of the nearest centroid of a color."""
    part = torch.tensor([colors.get(int(unit), -1) for unit in units])
    own = feats[torch.from_numpy(images)].float()
    means = centroids(own, part)
    _, place = np.unique(units, return_inverse=True)
    of_unit = F.normalize(torch.zeros(int(place.max()) + 1, own.shape[1]).index_add_(0, torch.from_numpy(place), own))
    nearest = (of_unit @ means.T).argmax(1)[torch.from_numpy(place)]
    return torch.where(part >= 0, part, nearest).numpy()


def read_answers(sources: Iterable[str | Sequence[str]], paths: Sequence[str]) -> list[Answer]:
    """Answers about pairs of images that are named by their paths.

    Args:
        sources: answers (first, second, same / different / unsure), and names of CSV files that hold them in columns
            of these names; `unsure` says nothing. A column `kind` may tell answers (`pair`) from rows that take back
            an earlier one (`undo`): that whose number is in `first`, counted from 1 after the header.
        paths: of the N images. An image may be named by the end of its path, if no other image ends with it.

    Raises:
        MissingFile: no such file.
        InvalidValue: a column is missing, an unknown answer or kind, or a name that fits no image or several.
    """
    rows: list[tuple[str, Sequence[str]]] = []
    for place, source in enumerate(sources):
        if not isinstance(source, (str, list, tuple)):
            raise InvalidValue(
                f"PSEUDO_LABELS.DECISIONS[{place}] is {shown(source)}; a CSV file, or [first, second, same or "
                f"different], is accepted. Correct it."
            )
        rows += _rows(source) if isinstance(source, str) else [(f"PSEUDO_LABELS.DECISIONS[{place}]", source)]
    names = _Names(paths)
    found = []
    for origin, row in rows:
        if len(row) != 3 or not all(isinstance(word, str) for word in row) or row[2] not in ANSWERS:
            raise InvalidValue(
                f"{origin}: found {list(row)}; two images and one of {', '.join(ANSWERS)} are accepted. Correct it."
            )
        if row[2] != "unsure":
            first, second = (names.find(name, origin) for name in row[:2])
            found.append(Answer(first, second, row[2] == "same", f"{origin}: {row[0]}, {row[1]}"))
    return found


def _rows(file: str) -> list[tuple[str, Sequence[str]]]:
    """Where each answer of a file is, and the answer; those that were taken back are left out."""
    file = expanded(file)
    try:
        opened = path_manager.open(file, "r", encoding="utf-8", newline="")
    except FileNotFoundError:
        raise MissingFile(f"PSEUDO_LABELS.DECISIONS: {file} is missing; a CSV file is needed. Correct it.") from None
    rows: dict[int, tuple[str, Sequence[str]]] = {}
    with opened:
        reader = csv.DictReader(opened)
        missing = [name for name in ("first", "second", "answer") if name not in (reader.fieldnames or ())]
        if missing:
            raise InvalidValue(
                f"{file}: column {missing[0]!r} is missing; first, second and answer are needed. Add it."
            )
        for number, row in enumerate(reader, start=1):
            kind = row.get("kind") or "pair"
            if kind == "undo" and row["first"].isdigit() and int(row["first"]) in rows:
                del rows[int(row["first"])]
            elif kind == "pair":
                rows[number] = f"{Path(file).name} row {number}", (row["first"], row["second"], row["answer"])
            else:
                raise InvalidValue(
                    f"{file}: row {number} has kind {kind!r}; pair, and undo of a pair, are accepted here. "
                    f"`fastreid-uns group --resume` reads all kinds."
                )
    return list(rows.values())


class _Names:
    """Images by their paths, or the ends of these."""

    def __init__(self, paths: Sequence[str]) -> None:
        self.paths = [Path(path).as_posix() for path in paths]
        self.by_file: dict[str, list[int]] = defaultdict(list)
        for image, path in enumerate(self.paths):
            self.by_file[path.rpartition("/")[2]].append(image)

    def find(self, name: str, origin: str) -> int:
        """The index of the image that a name means."""
        name = Path(name).as_posix()
        alike = self.by_file.get(name.rpartition("/")[2], [])
        found = [image for image in alike if f"/{self.paths[image]}".endswith(f"/{name.lstrip('/')}")]
        if len(found) != 1:
            what = "fits no image" if not found else f"fits {len(found)} images"
            raise InvalidValue(
                f"{origin}: {name!r} {what} of the {len(self.paths):,}; the path of one, or its end, is accepted. "
                f"Correct it."
            )
        return found[0]


class ConstrainedLabels(PseudoLabelGenerator):
    """Any generator, held to answers: the bank carries them into it, and what it gives is corrected by them.

    Args:
        generator: gives labels; one that reads `FeatureBank.constraints` keeps to them itself.
        constraints: over the N images of the bank.
    """

    def __init__(self, generator: PseudoLabelGenerator, constraints: Constraints) -> None:
        super().__init__()
        self.generator, self.constraints = generator, constraints
        self.order_free = generator.order_free

    def __call__(self, bank: FeatureBank, epoch: int) -> PseudoLabels:
        pseudo = self.generator(replace(bank, constraints=self.constraints), epoch)
        self.seconds = self.generator.seconds
        labels = self.constraints.apply(pseudo.labels, bank.feats)
        if torch.equal(labels, Constraints(self.constraints.count).apply(pseudo.labels, bank.feats)):
            return pseudo  # another numbering at most
        return PseudoLabels(labels, centroids(bank.feats, labels), pseudo.extras)

    def state_dict(self) -> dict:
        """That of the generator."""
        return self.generator.state_dict()

    def load_state_dict(self, state: dict) -> None:
        """Restore what `state_dict` gave."""
        self.generator.load_state_dict(state)
