import numpy as np
import pytest
from PIL import Image

from fastreid_uns.data.image_check import check_images, find_unreadable, readable, reason
from fastreid_uns.structures import Record


@pytest.fixture
def mixed(tmp_path) -> list[Record]:
    """Six images: the first is cut off, the third is text, the fifth is missing."""
    rng = np.random.default_rng(0)
    for name in ("0.jpg", "1.jpg", "3.jpg", "5.jpg"):
        Image.fromarray(rng.integers(0, 256, (64, 64, 3), np.uint8)).save(tmp_path / name)
    (tmp_path / "0.jpg").write_bytes((tmp_path / "0.jpg").read_bytes()[:-400])
    (tmp_path / "2.jpg").write_text("no image")
    return [Record(str(tmp_path / f"{i}.jpg"), 0, 0) for i in range(6)]


def test_finds_cut_wrong_and_missing_files(mixed):
    found = find_unreadable(mixed, threads=2)
    assert list(found) == [0, 2, 4]
    assert "cut off" in reason(found[0])
    assert "text" in reason(found[2])
    assert reason(found[4]) == "missing"


def test_bad_images_stop_or_are_left_out(mixed, caplog):
    with pytest.raises(
        ValueError,
        match=r"(?s)market: 3 of 6 images.*0\.jpg \(.*cut off.*fastreid-uns check.*INPUT\.ON_BAD_IMAGE: skip",
    ):
        check_images(mixed, on_bad="stop", what="market")
    assert check_images(mixed, on_bad="skip", what="market") == [mixed[1], mixed[3], mixed[5]]
    assert "market: 3 of 6 images cannot be read" in caplog.text


def test_good_images_and_an_unknown_word(mixed):
    good = [mixed[1], mixed[3]]
    assert check_images(good, on_bad="stop", what="market") == good
    assert readable(good, {}, on_bad="skip", what="market") == [0, 1]
    with pytest.raises(ValueError, match=r"INPUT.ON_BAD_IMAGE: 'ignore' is unknown; accepted: stop, skip"):
        check_images(good, on_bad="ignore", what="market")
