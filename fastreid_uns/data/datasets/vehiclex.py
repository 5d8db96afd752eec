"""VehicleX (Yao et al., ECCV 2020), in the edition of the AI City Challenge 2020: rendered vehicles."""

from __future__ import annotations

from os.path import join

from fastreid_uns.data.datasets.layout import PublishedCounts, check_counts, named_images, require
from fastreid_uns.registry import DATASET_REGISTRY
from fastreid_uns.structures import ReIDData


@DATASET_REGISTRY.register()
@check_counts(PublishedCounts(train=(192_150, 1_362), cameras=11))
def vehiclex(*, root: str = "datasets/AIC20_ReID_Simulation", folder: str = "image_train") -> ReIDData:
    """1,362 rendered vehicles for training only: query and gallery are empty.

    The eleven cameras have numbers with gaps in the file names; in ascending order they become 0..10.

    Args:
        root: the folder of the data set.
        folder: where the images lie below it: `image_train`, or `sys_image_train` and `sys_image_train_tr` (rendered,
            and in the style of real images) as some releases have it.

    Raises:
        MissingFile: a folder is missing.
        InvalidValue: a file name does not parse.
    """
    require(root, [folder])
    return ReIDData(named_images(join(root, folder), example="0001_c006_1.jpg"), [], [], "cross_camera")
