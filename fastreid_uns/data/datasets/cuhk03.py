"""CUHK03 (Li et al., CVPR 2014) with the split of Zhong et al. (CVPR 2017): 767 training, 700 test persons."""

from __future__ import annotations

import re
import struct
import zlib
from os.path import join

import numpy as np

from fastreid_uns.data.datasets.layout import (
    HELP,
    PublishedCounts,
    camera_index,
    check_counts,
    first_exists,
    require,
    three_folders,
)
from fastreid_uns.errors import InvalidValue
from fastreid_uns.registry import DATASET_REGISTRY
from fastreid_uns.structures import Record, ReIDData
from fastreid_uns.utils.paths import path_manager

CAMERAS = (1, 2)
KNOWN = {
    "labeled": PublishedCounts(train=(7_368, 767), query=(1_400, 700), gallery=(5_328, 700), cameras=2),
    "detected": PublishedCounts(train=(7_365, 767), query=(1_400, 700), gallery=(5_332, 700), cameras=2),
}


@DATASET_REGISTRY.register()
@check_counts(KNOWN, by="variant")
def cuhk03(*, root: str = "datasets/cuhk03-np", variant: str = "detected") -> ReIDData:
    """1,467 persons, each under two cameras.

    Args:
        root: either the folder with `labeled` and `detected`, each with `bounding_box_train`, `query` and
            `bounding_box_test`; or the folder with `cuhk03_new_protocol_config_{labeled,detected}.mat` and the images
            in `images_labeled`, `images_detected`.
        variant: who drew the boxes: `labeled` (persons) or `detected` (a detector).

    Raises:
        MissingFile: a folder or file is missing.
        InvalidValue: unknown variant, or a file name or split file that does not parse.
    """
    if variant not in KNOWN:
        raise InvalidValue(f"cuhk03: VARIANT is {variant!r}; accepted are labeled and detected.")
    split_file = f"cuhk03_new_protocol_config_{variant}.mat"
    if path_manager.isfile(join(root, split_file)):
        require(root, [f"images_{variant}"])
        return _from_split_file(join(root, split_file), join(root, f"images_{variant}"))
    folders = [f"{variant}/{name}" for name in ("bounding_box_train", "query", "bounding_box_test")]
    return three_folders(root, folders, cameras=CAMERAS, example="0001_c1_1.png")


def _from_split_file(path: str, images: str) -> ReIDData:
    from scipy.io import loadmat
    from scipy.io.matlab import MatReadError

    broken = (MatReadError, ValueError, TypeError, LookupError, OSError, NotImplementedError, struct.error, zlib.error)
    try:
        with path_manager.open(path, "rb") as file:
            content = loadmat(file, simplify_cells=True)
    except broken as error:
        raise InvalidValue(
            f"{path}: the file cannot be read as a .mat file ({error}). Download it again. {HELP}"
        ) from error
    fields = ("train_idx", "query_idx", "gallery_idx", "labels", "filelist")
    missing = [name for name in fields if name not in content]
    if missing:
        raise InvalidValue(f"{path}: field {', '.join(missing)} is missing; needed are {', '.join(fields)}. {HELP}")
    records = [
        _record(path, images, str(name), int(identity))
        for name, identity in zip(np.ravel(content["filelist"]), np.ravel(content["labels"]), strict=True)
    ]
    first_exists(records, path)
    # positions in the file count from 1; one that stands alone is read as a plain number
    train, query, gallery = ([records[int(at) - 1] for at in np.ravel(content[name])] for name in fields[:3])
    return ReIDData(train, query, gallery, "cross_camera")


def _record(path: str, images: str, name: str, identity: int) -> Record:
    match = re.fullmatch(r"[1-5]_\d+_(?P<camera>\d+)_\d+\.\w+", name)
    if match is None:
        raise InvalidValue(
            f"{path}: image {name!r} in filelist; accepted are names such as 1_001_1_01.png (camera pair, person, "
            f"camera, image). {HELP}"
        )
    return Record(join(images, name), identity, camera_index(int(match["camera"]), CAMERAS, f"{path}: {name}"))
