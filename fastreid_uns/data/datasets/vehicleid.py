"""PKU VehicleID (Liu et al., CVPR 2016)."""

from __future__ import annotations

import random
from os.path import join

from fastreid_uns.data.datasets.layout import PublishedCounts, check_counts, first_exists, read_list, require
from fastreid_uns.errors import InvalidValue
from fastreid_uns.registry import DATASET_REGISTRY
from fastreid_uns.structures import Record, ReIDData

TRAIN = (113_346, 13_164)
KNOWN = {
    800: PublishedCounts(TRAIN, query=(5_693, 800), gallery=(800, 800), cameras=0),
    1600: PublishedCounts(TRAIN, query=(11_777, 1_600), gallery=(1_600, 1_600), cameras=0),
    2400: PublishedCounts(TRAIN, query=(17_377, 2_400), gallery=(2_400, 2_400), cameras=0),
}


@DATASET_REGISTRY.register()
@check_counts(KNOWN, by="size")
def vehicleid(*, root: str = "datasets/VehicleID_V1.0", size: int = 800, seed: int = 0) -> ReIDData:
    """26,328 vehicles, cameras unknown (-1); the gallery holds one random image of each test vehicle.

    Papers average over ten draws of the gallery: a number from one `seed` has that spread.

    Args:
        root: the folder with `image` and `train_test_split`.
        size: test vehicles: 800, 1600 or 2400 (small, medium and large in the paper).
        seed: of the draw. The draw depends on the list alone, not on the order of its lines.

    Raises:
        MissingFile: a folder or list is missing.
        InvalidValue: unknown size, or a line that does not parse.
    """
    if size not in KNOWN:
        raise InvalidValue(f"vehicleid: SIZE is {size}; accepted are {', '.join(map(str, KNOWN))}.")
    lists = [f"train_test_split/{name}.txt" for name in ("train_list", f"test_list_{size}")]
    require(root, ["image"], lists)
    train, test = (_listed(root, name) for name in lists)
    images: dict[int, list[Record]] = {}
    for record in sorted(test):
        images.setdefault(record.identity, []).append(record)
    draw = random.Random(seed)
    gallery = [draw.choice(images[identity]) for identity in sorted(images)]
    drawn = set(gallery)
    return ReIDData(train, [record for record in test if record not in drawn], gallery, "one_per_identity")


def _listed(root: str, name: str) -> list[Record]:
    path = join(root, name)
    records = [
        Record(join(root, "image", f"{line['image']}.jpg"), int(line["identity"]), -1)
        for line in read_list(path, r"(?P<image>\d+)\s+(?P<identity>\d+)", "'0000001 2498' (image, identity)")
    ]
    first_exists(records, path)
    return records
