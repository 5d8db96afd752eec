"""Market-1501 (Zheng et al., ICCV 2015)."""

from __future__ import annotations

from fastreid_uns.data.datasets.layout import PublishedCounts, check_counts, three_folders
from fastreid_uns.registry import DATASET_REGISTRY
from fastreid_uns.structures import ReIDData


@DATASET_REGISTRY.register()
@check_counts(PublishedCounts(train=(12_936, 751), query=(3_368, 750), gallery=(15_913, 751), cameras=6))
def market1501(*, root: str = "datasets/Market-1501-v15.09.15") -> ReIDData:
    """1,501 persons under six cameras.

    Junk (identity -1) is dropped from the gallery; distractors (identity 0) stay and count as one identity there.

    Args:
        root: the folder with `bounding_box_train`, `query` and `bounding_box_test`.

    Raises:
        MissingFile: a folder is missing.
        InvalidValue: a file name does not parse.
    """
    folders = ["bounding_box_train", "query", "bounding_box_test"]
    return three_folders(root, folders, cameras=range(1, 7), example="0002_c1s1_000451_03.jpg")
