"""Search a folder of images by example: `build` turns it into an index, `query` finds what looks like an image."""

from __future__ import annotations

import argparse
import hashlib
import json
import os
from pathlib import Path

from fastreid_uns.commands import finished
from fastreid_uns.errors import InvalidValue, MissingFile


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    build = commands.add_parser("build", help="features of all images below a folder → index")
    build.add_argument("folder", type=Path, help="images, at any depth")
    build.add_argument("index", type=Path, help="file to write, for example gallery.safetensors")
    build.add_argument("--weights", required=True, type=Path, help="checkpoint, or OUTPUT_DIR of a run")
    build.add_argument("--workers", type=int, default=2, help="processes that decode (default: %(default)s)")
    query = commands.add_parser("query", help="the images of an index that are nearest to an image")
    query.add_argument("index", type=Path, help="file that build wrote")
    query.add_argument("image", type=Path, help="what to look for")
    query.add_argument("--top", type=int, default=10, help="images to show (default: %(default)s)")
    query.add_argument("--weights", type=Path, help="checkpoint, if it has moved since the index was built")
    query.add_argument("--html", type=Path, help="page to write (default: the index with the suffix .html)")
    for command in (build, query):
        command.add_argument(
            "--plugins", action="append", default=[], metavar="FOLDER", help="plugin folder of the run"
        )
        command.add_argument("--device", default="auto", help="auto, cpu or cuda (default: %(default)s)")
    return parser.parse_args(arguments)


def digest(file: str) -> str:
    """A fingerprint of the weights: an index can be searched only by the encoder that made it."""
    whole = hashlib.sha256()
    with open(file, "rb") as stream:
        while chunk := stream.read(2**20):
            whole.update(chunk)
    return whole.hexdigest()[:16]


def build(arguments: argparse.Namespace) -> None:
    from safetensors.torch import save_file

    from fastreid_uns.predictor import FeatureExtractor, find_checkpoint, list_images

    if not arguments.folder.is_dir():
        raise MissingFile(f"{arguments.folder}: no such folder. Check the path.")
    paths = list_images(arguments.folder)
    weights = find_checkpoint(arguments.weights)
    extractor = FeatureExtractor.from_checkpoint(
        weights, plugins=arguments.plugins, device=arguments.device, workers=arguments.workers
    )
    about = {
        "folder": str(arguments.folder.resolve()),
        "paths": [os.path.relpath(path, arguments.folder) for path in paths],
        "weights": str(Path(weights).resolve()),
        "digest": digest(weights),
    }
    feats = check_feats(extractor(paths), f"{weights}: the features")
    arguments.index.parent.mkdir(parents=True, exist_ok=True)
    save_file({"feats": feats}, arguments.index, metadata={"index": json.dumps(about)})
    print(f"{arguments.index}: {len(paths):,} images, {feats.shape[1]} features each")


def read_index(file: Path):
    """(feats (N,D), description) of an index.

    Raises:
        FileNotFoundError: there is none.
        ValueError: the file is no index.
    """
    from safetensors import SafetensorError, safe_open

    if not file.is_file():
        raise MissingFile(f"{file}: no such index. Make it with search.py build FOLDER {file} --weights ...")
    try:
        with safe_open(file, framework="pt") as content:
            about = (content.metadata() or {}).get("index")
            feats = content.get_tensor("feats") if about else None
    except SafetensorError as error:
        raise InvalidValue(f"{file}: the file is no index ({error}). Make one with search.py build.") from error
    if feats is None:
        raise InvalidValue(f"{file}: the file holds tensors but is no index. Make one with search.py build.")
    return check_feats(feats, f"{file}: the features of the index"), json.loads(about)


def check_feats(feats, what: str):
    """The features (N,D) as given.

    Raises:
        InvalidValue: there are none, or some are no finite numbers, which would be nearest to everything or nothing.
    """
    if feats.dim() != 2 or feats.numel() == 0 or not bool(feats.isfinite().all()):
        raise InvalidValue(
            f"{what}, of shape {tuple(feats.shape)}, are empty or not all finite; a row of numbers is needed for each "
            f"image. Check the weights, and build the index again with search.py build."
        )
    return feats


def nearest(query, feats, top: int):
    """(similarities, positions) of the `top` rows of feats (N,D) that are nearest to query (D,), nearest first."""
    return (feats @ query).topk(min(top, len(feats)))


def search(arguments: argparse.Namespace) -> None:
    from fastreid_uns.commands.pictures import GREY, Cell, Row, rows_html, write_page
    from fastreid_uns.predictor import FeatureExtractor, find_checkpoint

    if arguments.top < 1:
        raise InvalidValue(f"--top {arguments.top}: at least one image must be shown. Raise it.")
    feats, about = read_index(arguments.index)
    weights = find_checkpoint(arguments.weights or about["weights"])
    if digest(weights) != about["digest"]:
        raise InvalidValue(
            f"{weights}: the index was built with other weights ({about['weights']}, {about['digest']}). Name those "
            f"with --weights, or build the index again."
        )
    extractor = FeatureExtractor.from_checkpoint(weights, plugins=arguments.plugins, device=arguments.device)
    if not arguments.image.is_file():
        raise MissingFile(f"{arguments.image}: no such image. Check the path.")
    query = check_feats(extractor(arguments.image), f"{arguments.image}: the features")
    similarity, position = nearest(query[0], feats, arguments.top)
    cells = [Cell(str(arguments.image), "black", "query")]
    for rank, (value, row) in enumerate(zip(similarity.tolist(), position.tolist(), strict=True), start=1):
        path = str(Path(about["folder"]) / about["paths"][row])
        print(f"{rank:3d}  {value:.4f}  {path}")
        cells.append(Cell(path, GREY, f"{rank}: {value:.3f}"))
    page = arguments.html or arguments.index.with_suffix(".html")
    height, width = extractor.size
    size = (160, round(160 * width / height))
    explanation = f"Nearest of {len(feats):,} images first; the number is the cosine similarity."
    content = rows_html([Row(str(arguments.image), cells, lead=True)], size)
    write_page("Search", [(arguments.image.name, explanation, content)], page)
    print(page)


def main(arguments: list[str] | None = None) -> int:
    args = parse_arguments(arguments)
    return finished(build if args.command == "build" else search, args)
