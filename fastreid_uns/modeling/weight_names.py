"""Names of tensors in the files of other projects, and what they are called in an `Encoder`."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fastreid_uns.errors import InvalidState
from fastreid_uns.modeling.positions import Grid, recorded_grid

COUNTER = "num_batches_tracked"  # absent from old files, and without effect on the features
_CONTAINERS = ("model", "state_dict", "model_state_dict", "teacher", "student", "net", "network", "weights", "params")
_WRAPPERS = ("module.", "_orig_mod.", "model.", "net.", "network.")  # of DataParallel, torch.compile, Lightning, ours
_CLASSIFIER = r"((backbone|base|encoder_q)\.)?(fc|classifier(_proj)?|head(?!\.(embed|pool|part_|projected))|_fc)\."
_TEXT = (
    r"transformer\.resblocks|token_embedding|positional_embedding|ln_final|text\w*|logit_(scale|bias)|prompt_learner"
)
_PASSED_OVER = {  # what is of no use to an encoder, by the beginning of its name, and why
    _CLASSIFIER: "classifier, or linear layer before one; MODEL.HEAD replaces it",
    r"heads\.(weight|classifier|cls_layer)": "classifier; MODEL.HEAD replaces it",
    r"encoder_k\.|queue": "momentum branch of the pre-training",
    r"pixel_(mean|std)": "normalisation of the pixels; INPUT.MEAN and INPUT.STD give it",
    r"(encoder|teacher)\.(backbone|head)\.": "the other one of encoder and momentum encoder",
    r"(memory|losses)\.": "of the training, not of the encoder",
    r"(visual\.|image_encoder\.)?proj$": "projection into the space of texts, which this head has not",
}
_LEFT_OVER = {rf"({_TEXT})(\.|$)": "of the text branch"}  # an image encoder alone has the same names

Rename = Callable[[str], str | None]
State = Mapping[str, Tensor]


@dataclass
class NamedWeights:
    """The tensors of a file under the names of an `Encoder`; every name of the file is in `origin` or `left`."""

    family: str
    tensors: dict[str, Tensor] = field(default_factory=dict)
    origin: dict[str, list[str]] = field(default_factory=dict)  # name in the encoder → names in the file
    left: list[str] = field(default_factory=list)  # names in the file that no part of an encoder has


def open_weights(content: Any, source: str) -> tuple[dict[str, Tensor], list[str], Grid | None]:
    """The state dict inside a checkpoint, the other parts of it that hold tensors, and the grid that it records.

    Raises:
        InvalidState: there are no tensors.
    """
    config = content.get("config") if isinstance(content, Mapping) else None
    others: list[str] = []
    while isinstance(content, Mapping):
        key = next((key for key in _CONTAINERS if isinstance(content.get(key), Mapping)), None)
        if key is None:
            break
        others += [str(name) for name, value in content.items() if name != key and _holds_tensors(value)]
        content = content[key]
    items = content.items() if isinstance(content, Mapping) else ()
    state = {str(name): value for name, value in items if isinstance(value, Tensor)} or _flat(content)
    if not state:
        raise InvalidState(
            f"MODEL.WEIGHTS {source}: no tensors found; a state dict is needed, plain or under one of the keys "
            f"{', '.join(_CONTAINERS)}. Save it so."
        )
    return state, others, recorded_grid(content, config)


def named_weights(state: State) -> NamedWeights:
    """The tensors of a state dict under the names of an `Encoder`, by the family that their names tell.

    Raises:
        InvalidState: part tokens of which some tensors are absent.
    """
    plain = {without_wrappers(name): name for name in reversed(list(state))}  # of two equal names the first one counts
    bare = {short: state[name] for short, name in reversed(plain.items())}
    family, rename = next((name, make(bare)) for name, known, make in _FAMILIES if any(map(known, bare)))
    named = NamedWeights(family)
    named.left = sorted(state.keys() - set(plain.values()))
    for short, value in bare.items():
        new = rename(short)
        if new is None:
            named.left.append(plain[short])
        else:
            new = encoder_name(new)
            named.tensors[new] = value
            named.origin[new] = [plain[short]]
    if family == _CLIP:
        _shape_as_timm(named)
    if "backbone.part_token1" in named.tensors:
        _join_part_tokens(named)
    return named


def without_wrappers(name: str) -> str:
    """A name without what DataParallel, torch.compile, Lightning and the like put before it, in any order."""
    while wrapper := next((wrapper for wrapper in _WRAPPERS if name.startswith(wrapper)), None):
        name = name.removeprefix(wrapper)
    return name


def encoder_name(name: str) -> str:
    """The name under which a tensor of an `Encoder` is compared: that of the network itself, without its wrappers."""
    return f"backbone.{without_wrappers(name.removeprefix('backbone.'))}" if name.startswith("backbone.") else name


def reason(name: str, *, left: bool) -> str | None:
    """Why a tensor of a file, by its own name, is of no use to an encoder; None where it should have been of use.

    Args:
        left: no part of any encoder has the name.
    """
    short = without_wrappers(name)
    if name.endswith(COUNTER):
        return "counter of batches, without effect"
    known = {**_PASSED_OVER, **(_LEFT_OVER if left else {})}
    return next((why for pattern, why in known.items() if re.match(pattern, short)), None)


def below_prefixes(state: State, least: int) -> list[NamedWeights]:
    """What a state dict holds below each prefix that nobody knows, such as `visual.` or `params_ema.trunk.`.

    Args:
        state: of any project.
        least: tensors that a prefix must have.

    Returns:
        Those that ought to win over equals come first: teachers and averages, then short prefixes.
    """
    counts = Counter(name[: dot.end()] for name in state for dot in re.finditer(r"\.", name))
    prefixes = [prefix for prefix, count in counts.items() if count >= least]
    averaged = re.compile(r"teacher|ema(?![a-z])")
    found = []
    for prefix in sorted(prefixes, key=lambda prefix: (averaged.search(prefix) is None, prefix.count("."))):
        named = named_weights({name.removeprefix(prefix): v for name, v in state.items() if name.startswith(prefix)})
        named.family = f"{named.family}, below {prefix}"
        named.left = [prefix + name for name in named.left]
        named.left += [name for name in state if not name.startswith(prefix)]
        named.origin = {new: [prefix + name for name in old] for new, old in named.origin.items()}
        found.append(named)
    return found


def _flat(content: Any, where: str = "") -> dict[str, Tensor]:
    """The tensors in nested maps, their names joined by dots."""
    found: dict[str, Tensor] = {}
    for name, value in content.items() if isinstance(content, Mapping) else ():
        if isinstance(value, Tensor):
            found[f"{where}{name}"] = value
        else:
            found |= _flat(value, f"{where}{name}.")
    return found


def _holds_tensors(value: Any) -> bool:
    if isinstance(value, Mapping):
        return any(map(_holds_tensors, value.values()))
    return isinstance(value, Tensor)


def _join_part_tokens(named: NamedWeights) -> None:
    """PASS keeps each token and its position apart; we keep all part tokens in one tensor, as the class token's row."""
    named.family += ", part tokens"
    count = sum(bool(re.fullmatch(r"backbone\.part_token\d+", key)) for key in named.tensors)
    numbers = range(1, count + 1)
    wholes = {
        "part_tokens": [f"part_token{i}" for i in numbers],
        "part_pos": [f"part{i}_pos" for i in numbers],
        "pos_embed": ["cls_pos", "pos_embed"],
    }
    absent = [part for parts in wholes.values() for part in parts if f"backbone.{part}" not in named.tensors]
    if absent:
        raise InvalidState(
            f"MODEL.WEIGHTS: the file has part_token1 but no {', '.join(absent)}; part tokens are accepted with a "
            f"position each (part1_pos, ...), beside cls_pos and pos_embed. Take the file as its authors publish it."
        )
    for whole, parts in wholes.items():
        names = [f"backbone.{part}" for part in parts]
        joined = torch.cat([named.tensors.pop(name) for name in names], dim=1)
        named.origin[f"backbone.{whole}"] = [old for name in names for old in named.origin.pop(name)]
        named.tensors[f"backbone.{whole}"] = joined


def _shape_as_timm(named: NamedWeights) -> None:
    """CLIP's own files keep class token and positions without a leading dimension, and the projection transposed."""
    for name, dims in (("backbone.cls_token", 1), ("backbone.pos_embed", 2)):
        value = named.tensors.get(name)
        if value is not None and value.dim() == dims:
            named.tensors[name] = value.reshape(1, -1, value.shape[-1])
    projection = named.tensors.get(_PROJECTION)
    if projection is not None and projection.dim() == 2:
        named.tensors[_PROJECTION] = projection.T


def _prefixes(table: Mapping[str, str]) -> Callable[[State], Rename]:
    """A renaming by the first prefix that fits; tensors without one are none of ours."""

    def rename(key: str) -> str | None:
        return next((new + key.removeprefix(old) for old, new in table.items() if key.startswith(old)), None)

    return lambda state: rename


def _ours(state: State) -> Rename:
    part = "teacher." if any(key.startswith("teacher.backbone.") for key in state) else "encoder."
    return _prefixes({part: ""})(state)


def _sequential(state: State) -> Rename:
    """SpCL keeps a ResNet in a `Sequential`, MMT the same without ReLU; six layers have tensors, in this order."""
    places = sorted({int(key.split(".")[1]) for key in state if key.startswith("base.")})
    layers = ("conv1", "bn1", "layer1", "layer2", "layer3", "layer4")
    table = {f"base.{place}.": f"backbone.{layer}." for place, layer in zip(places, layers, strict=False)}
    head = {"feat_bn.": "head.embed.neck.", "feat.": "head.embed.project.", "gap.p": "head.pool.p"}
    return _prefixes({**table, **head})(state)


def _fastreid(state: State) -> Rename:
    """The neck is `bnneck` in old versions; a 1x1 convolution may come before it in `bottleneck`."""
    first = state.get("heads.bottleneck.0.weight")
    layers = ("neck",) if first is None or first.dim() == 1 else ("project", "neck")
    table = {f"heads.bottleneck.{i}.": f"head.embed.{layer}." for i, layer in enumerate(layers)}
    fixed = {"backbone.": "backbone.", "heads.bnneck.": "head.embed.neck.", "heads.pool_layer.p": "head.pool.p"}
    return _prefixes({**fixed, **table})(state)


_EFFICIENTNET = {"_conv_stem": "conv_stem", "_bn0": "bn1", "_conv_head": "conv_head", "_bn1": "bn2"}
_EXPANDING = {
    "_expand_conv": "conv_pw",
    "_bn0": "bn1",
    "_depthwise_conv": "conv_dw",
    "_bn1": "bn2",
    "_project_conv": "conv_pwl",
    "_bn2": "bn3",
}
_NOT_EXPANDING = {"_depthwise_conv": "conv_dw", "_bn1": "bn1", "_project_conv": "conv_pw", "_bn2": "bn2"}
_SQUEEZE = {"_se_reduce": "se.conv_reduce", "_se_expand": "se.conv_expand"}


def _efficientnet(state: State) -> Rename:
    """The blocks are counted through; timm counts them within a stage, which is a run of blocks of one width."""
    table = {f"{old}.": f"backbone.{new}." for old, new in _EFFICIENTNET.items()}
    stage, block, width = -1, 0, 0
    numbers = {int(found[1]) for key in state if (found := re.match(r"_blocks\.(\d+)\._project_conv\.weight", key))}
    for number in sorted(numbers):
        outputs = len(state[f"_blocks.{number}._project_conv.weight"])
        stage, block = (stage, block + 1) if outputs == width else (stage + 1, 0)
        width = outputs
        layers = _EXPANDING if f"_blocks.{number}._expand_conv.weight" in state else _NOT_EXPANDING
        for old, new in (layers | _SQUEEZE).items():
            table[f"_blocks.{number}.{old}."] = f"backbone.blocks.{stage}.{block}.{new}."
    return _prefixes(table)(state)


def _transreid(body: str) -> Callable[[State], Rename]:
    """Bag of Tricks, TransReID, and PASS, whose part tokens may have a neck each: numbered by their place."""

    def make(state: State) -> Rename:
        numbered = "bottleneck_pt" if "bottleneck_pt1.weight" in state else "bottleneck_"
        parts = range(3 if f"{body}part_token1" in state else 0)
        necks = {f"{numbered}{i + 1}.": f"head.part_embed.{i}.neck." for i in parts}
        return _prefixes({"bottleneck.": "head.embed.neck.", **necks, body: "backbone."})(state)

    return make


_CLIP = "CLIP"
_PROJECTION = "head.projected.project.weight"  # of a head that has the class token and its projection side by side
_CLIP_NECKS = {"bottleneck.": "head.embed.neck.", "bottleneck_proj.": "head.projected.neck."}  # of PCL-CLIP
_CLIP_NAMES = {
    "class_embedding": "backbone.cls_token",
    "positional_embedding": "backbone.pos_embed",
    "conv1.": "backbone.patch_embed.proj.",
    "ln_pre.": "backbone.norm_pre.",
    "ln_post.": "backbone.norm.",
    "proj": _PROJECTION,
}
_CLIP_BLOCK = {
    "ln_1.": "norm1.",
    "ln_2.": "norm2.",
    "attn.in_proj_": "attn.qkv.",
    "attn.out_proj.": "attn.proj.",
    "mlp.c_fc.": "mlp.fc1.",
    "mlp.c_proj.": "mlp.fc2.",
}


def _clip(state: State) -> Rename:
    """The image encoder of OpenAI or open_clip: in a whole CLIP (`visual.`), PCL-CLIP (`image_encoder.`) or alone."""
    branch = next((part for part in ("visual.", "image_encoder.") if any(key.startswith(part) for key in state)), "")
    numbers = {found[1] for key in state if (found := re.match(rf"{branch}transformer\.resblocks\.(\d+)\.", key))}
    table = {f"{branch}{old}": new for old, new in _CLIP_NAMES.items()}
    for number in numbers:
        old, new = f"{branch}transformer.resblocks.{number}.", f"backbone.blocks.{number}."
        table |= {f"{old}{name}": f"{new}{timm}" for name, timm in _CLIP_BLOCK.items()}
    return _prefixes({**_CLIP_NECKS, **table})(state)


def _clip_of_timm(state: State) -> Rename:
    return _prefixes({**_CLIP_NECKS, "head.weight": _PROJECTION, "": "backbone."})(state)


_OURS = {"backbone.": "backbone.", "head.": "head."}
_FAMILIES: list[tuple[str, Callable[[str], Any], Callable[[State], Rename]]] = [
    ("fastreid_uns checkpoint", re.compile(r"(encoder|teacher)\.backbone\.").match, _ours),
    ("fastreid_uns", re.compile(r"head\.(embed|pool|part)").match, _prefixes(_OURS)),
    (_CLIP, re.compile(r"((visual|image_encoder)\.)?(class_embedding$|transformer\.resblocks\.)").match, _clip),
    ("CLIP of timm", re.compile(r"norm_pre\.").match, _clip_of_timm),
    ("MoCo", re.compile(r"encoder_q\.").match, _prefixes({"encoder_q.": "backbone."})),
    ("fast-reid", re.compile(r"heads\.(bottleneck|bnneck|pool_layer)\.").match, _fastreid),
    ("DINO", re.compile(r"backbone\.").match, _prefixes({"backbone.": "backbone."})),
    ("SpCL family trained with STEM_RELU false", re.compile(r"base\.3\.").match, _sequential),
    ("SpCL family", re.compile(r"base\.\d+\.").match, _sequential),
    ("Bag of Tricks", re.compile(r"base\.").match, _transreid("base.")),
    ("EfficientNet", re.compile(r"_blocks\.\d+\.").match, _efficientnet),
    ("plain", re.compile("").match, _transreid("")),
]
