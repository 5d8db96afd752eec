"""Time of the camera-aware Jaccard distance beside the plain one.

Run as `python -m fastreid_uns.projects.CAJ.benchmark`; `--help` lists the sizes.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from fastreid_uns.pseudo_labels.jaccard import camera_jaccard_distance, jaccard_distance

IMAGES_PER_IDENTITY = 31  # as in MSMT17
WARM_UP = 9_000  # images of the runs that load what is compiled; as many as take the search in 8 bits
LATENT = 128  # features of trained networks vary in about so many directions


def make_bank(images: int, dim: int, cameras: int) -> tuple[Tensor, Tensor]:
    """Unit features (N,D) float32 and cameras (N,): identities, seen by cameras that each add a direction of its own.

    Images of one camera are nearer to each other than to those of others, as in features of a network before training.
    """
    generator = torch.Generator().manual_seed(images)
    latent = min(LATENT, dim)
    identities = torch.randn(max(1, images // IMAGES_PER_IDENTITY), latent, generator=generator)
    directions = torch.randn(cameras, latent, generator=generator)
    basis = torch.linalg.qr(torch.randn(dim, latent, generator=generator))[0].T
    seen = torch.randint(cameras, (images,), generator=generator)
    feats = torch.empty(images, dim)
    for part, camera in zip(feats.split(8192), seen.split(8192), strict=True):
        own = identities[torch.randint(len(identities), (len(part),), generator=generator)]
        spread = 1 + torch.rand(len(part), 1, generator=generator)
        within = own + 0.5 * directions[camera] + spread * torch.randn(len(part), latent, generator=generator)
        part.copy_(within @ basis).add_(torch.randn(part.shape, generator=generator), alpha=0.3 * (latent / dim) ** 0.5)
        F.normalize(part, out=part)
    return feats, seen


def measured(work: Callable[[], object]) -> tuple[float, float]:
    """Wall and CPU seconds of one run."""
    wall, before = time.perf_counter(), os.times()
    work()
    after = os.times()
    return time.perf_counter() - wall, after.user + after.system - before.user - before.system


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure both distances in turn and write a line for each."""
    parser = argparse.ArgumentParser(prog="python -m fastreid_uns.projects.CAJ.benchmark", description=__doc__)
    parser.add_argument("--images", type=int, default=32_621, help="N; 32,621 is that of MSMT17")
    parser.add_argument("--dim", type=int, default=2048)
    parser.add_argument("--cameras", type=int, default=15)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--max-distance", type=float, default=0.6, help="pairs farther apart are left out, as with EPS")
    args = parser.parse_args(arguments)

    far = args.max_distance
    forms: dict[str, Callable[[Tensor, Tensor], object]] = {
        "jaccard_distance": lambda feats, cameras: jaccard_distance(feats, max_distance=far),
        "camera_jaccard_distance": lambda feats, cameras: camera_jaccard_distance(feats, cameras, max_distance=far),
    }
    small = make_bank(WARM_UP, args.dim, args.cameras)
    for form in forms.values():
        form(*small)
    bank = make_bank(args.images, args.dim, args.cameras)
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in forms}
    for _ in range(args.runs):
        for name, form in forms.items():
            seconds[name].append(measured(lambda form=form: form(*bank)))
    sys.stdout.write(f"{args.images:,} x {args.dim:,}, {args.cameras} cameras, {torch.get_num_threads()} threads\n")
    for name, runs in seconds.items():
        each = ", ".join(f"{wall:.2f} ({cpu:.2f})" for wall, cpu in runs)
        median = statistics.median(cpu for _, cpu in runs)
        sys.stdout.write(f"{name}: wall seconds (CPU seconds) {each}; median of CPU seconds {median:.2f}\n")


if __name__ == "__main__":
    main()
