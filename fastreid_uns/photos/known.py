"""The individuals of a run, ready to be compared with further photos."""

from __future__ import annotations

import math
import shlex
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastreid_uns.data.decode import UnreadableImage
from fastreid_uns.errors import InvalidValue
from fastreid_uns.photos.adapt import Adaptation
from fastreid_uns.photos.album import images_of
from fastreid_uns.photos.audit import GOOD, QUESTIONS
from fastreid_uns.photos.group import Settings, features
from fastreid_uns.photos.identify import Identity, Thresholds, identify
from fastreid_uns.photos.index import Index
from fastreid_uns.photos.network import Network
from fastreid_uns.photos.outcome import present_groups
from fastreid_uns.photos.store import PhotoRun
from fastreid_uns.photos.teller import plural
from fastreid_uns.utils.comm import choose_device


class Known:
    """What `identify`, `serve` and `add` need of a run; it is read once.

    Args:
        run: with an index.
        device: that makes the features of further photos: `auto` (CUDA where there is one), `cpu` or `cuda`.

    Raises:
        MissingFile, InvalidValue: the index is missing or damaged.
        InvalidState: there is no such device.
    """

    def __init__(self, run: PhotoRun, device: str = "auto") -> None:
        self.run = run
        self.index = Index.load(run.folder / "index.safetensors")
        self.network = Network.of_index(self.index)
        self.network.model.to(choose_device(device))
        self.settings = Settings(
            views=int(self.index.about["views"]), seed=int(self.index.about["seed"]), adaptation=Adaptation(steps=0)
        )

    def features(self, files: Sequence[str]) -> Tensor:
        """(M, D) of photos, made as those of the index.

        Raises:
            UnreadableImage, MissingFile: one cannot be read.
        """
        return features(images_of(files, self.network.size), self.network.encoder, self.settings)

    def identify(self, files: Sequence[str]) -> list[Identity]:
        """Who is on each of the photos; raises as `features`."""
        now = present_groups(self.run)
        groups = torch.tensor([now.get(path, number) for path, number in self._numbers()])
        thresholds = Thresholds(**self.index.thresholds)
        return identify(self.features(files), self.index.features, groups, thresholds, precision=self._precision())

    def _precision(self) -> float | None:
        """Pair precision that enough answers found, None without them."""
        audit = self.run.about.get("audit", {})
        return audit.get("precision") if audit.get("verified") else None

    def caveat(self) -> str:
        """Why no photo is called known at present, and what to do; empty if photos are."""
        precision, none = self._precision(), "unsure: no photo is called known, because"
        review = f"`fastreid-uns review {shlex.quote(str(self.run.folder))}`"
        if precision is None:
            left = QUESTIONS - int(self.run.about.get("audit", {}).get("answers", 0))
            return f"{none} the groups were not checked; answer {plural(left, 'question')} with {review}"
        if precision < GOOD:
            return f"{none} too many pairs in the groups are different individuals; mend the groups with {review}"
        if not math.isfinite(Thresholds(**self.index.thresholds).known_at(precision)):
            return f"{none} the groups are too few to tell how alike different individuals are; add photos of others"
        return ""

    def _numbers(self) -> list[tuple[str, int]]:
        return list(zip(self.index.paths, self.index.groups.tolist(), strict=True))

    def identify_bytes(self, content: bytes) -> dict[str, Any]:
        """What is said about the bytes of an image file, as JSON can.

        Raises:
            InvalidValue: they cannot be read.
        """
        with tempfile.NamedTemporaryFile() as file:
            file.write(content)
            file.flush()
            try:
                (found,) = self.identify([file.name])
            except UnreadableImage as error:
                raise InvalidValue(f"identify: the image cannot be read ({error.cause}). Send another one.") from error
        return said(found, self.caveat())


def said(found: Identity, caveat: str = "") -> dict[str, Any]:
    """What is said about a photo, as JSON can: `answer`, `group` (null if there is none), `similarity`.

    One that is unsure has the caveat of `Known` as `note`, if there is one.
    """
    answer = {
        "answer": found.kind,
        "group": None if found.group < 0 else found.group,
        "similarity": round(found.similarity, 4),
    }
    return {**answer, "note": caveat} if caveat and found.kind == "unsure" else answer


def unreadable(file: str | Path) -> str:
    """Why a photo cannot be read; empty if it can."""
    from fastreid_uns.data.decode import read_image
    from fastreid_uns.errors import MissingFile

    try:
        read_image(file)
    except (UnreadableImage, MissingFile) as error:
        return str(error)
    return ""
