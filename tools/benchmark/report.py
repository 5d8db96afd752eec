"""Tables of what the benchmarks have measured, from the JSON files beside this one: a summary and all of it.

The summary goes into the README of the checkout, all cases into the one of this folder.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import measuring
from measuring import ROOT, Record

from fastreid_uns.commands import compare

BEGIN = "<!-- written by tools/benchmark/report.py -->\n"
FOLDER = Path(__file__).parent
NONE = "not measured"


def records_of(name: str) -> list[Record]:
    return measuring.read(measuring.results_file(FOLDER / f"{name}.py"))


def number(value: float | None, unit: str = "", digits: int = 3) -> str:
    """A value to some digits that count, or that there is none."""
    if value is None:
        return NONE
    text = f"{value:,.0f}" if abs(value) >= 10 ** (digits - 1) else f"{value:.{digits}g}"
    return f"{text}{unit}"


def ratio(above: float | None, below: float | None) -> str:
    return f"{number(above / below, digits=2)} times" if above and below else ""


def pseudo_labels(records: Sequence[Record]) -> str:
    """One row for each number of images and form: seconds of search and of all after it, memory, agreement."""
    rows = []
    for record in sorted(records, key=lambda r: (r["case"]["images"], r["case"]["dim"])):
        case, result = record["case"], record["result"]
        dense = measuring.result_of(records, images=case["images"], dim=case["dim"], form="dense")
        other = dense if dense and case["form"] != "dense" else None
        rows.append(
            [
                f"{case['images']:,} x {case['dim']:,}",
                case["form"],
                number(result["neighbours_seconds"], " s"),
                number(result["after_seconds"], " s"),
                ratio(other and other["after_seconds"], result["after_seconds"]),
                number(result["seconds"], " s"),
                ratio(other and other["seconds"], result["seconds"]),
                number(result["process_peak_gib"], " GiB"),
                _labels(result),
            ]
        )
    headers = ["images", "form", "search", "after it", "faster", "whole stage", "faster", "peak", "labels"]
    return table(rows, headers)


def _labels(result: dict[str, Any]) -> str:
    if "equal_labels" not in result:
        return ""
    if result["equal_labels"]:
        return f"equal to {result['compared_with']}"
    return f"ARI {result['adjusted_rand_index']:.4f} to {result['compared_with']}"


def evaluation(records: Sequence[Record]) -> str:
    """One row for each set and form of the ranking."""
    rows = []
    for record in records:
        case, result = record["case"], record["result"]
        slower = {
            form: measuring.result_of(records, set=case["set"], form=form, device="cpu")
            for form in ("loop", "compiled")
            if case["form"] == "blocks"
        }
        rows.append(
            [
                case["set"],
                f"{case['form']}, {case['device']}",
                number(result["seconds"], " s"),
                *(ratio((slower.get(f) or {}).get("seconds"), result["seconds"]) for f in ("loop", "compiled")),
                number(result["peak_gib"], " GiB"),
                f"{result['metrics']['mAP']:.4f}",
            ]
        )
    headers = ["size of", "form", "ranking", "faster than loop", "than compiled", "peak above features", "mAP"]
    return table(rows, headers)


def rates(records: Sequence[Record], base: str, keys: Iterable[str]) -> str:
    """One row for each case: images a second, and how many times that of the base form with the same other values."""
    rows = []
    for record in records:
        case, result = record["case"], record["result"]
        own = measuring.result_of(records, **{**case, "form": base})
        rate = result["images_per_second"]
        faster = ratio(rate, own["images_per_second"]) if own and case["form"] not in (base, "extract") else ""
        rows.append([*(case[key] for key in keys), result.get("precision", ""), number(rate), faster])
    return table(rows, [*keys, "precision", "images a second", f"as many as {base}"])


def runs(records: Sequence[Record]) -> str:
    """One row for each run: seconds of its stages and its scores."""
    rows = []
    for record in records:
        case, result = record["case"], record["result"]
        one = measuring.result_of(records, **{**case, "processes": 1}) if case["processes"] > 1 else None
        stages = ", ".join(f"{name} {number(value)}" for name, value in result["stages"].items())
        rows.append(
            [
                f"{case['run']}, {case['set']}",
                f"{case['processes']} x {case['device']}",
                case["epochs"],
                number(result["seconds"]),
                stages,
                number(result["images_per_second"]),
                ratio(result["images_per_second"], one and one["images_per_second"]),
            ]
        )
    headers = ["run", "processes", "epochs", "seconds", "seconds of its stages", "images a second", "as one process"]
    return table(rows, headers)


def table(rows: list[list[Any]], headers: list[str]) -> str:
    from tabulate import tabulate

    return tabulate(rows, headers, tablefmt="github", disable_numparse=True)


def hardware(records: Iterable[Record]) -> str:
    """On what and of which commit the records are."""
    found = {
        f"{e['device']}, {e['cores']} cores, torch {e['torch']}, commit {e['commit']}"
        for e in (record["environment"] for record in records)
    }
    return f"Measured on {'; '.join(sorted(found))}."


def summary() -> str:
    """What a user compares: the textbook form and ours, on the same inputs."""
    labels, ranking, feeding, step = map(records_of, ("pseudo_labels", "evaluation", "feeding", "training_step"))
    msmt = {"images": 32621, "dim": 2048}
    million = measuring.result_of(labels, images=1_000_000, form="exact") or {}
    pairs = [
        ("pseudo labels of 32,621 x 2,048, seconds", labels, "seconds", {**msmt, "form": "dense"}, "exact"),
        ("the same after the neighbour search, seconds", labels, "after_seconds", {**msmt, "form": "dense"}, "exact"),
        ("the same, peak memory in GiB", labels, "process_peak_gib", {**msmt, "form": "dense"}, "exact"),
        ("ranking 3,368 x 15,913, seconds", ranking, "seconds", {"set": "market1501", "form": "loop"}, "blocks"),
        (
            "ranking 11,659 x 82,161, seconds, against a compiled loop",
            ranking,
            "seconds",
            {"set": "msmt17", "form": "compiled"},
            "blocks",
        ),
        (
            "the same, peak memory above the features in GiB",
            ranking,
            "peak_gib",
            {"set": "msmt17", "form": "compiled"},
            "blocks",
        ),
        (
            "feeding from JPEG files, images a second",
            feeding,
            "images_per_second",
            {"form": "pil", "device": "cpu"},
            "loader",
        ),
        (
            "feeding from the pixel cache, images a second",
            feeding,
            "images_per_second",
            {"form": "pil", "device": "cpu"},
            "host",
        ),
        *(
            (
                f"training {name} at 256x128, images a second",
                step,
                "images_per_second",
                {"form": "plain", "backbone": name.lower().replace("-", ""), "device": "cpu"},
                "ours",
            )
            for name in ("ResNet-50", "ResNet-18")
        ),
    ]
    rows = []
    for text, records, key, case, ours in pairs:
        plain, own = (measuring.result_of(records, **{**case, "form": form}) for form in (case["form"], ours))
        values = [found and found[key] for found in (plain, own)]
        ends = values if key != "images_per_second" else values[::-1]
        rows.append([text, *map(number, values), ratio(*ends)])
    rows.append(["pseudo labels of 1,000,000 x 256, seconds", "not possible", number(million.get("seconds")), ""])
    rows.append(["the same after the neighbour search, seconds", "", number(million.get("after_seconds")), ""])
    rows.append(["the same, peak memory of the process in GiB", "", number(million.get("process_peak_gib")), ""])
    return table(rows, ["on two CPU cores", "textbook form", "here", "better"])


def report() -> str:
    """All tables, each with its heading."""
    parts = {
        "Pseudo labels": ("pseudo_labels", pseudo_labels),
        "Ranking": ("evaluation", evaluation),
        "Feeding": ("feeding", lambda found: rates(found, "pil", ["form", "device"])),
        "Training step": ("training_step", lambda found: rates(found, "plain", ["form", "backbone", "device"])),
        "Whole runs": ("runs", runs),
    }
    texts = []
    for heading, (name, write) in parts.items():
        found = records_of(name)
        if found:
            texts.append(f"## {heading}\n\n`{name}.py`. {hardware(found)}\n\n{write(found)}")
    return "\n\n".join(texts)


def main() -> None:
    compare.write_between_marks(FOLDER / "README.md", report(), BEGIN)
    compare.write_between_marks(ROOT / "README.md", summary(), BEGIN)


if __name__ == "__main__":
    main()
