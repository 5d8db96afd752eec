"""Seconds of the search on a GPU under other choices of its constants, and of its parts; one JSON line each.

    python tools/benchmark/search_choices.py
    python tools/benchmark/search_choices.py --sizes 32621x2048 1000000x256:65536 --seconds 80

A size is NxD, or NxD:M for the neighbours of the first M images only. All choices must find the same neighbours. The
script ends after `--seconds`, whatever is left.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
from pseudo_labels import K1, make_features, size_of

from fastreid_uns.pseudo_labels.search import gpu
from fastreid_uns.utils.precision import full_precision

CHOICES: dict[str, dict[str, Any]] = {
    "as shipped": {},
    "blocks of 1,024 rows": {"block": 1024},
    "blocks of 4,096 rows": {"block": 4096},
    "groups of 16 columns": {"_GROUP": 16},
    "groups of 64 columns": {"_GROUP": 64},
    "16 spare candidates": {"_SPARE": 16},
    "bfloat16": {"products": torch.bfloat16},
    "no Triton": {"triton_works": lambda: False},
}
PARTS = ("RoundedFeatures", "_of_others", "_least", "pair_distances", "search_again")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", default=["32621x2048", "1000000x256:65536"])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--seconds", type=float, default=80, help="after which nothing more is begun")
    arguments = parser.parse_args()
    begin = time.perf_counter()
    for size in arguments.sizes:
        whole, _, some = size.partition(":")
        n, d = size_of(whole)
        feats, rows = make_features(n, d).to(arguments.device), range(int(some or n))
        print(json.dumps({"size": size, "seconds of its parts": parts(feats, rows)}), flush=True)
        first = None
        for name, choice in CHOICES.items():
            if time.perf_counter() - begin > arguments.seconds:
                return
            result, index = timed(feats, rows, choice)
            first = index if first is None else first
            result["equal"] = torch.equal(index, first)
            print(json.dumps({"size": size, "choice": name, **result}), flush=True)


def timed(feats: torch.Tensor, rows: range, choice: dict[str, Any]) -> tuple[dict[str, Any], torch.Tensor]:
    """Best of three after one that warms up, and the neighbours."""
    settings = {name: choice[name] for name in ("block", "products") if name in choice}
    constants = {name: value for name, value in choice.items() if name not in settings}
    spent, again = [], []
    with ExitStack() as stack:
        for name, value in constants.items():
            stack.enter_context(mock.patch.object(gpu, name, value))
        search_again = gpu.search_again
        counted = lambda feats, images, *rest: again.append(len(images)) or search_again(feats, images, *rest)  # noqa: E731
        stack.enter_context(mock.patch.object(gpu, "search_again", counted))
        if feats.is_cuda:
            torch.cuda.reset_peak_memory_stats()
        for _ in range(4):
            start = waited(feats)
            index = search(feats, rows, **settings)
            spent.append(waited(feats) - start)
    peak = torch.cuda.max_memory_allocated() / 2**30 if feats.is_cuda else None
    return {"seconds": min(spent[1:]), "searched again": sum(again) // 4, "peak_gib": peak}, index


def search(feats: torch.Tensor, rows: range, block: int = 2048, **settings: Any) -> torch.Tensor:
    """As `nearest_neighbours` calls it; also on a CPU."""
    with full_precision(feats.device):
        return gpu.search_by_rows(feats, K1, block, rows=rows, **settings)[1]


def parts(feats: torch.Tensor, rows: range) -> dict[str, float]:
    """Seconds of each part of a search that waits for the device after each part, so the sum is more than it takes."""
    search(feats, rows)
    seconds = dict.fromkeys((*PARTS, "all"), 0.0)
    with ExitStack() as stack:
        for name in PARTS:
            stack.enter_context(mock.patch.object(gpu, name, clocked(getattr(gpu, name), name, seconds, feats)))
        with clock("all", seconds, feats):
            search(feats, rows)
    return seconds


def clocked(function: Callable, name: str, seconds: dict[str, float], feats: torch.Tensor) -> Callable:
    """The function, whose seconds are added up."""

    def run(*args: Any) -> Any:
        with clock(name, seconds, feats):
            return function(*args)

    return run


@contextmanager
def clock(name: str, seconds: dict[str, float], feats: torch.Tensor) -> Iterator[None]:
    """Add the seconds of a block."""
    start = waited(feats)
    yield
    seconds[name] += waited(feats) - start


def waited(feats: torch.Tensor) -> float:
    """The time, once the device has done all it was given."""
    if feats.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter()


if __name__ == "__main__":
    main()
