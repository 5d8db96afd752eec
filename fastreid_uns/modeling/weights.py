"""Weights of our own and of other projects into a model, with an account of every tensor."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from tabulate import tabulate
from torch import Tensor, nn

from fastreid_uns.errors import InvalidState
from fastreid_uns.modeling.backbones.base import Backbone
from fastreid_uns.modeling.weight_files import fetch, fetch_imagenet, read_file
from fastreid_uns.modeling.weight_names import (
    COUNTER,
    NamedWeights,
    below_prefixes,
    encoder_name,
    named_weights,
    open_weights,
    reason,
)

_log = logging.getLogger(__name__)


@dataclass
class WeightReport:
    """What became of each tensor.

    Every tensor of the model is in `matched`, `missing` or `mismatched`, by its name in an `Encoder`. Every tensor of
    the file is in `matched` or `mismatched` (by that name), `unexpected` or `passed_over` (by its name in the file).
    """

    source: str
    family: str
    matched: list[str] = field(default_factory=list)  # loaded, those of `reshaped` among them
    missing: list[str] = field(default_factory=list)  # of the model, not in the file
    unexpected: list[str] = field(default_factory=list)  # of the file, without a place in the model
    reshaped: list[str] = field(default_factory=list)  # position embeddings resized to the image size
    mismatched: list[str] = field(default_factory=list)  # same name, but another shape or kind, or NaN; not loaded
    passed_over: dict[str, str] = field(default_factory=dict)  # of the file, of no use to an encoder, and why

    @property
    def share(self) -> float:
        """Loaded tensors of the backbone, in 0..1; counters of batches, which old files lack, do not count."""
        loaded = sum(map(_counts, self.matched))
        absent = sum(_counts(name.split()[0]) for name in (*self.missing, *self.mismatched))
        return loaded / max(loaded + absent, 1)

    def __str__(self) -> str:
        names = ("matched", "missing", "unexpected", "reshaped", "mismatched")
        rows = [(name, len(getattr(self, name)), _some(getattr(self, name))) for name in names]
        for why in dict.fromkeys(self.passed_over.values()):
            held = [name for name, given in self.passed_over.items() if given == why]
            rows.append((f"passed over: {why}", len(held), _some(held)))
        title = f"{self.source} ({self.family}): {self.share:.1%} of the backbone"
        return f"{title}\n{tabulate(rows, headers=('tensors', 'count', 'names'), maxcolwidths=[40, None, None])}"


def load_weights(model: nn.Module, source: str, *, min_share: float = 0.9, head: bool = True) -> WeightReport:
    """Load weights of our own or of another project into a model, in place, and say what became of each tensor.

    Known by their names: torchvision, timm, IBN-Net and Torchreid (plain), EfficientNets whose blocks are counted
    through, MoCo (LUPerson), DINO (TransReID-SSL, PASS), CLIP, fast-reid, the SpCL and Cluster Contrast family, Bag of
    Tricks and TransReID, and our own checkpoints, of which the encoder for evaluation is taken. What DataParallel,
    torch.compile or Lightning put before the names is taken off, and so is any other prefix below which the backbone is
    found; of a teacher and a student, or a network and its average, the former counts. Position embeddings are resized;
    classifiers are passed over. Files are read as tensors and plain values only: code in them is refused. Load before
    `domain_batch_norm`.

    Args:
        model: an `Encoder`, or any other module, which is then taken for a backbone.
        source: file or URL (safetensors or a torch file), `hub:user/name`, or `imagenet` for the weights that an
            installed package carries or the backbone's library publishes.
        min_share: share of the backbone's tensors that must be loaded, in 0..1; the log names those that are absent.
        head: load the tensors of the head as well, where the file has them.

    Raises:
        MissingFile: no such file.
        MissingPackage: `imagenet` cannot be downloaded, and a package that has it is not installed.
        InvalidState: the download fails, the file is refused or broken, less than `min_share` is in it, or a tensor
            has another shape than in the model; the model is then unchanged.
    """
    whole = hasattr(model, "backbone")
    backbone: Any = model.backbone if whole else model
    published = source == "imagenet"
    file, source = fetch_imagenet(backbone) if published else (fetch(source), source)
    state, others, recorded = open_weights(read_file(file), source)
    names = set(state)
    if published:
        state, recorded = backbone.adapt(state), recorded or backbone.published_grid
    targets = {encoder_name(name if whole else f"backbone.{name}"): name for name in model.state_dict()}
    positions = getattr(backbone, "positions", None)
    fit = partial(positions.fit, recorded=recorded) if positions is not None else None
    match = partial(_match, model.state_dict(), targets, fit=fit, head=head)
    found = named_weights(state)
    report, chosen = match(found)
    if report.share < min_share:
        least = max(1, int(min_share * sum(map(_counts, targets))))
        for below in below_prefixes(state, least):
            candidate = match(below)
            if candidate[0].share > report.share:
                found, (report, chosen) = below, candidate
    report.source = source
    report.passed_over |= {f"{name} (whole)": "another part of the file" for name in others}
    report.passed_over |= {name: "renamed or dropped by the backbone's library" for name in sorted(names - set(state))}
    _check(report, min_share, backbone, found)
    model.load_state_dict(chosen, strict=False)
    _log.info("%s", report)
    absent = [name for name in report.missing if _counts(name)]
    if absent:
        message = "MODEL.WEIGHTS %s: %d tensors of the backbone are not in the file and keep their random values: %s."
        _log.warning(message, source, len(absent), ", ".join(_some(absent).splitlines()))
    if other := _other_options(backbone, found):
        _log.warning("MODEL.WEIGHTS %s:%s What both have was loaded.", source, other)
    return report


def _check(report: WeightReport, min_share: float, backbone: Any, found: NamedWeights) -> None:
    """Refuse what would leave a part of the network random although the file has something of its name."""
    where = f"MODEL.WEIGHTS {report.source}"
    broken = [name for name in report.mismatched if name.endswith(("values", "quantised"))]
    if broken:
        raise InvalidState(
            f"{where}: {len(broken):,} of its tensors cannot be used, such as {broken[0]}; finite numbers are needed. "
            f"Take an earlier file of that training, or convert it where it was made."
        )
    wrong = [name for name in report.mismatched if name.startswith("backbone.")]
    head = [name for name in report.mismatched if not name.startswith("backbone.")]
    if report.share < min_share or wrong:
        what = f"{report.share:.1%} of the backbone's tensors are in the file; at least {min_share:.0%} are needed"
        if report.share >= min_share:
            what = f"{len(wrong)} tensors of the backbone have another shape in the file, such as {wrong[0]}"
        raise InvalidState(
            f"{where}: {what}.{_other_options(backbone, found)} Set MODEL.BACKBONE to the network that the weights "
            f"were made for, or MODEL.WEIGHTS to weights of {type(backbone).__name__}.\n{report}"
        )
    if head:
        raise InvalidState(
            f"{where}: {len(head)} tensors of the head have another shape in the file, such as {head[0]}. Set "
            f"MODEL.HEAD to that of the file, or MODEL.WEIGHTS_HEAD to false, and the head starts anew.\n{report}"
        )


def _other_options(backbone: Any, found: NamedWeights) -> str:
    """A sentence on the options that differ, as far as the shapes of the tensors tell them."""
    if not isinstance(backbone, Backbone):
        return ""
    file = {name.removeprefix("backbone."): value for name, value in found.tensors.items()}
    theirs, ours = backbone.options_of(file), backbone.options_of(backbone.state_dict())
    differing = [
        f"{key} {theirs[key]} instead of {ours[key]}" for key in ours if theirs.get(key, ours[key]) != ours[key]
    ]
    return f" By its tensors the file is of a network with {', '.join(differing)}." if differing else ""


def _without_head(found: NamedWeights) -> list[str]:
    """Take the tensors of a head out; gives their names in the file."""
    names = [name for name in found.tensors if name.startswith("head.")]
    for name in names:
        del found.tensors[name]
    return [old for name in names for old in found.origin.pop(name)]


def _match(
    state: Mapping[str, Tensor],
    targets: Mapping[str, str],
    found: NamedWeights,
    fit: Callable[..., Tensor] | None,
    head: bool,
) -> tuple[WeightReport, dict[str, Tensor]]:
    if not any(".domains." in name for name in targets):
        found.tensors = {name.replace(".domains.0.", "."): value for name, value in found.tensors.items()}
        found.origin = {name.replace(".domains.0.", "."): value for name, value in found.origin.items()}
    report = WeightReport("", found.family)
    if not head:
        report.passed_over = dict.fromkeys(_without_head(found), "of the head; MODEL.WEIGHTS_HEAD is false")
    chosen: dict[str, Tensor] = {}
    for name, target in targets.items():
        value = found.tensors.get(name)
        if value is None:
            report.missing.append(name)
            continue
        want = state[target].shape
        if flaw := _flaw_of(value, state[target]):
            report.mismatched.append(f"{name} {flaw}")
            continue
        if fit is not None and name == "backbone.pos_embed" and value.dim() == 3:
            fitted = fit(value, want[1])
            if fitted is not value:
                report.reshaped.append(f"{name} {tuple(value.shape)} to {tuple(want)}")
            value = fitted
        elif (value.shape[: len(want)] == want and value.numel() == want.numel()) or value.numel() == want.numel() == 1:
            value = value.reshape(want)  # a 1x1 convolution is a linear layer
        if value.shape != want:
            report.mismatched.append(f"{name} {tuple(value.shape)} for {tuple(want)}")
            continue
        chosen[target] = value
        report.matched.append(name)
    nameless = [old for name, olds in found.origin.items() if name not in targets for old in olds]
    left = set(found.left)
    for old in sorted([*nameless, *found.left]):
        why = reason(old, left=old in left)
        if why is None:
            report.unexpected.append(old)
        else:
            report.passed_over[old] = why
    return report, chosen


def _flaw_of(value: Tensor, model: Tensor) -> str:
    """Why a tensor of a file cannot become that of a model, whatever its shape; empty if it can."""
    if value.device.type == "meta":
        return "without values"
    if value.layout != torch.strided or value.is_quantized:
        return "sparse or quantised"
    if value.is_floating_point() != model.is_floating_point():
        return f"{value.dtype} for {model.dtype}"
    return "with NaN or infinite values" if value.is_floating_point() and not value.isfinite().all() else ""


def _counts(name: str) -> bool:
    return name.startswith("backbone.") and not name.endswith(COUNTER)


def _some(names: list[str], count: int = 4) -> str:
    return "\n".join([*names[:count], *([f"and {len(names) - count} more"] if len(names) > count else [])])
