"""Which pairs of photos to ask about where nobody hands in better ones."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from fastreid_uns.photos.members import Member


class Question(NamedTuple):
    """Two photos (paths as in groups.csv), and how much the answer may change."""

    first: str
    second: str
    weight: float


def doubtful_pairs(members: Sequence[Member]) -> list[Question]:
    """One pair inside each group and one between each group and its nearest, the most informative first.

    Inside a group the least and the most certain photo are compared; the weight is the doubt about the first times
    the photos that would move. Between groups the photo that is most similar to the other group is compared with the
    most certain photo there; the weight is the similarity times the doubt times the size of the smaller group.
    """
    groups: dict[int, list[Member]] = {}
    for member in members:
        groups.setdefault(member.group, []).append(member)
    surest = {number: max(group, key=lambda one: one.confidence) for number, group in groups.items()}
    asked: dict[frozenset[str], Question] = {}

    def ask(first: Member, second: Member, weight: float) -> None:
        pair = frozenset((first.path, second.path))
        if len(pair) == 2 and (pair not in asked or asked[pair].weight < weight):
            asked[pair] = Question(first.path, second.path, weight)

    for number, group in groups.items():
        least = min(group, key=lambda one: one.confidence)
        ask(least, surest[number], (1 - least.confidence) * (len(group) - 1))
        near = [one for one in group if one.similarity is not None and one.nearest in groups and one.nearest != number]
        if near:
            closest = max(near, key=lambda one: one.similarity or 0.0)
            other = closest.nearest or 0
            moved = min(len(group), len(groups[other]))
            ask(closest, surest[other], (closest.similarity or 0.0) * (1 - closest.confidence) * moved)
    return sorted(asked.values(), key=lambda one: -one.weight)
