"""The index: known individuals in one file that needs nothing beside it.

A safetensors file with the features, the paths and groups of their photos, the tensors of the whitening, the
thresholds, how an image becomes an input, and the weights themselves or at least their fingerprint. Training that
goes on, a checkpoint that is deleted or a folder that moves changes nothing for it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from fastreid_uns.errors import InvalidState, InvalidValue, MissingFile
from fastreid_uns.photos.files import write_file
from fastreid_uns.utils.fingerprint import weights_fingerprint

FORMAT = 1
UNIT_TOLERANCE = 1e-2


class Preprocessing(NamedTuple):
    """How an image becomes an input of the network.

    Attributes:
        size: height and width in pixels.
        mean, std: of the three channels, for values in [0, 1].
    """

    size: tuple[int, int]
    mean: tuple[float, float, float]
    std: tuple[float, float, float]


class Found(NamedTuple):
    """The rows of an index that are nearest to each query, nearest first.

    Attributes:
        similarity: (Q, top) float32, cosine.
        rows: (Q, top) int64.
    """

    similarity: Tensor
    rows: Tensor


@dataclass
class Index:
    """Features of known photos, and all that is needed to compare another photo with them.

    Attributes:
        features: (N, D) float32, unit length.
        paths: N different names of the photos.
        groups: (N,) int64, from 1.
        preprocessing: of the images.
        fingerprint: sha256 of the weights that made the features; see `weights_fingerprint`.
        weights: the weights themselves; empty if only their fingerprint is kept.
        whitening: tensors by name.
        thresholds: numbers by name.
        about: anything that JSON can say, such as the name of the network.
    """

    features: Tensor
    paths: list[str]
    groups: Tensor
    preprocessing: Preprocessing
    fingerprint: str
    weights: dict[str, Tensor] = field(default_factory=dict)
    whitening: dict[str, Tensor] = field(default_factory=dict)
    thresholds: dict[str, float] = field(default_factory=dict)
    about: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.features, self.groups = _checked(self.features, self.paths, self.groups)
        self._refuse_repeated(self.paths)
        if self.weights:
            self.check_weights(self.weights)

    def __len__(self) -> int:
        return len(self.paths)

    def check_weights(self, weights: Mapping[str, Tensor]) -> None:
        """Refuse weights that did not make this index.

        Raises:
            InvalidValue: they differ in a name, a shape or a value.
        """
        found = weights_fingerprint(weights)
        if found != self.fingerprint:
            raise InvalidValue(
                f"index: it was made with the weights {self.fingerprint[:12]}, these are {found[:12]}. Take those "
                f"weights, or build the index again."
            )

    def add(self, features: Tensor, paths: Sequence[str], groups: Tensor) -> None:
        """Take in more photos.

        Args:
            features: (M, D), unit length, of the same weights and whitening.
            groups: (M,) int64.

        Raises:
            InvalidValue: a photo is there already, or a feature cannot be compared.
        """
        features, groups = _checked(features, paths, groups)
        if features.shape[1] != self.features.shape[1]:
            raise InvalidValue(
                f"index: features of {features.shape[1]} values do not fit those of {self.features.shape[1]} in it. "
                f"Extract them with the weights and the whitening of the index."
            )
        self._refuse_repeated([*self.paths, *paths])
        self.features = torch.cat([self.features, features])
        self.groups = torch.cat([self.groups, groups])
        self.paths = [*self.paths, *paths]

    def remove(self, paths: Sequence[str]) -> None:
        """Forget photos.

        Raises:
            InvalidValue: a photo is not in the index, or none would be left.
        """
        gone = set(paths)
        if missing := sorted(gone - set(self.paths)):
            raise InvalidValue(f"index: {missing[0]!r} is not in it ({len(missing)} such). Check the names.")
        keep = [row for row, path in enumerate(self.paths) if path not in gone]
        if not keep:
            raise InvalidValue("index: no photo would be left. Delete the file instead.")
        self.features, self.groups = self.features[keep], self.groups[keep]
        self.paths = [self.paths[row] for row in keep]

    def search(self, queries: Tensor, top: int = 1) -> Found:
        """The nearest photos of each query.

        Args:
            queries: (Q, D), unit length.
            top: how many; at most N are found.

        Raises:
            InvalidValue: a query is empty, NaN, of another length, or `top` is below 1.
        """
        queries = _comparable(queries, "query")
        if queries.shape[1] != self.features.shape[1] or top < 1:
            raise InvalidValue(
                f"index: queries of {queries.shape[1]} values and top {top} were found; {self.features.shape[1]} "
                f"values and a top from 1 are accepted."
            )
        return Found(*(queries @ self.features.T).topk(min(top, len(self))))

    def save(self, file: str | Path, overwrite: bool = False) -> None:
        """Write the index.

        Raises:
            InvalidState: the file is there already and `overwrite` is not set, or the disk does not allow it.
        """
        file = Path(file)
        if file.exists() and not overwrite:
            raise InvalidState(f"{file}: exists already and is not overwritten. Choose another, or say --overwrite.")
        tensors = {"features": self.features, "groups": self.groups}
        for kind in ("weights", "whitening"):
            tensors |= {f"{kind}.{name}": tensor for name, tensor in getattr(self, kind).items()}
        text = {"format": FORMAT, "paths": self.paths, "preprocessing": self.preprocessing._asdict()}
        text |= {"fingerprint": self.fingerprint, "thresholds": self.thresholds, "about": self.about}
        text["checksum"] = weights_fingerprint(tensors)
        own = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
        file.parent.mkdir(parents=True, exist_ok=True)
        write_file(file, save(own, metadata={"index": json.dumps(text)}))

    @classmethod
    def load(cls, file: str | Path) -> Index:
        """Read an index.

        Raises:
            MissingFile: there is none.
            InvalidValue: the file is damaged or no index, or was written by a later version.
        """
        file = Path(file)
        if not file.is_file():
            raise MissingFile(
                f"{file}: no index was found. `fastreid-uns group` and `fastreid-uns search build` write one."
            )
        try:
            with safe_open(file, framework="pt") as content:
                text = json.loads((content.metadata() or {})["index"])
                tensors = {name: content.get_tensor(name) for name in content.keys()}  # noqa: SIM118
            if text["format"] != FORMAT:
                raise ValueError(f"it has format {text['format']}, {FORMAT} is accepted")
            if text["checksum"] != weights_fingerprint(tensors):
                raise ValueError("its content was altered or damaged")
            sized = {key: tuple(value) for key, value in text["preprocessing"].items()}
            return cls(
                tensors["features"],
                text["paths"],
                tensors["groups"],
                Preprocessing(**sized),
                text["fingerprint"],
                _part(tensors, "weights."),
                _part(tensors, "whitening."),
                text["thresholds"],
                text["about"],
            )
        except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
            raise InvalidValue(f"{file}: cannot be read as an index ({error}). Build it again.") from error

    def _refuse_repeated(self, paths: Sequence[str]) -> None:
        seen: set[str] = set()
        for path in paths:
            if path in seen:
                raise InvalidValue(f"index: {path!r} is in it already. Remove it first, or leave it out.")
            seen.add(path)


def _part(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def _checked(features: Tensor, paths: Sequence[str], groups: Tensor) -> tuple[Tensor, Tensor]:
    features, groups = _comparable(features, "feature"), torch.as_tensor(groups, dtype=torch.int64)
    if not len(features) == len(paths) == len(groups) or groups.ndim != 1 or (groups < 1).any():
        raise InvalidValue(
            f"index: {len(features)} features, {len(paths)} paths and {len(groups)} groups were found; one of each "
            f"for every photo and groups from 1 are accepted."
        )
    return features, groups


def _comparable(features: Tensor, what: str) -> Tensor:
    """Features as (N, D) float32 on the CPU.

    Raises:
        InvalidValue: there is none, or one is NaN, infinite or not of unit length.
    """
    features = features.detach().to("cpu", torch.float32)
    if features.ndim != 2 or not features.numel():
        raise InvalidValue(
            f"index: {what}s of shape {tuple(features.shape)} were found; (N, D) with N >= 1 is accepted."
        )
    wrong = ~((features.norm(dim=1) - 1).abs() < UNIT_TOLERANCE)
    if wrong.any():
        row = int(wrong.nonzero()[0])
        raise InvalidValue(
            f"index: {what} {row} has length {float(features[row].norm()):.3g}; unit length is accepted "
            f"({int(wrong.sum())} such). NaN comes from damaged weights or an empty image: leave these photos out."
        )
    return features
