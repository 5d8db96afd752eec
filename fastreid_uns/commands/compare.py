"""Train configs over seeds and print the table: methods, their ablations, the untrained network and true labels.

One JSON line is appended for each finished run; runs that are in the file are not done again. Without names
of configs: the two real sets, with the method of the core and with every project and its ablation. `--into` also puts
the rows of a project, next to those of the core, into the README of the project.
"""

from __future__ import annotations

import argparse
import csv
import json
import multiprocessing
import os
import shutil
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor, as_completed
from pathlib import Path

from fastreid_uns.commands import finished
from fastreid_uns.errors import InvalidValue

ROOT = Path(__file__).resolve().parents[2]  # of the checkout, whose READMEs hold the tables

KINDS = ("untrained", "unsupervised", "supervised")
SETS = ("omniglot", "grocery")
BEGIN, END = "<!-- written by tools/compare.py -->\n", "<!-- end -->\n"
HELD_OUT_QUERIES = 2  # images of each held-out identity


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("configs", nargs="*", help="YAML files, relative to the checkout")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument(
        "--kinds", nargs="+", choices=KINDS, help="default: all for the core, unsupervised for a project"
    )
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="keys changed in every run")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time; the cores are shared out among them")
    parser.add_argument("--hold-out", type=float, default=0.0, help="fraction of the training identities to score on")
    parser.add_argument("--output", type=Path, default=Path("output/compare"), help="folder of the runs")
    parser.add_argument("--results", type=Path, help="file of the finished runs (OUTPUT/runs.jsonl)")
    parser.add_argument("--into", type=Path, help="Markdown file whose marked part becomes the table")
    parser.add_argument("--table-only", action="store_true", help="train nothing")
    return parser.parse_args(arguments)


def default_configs() -> list[str]:
    """The real sets: with the core's method, then with each project, and its baseline."""
    files = [ROOT / f"configs/{name}.yaml" for name in SETS]
    for project in sorted(path.parent for path in ROOT.glob("projects/*/configs")):
        files += [project / f"configs/{name}{ending}.yaml" for name in SETS for ending in ("", "_baseline")]
    return [str(file.relative_to(ROOT)) for file in files if file.is_file()]


def planned(configs: Sequence[str], seeds: Sequence[int], kinds: Sequence[str] | None) -> Iterator[tuple]:
    """(config, kind, seed) of every run, one whole seed after the other."""
    for seed in seeds:
        for config in configs:
            for kind in kinds or (["unsupervised"] if of_project(config) else KINDS):
                yield config, kind, seed


def of_project(config: str) -> bool:
    return config.startswith("projects")


def validation_manifest(manifest: Path, fraction: float, output: Path) -> Path:
    """A manifest of the training images alone, with every n-th identity as query and gallery instead.

    Args:
        manifest: of a `csv_file` set with identities.
        fraction: of the identities to hold out; n is its inverse, rounded.
        output: file to write in an existing folder; its paths start at the folder of `manifest`.
    """
    with manifest.open(newline="", encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if row["split"] == "train"]
    validation = set(sorted({row["identity"] for row in rows}, key=int)[:: round(1 / fraction)])
    seen: dict[str, int] = defaultdict(int)
    for row in rows:
        if row["identity"] in validation:
            row["split"] = "query" if seen[row["identity"]] < HELD_OUT_QUERIES else "gallery"
            seen[row["identity"]] += 1
    with output.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    return output


def validation(config: str, overrides: Sequence[str], fraction: float, folder: Path) -> list[str]:
    """Overrides that put held-out training identities in the place of the test part."""
    from fastreid_uns.config import load_config

    cfg = load_config(ROOT / config, overrides)
    manifest = Path(cfg.DATASETS.TRAIN.PATH)
    file = validation_manifest(manifest, fraction, folder / "validation.csv")
    sections = ["DATASETS.TRAIN", *(f"DATASETS.TESTS.{name}" for name in cfg.DATASETS.TESTS)]
    return [f"{s}.{key}={value}" for s in sections for key, value in (("PATH", file), ("ROOT", manifest.parent))]


def run(config: str, kind: str, seed: int, overrides: list[str], fraction: float, folder: Path) -> dict:
    """Train one config once and give its record."""
    import torch

    from fastreid_uns.config import load_config
    from fastreid_uns.engine.default import DefaultTrainer
    from fastreid_uns.engine.log import setup_logging
    from fastreid_uns.engine.recluster import ReclusterHook
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

    if "OMP_NUM_THREADS" in os.environ:
        torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    start = time.perf_counter()
    output = folder / f"{'-'.join(Path(config).with_suffix('').parts)}-{kind}-{seed}"
    shutil.rmtree(output, ignore_errors=True)  # of a run that was broken off; a whole one has a record
    output.mkdir(parents=True)
    setup_logging(output)
    test = validation(config, overrides, fraction, output) if fraction else []
    cfg = load_config(ROOT / config, [*overrides, *test, f"SEED={seed}", f"OUTPUT_DIR={output}"])
    trainer = DefaultTrainer(cfg)
    if kind == "untrained":
        results = DefaultTrainer.test(cfg, trainer.model)
    else:
        if kind == "supervised":
            images = trainer.train_set.records[: trainer.train_set.num_images]
            identities = torch.tensor([record.identity for record in images])
            trainer.hook(ReclusterHook).generator = TrueLabels(identities)
        trainer.train()
        results = trainer.results
    return {
        "config": config,
        "kind": kind,
        "seed": seed,
        "overrides": overrides,
        "hold_out": fraction,
        "results": results,
        "seconds": round(time.perf_counter() - start, 1),
        "environment": environment(trainer.device),
    }


def attempt(arguments: tuple) -> dict | str:
    """The record of a run in a process of its own, or why there is none: one failure must not end the others."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
        future = process.submit(run, *arguments)
    error = future.exception()
    return f"failed: {arguments[:3]}: {type(error).__name__}: {error}" if error else future.result()


def table(records: Sequence[dict]) -> str:
    """Mean and standard deviation over seeds: for each test set, a row for each config and kind of labels."""
    from tabulate import tabulate

    groups = defaultdict(list)
    for record in sorted(records, key=lambda r: (of_project(r["config"]), r["config"], r["seed"])):
        for test, metrics in record["results"].items():
            groups[test, record["config"], record["kind"]].append((metrics, record["seconds"]))
    tables = []
    for test in dict.fromkeys(test for test, _, _ in groups):
        rows = []
        for kind, config in sorted(((k, c) for t, c, k in groups if t == test), key=place):
            group = groups[test, config, kind]
            cells = [spread([metrics[metric] for metrics, _ in group]) for metric in ("mAP", "rank1")]
            seconds = statistics.mean(seconds for _, seconds in group)
            rows.append([config, kind, len(group), *cells, f"{seconds:.0f}"])
        headers = [f"config, tested on {test}", "labels", "seeds", "mAP", "rank1", "seconds"]
        tables.append(tabulate(rows, headers, tablefmt="github", disable_numparse=True))
    return "\n\n".join(tables)


def place(row: tuple[str, str]) -> tuple:
    """Untrained first and true labels last; in between the core, then the projects by name."""
    kind, config = row
    return KINDS.index(kind), of_project(config), config


def spread(values: Sequence[float]) -> str:
    deviation = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.2f}{deviation}"


def report(records: Sequence[dict]) -> str:
    """The table, and on what its figures were measured."""
    return f"{table(records)}\n\n{provenance(records)}"


def provenance(records: Sequence[dict]) -> str:
    """One sentence: seeds, keys, hardware, library and commits of the runs."""
    places = {f"{r['environment']['device']}, torch {r['environment']['torch']}" for r in records}
    commits = ", ".join(dict.fromkeys(r["environment"]["commit"] for r in records))
    keys = " ".join(dict.fromkeys(f"`{key}`" for r in records for key in r["overrides"]))
    seeds = ", ".join(map(str, sorted({r["seed"] for r in records})))
    return f"Seeds {seeds}; {'; '.join(sorted(places))}; commit {commits}; {keys or 'no key changed'}."


def of_one_project(records: Sequence[dict], project: str) -> list[dict]:
    """The runs of a project, and those of the core on the same sets."""
    folder = f"projects/{project}/"
    sets = {test for r in records if r["config"].startswith(folder) for test in r["results"]}
    return [
        r for r in records if r["config"].startswith(folder) or (not of_project(r["config"]) and sets & {*r["results"]})
    ]


def write_reports(file: Path, records: Sequence[dict]) -> None:
    """Write the report into a Markdown file, and into the README of each project its part."""
    write_between_marks(file, report(records))
    for project in sorted({Path(r["config"]).parts[1] for r in records if of_project(r["config"])}):
        write_between_marks(ROOT / f"projects/{project}/README.md", report(of_one_project(records, project)))


def write_between_marks(file: Path, text: str, begin: str = BEGIN) -> None:
    """Replace what stands between the two marks of a Markdown file.

    Raises:
        ValueError: the file lacks a mark.
    """
    old = file.read_text(encoding="utf-8")
    if begin not in old or END not in old.partition(begin)[2]:
        raise InvalidValue(
            f"{file} lacks the lines {begin.strip()!r} and {END.strip()!r}. Write them where the table goes."
        )
    before, _, rest = old.partition(begin)
    file.write_text(f"{before}{begin}{text}\n{END}{rest.partition(END)[2]}", encoding="utf-8")


def main(arguments: Sequence[str] | None = None) -> int:
    return finished(run_all, parse_arguments(arguments))


def run_all(options: argparse.Namespace) -> int:
    """1 if a run failed, else 0."""
    options.output.mkdir(parents=True, exist_ok=True)
    file = options.results or options.output / "runs.jsonl"
    records = [json.loads(line) for line in file.read_text().splitlines()] if file.is_file() else []
    done = {(r["config"], r["kind"], r["seed"], tuple(r["overrides"]), r["hold_out"]) for r in records}
    plan = planned(options.configs or default_configs(), options.seeds, options.kinds)
    runs = [run for run in plan if (*run, tuple(options.set), options.hold_out) not in done]
    failed = 0
    if runs and not options.table_only:
        os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // options.jobs)))
        os.environ.setdefault("NUMBA_NUM_THREADS", os.environ["OMP_NUM_THREADS"])
        jobs = [(*run, options.set, options.hold_out, options.output) for run in runs]
        with ThreadPoolExecutor(options.jobs) as pool:
            for record in (future.result() for future in as_completed([pool.submit(attempt, job) for job in jobs])):
                if isinstance(record, str):
                    failed += 1
                    print(record, file=sys.stderr)
                    continue
                records.append(record)
                with file.open("a", encoding="utf-8") as stream:
                    stream.write(json.dumps(record) + "\n")
    print(table(records))
    if options.into:
        write_reports(options.into, records)
    return 1 if failed else 0
