"""What the page shows after answers, and what windows that know less are told."""

from __future__ import annotations

import pytest

from fastreid_uns.errors import InvalidState, InvalidValue, UnknownName
from fastreid_uns.photos.decisions import Contradiction
from fastreid_uns.photos.members import Member
from fastreid_uns.photos.questions import doubtful_pairs
from fastreid_uns.photos.review import Review, Stale
from fastreid_uns.photos.store import PhotoRun
from fastreid_uns.photos.thumbnails import photo_id


@pytest.fixture
def review(small_run) -> Review:
    return Review(small_run)


def mark(review: Review, number: int) -> tuple[int, str]:
    return number, review.group(number)["mark"]


def members(review: Review, number: int) -> set[str]:
    return {photo["name"] for photo in review.group(number)["photos"]}


def test_the_summary_counts(review):
    found = review.summary()
    assert {name: found[name] for name in ("photos", "groups", "alone", "answered", "changes", "undo")} == {
        "photos": 10,
        "groups": 4,
        "alone": 1,
        "answered": 0,
        "changes": 0,
        "undo": None,
    }
    assert found["name"] == "my photos"
    assert "'" in found["resume"]  # the space in the name is quoted


def test_groups_come_in_pages_sorted_by_doubt_size_or_number(review):
    order = lambda by: [group["number"] for group in review.groups_page(1, by)["groups"]]  # noqa: E731
    assert order("doubt") == [1, 2, 4, 3]  # least certain: 0.3, 0.5, 0.7, 0.9
    assert order("size") == [1, 2, 4, 3]
    assert order("number") == [1, 2, 3, 4]
    assert [group["number"] for group in review.groups_page(1, "number", least=2)["groups"]] == [1, 2, 4]
    assert review.groups_page(99, "number")["page"] == 1
    with pytest.raises(UnknownName, match="doubt, size, number"):
        review.groups_page(1, "beauty")


def test_many_groups_come_in_pages(tmp_path):
    run = PhotoRun.create(tmp_path / "out", tmp_path)
    run.write_groups([Member(f"{i}.jpg", i, 1.0) for i in range(1, 61)])
    review = Review(run)
    pages = [[group["number"] for group in review.groups_page(page, "number")["groups"]] for page in (1, 2, 3)]
    assert [len(page) for page in pages] == [24, 24, 12]
    assert [number for page in pages for number in page] == list(range(1, 61))


def test_an_answer_closes_its_question_and_undo_opens_it_again(review):
    before = review.questions(20)
    first = before[0]
    for answer in ("same", "different", "unsure"):
        review.answer(first["first"]["id"], first["second"]["id"], answer)
        assert first not in review.questions(20)
        assert len(review.questions(20)) < len(before)
        review.undo()
        assert review.questions(20) == before


def test_what_follows_from_answers_is_not_asked(small_run):
    pairs = [("a1.png", "a2.png", 3), ("a2.png", "a3.png", 2), ("a1.png", "a3.png", 1)]
    review = Review(small_run, lambda: pairs)
    ids = [photo_id(name) for name in ("a1.png", "a2.png", "a3.png")]
    review.answer(ids[0], ids[1], "same")
    review.answer(ids[1], ids[2], "same")
    assert review.questions(5) == []
    assert review.summary()["left"] == 0


def test_the_same_answer_from_two_windows_is_one_row(review):
    one, other = photo_id("a1.png"), photo_id("b1.png")
    review.answer(one, other, "different")
    review.answer(other, one, "different")
    assert review.summary()["answered"] == 1
    with pytest.raises(Contradiction):
        review.answer(one, other, "same")


def test_merge_split_and_undo_move_photos_at_once(review):
    assert review.merge([mark(review, 1), mark(review, 2)]) == 1
    assert members(review, 1) == {"a1.png", "a2.png", "a3.png", "Ärger/a 4.png", "b1.png", "b2.png"} | {
        name for name in members(review, 1) if name.startswith("<img")
    }
    assert review.group(1)["size"] == 7
    with pytest.raises(UnknownName, match="no group 2"):
        review.group(2)
    assert review.split(*mark(review, 1), [photo_id("b1.png"), photo_id("b2.png")], together=True) == [5]
    assert members(review, 5) == {"b1.png", "b2.png"}
    assert review.split(*mark(review, 1), [photo_id("a1.png"), photo_id("a2.png")], together=False) == [6, 7]
    assert members(review, 6) == {"a2.png"}
    assert members(review, 7) == {"a1.png"}
    for _ in range(3):
        review.undo()
    assert [review.group(number)["size"] for number in (1, 2, 3, 4)] == [4, 3, 1, 2]
    with pytest.raises(InvalidState, match="no decision is left"):
        review.undo()


def test_a_window_that_saw_other_members_is_told(small_run):
    here, there = Review(small_run), Review(small_run)
    seen = mark(here, 1)
    there.merge([mark(there, 1), mark(there, 4)])
    with pytest.raises(Stale, match="Group 1 was changed in another window"):
        here.split(*seen, [photo_id("a1.png")], True)
    with pytest.raises(Stale, match="Group 1"):
        here.merge([seen, mark(here, 2)])
    assert here.group(1)["size"] == 6  # both see the same now


def test_changes_of_other_groups_do_not_concern_a_window(small_run):
    here, there = Review(small_run), Review(small_run)
    seen = mark(here, 1)
    there.merge([mark(there, 3), mark(there, 4)])
    here.split(*seen, [photo_id("a1.png")], True)
    assert there.group(1)["size"] == 3
    assert there.summary() == here.summary()


def test_what_makes_no_sense_is_refused_and_nothing_is_written(review):
    with pytest.raises(InvalidValue, match="two different groups"):
        review.merge([mark(review, 1), mark(review, 1)])
    for photos in ([], [photo_id("b1.png")], [photo_id(name) for name in members(review, 1)]):
        with pytest.raises(InvalidValue, match="must stay"):
            review.split(*mark(review, 1), photos, True)
    with pytest.raises(UnknownName, match="no such photo"):
        review.answer("../../etc/passwd", photo_id("a1.png"), "same")
    with pytest.raises(UnknownName, match="no such photo"):
        review.thumbnail("../../etc/passwd")
    assert review.summary()["undo"] is None


def test_a_new_grouping_is_seen_and_old_changes_are_not_made_twice(review):
    review.split(*mark(review, 1), [photo_id("a1.png")], True)
    assert members(review, 5) == {"a1.png"}
    regrouped = [
        member._replace(group=9 if member.path == "a1.png" else member.group) for member in review.run.groups()
    ]
    review.run.write_groups(regrouped, decisions=len(review.decisions.rows()))
    assert members(review, 9) == {"a1.png"}
    with pytest.raises(UnknownName):
        review.group(5)


def test_without_groups_the_way_on_is_named(tmp_path):
    with pytest.raises(InvalidState, match="to its end"):
        Review(PhotoRun.create(tmp_path / "out", tmp_path)).summary()


def test_doubtful_pairs_by_hand():
    rows = [
        Member("a", 1, 0.9, 2, 0.1),
        Member("b", 1, 0.4, 2, 0.5),
        Member("c", 1, 0.8, 2, 0.2),
        Member("d", 2, 1.0, 1, 0.5),
        Member("alone", 3, 0.5),
    ]
    # inside 1: b (0.4) with a, (1 - 0.4) * 2 photos; from 1 to 2: b is closest, 0.5 * 0.6 * 1; from 2: no doubt
    found = [(one.first, one.second, round(one.weight, 6)) for one in doubtful_pairs(rows)]
    assert found == [("b", "a", 1.2), ("b", "d", 0.3), ("d", "a", 0.0)]
