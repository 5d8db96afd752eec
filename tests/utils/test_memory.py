"""Memory of mapped files is given back, and what they hold is not lost."""

import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fastreid_uns.data.image_set import ImageSet
from fastreid_uns.data.pixel_cache import CachedImageSet
from fastreid_uns.photos.view_store import ViewStore
from fastreid_uns.structures import Record

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="memory is counted by Linux's /proc/self/smaps")


def resident(values: torch.Tensor) -> int:
    """kB of the mapping in which values lie that are in memory."""
    for block in re.split(r"(?m)^(?=[0-9a-f]+-[0-9a-f]+ )", Path("/proc/self/smaps").read_text())[1:]:
        first, last = (int(number, 16) for number in block.split(maxsplit=1)[0].split("-"))
        if first <= values.data_ptr() < last:
            return int(re.search(r"Rss:\s+(\d+) kB", block)[1])
    raise AssertionError("the values are not mapped")


def test_pixels_of_a_file(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (256, 256, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "one.png")
    record = Record(str(tmp_path / "one.png"), -1, -1)
    images = CachedImageSet(ImageSet([record], (256, 256)), where="disk", folder=tmp_path / "cache")
    for _ in range(2):
        assert resident(images.pixels) == 0
        (found,) = images.stream([[0]], "cpu")
        assert torch.equal(found[0], torch.from_numpy(pixels).permute(2, 0, 1))
        assert resident(images.pixels) >= 192
        images.release()


def test_rows_of_a_view_store(tmp_path):
    store = ViewStore(tmp_path / "kept.bin")
    store.begin((4, 2, 1 << 15), torch.float32)
    rows = torch.rand(4, 2, 1 << 15)
    for photo in range(4):
        store.put(slice(photo, photo + 1), rows[photo : photo + 1])
        assert resident(store.values) == 0
    assert torch.equal(store.take(slice(0, 4)), rows)
    assert resident(store.values) >= 1024
