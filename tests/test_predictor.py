from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from fastreid_uns.config import load_config
from fastreid_uns.modeling.meta_arch import build_model
from fastreid_uns.predictor import FeatureExtractor, load_run

SIZE = (32, 16)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """(folder, model): an output folder with the checkpoint of an untrained network."""
    folder = tmp_path_factory.mktemp("run")
    keys = ["INPUT.SIZE=[32, 16]", "MODEL.BACKBONE.NAME=SmallNet", "MODEL.MOMENTUM_ENCODER=true"]
    cfg = load_config(None, keys)
    torch.manual_seed(0)
    model = build_model(cfg, 7).eval()
    with torch.no_grad():
        for parameter in model.teacher.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))  # the two encoders must differ
    content = {"model": model.state_dict(), "config": cfg.dump(), "num_images": 7}
    torch.save(content, folder / "checkpoint_0003.pth")
    (folder / "last").write_text("checkpoint_0003.pth\n")
    return folder, model


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """A folder with three pictures of several sizes, one of them grey."""
    folder = tmp_path_factory.mktemp("pictures")
    random = np.random.default_rng(0)
    for name, shape in {"b.png": (40, 20, 3), "a.png": (32, 16, 3), "deeper/c.png": (50, 30)}.items():
        (folder / name).parent.mkdir(exist_ok=True)
        Image.fromarray(random.integers(0, 256, shape, dtype=np.uint8)).save(folder / name)
    return folder


def test_the_encoder_for_evaluation_gives_unit_features(run, pictures):
    folder, model = run
    extractor = FeatureExtractor.from_checkpoint(folder, device="cpu")
    pixels = torch.from_numpy(np.asarray(Image.open(pictures / "a.png")).copy()).permute(2, 0, 1)[None]
    with torch.no_grad():
        expected = model.teacher(pixels).feats
    assert extractor.size == SIZE
    assert extractor.dim == expected.shape[1]
    assert "SmallNet" in extractor.config
    for images in (pictures / "a.png", str(pictures / "a.png"), pixels, pixels / 255):
        feats = extractor(images)
        torch.testing.assert_close(feats, expected)
        assert feats.dtype == torch.float32
        assert feats.norm().item() == pytest.approx(1, abs=1e-5)


def test_paths_arrays_and_pillow_images_give_the_same(run, pictures):
    extractor = FeatureExtractor.from_checkpoint(run[0] / "checkpoint_0003.pth", device="cpu", batch_size=2)
    files = [pictures / name for name in ("a.png", "b.png", "deeper/c.png")]
    feats = extractor(files)
    opened = [Image.open(file) for file in files]
    arrays = [np.asarray(image.convert("RGB")) for image in opened]
    torch.testing.assert_close(extractor(pictures), feats)
    torch.testing.assert_close(extractor(opened), feats)
    torch.testing.assert_close(extractor(arrays), feats)
    torch.testing.assert_close(extractor([str(files[0]), opened[1], arrays[2]]), feats)
    torch.testing.assert_close(extractor(arrays[1]), feats[1:2])
    torch.testing.assert_close(extractor([array[..., ::-1][..., ::-1] for array in arrays]), feats)
    torch.testing.assert_close(FeatureExtractor.from_checkpoint(run[0], device="cpu", workers=1)(pictures), feats)


def test_pictures_of_any_depth_and_orientation_give_the_same(run, pictures, tmp_path):
    """The same picture upright and on its side, as 8 and 16 bits, as file, array and bytes."""
    extractor = FeatureExtractor.from_checkpoint(run[0], device="cpu")
    grey = np.asarray(Image.open(pictures / "deeper/c.png"))
    exif = Image.Exif()
    exif[274] = 6
    Image.fromarray(np.rot90(grey)).save(tmp_path / "turned.png", exif=exif)
    Image.fromarray(grey.astype(np.uint16) * 257).save(tmp_path / "deep.png")
    (expected,) = extractor(grey)
    given = [tmp_path / "turned.png", tmp_path / "deep.png", grey / 255, (tmp_path / "deep.png").read_bytes()]
    torch.testing.assert_close(extractor(given), expected.expand(4, -1))


def test_messages_name_no_key_that_the_extractor_lacks(run, tmp_path):
    (tmp_path / "a.jpg").write_bytes(b"")
    extractor = FeatureExtractor.from_checkpoint(run[0], device="cpu")
    for images in ([tmp_path / "a.jpg"], [tmp_path / "a.jpg", np.zeros((4, 4, 3), np.uint8)], tmp_path):
        with pytest.raises(ValueError, match=r"a\.jpg: the file is empty\. Replace it, or leave it out\.$"):
            extractor(images)


def test_no_images_give_no_rows(run):
    extractor = FeatureExtractor.from_checkpoint(run[0], device="cpu")
    assert extractor([]).shape == (0, extractor.dim)


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (torch.zeros(2, 3, 32, 32), r"shape \(2, 3, 32, 32\); \(B, 3, 32, 16\) is accepted"),
        (torch.full((1, 3, 32, 16), -2.0), "pixels run from -2.00 to -2.00; 0 to 1 is accepted. Do not normalise"),
        (torch.full((1, 3, 32, 16), 200.0), "divide 0..255 by 255"),
        (torch.full((1, 3, 32, 16), torch.nan), "pixels run from nan to nan"),
        (torch.zeros((1, 3, 32, 16), dtype=torch.int64), "the tensor is of type torch.int64; uint8, or floating point"),
        ([np.zeros((5, 0, 3), np.uint8)], r"image 0: the picture is empty \(5 x 0 pixels\)"),
        (np.zeros((2, 4, 4, 3), np.uint8), r"image 0: an array \(2, 4, 4, 3\); \(H, W\)"),
        ([Image.new("RGB", (4, 4)), 5], "image 1: an object of type int is no picture. Pass a path"),
        (b"<html>", r"image 0: the file is a web page \(HTML\)"),
    ],
)
def test_what_is_no_image_is_refused(run, images, message):
    with pytest.raises(ValueError, match=message):
        FeatureExtractor.from_checkpoint(run[0], device="cpu")(images)


def test_missing_files(run, tmp_path):
    extractor = FeatureExtractor.from_checkpoint(run[0], device="cpu")
    with pytest.raises(FileNotFoundError, match=r"none\.jpg: no such image or folder"):
        extractor(tmp_path / "none.jpg")
    with pytest.raises(FileNotFoundError, match="there is no image below this folder"):
        extractor(tmp_path)
    with pytest.raises(FileNotFoundError, match="no checkpoint was found"):
        FeatureExtractor.from_checkpoint(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"none\.pth does not exist"):
        FeatureExtractor.from_checkpoint(tmp_path / "none.pth")


def test_a_file_that_is_no_checkpoint(tmp_path):
    torch.save({"state_dict": {}}, tmp_path / "foreign.pth")
    with pytest.raises(ValueError, match=r"foreign\.pth is not a checkpoint of this framework"):
        load_run(tmp_path / "foreign.pth")
