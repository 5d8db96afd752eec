"""What users do to a run, from the outside: each case ends in a clear message, or trains all the same."""

import logging
import os

import numpy as np
import pytest
from PIL import Image

from fastreid_uns.config import load_config
from fastreid_uns.engine.default import DefaultTrainer


@pytest.fixture
def heard(caplog):
    """Messages of the package, whatever a test before has set up."""
    logger = logging.getLogger("fastreid_uns")
    logger.addHandler(caplog.handler)
    caplog.set_level(logging.INFO, logger="fastreid_uns")
    yield caplog
    logger.removeHandler(caplog.handler)


@pytest.fixture
def photos(tmp_path):
    """A folder of ten noisy photographs."""
    folder = tmp_path / "photos"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for i in range(10):
        Image.fromarray(rng.integers(0, 255, (32, 16, 3), dtype=np.uint8)).save(folder / f"{i}.jpg")
    return folder


def config(tiny, photos, *changes: str):
    unlabelled = [f"DATASETS.TRAIN={{NAME: folder, ROOT: {photos}}}", "DATASETS.TESTS.synthetic=null"]
    small = ["PSEUDO_LABELS.MIN_SAMPLES=1", "PSEUDO_LABELS.K1=4", "PSEUDO_LABELS.K2=1", "SOLVER.EPOCHS=1"]
    return load_config(overrides=[*tiny, *unlabelled, *small, *changes])


def train(cfg) -> DefaultTrainer:
    trainer = DefaultTrainer(cfg)
    trainer.train()
    return trainer


def cut(file) -> None:
    file.write_bytes(file.read_bytes()[:400])


def test_a_truncated_image_stops_the_run_before_the_first_epoch(tiny, photos):
    cut(photos / "3.jpg")
    with pytest.raises(ValueError, match=r"1 of 10 images cannot.*3\.jpg.*fastreid-uns check.*ON_BAD_IMAGE: skip"):
        DefaultTrainer(config(tiny, photos))


def test_a_truncated_image_is_left_out_with_a_count(tiny, photos, heard):
    cut(photos / "3.jpg")
    trainer = train(config(tiny, photos, "INPUT.ON_BAD_IMAGE=skip"))
    assert trainer.train_set.num_images == 9
    assert "1 of 10 images cannot be read" in heard.text


def test_fewer_images_than_a_batch_and_clusters_of_one_image(tiny, photos):
    trainer = train(config(tiny, photos, "PSEUDO_LABELS.EPS=0.001"))
    assert trainer.metrics["clusters"] == 10
    assert trainer.batch_size == 16


def test_fewer_images_than_neighbours(tiny, photos):
    with pytest.warns(UserWarning, match="K1"):
        trainer = train(config(tiny, photos, "PSEUDO_LABELS.K1=30"))
    assert trainer.epochs_done == 1


def test_equal_images_are_one_cluster_and_the_log_says_so(tiny, photos, heard):
    for i in range(10):
        Image.new("RGB", (16, 32), "red").save(photos / f"{i}.jpg")
    trainer = train(config(tiny, photos, "PSEUDO_LABELS.K1=10"))
    assert trainer.metrics["clusters"] == 1
    assert "are in one cluster, there is nothing to tell apart; lower EPS" in heard.text


def test_an_empty_folder(tiny, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="no image below this folder"):
        DefaultTrainer(config(tiny, tmp_path / "empty"))


def test_a_test_set_without_queries(tiny, photos):
    test = f"DATASETS.TESTS.mine={{NAME: folder, ROOT: {photos}}}"
    with pytest.raises(ValueError, match=r"DATASETS\.TESTS\.mine: folder has 0 query and 0 gallery images"):
        DefaultTrainer(config(tiny, photos, test))


@pytest.mark.parametrize(("cameras", "reason"), [("0,0", "camera"), ("0,1", None)])
def test_queries_whose_matches_are_all_from_their_own_camera(tiny, photos, cameras, reason):
    first, second = cameras.split(",")
    rows = [f"{i}.jpg,{i % 2},{first if i < 4 else second},{'query' if i < 4 else 'gallery'}" for i in range(10)]
    (photos / "manifest.csv").write_text("\n".join(["path,identity,camera,split", *rows]))
    test = f"DATASETS.TESTS.mine={{NAME: csv_file, PATH: {photos / 'manifest.csv'}, PROTOCOL: cross_camera}}"
    cfg = config(tiny, photos, test)
    if reason is None:
        assert train(cfg).results["mine"]["queries"] == 4
    else:
        with pytest.raises(ValueError, match=r"0 of 4 queries have a match.*own camera.*protocol .plain."):
            DefaultTrainer(cfg)


def test_an_unknown_view(tiny, photos):
    with pytest.raises(KeyError, match=r"INPUT\.VIEWS: 'strong' is no preset of INPUT\.AUGMENTS; known: train"):
        DefaultTrainer(config(tiny, photos, "INPUT.VIEWS=[strong]"))


def test_a_batch_that_does_not_divide(tiny, photos):
    with pytest.raises(ValueError, match=r"BATCH_SIZE 18 is no multiple of NUM_INSTANCES x processes \(4 x 1\)"):
        DefaultTrainer(config(tiny, photos, "DATALOADER.SAMPLER.BATCH_SIZE=18"))


@pytest.mark.parametrize("own", [2, 4])
def test_queries_that_are_in_the_gallery_are_told_before_training(tiny, photos, heard, own):
    """Half of them is a warning; more is no score."""
    rows = [f"{i}.jpg,{i},{split}" for i in range(4) for split in ("query", "gallery")]
    rows[1::2] = [f"{i if i < own else i + 4}.jpg,{i},gallery" for i in range(4)]
    (photos / "manifest.csv").write_text("\n".join(["path,identity,split", *rows]))
    cfg = config(tiny, photos, f"DATASETS.TESTS.mine={{NAME: csv_file, PATH: {photos / 'manifest.csv'}}}")
    if own == 4:
        with pytest.raises(ValueError, match=r"4 of 4 queries are in the gallery themselves"):
            DefaultTrainer(cfg)
    else:
        DefaultTrainer(cfg)
        assert "2 of 4 queries are in the gallery themselves" in heard.text


def test_pictures_that_are_passed_over_are_counted_before_training(tiny, photos, heard):
    (photos / "a.HEIC").touch()
    os.mkfifo(photos / "b.jpg")
    trainer = DefaultTrainer(config(tiny, photos))
    assert len(trainer.train_set.records) == 10
    assert "2 passed over: 1 .heic, 1 pipe, socket or device." in heard.text
