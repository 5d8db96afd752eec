"""Search images by example: `build` makes an index of a folder, `query` finds what looks like an image.

An index is one file with the network inside: it needs neither the run nor the images that it was made from.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastreid_uns.commands import finished
from fastreid_uns.errors import InvalidState, InvalidValue, MissingFile
from fastreid_uns.utils.places import path_of

if TYPE_CHECKING:
    from fastreid_uns.photos.index import Index
    from fastreid_uns.predictor import FeatureExtractor


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line of `search` and of its four commands."""
    parser = argparse.ArgumentParser(
        prog="fastreid-uns search", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    build = commands.add_parser("build", help="features of all images below a folder → index")
    build.add_argument("folder", type=path_of, help="images, at any depth")
    build.add_argument("index", type=path_of, help="file to write, for example gallery.safetensors")
    build.add_argument("--weights", required=True, type=path_of, help="checkpoint, or OUTPUT_DIR of a run")
    build.add_argument("--overwrite", action="store_true", help="replace an index that is there")
    add = commands.add_parser("add", help="take further images into an index")
    add.add_argument("index", type=path_of, help="file that build wrote")
    add.add_argument("images", type=path_of, nargs="+", help="images, or folders of them")
    remove = commands.add_parser("remove", help="take images out of an index; their files stay")
    remove.add_argument("index", type=path_of, help="file that build wrote")
    remove.add_argument("images", type=path_of, nargs="+", help="images, which may be gone, or folders of them")
    query = commands.add_parser("query", help="the images of an index that are nearest to each of some images")
    query.add_argument("index", type=path_of, help="file that build or group wrote")
    query.add_argument("images", type=path_of, nargs="+", metavar="image", help="what to look for")
    query.add_argument("--top", type=int, default=10, help="images to show for each (default: %(default)s)")
    query.add_argument("--json", action="store_true", help="one line of JSON for each image, and no page")
    query.add_argument("--html", type=path_of, help="page to write (default: the index with the suffix .html)")
    for command in (build, add, query):
        command.add_argument(
            "--plugins", action="append", default=[], metavar="FOLDER", help="plugin folder of the run"
        )
        command.add_argument("--device", default="auto", help="auto, cpu or cuda (default: %(default)s)")
        command.add_argument("--workers", type=int, default=0, help="processes that decode (default: %(default)s)")
    return parser.parse_args(arguments)


def build(given: argparse.Namespace) -> None:
    """Write an index of all images below a folder.

    Raises:
        MissingFile: there is no such folder.
        InvalidState: the index exists and shall not be replaced.
    """
    import torch

    from fastreid_uns.photos.index import Index, weights_fingerprint
    from fastreid_uns.photos.network import Network
    from fastreid_uns.predictor import list_images

    if not given.folder.is_dir():
        raise MissingFile(f"{given.folder}: no such folder. Check the path.")
    if given.index.exists() and not given.overwrite:
        raise InvalidState(f"{given.index}: exists already. Choose another name, or say --overwrite.")
    files = list_images(given.folder)
    network = Network.of_run(given.weights, given.plugins)
    feats = extractor_of(network, given)(files)
    folder = given.folder.resolve()
    weights = {name: value.detach().cpu().clone() for name, value in network.encoder.state_dict().items()}
    index = Index(
        feats,
        [_name(file, folder) for file in files],
        torch.arange(1, len(files) + 1),  # nobody knows which of them show the same
        network.preprocessing(),
        weights_fingerprint(weights),
        weights,
        about={**network.about(), "folder": str(folder)},
    )
    index.save(given.index, overwrite=given.overwrite)
    print(f"{given.index}: {len(index):,} images, {feats.shape[1]} features each")


def add(given: argparse.Namespace) -> None:
    """Take images into an index that are not in it yet; each is a group of its own."""
    import torch

    from fastreid_uns.photos.index import Index
    from fastreid_uns.photos.network import Network

    index = Index.load(given.index)
    folder = _folder(index, given.index)
    names = {_name(file, folder): file for image in given.images for file in _images(image)}
    files = {name: file for name, file in names.items() if name not in set(index.paths)}
    if files:
        feats = extractor_of(Network.of_index(index, given.plugins), given)(list(files.values()))
        first = int(index.groups.max()) + 1
        index.add(feats, list(files), torch.arange(first, first + len(files)))
        index.save(given.index, overwrite=True)
    there = f", {len(names) - len(files):,} were in it" if len(files) < len(names) else ""
    print(f"{given.index}: {len(files):,} images added{there}; it has {len(index):,} now")


def remove(given: argparse.Namespace) -> None:
    """Take images, or all below a folder, out of an index."""
    from fastreid_uns.photos.index import Index

    index = Index.load(given.index)
    folder = _folder(index, given.index)
    gone: list[str] = []
    for image in given.images:
        name = _name(str(image), folder)
        below = [path for path in index.paths if path == name or path.startswith(f"{name}/")]
        gone += below or [name]
    index.remove(list(dict.fromkeys(gone)))
    index.save(given.index, overwrite=True)
    print(f"{given.index}: {len(set(gone)):,} images removed; it has {len(index):,} now")


def query(given: argparse.Namespace) -> None:
    """Print the nearest images of each image, and write the page that shows them.

    Raises:
        InvalidValue: no image shall be shown.
        MissingFile: an image does not exist.
    """
    from fastreid_uns.photos.index import Index
    from fastreid_uns.photos.network import Network

    if given.top < 1:
        raise InvalidValue(f"--top {given.top}: at least one image must be shown. Raise it.")
    for image in given.images:
        if not image.is_file():
            raise MissingFile(f"{image}: no such image. Check the path.")
    index = Index.load(given.index)
    extractor = extractor_of(Network.of_index(index, given.plugins), given)
    found = index.search(extractor([str(image) for image in given.images]), given.top)
    answers = [
        [(value, _file(index, given.index, row)) for value, row in zip(values, rows, strict=True)]
        for values, rows in zip(found.similarity.tolist(), found.rows.tolist(), strict=True)
    ]
    if given.json:
        for image, answer in zip(given.images, answers, strict=True):
            nearest = [{"image": file, "similarity": round(value, 6)} for value, file in answer]
            print(json.dumps({"query": str(image), "nearest": nearest}))
        if given.html is None:
            return
    else:
        _print(given.images, answers)
    page = given.html or given.index.with_suffix(".html")
    _write_page(page, given.images, answers, len(index), extractor.size)
    if not given.json:
        print(page)


def extractor_of(network: Any, given: argparse.Namespace) -> FeatureExtractor:
    """What makes the features of images."""
    from fastreid_uns.predictor import FeatureExtractor

    return FeatureExtractor(network.encoder, network.size, device=given.device, workers=given.workers)


def _images(image: Path) -> list[str]:
    from fastreid_uns.predictor import list_images

    return list_images(image)


def _name(file: str, folder: Path) -> str:
    """What an image is called in the index: its place below the folder of the index, else its whole path."""
    path = Path(os.path.abspath(file))
    for place in (path, Path(os.path.realpath(path.parent)) / path.name):
        if place.is_relative_to(folder):
            return place.relative_to(folder).as_posix()
    return path.as_posix()


def _folder(index: Index, file: Path) -> Path:
    """
    Raises:
        InvalidState: it is the index of grouped photos.
    """
    if "folder" not in index.about:
        raise InvalidState(f"{file}: this is the index of grouped photos. Use `fastreid-uns add` for these.")
    return Path(index.about["folder"])


def _file(index: Index, file: Path, row: int) -> str:
    """The image of a row."""
    if "folder" in index.about:
        return str(Path(index.about["folder"]) / index.paths[row])
    from fastreid_uns.photos.store import PhotoRun

    return str(PhotoRun(file.parent).photo(index.paths[row]))


def _print(images: Sequence[Path], answers: Sequence[Sequence[tuple[float, str]]]) -> None:
    for image, answer in zip(images, answers, strict=True):
        if len(images) > 1:
            print(f"{image}:")
        for rank, (value, file) in enumerate(answer, start=1):
            print(f"{rank:3d}  {value:.4f}  {file}")


def _write_page(
    page: Path,
    images: Sequence[Path],
    answers: Sequence[Sequence[tuple[float, str]]],
    count: int,
    size: tuple[int, int],
) -> None:
    from fastreid_uns.commands.pictures import GREY, Cell, Row, rows_html, write_page

    shown = (160, round(160 * size[1] / size[0]))
    explanation = f"Nearest of {count:,} images first; the number is the cosine similarity."
    sections = []
    for image, answer in zip(images, answers, strict=True):
        cells = [Cell(str(image), "black", "query")]
        cells += [Cell(file, GREY, f"{rank}: {value:.3f}") for rank, (value, file) in enumerate(answer, start=1)]
        sections.append((image.name, explanation, rows_html([Row(str(image), cells, lead=True)], shown)))
    write_page("Search", sections, page)


def main(arguments: Sequence[str] | None = None) -> int:
    """See `commands.main`."""
    given = parse_arguments(arguments)
    return finished({"build": build, "add": add, "remove": remove, "query": query}[given.command], given)
