"""What the review page shows and does, without its web server: questions, groups, answers.

Photos go by ids, groups by their number and a mark of their members. A window that saw other members than there are
now is told so; changes of other groups do not concern it. So any number of windows can be open at once.
"""

from __future__ import annotations

import hashlib
import shlex
import threading
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from fastreid_uns.errors import InvalidState, InvalidValue, UnknownName
from fastreid_uns.photos.decisions import Decision, Decisions, Relations, regrouped
from fastreid_uns.photos.members import Member
from fastreid_uns.photos.questions import Question, doubtful_pairs
from fastreid_uns.photos.store import PhotoRun
from fastreid_uns.photos.thumbnails import Thumbnails, photo_id, picture
from fastreid_uns.utils.paths import printable

Json = dict[str, Any]

GROUPS_A_PAGE = 24
SHOWN_OF_GROUP = 8  # photos of a group in the list of groups
NEAREST = 4  # neighbours that a group shows
ANSWERS_SHOWN = 200
ZOOMED = 1600  # pixels of the longer side


class Stale(InvalidState):
    """A window acts on groups that another one has changed meanwhile."""


class Group:
    """The photos that are in one group now.

    Attributes:
        members: the least certain first.
        mark: changes with the members.
    """

    def __init__(self, number: int, members: Sequence[Member]) -> None:
        self.number = number
        self.members = sorted(members, key=lambda one: (one.confidence, one.path))

    @cached_property
    def mark(self) -> str:
        names = "/".join(sorted(photo_id(member.path) for member in self.members))
        return hashlib.sha256(names.encode()).hexdigest()[:16]

    @property
    def doubt(self) -> float:
        return 1 - self.members[0].confidence

    @property
    def paths(self) -> list[str]:
        return [member.path for member in self.members]

    def nearest(self, groups: Collection[int]) -> list[int]:
        """Those of the `groups` (numbers) that are nearest to its photos, the most similar first."""
        best: dict[int, float] = {}
        for member in self.members:
            number = member.nearest
            if number is not None and number in groups and number != self.number:
                best[number] = max(best.get(number, -1.0), member.similarity or 0.0)
        return sorted(best, key=lambda number: -best[number])[:NEAREST]


ORDERS: dict[str, Callable[[Group], tuple[float, int]]] = {
    "doubt": lambda group: (-group.doubt, group.number),
    "size": lambda group: (-len(group.members), group.number),
    "number": lambda group: (group.number, 0),
}


@dataclass(frozen=True)
class Snapshot:
    """The groups after all answers up to a moment."""

    stamp: tuple
    version: str
    groups: dict[int, Group]
    group_of: dict[str, int]
    path_of: dict[str, str]
    active: list[Decision]
    relations: Relations


class Review:
    """The answers to questions about one run, and what they make of its groups.

    Args:
        run: with groups in it.
        questions: gives (first, second, weight) of pairs to ask, the most informative first; called again when
            groups.csv has changed. Without it `doubtful_pairs` finds them.
    """

    def __init__(self, run: PhotoRun, questions: Callable[[], Sequence[tuple[str, str, float]]] | None = None) -> None:
        self.run = run
        self.decisions = Decisions(run.folder / "decisions.csv")
        self.thumbnails = Thumbnails(run.folder / "report" / "thumbnails")
        self._ask = questions
        self._lock = threading.RLock()
        self._snapshot: Snapshot | None = None
        self._questions: list[Question] = []
        self._asked_of = -1  # version of the groups for which the questions are

    # what there is

    def summary(self) -> Json:
        """Counts for the head of the page, and the version that tells whether anything has changed."""
        now = self._now()
        answers = [decision for decision in now.active if decision.kind == "pair"]
        return {
            "version": now.version,
            "name": printable(self.run.photos.name),
            "photos": len(now.group_of),
            "groups": len(now.groups),
            "alone": sum(len(group.members) == 1 for group in now.groups.values()),
            "answered": len(answers),
            "changes": len(now.active) - len(answers),
            "left": sum(1 for _ in self._open_questions(now)),
            "undo": now.active[-1].row if now.active else None,
            "resume": f"fastreid-uns group {_quoted(self.run.photos)} --output {_quoted(self.run.folder)} --resume",
        }

    def questions(self, count: int) -> list[Json]:
        """The next questions: two photos each, with some others of their groups."""
        now, found = self._now(), []
        for question in self._open_questions(now):
            found.append(
                {
                    "first": self._side(now, question.first),
                    "second": self._side(now, question.second),
                    "together": now.group_of[question.first] == now.group_of[question.second],
                }
            )
            if len(found) == count:
                break
        return found

    def groups_page(self, page: int, order: str = "doubt", least: int = 1) -> Json:
        """One page of the groups with at least so many photos.

        Raises:
            UnknownName: no such order.
        """
        if order not in ORDERS:
            raise UnknownName(f"review: order {order!r} was found; {', '.join(ORDERS)} are accepted.")
        now = self._now()
        groups = sorted((one for one in now.groups.values() if len(one.members) >= least), key=ORDERS[order])
        pages = max(1, -(-len(groups) // GROUPS_A_PAGE))
        page = min(max(page, 1), pages)
        shown = groups[(page - 1) * GROUPS_A_PAGE : page * GROUPS_A_PAGE]
        cards = [_group_json(group, SHOWN_OF_GROUP) for group in shown]
        return {"version": now.version, "page": page, "pages": pages, "count": len(groups), "groups": cards}

    def group(self, number: int) -> Json:
        """All photos of a group, and its nearest groups.

        Raises:
            UnknownName: no such group.
        """
        now = self._now()
        group = _group(now, number)
        near = [_group_json(now.groups[other], SHOWN_OF_GROUP) for other in group.nearest(now.groups)]
        return {"version": now.version, "nearest": near, **_group_json(group, len(group.members))}

    def answers(self) -> list[Json]:
        """The newest decisions that count, the last one first."""
        return [_answer_json(decision) for decision in self._now().active[: -ANSWERS_SHOWN - 1 : -1]]

    # what people decide

    def answer(self, first: str, second: str, answer: str) -> None:
        """Note an answer about two photos (ids); one that was given before is not written twice.

        Raises:
            Contradiction: another answer says otherwise.
            UnknownName: no such photo.
        """
        with self._lock:
            now = self._now()
            one, other = (_path(now, name) for name in (first, second))
            given = {frozenset((*row.first, *row.second)): row.answer for row in now.active if row.kind == "pair"}
            if given.get(frozenset((one, other))) != answer:
                self.decisions.pair(one, other, answer)

    def merge(self, groups: Sequence[tuple[int, str]]) -> int:
        """Make two groups one; gives its number.

        Args:
            groups: number and mark of each.

        Raises:
            Stale: one of them has changed.
            Contradiction: an answer says that they are different.
        """
        with self._lock:
            now = self._now()
            if len({number for number, _ in groups}) != 2:
                raise InvalidValue("review: two different groups are needed for a merge. Choose another one.")
            first, second = (_unchanged(now, number, mark) for number, mark in groups)
            self.decisions.merge(first.paths, second.paths)
            return self._now().group_of[first.paths[0]]

    def split(self, number: int, mark: str, photos: Sequence[str], together: bool) -> list[int]:
        """Take photos (ids) out of a group: into one new group, or into one each; gives their numbers.

        Raises:
            Stale: the group has changed.
            Contradiction: an answer says that photos which leave and photos which stay are the same.
        """
        with self._lock:
            now = self._now()
            group = _unchanged(now, number, mark)
            leaving = {_path(now, name) for name in photos}
            staying = [path for path in group.paths if path not in leaving]
            if not leaving or not staying or not leaving <= set(group.paths):
                raise InvalidValue("review: some photos of the group must leave and some must stay. Select again.")
            self.decisions.split([path for path in group.paths if path in leaving], staying, together)
            now = self._now()
            return sorted({now.group_of[path] for path in leaving})

    def undo(self, row: int | None = None) -> Json:
        """Take a decision back, by default the last one; gives it."""
        with self._lock:
            return _answer_json(self.decisions.undo(row))

    # pictures

    def thumbnail(self, name: str) -> Path:
        """File of the small picture of a photo (id); raises UnknownName."""
        path = _path(self._now(), name)
        return self.thumbnails.file(path, self.run.photo(path))

    def zoomed(self, name: str) -> bytes:
        """The photo (id) as a large JPEG; raises UnknownName."""
        return picture(self.run.photo(_path(self._now(), name)), ZOOMED)

    # how

    def _now(self) -> Snapshot:
        """The present state; read again if a file has changed."""
        with self._lock:
            file = self.run.groups_file.stat() if self.run.groups_file.is_file() else None
            stamp = (file and (file.st_mtime_ns, file.st_ino, file.st_size), self.decisions.size())
            if self._snapshot is None or self._snapshot.stamp != stamp:
                self._snapshot = self._read(stamp)
            return self._snapshot

    def _read(self, stamp: tuple) -> Snapshot:
        members, rows, about = self.run.groups(), self.decisions.rows(), self.run.about
        if not members:
            raise InvalidState(f"{self.run.folder}: there are no groups yet. Run `fastreid-uns group` to its end.")
        active = self.decisions.active()
        since = [decision for decision in active if decision.row > int(about.get("decisions", 0))]
        group_of = regrouped({one.path: one.group for one in members}, since, self.run.last_number)
        split: dict[int, list[Member]] = {}
        for member in members:
            split.setdefault(group_of[member.path], []).append(member)
        if self._asked_of != self.run.version:
            self._questions = [Question(*one) for one in (self._ask() if self._ask else doubtful_pairs(members))]
            self._asked_of = self.run.version
        return Snapshot(
            stamp,
            f"{self.run.version}.{len(rows)}",
            {number: Group(number, group) for number, group in split.items()},
            group_of,
            {photo_id(path): path for path in group_of},
            active,
            Relations(active),
        )

    def _open_questions(self, now: Snapshot) -> Iterator[Question]:
        """Questions that no decision answers, by itself or by what follows from several."""
        unsure = {frozenset((*one.first, *one.second)) for one in now.active if one.answer == "unsure"}
        for question in self._questions:
            pair = frozenset((question.first, question.second))
            if not pair <= now.group_of.keys() or pair in unsure:
                continue
            if now.relations.relation(question.first, question.second) is None:
                yield question

    def _side(self, now: Snapshot, path: str) -> Json:
        group = now.groups[now.group_of[path]]
        others = [member for member in reversed(group.members) if member.path != path][:SHOWN_OF_GROUP]
        own = next(member for member in group.members if member.path == path)
        return {
            **_photo_json(own),
            "group": group.number,
            "size": len(group.members),
            "others": [_photo_json(member) for member in others],
        }


def _path(now: Snapshot, name: str) -> str:
    if name not in now.path_of:
        raise UnknownName("review: there is no such photo any more. Load the page again.")
    return now.path_of[name]


def _group(now: Snapshot, number: int) -> Group:
    if number not in now.groups:
        raise UnknownName(f"review: there is no group {number} any more. Choose another one.")
    return now.groups[number]


def _unchanged(now: Snapshot, number: int, mark: str) -> Group:
    group = now.groups.get(number)
    if group is None or group.mark != mark:
        raise Stale(f"Group {number} was changed in another window meanwhile. It is shown as it is now; decide again.")
    return group


def _answer_json(decision: Decision) -> Json:
    return {
        "row": decision.row,
        "time": decision.time,
        "kind": decision.kind,
        "answer": decision.answer,
        "first": _side_json(decision.first),
        "second": _side_json(decision.second),
    }


def _side_json(paths: Sequence[str]) -> Json:
    shown = [{"id": photo_id(path), "name": printable(path)} for path in paths[:SHOWN_OF_GROUP]]
    return {"photos": shown, "count": len(paths)}


def _photo_json(member: Member) -> Json:
    return {"id": photo_id(member.path), "name": printable(member.path), "confidence": member.confidence}


def _group_json(group: Group, shown: int) -> Json:
    return {
        "number": group.number,
        "size": len(group.members),
        "doubt": round(group.doubt, 2),
        "mark": group.mark,
        "photos": [_photo_json(member) for member in group.members[:shown]],
    }


def _quoted(path: Path) -> str:
    return shlex.quote(printable(path))
