"""What answers mean: transitive, free of contradictions, kept by the labels of any generator."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from fastreid_uns.errors import InvalidValue
from fastreid_uns.pseudo_labels.constraints import Answer, ConstrainedLabels, Constraints, read_answers
from fastreid_uns.pseudo_labels.dbscan import DBSCANLabels
from fastreid_uns.pseudo_labels.linkage import AverageLinkageLabels
from fastreid_uns.structures import FeatureBank


def same(a: int, b: int, origin: str = "an answer") -> Answer:
    return Answer(a, b, True, origin)


def different(a: int, b: int, origin: str = "an answer") -> Answer:
    return Answer(a, b, False, origin)


def test_must_links_are_transitive_and_pass_on_what_is_kept_apart():
    constraints = Constraints(8, [same(5, 3), same(3, 1), different(5, 7), different(7, 1), same(2, 6)])
    assert constraints.unit.tolist() == [0, 1, 2, 1, 4, 1, 2, 7]
    assert constraints.must.tolist() == [[1, 3], [1, 5], [2, 6]]
    assert constraints.cannot.tolist() == [[1, 7]]
    assert constraints
    assert not Constraints(8)


def test_a_direct_contradiction_names_both_answers():
    with pytest.raises(ValueError, match=r"line 3 \(different\) contradicts line 2 \(same\)"):
        Constraints(4, [same(0, 1, "line 2"), different(1, 0, "line 3")])


def test_a_contradiction_over_several_pairs_names_the_shortest_chain():
    answers = [
        same(0, 1, "A"),
        same(1, 2, "B"),
        same(2, 3, "C"),
        same(3, 4, "D"),
        same(0, 3, "E"),
        different(4, 0, "F"),
    ]
    with pytest.raises(ValueError, match=r"F \(different\) contradicts D \(same\) and E \(same\);"):
        Constraints(5, answers)


def test_an_image_cannot_differ_from_itself():
    with pytest.raises(ValueError, match="an image is the same as itself"):
        Constraints(2, [different(1, 1)])


def test_indices_outside_of_the_set_are_refused():
    with pytest.raises(ValueError, match="names images 1 and 2; 0 to 1 are accepted"):
        Constraints(2, [same(1, 2)])


def test_labels_are_merged_and_split():
    feats = F.normalize(torch.tensor([[1.0, 0], [1, 0.1], [0.9, 1], [1, 1], [0, 1], [0, 1.0], [-1, 0]]))
    labels = torch.tensor([0, 0, 0, 0, 1, 1, -1])
    assert Constraints(7).apply(labels, feats).tolist() == [0, 0, 0, 0, 1, 1, -1]
    assert Constraints(7, [same(3, 4)]).apply(labels, feats).tolist() == [0, 0, 0, 0, 0, 0, -1]
    assert Constraints(7, [same(0, 6)]).apply(labels, feats).tolist() == [0, 0, 0, 0, 1, 1, 0]
    # images 0 and 3 part; 1 goes with 0 and 2 with 3, which are nearer
    assert Constraints(7, [different(0, 3)]).apply(labels, feats).tolist() == [0, 0, 1, 1, 2, 2, -1]
    # the unit of 1 and 2 stays whole
    parts = Constraints(7, [different(0, 3), same(1, 2)]).apply(labels, feats)
    assert parts[1] == parts[2]
    assert parts[0] != parts[3]


def test_two_linked_outliers_make_a_cluster():
    feats = F.normalize(torch.randn(4, 3, generator=torch.Generator().manual_seed(0)))
    labels = torch.tensor([-1, 0, -1, -1])
    assert Constraints(4, [same(0, 3)]).apply(labels, feats).tolist() == [0, 1, -1, 0]


@pytest.mark.parametrize("seed", range(5))
def test_any_labels_keep_to_the_answers(seed):
    draw = torch.Generator().manual_seed(seed)
    truth = torch.randint(0, 5, (60,), generator=draw)
    pairs = torch.randint(0, 60, (50, 2), generator=draw).tolist()
    answers = [Answer(a, b, bool(truth[a] == truth[b])) for a, b in pairs if a != b]
    feats = F.normalize(torch.randn(60, 8, generator=draw))
    found = Constraints(60, answers).apply(torch.randint(-1, 3, (60,), generator=draw), feats)
    for answer in answers:
        a, b = found[answer.first], found[answer.second]
        assert (a == b and a >= 0) if answer.same else (a != b or a < 0)
    assert found.unique()[found.unique() >= 0].tolist() == list(range(int(found.max()) + 1))


@pytest.fixture(scope="module")
def bank() -> FeatureBank:
    """Four clear clusters of ten."""
    draw = torch.Generator().manual_seed(0)
    middle = F.normalize(torch.randn(4, 16, generator=draw)).repeat_interleave(10, 0)
    return FeatureBank(F.normalize(middle + 0.01 * torch.randn(40, 16, generator=draw)), torch.zeros(40))


@pytest.mark.parametrize(("kind", "k1"), [(DBSCANLabels, 10), (AverageLinkageLabels, [10])])
def test_a_generator_is_held_to_answers(kind, k1, bank):
    free = kind(k1=k1, k2=1)
    assert free(bank, 0).labels.tolist() == [0] * 10 + [1] * 10 + [2] * 10 + [3] * 10
    held = ConstrainedLabels(kind(k1=k1, k2=1), Constraints(40, [same(0, 19), different(20, 29)]))
    pseudo = held(bank, 0)
    labels = pseudo.labels.tolist()
    assert len(set(labels[:20])) == 1
    assert labels[20] != labels[29]
    assert pseudo.num_clusters == len(pseudo.centroids) == 4
    assert held.seconds


def test_labels_that_keep_to_the_answers_stay_the_same_object(bank):
    class Fixed(DBSCANLabels):
        def __call__(self, bank, epoch):
            self.given = super().__call__(bank, epoch)
            return self.given

    generator = Fixed(k1=10, k2=1)
    assert ConstrainedLabels(generator, Constraints(40, [same(0, 9)]))(bank, 0) is generator.given


PATHS = ["/photos/a/1.jpg", "/photos/b/1.jpg", "/photos/b/ü 2.jpg"]


def test_answers_come_from_a_file(tmp_path):
    file = tmp_path / "decisions.csv"
    file.write_text(
        "time,kind,first,second,answer\n"
        "1,pair,a/1.jpg,b/1.jpg,different\n"
        "2,pair,b/1.jpg,ü 2.jpg,unsure\n"
        "3,pair,a/1.jpg,ü 2.jpg,same\n"
        "4,undo,3,,\n"
        "5,pair,b/1.jpg,/photos/b/ü 2.jpg,same\n",
        encoding="utf-8",
    )
    first, second = read_answers([str(file)], PATHS)
    assert first == (0, 1, False, "decisions.csv row 1: a/1.jpg, b/1.jpg")
    assert second[:3] == (1, 2, True)


def test_answers_come_from_a_table():
    found = read_answers([["a/1.jpg", "b/1.jpg", "same"]], PATHS)
    assert found == [(0, 1, True, "PSEUDO_LABELS.DECISIONS[0]: a/1.jpg, b/1.jpg")]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (["a/1.jpg", "c.jpg", "same"], "'c.jpg' fits no image of the 3"),
        (["1.jpg", "a/1.jpg", "same"], "'1.jpg' fits 2 images"),
        (["a/1.jpg", "b/1.jpg", "sane"], "same, different, unsure are accepted"),
        (["a/1.jpg", "b/1.jpg"], "two images and one of"),
    ],
)
def test_answers_that_mean_nothing_are_refused(row, message):
    with pytest.raises(ValueError, match=message):
        read_answers([row], PATHS)


def test_a_file_that_cannot_be_read_is_refused(tmp_path):
    file = tmp_path / "decisions.csv"
    file.write_text("first,second\n")
    with pytest.raises(ValueError, match="column 'answer' is missing"):
        read_answers([str(file)], PATHS)
    file.write_text("kind,first,second,answer\nmerge,a,b,\n")
    with pytest.raises(ValueError, match="row 1 has kind 'merge'"):
        read_answers([str(file)], PATHS)
    with pytest.raises(FileNotFoundError, match="is missing; a CSV file is needed"):
        read_answers([str(tmp_path / "none.csv")], PATHS)


@pytest.mark.parametrize("source", [5, None, {"a": 1}, [1, 2, "same"], ["a", "b", ["same"]], ["a", "b"]])
def test_answers_that_are_none(source):
    with pytest.raises(InvalidValue, match=r"DECISIONS\[0\].* accepted\. Correct it"):
        read_answers([source], ["a", "b"])
