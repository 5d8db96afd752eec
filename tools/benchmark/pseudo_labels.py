"""The pseudo-label stage against the number of images: seconds and memory, and a chart.

    python tools/benchmark/pseudo_labels.py
    python tools/benchmark/pseudo_labels.py --sizes 200000x256 --forms exact ivf:16 ivf:64 hnsw:64

A size is N or NxD; D is 2,048 up to 100,000 images and 256 above. Forms: `dense`, whole N x N matrices as in the
textbook, up to 40,000 images; `float32`, the search by products in float32, up to 200,000; `exact`, what the generator
does unless told otherwise: products in 8 bits where they are faster; `ranks:W`, the same by W processes of one thread
each, 1 and 2 of them up to 40,000; `ivf:EFFORT` and `hnsw:EFFORT`, by faiss; `cuda`, the features on a GPU;
`cuda:ivf:EFFORT`, by faiss on that GPU, if it was built for GPUs (extra `ann-gpu`). Labels are compared with those of
the dense form, or of an exact one where there is none; up to 50,000 images those of a GPU are compared with what its
CPU finds, and the neighbours of some images at any number.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import measuring
from measuring import FOLDER, ROOT

SIZES = {
    "full": ["1000", "4096", "12936", "32621", "100000", "200000", "1000000"],
    "small": ["600x128", "5000x64"],
}
FORMS = ["dense", "float32", "exact", "ranks:1", "ranks:2", "cuda"]
# images up to which a form is measured
LIMITS = {"dense": 40_000, "float32": 200_000, "ranks:1": 40_000, "ranks:2": 40_000}
REPEATED = 50_000  # images up to which a form other than dense is measured three times; the best counts
K1, K2, EPS, MIN_SAMPLES = 30, 6, 0.6, 4
PARTS = ("neighbours", "after")
IMAGES_PER_IDENTITY = 17  # as in Market-1501
LATENT = 128  # features of trained networks vary in about so many directions


def make_features(n: int, d: int):
    """(N, D) float32, unit length: identities, images around them, and a little noise in all directions.

    Equal on every machine with the same torch; made in slices, so that it takes no memory beside the result.
    """
    import torch

    generator = torch.Generator().manual_seed(n)
    latent = min(LATENT, d)
    identities = torch.randn(max(1, n // IMAGES_PER_IDENTITY), latent, generator=generator)
    basis = torch.linalg.qr(torch.randn(d, latent, generator=generator))[0].T
    feats = torch.empty(n, d)
    for part in feats.split(8192):
        own = identities[torch.randint(len(identities), (len(part),), generator=generator)]
        # some images resemble their identity less than others
        spread = 1 + torch.rand(len(part), 1, generator=generator)
        within = own + spread * torch.randn(len(part), latent, generator=generator)
        part.copy_(within @ basis).add_(torch.randn(part.shape, generator=generator), alpha=0.3 * (latent / d) ** 0.5)
        torch.nn.functional.normalize(part, out=part)
    return feats


def dense_labels(feats, result: dict[str, Any]):
    """Labels of the textbook form, which the tests hold as their oracle."""
    sys.path.insert(0, str(ROOT / "tests/pseudo_labels"))
    import dense_oracle
    from sklearn.cluster import DBSCAN

    x = feats.numpy()
    with measuring.measured(result, "neighbours"):
        order = dense_oracle.neighbours(x, K1)
    with measuring.measured(result, "after"):
        distance = dense_oracle.jaccard_from(order, x, K1, K2)
        return DBSCAN(eps=EPS, min_samples=MIN_SAMPLES, metric="precomputed").fit_predict(distance)


def sparse_labels(feats, result: dict[str, Any], search: Callable):
    """Labels of the package, as `DBSCANLabels` makes them."""
    from fastreid_uns.pseudo_labels.dbscan import dbscan
    from fastreid_uns.pseudo_labels.jaccard import encode, encoding_distance

    with measuring.measured(result, "neighbours"):
        sq, index = search(feats, K1)[:2]
        if feats.is_cuda:
            index[:1].cpu()  # waits for the device
    with measuring.measured(result, "after"):
        encoding = encode(feats, sq, index, K1, K2, lambda rows, distances: distances)
        del sq, index
        return dbscan(encoding_distance(encoding, max_distance=EPS), EPS, MIN_SAMPLES)


def search_of(form: str) -> Callable:
    """What finds the neighbours in a form that is not dense."""
    from fastreid_uns.pseudo_labels.search.approximate import approximate_neighbours
    from fastreid_uns.pseudo_labels.search.candidates import search_by_candidates
    from fastreid_uns.pseudo_labels.search.exact import nearest_neighbours

    kind, _, effort = form.removeprefix("cuda:").partition(":")
    if kind in ("ivf", "hnsw"):
        return partial(approximate_neighbours, search=kind, effort=int(effort or 64))
    if kind == "float32":
        return partial(search_by_candidates, block=2048, int8=False)
    return nearest_neighbours


def cases(size: str, sizes: list[str], forms: list[str]) -> list[measuring.Case]:
    """All forms of a size, smaller sizes first."""
    return [
        {
            "images": n,
            "dim": d,
            "form": form,
            "device": "cuda" if form.startswith("cuda") else "cpu",
            **({"gib": 12.0 * n * n / 2**30} if form == "dense" else {}),
        }
        for n, d in map(size_of, sizes or SIZES[size])
        for form in forms
        if n <= LIMITS.get(form, n)
    ]


def size_of(text: str) -> tuple[int, int]:
    """N and D of N or NxD.

    Raises:
        ValueError: the text is neither.
    """
    n, _, d = text.partition("x")
    if not n.isdigit() or (d and not d.isdigit()):
        raise ValueError(f"--sizes: {text!r} is no size; N or NxD is accepted, such as 32621 or 200000x256.")
    return int(n), int(d) if d else 2048 if int(n) <= 100_000 else 256


def measure(images: int, dim: int, form: str, device: str, gib: float = 0) -> dict[str, Any]:
    """One form at one size; its labels are kept beside, for comparison."""
    import numpy as np
    import torch

    from fastreid_uns.pseudo_labels.search import candidates

    if form.startswith("ranks:"):
        return measure_ranks(images, dim, int(form.removeprefix("ranks:")))
    run: Callable = dense_labels if form == "dense" else partial(sparse_labels, search=search_of(form))
    if form != "dense":
        load_compiled(run, dim, device)
    feats = make_features(images, dim)
    if form == "cuda" and images <= REPEATED and not labels_file(images, dim, "exact").is_file():
        np.save(labels_file(images, dim, "exact"), sparse_labels(feats, {}, search_of("exact")))
    feats = feats.to(device)
    held = measuring.memory_gib("VmRSS")
    runs = []
    for _ in range(3 if images <= REPEATED and form != "dense" else 1):
        result: dict[str, Any] = {}
        labels = np.asarray(run(feats, result))
        result["seconds"] = result["neighbours_seconds"] + result["after_seconds"]
        runs.append(result)
    result = min(runs, key=lambda found: found["seconds"])
    result["process_peak_gib"] = held + max(result["neighbours_peak_gib"], result["after_peak_gib"])
    result |= {"clusters": int(labels.max()) + 1, "outliers": int((labels < 0).sum())}
    if form == "exact":
        result["int8"] = candidates._chosen(feats, K1).int8
    if device == "cuda":
        result["device_peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
    if form == "cuda":
        result |= checked_search(feats)
    np.save(labels_file(images, dim, form), labels)
    return result | agreement(labels, images, dim, form)


def load_compiled(run: Callable, dim: int, device: str = "cpu") -> None:
    """What later calls find in memory: compiled loops, and whether products of 8 bits pay."""
    from fastreid_uns.pseudo_labels.search import candidates

    run(make_features(600, dim).to(device), {})
    search_of("exact")(make_features(candidates._SMALL, dim), K1)


def measure_ranks(images: int, dim: int, processes: int) -> dict[str, Any]:
    """The best of three runs by processes of one thread each, as the first has measured it, and the CPU seconds of all.

    Where the processors are shared with other work, the CPU seconds say more than the wall time.
    """
    import numpy as np
    import torch

    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(one_rank, (processes, images, dim, folder), nprocs=processes)
        runs = torch.load(Path(folder) / "runs.pth")
        labels = np.load(Path(folder) / "labels.npy")
    result: dict[str, Any] = min(runs, key=lambda found: found["seconds"])
    result |= {"clusters": int(labels.max()) + 1, "outliers": int((labels < 0).sum())}
    form = f"ranks:{processes}"
    np.save(labels_file(images, dim, form), labels)
    return result | agreement(labels, images, dim, form)


def one_rank(rank: int, processes: int, images: int, dim: int, folder: str) -> None:
    """One of the processes; the first writes the results of the runs, and the labels of the last."""
    import numpy as np
    import torch

    from fastreid_uns.utils import comm, sharing

    torch.set_num_threads(1)
    store = f"file://{folder}/store"
    torch.distributed.init_process_group("gloo", init_method=store, rank=rank, world_size=processes)
    run = partial(sparse_labels, search=search_of("exact"))
    with sharing.by_all_ranks():
        load_compiled(run, dim)
    feats, runs = make_features(images, dim), []
    held = measuring.memory_gib("VmRSS")
    for _ in range(3):
        result: dict[str, Any] = {}
        comm.barrier()
        with sharing.by_all_ranks():
            labels = run(feats, result)
        every = comm.gather_objects(result)
        result["seconds"] = result["neighbours_seconds"] + result["after_seconds"]
        result["cpu_seconds"] = [own["neighbours_cpu_seconds"] + own["after_cpu_seconds"] for own in every]
        result["process_peak_gib"] = held + max(own[f"{part}_peak_gib"] for own in every for part in PARTS)
        runs.append(result)
    if rank == 0:
        torch.save(runs, Path(folder) / "runs.pth")
        np.save(Path(folder) / "labels.npy", labels)
    torch.distributed.destroy_process_group()


def checked_search(feats, sample: int = 256) -> dict[str, Any]:
    """Of a search on a GPU: images that were searched again, and images of a sample whose neighbours are wrong."""
    from unittest import mock

    import numpy as np

    from fastreid_uns.pseudo_labels.search import gpu
    from fastreid_uns.pseudo_labels.search.candidates import nearest_of_listed

    again, search = [0], gpu.search_again
    counted = lambda feats, images, *rest: again.append(len(images)) or search(feats, images, *rest)  # noqa: E731
    with mock.patch.object(gpu, "search_again", counted):
        sq, index = (found.cpu() for found in search_of("cuda")(feats, K1))
    some = np.unique(np.linspace(0, len(feats) - 1, sample).astype(np.int64))
    none = np.empty((len(some), 0), np.int32)
    true_sq, true = nearest_of_listed(feats.cpu(), K1, some, np.full(len(some), -1, np.int32), none)
    wrong = ((index[some] != true) | (sq[some] != true_sq)).any(1)
    return {"searched_again": sum(again), "wrong_of_sample": int(wrong.sum()), "triton": gpu.triton_works()}


def labels_file(images: int, dim: int, form: str):
    """Where the labels of a case are kept."""
    return FOLDER / f"labels_{images}x{dim}_{form.replace(':', '_')}.npy"


def agreement(labels, images: int, dim: int, form: str) -> dict[str, Any]:
    """How labels agree with those of the first of the exact forms that was measured before."""
    import numpy as np
    from sklearn.metrics import adjusted_rand_score

    for other in ("dense", "float32", "exact", "ranks:1", "cuda"):
        file = labels_file(images, dim, other)
        if other != form and file.is_file():
            expected = np.load(file)
            index = float(adjusted_rand_score(expected, labels))
            equal = bool((expected == labels).all())
            return {"compared_with": other, "equal_labels": equal, "adjusted_rand_index": index}
    return {}


def draw(records: list[measuring.Record], file) -> None:
    """Seconds of all, seconds after the neighbours, and peak memory, against the number of images."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    panels = (
        ("whole stage, seconds", "seconds"),
        ("after the neighbours, seconds", "after_seconds"),
        ("peak memory of the process, GiB", "process_peak_gib"),
    )
    figure, axes = plt.subplots(1, 3, figsize=(15, 4.5), layout="constrained")
    lines = sorted({(record["case"]["form"], record["case"]["dim"]) for record in records})
    lines = [line for line in lines if not line[0].startswith("ranks:")]
    for axis, (title, key) in zip(axes, panels, strict=True):
        for form, dim in lines:
            points = sorted(
                (record["case"]["images"], record["result"][key])
                for record in records
                if (record["case"]["form"], record["case"]["dim"]) == (form, dim)
            )
            axis.plot(*zip(*points, strict=True), marker="o", markersize=4, label=f"{form}, {dim:,} numbers")
        axis.set(xscale="log", yscale="log", title=title, xlabel="images")
        axis.grid(True, which="both", alpha=0.2)
    axes[0].legend(fontsize=8)
    figure.savefig(file, dpi=110)
    plt.close(figure)


def check(records: list[measuring.Record]) -> None:
    """All exact forms of the package must give the same clusters.

    Raises:
        ValueError: they do not.
    """
    found: dict[tuple[int, int], tuple[str, int, int]] = {}
    for record in records:
        case, result = record["case"], record["result"]
        if case["form"] in ("float32", "exact", "cuda") or case["form"].startswith("ranks:"):
            own = (case["form"], result["clusters"], result["outliers"])
            first = found.setdefault((case["images"], case["dim"]), own)
            if own[1:] != first[1:]:
                raise ValueError(f"{case['images']} images: clusters and outliers of {own} are not those of {first}.")


def main() -> None:
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--sizes", nargs="+", default=[])
    parser.add_argument("--forms", nargs="+", default=FORMS)
    chosen, sys.argv[1:] = parser.parse_known_args()
    measuring.main(__doc__, __file__, partial(cases, sizes=chosen.sizes, forms=chosen.forms), measure, check)
    for size in ("small", "full"):
        file = measuring.results_file(__file__, size)
        if file.is_file() and "--one" not in sys.argv:
            draw(measuring.read(file), file.with_suffix(".png"))


if __name__ == "__main__":
    main()
