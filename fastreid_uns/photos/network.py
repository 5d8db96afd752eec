"""The network of a run: how it starts, how it is kept in an index and as a checkpoint, and how it comes back."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import yaml

from fastreid_uns.config import CfgNode, load_config, parse_config
from fastreid_uns.errors import InvalidValue, MissingFile
from fastreid_uns.modeling.encoder import Encoder
from fastreid_uns.modeling.meta_arch import MetaArch, build_model, warn_of_other_input
from fastreid_uns.modeling.weights import load_weights
from fastreid_uns.photos.index import Index, Preprocessing, weights_fingerprint
from fastreid_uns.predictor import find_checkpoint, load_run
from fastreid_uns.utils.checkpoint import load_checkpoint, numbered_checkpoints, point_to_last, save_checkpoint
from fastreid_uns.utils.paths import path_manager

MODEL = "tf_efficientnet_lite0"  # in timm; a package carries its weights
DIM = 256  # of the features
GRID = 2  # cells of the feature map in each direction, which tell where something is
_SUFFIXES = (".pth", ".pt", ".bin", ".ckpt", ".safetensors")  # of files of weights; names of networks have none of them
_FIXED = (  # what a config of grouped photos has in common
    "MODEL.HEAD.NAME=PooledHead",
    f"MODEL.HEAD.GRID={GRID}",
    f"MODEL.HEAD.DIM={DIM}",
    "MODEL.FREEZE_NORM=true",
    "MODEL.MEMORY.NAME=",
    "MODEL.LOSSES.contrast=null",
    "INPUT.ON_BAD_IMAGE=skip",
)


class Origin(NamedTuple):
    """Where the weights of a network come from."""

    name: str
    sha256: str  # of the tensors of the backbone


@dataclass(frozen=True)
class Network:
    """A model with the text of its config.

    Attributes:
        model: on the CPU; its `deploy` makes the features.
        config: YAML.
        num_images: that the model was built for.
    """

    model: MetaArch
    config: str
    num_images: int

    @property
    def encoder(self) -> Encoder:
        return self.model.deploy

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of the images in pixels."""
        height, width = yaml.safe_load(self.config)["INPUT"]["SIZE"]
        return height, width

    def save(self, folder: Path, number: int) -> None:
        """Write it as the only checkpoint of a folder, with its config beside it.

        Raises:
            InvalidState: the disk does not allow it.
        """
        file = folder / f"checkpoint_{number:04d}.pth"
        content = {"model": self.model.state_dict(), "config": self.config, "num_images": self.num_images}
        save_checkpoint(content, file)
        point_to_last(file)
        for old in numbered_checkpoints(folder):
            if old != file:
                old.unlink()

    def about(self) -> dict[str, Any]:
        """What an index must keep beside the weights."""
        return {"config": self.config, "num_images": self.num_images}

    def preprocessing(self) -> Preprocessing:
        """How an image becomes an input."""
        mean, std = (tuple(getattr(self.encoder, name).flatten().tolist()) for name in ("mean", "std"))
        return Preprocessing(self.size, mean, std)

    @classmethod
    def of_run(cls, path: str | Path, plugins: Sequence[str] = ()) -> Network:
        """The network of a checkpoint, or of the newest one of an OUTPUT_DIR; raises as `predictor.load_run`."""
        content, model = load_run(path, plugins=plugins)
        return cls(model, content["config"], content["num_images"])

    @classmethod
    def of_index(cls, index: Index, plugins: Sequence[str] = ()) -> Network:
        """The network that an index carries in itself.

        Raises:
            InvalidValue: it carries none.
            UnknownName: the model has a part that no imported plugin registers.
        """
        text = index.about.get("config")
        if not text or not index.weights:
            raise InvalidValue("index: it holds no network, so nothing can be compared with it. Build it again.")
        number = int(index.about["num_images"])
        cfg = parse_config(text, "index", ["MODEL.WEIGHTS="], plugins=plugins, model_only=True)
        model = build_model(cfg, number)
        model.deploy.load_state_dict(index.weights)
        return cls(model.eval(), text, number)


def start(cfg: CfgNode, num_images: int) -> tuple[Network, Origin]:
    """The network of a config with its starting weights; see `describe`.

    Raises:
        MissingPackage, MissingFile, InvalidState: as `load_weights`.
    """
    warn_of_other_input(cfg)
    plain = cfg.clone()
    plain.defrost()
    plain.MODEL.WEIGHTS = ""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # what the weights do not cover is equal in every run
        model = build_model(plain, num_images).eval()
    name = "random numbers"
    if cfg.MODEL.WEIGHTS:
        name = load_weights(model.encoder, cfg.MODEL.WEIGHTS, head=cfg.MODEL.WEIGHTS_HEAD).source
    origin = Origin(name, weights_fingerprint(model.encoder.backbone.state_dict()))
    return Network(model, cfg.dump(), num_images), origin


def describe(
    photos: Path, output: Path, size: tuple[int, int], weights: str, config_file: str | None = None
) -> CfgNode:
    """The complete config of a run on a folder of photos.

    Args:
        size: height and width of the input in pixels.
        weights: `imagenet` for the usual network; the name of a network of timm or `hf-hub:user/name`, with what is
            published for it; a checkpoint of this package, a folder that has one, or another file of weights.
        config_file: a YAML file that says what network it is; head and norm layers are those of this road.

    Raises:
        UnknownName, InvalidValue, MissingFile: no such network, size, or file.
    """
    common = [*_FIXED, f"INPUT.SIZE=[{size[0]}, {size[1]}]", f"OUTPUT_DIR={output}"]
    common += ["DATASETS.TRAIN.NAME=folder", f"DATASETS.TRAIN.ROOT={photos}"]
    if config_file is not None:
        return load_config(config_file, [*([] if weights == "imagenet" else [f"MODEL.WEIGHTS={weights}"]), *common])
    if weights != "imagenet" and path_manager.exists(weights):
        return _of_file(find_checkpoint(weights), common)
    if weights.startswith((".", os.sep)) or Path(weights).suffix in _SUFFIXES:
        raise MissingFile(f"weights: there is no file {weights}. Check the path, or name a network of timm.")
    backbone = f"MODEL.BACKBONE={{NAME: timm, MODEL: {json.dumps(MODEL if weights == 'imagenet' else weights)}}}"
    return load_config(None, [backbone, "MODEL.WEIGHTS=imagenet", *common])


def _of_file(file: str, common: Sequence[str]) -> CfgNode:
    """The config around a file of weights: its backbone is the one that it names, if it is a checkpoint of ours."""
    try:
        text = load_checkpoint(file)["config"]
    except InvalidValue:
        backbone = f"MODEL.BACKBONE={{NAME: timm, MODEL: {MODEL}}}"
        return load_config(None, [backbone, f"MODEL.WEIGHTS={file}", *common])
    return parse_config(text, Path(file).name, [f"MODEL.WEIGHTS={file}", *common], model_only=True)
