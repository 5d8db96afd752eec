"""More photos for a run that is finished: each joins a group that is known, or founds a new one."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from fastreid_uns.errors import InvalidState
from fastreid_uns.photos.album import Album, read_album
from fastreid_uns.photos.group import Grouping, Settings, cluster, features, for_count
from fastreid_uns.photos.identify import Thresholds
from fastreid_uns.photos.known import Known
from fastreid_uns.photos.members import Member
from fastreid_uns.photos.outcome import members_of, present_groups, thresholds_of, write_outcome
from fastreid_uns.photos.road import finish
from fastreid_uns.photos.store import PhotoRun
from fastreid_uns.photos.teller import Teller
from fastreid_uns.photos.verdict import draw
from fastreid_uns.pseudo_labels.constraints import Answer, Constraints


class Addition(NamedTuple):
    """What became of the added photos."""

    photos: int
    joined: int  # of them, into groups that were there before
    groups: int  # that were there before and got some
    founded: int  # new groups


def add_photos(run: PhotoRun, folder: str | Path, teller: Teller | None = None, *, device: str = "auto") -> Addition:
    """Assign the photos of another folder; groups that are known keep their numbers and their photos.

    Features alone are compared: the index holds no local descriptors.

    Args:
        device: see `Known`.

    Raises:
        MissingFile: no such folder, or no photo in it.
        InvalidState: all of its photos are in the run already, or the run is not finished or in use.
    """
    teller = teller or Teller()
    with run.locked():
        teller.begin(run.folder)
        if not run.about.get("finished"):
            raise InvalidState(f"{run.folder}: the groups are not finished. Run `fastreid-uns group` to its end first.")
        album, _ = read_album({"": folder}, teller.line, sized=False)
        known = Known(run, device)
        _leave_out_known(run, album, known)
        images = album.images(known.network.size, run.folder / "state", teller.line)
        feats = features(images, known.network.encoder, known.settings)
        known.network.model.cpu()
        old = present_groups(run)
        prefix = run.add_folder(folder)
        names = [*known.index.paths, *(prefix + name for name in album.names)]
        both = torch.cat([known.index.features, feats])
        settings = replace(for_count(known.settings, len(names)), threshold=float(run.about["settings"]["threshold"]))
        grouping, constraints = _extended(both, [old.get(name, 0) for name in names], settings)
        members = members_of(run, names, grouping)
        scan = {key: run.about["scan"].get(key, 0) + count for key, count in album.facts.items()}
        about = {"audit": draw(members, known.settings.seed), "scan": scan}
        copy = bool(run.about.get("asked", {}).get("copy"))
        thresholds = _raised(thresholds_of(grouping, constraints=constraints), Thresholds(**known.index.thresholds))
        write_outcome(
            run, members, grouping, known.network, settings, constraints, copy=copy, about=about, thresholds=thresholds
        )
        finish(run)
        return _counted(members[len(known.index) :], set(old.values()))


def _raised(found: Thresholds, before: Thresholds) -> Thresholds:
    """Those from which a photo is known, not below what they were; infinite ones had too few photos to say."""
    known, doubtful = (old if math.isfinite(old) else -math.inf for old in (before.known, before.doubtful))
    return found._replace(known=max(found.known, known), doubtful=max(found.doubtful, doubtful))


def _leave_out_known(run: PhotoRun, album: Album, known: Known) -> None:
    """Photos that are in the run already are not taken twice."""
    there = {str(run.photo(path).resolve()) for path in known.index.paths}
    fresh = [at for at, file in enumerate(album.files) if file not in there]
    if not fresh:
        raise InvalidState(f"{run.folder}: all {len(album):,} photos are in it already; nothing was added.")
    if len(fresh) < len(album):
        album.keep(fresh)


def _extended(feats: Tensor, numbers: Sequence[int], settings: Settings) -> tuple[Grouping, Constraints]:
    """Groups of old and new photos, in which old groups stay as they are.

    Args:
        feats: (N, D).
        numbers: old group of each photo, 0 for a new one.

    Where clustering would merge old groups through new photos, it is done again with these kept apart.
    """
    members: dict[int, list[int]] = defaultdict(list)
    for position, number in enumerate(numbers):
        if number:
            members[number].append(position)
    answers = [Answer(a, b, True, f"group {number}") for number, own in members.items() for a, b in pairwise(own)]
    while True:
        constraints = Constraints(len(numbers), answers)
        grouping = cluster(feats, settings, constraints)
        first = {number: own[0] for number, own in members.items()}
        held: dict[int, list[int]] = defaultdict(list)
        for number, position in first.items():
            held[int(grouping.labels[position])].append(number)
        clashes = [numbers for numbers in held.values() if len(numbers) > 1]
        if not clashes:
            return grouping, constraints
        for clash in clashes:
            pairs = ((a, b) for place, a in enumerate(clash) for b in clash[place + 1 :])
            answers += [Answer(first[a], first[b], False, f"groups {a} and {b}") for a, b in pairs]


def _counted(added: Sequence[Member], old: set[int]) -> Addition:
    joined = [member.group for member in added if member.group in old]
    founded = {member.group for member in added} - old
    return Addition(len(added), len(joined), len(np.unique(joined)), len(founded))
