"""Time of hard centroids in logit space against explicit copies of the centroids for each query.

Run as `python -m fastreid_uns.projects.ACFL.benchmark`; `--help` lists the sizes.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .ascent import FeatureAscent

TEMPERATURE = 0.05


def explicit_logits(feats: Tensor, centroids: Tensor, labels: Tensor, ascent: FeatureAscent) -> Tensor:
    """(B,K) logits of hard centroids as algorithm 2 of ACFL writes them down: B copies of all centroids, and autograd.

    Args:
        feats: (B,D).
        centroids: (K,D).
        labels: (B,).
        ascent: steps and rates; both sides, no sphere.
    """
    rates = torch.full((len(feats), len(centroids), 1), ascent.rate_negative, dtype=feats.dtype, device=feats.device)
    rates.scatter_(1, labels[:, None, None], ascent.rate_positive)
    stars = centroids.repeat(len(feats), 1, 1)
    for _ in range(ascent.steps):
        stars.requires_grad_()
        logits = torch.bmm(stars, feats[:, :, None]).squeeze(2) / TEMPERATURE
        (slope,) = torch.autograd.grad(F.cross_entropy(logits, labels, reduction="sum"), stars)
        stars = stars.detach().addcmul_(rates, slope)
    return torch.bmm(stars, feats[:, :, None]).squeeze(2) / TEMPERATURE


def recurrent_logits(feats: Tensor, centroids: Tensor, labels: Tensor, ascent: FeatureAscent) -> Tensor:
    """The same logits by the recurrence."""
    easy = feats @ centroids.T
    return ascent(feats, centroids, easy, labels, TEMPERATURE).products(feats, easy) / TEMPERATURE


def problem(batch: int, clusters: int, dim: int, device: str = "cpu") -> tuple[Tensor, Tensor, Tensor]:
    """Unit queries near their centroids, unit centroids, and labels, float32."""
    generator = torch.Generator().manual_seed(0)
    centroids = F.normalize(torch.randn(clusters, dim, generator=generator))
    labels = torch.arange(batch) % clusters
    feats = F.normalize(centroids[labels] + 1.5 * F.normalize(torch.randn(batch, dim, generator=generator)))
    return feats.to(device), centroids.to(device), labels.to(device)


def seconds(work: Callable[[], Tensor], repeats: int) -> float:
    """Shortest wall time of a number of runs, after one that does not count."""
    best = float("inf")
    for run in range(repeats + 1):
        begin = time.perf_counter()
        float(work().sum())  # waits for the device
        best = min(best, time.perf_counter() - begin) if run else best
    return best


def compare(batch: int, clusters: int, dim: int, repeats: int, device: str = "cpu") -> dict[str, float]:
    """Seconds of both forms, their ratio and the largest difference of a logit."""
    tensors, ascent = problem(batch, clusters, dim, device), FeatureAscent()
    explicit = seconds(lambda: explicit_logits(*tensors, ascent), repeats)
    recurrent = seconds(lambda: recurrent_logits(*tensors, ascent), max(5, repeats))
    gap = (explicit_logits(*tensors, ascent) - recurrent_logits(*tensors, ascent)).abs().max()
    return {"explicit": explicit, "recurrent": recurrent, "ratio": explicit / recurrent, "difference": float(gap)}


def main(arguments: Sequence[str] | None = None) -> None:
    """Write one line with times and ratio."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for key, value, text in (
        ("batch", 64, "queries"),
        ("clusters", 600, "centroids"),
        ("dim", 2048, "length of a feature"),
        ("repeats", 2, "runs of the explicit form, of which the fastest counts"),
    ):
        parser.add_argument(f"--{key}", type=int, default=value, help=f"{text} ({value})")
    parser.add_argument("--device", default="cpu", help="cpu or cuda (cpu)")
    options = parser.parse_args(arguments)
    found = compare(options.batch, options.clusters, options.dim, options.repeats, options.device)
    sys.stdout.write(
        f"{options.batch} queries, {options.clusters} centroids, {options.dim} dimensions, {options.device}: "
        f"explicit {found['explicit']:.3f} s, recurrent {found['recurrent']:.4f} s, "
        f"ratio {found['ratio']:.0f}, largest difference of a logit {found['difference']:.1e}\n"
    )


if __name__ == "__main__":
    main()
