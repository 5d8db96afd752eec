"""Position embeddings of one grid of patches for another grid."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
import yaml
from torch import Tensor

from fastreid_uns.errors import InvalidValue

Grid = tuple[int, int]  # lines and columns of patches

RESIZES: dict[str, dict[str, Any]] = {
    "bicubic": {"mode": "bicubic", "align_corners": False},  # DINO
    "bilinear": {"mode": "bilinear", "align_corners": False},  # TransReID, TransReID-SSL, PASS, PCL-CLIP
    "antialiased": {"mode": "bicubic", "align_corners": False, "antialias": True},  # timm
}
_STRUCTURED = 0.7  # roughness below which neighbours are alike; 1 for numbers without order
_MARGIN = 1.2  # by which the second best grid must be rougher
_log = logging.getLogger(__name__)


@dataclass
class Positions:
    """How the position embedding of a backbone is filled from a file.

    Args:
        grid: of the backbone.
        pretrained: of the file, where the user states it; () otherwise.
        resize: a name of `RESIZES`.

    Raises:
        InvalidValue: `pretrained` is no pair of positive numbers, or `resize` is unknown.
    """

    grid: Grid
    pretrained: Sequence[int] = ()
    resize: str = "bicubic"

    def __post_init__(self) -> None:
        if self.resize not in RESIZES:
            raise InvalidValue(
                f"MODEL.BACKBONE.POSITION_RESIZE: {self.resize!r} is unknown; accepted: {', '.join(RESIZES)}."
            )
        if len(self.pretrained) not in (0, 2) or any(not isinstance(side, int) or side < 1 for side in self.pretrained):
            raise InvalidValue(
                f"MODEL.BACKBONE.PRETRAINED_GRID is {list(self.pretrained)}; [] or lines and columns of patches are "
                f"accepted, such as [16, 8] for 256x128 pixels in patches of 16. Change it."
            )

    def fit(self, value: Tensor, rows: int, recorded: Grid | None = None) -> Tensor:
        """Position embeddings of a file for this grid.

        The grid of the file is the stated one, else the recorded one, else the one in which neighbours are clearly
        alike, else the square one. Where nothing tells and the count is right, the embedding is taken as it is.

        Args:
            value: (1,extra+n,C); the first rows are of tokens that are no patches, and stay as they are.
            rows: extra+h*w, of the backbone.
            recorded: what the file says about its grid.

        Returns:
            (1,extra+h*w,C), float32 where it was resized, else `value` itself.

        Raises:
            InvalidValue: the grid of the file cannot be told, or the stated one is not that of the file.
        """
        extra = rows - math.prod(self.grid)
        tokens, patches = value[:, :extra], value[:, extra:]
        count = patches.shape[1]
        source = self._stated(count) or _fitting(recorded, count) or measured_grid(patches[0]) or _square(count)
        if source == self.grid or (source is None and count == math.prod(self.grid)):
            return value
        if source is None:
            raise InvalidValue(
                f"MODEL.WEIGHTS: its position embedding has {count} patches in an unknown grid; of "
                f"{_several(count)} any is possible. Set MODEL.BACKBONE.PRETRAINED_GRID to the right one, which is the "
                f"size of the images of the pre-training divided by the stride of the patches."
            )
        image = patches.float().reshape(1, *source, -1).permute(0, 3, 1, 2)
        resized = F.interpolate(image, size=self.grid, **RESIZES[self.resize])
        _log.info("Position embedding resized from %dx%d to %dx%d patches (%s).", *source, *self.grid, self.resize)
        return torch.cat([tokens.float(), resized.flatten(2).transpose(1, 2)], dim=1)

    def _stated(self, count: int) -> Grid | None:
        if not self.pretrained:
            return None
        height, width = self.pretrained
        if height * width != count:
            raise InvalidValue(
                f"MODEL.BACKBONE.PRETRAINED_GRID is {height}x{width}, but the position embedding of MODEL.WEIGHTS has "
                f"{count} patches, such as {_several(count)}. Change it, or set it to []."
            )
        return height, width


def measured_grid(patches: Tensor) -> Grid | None:
    """The grid in which neighbours are most alike; None where no grid is clearly better than all others.

    Trained embeddings of neighbouring patches are alike. In a wrong grid, patches that are far apart become neighbours.

    Args:
        patches: (n,C), line by line.
    """
    count = len(patches)
    centred = patches.double() - patches.double().mean(0)
    variance = float(centred.square().mean())
    grids = [grid for grid in _grids(count) if min(grid) > 1]
    if not grids or variance == 0:
        return None
    roughness = sorted((_difference(centred.reshape(*grid, -1)) / (2 * variance), grid) for grid in grids)
    best, second = roughness[0][0], roughness[1][0] if len(roughness) > 1 else math.inf
    return roughness[0][1] if best < _STRUCTURED and second > _MARGIN * best else None


def record_grid(module: Any, state: Any, prefix: str, metadata: dict[str, Any]) -> None:
    """A hook for `register_state_dict_post_hook`: writes the grid of a backbone beside its tensors."""
    if module.grid is not None:
        metadata["grid"] = list(module.grid)


def recorded_grid(state: Mapping[str, Any], config: Any = None) -> Grid | None:
    """What `record_grid` wrote beside the tensors of a state dict, else what the config of a checkpoint says.

    Args:
        state: as it came from the file.
        config: YAML text of our config, if the file has one.

    Returns:
        None for files of others.
    """
    entries = [entry for entry in getattr(state, "_metadata", {}).values() if isinstance(entry, Mapping)]
    grid = next((entry["grid"] for entry in entries if "grid" in entry), None)
    if grid is None and isinstance(config, str):
        content = yaml.safe_load(config)
        backbone = content["MODEL"]["BACKBONE"]
        if "PATCH" in backbone:
            grid = [(side - backbone["PATCH"]) // backbone["STRIDE"] + 1 for side in content["INPUT"]["SIZE"]]
    return None if grid is None else (int(grid[0]), int(grid[1]))


def _difference(image: Tensor) -> float:
    """Mean squared difference of neighbours, lines and columns weighing the same, of an image (h,w,C)."""
    down = (image[1:] - image[:-1]).square().mean()
    right = (image[:, 1:] - image[:, :-1]).square().mean()
    return float(down + right) / 2


def _fitting(grid: Grid | None, count: int) -> Grid | None:
    return grid if grid is not None and math.prod(grid) == count else None


def _square(count: int) -> Grid | None:
    side = math.isqrt(count)
    return (side, side) if side * side == count else None


def _grids(count: int) -> list[Grid]:
    return [(count // width, width) for width in range(1, count + 1) if count % width == 0]


def _several(count: int) -> str:
    """The grids of so many patches that are nearest to a square."""
    near = sorted(_grids(count), key=lambda grid: (abs(math.log(grid[0] / grid[1])), -grid[0]))
    return ", ".join(f"{height}x{width}" for height, width in near[:6])
