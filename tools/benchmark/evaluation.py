"""Ranking of a gallery for each query, after the distances: seconds and memory.

Three forms on the same features: `loop`, the textbook form (all distances sorted, then a Python loop over the queries);
`compiled`, the same with a compiled loop; `blocks`, what the package does. All give the same numbers.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import measuring

SETS = {  # queries, gallery images, identities, cameras
    "market1501": (3368, 15913, 750, 6),
    "msmt17": (11659, 82161, 3060, 15),
    "small": (300, 2000, 100, 6),
}
DIM = 2048
NEEDED = {"loop": 22.0, "compiled": 13.0}  # GiB at the size of MSMT17


def cases(size: str) -> list[measuring.Case]:
    if size == "small":
        return [{"set": "small", "form": form, "device": "cpu"} for form in ("loop", "compiled", "blocks")]
    found = [
        {
            "set": name,
            "form": form,
            "device": "cpu",
            **({"gib": NEEDED[form]} if name == "msmt17" and form in NEEDED else {}),
        }
        for name in ("market1501", "msmt17")
        for form in ("blocks", "compiled", "loop")
    ]
    return found + [{"set": name, "form": "blocks", "device": "cuda"} for name in ("market1501", "msmt17")]


def task(name: str):
    """Features, identities and cameras of query and gallery; images of an identity are alike, but not all."""
    import torch

    queries, images, identities, cameras = SETS[name]
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(identities, DIM, generator=generator)
    split = []
    for count in (queries, images):
        owner = torch.randint(identities, (count,), generator=generator)
        camera = torch.randint(cameras, (count,), generator=generator)
        feats = torch.empty(count, DIM)
        for part, own in zip(feats.split(4096), owner.split(4096), strict=True):
            spread = 4 + 4 * torch.rand(len(part), 1, generator=generator)
            part.copy_(centres[own] + spread * torch.randn(part.shape, generator=generator))
            torch.nn.functional.normalize(part, out=part)
        split.append((feats, owner, camera))
    return split


def textbook(distance, owners, cameras, gallery_owners, gallery_cameras) -> Iterator[tuple[float, int]]:
    """Average precision and rank of the first match of each query, from all distances sorted at once."""
    import numpy as np

    order = np.argsort(distance, axis=1)
    matches = gallery_owners[order] == owners[:, None]
    for query in range(len(distance)):
        keep = ~(matches[query] & (gallery_cameras[order[query]] == cameras[query]))
        hits = matches[query][keep]
        if not hits.any():
            continue
        precision = hits.cumsum() / (np.arange(len(hits)) + 1)
        yield (precision * hits).sum() / hits.sum(), int(hits.argmax()) + 1


def compiled_loop():
    """The loop of `textbook` as machine code, one query after the other."""
    import numba

    @numba.njit
    def scores(order, owners, cameras, gallery_owners, gallery_cameras, precisions, firsts):
        for query in range(len(order)):
            rank, hits, total = 0, 0, 0.0
            for place in order[query]:
                same = gallery_owners[place] == owners[query]
                if same and gallery_cameras[place] == cameras[query]:
                    continue
                rank += 1
                if same:
                    hits += 1
                    total += hits / rank
                    if hits == 1:
                        firsts[query] = rank
            if hits:
                precisions[query] = total / hits

    return scores


def summary(precisions, firsts) -> dict[str, float]:
    """mAP and CMC in percent over the queries with a match."""
    import numpy as np

    firsts = np.asarray(firsts)
    valid = firsts > 0
    ranks = {f"rank{k}": 100 * float((firsts[valid] <= k).mean()) for k in (1, 5, 10)}
    return {"mAP": 100 * float(np.asarray(precisions)[valid].mean()), **ranks}


def measure(set: str, form: str, device: str, gib: float = 0) -> dict[str, Any]:
    """Seconds of the ranking and its peak above the features; with blocks, the distances of a block are in the peak."""
    import numpy as np

    from fastreid_uns.evaluation.retrieval import block_rows, distance_blocks

    (query, *labels), (gallery, *gallery_labels) = ((part.to(device) for part in split) for split in task(set))
    result: dict[str, Any] = {}
    if form == "blocks":
        return _blocks(query, gallery, [*labels, *gallery_labels], result)
    arrays = [value.numpy() for value in (*labels, *gallery_labels)]
    distance = np.empty((len(query), len(gallery)), np.float32)
    for row, block in zip(range(0, len(query), block_rows(len(gallery))), distance_blocks(query, gallery), strict=True):
        distance[row : row + len(block)] = block
    held = distance.nbytes / 2**30
    if form == "loop":
        with measuring.measured(result):
            precisions, firsts = zip(*textbook(distance, *arrays), strict=True)
    else:
        scores = compiled_loop()
        scores(np.zeros((1, 1), np.int64), *arrays, np.zeros(len(query)), np.zeros(len(query), np.int64))
        with measuring.measured(result):
            precisions, firsts = np.zeros(len(query)), np.zeros(len(query), np.int64)
            scores(np.argsort(distance, axis=1), *arrays, precisions, firsts)
    result["peak_gib"] += held  # the matrix of distances was made before
    return {**result, "metrics": summary(precisions, firsts)}


def _blocks(query, gallery, labels, result: dict[str, Any]) -> dict[str, Any]:
    import time

    import torch

    from fastreid_uns.evaluation.retrieval import Ranker, distance_blocks

    cuda = query.is_cuda
    spent = 0.0

    def timed() -> Iterator[torch.Tensor]:
        nonlocal spent
        blocks = distance_blocks(query, gallery)
        while True:
            start = time.perf_counter()
            block = next(blocks, None)
            if cuda:
                torch.cuda.synchronize()
            spent += time.perf_counter() - start
            if block is None:
                return
            yield block

    ranker = Ranker(*labels, "cross_camera")
    Ranker(*(value[:64] for value in labels[:2]), *labels[2:], "cross_camera").score(
        distance_blocks(query[:64], gallery)
    )
    with measuring.measured(result):
        spent = 0.0
        ranker = Ranker(*labels, "cross_camera")
        scores = ranker.score(timed())
        metrics = scores.summary()
    result["distances_seconds"] = spent
    result["seconds"] -= spent
    if cuda:
        result["device_peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
    return {**result, "metrics": {name: metrics[name] for name in ("mAP", "rank1", "rank5", "rank10")}}


def check(records: list[measuring.Record]) -> None:
    """All forms must give the same numbers, to 1e-6; the textbook sort leaves equal distances in any order.

    Raises:
        ValueError: they do not.
    """
    for name in SETS:
        found = [record["result"]["metrics"] for record in records if record["case"]["set"] == name]
        for metrics in found[1:]:
            if any(abs(metrics[key] - found[0][key]) > 1e-4 for key in metrics):  # percent
                raise ValueError(f"{name}: {metrics} is not {found[0]}.")


if __name__ == "__main__":
    measuring.main(__doc__, __file__, cases, measure, check)
