"""Images a second of the loaders: JPEG of 128x64 to batches of 256x128, mirrored, padded and cropped, erased.

Forms: `pil`, torchvision's transforms on Pillow images in a DataLoader, as in the papers' code; `loader`, the package's
loader without a cache, with as many workers; `host`, `disk` and `device`, those with one.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import measuring

SIZE, BATCH, WORKERS = (256, 128), 256, 2


def cases(size: str) -> list[measuring.Case]:
    images, batches = (512, 2) if size == "small" else (8192, 32)
    forms = [("pil", "cpu"), ("loader", "cpu"), ("host", "cpu"), ("disk", "cpu")]
    forms += [("pil", "cuda"), ("loader", "cuda"), ("host", "cuda"), ("device", "cuda")]
    return [{"form": form, "device": device, "images": images, "batches": batches} for form, device in forms]


def pictures(count: int) -> list[str]:
    """Paths of JPEG files with smooth colours and some noise, about 3 KB each, as crops of persons are; made once."""
    import numpy as np
    from PIL import Image

    folder = measuring.FOLDER / "jpeg"
    folder.mkdir(parents=True, exist_ok=True)
    files = [folder / f"{number:05d}.jpg" for number in range(count)]
    for number, file in enumerate(files):
        if not file.is_file():
            generator = np.random.default_rng(number)
            small = Image.fromarray(generator.integers(0, 256, (16, 8, 3), dtype=np.uint8))
            smooth = np.asarray(small.resize((64, 128), Image.Resampling.BICUBIC))
            noisy = smooth + generator.normal(0, 6, smooth.shape)
            Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(file, quality=90)
    return [str(file) for file in files]


def pil_batches(paths: list[str], device: str, length: int) -> Iterator[Any]:
    """The pipeline of the papers' code, up to float batches on the device."""
    from PIL import Image
    from torch.utils.data import DataLoader, Dataset, RandomSampler
    from torchvision import transforms

    change = transforms.Compose(
        [
            transforms.Resize(SIZE, interpolation=transforms.InterpolationMode.BICUBIC),
            transforms.RandomHorizontalFlip(),
            transforms.Pad(10),
            transforms.RandomCrop(SIZE),
            transforms.ToTensor(),
            transforms.RandomErasing(0.5, scale=(0.02, 0.4), ratio=(0.3, 3.33), value=0.45),
        ]
    )

    class Pictures(Dataset):
        def __len__(self) -> int:
            return len(paths)

        def __getitem__(self, index: int):
            return change(Image.open(paths[index]).convert("RGB")), index

    pictures = Pictures()
    sampler = RandomSampler(pictures, replacement=True, num_samples=length * BATCH)
    loader = DataLoader(pictures, BATCH, sampler=sampler, num_workers=WORKERS, pin_memory=device == "cuda")
    for images, _ in loader:
        yield images.to(device, non_blocking=True)


def our_batches(paths: list[str], form: str, device: str, length: int) -> Iterator[Any]:
    """The package's loader."""
    import torch

    from fastreid_uns.data.augment import Augment
    from fastreid_uns.data.image_set import ImageSet
    from fastreid_uns.data.loader import TrainLoader
    from fastreid_uns.data.pixel_cache import CachedImageSet
    from fastreid_uns.data.samplers import RandomSampler
    from fastreid_uns.data.train_set import TrainSet
    from fastreid_uns.structures import PseudoLabels, Record

    images = ImageSet([Record(path, -1, -1) for path in paths], SIZE, workers=WORKERS)
    if form != "loader":
        images = CachedImageSet(images, where=form, device=device, folder=measuring.FOLDER / "cache")
        images.check()
    train_set = TrainSet(images)
    train_set.pseudo = PseudoLabels(torch.zeros(len(images), dtype=torch.int64), torch.zeros(1, 1))
    sampler = RandomSampler(length, 0, 0, 1, batch_size=BATCH)
    loader = TrainLoader(train_set, sampler, [Augment()], seed=0, device=device)
    loader.plan(0)
    return (batch.views[0] for batch in loader.epoch(0))


def measure(form: str, device: str, images: int, batches: int) -> dict[str, Any]:
    """Images a second, and seconds until the first batch (which start the workers, or fill the cache)."""
    import torch

    from fastreid_uns.utils.allocator import raise_malloc_thresholds

    if device == "cpu" and form != "pil":
        raise_malloc_thresholds()  # as training on a CPU does
    paths = pictures(images)
    warm = 4 if batches > 4 else 1
    start = time.perf_counter()
    length = batches + warm
    stream = pil_batches(paths, device, length) if form == "pil" else our_batches(paths, form, device, length)
    first = next(stream)
    before = time.perf_counter() - start
    for _ in range(warm - 1):
        next(stream)
    _wait(device)
    result: dict[str, Any] = {"seconds_to_first": before}
    with measuring.measured(result):
        for _ in range(batches):
            batch = next(stream)
        _wait(device)
    if batch.shape != first.shape or batch.dtype != torch.float32:
        raise RuntimeError(f"feeding: {form} gave {batch.dtype} {tuple(batch.shape)}.")
    return {**result, "images_per_second": batches * BATCH / result["seconds"]}


def _wait(device: str) -> None:
    import torch

    if device == "cuda":
        torch.cuda.synchronize()


if __name__ == "__main__":
    measuring.main(__doc__, __file__, cases, measure)
