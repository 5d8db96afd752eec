"""Train configs over seeds and print the table: methods, their ablations, the untrained network and true labels.

One JSON line is appended for each finished run; runs that are in the file are not done again. Without names
of configs: the two real sets, with the method of the core and with every project and its ablation. `--into` also puts
the rows of a project, next to those of the core, into the README of the project.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

from fastreid_uns.commands import finished
from fastreid_uns.errors import InvalidValue

ROOT = Path(__file__).resolve().parents[2]  # of the checkout, whose READMEs hold the tables

SETS = ("omniglot", "grocery")
BEGIN, END = "<!-- written by tools/compare.py -->\n", "<!-- end -->\n"


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line of `compare`."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("configs", nargs="*", help="YAML files, relative to the checkout")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument(
        "--kinds",
        nargs="+",
        choices=("untrained", "unsupervised", "supervised"),
        help="default: all for the core, unsupervised for a project",
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


def write_reports(file: Path, records: Sequence[dict]) -> None:
    """Write the report into a Markdown file, and into the README of each project its part."""
    from fastreid_uns.experiments import of_one_project, of_project, report

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
    from fastreid_uns.experiments import attempt, planned, table

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
