import gc
import multiprocessing
import os
import resource
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fastreid_uns.data import image_set
from fastreid_uns.data.image_set import CachedImageSet, ImageSet, check_images, unreadable_images
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
    with pytest.raises(ValueError, match=r"^\S*broken\.png: the file is text; accepted are JPEG"):
        list(images.stream([[0], [7], [1]], CPU))
    with pytest.raises(FileNotFoundError, match=r"^\S*missing\.png: there is no such file"):
        list(images.stream([[8]], CPU))
    assert len(list(images.stream([[0], [1]], CPU))) == 2


@pytest.mark.parametrize("where", ["device", "host", "disk"])
def test_a_cache_holds_the_same_images(records, tmp_path, where):
    images = ImageSet(records, SIZE)
    cached = CachedImageSet(images, where=where, device=CPU, folder=tmp_path / "cache")
    batches = [[0, 6], [3], [2, 2, 5]]
    assert cached.pixels.shape == (7, 3, *SIZE)
    assert (len(cached), cached.paths, cached.size) == (7, images.paths, SIZE)
    assert torch.equal(cached[4], images[4])
    both = zip(cached.stream(batches, CPU), images.stream(batches, CPU), strict=True)
    assert all(torch.equal(a, b) for a, b in both)


def cache_file(folder: Path) -> Path:
    (file,) = folder.iterdir()
    return file


def test_a_file_is_used_again_until_an_image_or_the_size_changes(records, tmp_path):
    folder = tmp_path / "cache"
    first = CachedImageSet(ImageSet(records, SIZE), where="disk", folder=folder)
    file = cache_file(folder)
    assert file.stat().st_size == first.pixels.numel()
    written = file.stat().st_mtime_ns
    CachedImageSet(ImageSet(records, SIZE), where="disk", folder=folder)
    assert cache_file(folder).stat().st_mtime_ns == written
    write(Path(records[0].path), 99)
    os.utime(records[0].path, ns=(1, 1))
    changed = CachedImageSet(ImageSet(records, SIZE), where="disk", folder=folder)
    assert torch.equal(changed[0], pixels_of(records[0]))
    assert not torch.equal(changed[0], first[0])
    CachedImageSet(ImageSet(records, (4, 4)), where="disk", folder=folder)
    assert len(list(folder.iterdir())) == 3


def test_a_file_that_was_cut_off_is_written_again(records, tmp_path):
    folder = tmp_path / "cache"
    CachedImageSet(ImageSet(records, SIZE), where="disk", folder=folder)
    file = cache_file(folder)
    file.write_bytes(file.read_bytes()[:-1])
    assert torch.equal(CachedImageSet(ImageSet(records, SIZE), where="disk", folder=folder)[6], pixels_of(records[6]))


@pytest.mark.parametrize("limit", [100, 7 * 3 * 8 * 4 - 1])
def test_a_full_disk_leaves_nothing_behind(records, tmp_path, limit, monkeypatch):
    folder = tmp_path / "cache"
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    if limit == 100:  # the place is reserved, writing fails
        monkeypatch.setattr("fastreid_uns.data.image_set._reserve", lambda partial, shape: partial.touch())
        folder.mkdir()
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, old[1]))
    try:
        with pytest.raises(RuntimeError, match=r"cache cannot take the 0\.00 GiB of pixels \(File too large\)"):
            CachedImageSet(ImageSet(records, SIZE), where="disk", folder=folder)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
    assert list(folder.iterdir()) == []


def test_two_runs_that_write_the_same_file_leave_each_other_alone(records, tmp_path, monkeypatch):
    """As on two hosts, whose processes may have the same number: the second starts while the first one writes."""
    write, second = image_set._write_share, []

    def interrupted(*arguments):
        if not second:
            second.append(None)
            second[0] = CachedImageSet(ImageSet(records, SIZE), where="disk", folder=tmp_path)
        write(*arguments)

    monkeypatch.setattr(image_set, "_write_share", interrupted)
    first = CachedImageSet(ImageSet(records, SIZE), where="disk", folder=tmp_path)
    for cached in (first, second[0]):
        (pixels,) = cached.stream([list(range(len(records)))], "cpu")
        assert torch.equal(pixels, torch.stack([pixels_of(record) for record in records]))
    assert [file.suffix for file in tmp_path.iterdir() if file.name.startswith("pixels")] == [".bin"]


def test_a_bad_image_stops_the_cache_and_leaves_nothing_behind(records, tmp_path):
    Path(records[3].path).write_bytes(b"")
    with pytest.raises(ValueError, match=r"3\.png"):
        CachedImageSet(ImageSet(records, SIZE), where="disk", folder=tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []
    Path(records[3].path).unlink()
    with pytest.raises(FileNotFoundError, match=r"3\.png: there is no such file"):
        CachedImageSet(ImageSet(records, SIZE), where="disk", folder=tmp_path / "cache")


def test_cache_arguments_are_checked(records):
    images = ImageSet(records, SIZE)
    with pytest.raises(ValueError, match=r"DATALOADER.CACHE: 'gpu' is unknown; accepted: device, host, disk"):
        CachedImageSet(images, where="gpu")
    with pytest.raises(ValueError, match=r"DATALOADER.CACHE disk: no folder"):
        CachedImageSet(images, where="disk")
    with pytest.raises(ValueError, match="the set has no images"):
        CachedImageSet(ImageSet([], SIZE))
    with pytest.raises(RuntimeError, match=r"CACHE host: 7 images need [\d.]+ GiB.*DATALOADER.CACHE to disk"):
        CachedImageSet(ImageSet(records, (2**22, 2**22)))


TWO_PROCESSES = """
import sys, torch, torch.distributed as dist
from fastreid_uns.data.image_set import CachedImageSet, ImageSet, check_images
from fastreid_uns.structures import Record
torch.set_num_threads(1)
rank, folder = int(sys.argv[1]), sys.argv[2]
dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
records = [Record(f"{folder}/{i}.png", -1, 0) for i in range(7)]
images = ImageSet(records, (8, 4))
cached = CachedImageSet(images, where="disk", folder=folder + "/cache")
assert all(torch.equal(cached[i], images[i]) for i in range(7))
absent = [Record(f"{folder}/absent{i}.png", -1, 0) for i in range(2)]
kept = check_images([*absent, *records], on_bad="skip", what="set")
assert kept == records
broken = [*records, Record(f"{folder}/broken.png", -1, 0)]
expected, message = [(RuntimeError, "another process could not write its share"), (ValueError, "broken.png")][rank]
try:
    CachedImageSet(ImageSet(broken, (8, 4)), where="disk", folder=folder + "/cache")
except expected as error:
    assert message in str(error)
else:
    raise SystemExit("no error")
dist.barrier()
dist.destroy_process_group()
"""


def test_two_processes_write_one_file_together(records, tmp_path):
    (tmp_path / "broken.png").write_text("no image")
    run = [sys.executable, "-c", TWO_PROCESSES]
    processes = [subprocess.Popen([*run, str(rank), str(tmp_path)]) for rank in range(2)]
    assert [process.wait(60) for process in processes] == [0, 0]
    pixels = np.fromfile(cache_file(tmp_path / "cache"), np.uint8).reshape(7, 3, *SIZE)
    assert np.array_equal(pixels[6], pixels_of(records[6]).numpy())


def damaged(records, tmp_path) -> list[Record]:
    whole = tmp_path / "whole.jpg"
    Image.effect_noise((64, 64), 50).save(whole)
    (tmp_path / "cut.jpg").write_bytes(whole.read_bytes()[:-400])
    (tmp_path / "text.jpg").write_text("no image")
    bad = [Record(str(tmp_path / name), 0, 0) for name in ("cut.jpg", "text.jpg", "gone.jpg")]
    return [bad[0], records[0], bad[1], records[1], bad[2], Record(str(whole), 0, 0)]


def test_finds_cut_wrong_and_missing_files(records, tmp_path):
    mixed = damaged(records, tmp_path)
    found = unreadable_images(mixed, threads=2)
    assert [path for path, _ in found] == [mixed[0].path, mixed[2].path, mixed[4].path]
    assert "truncated" in found[0][1]
    assert "the file is text" in found[1][1]
    assert found[2][1] == "missing"


def test_bad_images_stop_or_are_left_out(records, tmp_path, caplog):
    mixed = damaged(records, tmp_path)
    with pytest.raises(
        ValueError,
        match=r"(?s)market: 3 of 6 images.*cut\.jpg \(.*truncated.*prepare_data\.py.*INPUT\.ON_BAD_IMAGE: skip",
    ):
        check_images(mixed, on_bad="stop", what="market")
    assert check_images(mixed, on_bad="skip", what="market") == [mixed[1], mixed[3], mixed[5]]
    assert "market: 3 of 6 images cannot be read" in caplog.text
    assert check_images(records, on_bad="stop", what="market") == records
    with pytest.raises(ValueError, match=r"INPUT.ON_BAD_IMAGE: 'ignore' is unknown; accepted: stop, skip"):
        check_images(records, on_bad="ignore", what="market")
