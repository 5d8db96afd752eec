"""VeRi-776 (Liu et al., ICME 2016)."""

from __future__ import annotations

from fastreid_uns.data.datasets.layout import PublishedCounts, check_counts, three_folders
from fastreid_uns.registry import DATASET_REGISTRY
from fastreid_uns.structures import ReIDData


@DATASET_REGISTRY.register()
@check_counts(PublishedCounts(train=(37_778, 576), query=(1_678, 200), gallery=(11_579, 200), cameras=20))
def veri776(*, root: str = "datasets/VeRi") -> ReIDData:
    """776 vehicles under twenty cameras.

    Args:
        root: the folder with `image_train`, `image_query` and `image_test`.

    Raises:
        MissingFile: a folder is missing.
        InvalidValue: a file name does not parse.
    """
    folders = ["image_train", "image_query", "image_test"]
    return three_folders(root, folders, cameras=range(1, 21), example="0001_c001_00016450_0.jpg")
