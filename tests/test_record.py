"""The record of a run: killed anywhere, resumed, lengthened; nothing of it is lost or mixed up."""

from __future__ import annotations

import json
import logging

import numpy as np
import pytest
import torch
from PIL import Image

from fastreid_uns.config import load_config
from fastreid_uns.engine.default import DefaultTrainer
from fastreid_uns.engine.hooks import CheckpointHook
from fastreid_uns.engine.log import JsonWriter
from fastreid_uns.hook import HookBase
from fastreid_uns.utils import atomic, checkpoint

RECIPE = ["PSEUDO_LABELS.K1=8", "PSEUDO_LABELS.K2=3", "PSEUDO_LABELS.MIN_SAMPLES=2", "MODEL.BACKBONE.WIDTH=8"]
EPOCHS = 3


class Killed(BaseException):
    """In the place of SIGKILL: nothing of the run handles it."""


@pytest.fixture
def recipe(tiny) -> list[str]:
    return [*tiny, *RECIPE, f"SOLVER.EPOCHS={EPOCHS}", "TEST.PERIOD=1"]


def run(recipe: list[str], resume: bool = False) -> DefaultTrainer:
    trainer = DefaultTrainer(load_config(overrides=recipe))
    if resume:
        trainer.resume()
    trainer.train()
    return trainer


def record(folder) -> tuple[tuple[list[dict], list[str]], dict, dict]:
    """Metrics without times and names of the checkpoints, the newest one's weights and the best one's."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    lines = [{k: v for k, v in line.items() if not k.startswith("seconds")} for line in lines]
    last = checkpoint.load_checkpoint(checkpoint.last_checkpoint(folder))
    best = checkpoint.load_checkpoint(folder / checkpoint.BEST)
    names = sorted(file.name for file in folder.glob("*.pth"))
    return (lines, names), last["model"], {**best["model"], "epochs": torch.tensor(best["epochs_done"])}


def assert_equal_records(one, two) -> None:
    assert one[0] == two[0]
    for a, b in zip(one[1:], two[1:], strict=True):
        assert a.keys() == b.keys()
        assert [name for name in a if not torch.equal(a[name], b[name])] == []


MOMENTS = {
    "before the line": (JsonWriter, "epoch", False),
    "after the line": (JsonWriter, "epoch", True),
    "before the checkpoint": (checkpoint, "save_checkpoint", False),
    "after the checkpoint": (checkpoint, "save_checkpoint", True),
    "after the pointer": (checkpoint, "point_to_last", True),
    "after the best one": (checkpoint, "copy_checkpoint", True),
}


@pytest.fixture(scope="module")
def straight(tmp_path_factory, tiny_set):
    """The record of a run that nothing interrupted, by recipe."""
    made: dict[str, tuple] = {}

    def get(recipe: list[str]):
        folder = tmp_path_factory.mktemp("straight") / "run"
        if not made:
            made["record"] = record(run([*recipe, f"OUTPUT_DIR={folder}"]).folder)
        return made["record"]

    return get


@pytest.mark.parametrize("epoch", [1, 2])
@pytest.mark.parametrize("moment", MOMENTS)
def test_a_run_killed_at_any_line_of_its_record_goes_on_as_if_it_had_not(recipe, straight, monkeypatch, moment, epoch):
    """Killed in the second or the last of three epochs."""
    expected = straight(recipe)
    owner, name, after = MOMENTS[moment]
    original, calls = getattr(owner, name), []

    def killing(*args):
        calls.append(name)
        if len(calls) <= epoch:
            return original(*args)
        if after:
            original(*args)
        raise Killed

    monkeypatch.setattr(owner, name, killing)
    trainer = DefaultTrainer(load_config(overrides=recipe))
    try:
        trainer.train()
    except Killed:
        pass
    else:
        assert moment == "after the best one"  # not every epoch is better than those before
    monkeypatch.undo()
    assert_equal_records(record(run(recipe, resume=True).folder), expected)


@pytest.mark.parametrize("damage", ["half a line", "no file", "best gone", "pointer gone", "an old one left"])
def test_what_a_finished_run_has_lost_comes_back(recipe, straight, damage, caplog):
    expected = straight(recipe)
    folder = run(recipe).folder
    metrics = folder / "metrics.jsonl"
    if damage == "half a line":
        metrics.write_bytes(metrics.read_bytes()[:-30])
    elif damage == "no file":
        metrics.unlink()
    elif damage == "an old one left":
        (folder / "checkpoint_0001.pth").write_bytes((folder / "checkpoint_0003.pth").read_bytes())
    elif damage == "pointer gone":
        (folder / "last").unlink()
    elif checkpoint.load_checkpoint(folder / "best.pth")["epochs_done"] == EPOCHS:
        (folder / "best.pth").unlink()
    logging.getLogger("fastreid_uns").propagate = True
    caplog.set_level(logging.INFO)
    assert_equal_records(record(run(recipe, resume=True).folder), expected)
    assert f"is finished, all {EPOCHS} epochs are done. To train longer raise SOLVER.EPOCHS" in caplog.text


def test_the_best_file_is_written_again_where_the_newest_checkpoint_is_the_best(recipe):
    trainer = DefaultTrainer(load_config(overrides=recipe))
    trainer.hook(CheckpointHook).improved = lambda: True
    trainer.train()
    folder = trainer.folder
    whole = (folder / "best.pth").read_bytes()
    checkpoint.save_checkpoint({"model": {}, "config": ""}, folder / "best.pth")
    run(recipe, resume=True)
    assert (folder / "best.pth").read_bytes() == whole


@pytest.fixture
def photos(tmp_path, recipe):
    """A recipe on a folder of 12 images, and the folder."""
    folder = tmp_path / "photos"
    folder.mkdir()
    for i in range(12):
        Image.new("RGB", (16, 32), (20 * i, 10, 255 - 20 * i)).save(folder / f"{i:02d}.png")
    keys = [f"DATASETS.TRAIN={{NAME: folder, ROOT: {folder}}}", "DATASETS.TESTS.synthetic=null"]
    small = ["PSEUDO_LABELS.MIN_SAMPLES=1", "PSEUDO_LABELS.K1=4", "PSEUDO_LABELS.K2=1", "SOLVER.EPOCHS=1"]
    return [*recipe, *keys, *small], folder


def test_other_images_are_refused_and_a_moved_folder_is_not(photos, tmp_path):
    recipe, folder = photos
    run(recipe)
    folder.rename(tmp_path / "moved")
    moved = [key.replace(str(folder), str(tmp_path / "moved")) for key in recipe]
    run(moved, resume=True)
    first, second = (tmp_path / "moved" / name for name in ("00.png", "01.png"))
    one, two = first.read_bytes(), second.read_bytes()
    first.write_bytes(two)
    second.write_bytes(one)
    with pytest.raises(ValueError, match=r"made with other training images.*Restore the images.*MODEL\.WEIGHTS"):
        run(moved, resume=True)


def test_a_checkpoint_of_today_without_the_new_entries_still_resumes(recipe):
    folder = run([*recipe, "SOLVER.EPOCHS=2"]).folder
    file = checkpoint.last_checkpoint(folder)
    old = torch.load(file, weights_only=True)
    for key in ("history", "images", "is_best"):
        del old[key]
    torch.save(old, file)
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    assert run([*recipe, "SOLVER.EPOCHS=3"], resume=True).epochs_done == 3
    assert (folder / "metrics.jsonl").read_text().splitlines()[:2] == lines


def test_weights_without_the_state_of_a_run_are_named(recipe):
    folder = run([*recipe, "SOLVER.EPOCHS=1"]).folder
    file = checkpoint.last_checkpoint(folder)
    content = checkpoint.load_checkpoint(file)
    checkpoint.save_checkpoint({k: content[k] for k in ("model", "config", "num_images")}, file)
    with pytest.raises(ValueError, match=r"weights without the state of a run \(epochs_done, hooks, iter"):
        run(recipe, resume=True)


class Measures(HookBase):
    """Notes numbers of other libraries."""

    def after_epoch(self):
        self.trainer.metrics.update(a=np.float64(0.5), b=np.int64(3), c=torch.tensor(1.5), d=True)


def test_numbers_of_other_libraries_can_be_saved_and_read(recipe):
    trainer = DefaultTrainer(load_config(overrides=[*recipe, "SOLVER.EPOCHS=1"]))
    trainer.add_hook(Measures())
    trainer.train()
    line = json.loads((trainer.folder / "metrics.jsonl").read_text())
    saved = checkpoint.load_checkpoint(checkpoint.last_checkpoint(trainer.folder))["history"][0]
    assert [(name, line[name], saved[name]) for name in "abcd"] == [
        ("a", 0.5, 0.5),
        ("b", 3, 3),
        ("c", 1.5, 1.5),
        ("d", 1, 1),
    ]


def test_what_a_killed_save_left_goes_with_the_next_one(tmp_path):
    (tmp_path / ".a[1].pth.0123.part").write_bytes(b"half a file")
    (tmp_path / ".b.pth.0123.part").write_bytes(b"of another one")
    with atomic.replacing(tmp_path / "a[1].pth") as stream:
        stream.write(b"whole")
    assert sorted(file.name for file in tmp_path.iterdir()) == [".b.pth.0123.part", "a[1].pth"]


@pytest.mark.parametrize("schedule", ["step", "milestones", "constant"])
def test_a_run_that_is_made_longer_equals_one_that_was_long_from_the_start(recipe, tmp_path, schedule):
    """The rate decays where the short run ended."""
    keys = [f"SOLVER.SCHEDULE={schedule}", "SOLVER.STEP_EPOCHS=1", "SOLVER.MILESTONES=[1]", "SOLVER.WARMUP_EPOCHS=1"]
    long = run([*recipe, *keys, "SOLVER.EPOCHS=2", f"OUTPUT_DIR={tmp_path / 'long'}"])
    run([*recipe, *keys, "SOLVER.EPOCHS=1"])
    longer = run([*recipe, *keys, "SOLVER.EPOCHS=2"], resume=True)
    assert_equal_records(record(longer.folder), record(long.folder))


def test_a_length_that_does_not_fit_is_answered(recipe):
    keys = [*recipe, "SOLVER.SCHEDULE=cosine"]
    run([*keys, "SOLVER.EPOCHS=2"])
    with pytest.raises(ValueError, match=r"SOLVER\.EPOCHS: 2 -> 3\. The cosine schedule falls"):
        run([*keys, "SOLVER.EPOCHS=3"], resume=True)


def test_fewer_epochs_than_are_done_are_answered(recipe):
    run([*recipe, "SOLVER.EPOCHS=2"])
    with pytest.raises(ValueError, match=r"SOLVER\.EPOCHS is 1, but \S+0002\.pth has done 2 epochs; as many or more"):
        run([*recipe, "SOLVER.EPOCHS=1"], resume=True)
