import fcntl
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

from fastreid_uns.data import pixel_file
from fastreid_uns.data.image_set import ImageSet
from fastreid_uns.data.pixel_file import map_pixels
from fastreid_uns.structures import Record

SIZE = (8, 4)
BYTES = 7 * 3 * 8 * 4


def write(path: Path, seed: int) -> Record:
    """BMP: all files have the same size."""
    pixels = np.random.default_rng(seed).integers(0, 256, (*SIZE, 3), np.uint8)
    Image.fromarray(pixels).save(path)
    return Record(str(path), -1, 0)


@pytest.fixture
def records(tmp_path) -> list[Record]:
    (tmp_path / "images").mkdir()
    return [write(tmp_path / f"images/{i}.bmp", i) for i in range(7)]


@pytest.fixture
def folder(tmp_path) -> Path:
    return tmp_path / "cache"


def pixels_of(records: list[Record]) -> torch.Tensor:
    return torch.stack([torch.from_numpy(np.array(Image.open(r.path))).permute(2, 0, 1) for r in records])


def mapped(records: list[Record], folder: Path, what: str = "DATASETS.TRAIN", size=SIZE) -> torch.Tensor:
    return map_pixels(ImageSet(records, size), folder, what)[0]


def only(folder: Path) -> Path:
    (file,) = folder.iterdir()
    return file


def test_a_file_is_written_once_and_used_again(records, folder):
    assert torch.equal(mapped(records, folder), pixels_of(records))
    file = only(folder)
    assert file.read_bytes()[:BYTES] == pixels_of(records).numpy().tobytes()
    written = file.stat().st_mtime_ns
    assert torch.equal(mapped(records, folder), pixels_of(records))
    assert only(folder).stat().st_mtime_ns == written


def zeros(data: bytearray) -> bytearray:
    return bytearray(len(data))


def zeroed_pixels(data: bytearray) -> bytearray:
    return bytearray(BYTES) + data[BYTES:]


def flipped(place: int):
    def flip(data: bytearray) -> bytearray:
        data[place] ^= 4
        return data

    return flip


DAMAGE = {
    "zeros": zeros,
    "zeros with the text": zeroed_pixels,
    "one bit of the first image": flipped(5),
    "one bit of the last image": flipped(BYTES - 1),
    "one bit of the text": flipped(BYTES + 20),
    "one bit of the checksum of the text": flipped(-1),
    "no text": lambda data: data[:BYTES],
    "cut": lambda data: data[: BYTES // 2],
    "empty": lambda data: bytearray(),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_file_that_is_not_whole_is_written_again(records, folder, damage, caplog):
    mapped(records, folder)
    file = only(folder)
    file.write_bytes(DAMAGE[damage](bytearray(file.read_bytes())))
    assert torch.equal(mapped(records, folder), pixels_of(records))
    assert only(folder) == file
    assert "is damaged or cut off; it is written again" in caplog.text
    caplog.clear()
    mapped(records, folder)
    assert "written again" not in caplog.text


def test_what_a_run_sees_of_a_file_stays_in_its_own_memory(records, folder):
    mapped(records, folder)[:] = 0
    assert torch.equal(mapped(records, folder), pixels_of(records))


def exchange(first: Path, second: Path) -> None:
    aside = first.with_name("aside")
    first.rename(aside)
    second.rename(first)
    aside.rename(second)


def test_changed_images_get_a_file_of_their_own_and_the_old_one_goes(records, folder):
    held = mapped(records, folder)
    old = only(folder)
    for record in records:
        os.utime(record.path, ns=(1, 1))
    mapped(records, folder)
    assert len(list(folder.iterdir())) == 2  # a run has the old file
    del held
    exchange(Path(records[0].path), Path(records[1].path))  # of equal size and time
    assert torch.equal(mapped(records, folder), pixels_of(records))
    assert only(folder) != old


def test_files_of_other_sets_sizes_and_programs_stay(records, folder):
    mapped(records, folder)
    mapped(records, folder, what="DATASETS.TESTS.a")
    mapped(records, folder, size=(4, 4))
    (folder / "notes.bin").touch()
    (folder / "notes.partial").touch()
    assert len(list(folder.iterdir())) == 5
    mapped(records[:6], folder)  # instead of the first
    assert len(list(folder.iterdir())) == 5
    assert torch.equal(
        mapped(records, folder, size=(4, 4)), torch.stack([ImageSet(records, (4, 4))[i] for i in range(7)])
    )


def test_what_a_killed_run_has_left_unfinished_goes_and_what_a_living_one_writes_stays(records, folder):
    def write_for_ever(name: Path, begun) -> None:
        pixel_file._reserve(name, (7, 3, *SIZE))
        begun.set()
        time.sleep(60)

    fork = multiprocessing.get_context("fork")
    names = [folder / f"pixels-8x4-0000-{i}.bin.{i}.partial" for i in range(2)]
    runs = []
    for name in names:
        begun = fork.Event()
        runs.append(fork.Process(target=write_for_ever, args=(name, begun)))
        runs[-1].start()
        assert begun.wait(30)
    try:
        runs[0].kill()
        runs[0].join()
        mapped(records, folder)
        assert [name.exists() for name in names] == [False, True]
    finally:
        runs[1].kill()
        runs[1].join()


def test_a_file_that_another_run_removed_before_it_was_locked_is_made_again(folder, monkeypatch):
    folder.mkdir()
    partial, lock, calls = folder / "pixels-x.partial", pixel_file._lock, []

    def late(descriptor, **keys):
        if not calls:
            partial.unlink()
        calls.append(keys)
        return lock(descriptor, **keys)

    monkeypatch.setattr(pixel_file, "_lock", late)
    descriptor = pixel_file._reserve(partial, (7, 3, *SIZE))
    assert os.path.samestat(os.fstat(descriptor), partial.stat())
    assert len(calls) == 2
    os.close(descriptor)


def test_planted_links_lead_nowhere(records, folder, tmp_path):
    mapped(records, folder)
    file, treasure = only(folder), tmp_path / "treasure"
    treasure.write_bytes(file.read_bytes())  # a valid file, elsewhere
    file.unlink()
    file.symlink_to(treasure)
    leftover = folder / "pixels-1.partial"
    leftover.symlink_to(treasure)
    before = treasure.stat()
    assert torch.equal(mapped(records, folder), pixels_of(records))
    assert file.is_file()
    assert not file.is_symlink()
    assert (treasure.stat().st_mtime_ns, treasure.stat().st_size) == (before.st_mtime_ns, before.st_size)
    with pytest.raises(RuntimeError, match="cannot take"):
        pixel_file._reserve(leftover, (7, 3, *SIZE))


def test_names_of_unfinished_files_cannot_be_foreseen(records, folder, monkeypatch):
    names, reserve = [], pixel_file._reserve
    monkeypatch.setattr(pixel_file, "_reserve", lambda file, shape: names.append(file.name) or reserve(file, shape))
    for _ in range(2):
        mapped(records, folder)
        only(folder).unlink()
    first, second = (name.split(".")[2] for name in names)
    assert len(first) == len(second) == 16
    assert first != second


@pytest.mark.parametrize("limit", [100, BYTES - 1, BYTES + 10])
def test_a_full_disk_leaves_nothing_behind(records, folder, limit, monkeypatch):
    """No place for the file; for the images; for the text."""
    if limit == 100:
        monkeypatch.setattr(pixel_file.os, "truncate", lambda *_: None)
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, old[1]))
    try:
        with pytest.raises(RuntimeError, match=r"cache cannot take the 0\.00 GiB of pixels \(File too large\)"):
            mapped(records, folder)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
    assert list(folder.iterdir()) == []


def test_a_folder_that_cannot_be_made(records, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(RuntimeError, match=r"file cannot take .*\(File exists\).*CACHE_DIR"):
        mapped(records, tmp_path / "file")


def test_a_file_system_without_locks_keeps_everything(records, folder, monkeypatch):
    def refuse(*_):
        raise OSError("no locks")

    monkeypatch.setattr(fcntl, "flock", refuse)
    mapped(records, folder)
    mapped(records[:6], folder)
    assert len(list(folder.iterdir())) == 2


def test_two_runs_that_write_the_same_file_leave_each_other_alone(records, folder, monkeypatch):
    """As on two machines: the second starts while the first one writes."""
    write_share, second = pixel_file._write_share, []

    def interrupted(*arguments):
        if not second:
            second.append(None)
            second[0] = mapped(records, folder)
        return write_share(*arguments)

    monkeypatch.setattr(pixel_file, "_write_share", interrupted)
    first = mapped(records, folder)
    assert torch.equal(first, pixels_of(records))
    assert torch.equal(second[0], pixels_of(records))
    assert only(folder).suffix == ".bin"


TWO_PROCESSES = """
import sys, torch, torch.distributed as dist
from pathlib import Path
from fastreid_uns.data import image_set
from fastreid_uns.data.image_check import check_images
from fastreid_uns.data.image_set import ImageSet
from fastreid_uns.data.pixel_cache import CachedImageSet
from fastreid_uns.structures import Record
torch.set_num_threads(1)
rank, folder = int(sys.argv[1]), sys.argv[2]
dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
count, read = [], image_set.read_pixels
image_set.read_pixels = lambda path, size: count.append(path) or read(path, size)
records = [Record(f"{folder}/images/{i}.bmp", -1, 0) for i in range(7)]
absent = [Record(f"{folder}/images/absent{i}.bmp", -1, 0) for i in range(2)]
def cached(given, where="disk"):
    return CachedImageSet(ImageSet(given, (8, 4)), where=where, folder=folder + "/cache")
every = cached(records)
assert len(count) == 3 + rank, count  # the processes share the work
plain = ImageSet(records, (8, 4))
assert all(torch.equal(every[i], plain[i]) for i in range(7))
expected = every.pixels.clone()
count.clear()
(file,) = Path(folder, "cache").iterdir()
dist.barrier()
if rank == 1:  # damage in the share that the other process checks
    data = bytearray(file.read_bytes()); data[0] ^= 1; file.write_bytes(data)
dist.barrier()
assert torch.equal(cached(records).pixels, expected)
assert len(count) == 3 + rank, count
count.clear()
assert torch.equal(cached(records).pixels, expected)
assert count == []
kept = check_images([*absent, *records], on_bad="skip", what="set")
assert kept == records, kept
for where in ("disk", "host"):
    images = cached([*absent, *records], where)
    assert list(images.check()) == [0, 1]
    images.keep(range(2, 9))
    assert torch.equal(next(images.stream([range(7)], "cpu")), expected)
dist.destroy_process_group()
"""


def test_two_processes_share_the_work_and_agree(records, tmp_path):
    run = [sys.executable, "-c", TWO_PROCESSES]
    processes = [subprocess.Popen([*run, str(rank), str(tmp_path)]) for rank in range(2)]
    assert [process.wait(60) for process in processes] == [0, 0]
