"""Images, labels and augmentation, put together into batches."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from fastreid_uns.data.augment import Augment
from fastreid_uns.data.camera_style import CameraStyle
from fastreid_uns.data.image_set import ImageSet, to_device
from fastreid_uns.data.samplers import Sampler
from fastreid_uns.errors import InvalidState, InvalidValue
from fastreid_uns.structures import Batch

_NO_LABELS = "feed: there are no labels yet; a batch needs them. Write feed.labels after clustering."


class Feed:
    """The batches of training.

    Labels are a tensor beside the images, which never change. Equal seeds give equal batches, whether the images are
    decoded or cached, whatever the number of workers; the slices of the processes make up the batch of one process.

    Args:
        images: the N unlabelled images, then the S labelled source images.
        sampler: says which images form a batch; its plan of the epoch must be made before the epoch is read.
        views: one augmentation for each view of the batch.
        seed: of the augmentation, from 0.
        device: where the batches are wanted.
        cameras: (N+S,) int64, -1 unknown.
        source_labels: (S,) classes 0..C-1 of the source images, None without sources.
        source_domains: (S,) number of the source set, from 1; None without sources.
        style: what shows images as other cameras would, before they are augmented; needed by views with `camera_style`.

    Raises:
        ValueError: lengths that disagree, no view, or a view with `camera_style` but no style.
    """

    def __init__(
        self,
        images: ImageSet,
        sampler: Sampler,
        views: Sequence[Augment],
        *,
        seed: int,
        device: torch.device | str,
        cameras: Tensor,
        source_labels: Tensor | None = None,
        source_domains: Tensor | None = None,
        style: CameraStyle | None = None,
    ) -> None:
        if not views:
            raise InvalidValue(
                "INPUT.VIEWS is empty; a batch needs at least one view. Name a preset of INPUT.AUGMENTS."
            )
        if style is None and any(view.camera_style for view in views):
            raise InvalidValue(
                "feed: a view has CAMERA_STYLE above 0 but no style is given. Pass style=ColourStyle(...)."
            )
        none = torch.zeros(0, dtype=torch.int64)
        self._source_labels = none if source_labels is None else source_labels.cpu()
        domains = none if source_domains is None else source_domains.cpu()
        if len(cameras) != len(images) or len(domains) != len(self._source_labels) or len(domains) > len(images):
            raise InvalidValue(
                f"feed: {len(images)} images, {len(cameras)} cameras, {len(self._source_labels)} source labels and "
                f"{len(domains)} source domains; each image needs a camera, each source image a label and a domain."
            )
        self.images = images
        self.sampler = sampler
        self.views = list(views)
        self.style = style
        self.seed = seed
        self.device = torch.device(device)
        self._count = len(images) - len(domains)
        self._labels: Tensor | None = None
        self._rows = none
        self._cameras = cameras.to(self.device)
        self._domains = torch.cat([none.new_zeros(self._count), domains])

    @property
    def labels(self) -> Tensor:
        """(N,) cluster of each unlabelled image, -1 outlier, on the CPU; written after each clustering.

        Batches number them after the C source classes.

        Raises:
            RuntimeError: read before it was written.
            ValueError: written with another length.
        """
        if self._labels is None:
            raise InvalidState(_NO_LABELS)
        return self._labels

    @labels.setter
    def labels(self, labels: Tensor) -> None:
        if labels.shape != (self._count,):
            raise InvalidValue(
                f"feed: labels of shape {tuple(labels.shape)} for {self._count} unlabelled images; one for each is "
                f"needed, -1 for outliers."
            )
        self._labels = labels.cpu()
        classes = int(self._source_labels.max()) + 1 if len(self._source_labels) else 0
        shifted = torch.where(self._labels < 0, self._labels, self._labels + classes)
        self._rows = torch.cat([shifted, self._source_labels]).to(self.device)

    def most_of_one_label(self) -> int:
        """How many images of one batch of all processes have the same label, at most, in the planned epoch."""
        return self.sampler.most_of_one(self._rows)

    def epoch(self, epoch: int) -> Iterator[Batch]:
        """The batches of this process, from the plan that the sampler has made for the epoch.

        Raises:
            RuntimeError: labels or plan are missing.
            FileNotFoundError, ValueError: an image is missing or unreadable.
        """
        if self._labels is None:
            raise InvalidState(_NO_LABELS)
        plan = list(self.sampler)
        for step, (batch, shown) in enumerate(zip(plan, self._shown(plan, epoch), strict=True)):
            host = torch.tensor(batch)
            index = to_device(host, self.device)
            yield Batch(
                views=tuple(self._view(number, pixels, epoch, step) for number, pixels in enumerate(shown)),
                index=index,
                labels=self._rows[index],
                cameras=self._cameras[index],
                domains=self._domains[host],
            )

    def _shown(self, plan: list[list[int]], epoch: int) -> Iterator[list[Tensor]]:
        """For each batch the pixels of its views before augmentation: the images, or other styles of them."""
        pixels = self.images.stream(plan, self.device)
        if self.style is None:
            return ([given] * len(self.views) for given in pixels)
        styles = [self._styles(self.style, batch, epoch, step) for step, batch in enumerate(plan)]
        return self.style.stream(plan, styles, pixels, self.device)

    def _styles(self, style: CameraStyle, batch: list[int], epoch: int, step: int) -> Tensor:
        """(V,B) style of each image in each view, see `CameraStyle.choose`."""
        index = torch.tensor(batch)
        styles = []
        for number, view in enumerate(self.views):
            size = (2, self.sampler.batch_size)
            draws = torch.rand(size, generator=self._generator(epoch, step, number, 1), dtype=torch.float64)
            styles.append(style.choose(index, draws[:, self.sampler.rows], view.camera_style))
        return torch.stack(styles)

    def _view(self, number: int, pixels: Tensor, epoch: int, step: int) -> Tensor:
        parameters = self.views[number].sample_parameters(
            self.sampler.batch_size, self.images.size, self._generator(epoch, step, number)
        )
        return self.views[number](pixels, {name: value[self.sampler.rows] for name, value in parameters.items()})

    def _generator(self, *moment: int) -> torch.Generator:
        """Random numbers of a moment: drawn for the batch of all processes, so that their count changes nothing."""
        seed = np.random.SeedSequence([self.seed, *moment]).generate_state(1, np.uint64)[0]
        return torch.Generator().manual_seed(int(seed))
