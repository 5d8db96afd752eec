"""From a folder of photos to individuals: the whole way of `fastreid-uns group`, and of `group_photos` in Python."""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fastreid_uns import __version__
from fastreid_uns.data.image_set import ImageSet
from fastreid_uns.errors import InvalidState, InvalidValue
from fastreid_uns.photos.adapt import Adaptation
from fastreid_uns.photos.album import Album, read_album
from fastreid_uns.photos.cost import estimate
from fastreid_uns.photos.decisions import Decisions
from fastreid_uns.photos.group import Features, Settings, cluster, embed, for_count
from fastreid_uns.photos.informative import meeting_heights, refitted_threshold
from fastreid_uns.photos.local import LocalMatch
from fastreid_uns.photos.network import Network, Origin, describe, start
from fastreid_uns.photos.outcome import constraints_of, members_of, thresholds_of, write_outcome
from fastreid_uns.photos.report import write_report
from fastreid_uns.photos.store import PhotoRun
from fastreid_uns.photos.teller import Teller, plural
from fastreid_uns.photos.verdict import calibrate, draw, judge
from fastreid_uns.photos.view_store import ViewStore
from fastreid_uns.pseudo_labels.constraints import Constraints
from fastreid_uns.utils.comm import choose_device
from fastreid_uns.utils.environment import commit
from fastreid_uns.utils.places import expanded, path_of

MANY = 500  # photos from which on time and memory are stated before the work begins

Ask = Callable[[PhotoRun], None]


@dataclass(frozen=True)
class Wishes:
    """What a user can choose; a run keeps it, and `resume` takes it from there.

    Attributes:
        weights: see `network.describe`.
        size: height and width in pixels; None = about 224 x 224 pixels in the shape of the photos.
        training: adapt the network to the photos.
        config_file: YAML of the network.
        seed: of views and training, from 0.
        copy: copies of the photos in groups/, not links.

    Raises:
        InvalidValue: the seed is out of range.
    """

    weights: str = "imagenet"
    size: tuple[int, int] | None = None
    training: bool = True
    config_file: str | None = None
    seed: int = 0
    copy: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.seed < 2**31:
            raise InvalidValue(f"seed is {self.seed}; whole numbers from 0 to {2**31 - 1:,} are accepted. Change it.")


@dataclass
class _Watch:
    """Seconds of each step."""

    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def step(self, name: str):
        begin = time.monotonic()
        yield
        self.seconds[name] = round(time.monotonic() - begin, 1)


def group_photos(
    photos: str | Path | None,
    output: str | Path,
    *,
    resume: bool = False,
    device: str | None = None,
    ask: Ask | None = None,
    teller: Teller | None = None,
    **wishes: Any,
) -> PhotoRun:
    """Find out which photos of a folder show the same individual: `group_photos("photos", "out").groups()`.

    An interrupted call goes on when it is made again.

    Args:
        photos: the folder, read at any depth; None with `resume` takes that of the run.
        output: folder of the results, see `store`; it may be inside of `photos`.
        resume: group a finished run again under the decisions that were made since; individuals keep their numbers.
        device: `auto` (CUDA where there is one), `cpu` or `cuda`; None takes `MODEL.DEVICE`, which is `auto` unless
            the YAML of the network says otherwise.
        ask: is called when the groups are written, so that someone can answer `verdict.open_pairs`.
        teller: gets what there is to say; by default the log.
        wishes: fields of `Wishes`.

    Returns:
        The run, with `groups()`.

    Raises:
        MissingFile: no such folder, or no photo in it.
        InvalidState: the output folder is finished, is of other photos, is in use, or cannot be written; or there is
            no such device.
        InvalidValue: a wish or a size that the network does not accept, or decisions that contradict each other.
    """
    teller, watch, output = teller or Teller(), _Watch(), path_of(str(output))
    choose_device(device or "auto")  # before anything is written
    before = PhotoRun(output) if resume else None
    place = Path(os.path.realpath(before.photos if before and photos is None else _given(photos)))
    _refuse_same(place, output)
    with watch.step("look through the folder"):
        folders: dict[str, str | Path] = {"": place, **{f"{name}/": path for name, path in _added(before).items()}}
        album, found = read_album(folders, teller.line, sized=wishes.get("size") is None)
    run = PhotoRun.create(output, place)
    with run.locked():
        teller.begin(output)
        asked = _wishes(run, resume, wishes)
        cfg = describe(place, output, asked.size or found.size, asked.weights, asked.config_file)
        network, origin = start(cfg, len(album))
        network.model.to(choose_device(device or cfg.MODEL.DEVICE))
        run.update(finished=False, asked=asdict(asked))
        with watch.step("read the photos"):
            images = album.images(network.size, output / "state", teller.line)
        _group(run, album, images, network, origin, asked, watch, teller)
        if ask is not None:
            ask(run)
        finish(run, watch.seconds)
    return run


def finish(run: PhotoRun, seconds: dict[str, float] | None = None) -> None:
    """Judge the groups by the answers so far, calibrate their confidence, and write the report."""
    from fastreid_uns.photos.index import Index

    begin = time.monotonic()
    precision = judge(run)
    if precision.answers:
        calibrate(run, precision)
    if seconds is not None:
        run.update(seconds=seconds)
    features = Index.load(run.folder / "index.safetensors").features
    write_report(run, features.numpy())
    run.update(finished=True)
    if seconds is not None:
        run.update(seconds={**seconds, "report": round(time.monotonic() - begin, 1)})


def _group(
    run: PhotoRun,
    album: Album,
    images: ImageSet,
    network: Network,
    origin: Origin,
    asked: Wishes,
    watch: _Watch,
    teller: Teller,
) -> None:
    settings = _settings(network, asked, len(album), teller)
    teller.line(f"weights: {origin.name}")
    if len(album) >= MANY:
        teller.line(str(estimate(len(album), network, settings)))
    decisions = Decisions(run.folder / "decisions.csv")
    constraints = constraints_of(album.names, album.equal, decisions)
    with watch.step("features and training"):
        found = _features(run, album, images, network, settings, constraints, teller)
        network.model.cpu()
    with watch.step("group"):
        settings = _refitted(found, settings, album.names, decisions)
        grouping = cluster(found.feats, settings, constraints, found.local)
    _tell_gone(run, album, teller)
    members = members_of(run, album.names, grouping)
    about = {
        "weights": origin._asdict(),
        "size": list(network.size),
        "settings": {**_told_settings(settings), "local descriptors": "not used" if found.local is None else "used"},
        "scan": album.facts,
        "audit": draw(members, asked.seed),
        "fastreid_uns": __version__,
        "commit": commit(Path(__file__).resolve().parents[2]),
    }
    with watch.step("write the groups"):
        thresholds = thresholds_of(grouping, found.views, constraints)
        write_outcome(
            run, members, grouping, network, settings, constraints, copy=asked.copy, about=about, thresholds=thresholds
        )


def _given(photos: str | Path | None) -> str:
    if photos is None:
        raise InvalidValue("group: no folder of photos is named. Name one, or --resume with a finished output folder.")
    return expanded(str(photos))


def _added(before: PhotoRun | None) -> dict[str, str]:
    """Folders that were added to a run; those that are gone are left out."""
    added = before.about.get("added", {}) if before else {}
    return {name: path for name, path in added.items() if os.path.isdir(path)}


def _refuse_same(photos: Path, output: Path) -> None:
    if Path(os.path.realpath(output)) == photos:
        raise InvalidValue(
            f"{output}: photos and output are the same folder. Choose another output folder; it may be inside of the "
            f"photos."
        )


def _wishes(run: PhotoRun, resume: bool, given: dict[str, Any]) -> Wishes:
    """What the run is asked for: what is given now, else what it was asked for before.

    Raises:
        InvalidState: it is finished, and nobody says `resume`.
        InvalidValue: there is no such wish.
    """
    about = run.about
    if about.get("finished") and not resume:
        raise InvalidState(
            f"{run.folder}: holds {len(set(one.group for one in run.groups())):,} groups already, which are not "
            f"overwritten. Add --resume to group again under your answers, or choose another output folder."
        )
    given = {name: value for name, value in given.items() if value is not None}
    if unknown := given.keys() - Wishes.__dataclass_fields__.keys():
        raise InvalidValue(f"group_photos: {sorted(unknown)[0]!r} is no argument; see Wishes.")
    kept = about.get("asked", {}) if resume else {}
    asked = Wishes(**{**kept, **given})
    return replace(asked, size=tuple(asked.size) if asked.size else None)  # type: ignore[arg-type]


def _settings(network: Network, asked: Wishes, count: int, teller: Teller) -> Settings:
    how = Adaptation() if asked.training else Adaptation(steps=0)
    try:
        network.encoder.backbone.split()  # type: ignore[operator]
    except InvalidState as error:
        if how.steps:
            teller.line(f"grouping without training: {error}")
        how = Adaptation(steps=0)
    return for_count(Settings(adaptation=how, seed=asked.seed), count)


def _told_settings(settings: Settings) -> dict[str, Any]:
    told = asdict(settings)
    return {**{f"training {name}": value for name, value in told.pop("adaptation").items()}, **told}


def _features(
    run: PhotoRun,
    album: Album,
    images: ImageSet,
    network: Network,
    settings: Settings,
    constraints: Constraints,
    teller: Teller,
) -> Features:
    """Features of the photos; the network is trained on the way, or takes the weights of an earlier command."""
    mark = _mark(album, network, settings, constraints)
    earlier = run.state("features", mark)
    if earlier is not None:
        teller.line("features and weights are those of an earlier command; nothing that they depend on has changed")
        found = {name: torch.from_numpy(value) for name, value in earlier.items()}
        feats, views, descriptors = (found.pop(name) for name in Features._fields)
        features = Features(feats, views, LocalMatch(descriptors) if len(descriptors) else None)
        network.encoder.load_state_dict(found)
        return features
    kept = ViewStore(run.folder / "state" / "unfinished.bin", mark)
    if kept.done:
        teller.line(f"{kept.done:,} of {plural(len(album), 'photo')} were done by an earlier command")
    features = embed(images, network.encoder, settings, constraints=constraints, kept=kept, told=teller.share)
    descriptors = torch.empty(0) if features.local is None else features.local.descriptors
    tensors = {**features._asdict(), "local": descriptors, **network.encoder.state_dict()}
    run.save_state("features", mark, {name: value.cpu().numpy() for name, value in tensors.items()})
    kept.remove()
    return features


def _mark(album: Album, network: Network, settings: Settings, constraints: Constraints) -> str:
    """Fingerprint of all that features depend on."""
    whole = hashlib.sha256(repr((__version__, Features._fields, network.config, settings)).encode())
    for file in album.files:
        found = os.stat(file)
        stamp = f"{file}\0{found.st_size}\0{found.st_mtime_ns}\n"
        whole.update(stamp.encode("utf-8", "surrogateescape"))
    if settings.adaptation.steps:
        whole.update(constraints.unit.tobytes() + constraints.cannot.tobytes())
    return whole.hexdigest()


def _refitted(found: Features, settings: Settings, names: list[str], decisions: Decisions) -> Settings:
    """Settings whose threshold agrees best with the answers about pairs."""
    place = {name: position for position, name in enumerate(names)}
    answers = [
        (place[one.first[0]], place[one.second[0]], one.answer == "same")
        for one in decisions.active()
        if one.answer in ("same", "different") and one.first[0] in place and one.second[0] in place
    ]
    if not answers:
        return settings
    pairs = np.array([answer[:2] for answer in answers])
    heights = meeting_heights(cluster(found.feats, settings, local=found.local).dendrogram, pairs)
    same = np.array([answer[2] for answer in answers])
    return replace(settings, threshold=refitted_threshold(settings.threshold, heights, same))


def _tell_gone(run: PhotoRun, album: Album, teller: Teller) -> None:
    gone = {member.path for member in run.groups()} - set(album.names)
    if gone:
        teller.line(f"{len(gone):,} photos of the earlier groups are gone and left out, such as {min(gone)}")
