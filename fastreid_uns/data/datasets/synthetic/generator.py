"""Generated pedestrians and vehicles: a data set that needs no download."""

from __future__ import annotations

import hashlib
import json
import secrets
import shutil
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from fastreid_uns.data.datasets.layout import check_counts, three_folders
from fastreid_uns.data.datasets.synthetic.render import STRANGER, Shot, Style, write_shots
from fastreid_uns.errors import InvalidValue
from fastreid_uns.registry import DATASET_REGISTRY
from fastreid_uns.structures import ReIDData
from fastreid_uns.utils.environment import cores
from fastreid_uns.utils.paths import path_manager
from fastreid_uns.utils.progress import progress

VERSION = 2  # counts up whenever the same knobs give other images, so that no old folder is taken for a new one
FOLDERS = ("bounding_box_train", "query", "bounding_box_test")
KINDS = ("person", "vehicle")
PASSAGE = 6  # frames in which an identity passes a camera, at most
CHUNK = 64  # images that a process renders at a time
WORTH_A_PROCESS = 2000  # images from which a further process saves time


@DATASET_REGISTRY.register()
@check_counts()
def synthetic(
    *,
    root: str = "datasets/synthetic",
    kind: str = "person",
    train_identities: int = 60,
    train_images: int = 1000,
    test_identities: int = 40,
    query_images: int = 120,
    gallery_images: int = 700,
    distractors: int = 100,
    junk: int = 20,
    cameras: int = 4,
    difficulty: float = 0.5,
    camera_bias: float = 0.5,
    size: Sequence[int] = (128, 64),
    seed: int = 0,
    processes: int = 0,
) -> ReIDData:
    """Drawn pedestrians or vehicles under cameras that differ in colour, sharpness, noise, scene and viewpoint.

    Identities come in groups of look-alikes that share their colours and differ in arrangement, pattern and
    accessories. The images are written once, in the layout of Market-1501, to a folder below `root` that is named
    after the knobs; a later call with the same knobs lists them. They are a function of the knobs alone, whatever
    the number of processes. Several processes may ask for the same set at the same time: the first one to finish
    wins. Market-1501 in numbers: 751 / 12936, 750 / 3368 / 15913, 2798 distractors, 3819 junk, 6 cameras.

    Args:
        root: folder under which sets are kept.
        kind: `person` or `vehicle`; vehicles look best in square images.
        train_identities: identities of the training split, none of which is in the test split.
        train_images: at least two for each of them, from at least two cameras.
        test_identities: identities that are queried.
        query_images: spread evenly over the identities, each from a camera of its own.
        gallery_images: distractors included, junk not; at least one for each camera that an identity was seen by.
        distractors: images of nobody who is queried, and of badly placed boxes; identity 0.
        junk: badly placed boxes of queried identities, written as identity -1 and dropped when listed.
        cameras: at least 2.
        difficulty: 0..1: fewer colours, larger groups, other viewpoints, worse boxes, more occlusion and noise.
        camera_bias: 0..1: how far cameras differ; at 0 they share one scene and only the viewpoint differs.
        size: height and width in pixels, each at least 16.
        seed: of everything.
        processes: that render; 0 = one, and one more for each 2,000 images as far as there are processors.

    Raises:
        InvalidValue: a knob is out of range.
    """
    knobs: dict[str, Any] = {
        "kind": kind,
        "train_identities": train_identities,
        "train_images": train_images,
        "test_identities": test_identities,
        "query_images": query_images,
        "gallery_images": gallery_images,
        "distractors": distractors,
        "junk": junk,
        "cameras": cameras,
        "difficulty": float(difficulty),
        "camera_bias": float(camera_bias),
        "size": list(size),
        "seed": seed,
    }
    _check(knobs, processes)
    stamp = hashlib.sha256(json.dumps({"version": VERSION, **knobs}).encode()).hexdigest()[:12]
    folder = Path(path_manager.get_local_path(root)) / f"{kind}-{stamp}"
    if not folder.is_dir():
        _generate(folder, knobs, processes)
    return three_folders(str(folder), FOLDERS, cameras=range(1, cameras + 1), example="0002_c1s1_000451_03.jpg")


def _check(knobs: dict[str, Any], processes: int) -> None:
    def refuse(name: str, accepted: str) -> None:
        value = processes if name == "processes" else knobs[name]
        raise InvalidValue(f"synthetic: {name} is {value!r}; accepted is {accepted}. Set {name.upper()} accordingly.")

    if knobs["kind"] not in KINDS:
        refuse("kind", " or ".join(KINDS))
    least = {"train_identities": 1, "test_identities": 1, "distractors": 0, "junk": 0, "cameras": 2, "seed": 0}
    for name, bound in least.items():
        if knobs[name] < bound:
            refuse(name, f"{bound} or more")
    if processes < 0:
        refuse("processes", "0 or more")
    for name in ("difficulty", "camera_bias"):
        if not 0.0 <= knobs[name] <= 1.0:
            refuse(name, "0 to 1")
    if len(knobs["size"]) != 2 or min(knobs["size"]) < 16:
        refuse("size", "[height, width], each 16 or more")
    trained, tested = knobs["train_identities"], knobs["test_identities"]
    if knobs["train_images"] < 2 * trained:
        refuse("train_images", f"{2 * trained:,} or more, two for each of {trained:,} train_identities")
    if not tested <= knobs["query_images"] <= tested * knobs["cameras"]:
        refuse("query_images", f"{tested:,} to {tested * knobs['cameras']:,}, test_identities to that times cameras")
    needed = sum(max(2, queries) for queries in _even(knobs["query_images"], tested)) + knobs["distractors"]
    if knobs["gallery_images"] < needed:
        refuse("gallery_images", f"{needed:,} or more, the distractors and one for each identity and camera")


def _even(total: int, parts: int) -> list[int]:
    return [total // parts + (i < total % parts) for i in range(parts)]


def _uneven(total: int, least: Sequence[int], rng: np.random.Generator) -> list[int]:
    """Parts that sum to `total`, each at least as large as asked for, the rest given out by chance."""
    weights = rng.uniform(0.5, 1.5, len(least))
    rest = rng.multinomial(total - sum(least), weights / weights.sum())
    return [int(a + b) for a, b in zip(least, rest, strict=True)]


def _plan(knobs: dict[str, Any]) -> list[Shot]:
    """Every image of the set."""
    rng = np.random.default_rng([knobs["seed"], 99])
    train, query, gallery = FOLDERS
    trained, tested, cameras = knobs["train_identities"], knobs["test_identities"], knobs["cameras"]
    shots: list[Shot] = []
    for identity, images in enumerate(_uneven(knobs["train_images"], [2] * trained, rng), start=1):
        seen_by = rng.permutation(cameras)[: rng.integers(2, 1 + min(cameras, images))]
        for camera, count in zip(seen_by, _even(images, len(seen_by)), strict=True):
            shots += [_shot(train, identity, int(camera), i) for i in range(count)]
    queries = _even(knobs["query_images"], tested)
    least = [max(2, count) for count in queries]
    images_of = _uneven(knobs["gallery_images"] - knobs["distractors"], least, rng)
    for identity, (asked, places, images) in enumerate(zip(queries, least, images_of, strict=True), start=trained + 1):
        for place, count in enumerate(_even(images, places)):
            camera = int(rng.permutation(cameras)[0]) if place == 0 else (camera + 1) % cameras
            if place < asked:
                shots.append(_shot(query, identity, camera, 0))
            shots += [_shot(gallery, identity, camera, 1 + i) for i in range(count)]
    for i in range(knobs["distractors"]):
        box = ("good", "bad", "bad", "empty")[i % 4]
        shots.append(_shot(gallery, STRANGER + i, int(rng.integers(cameras)), i, name="0000", box=box))
    for i in range(knobs["junk"]):
        identity = trained + 1 + int(rng.integers(tested))
        shots.append(_shot(gallery, identity, int(rng.integers(cameras)), i, name="-1", box="bad"))
    return shots


def _shot(folder: str, identity: int, camera: int, number: int, name: str = "", box: str = "good") -> Shot:
    tracklet, frame = divmod(number, PASSAGE)
    file = f"{name or f'{identity:04d}'}_c{camera + 1}s{tracklet + 1}_{frame:06d}_{'00' if box == 'good' else '01'}.jpg"
    return Shot(f"{folder}/{file}", identity, camera, tracklet, frame, box)


def _generate(folder: Path, knobs: dict[str, Any], processes: int) -> None:
    """Write all images to a folder beside the final one and rename it, so that the final one is complete or absent."""
    style = Style(
        knobs["kind"],
        knobs["difficulty"],
        knobs["camera_bias"],
        knobs["cameras"],
        (knobs["size"][0], knobs["size"][1]),
        knobs["seed"],
    )
    shots = _plan(knobs)
    chunks = [shots[i : i + CHUNK] for i in range(0, len(shots), CHUNK)]
    workers = processes or max(1, min(cores(), len(shots) // WORTH_A_PROCESS))
    unfinished = folder.with_name(f".{folder.name}-{secrets.token_hex(4)}")
    try:
        for name in FOLDERS:
            (unfinished / name).mkdir(parents=True)
        (unfinished / "knobs.json").write_text(json.dumps({"version": VERSION, **knobs}, indent=2))
        draw = partial(write_shots, style, folder=unfinished)
        if workers == 1:
            for _ in progress(map(draw, chunks), "drawing", len(chunks)):
                pass
        else:
            with ProcessPoolExecutor(workers) as pool:
                for _ in progress(pool.map(draw, chunks), "drawing", len(chunks)):
                    pass
        try:
            unfinished.rename(folder)
        except OSError:
            if not folder.is_dir():
                raise
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
