"""Show what a run has learned: rank lists, clusters, a map of features, and curves over epochs, as one web page."""

from __future__ import annotations

import argparse
import io
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from fastreid_uns.commands import finished
from fastreid_uns.errors import InvalidState, InvalidValue, UnknownName
from fastreid_uns.utils.places import path_of

if TYPE_CHECKING:
    from torch import Tensor

    from fastreid_uns.commands.pictures import Row
    from fastreid_uns.evaluation.retrieval import QueryScores, Ranker
    from fastreid_uns.structures import Record, ReIDData

Section = tuple[str, str, str]  # heading, explanation, HTML
PARTS = ("curves", "ranks", "clusters", "map")
PANELS = {
    "clustering": ("clusters", "outliers"),
    "images in a cluster": ("median_cluster", "largest_cluster"),
    "agreement of clusters with the truth": ("ARI", "NMI", "purity"),
    "retrieval in percent": ("mAP", "rank1"),
    "loss": ("loss",),
}


class Options(NamedTuple):
    """What a report shows."""

    parts: Sequence[str] = PARTS
    test: str | None = None  # name below DATASETS.TESTS; None = the first
    queries: int = 8  # of each kind
    top: int = 10  # gallery images of a query
    clusters: int = 20
    members: int = 14  # images of a cluster
    identities: int = 12  # in the map of features, at most 20
    device: str = "auto"
    seed: int = 0


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line of `report`, with the defaults of `Options`."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.set_defaults(**Options()._asdict())
    parser.add_argument("run", type=path_of, help="OUTPUT_DIR of a run, or a checkpoint")
    parser.add_argument("--output", type=path_of, help="folder of the page (default: report beside the checkpoint)")
    parser.add_argument("--parts", nargs="+", choices=PARTS, metavar="PART", help=f"{', '.join(PARTS)} (default: all)")
    parser.add_argument("--test", metavar="NAME", help="name below DATASETS.TESTS (default: the first)")
    for name, what in {
        "queries": "queries of each kind: best, worst, random",
        "top": "gallery images of a query",
        "clusters": "clusters to show, from the largest to the smallest",
        "members": "images of a cluster",
        "identities": "identities in the map of features, at most 20",
        "seed": "seed of the random queries and of the map",
    }.items():
        parser.add_argument(f"--{name}", type=int, metavar="N", help=f"{what} (default: %(default)s)")
    parser.add_argument("--device", help="auto, cpu or cuda (default: %(default)s)")
    parser.add_argument(
        "--plugins",
        action="append",
        default=[],
        metavar="FOLDER",
        help="plugin folder of the run to import; once for each",
    )
    parser.add_argument("overrides", nargs="*", metavar="KEY VALUE", help="keys of the run's config to change")
    return parser.parse_intermixed_args(arguments)


def choose_queries(scores: QueryScores, count: int, seed: int = 0) -> dict[str, list[int]]:
    """Positions of the best, the worst and of random queries by average precision; those without a match are out."""
    import torch

    precision = scores.average_precision
    valid = precision.isfinite().nonzero().flatten()
    order = valid[precision[valid].argsort(stable=True)]
    shuffled = valid[torch.randperm(len(valid), generator=torch.Generator().manual_seed(seed))]
    return {
        "best": order.flip(0)[:count].tolist(),
        "worst": order[:count].tolist(),
        "random": shuffled[:count].sort().values.tolist(),
    }


def rank_rows(
    data: ReIDData, ranker: Ranker, scores: QueryScores, query: Tensor, gallery: Tensor, chosen: Sequence[int], top: int
) -> list[Row]:
    """A row for each chosen query: the query, then its nearest gallery images, green = match, red = not.

    Distances and the choice of valid gallery images are those of the score.

    Args:
        query, gallery: (Q,D) and (G,D) float32, unit length.
        chosen: positions of queries.
        top: gallery images in a row.
    """
    from fastreid_uns.commands.pictures import GREEN, RED, Cell, Row
    from fastreid_uns.evaluation.retrieval import distance_blocks

    rows = []
    for q in chosen:
        record = data.query[q]
        nearest = ranker.lists(distance_blocks(query[q : q + 1], gallery), top, first_query=q)[0].tolist()
        cells = [Cell(record.path, "black", f"query, {_camera(record)}")]
        for g in nearest:
            if g >= 0:
                colour = GREEN if ranker.is_match(q, g) else RED
                cells.append(Cell(data.gallery[g].path, colour, _camera(data.gallery[g])))
        title = (
            f"query {q}, identity {record.identity}: AP {100 * scores.average_precision[q]:.1f} %, first match at rank "
            f"{int(scores.first_rank[q])} (nearest first)"
        )
        rows.append(Row(title, cells, lead=True))
    return rows


def cluster_rows(labels: Tensor, records: Sequence[Record], count: int = 20, members: int = 14) -> list[Row]:
    """A row for each of `count` clusters, evenly from the largest to the smallest, and one of outliers.

    Borders tell the true identities of a cluster, the most frequent one green; grey = unknown.

    Args:
        labels: (N,) -1 outlier.
        records: of the N training images.
        count: clusters.
        members: images in a row.
    """
    from fastreid_uns.commands.pictures import GREY, PALETTE, Cell, Row

    groups: dict[int, list[Record]] = {}
    for label, record in zip(labels.tolist(), records, strict=True):
        groups.setdefault(label, []).append(record)
    outliers = groups.pop(-1, [])
    order = sorted(groups, key=lambda label: (-len(groups[label]), label))
    rows = []
    for label in _evenly(order, count):
        group = groups[label]
        identities = Counter(record.identity for record in group if record.identity >= 0)
        colours = {identity: PALETTE[min(i, 7)] for i, (identity, _) in enumerate(identities.most_common())}
        cameras = len({record.camera for record in group if record.camera >= 0})
        purity = f", {100 * max(identities.values()) / identities.total():.0f} % of one identity" if identities else ""
        cells = [Cell(r.path, colours.get(r.identity, GREY), _camera(r)) for r in _evenly(group, members)]
        seen = f" from {cameras} camera{'s' * (cameras > 1)}" if cameras else ""
        title = f"cluster {label}: {len(group)} images{seen}{purity}"
        rows.append(Row(title, cells))
    if outliers:
        cells = [Cell(record.path, GREY, _camera(record)) for record in _evenly(outliers, members)]
        rows.append(Row(f"outliers: {len(outliers)} in no cluster", cells))
    return rows


def draw_map(feats: Tensor, records: Sequence[Record], chosen: Sequence[int], file: Path, seed: int = 0) -> None:
    """Draw a t-SNE of the images of some identities: colour = identity, marker = camera.

    Args:
        feats: (N,D) float32, unit length.
        records: of the N images.
        chosen: identities, at most 20.
    """
    from sklearn.manifold import TSNE

    plt = _matplotlib()
    rows = [i for i, record in enumerate(records) if record.identity in set(chosen)]
    if len(rows) < 4:
        raise InvalidValue(f"map of features: {len(rows)} images of the chosen identities; at least 4 are needed.")
    points = TSNE(
        metric="cosine", init="random", perplexity=min(30, (len(rows) - 1) / 3), random_state=seed
    ).fit_transform(feats[rows].cpu().numpy())
    figure, axes = plt.subplots(figsize=(8, 6), layout="constrained")
    for c, identity in enumerate(chosen):
        for m, camera in enumerate(sorted({records[i].camera for i in rows})):
            at = [p for p, i in enumerate(rows) if records[i].identity == identity and records[i].camera == camera]
            axes.scatter(*points[at].T, s=22, color=plt.cm.tab20(c % 20), marker="osD^vPX*<>"[m % 10])
        axes.plot([], [], "o", color=plt.cm.tab20(c % 20), label=str(identity))
    axes.legend(title="identity", loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)
    axes.set(xticks=[], yticks=[], title="t-SNE of features: colour = identity, marker = camera")
    _save(figure, file)
    plt.close(figure)


def _save(figure: Any, file: Path) -> None:
    from fastreid_uns.commands.output import write_output

    stream = io.BytesIO()
    figure.savefig(stream, format="png", dpi=110)
    write_output(file, stream.getvalue())


def draw_curves(lines: Sequence[dict[str, Any]], file: Path) -> bool:
    """Draw the numbers of `metrics.jsonl` over epochs; False, and no file, where there is nothing to draw.

    Args:
        lines: one for each epoch; a number may be absent from some of them. `market/mAP` counts as mAP of market.
    """
    keys = sorted({key for line in lines for key in line})
    panels = {}
    for title, names in PANELS.items():
        found = [key for name in names for key in keys if key == name or key.endswith(f"/{name}")]
        if found:
            panels[title] = found
    if not panels:
        return False
    plt = _matplotlib()
    lines_of_panels = -(-len(panels) // 3)
    figure, axes = plt.subplots(
        lines_of_panels, 3, figsize=(12, 3.2 * lines_of_panels), layout="constrained", squeeze=False
    )
    for axis, (title, found) in zip(axes.flat, panels.items(), strict=False):
        for key in found:
            points = [(line["epoch"] + 1, line[key]) for line in lines if key in line]
            axis.plot(*zip(*points, strict=True), marker=".", label=key)
        if title == "images in a cluster":
            axis.set_yscale("log")
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.set(title=title, xlabel="epoch")
        axis.legend(frameon=False)
        axis.grid(alpha=0.3)
    for axis in axes.flat[len(panels) :]:
        axis.remove()
    _save(figure, file)
    plt.close(figure)
    return True


def make_report(
    run: str | Path,
    output: str | Path | None = None,
    options: Options | None = None,
    overrides: Sequence[str] = (),
    plugins: Sequence[str] = (),
) -> Path:
    """Write `index.html` and PNG pictures about a run.

    Args:
        run: OUTPUT_DIR, or a checkpoint.
        output: folder; None = `report` beside the checkpoint.
        options: what to show, None = the defaults; what the run does not have is left out.
        overrides: `KEY VALUE ...` of the run's config, for example to point to images that have moved.
        plugins: plugin folders of the run to import; those that are installed are imported anyway.

    Returns:
        The page.
    """
    from fastreid_uns.commands.output import make_folder
    from fastreid_uns.commands.pictures import write_page
    from fastreid_uns.config import parse_config
    from fastreid_uns.predictor import find_checkpoint, load_run

    options = options or Options()
    if {"curves", "map"} & set(options.parts):
        _matplotlib()
    file = Path(find_checkpoint(run))
    folder = Path(output) if output else file.parent / "report"
    make_folder(folder)
    content, model = load_run(file, plugins=plugins)
    cfg = parse_config(content["config"], file.name, overrides, plugins=plugins, model_only=True)
    height, width = cfg.INPUT.SIZE
    size = (128, max(16, round(128 * width / height)))
    sections: list[Section] = []
    if "curves" in options.parts:
        sections += _curves_section(file.with_name("metrics.jsonl"), folder)
    if {"ranks", "map"} & set(options.parts) and _is_here(_test_section(cfg, options), "ranks and map"):
        data, query, gallery = _features(cfg, model, options)
        if "ranks" in options.parts:
            sections += _rank_sections(data, query, gallery, folder, size, options)
        if "map" in options.parts:
            sections += _map_section(data, query, gallery, folder, options)
    if "clusters" in options.parts and _is_here(cfg.DATASETS.TRAIN, "clusters"):
        sections += _cluster_section(cfg, content, folder, size, options)
    if not sections:
        raise InvalidValue(f"{file}: nothing to show; the run has no {', '.join(options.parts)}. Choose other --parts.")
    page = folder / "index.html"
    write_page(f"{file.parent.name}, {content.get('epochs_done', '?')} epochs", sections, page)
    return page


def _curves_section(file: Path, folder: Path) -> list[Section]:
    from fastreid_uns.commands.pictures import picture_html
    from fastreid_uns.engine.log import read_metrics

    if not draw_curves(read_metrics(file), folder / "curves.png"):
        return []
    return [("Curves", "Numbers of each epoch.", picture_html(folder / "curves.png", "curves"))]


def _rank_sections(
    data: ReIDData, query: Tensor, gallery: Tensor, folder: Path, size: tuple[int, int], options: Options
) -> list[Section]:
    from fastreid_uns.commands.pictures import rows_html, write_png
    from fastreid_uns.evaluation.retrieval import Ranker, distance_blocks

    ranker = Ranker.of(data)
    scores = ranker.score(distance_blocks(query, gallery))
    numbers = ", ".join(f"{name} {value:.2f}" for name, value in scores.summary().items() if name != "queries")
    out = " Images of the query's identity and camera are left out, as in the score."
    text = f"Green = same identity, red = another.{out if data.protocol == 'cross_camera' else ''} {numbers}."
    order = {"best": "highest AP first", "worst": "lowest AP first", "random": "as they come"}
    sections = []
    for kind, chosen in choose_queries(scores, options.queries, options.seed).items():
        rows = rank_rows(data, ranker, scores, query, gallery, chosen, options.top)
        write_png(rows, folder / f"ranks_{kind}.png", size)
        sections.append((f"Rank lists: {kind} queries, {order[kind]}", text, rows_html(rows, size)))
    return sections


def _map_section(data: ReIDData, query: Tensor, gallery: Tensor, folder: Path, options: Options) -> list[Section]:
    import torch

    from fastreid_uns.commands.pictures import picture_html

    queried = {record.identity for record in data.query}
    count = Counter(record.identity for record in data.gallery if record.identity in queried)
    chosen = sorted(identity for identity, _ in count.most_common(min(options.identities, 20)))
    draw_map(torch.cat([query, gallery]), [*data.query, *data.gallery], chosen, folder / "map.png", options.seed)
    text = "The queried identities with the most gallery images."
    return [("Map of features", text, picture_html(folder / "map.png", "t-SNE of features"))]


def _test_section(cfg: Any, options: Options) -> Any:
    """The data set to show; None if the run has none."""
    tests = cfg.DATASETS.TESTS
    if options.test is not None and options.test not in tests:
        raise UnknownName(f"--test {options.test} is none of DATASETS.TESTS: {', '.join(tests)}.")
    return tests[options.test] if options.test else next(iter(tests.values()), None)


def _is_here(section: Any, parts: str) -> bool:
    """Whether the data set of a section can be read; what cannot is left out with a word."""
    from fastreid_uns.registry import DATASET_REGISTRY

    if section is None:
        return False
    if section.NAME and section.NAME not in DATASET_REGISTRY:
        print(f"{parts} left out: no plugin here registers the data set {section.NAME}; see --plugins", file=sys.stderr)
        return False
    return True


def _features(cfg: Any, model: Any, options: Options) -> tuple[ReIDData, Tensor, Tensor]:
    import torch

    from fastreid_uns.data.image_set import ImageSet
    from fastreid_uns.evaluation.extract import extract_features
    from fastreid_uns.registry import DATASET_REGISTRY

    data = DATASET_REGISTRY.build(_test_section(cfg, options))
    images = ImageSet([*data.query, *data.gallery], tuple(cfg.INPUT.SIZE), workers=cfg.DATALOADER.WORKERS)
    device = options.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    found = extract_features(model.to(device), images, device=device, batch_size=cfg.TEST.BATCH_SIZE)["feats"]
    return data, found[: len(data.query)], found[len(data.query) :]


def _cluster_section(
    cfg: Any, content: dict[str, Any], folder: Path, size: tuple[int, int], options: Options
) -> list[Section]:
    from fastreid_uns.commands.pictures import rows_html, write_png
    from fastreid_uns.data.image_check import check_images
    from fastreid_uns.registry import DATASET_REGISTRY

    labels = content.get("hooks", {}).get("ReclusterHook", {}).get("labels")
    if labels is None:
        return []
    records = DATASET_REGISTRY.build(cfg.DATASETS.TRAIN).train
    if len(records) != len(labels):  # the run may have left out unreadable images
        records = check_images(records, on_bad=cfg.INPUT.ON_BAD_IMAGE, what="DATASETS.TRAIN")
    if len(records) != len(labels):
        raise InvalidValue(
            f"clusters: the run clustered {len(labels):,} images, DATASETS.TRAIN now has {len(records):,}. Point its "
            f"ROOT to the images of the run, or leave out the part clusters."
        )
    rows = cluster_rows(labels, records, options.clusters, options.members)
    write_png(rows, folder / "clusters.png", size)
    text = (
        f"{int(labels.max()) + 1:,} clusters of the last clustering, shown evenly from the largest to the smallest. "
        f"Borders: true identity, which training does not see; green = most frequent of the cluster, grey = unknown."
    )
    return [("Clusters", text, rows_html(rows, size))]


def _evenly(items: Sequence[Any], count: int) -> list[Any]:
    """At most `count` items, evenly spread from the first to the last."""
    if len(items) <= count:
        return list(items)
    return [items[i * (len(items) - 1) // max(1, count - 1)] for i in range(count)]


def _camera(record: Record) -> str:
    return f"camera {record.camera}" if record.camera >= 0 else ""


def _matplotlib() -> Any:
    try:
        import matplotlib
    except ImportError:
        raise InvalidState(
            "visualize: matplotlib is not installed; curves and map need it. Run pip install 'fastreid_uns[viz]', or "
            "choose --parts ranks clusters."
        ) from None
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt


def main(arguments: list[str] | None = None) -> int:
    args = parse_arguments(arguments)
    options = Options(**{name: getattr(args, name) for name in Options._fields})
    return finished(lambda: print(make_report(args.run, args.output, options, args.overrides, args.plugins)))
