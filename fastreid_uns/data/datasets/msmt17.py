"""MSMT17 (Wei et al., CVPR 2018), both versions."""

from __future__ import annotations

import logging
from os.path import join

from fastreid_uns.data.datasets.layout import (
    HELP,
    PublishedCounts,
    camera_index,
    check_counts,
    first_exists,
    read_list,
    require,
)
from fastreid_uns.errors import InvalidValue
from fastreid_uns.registry import DATASET_REGISTRY
from fastreid_uns.structures import Record, ReIDData
from fastreid_uns.utils.paths import path_manager

FOLDERS = {"V1": ("train", "test"), "V2": ("mask_train_v2", "mask_test_v2")}
CAMERAS = range(1, 16)

logger = logging.getLogger(__name__)


@DATASET_REGISTRY.register()
@check_counts(PublishedCounts(train=(32_621, 1_041), query=(11_659, 3_060), gallery=(82_161, 3_060), cameras=15))
def msmt17(*, root: str = "datasets/MSMT17_V1", version: str = "auto") -> ReIDData:
    """4,101 persons under fifteen cameras; training and validation list together are the training set.

    Version 2 is version 1 with blurred faces: the counts are equal, only the folder names tell them apart.
    Identities of the test part are numbered from 0 again.

    Args:
        root: the folder with the images and `list_{train,val,query,gallery}.txt`.
        version: `V1` (folders `train`, `test`), `V2` (folders `mask_train_v2`, `mask_test_v2`), or `auto` for the one
            that is there.

    Raises:
        MissingFile: a folder or list is missing.
        InvalidValue: unknown version, both versions in one root, or a line that does not parse.
    """
    if version not in ("auto", *FOLDERS):
        raise InvalidValue(f"msmt17: VERSION is {version!r}; accepted are auto, V1 and V2.")
    if version == "auto":
        there = [name for name, folders in FOLDERS.items() if path_manager.isdir(join(root, folders[0]))]
        if len(there) == 2:
            raise InvalidValue(f"{root}: holds the folders of V1 and of V2; set VERSION to the one to read. {HELP}")
        version = there[0] if there else "V1"
    train, test = FOLDERS[version]
    require(root, [train, test], [f"list_{part}.txt" for part in ("train", "val", "query", "gallery")])
    logger.info("msmt17 (%s): this is version %s (folders %s, %s)", root, version, train, test)
    return ReIDData(
        _listed(root, train, "list_train.txt") + _listed(root, train, "list_val.txt"),
        _listed(root, test, "list_query.txt"),
        _listed(root, test, "list_gallery.txt"),
        "cross_camera",
    )


def _listed(root: str, folder: str, name: str) -> list[Record]:
    path = join(root, name)
    pattern = r"(?P<image>\d+/\d+_\d+_(?P<camera>\d+)_\S+)\s+(?P<identity>\d+)"
    records = [
        Record(
            join(root, folder, line["image"]),
            int(line["identity"]),
            camera_index(int(line["camera"]), CAMERAS, f"{path}: {line['image']}"),
        )
        for line in read_list(path, pattern, "'0000/0000_000_01_0303morning_0015_0.jpg 0'")
    ]
    first_exists(records, path)
    return records
