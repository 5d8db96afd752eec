"""The training images of a run as one table: what the sampler, the loader and the clustering read."""

from __future__ import annotations

import hashlib
import os
from concurrent.futures import ThreadPoolExecutor
from os.path import commonpath, dirname, relpath

import torch
from torch import Tensor

from fastreid_uns.data.image_set import ImageSet
from fastreid_uns.errors import InvalidState, InvalidValue
from fastreid_uns.structures import PseudoLabels, Record
from fastreid_uns.utils.environment import cores
from fastreid_uns.utils.paths import path_manager

_SAMPLE = 4096  # bytes of a file that are read at each of three places


class TrainSet:
    """One row for each image: the N unlabelled ones, then the S of the labelled source sets.

    Everything but the pseudo labels stays as it is; those are written after each clustering.

    Args:
        images: of all rows, in order.
        domains: (N+S,) int64, 0 for an unlabelled image, else the number of its source set, from 1; None = all 0.
        classes: (N+S,) int64, class 0..C-1 of a source image, counted over all source sets; -1 for unlabelled images;
            None = all -1.

    Attributes:
        images, domains, classes: as given.
        cameras: (N+S,) int64, -1 unknown.
        num_images: N.
        num_classes: C.

    Raises:
        ValueError: columns of different lengths, a source before an unlabelled image, or classes that do not fit.

    Example:
        >>> from fastreid_uns.data import ImageSet
        >>> records = [Record("a.jpg", -1, 0), Record("b.jpg", -1, 1), Record("source/c.jpg", 5, 0)]
        >>> domains, classes = torch.tensor([0, 0, 1]), torch.tensor([-1, -1, 0])
        >>> train_set = TrainSet(ImageSet(records, size=(8, 4)), domains=domains, classes=classes)
        >>> train_set.num_images, train_set.num_classes
        (2, 1)
        >>> train_set.pseudo = PseudoLabels(labels=torch.tensor([0, -1]), centroids=torch.ones(1, 2))
        >>> train_set.batch_labels  # the source class is 0, so the cluster is 1
        tensor([ 1, -1,  0])
    """

    def __init__(self, images: ImageSet, *, domains: Tensor | None = None, classes: Tensor | None = None) -> None:
        self.images = images
        self.cameras = images.cameras
        self.domains = torch.zeros(len(images), dtype=torch.int64) if domains is None else domains.cpu()
        self.classes = torch.full((len(images),), -1) if classes is None else classes.cpu()
        if not len(images) == len(self.domains) == len(self.classes):
            raise InvalidValue(
                f"train set: {len(images):,} images, {len(self.domains):,} domains and {len(self.classes):,} classes; "
                f"each image needs one of each. Use domain 0 and class -1 for unlabelled images."
            )
        self.num_images = int((self.domains == 0).sum())
        if bool((self.domains[: self.num_images] != 0).any()) or bool(
            ((self.domains > 0) != (self.classes >= 0)).any()
        ):
            raise InvalidValue(
                "train set: unlabelled images (domain 0, class -1) must come first, then those of the labelled sets "
                "(domain from 1, class from 0). Sort the rows by domain."
            )
        self.num_classes = int(self.classes.max()) + 1 if len(images) else 0
        self._pseudo: PseudoLabels | None = None
        self._fingerprint: str | None = None

    def __len__(self) -> int:
        return len(self.images)

    @property
    def records(self) -> list[Record]:
        """Of all rows, in order. The identity of an unlabelled image is for the log only."""
        return self.images.records

    @property
    def pseudo(self) -> PseudoLabels | None:
        """The latest clustering of the N unlabelled images, on the CPU; None before the first.

        Raises:
            ValueError: written with another number of labels.
        """
        return self._pseudo

    @pseudo.setter
    def pseudo(self, pseudo: PseudoLabels) -> None:
        if pseudo.labels.shape != (self.num_images,):
            raise InvalidValue(
                f"train set: labels of shape {tuple(pseudo.labels.shape)} for {self.num_images:,} unlabelled images; "
                f"one for each is needed, -1 for outliers."
            )
        self._pseudo = pseudo.to("cpu")

    @property
    def labels(self) -> Tensor:
        """(N,) cluster of each unlabelled image in this epoch, -1 outlier, on the CPU.

        Raises:
            RuntimeError: nothing has been clustered yet.
        """
        if self._pseudo is None:
            raise InvalidState("train set: there are no labels yet; write train_set.pseudo after clustering.")
        return self._pseudo.labels

    @property
    def batch_labels(self) -> Tensor:
        """(N+S,) label of each image as batches number them: the C source classes, then the clusters; -1 outlier.

        Raises:
            RuntimeError: nothing has been clustered yet.
        """
        labels = torch.where(self.labels < 0, self.labels, self.labels + self.num_classes)
        return torch.cat([labels, self.classes[self.num_images :]])

    @property
    def source_classes(self) -> Tensor | None:
        """(S,) class of each source image, None without sources."""
        return self.classes[self.num_images :] if len(self) > self.num_images else None

    def fingerprint(self) -> str:
        """A digest of the list: parts of each file, its path below the folder of its set, camera, domain and class.

        It stays when the folder of a set moves, and changes when a file is added, removed, replaced or renamed.
        """
        if self._fingerprint is None:
            self._fingerprint = self._digest()
        return self._fingerprint

    def _digest(self) -> str:
        with ThreadPoolExecutor(cores()) as pool:
            contents = list(pool.map(_content, self.images.paths))
        whole = hashlib.sha256()
        columns = (self.cameras.tolist(), self.domains.tolist(), self.classes.tolist())
        for row in zip(self._names(), contents, *columns, strict=True):
            whole.update(repr(row).encode("utf-8", "backslashreplace"))
        return whole.hexdigest()[:32]

    def _names(self) -> list[str]:
        """The path of each image below the folder that all images of its domain share."""
        names: list[str] = []
        for domain in self.domains.unique().tolist():
            paths = [self.images.paths[i] for i in (self.domains == domain).nonzero().flatten().tolist()]
            folder = commonpath([dirname(path) for path in paths])
            names += [relpath(path, folder or ".") for path in paths]
        return names


def _content(path: str) -> str:
    """A digest of the size and of some bytes at the start, in the middle and at the end."""
    try:
        with path_manager.open(path, "rb") as file:
            size = file.seek(0, os.SEEK_END)
            digest = hashlib.blake2b(str(size).encode(), digest_size=16)
            for start in (0, size // 2, max(0, size - _SAMPLE)):
                file.seek(start)
                digest.update(file.read(_SAMPLE))
            return digest.hexdigest()
    except OSError:
        return "unreadable"
