"""Own images without labels: every image below a folder."""

from __future__ import annotations

from collections.abc import Iterator
from os.path import join

from fastreid_uns.data.datasets.layout import HELP, IMAGE_SUFFIXES, check_counts, is_image, require
from fastreid_uns.errors import MissingFile
from fastreid_uns.registry import DATASET_REGISTRY
from fastreid_uns.structures import Record, ReIDData
from fastreid_uns.utils.paths import path_manager


@DATASET_REGISTRY.register()
@check_counts()
def folder(*, root: str) -> ReIDData:
    """All images below a folder, at any depth, as a training set in order of path; identity and camera are -1.

    Hidden files and folders and `__MACOSX` are passed over; query and gallery are empty.

    Args:
        root: the folder.

    Raises:
        FileNotFoundError: there is no such folder, or no image below it.
    """
    require(root)
    train = [Record(path, -1, -1) for path in sorted(_images_below(root))]
    if not train:
        raise MissingFile(
            f"{root}: there is no image below this folder; accepted are {', '.join(IMAGE_SUFFIXES)}. {HELP}"
        )
    return ReIDData(train, [], [], "plain")


def _images_below(place: str) -> Iterator[str]:
    for name in path_manager.ls(place):
        if name.startswith(".") or name == "__MACOSX":
            continue
        if path_manager.isdir(join(place, name)):
            yield from _images_below(join(place, name))
        elif is_image(name):
            yield join(place, name)
