"""VERI-Wild (Lou et al., CVPR 2019)."""

from __future__ import annotations

from os.path import join

from fastreid_uns.data.datasets.layout import HELP, PublishedCounts, check_counts, first_exists, read_list, require
from fastreid_uns.errors import InvalidValue
from fastreid_uns.registry import DATASET_REGISTRY
from fastreid_uns.structures import Record, ReIDData
from fastreid_uns.utils.paths import path_manager

SPLITS = "train_test_split"
TRAIN = (277_797, 30_671)
KNOWN = {
    3000: PublishedCounts(TRAIN, query=(3_000, 3_000), gallery=(38_861, 3_000)),
    5000: PublishedCounts(TRAIN, query=(5_000, 5_000), gallery=(64_389, 5_000)),
    10000: PublishedCounts(TRAIN, query=(10_000, 10_000), gallery=(128_517, 10_000)),
}


@DATASET_REGISTRY.register()
@check_counts(KNOWN, by="size")
def veriwild(*, root: str = "datasets/VERI-Wild", size: int = 3000) -> ReIDData:
    """40,671 vehicles under 174 cameras.

    Identities are the numbers of the image folders. Cameras are those of `vehicle_info.txt`, in ascending order 0..173.

    Args:
        root: the folder with `images` and `train_test_split`. The lists may have either of the names under which they
            were released: `train_list.txt`, `test_3000.txt`, `test_3000_query.txt`, or `train_list_start0.txt`,
            `test_3000_id.txt`, `test_3000_id_query.txt`.
        size: test vehicles: 3000, 5000 or 10000.

    Raises:
        MissingFile: a folder or list is missing.
        InvalidValue: unknown size, a line that does not parse, or an image that `vehicle_info.txt` lacks.
    """
    if size not in KNOWN:
        raise InvalidValue(f"veriwild: SIZE is {size}; accepted are {', '.join(map(str, KNOWN))}.")
    names = [f"{SPLITS}/{name}.txt" for name in ("train_list", f"test_{size}_query", f"test_{size}")]
    if path_manager.isfile(join(root, SPLITS, f"test_{size}_id.txt")):
        names = [f"{SPLITS}/{name}.txt" for name in ("train_list_start0", f"test_{size}_id_query", f"test_{size}_id")]
    require(root, ["images", SPLITS], [*names, f"{SPLITS}/vehicle_info.txt"])
    cameras = _cameras(join(root, SPLITS, "vehicle_info.txt"))
    train, query, gallery = (_listed(root, name, cameras) for name in names)
    return ReIDData(train, query, gallery, "cross_camera")


def _cameras(path: str) -> dict[str, int]:
    form = "'00001/000001;114;2018-03-11 00:00:43;...' (identity/image;camera;...), below one header line"
    lines = list(read_list(path, r"(?P<image>\d+/\d+);(?P<camera>\d+);.*|(?P<header>\D.*)", form))
    numbers = {line["image"]: int(line["camera"]) for line in lines if line["image"]}
    order = {camera: index for index, camera in enumerate(sorted(set(numbers.values())))}
    return {image: order[camera] for image, camera in numbers.items()}


def _listed(root: str, name: str, cameras: dict[str, int]) -> list[Record]:
    path = join(root, name)
    records = []
    pattern = r"(?P<image>(?P<identity>\d+)/\d+)(\.jpg)?(\s+\d+\s+\d+)?"
    for line in read_list(path, pattern, "'00001/000001' or '00001/000001.jpg 0 23'"):
        if line["image"] not in cameras:
            raise InvalidValue(
                f"{path}: vehicle_info.txt lacks {line['image']}; it must hold each listed image. {HELP}"
            )
        image = join(root, "images", f"{line['image']}.jpg")
        records.append(Record(image, int(line["identity"]), cameras[line["image"]]))
    first_exists(records, path)
    return records
