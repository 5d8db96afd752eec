"""Images in the style of other cameras: what they show, and that nothing but the seed decides which."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import stats

from fastreid_uns.config import load_config
from fastreid_uns.data.augment import Augment
from fastreid_uns.data.camera_style import CameraStyle, ColourStyle, GeneratedStyle, generated_images
from fastreid_uns.data.image_set import ImageSet
from fastreid_uns.data.loader import TrainLoader
from fastreid_uns.data.pixel_cache import CachedImageSet
from fastreid_uns.data.samplers import ClusterSampler, JointSampler, RandomSampler
from fastreid_uns.data.train_set import TrainSet
from fastreid_uns.engine.default import DefaultTrainer
from fastreid_uns.structures import Batch, PseudoLabels, Record

SIZE = (16, 8)
PLAIN = {"flip": 0.0, "pad": 0, "erase": 0.0}
CAMERAS = [0, 1, 3, 0, 1, 3, 3, 0, 1, 0, -1, 3]  # no camera 2; the camera of image 10 is unknown
COUNT = len(CAMERAS)


def save(folder: Path, arrays: list[np.ndarray], cameras: list[int]) -> list[Record]:
    for i, array in enumerate(arrays):
        Image.fromarray(array).save(folder / f"{i:02d}.png")
    return [Record(str(folder / f"{i:02d}.png"), -1, camera) for i, camera in enumerate(cameras)]


def fake_name(record: Record, other: int) -> str:
    return f"{Path(record.path).stem}_fake_{record.camera + 1}to{other + 1}.jpg"


@pytest.fixture(scope="module")
def records(tmp_path_factory) -> list[Record]:
    """Twelve images of colours that differ from camera to camera, and none of them near black or white."""
    rng = np.random.default_rng(0)
    arrays = []
    for camera in CAMERAS:
        tint, contrast = np.array([[90, 120, 130], [140, 110, 100], [0, 0, 0], [120, 130, 90]])[camera], 6 + 3 * camera
        arrays.append(rng.normal(tint, contrast, (*SIZE, 3)).clip(0, 255).round().astype(np.uint8))
    return save(tmp_path_factory.mktemp("images"), arrays, CAMERAS)


@pytest.fixture(scope="module")
def fakes(records, tmp_path_factory) -> Path:
    """Generated pictures; that of image i in the style of camera c is grey of the value 20 i + 5 c."""
    folder = tmp_path_factory.mktemp("fakes")
    for i, record in enumerate(records):
        for other in {0, 1, 3} - {record.camera}:
            if record.camera >= 0:
                grey = np.full((*SIZE, 3), 20 * i + 5 * other, np.uint8)
                Image.fromarray(grey).save(folder / fake_name(record, other), quality=100)
    return folder


def style_of(kind: str, images: ImageSet, fakes: Path, cached: bool = False, workers: int = 0) -> CameraStyle:
    if kind == "colors":
        return ColourStyle(TrainSet(images))
    found, origins = generated_images(images.records, str(fakes))
    pictures = ImageSet(found, SIZE, workers=workers)
    return GeneratedStyle(TrainSet(images), CachedImageSet(pictures) if cached else pictures, origins)


def batches(
    images: ImageSet, style: CameraStyle | None, views: list[Augment], rank: int = 0, world: int = 1, epochs=(0, 1)
) -> list[Batch]:
    sampler = RandomSampler(4, 5, rank, world, batch_size=6)
    train_set = TrainSet(images)
    train_set.pseudo = PseudoLabels(torch.arange(COUNT) % 4, torch.zeros(4, 2))
    loader = TrainLoader(train_set, sampler, views, seed=5, device="cpu", style=style)
    found = []
    for epoch in epochs:
        loader.plan(epoch)
        found += loader.epoch(epoch)
    return found


def assert_equal(first: list[Batch], second: list[Batch]) -> None:
    for a, b in zip(first, second, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a.views, b.views, strict=True))
        assert torch.equal(a.index, b.index)


def opponent(rgb: np.ndarray) -> np.ndarray:
    """(...,3) grey, red against blue, green against both; at right angles and of unit length."""
    red, green, blue = rgb[..., 0], rgb[..., 1], rgb[..., 2]
    axes = [
        (red + green + blue) / math.sqrt(3),
        (red - blue) / math.sqrt(2),
        (red - 2 * green + blue) / math.sqrt(6),
    ]
    return np.stack(axes, axis=-1)


def rgb(coordinates: np.ndarray) -> np.ndarray:
    grey, warm, green = coordinates[..., 0], coordinates[..., 1], coordinates[..., 2]
    channels = [
        grey / math.sqrt(3) + warm / math.sqrt(2) + green / math.sqrt(6),
        grey / math.sqrt(3) - 2 * green / math.sqrt(6),
        grey / math.sqrt(3) - warm / math.sqrt(2) + green / math.sqrt(6),
    ]
    return np.stack(channels, axis=-1)


def shown(style: CameraStyle, images: ImageSet, index: list[int], wanted: list[int]) -> torch.Tensor:
    """uint8 (B,3,H,W): the images in the wanted styles."""
    (views,) = style.stream([index], [torch.tensor([wanted])], images.stream([index], "cpu"), torch.device("cpu"))
    return views[0]


def test_colours_equal_the_plain_form(records):
    images = ImageSet(records, SIZE)
    style = ColourStyle(TrainSet(images))
    assert style.numbers == [0, 1, 3]
    pixels = [opponent(np.asarray(Image.open(record.path), np.float64)) for record in records]
    of_camera = {
        c: np.concatenate([p.reshape(-1, 3) for p, d in zip(pixels, CAMERAS, strict=True) if d == c]) for c in (0, 1, 3)
    }
    for place, other in enumerate((0, 1, 3)):
        for i in (0, 1, 2, 11):
            own, target = of_camera[CAMERAS[i]], of_camera[other]
            expected = (pixels[i] - own.mean(0)) * target.std(0) / own.std(0) + target.mean(0)
            found = shown(style, images, [i], [place])[0].permute(1, 2, 0).numpy()
            assert np.abs(found - rgb(expected).clip(0, 255)).max() <= 0.51


def test_two_greys_worked_by_hand(tmp_path):
    """Camera 0 shows 100 and 120, camera 1 shows 50 and 130: 100 becomes 50, 120 becomes 130, and back."""
    halves = [
        np.repeat([[low, high]], 16, 0).repeat(4, 1)[..., None].repeat(3, 2) for low, high in ((100, 120), (50, 130))
    ]
    images = ImageSet(save(tmp_path, [half.astype(np.uint8) for half in halves], [0, 1]), SIZE)
    found = shown(ColourStyle(TrainSet(images)), images, [0, 1], [1, 0])
    assert torch.equal(found[0], images[1])
    assert torch.equal(found[1], images[0])


def test_a_camera_without_contrast_takes_the_mean_of_the_other_and_colours_stay_in_range(tmp_path):
    steep = np.zeros((*SIZE, 3), np.uint8)
    steep[:8] = [250, 10, 10]
    images = ImageSet(save(tmp_path, [np.full((*SIZE, 3), 77, np.uint8), steep], [0, 1]), SIZE)
    found = shown(ColourStyle(TrainSet(images)), images, [0, 1], [1, 0])
    # half of the pixels of camera 1 are 250, 10, 10, half are black
    assert torch.equal(found[0], torch.tensor([125, 5, 5], dtype=torch.uint8).view(3, 1, 1).expand(3, *SIZE))
    # its spread shrinks to an eighth, the most that is allowed, around 77
    assert sorted(found[1, 0].unique().tolist()) == [61, 93]


def test_colours_do_not_depend_on_the_cache_and_leave_the_images_alone(records, fakes, tmp_path):
    decoded = ImageSet(records, SIZE)
    cached = CachedImageSet(ImageSet(records, SIZE))
    assert cached.check() == {}
    kept = cached.pixels.clone()
    found = [shown(ColourStyle(TrainSet(images)), images, [0, 4, 2], [1, 2, 0]) for images in (decoded, cached)]
    assert torch.equal(*found)
    assert not torch.equal(found[0], kept[[0, 4, 2]])
    assert torch.equal(cached.pixels, kept)


def test_other_cameras_are_chosen_alike_and_the_own_never(records, fakes):
    images = ImageSet(records, SIZE)
    style = style_of("images", images, fakes)
    draws = torch.rand((2, 30_000), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for image, others in ((0, [1, 2]), (1, [0, 2]), (2, [0, 1])):
        chosen = style.choose(torch.full((30_000,), image), draws, 0.3)
        changed = chosen[chosen >= 0]
        assert abs(len(changed) / 30_000 - 0.3) < 4 * math.sqrt(0.3 * 0.7 / 30_000)
        assert changed.unique().tolist() == others
        assert stats.chisquare(changed.bincount(minlength=3)[others].numpy()).pvalue > 1e-3
    assert (style.choose(torch.full((30_000,), 10), draws, 1.0) == -1).all()  # its camera is unknown
    assert (style.choose(torch.zeros(30_000, dtype=torch.int64), draws, 0.0) == -1).all()


def test_the_picture_of_the_image_and_the_camera_is_shown(records, fakes):
    """Each value names the image and the camera, see `fakes`."""
    images = ImageSet(records, SIZE)
    plain = torch.stack([images[i] for i in range(COUNT)])
    seen = set()
    for batch in batches(
        images, style_of("images", images, fakes), [Augment(camera_style=0.7, **PLAIN)] * 2, epochs=range(6)
    ):
        for view in batch.views:
            for index, camera, picture in zip(batch.index.tolist(), batch.cameras.tolist(), view, strict=True):
                levels = (picture * 255).round().byte()
                if torch.equal(levels, plain[index]):
                    seen.add((index, camera))
                    continue
                assert len(levels.unique()) == 1
                other, rest = divmod(int(levels.flatten()[0]) - 20 * index, 5)
                assert rest == 0
                assert other in {0, 1, 3} - {camera}
                seen.add((index, other))
    assert seen == {(i, c) for i in range(COUNT) for c in (0, 1, 3) if CAMERAS[i] >= 0} | {(10, -1)}


@pytest.mark.parametrize("kind", ["colors", "images"])
def test_cache_workers_and_resume_change_nothing(records, fakes, kind):
    views = [Augment(camera_style=0.5, pad=3), Augment(camera_style=0.5, **PLAIN)]

    def run(workers: int = 0, cached: bool = False, epochs=(0, 1)) -> list[Batch]:
        images = ImageSet(records, SIZE, workers=workers)
        images = CachedImageSet(images) if cached else images
        return batches(images, style_of(kind, images, fakes, cached, workers), views, epochs=epochs)

    expected = run()
    assert_equal(run(workers=2), expected)
    assert_equal(run(cached=True), expected)
    assert_equal(run(epochs=(1,)), expected[4:])  # a run that begins with epoch 1
    assert not any(torch.equal(*batch.views) for batch in expected)


@pytest.mark.parametrize("kind", ["colors", "images"])
def test_slices_of_two_processes_make_up_the_batch_of_one(records, fakes, kind):
    images = ImageSet(records, SIZE)
    views = [Augment(camera_style=0.5, **PLAIN)] * 2
    whole, *halves = (
        batches(images, style_of(kind, images, fakes), views, rank, world) for rank, world in ((0, 1), (0, 2), (1, 2))
    )
    for half, rows in zip(halves, (slice(0, 3), slice(3, 6)), strict=True):
        for batch, part in zip(whole, half, strict=True):
            assert torch.equal(batch.index[rows], part.index)
            assert all(torch.equal(view[rows], own) for view, own in zip(batch.views, part.views, strict=True))


def test_a_view_without_styles_is_that_of_a_loader_without_them(records, fakes):
    images = ImageSet(records, SIZE)
    views = [Augment(pad=3), Augment(camera_style=1.0, pad=3)]
    for kind in ("colors", "images"):
        found = batches(images, style_of(kind, images, fakes), views)
        without = batches(images, None, [Augment(pad=3)] * 2)
        for batch, other in zip(found, without, strict=True):
            assert torch.equal(batch.views[0], other.views[0])
            assert not torch.equal(batch.views[1], other.views[1])


def test_images_of_labelled_sources_stay_as_they_are(records):
    """Eight unlabelled images, then four of a source, whose cameras are others."""
    images = ImageSet(records, SIZE)
    classes, domains = torch.tensor([-1] * 8 + [0, 0, 1, 1]), torch.tensor([0] * 8 + [1] * 4)
    train_set = TrainSet(images, domains=domains, classes=classes)
    sampler = JointSampler(
        RandomSampler(4, 5, 0, 1, batch_size=4),
        [ClusterSampler(4, 5, 0, 1, batch_size=4, num_instances=2)],
        train_set,
    )
    views, style = [Augment(camera_style=1.0, **PLAIN)], ColourStyle(train_set)
    loader = TrainLoader(train_set, sampler, views, seed=0, device="cpu", style=style)
    train_set.pseudo = PseudoLabels(torch.arange(8) % 2, torch.zeros(2, 2))
    loader.plan(0)
    for batch in loader.epoch(0):
        levels = (batch.views[0] * 255).round().byte()
        for index, picture in zip(batch.index.tolist(), levels, strict=True):
            assert torch.equal(picture, images[index]) == (index >= 8)


def test_names_of_either_form_are_found(records, tmp_path):
    """`<stem>_fake_<other>.jpg` names the camera of the style alone."""
    two = [records[0], records[1]]
    for name in ("00_fake_1to2.jpg", "01_fake_1.jpg", "notes.txt"):
        (tmp_path / name).touch()
    found, origins = generated_images(two, str(tmp_path))
    assert [(Path(r.path).name, r.camera) for r in found] == [("00_fake_1to2.jpg", 1), ("01_fake_1.jpg", 0)]
    assert origins.tolist() == [0, 1]


def test_what_is_missing_is_named_with_the_way_out(records, fakes, tmp_path):
    instead = r"INPUT\.CAMERA_STYLE\.KIND: colors needs no files"
    with pytest.raises(ValueError, match=rf"INPUT\.CAMERA_STYLE\.FOLDER is empty.*{instead}"):
        generated_images(records, "")
    with pytest.raises(FileNotFoundError, match=rf"there is no folder .*nowhere.*{instead}"):
        generated_images(records, str(tmp_path / "nowhere"))
    with pytest.raises(
        FileNotFoundError, match=rf"22 of 22 pictures are missing in .*00_fake_1to2\.jpg, 00_fake_1to4\.jpg.*{instead}"
    ):
        generated_images(records, str(tmp_path))
    with pytest.raises(ValueError, match=r"1 names of training images occur more than once, the first: 00; "):
        generated_images([*records, Record("elsewhere/00.png", -1, 1)], str(fakes))
    with pytest.raises(ValueError, match=r"CAMERA_STYLE is 1\.5; a probability"):
        Augment(camera_style=1.5)
    images = ImageSet(records, SIZE)
    with pytest.raises(ValueError, match="train loader: a view has CAMERA_STYLE above 0 but no style is given"):
        batches(images, None, [Augment(camera_style=0.5)])


@pytest.mark.parametrize(("cameras", "found"), [([-1] * 4, "no camera at all"), ([2, 2, -1, 2], "camera 2 only")])
def test_too_few_cameras_are_refused(records, cameras, found):
    images = ImageSet([record._replace(camera=c) for record, c in zip(records, cameras, strict=False)], SIZE)
    with pytest.raises(ValueError, match=rf"of the 4 training images {found} is known.*Set CAMERA_STYLE to 0"):
        ColourStyle(TrainSet(images))


def config(tiny: list[str], **keys: object):
    return load_config(overrides=[*tiny, *(f"{key}={json.dumps(value)}" for key, value in keys.items())])


def test_a_config_brings_either_kind_or_none(tiny, tmp_path):
    preset, section = "INPUT.AUGMENTS.train.CAMERA_STYLE", "INPUT.CAMERA_STYLE"
    assert DefaultTrainer(config(tiny)).train_loader.style is None
    trainer = DefaultTrainer(config(tiny, **{preset: 0.5}))
    assert type(trainer.train_loader.style) is ColourStyle
    with pytest.raises(ValueError, match=r"KIND is 'hues'; one of colors, images is accepted"):
        config(tiny, **{f"{section}.KIND": "hues"})
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        DefaultTrainer(config(tiny, **{preset: 0.5, f"{section}": {"KIND": "images", "FOLDER": str(tmp_path / "no")}}))

    (tmp_path / "fakes").mkdir()
    records = trainer.train_set.records
    for record in records:
        for other in set(trainer.train_loader.style.numbers) - {record.camera}:
            Image.new("RGB", (16, 32)).save(tmp_path / "fakes" / fake_name(record, other))
    broken = tmp_path / "fakes" / fake_name(records[3], 0 if records[3].camera else 1)
    broken.write_bytes(b"no image")
    keys = {preset: 1.0, section: {"KIND": "images", "FOLDER": str(tmp_path / "fakes")}}
    with pytest.raises(ValueError, match=r"INPUT\.CAMERA_STYLE\.FOLDER: 1 of 192 images cannot be read"):
        DefaultTrainer(config(tiny, **keys))
    for cache in ("none", "host", "disk"):
        changes = {"INPUT.ON_BAD_IMAGE": "skip", "DATALOADER.CACHE": cache}
        style = DefaultTrainer(config(tiny, **keys, **changes)).train_loader.style
        assert type(style) is GeneratedStyle
        assert len(style.images) == 191
        # all pictures are black but the one that is left out
        images = trainer.train_loader.images
        every = list(range(len(records)))
        wanted = [style.numbers.index(0 if record.camera else 1) for record in records]
        found = shown(style, images, every, wanted)
        assert [i for i in every if found[i].any()] == [3]
        assert torch.equal(found[3], images[3])


@pytest.mark.gpu
def test_cpu_and_gpu_show_the_same(records, fakes):
    host = CachedImageSet(ImageSet(records, SIZE))
    device = CachedImageSet(ImageSet(records, SIZE), where="device", device="cuda")
    index, wanted = [0, 4, 2, 10], torch.tensor([[1, 2, -1, -1], [-1, -1, -1, -1]])
    for on_host, on_device in (
        (ColourStyle(TrainSet(host)), ColourStyle(TrainSet(device), device="cuda")),
        (style_of("images", host, fakes), style_of("images", device, fakes, cached=True)),
    ):
        (expected,) = on_host.stream([index], [wanted], host.stream([index], "cpu"), torch.device("cpu"))
        cuda = torch.device("cuda")
        (found,) = on_device.stream([index], [wanted], device.stream([index], cuda), cuda)
        assert all(torch.equal(a, b.cpu()) for a, b in zip(expected, found, strict=True))
