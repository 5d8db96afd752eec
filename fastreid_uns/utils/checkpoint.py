"""Checkpoints: one file that holds everything the next epoch reads, written whole or not at all."""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import pickle
import shutil
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import nn

from fastreid_uns.errors import InvalidState, InvalidValue, MissingFile, UserError
from fastreid_uns.utils.atomic import replacing
from fastreid_uns.utils.file_kind import foreign_kind
from fastreid_uns.utils.paths import path_manager

logger = logging.getLogger(__name__)

LAST = "last"
BEST = "best.pth"

_SEAL = b"fastreid_uns sha256 "  # before the digest, at the end of a checkpoint
_SEAL_LENGTH = len(_SEAL) + 64
_KINDS: dict[str, Any] = {  # of what a checkpoint may hold
    "model": Mapping,
    "config": str,
    "num_images": int,
    "epochs_done": int,
    "iter": int,
    "optimizer": Mapping,
    "hooks": Mapping,
    "history": list,
    "random": list,
}
_DAMAGED = "Delete it to go on from an earlier one of its folder, or copy it again."


def save_checkpoint(content: Mapping[str, Any], file: Path) -> None:
    """Write a checkpoint with a checksum, whole or not at all: a killed or failed save leaves the old one.

    Args:
        content: tensors and plain Python values, as `torch.load(weights_only=True)` can read them.

    Raises:
        RuntimeError: the disk is full or not writable; nothing half-written stays.
    """
    with _written(file) as stream:
        torch.save(dict(content), stream)
        _seal(stream)


def copy_checkpoint(file: Path, copy: Path) -> None:
    """Write a second one like it, whole or not at all.

    Raises:
        RuntimeError: the disk is full or not writable; nothing half-written stays.
    """
    with _written(copy) as stream, file.open("rb") as source:
        shutil.copyfileobj(source, stream)


@contextlib.contextmanager
def _written(file: Path) -> Iterator[BinaryIO]:
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with replacing(file) as stream:
            yield stream
    except (OSError, RuntimeError) as error:  # torch wraps a failed write into a RuntimeError
        raise InvalidState(
            f"checkpoint: {file} could not be written ({error}); earlier checkpoints are untouched. Free some space "
            f"or set OUTPUT_DIR to another disk, then run again with --resume."
        ) from error


def _seal(stream: BinaryIO) -> None:
    """Put the SHA-256 of a finished zip archive into its comment, whose length the archive states in its last bytes."""
    stream.seek(-2, os.SEEK_END)
    stream.write(_SEAL_LENGTH.to_bytes(2, "little"))
    stream.write(_SEAL + _sha256(stream, stream.tell()))


def _sha256(stream: BinaryIO, length: int) -> bytes:
    """The digest of the first bytes of a stream in hexadecimal; the stream is left behind them."""
    digest = hashlib.sha256()
    stream.seek(0)
    while length > 0:
        block = stream.read(min(length, 1 << 20))
        if not block:
            break
        digest.update(block)
        length -= len(block)
    return digest.hexdigest().encode()


def load_checkpoint(file: str | Path) -> dict[str, Any]:
    """Read a checkpoint of ours onto the CPU; code in it is refused.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the file holds code or objects, is damaged, or is not a checkpoint of this framework.
        RuntimeError: it cannot be read.
    """
    if not path_manager.isfile(str(file)):
        raise MissingFile(f"checkpoint: {file} does not exist. Check the path.")
    try:
        local = Path(path_manager.get_local_path(str(file)))
        kind = foreign_kind(local)
        if kind is not None:
            raise InvalidValue(f"checkpoint: {file} is {kind}")
        with local.open("rb") as stream:
            _refuse_damaged(stream, file)
            stream.seek(0)
            content = torch.load(stream, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise InvalidValue(
            f"checkpoint: {file} holds more than tensors and plain values and could run code when loaded; it is "
            f"refused ({str(error).splitlines()[0]}). Use a file that this framework or a trusted converter wrote."
        ) from error
    except OSError as error:
        raise InvalidState(
            f"checkpoint: {file} cannot be read ({error}). Check its permissions and the disk."
        ) from error
    except (RuntimeError, EOFError, KeyError, IndexError, UnicodeDecodeError) as error:
        if isinstance(error, UserError):
            raise
        raise InvalidValue(f"checkpoint: {file} is damaged or cut off ({error}). {_DAMAGED}") from error
    if not isinstance(content, dict) or not {"model", "config"} <= content.keys():
        raise InvalidValue(
            f"checkpoint: {file} is not a checkpoint of this framework (it lacks 'model' or 'config'). To start from "
            f"foreign weights set MODEL.WEIGHTS; `fastreid-uns convert` converts them."
        )
    wrong = [
        f"{name} is {type(content[name]).__name__}"
        for name, kind in _KINDS.items()
        if name in content and (not isinstance(content[name], kind) or isinstance(content[name], bool))
    ]
    if wrong:
        raise InvalidValue(
            f"checkpoint: {file} is not a checkpoint of this framework ({', '.join(wrong)}). Take one that it wrote."
        )
    return content


def _refuse_damaged(stream: BinaryIO, file: str | Path) -> None:
    """Raise unless the checksum is right: ours, or, in a file without it, those of the zip archive."""
    size = stream.seek(0, os.SEEK_END)
    stream.seek(-min(size, _SEAL_LENGTH), os.SEEK_END)
    seal = stream.read()
    if seal.startswith(_SEAL) and len(seal) == _SEAL_LENGTH:
        why = "" if seal == _SEAL + _sha256(stream, size - _SEAL_LENGTH) else "its checksum is another one"
    else:
        why = _fault_of_archive(stream)
    if why:
        raise InvalidValue(f"checkpoint: {file} is damaged or cut off ({why}). {_DAMAGED}")


def _fault_of_archive(stream: BinaryIO) -> str:
    """What is wrong with a zip archive without our checksum; nothing, for a pickle, which has none at all."""
    stream.seek(0)
    if stream.read(2) != b"PK":
        return ""
    try:
        with zipfile.ZipFile(stream) as archive:
            if archive.comment:
                return "its end is not as it was written"
            bad = archive.testzip()
    except (zipfile.BadZipFile, zlib.error, EOFError, ValueError, NotImplementedError, OSError) as error:
        return str(error)
    return f"the checksum of {bad} is another one" if bad else ""


def last_checkpoint(folder: Path) -> Path:
    """The newest checkpoint of an output folder: the one that is noted, else the one with the highest number.

    Raises:
        FileNotFoundError: there is none.
    """
    pointer = folder / LAST
    noted = pointer.read_bytes().decode("utf-8", "replace").strip() if pointer.is_file() else ""
    if noted and noted == Path(noted).name and (folder / noted).is_file():
        return folder / noted
    found = numbered_checkpoints(folder)
    if not found:
        raise MissingFile(f"{folder}: no checkpoint was found. Train first, or set OUTPUT_DIR or MODEL.WEIGHTS.")
    logger.warning("%s: its file `%s` names no checkpoint; %s is the newest one.", folder, LAST, found[-1].name)
    return found[-1]


def numbered_checkpoints(folder: Path) -> list[Path]:
    """The checkpoints of single epochs, the oldest first."""
    epochs = {file: file.stem.removeprefix("checkpoint_") for file in folder.glob("checkpoint_*.pth")}
    found = [file for file, epoch in epochs.items() if epoch.isdecimal() and file.is_file()]
    return sorted(found, key=lambda file: int(epochs[file]))


def point_to_last(file: Path) -> None:
    """Note the newest checkpoint of its folder, atomically.

    Raises:
        RuntimeError: the disk is full or not writable.
    """
    with _written(file.parent / LAST) as stream:
        stream.write(f"{file.name}\n".encode())


def load_model(model: nn.Module, content: Mapping[str, Any], file: str | Path) -> None:
    """Give a model the weights of a checkpoint; all must fit.

    Raises:
        ValueError: the checkpoint is of another model; the message names the keys that differ.
    """
    try:
        model.load_state_dict(content["model"])
    except (RuntimeError, TypeError, AttributeError) as error:  # the latter two: a name or a value of another type
        detail = " ".join(str(error).split())
        raise InvalidValue(
            f"checkpoint: {file} was made with another model: {detail[:400]}. Use the config.yaml beside it."
        ) from error
