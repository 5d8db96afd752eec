"""Checkpoints: one file that holds everything the next epoch reads, written whole or not at all."""

from __future__ import annotations

import os
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import nn

from fastreid_uns.errors import InvalidState, InvalidValue, MissingFile
from fastreid_uns.utils.paths import path_manager

LAST = "last"
BEST = "best.pth"

# keys that may differ between a checkpoint and the run that resumes from it
FREE_KEYS = (
    "PLUGINS",
    "OUTPUT_DIR",
    "LOG",
    "CHECKPOINT",
    "TEST",
    "DATASETS.TESTS",
    "DATALOADER.CACHE",
    "DATALOADER.CACHE_DIR",
    "DATALOADER.WORKERS",
    "MODEL.DEVICE",
    "MODEL.WEIGHTS",
    "SOLVER.COMPILE",
    "SOLVER.FIND_UNUSED",
)


def save_checkpoint(content: Mapping[str, Any], file: Path) -> None:
    """Write a checkpoint beside its place and move it there, so that a killed or failed save leaves the old one.

    Args:
        content: tensors and plain Python values, as `torch.load(weights_only=True)` can read them.

    Raises:
        RuntimeError: the disk is full or not writable; nothing half-written stays.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_name(f"{file.name}.part")
    try:
        with part.open("wb") as stream:
            torch.save(dict(content), stream)
            stream.flush()
            os.fsync(stream.fileno())
        part.replace(file)
    except (OSError, RuntimeError) as error:  # torch wraps a failed write into a RuntimeError
        part.unlink(missing_ok=True)
        raise InvalidState(
            f"checkpoint: {file} could not be written ({error}); earlier checkpoints are untouched. Free some space "
            f"or set OUTPUT_DIR to another disk, then run again with --resume."
        ) from error


def load_checkpoint(file: str | Path) -> dict[str, Any]:
    """Read a checkpoint of ours onto the CPU; code in it is refused.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the file holds code or objects, is damaged, or is not a checkpoint of this framework.
    """
    if not path_manager.isfile(str(file)):
        raise MissingFile(f"checkpoint: {file} does not exist. Check the path.")
    try:
        with path_manager.open(str(file), "rb") as stream:
            content = torch.load(stream, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise InvalidValue(
            f"checkpoint: {file} holds more than tensors and plain values and could run code when loaded; it is "
            f"refused ({str(error).splitlines()[0]}). Use a file that this framework or a trusted converter wrote."
        ) from error
    except (RuntimeError, EOFError) as error:
        raise InvalidValue(f"checkpoint: {file} is damaged or cut off ({error}). Take an earlier one.") from error
    if not isinstance(content, dict) or not {"model", "config"} <= content.keys():
        raise InvalidValue(
            f"checkpoint: {file} is not a checkpoint of this framework (it lacks 'model' or 'config'). To start from "
            f"foreign weights set MODEL.WEIGHTS; tools/convert_weights.py converts them."
        )
    return content


def last_checkpoint(folder: Path) -> Path:
    """The newest checkpoint of an output folder.

    Raises:
        FileNotFoundError: there is none.
    """
    pointer = folder / LAST
    if not pointer.is_file():
        raise MissingFile(f"{folder}: no checkpoint was found. Train first, or set OUTPUT_DIR or MODEL.WEIGHTS.")
    return folder / pointer.read_text().strip()


def point_to_last(file: Path) -> None:
    """Note the newest checkpoint of its folder, atomically."""
    part = file.parent / f"{LAST}.part"
    part.write_text(f"{file.name}\n")
    part.replace(file.parent / LAST)


def load_model(model: nn.Module, content: Mapping[str, Any], file: str | Path) -> None:
    """Give a model the weights of a checkpoint; all must fit.

    Raises:
        ValueError: the checkpoint is of another model; the message names the keys that differ.
    """
    try:
        model.load_state_dict(content["model"])
    except RuntimeError as error:
        detail = " ".join(str(error).split())
        raise InvalidValue(
            f"checkpoint: {file} was made with another model: {detail[:400]}. Use the config.yaml beside it."
        ) from error


def refuse_other_config(saved: str, now: str, file: str | Path) -> None:
    """Compare the config of a checkpoint with the present one, apart from keys that do not steer training.

    Args:
        saved, now: YAML texts of complete configs.

    Raises:
        ValueError: a key that matters differs; the message lists them with both values.
    """
    old, new = (_flat(yaml.safe_load(text)) for text in (saved, now))
    free = [*FREE_KEYS, *([] if new.get("SOLVER.SCHEDULE") == "cosine" else ["SOLVER.EPOCHS"])]
    differ = [
        f"{key}: {old.get(key, 'absent')!r} -> {new.get(key, 'absent')!r}"
        for key in sorted(old.keys() | new.keys())
        if old.get(key) != new.get(key)
        and not key.endswith(".ROOT")
        and not any(key == name or key.startswith(f"{name}.") for name in free)
    ]
    if differ:
        raise InvalidValue(
            f"checkpoint: {file} was made with another config; these keys differ: {'; '.join(differ)}. Resume with the "
            f"old values, or start anew in another OUTPUT_DIR with MODEL.WEIGHTS {file}."
        )


def _flat(tree: Mapping[str, Any], where: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            flat.update(_flat(value, f"{where}{key}."))
        else:
            flat[f"{where}{key}"] = value
    return flat
