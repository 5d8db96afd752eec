"""The benchmarks: their tables, worked by hand, and that each runs at its small size."""

import subprocess
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "tools/benchmark"))
import known
import measuring
import photos
import report
import runs

FOLDER = report.FOLDER
BENCHMARKS = ("pseudo_labels", "evaluation", "feeding", "training_step", "runs")


def rows(table: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines()[2:]]


def labels_case(form: str, **result: float) -> measuring.Record:
    own = {"neighbours_seconds": 1.0, "after_seconds": 2.0, "seconds": 3.0, "process_peak_gib": 0.5}
    return {"case": {"images": 10, "dim": 4, "form": form, "device": "cpu"}, "result": {**own, **result}}


def test_pseudo_labels_are_set_against_the_dense_form_of_the_same_size():
    dense = labels_case("dense", neighbours_seconds=10.0, after_seconds=150.0, seconds=160.0)
    ours = labels_case("exact", equal_labels=True, compared_with="dense")
    near = labels_case("ivf:8", equal_labels=False, compared_with="dense", adjusted_rand_index=0.91)
    larger = labels_case("exact")
    larger["case"]["images"] = 1000
    found = rows(report.pseudo_labels([larger, dense, ours, near]))
    assert found[0] == ["10 x 4", "dense", "10 s", "150 s", "", "160 s", "", "0.5 GiB", ""]
    assert found[1] == ["10 x 4", "exact", "1 s", "2 s", "75 times", "3 s", "53 times", "0.5 GiB", "equal to dense"]
    assert found[2][-1] == "ARI 0.9100 to dense"
    assert found[3] == ["1,000 x 4", "exact", "1 s", "2 s", "", "3 s", "", "0.5 GiB", ""]


def test_rates_are_set_against_the_plain_form_of_the_same_backbone_and_machine():
    records = [
        {
            "case": {"form": form, "backbone": backbone},
            "result": {"images_per_second": rate},
            "environment": {"device": device},
        }
        for form, backbone, device, rate in (
            ("plain", "a", "X", 10.0),
            ("plain", "b", "X", 50.0),
            ("ours", "b", "X", 120.0),
            ("ours", "b", "Y", 500.0),
        )
    ]
    found = rows(report.rates(records, "plain", ["form", "backbone"]))
    assert found == [
        ["plain", "a", "X", "", "10", ""],
        ["plain", "b", "X", "", "50", ""],
        ["ours", "b", "X", "", "120", "2.4 times"],
        ["ours", "b", "Y", "", "500", ""],
    ]


def test_a_run_is_summed_up_without_its_first_epoch():
    lines = [
        {"seconds_extract": 5.0, "seconds_train": 30.0, "seconds_epoch": 36.0},
        {"seconds_extract": 1.0, "seconds_train": 10.0, "seconds_epoch": 11.0},
        {"seconds_extract": 2.0, "seconds_train": 20.0, "seconds_epoch": 23.0, "mAP": 40.0, "clusters": 7},
    ]
    assert runs.summary(lines, batch=6, solver={"ITERS_PER_EPOCH": 50}) == {
        "stages": {"extract": 8.0, "train": 60.0},
        "epoch_seconds": 17.0,
        "images_per_second": 20.0,  # 6 x 50 in 15 seconds
        "last": {"mAP": 40.0, "clusters": 7},
    }


def test_numbers_keep_the_digits_that_count():
    assert [report.number(value, " s") for value in (None, 0.01234, 3.14159, 41.234, 1234567.0)] == [
        "not measured",
        "0.0123 s",
        "3.14 s",
        "41.2 s",
        "1,234,567 s",
    ]


def test_the_readmes_show_the_committed_results():
    for file, text in ((FOLDER / "README.md", report.report()), (FOLDER.parents[1] / "README.md", report.summary())):
        shown = file.read_text().partition(report.BEGIN)[2].partition(report.compare.END)[0]
        assert shown.strip() == text


@pytest.mark.slow
@pytest.mark.parametrize("name", BENCHMARKS)
def test_benchmark_runs_at_its_small_size(name):
    subprocess.run([sys.executable, str(FOLDER / f"{name}.py"), "--size", "small", "--fresh"], check=True)
    assert measuring.read(measuring.results_file(FOLDER / f"{name}.py", "small"))


@pytest.mark.parametrize("benchmark", [photos, known])
def test_the_committed_lines_make_a_table(benchmark):
    assert "| cattely" in benchmark.table(photos.read_lines(Path(benchmark.__file__).with_suffix(".jsonl")))
