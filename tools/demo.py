"""The first run: generate a set, train on it without labels, and compare with what needs no training."""

from __future__ import annotations

import argparse
import shutil
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))


def colour_statistics(records, stripes: int = 6, bins: int = 8):
    """Unit-length histograms of the three channels in horizontal stripes: what colour alone can tell.

    Returns:
        (N, stripes * 3 * bins) float32.
    """
    import numpy as np
    import torch

    from fastreid_uns.data.decode import read_image

    rows = []
    for record in records:
        pixels = np.asarray(read_image(record.path))
        parts = [
            np.histogram(stripe[..., channel], bins=bins, range=(0, 256))[0] / stripe[..., channel].size
            for stripe in np.array_split(pixels, stripes)
            for channel in range(3)
        ]
        rows.append(np.sqrt(np.concatenate(parts)))
    return torch.nn.functional.normalize(torch.tensor(np.stack(rows), dtype=torch.float32))


def photos_of(records, folder: Path, individuals: int = 10, each: int = 6):
    """Some photos of a few individuals in one folder, under names that say nothing; who is on each, by name."""
    chosen: dict[int, list] = {}
    for record in records:
        chosen.setdefault(record.identity, []).append(record)
    kept = [record for own in list(chosen.values())[:individuals] for record in own[:each]]
    folder.mkdir(parents=True)
    truth = {}
    for number, record in enumerate(sorted(kept, key=lambda record: hash_of(record.path))):
        name = f"IMG_{number:04d}{Path(record.path).suffix}"
        shutil.copy(record.path, folder / name)
        truth[name] = record.identity
    return truth


def hash_of(path: str) -> str:
    import hashlib

    return hashlib.sha256(Path(path).name.encode()).hexdigest()


def show_photos(records, folder: Path) -> None:
    """The other way: from a folder of photos to groups, with pretrained weights, as `fastreid-uns group` does."""
    from sklearn.metrics import adjusted_rand_score

    from fastreid_uns.commands.group import summary
    from fastreid_uns.engine.log import logger
    from fastreid_uns.errors import UserError
    from fastreid_uns.photos.road import group_photos

    shutil.rmtree(folder, ignore_errors=True)
    truth = photos_of(records, folder / "photos")
    try:
        run = group_photos(folder / "photos", folder / "out", size=(128, 64))
    except UserError as error:
        logger.info("Grouping photos is left out: %s", error)
        return
    members = run.groups()
    score = adjusted_rand_score([truth[one.path] for one in members], [one.group for one in members])
    lines = "\n".join(summary(run))
    logger.info("Groups of %d photos; adjusted Rand index %.2f\n\n%s\n", len(members), score, lines)


def main() -> None:
    from fastreid_uns.utils.places import path_of

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config-file", default=str(ROOT / "configs/quickstart.yaml"))
    parser.add_argument("--output", type=path_of, default="output/demo")
    parser.add_argument("overrides", nargs="*", metavar="KEY VALUE")
    arguments = parser.parse_intermixed_args()

    from tabulate import tabulate

    from fastreid_uns.commands.report import make_report
    from fastreid_uns.config import load_config
    from fastreid_uns.engine.default import DefaultTrainer
    from fastreid_uns.engine.log import logger, setup_logging
    from fastreid_uns.evaluation.retrieval import retrieve
    from fastreid_uns.registry import DATASET_REGISTRY

    folder = arguments.output
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    setup_logging(folder)
    start = time.perf_counter()
    cfg = load_config(arguments.config_file, [*arguments.overrides, f"OUTPUT_DIR={folder}"])
    name, section = next(iter(cfg.DATASETS.TESTS.items()))
    logger.info("Generating the images of %s", section.NAME)
    data = DATASET_REGISTRY.build(section)
    trainer = DefaultTrainer(cfg)
    rows = {
        "colour statistics": retrieve(colour_statistics(data.query), colour_statistics(data.gallery), data),
        "untrained network": DefaultTrainer.test(cfg, trainer.model)[name],
    }
    trainer.train()
    rows["trained without labels"] = trainer.results[name]
    metrics = ["mAP", "rank1", "rank5", "mINP"]
    body = [[label, *(numbers[metric] for metric in metrics)] for label, numbers in rows.items()]
    logger.info("\n%s\n", tabulate(body, ["", *metrics], floatfmt=".2f", tablefmt="github"))
    report = make_report(folder)
    show_photos(data.train, folder.with_name(f"{folder.name}-photos"))
    logger.info("%.0f seconds. The report: %s", time.perf_counter() - start, report)


if __name__ == "__main__":
    main()
