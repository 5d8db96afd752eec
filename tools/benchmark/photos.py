"""How well photos are grouped, labels hidden and names scrambled; one line of photos.jsonl for each row of a run.

    python tools/benchmark/photos.py --data my/sets --sets cattely grocery omniglot person vehicle --seeds 1 2 3 4 5
    python tools/benchmark/photos.py --data my/sets --device cuda --jobs 4 --output output/gpu/photos.jsonl
    python tools/benchmark/photos.py --data my/sets --table

A set is a folder of `--data` with a manifest.csv (path, identity, ...), all of whose photos are taken, or a generated
set (person, vehicle). A seed changes names, views, training and questions. Rows:

    today       pooled features of one view, Jaccard distance, DBSCAN with its defaults
    start       views, whitening, average linkage; no training
    trained     the same after training
    answers15, answers50
                after so many answers by the true labels to the questions that tell most, the threshold refitted
    random50    after 50 answers to questions about random merges up to 0.1 from the threshold, the threshold refitted
    supervised  trained on the true labels, then grouped as `trained`
    identify    half of the individuals known, without labels: photos of the others that are called known, and photos of
                these that are found

`trained` also has what 15 audit answers say about its pair precision. `stages` are the seconds of `views` (reading,
views, and the stages that are not trained; once for all rows), `features`, `training` and `clustering`. Lines that are
there are not measured again.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import measuring
from measuring import FOLDER, ROOT

SETS = ("cattely", "grocery", "omniglot", "person", "vehicle")
ROWS = ("today", "start", "trained", "answers15", "answers50", "random50", "supervised", "identify")
GENERATED = {"TRAIN_IDENTITIES": 60, "TRAIN_IMAGES": 1200, "TEST_IDENTITIES": 2, "QUERY_IMAGES": 2}
GENERATED |= {"GALLERY_IMAGES": 16, "DISTRACTORS": 0, "JUNK": 0}  # the training part alone is grouped
GENERATED_SETS = {"person", "vehicle"}
BEFORE = {"answers15": "trained", "answers50": "answers15", "random50": "trained"}  # rows that others go on from
ROUND = 5  # answers after which the groups are made again
DOUBTFUL = 0.1  # distance of a merge to the threshold


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=ROOT / "datasets", help="folder of the real sets")
    parser.add_argument("--sets", nargs="+", default=SETS)
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3, 4, 5])
    parser.add_argument(
        "--rows", nargs="+", choices=ROWS, default=ROWS, help="answers50 needs answers15, that and random50 trained"
    )
    parser.add_argument("--identities", type=int, default=0, help="take every n-th identity only; 0 = all photos")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda (default: %(default)s)")
    parser.add_argument(
        "--weights", default="imagenet", help="of the network, or a file of them (default: %(default)s)"
    )
    parser.add_argument("--jobs", type=int, default=1, help="cases at a time, which share the cores")
    parser.add_argument("--output", type=Path, default=Path(__file__).with_suffix(".jsonl"))
    parser.add_argument("--table", action="store_true", help="print the results, measure nothing")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.one:
        for row in measure(given.data, given.device, given.weights, given.rows, **json.loads(given.one)):
            print(json.dumps(row), flush=True)
    elif given.table:
        print(table(read_lines(given.output)))
    else:
        run_all(given)


def run_all(given: argparse.Namespace) -> None:
    """Each set and seed that has no lines yet, in a process of its own; a row is written when it is there.

    Raises:
        SystemExit: a case failed; the others are done and written.
    """
    done = [line["case"] for line in read_lines(given.output)]
    cases = [
        {"name": name, "seed": seed, "identities": given.identities} for seed in given.seeds for name in given.sets
    ]
    cases = [case for case in cases if any({**case, "row": row} not in done for row in given.rows)]
    for name in GENERATED_SETS.intersection(case["name"] for case in cases):
        photos_of(given.data, name, 0)  # processes at the same time must not generate it
    lock = threading.Lock()

    def write(line: dict[str, Any]) -> None:
        with lock, given.output.open("a") as file:
            if line["case"] not in done:
                file.write(json.dumps(line) + "\n")
                print(json.dumps({**line["case"], **line["result"]}), flush=True)

    one = partial(run_one, given, write)
    with ThreadPoolExecutor(given.jobs) as pool:
        failed = [case for case, good in zip(cases, pool.map(one, cases), strict=True) if not good]
    if failed:
        raise SystemExit(f"photos: {len(failed)} of {len(cases)} cases failed, such as {failed[0]}; see above.")


def run_one(given: argparse.Namespace, write: Callable[[dict[str, Any]], None], case: dict[str, Any]) -> bool:
    """Write what `measure` gives in a process that has its share of the cores; whether it came to its end."""
    share = str(max((os.cpu_count() or 1) // given.jobs, 1))
    variables = {name: os.environ.get(name, share) for name in ("OMP_NUM_THREADS", "NUMBA_NUM_THREADS")}
    command = [sys.executable, __file__, "--data", str(given.data), "--device", given.device]
    command += ["--weights", given.weights, "--rows", *given.rows, "--one", json.dumps(case)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env={**os.environ, **variables}) as process:
        for text in process.stdout or ():
            write(json.loads(text))
    return process.returncode == 0


def read_lines(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()] if file.is_file() else []


def measure(
    data: Path, device: str, weights: str, rows: list[str], name: str, seed: int, identities: int
) -> Iterator[dict[str, Any]]:
    """The line of each row: its case, its numbers, and what they were measured on.

    What rows share is computed once, and counted in the seconds of each of them.
    """
    import numpy as np
    import torch

    from fastreid_uns.photos.scan import scan
    from fastreid_uns.utils.comm import choose_device
    from fastreid_uns.utils.environment import environment, processor
    from fastreid_uns.utils.precision import full_precision

    sources, truth = photos_of(data, name, identities)
    place = choose_device(device)
    with tempfile.TemporaryDirectory() as folder, full_precision(place):
        hidden = scramble(sources, Path(folder), seed)
        found = scan(folder)
        labels = np.array([truth[hidden[Path(photo).resolve()]] for photo in found.photos])
        shared: dict[str, Any] = {"photos": len(labels), "individuals": len(set(labels.tolist())), "size": found.size}
        with measuring.measured(shared):
            photos = Photos(found, seed, place, weights)
        once = dict(photos.seconds)
        hardware = {**environment(place), "processor": processor(), "threads": str(torch.get_num_threads())}
        hardware["precision"] = str(photos.stages.trunk.dtype or torch.float32)
        results: dict[str, dict[str, Any]] = {}
        for row in (row for row in ROWS if row in rows):
            own: dict[str, Any] = {}
            photos.seconds.clear()
            with measuring.measured(own):
                numbers = ROW[row](photos, labels)
            base = results[BEFORE[row]] if row in BEFORE else shared
            seconds = own["seconds"] + base["seconds"]
            results[row] = {**shared, **own, **numbers, "seconds": seconds, "stages": {**once, **photos.seconds}}
            case = {"name": name, "seed": seed, "identities": identities, "row": row}
            yield {"case": case, "result": results[row], "environment": hardware}


class Photos:
    """Photos of a scan, with the activations of their views and the network that makes features of these.

    `seconds` adds up the time of each stage; `fitted` has the features that were made last, and their views, `local`
    the local descriptors that count beside them.
    """

    def __init__(self, found: Any, seed: int, device: Any, weights: str) -> None:
        import torch

        from fastreid_uns.data.image_set import ImageSet
        from fastreid_uns.photos import network as networks
        from fastreid_uns.photos.embed import Stages, cache_activations, pooled_features
        from fastreid_uns.photos.group import Settings, for_count
        from fastreid_uns.structures import Record

        self.seed, self.usual = seed, Settings(seed=seed)
        self.settings = for_count(self.usual, len(found.photos))
        self.device, self.seconds = device, defaultdict(float)
        network, _ = networks.start(networks.describe(ROOT, ROOT, found.size, weights), len(found.photos))
        self.encoder = network.encoder.to(device)
        self.published = copy.deepcopy(self.encoder.state_dict())
        self.stages = Stages.of(self.encoder, found.size, trained=True, amp=self.settings.amp)
        workers = torch.get_num_threads() if torch.get_num_threads() > 1 else 0
        images = ImageSet([Record(photo, -1, -1) for photo in found.photos], found.size, workers=workers)
        with self.timed("views"):
            self.kept = cache_activations(self.stages, images, self.settings.views, seed)
        with self.timed("features"):
            self.published_features = pooled_features(self.stages, self.kept)
        self.local: Any = None
        self.groups: Any = None
        self.asked: Any = None  # groups, threshold and answers so far

    @contextmanager
    def timed(self, stage: str) -> Iterator[None]:
        """Add the seconds of the block to those of a stage."""
        import torch

        begin = time.perf_counter()
        yield
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self.seconds[stage] += time.perf_counter() - begin

    def features(self, rows: Any = None, *, steps: int | None = None, unit: Any = None) -> Any:
        """Features of some photos by a network that was trained on them, from published weights.

        `unit` tells which photos belong together, instead of strict groups.
        """
        from fastreid_uns.photos.adapt import adapt
        from fastreid_uns.photos.embed import pooled_features, whitening_of
        from fastreid_uns.photos.group import for_count, local_and_positives

        self.encoder.load_state_dict(self.published, strict=False)
        kept = self.kept if rows is None else self.part(rows)
        how = self.settings.adaptation
        how = how if steps is None else dataclasses.replace(how, steps=steps)
        self.local = None
        feats = self._fitted(self.published_features if rows is None else self.published_features[rows])
        if how.steps:
            with self.timed("training"):
                self.local, positives = local_and_positives(kept, feats, for_count(self.usual, len(feats)))
                unit = positives if unit is None else unit
                adapt(self.stages, kept, whitening_of(self.stages.head), how, unit, seed=self.seed)
            with self.timed("features"):
                pooled = pooled_features(self.stages, kept)
            feats = self._fitted(pooled)
        return feats

    def _fitted(self, pooled: Any) -> Any:
        from fastreid_uns.photos.group import fitted, for_count, main_directions

        with self.timed("features"):
            found = main_directions(self.stages, pooled)
            self.fitted = fitted(self.stages, found, for_count(self.usual, len(pooled)), local=self.local)
        return self.fitted.feats

    def more_features(self, rows: Any) -> Any:
        """Features of other photos by the network as it is now."""
        from fastreid_uns.photos.embed import pooled_features, whitened

        with self.timed("features"):
            return whitened(self.stages.head, pooled_features(self.stages, self.part(rows))).cpu()

    def cluster(self, feats: Any, constraints: Any = None, **changes: Any) -> Any:
        """Groups, with some settings changed."""
        from fastreid_uns.photos.group import cluster

        with self.timed("clustering"):
            return cluster(feats, dataclasses.replace(self.settings, **changes), constraints, self.local)

    def part(self, rows: Any) -> Any:
        """The activations of some photos."""
        import torch

        return self.kept.part(torch.from_numpy(rows))


def photos_of(data: Path, name: str, every: int) -> tuple[list[Path], list[int]]:
    """All photos of a set, and who they show."""
    import csv

    if name in GENERATED_SETS:
        from fastreid_uns import builtin  # noqa: F401
        from fastreid_uns.registry import DATASET_REGISTRY

        section = {"NAME": "synthetic", "ROOT": str(FOLDER / "images"), "KIND": name, "SIZE": [128, 128], **GENERATED}
        pairs = [(Path(record.path), record.identity) for record in DATASET_REGISTRY.build(section).train]
    else:
        with (data / name / "manifest.csv").open(newline="") as file:
            pairs = [(data / name / row["path"], int(row["identity"])) for row in csv.DictReader(file)]
    kept = set(sorted({identity for _, identity in pairs})[:: every or 1])
    pairs = [pair for pair in pairs if pair[1] in kept]
    return [path for path, _ in pairs], [identity for _, identity in pairs]


def scramble(sources: list[Path], folder: Path, seed: int) -> dict[Path, int]:
    """Copies whose names and order say nothing; place in `sources` by real path."""
    import numpy as np

    names = np.random.default_rng(seed).permutation(len(sources))
    hidden = {}
    for place, (source, number) in enumerate(zip(sources, names, strict=True)):
        copy = folder / f"{number:06d}{source.suffix}"
        copy.write_bytes(source.read_bytes())
        hidden[copy.resolve()] = place
    return hidden


def today(photos: Photos, truth) -> dict[str, Any]:
    import torch

    from fastreid_uns.pseudo_labels.dbscan import DBSCANLabels
    from fastreid_uns.structures import FeatureBank, NoClusters

    with photos.timed("features"):
        pooled = photos.published_features[:, 0].cpu()
        feats = torch.nn.functional.normalize(pooled[:, : photos.encoder.backbone.out_channels])
    try:
        with photos.timed("clustering"):
            bank = FeatureBank(feats, torch.zeros(len(feats)))
            labels = DBSCANLabels(outliers="singletons")(bank, 0).labels.numpy()
    except NoClusters:
        labels = torch.arange(len(feats)).numpy()
    return scores(labels, truth)


def start(photos: Photos, truth) -> dict[str, Any]:
    groups = photos.cluster(photos.features(steps=0))
    return {**scores(groups.labels, truth), **audit(groups, truth, photos.seed)}


def trained(photos: Photos, truth) -> dict[str, Any]:
    photos.groups = photos.cluster(photos.features())
    return {**scores(photos.groups.labels, truth), **audit(photos.groups, truth, photos.seed)}


def supervised(photos: Photos, truth) -> dict[str, Any]:
    import torch

    feats = photos.features(unit=torch.from_numpy(truth))
    return scores(photos.cluster(feats).labels, truth)


def answered(count: int, choose: Callable[..., list[Any]], *, goes_on: bool):
    """The row after `count` answers, asked in rounds about the groups of `trained`, or of the row before.

    Args:
        choose: gives so many pairs of photos by the photos, the groups, their threshold and the answers so far.
    """

    def measure(photos: Photos, truth) -> dict[str, Any]:
        import numpy as np

        from fastreid_uns.photos.informative import meeting_heights, refitted_threshold
        from fastreid_uns.pseudo_labels.constraints import Answer, Constraints

        usual = photos.settings.threshold
        groups, threshold, answers = photos.asked if goes_on else (photos.groups, usual, [])
        while len(answers) < count:
            wanted = min(ROUND, count - len(answers))
            pairs = choose(photos, groups, threshold, wanted, Constraints(len(truth), answers))
            if not pairs:
                break
            answers = answers + [Answer(a, b, bool(truth[a] == truth[b])) for a, b in pairs]
            heights = meeting_heights(photos.groups.dendrogram, np.array([answer[:2] for answer in answers]))
            threshold = refitted_threshold(usual, heights, np.array([answer.same for answer in answers]))
            groups = photos.cluster(groups.feats, Constraints(len(truth), answers), threshold=threshold)
        photos.asked = (groups, threshold, answers)
        return {**scores(groups.labels, truth), "threshold": threshold, "answers": len(answers)}

    return measure


def informative(photos: Photos, groups, threshold: float, wanted: int, known) -> list[tuple[int, int]]:
    from fastreid_uns.photos.informative import informative_pairs

    found = informative_pairs(groups.dendrogram, groups.feats, threshold, wanted, known)
    return [(pair.first, pair.second) for pair in found]


def at_random(photos: Photos, groups, threshold: float, wanted: int, known) -> list[tuple[int, int]]:
    """A random photo of each side of random merges that are doubtful and not answered."""
    import numpy as np

    draw, tree = np.random.default_rng([photos.seed, len(known.answers)]), groups.dendrogram
    found: list[tuple[int, int]] = []
    for merge in draw.permutation(np.flatnonzero(abs(tree.heights - threshold) <= DOUBTFUL)):
        if len(found) == wanted:
            break
        sides = [tree.members(int(node)) for node in tree.children[merge]]
        if not np.isin(known.unit[sides[0]], known.unit[sides[1]]).any():
            found.append((int(draw.choice(sides[0])), int(draw.choice(sides[1]))))
    return found


def audit(groups, truth, seed: int) -> dict[str, Any]:
    """What 15 true answers make of the estimate."""
    from fastreid_uns.photos.audit import audit_pairs, pair_precision, rough_estimate

    rough = rough_estimate(groups.confidence, groups.labels)
    pairs = audit_pairs(groups.labels, groups.confidence, seed=seed)
    same = int((truth[pairs[:, 0]] == truth[pairs[:, 1]]).sum())
    stated = pair_precision(rough, same, len(pairs) - same)
    return {"rough": rough, "stated": stated.estimate, "stated_low": stated.low, "stated_high": stated.high}


def identified(photos: Photos, truth) -> dict[str, Any]:
    """Half of the individuals are known by four fifths of their photos; the rest is asked about."""
    import numpy as np
    import torch

    from fastreid_uns.photos.group import for_count
    from fastreid_uns.photos.identify import STRICT, identify
    from fastreid_uns.photos.outcome import thresholds_of

    draw = np.random.default_rng(photos.seed)
    individuals = draw.permutation(np.unique(truth))
    known = np.isin(truth, individuals[: len(individuals) // 2])
    inside = known & (draw.random(len(truth)) < 0.8)
    feats = photos.features(np.flatnonzero(inside))
    views = photos.fitted.views
    settings = for_count(photos.usual, int(inside.sum()))
    grouping = photos.cluster(feats, k1=settings.k1)
    groups, strict = grouping.labels, grouping.dendrogram.cut(STRICT)
    thresholds = thresholds_of(grouping, views)
    rest = np.flatnonzero(~inside)
    said = identify(photos.more_features(rest), feats, torch.from_numpy(groups), thresholds, precision=1.0)
    own = truth[inside]
    who = {g: int(np.bincount(own[groups == g]).argmax()) for g in range(groups.max() + 1)}
    called = np.array([one.kind == "known" for one in said])
    right = np.array([who.get(one.group, -1) == truth[i] for one, i in zip(said, rest, strict=True)])
    old = known[rest]
    pure = scores(strict, own)
    return {
        "false_known": float(called[~old].mean()),
        "found": float((called & right)[old].mean()),
        "findable": float(right[old].mean()),
        "called_new": float(np.mean([one.kind == "new" for one, k in zip(said, old, strict=True) if not k])),
        "strict_precision": pure["precision"],
    }


def scores(labels, truth) -> dict[str, Any]:
    """Adjusted Rand index, and precision and recall of pairs."""
    import numpy as np
    from sklearn.metrics import adjusted_rand_score
    from sklearn.metrics.cluster import pair_confusion_matrix

    (_, wrong), (missed, right) = pair_confusion_matrix(truth, labels).tolist()
    return {
        "ari": float(adjusted_rand_score(truth, labels)),
        "precision": right / max(right + wrong, 1),
        "recall": right / max(right + missed, 1),
        "groups": len(np.unique(labels)),
    }


ROW = {
    "today": today,
    "start": start,
    "trained": trained,
    "answers15": answered(15, informative, goes_on=False),
    "answers50": answered(50, informative, goes_on=True),
    "random50": answered(50, at_random, goes_on=False),
    "supervised": supervised,
    "identify": identified,
}


def table(lines: list[dict[str, Any]]) -> str:
    """Means and spread over the seeds."""
    from tabulate import tabulate

    found = defaultdict(list)
    for line in lines:
        found[line["case"]["name"], line["case"]["row"]].append(line["result"])
    rows = []
    for (name, row), results in sorted(found.items(), key=lambda item: (item[0][0], ROWS.index(item[0][1]))):
        numbers = ("ari", "precision", "recall", "groups", "stated", "false_known", "found")
        cells = [spread([result[key] for result in results if key in result]) for key in numbers]
        minutes = spread([result["seconds"] / 60 for result in results])
        peak = max(result["peak_gib"] for result in results if "peak_gib" in result)
        rows.append([name, row, len(results), *cells, minutes, f"{peak:.1f}"])
    heads = ["set", "row", "seeds", "ARI", "pair precision", "pair recall", "groups", "stated precision"]
    return tabulate(rows, [*heads, "false known", "found", "minutes", "peak GiB"], tablefmt="github")


def spread(values: list[float]) -> str:
    if not values:
        return ""
    deviation = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.2f}{deviation}"


if __name__ == "__main__":
    main()
