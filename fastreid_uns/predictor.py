"""Images → features, for use outside training."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from fastreid_uns.config import CfgNode, parse_config
from fastreid_uns.data.datasets.folder import folder as images_below
from fastreid_uns.data.decode import read_pixels
from fastreid_uns.data.image_set import ImageSet
from fastreid_uns.errors import InvalidState, InvalidValue, MissingFile
from fastreid_uns.evaluation.extract import extract_features
from fastreid_uns.modeling.meta_arch import MetaArch, build_model
from fastreid_uns.published import HUB, fetch_published, is_published, read_published, write_published
from fastreid_uns.published import WEIGHTS as PUBLISHED
from fastreid_uns.structures import Record
from fastreid_uns.utils.checkpoint import last_checkpoint, load_checkpoint, load_model
from fastreid_uns.utils.paths import path_manager
from fastreid_uns.utils.places import expanded


class FeatureExtractor:
    """Features of images, whatever they come as: `FeatureExtractor.from_checkpoint("output/run")(["a.jpg", "b.jpg"])`.

    Args:
        encoder: normalises, and gives a `HeadOutput`; it is moved to `device`.
        size: height and width in pixels that the encoder was trained with.
        device: `auto` (CUDA where there is one), `cpu`, `cuda`, ...
        batch_size: images in one forward pass.
        workers: processes that decode files; 0 decodes in this one.

    Attributes:
        config: YAML text of the run that the encoder comes from, "" if unknown.

    Example:
        >>> from fastreid_uns.config import load_config
        >>> from fastreid_uns.modeling import build_encoder
        >>> encoder = build_encoder(load_config("configs/quickstart.yaml"))  # of random weights
        >>> extractor = FeatureExtractor(encoder, size=(128, 64), device="cpu")
        >>> feats = extractor([np.zeros((90, 50, 3), np.uint8), Image.new("RGB", (30, 60))])
        >>> feats.shape == (2, extractor.dim)
        True
        >>> (feats @ feats.T).allclose(torch.ones(2, 2))  # both images are black
        True
    """

    def __init__(
        self,
        encoder: nn.Module,
        size: Sequence[int],
        *,
        device: torch.device | str = "auto",
        batch_size: int = 64,
        workers: int = 0,
    ) -> None:
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        self.device = torch.device(device)
        self.encoder = encoder.to(self.device).eval()
        self.size = (int(size[0]), int(size[1]))
        self.batch_size = batch_size
        self.workers = workers
        self.config = ""
        self._model = _Extract(self.encoder)

    @classmethod
    def from_checkpoint(
        cls, path: str | Path, *, trust: bool = False, plugins: Sequence[str] = (), **options: Any
    ) -> FeatureExtractor:
        """The encoder of a training run.

        Args:
            path: a checkpoint; the OUTPUT_DIR of a run, of which the newest is taken; or what `from_pretrained` takes.
            trust, plugins: whose code may run, see `load_run`.
            options: keyword arguments of the class.

        Raises:
            FileNotFoundError, ValueError, KeyError: as `load_run`.
        """
        content, cfg, model = _load_run(path, trust, plugins)
        extractor = cls(model.deploy, cfg.INPUT.SIZE, **options)
        extractor.config = content["config"]
        return extractor

    @classmethod
    def from_pretrained(cls, source: str | Path, **options: Any) -> FeatureExtractor:
        """An encoder that `save_pretrained` or `hub.push` has written.

        Args:
            source: a folder, or `hub:user/name` with or without `@revision`; the word `hub:` may be left out where
                there is no such folder.
            options: as for `from_checkpoint`.

        Raises:
            MissingPackage, InvalidState: it cannot be fetched.
            FileNotFoundError, ValueError, KeyError: as `load_run`.
        """
        text = str(source)
        remote = (
            not text.startswith(HUB) and not path_manager.exists(text) and re.fullmatch(r"[\w-][\w.-]*/[\w.@-]+", text)
        )
        return cls.from_checkpoint(f"{HUB}{text}" if remote else text, **options)

    def save_pretrained(self, folder: str | Path, *, source: str = "", overwrite: bool = False) -> None:
        """Write the encoder for others: its weights as safetensors, its config, and a card that says how to use it.

        Args:
            folder: is made if it is not there.
            source: what the card says that it is loaded from; the folder by default.
            overwrite: replace what an earlier call has written.

        Raises:
            RuntimeError: the folder holds other things or cannot be written; or this extractor was not made from a
                run, so that nobody could build its encoder again.
        """
        if not self.config:
            raise InvalidState(
                "save_pretrained: nothing is known about how this encoder was built. Make the extractor with "
                "from_checkpoint."
            )
        weights = self.encoder.state_dict()
        write_published(Path(folder), weights, self.config, dim=self.dim, source=source, overwrite=overwrite)

    @property
    def dim(self) -> int:
        """D."""
        return int(self.encoder.dim)  # type: ignore[arg-type]

    def __call__(self, images: Any) -> Tensor:
        """Features of B images.

        Args:
            images: a path, a folder (all images below it, in order of path), a Pillow image, an array, the bytes of a
                file, or a list of these; arrays are grey, RGB or RGB with alpha (OpenCV reads BGR: pass
                `array[..., ::-1]`), of any size and of the types that `depth.to_eight_bits` accepts. Or one tensor
                (B,3,H,W) of the encoder's size, uint8 or float in 0..1, not normalised.

        Returns:
            (B,D) float32 on the CPU, unit length.

        Raises:
            FileNotFoundError: a file is missing.
            ValueError: an image is not readable or none of the above.
        """
        given = self._image_set(images)
        if len(given) == 0:
            return torch.zeros(0, self.dim)
        found = extract_features(self._model, given, device=self.device, batch_size=self.batch_size, what="features")
        return found["feats"].cpu()

    def _image_set(self, images: Any) -> Any:
        if isinstance(images, Tensor):
            return _Held(self._checked(images))
        if isinstance(images, (str, Path)):
            images = list_images(images)
        elif isinstance(images, (Image.Image, np.ndarray, bytes)):
            images = [images]
        images = list(images)
        if images and all(isinstance(image, (str, Path)) for image in images):
            return ImageSet([Record(str(image), -1, -1) for image in images], self.size, workers=self.workers)
        return _Held([self._pixels(image, i) for i, image in enumerate(images)])

    def _checked(self, images: Tensor) -> Tensor:
        if images.dim() != 4 or tuple(images.shape[1:]) != (3, *self.size):
            raise InvalidValue(
                f"FeatureExtractor: the tensor has shape {tuple(images.shape)}; (B, 3, {self.size[0]}, {self.size[1]}) "
                f"is accepted. Resize it, or pass arrays or Pillow images, which are resized as in training."
            )
        if not images.is_floating_point() and images.dtype != torch.uint8:
            raise InvalidValue(
                f"FeatureExtractor: the tensor is of type {images.dtype}; uint8, or floating point in 0..1, is "
                f"accepted. Convert it, or pass arrays, which are read at any depth."
            )
        if images.is_floating_point() and images.numel() and not (images.min() >= -0.01 and images.max() <= 1.01):
            raise InvalidValue(
                f"FeatureExtractor: pixels run from {images.min():.2f} to {images.max():.2f}; 0 to 1 is accepted. Do "
                f"not normalise them, the encoder does, and divide 0..255 by 255."
            )
        return images

    def _pixels(self, image: Any, position: int) -> Tensor:
        return torch.from_numpy(read_pixels(image, self.size, name=f"FeatureExtractor: image {position}"))


def list_images(path: str | Path) -> list[str]:
    """The image itself, or all images below a folder in order of path.

    Raises:
        FileNotFoundError: there is nothing, or no image below the folder.
    """
    place = expanded(str(path))
    if path_manager.isdir(place):
        return [record.path for record in images_below(root=place).train]
    if not path_manager.isfile(place):
        raise MissingFile(f"{place}: no such image or folder. Check the path.")
    return [place]


def find_checkpoint(path: str | Path) -> str:
    """The file that a path means: itself, the newest checkpoint of an OUTPUT_DIR, the weights of a published encoder.

    Args:
        path: on the disk, or `hub:user/name`, which is fetched.

    Raises:
        FileNotFoundError: there is none.
        MissingPackage, InvalidState: it cannot be fetched.
    """
    if str(path).startswith(HUB):
        return str(fetch_published(str(path)))
    place = expanded(str(path))
    if is_published(place):
        return str(Path(place) / PUBLISHED)
    return str(last_checkpoint(Path(place))) if path_manager.isdir(place) else place


def load_run(path: str | Path, *, trust: bool = False, plugins: Sequence[str] = ()) -> tuple[dict[str, Any], MetaArch]:
    """The content of a checkpoint of ours, and its model on the CPU.

    What the model does not need may be gone since: data sets, hooks and plugins.

    Args:
        path: a checkpoint, or the OUTPUT_DIR of a run, of which the newest is taken. Of a published encoder, a folder
            or `hub:user/name`, the weights of `model.deploy` alone are known.
        trust: import the plugin folders that the checkpoint names. Their code runs, so say so only for files of your
            own; plugins that are installed need no trust.
        plugins: import these folders or modules instead.

    Raises:
        FileNotFoundError: no such checkpoint.
        ValueError: it is damaged, holds code, or is no checkpoint of this framework.
        KeyError: the model has a part that no imported plugin registers.
    """
    content, _, model = _load_run(path, trust, plugins)
    return content, model


def _load_run(path: str | Path, trust: bool, plugins: Sequence[str]) -> tuple[dict[str, Any], CfgNode, MetaArch]:
    file = find_checkpoint(path)
    published = Path(file).suffix == Path(PUBLISHED).suffix
    content = read_published(Path(file)) if published else load_checkpoint(file)
    name, own_weights = Path(file).name, ["MODEL.WEIGHTS="]
    cfg = parse_config(content["config"], name, own_weights, trust=trust, plugins=plugins, model_only=True)
    model = build_model(cfg, content.get("num_images", 1))
    load_model(model.deploy if published else model, content, file)
    return content, cfg, model.eval()


class _Extract(nn.Module):
    """Gives an encoder the form in which features are extracted."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder

    def extract(self, images: Tensor) -> dict[str, Tensor]:
        return {"feats": self.encoder(images).feats}


class _Held:
    """Pixels in memory, in the form of an image set."""

    def __init__(self, pixels: Tensor | Sequence[Tensor]) -> None:
        self.pixels = pixels
        self.paths = [f"image {i}" for i in range(len(pixels))]

    def __len__(self) -> int:
        return len(self.pixels)

    def stream(self, batches: Iterable[Sequence[int]], device: torch.device) -> Iterator[Tensor]:
        for batch in batches:
            yield torch.stack([self.pixels[i] for i in batch]).to(device)
