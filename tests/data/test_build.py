"""From a config to the data of a run: how often an image is decoded, and what becomes of one that cannot be."""

from __future__ import annotations

import json
import os
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fastreid_uns.config import load_config
from fastreid_uns.data import build, image_check, image_set
from fastreid_uns.data.build import build_test_loader, build_train_loader, build_train_set
from fastreid_uns.data.pixel_cache import CachedImageSet
from fastreid_uns.engine.default import DefaultTrainer
from fastreid_uns.errors import InvalidValue
from fastreid_uns.utils import memory

CPU = torch.device("cpu")
IMAGES = 12
CACHES = pytest.mark.parametrize("cache", ["none", "device", "host", "disk"])


@pytest.fixture
def photos(tmp_path) -> Path:
    """Training images 0-5; image i of query and gallery, 6-11, has the identity i % 3."""
    folder = tmp_path / "photos"
    folder.mkdir()
    rows = ["path,identity,camera,split"]
    for i in range(IMAGES):
        Image.fromarray(np.full((32, 16, 3), 20 * i, np.uint8)).save(folder / f"{i}.png")
        split = "train" if i < 6 else "query" if i < 9 else "gallery"
        rows.append(f"{i}.png,{i % 3},{i % 2},{split}")
    (folder / "manifest.csv").write_text("\n".join(rows))
    return folder


def config(tiny, photos: Path, cache: str, **changes: object):
    section = {"NAME": "csv_file", "PATH": str(photos / "manifest.csv"), "PROTOCOL": "plain"}
    keys = {
        "DATASETS.TRAIN": section,
        "DATASETS.TESTS.mine": section,
        "DATALOADER.CACHE": cache,
        "PSEUDO_LABELS.MIN_SAMPLES": 1,
        "PSEUDO_LABELS.K1": 3,
        "PSEUDO_LABELS.K2": 1,
        "TEST.PERIOD": 1,
        **changes,
    }
    tiny = [word for word in tiny if not word.startswith(("DATASETS.", *(f"{key}=" for key in keys)))]
    return load_config(overrides=[*tiny, *(f"{key}={json.dumps(value)}" for key, value in keys.items())])


@pytest.fixture
def decoded(monkeypatch) -> Counter:
    """How often each file has been decoded, by its name."""
    seen: Counter = Counter()

    def counting(read):
        return lambda path, *size: seen.update([Path(path).name]) or read(path, *size)

    monkeypatch.setattr(image_set, "read_pixels", counting(image_set.read_pixels))
    monkeypatch.setattr(image_check, "read_image", counting(image_check.read_image))
    return seen


TRAIN = {f"{i}.png": 1 for i in range(6)}
TEST = {f"{i}.png": 1 for i in range(6, IMAGES)}


@CACHES
def test_the_start_decodes_each_training_image_once(tiny, photos, decoded, cache):
    build_train_set(config(tiny, photos, cache), CPU)
    assert decoded == TRAIN


@pytest.mark.parametrize("cache", ["device", "host", "disk"])
def test_a_run_decodes_each_image_once_and_a_run_with_its_file_none(tiny, photos, decoded, cache):
    """Two epochs, two evaluations."""
    trainer = DefaultTrainer(config(tiny, photos, cache))
    assert {name: decoded[name] for name in TRAIN} == TRAIN
    trainer.train()
    assert decoded == TRAIN | TEST
    cfg = config(
        tiny, photos, cache, OUTPUT_DIR=str(photos / "again"), **{"DATALOADER.CACHE_DIR": str(trainer.folder / "cache")}
    )
    decoded.clear()
    again = DefaultTrainer(cfg)
    again.train()
    assert decoded == (Counter() if cache == "disk" else TRAIN | TEST)
    assert again.results == trainer.results


def test_without_a_cache_every_evaluation_decodes(tiny, photos, decoded):
    _, images = build_test_loader(config(tiny, photos, "none"), "mine", CPU)
    for _ in range(2):
        list(images.stream([range(6)], CPU))
    assert decoded == {name: 2 for name in TEST}


@pytest.mark.parametrize(("period", "again"), [(0, False), (1, True), (2, False), (9, False)])
@pytest.mark.parametrize("cache", ["device", "host", "disk"])
def test_images_of_a_single_evaluation_fill_no_memory(tiny, photos, cache, period, again):
    """Of two epochs. A file is for later runs as well."""
    cfg = config(tiny, photos, cache, **{"TEST.PERIOD": period})
    _, images = build_test_loader(cfg, "mine", CPU)
    assert isinstance(images, CachedImageSet) == (again or cache == "disk")


@CACHES
def test_an_image_that_cannot_be_read_stops_the_start_with_a_count(tiny, photos, decoded, cache):
    (photos / "3.png").write_bytes((photos / "3.png").read_bytes()[:60])
    (photos / "4.png").write_bytes(b"")
    for _ in range(2):  # the second time a file says it
        with pytest.raises(
            ValueError,
            match=r"DATASETS\.TRAIN: 2 of 6 images cannot be read, the first: .*3\.png .*4\.png \(the file is empty\).*"
            r"INPUT\.ON_BAD_IMAGE: skip",
        ):
            build_train_set(config(tiny, photos, cache), CPU)


@CACHES
def test_what_is_skipped_leaves_the_others_in_their_places(tiny, photos, cache):
    """Images 0 and 3, the two of identity 0, of the unlabelled set and of the same set as a source."""
    for i in (0, 3):
        (photos / f"{i}.png").write_text("no image")
    source = {"NAME": "csv_file", "PATH": str(photos / "manifest.csv"), "PROTOCOL": "plain"}
    changes = {"DATASETS.SOURCES.other": source, "INPUT.ON_BAD_IMAGE": "skip"}
    for _ in range(2):
        train_set = build_train_set(config(tiny, photos, cache, **changes), CPU)
        kept = [1, 2, 4, 5] * 2
        assert [Path(record.path).stem for record in train_set.records] == [str(i) for i in kept]
        assert train_set.domains.tolist() == [0] * 4 + [1] * 4
        assert train_set.classes.tolist() == [-1] * 4 + [0, 1, 0, 1]  # identities 1 and 2
        assert train_set.cameras.tolist() == [i % 2 for i in kept]
        (pixels,) = train_set.images.stream([list(range(8))], CPU)
        assert pixels[:, 0, 0, 0].tolist() == [20 * i for i in kept]


@CACHES
def test_a_test_image_that_cannot_be_read_stops_the_evaluation(tiny, photos, cache):
    (photos / "7.png").write_text("no image")
    trainer = DefaultTrainer(config(tiny, photos, cache, **{"INPUT.ON_BAD_IMAGE": "skip"}))
    with pytest.raises(ValueError, match=r"7\.png: the file is text"):
        trainer.train()


def test_too_few_images_are_left(tiny, photos):
    for i in range(1, 6):
        (photos / f"{i}.png").write_text("no image")
    with pytest.raises(ValueError, match=r"csv_file has 1 training image\(s\); clustering needs at least two"):
        build_train_set(config(tiny, photos, "host", **{"INPUT.ON_BAD_IMAGE": "skip"}), CPU)


def test_a_sampler_of_sources_that_are_not_there_is_held_to_what_it_accepts(tiny, photos):
    for key, value in (("BATCH_SIZE", -7000), ("NUM_INSTANCES", 0)):
        cfg = config(tiny, photos, "none", **{f"DATALOADER.SOURCE_SAMPLER.{key}": value})
        with pytest.raises(InvalidValue, match=rf"^DATALOADER\.SOURCE_SAMPLER\.{key} (is )?{value}"):
            build_train_loader(cfg, build_train_set(cfg, CPU), CPU)


def test_a_step_whose_images_fill_the_memory_is_refused(tiny, photos, monkeypatch):
    """16 images of 32 x 16 pixels are 98,304 bytes as float32, two views of each twice as many."""
    monkeypatch.setattr(build, "total_memory", lambda device: 4 * 98_304)
    cfg = config(tiny, photos, "none")
    train_set = build_train_set(cfg, CPU)
    assert build_train_loader(cfg, train_set, CPU) is not None
    with pytest.raises(
        ValueError, match=r"SAMPLER.BATCH_SIZE: 16 images of 32 x 16 pixels, 2 views of each, take 0\.0"
    ):
        build_train_loader(config(tiny, photos, "none", **{"INPUT.VIEWS": ["train", "train"]}), train_set, CPU)
    assert build_test_loader(cfg, "mine", CPU)[0].protocol == "plain"  # 6 images, though TEST.BATCH_SIZE is 256
    monkeypatch.setattr(build, "total_memory", lambda device: 98_304)
    with pytest.raises(ValueError, match=r"TEST\.BATCH_SIZE: 6 images .* Lower TEST\.BATCH_SIZE or INPUT\.SIZE"):
        build_test_loader(cfg, "mine", CPU)


def test_a_large_batch_is_not_larger_than_its_set(tiny, photos):
    cfg = config(tiny, photos, "none", **{"DATALOADER.SAMPLER.BATCH_SIZE": 1028})
    with pytest.raises(ValueError, match=r"SAMPLER\.BATCH_SIZE is 1,028 for 6 training images; .*1,024 must not hold"):
        build_train_loader(cfg, build_train_set(cfg, CPU), CPU)


def test_the_memory_of_a_machine_and_of_its_container(monkeypatch, tmp_path):
    whole = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    monkeypatch.setattr(memory, "_LIMITS", (tmp_path / "memory.max", tmp_path / "gone"))
    assert memory.total_memory(CPU) == whole
    for text, expected in (("max\n", whole), ("4096\n", 4096), (f"{2 * whole}\n", whole)):
        (tmp_path / "memory.max").write_text(text)
        assert memory.total_memory(CPU) == expected
