"""What people answered about photos: decisions.csv, and what follows from it for the grouping.

The file is only ever appended to, one row a click: `time,kind,first,second,answer`.

| kind  | first                       | second                       | answer                    |
|-------|-----------------------------|------------------------------|---------------------------|
| pair  | a photo                     | another photo                | same / different / unsure |
| merge | all photos of a group       | all photos of another group  | (empty)                   |
| split | photos that leave a group   | photos that stay             | together / apart          |
| undo  | number of the row it cancels| (empty)                      | (empty)                   |

`time` is UTC. Photos are paths as in groups.csv; several are a JSON list. Rows count from 1, after the header. So a
row says all that it means without the groups of that time.

What follows: *same*, a merge, and a split whose photos stay together link photos; *different* and a split keep them
apart; *unsure* only says that the question was put. Links go on: if a is linked with b and b with c, then a with c, and
what is kept apart from one is kept apart from all. A split takes its photos out of the merges and splits before it, so
that a wrong photo can be taken out of a merged group. Every other contradiction is an error that names both rows.
"""

from __future__ import annotations

import csv
import fcntl
import json
import os
from collections import Counter, deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime, timezone
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from fastreid_uns.errors import InvalidState, InvalidValue
from fastreid_uns.photos.rows import complete_length, decode_rows, encode_row
from fastreid_uns.utils.atomic import append

HEADER = ("time", "kind", "first", "second", "answer")
ANSWERS = {"pair": ("same", "different", "unsure"), "merge": ("",), "split": ("together", "apart"), "undo": ("",)}


class Decision(NamedTuple):
    """A row of decisions.csv."""

    row: int  # from 1
    time: str
    kind: str
    first: tuple[str, ...]
    second: tuple[str, ...]
    answer: str

    def __str__(self) -> str:
        what = f"{self.kind} {self.answer}".strip()
        return f"row {self.row} ({self.time}), {what}: {_some(self.first)} and {_some(self.second)}"


class Contradiction(InvalidValue):
    """Two decisions that cannot both hold.

    Attributes:
        earlier, later: the two decisions, by their rows.
    """

    def __init__(self, one: Decision, chain: Sequence[Decision]) -> None:
        """`one` keeps two photos apart that the decisions of `chain` link."""
        newest = max(chain, key=lambda decision: decision.row)
        self.earlier, self.later = sorted((one, newest), key=lambda decision: decision.row)
        others = [str(decision) for decision in chain if decision not in (one, newest)]
        through = f" They meet through {'; '.join(others[:4])}." if others else ""
        super().__init__(f"decisions: {self.later} contradicts {self.earlier}.{through} Take one of them back (undo).")


class Link(NamedTuple):
    """Two photos of one individual, and the decision that says so."""

    first: str
    second: str
    decision: Decision


class Relations:
    """What follows from decisions; see the module for the rules.

    Args:
        decisions: those that are not cancelled, in their order.

    Attributes:
        links: pairs of photos that are the same individual; with all that follows from them they make the sets.

    Raises:
        Contradiction: photos are linked and kept apart.
    """

    def __init__(self, decisions: Sequence[Decision]) -> None:
        self.links = _links(decisions)
        self._set_of = _linked_sets(self.links)
        self._apart: set[frozenset[str | int]] = set()
        for decision in decisions:
            if decision.kind == "split" or decision.answer == "different":
                self._keep_apart(decision)

    def _keep_apart(self, decision: Decision) -> None:
        ones = {self._set(path): path for path in decision.first}
        others = {self._set(path): path for path in decision.second}
        for shared in ones.keys() & others.keys():
            first = next(path for path in decision.first if self._set(path) == shared)
            raise Contradiction(decision, _chain(self.links, first, others[shared]))
        self._apart |= {frozenset((one, other)) for one in ones for other in others}

    def _set(self, path: str) -> str | int:
        """The set of linked photos that a photo is in: a number, or its path if it is in none."""
        return self._set_of.get(path, path)

    def relation(self, first: str, second: str) -> str | None:
        """`same` or `different` if that follows for two photos, else None."""
        one, other = self._set(first), self._set(second)
        if one == other:
            return "same"
        return "different" if frozenset((one, other)) in self._apart else None

    def indices(self, paths: Sequence[str]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """(must-link (M, 2), cannot-link (C, 2)) as positions in `paths`; photos that are not there are left out.

        Must-link pairs are a chain through each set of linked photos, also where a photo between two is gone. Two
        sets that are kept apart are one cannot-link pair, of the first photo of each: it holds for all others by
        the links.
        """
        sets: dict[str | int, list[int]] = {}
        for position, path in enumerate(paths):
            sets.setdefault(self._set(path), []).append(position)
        must = [pair for members in sets.values() for pair in pairwise(members)]
        apart = [sorted(sets[name][0] for name in pair) for pair in self._apart if pair <= sets.keys()]
        return _array(must), _array(sorted(apart))


class Decisions:
    """The file decisions.csv; several processes may read and append at once.

    Args:
        file: it is made by the first decision.
    """

    def __init__(self, file: str | Path) -> None:
        self.file = Path(file)

    def size(self) -> int:
        """Bytes of the file. It only grows, so it tells whether something was decided since."""
        return self.file.stat().st_size if self.file.is_file() else 0

    def rows(self) -> list[Decision]:
        """All rows, the cancelled ones and `undo` included. A last row that was not written whole does not count.

        Raises:
            InvalidValue: a row cannot be read; the message names it.
        """
        if not self.file.is_file():
            return []
        return self._parse(self.file.read_bytes())

    def active(self) -> list[Decision]:
        """Decisions that are not cancelled, in their order."""
        return _active(self.rows())

    def relations(self) -> Relations:
        """What follows from the decisions that are not cancelled.

        Raises:
            Contradiction: two of them cannot both hold.
        """
        return Relations(self.active())

    def pair(self, first: str, second: str, answer: str) -> Decision:
        """Note that two photos are the `same` individual, are `different`, or that it is `unsure`.

        Raises:
            Contradiction: an earlier decision says otherwise; nothing is written.
        """
        return self._add("pair", (first,), (second,), answer)

    def merge(self, first: Sequence[str], second: Sequence[str]) -> Decision:
        """Note that the photos of two groups are one individual; raises as `pair` does."""
        return self._add("merge", first, second, "")

    def split(self, leaving: Sequence[str], staying: Sequence[str], together: bool = True) -> Decision:
        """Note that photos are another individual than the rest of their group; raises as `pair` does.

        Args:
            together: they are one individual; otherwise nothing is known of them among each other.
        """
        return self._add("split", leaving, staying, "together" if together else "apart")

    def undo(self, row: int | None = None) -> Decision:
        """Cancel a decision, by default the last one; gives the decision that no longer counts.

        Raises:
            InvalidState: there is no such decision, or it is cancelled already.
            Contradiction: a split made two others possible that contradict each other without it.
        """
        with self._locked() as descriptor:
            active = _active(self._repaired(descriptor))
            cancelled = next((one for one in reversed(active) if row in (None, one.row)), None)
            if cancelled is None:
                which = "no decision is left" if row is None else f"row {row} is no decision that still counts"
                raise InvalidState(f"{self.file}: {which}; nothing was taken back. Look at the list of answers.")
            Relations([one for one in active if one != cancelled])
            self._append(_now(), "undo", str(cancelled.row), "", "")
        return cancelled

    def _add(self, kind: str, first: Sequence[str], second: Sequence[str], answer: str) -> Decision:
        with self._locked() as descriptor:
            rows = self._repaired(descriptor)
            decision = Decision(len(rows) + 1, _now(), kind, tuple(first), tuple(second), answer)
            _check(decision)
            Relations([*_active(rows), decision])
            fields = (_field(kind, decision.first), _field(kind, decision.second))
            self._append(decision.time, kind, *fields, answer)
        return decision

    @contextmanager
    def _locked(self) -> Iterator[int]:
        """The open file; nobody else appends meanwhile. A killed process leaves no lock behind."""
        flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW
        try:
            descriptor = os.open(self.file, flags, 0o666)
        except OSError as error:
            raise InvalidState(f"{self.file}: cannot be opened for writing ({error.strerror}).") from error
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield descriptor
        finally:
            os.close(descriptor)

    def _repaired(self, descriptor: int) -> list[Decision]:
        """All rows, after what a killed process left of a last one was cut off."""
        content = self.file.read_bytes()
        os.ftruncate(descriptor, complete_length(content))
        return self._parse(content)

    def _append(self, *fields: str) -> None:
        line = (b"" if self.size() else encode_row(HEADER)) + encode_row(fields)
        try:
            append(self.file, line)
        except OSError as error:
            raise InvalidState(
                f"{self.file}: the answer could not be written ({error.strerror}); the earlier ones are untouched. "
                f"Free some space, then answer again."
            ) from error

    def _parse(self, content: bytes) -> list[Decision]:
        decisions: list[Decision] = []
        try:
            rows = decode_rows(content[: complete_length(content)])
            header = tuple(next(rows, HEADER))
            if header != HEADER:
                raise ValueError(f"the header is {','.join(header)}, not {','.join(HEADER)}")
            for values in rows:
                decisions.append(_decision(len(decisions) + 1, values))
            _active(decisions)
        except (ValueError, csv.Error) as error:
            raise InvalidValue(f"{self.file}: row {len(decisions) + 1} cannot be read: {error}. Mend it.") from error
        return decisions


def regrouped(groups: Mapping[str, int], decisions: Sequence[Decision], last: int) -> dict[str, int]:
    """Groups after the merges and splits among the decisions, one after the other.

    Args:
        groups: number of the group of each photo.
        decisions: those made since, without the cancelled ones, in their order.
        last: highest number that was ever given; photos that were split off get higher ones.
    """
    now, last = dict(groups), max(last, *groups.values(), 0)
    for decision in decisions:
        if decision.kind == "merge":
            together = [path for path in (*decision.first, *decision.second) if path in now]
            numbers = Counter(now[path] for path in together)
            now.update(dict.fromkeys(together, min(numbers, key=lambda one: (-numbers[one], one), default=0)))
        elif decision.kind == "split":
            stayed = {now[path] for path in decision.second if path in now}
            leaving = [path for path in decision.first if now.get(path) in stayed]
            for position, path in enumerate(leaving):
                last += position == 0 or decision.answer == "apart"
                now[path] = last
    return now


def _active(rows: Sequence[Decision]) -> list[Decision]:
    """Rows that no `undo` cancels.

    Raises:
        ValueError: an `undo` names no decision before it.
    """
    active: dict[int, Decision] = {}
    for decision in rows:
        if decision.kind != "undo":
            active[decision.row] = decision
        elif active.pop(int(decision.first[0]), None) is None:
            raise ValueError(f"row {decision.row} takes back row {decision.first[0]}, which is no decision that counts")
    return list(active.values())


def _blocks(decisions: Sequence[Decision]) -> list[tuple[Decision, list[str]]]:
    """Photos that merges and splits put together, without those that later splits took out."""
    blocks: list[tuple[Decision, list[str]]] = []
    for decision in decisions:
        if decision.kind == "merge":
            blocks.append((decision, [*decision.first, *decision.second]))
        elif decision.kind == "split":
            leaving = set(decision.first)
            blocks = [(one, [path for path in block if path not in leaving]) for one, block in blocks]
            if decision.answer == "together":
                blocks.append((decision, [*decision.first]))
    return [(decision, block) for decision, block in blocks if len(block) > 1]


def _links(decisions: Sequence[Decision]) -> list[Link]:
    stated = [Link(one.first[0], one.second[0], one) for one in decisions if one.answer == "same"]
    blocks = [Link(block[0], path, one) for one, block in _blocks(decisions) for path in block[1:]]
    return [*stated, *blocks]


def _neighbours(links: Sequence[Link]) -> dict[str, list[tuple[str, Decision]]]:
    table: dict[str, list[tuple[str, Decision]]] = {}
    for first, second, decision in links:
        table.setdefault(first, []).append((second, decision))
        table.setdefault(second, []).append((first, decision))
    return table


def _linked_sets(links: Sequence[Link]) -> dict[str, int]:
    """Number of the set of linked photos for each photo that has a link."""
    table, number = _neighbours(links), dict[str, int]()
    for start in table:
        if start in number:
            continue
        own, queue = len(number), [start]
        number[start] = own
        while queue:
            for path, _ in table[queue.pop()]:
                if path not in number:
                    number[path] = own
                    queue.append(path)
    return number


def _chain(links: Sequence[Link], start: str, end: str) -> list[Decision]:
    """Decisions on the shortest way of links from one photo to another."""
    table = _neighbours(links)
    came: dict[str, tuple[str, Decision] | None] = {start: None}
    queue = deque([start])
    while end not in came:
        path = queue.popleft()
        for other, decision in table[path]:
            if other not in came:
                came[other] = (path, decision)
                queue.append(other)
    chain = []
    while (step := came[end]) is not None:
        end, decision = step
        chain.append(decision)
    return chain[::-1]


def _decision(row: int, values: Sequence[str]) -> Decision:
    if len(values) != len(HEADER):
        raise ValueError(f"{len(values)} fields were found, {len(HEADER)} are accepted")
    time, kind, first, second, answer = values
    several = kind in ("merge", "split")
    sides = [tuple(json.loads(side)) if several else (side,) for side in (first, second)]
    if not all(isinstance(path, str) for side in sides for path in side):
        raise ValueError("something else than a path was found in a list of photos")
    decision = Decision(row, time, kind, sides[0], sides[1], answer)
    _check(decision)
    return decision


def _check(decision: Decision) -> None:
    """Refuse what says nothing.

    Raises:
        InvalidValue: an unknown kind or answer, no photo, or one photo on both sides.
    """
    accepted = ANSWERS.get(decision.kind)
    if accepted is None or decision.answer not in accepted:
        raise InvalidValue(
            f"decisions: {decision.kind!r} with answer {decision.answer!r} was found; accepted are {ANSWERS}."
        )
    if decision.kind == "undo":
        return
    both = set(decision.first) & set(decision.second)
    if both or not all((*decision.first, *decision.second, decision.first, decision.second)):
        raise InvalidValue(
            f"decisions: {decision.kind} of {_some(decision.first)} and {_some(decision.second)}; different photos on "
            f"both sides are accepted."
        )


def _field(kind: str, paths: Sequence[str]) -> str:
    return paths[0] if kind == "pair" else json.dumps(list(paths))


def _array(pairs: Sequence[Sequence[int]]) -> NDArray[np.int64]:
    return np.array(pairs, dtype=np.int64).reshape(-1, 2)


def _some(paths: Sequence[str]) -> str:
    rest = f" and {len(paths) - 1} more" if len(paths) > 1 else ""
    return f"{paths[0]!r}{rest}" if paths else "no photo"


def _now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")
