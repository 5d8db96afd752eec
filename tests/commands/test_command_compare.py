"""The command that compares methods: what it runs, holds out and prints."""

import csv
import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from fastreid_uns.commands import compare
from fastreid_uns.experiments import runs, tables
from fastreid_uns.experiments.agenda import Studied, current, unmeasured
from fastreid_uns.experiments.study import read_studies

ROOT = compare.ROOT


def record(config: str, kind: str, seed: int, score: float) -> dict:
    results = {"zoo": {"mAP": score, "rank1": 2 * score}}
    about = {"config": config, "kind": kind, "seed": seed, "hold_out": 0.0}
    return {**about, "results": results, "seconds": 10.0 * seed}


def test_seeds_are_run_one_after_the_other_and_only_the_core_with_true_labels():
    plan = list(runs.planned(["configs/a.yaml", "projects/P/configs/a.yaml"], [1, 2], None))
    assert [(job.config, job.kind) for job in plan if job.seed == 1] == [
        ("configs/a.yaml", "untrained"),
        ("configs/a.yaml", "unsupervised"),
        ("configs/a.yaml", "supervised"),
        ("projects/P/configs/a.yaml", "unsupervised"),
    ]
    assert [job.seed for job in plan] == [1] * 4 + [2] * 4


def test_validation_identities_leave_training_and_the_test_part_is_not_read(tmp_path):
    manifest = tmp_path / "manifest.csv"
    rows = [(f"{i}_{n}.png", i, n, "train") for i in range(10) for n in range(5)] + [("t.png", 99, 0, "gallery")]
    with manifest.open("w", newline="") as file:
        csv.writer(file).writerows([("path", "identity", "camera", "split"), *rows])
    with runs.validation_manifest(manifest, 0.2, tmp_path / "validation.csv").open(newline="") as file:
        new = list(csv.DictReader(file))
    assert Counter(row["split"] for row in new) == {"train": 40, "query": 4, "gallery": 6}
    trained = {row["identity"] for row in new if row["split"] == "train"}
    tested = {row["identity"] for row in new if row["split"] != "train"}
    assert (len(trained), len(tested), trained & tested) == (8, 2, set())
    assert "99" not in tested


def test_table_shows_mean_and_spread_between_the_untrained_and_the_true_labels():
    records = [
        record("projects/P/configs/zoo.yaml", "unsupervised", 1, 30.0),
        record("configs/zoo.yaml", "supervised", 1, 50.0),
        record("configs/zoo.yaml", "unsupervised", 1, 20.0),
        record("configs/zoo.yaml", "unsupervised", 2, 23.0),
        record("configs/zoo.yaml", "untrained", 1, 5.0),
    ]
    (table,) = tables.tables(records)
    assert table.headers == ["config, tested on zoo", "labels", "seeds", "mAP", "rank-1", "seconds"]
    assert table.rows == [
        ["configs/zoo.yaml", "untrained", "1", "5.00", "10.00", "10"],
        ["configs/zoo.yaml", "unsupervised", "2", "21.50 ± 2.12", "43.00 ± 4.24", "15"],  # 3/sqrt(2) and 6/sqrt(2)
        ["projects/P/configs/zoo.yaml", "unsupervised", "1", "30.00", "60.00", "10"],
        ["configs/zoo.yaml", "supervised", "1", "50.00", "100.00", "10"],
    ]


def test_table_is_written_between_the_marks(tmp_path):
    file = tmp_path / "README.md"
    file.write_text(f"before\n{compare.BEGIN}old\n{compare.END}after\n")
    compare.write_between_marks(file, "new")
    assert file.read_text() == f"before\n{compare.BEGIN}new\n{compare.END}after\n"
    file.write_text("no marks\n")
    with pytest.raises(ValueError, match="Write them where the table goes"):
        compare.write_between_marks(file, "new")


def test_a_project_is_shown_beside_the_core_on_its_own_sets():
    records = [
        record("configs/zoo.yaml", "unsupervised", 1, 20.0),
        {**record("configs/sea.yaml", "unsupervised", 1, 9.0), "results": {"sea": {"mAP": 9.0, "rank1": 9.0}}},
        record("projects/P/configs/zoo.yaml", "unsupervised", 1, 30.0),
        record("projects/Pike/configs/zoo.yaml", "unsupervised", 1, 40.0),
    ]
    assert tables.of_one_project(records, "P") == [records[0], records[2]]


def test_provenance_names_seeds_keys_hardware_and_commits():
    place = {"device": "Abacus", "torch": "2.0", "commit": "abc"}
    runs = [
        {**record("a", "unsupervised", seed, 1.0), "environment": place, "overrides": ["A=1"]} for seed in (2, 1, 2)
    ]
    runs[2]["environment"] = {**place, "commit": "def"}
    assert tables.provenance(runs) == "Seeds 1, 2; Abacus, torch 2.0; commit abc, def; `A=1`."


@pytest.mark.parametrize("name", ["results", "studies"])
def test_the_guide_and_each_project_show_the_committed_results(name):
    records = [json.loads(line) for line in (ROOT / f"projects/{name}.jsonl").read_text().splitlines()]
    begin, missing = compare.BEGIN, {}
    if name == "studies":
        agenda = Studied(read_studies(ROOT / "projects/studies.yaml"), records)
        missing = {study.name: unmeasured(agenda, study) for study in agenda.studies}
        begin, records = compare.BEGIN_STUDIES, current(agenda, records)
    expected = {ROOT / "projects/README.md": ""}
    projects = {Path(record["config"]).parts[1] for record in records if record["config"].startswith("projects")}
    projects |= {name for names in missing.values() for name in names} - {"untrained", "core", "supervised"}
    for project in projects:
        expected[ROOT / f"projects/{project}/README.md"] = project
    for file, project in expected.items():
        shown = file.read_text().partition(begin)[2].partition(compare.END)[0]
        assert shown.strip() == tables.report(records, project, missing), file


@pytest.mark.parametrize("line", ['{"config": "a.yaml", "ki', "text", "[1]", '{"seed": 1}', "\udcff"])
def test_a_line_that_is_no_run_is_named(tmp_path, capsys, line):
    file = tmp_path / "runs.jsonl"
    whole = json.dumps(record("configs/omniglot.yaml", "untrained", 1, 3.0))
    file.write_text(f"{whole}\n{line}\n", errors="surrogateescape")
    options = ["--studies", "--table-only", "--results", str(file), "--output", str(tmp_path)]
    assert compare.main(options) == 2
    assert f"{file}, line 2 is no record of a run" in capsys.readouterr().err


def test_runs_once_and_outlives_a_run_that_fails(tiny, tmp_path):
    overrides = [value for value in tiny if not value.startswith("OUTPUT_DIR")]
    command = [sys.executable, "tools/compare.py", "configs/quickstart.yaml", "configs/absent.yaml", "--seeds", "1"]
    command += ["--kinds", "untrained", "--jobs", "2", "--output", str(tmp_path)]
    command += ["--tables", str(tmp_path), "--set", *overrides]
    for _ in range(2):
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
        assert done.returncode == 1
        assert "failed: ('configs/absent.yaml', 'untrained', 1): MissingFile" in done.stderr
        (line,) = (tmp_path / "runs.jsonl").read_text().splitlines()
        assert json.loads(line)["config"] == "configs/quickstart.yaml"
    assert "configs/quickstart.yaml" in done.stdout
    assert {"tables.md", "tables.csv", "tables.tex"} <= {path.name for path in tmp_path.iterdir()}
