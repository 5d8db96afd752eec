"""Seconds per stage of one epoch on a generated set as large as Market-1501, with ResNet-50 features of 2,048 numbers.

On a GPU the whole epoch is run: extract, neighbours, cluster, train, evaluate. On a CPU only the pseudo-label stage is
timed, on features of the same network that are extracted once and kept beside the images.
"""

from __future__ import annotations

import argparse
import json
import resource
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

MARKET = {
    "NAME": "synthetic",
    "TRAIN_IDENTITIES": 751,
    "TRAIN_IMAGES": 12936,
    "TEST_IDENTITIES": 750,
    "QUERY_IMAGES": 3368,
    "GALLERY_IMAGES": 15913,
    "DISTRACTORS": 2798,
    "JUNK": 3819,
    "CAMERAS": 6,
    "SIZE": [128, 64],
}


def load(folder: Path, size: list[int]):
    """The recipe of the core on the generated set, from random weights."""
    from fastreid_uns.config import load_config

    data = json.dumps({**MARKET, "ROOT": str(folder / "images")})
    return load_config(
        ROOT / "configs/base.yaml",
        [
            f"DATASETS.TRAIN={data}",
            f"DATASETS.TESTS.synthetic={data}",
            f"INPUT.SIZE={size}",
            "MODEL.WEIGHTS=''",
            "SOLVER.EPOCHS=1",
            "CHECKPOINT.PERIOD=0",
            f"OUTPUT_DIR={folder / 'run'}",
        ],
    )


def dense_labels(feats, section):
    """Labels of the textbook form with its N x N matrices, which the tests hold as their oracle."""
    sys.path.insert(0, str(ROOT / "tests/pseudo_labels"))
    import dense_oracle
    from sklearn.cluster import DBSCAN

    distance = dense_oracle.jaccard(feats, section.K1, section.K2)
    model = DBSCAN(eps=section.EPS, min_samples=section.MIN_SAMPLES, metric="precomputed")
    return model.fit_predict(distance)


def label_stage(folder: Path, repeats: int) -> dict:
    """Time of neighbours and clustering over features of images at half size, and of the dense form on them."""
    import torch

    from fastreid_uns.data.image_set import ImageSet
    from fastreid_uns.engine.default import DefaultTrainer
    from fastreid_uns.engine.solver import precision
    from fastreid_uns.evaluation.extract import extract_features
    from fastreid_uns.registry import DATASET_REGISTRY
    from fastreid_uns.structures import FeatureBank

    cfg = load(folder, [128, 64])
    records = DATASET_REGISTRY.build(cfg.DATASETS.TRAIN).train
    images = ImageSet(records, (128, 64), workers=2)
    file = folder / "feats.pt"
    if not file.is_file():
        torch.manual_seed(cfg.SEED)
        model = DefaultTrainer.build_model(cfg, len(records)).to(memory_format=torch.channels_last).train()
        with torch.no_grad():  # random weights need norm statistics of the data, else all features are alike
            for pixels in images.stream(torch.randperm(len(records))[:2048].split(64), "cpu"):
                model.encoder(pixels)
        torch.save(extract_features(model, images, amp=precision("auto", torch.device("cpu")))["feats"], file)
    feats = torch.load(file, weights_only=True)
    # centred, or random weights leave gaps between neighbours that float32 cannot rank
    bank = FeatureBank(torch.nn.functional.normalize(feats - feats.mean(0)), images.cameras)
    generator = DefaultTrainer.build_generator(cfg)
    runs = []
    for _ in range(repeats + 1):  # the first one compiles
        start = time.perf_counter()
        pseudo = generator(bank, 0)
        runs.append({**generator.seconds, "total": time.perf_counter() - start})
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    start = time.perf_counter()
    labels = dense_labels(bank.feats.numpy(), cfg.PSEUDO_LABELS)
    dense = {"total": time.perf_counter() - start, "equal_labels": bool((labels == pseudo.labels.numpy()).all())}
    return {
        "images": len(records),
        "dim": bank.feats.shape[1],
        "clusters": pseudo.num_clusters,
        "outliers": int((pseudo.labels < 0).sum()),
        "first_call": runs[0],
        "best": min(runs[1:], key=lambda run: run["total"]),
        "peak_gib": peak,
        "dense": {**dense, "peak_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20},
    }


def whole_epoch(folder: Path) -> dict:
    """Metrics of one epoch at 256x128, the images cached on the device."""
    from fastreid_uns.engine.default import DefaultTrainer

    trainer = DefaultTrainer(load(folder, [256, 128]))
    trainer.train()
    return trainer.metrics


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=ROOT / "output/benchmark", help="images, features and logs")
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()

    import torch

    from fastreid_uns.utils.environment import environment

    cuda = torch.cuda.is_available()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    measured = whole_epoch(arguments.folder) if cuda else label_stage(arguments.folder, arguments.repeats)
    result = {**measured, "environment": environment(torch.device("cuda" if cuda else "cpu"))}
    file = Path(__file__).parent / f"epoch_{'gpu' if cuda else 'cpu'}.json"
    file.write_text(json.dumps(result, indent=1) + "\n")
    print(file.read_text())


if __name__ == "__main__":
    main()
