"""Rules by which `identify` tells known individuals from new ones, labels hidden; one line of known.jsonl a case.

    python tools/benchmark/known.py --data my/sets --sets cattely grocery omniglot --device cuda --jobs 3
    python tools/benchmark/known.py --table

A set is a folder of `--data` with a manifest.csv (path, identity, ...); `grocery:3` takes every third identity. A case
is a set and a seed: half of the identities are known by four fifths of their photos, the rest is asked about. A rule
sets the largest cosine to a photo of a known group from which a photo is called known:

    own scores      quantile over photos of the scores against other strict groups
    crossed         at least that of the scores by whitenings that have not seen the group
    one more        the same, but one more individual may reach any score, see `identify.least_known`
    product         what `identify` says: `one more`, of stricter groups where 15 true answers about random pairs state
                    that fewer than 90 of 100 are right, and nobody is known where they are fewer than 80
    best            the threshold that calls 5 % of the new individuals known, by true labels

Lines that are there are not measured again.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from measuring import ROOT
from photos import Photos, audit, read_lines, spread

SEEDS = range(5)
SHARE = 0.05  # of photos of new individuals that may be called known
NOBODY = 2.0  # threshold that no cosine reaches


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=ROOT / "datasets", help="folder of the sets")
    parser.add_argument("--sets", nargs="+", default=["cattely", "grocery", "omniglot"])
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda (default: %(default)s)")
    parser.add_argument(
        "--weights", default="imagenet", help="of the network, or a file of them (default: %(default)s)"
    )
    parser.add_argument("--jobs", type=int, default=1, help="sets at a time, which share the cores")
    parser.add_argument("--limit", type=float, default=float("inf"), help="seconds after which no case begins")
    parser.add_argument("--output", type=Path, default=Path(__file__).with_suffix(".jsonl"))
    parser.add_argument("--table", action="store_true", help="print the results, measure nothing")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.table:
        print(table(read_lines(given.output)))
    elif given.one:
        measure_set(given, given.one)
    else:
        with ThreadPoolExecutor(given.jobs) as pool:
            codes = list(pool.map(lambda name: run_set(given, name), given.sets))
        raise SystemExit(max(codes))


def run_set(given: argparse.Namespace, name: str) -> int:
    """All cases of a set in a process of its own; its lines are written as they come."""
    share = str(max((os.cpu_count() or 1) // given.jobs, 1))
    variables = {key: os.environ.get(key, share) for key in ("OMP_NUM_THREADS", "NUMBA_NUM_THREADS")}
    options = [f"--{key}={getattr(given, key)}" for key in ("data", "device", "weights", "limit", "output")]
    command = [sys.executable, __file__, *options, "--one", name]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env={**os.environ, **variables}) as process:
        for line in process.stdout or ():
            with given.output.open("a") as file:
                file.write(line)
            print(line, end="", flush=True)
    return process.returncode


def measure_set(given: argparse.Namespace, name: str) -> None:
    """Print a line for each case that has none yet."""
    import torch

    from fastreid_uns.utils.comm import choose_device
    from fastreid_uns.utils.environment import environment, processor
    from fastreid_uns.utils.precision import full_precision

    begin = time.monotonic()
    done = [line["case"] for line in read_lines(given.output)]
    cases = [case for seed in SEEDS if (case := {"set": name, "seed": seed}) not in done]
    if not cases:
        return
    device = choose_device(given.device)
    paths, truth = photos_of(given.data, name)
    with full_precision(device):
        photos = Photos(SimpleNamespace(photos=paths, size=size_of(paths)), 0, device, given.weights)
        about = {**environment(device), "processor": processor(), "threads": str(torch.get_num_threads())}
        for case in cases:
            if time.monotonic() - begin < given.limit:
                line = {"case": case, "result": measure(photos, truth, case["seed"]), "environment": about}
                print(json.dumps(line), flush=True)


def photos_of(data: Path, name: str) -> tuple[list[str], Any]:
    """Paths and identities."""
    import numpy as np

    folder, _, every = name.partition(":")
    with (data / folder / "manifest.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    kept = set(sorted({int(row["identity"]) for row in rows})[:: int(every or 1)])
    rows = [row for row in rows if int(row["identity"]) in kept]
    return [str(data / folder / row["path"]) for row in rows], np.array([int(row["identity"]) for row in rows])


def size_of(paths: list[str]) -> tuple[int, int]:
    """The input that the product would choose."""
    from fastreid_uns.data.decode import read_size
    from fastreid_uns.photos.scan import input_size

    sizes = [read_size(path) for path in paths]
    return input_size(statistics.median(width / height for height, width in sizes))


def measure(photos: Photos, truth: Any, seed: int) -> dict[str, Any]:
    """False known, found, findable and threshold of each rule."""
    import numpy as np

    begin, draw = time.monotonic(), np.random.default_rng(seed)
    individuals = draw.permutation(np.unique(truth))
    known = np.isin(truth, individuals[: len(individuals) // 2])
    inside = known & (draw.random(len(truth)) < 0.8)
    own, rest = np.flatnonzero(inside), np.flatnonzero(~inside)
    asked = SimpleNamespace(truth=truth[rest], old=known[rest], own=truth[own])
    space = features(photos, own, rest)
    stated = audit(space.grouping, truth[own], seed)["stated"]
    rules = judged_rules(space, asked, stated)
    found = {"photos": len(own), "asked": len(rest), "stated": stated, "seconds": time.monotonic() - begin}
    return {"rules": rules, **found}


def judged_rules(space: SimpleNamespace, asked: SimpleNamespace, stated: float) -> dict[str, dict[str, float]]:
    """What follows from each rule.

    Args:
        stated: pair precision by the answers.
    """
    import numpy as np
    import torch

    from fastreid_uns.photos.identify import left_out_scores
    from fastreid_uns.photos.outcome import thresholds_of

    strict = torch.from_numpy(space.strict)
    tenths = np.random.default_rng(0).permutation(space.strict.max() + 1)[space.strict] % 10
    parts = [left_out_scores(space.views, strict, torch.from_numpy(tenths == tenth)) for tenth in range(10)]
    own, crossed = quantile(scores(space)), quantile(torch.cat(parts).numpy())
    ours = thresholds_of(space.grouping, space.views)
    best = np.quantile(best_match(space)[1][~asked.old], 1 - SHARE)
    thresholds = {"own scores": own, "crossed": max(own, crossed), "one more": ours.known}
    thresholds |= {"product": min(ours.known_at(stated), NOBODY), "best": best}
    return {rule: judged(space, asked, float(threshold)) for rule, threshold in thresholds.items()}


def features(photos: Photos, own: Any, rest: Any) -> SimpleNamespace:
    """Features of known photos and of those that are asked about, groups, and strict groups."""
    from fastreid_uns.photos.group import for_count
    from fastreid_uns.photos.identify import STRICT

    feats = photos.features(own)
    settings = for_count(photos.usual, len(own))
    grouping = photos.cluster(feats, k1=settings.k1)
    return SimpleNamespace(
        feats=feats.numpy(),
        views=photos.fitted.views,
        queries=photos.more_features(rest).numpy(),
        groups=grouping.labels,
        strict=grouping.dendrogram.cut(STRICT),
        grouping=grouping,
    )


def scores(space: SimpleNamespace) -> Any:
    """Largest cosine of photos to those of other strict groups; groups of two and more alone count."""
    import numpy as np

    together = np.bincount(space.strict)[space.strict] > 1
    found = space.feats @ space.feats.T
    found[(space.strict[:, None] == space.strict) | ~together] = -2
    return found.max(1)[together]


def quantile(found: Any) -> float:
    """What a further score exceeds with a probability of `SHARE` at most; `NOBODY` where there are too few scores."""
    import numpy as np

    place = int(np.ceil((len(found) + 1) * (1 - SHARE)))
    return NOBODY if place > len(found) else float(np.sort(found)[place - 1])


def best_match(space: SimpleNamespace) -> tuple[Any, Any]:
    """Group and cosine of the nearest photo in a group of two and more, for each photo that is asked about."""
    import numpy as np

    together = np.bincount(space.groups)[space.groups] > 1
    found = space.queries @ space.feats[together].T
    return space.groups[together][found.argmax(1)], found.max(1)


def judged(space: SimpleNamespace, asked: SimpleNamespace, threshold: float) -> dict[str, float]:
    import numpy as np

    group, score = best_match(space)
    who = np.array([np.bincount(asked.own[space.groups == one]).argmax() for one in range(space.groups.max() + 1)])
    right, called = who[group] == asked.truth, score > threshold
    return {
        "false_known": float(called[~asked.old].mean()),
        "found": float((called & right)[asked.old].mean()),
        "findable": float(right[asked.old].mean()),
        "threshold": threshold,
    }


def table(lines: list[dict[str, Any]]) -> str:
    """Percent; mean and worst over the seeds."""
    from tabulate import tabulate

    found: dict[tuple[str, str], list[dict[str, float]]] = defaultdict(list)
    for line in lines:
        for rule, result in line["result"]["rules"].items():
            found[line["case"]["set"], rule].append(result)
    rows = []
    for (name, rule), results in found.items():
        wrong = [100 * result["false_known"] for result in results]
        cells = [spread([100 * result[key] for result in results]) for key in ("found", "findable")]
        rows.append([name, rule, len(results), f"{statistics.mean(wrong):.1f}", f"{max(wrong):.1f}", *cells])
    heads = ["set", "rule", "seeds", "false known", "worst", "found", "findable"]
    return tabulate(rows, heads, tablefmt="github", disable_numparse=True)


if __name__ == "__main__":
    main()
