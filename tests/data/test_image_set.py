import gc
import multiprocessing
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fastreid_uns.data.decode import UnreadableImage
from fastreid_uns.data.image_set import ImageSet
from fastreid_uns.errors import MissingFile
from fastreid_uns.structures import Record

SIZE = (8, 4)
CPU = torch.device("cpu")


def write(path: Path, seed: int, size=SIZE) -> Record:
    pixels = np.random.default_rng(seed).integers(0, 256, (*size, 3), np.uint8)
    Image.fromarray(pixels).save(path)
    return Record(str(path), -1, seed % 3 - 1)


@pytest.fixture
def records(tmp_path):
    return [write(tmp_path / f"{i}.png", i) for i in range(7)]


def pixels_of(record: Record) -> torch.Tensor:
    return torch.from_numpy(np.array(Image.open(record.path))).permute(2, 0, 1)


def test_images_of_the_right_size_keep_their_pixels(records):
    images = ImageSet(records, SIZE)
    assert len(images) == 7
    assert images.paths == [record.path for record in records]
    assert images.cameras.tolist() == [-1, 0, 1, -1, 0, 1, -1]
    assert images[3].dtype == torch.uint8
    assert torch.equal(images[3], pixels_of(records[3]))


def test_resizes_with_the_bicubic_filter_of_pillow(tmp_path):
    record = write(tmp_path / "large.png", 0, (40, 30))
    expected = np.asarray(Image.open(record.path).resize((4, 8), Image.Resampling.BICUBIC))
    assert np.array_equal(ImageSet([record], SIZE)[0].permute(1, 2, 0).numpy(), expected)


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "CMYK", "1"])
def test_every_mode_becomes_rgb(tmp_path, mode):
    file = tmp_path / "image.tif"
    Image.new("RGB", (4, 8), (255, 255, 255)).convert(mode).save(file)
    assert torch.equal(ImageSet([Record(str(file), 0, 0)], SIZE)[0], torch.full((3, *SIZE), 255, dtype=torch.uint8))


@pytest.mark.parametrize("workers", [0, 2])
def test_stream_gives_the_images_in_order(records, workers):
    batches = [[0, 1, 2], [6, 6], [5], [3, 0, 4, 1], [2]]
    streamed = list(ImageSet(records, SIZE, workers=workers).stream(iter(batches), CPU))
    expected = [torch.stack([pixels_of(records[i]) for i in batch]) for batch in batches]
    assert all(torch.equal(a, b) for a, b in zip(streamed, expected, strict=True))


def test_workers_stay_and_an_abandoned_stream_does_no_harm(records):
    images = ImageSet(records, SIZE, workers=2)
    left = images.stream([[i % 7] for i in range(50)], CPU)
    next(left)
    workers = {process.pid for process in multiprocessing.active_children()}
    assert len(workers) >= 2
    left.close()
    for _ in range(2):
        (pixels,) = images.stream([[4, 5]], CPU)
        assert torch.equal(pixels, torch.stack([pixels_of(records[4]), pixels_of(records[5])]))
    assert {process.pid for process in multiprocessing.active_children()} == workers


def test_workers_of_a_set_in_a_cycle_end_at_once(records):
    images = ImageSet(records, SIZE, workers=2)
    images.cycle = images
    list(images.stream([[0]], CPU))
    del images
    start = time.perf_counter()
    gc.collect()
    assert time.perf_counter() - start < 4


def test_one_stream_at_a_time(records):
    images = ImageSet(records, SIZE)
    first = images.stream([[0], [1]], CPU)
    next(first)
    assert len(list(images.stream([[2]], CPU))) == 1
    with pytest.raises(RuntimeError, match="stream 1 is read on after stream 2 has begun"):
        next(first)


@pytest.mark.parametrize("workers", [0, 2])
def test_streams_leave_the_global_random_state_alone(records, workers):
    before = torch.get_rng_state()
    list(ImageSet(records, SIZE, workers=workers).stream([[0]], CPU))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("workers", [0, 2])
def test_errors_name_the_file_and_the_set_goes_on(records, tmp_path, workers):
    broken, missing = tmp_path / "broken.png", tmp_path / "missing.png"
    broken.write_text("no image")
    images = ImageSet(
        [*records, Record(str(broken), 0, 0), Record(str(missing), 0, 0)],
        SIZE,
        workers=workers,
    )
    with pytest.raises(ValueError, match=r"^\S*broken\.png: the file is text; accepted are "):
        list(images.stream([[0], [7], [1]], CPU))
    with pytest.raises(FileNotFoundError, match=r"^\S*missing\.png: there is no such file"):
        list(images.stream([[8]], CPU))
    assert len(list(images.stream([[0], [1]], CPU))) == 2


@pytest.mark.parametrize("workers", [0, 2])
def test_decode_gives_the_errors_beside_the_pixels(records, tmp_path, workers):
    (tmp_path / "broken.png").write_text("no image")
    bad = [Record(str(tmp_path / name), 0, 0) for name in ("broken.png", "missing.png")]
    images = ImageSet([*records, *bad], SIZE, workers=workers)
    (first, none), (second, errors) = images.decode([[0, 1], [8, 2, 7]], CPU)
    assert none == {}
    assert {index: type(error) for index, error in errors.items()} == {8: MissingFile, 7: UnreadableImage}
    assert torch.equal(first, torch.stack([pixels_of(record) for record in records[:2]]))
    assert torch.equal(second[1], pixels_of(records[2]))
    assert not second[[0, 2]].any()


def test_what_is_left_out_is_counted_no_more(records):
    images = ImageSet(records, SIZE)
    list(images.stream([[0]], CPU))
    images.keep([1, 4, 6])
    assert len(images) == 3
    assert images.paths == [records[i].path for i in (1, 4, 6)]
    assert images.cameras.tolist() == [records[i].camera for i in (1, 4, 6)]
    (pixels,) = images.stream([[2, 0]], CPU)
    assert torch.equal(pixels, torch.stack([pixels_of(records[6]), pixels_of(records[1])]))


def test_check_reads_to_the_last_row(records, tmp_path):
    whole = tmp_path / "whole.jpg"
    Image.effect_noise((64, 64), 50).save(whole)
    (tmp_path / "cut.jpg").write_bytes(whole.read_bytes()[:-400])
    mixed = [records[0], Record(str(tmp_path / "cut.jpg"), 0, 0), Record(str(whole), 0, 0)]
    assert list(ImageSet(mixed, SIZE).check()) == [1]
