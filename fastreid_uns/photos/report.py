"""report.html: the groups for people, in one folder, without a network or a server.

The first page says how good the groups are, then shows a map of all photos and the most doubtful groups; further pages
are in report/, so that 20,000 photos stay readable. Small pictures are made once and shared with the review page.

What it tells is in groups.csv and run.json: `audit` with `statement`, `verified` and `advice` (texts, advice empty if
none is needed), `scan` with counts by name, `settings` by name, `weights` with `name` and `sha256`, `seconds` by step,
`size`, `commit`, `fastreid_uns`. What is absent is left out.
"""

from __future__ import annotations

import base64
import functools
import hashlib
import json
import os
import shlex
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from numpy.typing import NDArray
from sklearn.decomposition import PCA
from sklearn.manifold import TSNE

from fastreid_uns.errors import InvalidValue
from fastreid_uns.photos.files import write_file
from fastreid_uns.photos.members import Member
from fastreid_uns.photos.review import Group
from fastreid_uns.photos.store import PhotoRun, resolve
from fastreid_uns.photos.teller import duration
from fastreid_uns.photos.thumbnails import Thumbnails, photo_id
from fastreid_uns.utils.environment import cores
from fastreid_uns.utils.paths import printable
from fastreid_uns.utils.progress import progress

WEB = Path(__file__).parent / "web"
PHOTOS_A_PAGE = 600
NEIGHBOUR_MAP = 5000  # up to so many photos are placed by t-SNE, more by their principal components
UNVERIFIED = "The groups are unverified: nobody has answered whether photos in one group are the same individual."


def write_report(run: PhotoRun, features: NDArray[np.floating] | None = None, seed: int = 0) -> Path:
    """Write report.html and what it shows.

    Args:
        features: (N, D), one for each row of groups.csv in its order; without them there is no map.
        seed: of the map.

    Returns:
        The first page.

    Raises:
        InvalidValue: another number of features than of photos.
        InvalidState: the disk does not allow it.
    """
    members = run.groups()
    if features is not None and len(features) != len(members):
        raise InvalidValue(
            f"report: {len(features)} features and {len(members)} photos were found; one for each photo is accepted."
        )
    _write_thumbnails(run, members)
    groups = _by_doubt(members)
    pages = _pages(groups)
    page_of = {group.number: page for page, shown in enumerate(pages, start=1) for group in shown}
    about = {"facts": _facts(run.about, groups), "tables": _tables(run.about), "map": None}
    if features is not None and members:
        about["map"] = _map_data(members, project(features, seed), page_of)
    for page, shown in enumerate(pages, start=1):
        content = _Page(run, page, len(pages), page_of).html(shown, about)
        write_file(run.folder / _page_name(page), content.encode("utf-8"))
    for old in _further_pages(run.folder):
        if old.name not in {Path(_page_name(page)).name for page in page_of.values()}:
            old.unlink()
    return run.folder / _page_name(1)


def project(features: NDArray[np.floating], seed: int = 0) -> NDArray[np.float64]:
    """Places of photos on a map: similar ones are near each other.

    Args:
        features: (N, D), N >= 1.

    Returns:
        (N, 2) in [0, 1]. The same for the same seed.
    """
    features = np.asarray(features, dtype=np.float64)
    if not np.ptp(features, axis=0).any():
        return np.full((len(features), 2), 0.5)
    kept = min(50, *features.shape)
    components = PCA(kept, svd_solver="full" if len(features) <= NEIGHBOUR_MAP else "randomized", random_state=seed)
    reduced = components.fit_transform(features)
    if 10 <= len(features) <= NEIGHBOUR_MAP and kept > 2:
        perplexity = min(30.0, (len(features) - 1) / 3)
        reduced = TSNE(2, perplexity=perplexity, init="pca", random_state=seed).fit_transform(reduced)
    flat = np.zeros((len(features), 2))
    flat[:, : reduced.shape[1]] = reduced[:, :2]
    low, span = flat.min(axis=0), np.ptp(flat, axis=0)
    return np.where(span > 0, (flat - low) / np.where(span > 0, span, 1), 0.5)


class _Page:
    """One page; knows how its addresses begin."""

    def __init__(self, run: PhotoRun, page: int, pages: int, page_of: dict[int, int]) -> None:
        self.run, self.page, self.pages, self.page_of = run, page, pages, page_of
        self.about = run.about
        self.folder = (run.folder / _page_name(page)).parent

    def html(self, groups: Sequence[Group], about: dict[str, Any]) -> str:
        style, script = ((WEB / f"report.{kind}").read_text(encoding="utf-8") for kind in ("css", "js"))
        return _template().render(
            name=printable(self.run.photos.name),
            review=f"fastreid-uns review {shlex.quote(printable(self.run.folder))}",
            page=self.page,
            links=[(number, self._address(self.run.folder / _page_name(number))) for number in self._shown_pages()],
            pages=self.pages,
            groups=[self._group(group) for group in groups],
            thumbnails=self._address(self.run.folder / "report" / "thumbnails"),
            style=Markup(style),
            script=Markup(script),
            policy=f"default-src 'none'; img-src 'self' file:; style-src {_hash(style)}; script-src {_hash(script)}",
            audit=self.about.get("audit") or {"statement": UNVERIFIED, "verified": False, "advice": ""},
            page_names={number: self._address(self.run.folder / _page_name(number)) for number in self._all_pages()},
            **about,
        )

    def _all_pages(self) -> range:
        return range(1, self.pages + 1)

    def _shown_pages(self) -> list[int]:
        """First, last and near pages."""
        return [number for number in self._all_pages() if number in (1, self.pages) or abs(number - self.page) <= 3]

    def _group(self, group: Group) -> dict[str, Any]:
        return {
            "number": group.number,
            "size": len(group.members),
            "doubt": round(100 * group.doubt),
            "nearest": [(number, f"{page}#group-{number}") for number, page in self._nearest(group)],
            "members": [self._member(member) for member in group.members],
        }

    def _nearest(self, group: Group) -> Iterator[tuple[int, str]]:
        for number in group.nearest(self.page_of)[:2]:
            page = self.page_of[number]
            yield number, "" if page == self.page else self._address(self.run.folder / _page_name(page))

    def _member(self, member: Member) -> dict[str, Any]:
        return {
            "name": printable(member.path),
            "file": printable(member.path.rpartition("/")[2]),
            "link": self._address(resolve(self.about, member.path)),
            "thumbnail": _thumbnail_name(member.path),
            "confidence": round(100 * member.confidence),
        }

    def _address(self, file: Path) -> str:
        """Relative, so that the folders can move together."""
        return quote(os.fsencode(os.path.relpath(file, self.folder)))


@functools.cache
def _template():
    folder = Environment(loader=FileSystemLoader(WEB), autoescape=True, undefined=StrictUndefined, trim_blocks=True)
    return folder.get_template("report.html")


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def _page_name(page: int) -> str:
    return "report.html" if page == 1 else f"report/groups-{page:04d}.html"


def _further_pages(folder: Path) -> list[Path]:
    return sorted(folder.glob("report/groups-*.html"))


def _thumbnail_name(path: str) -> str:
    name = photo_id(path)
    return f"{name[:2]}/{name}.jpg"


def _write_thumbnails(run: PhotoRun, members: Sequence[Member]) -> None:
    small, about = Thumbnails(run.folder / "report" / "thumbnails"), run.about
    with ThreadPoolExecutor(cores()) as pool:
        made = pool.map(lambda member: small.file(member.path, resolve(about, member.path)), members)
        for _ in progress(made, "small pictures", len(members)):
            pass


def _by_doubt(members: Sequence[Member]) -> list[Group]:
    """Groups of several photos, the most doubtful first; then the photos that are alone."""
    split: dict[int, list[Member]] = {}
    for member in members:
        split.setdefault(member.group, []).append(member)
    groups = [Group(number, group) for number, group in split.items()]
    return sorted(groups, key=lambda group: (len(group.members) == 1, -group.doubt, group.number))


def _pages(groups: Sequence[Group]) -> list[list[Group]]:
    """Groups on pages of about `PHOTOS_A_PAGE` photos; there is at least one page."""
    pages: list[list[Group]] = [[]]
    filled = 0
    for group in groups:
        if filled and filled + len(group.members) > PHOTOS_A_PAGE:
            pages.append([])
            filled = 0
        pages[-1].append(group)
        filled += len(group.members)
    return pages


def _facts(about: dict[str, Any], groups: Sequence[Group]) -> list[tuple[str, str]]:
    sizes = [len(group.members) for group in groups]
    several = [size for size in sizes if size > 1]
    facts = [
        ("photos", f"{sum(sizes):,}"),
        ("groups of two and more", f"{len(several):,}"),
        ("alone", f"{len(sizes) - len(several):,}"),
        ("largest group", f"{max(sizes, default=0):,}"),
    ]
    scan = about.get("scan") or {}
    return facts + [(printable(name), f"{value:,}") for name, value in scan.items() if isinstance(value, int) and value]


def _tables(about: dict[str, Any]) -> list[tuple[str, list[tuple[str, str]]]]:
    """What the run was, as tables of two columns."""
    weights = about.get("weights") or {}
    seconds = about.get("seconds") or {}
    run = {
        "photos": about["photos"],
        "version of the groups": about.get("version"),
        "weights": weights.get("name"),
        "sha256 of the weights": weights.get("sha256"),
        "input size": " x ".join(map(str, about["size"])) if about.get("size") else None,
        "fastreid_uns": about.get("fastreid_uns"),
        "commit": about.get("commit"),
    }
    steps = [(step, duration(value)) for step, value in seconds.items()]
    steps += [("together", duration(sum(seconds.values())))] if len(seconds) > 1 else []
    tables = [
        ("Run", [(name, value) for name, value in run.items() if value]),
        ("Settings", list((about.get("settings") or {}).items())),
        ("Duration", steps),
    ]
    return [(title, [(printable(a), printable(b)) for a, b in rows]) for title, rows in tables if rows]


def _map_data(members: Sequence[Member], places: NDArray[np.float64], page_of: dict[int, int]) -> Markup:
    """JSON for the script of the page, harmless inside HTML."""
    sizes: dict[int, int] = {}
    for member in members:
        sizes[member.group] = sizes.get(member.group, 0) + 1
    data = {
        "x": (places[:, 0] * 9999).round().astype(int).tolist(),
        "y": (places[:, 1] * 9999).round().astype(int).tolist(),
        "group": [member.group for member in members],
        "id": [photo_id(member.path) for member in members],
        "name": [printable(member.path) for member in members],
        "alone": sorted(number for number, size in sizes.items() if size == 1),
        "page": {str(number): page for number, page in page_of.items()},
    }
    text = json.dumps(data, separators=(",", ":"))
    return Markup(text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026"))
