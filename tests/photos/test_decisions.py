"""Answers are kept as they were given, and what follows from them is worked out by hand or by a slow loop."""

from __future__ import annotations

import itertools
import multiprocessing
import os

import numpy as np
import pytest

from fastreid_uns.errors import InvalidState, InvalidValue
from fastreid_uns.photos.decisions import Contradiction, Decision, Decisions, Relations, regrouped


@pytest.fixture
def decisions(tmp_path) -> Decisions:
    return Decisions(tmp_path / "decisions.csv")


def test_rows_come_back_as_they_were_given(decisions):
    strange = ('a, b\n"c".jpg', os.fsdecode(b"\xff.jpg"), "ü\r.jpg", "[1].jpg")
    decisions.pair(strange[0], strange[1], "unsure")
    decisions.pair(strange[3], strange[2], "different")
    decisions.merge(strange[:2], ["x.jpg"])
    decisions.split([strange[2]], ["y.jpg", strange[3]], together=False)
    again = Decisions(decisions.file).rows()
    assert [(row.row, row.kind, row.first, row.second, row.answer) for row in again] == [
        (1, "pair", (strange[0],), (strange[1],), "unsure"),
        (2, "pair", (strange[3],), (strange[2],), "different"),
        (3, "merge", strange[:2], ("x.jpg",), ""),
        (4, "split", (strange[2],), ("y.jpg", strange[3]), "apart"),
    ]


def test_the_file_is_one_readable_line_a_click(decisions):
    decisions.pair("a.jpg", "b.jpg", "same")
    decisions.undo()
    lines = decisions.file.read_text().splitlines()
    assert lines[0] == "time,kind,first,second,answer"
    assert [line.split(",", 1)[1] for line in lines[1:]] == ["pair,a.jpg,b.jpg,same", "undo,1,,"]


def test_an_empty_file_says_nothing(decisions):
    assert decisions.rows() == decisions.active() == []
    assert decisions.size() == 0
    assert decisions.relations().relation("a", "b") is None


def test_links_go_on_and_what_is_apart_is_apart_for_all(decisions):
    decisions.pair("a", "b", "same")
    decisions.pair("b", "c", "same")
    decisions.pair("x", "y", "same")
    decisions.pair("c", "x", "different")
    decisions.pair("c", "z", "unsure")
    found = decisions.relations()
    assert found.relation("a", "c") == "same"
    assert found.relation("a", "y") == found.relation("y", "a") == "different"
    assert found.relation("a", "z") is None


def test_relations_equal_a_slow_closure():
    rng = np.random.default_rng(1)
    names = list("abcdefgh")
    for case in range(30):
        truth = dict(zip(names, rng.integers(0, 3, len(names)).tolist(), strict=True))
        pairs = [tuple(rng.choice(names, 2, replace=False).tolist()) for _ in range(7)]
        stated = {pair: "same" if truth[pair[0]] == truth[pair[1]] else "different" for pair in pairs}
        table = closure(names, stated)
        found = relations_of(stated).relation
        for one, other in itertools.combinations(names, 2):
            assert found(one, other) == table.get((one, other)), case


def closure(names, stated):
    table = {}
    for (one, other), answer in stated.items():
        table[one, other] = table[other, one] = answer
    for _ in names:
        for a, b, c in itertools.permutations(names, 3):
            first, second = table.get((a, b)), table.get((b, c))
            if first == "same" and second:
                table[a, c] = table[c, a] = second
    return table


def relations_of(stated):
    return Relations(
        [Decision(i, "", "pair", (a,), (b,), answer) for i, ((a, b), answer) in enumerate(stated.items(), start=1)]
    )


def test_a_contradiction_names_both_answers_with_time_and_photos(decisions):
    first = decisions.pair("a", "b", "same")
    size = decisions.size()
    with pytest.raises(Contradiction) as caught:
        decisions.pair("b", "a", "different")
    text = str(caught.value)
    assert f"row 1 ({first.time}), pair same: 'a' and 'b'" in text
    assert "pair different: 'b' and 'a'" in text
    assert caught.value.earlier == first
    assert decisions.size() == size
    decisions.undo(first.row)
    decisions.pair("b", "a", "different")


def test_a_contradiction_over_several_answers_names_the_way(decisions):
    decisions.pair("a", "b", "different")
    decisions.pair("b", "c", "same")
    with pytest.raises(Contradiction, match=r"'c' and 'a'.*contradicts row 1.*'a' and 'b'.*through row 2"):
        decisions.pair("c", "a", "same")


def test_a_contradiction_in_the_file_is_found_when_it_is_read(decisions):
    decisions.file.write_text("time,kind,first,second,answer\nt1,pair,a,b,same\nt2,pair,b,a,different\n")
    with pytest.raises(Contradiction, match=r"row 2 \(t2\).*contradicts row 1 \(t1\)"):
        decisions.relations()


def test_merge_links_all_and_a_later_split_takes_photos_out(decisions):
    decisions.merge(["a", "b"], ["c", "p"])
    assert decisions.relations().relation("a", "p") == "same"
    decisions.split(["p"], ["a", "b", "c"])
    found = decisions.relations()
    assert found.relation("a", "c") == found.relation("a", "b") == "same"
    assert {found.relation(path, "p") for path in "abc"} == {"different"}
    with pytest.raises(Contradiction):
        decisions.merge(["a", "b", "c"], ["p"])


def test_split_together_links_those_that_leave_and_apart_does_not(decisions):
    decisions.split(["p", "q"], ["a"])
    decisions.split(["r", "s"], ["a"], together=False)
    found = decisions.relations()
    assert found.relation("p", "q") == "same"
    assert found.relation("r", "s") is None
    assert found.relation("s", "a") == "different"
    decisions.split(["p"], ["q"])
    found = decisions.relations()
    assert found.relation("p", "q") == "different"
    assert found.relation("p", "a") == found.relation("q", "a") == "different"


def test_a_split_does_not_undo_an_explicit_answer(decisions):
    decisions.pair("a", "p", "same")
    with pytest.raises(Contradiction, match=r"split together.*contradicts row 1"):
        decisions.split(["p"], ["a"])


def test_undo_takes_back_the_last_one_that_counts_then_the_one_before(decisions):
    decisions.pair("a", "b", "same")
    decisions.pair("c", "d", "same")
    assert decisions.undo().first == ("c",)
    assert decisions.undo().first == ("a",)
    with pytest.raises(InvalidState, match="no decision is left"):
        decisions.undo()
    decisions.pair("e", "f", "same")
    assert [decision.row for decision in decisions.active()] == [5]
    with pytest.raises(InvalidState, match="row 2 is no decision"):
        decisions.undo(2)


def test_undo_leaves_no_contradiction_behind(decisions):
    decisions.merge(["a", "p"], ["c"])
    split = decisions.split(["p"], ["a", "c"])
    later = decisions.pair("p", "a", "different")
    size = decisions.size()
    with pytest.raises(Contradiction, match=r"row 3.*contradicts row 1"):
        decisions.undo(split.row)
    assert decisions.size() == size
    decisions.undo(later.row)
    decisions.undo(split.row)
    assert decisions.relations().relation("a", "p") == "same"


def test_indices_leave_out_photos_that_are_gone_but_keep_what_went_through_them(decisions):
    decisions.pair("a", "gone", "same")
    decisions.pair("gone", "c", "same")
    decisions.pair("c", "x", "different")
    decisions.pair("gone too", "x", "different")
    must, cannot = decisions.relations().indices(["x", "c", "free", "a"])
    assert must.tolist() == [[1, 3]]
    assert cannot.tolist() == [[0, 1]]
    assert [array.shape for array in decisions.relations().indices([])] == [(0, 2), (0, 2)]


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ("t,pair,a,b,perhaps", "perhaps"),
        ("t,join,a,b,", "join"),
        ("t,pair,a,a,same", "different photos"),
        ("t,pair,a,,same", "different photos"),
        ("t,merge,a,b,", "row 2"),
        ('t,merge,[1],"[""b""]",', "else than a path"),
        ("t,pair,a,b", "4 fields"),
        ("t,undo,7,,", "no decision that counts"),
        ("t,undo,x,,", "invalid literal"),
    ],
)
def test_a_row_that_says_nothing_is_named(decisions, row, reason):
    decisions.file.write_text(f"time,kind,first,second,answer\nt,pair,a,b,same\n{row}\n")
    with pytest.raises(InvalidValue, match=reason):
        decisions.rows()


def test_half_a_last_row_is_dropped_and_the_next_answer_is_whole(decisions):
    decisions.pair("a", "b", "same")
    with decisions.file.open("a") as stream:
        stream.write('t,pair,"half a\nna')  # killed within a quoted name
    assert len(decisions.rows()) == 1
    decisions.pair("c", "d", "same")
    assert [row.first for row in decisions.rows()] == [("a",), ("c",)]


def test_a_planted_link_is_not_followed(decisions, tmp_path):
    victim = tmp_path / "victim"
    victim.write_text("time,kind,first,second,answer\n")
    decisions.file.symlink_to(victim)
    with pytest.raises(InvalidState, match="cannot be opened"):
        decisions.pair("a", "b", "same")
    assert victim.read_text() == "time,kind,first,second,answer\n"


def answer_many(file, mark):
    for i in range(25):
        Decisions(file).pair(f"{mark}{i}", f"{mark}{i + 1}", "same")


def test_processes_append_at_once_without_loss(decisions):
    context = multiprocessing.get_context("fork")
    workers = [context.Process(target=answer_many, args=(decisions.file, mark)) for mark in "abc"]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    rows = decisions.rows()
    assert len(rows) == 75
    assert {row.first[0] for row in rows} == {f"{mark}{i}" for mark in "abc" for i in range(25)}


def test_groups_show_merges_and_splits_at_once(decisions):
    groups = {"a": 1, "b": 1, "c": 2, "d": 2, "e": 2, "f": 3}
    decisions.merge(["a", "b"], ["c", "d", "e"])
    assert regrouped(groups, decisions.active(), 3) == {"a": 2, "b": 2, "c": 2, "d": 2, "e": 2, "f": 3}
    decisions.split(["b", "c"], ["a", "d", "e"])
    decisions.split(["d", "e"], ["a"], together=False)
    now = regrouped(groups, decisions.active(), 9)
    assert now == {"a": 2, "b": 10, "c": 10, "d": 11, "e": 12, "f": 3}
    assert groups["a"] == 1  # the groups of before are untouched
    assert regrouped(now, decisions.active()[2:], 12) == now  # obeyed already


def test_a_photo_that_was_split_off_can_join_another_group(decisions):
    groups = {"a": 1, "b": 1, "p": 1, "c": 2, "d": 2}
    decisions.split(["p"], ["a", "b"])
    decisions.merge(["p"], ["c", "d"])
    assert regrouped(groups, decisions.active(), 2) == {"a": 1, "b": 1, "p": 2, "c": 2, "d": 2}
