import os
import shutil
from pathlib import Path

import pytest
import torch

from fastreid_uns.data.image_set import ImageSet
from fastreid_uns.data.train_set import TrainSet
from fastreid_uns.structures import PseudoLabels, Record


def table(domains=(0, 0, 0, 1, 1, 2), classes=(-1, -1, -1, 0, 1, 2)) -> TrainSet:
    images = ImageSet([Record(f"{i}.jpg", 7, i % 2) for i in range(6)], (8, 4))
    return TrainSet(images, domains=torch.tensor(domains), classes=torch.tensor(classes))


def test_rows_of_unlabelled_images_and_of_sources():
    train_set = table()
    assert (len(train_set), train_set.num_images, train_set.num_classes) == (6, 3, 3)
    assert train_set.source_classes.tolist() == [0, 1, 2]
    assert train_set.cameras.tolist() == [0, 1, 0, 1, 0, 1]
    assert [record.path for record in train_set.records] == [f"{i}.jpg" for i in range(6)]
    alone = TrainSet(train_set.images)
    assert (alone.num_images, alone.num_classes, alone.source_classes) == (6, 0, None)


def test_labels_of_the_epoch_and_their_numbers_in_a_batch():
    train_set = table()
    assert train_set.pseudo is None
    for labels, numbers in (([1, -1, 0], [4, -1, 3, 0, 1, 2]), ([0, 0, 1], [3, 3, 4, 0, 1, 2])):
        train_set.pseudo = PseudoLabels(torch.tensor(labels), torch.zeros(2, 4))
        assert train_set.labels.tolist() == labels
        assert train_set.batch_labels.tolist() == numbers


def test_what_does_not_fit_is_said():
    train_set = table()
    with pytest.raises(RuntimeError, match="train set: there are no labels yet"):
        train_set.labels  # noqa: B018
    with pytest.raises(ValueError, match=r"labels of shape \(2,\) for 3 unlabelled images"):
        train_set.pseudo = PseudoLabels(torch.tensor([0, 0]), torch.zeros(1, 4))
    with pytest.raises(ValueError, match="6 images, 5 domains and 6 classes"):
        table(domains=(0, 0, 0, 1, 1))
    odd = [((0, 1, 0, 0, 0, 0), (-1, 0, -1, -1, -1, -1)), ((0,) * 6, (0,) + (-1,) * 5), ((1,) * 6, (-1,) * 6)]
    for domains, classes in odd:
        with pytest.raises(ValueError, match="must come first"):
            table(domains, classes)


@pytest.fixture
def folder(tmp_path) -> Path:
    """Four files of equal size and equal time; what is in them need not be an image."""
    for name in ("train/a.jpg", "train/b.jpg", "train/c.jpg", "other/d.jpg"):
        file = tmp_path / "sets" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(name.encode() * 300)
        os.utime(file, ns=(1, 1))
    return tmp_path / "sets"


def fingerprint(folder: Path, camera: int = 0, identity: int = 5, kind: int = 0) -> str:
    """Of all files in `train`, unlabelled, and of `other/d.jpg`, a source image."""
    records = [Record(str(file), identity, camera) for file in sorted((folder / "train").iterdir())]
    count = len(records)
    images = ImageSet([*records, Record(str(folder / "other/d.jpg"), 3, 0)], (8, 4))
    classes = torch.tensor([-1] * count + [kind])
    return TrainSet(images, domains=torch.tensor([0] * count + [1]), classes=classes).fingerprint()


def exchange(folder: Path) -> None:
    first, second, aside = (folder / name for name in ("train/a.jpg", "train/b.jpg", "aside"))
    first.rename(aside)
    second.rename(first)
    aside.rename(second)


CHANGES = {
    "added": lambda folder: (folder / "train/e.jpg").write_bytes(b"e"),
    "removed": lambda folder: (folder / "train/c.jpg").unlink(),
    "renamed": lambda folder: (folder / "train/c.jpg").rename(folder / "train/d.jpg"),
    "replaced by one of the same size and time": lambda folder: shutil.copystat(
        folder / "train/a.jpg", shutil.copyfile(folder / "train/b.jpg", folder / "train/a.jpg")
    ),
    "names exchanged": exchange,
    "source replaced": lambda folder: (folder / "other/d.jpg").write_bytes(b"d"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_list_has_another_fingerprint(folder, change):
    before = fingerprint(folder)
    assert fingerprint(folder) == before
    CHANGES[change](folder)
    assert fingerprint(folder) != before


def test_the_fingerprint_stays_when_sets_move_and_knows_no_identity(folder, tmp_path):
    before = fingerprint(folder)
    moved = tmp_path / "elsewhere/deep"
    shutil.copytree(folder, moved)
    assert fingerprint(moved) == before
    assert fingerprint(folder, identity=8) == before
    assert fingerprint(folder, camera=1) != before
    assert fingerprint(folder, kind=2) != before


def test_a_file_that_is_gone_by_then_counts_as_a_change(folder):
    records = [Record(str(folder / "train/a.jpg"), -1, 0), Record(str(folder / "train/b.jpg"), -1, 0)]
    whole, broken = (TrainSet(ImageSet(records, (8, 4))) for _ in range(2))
    assert whole.fingerprint()
    (folder / "train/b.jpg").unlink()
    assert broken.fingerprint() != whole.fingerprint()
