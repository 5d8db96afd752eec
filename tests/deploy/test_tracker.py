"""The tracker of DEPLOY.md keeps the numbers of individuals that move, cross and are hidden for a while."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

from fastreid_uns.predictor import FeatureExtractor

PAGE = Path(__file__).parents[2] / "DEPLOY.md"
FRAMES, HIDDEN = 24, range(8, 15)


@pytest.fixture(scope="module")
def tracker_class() -> type:
    (code,) = re.findall(r"^```python title=track\.py\n(.*?)^```$", PAGE.read_text(), re.MULTILINE | re.DOTALL)
    names: dict = {}
    exec(compile(code, "track.py", "exec"), names)
    return names["Tracker"]


@pytest.fixture
def extractor(make_run, tmp_path) -> FeatureExtractor:
    return FeatureExtractor.from_checkpoint(make_run(tmp_path), device="cpu")


def scene(individuals: np.ndarray, time: int, random: np.random.Generator):
    """A noisy frame, boxes in random order, and whom they show; the third one is hidden for a while.

    All move to the right and come in again on the left, so that each is once where each other one was.
    """
    count, height, width = individuals.shape[:3]
    frame = random.integers(0, 256, (height + 10, 40 * (count + 1), 3), dtype=np.uint8)
    shown = [one for one in range(count) if not (one == 2 and time in HIDDEN)]
    boxes = {}
    for one in shown:
        light = random.uniform(0.85, 1.15)
        noisy = individuals[one] * light + random.normal(0, 8, individuals[one].shape)
        x, y = (40 * one + 9 * time) % (40 * count), 2 * one
        frame[y : y + height, x : x + width] = np.clip(noisy, 0, 255).astype(np.uint8)
        boxes[one] = (x, y, x + width, y + height)
    order = random.permutation(shown)
    return frame, np.array([boxes[one] for one in order]), order


def test_individuals_keep_their_numbers(tracker_class, extractor, pictures):
    individuals, random = pictures(5, 3), np.random.default_rng(0)
    tracker, numbers = tracker_class(extractor), {}
    for time in range(FRAMES):
        frame, boxes, shown = scene(individuals, time, random)
        for one, number in zip(shown.tolist(), tracker.update(frame, boxes).tolist(), strict=True):
            numbers.setdefault(one, set()).add(number)
    assert {one: len(found) for one, found in numbers.items()} == dict.fromkeys(range(5), 1)
    assert set.union(*numbers.values()) == set(range(5))


def test_a_frame_without_detections_changes_nothing(tracker_class, extractor, pictures):
    tracker = tracker_class(extractor)
    frame = np.concatenate(list(pictures(2, 4)), axis=1)
    assert tracker.update(frame, np.zeros((0, 4), int)).tolist() == []
    boxes = np.array([(0, 0, 32, 64), (32, 0, 64, 64)])
    assert tracker.update(frame, boxes).tolist() == [0, 1]
    assert tracker.update(frame, np.zeros((0, 4), int)).tolist() == []
    assert tracker.update(frame, boxes[::-1]).tolist() == [1, 0]
