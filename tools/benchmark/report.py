"""Tables of what the benchmarks have measured, from the JSON files beside this one: a summary and all of it.

The summary goes into the README of the checkout, all cases into the one of this folder.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

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


def ranks(records: Sequence[Record]) -> str:
    """One row for each number of images and of processes: seconds, and CPU seconds of each process."""
    rows = []
    for record in sorted(records, key=lambda r: (r["case"]["images"], r["case"]["dim"], r["case"]["form"])):
        case, result = record["case"], record["result"]
        one = measuring.result_of(records, images=case["images"], dim=case["dim"], form="ranks:1")
        rows.append(
            [
                f"{case['images']:,} x {case['dim']:,}",
                case["form"].removeprefix("ranks:"),
                number(result["seconds"], " s"),
                ratio(one and one["seconds"], result["seconds"]),
                ", ".join(number(seconds, " s") for seconds in result["cpu_seconds"]),
                ratio(one and max(one["cpu_seconds"]), max(result["cpu_seconds"])),
                number(result["process_peak_gib"], " GiB"),
                _labels(result),
            ]
        )
    headers = ["images", "processes", "whole stage", "as fast as one", "CPU time of each", "less", "peak", "labels"]
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
    """One row for each case: images a second, and how many times that of the base form on the same machine."""
    rows = []
    for record in records:
        case, result, made_on = record["case"], record["result"], record["environment"]["device"]
        beside = [other for other in records if other["environment"]["device"] == made_on]
        own = measuring.result_of(beside, **{**case, "form": base})
        rate = result["images_per_second"]
        faster = ratio(rate, own["images_per_second"]) if own and case["form"] not in (base, "extract") else ""
        rows.append([*(case[key] for key in keys), made_on, result.get("precision", ""), number(rate), faster])
    return table(rows, [*keys, "on", "precision", "images a second", f"as many as {base}"])


def runs(records: Sequence[Record]) -> str:
    """One row for each run: seconds of its stages and its scores."""
    rows = []
    for record in records:
        case, result = record["case"], record["result"]
        one = measuring.result_of(records, **{**case, "processes": 1}) if case["processes"] > 1 else None
        stages = ", ".join(f"{name} {number(value)}" for name, value in result["stages"].items())
        rows.append(
            [
                f"{case['run']}, {case['set']}{', compiled' if case.get('compile') else ''}",
                f"{case['processes']} x {record['environment']['device']}",
                case["epochs"],
                number(result["seconds"]),
                number(result["epoch_seconds"]),
                stages,
                number(result["images_per_second"]),
                ratio(result["images_per_second"], one and one["images_per_second"]),
            ]
        )
    headers = ["run", "processes", "epochs", "seconds", "of an epoch", "of all stages", "images a second"]
    return table(rows, [*headers, "as one process"])


def memory(records: Sequence[Record]) -> str:
    """One row for each form: the largest batch of each card, and images a second with it."""
    cards = sorted({record["case"]["gigabytes"] for record in records})
    rows = []
    for form in dict.fromkeys(record["case"]["form"] for record in records):
        found = [measuring.result_of(records, form=form, gigabytes=card) for card in cards]
        rows.append([form, *(f"{r['batch']} ({number(r['images_per_second'])}/s)" if r else NONE for r in found)])
    return table(rows, ["form", *(f"card of {card} GB" for card in cards)])


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


class Compared(NamedTuple):
    """One row of the summary: a number of ours beside that of a peer, from the same benchmark and machine."""

    what: str
    benchmark: str
    key: str  # of the result
    case: dict[str, Any]  # that both have
    peer: str
    peer_form: str
    own_form: str
    else_peer: str = NONE  # where the peer has no record


_LABELS = {"images": 32621, "dim": 2048, "device": "cpu"}
_MILLION = {"images": 1_000_000, "dim": 256, "device": "cpu"}
_MARKET = {"set": "market1501", "device": "cpu"}
_MSMT = {"set": "msmt17", "device": "cpu"}
_STEP = {"backbone": "resnet50", "size": [256, 128]}
_MATRICES = ("whole matrices, as in the papers' code", "dense", "exact")
_LOOP = ("the papers' loop", "loop", "blocks")
_COMPILED = ("a compiled loop, as in fast-reid", "compiled", "blocks")
_PIL = "torchvision on Pillow images"
_PLAIN = ("the papers' loop, float32", "plain", "ours")
SUMMARY = (
    Compared("pseudo labels of 32,621 x 2,048, seconds", "pseudo_labels", "seconds", _LABELS, *_MATRICES),
    Compared("the same after the neighbour search, seconds", "pseudo_labels", "after_seconds", _LABELS, *_MATRICES),
    Compared("the same, peak memory in GiB", "pseudo_labels", "process_peak_gib", _LABELS, *_MATRICES),
    Compared(
        "pseudo labels of 1,000,000 x 256, seconds", "pseudo_labels", "seconds", _MILLION, *_MATRICES, "impossible"
    ),
    Compared("the same, peak memory in GiB", "pseudo_labels", "process_peak_gib", _MILLION, *_MATRICES, "11,176"),
    Compared("ranking 3,368 x 15,913, seconds", "evaluation", "seconds", _MARKET, *_LOOP),
    Compared("ranking 11,659 x 82,161, seconds", "evaluation", "seconds", _MSMT, *_COMPILED),
    Compared("the same, memory above the features in GiB", "evaluation", "peak_gib", _MSMT, *_COMPILED),
    Compared(
        "images a second from JPEG files", "feeding", "images_per_second", {"device": "cpu"}, _PIL, "pil", "loader"
    ),
    Compared("images a second from the cache", "feeding", "images_per_second", {"device": "cpu"}, _PIL, "pil", "host"),
    *(
        Compared(
            "training ResNet-50 at 256x128, images a second",
            "training_step",
            "images_per_second",
            {**_STEP, "device": device},
            *_PLAIN,
        )
        for device in ("cpu", "cuda")
    ),
    Compared(
        "the same, peak memory of the GPU in GiB",
        "training_step",
        "device_peak_gib",
        {**_STEP, "device": "cuda"},
        *_PLAIN,
    ),
)


def summary() -> str:
    """What a user compares: a peer and ours, on the same inputs and the same machine, which is named."""
    rows = []
    for row in SUMMARY:
        records = records_of(row.benchmark)
        peer, own = (measuring.record_of(records, **row.case, form=form) for form in (row.peer_form, row.own_form))
        if own is None:
            continue
        values = [found and found["result"][row.key] for found in (peer, own)]
        ends = values[::-1] if row.key == "images_per_second" else values
        theirs = number(values[0]) if peer else row.else_peer
        rows.append([row.what, machine(own), row.peer, theirs, number(values[1]), ratio(*ends)])
    return table(rows, ["what", "on", "peer", "theirs", "here", "better"])


def machine(record: Record) -> str:
    """The processors or the card that a record was made on."""
    made = record["environment"]
    return made["device"] if record["case"].get("device") == "cuda" else f"{made['device']}, {made['cores']} cores"


def report() -> str:
    """All tables, each with its heading."""
    labels = records_of("pseudo_labels")
    shared = [record for record in labels if record["case"]["form"].startswith("ranks:")]
    parts = [
        ("Pseudo labels", "pseudo_labels", [record for record in labels if record not in shared], pseudo_labels),
        ("Pseudo labels by several processes of one thread", "pseudo_labels", shared, ranks),
        ("Ranking", "evaluation", records_of("evaluation"), evaluation),
        ("Feeding", "feeding", records_of("feeding"), lambda found: rates(found, "pil", ["form"])),
        (
            "Training step",
            "training_step",
            records_of("training_step"),
            lambda found: rates(found, "plain", ["form", "backbone"]),
        ),
        ("Largest batches", "memory", records_of("memory"), memory),
        ("Whole runs", "runs", records_of("runs"), runs),
    ]
    texts = [
        f"## {heading}\n\n`{name}.py`. {hardware(found)}\n\n{write(found)}"
        for heading, name, found, write in parts
        if found
    ]
    return "\n\n".join(texts)


def main() -> None:
    compare.write_between_marks(FOLDER / "README.md", report(), BEGIN)
    compare.write_between_marks(ROOT / "README.md", summary(), BEGIN)


if __name__ == "__main__":
    main()
