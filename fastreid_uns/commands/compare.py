"""Train configs over seeds and print tables: methods, their baselines, the untrained network and true labels.

`--studies` does what a file of studies says: tune every row on validation identities with the same budget, then measure
it with all seeds on the test part. Otherwise the configs that are named run as they are. One JSON line is appended for
each run; runs that are in the file are not done again. `--into` also puts the rows of a project, next to those of the
core, into the README of the project.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fastreid_uns.commands import finished
from fastreid_uns.errors import InvalidValue
from fastreid_uns.utils.places import path_of

ROOT = Path(__file__).resolve().parents[2]  # of the checkout, whose READMEs hold the tables

BEGIN, END = "<!-- written by tools/compare.py -->\n", "<!-- end -->\n"
BEGIN_STUDIES = "<!-- written by tools/compare.py --studies -->\n"


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line of `compare`."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("configs", nargs="*", help="YAML files, relative to the checkout")
    parser.add_argument("--studies", nargs="*", metavar="NAME", help="instead of configs: these studies; none = all")
    parser.add_argument("--study-file", type=path_of, default=ROOT / "projects/studies.yaml")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="start no run after this time")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3], help="of configs")
    parser.add_argument(
        "--kinds",
        nargs="+",
        choices=("untrained", "unsupervised", "supervised"),
        help="of configs; default: all for the core, unsupervised for a project",
    )
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="keys changed in every run")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time; the cores are shared out among them")
    parser.add_argument("--hold-out", type=float, default=0.0, help="fraction of the training identities to score on")
    parser.add_argument("--output", type=path_of, default=Path("output/compare"), help="folder of the runs")
    parser.add_argument("--results", type=path_of, help="file of the finished runs (OUTPUT/runs.jsonl)")
    parser.add_argument("--tables", type=path_of, help="folder for the tables as Markdown, CSV and LaTeX")
    parser.add_argument("--into", type=path_of, help="Markdown file whose marked part becomes the tables")
    parser.add_argument("--table-only", action="store_true", help="train nothing")
    options = parser.parse_args(arguments)
    if not options.configs and options.studies is None:
        parser.error("name configs, or --studies")
    return options


def write_reports(file: Path, records: Sequence[dict], missing: Mapping[str, Sequence[str]]) -> None:
    """Write the report into a Markdown file, and into the README of each project its part.

    Args:
        file: Markdown.
        records: of runs.
        missing: rows that lack seeds, by study; {} = the records belong to no study, and go between other marks.
    """
    from fastreid_uns.experiments.runs import of_project
    from fastreid_uns.experiments.tables import report

    begin = BEGIN_STUDIES if missing else BEGIN
    write_between_marks(file, report(records, missing=missing), begin)
    projects = {Path(r["config"]).parts[1] for r in records if of_project(r["config"])}
    rows = {name for names in missing.values() for name in names}
    for project in sorted(projects | {name for name in rows if (ROOT / f"projects/{name}").is_dir()}):
        write_between_marks(ROOT / f"projects/{project}/README.md", report(records, project, missing), begin)


def write_between_marks(file: Path, text: str, begin: str = BEGIN) -> None:
    """Replace what is between the two marks of a Markdown file.

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
    from fastreid_uns.experiments.tables import report, write_tables

    until = time.monotonic() + 60 * options.minutes
    options.output.mkdir(parents=True, exist_ok=True)
    file = options.results or options.output / "runs.jsonl"
    records = read_records(file) if file.is_file() else []
    failed = 0 if options.table_only else _run_missing(options, records, file, until)
    records, missing = _of_studies(options.study_file, records) if options.studies is not None else (records, {})
    print(report(records, missing=missing))
    if options.tables:
        write_tables(options.tables, records, missing)
    if options.into:
        write_reports(options.into, records, missing)
    return 1 if failed else 0


def read_records(file: Path) -> list[dict]:
    """The runs of a file, one on each line.

    Raises:
        ValueError: a line is no record of a run, such as one that was cut off.
    """
    records = []
    for number, line in enumerate(file.read_text(encoding="utf-8", errors="replace").splitlines(), 1):
        try:
            record = json.loads(line)
        except ValueError:
            record = None
        if not isinstance(record, dict) or not record.keys() >= {"config", "kind", "seed"}:
            raise InvalidValue(
                f"{file}, line {number} is no record of a run; JSON with config, kind and seed is expected. Remove the "
                f"line if it was cut off; its run is then made again."
            )
        records.append(record)
    return records


def _of_studies(file: Path, records: Sequence[dict]) -> tuple[list[dict], dict[str, list[str]]]:
    """The records that count now, of all studies of a file, and the rows that lack seeds, by study that tunes."""
    from fastreid_uns.experiments.agenda import Studied, current, unmeasured
    from fastreid_uns.experiments.study import read_studies

    agenda = Studied(read_studies(file), records)
    tuned = [study for study in agenda.studies if study.tuning.trials]
    return current(agenda, records), {study.name: unmeasured(agenda, study) for study in tuned}


def _run_missing(options: argparse.Namespace, records: list[dict], file: Path, until: float) -> int:
    """Run what has no record yet, append the new ones to the list and to the file; how many failed."""
    from fastreid_uns.experiments.workers import completed
    from fastreid_uns.utils.environment import cores

    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, cores() // options.jobs)))
    os.environ.setdefault("NUMBA_NUM_THREADS", os.environ["OMP_NUM_THREADS"])
    agenda = _agenda(options, records)
    failed = 0
    for record in completed(agenda.following, options.output, options.jobs, until):
        agenda.add(record)
        print(_line(record), file=sys.stderr if "error" in record else sys.stdout, flush=True)
        failed += "error" in record
        if "results" in record or (record["study"] and record["hold_out"] and not record.get("lost")):
            records.append(record)
            with file.open("a", encoding="utf-8") as stream:
                stream.write(json.dumps(record) + "\n")
    return failed


def _agenda(options: argparse.Namespace, records: Sequence[dict]) -> Any:
    from fastreid_uns.experiments.agenda import Listed, Studied
    from fastreid_uns.experiments.runs import planned
    from fastreid_uns.experiments.study import read_studies

    if options.studies is not None:
        return Studied(read_studies(options.study_file, options.studies), records)
    jobs = planned(options.configs, options.seeds, options.kinds)
    return Listed([job._replace(overrides=tuple(options.set), hold_out=options.hold_out) for job in jobs], records)


def _line(record: dict) -> str:
    run = record["row"] or record["config"], record["kind"], record["seed"]
    if "error" in record:
        return f"failed: {run}: {record['error']}"
    metrics = next(iter(record["results"].values()))
    return f"{record['study']} {run} {'validation ' if record['hold_out'] else ''}mAP {metrics['mAP']:.2f}"
