"""PersonX (Sun and Zheng, CVPR 2019): rendered persons."""

from __future__ import annotations

from fastreid_uns.data.datasets.layout import PublishedCounts, check_counts, three_folders
from fastreid_uns.registry import DATASET_REGISTRY
from fastreid_uns.structures import ReIDData


@DATASET_REGISTRY.register()
@check_counts(PublishedCounts(train=(9_840, 410), query=(5_136, 856), gallery=(30_816, 856), cameras=6))
def personx(*, root: str = "datasets/PersonX") -> ReIDData:
    """1,266 rendered persons in six scenes, in the subset that the unsupervised papers use.

    The scenes are numbered 3, 4, 8, 10, 11, 12 in the file names; they become cameras 0..5 in this order.

    Args:
        root: the folder with `bounding_box_train`, `query` and `bounding_box_test`.

    Raises:
        MissingFile: a folder is missing.
        InvalidValue: a file name does not parse, or holds another scene.
    """
    folders = ["bounding_box_train", "query", "bounding_box_test"]
    return three_folders(root, folders, cameras=(3, 4, 8, 10, 11, 12), example="0001_c3s1_000001_00.jpg")
