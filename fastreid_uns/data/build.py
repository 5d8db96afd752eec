"""From a config to the data of a run: image sets, the table of training images, loaders."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch

from fastreid_uns.data.camera_style import KINDS, CameraStyle, ColourStyle, GeneratedStyle, generated_images
from fastreid_uns.data.image_check import readable
from fastreid_uns.data.image_set import ImageSet
from fastreid_uns.data.loader import TrainLoader
from fastreid_uns.data.pixel_cache import CachedImageSet
from fastreid_uns.data.samplers import JointSampler, Sampler
from fastreid_uns.data.train_set import TrainSet
from fastreid_uns.errors import InvalidValue, UnknownName
from fastreid_uns.registry import AUGMENT_REGISTRY, DATASET_REGISTRY, SAMPLER_REGISTRY
from fastreid_uns.structures import Record, ReIDData
from fastreid_uns.utils.comm import rank, world
from fastreid_uns.utils.memory import total_memory

logger = logging.getLogger(__name__)

_MOST_REPEATED = 1_024  # images of a batch that may be larger than its set


def build_train_set(cfg: Any, device: torch.device) -> TrainSet:
    """Read the training sets, unlabelled images first; only source sets bring their identities, as classes.

    Every image is read before anything else happens: into the cache, or with `DATALOADER.CACHE none` for its own sake,
    so that unreadable ones are found; what then happens to them, `INPUT.ON_BAD_IMAGE` says.

    Args:
        cfg: a complete config.
        device: of `DATALOADER.CACHE device`.

    Raises:
        ValueError: no training set is named, it has fewer than two images, or a source image has no identity.
    """
    lists = {"DATASETS.TRAIN": _target(cfg)}
    for name, section in cfg.DATASETS.SOURCES.items():
        lists[f"DATASETS.SOURCES.{name}"] = _source(section, f"DATASETS.SOURCES.{name}")
    images = build_images(cfg, [record for records in lists.values() for record in records], device, "DATASETS.TRAIN")
    errors = images.check()
    kept: list[int] = []
    domains: list[int] = []
    start = 0
    for domain, (what, records) in enumerate(lists.items()):
        own = {i - start: error for i, error in errors.items() if start <= i < start + len(records)}
        rows = readable(records, own, on_bad=cfg.INPUT.ON_BAD_IMAGE, what=what)
        kept += [start + row for row in rows]
        domains += [domain] * len(rows)
        start += len(records)
    if len(kept) < start:
        images.keep(kept)
    count = domains.count(0)
    if count < 2:
        raise InvalidValue(
            f"DATASETS.TRAIN: {cfg.DATASETS.TRAIN.NAME} has {count} training image(s); clustering needs at least two. "
            f"Check its ROOT."
        )
    logger.info("%s training images, %s of labelled sources", f"{count:,}", f"{len(domains) - count:,}")
    classes = _classes(images.records, domains)
    return TrainSet(images, domains=torch.tensor(domains), classes=torch.tensor(classes))


def build_train_loader(cfg: Any, train_set: TrainSet, device: torch.device) -> TrainLoader:
    """Sampler, augmentation and camera style of training.

    Raises:
        KeyError: `INPUT.VIEWS` names no preset.
        ValueError, FileNotFoundError: see `Sampler`, `check_step`, `Augment` and `build_camera_style`.
    """
    sampler = _sampler(cfg, train_set)
    check_step(cfg, "DATALOADER.SAMPLER.BATCH_SIZE", sampler.batch_size // world(), device, views=len(cfg.INPUT.VIEWS))
    augments = {
        name: AUGMENT_REGISTRY.build(preset, mean=cfg.INPUT.MEAN, std=cfg.INPUT.STD)
        for name, preset in cfg.INPUT.AUGMENTS.items()
    }
    for view in cfg.INPUT.VIEWS:
        if view not in augments:
            raise UnknownName(f"INPUT.VIEWS: {view!r} is no preset of INPUT.AUGMENTS; known: {', '.join(augments)}.")
    views = [augments[view] for view in cfg.INPUT.VIEWS]
    style = build_camera_style(cfg, train_set, device)
    return TrainLoader(train_set, sampler, views, seed=cfg.SEED, device=device, style=style)


def build_camera_style(cfg: Any, train_set: TrainSet, device: torch.device) -> CameraStyle | None:
    """What shows images as other cameras would; None if no view has `CAMERA_STYLE`.

    Raises:
        ValueError: unknown `INPUT.CAMERA_STYLE.KIND`, or fewer than two cameras.
        FileNotFoundError: generated pictures are missing.
    """
    if not any(cfg.INPUT.AUGMENTS[view].get("CAMERA_STYLE") for view in cfg.INPUT.VIEWS):
        return None
    kind, what = cfg.INPUT.CAMERA_STYLE.KIND, "INPUT.CAMERA_STYLE.FOLDER"
    if kind == "colors":
        return ColourStyle(train_set, device=device)
    if kind != "images":
        raise InvalidValue(f"INPUT.CAMERA_STYLE.KIND: {kind!r} is unknown; accepted: {', '.join(KINDS)}.")
    records, origins = generated_images(train_set.records[: train_set.num_images], cfg.INPUT.CAMERA_STYLE.FOLDER)
    pictures = build_images(cfg, records, device, what)
    rows = readable(records, pictures.check(), on_bad=cfg.INPUT.ON_BAD_IMAGE, what=what)
    if len(rows) < len(records):
        pictures.keep(rows)
    return GeneratedStyle(train_set, pictures, origins[rows])


def build_test_loader(cfg: Any, name: str, device: torch.device) -> tuple[ReIDData, ImageSet]:
    """A set to evaluate on, one of `DATASETS.TESTS`, and its images: query, then gallery.

    A run that evaluates once takes no memory for the images: to fill a cache costs more than it saves.

    Raises:
        ValueError: it has no query or no gallery images; see also `check_step`.
    """
    section, what = cfg.DATASETS.TESTS[name], f"DATASETS.TESTS.{name}"
    data: ReIDData = DATASET_REGISTRY.build(section)
    if not data.query or not data.gallery:
        raise InvalidValue(
            f"{what}: {section.NAME} has {len(data.query)} query and {len(data.gallery)} gallery images; evaluation "
            f"needs both. Drop it with `{what} null`, or add a split."
        )
    images = min(cfg.TEST.BATCH_SIZE, len(data.query) + len(data.gallery))
    check_step(cfg, "TEST.BATCH_SIZE", images, device)
    once = not 0 < cfg.TEST.PERIOD < cfg.SOLVER.EPOCHS
    return data, build_images(cfg, [*data.query, *data.gallery], device, what, once=once)


def check_step(cfg: Any, key: str, images: int, device: torch.device, *, views: int = 1) -> None:
    """Refuse a step whose images alone fill the memory of the device; a network holds many times their numbers.

    Args:
        cfg: a complete config.
        key: gives the number of images.
        images: of one step of this process.
        views: versions of each image.

    Raises:
        ValueError: their numbers take more than a quarter of the memory.
    """
    height, width = cfg.INPUT.SIZE
    needed, memory = images * views * 3 * height * width * 4, total_memory(device)
    if needed > memory / 4:
        raise InvalidValue(
            f"{key}: {images:,} images of {height} x {width} pixels{f', {views} views of each,' if views > 1 else ''} "
            f"take {needed / 2**30:,.1f} GiB in a step; {device} has {memory / 2**30:,.1f} GiB, of which a quarter is "
            f"accepted for them. Lower {key} or INPUT.SIZE."
        )


def domains_of_tests(cfg: Any) -> dict[str, int]:
    """The domain of each of `DATASETS.TESTS`: 0 = the unlabelled target, 1.. = the labelled sources in their order.

    Raises:
        ValueError: `TEST.DOMAINS` names no test set or no source, or the model has no norm layers for each domain.
    """
    sources = list(cfg.DATASETS.SOURCES)
    for name, source in cfg.TEST.DOMAINS.items():
        if not cfg.MODEL.DOMAIN_BN or name not in cfg.DATASETS.TESTS or source not in sources:
            raise InvalidValue(
                f"TEST.DOMAINS: {name}: {source}; one of DATASETS.TESTS ({', '.join(cfg.DATASETS.TESTS)}) and one of "
                f"DATASETS.SOURCES ({', '.join(sources) or 'none'}) are accepted, with MODEL.DOMAIN_BN true (it is "
                f"{str(cfg.MODEL.DOMAIN_BN).lower()}). Correct it, or drop the entry."
            )
    named = {name: 1 + sources.index(source) for name, source in cfg.TEST.DOMAINS.items()}
    return {name: named.get(name, 0) for name in cfg.DATASETS.TESTS}


def build_images(cfg: Any, records: list[Record], device: torch.device, what: str, *, once: bool = False) -> ImageSet:
    """An image set that decodes in each pass (`DATALOADER.CACHE none`) or that holds its pixels.

    Args:
        cfg: a complete config.
        records: one for each image.
        device: of `DATALOADER.CACHE device`.
        what: the images are to the run, such as `DATASETS.TRAIN`.
        once: they are needed once in this run, so that only a file, which later runs use again, is worth filling.

    Raises:
        ValueError: unknown `DATALOADER.CACHE`.
    """
    images = ImageSet(records, tuple(cfg.INPUT.SIZE), workers=cfg.DATALOADER.WORKERS)
    if cfg.DATALOADER.CACHE == "none" or (once and cfg.DATALOADER.CACHE != "disk"):
        return images
    folder = cfg.DATALOADER.CACHE_DIR or Path(cfg.OUTPUT_DIR) / "cache"
    return CachedImageSet(images, where=cfg.DATALOADER.CACHE, device=device, folder=folder, what=what)


def _target(cfg: Any) -> list[Record]:
    if not cfg.DATASETS.TRAIN.NAME:
        raise InvalidValue("DATASETS.TRAIN has no NAME; name a data set, such as {NAME: folder, ROOT: my/images}.")
    records: list[Record] = DATASET_REGISTRY.build(cfg.DATASETS.TRAIN).train
    return records


def _source(section: Any, what: str) -> list[Record]:
    records: list[Record] = DATASET_REGISTRY.build(section).train
    if any(record.identity < 0 for record in records):
        raise InvalidValue(f"{what} has images without identity; a source set must be labelled throughout.")
    return records


def _classes(records: list[Record], domains: list[int]) -> list[int]:
    """The class of each source image, set by set and within a set by identity; -1 for unlabelled images."""
    pairs = [(domain, record.identity) for domain, record in zip(domains, records, strict=True)]
    number = {pair: i for i, pair in enumerate(sorted({pair for pair in pairs if pair[0] > 0}))}
    return [number.get(pair, -1) for pair in pairs]


def _sampler(cfg: Any, train_set: TrainSet) -> Sampler:
    sampler = _sampler_of(cfg, "SAMPLER", rank(), world())
    if sampler.batch_size > max(_MOST_REPEATED, len(train_set)):
        raise InvalidValue(
            f"DATALOADER.SAMPLER.BATCH_SIZE is {sampler.batch_size:,} for {len(train_set):,} training images; a batch "
            f"of more than {_MOST_REPEATED:,} must not hold images twice. Lower it."
        )
    if train_set.source_classes is None:
        _sampler_of(cfg, "SOURCE_SAMPLER", 0, 1)  # not used, but its keys are held to what they accept
        return sampler
    sources = [_sampler_of(cfg, "SOURCE_SAMPLER", rank(), world()) for _ in cfg.DATASETS.SOURCES]
    return JointSampler(sampler, sources, train_set)


def _sampler_of(cfg: Any, key: str, rank: int, world: int) -> Sampler:
    """The sampler of a section of `DATALOADER`."""
    try:
        sampler: Sampler = SAMPLER_REGISTRY.build(
            cfg.DATALOADER[key], cfg.SOLVER.ITERS_PER_EPOCH, cfg.SEED, rank, world
        )
    except InvalidValue as error:
        raise InvalidValue(str(error).replace("DATALOADER.SAMPLER", f"DATALOADER.{key}")) from error
    return sampler
