"""The photos of a run: those of its folder and of all that were added, each file once, without the damaged ones."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from fastreid_uns.data.image_check import reason
from fastreid_uns.data.image_set import ImageSet
from fastreid_uns.data.pixel_cache import CachedImageSet
from fastreid_uns.errors import MissingFile
from fastreid_uns.photos.scan import Scan, scan
from fastreid_uns.structures import Record
from fastreid_uns.utils.environment import cores
from fastreid_uns.utils.paths import printable

_FEW = 64  # photos that are decoded without further processes
_SHOWN = 5

Say = Callable[[str], None]


@dataclass
class Album:
    """Photos of one or more folders.

    Attributes:
        names: as groups.csv has them, in order of folders and names.
        files: real paths.
        equal: positions of photos whose files are equal byte by byte, two or more in each.
        facts: counts of what was found, by name.
    """

    names: list[str] = field(default_factory=list)
    files: list[str] = field(default_factory=list)
    equal: list[list[int]] = field(default_factory=list)
    facts: dict[str, int] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.names)

    def add(self, found: Scan, prefix: str = "") -> None:
        """Take in the photos of a folder; a file that is there already is passed over."""
        place = {file: position for position, file in enumerate(self.files)}
        for name, file in zip(found.names, found.photos, strict=True):
            if file not in place:
                place[file] = len(self.files)
                self.names.append(prefix + name)
                self.files.append(file)
        self.equal += [[place[file] for file in group] for group in found.duplicates]
        counts = {
            "found": len(found.photos),
            "more than once": sum(len(group) - 1 for group in found.duplicates),
            "unreadable": len(found.unreadable),
            "passed over": sum(found.passed_over.values()),
            "hidden": found.hidden,
        }
        self.facts = {name: self.facts.get(name, 0) + count for name, count in counts.items()}

    def keep(self, positions: Sequence[int]) -> None:
        """Leave out all other photos."""
        place = {old: new for new, old in enumerate(positions)}
        self.names = [self.names[old] for old in positions]
        self.files = [self.files[old] for old in positions]
        kept = ([place[old] for old in group if old in place] for group in self.equal)
        self.equal = [group for group in kept if len(group) > 1]

    def images(self, size: tuple[int, int], folder: Path, say: Say) -> ImageSet:
        """The photos as pixels, decoded once into a file that the next command uses again.

        Those that turn out to be damaged are left out, here as well.

        Args:
            size: height and width in pixels.
            folder: of the file.
            say: takes a line for each of the first damaged photos.

        Raises:
            MissingFile: none is left.
            InvalidState: the disk is full.
        """
        images = CachedImageSet(images_of(self.files, size), where="disk", folder=folder, what="photos")
        errors = images.check()
        if errors:
            told = [f"{printable(self.names[at])}: {reason(error)}" for at, error in list(errors.items())[:_SHOWN]]
            more = f"; {len(errors) - _SHOWN:,} more" if len(errors) > _SHOWN else ""
            say(f"{len(errors):,} damaged and left out: {'; '.join(told)}{more}")
            kept = [at for at in range(len(self)) if at not in errors]
            self.facts["unreadable"] = self.facts.get("unreadable", 0) + len(errors)
            self.keep(kept)
            refuse_nothing(self, "photos")
            images.keep(kept)
        return images


def images_of(files: Sequence[str], size: tuple[int, int]) -> ImageSet:
    """Photos as pixels; of many, all cores decode."""
    workers = 0 if len(files) < _FEW else cores()
    return ImageSet([Record(file, -1, -1) for file in files], size, workers=workers)


def read_album(folders: Mapping[str, str | Path], say: Say, *, sized: bool = True) -> tuple[Album, Scan]:
    """The photos of folders, by what their names begin with, and the scan of the first.

    Args:
        say: takes what was found.
        sized: the suggested size of the input will be taken, so it is said.

    Raises:
        MissingFile: no such folder, or no photo in any.
    """
    album, first = Album(), None
    for prefix, folder in folders.items():
        found = scan(folder)
        for line in found.summary(sized):
            say(line)
        album.add(found, prefix)
        first = first or found
    if first is None:
        raise MissingFile("photos: no folder is named. Name one.")
    refuse_nothing(album, first.folder)
    return album, first


def refuse_nothing(album: Album, folder: str) -> None:
    """
    Raises:
        MissingFile: there is no photo.
    """
    if len(album) == 0:
        passed = ", ".join(f"{count:,} {name}" for name, count in album.facts.items() if count)
        raise MissingFile(
            f"{printable(folder)}: no photo can be read there ({passed or 'the folder is empty'}); JPEG, PNG, TIFF, "
            f"WebP and BMP are accepted, at any depth. Name another folder, or convert the pictures."
        )
