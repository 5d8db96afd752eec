from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fastreid_uns.data import image_set
from fastreid_uns.data.image_set import ImageSet
from fastreid_uns.data.pixel_cache import CachedImageSet
from fastreid_uns.errors import MissingFile
from fastreid_uns.structures import Record

SIZE = (8, 4)
CPU = torch.device("cpu")
PLACES = pytest.mark.parametrize("where", ["device", "host", "disk"])


def write(path: Path, seed: int) -> Record:
    pixels = np.random.default_rng(seed).integers(0, 256, (*SIZE, 3), np.uint8)
    Image.fromarray(pixels).save(path)
    return Record(str(path), -1, seed % 3 - 1)


@pytest.fixture
def records(tmp_path) -> list[Record]:
    return [write(tmp_path / f"{i}.png", i) for i in range(7)]


@pytest.fixture
def decoded(monkeypatch) -> list[str]:
    """Names of the files that are decoded, in order."""
    seen: list[str] = []
    read = image_set.read_pixels
    monkeypatch.setattr(image_set, "read_pixels", lambda path, size: seen.append(Path(path).stem) or read(path, size))
    return seen


def pixels_of(records: list[Record], index: list[int]) -> torch.Tensor:
    return torch.stack([torch.from_numpy(np.array(Image.open(records[i].path))).permute(2, 0, 1) for i in index])


def cached(records: list[Record], where: str, folder: Path, workers: int = 0) -> CachedImageSet:
    return CachedImageSet(ImageSet(records, SIZE, workers=workers), where=where, device=CPU, folder=folder / "cache")


@PLACES
@pytest.mark.parametrize("workers", [0, 2])
def test_a_cache_holds_the_same_images(records, tmp_path, where, workers):
    images = cached(records, where, tmp_path, workers)
    assert images.pixels.shape == (7, 3, *SIZE)
    assert (len(images), images.paths, images.size) == (7, [record.path for record in records], SIZE)
    batches = [[0, 6], [3], [2, 2, 5], [0, 1, 4]]
    for _ in range(2):
        for batch, pixels in zip(batches, images.stream(iter(batches), CPU), strict=True):
            assert torch.equal(pixels, pixels_of(records, batch))
    assert torch.equal(images[4], pixels_of(records, [4])[0])


@PLACES
def test_no_image_is_decoded_twice(records, tmp_path, decoded, where):
    images = cached(records, where, tmp_path)
    list(images.stream([[3, 3, 1], [1, 2]], CPU))
    list(images.stream([[2, 3], [5]], CPU))
    if where != "disk":
        assert decoded == ["3", "1", "2", "5"]  # what is asked for, when it is
    assert images.check() == {}
    list(images.stream([list(range(7))], CPU))
    images.check()
    assert sorted(decoded) == ["0", "1", "2", "3", "4", "5", "6"]


def test_a_file_of_an_earlier_run_spares_all_decoding(records, tmp_path, decoded):
    cached(records, "disk", tmp_path)
    decoded.clear()
    again = cached(records, "disk", tmp_path)
    assert again.check() == {}
    assert torch.equal(next(again.stream([[6, 0]], CPU)), pixels_of(records, [6, 0]))
    assert decoded == []


def test_a_stream_that_is_left_early_is_made_up_for(records, tmp_path):
    images = cached(records, "host", tmp_path, workers=2)
    first = images.stream([[0], [1], [2], [3]], CPU)
    next(first)
    first.close()
    every = list(range(7))
    assert torch.equal(next(images.stream([every], CPU)), pixels_of(records, every))


@PLACES
def test_what_cannot_be_read_is_told_and_left_out(records, tmp_path, where, decoded):
    Path(records[2].path).write_text("no image")
    Path(records[5].path).unlink()
    for _ in range(2):  # the second time from the file, if there is one
        images = cached(records, where, tmp_path)
        errors = images.check()
        assert list(errors) == [2, 5]
        assert "2.png: the file is text" in str(errors[2])
        assert isinstance(errors[5], MissingFile)
        with pytest.raises(ValueError, match=r"2\.png: the file is text"):
            list(images.stream([[0, 2]], CPU))
        with pytest.raises(FileNotFoundError, match=r"5\.png: there is no such file"):
            list(images.stream([[5]], CPU))
        images.keep([0, 1, 3, 4, 6])
        assert images.paths == [records[i].path for i in (0, 1, 3, 4, 6)]
        assert images.cameras.tolist() == [records[i].camera for i in (0, 1, 3, 4, 6)]
        assert images.check() == {}
        found = torch.cat(list(images.stream([[4, 2], [0, 1, 3]], CPU)))
        assert torch.equal(found, pixels_of(records, [6, 3, 0, 1, 4]))
        images.keep([3, 1])
        assert torch.equal(next(images.stream([[0, 1]], CPU)), pixels_of(records, [4, 1]))
        assert len(decoded) == 7
        if where != "disk":
            decoded.clear()


def test_arguments_are_checked(records):
    images = ImageSet(records, SIZE)
    with pytest.raises(ValueError, match=r"DATALOADER.CACHE: 'gpu' is unknown; accepted: none, device, host, disk"):
        CachedImageSet(images, where="gpu")
    with pytest.raises(ValueError, match=r"DATALOADER.CACHE disk: no folder"):
        CachedImageSet(images, where="disk")
    with pytest.raises(ValueError, match=r"DATASETS\.TRAIN: the set has no images"):
        CachedImageSet(ImageSet([], SIZE), what="DATASETS.TRAIN")
    with pytest.raises(RuntimeError, match=r"CACHE host: 7 images need [\d.]+ GiB.*DATALOADER.CACHE to disk"):
        CachedImageSet(ImageSet(records, (2**22, 2**22)))
    with pytest.raises(RuntimeError, match=r"after check\(\) has read all of them"):
        CachedImageSet(images).keep([0])
