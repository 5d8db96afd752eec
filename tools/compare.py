"""Run configs over seeds, each also with its untrained network and with true labels, and print the table.

One JSON line is appended for each finished run; runs that stand in the file already are not done again.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

KINDS = ("untrained", "pseudo", "oracle")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("configs", nargs="+", help="YAML files")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--output", type=Path, default=Path("output/compare"), help="folder of runs and runs.jsonl")
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="keys changed in every run")
    parser.add_argument("--table-only", action="store_true", help="print what runs.jsonl holds")
    return parser.parse_args()


def run(config: str, kind: str, seed: int, folder: Path, overrides: list[str]) -> dict:
    """Train one config once and give its record."""
    import torch

    from fastreid_uns.config import load_config
    from fastreid_uns.engine.default import DefaultTrainer
    from fastreid_uns.engine.hooks import ReclusterHook
    from fastreid_uns.engine.log import setup_logging
    from fastreid_uns.pseudo_labels.base import PseudoLabelGenerator, centroids
    from fastreid_uns.structures import PseudoLabels
    from fastreid_uns.utils.environment import environment

    class TrueLabels(PseudoLabelGenerator):
        """What a supervised run would have; no config can name it."""

        def __init__(self, identities: torch.Tensor) -> None:
            super().__init__()
            self.labels = identities.unique(return_inverse=True)[1]

        def __call__(self, bank, epoch):
            labels = self.labels.to(bank.feats.device)
            return PseudoLabels(labels, centroids(bank.feats, labels))

    start = time.perf_counter()
    output = folder / f"{Path(config).stem}-{kind}-{seed}"
    output.mkdir(parents=True, exist_ok=True)
    setup_logging(output)
    cfg = load_config(config, [*overrides, f"SEED={seed}", f"OUTPUT_DIR={output}"])
    trainer = DefaultTrainer(cfg)
    if kind == "untrained":
        results = DefaultTrainer.test(cfg, trainer.model)
    else:
        if kind == "oracle":
            identities = torch.tensor([record.identity for record in trainer.data.target])
            trainer.hook(ReclusterHook).generator = TrueLabels(identities)
        trainer.train()
        results = trainer.results
    return {
        "config": Path(config).stem,
        "kind": kind,
        "seed": seed,
        "overrides": overrides,
        "results": results,
        "seconds": round(time.perf_counter() - start, 1),
        "environment": environment(trainer.device),
    }


def table(records: list[dict]) -> str:
    """Mean and spread over seeds, one row for each config and kind."""
    from tabulate import tabulate

    rows = []
    for config, kind in dict.fromkeys((r["config"], r["kind"]) for r in records):
        group = [r for r in records if (r["config"], r["kind"]) == (config, kind)]
        for test in group[0]["results"]:
            cells = []
            for metric in ("mAP", "rank1"):
                values = [r["results"][test][metric] for r in group]
                spread = statistics.stdev(values) if len(values) > 1 else 0.0
                cells.append(f"{statistics.mean(values):.2f} ± {spread:.2f}")
            seconds = statistics.mean(r["seconds"] for r in group)
            rows.append([config, test, kind, len(group), *cells, f"{seconds:.0f}"])
    return tabulate(rows, ["config", "test", "labels", "seeds", "mAP", "rank1", "seconds"], tablefmt="github")


def main() -> None:
    arguments = parse_arguments()
    arguments.output.mkdir(parents=True, exist_ok=True)
    file = arguments.output / "runs.jsonl"
    records = [json.loads(line) for line in file.read_text().splitlines()] if file.is_file() else []
    done = {(r["config"], r["kind"], r["seed"], tuple(r["overrides"])) for r in records}
    for config in arguments.configs if not arguments.table_only else []:
        for seed in arguments.seeds:
            for kind in arguments.kinds:
                if (Path(config).stem, kind, seed, tuple(arguments.set)) in done:
                    continue
                record = run(config, kind, seed, arguments.output, arguments.set)
                records.append(record)
                with file.open("a", encoding="utf-8") as stream:
                    stream.write(json.dumps(record) + "\n")
    print(table(records))


if __name__ == "__main__":
    main()
