"""One reader for the weights of other projects, recognised by their names."""

from __future__ import annotations

import argparse
import logging
import pickle
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from tabulate import tabulate
from torch import Tensor, nn

from fastreid_uns.errors import InvalidState, MissingFile
from fastreid_uns.utils.paths import path_manager

_CONTAINERS = ("model", "state_dict", "teacher", "student", "net")
_CLASSIFIERS = ("fc", "classifier", "head", "heads")
_COUNTER = "num_batches_tracked"  # absent from old files, and without effect on the features
_log = logging.getLogger(__name__)


@dataclass
class WeightReport:
    """What became of each tensor; names are those of the model, except in `unexpected`."""

    source: str
    family: str
    matched: list[str] = field(default_factory=list)  # loaded, those of `reshaped` among them
    missing: list[str] = field(default_factory=list)  # of the model, not in the file
    unexpected: list[str] = field(default_factory=list)  # of the file, not in the model; classifiers left out
    reshaped: list[str] = field(default_factory=list)  # position embeddings resized to the image size
    mismatched: list[str] = field(default_factory=list)  # same name, other shape; not loaded

    @property
    def share(self) -> float:
        """Loaded tensors of the backbone, in 0..1."""
        loaded = sum(_is_backbone(name) for name in self.matched)
        absent = sum(_is_backbone(name.split()[0]) for name in (*self.missing, *self.mismatched))
        return loaded / max(loaded + absent, 1)

    def __str__(self) -> str:
        names = ("matched", "missing", "unexpected", "reshaped", "mismatched")
        rows = [(name, len(getattr(self, name)), _some(getattr(self, name))) for name in names]
        title = f"{self.source} ({self.family}): {self.share:.1%} of the backbone"
        return f"{title}\n{tabulate(rows, headers=('tensors', 'count', 'names'))}"


def load_weights(model: nn.Module, source: str, *, min_share: float = 0.9) -> WeightReport:
    """Load weights of our own or of another project into a model, in place, and say what became of each tensor.

    Known by their names: torchvision, timm, IBN-Net and Torchreid (plain), MoCo (LUPerson), DINO (TransReID-SSL, PASS),
    fast-reid, the SpCL and Cluster Contrast family, Bag of Tricks and TransReID, and our own checkpoints, of which the
    encoder for evaluation is taken. Position embeddings are resized; classifiers are ignored. Files are read as tensors
    and plain values only: code in them is refused. Load before `domain_batch_norm`.

    Args:
        model: an `Encoder`, or any other module, which is then taken for a backbone.
        source: file or URL (`.safetensors`, else a torch file), `hub:user/name`, or `imagenet` for the weights that
            the backbone's library publishes.
        min_share: share of the backbone's tensors that must be loaded, in 0..1.

    Raises:
        FileNotFoundError: no such file.
        RuntimeError: the download fails, the file is refused or broken, or less than `min_share` is in it; the model
            is then unchanged.
    """
    whole = hasattr(model, "backbone")
    backbone: Any = model.backbone if whole else model
    if source == "imagenet":
        source = backbone.imagenet_url()
    found, family = _canonical(_unwrap(_read_file(_fetch(source)), source))
    targets = {_canonical_name(name if whole else f"backbone.{name}"): name for name in model.state_dict()}
    if not any(".domains." in name for name in targets):
        found = {name.replace(".domains.0.", "."): value for name, value in found.items()}
    report, chosen = _match(model.state_dict(), targets, found, getattr(backbone, "grid", None))
    report.source, report.family = source, family
    if report.share < min_share:
        raise InvalidState(
            f"MODEL.WEIGHTS {source}: {report.share:.1%} of the backbone's tensors are in the file; at least "
            f"{min_share:.0%} are needed. Set MODEL.BACKBONE to the network that the weights were made for, or "
            f"MODEL.WEIGHTS to weights of {type(backbone).__name__}.\n{report}"
        )
    model.load_state_dict(chosen, strict=False)
    _log.info("%s", report)
    return report


def _read_file(path: Path) -> Any:
    """The content of a weight file on the CPU: tensors, plain Python values, NumPy numbers; no code is run.

    Raises:
        RuntimeError: the file holds other objects, or is broken.
    """
    if path.suffix == ".safetensors":
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            return load_file(path)
        except SafetensorError as error:
            raise InvalidState(f"{path}: no readable safetensors file ({error}). Download it again.") from error
    with path.open("rb") as file:
        start = file.read(4)
    try:
        if start[:1] != b"\x80" and start != b"PK\x03\x04":  # a pickle, a zip; anything else would be run as a pickle
            raise EOFError
        with torch.serialization.safe_globals(_harmless()):
            return torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        culprit = re.search(r"GLOBAL (\S+)", str(error))
        if culprit is None:
            raise InvalidState(f"{path}: no readable torch file, perhaps cut short. Download it again.") from error
        raise InvalidState(
            f"{path}: refused, because it holds {culprit[1]} and reading that could run code; tensors, plain values "
            f"and NumPy numbers are accepted. If you trust the file, open it where it was made and save only its "
            f"state dict with torch.save."
        ) from error


def _harmless() -> list[Any]:
    """What checkpoints of others hold beside tensors and cannot do harm: NumPy numbers and parsed arguments."""
    import numpy as np

    scalar: Any = np.float64(0).__reduce__()[0]
    dtypes = [type(np.dtype(code)) for code in "?bBhHiIlLqQefd"]
    names = [(scalar, f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")]
    return [argparse.Namespace, np.dtype, *dtypes, *names]


def _fetch(source: str) -> Path:
    advice = "Download the file by hand and set MODEL.WEIGHTS to it, or to '' for random initialisation."
    try:
        if source.startswith("hub:"):
            from huggingface_hub import hf_hub_download

            user, name, *file = source.removeprefix("hub:").split("/", 2)
            return Path(hf_hub_download(f"{user}/{name}", *(file or ["model.safetensors"])))
        path = Path(path_manager.get_local_path(source))
    except ImportError as error:
        raise InvalidState(
            f"MODEL.WEIGHTS {source}: needs huggingface_hub; install the extra [hub]. {advice}"
        ) from error
    except OSError as error:
        raise InvalidState(f"MODEL.WEIGHTS {source}: the download failed ({error}). {advice}") from error
    if not path.is_file():
        raise MissingFile(f"MODEL.WEIGHTS {source}: there is no such file. Change MODEL.WEIGHTS, or '' for none.")
    return path


def _unwrap(content: Any, source: str) -> dict[str, Tensor]:
    """The state dict inside a checkpoint, without the prefixes of wrappers."""
    while isinstance(content, Mapping):
        inner = next((content[key] for key in _CONTAINERS if isinstance(content.get(key), Mapping)), None)
        if inner is None:
            break
        content = inner
    items = content.items() if isinstance(content, Mapping) else ()
    state = {key: value for key, value in items if isinstance(value, Tensor)}
    if not state:
        raise InvalidState(
            f"MODEL.WEIGHTS {source}: no tensors found; a state dict is needed, plain or under one of the keys "
            f"{', '.join(_CONTAINERS)}. Save it so."
        )
    for prefix in ("module.", "_orig_mod."):
        state = {key.removeprefix(prefix): value for key, value in state.items()}
    return state


def _canonical(state: dict[str, Tensor]) -> tuple[dict[str, Tensor], str]:
    """The tensors under the names of an `Encoder`, and the family that they come from."""
    family, rename = next((name, make(state)) for name, known, make in _FAMILIES if any(map(known, state)))
    named = {new: value for key, value in state.items() if (new := rename(key)) is not None}
    if "backbone.part_token1" in named:
        return _join_part_tokens(named), f"{family}, part tokens"
    return named, family


def _join_part_tokens(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """PASS keeps each token and its position apart; we keep all part tokens in one tensor, as the class token's row."""
    count = sum(bool(re.fullmatch(r"backbone\.part_token\d+", key)) for key in state)
    numbers = range(1, count + 1)
    joined = {
        "backbone.part_tokens": torch.cat([state.pop(f"backbone.part_token{i}") for i in numbers], dim=1),
        "backbone.part_pos": torch.cat([state.pop(f"backbone.part{i}_pos") for i in numbers], dim=1),
        "backbone.pos_embed": torch.cat([state.pop("backbone.cls_pos"), state.pop("backbone.pos_embed")], dim=1),
    }
    return {**state, **joined}


Rename = Callable[[str], str | None]


def _prefixes(table: Mapping[str, str]) -> Callable[[Mapping[str, Tensor]], Rename]:
    """A renaming by the first prefix that fits; tensors without one are none of ours."""

    def rename(key: str) -> str | None:
        return next((new + key.removeprefix(old) for old, new in table.items() if key.startswith(old)), None)

    return lambda state: rename


def _ours(state: Mapping[str, Tensor]) -> Rename:
    part = "teacher." if any(key.startswith("teacher.backbone.") for key in state) else "encoder."
    return _prefixes({part: ""})(state)


def _sequential(state: Mapping[str, Tensor]) -> Rename:
    """SpCL keeps a ResNet in a `Sequential`, MMT the same without ReLU; six layers have tensors, in this order."""
    places = sorted({int(key.split(".")[1]) for key in state if key.startswith("base.")})
    layers = ("conv1", "bn1", "layer1", "layer2", "layer3", "layer4")
    table = {f"base.{place}.": f"backbone.{layer}." for place, layer in zip(places, layers, strict=False)}
    head = {"feat_bn.": "head.embed.neck.", "feat.": "head.embed.project.", "gap.p": "head.pool.p"}
    return _prefixes({**table, **head})(state)


_OURS = {"backbone.": "backbone.", "head.": "head."}
_NECK = {"bottleneck.": "head.embed.neck."}  # of Bag of Tricks and TransReID
_FASTREID = {"backbone.": "backbone.", "heads.bottleneck.0.": "head.embed.neck.", "heads.pool_layer.p": "head.pool.p"}
_FAMILIES: list[tuple[str, Callable[[str], Any], Callable[[Mapping[str, Tensor]], Rename]]] = [
    ("fastreid_uns checkpoint", re.compile(r"(encoder|teacher)\.backbone\.").match, _ours),
    ("fastreid_uns", re.compile(r"head\.(embed|pool|part)").match, _prefixes(_OURS)),
    ("MoCo", re.compile(r"encoder_q\.").match, _prefixes({"encoder_q.": "backbone."})),
    ("fast-reid", re.compile(r"heads\.(bottleneck|pool_layer)\.").match, _prefixes(_FASTREID)),
    ("DINO", re.compile(r"backbone\.").match, _prefixes({"backbone.": "backbone."})),
    ("SpCL family trained with STEM_RELU false", re.compile(r"base\.3\.").match, _sequential),
    ("SpCL family", re.compile(r"base\.\d+\.").match, _sequential),
    ("Bag of Tricks", re.compile(r"base\.").match, _prefixes({**_NECK, "base.": "backbone."})),
    ("plain", re.compile("").match, _prefixes({**_NECK, "": "backbone."})),
]


def _canonical_name(name: str) -> str:
    return f"backbone.{name.removeprefix('backbone.net.')}" if name.startswith("backbone.net.") else name


def _match(
    state: Mapping[str, Tensor], targets: Mapping[str, str], found: Mapping[str, Tensor], grid: tuple[int, int] | None
) -> tuple[WeightReport, dict[str, Tensor]]:
    report = WeightReport("", "")
    chosen: dict[str, Tensor] = {}
    for name, target in targets.items():
        value = found.get(name)
        if value is None:
            if not name.endswith(_COUNTER):
                report.missing.append(name)
            continue
        want = state[target].shape
        if value.shape != want and grid is not None and name.endswith("pos_embed"):
            report.reshaped.append(f"{name} {tuple(value.shape)} to {tuple(want)}")
            value = _resize_positions(value, want[1] - grid[0] * grid[1], grid)
        elif value.numel() == want.numel() == 1:
            value = value.reshape(want)
        if value.shape != want:
            report.mismatched.append(f"{name} {tuple(value.shape)} for {tuple(want)}")
            continue
        chosen[target] = value
        if not name.endswith(_COUNTER):
            report.matched.append(name)
    for name in found.keys() - targets.keys():
        if name.removeprefix("backbone.").split(".")[0] not in _CLASSIFIERS and not name.endswith(_COUNTER):
            report.unexpected.append(name)
    report.unexpected.sort()
    return report, chosen


def _resize_positions(value: Tensor, extra: int, grid: tuple[int, int]) -> Tensor:
    """(1, extra+n, C) position embeddings for another grid of patches, bicubic; rows of the extra tokens stay."""
    tokens, patches = value[:, :extra], value[:, extra:]
    height, width = _guess_grid(patches.shape[1])
    square = patches.float().reshape(1, height, width, -1).permute(0, 3, 1, 2)
    resized = F.interpolate(square, size=grid, mode="bicubic", align_corners=False)
    return torch.cat([tokens.float(), resized.flatten(2).transpose(1, 2)], dim=1)


def _guess_grid(count: int) -> tuple[int, int]:
    """Lines and columns of `count` patches: square if that is possible, else 2:1, 3:1, else nearest to 2:1."""
    for ratio in (1, 2, 3):
        width = round((count / ratio) ** 0.5)
        if ratio * width * width == count:
            return ratio * width, width
    pairs = [(count // width, width) for width in range(1, int(count**0.5) + 1) if count % width == 0]
    return min(pairs, key=lambda pair: abs(pair[0] / pair[1] - 2))


def _is_backbone(name: str) -> bool:
    return name.startswith("backbone.")


def _some(names: list[str], count: int = 4) -> str:
    return "\n".join([*names[:count], *([f"and {len(names) - count} more"] if len(names) > count else [])])
