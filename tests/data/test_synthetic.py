"""The generated set: what the knobs promise is counted on the files."""

from __future__ import annotations

import hashlib
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fastreid_uns.data.datasets.synthetic import generator as module
from fastreid_uns.data.datasets.synthetic import synthetic
from fastreid_uns.data.datasets.synthetic.render import Shot, Style, render
from fastreid_uns.structures import ReIDData

KNOBS = {
    "train_identities": 5,
    "train_images": 23,
    "test_identities": 4,
    "query_images": 9,
    "gallery_images": 31,
    "distractors": 6,
    "junk": 3,
    "cameras": 3,
    "size": [32, 16],
}


def files(root: Path) -> dict[str, str]:
    """Digest of each image below a root, by its path in the set."""
    return {
        "/".join(path.parts[-2:]): hashlib.md5(path.read_bytes()).hexdigest() for path in sorted(root.rglob("*.jpg"))
    }


def generate(root: Path, **knobs: object) -> ReIDData:
    return synthetic(root=str(root), **{**KNOBS, **knobs})


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("synthetic")


@pytest.fixture(scope="module")
def data(root) -> ReIDData:
    return generate(root)


def test_counts_are_those_of_the_knobs(data, root):
    assert (len(data.train), len(data.query), len(data.gallery)) == (23, 9, 31)
    assert data.protocol == "cross_camera"
    trained, queried = {r.identity for r in data.train}, {r.identity for r in data.query}
    assert (len(trained), len(queried)) == (5, 4)
    assert not trained & queried
    assert {r.identity for r in data.gallery} == queried | {0}
    assert sum(r.identity == 0 for r in data.gallery) == 6
    assert {r.camera for part in data[:3] for r in part} == {0, 1, 2}
    junk = list(root.glob("*/bounding_box_test/-1_*.jpg"))
    assert len(junk) == 3
    assert not {str(path) for path in junk} & {r.path for r in data.gallery}


def test_each_image_is_an_rgb_file_of_the_asked_size(data):
    for record in [*data.train, *data.query, *data.gallery]:
        with Image.open(record.path) as image:
            assert (image.mode, image.size) == ("RGB", (16, 32))


@pytest.mark.parametrize(
    "knobs",
    [
        {},
        {"cameras": 2, "query_images": 8},
        {"query_images": 4, "gallery_images": 14},
        {"train_images": 10, "query_images": 12, "gallery_images": 18},
    ],
)
def test_every_query_has_a_match_under_another_camera(tmp_path, knobs):
    data = generate(tmp_path, **knobs)
    seen = {(r.identity, r.camera) for r in data.gallery}
    for query in data.query:
        assert any(identity == query.identity and camera != query.camera for identity, camera in seen)
    assert max(Counter((r.identity, r.camera) for r in data.query).values()) == 1
    for identity in {r.identity for r in data.train}:
        assert len({r.camera for r in data.train if r.identity == identity}) >= 2


@pytest.mark.parametrize("kind", ["person", "vehicle"])
def test_the_same_knobs_give_the_same_bytes_and_another_seed_others(tmp_path, kind):
    for name, seed in (("one", 3), ("two", 3), ("other", 4)):
        generate(tmp_path / name, kind=kind, seed=seed)
    one, two, other = (files(tmp_path / name) for name in ("one", "two", "other"))
    assert len(one) == 23 + 9 + 31 + 3
    assert one == two
    assert not set(one.values()) & set(other.values())


def test_the_number_of_processes_changes_nothing(root, data, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "CHUNK", 7)
    generate(tmp_path, processes=2)
    assert files(tmp_path) == files(root)


def test_a_second_call_lists_and_draws_nothing(root, data, monkeypatch):
    def refuse(*_: object, **__: object) -> None:
        raise RuntimeError("drawn again")

    monkeypatch.setattr(module, "write_shots", refuse)
    assert generate(root) == data
    assert generate(root, processes=3) == data
    with pytest.raises(RuntimeError, match="drawn again"):
        generate(root, seed=1)


def test_an_interrupted_generation_leaves_nothing(tmp_path, monkeypatch):
    draw, calls = module.write_shots, []

    def interrupt(style, shots, folder):
        calls.append(draw(style, shots, folder))
        if len(calls) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(module, "CHUNK", 10)
    monkeypatch.setattr(module, "write_shots", interrupt)
    with pytest.raises(KeyboardInterrupt):
        generate(tmp_path)
    assert calls == [10, 10]
    assert list(tmp_path.iterdir()) == []


def test_two_ranks_that_draw_at_the_same_time_share_one_folder(tmp_path, monkeypatch):
    draw, others = module.write_shots, []

    def slow(style, shots, folder):
        if not others:  # another rank finishes while this one is drawing
            others.append(None)
            others[0] = generate(tmp_path)
        return draw(style, shots, folder)

    monkeypatch.setattr(module, "write_shots", slow)
    mine = generate(tmp_path)
    assert mine == others[0]
    assert len(list(tmp_path.iterdir())) == 1


def pixels(style: Style, **shot: object) -> np.ndarray:
    values = {"path": "", "identity": 7, "camera": 0, "tracklet": 0, "frame": 0, "box": "good"}
    return np.asarray(render(style, Shot(**{**values, **shot})), dtype=np.float32)


@pytest.mark.parametrize("kind", ["person", "vehicle"])
def test_an_identity_looks_more_like_itself_than_like_others(kind):
    style = Style(kind, 0.0, 0.0, 2, (64, 64), 1)
    middle = np.s_[16:48, 24:40]
    scenes = [(camera, tracklet) for camera in (0, 1) for tracklet in (0, 1, 2)]
    mean = {
        identity: np.stack(
            [pixels(style, identity=identity, camera=c, tracklet=t)[middle].mean((0, 1)) for c, t in scenes]
        )
        for identity in range(1, 9)
    }
    within = np.mean([np.linalg.norm(a - a.mean(0), axis=1).mean() for a in mean.values()])
    centres = np.stack([a.mean(0) for a in mean.values()])
    between = np.linalg.norm(centres - centres.mean(0), axis=1).mean()
    assert between > 2 * within


def test_camera_bias_drives_cameras_apart():
    def spread(bias: float) -> float:
        style = Style("person", 0.0, bias, 6, (64, 32), 2)
        colours = [
            np.mean([pixels(style, camera=c, tracklet=t).mean((0, 1)) for t in range(4)], axis=0) for c in range(6)
        ]
        return float(np.std(colours, axis=0).mean())

    assert spread(1.0) > 2 * spread(0.0)


def test_an_empty_box_shows_nobody():
    style = Style("person", 0.0, 0.0, 2, (64, 32), 0)
    empty, good = pixels(style, box="empty"), pixels(style)
    assert np.abs(empty - good)[20:40, 12:20].mean() > 20  # the trunk is missing
    assert np.abs(empty - good)[2:8, 0:3].mean() < 8  # a corner shows the scene in both


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        ({"kind": "dog"}, "kind is 'dog'; accepted is person or vehicle"),
        ({"train_identities": 0}, "train_identities is 0; accepted is 1 or more"),
        ({"test_identities": -1}, "test_identities is -1; accepted is 1 or more"),
        ({"cameras": 1}, "cameras is 1; accepted is 2 or more"),
        ({"seed": -1}, "seed is -1; accepted is 0 or more"),
        ({"junk": -1}, "junk is -1; accepted is 0 or more"),
        ({"distractors": -2}, "distractors is -2; accepted is 0 or more"),
        ({"processes": -1}, "processes is -1; accepted is 0 or more"),
        ({"difficulty": 1.5}, "difficulty is 1.5; accepted is 0 to 1"),
        ({"camera_bias": -0.1}, "camera_bias is -0.1; accepted is 0 to 1"),
        ({"size": [32]}, r"size is \[32\]; accepted is \[height, width\], each 16 or more"),
        ({"size": [32, 8]}, r"size is \[32, 8\]"),
        ({"train_images": 9}, "train_images is 9; accepted is 10 or more, two for each of 5 train_identities"),
        ({"query_images": 3}, "query_images is 3; accepted is 4 to 12"),
        ({"query_images": 13}, "query_images is 13; accepted is 4 to 12"),
        ({"gallery_images": 14}, "gallery_images is 14; accepted is 15 or more"),  # 3 + 2 + 2 + 2 places, 6 distractors
    ],
)
def test_a_knob_out_of_range_is_named_with_what_is_accepted(tmp_path, knobs, message):
    with pytest.raises(ValueError, match=message):
        generate(tmp_path, **knobs)
    assert list(tmp_path.iterdir()) == []
