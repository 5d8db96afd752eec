"""From a grouping to the files of a run: stable numbers, groups.csv, links, index, checkpoint, questions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fastreid_uns.photos.decisions import Decisions, regrouped
from fastreid_uns.photos.group import Grouping, Settings
from fastreid_uns.photos.identify import STRICT, STRICTER, Thresholds, fit_thresholds, least_known
from fastreid_uns.photos.index import Index, weights_fingerprint
from fastreid_uns.photos.informative import informative_pairs
from fastreid_uns.photos.members import Member
from fastreid_uns.photos.network import Network
from fastreid_uns.photos.numbers import ABSENT, stable_numbers
from fastreid_uns.photos.store import PhotoRun
from fastreid_uns.pseudo_labels.constraints import Answer, Constraints

QUESTIONS = 200  # that are kept for the review page


def present_groups(run: PhotoRun) -> dict[str, int]:
    """Number of the group of each photo, after the merges and splits that were decided since groups.csv was written."""
    members = run.groups()
    if not members:
        return {}
    done = int(run.about.get("decisions", 0))
    since = [one for one in Decisions(run.folder / "decisions.csv").active() if one.row > done]
    return regrouped({one.path: one.group for one in members}, since, run.last_number)


def constraints_of(names: Sequence[str], equal: Sequence[Sequence[int]], decisions: Decisions) -> Constraints:
    """What is known about photos: the decisions, and that files which are equal show the same.

    Args:
        names: of the photos.
        equal: positions of photos with equal files; what a decision keeps apart stays apart.
        decisions: those about photos that are not among the names do not count.

    Raises:
        InvalidValue: they contradict each other.
    """
    relations = decisions.relations()
    must, cannot = relations.indices(names)
    answers = [Answer(a, b, True, f"decisions.csv: {names[a]}, {names[b]}") for a, b in must.tolist()]
    answers += [Answer(a, b, False, f"decisions.csv: {names[a]}, {names[b]}") for a, b in cannot.tolist()]
    for first, *others in equal:
        for other in others:
            if relations.relation(names[first], names[other]) != "different":
                answers.append(Answer(first, other, True, f"equal files: {names[first]}, {names[other]}"))
    return Constraints(len(names), answers)


def members_of(run: PhotoRun, names: Sequence[str], grouping: Grouping) -> list[Member]:
    """Rows of groups.csv; individuals keep the numbers that they have in the run."""
    old = present_groups(run)
    last = max(run.last_number, *old.values(), 0)
    numbers = stable_numbers([old.get(name, ABSENT) for name in names], grouping.labels, last)
    number_of = np.zeros(int(grouping.labels.max()) + 1, np.int64)
    number_of[grouping.labels] = numbers
    rows = zip(names, numbers, grouping.confidence, grouping.nearest, grouping.similarity, strict=True)
    return [
        Member(name, int(number), min(max(float(sure), 0.0), 1.0), *_near(number_of, int(near), float(similarity)))
        for name, number, sure, near, similarity in rows
    ]


def _near(number_of: NDArray[np.int64], near: int, similarity: float) -> tuple[int | None, float | None]:
    return (None, None) if near < 0 else (int(number_of[near]), similarity)


def write_outcome(
    run: PhotoRun,
    members: Sequence[Member],
    grouping: Grouping,
    network: Network,
    settings: Settings,
    constraints: Constraints,
    *,
    copy: bool,
    about: Mapping[str, Any],
    thresholds: Thresholds,
) -> None:
    """Write all that follows from a grouping but the report.

    Args:
        members: rows of the photos, see `members_of`.
        copy: of the photos in groups/, not links.
        about: entries of run.json.
        thresholds: of `identify`.
    """
    decided = len(Decisions(run.folder / "decisions.csv").rows())
    run.write_groups(members, decisions=decided, **about)
    names = [member.path for member in members]
    pairs = informative_pairs(grouping.dendrogram, grouping.feats, settings.threshold, QUESTIONS, constraints)
    run.save_questions([(names[pair.first], names[pair.second], pair.weight) for pair in pairs])
    index = index_of(network, grouping.feats, members, settings, thresholds)
    index.save(run.folder / "index.safetensors", overwrite=True)
    network.save(run.folder, run.version)
    run.link_groups(copy)


def thresholds_of(
    grouping: Grouping, views: Tensor | None = None, constraints: Constraints | None = None
) -> Thresholds:
    """Thresholds of `identify` from strict groups, which hold few wrong photos.

    Args:
        views: of the photos, see `identify.least_known`; None leaves out what they tell.
        constraints: answers that strict groups keep to as well.
    """

    def cut(distance: float) -> Thresholds:
        groups = torch.from_numpy(grouping.dendrogram.cut(distance))
        groups = groups if constraints is None else constraints.apply(groups, grouping.feats)
        found = fit_thresholds(grouping.feats, groups, grouping.individuals)
        least = found.known if views is None else least_known(views, groups, grouping.individuals)
        return found._replace(known=max(found.known, least))

    return cut(STRICT)._replace(doubtful=cut(STRICTER).known)


def index_of(
    network: Network, feats: Tensor, members: Sequence[Member], settings: Settings, thresholds: Thresholds
) -> Index:
    """All that is needed to recognise the individuals of a run."""
    weights = {name: value.detach().clone() for name, value in network.encoder.state_dict().items()}
    return Index(
        feats,
        [member.path for member in members],
        torch.tensor([member.group for member in members]),
        network.preprocessing(),
        weights_fingerprint(weights),
        weights,
        thresholds=thresholds._asdict(),
        about={**network.about(), "views": settings.views, "seed": settings.seed},
    )
