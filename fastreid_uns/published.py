"""An encoder that others can use: a folder with its weights, its config and a card that says how to use it.

    model.safetensors   the tensors of the encoder alone, with their checksum
    config.yaml         what it is built from
    README.md           the card

There is no code in it, nothing of the training images, and no folder of the machine that trained it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from fastreid_uns import __version__
from fastreid_uns.config.yaml_text import parse_yaml, read_text
from fastreid_uns.errors import InvalidState, InvalidValue, MissingFile, MissingPackage
from fastreid_uns.utils.atomic import replacing
from fastreid_uns.utils.checkpoint import LAST, numbered_checkpoints
from fastreid_uns.utils.fingerprint import weights_fingerprint

WEIGHTS, CONFIG, CARD = "model.safetensors", "config.yaml", "README.md"
HUB = "hub:"  # before the name of a repository of the Hugging Face hub
FORMAT = 1
_KEY = "fastreid_uns"  # of our part of the metadata
_CARD = """---
library_name: fastreid_uns
pipeline_tag: image-feature-extraction
tags: [re-identification, unsupervised]
---
# {title}

Features of images for re-identification without labels: the larger the cosine of two of them, the more likely both
images show the same individual.

```python
from fastreid_uns import FeatureExtractor

extractor = FeatureExtractor.from_pretrained("{source}")
feats = extractor(["a.jpg", "b.jpg"])  # (2, {dim}), unit length
print(feats @ feats.T)
```

| | |
|---|---|
| network | {network} |
| trained | {method}, on {data} |
| input | RGB, {height} x {width} pixels (height x width), mean {mean}, standard deviation {std} |
| output | {dim} numbers of unit length |
| version | fastreid_uns {version} |

To be added by whoever publishes it: which images it was trained on, how well it works, where it fails, the licence.
"""


def is_published(path: str | Path) -> bool:
    """Whether a folder holds a published encoder."""
    return all((Path(path) / name).is_file() for name in (WEIGHTS, CONFIG))


def fetch_published(source: str) -> Path:
    """The weights of a repository on this machine, the config beside them; without a network, of an earlier download.

    Args:
        source: `hub:user/name`, or `hub:user/name@revision`.

    Raises:
        MissingPackage: huggingface_hub is not installed.
        InvalidState: there is no such repository, or it cannot be reached.
        MissingFile: it holds something else.
    """
    name, _, revision = source.removeprefix(HUB).partition("@")
    try:
        from huggingface_hub import snapshot_download
    except ImportError as error:
        raise MissingPackage(f"{source}: needs huggingface_hub. Run pip install 'fastreid_uns[hub]'.") from error
    try:
        folder = snapshot_download(name, revision=revision or None, allow_patterns=[WEIGHTS, CONFIG])
    except hub_failures() as error:
        raise InvalidState(
            f"{source}: it could not be fetched ({_first_line(error)}). Check the name as hub:user/name, the network, "
            f"for a private one `hf auth login`, or the path if a folder was meant."
        ) from error
    if not is_published(folder):
        raise MissingFile(
            f"{source}: there is no {WEIGHTS} with a {CONFIG}, so no encoder of this framework. For weights of other "
            f"networks set MODEL.WEIGHTS or MODEL.BACKBONE.MODEL and train."
        )
    return Path(folder) / WEIGHTS


def hub_failures() -> tuple[type[BaseException], ...]:
    """What calls of huggingface_hub raise for a wrong name, a missing right or a missing network."""
    from huggingface_hub.errors import HfHubHTTPError

    return OSError, ValueError, HfHubHTTPError.__mro__[1]  # the last: all errors of the HTTP library that it uses


def read_published(file: Path) -> dict[str, Any]:
    """Weights and config of a published encoder, on the CPU.

    Args:
        file: its `model.safetensors`.

    Returns:
        `model`: tensors of the encoder by name; `config`: YAML; `num_images`: 1, since none of its tensors depends on
        their number.

    Raises:
        MissingFile: the weights, or the config beside them, are missing.
        InvalidValue: they are damaged, or of something else.
    """
    for needed in (file, file.with_name(CONFIG)):
        if not needed.is_file():
            raise MissingFile(
                f"{needed}: there is no such file; an encoder has {WEIGHTS} and {CONFIG}. Fetch it again."
            )
    try:
        with safe_open(file, framework="pt") as content:
            told = (content.metadata() or {}).get(_KEY)
            tensors = {name: content.get_tensor(name) for name in content.keys()} if told else {}  # noqa: SIM118
        about = json.loads(told) if told else {}
    except (SafetensorError, OSError, ValueError) as error:
        raise InvalidValue(f"{file}: the file is damaged or cut off ({error}). Fetch it again.") from error
    if not isinstance(about, dict) or about.get("format") != FORMAT:
        raise InvalidValue(
            f"{file}: no encoder that this version ({__version__}) of the framework reads. If another one wrote it, "
            f"install that; to start from foreign weights set MODEL.WEIGHTS."
        )
    if about.get("sha256") != weights_fingerprint(tensors):
        raise InvalidValue(f"{file}: its tensors are not those that were written. Fetch it again.")
    return {"model": tensors, "config": read_text(file.with_name(CONFIG)), "num_images": 1}


def write_published(
    folder: Path, weights: Mapping[str, Tensor], config: str, *, dim: int, source: str = "", overwrite: bool = False
) -> None:
    """Write an encoder that `read_published` reads.

    Args:
        folder: is made if it is not there.
        weights: of the encoder.
        config: YAML of its run; folders of this machine are left out of what is written.
        dim: numbers of a feature.
        source: what the card says that it is loaded from, the folder by default.
        overwrite: replace another one.

    Raises:
        InvalidState: the folder holds a run or, without `overwrite`, an encoder or a card; or it cannot be written.
    """
    _refuse_others(folder, overwrite)
    tensors = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in weights.items()}
    about = {"format": FORMAT, "sha256": weights_fingerprint(tensors), "version": __version__}
    published = _without_places(parse_yaml(config, CONFIG))
    card = _card(published, dim, source or str(folder))
    files = {
        CONFIG: yaml.safe_dump(published, sort_keys=False).encode(),
        CARD: card.encode(),
        WEIGHTS: save(tensors, metadata={"format": "pt", _KEY: json.dumps(about)}),  # last: with it, it is published
    }
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, content in files.items():
            with replacing(folder / name) as stream:
                stream.write(content)
    except OSError as error:
        raise InvalidState(
            f"{folder}: it cannot be written ({error.strerror or error}). Free some space or choose another folder."
        ) from error


def _refuse_others(folder: Path, overwrite: bool) -> None:
    if folder.is_dir() and ((folder / LAST).exists() or numbered_checkpoints(folder)):
        raise InvalidState(f"{folder}: holds a run, whose files are not mixed with others. Choose another folder.")
    held = [name for name in (WEIGHTS, CONFIG, CARD) if (folder / name).exists()]
    if held and not overwrite:
        raise InvalidState(
            f"{folder}: {', '.join(held)} exists already. Choose another folder, or pass overwrite=True."
        )


def _without_places(tree: Any) -> Any:
    """A config without what only its own machine has: starting weights, and the folders in which files are."""
    plugins = [f"./{Path(entry).name}" if "/" in entry else entry for entry in tree.get("PLUGINS") or []]
    tree = {**_relative(tree), "PLUGINS": plugins}
    tree["MODEL"] = {**tree["MODEL"], "WEIGHTS": ""}
    return tree


def _relative(value: Any) -> Any:
    """Absolute paths in a tree cut to their last name."""
    if isinstance(value, dict):
        return {key: _relative(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_relative(inner) for inner in value]
    if isinstance(value, str) and re.match(r"[/~\\]|[A-Za-z]:[/\\]|file:", value):
        return re.split(r"[/\\]", value.rstrip("/\\"))[-1]
    return value


def _card(config: Mapping[str, Any], dim: int, source: str) -> str:
    model, given = config["MODEL"], config["INPUT"]
    backbone, train = model["BACKBONE"], config.get("DATASETS", {}).get("TRAIN", {})
    network = " ".join(str(part) for part in (backbone["NAME"], backbone.get("MODEL", "")) if part)
    height, width = given["SIZE"]
    return _CARD.format(
        title=source.removeprefix(HUB).rstrip("/").rpartition("/")[2],
        source=source,
        dim=dim,
        network=f"{network}, {model['HEAD']['NAME']}",
        method=model["NAME"],
        data=train.get("NAME") or "images that its config does not name",
        height=height,
        width=width,
        mean=given["MEAN"],
        std=given["STD"],
        version=__version__,
    )


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
