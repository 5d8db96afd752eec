"""Images, labels and augmentation, put together into batches."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from fastreid_uns.data.augment import Augment
from fastreid_uns.data.camera_style import CameraStyle
from fastreid_uns.data.samplers import Sampler
from fastreid_uns.data.train_set import TrainSet
from fastreid_uns.errors import InvalidState, InvalidValue
from fastreid_uns.structures import Batch
from fastreid_uns.utils.transfer import made_ahead


class TrainLoader:
    """The batches of training.

    Equal seeds give equal batches, whether the images are decoded or cached, whatever the number of workers; the slices
    of the processes make up the batch of one process.

    Args:
        train_set: the images and, after each clustering, their labels.
        sampler: says which images form a batch.
        views: one augmentation for each view of the batch.
        seed: of the augmentation, from 0.
        device: where the batches are wanted.
        style: what shows images as other cameras would, before they are augmented; needed by views with `camera_style`.

    Raises:
        ValueError: no view, or a view with `camera_style` but no style.
    """

    def __init__(
        self,
        train_set: TrainSet,
        sampler: Sampler,
        views: Sequence[Augment],
        *,
        seed: int,
        device: torch.device | str,
        style: CameraStyle | None = None,
    ) -> None:
        if not views:
            raise InvalidValue(
                "INPUT.VIEWS is empty; a batch needs at least one view. Name a preset of INPUT.AUGMENTS."
            )
        if style is None and any(view.camera_style for view in views):
            raise InvalidValue(
                "train loader: a view has CAMERA_STYLE above 0 but no style is given. Pass style=ColourStyle(...)."
            )
        self.train_set = train_set
        self.images = train_set.images
        self.sampler = sampler
        self.views = list(views)
        self.style = style
        self.seed = seed
        self.device = torch.device(device)
        self._labels: Tensor | None = None
        self._most: int | None = None

    def plan(self, epoch: int) -> None:
        """Say which images form the batches of an epoch, from the labels that the train set has now.

        Raises:
            RuntimeError: it has none yet.
        """
        train_set, pseudo = self.train_set, self.train_set.pseudo
        if pseudo is None:
            raise InvalidState("train loader: there are no labels yet; write train_set.pseudo after clustering.")
        self._labels = train_set.batch_labels
        self.sampler.set_epoch(epoch, pseudo, train_set.cameras[: train_set.num_images])
        self._most = self.sampler.most_of_one(self._labels)

    def __len__(self) -> int:
        """Batches of the epoch that was planned last."""
        return len(self.sampler)

    def epoch(self, epoch: int) -> Iterator[Batch]:
        """The batches of this process, as they were planned.

        Raises:
            RuntimeError: nothing was planned.
            FileNotFoundError, ValueError: an image is missing or unreadable.
        """
        if self._labels is None:
            raise InvalidState("train loader: no epoch was planned; call plan(epoch) after clustering.")
        yield from made_ahead(self._batches(epoch, self._labels), self.device)

    def _batches(self, epoch: int, labels: Tensor) -> Iterator[Batch]:
        table = self.train_set
        plan = list(self.sampler)
        for step, (batch, shown) in enumerate(zip(plan, self._shown(plan, epoch), strict=True)):
            index = torch.tensor(batch)
            yield Batch(
                views=tuple(self._view(number, pixels, epoch, step) for number, pixels in enumerate(shown)),
                index=index,
                labels=labels[index],
                cameras=table.cameras[index],
                domains=table.domains[index],
                most=self._most,
            ).to(self.device)

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
